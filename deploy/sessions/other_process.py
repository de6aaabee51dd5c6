"""A session whose engines are in a process of their own, such as the second one of a guidance pair.

Two engines of one process share its Python interpreter: while one prepares a call, the other waits. Two processes share only
the memory of inputs and outputs (:mod:`.shared_tensors`). A process that dies takes no other one along: the call that it was
in is lost, and the next call starts it again.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from dvdquant import errors
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.sessions.shared_tensors import Link
from dvdquant.errors import DvdquantError, EngineError, ResourceError

__all__ = ["PROCESS", "ProcessSession"]

PROCESS = "process:"  # before the word of a device
COMMAND = (sys.executable, "-m", "dvdquant.deploy.sessions.engine_process")
"""The command of the other process. It gets the number of its end of the socket."""
_LAST_SECONDS = 10.0  # that the process gets to free its device


class _Told:
    """The attention of the other process, as it has told: an :class:`.AttentionReport`."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.said = said

    @property
    def wanted(self) -> str:
        """Return the recipe's format."""
        return str(self.said["json"]["wanted"])

    @property
    def choice(self) -> str | None:
        """Return what ran in the last call."""
        choice: str | None = self.said["choice"]
        return choice

    def to_json(self) -> dict[str, Any]:
        """Return what was wanted and what ran in the last call."""
        return dict(self.said["json"])


class ProcessSession(EngineSession):
    """See :class:`EngineSession`. Outputs are on the device of the inputs, so that this process needs no other device.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        bits: The activation bits to make available, or None for all.
        device: The device of the other process.
        options: More options of :func:`.open_session`, plain values.

    Raises:
        DvdquantError: The other process cannot open the session; the error is its own.
        ResourceError: It ended before it could say why.
    """

    def __init__(
        self, artifact: Artifact, component: str, bits: Sequence[int] | None, device: torch.device, **options: Any
    ) -> None:
        super().__init__(artifact, component, bits, device)
        self._options = {"component": component, "bits": self.bits, "device": str(device), **options}
        # PyTorch keeps the number of threads by thread, and sums in another order with another number.
        self._threads = torch.get_num_threads()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._follow: dict[str, str | None] = {}
        facts = self._start()
        self.backend, self.dtype, self.weights = facts["backend"], facts["dtype"], facts["weights"]
        self.library, self.fused = facts["library"], facts["fused"]
        self._told = None if facts["attention"] is None else _Told(facts["attention"])
        self.attention = self._told

    @property
    def pid(self) -> int | None:
        """Return the number of the process, or None where there is none."""
        return None if self._process is None else self._process.pid

    def run(self, inputs: Mapping[str, Tensor], bits: int) -> Tensor:
        """See :meth:`EngineSession.run`; the output is on the device of the inputs.

        Args:
            inputs: The graph's inputs by name, on one device.
            bits: Activation bits, one of ``self.bits``.

        Raises:
            ShapeError: The export does not serve one of the inputs.
            EngineError: The session is closed, lacks ``bits``, or the backend failed.
            ResourceError: The process has ended, for example for want of memory. The next call starts another one.
        """
        with self._lock:
            self._require_open()
            names = [spec.name for spec in self.family.inputs(self.sizes)]
            place = inputs[names[0]].device if names[0] in inputs else self.device
            sent = {name: inputs[name].detach().to(place) for name in names if name in inputs}
            tensors, told = self._ask("run", sent, bits=bits, **self._follow)
            if self._told is not None:
                self._told.said = told["attention"]
            return tensors["output"].to(place, copy=True)

    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        return self.run(inputs, bits)

    def follow_attention(self, choice: str | None) -> None:
        """See :meth:`EngineSession.follow_attention`. It is told with every call, to a process that has started again, too."""
        with self._lock:
            self._follow = {"follow": choice}

    def set_loras(self, specs: Sequence[LoraSpec]) -> None:
        """See :meth:`EngineSession.set_loras`.

        Args:
            specs: The LoRAs and their scales.
        """
        with self._lock:
            self._require_open()
            self._ask("loras", specs=tuple(specs))
            self.loras = tuple(specs)

    def _resident_bytes(self) -> dict[str, int]:
        held: dict[str, int] = self._ask("bytes")[1]["held"]
        return held

    def _close(self) -> None:
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.send("close")
        self._end(_LAST_SECONDS)

    # ------------------------------------------------------------------------------------------------------ the process

    def _ask(
        self, kind: str, tensors: Mapping[str, Tensor] | None = None, **fields: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send a message and return tensors and fields of the answer; a process that has ended is started again."""
        if self._link is None:
            self._start()
            if self.loras and kind != "loras":
                self._ask("loras", specs=self.loras)
        assert self._link is not None
        try:
            self._link.send(kind, tensors, **fields)
            said, found, values = self._link.receive()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if said == "error":
            raise _error(values)
        return found, values

    def _start(self) -> dict[str, Any]:
        """Start the process, and return what it says of its session."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [*COMMAND, str(number)],
                stdin=subprocess.PIPE,  # it ends when this end is closed, also by the end of this process
                pass_fds=(number,),
                start_new_session=True,  # Ctrl-C is for this process
            )
            self._link = Link(Connection(ours.detach()))
        try:
            self._link.send("settings", root=str(self.artifact.root), threads=self._threads, **self._options)
            said, _, values = self._link.receive()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        except BaseException:
            self._end(0)
            raise
        if said == "error":
            self._end(_LAST_SECONDS)
            raise _error(values)
        return values

    def _lost(self) -> ResourceError:
        """Return the error of a process that has ended, after clearing up."""
        code = self._end(_LAST_SECONDS)
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return ResourceError(
            f"the process of {self.component} on {self.device} has ended ({how})",
            fix="ask for the clip again, which starts the process again; the system's log says whether memory ran out",
        )

    def _end(self, seconds: float) -> int | None:
        """Close the link, wait for the process, and kill it where it goes on. Return its exit code."""
        link, process = self._link, self._process
        self._link = self._process = None
        if link is not None:
            link.close()
        if process is None:
            return None
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _error(said: dict[str, Any]) -> DvdquantError:
    """Return the error that the other process met."""
    kind = getattr(errors, said["name"], EngineError)
    error = kind(said["what"], available=said["available"], fix=said["fix"], out_of_memory=said["out_of_memory"])
    assert isinstance(error, DvdquantError)
    return error
