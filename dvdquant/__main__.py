"""``python -m dvdquant`` is ``dvdq``."""

from __future__ import annotations

from dvdquant.cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m dvdquant")
