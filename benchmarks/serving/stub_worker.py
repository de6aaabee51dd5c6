"""A worker of dvdq-serve whose engine is a stub that sleeps: everything but the engine is the product's.

The variables STUB_SECONDS (of a call), STUB_FAIL (a file whose presence makes calls fail), STUB_KILL (a file whose
presence kills the process in a call, and which it removes before) and STUB_HOLD (a file: while it is there, one call is
made, and the next one waits until it is gone) say how it behaves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dvdquant.deploy.serve.workers.worker_process import main
from dvdquant.errors import EngineError


class StubSession:
    """In the place of an engine session: sleeps, and gives back its input, scaled."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.held = inner, 0
        self.seconds = float(os.environ.get("STUB_SECONDS", "0.005"))

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
        self._wait_while_held()
        return (0.01 * inputs["hidden_states"]).to(self.inner.dtype)

    def _wait_while_held(self) -> None:
        """Let the first call pass after the file of STUB_HOLD has appeared, and no other."""
        hold = Path(os.environ.get("STUB_HOLD", ""))
        self.held = self.held + 1 if hold.is_file() else 0
        while self.held > 1 and hold.is_file():
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(wrap_session=StubSession))  # type: ignore[arg-type]
