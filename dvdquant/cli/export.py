"""``dvdq-export``: a diffusers checkpoint in, packed weights, ONNX graphs and engines out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.cli.common import ExamplesCommand, echo, loading, paragraphs, setup_logging, table
from dvdquant.cli.paths import LORA, MODEL, PATH, WORD
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.advice import Choice, choose
from dvdquant.recipe import ATTENTION, RECIPES, error_name, get_recipe
from dvdquant.text import amount, json_text

if TYPE_CHECKING:
    from dvdquant.export.estimate import Estimate
    from dvdquant.export.options import ExportOptions
    from dvdquant.export.plan import ExportPlan
    from dvdquant.export.result import ExportResult

FOR_GRAPH = {
    "tensorrt": "TensorRT with the plugin; ONNX Runtime by its function bodies",
    "onnx": "standard QDQ, for any runtime",
}

FOR_OTHERS = "ComfyUI/models/diffusion_models"
REALIZE = (
    "auto",
    "int8",
    "int4-weight-only",
    "nvfp4",
)  # those of dvdquant.export.engines.precision, which takes seconds to import
BUILD_PLACES = ("auto", "here", "device")  # those of dvdquant.export.options, which takes seconds to import
MAX_TOKENS, MAX_BATCH = 1 << 16, 1 << 10

EXAMPLES = """
# a trained toy model, engines of both widths for one RTX generation (SM 8.9), in half a minute
dvdq-export examples/tiny-wan -o out/tiny-wan --recipe w4a4 --latent 8x24x24 --text-tokens 5

# what would it take, and what would it give on my card? (of a local folder reads only headers; writes nothing)
dvdq-export Wan-AI/Wan2.1-T2V-1.3B-Diffusers -o out/wan --gpu "RTX 4090" --dry-run
dvdq-export --list-gpus

# a range of sizes: one engine with an optimization profile
dvdq-export ./Wan2.1-T2V-1.3B-Diffusers -o out/wan --height 480:720 --width 832:1280 --num-frames 33:81

# a 4-step LoRA fused into the weights, another into the second transformer; its steps become the defaults
dvdq-export ./Wan2.2-T2V-A14B-Diffusers -o out/wan22-4 --lora high.safetensors --lora transformer_2=low.safetensors:0.8 \
    --steps 4 --guidance 1

# for a Jetson Orin that is elsewhere: graphs, weights, profiles and the lines of trtexec; then dvdq-bundle, and dvdq-build there
dvdq-export ./Wan2.1-T2V-1.3B-Diffusers -o out/orin --target tensorrt --sm 8.7

# the same weights as a file that ComfyUI loads by itself (ConvRot W4A4)
dvdq-export ./Wan2.1-T2V-1.3B-Diffusers -o out/wan --target graphs --also-write comfy

# graphs only
dvdq-export ./HunyuanVideo -o out/hy --target onnx --recipe w4a4-g128

# engines that take LoRAs up to rank 64 at run time: dvdq-run out/wan --lora style.safetensors
dvdq-export ./Wan2.1-T2V-1.3B-Diffusers -o out/wan --lora-rank 64

# files of ComfyUI: the two transformers of Wan 2.2, or the folder that holds them
dvdq-export wan2.2_t2v_high_noise.safetensors --transformer-2 wan2.2_t2v_low_noise.safetensors -o out/wan22
dvdq-export ComfyUI/models/diffusion_models -o out/wan22 --pipeline Wan-AI/Wan2.2-T2V-A14B-Diffusers

# go on after an interruption; check every graph in ONNX Runtime
dvdq-export ./Wan2.2-T2V-A14B-Diffusers -o out/wan22 --resume --verify

# with a page that shows it all: out/tiny-wan/report.html
dvdq-export examples/tiny-wan -o out/tiny-wan --recipe w4a4 --latent 8x24x24 --text-tokens 5 --verify --report
"""


def _list_gpus(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the table of GPUs and end the command."""
    if wanted and not ctx.resilient_parsing:
        from dvdquant.hardware.listing import gpu_rows

        for name, *facts in gpu_rows():
            echo(name)
            sm, memory, target, recipe, four_bits, ran = facts
            if ran == "refused":
                echo(f"    SM {sm}, {memory}: refused, {four_bits}")
            else:
                echo(
                    f"    SM {sm}, {memory}; --target {target}, recipe {recipe}; 4-bit arithmetic: {four_bits}; has run: {ran}"
                )
        echo("\nA card that is not here: --sm with its compute capability.")
        ctx.exit()


@click.command(
    cls=ExamplesCommand,
    examples=EXAMPLES,
)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", "out", required=True, type=PATH, help="Folder for the export.")
@click.option(
    "--gpu",
    "gpus",
    type=WORD,
    multiple=True,
    metavar="NAME|auto",
    help='The card it is for, such as "RTX 4090"; auto is that of this machine. Repeatable.',
)
@click.option(
    "--sm",
    "sms",
    type=WORD,
    multiple=True,
    help="The compute capability instead: 8.9, 89 or sm_89. Repeatable.  [default: 8.9, where no card is named]",
)
@click.option(
    "--list-gpus",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_gpus,
    help="Print the known cards, what runs on each, and which recipe suits it.",
)
@click.option(
    "--recipe",
    type=WORD,
    default="auto",
    show_default=True,
    help=f"What is quantized how: {', '.join(RECIPES)}. auto: what suits the cards.",
)
@click.option(
    "--modulation",
    type=click.Choice(["keep", "a8"]),
    help="The blocks' modulation linears: 16 bit, or 4-bit weights with 8-bit activations.  [default: the recipe's]",
)
@click.option(
    "--attention",
    type=click.Choice(ATTENTION),
    help="Self-attention of long sequences: 16 bit, int8 or fp8. Engines of SM 8.9 and later run both as fp8.  "
    "[default: the recipe's]",
)
@click.option(
    "--fuse/--no-fuse",
    default=False,
    help="TensorRT engines: residual, norm and modulation, or GELU, in one plugin node with the layer behind them. Never ran "
    "on a GPU.  [default: no-fuse]",
)
@click.option(
    "--keep", type=WORD, multiple=True, metavar="GLOB", help="Layers to keep in 16 bit besides the family's own."
)
@click.option(
    "--force", type=WORD, multiple=True, metavar="GLOB", help="Layers to quantize although the family keeps them."
)
@click.option(
    "--target",
    "targets",
    type=WORD,
    multiple=True,
    help="rtx: TensorRT-RTX engines. tensorrt: TensorRT engines with the plugin. onnx: QDQ graphs for any runtime. "
    "graphs: nothing besides the graphs with QuantLinear nodes, which are always written. Repeatable.  "
    "[default: rtx; tensorrt for a Jetson; graphs where the card has no such engines]",
)
@click.option(
    "--also-write",
    type=WORD,
    multiple=True,
    metavar="comfy|comfy-a8",
    help="Write the same weights as ComfyUI loads them, too: ConvRot W4A4, or W4A8 of the same codes. For recipe convrot, "
    "which auto takes then.",
)
@click.option(
    "--precision",
    type=click.Choice(REALIZE),
    default="auto",
    show_default=True,
    help="How rtx engines run the quantized layers.",
)
@click.option(
    "--dtype", type=WORD, default="bf16", show_default=True, help="bf16 or fp16: activations and what is not quantized."
)
@click.option("--height", type=WORD, metavar="SIZE|MIN:MAX", help="Pixels.  [default: the family's]")
@click.option("--width", type=WORD, metavar="SIZE|MIN:MAX", help="Pixels.  [default: the family's]")
@click.option("--num-frames", type=WORD, metavar="SIZE|MIN:MAX", help="Frames.  [default: the family's]")
@click.option(
    "--latent",
    type=WORD,
    metavar="FxHxW",
    help="The sizes in latent units instead (each SIZE, MIN:MAX or MIN:OPT:MAX).",
)
@click.option(
    "--text-tokens",
    type=click.IntRange(1, MAX_TOKENS),
    help="Length of the text embedding.  [default: the prompt table's, or the family's]",
)
@click.option(
    "--batch", type=click.IntRange(1, MAX_BATCH), default=1, show_default=True, help="Batch size of the graphs."
)
@click.option(
    "--lora",
    "loras",
    type=LORA,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to fuse into the weights; repeatable. transformer_2=FILE:SCALE is for the second transformer.",
)
@click.option(
    "--lora-rank",
    type=int,
    default=0,
    metavar="N",
    help="Reserve inputs for LoRAs up to rank N in every graph and engine: dvdq-run --lora then loads one without a new "
    "export. Costs memory and time, with a LoRA or without; --dry-run says how much.",
)
@click.option("--steps", type=int, help="Denoising steps to record as the default, such as 4 of a distilled LoRA.")
@click.option("--guidance", type=float, metavar="SCALE", help="Guidance scale to record as the default; 1 is none.")
@click.option(
    "--transformer-2",
    type=MODEL,
    metavar="FILE|FOLDER",
    help="The second transformer of a model of two (Wan 2.2 A14B: that for low noise), where it is a file of its own.",
)
@click.option(
    "--config", type=PATH, help="The config.json of MODEL, in diffusers format, where its file does not tell it."
)
@click.option(
    "--pipeline",
    type=MODEL,
    metavar="PATH",
    help="Folder or hub id of the diffusers pipeline that dvdq-run takes text encoder, VAE and scheduler from, where MODEL has "
    "none, such as a file of ComfyUI. Nothing of it is exported.",
)
@click.option("--subfolder", type=WORD, help="Folder of the transformer inside MODEL.")
@click.option("--revision", type=WORD, help="Branch, tag or commit of a hub id.")
@click.option(
    "--build",
    type=click.Choice(BUILD_PLACES),
    default="auto",
    show_default=True,
    help="Where engines are built: here, or by dvdq-build on the device they are for, which needs no builder here. "
    "auto leaves TensorRT's to the device unless --plugin is given.",
)
@click.option(
    "--plugin", "plugins", multiple=True, type=PATH, help="TensorRT plugin library, to build its engines here."
)
@click.option("--workspace-gib", type=float, help="Workspace limit of the engine builder.")
@click.option("--timing-cache", type=PATH, help="TensorRT timing cache to read and update.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Builder effort (TensorRT).")
@click.option("--keep-graphs", is_flag=True, help="Keep the graphs made for the engine builders in onnx/.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where inputs are predicted and weights are quantized.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN/Inf weights (as zeros) and record their names.")
@click.option(
    "--allow-low-bits", is_flag=True, help="Take GGUF weights of 4 or 5 bits, with a warning in the manifest."
)
@click.option("--resume", is_flag=True, help="Go on from an interrupted export with the same options.")
@click.option(
    "--replace",
    is_flag=True,
    help="Put the export in the place of a finished one of another model, another recipe or other sizes; "
    "until it is whole, the old one stays.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Compare all that is stored with MODEL; run every graph in ONNX Runtime and judge it against PyTorch in float64, "
    "layer by layer and as a whole. Checks an export that is there already, too.",
)
@click.option("--report", is_flag=True, help="Write report.html: sizes, error of every layer, what executes, samples.")
@click.option(
    "--samples",
    type=int,
    metavar="N",
    help="Prompts the report shows clips of; for models with a prompt table.  [default: 1 for these]",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and what it takes; write nothing.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-v", "--verbose", count=True, help="More log; twice for the libraries' too.")
@click.version_option(__version__, prog_name="dvdq-export")
def main(**arguments: Any) -> None:
    """Quantize the video diffusion transformer MODEL and export it as ONNX graphs and TensorRT engines.

    MODEL is a diffusers folder, a hub id, a folder of the model's authors, or a single file: safetensors as ComfyUI has them
    (16 bit, fp8, fp8 with scales), or GGUF of 6 bits or more. It gets 4-bit weights and 4/8-bit activations, without
    calibration data.

    The output folder gets manifest.json (what is in it, and what really executes on each SM), the packed weights once,
    a graph and an engine per bit-width, and a model card. It holds the whole new export or what it held before, never half.
    """
    dry_run, verbose, log_format = (arguments.pop(n) for n in ("dry_run", "verbose", "log_format"))
    setup_logging(verbose, log_format)
    _check_revision(arguments["model"], arguments["revision"])
    gpus, sms, targets, named = (arguments.pop(name) for name in ("gpus", "sms", "targets", "recipe"))
    choice = choose(gpus, sms, targets, named, arguments["also_write"])
    recipe = get_recipe(choice.recipe).with_globs(arguments.pop("keep"), arguments.pop("force"))
    if (modulation := arguments.pop("modulation")) is not None:
        recipe = replace(recipe, modulation=modulation)
    if (attention := arguments.pop("attention")) is not None:
        recipe = replace(recipe, attention=attention)
    # PyTorch's threads wait for their next turn by spinning, and take the cores of the compiled loops in between. Read once,
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # 1. Everything that can be refused without PyTorch, which takes seconds to import.
    from dvdquant.checkpoint.lora.spec import parse_loras
    from dvdquant.export.options import ExportOptions
    from dvdquant.system.whole_file import check_writable

    started = time.monotonic()
    loras = parse_loras(arguments.pop("loras"))
    options = ExportOptions(recipe=recipe, targets=choice.targets, sms=choice.sms, lora=loras, **arguments)
    _check_early(options)
    if options.timing_cache is not None:
        check_writable(options.timing_cache)
    # 2. The plan, and what it says.
    loading("PyTorch and the exporter", log_format)
    from dvdquant.deploy.report.page import add_report
    from dvdquant.export.pipeline import run_export
    from dvdquant.export.plan import plan_export
    from dvdquant.system.progress import Progress

    plan = plan_export(options)
    _check_pipeline(plan)
    if dry_run:
        from dvdquant.export.fusable import planned_fusions

        fused = planned_fusions(plan)
        as_json = log_format == "json"
        echo(json_text(_plan_json(plan, choice, fused)) if as_json else _plan_text(plan, choice, fused))
        return
    progress = Progress(log_format)
    for note in choice.notes:
        progress.say(note)
    result = run_export(plan, progress, add_report)
    if log_format == "json":
        progress.event("done", **_result_json(result, time.monotonic() - started))
    else:
        echo(_result_text(plan, result, time.monotonic() - started))


def _check_early(options: ExportOptions) -> None:
    """Refuse an output folder or a model that cannot be used, in the order of the plan, which checks them again.

    A model of the hub is left to the plan: nothing is downloaded here.
    """
    from dvdquant.artifact.output_folder import check_output
    from dvdquant.checkpoint.locate import is_remote
    from dvdquant.checkpoint.opening import open_checkpoint, read_config_file
    from dvdquant.checkpoint.reader import Checkpoint
    from dvdquant.export.options import check_text

    check_text(options)
    check_output(options.out)
    config = None if options.config is None else read_config_file(options.config)
    if not (options.subfolder or is_remote(options.model)):
        for name in Checkpoint.components(options.model, revision=options.revision):
            component = name.rpartition("/")[2]
            open_checkpoint(options.model, revision=options.revision, component=component, config=config)


def _check_pipeline(plan: ExportPlan) -> None:
    """Refuse a local --pipeline that the runtime could not use. One of the hub is left to it: nothing is downloaded here."""
    from dvdquant.checkpoint.locate import is_remote
    from dvdquant.deploy.pipelines.parts import open_pipeline_folder

    place = plan.options.pipeline
    if place is not None and not is_remote(place):
        open_pipeline_folder(place, plan.plans[0].family.name)


def _check_revision(model: str, revision: str | None) -> None:
    if revision is not None and os.path.exists(os.path.expanduser(model)):
        raise UnsupportedError(
            f"--revision {revision!r:.100} is for a hub id, and {model} is a local folder",
            fix="leave --revision out, and check the revision out there",
        )


def _plan_json(plan: ExportPlan, choice: Choice, fused: dict[str, int] | None) -> dict[str, Any]:
    from dvdquant.cli.export_answers import answers, device_answers
    from dvdquant.export.source_words import source_facts

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
        "left_out": [name for p, c in zip(plan.plans, plan.checkpoints) for name in p.left_out(c.tensors)],
        "engines": [{"sm": e.sms, "act_bits": e.act_bits, "executes": e.executes} for e in plan.engines],
        "later": [
            {"sm": e.sms, "act_bits": e.act_bits, "executes": e.executes, "backend": e.backend} for e in plan.later
        ],
        "estimate": plan.estimate.to_json(),
    }


def _plan_text(plan: ExportPlan, choice: Choice, fused: dict[str, int] | None) -> str:
    from dvdquant.artifact.provenance import sampling_sentence
    from dvdquant.checkpoint.lora.fuse import lora_lines
    from dvdquant.cli.export_answers import answers, device_answers
    from dvdquant.export.source_words import source_lines
    from dvdquant.ops.attention.libraries import ladders_words
    from dvdquant.quantize.checkpoint import left_out_text

    first, estimate = plan.plans[0], plan.estimate
    devices = device_answers(plan, choice)
    kinds: dict[tuple[int, int, int, int], list[str]] = {}
    for model_plan in plan.plans:
        for spec in model_plan.layers:
            kinds.setdefault((spec.features, spec.out_features, spec.rotation.block, spec.groups), []).append(spec.name)
    rows = [
        (len(names), f"{k} → {n}", block if block > 1 else "none", f"{k // groups}", _shortened(names[0]))
        for (k, n, block, groups), names in kinds.items()
    ]
    weights = sum(p.quantized_weights for p in plan.plans)
    lines = [
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
        *ladders_words(plan.options.recipe.attention),
        *choice.notes,
        "",
        "what you get",
        paragraphs(answers(plan, choice)),
        "",
        *(["does the whole pipeline fit", paragraphs(devices), ""] if devices else []),
        table(("layers", "K → N", "rotation", "weight group", "such as"), rows, right=(0, 2, 3)),
        "",
    ]
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
            table(("file", "size", "for"), [(n, amount(s), FOR_OTHERS) for n, s in layouts.items()]),
            "",
        ]
    if note := _pipeline_note(plan):
        lines += [note, ""]
    if plan.options.sampling is not None:
        lines += [sampling_sentence(plan.options.sampling), ""]
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
    lines += [
        f"disk      {amount(estimate.disk_bytes):>10}   weights {amount(estimate.weight_file_bytes)} "
        f"(from {amount(estimate.source_bytes)}), engines {amount(estimate.engine_bytes)}, "
        f"scratch {amount(estimate.scratch_bytes)}",
        f"memory    {amount(estimate.peak_bytes):>10}   {_memory_text(estimate)}",
        f"time      {sum(estimate.seconds.values()):>8.0f} s   "
        + ", ".join(f"{name} {value:.0f} s" for name, value in estimate.seconds.items()),
        "dry run: nothing was written",
    ]
    return "\n".join(lines)


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


def _result_json(result: ExportResult, seconds: float) -> dict[str, Any]:
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


def _result_text(plan: ExportPlan, result: ExportResult, seconds: float) -> str:
    manifest = result.manifest
    lines = []
    if result.up_to_date:
        lines.append(f"{result.out} is up to date")
    sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
    weights = [n for n in sizes if n.startswith("onnx/") and n.endswith(".safetensors")]
    rows = [(name, amount(sizes[name]), "read by every graph") for name in weights]
    rows += [(g["path"], amount(sizes.get(g["path"], 0)), FOR_GRAPH[g["target"]]) for g in manifest.graphs]
    rows += [(e["path"], amount(sizes.get(e["path"], 0)), f"SM {', '.join(e['sm'])}") for e in manifest.engines]
    rows += [(name, amount(sizes[name]), FOR_OTHERS) for name in sizes if name.startswith("comfy/")]
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


if __name__ == "__main__":
    main()
