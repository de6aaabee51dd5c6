"""``dvdq-run --memory``: how the parts of a run share the device, and the refusal of what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dvdquant.cli.shared.common import table
from dvdquant.errors import ResourceError
from dvdquant.text import amount

if TYPE_CHECKING:
    import torch

    from dvdquant.cli.clips.run_options import RunOptions
    from dvdquant.deploy.generation.generate import Generator
    from dvdquant.deploy.generation.memory_plan import MemoryPlan
    from dvdquant.deploy.generation.request import GenerateRequest

__all__ = ["ArrangedRun", "Place", "arrange_run", "memory_text", "place_of", "plan_run", "sm_of_kernels"]

LEAST_BASE = 512 << 20


@dataclass(frozen=True)
class Place:
    """The device of a run.

    Args:
        name: Its name, in words.
        total: Its memory in bytes.
        free: What is free of it now.
        unified: Whether it shares the host's memory.
        base: Bytes of libraries and program.
        sm: Its compute capability, or None for a CPU.
    """

    name: str
    total: int
    free: int
    unified: bool
    base: int
    sm: str | None


def place_of(device: torch.device) -> Place:
    """Return what is known of a device.

    Args:
        device: The CPU or a CUDA device.
    """
    import psutil
    import torch

    from dvdquant.system.device_memory import KEPT_BACK, device_memory, shares_memory

    free, total = device_memory(device)
    if device.type != "cuda":
        base = max(LEAST_BASE, int(psutil.Process().memory_info().rss))
        return Place("CPU", total, free + base, True, base, None)
    facts = torch.cuda.get_device_properties(device)
    return Place(facts.name, total, free, shares_memory(device), KEPT_BACK[False], f"{facts.major}.{facts.minor}")


def plan_run(
    settings: RunOptions,
    generator: Generator,
    requests: Sequence[GenerateRequest],
    memory: int | None,
    place: Place,
    backend: str,
    sm: str | None,
) -> MemoryPlan:
    """Return how the parts of a run share the device: as the options say, or so that they fit ``memory``.

    Args:
        settings: The options of the command.
        generator: The generator, with nothing loaded.
        requests: The checked requests of one prompt.
        memory: Bytes that the run may take; None takes the options as they are, and refuses what is more than what is free.
        place: The device.
        backend: The backend that runs.
        sm: Its compute capability where our kernels run on it, see :func:`sm_of_kernels`.

    Raises:
        ResourceError: It does not fit; the error says what does.
    """
    from dvdquant.deploy.generation.memory_plan import Arrangement, arrange, best, fitting, possible
    from dvdquant.deploy.generation.needs import run_bytes
    from dvdquant.deploy.generation.text_encoder import usable_text_bits

    # 1. The bytes of what runs.
    narrow = settings.mode is None and settings.schedule is None and not settings.compare
    run = run_bytes(
        generator.checker,
        requests,
        backend,
        place.base,
        narrow=narrow,
        sm=sm,
        weights=settings.weights,
        loras=generator.loras,
        shared=place.unified and place.sm is not None,
    )
    # 2. What the user has decided, and the rest.
    given = {"vae_tiling": settings.vae_tiling, "offload": settings.offload, "alternate": settings.alternate}
    fixed: dict[str, Any] = {name: True for name, decided in given.items() if decided}
    if settings.text_encoder_bits is not None:
        fixed["text_bits"] = int(settings.text_encoder_bits)
    else:
        usable = usable_text_bits()
        run = dataclasses.replace(run, text={bits: size for bits, size in run.text.items() if bits in usable})
    first = next(iter(run.transformer))
    if memory is not None:
        return fitting(run, memory, unified=place.unified, fixed=fixed)
    asked = arrange(run, Arrangement(first, **{"text_bits": 16, **fixed}))
    if asked.peak <= place.free:
        return asked
    # What --memory auto would choose: another limit here would name options that it then refuses.
    other, fits = best(possible(run, unified=place.unified, fixed=fixed), place.free)
    busy = f", or end the programs that hold the other {amount(place.total - place.free)}"
    raise ResourceError(
        f"the run takes about {amount(asked.peak)}, and {place.name} has {amount(place.free)} free of {amount(place.total)}",
        available=f"{' '.join(other.arrangement.options(first))}, which takes {amount(other.peak)}"
        if fits
        else f"nothing at this size: {amount(other.peak)} at least",
        fix=("add --memory auto, which takes these options by itself" + busy * (asked.peak <= place.total))
        if fits
        else "ask for a smaller or shorter clip, or draw on a device with more memory"
        + busy * (other.peak <= place.total),
    )


def _backend(settings: RunOptions, generator: Generator, device: torch.device) -> str:
    """Return the full name of the backend that runs."""
    from dvdquant.deploy.sessions import best_backend, full_name

    artifact = generator.artifact
    # LoRAs that the best backend has no place for have moved the generator to another.
    name = "pytorch" if generator.options.in_pytorch else full_name(generator.options.backend)
    return best_backend(artifact, artifact.components[0], None, device)[0] if name == "auto" else name


def sm_of_kernels(device: torch.device, place: Place, backend: str) -> str | None:
    """Return the compute capability of a device on which our kernels hold the weights of a backend, else None.

    Without them, PyTorch keeps what the files hold, also on a GPU that they do not run on.

    Args:
        device: The device.
        place: What is known of it.
        backend: The backend that runs.
    """
    from dvdquant.ops.cuda_linear import usable_kernels

    return place.sm if backend == "tensorrt" or (backend == "pytorch" and usable_kernels(device)) else None


@dataclass(frozen=True)
class ArrangedRun:
    """A run whose parts were arranged on a device.

    Args:
        generator: The generator, with nothing loaded.
        requests: The requests of every prompt.
        plan: What is held when.
        place: The device.
        backend: The backend that runs.
        sm: The compute capability, where our kernels run; else None.
        memory: Bytes that the run may take, or None.
    """

    generator: Generator
    requests: list[list[GenerateRequest]]
    plan: MemoryPlan
    place: Place
    backend: str
    sm: str | None
    memory: int | None

    def text(self) -> str:
        """Return what the run holds when."""
        return memory_text(self.plan, self.place, self.memory)


def arrange_run(
    settings: RunOptions,
    generator: Generator,
    requests: list[list[GenerateRequest]],
    memory: int | Literal["auto"] | None,
) -> ArrangedRun:
    """Arrange a run on its device, before anything is loaded.

    Args:
        settings: The options of the command.
        generator: The generator as the options have it.
        requests: The checked requests of every prompt.
        memory: Bytes that the run may take, ``auto`` for what is free, or None to take the options as they are.

    Raises:
        ResourceError: It does not fit; the error says what does.
    """
    from dvdquant.deploy.generation.generate import with_changed_options
    from dvdquant.deploy.generation.memory_plan import PACKED
    from dvdquant.system.devices import resolve_device

    device = resolve_device(settings.device)
    place, backend = place_of(device), _backend(settings, generator, device)
    limit = place.free if memory == "auto" else memory
    sm = sm_of_kernels(device, place, backend)
    plan = plan_run(settings, generator, requests[0], limit, place, backend, sm)
    if limit is None:
        return ArrangedRun(generator, requests, plan, place, backend, sm, None)
    how = plan.arrangement
    bits = generator.artifact.bits(generator.artifact.components[0])
    alone = how.transformer.bits if len(how.transformer.bits) < len(bits) else ()
    changed = with_changed_options(
        generator,
        vae_tiling=how.vae_tiling,
        offload=how.offload,
        alternate=how.alternate,
        text_bits=how.text_bits,
        bits=alone or None,
        **({"weights": "packed"} if how.transformer == PACKED and place.sm is not None else {}),
    )
    if alone and requests[0][0].mode == "switch":
        requests = [[changed.check(_at_width(request, alone[0])) for request in each] for each in requests]
    return ArrangedRun(changed, requests, plan, place, backend, sm, limit)


def _at_width(request: GenerateRequest, width: int) -> GenerateRequest:
    """Return a request that switches, with every step at one width."""
    return dataclasses.replace(request, mode=f"a{width}", delta=None)


def memory_text(plan: MemoryPlan, place: Place, memory: int | None) -> str:
    """Return what a run holds when, as a table.

    Args:
        plan: The plan.
        place: The device.
        memory: Bytes that the run may take, or None.
    """
    rows = []
    for stage in plan.stages:
        parts = ", ".join(f"{name} {amount(size)}" for name, size in stage.parts.items())
        rows.append((stage.name, parts, amount(stage.work), amount(stage.total)))
    lines = [table(("while", "on the device", "to work in", "in all"), rows, right=(2, 3)), ""]
    limit = f" of {amount(memory)}" if memory is not None else ""
    lines.append(
        f"the most at once: {amount(plan.peak)}{limit}, with {amount(place.base)} for libraries and the program on {place.name}; "
        "estimated from shapes, cuDNN and cuBLAS take more"
    )
    lines.append(f"arranged: {plan.arrangement.words()}")
    return "\n".join(lines)
