"""The ONNX Runtime backend: the QuantLinear graphs, with inlined function bodies, on the CPU or a CUDA device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.sessions.expand_weights import EXPANDED, expand_weights, expanded_weight
from dvdquant.deploy.sessions.lora_inputs import LoraInputs
from dvdquant.deploy.sessions.weights import WeightFiles
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.hardware.weights import WeightForm
from dvdquant.model.layers import TENSORS
from dvdquant.onnx.function_depth import check_functions
from dvdquant.onnx.prepare import prepare_for_onnxruntime
from dvdquant.onnx.runtime_options import runtime_options
from dvdquant.system.records import brief

__all__ = ["OnnxRuntimeSession", "WeightForm"]

REQUIREMENT = "onnxruntime-gpu>=1.26"  # before it outputs reach PyTorch through private names alone


class OnnxRuntimeSession(EngineSession):
    """The graphs of all bit-widths, which share one copy of each weight.

    Weights are graph inputs and are bound once. On the CPU they are the private copy of the files, on a CUDA device a
    copy of it. As initializers they would be held, and folded into fp32, once per bit-width.

    ``packed`` unpacks the 4-bit weights layer by layer in every call. ``expanded`` unpacks them when the session opens
    and holds fp32 matrices. These take eight times the packed bytes, but once for all bit-widths.

    bfloat16 graphs run as float32 graphs that round after every operator, see
    :func:`dvdquant.onnx.emulate_bfloat16.emulate_bfloat16`. This is correct, but no faster than float32. For speed on a
    GPU use an engine.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        bits: The activation bits to make available. The default is all.
        device: The CPU (default) or a CUDA device.
        weights: ``packed`` or ``expanded``.
        threads: The number of threads of each operator. The default is the number that PyTorch uses.

    Raises:
        UnsupportedError: ``weights`` is neither ``packed`` nor ``expanded``, or ONNX Runtime is too old.
        EngineError: ONNX Runtime has no CUDA provider for a CUDA device, or it refuses a graph.
        OutputError: A file differs from the manifest.
    """

    backend = "onnxruntime"
    _lora_inputs: LoraInputs

    def __init__(
        self,
        artifact: Artifact,
        component: str = "transformer",
        bits: Sequence[int] | None = None,
        device: torch.device | None = None,
        *,
        weights: WeightForm = "packed",
        threads: int | None = None,
    ) -> None:
        if weights not in ("packed", "expanded"):
            raise UnsupportedError(f"weights is {weights!r}", available=["packed", "expanded"])
        super().__init__(artifact, component, bits, device or torch.device("cpu"))
        import onnxruntime

        if not hasattr(onnxruntime.OrtValue, "__dlpack__"):
            raise UnsupportedError(
                f"ONNX Runtime {onnxruntime.__version__} does not hand its outputs to PyTorch (OrtValue.__dlpack__)",
                available=REQUIREMENT,
                fix=f"install a release that does: pip install '{REQUIREMENT}'",
            )
        if self.device.type == "cuda":
            _check_cuda(onnxruntime.get_available_providers(), "install onnxruntime-gpu in place of onnxruntime")
        self.weights: WeightForm = weights
        self._threads = threads or torch.get_num_threads()
        self._files = WeightFiles(artifact, component, self.device)
        self._weights: dict[str, Tensor] = {}
        self._constants: dict[str, Any] = {}
        self._constant_bytes: list[Any] = []
        self._bound: dict[int, _Bound] = {}
        self._kinds: dict[str, int] = {}
        self._changed: dict[str, Tensor] = {}
        self._lora_inputs = LoraInputs(artifact, component)
        self._largest = 0
        # All graphs are read and hashed before ONNX Runtime gets the first.
        graphs = {width: artifact.graph(component, width) for width in self.bits}
        models = {width: _parse(artifact.read(path), path) for width, path in graphs.items()}
        for width, model in models.items():
            self._bound[width] = self._open(model, graphs[width])
        if self.device.type == "cuda" or weights == "expanded":
            self._files.close()  # other copies replace the stored weights; the constants still hold their own file

    # ------------------------------------------------------------------------------------------------------- loading

    def _open(self, model: ir.Model, path: str) -> _Bound:
        import onnxruntime

        prepare_for_onnxruntime(model)
        self._largest = max(self._largest, _largest_weight(model))
        if self.weights == "expanded":
            expand_weights(model)
        bound = self._take_weights(model)
        self._lora_inputs.require(bound, path)
        options = runtime_options(self._threads)
        constants = [name for name in model.graph.initializers if name in self._constants]
        if constants:
            options.add_external_initializers(constants, [self._constants[name] for name in constants])
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device.type == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", self._cuda_options()))
        try:
            raw = ir.serde.serialize_model(model).SerializeToString()
            session = onnxruntime.InferenceSession(raw, options, providers=providers)
            if self.device.type == "cuda":
                _check_cuda(session.get_providers(), "install the CUDA libraries this onnxruntime-gpu was built for")
            binding = session.io_binding()
            for name, kind in bound.items():
                _bind(binding, name, self._weights[name], kind)
            self._kinds |= bound
        except EngineError:
            raise
        except Exception as error:  # onnxruntime's own exceptions share no base class but this
            raise EngineError(
                f"ONNX Runtime refused {path}: {error}",
                fix="export again with this version of dvdquant, or take --backend pytorch",
            ) from error
        return _Bound(session, binding)

    def _cuda_options(self) -> dict[str, Any]:
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        return {"device_id": index, "arena_extend_strategy": "kSameAsRequested"}

    def _take_weights(self, model: ir.Model) -> dict[str, int]:
        """Turn stored weights into graph inputs, and load them.

        Constants (rotation and rotary tables) stay initializers over the copied bytes, because ONNX Runtime prepares
        the matrices of products with constants.

        Args:
            model: The graph, which is changed in place.

        Returns:
            A mapping from the name of each weight to its ONNX type.
        """
        bound: dict[str, int] = {}
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if str(tensor.location).endswith(".safetensors"):
                model.graph.initializers.pop(name)
                value.const_value = None
                model.graph.inputs.append(value)
                bound[name] = tensor.dtype.value
                if name not in self._weights:
                    # With "expanded" the whole private copy is closed later, so a view into it would keep it alive.
                    self._weights[name] = self._stored(name, tensor).to(self.device, copy=self.weights == "expanded")
            elif name not in self._constants:
                self._constants[name] = self._constant(tensor)
        reserved = self._lora_inputs.shapes
        for value in model.graph.inputs:
            name = value.name or ""
            if name in reserved:  # zeros, which add nothing
                dtype = torch.float16 if value.dtype == ir.DataType.FLOAT16 else torch.float32
                bound[name] = _ONNX_TYPES[dtype]
                if name not in self._weights:
                    self._weights[name] = torch.zeros(reserved[name], dtype=dtype, device=self.device)
            if name.endswith(EXPANDED):
                bound[name] = ir.DataType.FLOAT.value
                if name not in self._weights:
                    layer = name.removesuffix(EXPANDED)
                    packed = {k: self._files.tensor(f"{layer}.{k}") for k in TENSORS if k != "bias"}
                    self._weights[name] = expanded_weight(packed).to(self.device)
        return bound

    def _stored(self, name: str, place: ir.ExternalTensor) -> Tensor:
        """Return a weight of the files, after checking that the graph describes it correctly."""
        tensor = self._files.tensor(name)
        location, info = self._files.tensors[name]
        there = (location, info.offset, info.nbytes, tuple(tensor.shape))
        wanted = (str(place.location), place.offset, place.length, tuple(int(d) for d in place.shape.numpy()))
        if there != wanted:
            raise EngineError(f"the graph has {name} at {wanted}", available=str(there), fix="export again")
        return tensor

    def _constant(self, place: ir.ExternalTensor) -> Any:
        import onnxruntime

        raw = self._files.region(str(place.location), place.offset or 0, place.length or 0)
        # numpy has no bfloat16, so ONNX Runtime gets the bits as uint16.
        plain = np.dtype(np.uint16) if place.dtype == ir.DataType.BFLOAT16 else place.dtype.numpy()
        array = raw.view(plain).reshape(tuple(int(d) for d in place.shape.numpy()))
        self._constant_bytes.append(array)  # keeps the bytes alive: ONNX Runtime holds only their address
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, place.dtype.value)

    # --------------------------------------------------------------------------------------------------------- LoRAs

    def _kept(self, name: str) -> Tensor:
        if name not in self._weights:
            raise UnsupportedError(
                f"the LoRA changes {name}, which the graphs of {self.component} do not use",
                fix="give a LoRA of this model",
            )
        return self._weights[name]

    def _put(self, values: Mapping[str, Tensor | None]) -> None:
        for name, value in values.items():
            weight = self._weights[name]
            if name in self._lora_inputs.shapes:
                # The graph takes float32 for bfloat16, and rounds nothing that it is given.
                weight.zero_() if value is None else weight.copy_(value.to(self.dtype))
                continue
            # What is stored may be the private copy that other sessions read, so another tensor takes its place.
            self._changed.pop(name, None)
            if value is not None:
                weight = self._changed[name] = value.to(self.device, weight.dtype)
            for bound in self._bound.values():
                _bind(bound.binding, name, weight, self._kinds[name])

    # ------------------------------------------------------------------------------------------------------- running

    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        session, binding = self._bound[bits].session, self._bound[bits].binding
        # The prepared graph takes float32 where the original takes bfloat16.
        feeds = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in inputs.items()}
        for name, tensor in feeds.items():
            _bind(binding, name, tensor, _ONNX_TYPES[tensor.dtype])
        # The output is bound anew: otherwise a second run would write over the output that the first run returned.
        binding.clear_binding_outputs()
        binding.bind_output("sample", self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            # ONNX Runtime has its own stream, so the inputs must be ready. It waits for that stream before it returns.
            torch.cuda.current_stream(self.device).synchronize()
        session.run_with_iobinding(binding)
        (value,) = binding.get_outputs()
        output = torch.utils.dlpack.from_dlpack(value)
        binding.clear_binding_outputs()
        return output.to(self.dtype)

    def _resident_bytes(self) -> dict[str, int]:
        """Return the bytes that are held between calls.

        ``weights`` counts every bound tensor and every constant once for all bit-widths. ``workspace`` is a lower
        bound: the largest layer's weight in fp32, which ``packed`` makes in every call.
        """
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*self._weights.values(), *self._changed.values())}
        constants = sum(value.tensor_size_in_bytes() for value in self._constants.values())
        workspace = 4 * self._largest if self.weights == "packed" else 0
        return {"weights": sum(held.values()) + constants, "engines": 0, "workspace": workspace}

    def _close(self) -> None:
        self._bound.clear()
        self._weights.clear()
        self._changed.clear()
        self._constants.clear()
        self._constant_bytes.clear()
        self._files.close()


@dataclass(frozen=True)
class _Bound:
    """An ONNX Runtime session with its binding, in which the weights are bound.

    Args:
        session: The ``onnxruntime.InferenceSession``.
        binding: The session's ``IOBinding``.
    """

    session: Any
    binding: Any


def _check_cuda(providers: Sequence[str], fix: str) -> None:
    if "CUDAExecutionProvider" not in providers:
        raise EngineError(
            "ONNX Runtime has no CUDA provider here",
            available=providers,
            fix=f"{fix}, or use --backend pytorch or --device cpu",
        )


def _parse(raw: bytes, path: str) -> ir.Model:
    try:
        proto = onnx.ModelProto.FromString(raw)
        check_functions(proto)
        places = [_place(tensor) for tensor in proto.graph.initializer if _is_external(tensor)]
        strays = sum(_external_tensors(proto)) - len(places)
        model = ir.serde.deserialize_model(proto)
    except EngineError:
        raise
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise EngineError(f"{path} is no ONNX graph this version reads: {error}", fix="export again") from error
    # ONNX Runtime and the graph passes would open such files by path, without any check.
    if strays:
        raise EngineError(f"{path} has {strays} tensors in files that are no weights of the graph", fix="export again")
    for name, location in places:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", location):
            raise EngineError(
                f"{path} has {brief(name)} in the file {brief(location)}",
                available="files of weights beside the graph",
                fix="export again",
            )
    return model


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _place(tensor: onnx.TensorProto) -> tuple[str, str]:
    """Return the name and the file of an external tensor."""
    return tensor.name, next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _external_tensors(message: Any) -> Iterator[bool]:
    """Yield for every tensor in any part of an ONNX message whether it is stored in another file."""
    if isinstance(message, onnx.TensorProto):
        yield _is_external(message)
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                yield from _external_tensors(part)


def _largest_weight(model: ir.Model) -> int:
    """Return the number of elements of the largest packed weight."""
    sizes = [0]
    for node in model.graph:
        if node.op_type == "QuantLinear" and node.inputs[1] is not None and node.inputs[1].shape is not None:
            sizes.append(2 * int(np.prod(node.inputs[1].shape.numpy())))
    return max(sizes)


_ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT.value,
    torch.float16: ir.DataType.FLOAT16.value,
    torch.int64: ir.DataType.INT64.value,
    torch.int32: ir.DataType.INT32.value,
    torch.bool: ir.DataType.BOOL.value,
}


def _bind(binding: Any, name: str, tensor: Tensor, kind: int) -> None:
    """Bind a graph input to the address of a tensor, which must outlive the runs.

    Args:
        binding: The ``IOBinding`` of a session.
        name: The name of the graph input.
        tensor: A contiguous tensor on the session's device.
        kind: The ONNX type of the bytes.
    """
    binding.bind_input(name, tensor.device.type, tensor.device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())
