"""What a run holds at each of its stages, and the arrangement of parts that fits a device's memory.

A run has three stages: text is encoded, the steps are taken, the frames are decoded. At each stage some parts are on the
device and one of them works. An arrangement says which: all of them all the time, those that wait in the host's memory
(offload), or the text encoder first and freed before the transformer is loaded (alternate). Nothing here imports torch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dvdquant.errors import ResourceError
from dvdquant.hardware.weights import HeldForm
from dvdquant.model.working_memory import TEXT_BYTES
from dvdquant.text import amount

__all__ = [
    "FOUR_BIT_GROUP",
    "INT8_ROW",
    "PACKED",
    "Arrangement",
    "Loaded",
    "MemoryPlan",
    "RunBytes",
    "Stage",
    "arrange",
    "best",
    "engine_choices",
    "fitting",
    "four_bit_bytes",
    "possible",
]

INT8_ROW = 5
"""Bytes of the scale and the zero-point of a row, of a text encoder in 8 bits."""
FOUR_BIT_GROUP = 32
"""Channels that share a scale and a zero-point, of a text encoder in 4 bits; another number of channels stays in 16 bit."""
TEXT, STEPS, FRAMES = "text is encoded", "steps are taken", "frames are decoded"
_FORMS = {
    "original": "16 bit",
    "packed": "packed weights",
    "expanded": "expanded weights",
    "mixed": "partly expanded weights",
}


@dataclass(frozen=True)
class Loaded:
    """The transformers that are loaded.

    Args:
        form: How their weights are held. All but ``engines`` serve every bit-width.
        bits: Activation bits of the engines that are loaded, each with weights of its own; empty for other forms.
    """

    form: HeldForm | Literal["original", "engines"]
    bits: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.form == "engines":
            return " and ".join(f"a{bits}" for bits in self.bits)
        return _FORMS[self.form]

    def options(self) -> list[str]:
        """Return the options of ``dvdq-run`` that ask for it where another is the first choice."""
        # Another than the first is one bit-width of two, or weights that stay packed.
        return ["--mode", str(self)] if self.form == "engines" else ["--weights", self.form]


PACKED = Loaded("packed")


def four_bit_bytes(weights: int, rows: int) -> int:
    """Return the bytes of layers of a text encoder in 4 bits: codes, scale and zero-point of groups, and fp32 scales of rows.

    Args:
        weights: Their weights, in whole groups.
        rows: Their rows.
    """
    return weights // 2 + 2 * (weights // FOUR_BIT_GROUP) + 4 * rows


@dataclass(frozen=True)
class RunBytes:
    """The bytes of the parts of a run, and what they work in.

    Args:
        text: Bytes of the text encoders by the bits of their weights; empty where none is loaded.
        image: Bytes of the image encoder, 0 where there is none.
        vae: Bytes of the VAE, 0 where there is none.
        transformer: Bytes of the transformers by what is loaded of them, the one with most choice first.
        step: Bytes that one call of the transformer works in.
        decode: Bytes that the VAE works in, whole (False) and in tiles (True).
        base: Bytes that libraries and the program take before anything is loaded.
        copy: Bytes of a copy of the weight files that lies beside the transformers in the device's own memory.
    """

    text: Mapping[int, int]
    image: int
    vae: int
    transformer: Mapping[Loaded, int]
    step: int
    decode: Mapping[bool, int]
    base: int = 0
    copy: int = 0


@dataclass(frozen=True)
class Arrangement:
    """The way in which the parts of a run share a device.

    Args:
        transformer: What is loaded of the transformers, a key of :attr:`RunBytes.transformer`.
        vae_tiling: The VAE works in tiles.
        offload: Parts that do not work wait in the host's memory; the transformer stays.
        alternate: The text encoder is loaded first and freed before the transformer is loaded.
        text_bits: Bits of the text encoder's weights.
    """

    transformer: Loaded
    vae_tiling: bool = False
    offload: bool = False
    alternate: bool = False
    text_bits: int = 16

    def words(self, first: Loaded | None = None) -> str:
        """Return the arrangement in words.

        Args:
            first: What of the transformers needs no word.
        """
        found = [
            str(self.transformer) if self.transformer != first else "",
            "VAE in tiles" if self.vae_tiling else "",
            "parts offloaded" if self.offload else "",
            "text encoder before the transformer" if self.alternate else "",
            f"text encoder in {self.text_bits} bits" if self.text_bits != 16 else "",
        ]
        return ", ".join(words for words in found if words)

    def options(self, first: Loaded) -> list[str]:
        """Return the options of ``dvdq-run`` for it.

        Args:
            first: What of the transformers needs no option.
        """
        return [
            *([] if self.transformer == first else self.transformer.options()),
            *(["--vae-tiling"] if self.vae_tiling else []),
            *(["--offload"] if self.offload else []),
            *(["--alternate"] if self.alternate else []),
            *(["--text-encoder-bits", str(self.text_bits)] if self.text_bits != 16 else []),
        ]


@dataclass(frozen=True)
class Stage:
    """The bytes on the device at one stage.

    Args:
        name: The stage, in words.
        parts: Part -> bytes of its weights.
        work: Bytes that the part which runs works in.
        base: Bytes of libraries and program.
    """

    name: str
    parts: Mapping[str, int]
    work: int
    base: int

    @property
    def total(self) -> int:
        """Return the bytes in all."""
        return sum(self.parts.values()) + self.work + self.base


@dataclass(frozen=True)
class MemoryPlan:
    """An arrangement and what it holds when.

    Args:
        arrangement: The arrangement.
        stages: Its stages, in their order.
    """

    arrangement: Arrangement
    stages: tuple[Stage, ...]

    @functools.cached_property
    def worst(self) -> Stage:
        """Return the stage that holds most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        """Return the bytes of the stage that holds most."""
        return self.worst.total

    def to_json(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        stages = [
            {"stage": each.name, "parts": dict(each.parts), "work": each.work, "base": each.base, "total": each.total}
            for each in self.stages
        ]
        arrangement = {**asdict(self.arrangement), "transformer": str(self.arrangement.transformer)}
        return {"arrangement": arrangement, "stages": stages, "peak": self.peak}


def arrange(run: RunBytes, arrangement: Arrangement) -> MemoryPlan:
    """Return what an arrangement holds at each stage.

    Args:
        run: The bytes of the run.
        arrangement: The arrangement.
    """
    text = run.text.get(arrangement.text_bits, 0)
    transformer = {str(arrangement.transformer): run.transformer[arrangement.transformer]}
    if run.copy:
        transformer["copy of the weight files"] = run.copy
    others = {name: size for name, size in (("image encoder", run.image), ("VAE", run.vae)) if size}
    resident = {} if arrangement.offload else others
    encoder = {"text encoder": text} if text else {}
    # Neither offload nor alternating leaves the text encoder on the device while the others work.
    kept_text = encoder if not (arrangement.offload or arrangement.alternate) else {}
    stages = []
    if encoder:
        beside = {} if arrangement.alternate else {**transformer, **resident}
        stages.append(Stage(TEXT, {**encoder, **beside}, TEXT_BYTES, run.base))
    stages.append(Stage(STEPS, {**transformer, **resident, **kept_text}, run.step, run.base))
    if run.vae:
        decoding = {**transformer, **resident, "VAE": run.vae, **kept_text}
        stages.append(Stage(FRAMES, decoding, run.decode[arrangement.vae_tiling], run.base))
    return MemoryPlan(arrangement, tuple(stages))


def possible(run: RunBytes, *, unified: bool, fixed: Mapping[str, Any] | None = None) -> list[MemoryPlan]:
    """Return every arrangement of a run, the one that costs least first.

    What costs time comes before what changes the clip: tiles, offload, alternating, the text encoder in 8 and in 4 bits, fewer
    bit-widths.

    Args:
        run: The bytes of the run.
        unified: Whether the device shares the host's memory, where offload frees nothing.
        fixed: Fields of :class:`Arrangement` that the user has decided.
    """
    decided = dict(fixed or {})
    choices: dict[str, Sequence[Any]] = {
        "transformer": list(run.transformer),
        "text_bits": sorted(run.text, reverse=True) or [16],
        "alternate": [False, True] if run.text else [False],
        "offload": [False] if unified or not (run.text or run.vae) else [False, True],
        "vae_tiling": [False, True] if run.vae else [False],
    }
    choices.update({name: [value] for name, value in decided.items()})
    plans = [arrange(run, Arrangement(**dict(zip(choices, values)))) for values in itertools.product(*choices.values())]
    order = list(run.transformer)

    def cost(plan: MemoryPlan) -> tuple[int, int]:
        how = plan.arrangement
        each = how.vae_tiling + 2 * how.offload + 3 * how.alternate + {16: 0, 8: 8, 4: 16}[how.text_bits]
        return each + 24 * order.index(how.transformer), plan.peak

    return sorted(plans, key=cost)


def best(plans: Sequence[MemoryPlan], memory: int) -> tuple[MemoryPlan, bool]:
    """Return the first plan that fits a memory, and True; or the smallest one where none does, and False.

    Args:
        plans: The plans, see :func:`possible`.
        memory: Bytes that the run may take.
    """
    for plan in plans:
        if plan.peak <= memory:
            return plan, True
    return min(plans, key=lambda plan: plan.peak), False


def engine_choices(each: Mapping[int, int], *, narrow: bool = True) -> dict[Loaded, int]:
    """Return what may be loaded of engines that hold their weights themselves, see :attr:`RunBytes.transformer`.

    Args:
        each: Activation bits -> bytes of their engines.
        narrow: Whether one bit-width alone is a choice.
    """
    found = {Loaded("engines", tuple(sorted(each))): sum(each.values())}
    return found | {Loaded("engines", (bits,)): each[bits] for bits in sorted(each, reverse=True) if narrow}


def fitting(run: RunBytes, memory: int, *, unified: bool, fixed: Mapping[str, Any] | None = None) -> MemoryPlan:
    """Return the arrangement that costs least of those that fit a memory.

    Args:
        run: The bytes of the run.
        memory: Bytes that the run may take.
        unified: Whether the device shares the host's memory.
        fixed: Fields of :class:`Arrangement` that the user has decided.

    Raises:
        ResourceError: None fits; the error says what the smallest takes, and where.
    """
    least, fits = best(possible(run, unified=unified, fixed=fixed), memory)
    if fits:
        return least
    worst = least.worst
    held = ", ".join(f"{name} {amount(size)}" for name, size in worst.parts.items())
    how = least.arrangement.words(next(iter(run.transformer))) or "as it is"
    raise ResourceError(
        f"the run takes {amount(least.peak)} at least ({how}) while {worst.name}: {held}, and {amount(worst.work)} to work in"
        + (f", libraries {amount(worst.base)}" if worst.base else ""),
        available=f"{amount(memory)}; it fits {amount(least.peak)}",
        fix=_smaller(worst.name),
    )


def _smaller(stage: str) -> str:
    if stage == TEXT:
        return "encode the text elsewhere (--save-text-embeds FILE), and draw with --text-embeds FILE"
    return "ask for a smaller or shorter clip, or draw on a device with more memory"
