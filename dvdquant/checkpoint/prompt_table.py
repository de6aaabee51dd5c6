"""Prompts of models without a text encoder: each word is one row of a table beside the transformer.

A prompt table is two files in the folder that holds ``transformer/`` and ``scheduler/``. ``prompts.json`` has the
words, the order of the slots, and the latent shape, guidance and steps that the model was trained for.
``prompts.safetensors`` has the tensor ``words`` [len(words), text_dim]. The latents of such a model are RGB in [-1, 1],
so a clip needs no VAE.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.checkpoint.untrusted import UntrustedFolder, few, fix_of, reason_of
from dvdquant.errors import CheckpointError, ShapeError
from dvdquant.system.safetensors_io import read_header_from, read_tensor_from
from dvdquant.text import shown

__all__ = [
    "EMPTY_WORD",
    "PROMPTS",
    "PromptTable",
    "frames_from_latents",
]

PROMPTS, EMBEDDINGS, EMPTY_WORD = "prompts.json", "prompts.safetensors", "<none>"
MAX_JSON = 1 << 20
MAX_WORDS, MAX_WORD, MAX_SLOTS, MAX_STEPS = 65536, 80, 512, 1000
MAX_EMBEDDINGS = 256 << 20
MAX_LATENT = 1 << 28
"""Values of a latent clip: 81 frames of 720p RGB have 224 million."""
_FIX = "get the model's folder again"


@dataclass(frozen=True)
class PromptTable:
    """The words that a model knows, and what else a clip of it needs.

    Args:
        root: The folder of the table.
        words: The words, in the order of the rows of ``embeddings``.
        order: The name of each slot of a prompt.
        choices: Slot name -> the words that may stand there. It is empty if prompts.json does not say; then the user is
            responsible for the order of the words.
        latent: The size of a clip in latents: (channels, frames, height, width).
        guidance_scale: The guidance scale that the model was trained and scored with.
        steps: The number of denoising steps that the model was trained and scored with.
        embeddings: The rows of the words [words, text_dim], of any floating dtype.
    """

    root: Path
    words: tuple[str, ...]
    order: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    latent: tuple[int, int, int, int]
    guidance_scale: float
    steps: int
    embeddings: Tensor

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Return whether ``folder`` is local and holds a prompt table.

        Args:
            folder: A path or a hub id; ``~`` is the user's home.
        """
        try:
            return (Path(os.path.expanduser(folder)) / PROMPTS).is_file()
        except (OSError, ValueError, RuntimeError):
            return False  # no file can have this name, or the folder may not be entered; open() says so

    @classmethod
    def open(cls, folder: str | Path) -> PromptTable:
        """Read and check both files of a prompt table.

        Args:
            folder: The folder that holds them; ``~`` is the user's home.

        Raises:
            CheckpointError: A file is missing or out of form; the error names the file and the field.
        """
        root = Path(os.path.expanduser(folder))
        place = UntrustedFolder.at(root)
        data = _read_json(place, PROMPTS)
        try:
            words = _names(data, "words", MAX_WORDS)
            table = _parse(root, data, words, _read_words(place))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{root / PROMPTS} cannot be used: {reason}", fix="get the model again") from error
        if len(table.words) != table.embeddings.shape[0]:
            raise CheckpointError(
                f"{root / EMBEDDINGS} has {table.embeddings.shape[0]} rows for the {len(table.words)} words of {PROMPTS}",
                fix="use the two files of one and the same model",
            )
        return table

    def parse(self, prompt: str) -> tuple[str, ...]:
        """Return the words of ``prompt`` in the order of the slots.

        If ``choices`` are known, the words of the prompt may be in any order.

        Args:
            prompt: The words, separated by spaces or commas, in any case.

        Raises:
            ShapeError: A word is unknown (the error names the likely one), there are too few or too many words, or two
                words are for one slot.
        """
        words, known = prompt.replace(",", " ").split(), frozenset(self.known)
        for word in words:
            if word.lower() not in known:
                raise self._unknown(word)
        words = [word.lower() for word in words]
        if len(words) != len(self.order):
            raise ShapeError(
                f"prompt {prompt!r:.200} has {len(words)} words and this model takes {len(self.order)}: "
                + shown(", ".join(self.order), 1000),
                available=self.describe(),
                fix=f'one word for each, like "{shown(self.example(), 1000)}"',
            )
        return self._by_slot(prompt, words) if self.choices else tuple(words)

    def encode(self, prompt: str | None) -> Tensor:
        """Return the text embedding [1, slots, text_dim] of a prompt.

        Args:
            prompt: The words as for :meth:`parse`. None stands for the empty word in every slot.

        Raises:
            ShapeError: The prompt is refused as in :meth:`parse`.
        """
        words = (EMPTY_WORD,) * len(self.order) if prompt is None else self.parse(prompt)
        return self.embeddings[[self.words.index(word) for word in words]][None]

    @property
    def known(self) -> tuple[str, ...]:
        """Return the words that a prompt may hold."""
        return tuple(word for word in self.words if word != EMPTY_WORD)

    def describe(self) -> str:
        """Return the words by slot, in one line of at most 2000 characters."""
        if not self.choices:
            return shown(", ".join(self.known), 2000)
        return shown("; ".join(f"{slot}: {' '.join(self.choices[slot])}" for slot in self.order), 2000)

    def example(self) -> str:
        """Return a prompt that the model takes."""
        known = self.known
        return " ".join(
            self.choices[slot][-1] if self.choices else known[i % len(known)] for i, slot in enumerate(self.order)
        )

    def _unknown(self, word: str) -> ShapeError:
        """Return the error for a word that the model does not know, with the likely word."""
        near = difflib.get_close_matches(word.lower()[:80], [k for k in self.known if len(k) <= 80][:5000], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return ShapeError(
            f"the model does not know the word {word!r:.80}{hint}",
            available=self.describe(),
            fix=f'one word for each of {shown(", ".join(self.order), 1000)}, like "{shown(self.example(), 1000)}"',
        )

    def _by_slot(self, prompt: str, words: list[str]) -> tuple[str, ...]:
        """Return the words in the order of the slots, by ``choices``.

        Args:
            prompt: The prompt as given, for errors.
            words: Its words in lower case.

        Raises:
            ShapeError: A slot has no word or several.
        """
        chosen = {slot: [word for word in words if word in self.choices[slot]] for slot in self.order}
        for slot, found in chosen.items():
            if len(found) != 1:
                count = f"two words for {slot} ({shown(' and '.join(found))})" if found else f"no word for {slot}"
                raise ShapeError(
                    f"prompt {prompt!r:.200} has {count}",
                    available=shown(f"{slot}: {' '.join(self.choices[slot])}", 2000),
                    fix=f'one word for each, like "{shown(self.example(), 1000)}"',
                )
        return tuple(chosen[slot][0] for slot in self.order)


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


def _read_json(place: UntrustedFolder, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the table.

    Raises:
        CheckpointError: The file is missing or cannot be used.
    """
    folder = place.root / name.rpartition("/")[0]
    if not place.has(name) and not os.path.lexists(place.root / name):
        there = UntrustedFolder(folder if os.path.isdir(folder) else place.root, place.allowed)
        raise CheckpointError(f"{place.root / name} is missing", available=there.listing(), fix=_FIX)
    return place.json(name, MAX_JSON, fix=_FIX)


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


def _parse(root: Path, data: dict[str, Any], words: tuple[str, ...], embeddings: Tensor) -> PromptTable:
    """Build the table from the content of its files.

    Args:
        root: The folder of the table.
        data: The content of prompts.json.
        words: The words in it.
        embeddings: The rows of the words [words, text_dim].

    Raises:
        KeyError: A field is missing.
        ValueError: A field is out of form.
    """
    order = _names(data, "order", MAX_SLOTS)
    if set(words) == {EMPTY_WORD}:
        raise ValueError("words holds nothing but the empty word")
    if EMPTY_WORD not in words:
        raise ValueError(f"words lacks {EMPTY_WORD!r}, the empty word of the unconditional branch")
    if data.get("tokens_per_prompt", len(order)) != len(order):
        raise ValueError(f"tokens_per_prompt is {data['tokens_per_prompt']!r:.40}, order names {len(order)}")
    choices = data.get("choices", {})
    if not isinstance(choices, dict) or (choices and choices.keys() != set(order)):
        raise ValueError("choices does not name the slots of order")
    slots = {slot: _names(choices, slot, MAX_WORDS) for slot in choices}
    if slots and sorted(w for group in slots.values() for w in group) != sorted(set(words) - {EMPTY_WORD}):
        raise ValueError("choices does not hold every word once")
    latent = data["latent"]
    sized = isinstance(latent, list) and len(latent) == 4 and all(type(n) is int and 0 < n < 1 << 16 for n in latent)
    if not sized or latent[0] != 3:
        raise ValueError(f"latent is {latent!r:.80}, not [3, frames, height, width]")
    if math.prod(latent) > MAX_LATENT:
        raise ValueError(f"latent {latent!r:.80} has {math.prod(latent)} values, more than {MAX_LATENT}")
    guidance, steps = data["guidance_scale"], data["steps"]
    if type(guidance) not in (int, float) or not 0 <= guidance <= 1000:
        raise ValueError(f"guidance_scale is {guidance!r:.40}")
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps!r:.40}")
    size = (latent[0], latent[1], latent[2], latent[3])
    return PromptTable(root, words, order, slots, size, float(guidance), steps, embeddings)


def _names(data: Mapping[str, Any], field: str, most: int) -> tuple[str, ...]:
    """Return a field that is a list of different words.

    Args:
        data: The fields.
        field: The name of the field.
        most: The greatest number of words.

    Raises:
        KeyError: The field is missing.
        ValueError: It is no list of 1 to ``most`` different words of at most ``MAX_WORD`` characters.
    """
    value = data[field]
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise ValueError(f"{field:.80} is no list of 1 to {most} words")
    if not all(isinstance(word, str) and word and not word.isspace() for word in value) or len(set(value)) < len(value):
        raise ValueError(f"{field:.80} holds something that is no word, or a word twice")
    if long := next((word for word in value if len(word) > MAX_WORD), None):
        raise ValueError(f"{field:.80} holds {long!r:.40}…, longer than {MAX_WORD} characters")
    return tuple(value)
