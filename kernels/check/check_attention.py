"""The checks of gpu_check of libraries with 8-bit attention: each that is installed, against exact attention, and how fast it is.

Sessions judge a library on their own first layer, too. Here its error is against fp32, and at a size of a real model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from check_kernels import Bench, Outcome
from torch import Tensor

from dvdquant.ops.attention.e4m3 import e4m3_operands
from dvdquant.ops.attention.ladder import MAX_ERROR, attention_error, exact, seconds
from dvdquant.ops.attention.libraries import LIBRARIES, Library

# Wan2.1-14B at 81 frames of 832 x 480. The last tile of 128 tokens is not full.
SHAPE = (1, 32760, 40, 128)
# Queries that are compared, the first and the last among them: exact attention of all takes minutes in fp32.
_QUERIES = 64
# The standard deviation of the scores: some keys matter much more than others, as in a real layer.
_SPREAD = 2.0


def check_attention(
    bench: Bench,
    shape: tuple[int, int, int, int] = SHAPE,
    libraries: Mapping[str, Library] = LIBRARIES,
    apart: Callable[..., list[Outcome]] | None = None,
) -> Iterator[Outcome]:
    """Yield a row for each library, with its error and its speed; one that is not here is a row that says why.

    Args:
        bench: The device and its SM.
        shape: [B, S, H, d] of q, k and v.
        libraries: The libraries by name.
        apart: Makes the calls for one of :data:`LIBRARIES`, in a process of its own, which a library may crash; None makes
            them here.
    """
    reasons = {name: library.refused(bench.kernels.sm, shape[-1]) for name, library in libraries.items()}
    for name, reason in reasons.items():
        if reason is not None:
            yield Outcome(f"attention: {name}", True, 0, note=f"not run: {reason}")
    for name, reason in reasons.items():
        if reason is not None:
            continue
        try:
            if apart is None:
                yield from library_rows(name, libraries[name], shape, bench.device)
            else:
                yield from apart(rows_of, name, shape, str(bench.device))
        except Exception as error:  # noqa: BLE001 - whatever becomes of a library, the others are still checked
            yield Outcome(f"attention: {name}", False, note=_words(error))


def rows_of(name: str, shape: tuple[int, int, int, int], device: str) -> list[Outcome]:
    """Return the rows of one of :data:`LIBRARIES`.

    Args:
        name: Its name.
        shape: [B, S, H, d] of q, k and v.
        device: The word of the device.
    """
    return library_rows(name, LIBRARIES[name], shape, torch.device(device))


def library_rows(name: str, library: Library, shape: tuple[int, int, int, int], device: torch.device) -> list[Outcome]:
    """Return the rows of one library: of q, k and v in 16 bits, and of codes where it takes them.

    Args:
        name: What its rows are called.
        library: The library.
        shape: [B, S, H, d] of q, k and v.
        device: The device.
    """
    q, k, v = _operands(shape, device)
    scale = shape[-1] ** -0.5
    chosen = torch.linspace(0, shape[1] - 1, min(_QUERIES, shape[1]), device=device).long()
    wanted = exact(q[:, chosen].float(), k.float(), v.float(), scale)
    exact(q, k, v, scale)
    sixteen = seconds(lambda: exact(q, k, v, scale), device)
    # No row of a rotated head has a larger value than its length.
    bounds = torch.stack([x.float().norm(dim=-1).amax() for x in (q, k)])
    (q_codes, k_codes, _), _ = e4m3_operands(q, k, v, bounds)
    forms = {"": (q, k, v)} | ({", of codes": (q_codes, k_codes, v)} if library.codes else {})
    rows = []
    for words, operands in forms.items():
        row = f"attention: {name}{words}"
        try:
            rows.append(_row(row, library, operands, (scale, bounds), (chosen, wanted), sixteen))
        except Exception as error:  # noqa: BLE001 - whatever a library raises, its other form is still checked
            rows.append(Outcome(row, False, note=_words(error)))
    return rows


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def _operands(shape: tuple[int, int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in bf16: scores as spread as :data:`_SPREAD`, heads of v with means, a few large channels in k."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    q *= _SPREAD
    k[..., :: max(1, shape[-1] // 4)] *= 4
    q[..., :: max(1, shape[-1] // 4)] /= 4
    v += torch.linspace(-1, 1, shape[2], device=device)[:, None]
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def _row(
    name: str,
    library: Library,
    operands: tuple[Tensor, Tensor, Tensor],
    how: tuple[float, Tensor],
    judge: tuple[Tensor, Tensor],
    sixteen: float,
) -> Outcome:
    """Return the row of one library: its error, TOPS, and the time of 16 bit over its own, which need not be above 1."""
    kernel = library.load()
    chosen, wanted = judge
    v = operands[2]
    out = kernel(*operands, *how)
    if out.shape != v.shape or out.dtype != v.dtype:
        return Outcome(name, False, note=f"it gives {tuple(out.shape)} {out.dtype}, not {tuple(v.shape)} {v.dtype}")
    error = attention_error(out[:, chosen], wanted)
    taken = max(seconds(lambda: kernel(*operands, *how), v.device), 1e-9)
    batch, tokens, heads, channels = v.shape
    tops = 4.0 * batch * heads * tokens**2 * channels / taken / 1e12
    note = f"{100 * error:.2g} % from exact, {tops:.3g} TOPS, {sixteen / taken:.2f} times as fast as 16 bit"
    # Not "error > MAX_ERROR": a NaN is an error too.
    return Outcome(name, error <= MAX_ERROR, worst=error / MAX_ERROR, note=note)
