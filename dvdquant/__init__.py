"""dvdquant: video diffusion transformers as TensorRT engines with 4-bit weights and 4- or 8-bit activations.

The public names are :func:`export_model`, :func:`plan_schedule`, :func:`inspect_export`, :class:`DvdqTransformer`,
:class:`Recipe` and :func:`get_recipe`. Each is imported at its first use, so that ``import dvdquant`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvdquant.api import export_model, inspect_export, plan_schedule
    from dvdquant.deploy.pipelines.transformer import DvdqTransformer
    from dvdquant.recipe import Recipe, get_recipe

try:
    __version__ = version("dvdquant")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.1.0"

__all__ = [
    "DvdqTransformer",
    "Recipe",
    "__version__",
    "export_model",
    "get_recipe",
    "inspect_export",
    "plan_schedule",
]

_HOMES = {
    "DvdqTransformer": "dvdquant.deploy.pipelines.transformer",
    "Recipe": "dvdquant.recipe",
    "export_model": "dvdquant.api",
    "get_recipe": "dvdquant.recipe",
    "inspect_export": "dvdquant.api",
    "plan_schedule": "dvdquant.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that holds it.

    Raises:
        AttributeError: The name is not public.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'dvdquant' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
