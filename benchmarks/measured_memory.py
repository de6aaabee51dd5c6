"""Compare what ``dvdq-run --memory`` estimates with what a run takes: ``python -m benchmarks.measured_memory [--device cuda]``.

A Wan pipeline is made with random weights and parts that are large enough to be seen: a transformer of 111 million weights, a
text encoder of 222 million, and a VAE of the published size. Each arrangement draws one clip in a process of its own on the
CPU. The table has, for each stage, the estimate without what libraries and the program take, and the most of the process's
resident memory and of its own memory beyond what it had before anything was loaded. Pages of files that are mapped, such as
weights as PyTorch loads them on a CPU, are resident and not its own.

``--device cuda`` measures a GPU: what is in use on it, by the driver (by the system, where the GPU shares the host's memory),
and the most that PyTorch's tensors took. Other programs on it would be counted, too. Expanded weights need our kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.errors import DvdquantError

if TYPE_CHECKING:
    import torch

PROMPT = "a red cat runs in the rain"
CLIP: dict[str, Any] = {"num_frames": 9, "height": 96, "width": 96, "steps": 2}
TOKENS = 64
WIDTH = 1024
WORDS = ["<pad>", "</s>", "<unk>", *PROMPT.split()]
ARRANGEMENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pytorch", {}),
    ("pytorch", {"alternate": True}),
    ("pytorch", {"text_encoder_bits": 4}),
    ("pytorch", {"alternate": True, "text_encoder_bits": 4, "vae_tiling": True}),
    ("onnxruntime", {}),
)
# On a GPU, with our kernels where they are built.
ON_GPU: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pytorch", {"weights": "packed"}),
    ("pytorch", {"weights": "expanded"}),
    ("pytorch", {"weights": "packed", "alternate": True}),
    ("pytorch", {"weights": "packed", "alternate": True, "text_encoder_bits": 4, "vae_tiling": True}),
)
OFFLOADED: tuple[tuple[str, dict[str, Any]], ...] = (("pytorch", {"weights": "packed", "offload": True}),)
MIB = 1 << 20
Used = Callable[[], tuple[int, int]]


def build(folder: Path) -> None:
    """Write the pipeline into ``folder``/pipeline and its export into ``folder``/out.

    Args:
        folder: Where both go.
    """
    import diffusers
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from dvdquant.export.options import ExportOptions
    from dvdquant.export.pipeline import run_export
    from dvdquant.export.plan import plan_export
    from dvdquant.recipe import get_recipe
    from dvdquant.system.progress import Progress

    torch.manual_seed(0)
    # 1. A tokenizer of a few words.
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )
    # 2. The parts.
    sizes = {"d_model": WIDTH, "d_kv": 64, "d_ff": 4 * WIDTH, "num_heads": 16, "num_layers": 12, "vocab_size": 20_000}
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=16, attention_head_dim=64, text_dim=WIDTH, ffn_dim=4 * WIDTH, num_layers=6
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.to(torch.bfloat16).eval(),
        transformer=transformer.to(torch.bfloat16).eval(),
        vae=diffusers.AutoencoderKLWan().eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipeline.save_pretrained(folder / "pipeline")
    # 3. The export.
    options = ExportOptions(
        model=str(folder / "pipeline"),
        out=folder / "out",
        recipe=get_recipe("rtn"),
        targets=("graphs",),
        latent="3x12x12",
        text_tokens=TOKENS,
    )
    run_export(plan_export(options), Progress())


class Watch:
    """The most memory of two kinds while something runs, beyond what there was before.

    Args:
        used: Returns the bytes of each kind that are in use.
        start: Called before something runs, for a kind that is a peak itself.
    """

    def __init__(self, used: Used, start: Callable[[], None] = lambda: None) -> None:
        self._used, self._start = used, start
        self.before = used()

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
        """Run ``work``, and return what it gives and the most bytes of each kind beyond those of the beginning.

        Args:
            work: What runs.
        """
        self._start()
        over, seen = threading.Event(), [self._used()]

        def look() -> None:
            while not over.wait(0.002):
                seen.append(self._used())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            result = work()
            seen.append(self._used())
        finally:
            over.set()
            thread.join()
        first, second = (max(sizes) - before for sizes, before in zip(zip(*seen), self.before))
        return result, (first, second)


def used_bytes() -> tuple[int, int]:
    """Return the resident pages of this process in bytes, and those of them that are not of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files, shared = (int(lines[f"Rss{name}"].split()[0]) << 10 for name in ("Anon", "File", "Shmem"))
    return anonymous + files + shared, anonymous + shared


def watch_gpu(device: torch.device) -> Watch:
    """Return a watch of the bytes of a GPU that are in use, by whomever, and of those of PyTorch's tensors of this process.

    Where the GPU shares the host's memory, pages of files that the system can take back are not in use.

    Args:
        device: The GPU.
    """
    import torch

    from dvdquant.system.device_memory import shares_memory
    from dvdquant.system.memory import memory_limit

    shared = shares_memory(device)

    def used() -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(device)
        return total - (memory_limit() if shared else free), torch.cuda.max_memory_allocated(device)

    torch.cuda.reset_peak_memory_stats(device)
    return Watch(used, lambda: torch.cuda.reset_peak_memory_stats(device))


def measure(folder: Path, backend: str, device: str, how: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw one clip, and return the estimate and the measure of each stage.

    Args:
        folder: Of :func:`build`.
        backend: ``pytorch`` or ``onnxruntime``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        how: Arguments of :func:`open_generator` for the arrangement.
    """
    import diffusers
    import torch
    import transformers

    from dvdquant.cli.clips.run_memory import place_of, sm_of_kernels
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
    from dvdquant.deploy.generation.memory_plan import Arrangement, arrange
    from dvdquant.deploy.generation.needs import run_bytes
    from dvdquant.system.devices import resolve_device

    place = resolve_device(device)
    facts = place_of(place)
    # What is imported when a part is loaded is the program's, not the run's.
    _ = diffusers.WanPipeline, diffusers.AutoencoderKLWan, transformers.UMT5EncoderModel
    _ = torch.randn(256, 256, device=place) @ torch.randn(256, 256, device=place)
    on_gpu = place.type == "cuda"
    with open_generator(
        Artifact.open(folder / "out"), pipeline=folder / "pipeline", backend=backend, device=device, **how
    ) as generator:
        request = generator.check(GenerateRequest(PROMPT, mode="a8", **CLIP))
        sm, weights = sm_of_kernels(place, facts, backend), how.get("weights", "auto")
        shared = on_gpu and facts.unified
        run = run_bytes(generator.checker, [request], backend, 0, narrow=False, sm=sm, weights=weights, shared=shared)
        fields = {name: value for name, value in how.items() if name not in ("text_encoder_bits", "weights")}
        arrangement = Arrangement(next(iter(run.transformer)), text_bits=how.get("text_encoder_bits", 16), **fields)
        plan = arrange(run, arrangement)
        watch = watch_gpu(place) if on_gpu else Watch(used_bytes)

        def text() -> Any:
            if how.get("alternate"):
                generator.encode_ahead([request])
                return None
            generator.prepare(request)
            return generator.encode_prompt(request)

        embeddings, first = watch(text)

        def steps() -> Any:
            generator.prepare(request)
            return generator.denoise(request, embeddings or generator.encode_prompt(request))

        done, second = watch(steps)
        _, third = watch(lambda: generator.decode(request, done.latents))
    return [
        {"how": arrangement.words(), "stage": stage.name, "bytes": [stage.total, *measured]}
        for stage, measured in zip(plan.stages, (first, second, third), strict=True)
    ]


def table(rows: list[dict[str, Any]], *, on_gpu: bool) -> str:
    """Return the table in Markdown.

    Args:
        rows: The stages of every arrangement.
        on_gpu: Whether a GPU's memory was measured, and not the process's.
    """
    kinds = "in use on the GPU, MiB | of it PyTorch's tensors, MiB" if on_gpu else "resident, MiB | of it own, MiB"
    lines = [f"| backend | arrangement | while | estimated, MiB | {kinds} |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for row in rows:
        figures = " | ".join(f"{size / MIB:.0f}" for size in row["bytes"])
        lines.append(f"| {row['backend']} | {row['how']} | {row['stage']} | {figures} |")
    return "\n".join(lines)


def arrangements(device: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (backend, arrangement) of every measure on a device.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UnsupportedError: PyTorch does not see that GPU.
    """
    from dvdquant.ops.cuda_linear import usable_kernels
    from dvdquant.system.device_memory import shares_memory
    from dvdquant.system.devices import resolve_device

    place = resolve_device(device)
    if place.type == "cpu":
        return list(ARRANGEMENTS)
    kernels = usable_kernels(place) is not None
    found = [(backend, how) for backend, how in ON_GPU if kernels or how["weights"] == "packed"]
    # Where the host's memory is the GPU's, nothing is gained by what waits there.
    return [*found, *(() if shares_memory(place) else OFFLOADED)]


def main() -> None:
    """Build what is not there, and measure every arrangement in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where the pipeline is or goes (default: it is not kept)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        backend, how = options.one
        print(json.dumps(measure(options.folder, backend, options.device, json.loads(how))))
        return
    try:
        chosen = arrangements(options.device)
    except DvdquantError as error:
        raise SystemExit(f"error: {error}") from error
    with tempfile.TemporaryDirectory(prefix="dvdquant-memory-", dir="/var/tmp") as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "out" / "manifest.json").is_file():
            build(folder)
        rows = []
        for backend, how in chosen:
            command = [sys.executable, "-m", "benchmarks.measured_memory", str(folder), "--device", options.device]
            # Freed memory goes back to the system at once, so that what is measured is what is in use.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
            done = subprocess.run(
                [*command, "--one", backend, json.dumps(how)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            rows += [{"backend": backend, **row} for row in json.loads(done.stdout.splitlines()[-1])]
        print(table(rows, on_gpu=options.device != "cpu"))


if __name__ == "__main__":
    main()
