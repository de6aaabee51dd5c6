"""``dvdq-plan``: find the δ of δ-GBS for a wanted average of bits or time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.clashes import refuse_clashes
from dvdquant.cli.clips.clip_options import clip_options, loading_clashes, loading_options
from dvdquant.cli.clips.prompt_file import check_prompt, read_prompts
from dvdquant.cli.shared.common import ExamplesCommand, echo, loading, refuse_besides, runs_on, setup_logging, table
from dvdquant.cli.shared.paths import EXPORT, LORA, PATH, TEXT_FILE, WORD
from dvdquant.deploy.switching.defaults import LAST_HIGH, WEIGHTINGS
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.system.devices import check_device_word
from dvdquant.system.whole_file import check_writable

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.deploy.planning.planner import Plan

FEW_STEPS = 8
"""Up to as many, what is left to δ is said: a distilled model has four."""

GOALS = {"average_bits": "--average-bits", "time_budget": "--time-budget", "delta": "--delta"}
"""The options of which one says what is wanted."""
EXAMPLES = """
# delta for 6 activation bits on average, into out/tiny-wan/schedule.json
dvdq-plan out/tiny-wan --prompt "circle red right small black" --prompt "ring blue up large grey"

# delta for a time budget: the transformer's share of one clip, in seconds
dvdq-plan out/wan --prompts prompts.txt --time-budget 60 --steps 30 --seeds 0,1

# what delta 0.12 comes to, with a picture that compares a few delta with the 16-bit model
dvdq-plan out/wan --prompts prompts.txt --delta 0.12 --reference --plot plan.png -o wan-0.12.json

# without the text encoder, with the VAE on the GPU only while it decodes
dvdq-plan out/wan --text-embeds embeds.safetensors --offload --vae-tiling

# an export of the hub: the schedule goes into the current folder, as wan-w4a4-schedule.json
dvdq-plan user/wan-w4a4 --revision v1 --prompts prompts.txt

# does a schedule fit this export and 50 steps?
dvdq-plan out/wan --check wan-0.12.json --steps 50
"""


@click.command(
    cls=ExamplesCommand,
    examples=EXAMPLES,
)
@click.argument("out", type=EXPORT)
@click.option("--prompt", multiple=True, metavar="TEXT", help="A clip to record; repeat it. Two to eight are plenty.")
@click.option("--prompts", type=TEXT_FILE, metavar="FILE", help="Prompts, one a line; - is standard input.")
@clip_options
@click.option("--average-bits", type=float, metavar="BITS", help="Wanted average of activation bits.  [default: 6]")
@click.option(
    "--time-budget", type=float, metavar="SECONDS", help="Wanted time of the transformer in one clip, on this machine."
)
@click.option("--delta", type=float, help="Evaluate this delta instead of searching one.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option(
    "--seeds", type=WORD, default="0", show_default=True, metavar="N,N,...", help="Each prompt is recorded with each."
)
@click.option(
    "--weighting", type=click.Choice(WEIGHTINGS), default=WEIGHTINGS[0], show_default=True,
    help="step: a change counts by how far its step moves. none: the published rule.",
)  # fmt: skip
@click.option(
    "--last-high", type=int, default=LAST_HIGH, show_default=True, metavar="N",
    help="Keep the last N steps on the high engine, whatever delta says; 0 is the published rule.",
)  # fmt: skip
@click.option(
    "--reference",
    is_flag=True,
    help="Also compare a few delta with the original 16-bit checkpoint (PSNR); much slower.",
)
@click.option(
    "-o", "--output", type=PATH, metavar="PATH",
    help="The schedule.  [default: OUT/schedule.json, or ./NAME-schedule.json for USER/NAME on the hub]",
)  # fmt: skip
@click.option("--plot", type=PATH, metavar="PNG", help="Delta against bits, time and quality.")
@click.option(
    "--check", type=PATH, metavar="PATH",
    help="Record nothing: say whether this schedule fits the export and --steps.",
)  # fmt: skip
@click.option(
    "--lora", type=LORA, multiple=True, metavar="FILE[:SCALE]",
    help="A LoRA to run beside the weights, as dvdq-run does. Of a LoRA that the export has: where it is now, for --reference.",
)  # fmt: skip
@runs_on
@loading_options
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-v", "--verbose", count=True, help="More log; twice for the libraries' too.")
@click.version_option(__version__, prog_name="dvdq-plan")
def main(out: Path, check: Path | None, revision: str | None, log_format: str, verbose: int, **options: Any) -> None:
    """Find the delta of step switching for the export in folder OUT, and write it with its schedule.

    Records a few clips on the high-bit engine with the low-bit one beside it, predicts average bits and time for every
    delta, picks one, and checks it by a real run. Nothing here changes the weights.
    """
    setup_logging(verbose, log_format)
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.checkpoint.lora.spec import parse_loras
    from dvdquant.deploy.switching.schedule import default_place
    from dvdquant.hub.locate import locate_export

    if check is not None:
        refuse_besides(
            "--check records nothing",
            ("check", "steps", "revision", "log_format", "verbose"),
            "leave out --check to plan, or the others to check",
            available="--steps",
        )
        out = locate_export(out, revision)
        echo(_checked(check, load_manifest(out), options["steps"]))
        return
    # 1. Read the options, and refuse what cannot be before minutes of work.
    prompt, file = options.pop("prompt"), options.pop("prompts")
    from_embeds = options["text_embeds"] is not None and not prompt and file is None
    prompts = [] if from_embeds else read_prompts(prompt, file)
    seeds = _seeds(options.pop("seeds"))
    if options["negative_prompt"] is not None:
        check_prompt("--negative-prompt", options["negative_prompt"], may_be_empty=True)
    _check_loading(options)
    name, out = out, locate_export(out, revision)
    output = options.pop("output") or default_place(name, out)
    plot = options.pop("plot")
    manifest = load_manifest(out)
    for path in (output, plot):
        if path is not None:
            check_writable(path, make_folder=False)
    loras = parse_loras(options.pop("lora"))
    goals = {name: options.pop(name) for name in GOALS}
    if sum(value is not None for value in goals.values()) > 1:
        raise UnsupportedError("more than one goal", available=GOALS.values(), fix="give one of them")
    check_device_word(options["device"])
    # 2. Record clips, and find δ.
    loading("PyTorch and the runtime", log_format)
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.planning.planner import Goal, plan
    from dvdquant.system.progress import Progress

    if all(value is None for value in goals.values()):
        goals["average_bits"] = 6.0
    goal = Goal(goals["average_bits"], goals["time_budget"], goals["delta"])
    progress = Progress("json" if log_format == "json" else "text")
    options["text_encoder_bits"] = int(options["text_encoder_bits"] or 16)
    found = plan(Artifact.of(out, manifest), prompts, goal, seeds=seeds, progress=progress, lora=loras, **options)
    # 3. Write the schedule and the plot.
    found.schedule.save(output)
    if plot is not None:
        from dvdquant.deploy.planning.plot import draw_plan

        draw_plan(found, plot)
    progress.event("plan", delta=found.delta, schedule=str(output), **found.schedule.details)
    echo(_summary(found))
    echo(f"schedule  {output}" + (f"\nplot      {plot}" if plot is not None else ""))


def _check_loading(options: dict[str, Any]) -> None:
    """UnsupportedError for options of loading that contradict each other, as dvdq-run says them."""
    refuse_clashes(loading_clashes(options))


def _checked(path: Path, manifest: Manifest, steps: int | None) -> str:
    from dvdquant.deploy.switching.schedule import Schedule

    schedule = Schedule.load(path, manifest, steps)
    return (
        f"{path} fits: {schedule.steps} steps, {schedule.average_bits:.3g} bits on average, δ {schedule.delta:.4g}, "
        f"planned on {len(schedule.prompts)} prompts, {schedule.created}"
    )


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ShapeError(f"--seeds is {text!r:.80}", available="different numbers from 0 up", fix="give --seeds 0,1,2")
    return seeds


def _summary(found: Plan) -> str:
    """δ, predicted against measured, and the quality table if there is one."""
    from dvdquant.deploy.switching.gbs import free_steps

    low, high = found.low, found.high
    lines = [
        f"δ {found.delta:.4g}: {found.predicted_bits:.2f} bits on average, {found.predicted_seconds:.3g} s of the transformer "
        f"a clip (all {high}: {found.seconds_at(high):.3g} s, all {low}: {found.seconds_at(low):.3g} s)",
        f"one real run: {found.measured_bits:.2f} bits, predicted {found.predicted_clip_bits:.2f} for this clip; "
        f"{found.measured_seconds:.3g} s; {found.measured_retries} retries",
        f"a call takes {', '.join(f'{s * 1e3:.3g} ms on a{b}' for b, s in sorted(found.seconds_per_call.items()))} "
        f"({found.backend})",
        f"steps     {''.join(str(b) for b in found.schedule.bits)}; planned without a step cache",
    ]
    steps, last = found.schedule.steps, int(found.schedule.details.get("last_high", 0))
    if steps <= FEW_STEPS:
        left = free_steps(steps, last, len(found.schedule.components))
        lines.append(
            f"with {steps} steps, of which the first two{' of each transformer' * (len(found.schedule.components) > 1)} and the "
            f"last {last} are always at {high}, {left or 'none'} {'is' if left < 2 else 'are'} left to δ: it can save up to "
            f"{100 * left / steps:.0f} % of the calls from {high} bits"
        )
    if found.seconds_per_call[low] >= found.seconds_per_call[high]:
        lines.append(
            f"the {low}-bit engine is no faster than the {high}-bit one on this backend: switching saves no time"
        )
    if found.quality:
        rows = [
            (f"{q.delta:.4g}", f"{q.average_bits:.2f}", f"{q.psnr:.2f}" if math.isfinite(q.psnr) else "equal")
            for q in found.quality
        ]
        lines += ["", table(("δ", "bits, measured", "PSNR to 16 bit, dB"), rows, right=(0, 1, 2))]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
