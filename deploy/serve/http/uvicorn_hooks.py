"""All that is used of uvicorn without being public: how its server takes signals. It is looked up at import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn

from dvdquant.system.hooks import require_name

__all__ = ["REQUIREMENT", "ServerWithoutSignals"]

REQUIREMENT = "uvicorn>=0.34,<0.60"

# A method of this name that nobody calls would leave the signals to uvicorn: no job would be let finish.
require_name("uvicorn", "uvicorn:Server.serve", "capture_signals", "to drain before the server ends", REQUIREMENT)


class ServerWithoutSignals(uvicorn.Server):
    """uvicorn, but signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield
