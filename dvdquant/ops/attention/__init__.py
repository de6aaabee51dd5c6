"""Attention in 8 bits: its definition in plain PyTorch, the libraries that compute it, and the operation in a model."""
