"""All that is used of diffusers without being public, and the check that this release still has it.

Some of it is read here; some is what a pipeline calls on its transformer, which nothing but a check would miss: without
that call a request never ends, and without an error.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from dvdquant.system.hooks import hook, lost_hook

__all__ = ["REQUIREMENT", "check_pipeline_hooks", "fp32_modules", "ignored_tensors"]

REQUIREMENT = "diffusers>=0.40,<0.44"

_CACHE = "diffusers.models.cache_utils:CacheMixin"
_FREE = "diffusers:DiffusionPipeline.maybe_free_model_hooks"
_REGISTRY = "diffusers.hooks:HookRegistry.check_if_exists_or_initialize"
_REQUESTS = "to see where a request of a pipeline ends"
_REFUSALS = "to refuse hooks on a transformer without blocks"


def _names(model: Any, attribute: str, why: str) -> tuple[str, ...]:
    """Return the names in an attribute of a model, which may leave it out; refuse a diffusers that declares it no more."""
    _check_declared(attribute, why)
    return tuple(getattr(model, attribute, None) or ())


@cache
def _check_declared(attribute: str, why: str) -> None:
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
    _require_name(_FREE, "_reset_stateful_cache", _REQUESTS)
    _require_name(_REGISTRY, "_diffusers_hook", _REFUSALS)


def _require_name(path: str, name: str, why: str) -> None:
    """Refuse a function that does not use ``name`` in its code."""
    code = hook("diffusers", path, why, REQUIREMENT).__code__
    if name not in (*code.co_names, *code.co_consts):
        raise lost_hook("diffusers", f"{name} in {path.replace(':', '.')}", why, REQUIREMENT)
