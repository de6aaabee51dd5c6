"""Keep tensors of a checkpoint in memory between the stages of an export that need them, as far as memory allows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dvdquant.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ReadOnce"]


@dataclass
class _Held:
    """The tensors that are held, and their bytes together."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(frozen=True)
class ReadOnce(Checkpoint):
    """A checkpoint whose tensors are held after their first read, first come first served, up to a number of bytes.

    The stages read the tensors in much the same order, so what came first is as good a choice as any, and dropping one
    for another would only lead to more reads. Nobody may write into a tensor that :meth:`read` returned.

    Args:
        budget: The number of bytes that may be held. What does not fit is read from the disk each time.
    """

    budget: int = 0
    _held: _Held = field(default_factory=_Held, repr=False, compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, budget: int) -> ReadOnce:
        """Return ``checkpoint`` with room for some bytes of its tensors; nothing is read yet.

        Args:
            checkpoint: The checkpoint that tensors are read from.
            budget: The number of bytes that may be held.
        """
        fields = {item.name: getattr(checkpoint, item.name) for item in dataclasses.fields(Checkpoint)}
        return cls(**fields, budget=budget)

    @property
    def held_bytes(self) -> int:
        """Return the number of bytes that are held now."""
        return self._held.nbytes

    def read(self, name: str) -> Tensor:
        """Return one tensor as :meth:`Checkpoint.read` does, from memory where it was read before.

        Args:
            name: The name of the tensor.

        Raises:
            CheckpointError: The tensor is absent or unreadable, see :meth:`Checkpoint.read`.
        """
        import torch

        held = self._held
        if name in held.tensors:
            return held.tensors[name]
        with torch.inference_mode(False):  # a tensor of inference mode cannot be used outside of it
            tensor = super().read(name)
        if tensor.nbytes <= self.budget - self.held_bytes:
            held.tensors[name] = tensor
            held.nbytes += tensor.nbytes
        return tensor

    def forget(self) -> None:
        """Give back all that is held; what is read later is held again."""
        self._held.tensors.clear()
        self._held.nbytes = 0
