"""The loops of the quantizer: numba on the CPU, PyTorch or our kernels on a GPU."""
