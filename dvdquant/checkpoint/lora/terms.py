"""What LoRAs add to the weights of a checkpoint: W + scale · alpha / rank · B · A in fp32, one layer at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dvdquant.checkpoint.lora.file import LoraFile
from dvdquant.checkpoint.lora.names import Place
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.errors import CheckpointError
from dvdquant.system.safetensors_reader import TensorInfo
from dvdquant.text import shown

if TYPE_CHECKING:
    import torch


__all__ = ["CHUNK_WEIGHTS", "FusedLora", "Loras", "Term"]

CHUNK_WEIGHTS = 1 << 23
"""Weights whose change is in memory at a time: 32 MiB of fp32."""


@dataclass(frozen=True)
class FusedLora:
    """One LoRA that is fused into one transformer, for the fingerprint, the manifest and what is said of an export.

    Args:
        spec: What was asked for.
        sha256: The SHA-256 of the file.
        nbytes: Its bytes.
        format: ``diffusers``, ``original`` or ``kohya``.
        layers: The layers of the file, all of which were found in the transformer.
        rank: (least, most); 0 where the file holds differences alone.
        notes: What else is to be said.
    """

    spec: LoraSpec
    sha256: str
    nbytes: int
    format: str
    layers: int
    rank: tuple[int, int]
    notes: tuple[str, ...] = ()

    def identity(self) -> list[Any]:
        """Return what the fused weights depend on: no path, and no time."""
        return [self.sha256, self.spec.scale, self.layers]

    def words(self) -> str:
        """Return format, scale, ranks and layers in one line."""
        low, high = self.rank
        rank = "differences" if not high else f"rank {high}" if low == high else f"rank {low} to {high}"
        return f"{self.format} names, {rank}, scale {self.spec.scale:g}, {self.layers} layers, all found"


@dataclass(frozen=True)
class Term:
    """One change to one tensor: ``factor`` times ``up @ down``, or times ``diff``.

    Args:
        file: The file of the LoRA.
        factor: Scale · alpha / rank.
        up: B [N, rank], or None.
        down: A [rank, K], or None.
        diff: The change itself, or None.
        place: The tensor, and its rows where the file joins layers.
        channels: The number of first input channels that it changes; None is all of them.
    """

    file: LoraFile
    factor: float
    up: TensorInfo | None
    down: TensorInfo | None
    diff: TensorInfo | None
    place: Place
    channels: int | None

    @property
    def nbytes(self) -> int:
        """Return the memory of its tensors while they are read: as stored and in fp32."""
        parts = (self.up, self.down, self.diff)
        return max(info.nbytes + 4 * math.prod(info.shape) for info in parts if info is not None)

    def add_to(self, value: torch.Tensor, name: str) -> None:
        """Add the change to ``value``, a tensor of fp32 that nobody else holds.

        Args:
            value: The weight, fp32 [N, K]; it is changed in place.
            name: The name of the weight.
        """
        import torch

        target = value if self.channels is None else value[:, : self.channels]
        if self.diff is not None or self.channels is not None:  # of the size of a layer that is small
            change = self.change().mul_(self.factor)
            self._require_finite(change, name)
            target.add_(change.reshape(target.shape))
            return
        up, down = self.factors()
        flat = value.view(value.shape[0], -1)
        # Parts of one size: a part of few rows would be summed by another loop of the BLAS, and differ in the last bit.
        step = math.ceil(len(flat) / math.ceil(flat.numel() / CHUNK_WEIGHTS))
        for start in range(0, len(flat), step):
            change = torch.mm(up[start : start + step], down).mul_(self.factor)
            self._require_finite(change, name)
            flat[start : start + step] += change

    def change(self) -> torch.Tensor:
        """Return the whole change in fp32, not yet multiplied by ``factor``."""
        if self.diff is not None:
            return self._rows(self.file.read(self.diff))
        up, down = self.factors()
        return up @ down

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B [rows, rank] and A [rank, features] of a low-rank change, in fp32."""
        assert self.up is not None
        assert self.down is not None
        return self._rows(self.file.read(self.up)).flatten(1), self.file.read(self.down).flatten(1)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if self.place.rows is None:
            return tensor
        return torch.cat([tensor[start:stop] for start, stop in self.place.rows])

    def _require_finite(self, change: torch.Tensor, name: str) -> None:
        import torch

        if change.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(change)):
            raise CheckpointError(
                f"the LoRA {shown(self.file.path)} changes {name!r:.200} by more than fp32 holds",
                fix="give a smaller scale, or download the LoRA again",
            )


@dataclass(frozen=True)
class Loras:
    """The LoRAs of one transformer, and the changes to each of its tensors, in the order they were given.

    Args:
        fused: What is recorded of each LoRA.
        terms: The changes, by the name of the tensor.
    """

    fused: tuple[FusedLora, ...]
    terms: Mapping[str, tuple[Term, ...]]

    def apply(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor ``name`` with every change added, in fp32; a tensor without one is returned as it is.

        Args:
            name: The name of the tensor.
            value: The tensor as stored, of any floating dtype; it is not used afterwards.

        Raises:
            CheckpointError: A LoRA has changed since it was opened, or fp32 does not hold its change.
        """
        terms = self.terms.get(name, ())
        if not terms:
            return value
        result = value.float().contiguous()
        for term in terms:
            term.add_to(result, name)
        return result

    def reading_bytes(self, name: str, elements: int) -> int:
        """Return the bytes that a fuse takes beside the tensor as stored: its copy in fp32, the factors, one chunk.

        Args:
            name: The name of the tensor.
            elements: The number of elements of the tensor.
        """
        terms = self.terms.get(name, ())
        if not terms:
            return 0
        return 4 * elements + sum(term.nbytes for term in terms) + 4 * min(elements, 2 * CHUNK_WEIGHTS)

    def identity(self) -> bytes:
        """Return the part of the LoRAs that a fingerprint covers: files, scales and layers, as JSON."""
        return json.dumps([lora.identity() for lora in self.fused]).encode()
