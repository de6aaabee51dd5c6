"""The export folder: its manifest, and how a new export replaces the old one as a whole."""
