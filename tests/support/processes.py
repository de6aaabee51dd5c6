"""Programs that tests start beside themselves."""

from __future__ import annotations

import socket
import subprocess


def free_port() -> int:
    """A port of the loopback interface that nobody had a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def end_process(process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Ask a program to end, and end it after some seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
