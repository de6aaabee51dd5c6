"""What a family of transformers is called by others: a scheme of names, and the config that its shapes tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dvdquant.checkpoint.formats.names import Names
from dvdquant.checkpoint.formats.shapes import Shapes

__all__ = ["Piece", "Scheme"]


@dataclass(frozen=True)
class Piece:
    """A tensor of diffusers made of a tensor of a file.

    Args:
        name: Its name in diffusers.
        rows: The rows that it is, None for all.
        swapped: Whether its halves change places.
    """

    name: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


@dataclass(frozen=True)
class Scheme:
    """One family.

    Args:
        title: The family in words.
        class_name: Its class in diffusers.
        original: A name that only its authors' files have.
        diffusers: One that only those of diffusers have.
        unsupported: (Names that only a relative has, what that relative is), for the authors' names.
        names: The names of its modules.
        pieces: The authors' shapes by name -> what each tensor becomes, by name. Unknown names stay as they are.
        config: Shapes by diffusers' names and what is known besides -> (diffusers' config, what had to be assumed in words).
    """

    title: str
    class_name: str
    original: re.Pattern[str]
    diffusers: re.Pattern[str]
    unsupported: tuple[tuple[re.Pattern[str], str], ...]
    names: Names
    pieces: Callable[[Mapping[str, tuple[int, ...]]], dict[str, list[Piece]]]
    config: Callable[[Shapes, Mapping[str, Any]], tuple[dict[str, Any], list[str]]]

    def has_original(self, names: Iterable[str]) -> bool:
        """Return whether these are the names that the authors gave.

        Args:
            names: The names of the tensors.
        """
        return any(map(self.original.search, names))

    def has_diffusers(self, names: Iterable[str]) -> bool:
        """Return whether these are the names of diffusers.

        Args:
            names: The names of the tensors.
        """
        return any(map(self.diffusers.search, names))

    def relative(self, names: Iterable[str]) -> str | None:
        """Return what relative of the family has one of these names, or None.

        Args:
            names: The names of the tensors.
        """
        listed = list(names)
        return next((what for pattern, what in self.unsupported if any(map(pattern.search, listed))), None)
