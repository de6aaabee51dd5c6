"""Graphs as one builder runs them: INT8, packed INT4, NVFP4."""
