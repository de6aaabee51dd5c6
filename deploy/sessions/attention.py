"""8-bit attention in a diffusers transformer, without its attention code.

diffusers' attention dispatch gets a backend of ours. A processor names its backend, and hands something on to it that is
meant for parallel computation, None in attention to text (Wan). There the backend finds the layer. diffusers'
``set_attention_backend`` is not called: it also sets the backend of every other model of the process.

CogVideoX's processor calls PyTorch itself. It is called with another ``F`` among its globals.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dvdquant.model.diffusers_hooks import (
    add_attention_backend,
    attention_is_dispatched,
    dispatch_to,
    lost_attention,
)
from dvdquant.ops.attention import ladder
from dvdquant.ops.attention.ladder import Attention
from dvdquant.ops.attention.operation import attention, number_of
from dvdquant.ops.attention.static_scales import longest_row, pair_exponents

__all__ = [
    "MASK",
    "AttentionState",
    "check_attention",
    "cut_padded_words",
    "fold_norms",
    "install_attention",
    "norm_bounds",
    "norm_pairs",
    "pair_sizes",
    "registered_backend",
    "self_attentions",
]

# The input of a graph that says which words are padding.
MASK = "encoder_attention_mask"

_NORMS = (("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"))


class AttentionState:
    """The state of attention that all layers of a session share.

    Args:
        chosen: The session's attention; None leaves it in 16 bit, so that only masks are left out.

    Attributes:
        number: The number of ``chosen`` for the operation, or None.
        least: The shortest sequence that is not in 16 bit.
        whole: Whether masks over keys are true everywhere, so that they are left out.
    """

    def __init__(self, chosen: Attention | None) -> None:
        self.number = None if chosen is None else number_of(chosen)
        self.least = ladder.MIN_TOKENS
        self.whole = False

    def cut(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a step without padded words, and note whether masks have nothing left to do in it.

        Args:
            inputs: The graph's inputs by name.
        """
        cut, self.whole = cut_padded_words(inputs)
        return cut

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, attn_mask: Tensor | None, is_causal: bool,
        scale: float | None, dropout_p: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Compute attention: in 8 bits where it is self-attention of a long sequence without a mask.

        Args:
            q: [B, S, H, d] in 16 bit (fp32 on a CPU).
            k: [B, T, H, d] of the dtype of q.
            v: [B, T, H, d] of the dtype of q.
            bounds: fp32 [2], the largest values of the layer's q and k, or None.
            attn_mask: The mask of PyTorch's ``scaled_dot_product_attention``, or None.
            is_causal: Whether a token sees only those before it.
            scale: The factor of the scores; None is 1/√d.
            dropout_p: The share of scores that are dropped; 0 in a step.
        """
        if self.whole and attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.shape[-2] == 1:
            attn_mask = None
        plain = attn_mask is None and not is_causal and not dropout_p
        if self.number is not None and plain and k.shape[1] == q.shape[1] and q.shape[1] >= self.least:
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            out: Tensor = attention(q, k, v, bounds, factor, self.number)
            return out
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale).transpose(1, 2)


class _Layer:
    """The facts that the backend knows of a layer. diffusers hands it on from the layer's processor."""

    def __init__(self, state: AttentionState, bounds: Tensor | None) -> None:
        self.state, self.bounds = state, bounds


def _dispatched(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, layer: _Layer | None,
) -> Tensor:  # fmt: skip
    if layer is None:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale).transpose(1, 2)
    return layer.state.attention(query, key, value, layer.bounds, attn_mask, is_causal, scale, dropout_p)


@functools.cache
def registered_backend() -> Any:
    """Return the name of our backend in diffusers' attention dispatch, and register it at the first call.

    Raises:
        UnsupportedError: This diffusers dispatches attention in another way.
    """
    return add_attention_backend("dvdquant", _dispatched)


_registering = threading.Lock()


def _backend() -> Any:
    """Return the name of the backend in a processor; registered once in a process, before any session uses it."""
    with _registering:
        return registered_backend()


class _Functions:
    """``torch.nn.functional`` as a processor sees it that calls PyTorch itself.

    Args:
        calls: Has the layer of the processor that was called last in this thread.
    """

    def __init__(self, calls: threading.local) -> None:
        self.calls = calls

    def scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute attention as PyTorch's function does, in the arithmetic of the session."""
        layer: _Layer = self.calls.layer
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return layer.state.attention(q, k, v, layer.bounds, attn_mask, is_causal, scale, dropout_p).transpose(1, 2)


def check_attention(model: nn.Module) -> None:
    """Refuse a model whose self-attention cannot be taken over by :func:`install_attention`. Its weights are not read.

    Args:
        model: A diffusers transformer.

    Raises:
        UnsupportedError: This diffusers calls attention in another way; it would stay in 16 bit without a word.
    """
    _backend()
    modules = self_attentions(model)
    if not modules:
        raise lost_attention(type(model).__name__)
    for module in modules:
        attention_is_dispatched(module.processor)


def install_attention(model: nn.Module, chosen: Attention | None) -> AttentionState:
    """Let a session's attention compute the self-attention of a model.

    Args:
        model: A diffusers transformer with its weights, which is changed in place.
        chosen: The session's attention; None leaves it in 16 bit, so that only masks are left out.

    Raises:
        UnsupportedError: See :func:`check_attention`.
    """
    check_attention(model)
    state = AttentionState(chosen)
    for module in self_attentions(model):
        if chosen is not None:
            fold_norms(module)
        layer = _Layer(state, None if chosen is None else norm_bounds(module))
        processor: Any = module.processor
        if attention_is_dispatched(processor):
            dispatch_to(module, _backend(), layer)
        else:
            kind: Any = type(processor)
            own: Any = _with_functions(kind)()
            own.layer = layer
            module.processor = own
    return state


@functools.cache
def _with_functions(kind: type) -> Any:
    """Return the class of processors whose ``F`` is another: one for all sessions, which share compiled code by it.

    Args:
        kind: The class of a processor that calls PyTorch itself. Those of the class that is returned have a ``layer``.
    """
    call: Any = kind.__call__
    calls = threading.local()
    # Without the module's name: torch.compile would look F up in the module that is called so.
    known = {name: value for name, value in call.__globals__.items() if name != "__name__"}
    known["F"] = _Functions(calls)
    rebound = types.FunctionType(call.__code__, known, call.__name__, call.__defaults__, call.__closure__)
    rebound.__kwdefaults__ = call.__kwdefaults__
    rebound.__module__ = call.__module__

    # With its signature, by which diffusers finds out what it may hand on.
    @functools.wraps(rebound)
    def with_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.layer = self.layer
        return rebound(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": with_layer})


def self_attentions(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention modules of a transformer's blocks, but for those that refine text alone.

    Args:
        model: The transformer.
    """
    found = []
    for name, module in model.named_modules():
        in_block = "blocks." in name and not name.startswith("context_embedder")
        if in_block and name.rpartition(".")[2] in ("attn", "attn1") and hasattr(module, "processor"):
            found.append(module)
    return found


def cut_padded_words(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Cut the padded words off, where the text of a batch of one has a mask.

    Words that the mask leaves out reach nothing else, so without them the model computes the same, and needs no mask in its
    attention. The fast kernels take none.

    Args:
        inputs: The graph's inputs by name.

    Returns:
        The inputs, and whether nothing is left for a mask to do.
    """
    mask = inputs.get(MASK)
    if mask is None or mask.ndim != 2 or mask.shape[0] != 1:
        return dict(inputs), False
    words = int(mask.bool().sum())
    if not words or not bool(mask[0, :words].bool().all()):
        return dict(inputs), False  # no words at all, or holes between them
    cut = {**inputs, MASK: mask[:, :words]}
    cut["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :words]
    return cut, True


# ------------------------------------------------------------------------------------------------------------ the norms


@torch.no_grad()
def fold_norms(module: nn.Module) -> None:
    """Make the norm weights of q and k equal in size, rope pair by rope pair, with the scores as they are.

    :func:`.pair_exponents` says by how much. It comes before the rotation, which mixes all channels: it would spread
    outliers, and those of q and k differ.

    Args:
        module: An attention module. Its norms of q and k get new weights; the tensors they had are left alone.
    """
    pairs = [(q, k) for q, k in norm_pairs(module) if getattr(q, "weight", None) is not None]
    if not pairs or any(q.weight.shape != k.weight.shape for q, k in pairs):
        return
    sizes = [torch.stack([pair_sizes(q), pair_sizes(k)]) for q, k in pairs]
    q_size, k_size = torch.stack(sizes).square().sum(0).sqrt()
    factor = pair_exponents(q_size, k_size).exp2().repeat_interleave(2)
    for q, k in pairs:
        for norm, by in ((q, factor), (k, 1 / factor)):
            for name in ("weight", "bias"):
                old = getattr(norm, name, None)
                if old is not None:
                    new = (old.float() * by).to(old.dtype)
                    norm.register_parameter(name, nn.Parameter(new, requires_grad=False))


def norm_bounds(module: nn.Module) -> Tensor | None:
    """Return the largest values that q and k can have behind their norms, rope and a rotation: fp32 [2], or None.

    They are the lengths of the longest rows (:func:`.longest_row`). The norm is over all heads in Wan and LTX-Video, and
    over each head in HunyuanVideo and CogVideoX.

    Args:
        module: An attention module with norms of q and k; without them nothing is known.
    """
    bounds = []
    for norms in zip(*norm_pairs(module)):
        lengths = [_length(norm, module) for norm in norms]
        if any(length is None for length in lengths):
            return None
        bounds.append(max(length for length in lengths if length is not None))
    return torch.tensor(bounds, dtype=torch.float32, device=_device(module)) if bounds else None


def norm_pairs(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the norms of q and of k: of the video, and of the text where it has its own.

    Args:
        module: An attention module.
    """
    pairs = [tuple(getattr(module, name, None) for name in names) for names in _NORMS]
    return [(q, k) for q, k in pairs if q is not None and k is not None]


def pair_sizes(norm: Any) -> Tensor:
    """Return the length of each pair of weights of a norm that rope turns together, fp32 [channels/2].

    Args:
        norm: A norm with weights.
    """
    return norm.weight.float().view(-1, 2).norm(dim=1)  # type: ignore[no-any-return]


def _length(norm: Any, module: nn.Module) -> float | None:
    """Return the largest length of a row (of one head or of all) behind a norm, or None if it is no norm we know."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        return longest_row(weight.numel(), weight, bias)
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    if shape is None:
        return None
    return longest_row(torch.Size(shape if isinstance(shape, Sequence) else (shape,)).numel(), None, bias)


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
