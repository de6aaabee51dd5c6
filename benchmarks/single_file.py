"""What an export takes from a single file in fp8 with scales, beside the same weights as a diffusers folder in bf16.

    python benchmarks/single_file.py benchmarks/configs/wan2.1-14b.json /var/tmp/wan-14b --limit-gib 8
    python benchmarks/single_file.py benchmarks/configs/wan2.1-14b.json /var/tmp/wan-2 --layers 2 --recipe weights-only

writes the file below the folder, runs benchmarks/export.py on it, removes it, and does the same with a folder of the same
weights: 28 GB of the 14B at a time, and the export. The file has the names that its authors gave and ComfyUI's prefix.
``--lora-rank 64`` also fuses a random LoRA of that rank on every linear layer of the blocks into both. Further options go to
``dvdq-export``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lora import write_lora
from benchmarks.make_checkpoint import HeavyTailed
from dvdquant.checkpoint.formats.wan import NAMES
from dvdquant.model.plan import build_skeleton

HERE = Path(__file__).parent
PREFIX = "model.diffusion_model."


def authors_name(name: str) -> str:
    """Return the name that Wan's authors gave a tensor of diffusers."""
    module, _, parameter = name.rpartition(".")
    table = next(NAMES.theirs(name), None)
    return table if table is not None else f"{next(NAMES.theirs(module), module)}.{parameter}"


def write_scaled(config: Path, file: Path) -> None:
    """Write the weights that make_checkpoint.py draws as a single file: the linear layers of blocks in fp8, one scale each."""
    skeleton = build_skeleton(json.loads(config.read_text()), torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    plan: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    names = {name: PREFIX + authors_name(name) for name in shapes}
    scaled = {name for name, shape in shapes.items() if name.startswith("blocks.") and is_matrix(name, shape)}
    for name, shape in shapes.items():
        plan.append((names[name], torch.float8_e4m3fn if name in scaled else torch.bfloat16, shape))
        if name in scaled:
            plan.append((names[name].replace(".weight", ".scale_weight"), torch.float32, (1,)))
    weights = HeavyTailed(0)
    with file.open("wb") as output:
        output.write(header(plan))
        for name, shape in shapes.items():
            value = weights.draw(shape)
            if name in scaled:
                scale = value.abs().max().float().reshape(1) / 448
                value = (value.float() / scale).to(torch.float8_e4m3fn)
            output.write(value.contiguous().view(torch.uint8).numpy().data)
            if name in scaled:
                output.write(scale.numpy().data)


def header(plan: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return the header of a safetensors file without padding between tensors, as other programs write it."""
    codes = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    entries, offset = {}, 0
    for name, dtype, shape in plan:
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer."""
    return name.endswith(".weight") and len(shape) == 2


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=int, help="Blocks, fewer than the configuration has.")
@click.option("--lora-rank", type=int, help="Fuse a LoRA of this rank, too.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(config: Path, folder: Path, layers: int | None, lora_rank: int | None, options: tuple[str, ...]) -> None:
    """Write the checkpoint of CONFIG into FOLDER in both forms, export each, and print what each took."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(config.read_text())
    settings["num_layers"] = layers or settings["num_layers"]
    own, lora = folder / "config.json", folder / "lora.safetensors"
    own.write_text(json.dumps(settings))
    plain, file = folder / "bf16", folder / "fp8" / "wan_fp8_scaled.safetensors"
    if lora_rank is not None:
        options = (*options, "--lora", str(lora))
    for model in (file, plain):
        if model == file:
            file.parent.mkdir(exist_ok=True)
            write_scaled(own, file)
        else:
            subprocess.run([sys.executable, HERE / "make_checkpoint.py", own, plain], check=True)
        if lora_rank is not None:
            write_lora(model, lora, lora_rank)
        command = [sys.executable, HERE / "export.py", model, "--target", "graphs", *options]
        try:
            subprocess.run([str(word) for word in command], check=True)
        finally:
            shutil.rmtree(plain if model == plain else file.parent)


if __name__ == "__main__":
    main()
