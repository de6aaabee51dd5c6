"""The PyTorch backend: the diffusers transformer with QuantLinear modules, on the CPU or a GPU."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dvdquant.checkpoint.lora.fuse import read_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.attention import MASK, check_attention, install_attention
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.sessions.compiled import compile_blocks
from dvdquant.deploy.sessions.fusion_check import why_not_fused
from dvdquant.deploy.sessions.lora_branches import LoraBranches
from dvdquant.deploy.sessions.replay import GraphReplay, why_not
from dvdquant.deploy.sessions.weight_form import choose_form, claim
from dvdquant.deploy.sessions.weights import WeightFiles
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.hardware.weights import HeldForm, WeightPolicy, check_policy, slower_in_int8
from dvdquant.model.loading import GraphWrapper, fill_quantized
from dvdquant.model.plan import ModelPlan, quantized_skeleton
from dvdquant.model.quantized_model import (
    forget_stored,
    kernel_layers,
    make_weights,
    prepare_layers,
    prepared_bytes,
    quant_linears,
    set_activation,
)
from dvdquant.model.weight_choice import WeightChoice
from dvdquant.ops.attention.ladder import Attention, rungs_for
from dvdquant.ops.attention.libraries import refuse_library_in_16_bit
from dvdquant.ops.cuda_linear import CACHE, CudaKernels, usable_kernels
from dvdquant.recipe import ATTENTION, Recipe
from dvdquant.system.devices import cuda_sm, current_device
from dvdquant.system.torch_hooks import check_example_values

__all__ = ["PyTorchSession", "warn_once"]

log = logging.getLogger(__name__)


class PyTorchSession(EngineSession):
    """One model for all bit-widths. A switch sets the activation grid of its QuantLinear modules.

    On the CPU the weights are the private copy of the files itself (:class:`.weights.WeightFiles`).

    A GPU that the kernels are built for holds each layer once and packed, half a byte a weight for all bit-widths, and
    the kernels expand it before a product of 8 bits. Or it holds each layer expanded, in the form that the kernels
    multiply: it makes this form before the first step that needs it, and holds both forms if the bit-widths that ran
    differ in it. Then the private copy stays on the host until every bit-width has run. Or some layers are held in one
    way and some in the other. Outputs are the same.

    On another GPU the packed weights are copied, and the private copy is closed.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        bits: The activation bits to make available. The default is all.
        device: The CPU (default) or a CUDA device.
        compile: Compile the transformer's blocks with torch.compile. The first step with each bit-width takes a minute or
            more then, and the outputs differ from those without by rounding.
        attention: ``16``, ``int8`` or ``fp8`` for self-attention of long sequences. The default is the recipe's.
        attention_backend: The library that computes it, or ``reference``, the definition in plain PyTorch. By default
            those of the GPU are tried, and one is taken that is right and faster than 16 bit on the first layer.
        weights: ``auto``, ``packed`` or ``expanded``: how the kernels' device holds them (:func:`.choose_weights`).
        fuse: Take residuals, norms, modulations and GELU before quantized layers into the layers' kernels, where a
            self-test on the device passes. Outputs differ by rounding. True does so without ``compile``, too, where the
            rest runs operation by operation; None does so if ``compile`` is on.
        cuda_graphs: Capture steps of static sizes of up to 4000 tokens as CUDA graphs, and repeat them (:mod:`.replay`).

    Attributes:
        fused: Whether that is done.
        weights: ``packed``, ``expanded`` or ``mixed``, as they are held. Without kernels they are packed.

    Raises:
        UnsupportedError: The attention or the policy is unknown, the library that was asked for cannot run here, or
            expanded weights are wanted without kernels.
        EngineError: The weights do not fit the device's memory.
        OutputError: A file differs from the manifest.
    """

    backend = "pytorch"
    attention: Attention | None

    def __init__(
        self,
        artifact: Artifact,
        component: str = "transformer",
        bits: Sequence[int] | None = None,
        device: torch.device | None = None,
        compile: bool = False,
        attention: str | None = None,
        attention_backend: str | None = None,
        weights: WeightPolicy = "auto",
        fuse: bool | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(artifact, component, bits, device or torch.device("cpu"))
        # 1. Decide: kernels, the form of the weights, attention.
        kernels = usable_kernels(self.device)
        self._prepared = kernels is not None
        plan = artifact.plan(component)
        choice = self._choice(check_policy(weights), kernels)
        self.weights: HeldForm = "packed" if choice is None else choice.form
        self._recipe = plan.recipe
        self._advice = None if kernels is None or 8 not in self.bits else bits_advice(kernels.sm, plan.recipe)
        if kernels is not None and (slow := slower_in_int8(kernels.sm)):
            warn_once(f"SM {kernels.sm / 10} is slow in 8 bits: {slow}; where the original fits, it is faster in bf16")
        self.attention = wanted_attention(attention or plan.recipe.attention, attention_backend, self.device, component)
        # A mask makes PyTorch take a slow kernel on a GPU, and no kernel in 8 bits takes one.
        masked = any(spec.name == MASK for spec in self.family.inputs(self.sizes))
        self._cuts = self.attention is not None or (masked and self.device.type == "cuda")
        if kernels is not None and (compile if fuse is None else fuse):
            check_example_values()
        # 2. Load the weights, and prepare those that kernels run.
        self._current: int | None = self.bits[0]
        self._ran: set[int] = set()
        self._files = WeightFiles(artifact, component, self.device)
        try:
            model = quantized_skeleton(plan, self.bits[0])
            if self._cuts:
                check_attention(model)
            fill_quantized(model, plan, self._files.tensor)
            if kernels is not None:
                grids = [plan.recipe.activation(width) for width in self.bits]
                expanded = frozenset() if choice is None else choice.expanded
                left = prepare_layers(model, kernels, grids, plan.dtype, self.device, "packed", expanded)
                for name, reason in left.items():
                    log.info("%s is computed in fp32: %s", name, reason)
            self._branches: LoraBranches | None = None
            model.to(self.device)
            # 3. Attention, fused and compiled blocks, CUDA graphs.
            if self._cuts:
                self._state = install_attention(model, self.attention)
            self.fused = bool(compile if fuse is None else fuse) and self._may_fuse(
                kernels, plan, model, asked=bool(fuse)
            )
            if compile or self.fused:
                dynamic = True if self.sizes.dynamic else None
                count = compile_blocks(model, dynamic, self.fused, compile)
                how = ("compiled" if compile else "traced") + (" and fused" if self.fused else "")
                log.info("%s: %d blocks are %s", component, count, how)
            self._model: nn.Module | None = GraphWrapper(model, self.family)
            self._graphs = self._replay() if cuda_graphs else None
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the weights of {component} do not fit {self.device}: {error}", fix="close other sessions"
            ) from error
        # 4. Free what of the private copy the device holds now.
        if kernels is not None:
            self._files.drop_pages()
        elif self.device.type != "cpu":
            self._files.close()
        self._planned = 0 if choice is None else choice.made
        self._claim_the_rest(model)

    @property
    def model(self) -> nn.Module:
        """Return the model of diffusers that a step runs, with packed layers in the place of its linear ones.

        Raises:
            EngineError: The session is closed.
        """
        self._require_open()
        assert self._model is not None
        return self._model.get_submodule("model")

    def _choice(self, policy: WeightPolicy, kernels: CudaKernels | None) -> WeightChoice | None:
        """Return how the kernels' device holds weights; None without kernels, where they are packed."""
        if kernels is None:
            if policy == "expanded":
                raise UnsupportedError(
                    f"PyTorch on {self.device} keeps weights packed: expanded ones are a form of the CUDA kernels",
                    available="packed here; the onnxruntime backend expands them to fp32",
                    fix="leave the policy out, or run on a GPU that the kernels are built for",
                )
            return None
        return choose_form(self, kernels.sm, policy)

    def _replay(self) -> GraphReplay | None:
        """Return what captures and repeats steps; else say why nothing is."""
        tokens = self.family.tokens(*self.sizes.at("max")) * self.sizes.batch
        why = why_not(self.device, self.sizes.dynamic, tokens)
        if why is None:
            assert self._model is not None
            return GraphReplay(self._model, self.component, self.device)
        log.warning("%s: steps are not captured as CUDA graphs: %s", self.component, why)
        return None

    @property
    def repeats_steps(self) -> bool:
        """Return whether steps are captured and repeated, or would be from the second one on."""
        return self._graphs is not None and self._graphs.failed is None

    def _may_fuse(self, kernels: CudaKernels | None, plan: ModelPlan, model: nn.Module, asked: bool) -> bool:
        """Return whether the fused kernels are there and pass their self-test; else say why not, louder if it was asked for."""
        why = why_not_fused(kernels, self.device, plan.dtype, kernel_layers(model))
        if why is None:
            return True
        log.log(logging.WARNING if asked else logging.INFO, "%s: nothing is fused: %s", self.component, why)
        return False

    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        model = self._model
        assert model is not None
        if bits == 4 and self._advice:
            warn_once(self._advice)
        if bits != self._current:
            # An interrupt may leave some layers on the old grid and some on the new one. Then all are set again.
            self._current = None
            set_activation(model, self._recipe.activation(bits))
            self._current = bits
        if bits not in self._ran:
            make_weights(model)
        if self._cuts:
            inputs = self._state.cut(inputs)
        with current_device(self.device), torch.inference_mode():
            if self._graphs is None:
                output: Tensor = model(inputs)
            else:
                choice = None if self.attention is None else self.attention.choice
                output = self._graphs(inputs, (bits, self._cuts and self._state.whole, choice))
        if bits not in self._ran:
            self._ran.add(bits)
            if self._prepared:
                self._let_files_go(model)
                self._claim_the_rest(model)
        # A copy made outside of inference mode is an ordinary tensor, which schedulers may change in place.
        return output.to(self.dtype, copy=True)

    def _let_files_go(self, model: nn.Module) -> None:
        """Close the private copy where the device has made all that it will multiply; else give its pages back.

        Packed weights serve every bit-width. Others are made of the stored ones for each width that runs.
        """
        if self.weights != "packed" and not self._ran.issuperset(self.bits):
            self._files.drop_pages()
            return
        forget_stored(model)
        self._files.close()

    def follow_attention(self, choice: str | None) -> None:
        """See :meth:`EngineSession.follow_attention`."""
        if self.attention is not None:
            self.attention.follow(choice)

    def _claim_the_rest(self, model: nn.Module) -> None:
        """Note what is planned and not made yet, so that a session that is opened meanwhile leaves room for it."""
        made = bool(self._ran) if self.weights == "packed" else self._ran.issuperset(self.bits)
        claim(self, 0 if made else self._planned - prepared_bytes(model))

    def set_loras(self, specs: Sequence[LoraSpec]) -> None:
        """See :class:`EngineSession`. Each costs rank · (K + N) · 2 bytes a layer, and as many products for every token.

        Args:
            specs: The LoRAs, each a file with a scale and a transformer.
        """
        with self._lock:
            self._require_open()
            class_name = str(self.artifact.config(self.component)["_class_name"])
            shapes = self.artifact.plan(self.component).shapes
            # Read first: where a file cannot be used, those that ran before go on.
            loras = read_loras(class_name, shapes, specs) if specs else None
            if self._graphs is not None:
                self._graphs.forget()
            if self._branches is not None:
                self._branches.remove()
            self._branches, self.loras = None, ()
            if loras is not None:
                self._branches = LoraBranches(self.model, loras, self.dtype, self.device)
                self.loras = tuple(specs)

    def _resident_bytes(self) -> dict[str, int]:
        """Return the bytes that are held between calls.

        ``weights`` grows with the bit-widths that ran. ``workspace`` is a lower bound: the scratch memory of the
        largest layer. For a layer with kernels, that is the kernels' workspace at the export's largest size. For
        another layer, it is the weight in fp32, which the reference op expands in each call.
        """
        assert self._model is not None
        held = {t.data_ptr(): t.nbytes for t in (*self._model.parameters(), *self._model.buffers())}
        weights, scratch = sum(held.values()), [0]
        weights += 0 if self._branches is None else self._branches.nbytes
        tokens = (self.family.tokens(*self.sizes.at("max")) + self.sizes.text_tokens) * self.sizes.batch
        for layer in quant_linears(self._model).values():
            kernel = layer.kernel
            weights += CACHE.held_bytes(layer.get_buffer("weight")) if kernel is None else kernel.nbytes
            fp32 = 4 * layer.spec.out_features * layer.spec.features
            scratch.append(fp32 if kernel is None else kernel.workspace_bytes(tokens))
        held_steps = 0 if self._graphs is None else self._graphs.nbytes
        # Where the device shares the host's memory, a private copy in memory is a second one on it.
        return {"weights": weights + self._files.beside, "engines": 0, "workspace": max(scratch) + held_steps}

    def _close(self) -> None:
        if self.device.type == "cuda":
            # Wait for every stream: freed memory goes to whoever asks next, and a pass may still read the weights.
            torch.cuda.synchronize(self.device)
        self._model = self._branches = self._graphs = None
        self._files.close()


def wanted_attention(wanted: str, backend: str | None, device: torch.device, name: str) -> Attention | None:
    """Return the attention of a session, which chooses its library at its first call; None is 16 bit.

    Args:
        wanted: ``16``, ``int8`` or ``fp8``.
        backend: The library that was asked for, or None.
        device: The device of the session.
        name: The name of the transformer, for the log.

    Raises:
        UnsupportedError: The attention is unknown, or the library is not possible here.
    """
    if wanted not in ATTENTION:
        raise UnsupportedError(f"unknown attention {wanted!r:.100}", available=ATTENTION, fix="pick one of these")
    refuse_library_in_16_bit(wanted, backend)
    if wanted == "16":
        return None
    sm = cuda_sm(device) if device.type == "cuda" else None
    return Attention(wanted, rungs_for(wanted, sm, backend), sm, must_be_faster=backend is None, name=name)


def bits_advice(sm: int, recipe: Recipe) -> str | None:
    """Return the advice to log before a step with 4-bit activations on a GPU whose tensor cores gain nothing by them.

    Args:
        sm: The compute capability times 10, such as 89 or 90.
        recipe: The recipe of the export.

    Returns:
        The advice, or None for SM below 9.0, whose tensor cores gain by 4-bit activations.
    """
    if sm < 90:
        return None
    time = "save no time here"
    if sm == 90 and recipe.activation(4).group_size:
        time = "take longer here, with their scales per group"
    return (
        f"SM {sm / 10} has no 4-bit integer tensor cores: steps with 4-bit activations {time}, and 8 bits are nearer to the "
        "original; --mode a8 runs all steps so"
    )


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning at the first time in this process.

    Args:
        text: The warning.
    """
    log.warning(text)
