"""Refusals of what diffusers offers on a transformer of PyTorch blocks, but an engine cannot do.

The errors name another way.

diffusers' hooks are methods of a model, and also functions (``diffusers.hooks.apply_…``). Such a function looks for
blocks among the module's children and finds none. Then it either says nothing or fails over an empty list. It is
recognized by its name when it asks for blocks, or by the attribute that it leaves on the module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

from torch import nn

from dvdquant.errors import UnsupportedError

__all__ = ["COPIED", "LOADED", "REFUSED", "WholeEngine", "refuse"]

_LORA = (
    "its weights are packed in 4 bits inside the export",
    "export again with dvdq-export --lora FILE:SCALE, which fuses the LoRA into the weights; of an export with "
    "--lora-rank, and on the pytorch backend, transformer.load_lora_adapter(FILE, scale) runs it beside them",
)
_CACHE = (
    "the transformer is one engine, without blocks that a cache could hook",
    "use dvdquant's step cache: DvdqTransformer.from_pretrained(OUT, cache=THRESHOLD)",
)
_ATTENTION = ("attention runs inside the engine", "leave it out; what executes was chosen by dvdq-export")
_COMPILE = ("there are no PyTorch blocks to compile", "leave it out: the engine is compiled already")
_TRAINING = ("an engine has no gradients", "train the original checkpoint and export it again")
_OFFLOAD = (
    "there are no parameters to move: the weights belong to the engine",
    "leave the transformer out (exclude_modules), or use enable_model_cpu_offload() for the other parts",
)
_DTYPE = ("its dtype is that of the export", "export again with --dtype")
_SAVE = (
    "the engines are an export of their own and are not saved in diffusers format",
    "copy the export folder; load both with Pipeline.from_pretrained(FOLDER, transformer=DvdqTransformer.from_pretrained(OUT))",
)

LOADED = (
    "its weights are packed in 4 bits inside the export",
    "load the state into the original checkpoint, save that (save_pretrained) and export it",
)
COPIED = (
    "its engines belong to this process",
    "open the export again where you need it: DvdqTransformer.from_pretrained(OUT); copy.deepcopy shares the engines",
)
_HOOKS = (
    "the transformer is one engine, without blocks to hook",
    "leave it out, and use dvdquant's step cache: DvdqTransformer.from_pretrained(OUT, cache=THRESHOLD)",
)

_NAMES = (
    ("enable_cache", _CACHE),
    ("save_lora_adapter add_adapter set_adapter enable_adapters disable_adapters fuse_lora unfuse_lora", _LORA),
    ("enable_lora_hotswap load_attn_procs save_attn_procs", _LORA),
    ("set_attn_processor set_default_attn_processor set_attention_backend reset_attention_backend", _ATTENTION),
    ("fuse_qkv_projections unfuse_qkv_projections enable_forward_chunking", _ATTENTION),
    ("enable_xformers_memory_efficient_attention enable_npu_flash_attention enable_xla_flash_attention", _ATTENTION),
    ("compile compile_repeated_blocks", _COMPILE),
    ("enable_gradient_checkpointing", _TRAINING),
    ("enable_group_offload enable_parallelism", _OFFLOAD),
    ("enable_layerwise_casting dequantize", _DTYPE),
    ("save_pretrained save_config push_to_hub", _SAVE),
)
REFUSED = {name: reason for names, reason in _NAMES for name in names.split()}


def refuse(name: str, why: str, fix: str, available: str | Iterable[str] | None = None) -> NoReturn:
    """Raise UnsupportedError that says that ``name`` does not apply to an engine.

    Args:
        name: The method or option.
        why: The reason.
        fix: What to do instead.
        available: The allowed values, or None.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(f"{name} does not apply to an exported transformer: {why}", available=available, fix=fix)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        del self, args, kwargs
        refuse(name, *REFUSED[name])

    method.__name__ = name
    method.__doc__ = f"UnsupportedError: {REFUSED[name][0]}; {REFUSED[name][1]}."
    return method


# diffusers' functions on a module, each with the reason to refuse it.
_FUNCTIONS = {
    "apply_group_offloading": _OFFLOAD,
    "apply_tensor_parallel": _OFFLOAD,
    "apply_context_parallel": _OFFLOAD,
    "apply_layerwise_casting": _DTYPE,
    "apply_layerwise_casting_hook": _DTYPE,
}


def _hooking(frame: FrameType | None) -> str | None:
    """Return the name of the function of ``diffusers.hooks`` that is running, or None."""
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("diffusers.hooks."):
        name = frame.f_code.co_name
        if name.startswith("apply_"):
            return name
        frame = frame.f_back
    return None


def _refuse_hooks(frame: FrameType | None) -> None:
    name = _hooking(frame)
    if name is not None:
        reason = _FUNCTIONS.get(name) or (_CACHE if "cache" in name or "broadcast" in name else _HOOKS)
        refuse(name, *reason)


class WholeEngine:
    """The base of a transformer that is one engine.

    Every method of :data:`REFUSED` raises UnsupportedError, and so does every ``diffusers.hooks.apply_…`` on it.
    """

    is_cache_enabled = False
    is_gradient_checkpointing = False

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return no children, and refuse a function of diffusers that wants blocks."""
        _refuse_hooks(sys._getframe(1))
        return super().named_children()  # type: ignore[misc,no-any-return]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Return the module itself, and refuse a function of diffusers that wants blocks.

        Args:
            *args: The arguments of ``torch.nn.Module.named_modules``.
            **kwargs: The keyword arguments of ``torch.nn.Module.named_modules``.
        """
        _refuse_hooks(sys._getframe(1))
        return super().named_modules(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def __getattr__(self, name: str) -> Any:
        # Python calls this for missing attributes. A function of diffusers asks for blocks by name, too.
        _refuse_hooks(sys._getframe(1))
        return super().__getattr__(name)  # type: ignore[misc]

    @property
    def _diffusers_hook(self) -> NoReturn:
        # diffusers keeps its hooks in this attribute. It also reads it to see that there are no hooks.
        raise AttributeError("_diffusers_hook")

    @_diffusers_hook.setter
    def _diffusers_hook(self, registry: Any) -> None:
        del registry
        # Setting an attribute of a module goes through torch, so frames of torch are skipped.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("torch."):
            frame = frame.f_back
        _refuse_hooks(frame)
        refuse("a hook of diffusers", *_HOOKS)

    def disable_cache(self) -> None:
        """Do nothing: diffusers' caches are never on."""

    def disable_gradient_checkpointing(self) -> None:
        """Do nothing: gradient checkpointing is never on."""


for _name in REFUSED:
    setattr(WholeEngine, _name, _refusing(_name))
