"""Models with random weights that run as a flavour of step_cases.py says, through the parts that sessions are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.step_cases import Flavour
from dvdquant.deploy.sessions.attention import MASK, AttentionState, install_attention
from dvdquant.deploy.sessions.compiled import compile_blocks
from dvdquant.deploy.sessions.fusion_check import why_not_fused
from dvdquant.deploy.sessions.pytorch import wanted_attention
from dvdquant.deploy.sessions.replay import GraphReplay, why_not
from dvdquant.deploy.timing.original import fill_parameters
from dvdquant.errors import UnsupportedError
from dvdquant.model.layers import QuantLinear
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import ModelPlan, build_skeleton, quantized_skeleton
from dvdquant.model.quantized_model import kernel_layers, make_weights, prepare_layers
from dvdquant.ops.attention.ladder import Attention
from dvdquant.ops.cuda_linear import usable_kernels

__all__ = ["StepModel", "build"]


@dataclass
class StepModel:
    """A model that runs as a flavour says.

    Args:
        model: The transformer, which takes the graph's inputs.
        attention: Its 8-bit attention, or None.
        state: What its attention layers share; None leaves padded words and their mask as diffusers has them.
        graphs: What captures and repeats its steps, or None.
    """

    model: GraphWrapper
    attention: Attention | None = None
    state: AttentionState | None = None
    graphs: GraphReplay | None = None

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Run a step as a session does: padded words are cut off first, where that is wanted.

        Args:
            inputs: The graph's inputs by name.

        Raises:
            UnsupportedError: The step could not be captured as a CUDA graph.
        """
        if self.state is not None:
            inputs = self.state.cut(inputs)
        if self.graphs is None:
            output: Tensor = self.model(inputs)
            return output
        output = self.graphs(inputs, self.state is not None and self.state.whole)
        if self.graphs.failed is not None:
            raise UnsupportedError(
                f"the step is not captured as a CUDA graph: {self.graphs.failed}", fix="measure it without graphs"
            )
        return output

    def words(self, inputs: dict[str, Tensor]) -> str:
        """Return what computed the self-attention of the last step.

        Args:
            inputs: The inputs of the step.
        """
        mask = MASK in inputs and (self.state is None or not self.state.whole)
        words = "16 bit" if self.attention is None else self.attention.words()
        return words + ", with a mask" * mask


def fill(model: nn.Module, device: torch.device, home: torch.device) -> nn.Module:
    """Put random parameters and packed weights into a model, of sizes that keep activations near 1.

    Args:
        model: The skeleton, which is changed in place and returned.
        device: Where the numbers are drawn: billions of them take a GPU no time, and one core of a CPU many seconds.
        home: The device of the tensors.
    """
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            for name, (dtype, shape) in module.spec.tensors().items():
                value = _random(name, dtype, shape, module, device).to(home)
                setattr(module, name.removeprefix(module.spec.name + "."), value)
    fill_parameters(model, device)
    return model.to(home).eval()


def _random(name: str, dtype: torch.dtype, shape: tuple[int, ...], layer: QuantLinear, device: torch.device) -> Tensor:
    """Return a random packed tensor of a layer.

    Args:
        name: The full name of the tensor.
        dtype: Its dtype.
        shape: Its shape.
        layer: The layer.
        device: Its device.
    """
    kind = name.rpartition(".")[2]
    if kind == "weight":
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    if kind == "weight_group_scale":
        return torch.full(shape, 255, dtype=dtype, device=device)
    if kind == "weight_zero":
        return torch.full(shape, -0.5, dtype=dtype, device=device)
    if kind == "weight_scale":
        return torch.full(shape, 0.2 * layer.spec.features**-0.5, dtype=dtype, device=device)
    if kind == "pre_quant_scale":
        return torch.randint(0, 2, shape, device=device).mul_(2).sub_(1).to(dtype)
    if kind == "pre_quant_shift":
        return torch.randn(shape, dtype=dtype, device=device).mul_(0.1)
    return torch.zeros(shape, dtype=dtype, device=device)


def build(plan: ModelPlan, flavour: Flavour, device: torch.device, inputs: dict[str, Tensor], tokens: int) -> StepModel:
    """Return a model with random weights that runs as the flavour says.

    Args:
        plan: The plan of the model.
        flavour: What runs.
        device: The device.
        inputs: The inputs of a step, by name.
        tokens: The tokens of a step, of all samples.

    Raises:
        UnsupportedError: The attention, the kernels, the mask or the capture is not possible here.
    """
    # 1. Refuse what would run as another flavour does.
    quantized = flavour.bits != 16
    kernels = usable_kernels(device) if quantized else None
    if kernels is None and flavour.weights == "packed":
        raise UnsupportedError("packed weights are a form of the kernels", fix="a GPU that they are built for")
    if flavour.fused and (why := why_not_fused(kernels, device, plan.dtype)):
        raise UnsupportedError(f"nothing is fused: {why}", fix="a GPU that the kernels are built for")
    if flavour.masked and MASK not in inputs:
        raise UnsupportedError("the model takes no mask over its words", fix="measure a model that does")
    if flavour.graphs and (why := why_not(device, False, tokens)):
        raise UnsupportedError(f"steps are not captured as CUDA graphs: {why}", fix="measure a shorter step on a GPU")
    backend = flavour.library
    if backend is None and flavour.attention != "16" and device.type == "cpu":
        backend = "reference"
    attention = wanted_attention(flavour.attention, backend, device, flavour.name)
    # 2. Load. The packed weights stay on the CPU, as in a session.
    skeleton = (
        quantized_skeleton(plan, flavour.bits) if quantized else build_skeleton(plan.family.config, torch.bfloat16)
    )
    model = fill(skeleton, device, device if kernels is None else torch.device("cpu"))
    if kernels is not None:
        prepare_layers(model, kernels, [plan.recipe.activation(flavour.bits)], plan.dtype, device, flavour.weights)
        make_weights(model)
        if flavour.fused and (why := why_not_fused(kernels, device, plan.dtype, kernel_layers(model))):
            raise UnsupportedError(f"nothing is fused: {why}", fix="a GPU that the kernels are right on")
    model = model.to(device)
    # 3. Attention, fused and compiled blocks, CUDA graphs.
    state = None
    if attention is not None or (MASK in inputs and not flavour.masked):
        state = install_attention(model, attention)
    if flavour.compiled or flavour.fused:
        compile_blocks(model, dynamic=False, fuse=flavour.fused, compile=flavour.compiled)
    wrapper = GraphWrapper(model, plan.family)
    graphs = GraphReplay(wrapper, flavour.name, device) if flavour.graphs else None
    return StepModel(wrapper, attention, state, graphs)
