"""Attention in 8 bits: its definition in PyTorch, q and k on their way to it, the libraries, the operation in a model."""
