"""dvdq-serve with the workers of :mod:`benchmarks.serving.stub_worker`."""

from __future__ import annotations

import json
import os
import sys
from functools import partial

from dvdquant.cli import serve
from dvdquant.deploy.serve import server

WORKER: tuple[str, ...] = (sys.executable, "-m", "benchmarks.serving.stub_worker")
if command := os.environ.get("STUB_WORKER"):  # as JSON; tests name one that forks a process with all imports done
    WORKER = tuple(json.loads(command))

if __name__ == "__main__":
    server.serve = partial(server.serve, worker_command=WORKER)
    serve.main()
