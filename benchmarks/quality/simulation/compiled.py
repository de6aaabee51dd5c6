"""A Wan model compiled once, with its quantized layers as operators whose content is exchanged: a method costs no compilation.

Inductor fuses what lies between the layers (norms, modulation, rotary embedding, GELU, softmax); each merged layer is one
opaque operator that looks itself up in a table. One compiled model serves every method, and the unquantized model as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.simulation.simulate import Layer, Simulated, SimulatedGroup, install, product

__all__ = ["CompiledModel", "EagerModel", "WithLayers"]

# What every operator does at the moment: one model runs at a time in a process.
_running: list[SimulatedGroup] = []


@torch.library.custom_op("dvdquant_quality::layer", mutates_args=())
def _layer(x: Tensor, slot: int, rows: int, wide: bool) -> Tensor:
    y: Tensor = _running[slot](x)
    return y.float() if wide else y


@_layer.register_fake
def _(x: Tensor, slot: int, rows: int, wide: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.float32 if wide else torch.bfloat16)


class _Slot(nn.Module):
    def __init__(self, slot: int, rows: int, wide: bool) -> None:
        super().__init__()
        self.slot, self.rows, self.wide = slot, rows, wide

    def forward(self, x: Tensor) -> Tensor:
        return _layer(x, self.slot, self.rows, self.wide)  # type: ignore[no-any-return]


class _Attention:
    """Computes Wan's attention with merged projections as plain products, the faster way at a few hundred tokens."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        if encoder_hidden_states is None:
            q, k, v = attn.slots["to_q"](hidden_states).chunk(3, -1)
        else:
            q = attn.slots["to_q"](hidden_states)
            k, v = attn.slots["to_k"](encoder_hidden_states).chunk(2, -1)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (q, k, v))
        if rotary_emb is not None:
            q, k = _rotary(q, *rotary_emb), _rotary(k, *rotary_emb)
        q, k, v = (t.transpose(1, 2).to(v.dtype) for t in (q, k, v))
        scores = product(q, k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        out = product(scores.softmax(-1).to(v.dtype), v)
        return attn.slots["to_out"](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to pairs of neighbours: x [B, T, H, D], cos and sin broadcast to it."""
    x1, x2 = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((x1 * c - x2 * s, x1 * s + x2 * c), -1).flatten(-2).type_as(x)


class CompiledModel:
    """Holds one model, compiled for each batch size it meets.

    Args:
        model: WanTransformer3DModel in fp32.
        layers: All layers that are exchanged, merged as the export does.
        wide: Whether layers hand on fp32 and the model runs without autocast: the reference.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], wide: bool = False) -> None:
        torch._dynamo.config.recompile_limit = 32
        self.layers, self.wide = list(layers), wide
        slotted = copy.deepcopy(model)
        for index, layer in enumerate(self.layers):
            slot = _Slot(index, sum(layer.spec.rows), wide)
            first = layer.spec.members[0]
            if ".attn" in first:
                name, _, child = first.partition(".to_")
                attention: Any = slotted.get_submodule(name)
                if not hasattr(attention, "slots"):
                    attention.slots = nn.ModuleDict()
                attention.slots["to_" + child.partition(".")[0]] = slot
            else:
                parent, _, child = first.rpartition(".")
                setattr(slotted.get_submodule(parent), child, slot)
        wan: Any = slotted
        for block in wan.blocks:
            block.attn1.set_processor(_Attention())
            block.attn2.set_processor(_Attention())
        self.run = torch.compile(slotted, dynamic=False)

    def install(self, layers: Iterable[Layer], method: Callable[[Layer], Simulated]) -> WithLayers:
        """Return the model with ``method`` in place of its layers.

        Args:
            layers: The same layers, with what a method may look at.
            method: What a layer becomes.
        """
        dtype = torch.float32 if self.wide else torch.bfloat16
        return WithLayers(self, [SimulatedGroup(layer, method(layer), dtype) for layer in layers])


class EagerModel:
    """Holds one model as :class:`CompiledModel` does, not compiled: a few clips take less time than compiling does.

    Args:
        model: WanTransformer3DModel in fp32.
        layers: All layers that are exchanged.
        wide: Whether layers hand on fp32 and the model runs without autocast.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], wide: bool = False) -> None:
        self.run, self.layers, self.wide = model, list(layers), wide

    def install(self, layers: Iterable[Layer], method: Callable[[Layer], Simulated]) -> WithLayers:
        """Return the model with ``method`` in place of its layers.

        Args:
            layers: The same layers, with what a method may look at.
            method: What a layer becomes.
        """
        dtype = torch.float32 if self.wide else torch.bfloat16
        return WithLayers(EagerModel(install(self.run, layers, method, dtype), self.layers, self.wide), [])


class WithLayers(nn.Module):
    """Holds a compiled model and what its layers are; called as the diffusers model is.

    Args:
        compiled: The model.
        groups: What its layers are, in their order.
    """

    def __init__(self, compiled: CompiledModel | EagerModel, groups: Iterable[SimulatedGroup]) -> None:
        super().__init__()
        self.compiled, self._groups = compiled, list(groups)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as WanTransformer3DModel runs.

        Args:
            args: The arguments of its ``forward``.
            kwargs: Those by name.
        """
        _running[:] = self._groups
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.compiled.wide):
            return self.compiled.run(*args, **kwargs)
