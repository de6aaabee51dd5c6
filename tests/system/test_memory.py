"""Peak memory of quantization: bounded by the largest tensor, not by the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.model.plan import build_skeleton
from dvdquant.system.safetensors_writer import StreamingWriter
from tests.support.exporting import REPOSITORY

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 6,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 512,
    "freq_dim": 256,
    "ffn_dim": 4096,
    "num_layers": 7,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
    "eps": 1e-6,
}
MEASURE = """
import json, resource, sys
import dvdquant.cli.export, dvdquant.export.pipeline, diffusers, onnxruntime, torch
import dvdquant.quantize.backends.numba_search
from pathlib import Path
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.model.plan import plan_model
from dvdquant.system.progress import Progress
from dvdquant.quantize.checkpoint import quantize_checkpoint
from dvdquant.recipe import RECIPES
from dvdquant.artifact.transaction import ExportTransaction

recipe = RECIPES["weights-only"]
checkpoint = open_checkpoint(sys.argv[1])
plan = plan_model(checkpoint.config, recipe, torch.bfloat16)
quantize_weight(torch.randn(8, 64), recipe.weight)  # compiled code is part of the baseline
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
with ExportTransaction(Path(sys.argv[2])) as transaction:
    packed = quantize_checkpoint(checkpoint, plan, transaction, Progress())
    weights = sum(e["bytes"] for e in packed.files.values())
print(json.dumps({"before": before, "after": peak(), "largest": checkpoint.largest.nbytes, "total": checkpoint.nbytes,
                  "weights": weights}))
"""


def write_sharded(folder: Path, shards: int) -> None:
    """A sharded bf16 checkpoint, written without holding it; one random block is repeated."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {n: tuple(p.shape) for n, p in build_skeleton(CONFIG, torch.float32).named_parameters()}
    noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names = list(shapes)
    files = [f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    mapping = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        part = [(n, torch.bfloat16, shapes[n]) for n in names if mapping[n] == file]
        with StreamingWriter(folder / file, part) as writer:
            for name, _, shape in part:
                count = torch.Size(shape).numel()
                value = noise.repeat(-(-count // noise.numel()))[:count].reshape(shape)
                writer.write(name, value)
            writer.finish()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


@pytest.mark.slow
def test_peak_memory_follows_the_largest_tensor(tmp_path: Path) -> None:
    """A checkpoint of several times the bound: peak ≤ import baseline + 2 × largest tensor + 50 MB."""
    free = shutil.disk_usage(tmp_path).free
    if free < 2 << 30:
        pytest.skip(f"needs 2 GB of disk, {free >> 30} are free")
    model = tmp_path / "model"
    try:
        write_sharded(model, 3)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(model), str(tmp_path / "out")],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        measured = json.loads(result.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(model, ignore_errors=True)
    print(measured)
    bound = 2 * measured["largest"] + 50_000_000
    assert measured["total"] > 2 * bound, "the checkpoint is too small to show anything"
    assert measured["after"] - measured["before"] <= bound, measured
    assert measured["weights"] < 0.35 * measured["total"]
