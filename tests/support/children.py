"""Work in a forked process, and how that process ended."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

__all__ = ["in_child"]


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its exit status: 0, 1 after an exception, −9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
