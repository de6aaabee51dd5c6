"""Results that the kernels need of a layer's stored tensors, made once: prepared weights, smoothing rows, matrix checks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dvdquant.errors import UnsupportedError
from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.cuda.arguments import LayerPlan
from dvdquant.ops.cuda.errors import KernelError
from dvdquant.ops.packed_layer import PackedLayer
from dvdquant.ops.repack import LayerShape
from dvdquant.ops.smooth import pack_pre_quant
from dvdquant.system.torch_hooks import tensor_version

__all__ = ["PreparedCache", "refuse_capture", "synchronize"]


class Preparing(Protocol):
    """Kernels as the cache needs them: :class:`dvdquant.ops.cuda_linear.CudaKernels`, or a double."""

    @property
    def plan(self) -> Callable[[LayerShape], LayerPlan]:
        """The plan of the kernels for a layer."""

    def prepare(self, layer: LayerShape, packed: tuple[Tensor, ...]) -> Tensor:
        """Return the prepared weight, uint8 [plan.prepared_bytes].

        Args:
            layer: Shape and grids of the layer.
            packed: The stored tensors of the layer.
        """


class PreparedCache:
    """Prepared weights, each kept as long as the packed weight tensor it was made from.

    An entry is keyed by the weight tensor and :attr:`LayerPlan.form`. It is made again when one of the five stored
    tensors was replaced, moved or changed in place. On 8-bit paths it takes one byte per weight, beside the half byte
    of the packed one. 4- and 8-bit activations share an entry where their paths hold weights in the same form.
    """

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()
        self._sylvester: Any = WeakTensorKeyDictionary()
        self._pre_quants: Any = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(paths) for paths in self._entries.values())

    def get(self, kernels: Preparing, layer: LayerShape, packed: PackedLayer) -> Tensor:
        """Return the prepared weight of a layer, uint8 [plan.prepared_bytes]; make it if it is not there.

        Args:
            kernels: The kernels that prepare it.
            layer: Shape and grids of the layer.
            packed: The tensors of the layer.

        Raises:
            KernelError: It would have to be made while a CUDA graph is being captured.
        """
        key = kernels.plan(layer).form
        state = tuple((t.data_ptr(), tensor_version(t)) for t in packed.stored())
        with self._lock:
            paths = self._entries.setdefault(packed.weight, {})
            if key in paths and paths[key][0] == state:
                prepared: Tensor = paths[key][1]
                return prepared
            refuse_capture(packed.weight.device, "its weight is prepared at the first call")
            prepared = kernels.prepare(layer, packed.stored())
            synchronize(prepared)
            paths[key] = (state, prepared)
            return prepared

    def held_bytes(self, weight: Tensor) -> int:
        """Return the bytes of the prepared weights made of this packed weight.

        Args:
            weight: The packed weight tensor.
        """
        with self._lock:
            return sum(prepared.nbytes for _, prepared in self._entries.get(weight, {}).values())

    def pre_quant(self, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return :func:`pack_pre_quant` of a layer's tensors, kept as long as they are; None where both are None.

        Args:
            scale: fp32 [K], or None.
            shift: fp32 [K], or None.
            dtype: Dtype of x.

        Raises:
            KernelError: It would have to be made while a CUDA graph is being captured.
        """
        key, other = (shift, None) if scale is None else (scale, shift)
        if key is None:
            return None
        state = [(t.data_ptr(), tensor_version(t), t.device) for t in (key, other) if t is not None]
        with self._lock:
            kept = self._pre_quants.setdefault(key, {})
            if dtype in kept and kept[dtype][0] is other and kept[dtype][1] == state:
                rows: Tensor = kept[dtype][2]
                return rows
            refuse_capture(key.device, "its pre-quant scale is prepared at the first call")
            rows = pack_pre_quant(scale, shift, dtype)
            synchronize(rows)
            kept[dtype] = (other, state, rows)
            return rows

    def require_sylvester(self, hadamard: Tensor) -> None:
        """Refuse an inner factor that the kernels do not have.

        Args:
            hadamard: The inner rotation factor, fp32 [b, b].

        Raises:
            UnsupportedError: It is no Sylvester matrix / √b.
            KernelError: It would have to be checked for the first time while a CUDA graph is being captured.
        """
        if not self.is_sylvester(hadamard):
            raise UnsupportedError(
                "the kernels rotate by Sylvester matrices, and the hadamard input is another one",
                fix="export with rotation auto, full or none, or run on --device cpu",
            )

    def is_sylvester(self, hadamard: Tensor) -> bool:
        """Return whether ``hadamard`` is the Sylvester matrix / √b, the only inner factor that the kernels have.

        Args:
            hadamard: The inner rotation factor, fp32 [b, b].

        Raises:
            KernelError: It would have to be checked for the first time while a CUDA graph is being captured.
        """
        version = tensor_version(hadamard)
        with self._lock:
            known = self._sylvester.get(hadamard)
            if known is None or known[0] != version:
                refuse_capture(hadamard.device, "its Hadamard matrix is checked at the first call")
                order = hadamard.shape[0]
                power = order & (order - 1) == 0
                same = power and torch.equal(hadamard, hadamard_matrix(order).to(hadamard))
                self._sylvester[hadamard] = known = (version, same)
            return bool(known[1])


def refuse_capture(device: torch.device, why: str) -> None:
    """Refuse to go on while a CUDA graph is being captured.

    Args:
        device: Where the layer is; nothing is refused on a CPU.
        why: What would have to be done now, for the message.

    Raises:
        KernelError: A CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"a quantized layer is being captured in a CUDA graph before it ever ran: {why}",
            fix="call the model once before capturing it",
        )


def synchronize(tensor: Tensor) -> None:
    """Wait for what was made on the current stream, so that every stream can use it.

    Args:
        tensor: A tensor that was just made; nothing happens on a CPU.
    """
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
