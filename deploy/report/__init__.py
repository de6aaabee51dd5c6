"""The report of an export as one page."""
