"""Linear layers that receive the very same tensor (q/k/v of one parent), merged so that x is rotated and quantized once.

The merged layer is called after its members: ``attn1.to_q+to_k+to_v``.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.model.layers import QuantLinear
from dvdquant.system.torch_hooks import tensor_version

__all__ = ["MergedMember", "SharedInput"]


class SharedInput:
    """The shared state of the members of a merged layer: it runs the layer at the first call and keeps the other rows.

    A new call runs if a member is called with another tensor than the last one, with that tensor changed in place, or
    after a switch of the activation bits. So results are right for every order of calls, and only the saving depends on
    the members being called one after the other. Threads that call the members at the same time, each with its own
    tensor, run the layer more often; none gets another's rows.

    Args:
        layer: The merged layer.
    """

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer
        self.input: Tensor | None = None
        self.state: tuple[int, int, int] | None = None
        self.pending: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that a copy of the model needs: the layer alone.

        A copy waits for rows of its own, and has its own lock.
        """
        return {"layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layer"])  # type: ignore[misc]

    def take(self, index: int, x: Tensor) -> Tensor:
        """Return the rows of one member, [..., rows of the member].

        Args:
            index: The number of the member.
            x: The input [..., K], floating point.
        """
        if torch.compiler.is_compiling():  # a trace has one thread, and a lock cannot be traced
            part = self._kept(index, x, self._state(x))
            return self._run(index, x) if part is None else part
        with self._lock:
            part = self._kept(index, x, self._state(x))
        # The layer runs outside of the lock, so that its time does not stop the other threads.
        return self._run(index, x, self._lock) if part is None else part

    def _state(self, x: Tensor) -> tuple[int, int, int]:
        """Return what must not change while rows are kept: the version of the input, the bits and the group size."""
        # A compiler sees every change in place by itself.
        version = 0 if torch.compiler.is_compiling() else tensor_version(x)
        return version, self.layer.act_bits, self.layer.act_group

    def _kept(self, index: int, x: Tensor, state: tuple[int, int, int]) -> Tensor | None:
        """Take the kept rows of one member, or return None if they are not those of this input and state."""
        if self.input is not x or self.state != state or index not in self.pending:
            return None
        part = self.pending.pop(index)
        if not self.pending:
            self.input = None
        return part

    def _run(self, index: int, x: Tensor, lock: AbstractContextManager[Any] | None = None) -> Tensor:
        """Run the layer, keep the rows of the other members, and return those of one.

        Args:
            index: The number of the member.
            x: The input [..., K], floating point.
            lock: The lock for the kept rows, or None while tracing.
        """
        state = self._state(x)
        parts: dict[int, Tensor] = dict(enumerate(self.layer(x).split(list(self.layer.spec.rows), dim=-1)))
        part = parts.pop(index)
        with nullcontext() if lock is None else lock:
            # Rows are kept only if no other thread changed the input or switched the bits while the layer ran.
            # Not bool(parts): PyTorch 2.11 cannot trace it.
            keep = len(parts) > 0 and state == self._state(x)
            self.input = x if keep else None
            self.state = state
            self.pending = parts if keep else {}
        return part


class MergedMember(nn.Module):
    """The module in place of one merged ``nn.Linear``; it returns the rows of that layer from the merged output.

    Args:
        shared: The shared state of the merged layer.
        index: The number of the member.
    """

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows of this member.

        Args:
            x: The input [..., K], floating point.

        Returns:
            The output [..., rows of this member].
        """
        return self._shared.take(self._index, x)

    def extra_repr(self) -> str:
        """Return the names of the member and of its layer for the printed module."""
        spec = self._shared.layer.spec
        return f"rows of {spec.members[self._index]} in {spec.name}"
