"""The output folder of an export as a transaction: all of the new export, or nothing of it.

Work goes into ``OUT/.tmp-<id>/tree``, beside a journal of the finished steps. ``commit`` hashes and fsyncs the tree and
puts it in place (see :mod:`dvdquant.artifact.commit`). A reader sees ``OUT/manifest.json`` and the files that it lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import StrictInt, StrictStr, TypeAdapter

from dvdquant.artifact.commit import (
    install,
    is_trusted,
    recover,
    recover_locked,
    remove_stage,
    sweep,
)
from dvdquant.artifact.folder import Folder
from dvdquant.artifact.journal import JOURNAL, Journal, read_journal
from dvdquant.artifact.layout import COMMIT, MANIFEST, OWNER, STAGE, TREE
from dvdquant.artifact.lock import FolderLock
from dvdquant.artifact.manifest import MAX_MANIFEST, Manifest, check_relpath
from dvdquant.artifact.output_folder import check_path, previous_export, real_path
from dvdquant.artifact.unfinished import differences
from dvdquant.errors import DvdquantError, OutputError, ResourceError
from dvdquant.system.copies import copy_file, link_file
from dvdquant.system.files import FileEntry, disk_error, hash_descriptor, require_disk, strict_json
from dvdquant.text import shown

__all__ = ["ExportTransaction", "recover", "require_disk"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The content of ``owner.json`` of a stage: the process that made it, and the key of its work.

    Args:
        pid: The id of the process.
        host: The name of its machine.
        started: The time of its start, in ISO 8601.
        key: The values that the result depends on.
    """

    pid: StrictInt
    host: StrictStr
    started: StrictStr
    key: dict[StrictStr, Any]


_OWNER = TypeAdapter(Owner)


class ExportTransaction:
    """A context manager around one export into ``out``.

    ``out`` may be absent (it and its parents are created), empty, or a previous export, which stays until the commit
    and is replaced by it. If the block ends without :meth:`commit`, by an exception or not, everything that was written
    is removed. With ``keep_for_resume`` and a finished step, the work is kept for a run with ``resume``.

    Args:
        out: The output folder.
        key: The values that the result depends on (checkpoint fingerprint, recipe, options), as plain JSON.
        resume: Adopt the work of an interrupted run with the same key.
        keep_for_resume: Keep finished work on failure. It may be set later as an attribute.
        accept: A function of a step and its data, read from the journal of interrupted work. It says if they are in
            form.

    Attributes:
        previous: The manifest of the export that is replaced, or None.
        complete: True if that export has the same key, so that there is nothing left to do.
        resumed: True if work was adopted.
        recovered: True if a killed commit was completed on entry.
        committed: True after :meth:`commit`.
        kept: The folder of the work left behind for ``--resume``, or None.

    Raises:
        OutputError: ``out`` is a file, holds something else, is in use (the error names the pid) or cannot be written.
            Or ``resume`` finds only work of another key. An OSError in the block becomes this error, or the next.
        ResourceError: The disk is full.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        key: Mapping[str, Any] | None = None,
        resume: bool = False,
        keep_for_resume: bool = False,
        accept: Callable[[str, Any], bool] = lambda step, data: True,
    ) -> None:
        self.out = real_path(out)
        check_path(self.out)
        text = json.dumps(dict(key or {}), sort_keys=True, allow_nan=False)
        self.key: dict[str, Any] = json.loads(text)
        self.export_key = hashlib.sha256(text.encode()).hexdigest()
        self.resume, self.keep_for_resume = resume, keep_for_resume
        self.previous: Manifest | None = None
        self.complete = self.resumed = self.recovered = self.committed = False
        self.kept: Path | None = None
        self._made: list[Path] = []
        self._lock: FolderLock | None = None
        self._stage: Folder | None = None
        self._journal: Journal | None = None
        self._accept = accept
        self._useless: dict[str, str] = {}

    def __enter__(self) -> ExportTransaction:
        try:
            self._lock = self._open_folder()
            folder = self._lock.folder
            self.recovered = recover_locked(folder)
            self.previous = previous_export(folder)
            self.complete = bool(self.key) and self.previous is not None and self.previous.export_key == self.export_key
            adopted = self._find_work(folder) if self.resume and not self.complete else None
            self._sweep(folder, adopted)
            if adopted:
                self._stage = folder.child(adopted)
                self._journal = Journal(self._stage, accept=self._accept)
                _drop_unclaimed(self._stage, self._journal.files, folder)
                self.resumed = self.keep_for_resume = True
            else:
                self._stage = self._new_stage(folder)
                self._journal = Journal(self._stage)
        except BaseException as error:
            self._abort()
            if isinstance(error, OSError):
                raise disk_error(error, error.filename or self.out) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._abort()
        # A pipe that nobody reads any more belongs to the terminal; the folder has no fault.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> DvdquantError:
        """Return the error for an OSError of the block, which may be of a file elsewhere, or of no file."""
        place = error.filename if isinstance(error.filename, str) else os.fsdecode(error.filename or b"")
        said = disk_error(error, place or self.out)
        if isinstance(said, ResourceError) or Path(place or self.out).is_relative_to(self.out):
            return said
        return OutputError(f"the export into {self.out} failed at {place}: {error.strerror}", fix=said.fix)

    def _open_folder(self) -> FolderLock:
        """Make the output folder and its parents where they are missing, and lock it.

        Raises:
            OutputError: A file is in the place of a folder, or another export runs.
            OSError: A folder cannot be made or opened.
        """
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

    def _new_stage(self, folder: Folder) -> Folder:
        """Make and open a new stage.

        Nobody else may enter its folder, because later files are written into it by path.
        """
        name = f".tmp-{secrets.token_hex(8)}"
        folder.make(name, 0o700)
        stage = folder.child(name)
        try:
            stage.make(TREE)
            owner = Owner(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(), self.key)
            stage.write(OWNER, json.dumps(vars(owner)).encode())
            stage.sync()
            folder.sync()
        except BaseException:
            stage.close()
            with contextlib.suppress(OSError):
                remove_stage(folder, name)
            raise
        return stage

    def _sweep(self, folder: Folder, adopted: str | None) -> None:
        """Delete the work of earlier runs but what is ``adopted``; who asked for --resume is told what goes, and why."""
        for name in folder.names() if self.resume else ():
            if STAGE.fullmatch(name) and name != adopted:
                why = self._useless.get(name, "newer work of the same model and options is gone on with")
                if self.complete:
                    why = "the export it was for is finished"
                logger.warning("--resume: %s is deleted: %s", folder.path / name, why)
        sweep(folder, keep=adopted)

    def _find_work(self, folder: Folder) -> str | None:
        """Return the name of the newest stage with our key and a finished step, or None if there is no unfinished work.

        Raises:
            OutputError: There is only work of another key.
        """
        found: list[tuple[int, str, dict[str, Any]]] = []
        for name in folder.names():
            if STAGE.fullmatch(name) and folder.has_folder(name):
                try:
                    with folder.child(name) as stage:
                        if useless := _why_no_work(stage, folder):
                            self._useless[name] = useless
                        else:
                            owner = _OWNER.validate_python(strict_json(stage.read(OWNER, MAX_MANIFEST)))
                            found.append((stage.own().st_mtime_ns, name, owner.key))
                except (OSError, ValueError) as error:
                    # Killed while it was made or being deleted; or of somebody else, or made to look like work.
                    reason = error.strerror if isinstance(error, OSError) else None
                    self._useless[name] = f"it is damaged ({shown(reason or error, 200)})"
            elif STAGE.fullmatch(name):
                self._useless[name] = "it is no folder"
        found.sort(key=lambda work: work[0], reverse=True)
        for _, name, key in found:
            if key == self.key:
                others = {other: "it is of another model or of other options" for _, other, its in found if its != key}
                self._useless |= others
                return name
        if found:
            raise OutputError(
                f"--resume: the interrupted export in {self.out} was another one",
                available=differences(found[0][2], self.key),
                fix="use the same model and options, or leave out --resume to start again",
            )
        return None

    def _abort(self) -> None:
        """Close everything; unless committed, remove the work (or keep it for --resume) and the folders made for it."""
        finished = self._journal is not None and bool(self._journal.done)
        if self._journal is not None:
            self._journal.close()
        try:
            if self._stage is not None and self._lock is not None:
                self._leave_stage(self._stage, self._lock.folder, finished)
        finally:
            if self._stage is not None:
                self._stage.close()
            if self._lock is not None:
                self._lock.release()
        if not self.committed:
            for folder in reversed(self._made):
                try:
                    folder.rmdir()
                except OSError:
                    break  # it holds work kept for --resume, or somebody else's files

    def _leave_stage(self, stage: Folder, folder: Folder, finished: bool) -> None:
        """Remove the stage, or keep it for --resume.

        Args:
            stage: The stage.
            folder: The output folder.
            finished: The journal has a finished step.
        """
        place, name = self.out / stage.path.name, stage.path.name
        try:
            if not folder.has_folder(name) or folder.has(COMMIT):
                return
            if finished and self.keep_for_resume and not self.committed:
                self.kept = place
                logger.warning("finished work is kept in %s: run again with --resume to go on from it", place)
            else:
                remove_stage(folder, name)
        except OSError as error:
            logger.warning("%s could not be removed (%s); the next export into %s does it", place, error, self.out)

    # -------------------------------------------------------------------------------------------------- the work

    @property
    def tree(self) -> Path:
        """Return the folder that becomes the export; write only into it.

        Raises:
            RuntimeError: The transaction has not been entered.
        """
        if self._stage is None:
            raise RuntimeError("the transaction has not been entered")
        return self._stage.path / TREE

    def take_over(self, relative: str) -> None:
        """Take a file of the export that is there into the new one. Whoever asks has verified it.

        Readers of external data refuse files with several names, also while this work goes on and after a kill, so graphs and
        weights are copied. Others get a second name.

        Args:
            relative: The POSIX path of the file in the export.

        Raises:
            OSError: It cannot be read, or there is no room.
            DvdquantError: See :meth:`path`.
        """
        take = copy_file if relative.startswith("onnx/") else link_file
        take(self.out / relative, self.path(relative))

    def path(self, relative: str, *, resumable: bool = False) -> Path:
        """Return the place of a file of the export, and make its parent folders.

        Args:
            relative: The POSIX path of the file in the export.
            resumable: Let a resumed run find the file even if no finished step names it. Other files are deleted then,
                because nobody knows if they are whole.

        Raises:
            OutputError: The path is no plain one, the folder cannot be written, or it was moved or replaced meanwhile.
            ResourceError: The disk is full.
            RuntimeError: The transaction has not been entered.
        """
        path = self.tree / check_relpath(relative)
        try:
            self._check_place()
            assert self._stage is not None
            self._stage.reach([TREE, *relative.split("/")[:-1]], make=True).close()
            if resumable and self._journal is not None and relative not in self._journal.files:
                self._journal.add(None, None, [relative])
        except OSError as error:
            raise disk_error(error, error.filename or path) from error
        return path

    def _check_place(self) -> None:
        """Check that the path of the output folder still leads to it, because files are written by that path.

        Raises:
            OutputError: The folder was moved, replaced or deleted.
        """
        assert self._stage is not None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            there, own = os.lstat(self._stage.path), self._stage.own()
            if os.path.samestat(there, own):
                return
        raise OutputError(
            f"{self.out} was moved, replaced or deleted while the export was written",
            fix="export again into another -o",
        )

    def done(self, step: str, data: Any = None, files: Iterable[str] = ()) -> None:
        """Record that a step is finished, after its files are fsynced.

        Args:
            step: The name of the step.
            data: Values that JSON can hold, for :meth:`data`.
            files: The relative POSIX paths of the step's files.

        Raises:
            OutputError: A file is no regular file of the export, or the journal cannot be written.
            ResourceError: The disk is full.
            RuntimeError: The transaction has not been entered.
        """
        if self._journal is None:
            raise RuntimeError("the transaction has not been entered")
        names = [check_relpath(name) for name in files]
        try:
            for name in names:
                self._sync_file(name)
            self._journal.add(step, data, names)
            if self._lock is not None:
                self._lock.touch()
        except OSError as error:
            raise disk_error(error, error.filename or self.tree) from error

    def _sync_file(self, name: str) -> None:
        """Make a file of the tree durable.

        Raises:
            OutputError: It is no regular file.
            OSError: It is missing or cannot be synced.
        """
        assert self._stage is not None
        *parents, last = name.split("/")
        try:
            with self._stage.reach([TREE, *parents]) as folder:
                folder.sync_file(last)
        except ValueError as error:
            raise OutputError(
                f"{self.tree / name} cannot be part of an export: {error}",
                fix="move what is in its place away, and run the same line with --resume",
            ) from error

    def is_done(self, step: str) -> bool:
        """Return whether a step was finished, in this run or in the resumed one.

        Args:
            step: The name of the step.
        """
        return step in self.steps

    def data(self, step: str) -> Any:
        """Return the data that :meth:`done` was given for a step.

        Args:
            step: The name of the step.

        Raises:
            KeyError: The step is not done.
        """
        return self.steps[step]

    @property
    def steps(self) -> dict[str, Any]:
        """Return all finished steps and their data, in order."""
        return dict(self._journal.done) if self._journal else {}

    def commit(
        self,
        manifest: Manifest,
        known: Mapping[str, FileEntry] | None = None,
        progress: Callable[[int], None] | None = None,
        export_key: str | None = None,
    ) -> Manifest:
        """Hash the tree, write the manifest and put the export in place.

        Args:
            manifest: The manifest without ``files`` and ``export_key``, which are filled in here.
            known: Hashes that are already known (``StreamingWriter.finish()``), by relative path. If the size is right,
                they are not computed again.
            progress: A function that gets the number of bytes of every block hashed.
            export_key: The key that the export keeps, where something was added to one that is there; None means the
                hash of this transaction's own.

        Returns:
            The manifest with its files.

        Raises:
            OutputError: A file cannot be part of an export, or a file system call fails. The old export is still in
                place, or the next run completes the new one.
            ResourceError: The disk is full; the same holds.
            RuntimeError: The transaction is over or has not been entered.
        """
        stage, lock = self._stage, self._lock
        if self.committed or stage is None or lock is None:
            raise RuntimeError("the transaction is over")
        try:
            self._check_place()
            with stage.child(TREE) as tree:
                tree.unlink(MANIFEST)
                files = _hash_tree(tree, known or {}, progress)
                final = replace(manifest, files=files, export_key=self.export_key if export_key is None else export_key)
                tree.write(MANIFEST, final.to_json().encode())
                for entry in list(tree.walk()):
                    if entry.is_folder:
                        with tree.reach(entry.path.split("/")) as folder:
                            folder.sync()
                tree.sync()
            stage.sync()
            # The journal is closed before its folder is deleted: NFS keeps a name for an open file.
            if self._journal is not None:
                self._journal.close()
            self._lock = install(lock, stage, files, self.previous)
        except OSError as error:
            if _may_be_there(self.out / COMMIT):
                cause = disk_error(error, self.out)
                raise type(cause)(
                    f"the export is finished, but putting it in place failed at {error.filename or self.out}: "
                    f"{error.strerror}",
                    fix=f"remove the cause ({cause.fix}); the same command with --resume completes it",
                ) from error
            raise disk_error(error, error.filename or self.out) from error
        self.committed = True
        return final


def _may_be_there(path: Path) -> bool:
    """Return whether a path exists; True, too, where the disk does not even say that."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _make_folder(folder: Path) -> bool:
    """Make a folder, and return False if it was there already.

    Raises:
        OutputError: A file has its name.
        OSError: It cannot be made.
    """
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
    tree: Folder, known: Mapping[str, FileEntry], progress: Callable[[int], None] | None
) -> dict[str, FileEntry]:
    """Make every file readable and durable, and return its hash and size, all by the same descriptor.

    Args:
        tree: The tree of the stage.
        known: Hashes that are already known, by relative path.
        progress: A function that gets the number of bytes of every block hashed.

    Raises:
        OutputError: A file is no regular file, or its path is no plain one.
        OSError: A file cannot be read.
    """
    files: dict[str, FileEntry] = {}
    for item in sorted(tree.walk(), key=lambda item: item.path):
        if item.is_folder:
            continue
        *parents, last = check_relpath(item.path).split("/")
        with tree.reach(parents) as folder:
            try:
                fd = folder.open_file(last)
            except ValueError as error:
                raise OutputError(
                    f"{tree.path / item.path} cannot be part of an export: {error}",
                    fix="move what is in its place away, and run the same line with --resume",
                ) from error
            try:
                info = os.fstat(fd)
                if stat.S_IMODE(info.st_mode) != 0o644 and info.st_nlink == 1:
                    os.fchmod(fd, 0o644)
                os.fsync(fd)
                entry = known.get(item.path)
                fits = entry is not None and entry["bytes"] == info.st_size
                files[item.path] = entry if entry is not None and fits else hash_descriptor(fd, progress)
            except OSError as error:
                error.filename = str(tree.path / item.path)
                raise
            finally:
                os.close(fd)
    return files


def _why_no_work(stage: Folder, out: Folder) -> str | None:
    """Return why a run cannot go on with what is there, or None where a trusted user's export finished a step.

    Raises:
        OSError: It cannot be read, or is deeper than an export.
        ValueError: Its journal is no journal.
    """
    if not is_trusted(stage.own(), out):
        return "it is of another user"
    if not stage.has_folder(TREE):
        return "it is damaged (its files are missing)"
    if not stage.has(OWNER):
        return "it is half deleted, or was killed while it was begun"
    journal = stage.info(JOURNAL)
    if journal is None or not journal.st_size:
        return "no step of it was finished"
    read_journal(stage, JOURNAL)
    with stage.child(TREE) as tree:
        for _ in tree.walk():  # an OSError if it is deeper than an export
            pass
    return None


def _drop_unclaimed(stage: Folder, claimed: set[str], out: Folder) -> None:
    """Delete the parts of adopted work that cannot be trusted to be whole or to be its own.

    These are the files that no line of the journal names, and everything that is no file of its own: writing to a link,
    or to the second name of a file, would write elsewhere.

    Args:
        stage: The adopted stage.
        claimed: The paths that the journal names.
        out: The output folder.
    """
    os.fchmod(stage.fd, 0o700)
    for name in stage.names():
        info = stage.info(name)
        if info is not None and name != TREE and not _is_own_file(info, out):
            stage.remove(name)
    with stage.child(TREE) as tree:
        for entry in list(tree.walk()):
            if entry.is_folder or (entry.path in claimed and _is_own_file(entry.info, out)):
                continue
            *parents, last = entry.path.split("/")
            with tree.reach(parents) as folder:
                folder.unlink(last)
        # Delete the folders that are empty now, such as the scratch folder of a killed builder.
        for entry in reversed([entry for entry in tree.walk() if entry.is_folder]):
            *parents, last = entry.path.split("/")
            with tree.reach(parents) as folder, contextlib.suppress(OSError):
                folder.remove_folder(last)


def _is_own_file(info: os.stat_result, out: Folder) -> bool:
    """Return whether it is a regular file of a trusted user with this one name."""
    return stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and is_trusted(info, out)
