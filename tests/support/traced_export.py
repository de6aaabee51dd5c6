"""``dvdq-export`` in a process of its own, with the traced graphs that a test run shares.

``python -m tests.support.traced_export`` takes what ``dvdq-export`` takes.
"""

from __future__ import annotations

from dvdquant.cli.export import main
from tests.support.traces import share_traces

if __name__ == "__main__":
    share_traces()
    main()
