"""The exports that ComfyUI offers: folders below ``models/dvdquant`` and what extra_model_paths.yaml adds.

Only names from this list are opened, never a path from a workflow: a workflow comes from anywhere, and engines run code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from dvdquant.artifact.layout import MANIFEST
from dvdquant.artifact.manifest import MAX_MANIFEST
from dvdquant.checkpoint.prompt_table import PROMPTS
from dvdquant.errors import OutputError
from dvdquant.system.files import read_limited
from dvdquant.system.plugin_file import plugin_paths

__all__ = ["FOLDER", "NOTHING", "changed", "exports", "find", "plugin_libraries", "roots", "tables"]

FOLDER = "dvdquant"  # below ComfyUI/models
NOTHING = "none: put an export into models/dvdquant"
PLUGINS = "DVDQ_PLUGINS"
"""The variable that names the TensorRT plugin libraries, with ``:`` between them, as PATH has."""
DEPTH = 2  # folders below a root


def roots() -> list[Path]:
    """Return the folders that hold exports. ``models/dvdquant`` is added to ComfyUI's list."""
    import folder_paths

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    return [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]


def plugin_libraries() -> tuple[Path, ...]:
    """Return the TensorRT plugin libraries that the environment of ComfyUI names. No workflow can name one.

    Raises:
        UnsupportedError: A library is not there.
    """
    return plugin_paths([path for path in os.environ.get(PLUGINS, "").split(os.pathsep) if path])


def exports(places: Iterable[Path]) -> list[str]:
    """Return the names of the exports: their paths below the places.

    Args:
        places: The folders to look in.
    """
    return _names(places, MANIFEST)


def tables(places: Iterable[Path]) -> list[str]:
    """Return the names of the models with a prompt table.

    Args:
        places: The folders to look in.
    """
    return _names(places, PROMPTS)


def find(name: str, places: Iterable[Path], file: str = MANIFEST) -> Path:
    """Return the folder of a name from the list.

    Args:
        name: The name.
        places: The folders to look in.
        file: The file that such a folder holds.

    Raises:
        OutputError: There is no such folder any more.
    """
    places = list(places)
    listed = _names(places, file)
    for place in places:
        if name in listed and (place / name / file).is_file():
            return place / name
    raise OutputError(
        f"there is no {name!r:.200} in {', '.join(map(str, places))}",
        available=listed or "nothing",
        fix="copy or link the folder that dvdq-export wrote into ComfyUI/models/dvdquant, and reload the page",
    )


def changed(root: Path) -> str:
    """Return a text that changes when the export does.

    Args:
        root: The export folder.
    """
    try:
        return hashlib.sha256(read_limited(root / MANIFEST, MAX_MANIFEST)).hexdigest()
    except (OSError, ValueError):
        return "unreadable"


def _names(places: Iterable[Path], file: str) -> list[str]:
    found = set()
    for place in places:
        pattern = "*"
        for _ in range(DEPTH):
            found |= {path.parent.relative_to(place).as_posix() for path in place.glob(f"{pattern}/{file}")}
            pattern += "/*"
    return sorted(found)
