"""The same weights in files that other programs load."""
