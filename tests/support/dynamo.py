"""NVIDIA Dynamo of one's own: a frontend and a worker that find each other through a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.support.exporting import REPOSITORY
from tests.support.processes import end_process, free_port

PATIENCE = 300.0


@contextlib.contextmanager
def dynamo(arguments: Sequence[object], name: str, work: Path) -> Iterator[str]:
    """The frontend's address, once the worker ``dvdq-serve ARGUMENTS --dynamo`` has registered the model ``name``."""
    site = os.environ.get("DVDQ_DYNAMO", "")
    if not site and importlib.util.find_spec("dynamo") is None:
        pytest.skip("needs NVIDIA Dynamo: make dynamo-check, or pip install 'dvdquant[serve-dynamo]'")
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), site and str(Path(site).absolute())])),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(work / "names"),
        "DYN_MEDIA_OUTPUT_FS_URL": (work / "clips").as_uri(),
        "DYN_MEDIA_OUTPUT_HTTP_URL": "https://clips.example",
        "NO_COLOR": "1",
    }
    worker = [sys.executable, "-m", "dvdquant", "serve", *map(str, arguments), "--dynamo"]
    frontend = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    with contextlib.ExitStack() as stack:
        processes = []
        for command, log in ((worker, work / "worker.log"), (frontend, work / "frontend.log")):
            output = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=work)
            stack.callback(end_process, process, 30)
            processes.append((process, log))
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while name not in _models(url):
            for process, log in processes:
                assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, [log.read_text()[-2000:] for _, log in processes]
            time.sleep(0.5)
        yield url


def _models(url: str) -> list[str]:
    try:
        return [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=5).json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError):
        return []
