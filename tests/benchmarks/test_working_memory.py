"""What a stage works in, estimated, against the live tensors of published modules run without data."""

from __future__ import annotations

import pytest
import torch

from benchmarks.working_memory import STEPS, VAES, LiveBytes, count_decode, count_step, count_text, family_of
from dvdquant.model.working_memory import TEXT_BYTES, decode_bytes


def test_the_counter_counts_what_lives() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        one = known + 1
        two = one.view(10, 100) * 2
        del one
        three = two.sum()
    assert live.now == 4000 + 4
    assert live.peak == 8000
    del two, three


@pytest.mark.parametrize("name", ["wan", "ltx-video"])
def test_a_vae_at_480p(name: str) -> None:
    """Never less than was counted, and at most a tenth more."""
    counted = count_decode(name, 33, 480, 832, tiled=False).peak
    assert counted <= decode_bytes(family_of(name), 33, 480, 832) <= 1.1 * counted


def test_a_step_of_wan() -> None:
    counted, guess = count_step("wan2.1-1.3b")
    assert counted.peak <= guess <= 1.4 * counted.peak


@pytest.mark.stress
@pytest.mark.parametrize("size", [(33, 480, 832), (81, 480, 832), (33, 736, 1280)])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", VAES)
def test_every_vae(name: str, tiled: bool, size: tuple[int, int, int]) -> None:
    counted = count_decode(name, *size, tiled=tiled).peak
    assert 0.99 * counted <= decode_bytes(family_of(name), *size, tiled=tiled) <= 1.15 * counted


@pytest.mark.stress
@pytest.mark.parametrize("name", STEPS)
def test_every_transformer(name: str) -> None:
    counted, guess = count_step(name)
    assert 0.99 * counted.peak <= guess <= 1.4 * counted.peak


@pytest.mark.stress
@pytest.mark.parametrize("name", ["umt5-xxl", "t5-xxl", "llama-3-8b"])
def test_every_text_encoder(name: str) -> None:
    counted, _ = count_text(name)
    assert counted.peak <= TEXT_BYTES
