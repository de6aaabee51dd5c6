"""Helpers that know nothing of models: files, safetensors, memory, progress and text."""
