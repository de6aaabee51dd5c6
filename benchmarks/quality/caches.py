"""What step caches cost on the toy models: PSNR of clips against the share of the steps that is left out, by policy.

    python -m benchmarks.quality caches                      16 clips; the table in docs/quality/index.md
    python -m benchmarks.quality caches --clips 128 --processes 2
    python -m benchmarks.quality caches --along              8 recorded clips, of other words and seeds; minutes
    python -m benchmarks.quality caches --try "a8 easycache 0.08 output 6 0.1" --no-page

Every clip is drawn with the layers of ``w4a4``, on a8 or switched as ``dvdq-run`` has it, without a cache and with each
policy at several thresholds, and held against the fp32 clip of its prompt and seed. A setting is written as mode (``a8``,
``a4``, ``switch`` or ``switch=δ``), policy, threshold, what is reused, the longest run of skipped steps, the warm-up and, where
it is not ``none``, the weighting. A killed run goes on where it was. Where a8 is not among what is drawn, its clips are those
that ``run`` keeps here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path
from benchmarks.quality import jobs
from benchmarks.quality.jobs import Job
from benchmarks.quality.page import MODEL, PAGE, write_table

CHUNK = 16
METHOD = "dvdquant w4a4"
# Without a cache; the default policy and `line` at their own thresholds and at others; the other policies at shares like these;
# EasyCache and MagCache as they are published, but that MagCache's ratios are extrapolated.
FIXED = (
    "a8",
    "a8 forecast 0.02 output 3 0",
    "a8 forecast 0.05 output 3 0",
    "a8 line 0.04 line 4 0 step",
    "a8 line 0.06 line 4 0 step",
)
SWITCHED = (
    "switch",
    "switch line 0.04 line 4 0 step",
    "switch=0.06 line 0.04 line 4 0 step",
    "switch=0.06 forecast 0.02 output 3 0",
    "switch forecast 0.02 output 3 0",
    "switch forecast 0.05 output 3 0",
    "switch=0.06 forecast 0.05 output 3 0",
    "switch forecast 0.1 output 3 0",
)
OTHERS = (
    "a8 easycache 0.02 output 10 0",
    "a8 magcache 0.12 output 3 0",
    "a8 easycache 0.03 output 10 0",
    "a8 magcache 0.24 output 3 0",
    "switch easycache 0.03 output 10 0",
    "switch easycache 0.1 output 10 0",
    "a8 easycache 0.05 latent 10 0.2",
    "a8 magcache 0.06 latent 3 0.2",
    "a4",
)
SETTINGS = (*FIXED, *SWITCHED, *OTHERS)
# On recorded clips: what is returned, the weight of a step, and how far apart computed steps may be, one by one.
ALONG = (
    "a8",
    *(f"a8 forecast {threshold} output 3 0" for threshold in (0.02, 0.05)),
    *(f"a8 forecast {threshold} line 3 0" for threshold in (0.02, 0.05)),
    "a8 forecast 0.05 output 3 0 step",
    *(f"a8 line 0.04 {residual} {most} 0 step" for residual in ("output", "line") for most in (3, 4, 5)),
    *(f"a8 line {threshold} line 4 0 step" for threshold in (0.02, 0.06, 0.08)),
)


def controller_of(setting: str) -> Any:
    """Return the controller of a setting.

    Args:
        setting: Mode, policy, threshold, what is reused, the longest run of skipped steps and the warm-up, apart by spaces; or
            the mode alone.
    """
    from dvdquant.deploy.switching.defaults import DEFAULT_DELTA
    from dvdquant.deploy.switching.factory import make_controller
    from dvdquant.deploy.switching.step_cache import StepCachePolicy

    words = setting.split()
    mode, _, delta = words[0].partition("=")
    cache = None
    if len(words) > 1:
        policy, threshold, residual, most, warm_up, *weighting = words[1:]
        given: Any = (float(threshold), residual, int(most), policy, float(warm_up), *weighting)
        cache = StepCachePolicy(*given)
    rule: dict[str, Any] = {"delta": float(delta or DEFAULT_DELTA)} if mode == "switch" else {}
    return make_controller(mode, component="transformer", family="wan", bits=(4, 8), cache=cache, **rule)


class CacheRunner:
    """Draws clips in one process: the toy models with the layers of one method."""

    def __init__(self, folders: dict[str, Path], work: Path, clips: int, eager: bool) -> None:
        """Prepare the toy models.

        Args:
            folders: The folder of every model by its name.
            work: The folder of what processes share.
            clips: The number of clips.
            eager: Whether the models are not compiled.
        """
        from benchmarks.quality.toy.clips import Bench
        from benchmarks.quality.work import Worker, find_method, plan

        steps = Bench.open(next(iter(folders.values()))).steps
        self.worker = Worker(folders, work, steps, eager=eager)
        self.method = find_method(METHOD)
        bench = self.worker.bench(next(iter(folders)))
        self.plan = plan(bench, 64, 2)[:clips]

    def do(self, job: Job) -> list[dict[str, Any]]:
        """Return the rows of one job.

        Args:
            job: (model, setting, number of the chunk).
        """
        import torch

        from benchmarks.quality.toy.clips import Clips

        model, setting, index = job
        chunk = self.plan[index * CHUNK : (index + 1) * CHUNK]
        # One clip at a time: the model is compiled for one size of a batch, whatever the clips' controllers decide.
        alone = [
            self.worker.switched_clips(model, self.method, [clip], lambda _: controller_of(setting)) for clip in chunk
        ]
        clips = Clips(torch.cat([each.latents for each in alone]), [each.bits[0] for each in alone], [])
        rows = self.worker.score(model, METHOD, "A8", index, chunk, clips)
        return [
            {
                "model": model, "setting": setting, "prompt": row["prompt"], "seed": row["seed"], "psnr": row["psnr"],
                "ssim": row["ssim"], "right": all(row["right"].values()),
                "skipped": bits.count(None) / len(bits), "low": bits.count(4) / len(bits),
            }
            for row, bits in zip(rows, clips.bits)
        ]  # fmt: skip


def kept_a8(model: str, clips: Sequence[tuple[Any, int]]) -> list[dict[str, Any]]:
    """Return the rows of a8 without a cache among those that `run` keeps here, for some clips.

    Args:
        model: The name of the model.
        clips: (prompt, seed) of every clip.
    """
    from benchmarks.quality.results.results_file import read_lines

    wanted = {(" ".join(prompt), seed) for prompt, seed in clips}
    found = []
    for row in map(json.loads, read_lines(Path(__file__).with_name("results.jsonl.xz")).splitlines()):
        what = [row.get(name) for name in ("kind", "model", "method", "width")]
        if what == ["clip", model, METHOD, "A8"] and (row["prompt"], row["seed"]) in wanted:
            right = all(row["right"].values())
            found.append({**row, "setting": "a8", "right": right, "skipped": 0.0, "low": 0.0})
    return found


def table_of(rows: Sequence[dict[str, Any]], settings: Sequence[str]) -> str:
    """Write a line for every model and setting: what is left out, PSNR, and its loss to a8 without a cache on the same clips.

    Args:
        rows: The rows of all jobs.
        settings: The settings, in the order of the lines.
    """
    from benchmarks.quality.report import difference, difference_text, interval
    from dvdquant.text import markdown_table

    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["model"] == model:
                found.setdefault(row["setting"], []).append(row)
        psnrs: dict[str, dict[Hashable, float]] = {
            name: {(r["prompt"], r["seed"]): r["psnr"] for r in each} for name, each in found.items()
        }
        for setting in settings:
            if setting not in found:
                continue
            each = found[setting]
            skipped, low, right = (sum(r[name] for r in each) / len(each) for name in ("skipped", "low", "right"))
            loss = difference(psnrs[setting], psnrs["a8"]) if setting != "a8" and "a8" in psnrs else None
            lines.append(
                [
                    model, setting, f"{skipped:.0%}", f"{skipped + low:.0%}", f"{interval(psnrs[setting])[0]:.2f}",
                    "–" if loss is None else difference_text(loss, ".2f"), f"{right:.0%}",
                ]
            )  # fmt: skip
    head = ["model", "setting", "skipped", "skipped or a4", "PSNR, dB", "PSNR less that of a8", "all right"]
    return markdown_table(head, lines)


def along(worker: Any, settings: Sequence[str], models: Sequence[str], clips: int) -> str:
    """Return a table with a line for every model and setting: what is left out, and what that does to recorded clips of a8.

    Args:
        worker: What this process does jobs with.
        settings: The settings, in words.
        models: Names of the models.
        clips: The number of clips.
    """
    from benchmarks.quality.toy.clips import skips_along
    from dvdquant.text import markdown_table

    lines = []
    for model in models:
        bench = worker.bench(model)
        recorded = [worker.recording(model, METHOD, "A8", clip) for clip in range(clips)]
        for setting in settings:
            bits, *errors = zip(*(skips_along(bench, each, controller_of(setting)) for each in recorded))
            share = sum(each.count(None) / len(each) for each in bits) / clips
            rms = [f"{100 * (sum(error**2 for error in each) / clips) ** 0.5:.2f}" for each in errors]
            lines.append([model, setting, f"{share:.0%}", *rms])
    return markdown_table(
        ["model", "setting", "skipped", "error of the latent by skips, %", "with quantization, %"], lines
    )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="that of `run`: fp32 clips are shared")
    parser.add_argument("--models", nargs="+", choices=["plain", "outliers"], default=["plain", "outliers"])
    parser.add_argument("--clips", type=int, default=CHUNK, help=f"a multiple of {CHUNK}; fewer with --along")
    parser.add_argument("--only", nargs="+", default=[], help="settings by part of their words")
    parser.add_argument("--try", dest="tried", nargs="+", default=[], metavar="SETTING", help="these settings instead")
    parser.add_argument("--along", action="store_true", help="what skips do to 8 recorded clips of a8")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="stop after so long; started again, it goes on")
    parser.add_argument("--eager", action="store_true", help="do not compile the model: for a few clips")
    parser.add_argument("--page", type=Path, default=PAGE, help="whose block 'caches' is written anew")
    parser.add_argument("--no-page", action="store_true", help="only print the table")
    options = parser.parse_args()
    jobs.one_thread()
    from benchmarks.quality.outliers import KINDS, toy_folders
    from benchmarks.quality.work import HELD_OUT

    options.work.mkdir(parents=True, exist_ok=True)
    folders = toy_folders(options.model, options.work)
    models = [name for name, kind in zip(folders, KINDS) if kind in options.models]
    known = ALONG if options.along else SETTINGS
    settings = [s for s in options.tried or known if not options.only or any(part in s for part in options.only)]
    for setting in settings:
        controller_of(setting)  # a wrong one is refused before anything is drawn
    given = (folders, options.work, options.clips, options.eager)
    runner = jobs.start(CacheRunner, given)
    for model in models:
        runner.worker.held_out(model)  # what processes share is made once
    if options.along:
        clips = min(options.clips, HELD_OUT)
        text = along(runner.worker, settings, models, clips)
        print(text)
        if not options.no_page:
            write_table(options.page, "caches-along", text, f"{clips} recorded clips", "caches")
        return 0
    todo: list[Job] = [
        (model, setting, index)
        for index in range(-(-options.clips // CHUNK))
        for model in models
        for setting in settings
    ]
    results = options.work / "caches.jsonl"
    rows = jobs.run_jobs(CacheRunner, given, todo, results, options.processes, options.seconds)
    for model in models:
        if not any(row["setting"] == "a8" for row in rows if row["model"] == model):
            rows += kept_a8(model, runner.plan)
    text = table_of(rows, list(SETTINGS) + [s for s in settings if s not in SETTINGS])
    print(text)
    if not options.no_page:
        write_table(options.page, "caches", text, f"{options.clips} clips", "caches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
