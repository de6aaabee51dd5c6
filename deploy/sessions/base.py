"""The common base of all backends: one transformer, all its bit-widths, and the weights that they share."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.inputs import check_inputs, graph_dtype
from dvdquant.deploy.sessions.lora_inputs import LoraInputs, refuse_without_inputs
from dvdquant.errors import DvdquantError, EngineError
from dvdquant.model.families import Family, Sizes
from dvdquant.system.out_of_memory import ran_out_of_memory

if TYPE_CHECKING:
    from dvdquant.ops.attention.ladder import Attention

__all__ = ["ENGINES", "EngineSession", "WrappedSession"]

# The backends whose sessions run engines.
ENGINES = ("tensorrt_rtx", "tensorrt")
_MORE_MEMORY = "close other sessions and programs, or use a smaller size (dvdq-run --dry-run says what a run needs)"


class EngineSession(ABC):
    """All bit-widths of one transformer on one backend. They share weights as far as the backend can.

    Calls from several threads wait for each other. Close the session, or use it in a ``with`` statement, to free
    memory.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        bits: The activation bits to make available, a part of ``artifact.bits(component)``. None means all.
        device: The device that inputs are moved to and outputs are on.
    """

    backend: str
    # What chooses the library of 8-bit attention; None is 16 bit, or what engines were built with.
    attention: Attention | None = None
    # Whether what comes before quantized layers is in their kernels: sessions of PyTorch say so.
    fused = False
    # The library that runs engines, with its release; "" for the other backends.
    library = ""
    # How quantized weights are held: packed, expanded, or as built, inside of engines.
    weights: str = "as built"

    def __init__(self, artifact: Artifact, component: str, bits: Sequence[int] | None, device: torch.device) -> None:
        self.artifact = artifact
        self.component = component
        self.device = device
        self.dtype: torch.dtype = artifact.dtype
        self.family: Family = artifact.family(component)
        self.sizes: Sizes = artifact.sizes
        self.bits: tuple[int, ...] = chosen_bits(artifact, component, bits)
        self.loras: tuple[LoraSpec, ...] = ()
        self._lora_inputs: LoraInputs | None = None
        self.closed = False
        self._lock = threading.RLock()

    def run(self, inputs: Mapping[str, Tensor], bits: int) -> Tensor:
        """Run one forward pass.

        Args:
            inputs: The graph's inputs by name, as ``family.inputs(sizes)`` lists them, on any device. Latents and
                embeddings are cast to ``self.dtype``, the others to the dtype of their InputSpec.
            bits: Activation bits, one of ``self.bits``.

        Returns:
            The sample, in ``self.dtype`` on ``self.device``.

        Raises:
            ShapeError: The export does not serve one of the inputs, see :meth:`check_inputs`.
            EngineError: The session is closed, lacks ``bits``, or the backend failed (its own error is the cause).
        """
        with self._lock:
            self._require_open()
            if bits not in self.bits:
                raise EngineError(
                    f"the {self.backend} session of {self.component} has no {bits}-bit activations",
                    available=[f"{b} bits" for b in self.bits],
                    fix="open the session with these bits, or export with a recipe that has them",
                )
            self.check_inputs(inputs)
            specs = self.family.inputs(self.sizes)
            ready = {s.name: inputs[s.name].to(self.device, graph_dtype(s, self.dtype)).contiguous() for s in specs}
            try:
                return self._run(ready, bits)
            except EngineError as error:
                if not ran_out_of_memory(error):
                    raise
                # The binding says what to do about an engine that fails, which is no help against too little memory.
                raise EngineError(error.what, available=error.available, fix=_MORE_MEMORY) from error
            except DvdquantError:
                raise
            except Exception as error:  # each backend has its own exceptions, and they share no base class
                if ran_out_of_memory(error):
                    kind = "device memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
                    raise EngineError(
                        f"{self.backend} ran out of {kind} in {self.component} a{bits}: {error}", fix=_MORE_MEMORY
                    ) from error
                raise EngineError(
                    f"{self.backend} failed in {self.component} a{bits}: {error}",
                    fix="free memory of the device (dvdq-run --dry-run says what a run needs), or take another --backend",
                ) from error

    def _require_open(self) -> None:
        """EngineError if the session is closed."""
        if self.closed:
            raise EngineError(
                f"the {self.backend} session of {self.component} is closed",
                fix="open the export anew, by what opened it: DvdqTransformer.from_pretrained or open_session",
            )

    @abstractmethod
    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        """Run one forward pass on checked inputs.

        Args:
            inputs: Inputs by name. They are contiguous, on ``self.device``, and have the graph's dtypes.
            bits: Activation bits, one of ``self.bits``.
        """

    def set_loras(self, specs: Sequence[LoraSpec]) -> None:
        """Run LoRAs beside the quantized weights, in 16 bit, instead of those that ran before; none switches them off.

        Graphs and engines have a place for them where the export reserves inputs (``dvdq-export --lora-rank``).

        Args:
            specs: The LoRAs and their scales, in addition to those that are in the weights of the export.

        Raises:
            UnsupportedError: The export reserves no inputs, or they do not hold these LoRAs. Those that ran before go on.
            CheckpointError: A file is no LoRA of this model. Those that ran before go on.
            EngineError: The session is closed.
        """
        inputs = self._lora_inputs
        if inputs is None or not inputs.rank:
            if specs:
                refuse_without_inputs(self.backend)
            return
        with self._lock:
            self._require_open()
            # Read first: where a file cannot be used, nothing has changed.
            values = inputs.values(specs, self._kept)
            before, inputs.changed = inputs.changed, inputs.changed | values.keys()
            self._put({**dict.fromkeys(before - values.keys()), **values})
            inputs.changed, self.loras = set(values), tuple(specs)

    def _kept(self, name: str) -> Tensor:
        """Return a tensor that the export keeps in 16 bit, as it is without LoRAs.

        Raises:
            UnsupportedError: The session cannot change it.
        """
        raise NotImplementedError

    def _put(self, values: Mapping[str, Tensor | None]) -> None:
        """Put values into reserved inputs and in the place of kept tensors; None puts back what was there without LoRAs.

        Args:
            values: fp32 tensors on the CPU, by name.
        """
        raise NotImplementedError

    def resident_bytes(self) -> dict[str, int]:
        """Return the bytes that are held between calls. It waits for a running pass.

        Returns:
            ``weights``: quantized and kept tensors and constants. What bit-widths share is counted once. ``engines``:
            what the backend loaded besides. ``workspace``: scratch memory, as far as it is known. A closed session
            holds nothing.
        """
        with self._lock:
            return {"weights": 0, "engines": 0, "workspace": 0} if self.closed else self._resident_bytes()

    @abstractmethod
    def _resident_bytes(self) -> dict[str, int]:
        """Return what :meth:`resident_bytes` does. The session is open and stays so."""

    @property
    def repeats_steps(self) -> bool:
        """Return whether steps of the same shapes are repeated as CUDA graphs."""
        return False

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse inputs that the export does not serve.

        Args:
            inputs: The graph's inputs by name.

        Raises:
            ShapeError: An input does not fit. The error says what the export serves, and which option widens it.
        """
        check_inputs(self.family, self.sizes, inputs)

    def close(self) -> None:
        """Free weights, engines and scratch memory.

        A second call is harmless. Outputs that :meth:`run` returned stay valid.
        """
        with self._lock:
            if not self.closed:
                self.closed = True
                self._close()

    @abstractmethod
    def _close(self) -> None:
        """Drop everything that the backend holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class WrappedSession(EngineSession):
    """A session around another session, for a subclass whose ``run`` does additional work.

    Closing it closes the inner session too.

    Args:
        inner: The session that runs the engines.
    """

    def __init__(self, inner: EngineSession) -> None:
        super().__init__(inner.artifact, inner.component, inner.bits, inner.device)
        self.inner, self.backend, self.dtype = inner, inner.backend, inner.dtype
        self.loras = inner.loras
        self.attention = inner.attention
        self.fused = inner.fused
        self.weights = inner.weights
        self.library = inner.library

    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        return self.inner._run(inputs, bits)

    @property
    def repeats_steps(self) -> bool:
        """Return whether the inner session repeats steps as CUDA graphs."""
        return self.inner.repeats_steps

    def set_loras(self, specs: Sequence[LoraSpec]) -> None:
        """See :meth:`EngineSession.set_loras`; of the inner session.

        Args:
            specs: The LoRAs, each a file with a scale and a transformer.
        """
        self.inner.set_loras(specs)
        self.loras = self.inner.loras

    def _resident_bytes(self) -> dict[str, int]:
        return self.inner.resident_bytes()

    def _close(self) -> None:
        self.inner.close()


def chosen_bits(artifact: Artifact, component: str, bits: Sequence[int] | None) -> tuple[int, ...]:
    """Return the wanted bits in ascending order and without duplicates.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        bits: The wanted activation bits, or None for all that were exported.

    Raises:
        EngineError: ``bits`` is empty, or the export lacks some of them. The error names the bits that it has.
    """
    there = artifact.bits(component)
    chosen = there if bits is None else tuple(sorted(set(bits)))
    for width in chosen:
        artifact.graph(component, width)
    if not chosen:
        raise EngineError("no activation bits were asked for", available=[f"{b} bits" for b in there])
    return chosen
