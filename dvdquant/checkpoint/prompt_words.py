"""The words of a model without a text encoder, as prompts.json beside its transformer lists them.

Nothing here imports torch: a server checks a prompt without it. The rows of the words are in
:mod:`dvdquant.checkpoint.prompt_table`.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvdquant.checkpoint.untrusted import MAX_JSON, UntrustedFolder
from dvdquant.errors import CheckpointError, ShapeError
from dvdquant.text import shown

__all__ = ["EMPTY_WORD", "PROMPTS", "PromptWords"]

PROMPTS, EMPTY_WORD = "prompts.json", "<none>"
MAX_WORDS, MAX_WORD, MAX_SLOTS, MAX_STEPS = 65536, 80, 512, 1000
MAX_LATENT = 1 << 28
"""Values of a latent clip: 81 frames of 720p RGB have 224 million."""
_FIX = "get the model's folder again"


@dataclass(frozen=True)
class PromptWords:
    """The words that a model knows, and what else a clip of it needs.

    Args:
        root: The folder of the table.
        words: The words, in the order of the rows of the embeddings.
        order: The name of each slot of a prompt.
        choices: Slot name -> the words that may stand there. It is empty if prompts.json does not say; then the user is
            responsible for the order of the words.
        latent: The size of a clip in latents: (channels, frames, height, width).
        guidance_scale: The guidance scale that the model was trained and scored with.
        steps: The number of denoising steps that the model was trained and scored with.
    """

    root: Path
    words: tuple[str, ...]
    order: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    latent: tuple[int, int, int, int]
    guidance_scale: float
    steps: int

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
    def read(cls, folder: str | Path) -> PromptWords:
        """Read and check the words of a prompt table, without their rows.

        Args:
            folder: The folder that holds the table; ``~`` is the user's home.

        Raises:
            CheckpointError: The file is missing or out of form; the error names the file and the field.
        """
        root = Path(os.path.expanduser(folder))
        data = _read_json(UntrustedFolder.at(root), PROMPTS)
        try:
            return _parse(root, data)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{root / PROMPTS} cannot be used: {reason}", fix="get the model again") from error

    def parse(self, prompt: str) -> tuple[str, ...]:
        """Return the words of ``prompt`` in the order of the slots.

        If ``choices`` are known, the words of the prompt may be in any order.

        Args:
            prompt: The words, separated by spaces or commas, in any case.

        Raises:
            ShapeError: A word is unknown (the error names the likely one), there are too few or too many words, or two
                words are for one slot.
        """
        if not isinstance(prompt, str):
            raise ShapeError(
                f"the prompt is a {type(prompt).__name__}", available="words", fix="give the prompt as text"
            )
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


def _parse(root: Path, data: dict[str, Any]) -> PromptWords:
    """Build the words from the content of prompts.json.

    Args:
        root: The folder of the table.
        data: The content of prompts.json.

    Raises:
        KeyError: A field is missing.
        ValueError: A field is out of form.
    """
    words = _names(data, "words", MAX_WORDS)
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
    return PromptWords(root, words, order, slots, size, float(guidance), steps)


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
