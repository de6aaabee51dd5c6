"""Whether a device's kernels fuse layers rightly: their self-test, on a session's own grids, widths and forms of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dvdquant.errors import DvdquantError
from dvdquant.ops.attention.rope import Rope, apply_rope, run_rope_quantize
from dvdquant.ops.cuda_linear import CudaKernels, usable_kernels
from dvdquant.ops.fused import (
    MAX_CHANNELS,
    Prologue,
    apply_prologue,
    run_fused_linear,
    run_fused_quantize,
    run_packed_fused_linear,
)
from dvdquant.ops.kernel_layer import KernelLayer
from dvdquant.ops.linear_gemm import decode_codes
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.ops.repack import LayerShape

__all__ = ["fusion_text", "kernels_fuse", "why_not_fused"]

NO_KERNELS = "there are no kernels for this device"
# Tokens, and output features of a layer.
_TOKENS, _ROWS = 33, 64
# How far the products of a fused layer may be from those apart, as a relative L2 distance: 2 % of 4-bit codes that fall to the
# other side of a step are .08. A wrong grid, scale or weight gives about 1.
_MOST_APART = 0.1


def kernels_fuse(
    kernels: CudaKernels, device: torch.device, dtype: torch.dtype, layers: Iterable[KernelLayer] = ()
) -> str | None:
    """Compare the fused kernels with their definition on a device, and return in words what is wrong, or None.

    Args:
        kernels: The kernels of the device.
        device: The device.
        dtype: bf16 or fp16.
        layers: The layers of a session. A few rows are computed of one for each number of channels, grid and form.
    """
    x, norm, (scale, shift) = _sample(512, dtype, device)
    layer = LayerShape(8, 512, 1, False, 64, 1, 8, 0, DTYPE_NAMES[dtype])
    empty = torch.eye(1, device=device)
    try:
        path = kernels.plan(layer).path
        for prologue in (norm, Prologue(gelu=True)):
            codes, scales, _, hidden = run_fused_quantize(kernels, layer, x, prologue)
            z, h = apply_prologue(x, prologue)
            wanted, wanted_scales, _ = kernels.rotate_quantize(layer, z, empty)
            off = (decode_codes(codes, path) - decode_codes(wanted, path)).abs()
            # Roundings of z to 16 bits that fall to the other side move codes by one.
            if off.max() > 1 or off.mean() > 0.02 or not torch.allclose(scales, wanted_scales, rtol=0.01):
                return "the fused kernel's codes differ from those of its definition"
            if not torch.allclose(hidden.float(), h.float(), rtol=2.0**-7, atol=1e-6):
                return "the fused kernel's sum differs from that of its definition"
        rope = Rope(
            64, "all", 1e-6, True, 1 + scale[0].to(device), *_angles(33, device), torch.full((1,), 8.0, device=device)
        )
        # As CogVideoX: 3 tokens of text in front, tables with a value for each channel, and 16 bits.
        cosines, sines = (table.repeat_interleave(2, 1) for table in _angles(30, device))
        weight, bias = (part[0, :64].to(device) for part in (scale, shift))
        behind = Rope(64, "layer", 1e-6, False, weight, cosines, sines, None, bias, 3, True)
        for through in (rope, behind):
            coded, wanted = run_rope_quantize(kernels, x[None], through).float(), apply_rope(x[None], through).float()
            if (coded - wanted).norm() > 0.01 * wanted.norm():
                return "q and k differ from those of their definition"
        for each in _kinds(layers):
            if (why := _layer_fuses(kernels, each)) is not None:
                return why
    except (DvdquantError, RuntimeError) as error:
        return f"the fused kernel failed: {str(error).splitlines()[0]:.200}"
    return None


def _sample(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Prologue, tuple[Tensor, Tensor]]:
    """Return an input, and a residual, norm and modulation with what is multiplied (less 1) and added."""
    rng = torch.Generator().manual_seed(0)
    x, y, gate, scale, shift = (
        torch.randn(_TOKENS if i < 2 else 1, channels, generator=rng).to(device) for i in range(5)
    )
    return x.to(dtype), Prologue(y.to(dtype), gate, 1 + scale, shift, "layer"), (scale, shift)


def _kinds(layers: Iterable[KernelLayer]) -> Iterator[KernelLayer]:
    """Yield a few rows of one layer of each kind that the kernels fuse."""
    seen = set()
    for layer in layers:
        shapes = tuple(replace(shape, n=0) for shape in layer.shapes)
        kind = (shapes, layer.form, layer.has_pre_quant)
        if kind not in seen and shapes[0].outer == 1 and shapes[0].k <= MAX_CHANNELS:
            seen.add(kind)
            yield layer.with_rows(_ROWS)


def _layer_fuses(kernels: CudaKernels, layer: KernelLayer) -> str | None:
    """Compare a layer that is fused with the same layer apart, on each of its grids; return in words what is wrong, or None."""
    device = layer.device
    for shape in layer.shapes:
        x, norm, _ = _sample(shape.k, layer.dtype, device)
        weight = layer.make_weight(shape.act_bits, shape.act_group)
        for prologue in (norm, Prologue(gelu=True)):
            if layer.form == "packed":
                codes, rows = weight
                out, _ = run_packed_fused_linear(kernels, shape, x, prologue, codes, rows, layer.pre_quant)
            else:
                out, _ = run_fused_linear(kernels, shape, x, prologue, weight[0], layer.pre_quant)
            z, _ = apply_prologue(x, prologue)
            apart = layer(z, torch.eye(1, device=device), shape.act_bits, shape.act_group).float()
            # Not "distance > …": a NaN is a distance too.
            if not (out.float() - apart).norm() <= _MOST_APART * apart.norm():
                grid = f"a{shape.act_bits}" + (f" in groups of {shape.act_group}" if shape.act_group else "")
                return f"a fused layer of {shape.k} channels ({grid}, {layer.form}) differs from one that is not"
    return None


def why_not_fused(
    kernels: CudaKernels | None, device: torch.device, dtype: torch.dtype, layers: Iterable[KernelLayer] = ()
) -> str | None:
    """Return in words why layers are not fused on a device, or None where they are.

    Args:
        kernels: The kernels of the device, or None where it has none.
        device: The device.
        dtype: bf16 or fp16.
        layers: As of :func:`kernels_fuse`.
    """
    return NO_KERNELS if kernels is None else kernels_fuse(kernels, device, dtype, layers)


def fusion_text(device: torch.device, compile: bool, fuse: bool | None) -> str | None:
    """Return in words what a PyTorch session will do, before it is opened; None where nothing asks for it.

    Args:
        device: The device of the session.
        compile: Whether its blocks are compiled.
        fuse: As of the session.
    """
    if not (compile if fuse is None else fuse):
        return "layers fused with what comes before them: no, --no-fuse" if compile else None
    if usable_kernels(device) is None:
        return f"layers fused with what comes before them: no, {NO_KERNELS}"
    return "layers fused with what comes before them: yes, if the kernels pass their self-test on the device"


def _angles(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tables of rope for heads of 64 channels."""
    angles = torch.arange(tokens * 32, dtype=torch.float32, device=device).reshape(tokens, 32) * 0.1
    return angles.cos(), angles.sin()
