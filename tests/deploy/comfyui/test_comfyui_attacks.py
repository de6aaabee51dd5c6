"""What ComfyUI's nodes are given: values of every kind, as nodes of others may link them, are taken or refused in words.

ComfyUI checks the values that are typed in. Nothing here needs ComfyUI or an export.
"""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.deploy.comfyui import nodes, places
from dvdquant.deploy.comfyui.calls import BranchNames, step_of, wan_arguments
from dvdquant.deploy.comfyui.sampling import OPTION, SamplingRun, Settings
from dvdquant.deploy.comfyui.trace_text import trace_json, trace_table
from dvdquant.errors import DvdquantError
from dvdquant.model.families import Axis, Sizes, get_family
from tests.support import tiny_models as tiny
from tests.support.costs import Costs
from tests.support.exporting import TINY_WAN

SIZES = Sizes(Axis(2, 3, 4), Axis(4, 8, 12), Axis(6, 8, 10), text_tokens=12)
LEVELS = [1.0, 0.9, 0.6, 0.2, 0.0]
FAMILY = get_family(tiny.WAN)
# As much of an open session as the beginning of a sampler touches.
SESSION: Any = types.SimpleNamespace(
    component="transformer", family=FAMILY, bits=(4, 8), backend="pytorch", device=torch.device("cpu"),
    artifact=types.SimpleNamespace(root=Path("/nowhere"), manifest=None),
)  # fmt: skip

NUMBERS = (
    0, 1, 2, 3, 4, 12, -1, -3, 10**6, 10**30, True, 0.0, 0.1, 0.35, -0.5, 1.5, 1e-300, 1e308, float("nan"),
    float("inf"), -float("inf"),
)  # fmt: skip
TEXTS = (
    "", "switch", "a8", "a4", "a6", "a", "planned", "callback", "fixed", "a" + "9" * 5000, "a٨", "step", "none", "magcache",
    "easycache", "../x", "x/../../y", "/etc/passwd", "\0", "\udcff", "\u202e", "\x1b[2J", "0.1", "a" * 5000, "linked", "tiny-wan",
    "loop", "out", "ring red right large black", "ring ring", "style.safetensors", "first", "auto",
)  # fmt: skip
OTHERS = (None, [], {}, ["a8"], {"samples": 1}, object(), b"a8", torch.zeros(2))
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


def anything(chance: random.Random, *usual: Any) -> Any:
    """One of the usual values most of the time, else any other."""
    if usual and chance.random() < 0.75:
        return chance.choice(usual)
    return chance.choice(chance.choice((NUMBERS, NUMBERS, TEXTS, OTHERS)))


def changed_tensor(tensor: Any, chance: random.Random) -> Any:
    """A tensor of another shape, dtype or content, or something else; what is no tensor any more, or one number, stays."""
    if not isinstance(tensor, Tensor) or not tensor.ndim:
        return tensor
    way = chance.randrange(7)
    if way < 3:
        shape = list(tensor.shape)
        at = chance.randrange(len(shape))
        change = chance.randrange(4)
        if change == 0:
            del shape[at]
        elif change == 1:
            shape.insert(at, chance.choice((0, 1, 2)))
        else:
            shape[at] = chance.choice((0, 1, 2, 3, 5, 7, 9, 13, 16, 33))
        return torch.rand(shape)
    if way == 3:
        return tensor.to(chance.choice(DTYPES))
    if way == 4:
        return tensor * chance.choice((0.0, float("nan"), float("inf"), 1e38))
    return anything(chance) if way == 5 else tensor


def model() -> Any:
    """As much of ComfyUI's ModelPatcher as the nodes touch."""
    made: Any = types.SimpleNamespace(model_options={"transformer_options": {OPTION: Settings()}})

    def clone() -> Any:
        twin = model()
        twin.model_options["transformer_options"] |= made.model_options["transformer_options"]
        return twin

    made.clone = clone
    return made


def set_bits(chance: random.Random) -> None:
    """Bit schedule, and a sampler that begins with it."""
    given = {
        "mode": anything(chance, "switch", "a8", "a4", "planned"),
        "delta": anything(chance, 0.1, 0.35, 2, 0.0),
        "last_high": anything(chance, 0, 1, 2),
        "weighting": anything(chance, "step", "none"),
        "cache": anything(chance, 0.0, 0.0, 0.1),
        "total_steps": anything(chance, 0, 0, 4, 12),
        "first_step": anything(chance, 0, 0, 2),
        "cache_policy": anything(chance, "teacache", "magcache", "easycache"),
    }
    (made,) = nodes.BitSchedule().set(model(), **given)
    settings = made.model_options["transformer_options"][OPTION]
    nan = [float("nan")] * 3
    sigmas = chance.choice((LEVELS, LEVELS, LEVELS, LEVELS[:2], LEVELS[1:], [0.0], [], LEVELS[::-1], nan))
    run = SamplingRun(SESSION, None, settings, sigmas)  # type: ignore[arg-type]
    assert 0 <= run.first < run.steps
    json.dumps(trace_json(settings.trace))
    assert len(trace_table(settings.trace)) < 10_000


def find_folders(chance: random.Random) -> None:
    """The names of exports and of tables, and the words."""
    name = anything(chance, "linked", "tiny-wan", "deeper/copied")
    if chance.random() < 0.5:
        assert len(nodes.LoadExport.IS_CHANGED(name)) in (10, 64)
        assert name in ("linked", "deeper/copied")
    else:
        nodes.TableWords().encode(name, anything(chance, "ring red right large black", "ring,RED right large black"))
        assert name == "tiny-wan"


def add_lora(chance: random.Random) -> None:
    """A LoRA with a strength, several times."""
    (made,) = nodes.LoraBeside().add(model(), anything(chance, "style.safetensors"), anything(chance, 1.0, 0.5, 0))
    nodes.LoraBeside().add(made, anything(chance, "style.safetensors"), anything(chance, 1.0, 0.5, 0))


def show_frames(chance: random.Random) -> None:
    """Latents as frames."""
    latent = {"samples": changed_tensor(torch.rand(1, 3, 2, 4, 4), chance)}
    (frames,) = nodes.TableFrames().show(anything(chance, latent, latent, latent, latent))
    assert frames.ndim == 4
    assert frames.shape[-1] == 3
    assert bool(((frames >= 0) & (frames <= 1)).all())


def call_model(chance: random.Random) -> None:
    """The arguments of a call of the model, as a node in between may change them."""
    given: dict[str, Any] = {
        "latents": torch.rand(2, 4, 3, 8, 8), "timestep": torch.full((2,), 900.0), "text": torch.rand(2, 9, 32),
        "images": None,
    }  # fmt: skip
    for _ in range(chance.choice((0, 1, 1, 2))):
        name = chance.choice(list(given))
        given[name] = changed_tensor(torch.rand(2, 257, 8) if given[name] is None else given[name], chance)
    arguments = wan_arguments(**given, family=FAMILY, sizes=SIZES)
    rows = arguments["hidden_states"].shape[0]
    indices = chance.choice(([0], [1, 0], [0, 1, 0], [2, 1, 0], []))
    parts = BranchNames().parts(rows, indices, chance.choice((None, ["n", "p"], [])))
    assert sum(part.stop - part.start for part in parts) == rows
    assert 0 <= step_of(LEVELS, chance.choice(NUMBERS)) < len(LEVELS) - 1


GIVEN = (set_bits, set_bits, set_bits, find_folders, add_lora, show_frames, call_model)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/dvdquant of a double of ComfyUI: two exports by name, a table, a link to itself and one to everything."""
    double: Any = types.ModuleType("folder_paths")
    double.get_full_path = lambda _, file: "/loras/style.safetensors" if file == "style.safetensors" else None
    monkeypatch.setitem(sys.modules, "folder_paths", double)
    monkeypatch.setattr(places, "roots", lambda: [tmp_path])
    for name in ("linked", "deeper/copied", "\u202e\x1b[2J"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "tiny-wan").symlink_to(TINY_WAN, target_is_directory=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.stress)])
def test_nodes_take_or_refuse_whatever_they_are_given(count: int, place: Path) -> None:
    taken = dict.fromkeys(GIVEN, 0)
    with Costs("what ComfyUI's nodes are given") as costs:
        for index in range(count):
            chance = random.Random(f"{count} {index}")
            check = chance.choice(GIVEN)
            try:
                with costs.case():
                    check(chance)
            except DvdquantError as error:
                words = str(error)
                assert len(words) < 4000, words[:500]
                assert not set(words) & set("\x1b\0\u202e"), words
            except Exception as error:
                raise AssertionError(f"case {index} of {count}, {check.__name__}") from error
            else:
                taken[check] += 1
    assert all(taken.values())
    assert costs.refused > count / 5
