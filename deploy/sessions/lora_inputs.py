"""LoRAs in graphs and engines that reserve inputs for them: what goes into these inputs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

from dvdquant.checkpoint.lora.fuse import read_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.lora.terms import Loras, Term
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.model.layers import LayerSpec
from dvdquant.model.lora_inputs import BIAS, DOWN, UP, lora_input_shapes, stacked
from dvdquant.text import shown

__all__ = ["LoraInputs", "refuse_without_inputs"]

_OTHER_WAYS = "run it with the pytorch backend (--backend pytorch), or fuse it: dvdq-export --lora"


class LoraInputs:
    """The inputs that an export reserves for LoRAs, and what is in them.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.

    Attributes:
        rank: The rank that is reserved; 0 if there is no place for a LoRA.
        shapes: The shape of each reserved input by its name.
        changed: The names of what a LoRA has changed: reserved inputs, and tensors that the export keeps in 16 bit.
    """

    def __init__(self, artifact: Artifact, component: str) -> None:
        # Without a place there is no need for the plan, which takes a second.
        self.rank = artifact.manifest.lora_rank
        self._plan = artifact.plan(component) if self.rank else None
        self._class_name = str(artifact.config(component)["_class_name"])
        self.shapes = lora_input_shapes(self._plan.layers, self.rank) if self._plan is not None else {}
        self.changed: set[str] = set()

    def require(self, there: Container[str], place: str) -> None:
        """Check that a graph or an engine has every reserved input.

        Args:
            there: The names of what it takes besides the inputs of a pass.
            place: The graph or the engine, for the error.

        Raises:
            EngineError: It lacks one.
        """
        if lacking := [name for name in self.shapes if name not in there]:
            raise EngineError(
                f"the manifest reserves rank {self.rank} for LoRAs, and {place} has no input {lacking[0]}",
                fix="export again",
            )

    def values(self, specs: Sequence[LoraSpec], kept: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the new value of everything that LoRAs change, fp32 on the CPU, by name.

        Args:
            specs: The LoRAs; none changes nothing.
            kept: A function that returns a tensor which the export keeps in 16 bit, as it is without LoRAs. It refuses
                one that a LoRA cannot change.

        Raises:
            CheckpointError: A file is no LoRA of this model.
            UnsupportedError: The ranks are larger than what is reserved, or a whole matrix of a quantized layer changes.
        """
        if not specs:
            return {}
        assert self._plan is not None
        loras = read_loras(self._class_name, self._plan.shapes, specs)
        self.check(loras)
        left, found = dict(loras.terms), dict[str, Tensor]()
        for spec in self._plan.layers:
            found |= self._branch(spec, left)
        for name in left:
            found[name] = loras.apply(name, kept(name).detach().to("cpu", torch.float32, copy=True))
        return found

    def check(self, loras: Loras) -> None:
        """Check that the reserved inputs hold LoRAs. Nothing of their values is read.

        Args:
            loras: The changes to this transformer.

        Raises:
            UnsupportedError: The ranks are larger than what is reserved, or a whole matrix of a quantized layer changes.
        """
        assert self._plan is not None
        for spec in self._plan.layers:
            for member in spec.members:
                self._check(member, loras.terms.get(f"{member}.weight", ()))

    def _check(self, member: str, terms: Sequence[Term]) -> None:
        """Check the changes to the weight of one layer, as :meth:`check` does."""
        total = 0
        for term in terms:
            if term.down is None:
                assert term.diff is not None
                raise UnsupportedError(
                    f"{shown(term.file.path)} changes the whole matrix of {member} ({shown(term.diff.name)}), which is "
                    "packed in 4 bits",
                    available=f"low-rank changes of it, up to rank {self.rank}",
                    fix=_OTHER_WAYS,
                )
            total += term.down.shape[0]
        if total > self.rank:
            whose = "the LoRA has" if len(terms) == 1 else f"the {len(terms)} LoRAs have together"
            raise UnsupportedError(
                f"{whose} rank {total} in {member}, and the export reserves {self.rank}",
                available=f"up to rank {self.rank}",
                fix=f"export again with --lora-rank {total}, or {_OTHER_WAYS}",
            )

    def _branch(self, spec: LayerSpec, left: dict[str, tuple[Term, ...]]) -> dict[str, Tensor]:
        """Return what goes into the inputs of one layer, and take its changes out of ``left``."""
        weights = {member: left.pop(f"{member}.weight", ()) for member in spec.members}
        biases = {member: left.pop(f"{member}.bias", ()) for member in spec.members}
        found = {}
        if any(weights.values()):
            pairs = {member: [_pair(term) for term in terms] for member, terms in weights.items()}
            found[f"{spec.name}.{DOWN}"], found[f"{spec.name}.{UP}"] = stacked(spec, self.rank, pairs)
        if any(biases.values()):
            parts = [
                sum((term.change().flatten() * term.factor for term in biases[member]), torch.zeros(rows))
                for member, rows in zip(spec.members, spec.rows)
            ]
            found[f"{spec.name}.{BIAS}"] = torch.cat(parts)
        return found


def _pair(term: Term) -> tuple[Tensor, Tensor]:
    """Return (B · factor, A) of a low-rank change, in fp32."""
    b, a = term.factors()
    return b * term.factor, a


def refuse_without_inputs(backend: str) -> None:
    """Refuse a LoRA in an export that has no place for one.

    Args:
        backend: The name of the backend.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(
        f"the export has no place for a LoRA: it was made without --lora-rank, and {backend} runs its graph as it is",
        available="the pytorch backend",
        fix="open it with the pytorch backend (--backend pytorch), or export again, with dvdq-export --lora-rank 64 for "
        "LoRAs that are loaded at run time, or with --lora to fuse this one",
    )
