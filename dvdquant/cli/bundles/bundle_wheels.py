"""The wheels that a device needs: which they are, what fetches them, and what a folder of them lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dvdquant.errors import UnsupportedError

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest

__all__ = ["download_line", "lacking_wheels", "required_packages"]

# Of another processor than this machine's, or the builder of another target.
_NOT_THERE = ("tensorrt-rtx", "nvidia-modelopt")


def download_line(machine: str) -> str:
    """Return the command that fetches the wheels for a device, all but dvdquant's own.

    Args:
        machine: The processor of the device.
    """
    # Wheels for glibc 2.34 and older: pip does not count down by itself.
    platforms = f"$(seq -f '--platform manylinux_2_%g_{machine}' 34 -1 17) --platform manylinux2014_{machine}"
    return f"pip download -r requirements.txt --only-binary=:all: {platforms} --python-version 3.12 -d wheels"


def required_packages(manifest: Manifest) -> list[str]:
    """Return the packages that dvdquant needs there, at the versions of this machine, which this export was made with.

    dvdquant itself is in no index and is installed from its wheel, without what only its other targets need.

    Args:
        manifest: The manifest of the export.
    """
    import importlib.metadata

    lines = []
    for requirement in importlib.metadata.requires("dvdquant") or ():
        name = _name_of(requirement)
        if not name or "extra ==" in requirement:
            continue
        rtx = any(entry["backend"] == "tensorrt_rtx" for entry in manifest.builds)
        if name in _NOT_THERE and not (rtx and name == "tensorrt-rtx"):
            continue
        try:
            lines.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(requirement.partition(";")[0].strip())
    return lines


def lacking_wheels(folder: Path, wheels: list[str], required: list[str], machine: str) -> list[str]:
    """Return those of the required packages that no wheel is of.

    Args:
        folder: The folder of the wheels, for the error.
        wheels: The names of the files, ``name-version[-build]-python-abi-platform.whl`` (PEP 427).
        required: The packages, ``name==version``; a version may be missing.
        machine: The processor of the device.

    Raises:
        UnsupportedError: There is no wheel, or one is for another system or processor than the device's.
    """
    if not wheels:
        raise UnsupportedError(f"{folder} holds no wheel", fix=f"fill it: {download_line(machine)}")
    there = set()
    for wheel in wheels:
        parts = wheel.removesuffix(".whl").split("-")
        if len(parts) not in (5, 6):
            raise UnsupportedError(
                f"{folder / wheel} has not the name of a wheel",
                fix="take it out, or give the file the name that it was made with",
            )
        if not any(tag == "any" or ("linux" in tag and tag.endswith(f"_{machine}")) for tag in parts[-1].split(".")):
            raise UnsupportedError(
                f"{folder / wheel} is for {parts[-1]}, and the device is Linux on {machine}",
                fix=f"empty the folder and fill it: {download_line(machine)}",
            )
        there |= {_canonical(parts[0]), f"{_canonical(parts[0])}=={parts[1].partition('+')[0]}"}
    lacking = []
    for line in required:
        name, pinned, version = line.partition("==")
        name = _canonical(_name_of(name))
        if (f"{name}=={version}" if pinned else name) not in there:
            lacking.append(line)
    return lacking


def _name_of(requirement: str) -> str:
    """Return the name that a requirement begins with, or "" where it has none."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return "" if found is None else found[0]


def _canonical(name: str) -> str:
    """Return the name of a package as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
