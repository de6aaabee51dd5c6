"""The GEMMs of ``kernels/csrc``: the grouped kernel run on the CPU, and the algebra the others rely on.

The grouped mma.sync kernel is compiled from the source the GPU gets, against the emulator of ``kernels/emulator``, and
compared with float64. The CUTLASS kernels cannot run here; what their epilogues and code formats assume is proven below
in exact integers and float64:

- weights expanded to 8 bits carry their zero-point exactly (mid-rise: 2c + 1 at half the step);
- one sum of codes per token corrects a zero-point;
- partial sums of e4m3 codes are exact if the tensor core keeps 13 bits below the leading one of the largest term it
  aligns. PTX leaves that precision open and 13 is what is reported for Hopper, so gpu_check has to show, with the extreme
  codes used here, that the device gives the exact integers.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
GUARD = 64  # 16-bit elements behind y that nothing may write
POISON = 0x7FC1  # a NaN in bf16 and fp16
OK, UNSUPPORTED = 0, 2
UNIT = 2.0**-24  # of one fp32 rounding


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernel")
    library = tmp_path_factory.mktemp("emulated") / "grouped.so"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-DDVDQ_EMULATE", "-Wno-unknown-pragmas", "-shared"]
    command += ["-fPIC", f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'csrc'}", str(KERNELS / "emulator" / "grouped.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=120)
    loaded = ctypes.CDLL(str(library))
    loaded.grouped_error.restype = ctypes.c_char_p
    return loaded


@dataclass(frozen=True)
class Case:
    """One product; act_group 0 = one scale per token, weight_groups 1 = one scale and zero-point per row."""

    bits: int
    m: int
    n: int
    k: int
    act_group: int = 0
    weight_groups: int = 1
    float_zero_point: bool = False
    half: bool = False
    sm: int = 80


@dataclass
class Operands:
    """Arrays of one product; codes and weight are the integers, unpacked."""

    codes: np.ndarray
    weight: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    row_scale: np.ndarray
    row_zero: np.ndarray
    bias: np.ndarray
    group_scale: np.ndarray | None
    group_zero: np.ndarray | None


def make_operands(case: Case, seed: int = 0) -> Operands:
    """Random codes with rows and columns at the extremes, scales over three decades."""
    rng = np.random.default_rng(seed)
    low, high = (-8, 7) if case.bits == 4 else (-128, 127)
    codes = rng.integers(-high, high + 1, (case.m, case.k))
    weight = rng.integers(low, high + 1, (case.n, case.k))
    codes[0], weight[0] = high, low
    codes[-1, ::2], weight[-1] = -high, high
    groups = case.k // (case.act_group or case.k)
    weighted = case.bits == 4 and case.weight_groups > 1
    shape = (case.n, case.weight_groups)
    return Operands(
        codes,
        weight,
        np.exp(rng.uniform(-7, 0, (groups, case.m))).astype(np.float32),
        np.ascontiguousarray(codes.reshape(case.m, groups, -1).sum(2).T, dtype=np.float32),
        (np.exp(rng.uniform(-7, 0, case.n)) / (case.k << case.bits)).astype(np.float32),  # |y| within fp16
        (rng.normal(size=case.n) if case.bits == 4 else np.zeros(case.n)).astype(np.float32),
        rng.normal(size=case.n).astype(np.float32),
        rng.integers(1, 256, shape).astype(np.uint8) if weighted else None,
        rng.integers(0, 256, shape).astype(np.uint8) if weighted and case.float_zero_point else None,
    )


def reference(case: Case, ops: Operands) -> tuple[np.ndarray, np.ndarray]:
    """y in float64, and a bound of the kernel's fp32 error before y is rounded.

    The bound counts roundings: each group's term passes through at most 5 (factor, zero-point, its product with the sum,
    scale, accumulation) and is then carried through one addition per later group; the end adds 4.
    """
    groups = ops.scales.shape[0]
    group_scale = np.ones((case.n, case.weight_groups)) if ops.group_scale is None else ops.group_scale / 255.0
    zero = np.repeat(ops.row_zero[:, None].astype(np.float64), case.weight_groups, 1)
    if ops.group_zero is not None:
        zero = ops.group_zero / 16.0 - 8.0
    total, size = np.zeros((case.m, case.n)), np.zeros((case.m, case.n))
    for g in range(groups):
        part = slice(g * case.k // groups, (g + 1) * case.k // groups)
        column = g * case.weight_groups // groups
        partial = (ops.codes[:, part] @ ops.weight[:, part].T).astype(np.float64)
        correction = ops.codes[:, part].sum(1)[:, None] * zero[None, :, column]
        weight = ops.scales[g].astype(np.float64)[:, None] * group_scale[None, :, column]
        total += weight * (partial - correction)
        size += weight * (np.abs(partial) + np.abs(correction))
    scaled = ops.row_scale.astype(np.float64) * total + ops.bias
    return scaled, (groups + 9) * UNIT * (ops.row_scale * size + np.abs(ops.bias))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as the kernel reads them: int8, or two 4-bit codes per byte, low nibble = even k."""
    if bits == 8:
        return np.ascontiguousarray(codes.astype(np.int8))
    nibbles = (codes & 15).astype(np.uint8)
    return np.ascontiguousarray(nibbles[:, ::2] | nibbles[:, 1::2] << 4)


def run(emulated: ctypes.CDLL, case: Case, ops: Operands, schedule: int = 0) -> tuple[int, torch.Tensor]:
    """Status and y; checks that nothing behind y is written."""
    y = np.full(case.m * case.n + GUARD, POISON, np.uint16)
    sizes = (case.m, case.n, case.k, case.act_group, case.weight_groups, case.float_zero_point, case.half, case.sm)
    arrays = [pack(ops.codes, case.bits), ops.scales, ops.sums, pack(ops.weight, case.bits)]
    arrays += [ops.row_scale, ops.row_zero, ops.bias, ops.group_scale, ops.group_zero, y]
    pointers = [None if a is None else a.ctypes.data_as(ctypes.c_void_p) for a in arrays]
    status = emulated.run_grouped(
        case.bits, (ctypes.c_int64 * 8)(*map(int, sizes)), *pointers, ctypes.c_uint64(schedule)
    )
    assert (y[-GUARD:] == POISON).all(), "written behind y"
    kind = torch.float16 if case.half else torch.bfloat16
    return status, torch.from_numpy(y[:-GUARD].view(np.int16)).view(kind).reshape(case.m, case.n)


CASES = [
    Case(8, 1, 1, 32, act_group=32),
    Case(8, 130, 131, 192, act_group=64),
    Case(8, 65, 136, 384, act_group=128, half=True, sm=90),
    Case(8, 129, 8, 288, act_group=96, sm=120),
    Case(8, 3, 7, 160),  # per token, odd n: the fallback of the per-token paths
    Case(8, 17, 9, 416, half=True),
    Case(4, 1, 1, 32),  # half an mma step
    Case(4, 130, 131, 96),  # one and a half
    Case(4, 67, 130, 256, act_group=64),
    Case(4, 129, 24, 512, act_group=128, half=True, sm=89),
    Case(4, 33, 130, 512, act_group=64, weight_groups=4),
    Case(4, 130, 9, 384, act_group=128, weight_groups=3, float_zero_point=True),
    Case(4, 18, 40, 512, act_group=64, weight_groups=8, float_zero_point=True, half=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_kernel_against_float64(emulated: ctypes.CDLL, case: Case) -> None:
    ops = make_operands(case)
    status, y = run(emulated, case, ops)
    assert status == OK, emulated.grouped_error()
    exact, bound = reference(case, ops)
    eps = torch.finfo(y.dtype).eps / 2
    smallest = torch.finfo(y.dtype).smallest_normal * eps
    error = np.abs(y.double().numpy() - exact)
    allowed = bound + eps * (np.abs(exact) + bound) + smallest
    assert (error <= allowed).all(), f"worst {np.max(error / allowed):.2f} of what fp32 allows"


@pytest.mark.parametrize("case", [CASES[1], CASES[11]], ids=str)
def test_grouped_kernel_does_not_depend_on_thread_order(emulated: ctypes.CDLL, case: Case) -> None:
    ops = make_operands(case)
    results = [run(emulated, case, ops, schedule)[1] for schedule in (0, 1, 7)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_grouped_kernel_is_exact_with_power_of_two_scales(emulated: ctypes.CDLL, bits: int) -> None:
    case = Case(bits, 20, 34, 256, act_group=64)
    ops = make_operands(case)
    ops.scales = np.exp2(np.arange(ops.scales.size).reshape(ops.scales.shape) % 3).astype(np.float32)
    ops.row_scale = np.full(case.n, 0.25, np.float32)
    ops.row_zero = np.full(case.n, -0.5 if bits == 4 else 0.0, np.float32)  # mid-rise
    ops.bias = np.arange(case.n).astype(np.float32)
    exact, _ = reference(case, ops)  # every term is a multiple of 1/8 below 2^21: exact in fp32
    assert np.abs(exact).max() < 2**21
    assert torch.equal(run(emulated, case, ops)[1], torch.from_numpy(exact).to(torch.bfloat16))


def test_grouped_kernel_carries_nan_and_infinity_of_a_scale(emulated: ctypes.CDLL) -> None:
    case = Case(8, 5, 6, 64, act_group=32)
    ops = make_operands(case)
    ops.codes[1:3] = 0
    ops.scales[0, 1], ops.scales[1, 2] = np.nan, np.inf
    y = run(emulated, case, ops)[1]
    assert y[1:3].isnan().all()
    assert y[[0, 3, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case(8, 4, 8, 48), "multiple of 32"),
        (Case(8, 4, 8, 128, act_group=16), "groups that are multiples of 32"),
        (Case(4, 4, 8, 128, act_group=32), "groups that are multiples of 64"),
        (Case(4, 4, 8, 256, act_group=128, weight_groups=4), "s8_group can run"),
        (Case(4, 4, 8, 128, act_group=64, sm=90), "SM 9.0"),
    ],
    ids=str,
)
def test_grouped_kernel_refuses_in_words(emulated: ctypes.CDLL, case: Case, says: str) -> None:
    ops = make_operands(Case(case.bits, case.m, case.n, case.k))
    status, y = run(emulated, case, ops)
    assert status == UNSUPPORTED
    assert says in emulated.grouped_error().decode()
    assert (y.view(torch.int16) == POISON).all()


def test_midrise_and_integer_zero_points_expand_exactly() -> None:
    codes = np.arange(-8, 8)
    step = 0.0123  # any fp32 value: halving it is exact
    assert (np.float32(step) / np.float32(2) * np.float32(2)) == np.float32(step)
    for zero, odd in ((-0.5, True), (0.0, False), (7.0, False), (-8.0, False)):
        expanded = 2 * codes + 1 if odd else codes - int(zero)
        scale = step / 2 if odd else step
        assert np.abs(expanded).max() <= 15
        np.testing.assert_allclose(expanded * scale, (codes - zero) * step, rtol=1e-15)


def test_zero_point_correction_is_an_identity_of_integers() -> None:
    rng = np.random.default_rng(1)
    codes, weight = rng.integers(-7, 8, (5, 96)), rng.integers(-8, 8, (6, 96))
    twice = rng.integers(-17, 18, 6)  # 2z: mid-rise and integer zero-points alike
    left = 2 * (codes @ weight.T) - codes.sum(1)[:, None] * twice[None]
    right = codes @ (2 * weight - twice[:, None]).T
    assert (left == right).all()


def aligned_sum(accumulator: float, products: np.ndarray, fraction: int) -> float:
    """One tensor-core addition: terms are cut to ``fraction`` bits below the leading one of the largest, then added."""
    terms = np.append(products, accumulator)
    largest = np.abs(terms).max()
    if largest == 0:
        return 0.0
    quantum = 2.0 ** (math.floor(math.log2(largest)) - fraction)
    total = (np.trunc(terms / quantum) * quantum).sum()
    # The result is normalized and cut again.
    if total == 0:
        return 0.0
    quantum = 2.0 ** (math.floor(math.log2(abs(total))) - fraction)
    return float(np.trunc(total / quantum) * quantum)


def dot_in_tensor_core(codes: np.ndarray, weight: np.ndarray, width: int, fraction: int) -> float:
    total = 0.0
    for start in range(0, len(codes), width):
        part = slice(start, start + width)
        total = aligned_sum(total, codes[part] * weight[part], fraction)
    return total


def extreme_rows(group: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    signs = np.where(np.arange(group) % 2 == 0, 1.0, -1.0)
    rows = [(np.full(group, 7.0), np.full(group, 15.0)), (np.full(group, -7.0), np.full(group, 16.0))]
    rows += [(7 * signs, 15 * signs), (np.full(group, 7.0), np.where(np.arange(group) < group // 2, 15.0, -15.0))]
    rows += [(rng.integers(5, 8, group) * 1.0, rng.integers(7, 8, group) * 2.0 + 1) for _ in range(8)]
    rows += [(rng.integers(-7, 8, group) * 1.0, rng.integers(-8, 8, group) * 2.0 + 1) for _ in range(8)]
    return rows


def test_4_bit_codes_are_exact_in_e4m3() -> None:
    integers = torch.arange(-16, 17, dtype=torch.float32)
    assert torch.equal(integers.to(torch.float8_e4m3fn).float(), integers)
    assert torch.tensor(17.0).to(torch.float8_e4m3fn).float() != 17.0


@pytest.mark.parametrize("width", [4, 8, 16, 32])
def test_e4m3_partial_sums_are_exact_with_13_bits(width: int) -> None:
    assert 7 * 16 * 128 < 2**14
    for codes, weight in extreme_rows(128):
        assert dot_in_tensor_core(codes, weight, width, 13) == codes @ weight


def test_e4m3_bounds_are_tight() -> None:
    """12 bits, or groups of 256, lose integers: what the two tests above assert is not free."""
    assert any(dot_in_tensor_core(c, w, 32, 12) != c @ w for c, w in extreme_rows(128))
    assert any(dot_in_tensor_core(c, w, 32, 13) != c @ w for c, w in extreme_rows(256))


@pytest.mark.slow
def test_mode_g_loads_every_scale_once(tmp_path: Path) -> None:
    """The collective's element-wise scale loads, walked on the CPU with the kernel's own layout; any m, no padding."""
    compiler = shutil.which("nvcc")
    roots = [Path(os.environ.get("CUTLASS_ROOT", "/nonexistent")), KERNELS.parent / "build" / "kernels" / "cutlass"]
    headers = next((header for root in roots for header in root.glob("**/include/cutlass/cutlass.h")), None)
    if compiler is None or headers is None:
        pytest.skip("needs nvcc and the CUTLASS headers (CUTLASS_ROOT, or what `make kernels` fetches)")
    program = tmp_path / "scale_loads"
    command = [compiler, "-std=c++17", "-DNDEBUG", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"]
    command += [
        "-I",
        str(headers.parents[1]),
        "-I",
        str(KERNELS / "csrc"),
        str(KERNELS / "emulator" / "scale_loads.cu"),
    ]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=300)
    for m, k in ((1, 128), (127, 512), (128, 3072), (129, 512), (4095, 1536), (32760, 128)):
        done = subprocess.run([str(program), str(m), str(k)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout
