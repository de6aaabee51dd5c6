"""A process that holds one engine session for another process, and runs its calls.

    python -m dvdquant.deploy.sessions.engine_process FD

``FD`` is this end of the socket; the first message says what to open. It ends with the process that started it.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.sessions.shared_tensors import Link
from dvdquant.errors import DvdquantError
from dvdquant.system.garbage import collect_less_often
from dvdquant.system.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from dvdquant.deploy.sessions.base import EngineSession

__all__ = ["main"]


def main(words: list[str] | None = None) -> int:
    """Serve one session until it is closed; return the exit code.

    Args:
        words: The number of the inherited socket. The default is the command line.
    """
    (number,) = sys.argv[1:] if words is None else words
    collect_less_often()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # what a library prints is no output of the command that started us
    link = Link(Connection(int(number)))
    try:
        _, _, fields = link.receive()
        torch.set_num_threads(fields.pop("threads"))
        try:
            session = open_session(Artifact.open(fields.pop("root")), **fields)
        except Exception as error:  # noqa: BLE001  it belongs to the process that waits for us
            link.send("error", **_said(error))
            return 2
        with session:
            link.send("open", **_facts(session))
            _serve(link, session)
    except (EOFError, OSError):
        return 1  # nobody is there to be told
    finally:
        link.close()
    return 0


def _serve(link: Link, session: EngineSession) -> None:
    """Answer every message until one says that it was the last."""
    while True:
        kind, tensors, fields = link.receive()
        try:
            if kind == "run":
                bits, place = fields["bits"], next(iter(tensors.values())).device
                if "follow" in fields:
                    session.follow_attention(fields["follow"])
                # Memory of the caller's device: it need not open memory of ours.
                with torch.inference_mode():
                    output = session.run(tensors, bits).detach().to(place)
                link.send("output", {"output": output}, attention=_attention(session))
            elif kind == "loras":
                session.set_loras(fields["specs"])
                link.send("done")
            elif kind == "bytes":
                link.send("done", held=session.resident_bytes())
            else:
                return
        except (EOFError, OSError):
            raise
        except Exception as error:  # noqa: BLE001  it belongs to the caller, who decides what follows
            link.send("error", **_said(error))


def _facts(session: EngineSession) -> dict[str, Any]:
    names = ("backend", "dtype", "weights", "library", "fused")
    return {**{name: getattr(session, name) for name in names}, "attention": _attention(session)}


def _attention(session: EngineSession) -> dict[str, Any] | None:
    """Return what is told of a session's attention, or None in 16 bit."""
    attention = session.attention
    return None if attention is None else {"choice": attention.choice, "json": attention.to_json()}


def _said(error: Exception) -> dict[str, Any]:
    """Return an error as plain values."""
    said: dict[str, Any] = {"out_of_memory": is_out_of_memory(error)}
    if isinstance(error, DvdquantError):
        fix = error.fix if error.has_own_fix else None
        return {**said, "name": type(error).__name__, "what": error.what, "available": error.available, "fix": fix}
    return {**said, "name": "EngineError", "what": f"{type(error).__name__}: {error}", "available": None, "fix": None}


def _end_with_parent() -> None:
    """End this process when its parent is gone, in the middle of a call, too: standard input then ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
