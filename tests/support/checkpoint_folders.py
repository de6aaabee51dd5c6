"""Model folders of small real files, and safetensors files that are wrong on purpose."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: who writes headers alone does not wait for it
    import torch

__all__ = [
    "CONFIG",
    "INDEX",
    "SHARD1",
    "SHARD2",
    "SINGLE",
    "entry",
    "raw_safetensors",
    "save_checkpoint",
    "save_pipeline",
    "save_plain",
    "tensors",
    "write_index",
]

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
SHARD1, SHARD2 = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
CONFIG = {"_class_name": "WanTransformer3DModel", "num_layers": 2, "patch_size": [1, 2, 2]}


def tensors(count: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """``count`` small tensors in several dtypes and shapes, an odd one and a scalar included."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(8, 16), (5,), (3, 7, 2), ()]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return {
        f"blocks.{i}.weight": torch.randn(shapes[i % 4], generator=generator).to(dtypes[i % 3]) for i in range(count)
    }


def save_checkpoint(folder: Path, shards: int = 1, config: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """A transformer folder as diffusers writes it; returns its tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    content = tensors(6)
    if shards == 1:
        save_file(content, folder / "diffusion_pytorch_model.safetensors")
        return content
    weight_map = {}
    for shard in range(shards):
        name = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: value for i, (key, value) in enumerate(content.items()) if i % shards == shard}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    write_index(folder, weight_map)
    return content


def save_plain(folder: Path, shards: int = 1, config: Mapping[str, Any] | None = None) -> list[str]:
    """A transformer folder as :func:`save_checkpoint` lays it out, of one float a tensor and without torch; its names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    names = [f"blocks.{i}.weight" for i in range(6)]
    weight_map = {}
    for shard in range(shards):
        name = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        path = folder / (name if shards > 1 else "diffusion_pytorch_model.safetensors")
        part = names[shard::shards]
        header = {key: entry("F32", (1,), (4 * i, 4 * i + 4)) for i, key in enumerate(part)}
        path.write_bytes(raw_safetensors(header, bytes(range(4 * len(part)))))
        weight_map.update(dict.fromkeys(part, name))
    if shards > 1:
        write_index(folder, weight_map)
    return names


def save_pipeline(folder: Path, *components: str, **entries: Any) -> None:
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"], "transformer_9": [None, None]}
    index |= {name: ["diffusers", "WanTransformer3DModel"] for name in components} | entries
    for name in components:
        save_checkpoint(folder / name)
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))


def write_index(folder: Path, weight_map: Any) -> None:
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def raw_safetensors(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
