"""The table of GPUs with what an export for each of them is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dvdquant.hardware.advice import choose_recipe, choose_target
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.hardware.gpus import GPUS, KINDS, Gpu
from dvdquant.hardware.weights import slower_in_int8

__all__ = ["GpuRow", "HEADER", "SHORT_HEADER", "gpu_rows", "runs_text", "short_rows"]

HEADER = ("GPU", "SM", "memory", "--target", "--recipe auto", "4-bit arithmetic", "has run")
SHORT_HEADER = ("GPU", "SM", "`--target`", "`--recipe auto`", "4-bit arithmetic", "has run on it")


def short_rows() -> Iterator[tuple[str, ...]]:
    """Return a row for every kind of export that something is offered for, for the first screen of the README.

    Compute capabilities share a row that have one target and the same 4-bit arithmetic; those that build on the device share
    one in any case. Where they differ in a column, it names the ones that each of its words is for.
    """
    groups: dict[tuple[object, ...], dict[str, tuple[str, ...]]] = {}
    for sm, found in CAPABILITIES.items():
        if not found.refused:
            target, recipe = _choice(sm)
            kind = () if target == "tensorrt" else (found.rtx_a4, found.kernels_a4)
            ran = "kernels and PyTorch sessions, on one H100" if found.measured else "nothing yet"
            groups.setdefault((target, *kind), {})[sm] = (f"`{target}`", f"`{recipe}`", runs_text(sm), ran)
    for cells in groups.values():
        sms = list(cells)
        cards = ", ".join(CAPABILITIES[sm].cards for sm in sms)
        yield cards, ", ".join(sms), *(_shared(column, sms) for column in zip(*cells.values(), strict=True))


def _choice(sm: str) -> tuple[str, str]:
    """Return the target and the recipe that ``auto`` takes for one compute capability."""
    target, _ = choose_target([sm])
    return target, choose_recipe([sm], [target]).recipe


def _shared(words: Sequence[str], sms: Sequence[str]) -> str:
    """Return the words of a column that some compute capabilities share; where they differ, each with those it is for."""
    told: dict[str, list[str]] = {}
    for word, sm in zip(words, sms, strict=True):
        told.setdefault(word, []).append(sm)
    if len(told) == 1:
        return words[0]
    return "; ".join(f"{word} ({', '.join(which)})" for word, which in told.items())


@dataclass(frozen=True)
class GpuRow:
    """An export for some cards: the columns of :data:`HEADER`, and whether there is one.

    Args:
        names: The kind of the cards, and their names.
        sm: Their compute capability.
        memory: The memory that they come with, in GB.
        target: The target, or "none".
        recipe: The recipe that ``auto`` takes, or "none".
        four_bits: Where 4-bit activations gain time or memory, or why the cards are refused.
        ran: What it has run on.
        refused: Nothing is offered for these cards.
    """

    names: str
    sm: str
    memory: str
    target: str
    recipe: str
    four_bits: str
    ran: str
    refused: bool = False

    def cells(self) -> tuple[str, ...]:
        """Return the columns of :data:`HEADER`."""
        return self.names, self.sm, self.memory, self.target, self.recipe, self.four_bits, self.ran


def gpu_rows() -> Iterator[GpuRow]:
    """Return a row for every kind and compute capability: cards that are served alike share it."""
    for kind, title in KINDS.items():
        groups: dict[str, list[Gpu]] = {}
        for gpu in GPUS:
            if gpu.kind == kind:
                groups.setdefault(gpu.sm, []).append(gpu)
        for sm in sorted(groups, key=float):
            yield _row(title, sm, groups[sm])


def _row(title: str, sm: str, gpus: list[Gpu]) -> GpuRow:
    names = f"{title}: " + ", ".join(gpu.name for gpu in gpus)
    sizes = sorted({size for gpu in gpus for size in gpu.memory})
    memory = f"{sizes[0]} GB" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} GB"
    found = CAPABILITIES[sm]
    if found.refused:
        return GpuRow(names, sm, memory, "none", "none", found.refused, "refused", refused=True)
    target, recipe = _choice(sm)
    ran = "one H100" if found.measured else "nothing yet"
    return GpuRow(names, sm, memory, target, recipe, runs_text(sm), ran)


def runs_text(sm: str) -> str:
    """Return where 4-bit activations gain time or memory on a compute capability, in words.

    Args:
        sm: The compute capability.
    """
    found = CAPABILITIES[sm]
    words = [f"engines: {found.rtx_a4}"] if found.rtx_a4 else []
    words += [f"kernels: {found.kernels_a4}"] if found.kernels_a4 else []
    if not words and slower_in_int8(sm_number(sm)):
        return "none: a8, slower than bf16"
    return "; ".join(words) or "none: a8"
