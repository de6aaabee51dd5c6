"""The server as a process: started, asked, killed and stopped as its operator would."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from dvdquant.deploy.serve.workers.left_workers import find_left

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_WAN = REPOSITORY / "examples" / "tiny-wan"
PROMPT = "ring red right large black"
START_SECONDS = 240.0  # on a busy machine; an idle one takes ten
# The servers speak plain HTTP; without this, every client reads the list of certificates first, 30 ms of a processor.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Clients:
    """What clients ask a server for."""

    url = ""

    def said(self) -> str:
        """The end of its log."""
        return ""

    def client(self, **more: Any) -> httpx.Client:
        """A client that knows the address."""
        return httpx.Client(base_url=self.url, timeout=120, verify=_NO_CERTIFICATES, **more)

    def create(self, client: httpx.Client, **fields: Any) -> dict[str, Any]:
        """Create a job of two steps; its first state."""
        body = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1, **fields}
        answer = client.post("/v1/videos", json=body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def wait(self, client: httpx.Client, video: str, seconds: float = 240) -> dict[str, Any]:
        """Wait for the end of a job; its last state."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state: dict[str, Any] = client.get(f"/v1/videos/{video}").json()
            if state["status"] in ("completed", "failed"):
                return state
            time.sleep(0.02)
        raise AssertionError(f"{video} is {state['status']}:\n{self.said()}")


class ServerProcess(Clients):
    """A server on a free port, with its log in a file.

    Args:
        out: The export.
        data: The data folder.
        options: More of the command line.
        stub: With the stub in the place of the engine, and these variables.
        pipeline: The model of the export.
    """

    def __init__(
        self, out: Path, data: Path, *options: object, stub: dict[str, str] | None = None, pipeline: Path = TINY_WAN
    ) -> None:
        self.out, self.data, self.options, self.stub, self.pipeline = out, data, options, stub, pipeline
        self.log_path = data.parent / f"{data.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.port = 0

    def start(self, *, ready: bool = True) -> ServerProcess:
        """Start it, and wait until it listens, or until a worker is ready."""
        module = "dvdquant.cli.serve" if self.stub is None else "benchmarks.serving.stub_server"
        words = [self.out, "--data", self.data, "--port", self.port, "--pipeline", self.pipeline, "--device", "cpu"]
        words += ["--backend", "onnxruntime", "--no-warm-up", *self.options]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(self.stub or {})}
        begin = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, words)],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=REPOSITORY,
            )
        end = time.monotonic() + START_SECONDS
        while not (said := [e for e in self.events(begin) if e["event"] == "listening"]):
            assert self.process.poll() is None and time.monotonic() < end, self.log_path.read_text()[begin:]  # noqa: PT018
            time.sleep(0.05)
        self.url = said[-1]["address"]
        self.port = int(self.url.rpartition(":")[2])
        if ready:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until jobs are taken."""
        end = time.monotonic() + START_SECONDS
        with self.client() as client:
            while time.monotonic() < end:
                try:
                    if client.get("/ready").status_code == 200:
                        return
                except httpx.TransportError:
                    assert self.process is not None
                    assert self.process.poll() is None, self.log_path.read_text()
                time.sleep(0.05)
        raise AssertionError(self.log_path.read_text())

    def said(self) -> str:
        """The end of its log."""
        return self.log_path.read_text()[-5000:]

    def events(self, begin: int = 0) -> list[dict[str, Any]]:
        """The lines of the log that are whole."""
        with self.log_path.open("rb") as file:
            file.seek(begin)
            lines = file.read().split(b"\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    def worker_pids(self) -> list[int]:
        """The processes of its workers that live; a spare one is none of them."""
        return [left.pid for left in find_left(self.data / "workers") if left.pid]

    def kill(self) -> None:
        """As the kernel kills a process that took too much memory."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_workers(self) -> None:
        """Kill every worker, and wait until others take jobs."""
        before = self.worker_pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + START_SECONDS
        while len(now := self.worker_pids()) < len(before) or set(now) & set(before):
            assert time.monotonic() < end, self.log_path.read_text()[-5000:]
            time.sleep(0.02)
        self.wait_ready()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def __enter__(self) -> ServerProcess:
        return self.start() if self.process is None else self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
