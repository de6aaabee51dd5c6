"""Exports on the hub: writing them there, and reading them back."""
