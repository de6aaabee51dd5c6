"""Look up what is not public in another package, and say which release has it where it is gone."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from dvdquant.errors import UnsupportedError

__all__ = ["hook", "lost_hook", "require_name"]


def hook(package: str, path: str, why: str, requirement: str) -> Any:
    """Return an object of another package that no release promises to keep.

    Args:
        package: The name under which pip knows the package.
        path: The module and the attributes in it, as ``torch._C:_nn._parse_to``.
        why: What dvdquant needs it for, in a few words.
        requirement: The releases that have it, as pip takes them.

    Raises:
        UnsupportedError: The installed release does not have it; with its version and the command that installs another.
    """
    module, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in filter(None, names.split(".")):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise lost_hook(package, path.replace(":", "."), why, requirement) from error
    return found


def require_name(package: str, path: str, name: str, why: str, requirement: str) -> None:
    """Refuse a function of another package whose code does not use ``name`` any more; arguments as for :func:`hook`.

    Args:
        package: The name of the package.
        path: The function.
        name: The attribute or the text that its code has to use.
        why: What dvdquant needs it for.
        requirement: The releases that use it.

    Raises:
        UnsupportedError: There is no such function, or it does not use the name.
    """
    code = getattr(hook(package, path, why, requirement), "__code__", None)
    if code is None or name not in (*code.co_names, *code.co_consts):
        raise lost_hook(package, f"{name} in {path.replace(':', '.')}", why, requirement)


def lost_hook(package: str, name: str, why: str, requirement: str) -> UnsupportedError:
    """Return the error for something that the installed release of a package lacks; arguments as for :func:`hook`.

    Args:
        package: The name of the package.
        name: What it lacks.
        why: What dvdquant needs it for.
        requirement: The releases that have it.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "(of unknown version)"
    return UnsupportedError(
        f"{package} {version} has no {name}, which dvdquant needs {why}",
        available=requirement,
        fix=f"install a release that has it: pip install '{requirement}'",
    )
