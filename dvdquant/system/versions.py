"""Versions of installed packages, for what is recorded of a run."""

from __future__ import annotations

import importlib.metadata

__all__ = ["installed_versions"]


def installed_versions(*packages: str) -> dict[str, str]:
    """Return distribution -> version of those of the packages that are installed.

    Args:
        packages: The names of distributions; ONNX Runtime has several.
    """
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
