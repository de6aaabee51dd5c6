"""Which store and which files a server and its workers use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dvdquant.deploy.serve.jobs import JobStore
from dvdquant.deploy.serve.settings import ObjectStore
from dvdquant.deploy.serve.store.files import ClipFiles, FolderFiles
from dvdquant.deploy.serve.store.sqlite_store import SqliteStore
from dvdquant.errors import UnsupportedError

__all__ = ["open_files", "open_store"]


def open_store(
    data: str | Path, keep: float, url: str | None = None, objects: ObjectStore | None = None
) -> tuple[JobStore, ClipFiles]:
    """Return the store and the files.

    Args:
        data: The data folder; it holds the clips without ``objects``, and the store without ``url``.
        keep: Seconds until a job expires that ends without a worker.
        url: ``postgresql://…`` for a store that several servers share, or None.
        objects: The place for the clips of several servers, or None.

    Raises:
        OutputError: The store or the place cannot be used.
        UnsupportedError: An address is of another kind, or psycopg or obstore is not installed.
    """
    files = open_files(data, objects)
    if url is None:
        return SqliteStore(Path(data) / "jobs.sqlite", keep), files
    if not url.startswith(("postgresql://", "postgres://")):
        raise UnsupportedError("--store is no address of a database", available="postgresql://user@host/database")
    if importlib.util.find_spec("psycopg") is None:
        raise UnsupportedError("a store in Postgres needs psycopg", fix="pip install 'dvdquant[serve-postgres]'")
    from dvdquant.deploy.serve.store.postgres_store import PostgresStore

    return PostgresStore(url, keep), files


def open_files(data: str | Path, objects: ObjectStore | None) -> ClipFiles:
    """Return the place for clips: the data folder, or an object store.

    Args:
        data: The data folder.
        objects: The object store, or None.

    Raises:
        OutputError: The object store cannot be used.
        UnsupportedError: Its address is of another kind, or obstore is not installed.
    """
    if objects is None:
        return FolderFiles(Path(data) / "videos")
    if importlib.util.find_spec("obstore") is None:
        raise UnsupportedError("clips in an object store need obstore", fix="pip install 'dvdquant[serve-s3]'")
    from dvdquant.deploy.serve.store.s3_files import S3Files

    return S3Files(objects.address, Path(data) / "uploads", objects.endpoint, objects.link_seconds)
