"""Second moments of the inputs of every layer, predicted from the checkpoint alone, without data or generated clips.

The model itself runs once, on a batch of smooth random fields in the place of clips, each mixed with as much noise as
its timestep says, and on random words. The weights pass through memory one module at a time, so that a model of 13
billion parameters needs no more than its activations, its largest layer in fp32, and the moments.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, DvdquantError, ResourceError
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan, build_skeleton
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.quantize.magnitudes import Magnitudes
from dvdquant.quantize.synthetic_inputs import synthetic_inputs
from dvdquant.system.memory import memory_limit
from dvdquant.system.progress import Progress
from dvdquant.text import amount

__all__ = [
    "InputHessian",
    "LayerSums",
    "move_buffers",
    "smooth_scale_of",
    "random_signs_of",
    "hessian_block",
    "hessian_bytes",
    "rotated_hessian",
    "streamed",
    "synthetic_hessians",
    "triangles_shape",
]

# Channels whose moments are kept together: half of K·256 floats a layer are 1 GB for HunyuanVideo.
_BLOCK = 256
# Exponents of the smooth scale: an outlier may be divided by what every 16-bit dtype takes as a factor, but a channel that is
# quiet on synthetic inputs may be louder on real ones.
_EXPONENTS = (-3, 12)


@dataclass(frozen=True, eq=False)
class InputHessian:
    """Prediction about the inputs of one layer, in the basis of the checkpoint (not rotated).

    Args:
        triangles: fp32 [K/b, b·(b+1)/2], E[xᵀx] along the diagonal: the lower triangle of each block, row after row.
        weight_energy: fp32 [K], mean square of each column of the weight, over the rows of all members.
        mean: fp32 [K], E[x]; zeros where no input was seen.
        tokens: Number of inputs the moments are the mean of; 0 where none was seen and the moments are the identity.
    """

    triangles: Tensor
    weight_energy: Tensor
    mean: Tensor
    tokens: int

    @classmethod
    def from_blocks(cls, blocks: Tensor, weight_energy: Tensor, tokens: int = 0) -> InputHessian:
        """Return the moments of inputs with a mean of 0, from symmetric blocks.

        Args:
            blocks: [K/b, b, b], symmetric; their upper triangles are not read.
            weight_energy: [K], mean square of each column of the weight.
            tokens: Number of inputs the moments are the mean of.
        """
        energy = weight_energy.float()
        return cls(_pack(blocks.float()), energy, torch.zeros_like(energy), tokens)

    @property
    def block(self) -> int:
        """Return b, the order of a block."""
        return (math.isqrt(8 * self.triangles.shape[1] + 1) - 1) // 2

    @property
    def blocks(self) -> Tensor:
        """Return the symmetric blocks, fp32 [K/b, b, b], as a new tensor."""
        order = self.block
        full = torch.empty(len(self.triangles), order, order, dtype=self.triangles.dtype)
        for i in range(order):
            row = self.triangles.narrow(1, i * (i + 1) // 2, i + 1)
            full[:, i, : i + 1] = row
            full[:, :i, i] = row[:, :i]
        return full

    @property
    def input_energy(self) -> Tensor:
        """Return the mean square of each input channel, fp32 [K]."""
        rows = torch.arange(self.block)
        return self.triangles[:, rows * (rows + 3) // 2].flatten()


def _pack(blocks: Tensor) -> Tensor:
    return torch.cat([blocks[:, i, : i + 1] for i in range(blocks.shape[1])], dim=1)


def triangles_shape(spec: LayerSpec) -> tuple[int, int]:
    """Return the shape of :attr:`InputHessian.triangles`.

    Args:
        spec: The layer.
    """
    order = hessian_block(spec)
    return spec.features // order, order * (order + 1) // 2


def hessian_block(spec: LayerSpec) -> int:
    """Return b, the order of a block of moments.

    It is the largest multiple of the rotation's block up to 256 that divides K, or the rotation's block where that is
    larger.

    Args:
        spec: The layer.
    """
    step = spec.rotation.block
    return max((b for b in range(step, _BLOCK + 1, step) if spec.features % b == 0), default=step)


def random_signs_of(name: str, features: int) -> Tensor:
    """Return random signs, fp32 [K], always the same for one ``name``: the bits of its SHAKE-256.

    A Hadamard matrix adds all channels of a block up in its first column, so inputs that are mostly positive (those behind a
    GELU) get one outlier per block from it. With random signs no direction is special.

    Args:
        name: Name of the layer.
        features: Input features K.
    """
    digest = hashlib.shake_256(name.encode()).digest(-(-features // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=features)
    return torch.from_numpy(1.0 - 2.0 * bits).float()


def smooth_scale_of(hessian: InputHessian) -> Tensor:
    """Return the smooth scale: inputs are divided by it and weights multiplied, so that both sides vary alike.

    ``2^trunc(½·log2(rms_x/rms_w) − mean)``: powers of two, so that dividing is exact in 16 bit; rounded towards 1, so
    that channels stay as they are that differ from the mean by less than a factor of four; within 2⁻³..2¹².

    Args:
        hessian: Prediction about the layer's inputs.

    Returns:
        fp32 [K]. Channels without energy on either side get 1, and do not count in the mean.
    """
    x, w = hessian.input_energy, hessian.weight_energy
    alive = (x > 0) & (w > 0)
    smooth_scale = torch.ones_like(x)
    if bool(alive.any()):
        exponent = 0.25 * (x[alive].double().log2() - w[alive].double().log2())
        exponent = (exponent - exponent.mean()).trunc().clamp(*_EXPONENTS)
        smooth_scale[alive] = torch.exp2(exponent).float()
    return smooth_scale


def rotated_hessian(hessian: InputHessian, spec: LayerSpec, smooth_scale: Tensor | None) -> Tensor:
    """Return the second moments of the rotation of ``x / smooth_scale``: ``Hᵀ D⁻¹ M D⁻¹ H``, block by block.

    Args:
        hessian: Prediction about the layer's inputs.
        spec: The layer; its rotation is read.
        smooth_scale: [K], or None to divide by nothing.

    Returns:
        fp32 [K/b, b, b], as :func:`dvdquant.quantize.gptq.gptq_round` takes them.
    """
    blocks = hessian.blocks
    order = blocks.shape[1]
    if smooth_scale is not None:
        d = smooth_scale.float().view(-1, order)
        blocks = blocks / d[:, :, None] / d[:, None, :]
    rotation = Rotation(order, spec.rotation.inner, spec.rotation.outer)
    return rotate(rotate(blocks, rotation).mT, rotation)


def synthetic_hessians(
    checkpoint: Checkpoint,
    plan: ModelPlan,
    progress: Progress,
    *,
    levels: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    limits: Magnitudes | None = None,
) -> dict[str, InputHessian]:
    """Predict the moments of the inputs of every planned layer, by ``LayerSpec.name``.

    One forward in fp32 runs on :func:`synthetic_inputs`. Every module's own parameters are read when it is called and
    dropped afterwards; NaN and infinities count as 0.

    Args:
        checkpoint: The checkpoint of one transformer.
        plan: The plan of its model.
        progress: Where the stage is shown.
        levels: Noise levels, one item of the batch each; fewer where the model runs at large sizes only.
        seed: Seed of the inputs. One seed gives one result for one number of threads.
        device: Where the model runs; what is predicted comes back to the CPU.
        limits: Refuses a value that the export could not hold, so that nothing is quantized before it is found; or
            None.

    Returns:
        The moments; the identity for layers that the forward does not reach, or reaches with values beyond fp32.

    Raises:
        CheckpointError: A missing, misshapen or unreadable tensor, one beyond the limits, or a model that does not run.
        ResourceError: The moments do not fit into memory (a rotation of whole rows needs all K² of them).
    """
    checkpoint.check_shapes(plan.shapes, set(plan.left_out(checkpoint.tensors)))
    _check_memory(plan)
    collected = LayerSums(plan)
    with progress.stage("inputs", plan.all_weights, "weights") as stage, torch.inference_mode():
        unread = set(plan.shapes)

        def loaded(name: str, value: Tensor) -> None:
            if name in unread:
                unread.discard(name)
                collected.add_weight(name, value)
                stage.update(value.numel(), name)

        # 1. A model without weights, its inputs, and a hook at each layer that adds up what it gets.
        model = build_skeleton(plan.family.config, torch.float32)
        move_buffers(model, device)
        inputs = {name: value.to(device) for name, value in synthetic_inputs(plan.family, levels, seed).items()}
        hooks = [
            model.get_submodule(spec.members[0]).register_forward_pre_hook(collected.watch(spec))
            for spec in plan.layers
        ]
        # 2. One forward; weights are read as they are needed.
        try:
            with streamed(model, checkpoint, loaded, device, limits):
                model(**plan.family.forward_kwargs(inputs), return_dict=False)
        except (DvdquantError, torch.OutOfMemoryError):
            raise  # the second says nothing about the model
        except Exception as error:
            # diffusers and PyTorch raise every class there is.
            raise CheckpointError(
                f"the {checkpoint.class_name} of {checkpoint.root} does not run: {type(error).__name__}: {error}",
                fix="compare config.json with the one the model was published with",
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        # 3. Weights that the forward did not reach: their column energy is needed all the same.
        for name in sorted(unread & collected.wanted):
            loaded(name, _read(checkpoint, name, limits))
        stage.update(sum(math.prod(plan.shapes[name]) for name in unread))
    return {spec.name: collected.take(spec) for spec in plan.layers}


class LayerSums:
    """Sums over the inputs and the weights of every layer.

    The sums lie in one allocation: many of a few megabytes, made between the passing ones of a forward, left holes that took
    as much memory as the sums did.

    Args:
        plan: The plan, whose layers are summed over.
    """

    def __init__(self, plan: ModelPlan) -> None:
        self._layer_of = {f"{member}.weight": spec.name for spec in plan.layers for member in spec.members}
        shapes = {spec.name: triangles_shape(spec) for spec in plan.layers}
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = torch.split(torch.zeros(sum(sizes)), sizes)
        self._triangles = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items())}
        self._sums = {spec.name: torch.zeros(spec.features) for spec in plan.layers}
        self._tokens = dict.fromkeys(shapes, 0)
        self._energy: dict[str, Tensor] = {}

    @property
    def wanted(self) -> set[str]:
        """Return the names of the weights whose energy is asked for."""
        return set(self._layer_of)

    def add_weight(self, name: str, value: Tensor) -> None:
        """Add the squared norm of each column of a weight to its layer; other parameters are ignored.

        Args:
            name: The name of the parameter.
            value: Its values; of a weight [N, K].
        """
        layer = self._layer_of.get(name)
        if layer is not None:
            energy = torch.linalg.vector_norm(value, dim=0).square().cpu()
            self._energy[layer] = self._energy[layer] + energy if layer in self._energy else energy

    def watch(self, spec: LayerSpec) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a forward pre-hook for the first member of a layer, which adds the layer's inputs up.

        Args:
            spec: The layer.
        """
        order, sums = hessian_block(spec), self._triangles[spec.name]

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, spec.features // order, order)
            sums.add_(_pack(torch.stack([x.T @ x for x in rows.unbind(1)])).cpu())
            self._sums[spec.name] += rows.sum(0).flatten().cpu()
            self._tokens[spec.name] += len(rows)

        return hook

    def take(self, spec: LayerSpec) -> InputHessian:
        """Return the result of one layer and forget it here; outside inference mode these are ordinary tensors.

        Args:
            spec: The layer. Where its inputs were never seen, or their squares do not fit into fp32, the Hessian is the identity.
        """
        energy = self._energy.pop(spec.name) / spec.out_features
        triangles, tokens = self._triangles.pop(spec.name), self._tokens[spec.name]
        mean = self._sums.pop(spec.name)
        if tokens:
            triangles /= tokens
            mean /= tokens
        if not tokens or not all(abs(float(extreme)) <= _most_moment(spec) for extreme in torch.aminmax(triangles)):
            triangles, tokens = _pack(torch.eye(hessian_block(spec))[None]).repeat(len(triangles), 1), 0
            mean = torch.zeros_like(mean)
        return InputHessian(triangles, energy, mean, tokens)


def _most_moment(spec: LayerSpec) -> float:
    """Return the largest moment that still fits into fp32 after it was divided by smooth scales and rotated."""
    order, divided = hessian_block(spec), float(4.0 ** -_EXPONENTS[0])
    return float(torch.finfo(torch.float32).max / (divided * order**1.5))


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Move the buffers of a skeleton, which hold real values; moving a placeholder would give its elements memory.

    Args:
        model: The skeleton, whose parameters have no memory.
        device: Where its buffers go.
    """
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _set_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for key, parameter in parameters.items():
        setattr(module, key, parameter)


@contextmanager
def streamed(
    model: nn.Module,
    checkpoint: Checkpoint,
    loaded: Callable[[str, Tensor], None] | None = None,
    device: torch.device | str = "cpu",
    limits: Magnitudes | None = None,
) -> Iterator[nn.Module]:
    """Let ``model`` compute with the checkpoint's weights within this context, although it holds none of them.

    Every module reads its own parameters when it is called, in fp32, NaN and infinities as 0, and gives them up when it
    returns or fails.

    Args:
        model: A skeleton in fp32 (:func:`dvdquant.model.plan.build_skeleton`).
        checkpoint: Where the parameters are read.
        loaded: Called with the name and the value of every parameter that was read; or None.
        device: Where the parameters go; the caller moves buffers and inputs.
        limits: Refuses a value that an export could not hold; or None.

    Yields:
        The model.
    """
    hooks: list[Any] = []
    placeholders = {
        name: dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, module in model.named_modules()
    }

    def load(prefix: str) -> Any:
        def hook(module: nn.Module, _args: tuple[Any, ...]) -> None:
            for key in placeholders[prefix]:
                name = f"{prefix}.{key}" if prefix else key
                value = _read(checkpoint, name, limits).to(device)
                if loaded is not None:
                    loaded(name, value)
                setattr(module, key, nn.Parameter(value, requires_grad=False))

        return hook

    def drop(prefix: str) -> Any:
        def hook(module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
            _set_parameters(module, placeholders[prefix])

        return hook

    try:
        for name, module in model.named_modules():
            if placeholders[name]:
                hooks.append(module.register_forward_pre_hook(load(name)))
                hooks.append(module.register_forward_hook(drop(name), always_call=True))
        yield model
    finally:
        for handle in hooks:
            handle.remove()
        for name, module in model.named_modules():
            _set_parameters(module, placeholders[name])


def _read(checkpoint: Checkpoint, name: str, limits: Magnitudes | None = None) -> Tensor:
    value = checkpoint.read(name)
    if limits is not None:
        limits.check(checkpoint, name, value)
    if not value.dtype.is_floating_point:
        return value
    # A copy, also of fp32: the tensor may be one that the checkpoint holds for others.
    return value.to(torch.float32, copy=True).nan_to_num_(0.0, 0.0, 0.0)


def hessian_bytes(plan: ModelPlan) -> int:
    """Return the size of all layers' moments in bytes.

    Args:
        plan: The plan of the model.
    """
    return 4 * sum(math.prod(triangles_shape(spec)) for spec in plan.layers)


def _check_memory(plan: ModelPlan) -> None:
    needed, available = hessian_bytes(plan), memory_limit()
    if needed > available:
        raise ResourceError(
            f"the second moments of the inputs take {amount(needed)}",
            available=f"{amount(available)} of memory",
            fix="use rotation auto, whose blocks are small, or a machine with more memory",
        )
