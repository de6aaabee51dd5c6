"""The operators, one file each: schema, plain PyTorch reference, and CUDA dispatch where a kernel exists."""
