"""What is free of a device: a double of PyTorch's CUDA, with memory of its own and with the host's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvdquant.cli.clips import run_memory
from dvdquant.deploy.sessions import weight_form
from dvdquant.model.families import get_family
from dvdquant.model.held_weights import HeldWeights
from dvdquant.model.weight_choice import WeightChoice
from dvdquant.model.working_memory import step_bytes
from dvdquant.system import device_memory as room
from dvdquant.system.device_memory import KEPT_BACK, device_memory, shares_memory
from tests.support import tiny_models as tiny

GIB = 1 << 30
GPU = torch.device("cuda")


def double(patched: pytest.MonkeyPatch, integrated: bool, *, unused: int, available: int, total: int = 8 * GIB) -> None:
    """A GPU of which ``unused`` bytes hold nothing, on a machine that can give ``available``; PyTorch keeps 2 GiB, uses 1."""
    facts = SimpleNamespace(name="Orin", is_integrated=int(integrated), major=8, minor=7)
    patched.setattr(torch.cuda, "mem_get_info", lambda device: (unused, total))
    patched.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    patched.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    patched.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    patched.setattr(room, "memory_limit", lambda: available)


def test_the_cache_of_files_is_free_where_the_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GiB of weights that were just read: CUDA says one GiB is free, the system can give five."""
    double(monkeypatch, True, unused=GIB, available=5 * GIB)
    assert device_memory(GPU) == (6 * GIB, 8 * GIB)
    assert shares_memory(GPU)
    place = run_memory.place_of(GPU)
    assert (place.free, place.total, place.unified, place.base) == (6 * GIB, 8 * GIB, True, KEPT_BACK[False])
    # Never more than there is, however little the system holds back.
    double(monkeypatch, True, unused=GIB, available=9 * GIB)
    assert device_memory(GPU) == (8 * GIB, 8 * GIB)
    # A card has memory of its own, and the host's says nothing of it.
    double(monkeypatch, False, unused=GIB, available=5 * GIB)
    assert device_memory(GPU) == (2 * GIB, 8 * GIB)
    assert not shares_memory(GPU)
    # PyTorch before it had the field.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert device_memory(GPU) == (2 * GIB, 8 * GIB)


def test_a_cpu_is_the_hosts_memory() -> None:
    free, total = device_memory(torch.device("cpu"))
    assert 0 < free <= total
    assert shares_memory(torch.device("cpu"))


def test_the_choice_of_weights_asks_for_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` expands what fits into what is free beside a step, and no page of a file counts as used."""
    asked: list[int | None] = []

    def choose(held: Any, policy: Any, free: int | None, plugin: bool) -> WeightChoice:
        asked.append(free)
        return WeightChoice("packed", frozenset(), 0.0, held.nbytes("packed"), 0, 0.0)

    monkeypatch.setattr(weight_form, "choose_weights", choose)
    monkeypatch.setattr(weight_form, "held_weights", lambda *_: HeldWeights(1000, ()))
    family = get_family(tiny.WAN_ONE)
    artifact = SimpleNamespace(plan=lambda component: None, family=lambda component: family)
    session: Any = SimpleNamespace(artifact=artifact, component="transformer", bits=(4,), sizes=tiny.RANGES, device=GPU)
    double(monkeypatch, True, unused=0, available=5 * GIB)
    weight_form.choose_form(session, 87, "auto")
    session.device = torch.device("cpu")
    weight_form.choose_form(session, 87, "auto")
    # 3 × 4 × 4 patches and 12 words.
    work = step_bytes(family, 60)
    assert work > 0
    assert asked == [6 * GIB - work, None]
