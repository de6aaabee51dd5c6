"""The end of jobs that nobody fetches any more: they and their files are deleted some time after they have ended."""

from __future__ import annotations

import asyncio
import logging
import time

from dvdquant.deploy.serve.logs import log_event
from dvdquant.deploy.serve.service import Service

__all__ = ["expire_for_ever"]

EXPIRE_SECONDS = 60.0
STUCK_SECONDS = 600.0  # until what could not be deleted is tried again

log = logging.getLogger(__name__)


async def expire_for_ever(service: Service) -> None:
    """Delete what has expired, now and every minute; what the disk keeps is tried again later.

    Args:
        service: Store, files and figures; several servers may delete the same.
    """
    while True:
        try:
            expired = await service.run(service.store.expire, time.time())
        except Exception:  # of sqlite3 or psycopg; a store that is away comes back
            log.exception("the store does not say what has expired")
            expired = []
        stuck = 0
        for video in expired:
            try:
                await service.run(service.delete, video)
            except OSError:
                log.exception("the clip of %s, which has expired, cannot be deleted", video)
                stuck += 1
                await _postpone(service, video)
            except Exception:  # of the store, as above; it names the job again in a minute
                log.exception("the store does not delete %s, which has expired", video)
            else:
                log_event(log, "video_expired", video=video)
        service.metrics.stuck.inc(stuck)
        await asyncio.sleep(EXPIRE_SECONDS)


async def _postpone(service: Service, video: str) -> None:
    """Let a job whose files the disk keeps expire later, so that others are not held up."""
    try:
        await service.run(service.store.keep_until, video, time.time() + STUCK_SECONDS)
    except Exception:  # of the store; the job is tried again in a minute, before others
        log.exception("the store does not postpone the end of %s", video)
