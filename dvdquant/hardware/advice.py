"""The recipe and the target that suit a GPU, by what was measured and by what really executes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dvdquant.errors import UnsupportedError
from dvdquant.hardware.capabilities import CAPABILITIES, JETSONS, capability, parse_sm, sm_number
from dvdquant.hardware.find import installed_gpus, resolve_gpu
from dvdquant.hardware.weights import slower_in_int8
from dvdquant.text import shown

__all__ = ["AUTO", "QUALITY", "Advice", "Choice", "choose", "choose_recipe", "choose_target"]

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


@dataclass(frozen=True)
class Advice:
    """A chosen recipe.

    Args:
        recipe: Its name.
        reason: Why, in words.
    """

    recipe: str
    reason: str


_CONVROT = Advice("convrot", "the one whose codes ComfyUI's kernels multiply as they are, for --also-write")


@dataclass(frozen=True)
class Choice:
    """What an export is made for, with all that was left open filled in.

    Args:
        sms: The compute capabilities.
        targets: The targets.
        recipe: The name of the recipe.
        gpus: The names of the cards that were given, or found in this machine.
        notes: What was chosen and why, a line each.
    """

    sms: tuple[str, ...]
    targets: tuple[str, ...]
    recipe: str
    gpus: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose(
    gpus: Sequence[str], sms: Sequence[str], targets: Sequence[str], recipe: str = AUTO, layouts: Sequence[str] = ()
) -> Choice:
    """Return what an export is made for: the words of the user, and for what they leave open, what suits the cards.

    Args:
        gpus: Names of cards, or ``auto`` for that of this machine.
        sms: Compute capabilities in any form.
        targets: Targets; none lets the cards decide.
        recipe: The name of a recipe, or ``auto``.
        layouts: The layouts of others that the weights are written in as well.

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
    if recipe == AUTO:
        advice = choose_recipe(found, wanted) if not layouts else _CONVROT
        recipe = advice.recipe
        notes.append(f"recipe {recipe}: {advice.reason}")
    notes += _slow_notes(found, wanted)
    return Choice(found, wanted, recipe, tuple(name for name, _ in cards), tuple(notes))


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


def choose_recipe(sms: Sequence[str], targets: Sequence[str]) -> Advice:
    """Return the recipe for compute capabilities and targets.

    4-bit activations cost quality, so they are taken only where they gain time or memory over 8 bits.

    Args:
        sms: The compute capabilities that the export is for.
        targets: The targets of the export.

    Raises:
        UnsupportedError: A compute capability is unknown.
    """
    if "onnx" in targets:
        return Advice("w4a4", "QDQ graphs are for any runtime, and nothing is known of what yours gains from 4 bits")
    gains = {(sm, target): capability(sm).gain(target) for sm in sms for target in targets}
    where = {sm: units for (sm, _), units in gains.items() if units}
    if not where:
        return Advice(
            "w4a8",
            f"on SM {', '.join(sms)} a4 takes the time and the memory of a8, and is further from the original "
            f"({QUALITY['w4a8', 8]:.1f} dB against {QUALITY['w4a4', 4]:.1f} on the toy model)",
        )
    units = ", ".join(dict.fromkeys(where.values()))
    whole = [sm for sm in sms if not capability(sm).rtx_a4]  # their engines multiply a4 as INT8, if scales are per row
    if "rtx" in targets and whole:
        return Advice(
            "w4a4",
            f"a4 runs on {units} of SM {', '.join(where)}, and on INT8 in the rtx engines of SM {', '.join(whole)}, which "
            "want a scale per row",
        )
    if "rtx" in targets:
        return Advice(
            "w4a4-g64",
            f"a4 runs on {units} of SM {', '.join(where)} ({QUALITY['nvfp4', 4]:.1f} dB on the toy model under any recipe), "
            f"a8 on INT8, which scales per 64 channels bring nearest ({QUALITY['w4a4-g64', 8]:.1f} dB, with one per row "
            f"{QUALITY['w4a4', 8]:.1f})",
        )
    return Advice("w4a4-g64", f"a4 runs on {units} of SM {', '.join(where)}; scales per 64 channels cost it least")
