"""Readers of models that come from anywhere, and are not trusted."""
