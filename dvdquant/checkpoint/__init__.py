"""Readers of models that may come from anywhere and are not trusted."""
