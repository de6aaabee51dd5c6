"""What is free of a device: a double of PyTorch's CUDA, with memory of its own and with the host's."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvdquant.cli.clips import run_memory
from dvdquant.deploy.generation.device_fit import DEVICES, DeviceSize
from dvdquant.deploy.sessions import weight_form
from dvdquant.deploy.sessions.weight_form import claim
from dvdquant.hardware.gpus import GPUS
from dvdquant.hardware.shared_memory import SEEN, seen_bytes
from dvdquant.model.families import get_family
from dvdquant.model.held_weights import HeldWeights
from dvdquant.model.weight_choice import WeightChoice
from dvdquant.model.working_memory import step_bytes
from dvdquant.system.device_memory import KEPT_BACK, device_memory, shares_memory, usable_bytes
from tests.support import tiny_models as tiny
from tests.support.gpu_memory import GPU, gpu_double

GIB = 1 << 30


def test_the_cache_of_files_is_free_where_the_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GiB of weights that were just read: CUDA says one GiB is free, the system can give five."""
    gpu_double(monkeypatch, True, unused=GIB, available=5 * GIB)
    assert device_memory(GPU) == (6 * GIB, 8 * GIB)
    assert shares_memory(GPU)
    place = run_memory.place_of(GPU)
    assert (place.free, place.total, place.unified, place.base) == (6 * GIB, 8 * GIB, True, KEPT_BACK[False])
    # Never more than there is, however little the system holds back.
    gpu_double(monkeypatch, True, unused=GIB, available=9 * GIB)
    assert device_memory(GPU) == (8 * GIB, 8 * GIB)
    # A card has memory of its own, and the host's says nothing of it.
    gpu_double(monkeypatch, False, unused=GIB, available=5 * GIB)
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
    gpu_double(monkeypatch, True, unused=0, available=5 * GIB)
    weight_form.choose_form(session, 87, "auto")
    session.device = torch.device("cpu")
    weight_form.choose_form(session, 87, "auto")
    # 3 × 4 × 4 patches and 12 words.
    work = step_bytes(family, 60)
    assert work > 0
    assert asked == [6 * GIB - work, None]


class Opened:
    """A session for the GPU, as far as the choice of its weights looks at it."""

    def __init__(self, device: torch.device) -> None:
        family = get_family(tiny.WAN_ONE)
        self.artifact = SimpleNamespace(plan=lambda component: None, family=lambda component: family)
        self.component, self.bits, self.sizes, self.device, self.closed = (
            "transformer",
            (4,),
            tiny.RANGES,
            device,
            False,
        )


def test_what_an_open_session_will_take_yet_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two transformers, the second is opened before the first has made its weights."""
    asked: list[int] = []

    def choose(held: Any, policy: Any, free: int, plugin: bool) -> WeightChoice:
        asked.append(free)
        return WeightChoice("packed", frozenset(), 0.0, held.nbytes("packed"), 0, 0.0)

    monkeypatch.setattr(weight_form, "choose_weights", choose)
    monkeypatch.setattr(weight_form, "held_weights", lambda *_: HeldWeights(1000, ()))
    gpu_double(monkeypatch, False, unused=5 * GIB, available=GIB)
    first: Any = Opened(torch.device("cuda:0"))
    elsewhere: Any = Opened(torch.device("cuda:1"))
    second: Any = Opened(GPU)
    weight_form.choose_form(second, 89, "auto")
    claim(first, 2 * GIB)
    claim(elsewhere, GIB)
    weight_form.choose_form(second, 89, "auto")
    assert asked[0] - asked[1] == 2 * GIB
    claim(first, GIB)  # a part is made, and so not free any more
    weight_form.choose_form(second, 89, "auto")
    assert asked[0] - asked[2] == GIB
    claim(first, 9 * GIB)
    weight_form.choose_form(second, 89, "auto")
    assert asked[3] == 0
    first.closed = True
    weight_form.choose_form(second, 89, "auto")
    assert asked[4] == asked[0]
    first.closed = False
    del first
    gc.collect()
    weight_form.choose_form(second, 89, "auto")
    assert asked[5] == asked[0]


def test_what_a_module_is_sold_with_is_not_what_its_system_sees() -> None:
    """An Orin Nano of 8 GB has 7.4 GiB; the plan of a clip and the builds of engines leave the same of it."""
    small = DeviceSize("Orin", 8, ("8.7",), unified=True)
    assert seen_bytes("8.7", 8) == 7620 << 20
    assert small.usable == usable_bytes(7620 << 20, True) == (7620 << 20) - 2 * GIB
    # What is not listed has the least share of what is: 93 %.
    assert seen_bytes("11.0", 64) == 7620 * 8 << 20
    assert seen_bytes("8.7", 4) == 3810 << 20
    assert all(0.9 < each.nbytes / (gib << 30) < 0.97 for (_, gib), each in SEEN.items())
    # A card's memory is all there, but for CUDA; and nothing is less than nothing.
    assert DeviceSize("RTX", 8, ("8.9",)).usable == usable_bytes(8 * GIB, False) == 7 * GIB
    assert usable_bytes(GIB, True) == 0


def test_every_module_that_shares_its_memory_is_asked_for_what_it_sees() -> None:
    """In the table of devices, and where an export is for a module by its name."""
    sold = {(gpu.sm, gib) for gpu in GPUS if gpu.kind == "jetson" for gib in gpu.memory}
    assert set(SEEN) <= sold
    shared = [device for device in DEVICES if device.unified]
    assert {(device.sms[0], device.gib) for device in shared} <= set(SEEN)
    assert all(device.usable < device.gib * GIB - 2 * GIB for device in shared)
