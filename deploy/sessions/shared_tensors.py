"""Tensors that one process shows another: bytes in memory that both see, and messages over a socket that say where.

Each direction has one region of memory, which grows when it must. On the CPU it is an anonymous file (memfd), which has no
name that a killed process could leave behind, and no limit such as that of ``/dev/shm`` in a container. Between GPUs it is
memory of the sender's device, which the receiver opens by CUDA's own handles (CUDA IPC); where that is refused, as in some
containers, the region is on the CPU after all.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
from collections.abc import Mapping
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

__all__ = ["Link"]

_ALIGN = 256
_CPU = torch.device("cpu")


class Link:
    """One end of the connection of two processes that trust each other. One thread at a time uses it.

    Args:
        connection: The end of a pair of Unix sockets; it is closed with the link.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent: Tensor | None = None  # bytes of our region
        self._received: Tensor | None = None  # bytes of the other's region
        self._refused: set[torch.device] = set()  # devices whose memory the other process cannot open

    def send(self, kind: str, tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> None:
        """Send a message. The tensors stay readable for the other process until the next message with tensors.

        Args:
            kind: What the message is.
            tensors: Tensors on one device, of any dtype and shape.
            fields: Plain values.

        Raises:
            OSError: The other process is gone.
        """
        places = self._write(tensors or {})
        self._connection.send_bytes(pickle.dumps((kind, places, fields)))

    def receive(self) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """Return the next message. Its tensors are views that the next message of the other process may overwrite.

        Raises:
            EOFError: The other process is gone.
            OSError: The same.
        """
        while True:
            kind, places, fields = pickle.loads(self._connection.recv_bytes())
            if kind != "region":
                return kind, {name: self._read(*place) for name, place in places.items()}, fields
            self._connection.send_bytes(pickle.dumps(self._open(fields)))

    def close(self) -> None:
        """Close the socket and let go of the memory."""
        with contextlib.suppress(OSError):
            self._connection.close()
        self._sent = self._received = None

    # ---------------------------------------------------------------------------------------------------------- sending

    def _write(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, torch.dtype, tuple[int, ...]]]:
        if not tensors:
            return {}
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = (end, tensor.dtype, tuple(tensor.shape))
            end += -(-tensor.nbytes // _ALIGN) * _ALIGN
        (device,) = {tensor.device for tensor in tensors.values()}
        region = self._region(max(end, _ALIGN), device)
        for name, tensor in tensors.items():
            begin = places[name][0]
            region[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the other process has streams of its own
        return places

    def _region(self, size: int, device: torch.device) -> Tensor:
        """Return our region, a new one where it is too small or elsewhere."""
        if device in self._refused:
            device = _CPU
        if self._sent is None or self._sent.numel() < size or self._sent.device != device:
            self._sent = self._offer(size, device)
        return self._sent

    def _offer(self, size: int, device: torch.device) -> Tensor:
        """Make a region, and let the other process open it."""
        if device.type == "cuda":
            from torch.multiprocessing.reductions import reduce_tensor

            region = torch.empty(size, dtype=torch.uint8, device=device)
            handle = pickle.dumps(reduce_tensor(region))  # type: ignore[no-untyped-call]
            if self._opened({"size": size, "handle": handle}):
                return region
            self._refused.add(device)
        descriptor = os.memfd_create("dvdq:tensors", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
            if not self._opened({"size": size, "handle": None}, descriptor):
                raise OSError("the other process cannot map the memory")
            return _mapped(descriptor, size)
        finally:
            os.close(descriptor)

    def _opened(self, fields: dict[str, Any], descriptor: int | None = None) -> bool:
        self._connection.send_bytes(pickle.dumps(("region", {}, fields)))
        if descriptor is not None:
            reduction.send_handle(self._connection, descriptor, None)  # a process id is not needed on Unix
        return bool(pickle.loads(self._connection.recv_bytes()))

    # -------------------------------------------------------------------------------------------------------- receiving

    def _open(self, fields: dict[str, Any]) -> bool:
        """Open a region of the other process; False if this process cannot."""
        self._received = None
        if fields["handle"] is None:
            descriptor = reduction.recv_handle(self._connection)
            try:
                self._received = _mapped(descriptor, fields["size"])
            finally:
                os.close(descriptor)
            return True
        rebuild, arguments = pickle.loads(fields["handle"])
        try:
            self._received = rebuild(*arguments)
        except RuntimeError:  # CUDA's, where devices or containers do not share memory
            return False
        return True

    def _read(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        assert self._received is not None
        count = dtype.itemsize
        for length in shape:
            count *= length
        return self._received[begin : begin + count].view(dtype).view(shape)


def _mapped(descriptor: int, size: int) -> Tensor:
    """Return the bytes of a file in memory as a tensor, which keeps the map."""
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
