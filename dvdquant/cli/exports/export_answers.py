"""What an export is worth on a card: how much faster, how much memory, how much disk, at what cost in quality."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dvdquant.cli.exports.engine_copies import copies_text, sum_by_width
from dvdquant.hardware.advice import QUALITY
from dvdquant.hardware.capabilities import capability, sm_number
from dvdquant.hardware.find import find_gpu
from dvdquant.hardware.weights import slower_in_int8
from dvdquant.text import amount

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dvdquant.deploy.generation.memory_plan import Loaded
    from dvdquant.export.plan import ExportPlan
    from dvdquant.hardware.advice import Choice
    from dvdquant.hardware.weights import WeightForm
    from dvdquant.model.held_weights import HeldWeights

__all__ = ["answers", "device_answers"]

GB = 10**9


def answers(plan: ExportPlan, choice: Choice) -> list[tuple[str, str]]:
    """Return (question, answer) of an export, in words that say what was measured, what is modelled and what is not known.

    Args:
        plan: The plan of the export.
        choice: What it is made for.
    """
    return [
        ("faster", _speed(choice)),
        ("GPU memory", _memory(plan, choice)),
        *([("engines", copies)] if (copies := _copies(plan)) else []),
        ("disk", _disk(plan)),
        ("quality", _quality(plan)),
    ]


def _speed(choice: Choice) -> str:
    """Return how much faster it is."""
    words = []
    for sm in choice.sms:
        known = capability(sm)
        if "rtx" in choice.targets:
            listed = "" if known.rtx_listed else "; NVIDIA's support matrix of TensorRT-RTX does not name it"
            words.append(f"SM {sm}: not known, engines build for it and none has run on a GPU{listed}")
        elif not {"graphs", "tensorrt"} & {*choice.targets}:
            words.append(f"SM {sm}: not known, it depends on the runtime of the QDQ graphs")
        elif known.measured:
            what = "measured with PyTorch sessions on"
            words.append(f"SM {sm}: {what} {known.measured} as fast; other cards of this SM are not measured")
        elif slower_in_int8(sm_number(sm)):
            words.append(
                f"SM {sm}: no, by reported rates slower than the original in bf16, see above; nothing has run on it"
            )
        else:
            words.append(f"SM {sm}: not known, our kernels compile for it and have not run on it")
    return "; ".join(words)


def _memory(plan: ExportPlan, choice: Choice) -> str:
    """Return the memory that weights take on the GPU, beside those of 16 bit, and whether the card has it."""
    from dvdquant.export.estimate import held_bytes
    from dvdquant.model.held_weights import held_weights

    # Of two transformers, only one is needed at a time, but a pipeline holds both.
    widths: dict[int, int] = {}
    for engine in (*plan.engines, *plan.later):
        if engine.precision != "plugin":
            size = sum(held_bytes(each, engine) for each in plan.plans)
            widths[engine.act_bits] = max(widths.get(engine.act_bits, 0), size)
    sixteen = sum(2 * each.all_weights for each in plan.plans)
    if widths:
        parts = [f"a{bits} engine {amount(size)}" for bits, size in sorted(widths.items())]
        needed = sum(widths.values())
        words = f"weights of the {', of the '.join(parts)}"
        words += f", {amount(needed)} where both are loaded to switch" if len(widths) > 1 else ""
    else:
        bits = [each.bits for each in plan.options.recipe.activations]
        held = {sm: [held_weights(each, sm_number(sm), bits, plan.sizes) for each in plan.plans] for sm in choice.sms}
        plugin = _with_plugin(choice)
        packed = max(_held(each, "packed", plugin) for each in held.values())
        expanded = max(_held(each, "expanded", plugin) for each in held.values())
        needed = packed
        words = f"weights {amount(packed)} packed, for all bit-widths together; {amount(expanded)} expanded"
        words += _auto(held, plugin)
    words += f" (16 bit: {amount(sixteen)}), computed; activations, text encoder and VAE come on top"
    for name in choice.gpus:
        sizes = find_gpu(name).memory
        if needed > 0.9 * min(sizes) * GB:
            words += f"; too much for {name} with {min(sizes)} GB"
    return words


def _copies(plan: ExportPlan) -> str:
    """Return what engines of both widths hold beside 16 bit, or "" where there is one."""
    from dvdquant.export.estimate import held_bytes

    engines = [engine for engine in (*plan.engines, *plan.later) if engine.precision != "plugin"]
    held = sum_by_width((e.sms, e.act_bits, sum(held_bytes(each, e) for each in plan.plans)) for e in engines)
    return copies_text(held, sum(2 * each.all_weights for each in plan.plans), "the model")


def _with_plugin(choice: Choice) -> bool:
    """Return whether engines with the plugin hold the weights, and not a PyTorch session: it has rows and constants besides."""
    return "tensorrt" in choice.targets


def _held(transformers: Sequence[HeldWeights], form: WeightForm, plugin: bool) -> int:
    """Return the bytes that all transformers hold in a form, in engines with the plugin or in a PyTorch session."""
    return sum(one.nbytes(form, plugin) for one in transformers)


def _auto(held: Mapping[str, Sequence[HeldWeights]], plugin: bool) -> str:
    """Return what ``auto`` holds on the SM where that is most, and what a step pays there, in words."""
    from dvdquant.model.weight_choice import choose_weights

    found = {sm: [choose_weights(one, "auto", plugin=plugin) for one in each] for sm, each in held.items()}
    sm, choices = max(found.items(), key=lambda item: sum(choice.nbytes for choice in item[1]))
    cost = max(choice.cost for choice in choices)
    if all(choice.form == "packed" for choice in choices):
        return f", auto: packed, which costs a step {100 * cost:.1f} % [modelled]"
    whole = max(one.cost for one in held[sm])
    return (
        f", auto: {amount(sum(choice.nbytes for choice in choices))} on SM {sm}, where packed ones alone would cost a step "
        f"{100 * whole:.1f} % and so cost {100 * cost:.1f} % [modelled]"
    )


def _disk(plan: ExportPlan) -> str:
    """Return the size of the export, and what making it takes."""
    estimate = plan.estimate
    total = estimate.weight_file_bytes + estimate.engine_bytes
    share = f"{total / estimate.source_bytes:.2f} times the checkpoint's {amount(estimate.source_bytes)}"
    return f"{amount(total)}, {share}; {amount(estimate.disk_bytes)} while it is made, computed"


def _quality(plan: ExportPlan) -> str:
    """Return what it costs, as far as it was measured."""
    recipe = plan.options.recipe
    known = {
        each.bits: QUALITY[recipe.name, each.bits] for each in recipe.activations if (recipe.name, each.bits) in QUALITY
    }
    nvfp4 = any(engine.precision == "nvfp4" for engine in (*plan.engines, *plan.later))
    parts = [
        f"a{bits} {value:.1f} dB" for bits, value in sorted(known.items(), reverse=True) if not (nvfp4 and bits == 4)
    ]
    words = f"{', '.join(parts)} to the fp32 clips of a trained toy model, 128 clips" if parts else "not measured"
    if nvfp4:
        words += "; the a4 engines run NVFP4, another format"
        value = QUALITY.get(("nvfp4", 4))
        words += ", which is not measured" if value is None else f": {value:.1f} dB"
    return f"{words}. Nothing is known of this model at its full size: compare with dvdq run OUT --compare"


def device_answers(plan: ExportPlan, choice: Choice) -> list[tuple[str, str]]:
    """Return (device, whether the whole pipeline fits and how) for the named cards, or for the sizes that are sold of an SM.

    Args:
        plan: The plan of the export.
        choice: What it is made for.
    """
    from dvdquant.checkpoint.prompt_words import PromptWords
    from dvdquant.deploy.generation.device_fit import DEVICES, DeviceSize, fit, published, published_run

    alone = PromptWords.is_at(plan.options.model)  # such a model has neither text encoder nor VAE
    named = [find_gpu(name) for name in choice.gpus]
    devices = [
        DeviceSize(gpu.name, size, (gpu.sm,), unified=gpu.kind == "jetson") for gpu in named for size in gpu.memory
    ]
    devices = devices or [device for device in DEVICES if set(device.sms) & set(choice.sms)]
    family, found = plan.plans[0].family, []
    for device in devices:
        sm = next(sm for sm in device.sms if sm in choice.sms)
        held = _transformers(plan, choice, sm)
        run = published_run(family, plan.sizes, held)
        (answer,) = fit(replace(run, text={}, image=0, vae=0) if alone else run, [device])
        found.append((str(device), answer.words(next(iter(held)))))
    if found and not alone:
        parts = published(family)
        note = f"with {parts.names} and the VAE that the family is published with, at the size above; not measured"
        found.append(("counted", note))
    return found


def _transformers(plan: ExportPlan, choice: Choice, sm: str) -> dict[Loaded, int]:
    """Return the bytes of what may be loaded of the transformers on an SM, the one with most choice first."""
    from dvdquant.deploy.generation.memory_plan import PACKED, engine_choices
    from dvdquant.export.estimate import held_bytes
    from dvdquant.model.held_weights import held_weights

    engines = [e for e in (*plan.engines, *plan.later) if sm in e.sms and e.precision != "plugin"]
    if engines:
        each = {e.act_bits: sum(held_bytes(p, e) for p in plan.plans) for e in engines}
        return engine_choices(each)
    widths = [activation.bits for activation in plan.options.recipe.activations]
    held = [held_weights(p, sm_number(sm), widths, plan.sizes) for p in plan.plans]
    return {PACKED: _held(held, "packed", _with_plugin(choice))}
