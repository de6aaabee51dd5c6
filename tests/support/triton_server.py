"""A tritonserver of one's own, out of pytriton's wheel as ``make triton-check`` unpacks it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.exporting import REPOSITORY
from tests.support.processes import end_process, free_port

PATIENCE = 300.0


def require_tritonserver() -> Path:
    """The folder of the unpacked wheel; skips where there is none."""
    if not os.environ.get("DVDQ_TRITON"):
        pytest.skip("needs the tritonserver of pytriton's wheel, named by DVDQ_TRITON: make triton-check")
    return Path(os.environ["DVDQ_TRITON"]).absolute()


@contextlib.contextmanager
def tritonserver(repository: Path, work: Path) -> Iterator[tuple[str, str]]:
    """Its addresses for HTTP and gRPC, once every model is ready; skips where the wheel is not unpacked."""
    place = require_tritonserver()
    server = place / "server/pytriton/tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    backends = work / "backends"
    shutil.copytree(server / "backends", backends)
    for file in (server / "python_backend_stubs" / python).iterdir():
        shutil.copy(file, backends / "python")
        (backends / "python" / file.name).chmod(0o755)
    program = work / "tritonserver"
    shutil.copy(server / "bin/tritonserver", program)
    program.chmod(0o755)
    ports = [free_port() for _ in range(3)]
    libraries = f"{place}/server/nvidia_pytriton.libs:{sysconfig.get_config_var('LIBDIR')}"
    packages = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": libraries,
        "DVDQ_NUMPY": str(place / "numpy"),
        "DVDQ_SITE": os.pathsep.join([str(REPOSITORY), *dict.fromkeys(packages)]),
    }
    command = [
        program, f"--model-repository={repository}", f"--backend-directory={backends}", "--allow-grpc=true",
        "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1",
        f"--http-port={ports[0]}", f"--grpc-port={ports[1]}", f"--metrics-port={ports[2]}",
    ]  # fmt: skip
    log = work / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < end, log.read_text()[-6000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{ports[0]}/v2/health/ready").status_code == 200:
                    break
            time.sleep(0.3)
        yield f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    finally:
        end_process(process)
