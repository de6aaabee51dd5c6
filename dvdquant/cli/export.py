"""``dvdq-export``: a diffusers checkpoint in, packed weights, ONNX graphs and engines out."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.cli.exports.export_text import plan_json, plan_text, result_json, result_text
from dvdquant.cli.shared.common import ExamplesCommand, echo, loading, setup_logging
from dvdquant.cli.shared.paths import LORA, MODEL, PATH, WORD
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.advice import choose
from dvdquant.recipe import ATTENTION, RECIPES, get_recipe
from dvdquant.text import json_text

if TYPE_CHECKING:
    from dvdquant.export.options import ExportOptions

PRECISIONS = (
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

        for row in gpu_rows():
            echo(row.names)
            if row.refused:
                echo(f"    SM {row.sm}, {row.memory}: refused, {row.four_bits}")
            else:
                echo(
                    f"    SM {row.sm}, {row.memory}; --target {row.target}, recipe {row.recipe}; "
                    f"4-bit arithmetic: {row.four_bits}; has run: {row.ran}"
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
    "--activations",
    type=click.Choice(["4", "8"]),
    help="Only the graph and the engine of these activation bits: one engine, not two.  [default: all of the recipe's]",
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
    type=click.Choice(PRECISIONS),
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
@click.option(
    "--version-compatible",
    is_flag=True,
    help="TensorRT engines that the lean runtime of the same release runs, too. They may be slower. Never ran on a GPU.",
)
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
    only = None if (word := arguments.pop("activations")) is None else int(word)
    layouts, precision = arguments["also_write"], arguments["precision"]
    choice = choose(gpus, sms, targets, named, layouts, only=only, precision=precision)
    changes = {name: arguments.pop(name) for name in ("keep", "force", "modulation", "attention")}
    recipe = get_recipe(choice.recipe).with_options(activations=choice.activations, **changes)
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
    check_early(options)
    if options.timing_cache is not None:
        check_writable(options.timing_cache)
    # 2. The plan, and what it says.
    loading("PyTorch and the exporter", log_format)
    from dvdquant.planned_export import plan_checked, run_planned
    from dvdquant.system.progress import Progress

    plan = plan_checked(options)
    if dry_run:
        from dvdquant.export.fusable import planned_fusions

        fused = planned_fusions(plan)
        as_json = log_format == "json"
        echo(json_text(plan_json(plan, choice, fused)) if as_json else plan_text(plan, choice, fused))
        return
    progress = Progress(log_format)
    result = run_planned(plan, choice, progress)
    if log_format == "json":
        progress.event("done", **result_json(result, time.monotonic() - started))
    else:
        echo(result_text(plan, result, time.monotonic() - started))


def check_early(options: ExportOptions) -> None:
    """Refuse an output folder or a model that cannot be used, in the order of the plan, which checks them again.

    A model of the hub is left to the plan: nothing is downloaded here.

    Args:
        options: The options of the export.

    Raises:
        OutputError: The output folder cannot be used.
        CheckpointError: The model or its config cannot be read.
        UnsupportedError: An option is for another kind of model.
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


def _check_revision(model: str, revision: str | None) -> None:
    if revision is not None and os.path.exists(os.path.expanduser(model)):
        raise UnsupportedError(
            f"--revision {revision!r:.100} is for a hub id, and {model} is a local folder",
            fix="leave --revision out, and check the revision out there",
        )


if __name__ == "__main__":
    main()
