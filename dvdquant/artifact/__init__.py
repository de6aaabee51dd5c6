"""The export folder: its manifest, and how it is put in place whole."""
