"""What diffusers offers on a transformer made of PyTorch blocks and an engine cannot do, refused with the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from dvdquant.errors import UnsupportedError

__all__ = ["WholeEngine"]

_LORA = (
    "its weights are packed in 4 bits inside the export",
    "fuse the LoRA into the checkpoint first (pipe.fuse_lora(), pipe.transformer.save_pretrained()) and export that",
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

_NAMES = (
    ("enable_cache", _CACHE),
    ("load_lora_adapter save_lora_adapter add_adapter set_adapter set_adapters active_adapters delete_adapters", _LORA),
    ("enable_adapters disable_adapters fuse_lora unfuse_lora unload_lora enable_lora disable_lora", _LORA),
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
    """UnsupportedError saying that ``name`` does not apply to an engine."""
    raise UnsupportedError(f"{name} does not apply to an exported transformer: {why}", available=available, fix=fix)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        del self, args, kwargs
        refuse(name, *REFUSED[name])

    method.__name__ = name
    method.__doc__ = f"UnsupportedError: {REFUSED[name][0]}; {REFUSED[name][1]}."
    return method


class WholeEngine:
    """Base of a transformer that is one engine; every method of :data:`REFUSED` raises UnsupportedError."""

    is_cache_enabled = False
    is_gradient_checkpointing = False

    def disable_cache(self) -> None:
        """Nothing to do: diffusers' caches are never on."""

    def disable_gradient_checkpointing(self) -> None:
        """Nothing to do: it is never on."""


for _name in REFUSED:
    setattr(WholeEngine, _name, _refusing(_name))
