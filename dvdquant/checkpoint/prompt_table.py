"""Prompts of models without a text encoder: each word is one row of a table beside the transformer.

A prompt table is two files in the folder that holds ``transformer/`` and ``scheduler/``. ``prompts.json`` has the
words, the order of the slots, and the latent shape, guidance and steps that the model was trained for.
``prompts.safetensors`` has the tensor ``words`` [len(words), text_dim]. The latents of such a model are RGB in [-1, 1],
so a clip needs no VAE.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.checkpoint.prompt_words import EMPTY_WORD, PROMPTS, PromptWords
from dvdquant.checkpoint.untrusted import UntrustedFolder, few, fix_of, reason_of
from dvdquant.errors import CheckpointError, ShapeError
from dvdquant.system.safetensors_reader import read_header_from, read_tensor_from

__all__ = [
    "EMPTY_WORD",
    "PROMPTS",
    "PromptTable",
    "frames_from_latents",
]

EMBEDDINGS = "prompts.safetensors"
MAX_EMBEDDINGS = 256 << 20
_FIX = "get the model's folder again"


@dataclass(frozen=True)
class PromptTable(PromptWords):
    """The words that a model knows, with their rows.

    Args:
        embeddings: The rows of the words [words, text_dim], of any floating dtype.
    """

    embeddings: Tensor

    @classmethod
    def open(cls, folder: str | Path) -> PromptTable:
        """Read and check both files of a prompt table.

        Args:
            folder: The folder that holds them; ``~`` is the user's home.

        Raises:
            CheckpointError: A file is missing or out of form; the error names the file and the field.
        """
        known = PromptWords.read(folder)
        table = cls(**vars(known), embeddings=_read_words(UntrustedFolder.at(known.root)))
        if len(table.words) != table.embeddings.shape[0]:
            raise CheckpointError(
                f"{table.root / EMBEDDINGS} has {table.embeddings.shape[0]} rows for the {len(table.words)} words of {PROMPTS}",
                fix="use the two files of one and the same model",
            )
        return table

    def encode(self, prompt: str | None) -> Tensor:
        """Return the text embedding [1, slots, text_dim] of a prompt.

        Args:
            prompt: The words as for :meth:`parse`. None stands for the empty word in every slot.

        Raises:
            ShapeError: The prompt is refused as in :meth:`parse`.
        """
        words = (EMPTY_WORD,) * len(self.order) if prompt is None else self.parse(prompt)
        return self.embeddings[[self.words.index(word) for word in words]][None]


def frames_from_latents(latents: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the pictures of RGB latents as uint8 [F, H, W, 3]: round(255 · clamp((x + 1) / 2, 0, 1)).

    Args:
        latents: RGB latents [1, 3, F, H, W] in [-1, 1], of any floating dtype.

    Raises:
        ShapeError: The latents have another shape.
    """
    if latents.ndim != 5 or latents.shape[:2] != (1, 3):
        raise ShapeError(f"latents {list(latents.shape)} are no RGB clip", available="[1, 3, frames, height, width]")
    unit = ((latents[0].detach().to("cpu", torch.float64) + 1) / 2).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()


def _read_words(place: UntrustedFolder) -> Tensor:
    """Return the tensor ``words`` [words, text_dim] of the table.

    Raises:
        CheckpointError: The file is missing, cannot be read, lacks the tensor, or the tensor is too large or not of
            finite floats.
        ResourceError: There is not enough memory for the tensor.
    """
    path = place.root / EMBEDDINGS
    try:
        fd = place.open(EMBEDDINGS)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", fix=_FIX) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}", fix=fix_of(error, _FIX)) from error
    try:
        header = read_header_from(fd, path)
        info = header.tensors.get("words")
        if info is None or len(info.shape) != 2:
            raise CheckpointError(f"{path} has no tensor 'words' [words, text_dim]", available=few(header.tensors))
        if info.nbytes > MAX_EMBEDDINGS:
            raise CheckpointError(f"{path}: 'words' takes {info.nbytes} bytes, more than {MAX_EMBEDDINGS}", fix=_FIX)
        tensor = read_tensor_from(fd, info, path)
    finally:
        os.close(fd)
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
        raise CheckpointError(f"{path}: tensor 'words' is not of finite floats", fix=_FIX)
    return tensor
