"""The original checkpoint in PyTorch, to put a picture beside the quantized one."""

from __future__ import annotations

import inspect
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvdquant.artifact.provenance import source_of
from dvdquant.checkpoint.locate import hub_file
from dvdquant.checkpoint.lora.recorded import with_recorded
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.checkpoint.recorded_source import was_diffusers_folder
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import CheckpointError
from dvdquant.model.plan import build_skeleton

__all__ = ["LOADING", "load_original"]

# diffusers and transformers change torch.nn.Module itself while they load (accelerate's init_empty_weights). Where two
# threads load at once, the change stays, and every later module of the process is made on the meta device.
LOADING = threading.RLock()


def load_original(
    artifact: Artifact,
    source: str | Path,
    component: str,
    device: torch.device,
    dtype: torch.dtype,
    lora: Sequence[LoraSpec] = (),
    beside: Sequence[LoraSpec] = (),
) -> nn.Module:
    """Return the transformer the export was made from, its weights cast to ``dtype``.

    LoRAs of the export are fused in fp32, as they were for it, and rounded once.

    Args:
        artifact: The export.
        source: The folder of the model.
        component: ``transformer`` or ``transformer_2``.
        device: The device to move it to.
        dtype: The dtype of its weights.
        lora: Files of the export's LoRAs that no longer lie where they were.
        beside: LoRAs of this component that the export does not have; they are fused, too.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of another configuration than the export's, or a LoRA of the
            export is missing.
    """
    checkpoint = _open(artifact, source, component)
    _check_same(artifact, checkpoint, component)
    checkpoint = with_recorded(checkpoint, artifact.manifest.lora, component, lora, beside)
    if not checkpoint.source.is_diffusers:
        return _read_model(checkpoint, dtype).to(device).eval()
    import diffusers

    # diffusers reads the folder by path: nothing in it may lead out, and the weights must be the checked ones.
    checkpoint.folder.check_tree()
    checkpoint.check_unchanged()
    try:
        with LOADING:
            model = getattr(diffusers, checkpoint.class_name).from_pretrained(
                checkpoint.root, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.root} cannot be loaded: {error!s:.500}",
            fix="draw without --mode 16 and --compare, or install a diffusers that knows the model (dvdq doctor shows yours)",
        ) from error
    checkpoint.check_unchanged()
    _fuse(model, checkpoint)
    module: nn.Module = model.to(device).eval()
    return module


@torch.no_grad()
def _fuse(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put what the checkpoint's LoRAs change into ``model``, one tensor at a time, in the dtype that it has there."""
    changed = checkpoint.lora.terms if checkpoint.lora is not None else {}
    for name, parameter in model.named_parameters():
        if name in changed:
            parameter.copy_(checkpoint.read(name).reshape(parameter.shape))


def _open(artifact: Artifact, source: str | Path, component: str) -> Checkpoint:
    """Open the transformer that the export was made from: of ``source``, or the file that the export names where it is there."""
    made_from, inside = source_of(artifact.manifest.source, component)
    is_there = hub_file(made_from) is not None or os.path.exists(os.path.expanduser(made_from))
    if is_there and not was_diffusers_folder(artifact.manifest.source):
        return open_checkpoint(made_from, component=inside, config=artifact.configs[component])
    return open_checkpoint(source, component=component)


def _read_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Return a transformer filled tensor by tensor, where diffusers cannot read what it is stored as.

    Raises:
        CheckpointError: The tensors are not those of its class.
    """
    model = build_skeleton(checkpoint.config, dtype)
    shapes = {name: tuple(placeholder.shape) for name, placeholder in model.named_parameters()}
    checkpoint.check_shapes(shapes)
    for name, placeholder in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        value = checkpoint.read(name).to(placeholder.dtype)
        checkpoint.check_finite(name, value)
        model.get_submodule(parent).register_parameter(child, nn.Parameter(value, requires_grad=False))
    return model


def _check_same(artifact: Artifact, checkpoint: Checkpoint, component: str) -> None:
    ours, theirs = _complete(artifact.configs[component]), _complete(checkpoint.config)
    if different := sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)):
        raise CheckpointError(
            f"{checkpoint.root} is another model than {artifact.root} was exported from: {', '.join(different[:5])} differ",
            available=f"exported from {artifact.manifest.source['model']}",
            fix="give that model's folder with --pipeline",
        )


def _complete(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a config as text per field, with what it leaves out filled in by the defaults of its class."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    fields = {**defaults, **{k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}}
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in fields.items()}
