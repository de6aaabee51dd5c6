"""Kernel libraries that make the mistakes kernels make, for the tests of gpu_check: each is right but for one thing."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvdquant.numerics.activation_grid import AMAX_FLOOR, QMAX, quantize_activation
from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.packed_layer import DTYPES
from dvdquant.ops.reference import rotate_by_matrices

CHECK = Path(__file__).parents[2] / "kernels" / "check"
sys.path.insert(0, str(CHECK))

from host_library import HostLibrary, host_view  # noqa: E402


class SwappedNibbles(HostLibrary):
    def rotate_quantize(self, layer: Any, sm: int, x: int, outer: int, codes: int, scales: int, sums: int, m: int, stream: int, balance: int = 0) -> None:  # fmt: skip # noqa: E501
        super().rotate_quantize(layer, sm, x, outer, codes, scales, sums, m, stream, balance)
        plan = self.plan_layer(layer, sm)
        raw = host_view(codes, (m, plan.codes_bytes_per_token), torch.uint8)
        if plan.codes == "s4":
            raw.copy_((raw << 4) | (raw >> 4))


class ExpandsWrongly(HostLibrary):
    """Loses the last code of an expanded weight."""

    def expanded_bytes(self, layer: Any, plan: Any, weight: Any, rows: int) -> bytes:
        raw = bytearray(super().expanded_bytes(layer, plan, weight, rows))
        raw[layer.n * (layer.k // 2 if plan.codes == "s4" else layer.k) - 1] ^= 64
        return bytes(raw)


class OneScratchForAll(HostLibrary):
    """Expands the weights of all streams into one buffer."""

    scratch = ctypes.create_string_buffer(1 << 20)
    meeting = threading.Barrier(2)

    def packed_linear(self, layer: Any, sm: int, x: int, outer: int, weight: Any, rows: int, y: int, m: int, workspace: int, size: int, stream: int, balance: int = 0) -> None:  # fmt: skip # noqa: E501
        raw = self.expanded_bytes(layer, self.plan_layer(layer, sm), weight, rows)
        ctypes.memmove(self.scratch, raw, len(raw))
        with contextlib.suppress(threading.BrokenBarrierError):
            self.meeting.wait(1)
        self.quant_linear(layer, sm, x, outer, ctypes.addressof(self.scratch), y, m, workspace, size, stream, balance)


class UnbalancedTail(HostLibrary):
    """Balances whole strips of 256 channels only."""

    def rotate_quantize(self, layer: Any, sm: int, x: int, outer: int, codes: int, scales: int, sums: int, m: int, stream: int, balance: int = 0) -> None:  # fmt: skip # noqa: E501
        if balance and layer.k % 256:
            rows = host_view(balance, (layer.k // 8, 2, 8), DTYPES[layer.dtype]).clone()
            rows[layer.k // 256 * 32 :, 0], rows[layer.k // 256 * 32 :, 1] = 1, 0
            balance = rows.data_ptr()
        super().rotate_quantize(layer, sm, x, outer, codes, scales, sums, m, stream, balance)


class WrongSums(HostLibrary):
    def rotate_quantize(self, layer: Any, sm: int, x: int, outer: int, codes: int, scales: int, sums: int, m: int, stream: int, balance: int = 0) -> None:  # fmt: skip # noqa: E501
        super().rotate_quantize(layer, sm, x, outer, codes, scales, sums, m, stream, balance)
        if sums:
            host_view(sums, (self.plan_layer(layer, sm).scale_rows, m), torch.float32)[-1, -1] += 1


class Truncated(HostLibrary):
    def quantize(self, layer: Any, x: Any, outer: Any) -> Any:
        hadamard = hadamard_matrix(layer.block, torch.float32)
        rotated = rotate_by_matrices(x.float(), hadamard, outer)
        _, scale = quantize_activation(rotated, layer.act_bits, layer.act_group)
        grouped = rotated.reshape(len(x), scale.shape[1], -1)
        return (grouped / scale[..., None]).trunc().to(torch.int8).flatten(1), scale


class RoundedBetweenStages(HostLibrary):
    def quantize(self, layer: Any, x: Any, outer: Any) -> Any:
        inner = rotate_by_matrices(x.float(), hadamard_matrix(layer.block, torch.float32), torch.ones(1, 1))
        rotated = rotate_by_matrices(inner.to(x.dtype).float(), torch.eye(layer.block), outer)
        return quantize_activation(rotated, layer.act_bits, layer.act_group)


class OuterNotTransposed(HostLibrary):
    def outer(self, layer: Any, address: int) -> Any:
        return super().outer(layer, address).T


class AsymmetricRange(HostLibrary):
    def quantize(self, layer: Any, x: Any, outer: Any) -> Any:
        codes, scale = super().quantize(layer, x, outer)
        return torch.where(codes == -QMAX[layer.act_bits], codes - 1, codes), scale


class NoFloor(HostLibrary):
    def quantize(self, layer: Any, x: Any, outer: Any) -> Any:
        codes, scale = super().quantize(layer, x, outer)
        return codes, torch.where(scale <= AMAX_FLOOR, torch.nan, scale)


class NanHidden(HostLibrary):
    def quantize(self, layer: Any, x: Any, outer: Any) -> Any:
        return super().quantize(layer, torch.nan_to_num(x, nan=0.0), outer)


class NanSpreads(HostLibrary):
    def multiply(self, *args: Any) -> Any:
        y = super().multiply(*args)
        return y + 0 * y.sum()


class UnwrittenTail(HostLibrary):
    def linear_gemm(self, layer: Any, sm: int, codes: int, scales: int, sums: int, prepared: int, y: int, m: int, *rest: Any) -> None:  # fmt: skip # noqa: E501
        whole = m - m % 16 if m > 16 else m
        plan = self.plan_layer(layer, sm)
        all_scales = host_view(scales, (plan.scale_rows, m), torch.float32)[:, :whole].clone()
        super().linear_gemm(layer, sm, codes, all_scales.data_ptr(), sums, prepared, y, whole, *rest)


class WritesBeyond(HostLibrary):
    def linear_gemm(self, layer: Any, sm: int, codes: int, scales: int, sums: int, prepared: int, y: int, m: int, *rest: Any) -> None:  # fmt: skip # noqa: E501
        super().linear_gemm(layer, sm, codes, scales, sums, prepared, y, m, *rest)
        ctypes.memset(y + 2 * m * layer.n, 0, 2)


class LosesAGroup(HostLibrary):
    def multiply(self, layer: Any, path: str, codes: Any, scales: Any, prepared: bytes) -> Any:
        scales = scales.clone()
        if len(scales) > 1:
            scales[-1] = 0
        return super().multiply(layer, path, codes, scales, prepared)


class NoBias(HostLibrary):
    def multiply(self, layer: Any, path: str, codes: Any, scales: Any, prepared: bytes) -> Any:
        return super().multiply(layer, path, codes, scales, prepared) - super().multiply(
            layer, path, codes, 0 * scales, prepared
        )


class CoarseSums(HostLibrary):
    """Products summed with 11 bits, as fp16 accumulators would."""

    def multiply(self, layer: Any, path: str, codes: Any, scales: Any, prepared: bytes) -> Any:
        base = super().multiply(layer, path, codes, 0 * scales, prepared)
        exact = super().multiply(layer, path, codes, scales, prepared) - base
        mantissa, exponent = torch.frexp(exact)
        return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent) + base


class ScaleOffByOneBit(HostLibrary):
    def prepare_weight(self, layer: Any, sm: int, weight: Any, prepared: int, size: int, stream: int) -> None:
        super().prepare_weight(layer, sm, weight, prepared, size, stream)
        plan = self.plan_layer(layer, sm)
        width = layer.k // 2 if plan.codes == "s4" else layer.k
        scale = host_view(prepared + -(-layer.n * width // 256) * 256, (layer.n,), torch.int32)
        scale[-1] += 1


class RacyOutput(HostLibrary):
    calls = 0

    def multiply(self, *args: Any) -> Any:
        self.calls += 1
        return super().multiply(*args) * (1 + 2.0**-7 * (self.calls % 2))


class WrongPath(HostLibrary):
    def plan_layer(self, layer: Any, sm: int) -> Any:
        from dataclasses import replace

        plan = super().plan_layer(layer, sm)
        return replace(plan, path="s8_token") if sm == 90 and plan.path == "s8_wgmma" else plan


class WrapsRows(HostLibrary):
    """Row indices that overflow: the last token is written over the first."""

    def linear_gemm(self, layer: Any, sm: int, codes: int, scales: int, sums: int, prepared: int, y: int, m: int, *rest: Any) -> None:  # fmt: skip # noqa: E501
        super().linear_gemm(layer, sm, codes, scales, sums, prepared, y, m, *rest)
        out = host_view(y, (m, layer.n), torch.bfloat16)
        if m > 64:
            out[0] = out[-1]


class WrongAtTheTilesEdge(HostLibrary):
    """The first token of the second tile gets the one before."""

    def linear_gemm(self, layer: Any, sm: int, codes: int, scales: int, sums: int, prepared: int, y: int, m: int, *rest: Any) -> None:  # fmt: skip # noqa: E501
        super().linear_gemm(layer, sm, codes, scales, sums, prepared, y, m, *rest)
        out = host_view(y, (m, layer.n), DTYPES[layer.dtype])
        if m > 128:
            out[128] = out[127]


class SkipsOneToken(HostLibrary):
    """A token in the middle, which no float64 product looks at, stays unwritten."""

    def linear_gemm(self, layer: Any, sm: int, codes: int, scales: int, sums: int, prepared: int, y: int, m: int, *rest: Any) -> None:  # fmt: skip # noqa: E501
        before = host_view(y, (m, layer.n), DTYPES[layer.dtype]).clone()
        super().linear_gemm(layer, sm, codes, scales, sums, prepared, y, m, *rest)
        if m > 150:
            host_view(y, (m, layer.n), DTYPES[layer.dtype])[141] = before[141]


class WidestGrid(HostLibrary):
    def search_grid(self, grid: Any, weight: int, out: Any, stream: int) -> None:
        super().search_grid(replace(grid, solver="minmax"), weight, out, stream)


class OneCodeOff(HostLibrary):
    def search_grid(self, grid: Any, weight: int, out: Any, stream: int) -> None:
        super().search_grid(grid, weight, out, stream)
        host_view(out.codes, (grid.n, grid.k), torch.int8)[-1, -1] ^= 1


class ForgetsErrors(HostLibrary):
    def gptq_round(self, grid: Any, weight: int, out: Any, group_scales: int, block: int, stream: int) -> None:
        host_view(group_scales, (grid.k // block, block, block), torch.float32).copy_(torch.eye(block))
        super().gptq_round(grid, weight, out, group_scales, block, stream)


class PreparedTwice(HostLibrary):
    """Right the first time a weight is prepared; later its codes are those of another."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def prepare_weight(self, layer: Any, sm: int, weight: Any, prepared: int, size: int, stream: int) -> None:
        super().prepare_weight(layer, sm, weight, prepared, size, stream)
        if weight.codes in self.seen:
            codes = host_view(prepared, (layer.n, layer.k), torch.uint8)
            codes.copy_(codes.flip(0))
        self.seen.add(weight.codes)


class RoughNorm(HostLibrary):
    """Takes half a unit of bf16 too much of a norm, as an approximate root would."""

    def prologue(self, layer: Any, prologue: Any, x: int, m: int) -> torch.Tensor:
        z = super().prologue(layer, prologue, x, m)
        if prologue.norm == "none":
            return z
        return (z.float() * (1 + 2.0**-9)).to(z.dtype)


class RoughGelu(HostLibrary):
    """Computes GELU by the error function."""

    def prologue(self, layer: Any, prologue: Any, x: int, m: int) -> torch.Tensor:
        if not prologue.gelu:
            return super().prologue(layer, prologue, x, m)
        dtype = DTYPES[layer.dtype]
        return torch.nn.functional.gelu(host_view(x, (m, layer.k), dtype).float()).to(dtype)


class OneGate(HostLibrary):
    """Reads the first row of the gate for every token."""

    def prologue(self, layer: Any, prologue: Any, x: int, m: int) -> torch.Tensor:
        return super().prologue(layer, replace(prologue, gate_tokens=0), x, m)


class SwapsTables(HostLibrary):
    """Takes sines for cosines."""

    def rope_quantize(self, rope: Any, x: int, out: int, m: int, stream: int) -> None:
        super().rope_quantize(replace(rope, cosines=rope.sines, sines=rope.cosines), x, out, m, stream)


class TurnsTheText(HostLibrary):
    """Turns the first tokens of a sample, wherever rope begins."""

    def rope_quantize(self, rope: Any, x: int, out: int, m: int, stream: int) -> None:
        super().rope_quantize(replace(rope, rope_first=0), x, out, m, stream)


class ForgetsTheBias(HostLibrary):
    """Leaves the bias of a layer norm out."""

    def rope_quantize(self, rope: Any, x: int, out: int, m: int, stream: int) -> None:
        super().rope_quantize(replace(rope, bias=0), x, out, m, stream)


class NoRotation(HostLibrary):
    """Leaves the rotation of heads out."""

    def rope_quantize(self, rope: Any, x: int, out: int, m: int, stream: int) -> None:
        super().rope_quantize(replace(rope, rotated=False), x, out, m, stream)


class RoundsTwice(HostLibrary):
    """Rounds to 16 bits before it rounds to codes."""

    def rope_quantize(self, rope: Any, x: int, out: int, m: int, stream: int) -> None:
        if not rope.bound:
            super().rope_quantize(rope, x, out, m, stream)
            return
        held = torch.empty(m, rope.channels, dtype=DTYPES[rope.dtype])
        super().rope_quantize(replace(rope, bound=0), x, held.data_ptr(), m, stream)
        again = replace(rope, stride=rope.channels, rope_channels=0, norm="none", rotated=False)
        super().rope_quantize(again, held.data_ptr(), out, m, stream)
