"""LoRAs beside a quantized model: W_q·x + scale · alpha / rank · B·(A·x), the second in 16 bit.

A layer that is packed in 4 bits cannot take a change into its weight, so the change is a branch of its own. What an
export keeps in 16 bit takes it into its weight, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.checkpoint.lora.terms import Loras, Term
from dvdquant.model.layers import QuantLinear
from dvdquant.model.quantized_model import quant_linears

__all__ = ["LoraBranches"]


@dataclass(frozen=True)
class _Branch:
    """The change of some rows of a layer's output: pairs of B [rows, rank] and A [rank, K], full matrices, and a bias."""

    rows: slice
    pairs: tuple[tuple[Tensor, Tensor], ...]
    full: tuple[Tensor, ...]
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        tensors = [*(t for pair in self.pairs for t in pair), *self.full]
        return sum(t.nbytes for t in tensors) + (0 if self.bias is None else self.bias.nbytes)

    def of(self, x: Tensor) -> Tensor | None:
        """Return what is added to the output for an input [..., K]."""
        y = self.bias
        for b, a in self.pairs:
            change = (x @ a.T) @ b.T
            y = change if y is None else y + change
        for matrix in self.full:
            change = x @ matrix.T
            y = change if y is None else y + change
        return y


class LoraBranches:
    """The branches of a model, attached until :meth:`remove`.

    Args:
        model: The diffusers transformer with QuantLinear modules.
        loras: The changes, by the names of the checkpoint's tensors.
        dtype: The dtype of the branches.
        device: The device that they run on.
    """

    def __init__(self, model: nn.Module, loras: Loras, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self._hooks: list[Any] = []
        self._kept: dict[str, nn.Parameter] = {}
        self.nbytes = 0
        try:
            left = dict(loras.terms)
            for layer in quant_linears(model).values():
                self._attach(layer, left)
            for name in left:  # what is not quantized
                self._patch(name, loras)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was, bit by bit."""
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self._kept.items():
            setattr(self._owner(name), name.rpartition(".")[2], parameter)
        self._hooks, self._kept, self.nbytes = [], {}, 0

    def _attach(self, module: QuantLinear, left: dict[str, tuple[Term, ...]]) -> None:
        spec, start, branches = module.spec, 0, []
        for member, count in zip(spec.members, spec.rows):
            weight, bias = left.pop(f"{member}.weight", ()), left.pop(f"{member}.bias", ())
            if weight or bias:
                branches.append(self._branch(slice(start, start + count), weight, bias))
            start += count
        if not branches:
            return
        self.nbytes += sum(branch.nbytes for branch in branches)

        def add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del layer
            x = args[0].to(self._dtype)
            changed = output.clone()
            for branch in branches:
                change = branch.of(x)
                if change is not None:
                    changed[..., branch.rows] += change
            return changed

        self._hooks.append(module.register_forward_hook(add))

    def _branch(self, rows: slice, weight: Sequence[Term], bias: Sequence[Term]) -> _Branch:
        pairs, full = [], []
        for term in weight:
            if term.diff is not None:
                full.append(self._here(term.change() * term.factor))
            else:
                b, a = term.factors()
                pairs.append((self._here(b * term.factor), self._here(a)))
        total = sum(term.change() * term.factor for term in bias) if bias else None
        return _Branch(rows, tuple(pairs), tuple(full), self._here(total) if isinstance(total, Tensor) else None)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype).contiguous()

    def _patch(self, name: str, loras: Loras) -> None:
        """Fuse the changes of a tensor that the export keeps, and remember it as it was."""
        owner, child = self._owner(name), name.rpartition(".")[2]
        stored = owner.get_parameter(child)
        fused = loras.apply(name, stored.detach().to("cpu", torch.float32, copy=True))
        self._kept[name] = stored
        setattr(owner, child, nn.Parameter(fused.to(self._device, stored.dtype), requires_grad=False))
        self.nbytes += stored.nbytes

    def _owner(self, name: str) -> nn.Module:
        """Return the module that a parameter belongs to."""
        return self._model.get_submodule(name.rpartition(".")[0])
