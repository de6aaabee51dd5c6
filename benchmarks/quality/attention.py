"""What 8-bit attention costs on the toy model: error of a step, and PSNR of clips, with linear layers in 16 bit, w4a8 and w4a4.

    python -m benchmarks.quality attention --steps 20                    8 clips; the table in docs/quality/index.md
    python -m benchmarks.quality attention --clips 128 --processes 2     as many as the other methods

Self-attention is computed by the definition of each format (``dvdquant/ops/attention/definition.py``), put into diffusers'
model as a session does it, the least length aside: the toy model has 288 tokens. The step error is the relative L2 of the
output along the fp32 trajectories of held-out clips. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path
from benchmarks.quality import jobs
from benchmarks.quality.jobs import Job
from benchmarks.quality.page import MODEL, PAGE, write_table
from dvdquant.system.processor import usable_cores

CHUNK = 8
LINEARS = {"bf16": 16, "w4a8": 8, "w4a4": 4}
KINDS = ("16", "int8", "int8-rotated", "int8-fp8", "fp8", "fp8-plain")
DRAWN = ("16", "int8", "int8-fp8", "fp8", "fp8-plain")


class _Format:
    """Computes one format as the operation calls it. Under autocast q and k may be wider than v; kernels get 16 bit."""

    def __init__(self, kind: str) -> None:
        from dvdquant.ops.attention.definition import FORMATS

        self.kind = FORMATS[kind]

    def __call__(self, q: Any, k: Any, v: Any, scale: float, bounds: Any) -> Any:
        import torch

        from dvdquant.ops.attention.definition import quantized_attention

        dtype = q.dtype
        q, k, v = (t.to(torch.bfloat16).float().transpose(1, 2) for t in (q, k, v))
        out = quantized_attention(q, k, v, self.kind, bounds, scale)
        return out.transpose(1, 2).to(torch.bfloat16).to(dtype)


class AttentionRunner:
    """Draws clips in one process: the toy model with one kind of linear layers at a time."""

    def __init__(self, model: Path, work: Path, steps: int, every: int, clips: int) -> None:
        """Prepare the toy model.

        Args:
            model: The folder of the toy model.
            work: The folder of what processes share.
            steps: The denoising steps of a clip.
            every: Every how many steps the error is measured.
            clips: The number of clips.
        """
        from benchmarks.quality.work import Worker, plan

        self.name = model.name
        self.worker = Worker({self.name: model}, work, steps, eager=True)
        self.every, self.work = every, work
        bench = self.worker.bench(self.name)
        self.plan = plan(bench, min(clips, 64), -(-clips // 64))[:clips]
        self.linears = ""
        self.built: Any = None
        self.states: dict[str, tuple[Any, Any]] = {}

    def model(self, linears: str, kind: str) -> Any:
        """Return the model with some linear layers and some attention.

        Args:
            linears: The linear layers, a key of ``LINEARS``.
            kind: The attention, one of ``KINDS``.
        """
        from benchmarks.quality.compared.methods import METHODS
        from dvdquant.deploy.sessions.attention import install_attention
        from dvdquant.ops.attention.ladder import Attention
        from dvdquant.ops.attention.operation import number_of

        if linears != self.linears:
            if linears == "bf16":
                self.built = self.worker.unquantized(self.name, wide=False)
            else:
                method = METHODS[f"dvdquant {linears}"]
                self.built = self.worker.simulated(self.name, method, LINEARS[linears])
            self.linears = linears
            # Folding the norms and finding their bounds is a session's; the kernel is put in by its number.
            self.state = install_attention(self.built.compiled.run, Attention("fp8", ()))
            self.state.least = 1
        if kind != "16" and kind not in self.states:
            made: Any = _Format(kind)
            self.states[kind] = (made, number_of(made))
        self.state.number = None if kind == "16" else self.states[kind][1]
        return self.built

    def do(self, job: Job) -> list[dict[str, Any]]:
        """Return the rows of one job.

        Args:
            job: (linear layers, attention, number of the chunk), the latter below 0 for step errors.
        """
        linears, kind, chunk = job
        model = self.model(linears, kind)
        base = {"linears": linears, "attention": kind}
        if chunk < 0:
            found = self.worker.step_errors(self.name, model, self.every)
            return [{**base, "clip": c, "step": s, "error": e} for c, s, _, e in found]
        from benchmarks.quality.work import generate_chunk

        clips = self.plan[chunk * CHUNK : (chunk + 1) * CHUNK]
        latents = generate_chunk(self.worker.bench(self.name), {16: model}, clips)
        rows = self.worker.score(self.name, linears, "A16", chunk, clips, latents)
        return [{**base, "prompt": r["prompt"], "seed": r["seed"], "psnr": r["psnr"]} for r in rows]


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Write step error and PSNR (dB) of every format, and the difference to 16-bit attention on the same clips.

    Args:
        rows: Rows of all jobs.
    """
    from benchmarks.quality.report import difference, difference_text, interval
    from dvdquant.text import markdown_table

    errors: dict[tuple[str, str], dict[Any, list[float]]] = {}
    psnrs: dict[tuple[str, str], dict[Any, float]] = {}
    for row in rows:
        place = (row["linears"], row["attention"])
        if "error" in row:
            errors.setdefault(place, {}).setdefault(row["clip"], []).append(row["error"])
        elif row["psnr"] is not None:
            psnrs.setdefault(place, {})[row["prompt"], row["seed"]] = row["psnr"]
    lines = []
    for linears in LINEARS:
        for kind in KINDS:
            place, base = (linears, kind), (linears, "16")
            if place not in errors and place not in psnrs:
                continue
            means = {clip: sum(each) / len(each) for clip, each in errors.get(place, {}).items()}
            mean, low, high = interval(means) if means else (float("nan"),) * 3
            drawn = psnrs.get(place, {})
            value = f"{interval(drawn)[0]:.2f}" if drawn else "–"
            loss = difference(drawn, psnrs.get(base, {})) if kind != "16" and drawn else None
            error = f"{mean:.4f} ± {(high - low) / 2:.4f}" if means else "–"
            lines.append([linears, kind, error, value, "–" if loss is None else difference_text(loss, ".2f")])
    head = ["linear layers", "attention", "step error", "PSNR, dB", "PSNR less that of 16-bit attention"]
    return markdown_table(head, lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, default=Path("out/quality-attention"))
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, help="denoising steps; those the model was trained for if not given")
    parser.add_argument("--every", type=int, default=10, help="step errors at every so many steps, and the last")
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--linears", nargs="+", choices=LINEARS, default=list(LINEARS))
    parser.add_argument(
        "--formats", nargs="+", choices=KINDS, default=list(DRAWN), help="those that clips are drawn with"
    )
    parser.add_argument("--seconds", type=float, help="stop after so long; started again, it goes on")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="whose block 'attention', or 'attention-MODEL', is written anew"
    )
    options = parser.parse_args()
    jobs.one_thread()
    from benchmarks.quality.toy.clips import Bench

    options.work.mkdir(parents=True, exist_ok=True)
    steps = options.steps or Bench.open(options.model).steps
    todo: list[Job] = [(linears, kind, -1) for linears in options.linears for kind in KINDS]
    chunks = range(-(-options.clips // CHUNK))
    todo += [(linears, kind, chunk) for chunk in chunks for linears in options.linears for kind in options.formats]
    given = (options.model.resolve(), options.work, steps, options.every, options.clips)
    runner = jobs.start(AttentionRunner, given)
    runner.worker.held_out(runner.name)  # what processes share is made once
    results = options.work / "attention.jsonl"
    rows = jobs.run_jobs(AttentionRunner, given, todo, results, options.processes, options.seconds)
    text = table_of(rows)
    print(text)
    name = options.model.resolve().name
    block = "attention" if name == MODEL.name else f"attention-{name}"
    write_table(options.page, block, text, f"{steps} steps a clip, {options.clips} clips", "attention")
    return 0


if __name__ == "__main__":
    sys.exit(main())
