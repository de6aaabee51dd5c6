"""diffusers' ``from_pipe`` with an exported transformer: the new pipeline keeps it, and no part changes its dtype."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DiffusionPipeline

from dvdquant.deploy.pipelines.unsupported import WholeEngine, refuse

__all__ = ["keep_in_from_pipe"]


def keep_in_from_pipe() -> None:
    """Let ``Pipeline.from_pipe(pipe)`` keep an exported transformer, and every part in its own dtype.

    diffusers passes a model on only if its class is exactly that of the new pipeline's signature, and leaves any other
    model out. It also casts all parts to float32 unless told otherwise, those of the old pipeline with them. Both are
    right for transformers of PyTorch blocks. A pipeline without an exported transformer goes to diffusers as it came.

    This is called when the first exported transformer is made. A process without one keeps diffusers' own method.
    """
    original = DiffusionPipeline.from_pipe.__func__
    if getattr(original, "keeps_engines", False):
        return

    @functools.wraps(original)
    def from_pipe(cls: type[Any], /, *args: Any, **kwargs: Any) -> Any:
        pipeline = args[0] if args else kwargs.get("pipeline")
        if not (isinstance(pipeline, DiffusionPipeline) and _has_engine(vars(pipeline), kwargs)):
            return original(cls, *args, **kwargs)
        kwargs.pop("pipeline", None)
        return _from_pipe_with_engine(original, cls, pipeline, kwargs)

    from_pipe.keeps_engines = True  # type: ignore[attr-defined]
    DiffusionPipeline.from_pipe = classmethod(from_pipe)


def _has_engine(*parts: Mapping[str, Any]) -> bool:
    return any(isinstance(part, WholeEngine) for group in parts for part in group.values())


def _from_pipe_with_engine(original: Callable[..., Any], cls: type[Any], pipeline: Any, kwargs: dict[str, Any]) -> Any:
    expected = inspect.signature(cls.__init__).parameters
    parts = {**pipeline.components, **kwargs}
    kept: dict[str, Any] = {n: part for n, part in parts.items() if isinstance(part, WholeEngine) and n in expected}
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    kwargs = {**kept, **kwargs}
    if dtype is not None:
        for part in kept.values():
            # A wrong dtype is refused here, before the parts that both pipelines share are cast.
            part.to(dtype)
        return original(cls, pipeline, **kwargs)
    if kwargs.get("custom_pipeline") is not None:
        refuse(
            "from_pipe with custom_pipeline and without dtype",
            "diffusers casts all parts to float32 then",
            "give dtype, or make the pipeline itself: CustomPipeline(**pipe.components)",
        )
    # diffusers has no word for "no cast", so the pipeline is made as one that cannot be cast.
    uncast = type(cls.__name__, (cls,), {"to": _stay, "__module__": cls.__module__, "__qualname__": cls.__qualname__})
    made = original(uncast, pipeline, **kwargs)
    made.__class__ = cls
    return made


def _stay(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the pipeline as it is."""
    del args, kwargs
    return self
