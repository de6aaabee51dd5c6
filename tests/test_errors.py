"""Every error says what to do: its own remedy, what is available, or that of its class."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dvdquant import errors
from dvdquant.errors import Cancelled, DvdquantError, ShapeError
from dvdquant.export.options import ExportOptions
from dvdquant.export.sizes import resolve_sizes
from dvdquant.model.families import get_family
from dvdquant.recipe import RECIPES
from tests.support import tiny_models as tiny
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
# Errors that have nothing but their class's remedy, and those whose remedy is to take one of what they list. They only get fewer.
GENERAL, LISTING = 0, 143
# Options of docker, of the hub's own command and of GGUF's, which remedies name.
OTHER_PROGRAMS = {"--gpus", "--runtime", "--local-dir", "--merge"}
KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Cancelled], ids=lambda kind: kind.__name__)
def test_every_error_has_a_fix(kind: type[DvdquantError]) -> None:
    assert kind("what").fix
    assert kind("what", available="a, b").fix
    assert kind("what", fix="this").fix == "this"
    assert "\n  fix: " in str(kind("what"))


def test_nothing_is_to_be_done_about_a_wish() -> None:
    assert Cancelled("cancelled").fix is None


@pytest.fixture(scope="module")
def entries() -> list[Any]:
    """Every error of the source, as the page of errors lists them."""
    return load_script(ROOT / "docs" / "scripts" / "errors.py").collect()


def test_remedies_name_options_and_commands_that_exist(entries: list[Any]) -> None:
    """No remedy sends anybody to what is not there."""
    import re

    from dvdquant.cli.commands import COMMANDS

    assert len(entries) > 400
    commands = {word for entry in entries for word in re.findall(r"\bdvdq[ -]([a-z]+)", entry.fix)}
    assert commands <= set(COMMANDS), commands - set(COMMANDS)
    known = {
        option
        for name in COMMANDS
        for parameter in import_module(COMMANDS[name].module).main.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    options = {word for entry in entries for word in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", entry.fix)}
    assert options <= known | OTHER_PROGRAMS, options - known


def test_a_narrower_error_is_listed_as_the_one_that_it_is(entries: list[Any]) -> None:
    """Of ffmpeg, EncoderError, which is an OutputError."""
    assert {entry.kind for entry in entries if "ffmpeg" in entry.what} == {"OutputError"}


def test_errors_stand_under_their_own_class(entries: list[Any]) -> None:
    """A public class that is narrower than another one has a section of its own, which is not empty."""
    assert "ChoiceError" in {entry.kind for entry in entries}


def test_few_errors_have_only_a_general_remedy(entries: list[Any]) -> None:
    """Whoever adds an error says what helps against it, or lists what there is."""
    without = [entry for entry in entries if not entry.fix]
    general = [f"{entry.kind}: {entry.what}" for entry in without if not entry.lists and entry.kind != "Cancelled"]
    assert len(general) <= GENERAL, general
    assert sum(entry.lists for entry in without) <= LISTING


def resolve(name: str, **options: str) -> object:
    family = get_family(tiny.CONFIGS[name])
    sizes = {"height": "128", "width": "128", "num_frames": "17"} | options
    return resolve_sizes(family, ExportOptions(model="m", out=Path("out"), recipe=RECIPES["w4a4"], **sizes))


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize(
    ("option", "sizes"), [("height", range(90, 130)), ("width", range(90, 130)), ("num_frames", range(2, 40))]
)
def test_suggested_sizes_work(name: str, option: str, sizes: range) -> None:
    """The VAE and the transformer's patch both take them, in the unit of the option."""
    refused = 0
    for size in sizes:
        try:
            resolve(name, **{option: str(size)})
        except ShapeError as error:
            refused += 1
            suggested = [int(word) for word in (error.available or "").split(" or ")]
            assert suggested
            for each in suggested:
                resolve(name, **{option: str(each)})
            assert max(abs(each - size) for each in suggested) <= 64
    assert refused
