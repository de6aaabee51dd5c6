"""Text embeddings in a file: what a text encoder makes of prompts, so that clips can be drawn where it has no room.

A safetensors file with a tensor for every argument of the pipeline's call, ``0.prompt_embeds`` and so on, one number a
prompt. Its metadata says the prompts, the family, and whether there are embeddings for guidance. The file may come from
anybody: it is read under limits, its record is validated, and every tensor has to be what the export takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvdquant.deploy.generation.request import DISTILLED, MAX_PROMPT, GenerateRequest
from dvdquant.errors import CheckpointError, ShapeError
from dvdquant.model.families import Family, Sizes
from dvdquant.system.files import open_regular, strict_json
from dvdquant.system.safetensors_reader import Header, read_header_from, read_tensor_from
from dvdquant.system.safetensors_writer import PAD, StreamingWriter
from dvdquant.system.whole_file import atomic_path
from dvdquant.text import json_text, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TextEmbeds", "load_text_embeds", "save_text_embeds"]

FORMAT: Literal["dvdquant text embeddings 1"] = "dvdquant text embeddings 1"
MAX_BYTES = 4 << 30  # 256 prompts of the longest text take 2 GB
MAX_PROMPTS = 256
_KEY = "dvdquant"
_FIX = "save it again with the same export: dvdq-run OUT --save-text-embeds FILE"
# Argument of the pipeline's call -> input of the transformer.
_INPUTS = {
    "prompt_embeds": "encoder_hidden_states",
    "prompt_attention_mask": "encoder_attention_mask",
    "pooled_prompt_embeds": "pooled_projections",
    "negative_prompt_embeds": "encoder_hidden_states",
    "negative_prompt_attention_mask": "encoder_attention_mask",
}
_NEGATIVE = "negative_"

_Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]


class _Record(BaseModel):
    """The metadata of a file.

    Attributes:
        format: The format and its version.
        family: The family of the model.
        prompts: The prompts, in the order of their numbers.
        negative_prompt: What guidance leads away from; None for the model's own.
        guided: Whether every prompt has embeddings for guidance.
        image: SHA-256 of the image that the text encoder saw; None if it saw none.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["dvdquant text embeddings 1"]
    family: Annotated[str, Field(max_length=80)]
    prompts: Annotated[list[_Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None
    guided: bool
    image: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


@dataclass(frozen=True)
class TextEmbeds:
    """The embeddings of some prompts.

    Args:
        name: The file, for errors.
        family: The family of the model.
        prompts: The prompts.
        negative_prompt: What guidance leads away from; None for the model's own.
        guided: Whether there are embeddings for guidance.
        image: SHA-256 of the image that the text encoder saw; None if it saw none.
        tensors: Of every prompt, by the names of the arguments of the pipeline's call.
    """

    name: str
    family: str
    prompts: tuple[str, ...]
    negative_prompt: str | None
    guided: bool
    image: str | None
    tensors: tuple[Mapping[str, Tensor], ...]

    def check(self, request: GenerateRequest, image: str | None) -> None:
        """Refuse a request whose text is not in the file.

        Args:
            request: The request, with its guidance filled in.
            image: SHA-256 of its image; None if it has none.

        Raises:
            ShapeError: The prompt, the negative prompt, the guidance or the image is another one.
        """
        where = shown(self.name, 300)
        if request.prompt not in self.prompts:
            raise ShapeError(
                f"{where} has no embedding of {shown(request.prompt, 80)!r}",
                available=[shown(prompt, 80) for prompt in self.prompts[:8]],
                fix="leave --prompt out, or save the embeddings of this one",
            )
        if request.negative_prompt is not None and request.negative_prompt != self.negative_prompt:
            raise ShapeError(f"{where} was saved with another negative prompt", fix="leave --negative-prompt out")
        if not self.guided and request.guided and self.family not in DISTILLED:
            raise ShapeError(
                f"{where} was saved without guidance, and this clip has guidance {request.guidance:g}",
                fix="save it again with that --guidance, or draw with --guidance 1",
            )
        if self.image is not None and self.image != image:
            raise ShapeError(
                f"the text encoder saw another image when {where} was saved",
                fix="give that image, or save the embeddings again with this one",
            )

    def of(self, request: GenerateRequest) -> dict[str, Tensor]:
        """Return the embeddings of a checked request.

        Args:
            request: The request.
        """
        held = self.tensors[self.prompts.index(request.prompt)]
        return {name: tensor for name, tensor in held.items() if request.guided or not name.startswith(_NEGATIVE)}


def save_text_embeds(
    path: Path,
    family: Family,
    requests: Sequence[GenerateRequest],
    made: Sequence[Mapping[str, Tensor]],
    image: str | None,
) -> None:
    """Write the embeddings of some requests, whole or not at all.

    Args:
        path: The file.
        family: The family of the model.
        requests: The requests, which differ in their prompts alone.
        made: The embeddings of each.
        image: SHA-256 of the image that the text encoder saw; None if it saw none.

    Raises:
        OutputError: It cannot be written.
        ResourceError: The disk is full.
    """
    record = {
        "format": FORMAT,
        "family": family.name,
        "prompts": [request.prompt for request in requests],
        "negative_prompt": requests[0].negative_prompt,
        "guided": all(any(name.startswith(_NEGATIVE) for name in tensors) for tensors in made),
        "image": image,
    }
    tensors = {
        f"{index}.{name}": tensor.detach().cpu() for index, held in enumerate(made) for name, tensor in held.items()
    }
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with atomic_path(path) as partial, StreamingWriter(partial, layout, {_KEY: json_text(record)}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.contiguous())
        writer.finish()


def load_text_embeds(path: Path, family: Family, sizes: Sizes) -> TextEmbeds:
    """Read and check a file of text embeddings.

    Args:
        path: The file.
        family: The family of the export's model.
        sizes: The sizes of the export.

    Raises:
        CheckpointError: It is no such file, damaged, or for another model or text length.
    """
    name = shown(path, 300)
    try:
        fd, size = open_regular(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--text-embeds {name} cannot be read: {getattr(error, 'strerror', None) or error}", fix=_FIX
        ) from error
    try:
        if size > MAX_BYTES:
            raise CheckpointError(f"--text-embeds {name} has {size} bytes", available=f"up to {MAX_BYTES}", fix=_FIX)
        header = read_header_from(fd, path)
        record = _record(header, name)
        if record.family != family.name:
            raise CheckpointError(
                f"--text-embeds {name} is of a {shown(record.family)} model, and the export of family {family.name}",
                fix=_FIX,
            )
        held = [_read(fd, path, header, index, record, family, sizes) for index in range(len(record.prompts))]
        known = {f"{index}.{name}" for index, tensors in enumerate(held) for name in tensors}
        if extra := sorted(name for name in header.tensors if name not in known and not name.startswith(PAD)):
            raise CheckpointError(f"--text-embeds {name} holds an unknown tensor {shown(extra[0])}", fix=_FIX)
    finally:
        os.close(fd)
    return TextEmbeds(
        str(path),
        record.family,
        tuple(record.prompts),
        record.negative_prompt,
        record.guided,
        record.image,
        tuple(held),
    )


def _record(header: Header, name: str) -> _Record:
    raw = header.metadata.get(_KEY)
    if raw is None:
        raise CheckpointError(f"--text-embeds {name} is no file of text embeddings", fix=_FIX)
    try:
        return _Record.model_validate(strict_json(raw.encode()))
    except ValueError as error:
        first = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(
            f"--text-embeds {name} has a record that cannot be used: {first:.200}", fix=_FIX
        ) from error


def _read(
    fd: int, path: Path, header: Header, index: int, record: _Record, family: Family, sizes: Sizes
) -> dict[str, Tensor]:
    """Return the tensors of one prompt, each of the shape that the transformer takes, and finite."""
    import torch

    specs = {spec.name: spec for spec in family.inputs(sizes)}
    found = {}
    for argument, taken in _INPUTS.items():
        if taken not in specs or (argument.startswith(_NEGATIVE) and not record.guided):
            continue
        if family.name in DISTILLED and argument.startswith(_NEGATIVE):
            continue
        key = f"{index}.{argument}"
        info = header.tensors.get(key)
        wanted = (1, *(size for size in specs[taken].shape[1:] if isinstance(size, int)))
        what = f"--text-embeds {shown(path, 300)}: {key}"
        if info is None:
            raise CheckpointError(
                f"{what} is missing", available=[shown(n) for n in list(header.tensors)[:12]], fix=_FIX
            )
        if tuple(info.shape) != wanted:
            raise CheckpointError(
                f"{what} has shape {list(info.shape)}, and this export takes {list(wanted)}",
                fix=f"save it with this export, or export again with --text-tokens {info.shape[1]}"
                if len(info.shape) == len(wanted) > 2 and info.shape[2:] == wanted[2:]
                else _FIX,
            )
        tensor = read_tensor_from(fd, info, path)
        mask = specs[taken].kind == "mask"
        good = bool(((tensor == 0) | (tensor == 1)).all()) if mask else tensor.is_floating_point()
        if not good or not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"{what} is {'no mask of zeros and ones' if mask else f'{info.dtype} with NaN, infinities or no floats'}",
                fix=_FIX,
            )
        found[argument] = tensor
    return found
