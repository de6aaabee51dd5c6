"""Quality of switched generation on tiny-wan: PSNR and SSIM to the fp32 model, of a4, a8, δ-GBS and other placements.

    dvdq-export examples/tiny-wan -o out/tiny-wan --latent 8x24x24 --text-tokens 5 --target graphs --recipe w4a4
    python benchmarks/switching/measure.py out/tiny-wan            # table and picture into this folder
    python benchmarks/switching/measure.py out/tiny-wan --study cache --clips 8

Every finished generation is a line in --results, which lies outside the repository: killed and started again, it goes on.
δ comes from the planner on prompts and seeds that are not measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path
from benchmarks.rows import append_rows, read_rows

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
Variant = dict[str, Any]
Row = dict[str, Any]


def clip_prompts(model: Path, count: int, seed: int) -> list[str]:
    """Random prompts of the model's own words."""
    words = json.loads((model / "prompts.json").read_text())["words"]
    groups, draw = [words[0:4], words[4:8], words[8:12], words[12:14], words[14:16]], random.Random(seed)
    return [" ".join(draw.choice(group) for group in groups) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- variants


def quality_variants(deltas: dict[str, float], cache: float) -> list[Variant]:
    """What is compared. ``like`` places as many 8-bit steps as that variant took on the same clip."""
    variants: list[Variant] = [{"name": "a8", "mode": "a8"}, {"name": "a4", "mode": "a4"}]
    for bits, delta in deltas.items():
        variants.append({"name": f"δ-GBS {bits}", "mode": "switch", "delta": delta})
        variants.append({"name": f"δ-GBS {bits}, last 2 high", "mode": "switch", "delta": delta, "last_high": 2})
    for base in [v for v in variants if "last_high" not in v]:
        variants.append({**base, "name": f"{base['name']} + cache", "cache": cache})
    for bits in deltas:
        for place in ("first", "last", "evenly"):
            variants.append(
                {"name": f"{place}, as δ-GBS {bits}", "mode": "planned", "place": place, "like": f"δ-GBS {bits}"}
            )
    return variants


def cache_variants(deltas: dict[str, float]) -> list[Variant]:
    """Thresholds and residuals of the step cache, on all-8-bit and on switched generation."""
    variants: list[Variant] = [{"name": "a8", "mode": "a8"}]
    bases: list[Variant] = [{"mode": "a8"}, {"mode": "switch", "delta": deltas["6"]}]
    variants.append({"name": "δ-GBS 6", **bases[1]})
    for threshold in (0.02, 0.05, 0.01, 0.03, 0.005, 0.1):
        for base, title in zip(bases, ("a8", "δ-GBS 6")):
            for residual in ("output", "latent"):
                name = f"{title} + cache {threshold} {residual}"
                variants.append({**base, "name": name, "cache": threshold, "residual": residual})
    return variants


def place_high(place: str, count: int, steps: int) -> list[int]:
    """``count`` 8-bit steps among ``steps``: the first, the last, or spread as evenly as can be from the first to the last."""
    if place == "first":
        chosen = set(range(count))
    elif place == "last":
        chosen = set(range(steps - count, steps))
    else:
        chosen = {round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}
    return [8 if step in chosen else 4 for step in range(steps)]


# -------------------------------------------------------------------------------------------------------------- workers


class Worker:
    """One process: a generator with one thread, and the clips it is given."""

    def __init__(self, out: Path, model: Path, steps: int, results: Path) -> None:
        import torch

        torch.set_num_threads(1)
        from dvdquant.deploy.artifact import Artifact
        from dvdquant.deploy.generation.generate import open_generator
        from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession

        self.artifact, self.steps, self.results = Artifact.open(out), steps, results

        def unpacked(session: Any) -> Any:
            """The weights unpacked once: the same arithmetic, a third less time."""
            session.close()
            return OnnxRuntimeSession(self.artifact, session.component, weights="expanded", threads=1)

        self.generator = open_generator(
            self.artifact, pipeline=str(model), backend="onnxruntime", device="cpu", wrap_session=unpacked
        )

    def clip(self, key: str, prompt: str, seed: int, variants: Sequence[Variant], done: dict[str, Row]) -> None:
        """Generate what is missing of one clip, and append a row for each."""
        from dvdquant.deploy.generation.request import GenerateRequest

        # The published rule, unless a variant says otherwise.
        base = GenerateRequest(prompt, seed=seed, steps=self.steps, last_high=0, weighting="none")
        reference = None
        for variant in variants:
            if variant["name"] in done:
                continue
            if reference is None:
                reference = self.generator.generate(dataclass_replace(base, mode="16")).frames
            row = {"key": key, "prompt": prompt, "seed": seed, **self._one(base, variant, reference, done)}
            done[variant["name"]] = row
            append_rows(self.results, [row])

    def _one(self, base: Any, variant: Variant, reference: Any, done: dict[str, Row]) -> Row:
        from benchmarks.switching.metrics import ssim
        from dvdquant.deploy.generation.psnr import psnr
        from dvdquant.deploy.switching import step_cache
        from dvdquant.deploy.switching.schedule import Schedule, average_bits

        fields: Variant = {name: variant[name] for name in ("mode", "delta", "last_high", "cache") if name in variant}
        if "place" in variant:
            bits: list[int | None] = list(place_high(variant["place"], done[variant["like"]]["high_steps"], self.steps))
            fields["schedule"] = Schedule("benchmark", "w4a4", self.steps, 0.0, tuple(bits), average_bits(bits))
        policy = step_cache.StepCachePolicy.for_family("wan")
        if "residual" in variant:
            step_cache.FAMILY_CACHE = {"wan": step_cache.StepCachePolicy(variant["cache"], variant["residual"])}
        started = time.perf_counter()
        result = self.generator.generate(dataclass_replace(base, **fields))
        seconds = time.perf_counter() - started
        step_cache.FAMILY_CACHE = {"wan": policy}
        deciding = [r for r in result.trace if r.branch == "cond"]
        return {
            "name": variant["name"],
            "psnr": psnr(result.frames, reference),
            "ssim": ssim(result.frames, reference),
            "high_steps": sum(r.bits == 8 for r in deciding),
            "skipped": sum(r.bits is None for r in deciding),
            "average_bits": result.summary["average_bits"],
            "relative_cost": result.summary["relative_cost"],
            "retries": result.summary["retries"],
            "controller_seconds": result.summary["controller_seconds"],
            "seconds": seconds,
        }


def dataclass_replace(request: Any, **fields: Any) -> Any:
    """``dataclasses.replace``, imported late: this module is loaded before the thread counts are set."""
    import dataclasses

    return dataclasses.replace(request, **fields)


_worker: Worker | None = None


def start_worker(*arguments: Any) -> None:
    """In a new process."""
    global _worker
    _worker = Worker(*arguments)


def run_clip(job: tuple[str, str, int, list[Variant], dict[str, Row]]) -> str:
    """In a worker process."""
    assert _worker is not None
    _worker.clip(*job)
    return job[0]


# --------------------------------------------------------------------------------------------------------------- running


def load_rows(path: Path) -> dict[str, dict[str, Row]]:
    """key -> name -> row; a line torn by a kill is left out."""
    rows: dict[str, dict[str, Row]] = {}
    for row in read_rows(path):
        rows.setdefault(row["key"], {})[row["name"]] = row
    return rows


def plan_deltas(out: Path, model: Path, steps: int, results: Path, export_key: str) -> dict[str, float]:
    """δ for 6 and 5 bits on average, from four prompts with seeds that are not measured; kept in the results file."""
    key = f"{export_key}/{steps}/deltas"
    known = load_rows(results).get(key)
    if known:
        return {name: row["delta"] for name, row in known.items()}
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.planning.planner import Goal, plan
    from dvdquant.deploy.switching.gbs import delta_for_average_bits
    from dvdquant.system.progress import Progress

    prompts = clip_prompts(model, 4, seed=1)
    found = plan(
        Artifact.open(out), prompts, Goal(average_bits=6.0), seeds=(10_000,), steps=steps, pipeline=str(model),
        backend="onnxruntime", device="cpu", progress=Progress("text"),
    )  # fmt: skip
    recordings = [clip.changes for clip in found.clips]
    rows: list[Row] = [
        {"key": key, "name": name, "delta": delta_for_average_bits(recordings, bits)[0]}
        for name, bits in (("6", 6.0), ("5", 5.0))
    ]
    append_rows(results, rows)
    return {row["name"]: row["delta"] for row in rows}


def run_all(arguments: argparse.Namespace, key: str, variants: list[Variant]) -> list[str]:
    """Generate what is missing; the clips' keys, in order."""
    prompts = clip_prompts(arguments.model, arguments.clips, seed=0)
    keys = [f"{key}/{seed}" for seed in range(arguments.clips)]
    rows = load_rows(arguments.results)
    jobs = [(k, p, s, variants, rows.get(k, {})) for s, (k, p) in enumerate(zip(keys, prompts))]
    jobs = [job for job in jobs if any(v["name"] not in job[4] for v in variants)]
    context = multiprocessing.get_context("spawn")
    setup = (arguments.out, arguments.model, arguments.steps, arguments.results)
    with context.Pool(arguments.processes, start_worker, setup) as pool:
        from tqdm import tqdm

        for _ in tqdm(pool.imap_unordered(run_clip, jobs), total=len(jobs), desc="clips"):
            pass
    return keys


def gather(results: Path, keys: Iterable[str], variants: Sequence[Variant]) -> dict[str, list[Row]]:
    """name -> rows in the order of the clips."""
    rows = load_rows(results)
    return {v["name"]: [rows[k][v["name"]] for k in keys] for v in variants}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an export of tiny-wan with a4 and a8")
    parser.add_argument("--model", type=Path, default=REPOSITORY / "examples" / "tiny-wan")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--study", choices=["quality", "cache"], default="quality")
    default = Path(tempfile.gettempdir()) / "dvdquant-switching.jsonl"
    parser.add_argument("--results", type=Path, default=default, help="finished generations, to go on from")
    parser.add_argument("--report", type=Path, default=HERE, help="folder for README.md and the picture")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    from benchmarks.switching.report import write_cache_report, write_report
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.deploy.switching.step_cache import StepCachePolicy

    started = time.monotonic()
    export_key = load_manifest(arguments.out).export_key
    deltas = plan_deltas(arguments.out, arguments.model, arguments.steps, arguments.results, export_key)
    quality = arguments.study == "quality"
    threshold = StepCachePolicy.for_family("wan").threshold
    variants = quality_variants(deltas, threshold) if quality else cache_variants(deltas)
    # A changed default must not meet rows that were made with another.
    key = f"{export_key}/{arguments.steps}/{arguments.study}/" + (f"{threshold:g}" if quality else "all")
    table = gather(arguments.results, run_all(arguments, key, variants), variants)
    seconds = time.monotonic() - started
    write = write_report if quality else write_cache_report
    write(arguments.report, table, arguments, deltas, seconds)


if __name__ == "__main__":
    main()
