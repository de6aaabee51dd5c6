"""What fusing a LoRA costs an export: wall time and peak memory, without it and with it.

    python benchmarks/make_checkpoint.py benchmarks/configs/wan2.1-1.3b.json out/wan-1.3b
    python benchmarks/lora.py out/wan-1.3b --rank 64 --target graphs --recipe weights-only

writes a random LoRA of this rank for every linear layer of the blocks, bf16, into a folder of its own, runs ``export.py`` on
CHECKPOINT twice, and removes it. Every other option goes to ``dvdq-export``. Before that it reads every tensor once, in a
process of its own, which shows the fuse alone: an export has its peak elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from dvdquant.checkpoint.opening import open_checkpoint

READ = """
import resource, sys, time
from pathlib import Path
from dvdquant.checkpoint.lora.fuse import with_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.opening import open_checkpoint

checkpoint = open_checkpoint(sys.argv[1])
largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
checkpoint.read(min(checkpoint.tensors))
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
checkpoint = with_loras(checkpoint, [LoraSpec(Path(path)) for path in sys.argv[2:]])
opened = time.perf_counter() - started
for name in checkpoint.tensors:
    checkpoint.read(name)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(f"reading alone: opened in {opened:.1f} s, all read after {time.perf_counter() - started:.1f} s, "
      f"{peak / 1024:.0f} MiB more at its peak; the largest tensor has {largest.nbytes / 2**20:.0f} MiB as stored")
"""
EXPORT = Path(__file__).with_name("export.py")


def write_lora(checkpoint: Path, path: Path, rank: int) -> int:
    """Write a LoRA with diffusers' names; return how many layers it has."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, info in open_checkpoint(checkpoint).tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(info.shape) == 2 and "blocks." in name:
            rows, features = info.shape
            for part, shape in (("A", (rank, features)), ("B", (rows, rank))):
                value = torch.randn(shape, generator=generator).mul_(0.02)
                tensors[f"transformer.{layer}.lora_{part}.weight"] = value.bfloat16()
    save_file(tensors, path)
    return len(tensors) // 2


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--rank", type=int, default=64, show_default=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(checkpoint: Path, rank: int, options: tuple[str, ...]) -> None:
    """Export CHECKPOINT with OPTIONS of dvdq-export, without a LoRA and with one."""
    with tempfile.TemporaryDirectory(prefix="dvdq-lora-", dir=checkpoint.parent) as folder:
        path = Path(folder) / "lora.safetensors"
        layers = write_lora(checkpoint, path, rank)
        for title, more in (("without", ()), (f"rank {rank}, {layers} layers", ("--lora", str(path)))):
            click.echo(f"\n{title}")
            subprocess.run([sys.executable, "-c", READ, str(checkpoint), *more[1:]], check=True)
            subprocess.run([sys.executable, str(EXPORT), str(checkpoint), *options, *more], check=True)


if __name__ == "__main__":
    main()
