"""Tools that run the exported engines.

The package has sessions per backend, step switching, and a drop-in transformer for diffusers pipelines. ``from
dvdquant.deploy import DvdqTransformer`` imports PyTorch and diffusers at that moment, not with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvdquant.deploy.pipelines.transformer import DvdqTransformer

__all__ = ["DvdqTransformer"]


def __getattr__(name: str) -> Any:
    if name == "DvdqTransformer":
        from dvdquant.deploy.pipelines.transformer import DvdqTransformer

        return DvdqTransformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
