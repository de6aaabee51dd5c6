"""What an export is and is worth, in words and as JSON; for ``dvdq-export``, ``dvdq-inspect`` and ``dvdq-run``."""
