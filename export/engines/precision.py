"""The frozen table from (backend, SM, activation grid) to the precision that really executes, and its plain words.

A test builds every entry of the RTX table and reads the operand types out of the builder's own listing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dvdquant.artifact.layout import engine_path
from dvdquant.errors import UnsupportedError
from dvdquant.export.engines.attention import SIXTEEN_BIT, AttentionWish
from dvdquant.hardware.capabilities import sm_number
from dvdquant.hardware.weights import slower_in_int8
from dvdquant.recipe import ActivationSpec, Recipe

__all__ = [
    "PRECISIONS",
    "RTX_SMS",
    "TENSORRT_SMS",
    "EnginePlan",
    "Precision",
    "check_sms",
    "choose_precision",
    "plan_engines",
    "what_executes",
]

Precision = Literal["int8", "int4-weight-only", "nvfp4", "plugin"]
"""How a QuantLinear runs.

``int8``: INT8 tensor cores; both operands' codes in 8 bits. ``int4-weight-only``: packed 4-bit weights, activations
rounded to their codes and multiplied in 16 bit. ``nvfp4``: FP4 tensor cores, another quantizer. ``plugin``: dvdquant's
own kernels.
"""

PRECISIONS: tuple[str, ...] = ("auto", "int8", "int4-weight-only", "nvfp4")

RTX_SMS: tuple[str, ...] = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""SMs TensorRT-RTX 1.7 compiles these graphs for. 7.5 is left out: it has neither bf16 nor INT4 there."""

_FP4_SMS = ("12.0", "12.1")

_S4 = "native 4-bit integer tensor cores (s4 mma)"
_S8 = "8-bit integer tensor cores; 4-bit codes widened to 8 bits, so A4 is no faster than A8"
_PLUGIN_A4: dict[str, str] = {
    "8.0": _S4,
    "8.6": _S4,
    "8.7": _S4,
    "8.9": _S4,
    "9.0": "8-bit tensor cores (Hopper has no 4-bit integer units), so A4 is no faster than A8",
    "10.0": _S8,
    "10.3": _S8,
    "11.0": _S8,
    "12.0": _S8,
    "12.1": _S8,
}
# Machine code runs on later minor versions of its major version, unless it was made for one version's own instructions (sm_90a
# is, sm_100 and sm_120 are not) or the GPU is a Tegra chip (8.7, 11.0). The kernel library is built for 8.0, 8.7, 9.0a, 10.0,
# 11.0 and 12.0.
_PLUGIN_CODE_OF = {"10.3": "10.0", "12.1": "12.0"}
TENSORRT_SMS: tuple[str, ...] = tuple(_PLUGIN_A4)
"""SMs the TensorRT plugin has kernels for."""


@dataclass(frozen=True)
class EnginePlan:
    """One engine file to build.

    Args:
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        sms: The compute capabilities that it serves. Several are possible only with TensorRT-RTX, at no extra size.
        act_bits: The bits of the graph's activations: 4, 6 or 8.
        precision: The way in which its QuantLinear nodes run.
        executes: The same in plain words, for the manifest and the dry run.
        attention: How its self-attention runs: ``16`` or ``fp8``.
    """

    backend: str
    sms: tuple[str, ...]
    act_bits: int
    precision: Precision
    executes: str
    attention: Literal["16", "fp8"] = "16"

    @property
    def folder(self) -> str:
        """Return the name of the engine's folder, such as ``tensorrt_rtx-8.0+8.6``."""
        return f"{self.backend}-{'+'.join(self.sms)}"

    def path(self, component: str) -> str:
        """Return the path of the engine, relative to the export.

        Args:
            component: The name of the transformer's folder.
        """
        return engine_path(component, self.backend, self.sms, self.act_bits)


def choose_precision(backend: str, sm: str, activation: ActivationSpec, override: str = "auto") -> Precision:
    """Return the precision of one graph on one SM.

    TensorRT always runs the plugin, with 4 or 8 bits. TensorRT-RTX with ``auto`` runs:

    | SM | act_bits 8 or 6, token | act_bits 4, token | act_bits 8 or 6, groups | act_bits 4, groups |
    |---|---|---|---|---|
    | 8.0 8.6 8.9 | int8 | int8 | int4-weight-only | int4-weight-only |
    | 12.0 12.1 | int8 | nvfp4 | int4-weight-only | nvfp4 |

    Args:
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        sm: The compute capability, such as "8.9".
        activation: The activation grid of the graph.
        override: ``auto`` or one of the other ``PRECISIONS``; TensorRT takes ``auto`` only.

    Raises:
        UnsupportedError: The SM has no entry, the backend or the override is unknown, or the override cannot run this
            grid on this SM.
    """
    known = _known_sms(backend)
    if sm not in known:
        raise UnsupportedError(
            f"{backend} engines for SM {sm} are not supported", available=known, fix="pick with --sm"
        )
    if override not in PRECISIONS:
        raise UnsupportedError(f"unknown precision {override!r}", available=PRECISIONS, fix="pick with --precision")
    if backend == "tensorrt":
        if override != "auto":
            raise UnsupportedError(
                "TensorRT engines run the plugin; --precision applies to the rtx target",
                fix="leave --precision out, or take --target rtx",
            )
        if activation.bits not in (4, 8):
            raise UnsupportedError(
                f"the TensorRT plugin has no {activation.bits}-bit activations",
                available=["4", "8"],
                fix="use w4a4 or w4a8",
            )
        return "plugin"
    fp4 = sm in _FP4_SMS and activation.bits == 4
    whole = activation.group_size == 0
    accepted: tuple[Precision, ...] = (
        *(("nvfp4",) if fp4 else ()), *(("int8",) if whole else ()), "int4-weight-only",
    )  # fmt: skip
    if override == "auto":
        return accepted[0]
    for precision in accepted:
        if precision == override:
            return precision
    grid = f"{activation.bits}-bit activations, " + (
        "one scale per token" if whole else f"groups of {activation.group_size}"
    )
    raise UnsupportedError(f"{override} cannot run {grid} on SM {sm}", available=accepted, fix="pick with --precision")


def check_sms(sms: Iterable[str]) -> None:
    """Refuse a compute capability that no backend has, also where no engine is built; it is a typo there as well.

    Args:
        sms: The compute capabilities, such as "8.9".

    Raises:
        UnsupportedError: A compute capability is unknown.
    """
    known = sorted({*RTX_SMS, *TENSORRT_SMS}, key=float)
    for sm in sms:
        if sm not in known:
            raise UnsupportedError(f"there are no engines for SM {sm!r:.40}", available=known, fix="pick with --sm")


def _known_sms(backend: str) -> tuple[str, ...]:
    """Return the SMs that a backend has entries for.

    Raises:
        UnsupportedError: There is no such backend.
    """
    tables = {"tensorrt_rtx": RTX_SMS, "tensorrt": TENSORRT_SMS}
    if backend not in tables:
        raise UnsupportedError(f"unknown engine backend {backend!r}", available=tables)
    return tables[backend]


def what_executes(
    precision: Precision,
    act_bits: int,
    sm: str,
    recipe: Recipe | None = None,
    *,
    from_checkpoint: bool = False,
) -> str:
    """Return plain words for the manifest and ``--dry-run``: the units, the widths, and the effect on speed and memory.

    Args:
        precision: The way in which the QuantLinear nodes run.
        act_bits: The bits of the activations: 4, 6 or 8.
        sm: The compute capability; only the words of the plugin depend on it.
        recipe: The recipe, which says if the INT8 codes are exact or rounded again; None leaves that out.
        from_checkpoint: True if nvfp4 weights come from the original checkpoint, False if from the 4-bit codes.

    Raises:
        UnsupportedError: The plugin has no kernels for this SM.
    """
    if precision == "plugin":
        return _plugin_text(act_bits, sm)
    if precision == "int8":
        codes = "4-bit weights" if act_bits == 8 else f"4-bit weights and {act_bits}-bit activation codes each"
        words = f"INT8 tensor cores; {codes} stored in 8 bits" + ("" if act_bits == 8 else ", so no faster than a8")
        if recipe is not None and recipe.weight.group_size:
            words += f"; weight groups of {recipe.weight.group_size} rounded again to 8 bits per row"
        return words
    if precision == "int4-weight-only":
        return (
            "16-bit tensor cores; weights stay packed in 4 bits (least memory), activations are rounded to their "
            f"{act_bits}-bit codes and multiplied in 16 bits, so the product is no faster than 16 bit"
        )
    source = "the original checkpoint" if from_checkpoint else "the 4-bit codes (rounded to 4 bits twice)"
    return (
        "FP4 tensor cores; NVFP4 (e2m1, one e4m3 scale per 16 channels) replaces the recipe's grids of weights and "
        f"activations, rotation kept; weights quantized from {source}"
    )


def _plugin_text(act_bits: int, sm: str) -> str:
    """Return the plain words of the plugin.

    Raises:
        UnsupportedError: It has no kernels for this SM.
    """
    if sm not in _PLUGIN_A4:
        raise UnsupportedError(f"the TensorRT plugin has no kernels for SM {sm}", available=TENSORRT_SMS)
    words = _PLUGIN_A4[sm] if act_bits == 4 else "8-bit tensor cores, 4-bit weights widened to 8 bits"
    code = f" (machine code of SM {_PLUGIN_CODE_OF[sm]})" if sm in _PLUGIN_CODE_OF else ""
    slow = ", slower than 16 bit there" if slower_in_int8(sm_number(sm)) else ""
    return f"dvdquant plugin: {words}{slow}{code}"


def plan_engines(
    backend: str,
    sms: Sequence[str],
    activations: Iterable[ActivationSpec],
    *,
    recipe: Recipe | None = None,
    override: str = "auto",
    from_checkpoint: bool = False,
    attention: AttentionWish = SIXTEEN_BIT,
) -> list[EnginePlan]:
    """Return the engines to build; SMs with the same precision share one per graph where the backend allows it.

    An override that one graph can run and another cannot (NVFP4 has no 8-bit activations) applies to the first one; the
    other gets its automatic precision.

    Args:
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        sms: The target compute capabilities. Repeated ones count once, and the order is kept.
        activations: The activation grids, one per graph.
        recipe: The recipe, for the plain words; see :func:`what_executes`.
        override: ``auto`` or one of the other ``PRECISIONS``.
        from_checkpoint: True if nvfp4 weights come from the original checkpoint, for the plain words.
        attention: The self-attention that is asked for. An engine that also serves an SM without FP8 has it in 16 bit.

    Raises:
        UnsupportedError: See :func:`choose_precision`; for an override only if no graph can run it on one of the SMs.
    """
    plans: list[EnginePlan] = []
    grids = list(activations)
    for activation in grids:
        groups: dict[tuple[Precision, str], list[str]] = {}
        for sm in dict.fromkeys(sms):
            precision = _override_or_auto(backend, sm, activation, override, grids)
            groups.setdefault((precision, sm if backend == "tensorrt" else ""), []).append(sm)
        for (chosen, _), members in groups.items():
            words = what_executes(chosen, activation.bits, members[0], recipe, from_checkpoint=from_checkpoint)
            words += attention.words(members)
            plans.append(EnginePlan(backend, tuple(members), activation.bits, chosen, words, attention.on(members)))
    return plans


def _override_or_auto(
    backend: str, sm: str, activation: ActivationSpec, override: str, grids: Sequence[ActivationSpec]
) -> Precision:
    """Return the override, or the automatic precision if only another graph can run the override.

    Raises:
        UnsupportedError: No graph can run the override on this SM, or there is no precision at all.
    """
    try:
        return choose_precision(backend, sm, activation, override)
    except UnsupportedError:
        if override not in PRECISIONS or not any(_runs(backend, sm, grid, override) for grid in grids):
            raise
        return choose_precision(backend, sm, activation)


def _runs(backend: str, sm: str, activation: ActivationSpec, override: str) -> bool:
    """Return whether a graph can run the override on an SM."""
    try:
        choose_precision(backend, sm, activation, override)
    except UnsupportedError:
        return False
    return True
