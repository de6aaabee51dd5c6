"""What ``dvdq-export`` says: the plan before anything is written, and the result after it, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvdquant.cli.shared.common import paragraphs, table
from dvdquant.hardware.advice import Choice
from dvdquant.text import amount

if TYPE_CHECKING:
    from dvdquant.export.estimate import Estimate
    from dvdquant.export.plan import ExportPlan
    from dvdquant.export.result import ExportResult

__all__ = ["plan_json", "plan_text", "result_json", "result_text"]

_FOR_GRAPH = {
    "tensorrt": "TensorRT with the plugin; ONNX Runtime by its function bodies",
    "onnx": "standard QDQ, for any runtime",
}
_FOR_OTHERS = "ComfyUI/models/diffusion_models"


def plan_json(plan: ExportPlan, choice: Choice, fused: dict[str, int] | None) -> dict[str, Any]:
    """Return what a dry run says, as JSON values.

    Args:
        plan: The plan of the export.
        choice: What was chosen for the GPUs, and the notes on it.
        fused: The number of fused layers of each transformer, or None where none is asked for.
    """
    from dvdquant.cli.exports.export_answers import answers, device_answers
    from dvdquant.cli.exports.held_text import kept_json
    from dvdquant.export.elsewhere import planned_lines
    from dvdquant.export.source_text import source_facts

    return {
        "gpus": list(choice.gpus),
        "notes": list(choice.notes),
        "answers": dict(answers(plan, choice)),
        "devices": dict(device_answers(plan, choice)),
        "family": plan.plans[0].family.name,
        "components": list(plan.components),
        "sources": [source_facts(c, p.family) for c, p in zip(plan.checkpoints, plan.plans)],
        "recipe": plan.options.recipe.to_json(),
        "sizes": plan.sizes.to_json(),
        "layers": [
            {"name": s.name, "out": s.out_features, "in": s.features, "block": s.rotation.block, "groups": s.groups}
            for p in plan.plans
            for s in p.layers
        ],
        "lora": [
            {"component": name, "path": str(one.spec.path), "sha256": one.sha256, "scale": one.spec.scale}
            | {"format": one.format, "layers": one.layers, "rank": list(one.rank), "notes": list(one.notes)}
            for name, checkpoint in zip(plan.components, plan.checkpoints)
            if checkpoint.lora is not None
            for one in checkpoint.lora.fused
        ],
        "lora_rank": _reserved(plan),
        "fused_layers": fused,
        "also_written": _layouts(plan),
        "sampling": plan.options.sampling,
        "held_bytes": _held(plan),
        "kept": [name for p in plan.plans for name in p.kept_linears],
        "largest_kept": {name: kept_json(p) for name, p in zip(plan.components, plan.plans)},
        "left_out": [name for p, c in zip(plan.plans, plan.checkpoints) for name in p.left_out(c.tensors)],
        "engines": [{"sm": e.sms, "act_bits": e.act_bits, "executes": e.executes} for e in plan.engines],
        "later": [
            {"sm": e.sms, "act_bits": e.act_bits, "executes": e.executes, "backend": e.backend} for e in plan.later
        ],
        "trtexec": planned_lines(plan, fused),
        "estimate": plan.estimate.to_json(),
    }


def plan_text(plan: ExportPlan, choice: Choice, fused: dict[str, int] | None) -> str:
    """Return what a dry run says, as text.

    Args:
        plan: The plan of the export.
        choice: What was chosen for the GPUs, and the notes on it.
        fused: The number of fused layers of each transformer, or None where none is asked for.
    """
    lines = [*_made(plan, choice), *_besides(plan), *_executed(plan, fused), *_costs(plan.estimate)]
    return "\n".join([*lines, "dry run: nothing was written"])


def _made(plan: ExportPlan, choice: Choice) -> list[str]:
    """Return the model, what is made of it, and whether that fits the devices."""
    from dvdquant.cli.exports.export_answers import answers, device_answers
    from dvdquant.export.source_text import source_lines
    from dvdquant.ops.attention.libraries import ladders_text

    first = plan.plans[0]
    devices = device_answers(plan, choice)
    weights = sum(p.quantized_weights for p in plan.plans)
    return [
        f"{plan.options.model}: {first.family.config['_class_name']}, {', '.join(plan.components)}",
        *(
            line
            for name, checkpoint, model_plan in zip(plan.components, plan.checkpoints, plan.plans)
            for line in source_lines(name, checkpoint, model_plan.family)
        ),
        f"recipe {plan.options.recipe.name}: {weights / 1e6:.1f} M weights to 4 bits in "
        f"{sum(len(p.layers) for p in plan.plans)} layers, {sum(len(p.kept_linears) for p in plan.plans)} linear layers kept "
        f"in {plan.options.dtype}",
        f"sizes (latent): {plan.sizes.frames} × {plan.sizes.height} × {plan.sizes.width}, "
        f"{first.family.tokens(*plan.sizes.at('opt'))} video tokens, {plan.sizes.text_tokens} text tokens",
        *ladders_text(plan.options.recipe.attention),
        *choice.notes,
        "",
        "what you get",
        paragraphs(answers(plan, choice)),
        "",
        *(["does the whole pipeline fit", paragraphs(devices), ""] if devices else []),
        _kinds_of_layers(plan),
        "",
    ]


def _besides(plan: ExportPlan) -> list[str]:
    """Return what is left out, fused in, reserved or written besides, and the defaults of the runtime."""
    from dvdquant.artifact.provenance import sampling_sentence
    from dvdquant.checkpoint.lora.fuse import lora_lines
    from dvdquant.quantize.checkpoint import left_out_text

    lines = []
    for model_plan, checkpoint in zip(plan.plans, plan.checkpoints):
        if unused := model_plan.left_out(checkpoint.tensors):
            lines += [left_out_text(checkpoint, unused), ""]
    if loras := lora_lines(plan.components, plan.checkpoints):
        lines += [*loras, ""]
    if reserved := _reserved(plan):
        lines += [_reserved_text(reserved, plan), ""]
    if layouts := _layouts(plan):
        lines += [
            "also written",
            table(("file", "size", "for"), [(n, amount(s), _FOR_OTHERS) for n, s in layouts.items()]),
            "",
        ]
    if note := _pipeline_note(plan):
        lines += [note, ""]
    if plan.options.sampling is not None:
        lines += [sampling_sentence(plan.options.sampling), ""]
    return lines


def _executed(plan: ExportPlan, fused: dict[str, int] | None) -> list[str]:
    """Return what executes where, what builds it by hand, and what an engine and its largest inputs take on the device."""
    from dvdquant.cli.exports.held_text import kept_text
    from dvdquant.export.elsewhere import planned_lines

    lines = []
    if plan.engines:
        lines += [
            "what will execute",
            paragraphs([(_target(e.backend, e.sms, e.act_bits), e.executes) for e in plan.engines]),
            "",
        ]
    if plan.later:
        lines += [
            "left to dvdq-build on the device",
            paragraphs([(_target(e.backend, e.sms, e.act_bits), e.executes) for e in plan.later]),
            "",
        ]
    if by_hand := planned_lines(plan, fused):
        lines += [*(f"by hand: {line}" for line in by_hand.values()), ""]
    if fused is not None:
        counts = ", ".join(
            f"{name} {fused[name]} of {len(p.layers)} layers" for name, p in zip(plan.components, plan.plans)
        )
        lines += [f"fused in TensorRT engines with what comes before them, one plugin node each (--fuse): {counts}", ""]
    if held := _held(plan):
        lines.append(
            "on the device, an engine of one transformer with its weights: "
            + ", ".join(f"{name} {amount(size)}" for name, size in held.items())
        )
    if any(engine.backend == "tensorrt" for engine in (*plan.engines, *plan.later)):
        for component, model_plan in zip(plan.components, plan.plans):
            lines += ["", kept_text(model_plan, component)]
        lines.append("")
    return lines


def _kinds_of_layers(plan: ExportPlan) -> str:
    """Return the table of the quantized layers, a row for each shape, rotation and group size."""
    kinds: dict[tuple[int, int, int, int], list[str]] = {}
    for model_plan in plan.plans:
        for spec in model_plan.layers:
            kinds.setdefault((spec.features, spec.out_features, spec.rotation.block, spec.groups), []).append(spec.name)
    rows = [
        (len(names), f"{k} → {n}", block if block > 1 else "none", f"{k // groups}", _shortened(names[0]))
        for (k, n, block, groups), names in kinds.items()
    ]
    return table(("layers", "K → N", "rotation", "weight group", "such as"), rows, right=(0, 2, 3))


def _costs(estimate: Estimate) -> list[str]:
    """Return what an export takes of disk, memory and time, a line each."""
    return [
        f"disk      {amount(estimate.disk_bytes):>10}   weights {amount(estimate.weight_file_bytes)} "
        f"(from {amount(estimate.source_bytes)}), engines {amount(estimate.engine_bytes)}, "
        f"scratch {amount(estimate.scratch_bytes)}",
        f"memory    {amount(estimate.peak_bytes):>10}   {_memory_text(estimate)}",
        f"time      {sum(estimate.seconds.values()):>8.0f} s   "
        + ", ".join(f"{name} {value:.0f} s" for name, value in estimate.seconds.items()),
    ]


def _layouts(plan: ExportPlan) -> dict[str, int]:
    """Return the bytes of what ``--also-write`` writes, by path."""
    from dvdquant.export.layouts.comfy import comfy_bytes, comfy_path

    return {
        comfy_path(component, layout): comfy_bytes(one, layout)
        for component, one in zip(plan.components, plan.plans)
        for layout in plan.options.also_write
    }


def _reserved(plan: ExportPlan) -> dict[str, Any] | None:
    """Return what ``--lora-rank`` reserves and what it costs in one step; None without it."""
    from dvdquant.model.lora_inputs import reserved_bytes, step_flops

    rank = plan.options.lora_rank
    if not rank:
        return None
    plans = dict(zip(plan.components, plan.plans))
    flops = {name: step_flops(p, plan.sizes, rank) for name, p in plans.items()}
    return {
        "rank": rank,
        "bytes": {name: reserved_bytes(p, rank) for name, p in plans.items()},
        "flops_per_step": {name: branches for name, (branches, _) in flops.items()},
        "quantized_flops_per_step": {name: layers for name, (_, layers) in flops.items()},
    }


def _reserved_text(reserved: dict[str, Any], plan: ExportPlan) -> str:
    first = plan.components[0]
    nbytes, flops = reserved["bytes"][first], reserved["flops_per_step"][first]
    share = flops / max(1.0, reserved["quantized_flops_per_step"][first])
    each = " in each transformer" if len(plan.components) > 1 else ""
    return (
        f"reserved for LoRAs, rank {reserved['rank']}{each}: {amount(nbytes)} of device memory and {flops / 1e12:.3g} TFLOP in "
        f"{plan.options.dtype} a step, {100 * share:.2g} % of what the quantized layers multiply; both with and without a LoRA"
    )


def _pipeline_note(plan: ExportPlan) -> str | None:
    """Return where clips get text encoder and VAE from, if that is not MODEL itself."""
    from dvdquant.model.families.pipelines import known_pipeline

    if plan.options.pipeline is not None:
        return f"text encoder, VAE and scheduler: {plan.options.pipeline}"
    if plan.checkpoints[0].source.is_diffusers:
        return None
    known = known_pipeline(plan.plans[0].family.name, plan.plans[0].family.config, len(plan.plans))
    return f"text encoder, VAE and scheduler are not in MODEL: give --pipeline {known or 'FOLDER'} here or to dvdq-run"


def _held(plan: ExportPlan) -> dict[str, int]:
    """Return the device memory that the weights of the largest transformer take, by engine in words."""
    from dvdquant.export.estimate import held_bytes

    return {
        _target(e.backend, e.sms, e.act_bits): max(held_bytes(p, e) for p in plan.plans)
        for e in (*plan.engines, *plan.later)
    }


def _memory_text(estimate: Estimate) -> str:
    """Return what the peak is the larger of."""
    words = f"exporter {amount(estimate.resident_bytes)}"
    if estimate.held_bytes:
        words += (
            f", and {amount(estimate.held_bytes)} of the checkpoint are kept for the next stage because there is room"
        )
    if not estimate.builder_bytes:
        return words
    waiting, builder = amount(estimate.waiting_bytes), amount(estimate.builder_bytes)
    return f"{words}, later {waiting} of it beside the engine builder's {builder}"


def _target(backend: str, sms: Sequence[str], bits: int) -> str:
    return f"a{bits} on SM {', '.join(sms)} ({backend})"


def _shortened(name: str) -> str:
    return name if len(name) <= 48 else name[:45] + "..."


def result_json(result: ExportResult, seconds: float) -> dict[str, Any]:
    """Return what an export has written, as JSON values.

    Args:
        result: What the export wrote.
        seconds: How long the command took.
    """
    return {
        "output": str(result.out),
        "up_to_date": result.up_to_date,
        "seconds": {**{k: round(v, 2) for k, v in result.seconds.items()}, "total": round(seconds, 2)},
        "engines": [dict(e) for e in result.manifest.engines],
        "builds": [
            {k: b[k] for k in ("path", "seconds", "bytes", "peak_rss_bytes", "products")} for b in result.builds
        ],
        "checks": [check.to_json() for check in result.checks],
        "stored": [check.to_json() for check in result.stored],
        "report": "report.html" if "report.html" in result.manifest.files else None,
    }


def result_text(plan: ExportPlan, result: ExportResult, seconds: float) -> str:
    """Return what an export has written, and what to do next.

    Args:
        plan: The plan of the export.
        result: What the export wrote.
        seconds: How long the command took.
    """
    from dvdquant.recipe import error_name

    manifest = result.manifest
    lines = []
    if result.up_to_date:
        lines.append(f"{result.out} is up to date")
    sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
    weights = [n for n in sizes if n.startswith("onnx/") and n.endswith(".safetensors")]
    rows = [(name, amount(sizes[name]), "read by every graph") for name in weights]
    rows += [(g["path"], amount(sizes.get(g["path"], 0)), _FOR_GRAPH[g["target"]]) for g in manifest.graphs]
    rows += [(e["path"], amount(sizes.get(e["path"], 0)), f"SM {', '.join(e['sm'])}") for e in manifest.engines]
    rows += [(name, amount(sizes[name]), _FOR_OTHERS) for name in sizes if name.startswith("comfy/")]
    lines += ["", table(("file", "size", "for"), rows, right=(1,)), ""]
    if manifest.engines:
        words = [(_target(e["backend"], e["sm"], e["act_bits"]), e["executes"]) for e in manifest.engines]
        lines += ["what executes", paragraphs(words), ""]
    if manifest.builds:
        rows = [(b["engine"], ", ".join(b["sm"]), b["graph"]) for b in manifest.builds]
        lines += ["left to dvdq-build on the device", table(("engine", "SM", "from"), rows), ""]
    lines += [_error_line(manifest.layers, error_name(manifest.recipe))]
    for stored in result.stored:
        lines += stored.lines()
    for check in result.checks:
        lines += check.lines()
    if plan.options.report:
        lines.append(f"report: {result.out}/report.html")
    if result.up_to_date:
        lines.append(f"nothing to do ({seconds:.1f} s)")
    else:
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
        lines.append(f"{result.out}/manifest.json written in {seconds:.1f} s ({stages})")
    return "\n".join(lines)


def _error_line(layers: Any, name: str) -> str:
    known = [(e["relative_mse"], e["relative_mse_minmax"]) for e in layers if e["relative_mse"] is not None]
    if not known:
        return f"{name}: none measured"
    ours, theirs = (sum(column) / len(known) for column in zip(*known))
    return f"{name} (mean relative MSE over {len(known)} layers): {ours:.5f}, min-max {theirs:.5f}"
