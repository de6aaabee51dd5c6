"""All that is used of diffusers without being public, and the check that this release still has it.

Some of it is read here; some is what a pipeline calls on its transformer, which nothing but a check would miss: without
that call a request never ends, and without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.errors import UnsupportedError
from dvdquant.system.hooks import hook, lost_hook, require_name

__all__ = [
    "REQUIREMENT",
    "add_attention_backend",
    "attention_is_dispatched",
    "check_declared",
    "check_pipeline_hooks",
    "check_stage_hooks",
    "denormalize_latents",
    "dispatch_to",
    "execution_device",
    "fp32_modules",
    "ignored_tensors",
    "lost_attention",
    "repeated_block_names",
    "unpack_latents",
]

REQUIREMENT = "diffusers>=0.40,<0.44"

_CACHE = "diffusers.models.cache_utils:CacheMixin"
_FREE = "diffusers:DiffusionPipeline.maybe_free_model_hooks"
_REGISTRY = "diffusers.hooks:HookRegistry.check_if_exists_or_initialize"
_REQUESTS = "to see where a request of a pipeline ends"
_REFUSALS = "to refuse hooks on a transformer without blocks"
_ATTENTION = "to compute the attention of a layer in 8 bits"
_DISPATCH = "diffusers.models.attention_dispatch"
_LATENTS = ("_unpack_latents", "_denormalize_latents")


def _names(model: Any, attribute: str, why: str) -> tuple[str, ...]:
    """Return the names in an attribute of a model, which may leave it out; refuse a diffusers that declares it no more."""
    check_declared(attribute, why)
    return tuple(getattr(model, attribute, None) or ())


@cache
def check_declared(attribute: str, why: str) -> None:
    """Refuse a diffusers whose models do not declare an attribute.

    Args:
        attribute: The name of the attribute.
        why: What it is needed for, as the error says it.

    Raises:
        UnsupportedError: This diffusers names it in another way.
    """
    hook("diffusers", f"diffusers:ModelMixin.{attribute}", why, REQUIREMENT)


def fp32_modules(model: Any) -> set[str]:
    """Return the names of the modules that diffusers keeps in fp32, whatever the dtype of the rest.

    Args:
        model: A diffusers model.

    Raises:
        UnsupportedError: This diffusers names them in another way.
    """
    return set(_names(model, "_keep_in_fp32_modules", "to know which parameters stay in fp32"))


def ignored_tensors(model: Any) -> tuple[str, ...]:
    """Return the patterns of tensors that a checkpoint may hold and the model does not use.

    Args:
        model: A diffusers model.

    Raises:
        UnsupportedError: This diffusers names them in another way.
    """
    return _names(model, "_keys_to_ignore_on_load_unexpected", "to know which tensors a model does not use")


@cache
def check_pipeline_hooks() -> None:
    """Refuse a diffusers whose pipelines do not say what a stand-in for a transformer has to be told.

    Raises:
        UnsupportedError: A method is gone, or the pipeline does not call it any more; with a release that does.
    """
    hook("diffusers", f"{_CACHE}.cache_context", "to know which branch of guidance is called", REQUIREMENT)
    hook("diffusers", f"{_CACHE}._reset_stateful_cache", _REQUESTS, REQUIREMENT)
    hook("diffusers", "diffusers:DiffusionPipeline.from_pipe.__func__", "to keep an export in from_pipe", REQUIREMENT)
    hook("diffusers", "diffusers.hooks:apply_layerwise_casting", _REFUSALS, REQUIREMENT)
    require_name("diffusers", _FREE, "_reset_stateful_cache", _REQUESTS, REQUIREMENT)
    require_name("diffusers", _REGISTRY, "_diffusers_hook", _REFUSALS, REQUIREMENT)


def repeated_block_names(model: Any) -> tuple[str, ...]:
    """Return the names of the classes of a transformer's repeated blocks; none where its class does not say.

    Args:
        model: A diffusers model.

    Raises:
        UnsupportedError: This diffusers names them in another way.
    """
    return _names(model, "_repeated_blocks", "to compile the blocks of a transformer")


# ---------------------------------------------------------------------------------------------------- stages of a pipeline


@cache
def check_stage_hooks(class_name: str, latents: bool) -> None:
    """Refuse a pipeline class whose first and last stage cannot be run apart, before anything is loaded for it.

    Args:
        class_name: The class, of diffusers.
        latents: Whether its latents are unpacked and scaled back by the pipeline itself, as those of LTX-Video are.

    Raises:
        UnsupportedError: This diffusers has no such class, or the class lacks what the stages need.
    """
    for name in ("_execution_device", *(_LATENTS if latents else ())):
        hook("diffusers", f"diffusers:{class_name}.{name}", "to run the stages of a pipeline apart", REQUIREMENT)


def execution_device(pipe: Any) -> torch.device:
    """Return the device on which a pipeline computes, where its parts come and go.

    Args:
        pipe: A pipeline of a class that :func:`check_stage_hooks` took.
    """
    device: torch.device = pipe._execution_device
    return device


def unpack_latents(pipe: Any, latents: Tensor, size: tuple[int, int, int], patch: tuple[int, int]) -> Tensor:
    """Return the latents of LTX-Video as its VAE takes them, [B, C, F, H, W].

    Args:
        pipe: A pipeline of LTX-Video that :func:`check_stage_hooks` took.
        latents: [B, tokens, C · patch].
        size: Latent frames, rows and columns.
        patch: The patch across and in time.
    """
    across, time = patch
    unpacked: Tensor = pipe._unpack_latents(latents, *size, across, time)
    return unpacked


def denormalize_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Return the latents of LTX-Video in the scale of its VAE.

    Args:
        pipe: A pipeline of LTX-Video that :func:`check_stage_hooks` took, with its VAE.
        latents: [B, C, F, H, W].
    """
    vae = pipe.vae
    scaled: Tensor = pipe._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    return scaled


# --------------------------------------------------------------------------------------------------------------- attention


def add_attention_backend(name: str, compute: Callable[..., Tensor]) -> Any:
    """Give diffusers' attention dispatch a backend, and see once that the dispatch hands a layer on to it.

    Args:
        name: A name that no backend of diffusers has.
        compute: A function of query, key, value, attn_mask, dropout_p, is_causal, scale, as PyTorch's function has them but
            [B, S, H, d], and of what :func:`dispatch_to` put in place for the layer; None where it put nothing.

    Returns:
        What names the backend in a processor.

    Raises:
        UnsupportedError: The dispatch of this diffusers is another one.
    """
    register = hook("diffusers", f"{_DISPATCH}:_AttentionBackendRegistry.register", _ATTENTION, REQUIREMENT)
    dispatch = hook("diffusers", f"{_DISPATCH}:dispatch_attention_fn", _ATTENTION, REQUIREMENT)
    names = hook("diffusers", f"{_DISPATCH}:AttentionBackendName", _ATTENTION, REQUIREMENT)
    # A member that is not in the enumeration's list, which no code outside can extend.
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    seen: list[Any] = []

    def backend_of(function: Callable[..., Tensor]) -> None:
        @register(member)
        def dispatched(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, scale: float | None = None, _parallel_config: Any = None,
        ) -> Tensor:  # fmt: skip
            return function(query, key, value, attn_mask, dropout_p, is_causal, scale, _parallel_config)

    def noted(query: Tensor, *more: Any) -> Tensor:
        seen.append(more[-1])
        return query

    layer, x = object(), torch.zeros(1, 1, 1, 8, device="cpu")
    try:
        backend_of(noted)
        dispatch(x, x, x, backend=member, parallel_config=layer)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise lost_hook(
            "diffusers", "attention dispatch that takes a backend and a parallel_config", _ATTENTION, REQUIREMENT
        ) from error
    if seen != [layer]:
        raise lost_hook(
            "diffusers", "_parallel_config that dispatch_attention_fn hands on to a backend", _ATTENTION, REQUIREMENT
        )
    backend_of(compute)
    return member


def attention_is_dispatched(processor: Any) -> bool:
    """Return whether a processor calls diffusers' attention dispatch; False where it calls PyTorch, by ``F`` in its module.

    Args:
        processor: The processor of an attention module.

    Raises:
        UnsupportedError: It does neither: its attention could not be taken over, and would stay as it is without a word.
    """
    call = type(processor).__call__
    code, known = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    used = set() if code is None else set(code.co_names)
    routes = {"_attention_backend", "_parallel_config"}
    if routes <= used and all(hasattr(processor, name) for name in routes):
        return True
    if "F" in known and {"F", "scaled_dot_product_attention"} <= used:
        return False
    raise lost_attention(type(processor).__name__, "_attention_backend and _parallel_config")


def lost_attention(class_name: str, name: str = "attention module with a processor") -> UnsupportedError:
    """Return the error for a class without what leads to its self-attention.

    Args:
        class_name: The class, of diffusers.
        name: What it lacks.
    """
    return lost_hook("diffusers", f"{name} in {class_name}", _ATTENTION, REQUIREMENT)


def dispatch_to(module: nn.Module, backend: Any, layer: Any) -> None:
    """Let the dispatch send the self-attention of a module to a backend, with what belongs to the layer.

    Args:
        module: An attention module whose processor :func:`attention_is_dispatched`.
        backend: What :func:`add_attention_backend` returned.
        layer: What the backend's function gets as its last argument.
    """
    processor: Any = module.processor
    processor._attention_backend = backend
    processor._parallel_config = layer
