"""8-bit attention: the definition against float64, and how a session comes to its library."""

from __future__ import annotations

import gc
import importlib
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.errors import ChoiceError, EngineError, ShapeError, UnsupportedError
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.attention.definition import (
    FORMATS,
    K_BLOCK,
    P_TILE,
    Q_BLOCK,
    AttentionFormat,
    block_amax,
    e4m3_grid,
    exact_attention,
    quantized_attention,
    tile_grid,
)
from dvdquant.ops.attention.e4m3 import e4m3_operands
from dvdquant.ops.attention.ladder import Attention, exact, rungs_for
from dvdquant.ops.attention.libraries import (
    LADDERS,
    LIBRARIES,
    REFERENCE,
    Library,
    ladder,
    ladder_rows,
    ladders_text,
)
from dvdquant.ops.attention.operation import attention, number_of


def operands(queries: int = 200, keys: int = 150, d: int = 64, seed: int = 0, std: float = 1.0) -> list[Tensor]:
    """q, k, v [2, 3, tokens, d] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, queries, d), (2, 3, keys, d), (2, 3, keys, d))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [q * std, k * std, v]


def relative(y: Tensor, exact_y: Tensor) -> float:
    return float((y.double() - exact_y).norm() / exact_y.norm())


# --------------------------------------------------------------------------------------------------------- definition


def half_step(x: Tensor, amax: Tensor, kind: str) -> Tensor:
    """How far rounding to a grid moves a value, by the definition of the format."""
    if kind == "int8":
        return (amax / 254).expand_as(x)
    # e4m3 has 3 bits behind the point, and 2⁻⁹ as its smallest step. The codes pass through fp32.
    return (x.abs() * 2.0**-4).clamp(min=1e-300) + amax / 448 * 2.0**-10


def worst_case(q: Tensor, k: Tensor, v: Tensor, kind: AttentionFormat, bounds: Tensor | None) -> Tensor:
    """The largest distance from exact attention that the roundings allow, in fp64; no probability in it."""
    if kind.centred:
        k = k - k.mean(2, keepdim=True)
    if kind.rotated:
        q, k = (t @ hadamard_matrix(t.shape[-1]) for t in (q, k))
    if kind.qk == "int8":
        of_q = half_step(q, block_amax(q, Q_BLOCK), "int8")
        of_k = half_step(k, block_amax(k, K_BLOCK), "int8")
    else:
        limits = (q.abs().amax(), k.abs().amax()) if bounds is None else bounds.double().unbind()
        of_q, of_k = (half_step(t, limit, "e4m3") for t, limit in zip((q, k), limits))
    scale = q.shape[-1] ** -0.5
    of_scores = scale * (of_q @ k.abs().mT + (q.abs() + of_q) @ of_k.mT)
    # Scores off by e at most: weights off by exp(2e) at most.
    growth = (2 * of_scores.amax(-1, keepdim=True)).exp()
    weights = (q @ k.mT * scale).softmax(-1)
    channel = v.abs().amax(2, keepdim=True)
    of_v = half_step(v, channel, "e4m3" if kind.pv == "e4m3" else "int8")
    if kind.pv == "e4m3":
        # The sum of exp(s − max s) is 1 at least.
        of_p = weights * growth * 2.0**-4 + 2.0**-10 / 448
    else:
        keys = weights.shape[-1]
        tiles = torch.nn.functional.pad(weights * growth, (0, -keys % P_TILE)).unflatten(-1, (-1, P_TILE))
        of_p = (tiles.amax(-1, keepdim=True) / 510).expand_as(tiles).flatten(-2)[..., :keys]
    return (weights * (growth - 1)) @ v.abs() + of_p @ (v.abs() + of_v) + (weights * growth) @ of_v


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bounded", [False, True])
def test_the_definition_is_no_further_from_float64_than_its_roundings(name: str, bounded: bool) -> None:
    kind = FORMATS[name]
    q, k, v = operands()
    bounds = torch.tensor([9.0, 11.0]) if bounded else None
    if bounds is not None:
        assert q.norm(dim=-1).max() < 14  # a row's length bounds its values under any rotation
        bounds = torch.tensor([14.0, 14.0])
    wanted = exact_attention(q, k, v)
    allowed = worst_case(q, k, v, kind, bounds)
    wide = quantized_attention(q, k, v, kind, bounds)
    assert wide.dtype == torch.float64
    # 1e-6: codes of e4m3 are rounded from fp32.
    assert ((wide - wanted).abs() <= allowed * (1 + 1e-6)).all()
    narrow = quantized_attention(q.float(), k.float(), v.float(), kind, bounds)
    assert narrow.dtype == torch.float32
    assert ((narrow - wanted).abs() <= allowed * (1 + 1e-3)).all()
    # The grids of both are the same, but for values at a boundary between two codes.
    assert relative(narrow, wide) < 0.1 * relative(wide, wanted)
    assert relative(wide, wanted) > 1e-4  # it does round


def test_the_reference_of_the_tests_is_softmax() -> None:
    q, k, v = operands(5, 7, 8)
    weights = torch.empty(2, 3, 5, 7, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in range(5)):
        row = torch.tensor([float(q[b, h, i] @ k[b, h, j]) / 8**0.5 for j in range(7)], dtype=torch.float64)
        weights[b, h, i] = row.exp() / row.exp().sum()
    assert torch.allclose(exact_attention(q, k, v), weights @ v, rtol=1e-12, atol=1e-12)


def test_grids_hold_their_values() -> None:
    """Codes of e4m3, of uint8 tiles, and blocks of tokens, at lengths that are no multiple of anything."""
    every = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = torch.cat((every, -every))
    again = e4m3_grid(codes / 448, torch.ones((), dtype=torch.float64)) * 448
    assert torch.allclose(again, codes, rtol=1e-12, atol=0)
    assert e4m3_grid(torch.tensor([5.0]), torch.tensor(2.0)) == 2.0  # what is larger than the bound becomes it
    p = torch.rand(3, 2 * P_TILE + 5, dtype=torch.float64)
    rounded = tile_grid(p, P_TILE)
    for start in range(0, p.shape[-1], P_TILE):
        part, got = p[:, start : start + P_TILE], rounded[:, start : start + P_TILE]
        step = part.amax(-1, keepdim=True) / 255
        assert torch.allclose(got / step, (part / step).round(), rtol=0, atol=1e-9)
    x = torch.randn(1, 2, 70, 4)
    blocks = block_amax(x, 64)
    assert torch.equal(blocks[:, :, 3], x[:, :, :64].abs().amax((2, 3))[..., None])
    assert torch.equal(blocks[:, :, 69], x[:, :, 64:].abs().amax((2, 3))[..., None])


def test_what_centring_is_for() -> None:
    """A number that all keys share changes no output. It takes the grid of k for itself if it stays."""
    q, k, v = operands()
    k = k + 40 * torch.randn(1, 3, 1, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = exact_attention(q, k, v)
    centred = relative(quantized_attention(q, k, v, FORMATS["int8"]), wanted)
    left = relative(quantized_attention(q, k, v, replace(FORMATS["int8"], centred=False)), wanted)
    assert centred < 0.1 * left


def test_what_the_rotation_is_for() -> None:
    """Outlier channels, in the same place in q and k as balanced norms leave them."""
    q, k, v = operands()
    size = torch.ones(64, dtype=torch.float64)
    size[[3, 40]] = 40.0
    q, k = q * size / 8, k * size / 8
    wanted = exact_attention(q, k, v)
    errors = {
        name: relative(quantized_attention(q, k, v, replace(FORMATS[name], rotated=rotated, centred=False)), wanted)
        for name, rotated in (("int8", False), ("int8-rotated", True))
    }
    assert errors["int8-rotated"] < 0.5 * errors["int8"]


@pytest.mark.parametrize("std", [0.5, 1.5])
def test_long_rows_keep_their_small_weights(std: float) -> None:
    """Both formats of p at 16384 keys; one scale for int8 weights that were divided by their sum leaves nothing there."""
    q, k, v = (t[:1, :1] for t in operands(8, 16384, 64, std=std**0.5))
    wanted = exact_attention(q, k, v)
    for name in ("int8", "fp8", "int8-fp8"):
        y = quantized_attention(q.float(), k.float(), v.float(), FORMATS[name])
        assert relative(y, wanted) < 0.12, name
    weights = (q @ k.mT / 8).softmax(-1)
    assert relative((weights * 127).round() / 127 @ v, wanted) > 0.5


def test_q_in_parts_is_q_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands()
    whole = [quantized_attention(q, k, v, kind) for kind in FORMATS.values()]
    monkeypatch.setattr("dvdquant.ops.attention.definition.SCORES_AT_ONCE", 6 * 150 * 7)
    for wanted, kind in zip(whole, FORMATS.values()):
        assert torch.allclose(quantized_attention(q, k, v, kind), wanted, rtol=1e-10, atol=1e-12)


def test_operands_that_do_not_fit_are_refused() -> None:
    q, k, v = operands()
    for bad in (
        (q[0], k, v),
        (q, k[:, :, :-1], v),
        (q[..., :32], k, v),
        (q[:, :2], k, v),
        (q, k[:, :, :0], v[:, :, :0]),
    ):
        with pytest.raises(ShapeError, match="attention got q"):
            quantized_attention(*bad, FORMATS["int8"])


def test_codes_for_kernels_are_the_definitions() -> None:
    """What a kernel that takes e4m3 gets, put together again."""
    q, k, v = (t.transpose(1, 2).float() for t in operands())
    bounds = torch.tensor([14.0, 15.0])
    codes, steps = e4m3_operands(q, k, v, bounds)
    wide = [code.double() * step.double()[:, None, :, None] for code, step in zip(codes, steps)]
    matrix = hadamard_matrix(64)
    for x, got, bound in zip((q, k), wide, bounds):
        rotated = (x.double() @ matrix).transpose(1, 2)
        assert ((got.transpose(1, 2) - rotated).abs() <= half_step(rotated, bound.double(), "e4m3") * 1.01).all()
    assert steps[2].shape == (2, 3)
    one = e4m3_operands(q, k, v, bounds, v_per_head=False)
    assert torch.equal(one[0][0].float(), codes[0].float())
    whole = v.abs().amax().double()
    again = one[0][2].double() * one[1][2].double()[:, None, :, None]
    assert ((again - v.double()).abs() <= half_step(v.double(), whole, "e4m3") * 1.01).all()
    assert all(code.is_contiguous() for code in one[0])
    per_head = v.abs().amax((1, 3)).double()[:, None, :, None]
    assert ((wide[2] - v.double()).abs() <= half_step(v.double(), per_head, "e4m3") * 1.01).all()


# -------------------------------------------------------------------------------------------------------------- ladder


def heads_last(seed: int = 0, std: float = 1.0) -> tuple[Tensor, Tensor, Tensor, float, None]:
    q, k, v = (t.transpose(1, 2).float() for t in operands(192, 192, 64, seed, std))
    return q, k, v, 64**-0.5, None


def library(name: str, load: object, **more: object) -> Library:
    return replace(REFERENCE["int8"], name=name, load=load, **more)  # type: ignore[arg-type]


def means(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
    """A kernel that is right where all scores are the same, and faster: the mean of v."""
    return v.mean(1, keepdim=True).expand_as(q).contiguous()


def wrong(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
    return 1.1 * exact(q, k, v, scale)


def nan(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
    return exact(q, k, v, scale) * float("nan")


def slow(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
    y = exact(q, k, v, scale)
    time.sleep(0.05)
    return y


def raises(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
    raise RuntimeError("no kernel image is available")


def large(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None = None) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")


def missing() -> object:
    return importlib.import_module("dvdquant.no_such_module")


PASSED_OVER = {
    "another SM": (library("x", lambda: means, sms=frozenset({90})), "needs a CUDA device"),
    "not installed": (library("x", lambda: means, package="dvdquant-no-such-package"), "is not installed"),
    "too old": (library("x", lambda: means, package="torch", least=(999,)), "too old, it needs 999"),
    "another interface": (library("x", lambda: means, package="torch", below=(1,)), "another interface"),
    "large heads": (library("x", lambda: means, max_head=32), "at most 32 channels, not 64"),
    "does not import": (library("x", missing), "ModuleNotFoundError"),
    "fails": (library("x", lambda: raises), "no kernel image"),
    "needs too much memory": (library("x", lambda: large), "Tried to allocate 8.00 GiB"),
    "wrong": (library("x", lambda: wrong), "10 % from 16 bit"),
    "NaN": (library("x", lambda: nan), "nan % from 16 bit"),
    "slow": (library("x", lambda: slow), "times as long"),
    "another shape": (library("x", lambda: lambda q, *_: q[:, :5]), "instead of"),
    "another dtype": (library("x", lambda: lambda *o: means(*o).half()), "torch.float16 instead of"),
}


@pytest.mark.parametrize("kind", PASSED_OVER)
def test_a_library_that_cannot_is_passed_over_with_a_reason(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rung, reason = PASSED_OVER[kind]
    times = iter((2.0, 3.0, 1.0) if kind == "slow" else (2.0, 1.0))  # 16 bit, then each that computes the right thing
    monkeypatch.setattr("dvdquant.ops.attention.ladder.seconds", lambda call, device: next(times))
    caplog.set_level(logging.INFO, "dvdquant")
    chosen = Attention("int8", (rung, library("means", lambda: means)))
    q, k, v, scale, bounds = heads_last(std=1e-4)
    y = chosen(q, k, v, scale, bounds)
    assert chosen.taken is not None, chosen.passed_over
    assert chosen.taken.name == "means"
    assert torch.equal(y, means(q, k, v, scale, bounds))
    ((name, why),) = chosen.passed_over
    assert name == "x"
    assert reason in why
    assert any("not by x" in record.message and reason in record.message for record in caplog.records)
    assert chosen.to_json()["passed_over"] == [{"library": "x", "reason": why}]
    assert chosen.speedup == 2


def test_the_floor_is_16_bit(caplog: pytest.LogCaptureFixture) -> None:
    rungs = tuple(rung for rung, _ in PASSED_OVER.values())
    chosen = Attention("fp8", rungs)
    given = heads_last()
    assert torch.equal(chosen(*given), exact(*given[:4]))
    assert (chosen.decided, chosen.taken, len(chosen.passed_over)) == (True, None, len(rungs))
    assert chosen.to_json()["format"] == "16"
    assert "16 bit, not fp8" in chosen.words()
    assert [record.levelname for record in caplog.records if "of long sequences" in record.message] == ["WARNING"]
    chosen(*given)
    assert len(chosen.passed_over) == len(rungs)  # it is tried once


def test_16_bit_that_does_not_fit_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing against a library, and the next call asks again."""
    monkeypatch.setattr("dvdquant.ops.attention.ladder.exact", large)
    chosen = Attention("int8", (library("means", lambda: means),))
    with pytest.raises(torch.OutOfMemoryError):
        chosen(*heads_last())
    assert (chosen.decided, chosen.passed_over) == (False, [])


def refusing(*tokens: int, error: type[Exception] = RuntimeError) -> Callable[..., Tensor]:
    """A kernel without a plan for these numbers of tokens."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None = None) -> Tensor:
        if q.shape[1] in tokens:
            raise error(f"no plan for {q.shape[1]} tokens")
        return means(q, k, v, scale, bounds)

    return kernel


def test_a_library_that_fails_later_gives_way_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    """At a size that it has no kernel for: the next one is tried there, and in the end 16 bit; each is said once."""
    rungs = (library("first", lambda: refusing(24, 32)), library("second", lambda: refusing(32)))
    chosen = Attention("int8", rungs, must_be_faster=False)
    caplog.set_level(logging.INFO, "dvdquant")
    taken = []
    for tokens in (16, 24, 24, 16, 32, 32):
        *heads, scale, bounds = heads_last(std=1e-4)
        q, k, v = (part[:, :tokens] for part in heads)
        y = chosen(q, k, v, scale, bounds)
        assert torch.equal(y, means(q, k, v, scale, bounds) if tokens < 32 else exact(q, k, v, scale))
        taken.append(chosen.choice)
    assert taken == ["first", "second", "second", "second", "16", "16"]
    assert [name for name, _ in chosen.passed_over] == ["first", "second"]
    assert "it fails at [2, 24, 3, 64]: RuntimeError: no plan for 24 tokens" in chosen.passed_over[0][1]
    assert caplog.text.count("attention no longer by") == 2


def test_want_of_memory_stays_an_error() -> None:
    """Another library would not have more."""
    q, k, v, scale, bounds = heads_last(std=1e-4)
    lacking = refusing(192, error=torch.OutOfMemoryError)
    chosen = Attention("int8", (library("x", lambda: lacking),), must_be_faster=False)
    chosen(q[:, :16], k[:, :16], v[:, :16], scale, bounds)
    with pytest.raises(torch.OutOfMemoryError):
        chosen(q, k, v, scale, bounds)
    assert (chosen.choice, chosen.passed_over) == ("x", [])


def test_a_session_that_follows_takes_what_the_other_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock; or it says that it cannot, and why."""
    monkeypatch.setattr("dvdquant.ops.attention.ladder.seconds", lambda call, device: pytest.fail("it times a library"))
    q, k, v, scale, bounds = given = heads_last(std=1e-4)
    rungs = (library("x", lambda: means), library("bad", lambda: wrong), library("y", lambda: refusing(16)))
    chosen = Attention("int8", rungs)
    sixteen, mean = exact(q, k, v, scale), means(q, k, v, scale, bounds)
    for choice, wanted in (("y", mean), ("16", sixteen), ("x", mean)):
        chosen.follow(choice)
        assert torch.equal(chosen(*given), wanted)
        assert chosen.choice == choice
        assert "as the first session" in chosen.words()
        chosen.follow(choice)
        assert chosen.decided  # it is no new choice
    for choice, why in ((None, "not chosen yet"), ("bad", "10 % from 16 bit"), ("z", "z is none of its libraries")):
        chosen.follow(choice)
        with pytest.raises(ChoiceError, match=why):
            chosen(*given)
    # It falls to nothing else, and goes on where it can.
    chosen.follow("y")
    chosen(*given)
    with pytest.raises(ChoiceError, match="no plan for 16 tokens"):
        chosen(q[:, :16], k[:, :16], v[:, :16], scale, bounds)
    chosen.follow("16")
    assert torch.equal(chosen(*given), sixteen)


@pytest.mark.parametrize("kind", REFERENCE)
def test_the_definition_passes_the_self_test_where_it_is_asked_for(kind: str) -> None:
    chosen = Attention(kind, rungs_for(kind, None, "reference"), must_be_faster=False)
    assert "has come yet" in chosen.words()
    q, k, v, scale, bounds = heads_last(std=0.5)
    y = chosen(q, k, v, scale, bounds)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(y.transpose(1, 2), quantized_attention(*heads_first, FORMATS[kind], bounds, scale))
    assert chosen.error is not None
    assert 1e-4 < chosen.error < 0.05
    assert kind in chosen.words()


def test_a_library_by_name_that_cannot_run_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="unknown attention library") as info:
        rungs_for("int8", None, "flash")
    assert "comfy-kitchen" in str(info.value)
    assert "reference" in str(info.value)
    for name in LIBRARIES:
        with pytest.raises(UnsupportedError, match="needs a CUDA device"):
            rungs_for("int8", None, name)
    with pytest.raises(UnsupportedError, match=r"no kernels for SM 8\.9"):
        rungs_for("fp8", 89, "fa3-fwd")


def test_ladders() -> None:
    assert ladder("int8", None) == ladder("int8", 70) == ()
    for sm, formats in LADDERS.items():
        for wanted, rungs in formats.items():
            assert rungs, (sm, wanted)
            assert all(sm in (rung.sms or ()) for rung in rungs), (sm, wanted)
            assert all(rung.kind in FORMATS for rung in rungs)
    assert ladders_text("16") == []
    words = "\n".join(ladders_text("int8"))
    assert all(f"{sm / 10}" in words for sm in LADDERS)
    assert "installed here" in words


def test_the_page_and_the_command_name_what_is_tried_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of docs/runtime.md, row by row, and the text of dvdq-inspect where no library is installed."""
    page = (Path(__file__).parents[3] / "docs/runtime.md").read_text()
    told = re.findall(
        r"^\| (\d[^|]*) \| ([^|]+) \| ([^|]+) \|$", page[page.index("## Attention in 8 bits") :], re.MULTILINE
    )
    rows = ladder_rows()
    assert [re.findall(r"\d+\.\d", sms) for sms, _, _ in told] == [sms for sms, _ in rows]
    for (_, int8, fp8), (sms, formats) in zip(told, rows):
        for wanted, words in (("int8", int8), ("fp8", int8 if fp8 == "the same" else fp8)):
            tried = ", ".join(library.name for library in formats[wanted])
            assert words == tried if tried else words.startswith("none"), (sms, wanted)
            assert all(ladder(wanted, sm_number(sm)) == formats[wanted] for sm in sms)
    kernels = {sm for sm, facts in CAPABILITIES.items() if facts.kernels and not facts.refused}
    assert {sm for sms, _ in rows for sm in sms} == kernels | {f"{sm / 10}" for sm in LADDERS}
    monkeypatch.setattr(Library, "installed", lambda library: "it is not installed")
    assert ladders_text("fp8")[1:] == [
        "  SM 8.0 (A100, A30), 8.6 (RTX 30, RTX A, A10, A40): comfy-kitchen, sageattention-2, sageattention-1",
        "  SM 8.9 (RTX 40, RTX Ada, L4, L40S): sageattention-2, comfy-kitchen, sageattention-1",
        "  SM 9.0 (H100, H200, GH200): fa3-fwd, cudnn, sageattention-2, comfy-kitchen",
        "  SM 10.0 (B200, GB200): cudnn, comfy-kitchen",
        "  SM 10.3 (B300, GB300): cudnn",
        "  SM 12.0 (RTX 50, RTX PRO Blackwell): comfy-kitchen, sageattention-2",
        "  SM 8.7 (Jetson Orin), 11.0 (Jetson Thor), 12.1 (GB10 (DGX Spark)): none, so 16 bit",
        "  installed here: none",
    ]


# ----------------------------------------------------------------------------------------------------------- operation


def test_the_operation_by_itself() -> None:
    chosen = Attention("int8", (), must_be_faster=False)
    number = number_of(chosen)
    q, k, v, scale, _ = heads_last()
    arguments = (q, k, v, torch.ones(2), scale, number)
    torch.library.opcheck(torch.ops.dvdquant.attention.default, arguments)
    assert torch.equal(attention(*arguments), exact(q, k, v, scale))
    del chosen
    gc.collect()
    with pytest.raises(EngineError, match="is gone"):
        attention(*arguments)


def test_sageattention_1_does_not_change_the_caller_s_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it subtracts the mean in place, from what another library, or a later operation of the model, reads."""

    def sageattn(q: Tensor, k: Tensor, v: Tensor, smooth_k: bool = True, sm_scale: float = 1.0, **_: Any) -> Tensor:
        if smooth_k:
            k -= k.mean(dim=1, keepdim=True)
        centred.append(bool(k.mean(1).abs().amax() < 1e-12))
        return exact(q, k, v, sm_scale)

    centred: list[bool] = []
    library = ModuleType("sageattention")
    library.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", library)
    q, k, v = (part.transpose(1, 2) for part in operands(150))
    k += 1
    before = k.clone()
    out = LIBRARIES["sageattention-1"].load()(q, k, v, 0.1, None)
    assert torch.equal(k, before)
    assert centred == [True]
    assert relative(out, exact(q, before, v, 0.1)) < 1e-12
