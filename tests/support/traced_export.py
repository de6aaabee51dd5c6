"""``dvdq-export`` in a process of its own, with the traced graphs that a test run shares.

``python -m tests.support.traced_export`` takes what ``dvdq-export`` takes.
"""

from __future__ import annotations

from importlib import import_module

from dvdquant.cli.export import main
from dvdquant.system.garbage import collect_less_often

if __name__ == "__main__":
    collect_less_often()
    import_module("tests.support.traces").share_traces()
    main()
