"""The runner that a caller of a transformer sees, among those of all callers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvdquant.deploy.cancel import CancelSignal
from dvdquant.deploy.pipelines.request_state import RequestTable
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.switching.controller import OnStep, StepController, StepRecord

__all__ = ["RunnerView"]


class RunnerView:
    """The runner of the calling thread or task: what it has run, and who is told.

    What it reads is of this caller's last (or running) request, or of the latest of any caller if this one has had
    none. Setting ``on_step`` is for this caller's running and coming requests.

    Args:
        table: The requests of the transformer.
    """

    def __init__(self, table: RequestTable) -> None:
        self._table = table

    @property
    def on_step(self) -> OnStep | None:
        """Return the callback that gets the record of every call, or None."""
        return self._table.on_step

    @on_step.setter
    def on_step(self, on_step: OnStep | None) -> None:
        self._table.listen(on_step)

    @property
    def cancel(self) -> CancelSignal | None:
        """Return the event that cancels a request, or None."""
        return self._table.cancel

    @property
    def trace(self) -> list[StepRecord]:
        """Return the record of every call, in order."""
        return self._table.latest.runner.trace

    @property
    def controller(self) -> StepController:
        """Return the controller of the request."""
        return self._table.latest.runner.controller

    @property
    def session(self) -> EngineSession:
        """Return the session that runs the engines."""
        return self._table.latest.runner.session

    @property
    def controller_seconds(self) -> float:
        """Return the seconds that the decisions took."""
        return self._table.latest.runner.controller_seconds

    def summary(self, cost: Mapping[int, float] | None = None) -> dict[str, Any]:
        """Return the figures of the request so far, see :meth:`StepRunner.summary`.

        Args:
            cost: The relative cost of a call by activation bits, or None.
        """
        return self._table.latest.runner.summary(cost)
