"""A Postgres server of one's own, on a socket in a temporary folder, without a network."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of its database; skips where there is no server to run."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'dvdquant[serve-postgres]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(p) for p in [shutil.which("initdb")] if p]
    if not found:
        pytest.skip("needs the programs of a Postgres server: Debian's package postgresql")
    programs, user = found[-1].parent, None
    if os.getuid() == 0:  # it refuses to run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("needs the user postgres, because a Postgres server does not run as root")
    folder = Path(tempfile.mkdtemp(prefix="dvdq-pg-"))
    if user is not None:
        shutil.chown(folder, user)

    def run(program: str, *words: str) -> None:
        command = [str(programs / program), *words]
        done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run("initdb", "-D", f"{folder}/db", "-U", "dvdq", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", f"{folder}/db", "-w", "-t", "240", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://dvdq@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", f"{folder}/db", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
