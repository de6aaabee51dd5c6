"""Compare what ``dvdq-run --memory`` estimates with what a run takes: ``python -m benchmarks.measured_memory [FOLDER]``.

A Wan pipeline is made with random weights and parts that are large enough to be seen: a transformer of 111 million weights, a
text encoder of 222 million, and a VAE of the published size. Each arrangement draws one clip in a process of its own on the
CPU. The table has, for each stage, the estimate without what libraries and the program take, and the most of the process's
resident memory and of its own memory beyond what it had before anything was loaded. Pages of files that are mapped, such as
weights as PyTorch loads them on a CPU, are resident and not its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
MIB = 1 << 20


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
    """The most memory of this process while something runs."""

    def __init__(self) -> None:
        self.before = used_bytes()

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
        """Run ``work``, and return what it gives and the most bytes beyond those of the beginning, resident and own.

        Args:
            work: What runs.
        """
        over, seen = threading.Event(), [used_bytes()]

        def look() -> None:
            while not over.wait(0.002):
                seen.append(used_bytes())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            result = work()
        finally:
            over.set()
            thread.join()
        resident, own = (max(sizes) - before for sizes, before in zip(zip(*seen), self.before))
        return result, (resident, own)


def used_bytes() -> tuple[int, int]:
    """Return the resident pages of this process in bytes, and those of them that are not of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files, shared = (int(lines[f"Rss{name}"].split()[0]) << 10 for name in ("Anon", "File", "Shmem"))
    return anonymous + files + shared, anonymous + shared


def measure(folder: Path, backend: str, how: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw one clip, and return the estimate and the measure of each stage.

    Args:
        folder: Of :func:`build`.
        backend: ``pytorch`` or ``onnxruntime``.
        how: Arguments of :func:`open_generator` for the arrangement.
    """
    import diffusers
    import torch
    import transformers

    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
    from dvdquant.deploy.generation.memory_plan import Arrangement, arrange
    from dvdquant.deploy.generation.needs import run_bytes

    # What is imported when a part is loaded is the program's, not the run's.
    _ = diffusers.WanPipeline, diffusers.AutoencoderKLWan, transformers.UMT5EncoderModel
    torch.randn(256, 256) @ torch.randn(256, 256)
    with open_generator(
        Artifact.open(folder / "out"), pipeline=folder / "pipeline", backend=backend, device="cpu", **how
    ) as generator:
        request = generator.check(GenerateRequest(PROMPT, mode="a8", **CLIP))
        run = run_bytes(generator.checker, [request], backend, 0, narrow=False)
        fields = {name: value for name, value in how.items() if name != "text_encoder_bits"}
        arrangement = Arrangement(next(iter(run.transformer)), text_bits=how.get("text_encoder_bits", 16), **fields)
        plan = arrange(run, arrangement)
        watch = Watch()

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


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown.

    Args:
        rows: The stages of every arrangement.
    """
    lines = ["| backend | arrangement | while | estimated, MiB | resident, MiB | of it own, MiB |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for row in rows:
        figures = " | ".join(f"{size / MIB:.0f}" for size in row["bytes"])
        lines.append(f"| {row['backend']} | {row['how']} | {row['stage']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Build what is not there, and measure every arrangement in a process of its own."""
    if "--one" in sys.argv:
        built, session, given = sys.argv[sys.argv.index("--one") + 1 :]
        print(json.dumps(measure(Path(built), session, json.loads(given))))
        return
    with tempfile.TemporaryDirectory(prefix="dvdquant-memory-", dir="/var/tmp") as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        if not (folder / "out" / "manifest.json").is_file():
            build(folder)
        rows = []
        for backend, how in ARRANGEMENTS:
            command = [sys.executable, "-m", "benchmarks.measured_memory", "--one", str(folder), backend]
            # Freed memory goes back to the system at once, so that what is measured is what is in use.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
            done = subprocess.run(
                [*command, json.dumps(how)], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            rows += [{"backend": backend, **row} for row in json.loads(done.stdout.splitlines()[-1])]
        print(table(rows))


if __name__ == "__main__":
    main()
