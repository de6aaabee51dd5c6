"""``dvdq-run``: generate video with an export, each denoising step on the engine that the controller picks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from dvdquant import __version__
from dvdquant.cli.clips.clip_options import clip_options, loading_options
from dvdquant.cli.clips.prompt_file import check_prompt, read_prompts
from dvdquant.cli.clips.run_options import RunOptions, check_options, no_prompts, parse_cache, parse_memory
from dvdquant.cli.shared.common import ExamplesCommand, echo, loading, runs_on, setup_logging
from dvdquant.cli.shared.paths import EXPORT, LORA, PATH, TEXT_FILE, WORD
from dvdquant.deploy.switching.defaults import CACHE_POLICIES, LAST_HIGH, WEIGHTINGS
from dvdquant.system.devices import check_device_word
from dvdquant.system.whole_file import check_writable

if TYPE_CHECKING:
    from dvdquant.cli.clips.run_memory import ArrangedRun
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import Generator
    from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult
    from dvdquant.system.progress import Progress

EXAMPLES = """
# a clip, its frames as one picture, and why every step ran on which engine
dvdq-run out/tiny-wan --prompt "ring red right large black" -o clip.mp4 --strip clip.png --trace clip.json

# 16 bit, a8, switching and a4 from one seed, side by side, with PSNR
dvdq-run out/tiny-wan --prompt "square blue down small grey" -o compare.mp4 --strip compare.png --compare

# the steps that dvdq-plan found, or more 4-bit steps by a larger delta
dvdq-run out/wan --prompt "a cat in the snow" -o cat.mp4 --schedule out/wan/schedule.json
dvdq-run out/wan --prompt "a cat in the snow" -o cat.mp4 --delta 0.2 --steps 30 --seed 7

# image to video: the first frame is given, and the last one of models that take two
dvdq-run out/wan-i2v --prompt "the cat turns its head" --image cat.jpg -o cat.mp4
dvdq-run out/wan-flf2v --prompt "the flower opens" --image bud.png --last-image bloom.png -o flower.mp4

# a GPU with little memory: the text encoder on its own first, then the rest without it; what a run would take
dvdq-run out/wan --prompt "a cat in the snow" --save-text-embeds cat.safetensors --device cpu
dvdq-run out/wan --text-embeds cat.safetensors --offload --vae-tiling -o cat.mp4
dvdq-run out/wan --prompt "a cat in the snow" --memory 16GiB --dry-run

# an export on the hub
dvdq-run user/wan2.1-1.3b-w4a4 --prompt "a cat in the snow" -o cat.mp4

# many prompts, one a line; text encoder, VAE and scheduler from another folder
dvdq-run out/wan --prompts prompts.txt -o clips/cat.mp4 --pipeline ./Wan2.1-T2V-1.3B-Diffusers
"""

GROUPS = {
    "What to draw": (
        "prompt",
        "prompts",
        "negative_prompt",
        "image",
        "last_image",
        "height",
        "width",
        "num_frames",
        "seed",
        "steps",
        "guidance",
        "text_embeds",
    ),
    "Which engine each step runs on": (
        "mode",
        "delta",
        "weighting",
        "last_high",
        "schedule",
        "average_bits",
        "cache",
        "cache_policy",
        "compare",
    ),
    "What to write": ("output", "gif", "strip", "trace", "fps", "save_text_embeds", "dry_run"),
    "Where it runs": (
        "revision",
        "pipeline",
        "lora",
        "backend",
        "device",
        "weights",
        "plugins",
        "memory",
        "offload",
        "alternate",
        "text_encoder_bits",
        "vae_tiling",
        "compile",
        "fuse",
        "cuda_graphs",
        "attention",
        "attention_backend",
        "cfg_parallel",
    ),
}


class GroupedCommand(ExamplesCommand):
    """Options under the headings of :data:`GROUPS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options as :meth:`click.Command.format_options` does, in sections."""
        records = {p.name: p.get_help_record(ctx) for p in self.get_params(ctx) if isinstance(p, click.Option)}
        grouped = {name for names in GROUPS.values() for name in names}
        sections = {**GROUPS, "Other": tuple(name for name in records if name not in grouped)}
        for title, names in sections.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records[name]) is not None])


@click.command(
    cls=GroupedCommand,
    examples=EXAMPLES,
)
@click.argument("out", type=EXPORT)
@click.option("--prompt", multiple=True, metavar="TEXT", help="What to draw; repeat it for several clips.")
@click.option("--prompts", type=TEXT_FILE, metavar="FILE", help="Prompts, one a line; - is standard input.")
@clip_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first noise, the same for every prompt.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the schedule's, or the model's]")
@click.option(
    "--mode",
    type=click.Choice(["switch", "a4", "a8", "16"]),
    help="switch: 4 or 8 activation bits, chosen at each step (delta-GBS). a4, a8: always that. 16: the original checkpoint "
    "in PyTorch.  [default: switch]",
)
@click.option(
    "--delta",
    type=float,
    help="A step runs on a4 while the output has changed by less since the last a8 step; 0 is always a8.  "
    "[default: 0.12]",
)
@click.option(
    "--weighting",
    type=click.Choice(WEIGHTINGS),
    help="step: a change counts by how far its step moves, which favours the long steps at the end. none: the published "
    "rule.  [default: step]",
)
@click.option(
    "--last-high",
    type=int,
    metavar="N",
    help="Run the last N steps on a8, whatever delta says; 0 is the published rule.  [default: 2]",
)
@click.option("--schedule", type=PATH, metavar="PATH", help="Follow a schedule of dvdq-plan.")
@click.option(
    "--average-bits", type=float, metavar="BITS", help="Switch with the delta that had this average in --schedule."
)
@click.option(
    "--cache",
    type=WORD,
    metavar="THRESHOLD|off",
    help="Skip a step when the error that is predicted since the last computed one is less than this.  "
    "[default: off; with --cache-policy, the policy's own]",
)
@click.option(
    "--cache-policy",
    type=click.Choice(CACHE_POLICIES),
    help="What predicts that error. forecast: how fast the output changed. line: the same, "
    "and a skipped step goes on along the line through the last two outputs. easycache: how far the latent moves. magcache: "
    "how the size of output - latent grows.  [default: forecast]",
)
@click.option("--compare", is_flag=True, help="16 bit, a8, switch and a4 from one seed, side by side, with PSNR.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="The clip, .mp4 or .gif; numbered if several.  [required, but with --save-text-embeds or --dry-run]",
)
@click.option(
    "--save-text-embeds",
    type=PATH,
    metavar="FILE",
    help="Draw nothing: load the text encoder alone, and write what it makes of the prompts (.safetensors).",
)
@click.option("--dry-run", is_flag=True, help="Draw nothing: check the request, and say what a run takes.")
@click.option("--gif", type=PATH, metavar="PATH", help="The clip as a GIF too.")
@click.option("--strip", type=PATH, metavar="PATH", help="Frames as one PNG, a row for each clip.")
@click.option("--trace", type=PATH, metavar="PATH", help="Every step with bits, reason and seconds.")
@click.option("--fps", type=float, help="Frames per second of the files.  [default: the model's]")
@click.option(
    "--lora",
    type=LORA,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to run beside the weights, in 16 bit: of an export with --lora-rank, or on the pytorch backend. Of a LoRA that "
    "the export has: where it is now, for --mode 16 and --compare.",
)
@runs_on
@loading_options
@click.option(
    "--memory",
    type=WORD,
    metavar="SIZE|auto",
    help="Arrange the run so that it takes no more than this, such as 16GiB, or what is free; refused if it cannot.",
)
@click.option(
    "--alternate",
    is_flag=True,
    help="Load the text encoder first and free it before the transformer is loaded; all prompts are encoded then.",
)
@click.option(
    "--cfg-parallel",
    type=WORD,
    metavar="DEVICE",
    help="Run the second branch of guidance on this device at the same time, such as cuda:1, or process:cuda:1 for a "
    "process of its own.  [default: one after the other]",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-v", "--verbose", count=True, help="More log; twice for the libraries' too.")
@click.version_option(__version__, prog_name="dvdq-run")
def main(out: Path, revision: str | None, log_format: str, verbose: int, **options: Any) -> None:
    """Generate video with the export OUT, a folder or user/name on the hub, and write clips to -o."""
    setup_logging(verbose, log_format)
    # 1. What the options alone tell.
    settings = RunOptions(**options)
    prompts = [] if no_prompts(settings) else read_prompts(settings.prompt, settings.prompts)
    if settings.negative_prompt is not None:
        check_prompt("--negative-prompt", settings.negative_prompt, may_be_empty=True)
    check_options(settings)

    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.checkpoint.lora.spec import parse_loras
    from dvdquant.cli.clips.run_outputs import Writer
    from dvdquant.hub.locate import locate_export

    draws = not (settings.dry_run or settings.save_text_embeds)
    writer = Writer.open(settings, max(1, len(prompts))) if draws and prompts else None
    if settings.save_text_embeds is not None:
        check_writable(settings.save_text_embeds)
    loras = parse_loras(settings.lora)
    memory = parse_memory(settings.memory)
    check_device_word(settings.device)
    # 2. The export, before PyTorch, which takes seconds to load.
    out = locate_export(out, revision)
    manifest = load_manifest(out)
    loading("PyTorch and the runtime", log_format)
    from dvdquant.cli.clips.run_memory import arrange_run
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import open_generator
    from dvdquant.system.progress import Progress

    # 3. The engines. Every request is checked, and every engine loaded, before the first clip is drawn.
    artifact = Artifact.of(out, manifest)
    progress = Progress("json" if log_format == "json" else "text")
    with ExitStack() as stack:
        generator = stack.enter_context(
            open_generator(
                artifact,
                pipeline=settings.pipeline,
                backend=settings.backend,
                device=settings.device,
                lora=loras,
                compile=settings.compile,
                fuse=settings.fuse,
                cuda_graphs=settings.cuda_graphs,
                attention=settings.attention,
                attention_backend=settings.attention_backend,
                plugins=settings.plugins,
                offload=settings.offload,
                vae_tiling=settings.vae_tiling,
                text_embeds=settings.text_embeds,
                cfg_parallel=settings.cfg_parallel,
                alternate=settings.alternate,
                text_encoder_bits=int(settings.text_encoder_bits or 16),
                weights=settings.weights,
            )
        )
        prompts = prompts or generator.prompts()
        if draws and writer is None:
            writer = Writer.open(settings, len(prompts))
        plan = [[generator.check(r) for r in requests_for(settings, artifact, p)] for p in prompts]
        if settings.save_text_embeds is not None:
            generator.save_text_embeds(settings.save_text_embeds, [requests[0] for requests in plan])
            progress.say(f"text embeddings of {len(plan)} prompts  {settings.save_text_embeds}")
            return
        arrangement = arrange_run(settings, generator, plan, memory)
        generator, plan = stack.enter_context(arrangement.generator), arrangement.requests
        for note in generator.notes(plan[0][0]):
            progress.say(note)
        if settings.dry_run:
            say_needs(generator, plan, arrangement, progress)
            return
        if memory is not None:
            progress.event("memory", **arrangement.plan.to_json())
            progress.say(arrangement.text())
        # 4. The clips.
        assert writer is not None
        generator.encode_ahead([requests[0] for requests in plan])
        for request in plan[0]:
            if words := undecided(request, len(artifact.components)):
                progress.say(words)
            generator.prepare(request)
        for requests in plan:
            results = [generate_one(generator, request, progress) for request in requests]
            writer.clip(results, generator.fps(len(results[0].frames)), progress)
    writer.finish(artifact, progress)


def say_needs(
    generator: Generator, plan: list[list[GenerateRequest]], arrangement: ArrangedRun, progress: Progress
) -> None:
    """Say what a run would take, for ``--dry-run``.

    Args:
        generator: The generator as the run would use it.
        plan: The checked requests of every prompt.
        arrangement: How its parts share the device.
        progress: Where it is said.
    """
    from dvdquant.cli.clips.run_text import asked_text, needs_text
    from dvdquant.cli.exports.held_text import held_json, held_text
    from dvdquant.deploy.generation.needs import parts_of_run

    how = generator.options
    parts = parts_of_run(
        generator.checker,
        plan[0],
        arrangement.backend,
        offload=how.offload,
        alternate=how.alternate,
        text_bits=how.text_bits,
        loras=generator.loras,
        sm=arrangement.sm,
        weights=how.weights,
    )
    quantized = any(request.mode != "16" for request in plan[0])
    asked = asked_text(generator, arrangement.backend) if quantized else []
    held = {"weights": held_json(generator.artifact)} if quantized else {}
    progress.event("needs", parts=[part.to_json() for part in parts], memory=arrangement.plan.to_json(), **held)
    echo(needs_text(parts, plan[0], len(plan), generator.checker.pipeline_of(plan[0][0]), arrangement.text()))
    if asked:
        echo("\n" + "\n".join(asked))
    if quantized:
        echo("\n" + held_text(generator.artifact))


def undecided(request: GenerateRequest, transformers: int) -> str | None:
    """Return what is said of a clip whose steps leave delta-GBS nothing to decide; None where it has something.

    Args:
        request: The request, with its steps filled in.
        transformers: The number of transformers that share the steps.
    """
    from dvdquant.deploy.switching.gbs import free_steps

    steps, last = request.steps or 0, request.last_high
    if request.mode != "switch" or free_steps(steps, last, transformers):
        return None
    first = "the first two" if transformers == 1 else f"the first two of each of {transformers} transformers"
    words = f"{steps} steps: {first} and the last {last} run on the high engine, so delta decides nothing"
    if last and (least := free_steps(steps, 0, transformers)):
        words += f"; --last-high 0 leaves it {least}"
    return words


def generate_one(generator: Generator, request: GenerateRequest, progress: Progress) -> GenerateResult:
    """Draw one clip, with a bar that shows the bits of every step.

    Args:
        generator: What draws it.
        request: What to draw.
        progress: Where the bar is drawn.
    """
    title = "16 bit" if request.mode == "16" else request.mode
    with step_bar(progress, title, request.steps or 0) as on_step:
        return generator.generate(request, on_step)


@contextmanager
def step_bar(progress: Progress, title: str, steps: int) -> Iterator[Callable[[Any], None]]:
    """Return a callback for every record of the trace: the bar moves with the first call of each step.

    Args:
        progress: Where the bar is drawn.
        title: What stands before it.
        steps: The number of steps of the clip.
    """
    from dvdquant.deploy.generation.run_report import bits_name, block

    blocks: list[str] = []
    last = -1
    with progress.stage(title, steps, "steps") as stage:

        def on_step(record: Any) -> None:
            nonlocal last
            progress.event("step", **record.to_json())
            if record.step == last:
                return
            last = record.step
            blocks.append(block(record.bits))
            stage.update(1, f"{bits_name(record.bits):<4} {''.join(blocks[-40:])}")

        yield on_step


def requests_for(settings: RunOptions, artifact: Artifact, prompt: str) -> list[GenerateRequest]:
    """Return the clips of one prompt: one, or one for every mode to compare.

    Args:
        settings: The options of the command.
        artifact: The export.
        prompt: One prompt.
    """
    from dvdquant.deploy.generation.request import GenerateRequest
    from dvdquant.deploy.switching.schedule import Schedule

    schedule = None
    if settings.schedule is not None:
        schedule = Schedule.load(settings.schedule, artifact.manifest, settings.steps)
    names = ("negative_prompt", "image", "last_image", "height", "width", "num_frames", "seed", "guidance", "delta")
    request = GenerateRequest(
        prompt,
        steps=schedule.steps if settings.steps is None and schedule is not None else settings.steps,
        cache=parse_cache(settings.cache),
        cache_policy=settings.cache_policy,
        weighting=cast(Any, settings.weighting or WEIGHTINGS[0]),
        last_high=LAST_HIGH if settings.last_high is None else settings.last_high,
        **{name: getattr(settings, name) for name in names},
    )
    bits = [f"a{b}" for b in artifact.bits(artifact.components[0])]
    switching = [_switching(request, settings, schedule)] if len(bits) > 1 else []
    if settings.compare:
        plain: dict[str, Any] = {"cache": None, "cache_policy": None, "delta": None}
        fixed = {mode: dataclasses.replace(request, mode=mode, **plain) for mode in ("16", *bits)}
        return [fixed["16"], *(fixed[mode] for mode in reversed(bits[1:])), *switching, fixed[bits[0]]]
    if settings.mode in (None, "switch") and switching:
        return switching
    mode = settings.mode or bits[0]
    return [dataclasses.replace(request, mode=mode)]


def _switching(request: GenerateRequest, settings: RunOptions, schedule: Any) -> GenerateRequest:
    """Return the request that switches: by a schedule's bits, by the δ of a wanted average in it, or by δ."""
    if schedule is None:
        return dataclasses.replace(request, mode="switch")
    if settings.average_bits is not None:
        from dvdquant.deploy.generation.request import delta_for_average

        delta = delta_for_average(schedule, settings.average_bits)
        last = schedule.details.get("last_high", 0) if settings.last_high is None else settings.last_high
        weighting: Any = settings.weighting or schedule.details.get("weighting", "none")
        return dataclasses.replace(request, mode="switch", delta=delta, last_high=last, weighting=weighting)
    return dataclasses.replace(request, mode="planned", schedule=schedule)


if __name__ == "__main__":
    main()
