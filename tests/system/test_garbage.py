"""How often Python looks for garbage in the processes of the commands."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from dvdquant.cli.inspect import main as inspect_main
from dvdquant.system.garbage import collect_less_often


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(
    ("before", "after"),
    [((700, 10, 10), (10_000, 10, 10)), ((50_000, 5, 100), (50_000, 10, 100)), ((0, 10, 10), (0, 10, 10))],
)
def test_thresholds_are_only_raised_and_a_collector_that_is_off_stays_off(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    gc.set_threshold(*before)
    collect_less_often()
    assert gc.get_threshold() == after


def test_a_command_collects_less_often() -> None:
    gc.set_threshold(700, 10, 10)
    assert CliRunner().invoke(inspect_main, ["nowhere"]).exit_code == 2
    assert gc.get_threshold()[0] == 10_000
