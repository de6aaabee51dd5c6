"""dvdq-serve with the workers of :mod:`benchmarks.serving.stub_worker`."""

from __future__ import annotations

import sys

from dvdquant.cli import serve
from dvdquant.deploy.serve import server

WORKER = (sys.executable, "-m", "benchmarks.serving.stub_worker")

if __name__ == "__main__":
    original = server.serve
    server.serve = lambda settings: original(settings, worker_command=WORKER)
    serve.main()
