"""Which store and which files a server and its workers use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dvdquant.deploy.serve.files import FolderFiles
from dvdquant.deploy.serve.jobs import JobStore
from dvdquant.deploy.serve.sqlite_store import SqliteStore
from dvdquant.errors import UnsupportedError

__all__ = ["open_store"]


def open_store(data: str | Path, keep: float, url: str | None = None) -> tuple[JobStore, FolderFiles]:
    """Return the store and the files.

    Args:
        data: The data folder; it holds the clips, and without ``url`` the store.
        keep: Seconds until a job expires that ends without a worker.
        url: ``postgresql://…`` for a store that several servers share, or None.

    Raises:
        OutputError: The store cannot be used.
        UnsupportedError: The address is of another kind, or psycopg is not installed.
    """
    files = FolderFiles(Path(data) / "videos")
    if url is None:
        return SqliteStore(Path(data) / "jobs.sqlite", keep), files
    if not url.startswith(("postgresql://", "postgres://")):
        raise UnsupportedError("--store is no address of a database", available="postgresql://user@host/database")
    if importlib.util.find_spec("psycopg") is None:
        raise UnsupportedError("a store in Postgres needs psycopg", fix="pip install 'dvdquant[serve-postgres]'")
    from dvdquant.deploy.serve.postgres_store import PostgresStore

    return PostgresStore(url, keep), files
