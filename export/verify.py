"""Check an exported graph: ONNX Runtime against the quantized PyTorch model, with float64 as the judge.

4-bit activations are chaotic at rounding ties: a difference in the last bit of x̃ flips a code, and the flip moves every
later layer. So the question is not whether two executors agree to 1e-3, but whether the graph is as close to the exact
(float64) quantized model as PyTorch in the graph's own dtype is. The bound is twice that distance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dvdquant.errors import ExportError
from dvdquant.families import Sizes
from dvdquant.layers import QuantLinear, set_activation
from dvdquant.model import ModelPlan, quantized_skeleton
from dvdquant.safetensors_io import TensorInfo, read_tensor

from .onnx import GraphWrapper
from .passes.emulate_bfloat16 import emulate_bfloat16
from .passes.expand_attention_mask import expand_attention_mask

__all__ = [
    "GraphCheck",
    "fill_quantized",
    "load_quantized",
    "prepare_for_onnxruntime",
    "run_onnxruntime",
    "verify_graph",
]

FACTOR = 2.0
ATOL = 1e-6


@dataclass(frozen=True)
class GraphCheck:
    """Distances are relative L2 of the output, ‖y − y₆₄‖ / ‖y₆₄‖.

    Args:
        graph: name of the graph.
        error: ONNX Runtime from the float64 quantized model.
        reference_error: PyTorch in the graph's dtype from the same.
        difference: ONNX Runtime from PyTorch in the graph's dtype.
        flipped_codes: share of activation codes in which PyTorch in the graph's dtype differs from float64.
    """

    graph: str
    error: float
    reference_error: float
    difference: float
    flipped_codes: float

    @property
    def bound(self) -> float:
        """The largest error that passes."""
        return FACTOR * self.reference_error + ATOL

    @property
    def passed(self) -> bool:
        """Whether the graph is within the bound (NaN is not)."""
        return self.error <= self.bound

    def to_json(self) -> dict[str, Any]:
        """With the bound and the verdict."""
        return {**asdict(self), "bound": self.bound, "passed": self.passed}


def load_quantized(plan: ModelPlan, tensors: Mapping[str, tuple[str, TensorInfo]], root: Path, bits: int) -> nn.Module:
    """The quantized PyTorch model of an export, in its own dtype.

    Args:
        tensors: name -> (weight file relative to ``root``, place), as in :class:`dvdquant.quantize.PackedWeights`.
    """
    model = quantized_skeleton(plan, bits)

    def read(name: str) -> Tensor:
        relative, info = tensors[name]
        return read_tensor(root / relative, info)

    fill_quantized(model, plan, read)
    return model


def fill_quantized(model: nn.Module, plan: ModelPlan, read: Callable[[str], Tensor]) -> None:
    """Put the stored tensors into a :func:`dvdquant.model.quantized_skeleton`; ``read`` gives one by its name."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.load({name: read(name) for name in module.spec.tensors()})
    for name in plan.kept:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._parameters[child] = nn.Parameter(read(name), requires_grad=False)


def prepare_for_onnxruntime(model: ir.Model) -> ir.Model:
    """Rewrite, in place, what ONNX Runtime's CPU provider cannot run; the arithmetic stays. Returns ``model``."""
    expand_attention_mask(model)
    emulate_bfloat16(model)
    return model


def run_onnxruntime(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """One run of the graph at ``path`` on the CPU provider, as float32; bfloat16 inputs are fed as float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Fusions would drop the casts that stand for rounding to bfloat16.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {}
        for value in session.get_inputs():
            tensor = inputs[value.name]
            feeds[value.name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        (output,) = session.run(None, feeds)
    except Exception as error:  # onnxruntime's own exceptions share no base class but this
        raise ExportError(f"ONNX Runtime refused {path.name}: {error}") from error
    return torch.from_numpy(np.asarray(output)).float()


def verify_graph(
    path: Path,
    plan: ModelPlan,
    sizes: Sizes,
    model: nn.Module,
    bits: int,
    work_dir: Path,
    *,
    seed: int = 0,
    which: str = "opt",
) -> GraphCheck:
    """Compare the graph at ``path`` with ``model`` (see :func:`load_quantized`) on random inputs.

    Args:
        work_dir: on the same folder level as the weight files, for the rewritten copy that ONNX Runtime runs.

    Raises:
        ExportError: ONNX Runtime cannot run the graph.
    """
    inputs = plan.family.sample(sizes, plan.dtype, seed, which)
    set_activation(model, plan.recipe.activation(bits))
    same_dtype, codes = _run_recording(model, plan, inputs)
    exact_model = _as_float64(model)
    exact_inputs = {n: t.double() if t.dtype == plan.dtype else t for n, t in inputs.items()}
    exact, exact_codes = _run_recording(exact_model, plan, exact_inputs)
    copy = work_dir / f".verify-{path.name}"
    try:
        ir.save(prepare_for_onnxruntime(ir.load(path)), copy)
        got = run_onnxruntime(copy, inputs).double()
    finally:
        copy.unlink(missing_ok=True)
    flips = sum(int((a != b).sum()) for a, b in zip(codes, exact_codes))
    return GraphCheck(
        graph=path.name,
        error=_relative(got, exact),
        reference_error=_relative(same_dtype, exact),
        difference=_relative(got, same_dtype),
        flipped_codes=flips / max(1, sum(c.numel() for c in codes)),
    )


def _relative(value: Tensor, reference: Tensor) -> float:
    norm = float(reference.double().norm())
    return float((value.double() - reference.double()).norm()) / norm if norm else float(value.double().norm())


def _as_float64(model: nn.Module) -> nn.Module:
    """A copy with float parameters in float64; packed buffers are shared. QuantLinear then computes in float64."""
    import copy

    memo: dict[int, Any] = {}
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = buffer
    clone = copy.deepcopy(model, memo)
    for module in clone.modules():
        if not isinstance(module, QuantLinear):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    module._parameters[name] = nn.Parameter(parameter.double(), requires_grad=False)
    return clone


def _run_recording(model: nn.Module, plan: ModelPlan, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the activation codes of every QuantLinear in call order."""
    from dvdquant.arq import quantize_activation
    from dvdquant.ops.quant_linear import rotate_by_matrices

    codes: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, QuantLinear)
        compute = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        hadamard, outer = (m.to(compute) for m in module._table[0].matrices(module.spec.rotation))
        rotated = rotate_by_matrices(args[0].to(compute), hadamard, outer)
        codes.append(quantize_activation(rotated, module.act_bits, module.act_group)[0])

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, QuantLinear)]
    try:
        with torch.no_grad():
            output = GraphWrapper(model, plan.family)(dict(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return output, codes
