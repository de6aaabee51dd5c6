"""Where a model lies: a local folder, or a repository of the hub, of which only what is needed is downloaded."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from pathlib import Path

from dvdquant.checkpoint.untrusted import UntrustedFolder, fix_of, reason_of
from dvdquant.errors import CheckpointError
from dvdquant.system.files import disk_error
from dvdquant.system.hub_client import EndlessAnswerError, one_listing
from dvdquant.system.recognize import PICKLED_FILE, SNIFFED, Found, recognize_bytes, recognize_tensors, tensor_names
from dvdquant.text import message_of, shown

__all__ = [
    "CONVERT",
    "PICKLED",
    "hub_file",
    "is_remote",
    "locate_hub_file",
    "locate_model",
    "recognize_file",
    "start_of",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})[:/]([^\\\0]+\.(?:safetensors|gguf))", re.IGNORECASE)
PICKLED = (".bin", ".pt", ".ckpt", ".pth", ".pkl")
CONVERT = (
    "convert them in a place you trust: from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
)


def hub_file(model: str) -> tuple[str, str] | None:
    """Return the repository and the path in it of a single file on the hub, None where the name means none.

    Args:
        model: Such as ``org/name/folder/file.safetensors`` or ``org/name:file.gguf``. What is there locally is no such name.
    """
    match = _HUB_FILE.fullmatch(model)
    if match is None or ".." in match[2].split("/") or match[2].startswith("/"):
        return None
    first = Path(model.split("/")[0])
    return None if os.path.lexists(first) else (match[1], match[2])


def is_remote(model: str) -> bool:
    """Return whether a name means a repository or a single file of the hub, which is downloaded when it is opened.

    Args:
        model: The model as it was given. What is there locally is not remote.
    """
    if hub_file(model) is not None:
        return True
    return _names_repository(model) and not os.path.exists(model)


def _names_repository(model: str) -> bool:
    """Return whether a name that is not there locally has the form of a hub id, and not that of a path into a folder."""
    return _HUB_ID.fullmatch(model) is not None and not os.path.isdir(model.split("/")[0])


def locate_hub_file(repository: str, path: str, revision: str | None) -> Path:
    """Download a single file of the hub, and return where it lies.

    Args:
        repository: The hub id.
        path: The file in it.
        revision: The revision; None takes the newest.

    Raises:
        CheckpointError: The hub does not give it.
        ResourceError: The disk is full.
    """
    found = _download(repository, revision, [glob.escape(path)]) / path
    if not found.is_file():
        raise CheckpointError(
            f"the repository {repository} has no file {shown(path)}",
            fix="look at its files on the hub, or give a local file",
        )
    return found


def locate_model(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the local folder of a path or a hub id, with the links on the way to it; a hub id is downloaded.

    Args:
        model: A local folder or a hub id ``org/name``.
        revision: The revision of a hub id; None takes the newest.
        patterns: Globs of the files that are downloaded of a hub id.

    Raises:
        CheckpointError: There is no such folder, it cannot be opened, or the download fails.
        ResourceError: The disk is full.
    """
    if "\0" in model or not model.strip():
        raise CheckpointError(f"{model!r:.200} is no model", fix="give a local folder or a hub id like org/name")
    try:
        model.encode()
    except UnicodeEncodeError as error:  # the name goes into manifests and graphs, which are UTF-8
        raise CheckpointError(
            f"the name {shown(model)} is not UTF-8", fix="rename the folder, or give it by a link with a plain name"
        ) from error
    try:
        given = Path(os.path.expanduser(model))
        path = Path(os.path.realpath(given))
        info = _status(path)
        if info is not None and stat.S_ISDIR(info.st_mode):
            return given
        if info is not None:
            raise _no_folder(shown(model), path, info)
        if not _names_repository(model):
            parent = next(place for place in path.parents if place.is_dir())
            available = f"{parent} holds {UntrustedFolder(parent, (parent,)).listing()}"
            raise CheckpointError(
                f"there is no folder {shown(model)!r:.300}", available=available, fix="give a local folder or a hub id"
            )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder to expand to
        raise CheckpointError(
            f"{shown(model)!r:.200} cannot be opened: {reason_of(error)}",
            fix=fix_of(error, "give a folder that you may read"),
        ) from error
    return _download(model, revision, patterns)


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a path, or None if nothing is there."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _no_folder(model: str, path: Path, info: os.stat_result) -> CheckpointError:
    """Return the error for a model path that is no folder; it names what is there instead."""
    if not stat.S_ISREG(info.st_mode):
        return CheckpointError(f"{model} is a device, a pipe or a socket", fix="give the folder that holds config.json")
    found = recognize_file(UntrustedFolder.at(path.parent), path.name)
    if found is not None:
        return CheckpointError(f"{model} is a file, not a model folder: it is {found.what}", fix=found.fix)
    fix = PICKLED_FILE if path.suffix in PICKLED else "give the folder that holds config.json"
    return CheckpointError(f"{model} is a file, not a model folder", fix=fix)


def recognize_file(folder: UntrustedFolder, name: str) -> Found | None:
    """Return the foreign format of a file, or None if it is unknown or cannot be read.

    Args:
        folder: The folder, opened as untrusted.
        name: The name of the file in it.
    """
    start = start_of(folder, name)
    return None if start is None else recognize_bytes(start) or recognize_tensors(tensor_names(start) or ())


def start_of(folder: UntrustedFolder, name: str) -> bytes | None:
    """Return the first bytes of a file, enough for the header of a large model; None if it cannot be read.

    Args:
        folder: The folder, opened as untrusted.
        name: The name of the file in it.
    """
    try:
        fd = folder.open(name)
    except (CheckpointError, OSError, ValueError):
        return None
    try:
        # A header with the names of a large model takes about 200 kB.
        return os.pread(fd, 64 * SNIFFED, 0)
    except OSError:
        return None
    finally:
        os.close(fd)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Download the files of a hub id that fit ``patterns``, and return the folder that they are in.

    Raises:
        CheckpointError: The hub does not give them.
        ResourceError: The disk is full.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    local = "or give a local folder that holds the model"
    try:
        with one_listing():
            found = huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the HTTP client underneath has its own classes, which differ between versions
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error(error, f"the hub cache with {model}") from error
        if isinstance(error, GatedRepoError):
            what, fix = "may only be downloaded after its terms are accepted", f"accept them and log in, {local}"
        elif isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
            what, fix = f"(revision {revision}) is neither a local folder nor on the hub", f"check the name, {local}"
        elif isinstance(error, EndlessAnswerError):
            what, fix = "is no local folder, and the hub does not come to an end", f"check HF_ENDPOINT, {local}"
        else:
            what, fix = "is no local folder, and the hub gave nothing", f"connect, unset HF_HUB_OFFLINE, {local}"
        said = f"{type(error).__name__}: {message_of(error)}"
        raise CheckpointError(f"model {model!r} {what} ({said})", fix=fix) from error
    return Path(found)
