"""The binding of the kernel library: the same structs and calls as kernels/include/dvdquant/kernels.h, by ctypes.

Pointers are plain integers. Nothing here imports PyTorch or needs a device: planning and workspace sizes are host-only
functions of the library. One file each:

- ``abi``: the C structs, the signatures of the calls and the version, as the header says them,
- ``arguments``: what callers pass and get in Python's terms, checked and turned into the C structs,
- ``library``: the calls of an opened library,
- ``architectures``: which GPUs a library has code for,
- ``find``: where the library of this installation is, opened once,
- ``errors``: what is raised when it cannot be used.
"""
