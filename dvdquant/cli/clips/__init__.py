"""Clips on the command line: prompts, options, memory, outputs, and what is said of them; for ``dvdq-run`` and ``dvdq-plan``."""
