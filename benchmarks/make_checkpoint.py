"""Write a synthetic checkpoint of a real configuration: heavy-tailed weights with outlier channels, bf16, sharded.

python benchmarks/make_checkpoint.py benchmarks/configs/wan2.1-1.3b.json /tmp/wan-1.3b
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from tqdm import tqdm

from dvdquant.model.plan import build_skeleton
from dvdquant.system.safetensors_writer import StreamingWriter

SHARD_BYTES = 5 << 30
NAME = "diffusion_pytorch_model"


POOL = (1 << 25) + 39  # a length that no row length divides


class HeavyTailed:
    """A source of weights [N, K] of variance about 1/K with the kurtosis of t(5).

    One input channel in a hundred is ten times larger. Weights are cut from one pool of random numbers at random
    places: 26 GB of fresh normal draws would take longer than the export.

    Args:
        seed: The seed of the random numbers.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        values = torch.empty(POOL).normal_(generator=self._generator)
        self._pool = values.mul_(values.abs().add_(1)).mul_(0.5).bfloat16()

    def draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return one tensor, bf16; vectors are norm gains and biases around 1.

        Args:
            shape: The shape of the tensor.
        """
        count = torch.Size(shape).numel()
        flat = torch.empty(count, dtype=torch.bfloat16)
        filled = 0
        while filled < count:
            start = int(torch.randint(0, POOL, (1,), generator=self._generator))
            part = self._pool[start : start + count - filled]
            flat[filled : filled + len(part)] = part
            filled += len(part)
        if len(shape) < 2:
            return flat.mul_(0.1).add_(1)
        matrix = flat.reshape(shape[0], -1).mul_(matrix_scale(count // shape[0]))
        matrix[:, :: max(2, matrix.shape[1] // max(1, matrix.shape[1] // 100))] *= 10
        return matrix.reshape(shape)


def matrix_scale(features: int) -> float:
    """Return 1/√K.

    Args:
        features: K, the number of input channels.
    """
    return float(features**-0.5)


def _write_hollow(path: Path, plan: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
    """Write a safetensors file of the right size that occupies only its header.

    Args:
        path: The file.
        plan: (name, dtype, shape) of each tensor; the dtype is bf16.
    """
    header, offset = {}, 0
    for name, _, shape in plan:
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--hollow", is_flag=True, help="Headers and holes only: every weight is zero. For dry runs, which read headers."
)
def main(config: Path, folder: Path, seed: int, hollow: bool) -> None:
    """Write FOLDER/config.json and FOLDER/diffusion_pytorch_model*.safetensors for CONFIG."""
    settings = json.loads(config.read_text())
    shapes = {name: tuple(p.shape) for name, p in build_skeleton(settings, torch.bfloat16).named_parameters()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    folder.mkdir(parents=True, exist_ok=True)
    weights = HeavyTailed(seed)
    weight_map: dict[str, str] = {}
    with tqdm(total=sum(2 * torch.Size(s).numel() for s in shapes.values()), unit="B", unit_scale=True) as bar:
        for index, names in enumerate(shards):
            single = len(shards) == 1
            file = f"{NAME}.safetensors" if single else f"{NAME}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            plan = [(name, torch.bfloat16, shapes[name]) for name in names]
            if hollow:
                _write_hollow(folder / file, plan)
                weight_map |= dict.fromkeys(names, file)
                continue
            with StreamingWriter(folder / file, plan, {"format": "pt"}) as writer:
                for name in names:
                    writer.write(name, weights.draw(shapes[name]))
                    bar.update(2 * torch.Size(shapes[name]).numel())
                writer.finish()
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(2 * torch.Size(s).numel() for s in shapes.values())
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        (folder / f"{NAME}.safetensors.index.json").write_text(index_text)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    main()
