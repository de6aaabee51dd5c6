"""Shapes of tensors by their names in diffusers, as the source of a config: what is missing or odd is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dvdquant.errors import CheckpointError
from dvdquant.system.records import first_problem
from dvdquant.text import shown

__all__ = ["NEED_CONFIG", "Shapes", "count_blocks", "known_fields"]

NEED_CONFIG = "give the config.json of the same model in diffusers format with --config FILE"
MOST_BLOCKS = 10_000


class Shapes:
    """The shapes of a checkpoint.

    Args:
        shapes: The shape of each tensor, by its name in the file.
        place: The file, for errors.
        what: The model that the tensors should be of, for errors.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], place: str, what: str) -> None:
        self._shapes, self.place, self.what = shapes, place, what

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor that must have ``axes`` axes.

        Args:
            name: The name of the tensor.
            axes: The number of its axes.

        Raises:
            CheckpointError: It is missing, or has another number of axes, or none of its elements.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.place} holds {self.what} and lacks its {name!r}", fix="download the file again"
            )
        if len(shape) != axes or not all(shape):
            raise CheckpointError(
                f"{self.place}: {name!r} is {shown(list(shape), 80)}, and in {self.what} it has {axes} axes",
                fix="download the file again",
            )
        return shape

    def blocks(self, stack: str) -> int:
        """Return the number of blocks ``stack.0`` to ``stack.N``.

        Args:
            stack: The name of the list of blocks.

        Raises:
            CheckpointError: One of them is missing.
        """
        return count_blocks(self._shapes, stack, self.place)


def count_blocks(names: Mapping[str, object], stack: str, place: str) -> int:
    """Return the number of blocks of a stack.

    Args:
        names: The tensors by name.
        stack: The name of the list of blocks.
        place: The path of the file, for the error.

    Raises:
        CheckpointError: A block is missing, or there are too many.
    """
    pattern = re.compile(re.escape(stack) + r"\.(0|[1-9][0-9]{0,4})\.")
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    if len(found) > MOST_BLOCKS or (found and max(found) != len(found) - 1):
        missing = next(i for i in range(len(found) + 1) if i not in found)
        raise CheckpointError(f"{place} lacks {stack}.{missing}", fix="download the file again")
    return len(found)


Record = TypeVar("Record", bound=BaseModel)


def known_fields(record: type[Record], config: Mapping[str, Any], place: str) -> Record:
    """Return the fields of an authors' config that a record has.

    Args:
        record: The class of the record.
        config: The config as it was read.
        place: The path of the file, for the error.

    Raises:
        CheckpointError: One is of another type or out of bounds.
    """
    try:
        return record.model_validate(dict(config))
    except ValidationError as error:
        problem = first_problem(error, dict(config))
        raise CheckpointError(
            f"{place}: {shown(problem.field)} of its config {problem.state}", available=problem.allowed, fix=NEED_CONFIG
        ) from error
