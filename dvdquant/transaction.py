"""The output folder of an export as a transaction: all of the new export, or nothing of it.

Work goes into ``OUT/.tmp-<id>/tree``, beside a journal of what is finished; ``commit`` hashes and fsyncs it and puts it
in place (see :mod:`dvdquant.commit`). The layout a reader sees is ``OUT/manifest.json`` and the files it lists.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from .commit import (
    COMMIT,
    OWNER,
    STAGE,
    TREE,
    FolderLock,
    install,
    recover,
    recover_locked,
    remove_tree,
    sweep,
    sync_path,
    walk_files,
    write_durable,
)
from .errors import OutputError
from .files import FileEntry, disk_error, hash_file, read_limited, require_disk, strict_json
from .manifest import MANIFEST, MAX_MANIFEST, Manifest, check_relpath
from .output_folder import previous_export, real_path
from .unfinished import differences

__all__ = ["ExportTransaction", "Journal", "recover", "require_disk"]

JOURNAL = "journal.jsonl"
MAX_JOURNAL = 1 << 30

logger = logging.getLogger(__name__)


class Journal:
    """An append-only list of finished steps, each line on disk before ``add`` returns.

    A line torn by a kill or a power cut ends the journal: it and what follows are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.done: dict[str, Any] = {}
        self.files: set[str] = set()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._end = 0
            for line in read_limited(path, MAX_JOURNAL).splitlines(keepends=True):
                if not self._load(line):
                    logger.warning("%s: dropped what follows byte %d, a line that was not completed", path, self._end)
                    break
                self._end += len(line)
            os.ftruncate(self._fd, self._end)
        except BaseException:
            self.close()
            raise

    def _load(self, line: bytes) -> bool:
        try:
            entry: Any = strict_json(line) if line.endswith(b"\n") else None
            files = {check_relpath(name) for name in entry["files"]}
            if entry["step"] is not None:
                self.done[str(entry["step"])] = entry["data"]
        except (ValueError, TypeError, KeyError, OutputError):
            return False
        self.files |= files
        return True

    def add(self, step: str | None, data: Any, files: Iterable[str]) -> None:
        """Append one line: the step finished (None for only naming files), what it left, and its files."""
        entry = {"step": step, "data": data, "files": sorted(files)}
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], self._end + written)
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._end)  # a full disk may have taken half a line
            raise
        self._end += len(line)
        self._load(line)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class ExportTransaction:
    """Context manager around one export into ``out``.

    ``out`` may be absent (it and its parents are created), empty, or a previous export, which stays until the commit
    and is replaced by it. Leaving the block without :meth:`commit`, by an exception or not, removes all that was
    written; with ``keep_for_resume`` and a finished step, the work is kept for a run with ``resume``.

    Args:
        out: the output folder.
        key: what the result depends on (checkpoint fingerprint, recipe, options), plain JSON values.
        resume: adopt the work of an interrupted run with the same key.
        keep_for_resume: keep finished work on failure; may be set later as an attribute.

    Attributes:
        previous: the manifest of the export being replaced. complete: whether that has the same key, so that there is
        nothing left to do. resumed: whether work was adopted. recovered: whether a killed commit was completed on
        entry. kept: the folder of the work left behind for ``--resume``.

    Raises:
        OutputError: ``out`` is a file, holds something else, is in use (naming the pid) or cannot be written;
            ``resume`` finds work of another key. ResourceError: the disk is full.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        key: Mapping[str, Any] | None = None,
        resume: bool = False,
        keep_for_resume: bool = False,
    ) -> None:
        self.out = real_path(out)
        text = json.dumps(dict(key or {}), sort_keys=True, allow_nan=False)
        self.key: dict[str, Any] = json.loads(text)
        self.export_key = hashlib.sha256(text.encode()).hexdigest()
        self.resume, self.keep_for_resume = resume, keep_for_resume
        self.previous: Manifest | None = None
        self.complete = self.resumed = self.recovered = self.committed = False
        self.kept: Path | None = None
        self._made: list[Path] = []
        self._lock: FolderLock | None = None
        self._stage: Path | None = None
        self._journal: Journal | None = None

    def __enter__(self) -> ExportTransaction:
        try:
            self._lock = self._open_folder()
            self.recovered = recover_locked(self.out)
            self.previous = previous_export(self.out)
            self.complete = bool(self.key) and self.previous is not None and self.previous.export_key == self.export_key
            adopted = self._find_work() if self.resume and not self.complete else None
            sweep(self.out, keep=adopted)
            if adopted:
                self._journal = Journal(adopted / JOURNAL)
                _drop_unclaimed(adopted / TREE, self._journal.files)
                self.resumed = self.keep_for_resume = True
            self._stage = adopted or self._new_stage()
            self._journal = self._journal or Journal(self._stage / JOURNAL)
        except BaseException as error:
            self._abort()
            if isinstance(error, OSError):
                raise disk_error(error, error.filename or self.out) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._abort()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_error(error, error.filename or self.out) from error

    def _open_folder(self) -> FolderLock:
        attempts = 100
        while True:
            try:
                for folder in reversed((self.out, *self.out.parents)):
                    if _make_folder(folder) and folder not in self._made:
                        self._made.append(folder)
                return FolderLock(self.out)
            except FileNotFoundError:  # another export failed just now and removed the folders it had made
                if not (attempts := attempts - 1):
                    raise

    def _new_stage(self) -> Path:
        stage = self.out / f".tmp-{secrets.token_hex(8)}"
        (stage / TREE).mkdir(parents=True)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": datetime.now(UTC).isoformat()}
        write_durable(stage / OWNER, json.dumps({**owner, "key": self.key}).encode())
        sync_path(stage)
        sync_path(self.out)
        return stage

    def _find_work(self) -> Path | None:
        """The newest work with our key and anything finished; OutputError if there is only such work of another key."""
        keys: dict[Path, Any] = {}
        for stage in self.out.iterdir():
            if STAGE.fullmatch(stage.name) and (stage / TREE).is_dir() and not (stage / TREE).is_symlink():
                try:
                    if (stage / JOURNAL).stat().st_size:
                        keys[stage] = strict_json(read_limited(stage / OWNER, MAX_MANIFEST))["key"]
                except (OSError, ValueError, TypeError, KeyError):
                    continue  # killed while it was made or being deleted
        newest = sorted(keys, key=lambda stage: stage.stat().st_mtime_ns, reverse=True)
        for stage in newest:
            if keys[stage] == self.key:
                return stage
        if newest:
            raise OutputError(
                f"--resume: the interrupted export in {self.out} was another one",
                available=differences(keys[newest[0]], self.key),
                fix="use the same model and options, or leave out --resume to start again",
            )
        return None

    def _abort(self) -> None:
        """Close; unless committed, remove what was written (or keep it for --resume), then what was created for it."""
        finished = self._journal is not None and bool(self._journal.done)
        if self._journal is not None:
            self._journal.close()
        stage = self._stage
        try:
            if stage is not None and stage.exists() and not os.path.lexists(self.out / COMMIT):
                if finished and self.keep_for_resume and not self.committed:
                    self.kept = stage
                    logger.warning("finished work is kept in %s: run again with --resume to go on from it", stage)
                else:
                    remove_tree(stage)
        except OSError as error:
            logger.warning("%s could not be removed (%s); the next export into %s does it", stage, error, self.out)
        finally:
            if self._lock is not None:
                self._lock.release()
        if not self.committed:
            for folder in reversed(self._made):
                try:
                    folder.rmdir()
                except OSError:
                    break  # not empty: work kept for --resume, or somebody else's files

    # -------------------------------------------------------------------------------------------------- the work

    @property
    def tree(self) -> Path:
        """The folder that becomes the export; write only into it."""
        if self._stage is None:
            raise RuntimeError("the transaction has not been entered")
        return self._stage / TREE

    def path(self, relative: str, *, resumable: bool = False) -> Path:
        """The place of a file of the export, its parent folders made.

        A resumed run finds only files that were ``resumable`` or named by a finished step; others are deleted, since
        nobody knows whether they are whole.
        """
        path = self.tree / check_relpath(relative)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resumable and self._journal is not None and relative not in self._journal.files:
                self._journal.add(None, None, [relative])
        except OSError as error:
            raise disk_error(error, path) from error
        return path

    def done(self, step: str, data: Any = None, files: Iterable[str] = ()) -> None:
        """Record that ``step`` is finished, with JSON ``data`` to find again; ``files`` of it are fsynced first."""
        if self._journal is None:
            raise RuntimeError("the transaction has not been entered")
        names = [check_relpath(name) for name in files]
        try:
            for name in names:
                sync_path(self.tree / name)
            self._journal.add(step, data, names)
        except OSError as error:
            raise disk_error(error, self.tree) from error

    def is_done(self, step: str) -> bool:
        """Whether ``step`` was finished, in this run or in the one resumed."""
        return step in self.steps

    def data(self, step: str) -> Any:
        """What :meth:`done` was given for ``step``; KeyError if it is not done."""
        return self.steps[step]

    @property
    def steps(self) -> dict[str, Any]:
        """All finished steps and their data, in order."""
        return dict(self._journal.done) if self._journal else {}

    def commit(
        self,
        manifest: Manifest,
        known: Mapping[str, FileEntry] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Manifest:
        """Hash the tree, write the manifest and put the export in place; returns the manifest with its files.

        Args:
            manifest: everything but ``files`` and ``export_key``, which are filled in here.
            known: hashes already at hand (``StreamingWriter.finish()``), by relative path; of the right size, they are
                not computed again.
            progress: gets the number of bytes of every block hashed.

        Raises:
            OutputError, ResourceError: the export before this one is still in place, or the next run completes this.
        """
        tree, stage = self.tree, self._stage
        if self.committed or stage is None or self._lock is None:
            raise RuntimeError("the transaction is over")
        try:
            (tree / MANIFEST).unlink(missing_ok=True)
            files = _hash_tree(tree, known or {}, progress)
            final = replace(manifest, files=files, export_key=self.export_key)
            write_durable(tree / MANIFEST, final.to_json().encode())
            for folder, _, _ in os.walk(tree, topdown=False):
                sync_path(Path(folder))
            sync_path(stage)
            self._lock = install(self.out, stage, files, self.previous, self._lock)
        except OSError as error:
            if os.path.lexists(self.out / COMMIT):
                raise OutputError(
                    f"the export is finished, but putting it in place failed at {error.filename}: {error.strerror}",
                    fix="remove the cause, then run the same command with --resume, which completes it at once",
                ) from error
            raise disk_error(error, error.filename or self.out) from error
        self.committed = True
        return final


def _make_folder(folder: Path) -> bool:
    """Whether it was made; OutputError if a file has its name."""
    try:
        folder.mkdir()
    except OSError:
        if folder.is_dir():
            return False
        if os.path.lexists(folder):
            raise OutputError(f"{folder} is not a folder", fix="pick another -o") from None
        raise
    return True


def _hash_tree(
    tree: Path, known: Mapping[str, FileEntry], progress: Callable[[int], None] | None
) -> dict[str, FileEntry]:
    files: dict[str, FileEntry] = {}
    for name in sorted(walk_files(tree)):
        path = tree / check_relpath(name)
        if path.is_symlink() or not path.is_file():
            raise OutputError(f"{path} is not a regular file and cannot be part of an export")
        os.chmod(path, 0o644)
        sync_path(path)
        entry = known.get(name)
        files[name] = entry if entry and entry["bytes"] == path.stat().st_size else hash_file(path, progress)
    return files


def _drop_unclaimed(tree: Path, claimed: set[str]) -> None:
    for name in list(walk_files(tree)):
        if name not in claimed:
            (tree / name).unlink()
