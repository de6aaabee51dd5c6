"""Switching engines: what it keeps of the quality. The command is measure.py."""
