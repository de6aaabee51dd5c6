"""One tar that holds an export for a machine without internet: written here, read there with doubt.

A bundle is a plain tar: ``bundle.json`` first, then the files that it lists, in its order, each a regular file of the size and
the SHA-256 that it says. Whatever else a tar may hold (links, devices, sparse files, extended headers, members that are not
listed) is refused. So the size of every part is known before anything is written, and no name is trusted. What the record says of
the engines and of the plugin library is compared with the manifest and with that library when a bundle is opened, so that whoever
decides by it decides by what is inside.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # typing's own from Python 3.12 on

from dvdquant import __version__
from dvdquant.artifact.entries import ComputeCapability, Digest, Size, Text
from dvdquant.artifact.layout import MANIFEST, PLUGIN_PLACE
from dvdquant.artifact.manifest import MAX_MANIFEST, Manifest, check_relpath
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.system.files import FileEntry, disk_error, hash_file, open_regular, require_disk, strict_json
from dvdquant.system.plugin_file import MAX_PLUGIN, PluginFile, parse_plugin, read_plugin
from dvdquant.system.records import first_problem
from dvdquant.system.whole_file import atomic_path
from dvdquant.text import shown

__all__ = [
    "Bundle",
    "BundleFacts",
    "Member",
    "open_bundle",
    "write_bundle",
]

RECORD = "bundle.json"
FORMAT: Literal[1] = 1
MAX_RECORD = 8 << 20
MAX_FILES = 4096
BLOCK = 512
# Names longer than this need headers of another kind.
MAX_NAME = 100
_RECORD_SIZE = 20 * BLOCK  # what tar fills the end of a file up to
_AGAIN = "make the bundle again with dvdq-bundle, and compare its SHA-256 after copying"


@with_config({"extra": "forbid", "strict": True})
class Member(TypedDict):
    """One file of a bundle.

    Attributes:
        path: Its path in the export.
        sha256: Its SHA-256.
        bytes: Its size.
    """

    path: Annotated[str, Field(max_length=MAX_NAME)]
    sha256: Digest
    bytes: Size


@with_config({"extra": "forbid", "strict": True})
class BundleFacts(TypedDict):
    """The facts of a bundle that a device needs before it unpacks one.

    Attributes:
        format: The version of this format.
        dvdquant: The version that wrote it.
        sm: The compute capabilities that its engines are for.
        machine: The processor that its libraries are for, as ``uname -m`` says it; null if it holds none.
        tensorrt_major: The major version of TensorRT that its plugin library is for; null if it holds none.
        builder_bytes: The memory that the largest build takes, by estimate.
        held_bytes: The device memory for the weights of the smallest of its engines.
        builders: The builders that its engines need; older bundles do not say it.
        files: Its files, in their order.
    """

    format: Literal[1]
    dvdquant: Text
    sm: Annotated[list[ComputeCapability], Field(min_length=1, max_length=100)]
    machine: Annotated[str, Field(pattern="^[a-z0-9_]{1,32}$")] | None
    tensorrt_major: Annotated[int, Field(ge=8, le=99)] | None
    builder_bytes: Size
    held_bytes: Size
    builders: NotRequired[Annotated[list[Literal["tensorrt", "tensorrt_rtx"]], Field(min_length=1, max_length=2)]]
    files: Annotated[list[Member], Field(min_length=1, max_length=MAX_FILES)]


_FACTS = TypeAdapter(BundleFacts)


@dataclass(frozen=True)
class Bundle:
    """An open bundle, of which the record was read and checked.

    Args:
        path: The file.
        facts: Its record, which says what the manifest and the plugin library say.
        manifest: The manifest of its export, as it was packed.
        library: What its plugin library is for; None if it holds none.
        file: The open file, at the first member after the manifest.
    """

    path: Path
    facts: BundleFacts
    manifest: Manifest
    library: PluginFile | None
    file: IO[bytes]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files that it holds."""
        return sum(member["bytes"] for member in self.facts["files"])

    def copy_next(self, member: Member, target: IO[bytes], progress: Callable[[int], None]) -> None:
        """Copy the next member into a file, and compare its SHA-256 with the record.

        Args:
            member: The record's entry of the member that is next.
            target: The file, open for writing.
            progress: A function that gets the number of bytes of every block.

        Raises:
            OutputError: The next member is another one, is not what the record says, or ends too early.
        """
        _expect(self.file, self.path, member)
        digest, left = hashlib.sha256(), member["bytes"]
        while left:
            block = self.file.read(min(left, 1 << 22))
            if not block:
                raise _changed(self.path, "it ends too early")
            digest.update(block)
            target.write(block)
            left -= len(block)
            progress(len(block))
        self.file.read(_padded(member["bytes"]) - member["bytes"])
        if digest.hexdigest() != member["sha256"]:
            raise _changed(self.path, f"{shown(member['path'])} was changed")

    def require_end(self) -> None:
        """Refuse a bundle that holds something behind its last member, which was just read.

        Raises:
            OutputError: There is something.
        """
        if self.file.read().strip(b"\0"):
            raise _changed(self.path, "there is something behind its last file")


# ---------------------------------------------------------------------------------------------------------------- write


def write_bundle(
    path: Path,
    out: Path,
    manifest: Manifest,
    others: Mapping[str, Path | bytes],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> str:
    """Write the tar, which appears whole or not at all, and return its SHA-256.

    Args:
        path: The file to write.
        out: The export.
        manifest: Its manifest, perhaps without some of its files; those that it lists are packed.
        others: Relative path -> file, or bytes, of what is packed besides; a plugin library is at ``PLUGIN_PLACE``.
        progress: A function that gets the number of bytes of every block packed.

    Raises:
        OutputError: A file of the export is not what its manifest says, or cannot be read or written.
        ResourceError: The disk is full.
        UnsupportedError: The plugin library is none.
    """
    # 1. What goes in; the manifest is the first, so that a reader can check the others by it.
    contents: dict[str, Path | bytes] = {MANIFEST: manifest.to_json().encode()}
    contents |= {name: out / name for name in sorted(manifest.files)} | dict(others)
    members: list[Member] = []
    for name, content in contents.items():
        if name != MANIFEST:
            check_relpath(name)
        if len(name.encode()) > MAX_NAME:
            raise OutputError(
                f"the path {shown(name)} has more than {MAX_NAME} bytes, which a plain tar cannot hold",
                fix="give the model, the component or the LoRA a shorter name and export again",
            )
        entry = manifest.files.get(name) if isinstance(content, Path) else None
        if entry is None:
            entry = _entry(content)
        members.append({"path": name, "sha256": entry["sha256"], "bytes": entry["bytes"]})
    library = others.get(PLUGIN_PLACE)
    facts = _facts_of(manifest, library if library is None else _plugin_of(library), members)
    record = (json.dumps(facts, indent=1) + "\n").encode()
    require_disk(path.parent, sum(_padded(m["bytes"]) + BLOCK for m in members) + len(record), "the bundle")
    # 2. Write it: the same export gives the same bytes.
    try:
        with atomic_path(path) as unfinished, unfinished.open("r+b") as file:
            digest = _Hashed(file)
            with tarfile.open(fileobj=digest, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 20) as tar:  # type: ignore[call-overload]
                _add(tar, RECORD, io.BytesIO(record), len(record))
                for member in members:
                    _pack(tar, member, contents[member["path"]], progress)
    except OSError as error:
        raise disk_error(error, error.filename or path) from error
    return digest.hexdigest()


def _plugin_of(library: Path | bytes) -> PluginFile:
    """Return what a plugin library is for.

    Raises:
        UnsupportedError: It is none.
    """
    return parse_plugin(Path(PLUGIN_PLACE), library) if isinstance(library, bytes) else read_plugin(library)


def _facts_of(manifest: Manifest, library: PluginFile | None, files: list[Member]) -> BundleFacts:
    """Return the record of a bundle.

    Args:
        manifest: The manifest that it holds.
        library: The plugin library that it holds, or None.
        files: Its files.
    """
    builds = manifest.builds
    facts = BundleFacts(
        format=FORMAT,
        dvdquant=__version__,
        sm=sorted({sm for entry in builds for sm in entry["sm"]}, key=float),
        machine=None if library is None else library.machine,
        tensorrt_major=None if library is None else library.tensorrt_major,
        builder_bytes=max((entry["builder_bytes"] for entry in builds), default=0),
        held_bytes=min((entry["held_bytes"] for entry in builds), default=0),
        files=files,
    )
    if builders := sorted({entry["backend"] for entry in builds}):
        facts["builders"] = builders
    return facts


class _Hashed:
    """A file that hashes what is written to it.

    Args:
        file: The file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash a block."""
        self._digest.update(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        """Return the SHA-256 so far."""
        return self._digest.hexdigest()


class _Checked:
    """A reader that hashes what is read from a file, for a digest that is compared at the end.

    Args:
        file: The file.
        progress: A function that gets the number of bytes of every block.
    """

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        self._file, self._progress, self._digest = file, progress, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read and hash a block."""
        data = self._file.read(size)
        self._digest.update(data)
        self._progress(len(data))
        return data

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was read."""
        return self._digest.hexdigest()


def _entry(content: Path | bytes) -> FileEntry:
    """Return the hash and the size of what is packed besides the export's files."""
    if isinstance(content, bytes):
        return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return hash_file(content)


def _pack(tar: tarfile.TarFile, member: Member, content: Path | bytes, progress: Callable[[int], None]) -> None:
    """Add one member, whose bytes are compared with its digest as they are packed.

    Raises:
        OutputError: The file is not what the manifest says.
    """
    if isinstance(content, bytes):
        _add(tar, member["path"], io.BytesIO(content), len(content))
        return
    try:
        descriptor, size = open_regular(content)
    except ValueError as error:
        raise OutputError(
            f"{content} cannot be packed: {error}", fix="make it readable, or export again into an empty folder"
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        reader = _Checked(file, progress)
        if size == member["bytes"]:
            _add(tar, member["path"], reader, size)  # type: ignore[arg-type]
        if reader.hexdigest() != member["sha256"]:
            raise OutputError(
                f"{content} does not match its manifest: it was changed", fix="export again, or dvdq-inspect --check"
            )


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> None:
    """Add a regular file of nobody, of no time."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    tar.addfile(info, file)


# ----------------------------------------------------------------------------------------------------------------- read


@contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """Open a bundle and compare its record with its size, its manifest and its plugin library; the rest is not looked at yet.

    Args:
        path: The file.

    Raises:
        OutputError: It is no bundle, one of another format, its size is not what its record says, or the record says
            something else than the manifest or the plugin library.
    """
    try:
        descriptor, size = open_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"{path} cannot be read: {reason}", fix="give the file that dvdq-bundle wrote") from error
    with os.fdopen(descriptor, "rb") as file:
        info = _header(file, path)
        if info is None or info.name != RECORD or info.size > MAX_RECORD:
            raise OutputError(
                f"{path} is no bundle: it does not begin with {RECORD}", fix="give the file that dvdq-bundle wrote"
            )
        facts = _read_facts(_read(file, info.size, path), path)
        rest = sum(BLOCK + _padded(member["bytes"]) for member in facts["files"])
        whole = file.tell() + rest + 2 * BLOCK
        if not whole <= size <= -(-whole // _RECORD_SIZE) * _RECORD_SIZE:
            raise OutputError(
                f"{path} has {size} bytes, and its record says {whole}: it was cut off, or something was added",
                fix=_AGAIN,
            )
        start = file.tell()
        member = facts["files"][0]
        _expect(file, path, member)
        manifest = Manifest.from_json(_hashed_bytes(file, path, member))
        library = _packed_plugin(file, path, facts, start)
        _check_claims(path, facts, manifest, library)
        yield Bundle(path, facts, manifest, library, file)


def _expect(file: IO[bytes], path: Path, member: Member) -> None:
    """Read the header of a member.

    Raises:
        OutputError: It is of another member than the one that the record lists there.
    """
    info = _header(file, path)
    if info is None or (info.name, info.size) != (member["path"], member["bytes"]):
        raise _changed(path, f"{shown(member['path'])} is not where its record has it")


def _packed_plugin(file: IO[bytes], path: Path, facts: BundleFacts, start: int) -> PluginFile | None:
    """Return what the plugin library of a bundle is for, or None if it holds none. The place in the file stays as it is.

    Args:
        file: The open bundle.
        path: Its path.
        facts: Its record.
        start: The place of the first member after the record.

    Raises:
        OutputError: It is not what the record says, or no plugin library.
    """
    for member in facts["files"]:
        start += BLOCK
        if member["path"] == PLUGIN_PLACE and member["bytes"]:
            if member["bytes"] > MAX_PLUGIN:
                raise _changed(path, f"{PLUGIN_PLACE} is no plugin library")
            data = os.pread(file.fileno(), member["bytes"], start)
            if hashlib.sha256(data).hexdigest() != member["sha256"]:
                raise _changed(path, f"{PLUGIN_PLACE} was changed")
            try:
                return parse_plugin(path / PLUGIN_PLACE, data)
            except UnsupportedError as error:
                raise _changed(path, f"{PLUGIN_PLACE} is no plugin library of dvdquant") from error
        start += _padded(member["bytes"])
    return None


def _check_claims(path: Path, facts: BundleFacts, manifest: Manifest, library: PluginFile | None) -> None:
    """Compare the record with what it is a record of.

    Raises:
        OutputError: The manifest or the plugin library says something else, or the record lists a file otherwise than the
            manifest.
    """
    listed = {m["path"]: FileEntry(sha256=m["sha256"], bytes=m["bytes"]) for m in facts["files"]}
    if any(listed.get(name) != entry for name, entry in manifest.files.items()):
        raise _changed(path, "its files are not those of its manifest")
    right = _facts_of(manifest, library, facts["files"])
    for name in ("sm", "builders", "builder_bytes", "held_bytes", "machine", "tensorrt_major"):
        if name != "builders" or name in facts:  # older bundles lack it
            said, found = facts.get(name), right.get(name)
            if said != found:
                where = PLUGIN_PLACE if name in ("machine", "tensorrt_major") else MANIFEST
                raise _changed(path, f"{RECORD} says {name} {json.dumps(said)}, and {where} {json.dumps(found)}")


def _header(file: IO[bytes], path: Path) -> tarfile.TarInfo | None:
    """Return the next member of a tar, or None where no plain file is next.

    Raises:
        OutputError: It is a link, a device or another thing that a bundle does not hold, or no header at all.
    """
    raw = file.read(BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
        raise _changed(path, f"{shown(info.name)} is no plain file")
    return info


def _read(file: IO[bytes], size: int, path: Path) -> bytes:
    """Return the content of a member, and skip what fills its last block.

    Raises:
        OutputError: The file ends before.
    """
    data = file.read(size)
    file.read(_padded(size) - size)
    if len(data) != size:
        raise _changed(path, "it ends too early")
    return data


def _read_facts(raw: bytes, path: Path) -> BundleFacts:
    """Return the checked record of a bundle.

    Raises:
        OutputError: It is out of form.
    """
    try:
        data: Any = strict_json(raw)
    except ValueError as error:
        raise OutputError(f"{path}: {RECORD} is not valid JSON: {error}", fix=_AGAIN) from error
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] != FORMAT:
        raise OutputError(
            f"{path} is a bundle of format {data['format']}",
            available=f"this version of dvdquant reads format {FORMAT}",
            fix=f"update dvdquant, or make the bundle with dvdquant {__version__}",
        )
    try:
        facts = _FACTS.validate_python(data)
    except ValidationError as error:
        problem = first_problem(error, data)
        raise OutputError(
            f"{path}: {RECORD}: field {problem.field} {problem.state}", available=problem.allowed, fix=_AGAIN
        ) from error
    names = [member["path"] for member in facts["files"]]
    if names[0] != MANIFEST or facts["files"][0]["bytes"] > MAX_MANIFEST or len(set(names)) != len(names):
        raise OutputError(f"{path}: {RECORD} does not list {MANIFEST} first, or a file twice", fix=_AGAIN)
    for name in names[1:]:
        check_relpath(name)
    return facts


def _hashed_bytes(file: IO[bytes], path: Path, member: Member) -> bytes:
    """Return the content of a member.

    Raises:
        OutputError: It is not what the record says.
    """
    raw = _read(file, member["bytes"], path)
    if hashlib.sha256(raw).hexdigest() != member["sha256"]:
        raise _changed(path, f"{shown(member['path'])} was changed")
    return raw


def _padded(size: int) -> int:
    """Return a size filled up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _changed(path: Path, why: str) -> OutputError:
    """Return the error for a bundle that is not as it was written."""
    return OutputError(f"{path} is not as dvdq-bundle wrote it: {why}", fix=_AGAIN)
