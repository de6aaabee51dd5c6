"""The repeated blocks of a transformer, compiled: what lies between the quantized layers becomes a few fused kernels."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from dvdquant.deploy.sessions.fusion import fusing_backend
from dvdquant.errors import UnsupportedError
from dvdquant.model.diffusers_hooks import repeated_block_names
from dvdquant.system.torch_hooks import allow_recompiles, notice_module_hooks

__all__ = ["cache_folder", "compile_blocks", "repeated_blocks"]

BACKEND = "inductor"
# Each bit-width and each size may need a function of its own; PyTorch's limit of 8 would end in eager mode without a word.
_FUNCTIONS = 64


def cache_folder() -> Path:
    """Return the folder that keeps compiled code from one process to the next: TORCHINDUCTOR_CACHE_DIR, or one of ours."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dvdquant" / "inductor"


def compile_blocks(model: nn.Module, dynamic: bool | None = None, fuse: bool = False, compile: bool = True) -> int:
    """Compile every repeated block of a diffusers transformer, in its place.

    Blocks of one class share the compiled function, so that the time of compilation does not grow with the depth. The
    compilation itself happens at the first call for each bit-width and size.

    Args:
        model: A diffusers transformer. Its class names the repeated blocks; else they are the modules in its lists.
        dynamic: True makes one function for all sizes, False one per size. None makes the first for its size, and the
            second for all.
        fuse: Take what comes before a quantized layer into its kernel (:mod:`.fusion`).
        compile: False runs the operations of the traced blocks one by one, which needs no compiler.

    Returns:
        The number of blocks.

    Raises:
        UnsupportedError: The model has no repeated blocks.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise UnsupportedError(
            f"{type(model).__name__} has no repeated blocks to compile", fix="open the session without compile"
        )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    allow_recompiles(_FUNCTIONS)
    notice_module_hooks()
    inner = BACKEND if compile else None
    backend = fusing_backend(inner) if fuse else inner or "eager"
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    return len(blocks)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer that its class names, or else the modules of its lists.

    Args:
        model: The transformer.
    """
    names = set(repeated_block_names(model))
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        blocks = [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
    return blocks
