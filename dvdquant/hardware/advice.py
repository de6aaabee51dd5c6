"""The recipe and the target that suit a GPU, by what was measured and by what really executes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dvdquant.errors import UnsupportedError
from dvdquant.hardware.capabilities import CAPABILITIES, JETSONS, Capability, capability, parse_sm, sm_number
from dvdquant.hardware.find import installed_gpus, resolve_gpu
from dvdquant.hardware.weights import slower_in_int8
from dvdquant.text import shown

__all__ = ["AUTO", "BOTH_BYTES", "QUALITY", "Advice", "Choice", "choose", "choose_recipe", "choose_target"]

AUTO = "auto"
DEFAULT_SM, DEFAULT_TARGET = "8.9", "rtx"

# PSNR in dB to the fp32 clips of tiny-wan, 128 clips (docs/quality/index.md), by (recipe, activation bits); "nvfp4" is what a4
# engines of SM 12.x compute under any recipe.
QUALITY: dict[tuple[str, int], float] = {
    ("w4a8", 8): 36.14,
    ("w4a4-g64", 8): 36.01,
    ("w4a4-g64", 4): 30.89,
    ("w4a4", 8): 32.55,
    ("w4a4", 4): 28.37,
    ("nvfp4", 4): 28.53,
}
# Bytes a weight of an INT8 and an NVFP4 engine together, with its scales (dvdquant.export.estimate has both).
BOTH_BYTES = 1.5625


@dataclass(frozen=True)
class Advice:
    """A chosen recipe.

    Args:
        recipe: Its name.
        reason: Why, in words.
        activations: The activation bits of the recipe that are made; empty means all of them.
    """

    recipe: str
    reason: str
    activations: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The cards, targets and recipe of an export, with all that was left open filled in.

    Args:
        sms: The compute capabilities.
        targets: The targets.
        recipe: The name of the recipe.
        gpus: The names of the cards that were given, or found in this machine.
        notes: What was chosen and why, a line each.
        activations: The activation bits of the recipe that are made; empty means all of them.
    """

    sms: tuple[str, ...]
    targets: tuple[str, ...]
    recipe: str
    gpus: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    activations: tuple[int, ...] = ()


def choose(
    gpus: Sequence[str],
    sms: Sequence[str],
    targets: Sequence[str],
    recipe: str = AUTO,
    layouts: Sequence[str] = (),
    *,
    only: int | None = None,
    precision: str = AUTO,
) -> Choice:
    """Return what an export is made for: the words of the user, and for what they leave open, what suits the cards.

    Args:
        gpus: Names of cards, or ``auto`` for that of this machine.
        sms: Compute capabilities in any form.
        targets: Targets; none lets the cards decide.
        recipe: The name of a recipe, or ``auto``.
        layouts: The layouts of others that the weights are written in as well.
        only: The activation bits, 4 or 8, that are made alone; None leaves that open.
        precision: How rtx engines are to run, or ``auto``. ``nvfp4`` asks for a4, which has no other width.

    Raises:
        UnsupportedError: A card or a compute capability is unknown or has nothing, or ``auto`` finds no card.
    """
    cards = [resolve_gpu(name) for name in gpus]
    found = tuple(dict.fromkeys([*(sm for _, sm in cards), *map(parse_sm, sms)]))
    notes = [f"{shown(name)} is SM {sm}" for name, sm in cards]
    named = bool(found)
    if not named:
        found = (DEFAULT_SM,)
        here = [shown(gpu.name) for gpu in installed_gpus()]
        yours = (
            f"this machine has {here[0]}, which --gpu auto takes"
            if here
            else "--gpu NAME or --gpu auto takes what suits yours"
        )
        notes = [f"no card was named: SM {DEFAULT_SM} (RTX 40), target {' '.join(targets) or DEFAULT_TARGET}; {yours}"]
    wanted = tuple(targets)
    if not named:
        wanted = wanted or (DEFAULT_TARGET,)
    elif not wanted:
        target, why = choose_target(found)
        wanted = (target,)
        notes.append(f"target {target}: {why}")
    else:
        _check_targets(found, wanted)
    made: tuple[int, ...] = () if only is None else (only,)
    if recipe == AUTO:
        width = 4 if only is None and precision == "nvfp4" else only
        advice = _for_layouts(wanted, width) if layouts else choose_recipe(found, wanted, width)
        recipe, made = advice.recipe, advice.activations
        notes.append(f"recipe {recipe}: {advice.reason}")
    notes += _slow_notes(found, wanted)
    return Choice(found, wanted, recipe, tuple(name for name, _ in cards), tuple(notes), made)


def _slow_notes(sms: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return a line for every compute capability on which our kernels are slower than the original in bf16."""
    if not {"graphs", "tensorrt"} & {*targets}:
        return []
    return [
        f"SM {sm} is slow in 8 bits: {slow}. This export saves memory there and costs time; where the original fits, run it in "
        "bf16, or in FP8 or NVFP4 by other tools"
        for sm in sms
        if (slow := slower_in_int8(sm_number(sm)))
    ]


def _check_targets(sms: Sequence[str], targets: Sequence[str]) -> None:
    """Refuse engines that nobody builds for a compute capability, and name the target that serves it.

    Raises:
        UnsupportedError: A target makes nothing for one of them.
    """
    for sm in sms:
        possible = capability(sm).targets
        for target in targets:
            if target in ("rtx", "tensorrt") and target not in possible:
                raise UnsupportedError(
                    f"--target {target} makes nothing for SM {sm}",
                    available=f"for SM {sm}: {', '.join(f'--target {each}' for each in possible)}",
                    fix=f"take --target {possible[0]} for it, in a folder of its own if there are other SMs",
                )


def choose_target(sms: Sequence[str]) -> tuple[str, str]:
    """Return the target for compute capabilities where none was given, and why.

    Args:
        sms: The compute capabilities.

    Raises:
        UnsupportedError: One is unknown or has nothing, or they need different targets.
    """
    found = [capability(sm) for sm in sms]
    without = [each.sm for each in found if not each.rtx]
    unlisted = [each.sm for each in found if each.rtx and not each.rtx_listed]
    listed = len(found) - len(without) - len(unlisted)
    if listed and not without:
        words = f"; NVIDIA's support matrix of it does not name SM {', '.join(unlisted)}" if unlisted else ""
        return "rtx", f"TensorRT-RTX builds its engines without a GPU{words}"
    if listed:
        raise UnsupportedError(
            f"TensorRT-RTX builds no engines for SM {', '.join(without)}",
            available=[each.sm for each in CAPABILITIES.values() if each.rtx],
            fix=f"export for it alone, into another folder: --sm {without[0]} --target graphs, or --target tensorrt",
        )
    if all(each.sm in JETSONS for each in found):
        return "tensorrt", (
            "a Jetson builds its TensorRT engines itself, from these graphs, with the plugin (dvdq-build there); PyTorch "
            "sessions run the same export on our kernels"
        )
    reasons = [f"TensorRT-RTX builds no engines for SM {', '.join(without)}"] if without else []
    if unlisted:
        reasons.append(f"NVIDIA's support matrix of TensorRT-RTX does not name SM {', '.join(unlisted)}")
    return "graphs", (
        f"{'; '.join(reasons)}; PyTorch sessions run the graphs' weights on our kernels, "
        "and --target tensorrt builds engines with the plugin"
    )


def choose_recipe(sms: Sequence[str], targets: Sequence[str], only: int | None = None) -> Advice:
    """Return the recipe for compute capabilities and targets.

    4-bit activations cost quality, so they are taken only where they gain time or memory over 8 bits. Engines of
    TensorRT-RTX do not share weights, and two of them are larger than the original in bf16, so one is made.

    Args:
        sms: The compute capabilities that the export is for.
        targets: The targets of the export.
        only: The activation bits, 4 or 8, that are made alone; None leaves that open.

    Raises:
        UnsupportedError: A compute capability is unknown.
    """
    found = [capability(sm) for sm in sms]
    if only == 4:
        return _a4_alone(found, targets)
    if only == 8:
        return Advice(
            "w4a8", f"a8 alone, as asked for, which it keeps best ({_decibels('w4a8', 8)} on the toy model)", (8,)
        )
    if "rtx" in targets:
        return _one_engine(found, targets)
    if "onnx" in targets:
        return Advice("w4a4", "QDQ graphs are for any runtime, and nothing is known of what yours gains from 4 bits")
    where = {each.sm: each.kernels_a4 for each in found if each.kernels_a4}
    same = [each.sm for each in found if not each.kernels_a4]
    if not where:
        return Advice(
            "w4a8",
            f"{_same(same)}, and is further from the original ({_decibels('w4a8', 8)} against {QUALITY['w4a4', 4]:.1f} on the "
            "toy model)",
        )
    units = ", ".join(dict.fromkeys(where.values()))
    beside = f"; {_same(same)}" if same else ""
    return Advice(
        "w4a4-g64", f"a4 runs on {units} of SM {', '.join(where)}; scales per 64 channels cost it least{beside}"
    )


def _one_engine(found: Sequence[Capability], targets: Sequence[str]) -> Advice:
    """Return the recipe of one TensorRT-RTX engine for all compute capabilities."""
    fast = [each for each in found if each.rtx_a4]
    same = [each.sm for each in found if not each.rtx_a4]
    others = "; the other targets get the same width" if len({*targets}) > 1 else ""
    engines = " in rtx engines" if others else ""
    if not fast:
        return Advice(
            "w4a8",
            f"{_same(same)}{engines}, and is further from the original ({_decibels('w4a8', 8)} against {QUALITY['w4a4', 4]:.1f} "
            f"on the toy model){others}",
        )
    units = ", ".join(dict.fromkeys(each.rtx_a4 for each in fast))
    beside = f"; {_same(same)}{engines}" if same else ""
    both = "w4a4" if same else "w4a4-g64"
    return Advice(
        "w4a8",
        f"one engine, of a8, the nearer to the original ({_decibels('w4a8', 8)} against {QUALITY['nvfp4', 4]:.1f} on the toy "
        f"model). On SM {', '.join(each.sm for each in fast)} a4 runs on {units}, in an engine with a copy of the weights of "
        f"its own: both hold {BOTH_BYTES:.2f} bytes a weight, and with the packed weights they take more disk than bf16{beside}. "
        f"--recipe {both} makes both, to switch; --activations 4 makes a4 alone{others}",
    )


def _a4_alone(found: Sequence[Capability], targets: Sequence[str]) -> Advice:
    """Return the recipe of a4 alone: scales per 64 channels, where what multiplies them takes them."""
    words = "a4 alone, as asked for"
    whole = [each.sm for each in found if "rtx" in targets and not each.rtx_a4]
    if whole:
        return Advice("w4a4", f"{words}; the rtx engines of SM {', '.join(whole)} want a scale per row", (4,))
    if "onnx" in targets:
        return Advice("w4a4", f"{words}; QDQ graphs for any runtime have a scale per row", (4,))
    nvfp4 = f": NVFP4 in rtx engines ({_decibels('nvfp4', 4)} on the toy model)" if "rtx" in targets else ""
    return Advice("w4a4-g64", f"{words}{nvfp4}; scales per 64 channels cost it least", (4,))


def _for_layouts(targets: Sequence[str], only: int | None) -> Advice:
    """Return the recipe whose weights are written in the layouts of others, too."""
    words = "the one whose codes ComfyUI's kernels multiply as they are, for --also-write"
    if only is not None:
        return Advice("convrot", f"{words}; a{only} alone, as asked for", (only,))
    if "rtx" in targets:
        return Advice(
            "convrot", f"{words}; a8 alone, because each rtx engine holds a copy of the weights of its own", (8,)
        )
    return Advice("convrot", words)


def _same(sms: Sequence[str]) -> str:
    return f"on SM {', '.join(sms)} a4 takes the time and the memory of a8"


def _decibels(recipe: str, bits: int) -> str:
    return f"{QUALITY[recipe, bits]:.1f} dB"
