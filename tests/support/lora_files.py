"""LoRA files of tiny models in every key format, and folders into which the same changes were fused beforehand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint.lora.fuse import with_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.model.plan import plan_model
from dvdquant.quantize.checkpoint import quantize_checkpoint
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress

__all__ = [
    "RANK",
    "Changes",
    "blocks",
    "fused_folder",
    "low_rank",
    "packed",
    "write_flat",
    "write_original",
    "write_peft",
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
RANK = 4


@dataclass
class Changes:
    """A LoRA by the names of diffusers.

    Args:
        pairs: layer -> (A [rank, K], B [N, rank]). added: tensor -> what is added to it as it is. alpha: of every layer.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    added: dict[str, Tensor] = field(default_factory=dict)
    alpha: float = float(RANK)

    @property
    def strength(self) -> float:
        """alpha / rank."""
        return self.alpha / RANK


def blocks(folder: Path) -> list[str]:
    """The linear layers in the blocks of a model."""
    tensors = load_file(folder / WEIGHTS)
    names = (name.removesuffix(".weight") for name, value in tensors.items() if value.ndim == 2)
    return [name for name in names if "blocks." in name and not name.endswith("table")]


def low_rank(folder: Path, layers: list[str], alpha: float = float(RANK), seed: int = 1) -> Changes:
    """Random changes of rank 4 to ``layers``; of a convolution, to its flattened kernel."""
    generator, tensors = torch.Generator().manual_seed(seed), load_file(folder / WEIGHTS)
    pairs = {}
    for name in layers:
        weight = tensors[f"{name}.weight"].flatten(1)
        a = torch.randn(RANK, weight.shape[1], generator=generator) * 0.2
        pairs[name] = (a, torch.randn(weight.shape[0], RANK, generator=generator) * 0.2)
    return Changes(pairs, alpha=alpha)


def fused_folder(folder: Path, target: Path, *loras: tuple[Changes, float], dtype: torch.dtype = torch.float32) -> Path:
    """A copy of ``folder`` with ``loras`` (changes and scale) fused in fp32, one after the other, stored in ``dtype``."""
    shutil.copytree(folder, target)
    tensors = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    for changes, scale in loras:
        for name, (a, b) in changes.pairs.items():
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = weight + ((b @ a) * (scale * changes.strength)).reshape(weight.shape)
        for name, value in changes.added.items():
            tensors[name] = tensors[name] + scale * value
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, target / WEIGHTS)
    return target


def packed(folder: Path, work: Path, *loras: LoraSpec) -> dict[str, bytes]:
    """The packed weight files of an export of ``folder`` with ``loras``."""
    checkpoint = with_loras(open_checkpoint(folder), loras)
    plan = plan_model(checkpoint.config, get_recipe("weights-only"), torch.bfloat16)
    with ExportTransaction(work) as transaction:
        files = quantize_checkpoint(checkpoint, plan, transaction, Progress()).files
        return {name: (transaction.tree / name).read_bytes() for name in files}


# ---------------------------------------------------------------------------------------------------------- the formats


def write_peft(
    path: Path, changes: Changes, prefix: str = "transformer.", infix: str = "", how: str = "metadata"
) -> Path:
    """``transformer.<layer>.lora_A.weight``; alpha lies in the metadata as diffusers saves it, in ``adapter_config.json`` as
    PEFT does, or in the keys."""
    tensors = {}
    for name, (a, b) in changes.pairs.items():
        tensors |= {f"{prefix}{name}.lora_A{infix}.weight": a, f"{prefix}{name}.lora_B{infix}.weight": b}
        if how == "keys":
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(changes.alpha)
    settings = {"r": RANK, "lora_alpha": changes.alpha, "alpha_pattern": {}, "peft_type": "LORA", "use_dora": False}
    metadata = {"format": "pt"}
    if how == "metadata":
        named = {f"transformer.{name}": value for name, value in settings.items()}
        metadata["lora_adapter_metadata"] = json.dumps(named)
    if how == "file":
        path = path.with_name("adapter_model.safetensors")
        path.with_name("adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, path, metadata=metadata)
    return path


def write_original(path: Path, changes: Changes, names: Mapping[str, str], prefix: str = "diffusion_model.") -> Path:
    """``diffusion_model.<the authors' layer>.lora_down.weight``, ``.alpha``, and ``.diff*`` of what is added.

    Args:
        names: layer or tensor of diffusers -> its name here; ``:diff_b`` at its end is the kind of what is added.
    """
    tensors = {}
    for name, (a, b) in changes.pairs.items():
        layer = prefix + names[name]
        tensors |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b}
        tensors[f"{layer}.alpha"] = torch.tensor(changes.alpha)
    for name, value in changes.added.items():
        layer, _, kind = names[name].partition(":")
        tensors[f"{prefix}{layer}.{kind}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def write_flat(path: Path, changes: Changes, names: Mapping[str, str], prefix: str = "lora_unet_") -> Path:
    """``lora_unet_<layer with underscores>.lora_down.weight`` and ``.alpha``."""
    tensors = {}
    for name, (a, b) in changes.pairs.items():
        layer = prefix + names[name].replace(".", "_")
        tensors |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b}
        tensors[f"{layer}.alpha"] = torch.tensor(changes.alpha)
    save_file(tensors, path)
    return path
