"""The checks of gpu_check that run kernels: each takes a :class:`Bench` and yields :class:`Outcome` rows.

A bench is a device, an SM and a library. With ``host_library.HostLibrary`` and the CPU the same functions run anywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from check_cases import GRIDS, PAIRS, ROWS, Grid, first_rows, layer_of, layers, make_tokens, make_weight
from check_compare import Verdict, check_codes, check_equal, check_expansion, check_product, decode_prepared
from host_library import HostLibrary
from torch import Tensor

from dvdquant.errors import UnsupportedError
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.cuda.arguments import LayerPlan
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.packed_layer import DTYPES, PackedLayer
from dvdquant.ops.repack import LayerShape, prepare, to_bytes

HOST = HostLibrary()
_GUARD_BYTES, _ALIGNMENT = 4096, 256
_GUARD, _POISON = 0xA5, 0xFF
# NumPy repacks this many weights in some hundredths of a second; larger ones are held against the packed weight only.
_REPACKED = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Args:
        name: The name of the check.
        passed: True if all its cases passed.
        cases: The number of cases; 0 means that it was not run.
        worst: The largest error as a share of its bound.
        ties: The number of codes that differ from float64's because they lie at a tie.
        note: The first failure, or a remark.
    """

    name: str
    passed: bool
    cases: int = 1
    worst: float = 0.0
    ties: int = 0
    note: str = ""


class GuardedKernels(CudaKernels):
    """Kernels whose outputs lie between guard zones and start as 0xFF bytes: NaN as a float, −1 as a code.

    Attributes:
        guarded: The buffers with guard zones since the last :meth:`intact`.
    """

    guarded: list[Tensor]

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the poisoned inside of a larger buffer.

        Args:
            shape: The shape of the output.
            dtype: Its dtype.
            device: Its device.
        """
        size = math.prod(shape) * dtype.itemsize
        whole = torch.full((size + 2 * _GUARD_BYTES + _ALIGNMENT,), _GUARD, dtype=torch.uint8, device=device)
        # Outputs on the CPU are aligned too, as the library demands.
        whole = whole[-whole.data_ptr() % _ALIGNMENT :][: size + 2 * _GUARD_BYTES]
        inside = whole[_GUARD_BYTES : _GUARD_BYTES + size].fill_(_POISON)
        self.__dict__.setdefault("guarded", []).append(whole)
        return inside.view(dtype).reshape(shape)

    def intact(self) -> bool:
        """Return whether nothing was written outside of the outputs since the last call."""
        buffers, self.guarded = self.__dict__.get("guarded", []), []
        return all(
            bool((b[:_GUARD_BYTES] == _GUARD).all()) and bool((b[-_GUARD_BYTES:] == _GUARD).all()) for b in buffers
        )


@dataclass
class Bench:
    """The subject of the checks: the kernels, the device they run on, and the sizes.

    Args:
        kernels: The kernels.
        device: The device.
        features: The values of K.
        pairs: The pairs (M, N) of tokens and output channels.
        deadline: The time of ``time.monotonic()`` at which the check of shapes ends.
        paths: Gets the kernel paths that ran.
    """

    kernels: GuardedKernels
    device: torch.device
    features: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = PAIRS
    deadline: float = math.inf
    paths: set[str] = field(default_factory=set)

    def late(self) -> bool:
        """Return whether the time for the check is used up."""
        return time.monotonic() > self.deadline


class Tally:
    """The collected verdicts under names, in the order in which the names first came.

    Attributes:
        rows: The rows by name.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Outcome] = {}

    def add(self, name: str, verdict: Verdict, where: str) -> None:
        """Add a verdict to the row of a name.

        Args:
            name: The name of the row.
            verdict: The verdict.
            where: The case, for the note of a failure.
        """
        row = self.rows.get(name, Outcome(name, True, 0))
        note = row.note or ("" if verdict.passed else f"{where}: {verdict.note}")
        self.rows[name] = Outcome(
            name,
            row.passed and verdict.passed,
            row.cases + 1,
            max(row.worst, verdict.worst),
            row.ties + verdict.ties,
            note,
        )


def check_dispatch(bench: Bench) -> Iterator[Outcome]:
    """Yield the check of the library's plan for every layer, on every SM, against ``dvdquant.ops.paths``.

    Args:
        bench: The kernels and the values of K.
    """
    tally = Tally()
    for sm in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
        for features in bench.features:
            for rows in ROWS:
                for grid, layer in layers(features, rows):
                    got, want = _path(bench.kernels.library.plan_layer, layer, sm), _path(HOST.plan_layer, layer, sm)
                    verdict = Verdict(got == want, note=f"{got} instead of {want}")
                    tally.add("dispatch table", verdict, f"SM {sm / 10}, K {features}, N {rows}, {grid}")
    yield from tally.rows.values()


def _path(plan_layer: Callable[[LayerShape, int], LayerPlan], layer: LayerShape, sm: int) -> str:
    """Return the path of a layer's plan, or "refused"."""
    try:
        return plan_layer(layer, sm).path
    except UnsupportedError:
        return "refused"


def check_shapes(bench: Bench) -> Iterator[Outcome]:
    """Yield the checks of every grid, K, dtype and pair of M and N.

    They are weights bit by bit, codes, products, and both halves in one call.

    Args:
        bench: The kernels, the device and the sizes.
    """
    tally = Tally()
    refused: dict[str, int] = {}
    for features in bench.features:
        for grid, layer in layers(features, max(n for _, n in bench.pairs)):
            if bench.late():
                tally.add(
                    "time", Verdict(False, note="the time was used up before every shape had run"), f"K {features}"
                )
                break
            try:
                bench.kernels.plan(layer)
            except UnsupportedError as error:
                refused[str(error)] = refused.get(str(error), 0) + 1
                continue
            _check_layer(bench, grid, layer, tally)
    yield from tally.rows.values()
    for reason, count in refused.items():
        yield Outcome("refused by the plan", True, count, note=reason)


def _check_layer(bench: Bench, grid: Grid, layer: LayerShape, tally: Tally) -> None:
    """Check one layer at every pair of M and N.

    Args:
        bench: The kernels, the device and the sizes.
        grid: The grid of the layer.
        layer: The layer with the largest N.
        tally: Gets the verdicts.
    """
    packed = make_weight(layer, grid.zero, bench.device, seed=layer.k)
    x = make_tokens(layer, max(m for m, _ in bench.pairs), bench.device, seed=layer.k + 1)
    for rows in sorted({n for _, n in bench.pairs}):
        part, shape = first_rows(packed, rows), replace(layer, n=rows)
        path = bench.kernels.plan(shape).path
        bench.paths.add(path)
        where = f"K {layer.k}, N {rows}, {layer.dtype}, block {layer.block}×{layer.outer}, {grid}"
        prepared = bench.kernels.prepare(shape, part.stored())
        weight, bias = decode_prepared(shape, path, prepared)
        exact = path.startswith("s4") or (layer.weight_groups == 1 and grid.zero in ("midrise", "paper", "symmetric"))
        tally.add(f"{path}: prepared weight", check_expansion(shape, part, weight, exact), where)
        if rows * layer.k <= _REPACKED:
            tally.add(f"{path}: prepared bits", _repacked(shape, path, part, prepared), where)
        held = bench.kernels.make_rows(shape, part.stored())
        if not path.startswith("s4"):
            expanded = bench.kernels.expand(shape, *held)
            verdict = _same_sections(shape, path, prepared, expanded)
            tally.add(f"{path}: packed weight, expanded = prepared", verdict, where)
        for tokens in (m for m, n in bench.pairs if n == rows):
            _check_tokens(
                bench,
                shape,
                part,
                x[:tokens].clone(),
                prepared,
                held,
                weight,
                bias,
                exact,
                tally,
                f"M {tokens}, {where}",
            )


def _check_tokens(
    bench: Bench, layer: LayerShape, packed: PackedLayer, x: Tensor, prepared: Tensor, held: tuple[Tensor, Tensor],
    weight: Tensor, bias: Tensor, integers: bool, tally: Tally, where: str,
) -> None:  # fmt: skip
    """Check one layer on some tokens.

    Args:
        bench: The kernels.
        layer: The layer.
        packed: Its tensors.
        x: The input [M, K].
        prepared: The prepared buffer of its weight.
        held: The codes and rows of its weight as it stays packed.
        weight: The decoded weight, float64 [N, K].
        bias: The decoded bias, float64 [N].
        integers: True if the codes of the prepared weight are integers.
        tally: Gets the verdicts.
        where: The case, for the note of a failure.
    """
    kernels, path = bench.kernels, bench.kernels.plan(layer).path
    codes, scales, sums = kernels.rotate_quantize(layer, x, packed.outer)
    y = kernels.linear_gemm(layer, codes, scales, sums, prepared)
    # If there are many tokens, some are compared: most GPUs do float64 at a 64th of fp32's rate. The NaN poison shows
    # if not all of y was written.
    some = _near_edges(len(x))
    verdict = check_codes(layer, packed, path, x[some], codes[some], scales[:, some], sums[:, some])
    tally.add(f"{path}: codes, scales, sums", verdict, where)
    verdict = check_product(layer, path, codes[some], scales[:, some], weight, bias, y[some], integers)
    if verdict.passed and not bool(torch.isfinite(y).all()):
        verdict = Verdict(False, math.inf, note="an output is not finite, or was not written")
    tally.add(f"{path}: product", verdict, where)
    again = kernels.quant_linear(layer, x, packed.outer, prepared)
    tally.add(f"{path}: one call = two calls", check_equal(y, again, "y"), where)
    once_more = kernels.quant_linear(layer, x, packed.outer, prepared)
    packed_y = kernels.packed_linear(layer, x, packed.outer, *held)
    tally.add(f"{path}: packed weight gives the same bits", check_equal(again, packed_y, "y"), where)
    tally.add(f"{path}: two runs bit-equal", check_equal(again, once_more, "y"), where)
    tally.add(f"{path}: guard zones", Verdict(kernels.intact(), note="written outside an output"), where)


def _repacked(layer: LayerShape, path: str, packed: PackedLayer, prepared: Tensor) -> Verdict:
    """Check the device's prepared buffer against ``dvdquant.ops.repack`` bit by bit, padding left out.

    Args:
        layer: The layer.
        path: The kernel path.
        packed: The tensors of the layer.
        prepared: The prepared buffer.
    """
    raw = to_bytes(prepare(layer, path, *(t.cpu() for t in packed.stored())))
    return _same_sections(layer, path, torch.frombuffer(bytearray(raw), dtype=torch.uint8), prepared.cpu())


def _same_sections(layer: LayerShape, path: str, want: Tensor, got: Tensor) -> Verdict:
    """Check two prepared buffers of a path for the same bits, padding left out.

    Args:
        layer: The layer.
        path: The kernel path.
        want: The one buffer, uint8 [bytes].
        got: The other one, on the same device.
    """
    start = 0
    for size in _section_sizes(layer, path):
        verdict = check_equal(want[start : start + size], got[start : start + size], f"section at byte {start}")
        if not verdict.passed:
            return verdict
        start += -(-size // 256) * 256
    return Verdict(True)


def _section_sizes(layer: LayerShape, path: str) -> list[int]:
    """Return the sizes in bytes of the sections of a prepared buffer, without their padding."""
    codes = layer.n * (layer.k // 2 if path.startswith("s4") else layer.k)
    grouped = path == "s4_group" and layer.weight_groups > 1
    return [codes, *[4 * layer.n] * 3, *[layer.n * layer.weight_groups] * (grouped * (1 + layer.float_zero_point))]


def reachable_layers(
    bench: Bench, features: int = 512, rows: int = 136, rotation: str = "auto"
) -> Iterator[tuple[str, Grid, LayerShape]]:
    """Yield one layer per path and activation width that the device's plan leads to: (path, grid, layer).

    Args:
        bench: The kernels.
        features: K, the number of input channels.
        rows: N, the number of output channels.
        rotation: The Hadamard block, as in a recipe.
    """
    found: set[tuple[str, int]] = set()
    for index, grid in enumerate(GRIDS):
        dtype = ("bf16", "fp16")[index % 2]
        layer = layer_of(grid, features, rows, Rotation.for_features(features, rotation), dtype)
        try:
            path = bench.kernels.plan(layer).path
        except UnsupportedError:
            continue
        if (path, layer.act_bits) not in found:
            found.add((path, layer.act_bits))
            yield path, grid, layer


def check_extremes(bench: Bench, tokens: int = 33) -> Iterator[Outcome]:
    """Yield the checks of codes at ±qmax, of zeros, of the smallest numbers, and of NaN and Inf.

    NaN and Inf must reach their token alone.

    Args:
        bench: The kernels and the device.
        tokens: M, the number of tokens.
    """
    tally = Tally()
    for path, grid, layer in reachable_layers(bench):
        plain = replace(layer, block=1, outer=1)
        packed = make_weight(plain, grid.zero, bench.device, seed=3)
        prepared = bench.kernels.prepare(plain, packed.stored())
        signs = make_tokens(plain, tokens, bench.device, 5).sign()
        x = torch.where(signs == 0, torch.ones_like(signs), signs) * 3
        _judge(bench, plain, packed, prepared, x, tally, f"{path}: all codes ±qmax")
        packed = make_weight(layer, grid.zero, bench.device, seed=4)
        prepared = bench.kernels.prepare(layer, packed.stored())
        x = torch.zeros(tokens, layer.k, dtype=DTYPES[layer.dtype], device=bench.device)
        y = _judge(bench, layer, packed, prepared, x, tally, f"{path}: zeros")
        tally.add(f"{path}: zeros give the bias", check_equal(y, packed.bias.to(y.dtype).expand_as(y), "y"), str(grid))
        x[::2] = torch.finfo(x.dtype).tiny
        _judge(bench, layer, packed, prepared, x, tally, f"{path}: smallest normal numbers")
        for value in (math.nan, math.inf, -math.inf):
            verdict = _nonfinite(bench, layer, packed, prepared, value)
            tally.add(f"{path}: NaN and Inf stay visible", verdict, f"{value}, {grid}")
        empty = bench.kernels.quant_linear(layer, x[:0], packed.outer, prepared)
        tally.add(f"{path}: no tokens", Verdict(tuple(empty.shape) == (0, layer.n)), str(grid))
    yield from tally.rows.values()


def _judge(
    bench: Bench, layer: LayerShape, packed: PackedLayer, prepared: Tensor, x: Tensor, tally: Tally, name: str
) -> Tensor:
    """Check codes and product of one input, and return y [M, N].

    Args:
        bench: The kernels.
        layer: The layer.
        packed: Its tensors.
        prepared: The prepared buffer of its weight.
        x: The input [M, K].
        tally: Gets the verdicts.
        name: The name of their row.
    """
    path = bench.kernels.plan(layer).path
    codes, scales, sums = bench.kernels.rotate_quantize(layer, x, packed.outer)
    tally.add(name, check_codes(layer, packed, path, x, codes, scales, sums), "codes")
    y = bench.kernels.linear_gemm(layer, codes, scales, sums, prepared)
    weight, bias = decode_prepared(layer, path, prepared)
    tally.add(name, check_product(layer, path, codes, scales, weight, bias, y), "product")
    return y


def _nonfinite(bench: Bench, layer: LayerShape, packed: PackedLayer, prepared: Tensor, value: float) -> Verdict:
    """Check that one NaN or infinity makes its token not finite, and changes no other token."""
    x = make_tokens(layer, 9, bench.device, 6)
    clean = bench.kernels.quant_linear(layer, x, packed.outer, prepared)
    x[4, layer.k // 3] = value
    y = bench.kernels.quant_linear(layer, x, packed.outer, prepared)
    # The smallest row scale turns an infinite activation scale into infinity times a finite number: still not finite.
    hidden = int(torch.isfinite(y[4]).sum())
    others = [i for i in range(9) if i != 4]
    if hidden:
        return Verdict(False, math.inf, note=f"{hidden} of {layer.n} outputs of the token are finite")
    return check_equal(clean[others], y[others], "other tokens")


def check_exact_sums(bench: Bench, features: int = 1024) -> Iterator[Outcome]:
    """Yield the checks of A4 on the largest codes, whose sums are exact integers.

    This holds for every partial sum of a group, up to 7·15·128 = 13440 on e4m3_group. Scales and steps are powers of
    two, so y is acc + bias with the bias −acc of the first token: equal tokens must give exactly 0, and a token with
    one code changed exactly the product of that change. A sum that loses a bit shows.

    Args:
        bench: The kernels and the device.
        features: K, the number of input channels.
    """
    tally = Tally()
    for act_group in (0, 64, 128):
        layer = layer_of(Grid(4, act_group, 0, "midrise"), features, 136, Rotation(features, 1, 1), "bf16")
        path = bench.kernels.plan(layer).path
        for pattern in ("same signs", "half and half", "alternating", "random"):
            tally.add(
                f"{path}: integer-exact sums", _exact_sums(bench, layer, pattern), f"group {act_group}, {pattern}"
            )
    yield from tally.rows.values()


def _exact_sums(bench: Bench, layer: LayerShape, pattern: str) -> Verdict:
    """Check the sums of one pattern of signs.

    Args:
        bench: The kernels and the device.
        layer: The layer.
        pattern: The signs along K: ``same signs``, ``half and half``, ``alternating`` or ``random``.
    """
    from dvdquant.numerics.packing import pack_int4
    from dvdquant.ops.rotate_quantize import encode_codes

    n, k, device, tokens = layer.n, layer.k, bench.device, 65
    path = bench.kernels.plan(layer).path
    generator = torch.Generator(device).manual_seed(8)
    column = torch.arange(k, device=device)
    sign = {
        "same signs": torch.ones_like(column),
        "half and half": 1 - 2 * (column % 128 // 64),
        "alternating": 1 - 2 * (column % 2),
        "random": 2 * torch.randint(0, 2, (k,), generator=generator, device=device) - 1,
    }[pattern]
    # Weight codes −8 and 7 stand for −7.5 and 7.5 steps: the odd integers ∓15 in half steps.
    flips = 2 * torch.randint(0, 2, (n, 1), generator=generator, device=device) - 1
    odd = 15 * sign * flips
    codes4 = torch.div(odd - 1, 2, rounding_mode="floor").to(torch.int8)
    acts = (7 * torch.ones(tokens, k, device=device)).to(torch.int8)
    for token in range(1, tokens):
        acts[token, (token * 37) % k] = token % 15 - 7
    total = acts[0].double() @ odd.double().T
    ones = torch.ones(n, device=device)
    packed = (pack_int4(codes4).view(torch.int8), 2 * ones, torch.full((n, 1), 255, dtype=torch.uint8, device=device),
              -0.5 * ones, -total.float())  # fmt: skip
    prepared = bench.kernels.prepare(layer, packed)
    groups = layer.k // layer.act_group if layer.act_group else 1
    sums = acts.reshape(tokens, groups, -1).float().sum(dim=2).T.contiguous()
    scales = torch.ones(groups, tokens, device=device)
    y = bench.kernels.linear_gemm(layer, encode_codes(acts, path), scales, sums, prepared)
    want = (acts.double() @ odd.double().T - total).to(y.dtype)
    return check_equal(want + 0, y + 0, f"sums of {pattern} signs")


def check_large(bench: Bench, tokens: int, features: int, rows: int, chunk: int = 512) -> Iterator[Outcome]:
    """Yield the checks of tensors past 2³¹ elements: RQ of [tokens, features], and QL to [tokens, rows].

    Some tokens are compared.

    Args:
        bench: The kernels and the device.
        tokens: M, the number of tokens.
        features: K of the check of codes.
        rows: N of the check of outputs.
        chunk: The number of tokens that are compared at a time.
    """
    tally = Tally()
    picks = _picks(tokens, features, rows)
    for name, k, n in (("codes", features, 8), ("outputs", 256, rows)):
        layer = layer_of(Grid(8, 0, 0, "midrise"), k, n, Rotation.for_features(k, "auto"), "bf16")
        path = bench.kernels.plan(layer).path
        packed = make_weight(layer, "midrise", bench.device, seed=9)
        x = torch.empty(tokens, k, dtype=torch.bfloat16, device=bench.device)
        for start in range(0, tokens, chunk * 8):
            part = x[start : start + chunk * 8]
            part.copy_(make_tokens(layer, len(part), bench.device, seed=start))
        prepared = bench.kernels.prepare(layer, packed.stored())
        codes, scales, sums = bench.kernels.rotate_quantize(layer, x, packed.outer)
        y = bench.kernels.linear_gemm(layer, codes, scales, sums, prepared)
        weight, bias = decode_prepared(layer, path, prepared)
        where = f"{tokens}×{k}→{n}"
        for some in torch.split(picks, chunk):
            verdict = check_codes(layer, packed, path, x[some], codes[some], scales[:, some], sums[:, some])
            tally.add(f"{path}: {name} beyond 2³¹ elements", verdict, where)
            verdict = check_product(layer, path, codes[some], scales[:, some], weight, bias, y[some])
            tally.add(f"{path}: {name} beyond 2³¹ elements", verdict, where)
        guards = Verdict(bench.kernels.intact(), note="written outside an output")
        tally.add(f"{path}: {name} beyond 2³¹ elements", guards, where)
    yield from tally.rows.values()


def _near_edges(tokens: int, tile: int = 128) -> Tensor:
    """Return the numbers of tokens to compare, ascending.

    Of few tokens it is all. Of many it is those at the edges of tiles, the first, the last, and some 61 between.

    Args:
        tokens: The number of tokens.
        tile: The tokens of a tile.
    """
    edges = {edge + offset for edge in (0, tile, 2 * tile, tokens // tile * tile, tokens) for offset in (-2, -1, 0, 1)}
    wanted = set(range(tokens)) if tokens <= 2 * tile else edges | set(range(0, tokens, max(1, tokens // 61)))
    return torch.tensor(sorted(t for t in wanted if 0 <= t < tokens))


def _picks(tokens: int, features: int, rows: int) -> Tensor:
    """Return the first and last tokens, those around the 2³¹st element of x and of y, and some 61 between."""
    edges: list[int] = []
    for width in {features, rows}:
        for limit in (2**31, 2**32):
            edges += range(limit // width - 2, limit // width + 3)
    wanted = {0, 1, tokens - 2, tokens - 1, *edges, *range(0, tokens, max(1, tokens // 61))}
    return torch.tensor(sorted(t for t in wanted if 0 <= t < tokens))


def run_all(checks: Iterable[Iterator[Outcome]]) -> Iterator[Outcome]:
    """Yield every outcome; a check that raises is one failed row, and the others still run.

    Args:
        checks: The checks.
    """
    for check in checks:
        try:
            yield from check
        except Exception as error:  # noqa: BLE001 - whatever a check raises, it costs its own rows alone
            yield Outcome(getattr(check, "__name__", "check"), False, note=f"{type(error).__name__}: {error}")
