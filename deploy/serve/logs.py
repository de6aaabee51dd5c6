"""The log of server and workers: one JSON object, or one line of text, for each event."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

from dvdquant.text import json_text, shown

__all__ = ["log_event", "setup_server_log"]

_EVENT = "dvdq_event"
_FIELDS = "dvdq_fields"


def setup_server_log(log_format: str, verbose: int, **fixed: Any) -> None:
    """Write every event to stderr.

    Args:
        log_format: ``json`` or ``text``.
        verbose: 0 logs the server's own events and the warnings of others; 1 also their information; 2 everything.
        fixed: Fields of every event, such as the name of the worker.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(fixed) if log_format == "json" else _TextLines(fixed))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    logging.getLogger("dvdquant.deploy.serve").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)


def log_event(
    logger: logging.Logger,
    event: str,
    *,
    level: int = logging.INFO,
    text: str = "",
    error: BaseException | None = None,
    **fields: Any,
) -> None:
    """Log one event with its fields.

    Args:
        logger: The logger of the module.
        event: A word that names the event.
        level: The level.
        text: A sentence for people.
        error: What went wrong; its traceback is logged.
        fields: Values that JSON can carry.
    """
    logger.log(level, text or event, exc_info=error, extra={_EVENT: event, _FIELDS: fields})


class _Lines(logging.Formatter):
    """Events with the fields that all have.

    Args:
        fixed: The fields.
    """

    def __init__(self, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.fixed = fixed


class _JsonLines(_Lines):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": round(time.time(), 3),
            "level": record.levelname.lower(),
            "event": getattr(record, _EVENT, "log"),
            **self.fixed,
            **getattr(record, _FIELDS, {}),
        }
        if not hasattr(record, _EVENT):
            fields["logger"] = record.name
        if (text := record.getMessage()) != fields["event"]:
            fields["text"] = text
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_text({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()})


class _TextLines(_Lines):
    """One line of text, with the fields behind it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {**self.fixed, **getattr(record, _FIELDS, {})}
        said = " ".join(f"{name}={shown(value)}" for name, value in fields.items() if value not in (None, ""))
        text = f"{time.strftime('%H:%M:%S')} {record.levelname.lower():<7} {record.getMessage()} {said}".rstrip()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return shown(text, 0, keep="\n\t")
