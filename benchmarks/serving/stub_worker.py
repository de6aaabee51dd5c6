"""A worker of dvdq-serve whose engine is a stub that sleeps: everything but the engine is the product's.

The variables STUB_SECONDS (of a call), STUB_FAIL (a file whose presence makes calls fail) and STUB_KILL (a file whose
presence kills the process in a call, and which it removes before) say how it behaves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dvdquant.deploy.serve.worker_process import main
from dvdquant.errors import EngineError


class StubSession:
    """In the place of an engine session: sleeps, and gives back its input, scaled."""

    def __init__(self, inner: Any) -> None:
        self.__dict__.update(inner=inner, seconds=float(os.environ.get("STUB_SECONDS", "0.005")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, inputs: dict[str, Any], bits: int) -> Any:
        """One call."""
        del bits
        time.sleep(self.seconds)
        kill, fail = os.environ.get("STUB_KILL"), os.environ.get("STUB_FAIL")
        if kill and Path(kill).exists():
            Path(kill).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if fail and Path(fail).exists():
            raise EngineError(Path(fail).read_text())
        return (0.01 * inputs["hidden_states"]).to(self.inner.dtype)


if __name__ == "__main__":
    sys.exit(main(wrap_session=StubSession))  # type: ignore[arg-type]
