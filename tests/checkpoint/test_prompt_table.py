"""Prompt tables: words to embeddings, and everything in one that can be wrong."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dvdquant.checkpoint.prompt_table import EMPTY_WORD, PromptTable, frames_from_latents
from dvdquant.deploy.pipelines.schedulers import open_table_scheduler
from dvdquant.errors import CheckpointError, ShapeError
from tests.support.exporting import TINY_WAN

PROMPT = "ring red right large black"


@pytest.fixture(scope="module")
def table() -> PromptTable:
    return PromptTable.open(TINY_WAN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("prompts.json", "prompts.safetensors"):
        shutil.copy(TINY_WAN / name, tmp_path)
    shutil.copytree(TINY_WAN / "scheduler", tmp_path / "scheduler")
    return tmp_path


def test_words_become_their_rows(table: PromptTable) -> None:
    rows = load_file(TINY_WAN / "prompts.safetensors")["words"]
    words = json.loads((TINY_WAN / "prompts.json").read_text())["words"]
    expected = torch.stack([rows[words.index(word)] for word in PROMPT.split()])
    assert torch.equal(table.encode(PROMPT), expected[None])
    assert torch.equal(table.encode(None), rows[words.index(EMPTY_WORD)].expand(1, 5, 64))


def test_order_case_and_commas_do_not_matter(table: PromptTable) -> None:
    for words in itertools.permutations(PROMPT.split()):
        assert table.parse(", ".join(words).upper()) == tuple(PROMPT.split())


def test_every_combination_of_words_is_taken(table: PromptTable) -> None:
    combinations = list(itertools.product(*(table.choices[slot] for slot in table.order)))
    assert len(combinations) == 4 * 4 * 4 * 2 * 2
    for words in combinations:
        assert table.parse(" ".join(words)) == words
    assert table.parse(table.example())


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("rign red right large black", "did you mean 'ring'"),
        ("ring red right large purple", "'purple'"),
        ("ring red right large", "4 words"),
        ("", "0 words"),
        ("ring red right large black black", "6 words"),
        ("ring red blue large black", "two words for colour (red and blue)"),
        (f"ring red right large {EMPTY_WORD}", "does not know"),
    ],
)
def test_prompts_it_cannot_draw(table: PromptTable, prompt: str, said: str) -> None:
    with pytest.raises(ShapeError) as caught:
        table.parse(prompt)
    assert said in str(caught.value)
    assert "available:" in str(caught.value)


def test_without_choices_the_order_is_the_users(folder: Path) -> None:
    _edit(folder, lambda data: data.pop("choices"))
    table = PromptTable.open(folder)
    assert table.parse("red ring right large black") == ("red", "ring", "right", "large", "black")


def test_fewer_words_than_slots(folder: Path) -> None:
    """An error shows an example although the table has one word for five slots."""
    _edit(folder, lambda data: data.update(words=[EMPTY_WORD, "ring"], choices={}))
    _tensor(lambda t: t[:2])(folder)
    table = PromptTable.open(folder)
    with pytest.raises(ShapeError, match="ring ring ring ring ring"):
        table.parse("rings")
    assert table.encode(table.example()).shape == (1, 5, 64)


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "prompts.json").read_text())
    change(data)
    (folder / "prompts.json").write_text(json.dumps(data))


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "prompts.safetensors"
        save_file({"words": change(load_file(path)["words"]).contiguous()}, path)

    return edit


def _json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, change)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_json(lambda d: d.pop("words")), "words"),
        (_json(lambda d: d["words"].append("oval")), "every word once"),
        (_json(lambda d: d["words"].remove(EMPTY_WORD)), EMPTY_WORD),
        (_json(lambda d: d.update(words="ring")), "no list"),
        (_json(lambda d: d.update(words=[EMPTY_WORD])), "nothing but the empty word"),
        (_json(lambda d: d["words"].__setitem__(0, "r" * 81)), "longer than 80"),
        (_json(lambda d: d.update(order=[f"s{i}" for i in range(513)])), "order is no list of 1 to 512"),
        (_json(lambda d: d["words"].__setitem__(0, 7)), "no word"),
        (_json(lambda d: d.update(tokens_per_prompt=4)), "tokens_per_prompt"),
        (_json(lambda d: d["choices"].pop("shape")), "choices"),
        (_json(lambda d: d.update(latent=[3, 8, 24])), "latent"),
        (_json(lambda d: d.update(latent=[16, 8, 24, 24])), "latent"),
        (_json(lambda d: d.update(guidance_scale=-1)), "guidance_scale"),
        (_json(lambda d: d.update(steps=0)), "steps"),
        (_json(lambda d: d.update(steps=True)), "steps"),
        (_tensor(lambda t: t[:-1]), "16 rows for the 17 words"),
        (_tensor(lambda t: t * float("nan")), "finite"),
        (_tensor(lambda t: t.to(torch.int8)), "finite floats"),
        (_tensor(lambda t: t[0]), "no tensor 'words'"),
        (lambda folder: (folder / "prompts.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "prompts.safetensors").write_bytes(b"\x08"), "prompts.safetensors"),
        (lambda folder: (folder / "prompts.json").write_text("{"), "prompts.json"),
        (lambda folder: (folder / "prompts.json").write_text("[]"), "not a JSON object"),
    ],
)
def test_damaged_tables_are_refused(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        PromptTable.open(folder)
    assert said in str(caught.value)


def test_scheduler(folder: Path) -> None:
    scheduler = open_table_scheduler(folder)
    scheduler.set_timesteps(10)
    assert type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert scheduler.config.shift == 3.0
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("FlowMatchEuler", "Euler"))
    with pytest.raises(CheckpointError, match="EulerDiscreteScheduler"):
        open_table_scheduler(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_table_scheduler(folder)


def test_frames_are_the_rounded_latents() -> None:
    latents = 3 * torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    frames = frames_from_latents(latents)
    exact = np.clip((latents[0].double().numpy() + 1) / 2, 0, 1) * 255
    assert frames.shape == (4, 5, 6, 3)
    assert np.abs(frames.astype(float) - exact.transpose(1, 2, 3, 0)).max() <= 0.5
    with pytest.raises(ShapeError):
        frames_from_latents(latents[:, :2])
