"""What an error means for the next request: bad request, failed once, or a process that is broken."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

from dvdquant.deploy.faults import fault_of
from dvdquant.errors import (
    Cancelled,
    CheckpointError,
    EngineError,
    OutputError,
    RecipeError,
    ResourceError,
    ShapeError,
    UnsupportedError,
)

# cudaGetErrorString of the errors after which the CUDA runtime's documentation says that the process must end.
LASTING = {
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    999: "unknown error",
}
OF_ONE_CALL = {
    1: "invalid argument",
    2: "out of memory",
    9: "invalid configuration argument",
    98: "invalid device function",
    209: "no kernel image is available for execution on the device",
    701: "too many resources requested for launch",
    720: "too many blocks in cooperative launch",
    801: "operation not supported",
}
# How torch, TensorRT and cuBLAS wrap such a text.
WRAPPED = (
    "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call",
    "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime ({})",
    "CUDA driver error: {}",
)


def raised(error: Exception, cause: BaseException | None) -> Exception:
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_texts_of_cuda(wrapped: str) -> None:
    for text in LASTING.values():
        assert fault_of(RuntimeError(wrapped.format(text))) == "process", text
    for text in OF_ONE_CALL.values():
        assert fault_of(RuntimeError(wrapped.format(text))) == "once", text


def test_an_engine_error_has_the_fault_of_its_cause() -> None:
    """The session wraps the backend's error, and the step runner wraps the session's."""
    broken = RuntimeError(WRAPPED[0].format(LASTING[700]))
    inner = raised(EngineError("pytorch failed in transformer a4"), broken)
    assert fault_of(raised(EngineError("step 3, branch cond: EngineError"), inner)) == "process"
    assert fault_of(raised(EngineError("step 3: NaN"), None)) == "once"
    while_handled = ValueError("while it was handled")
    while_handled.__context__ = broken
    assert fault_of(while_handled) == "process"
    assert fault_of(raised(ValueError("told apart"), None)) == "once"


def test_our_own_errors() -> None:
    for request in (ShapeError, UnsupportedError, RecipeError, Cancelled):
        assert fault_of(request("--steps is 0")) == "request"
    for once in (EngineError, CheckpointError, OutputError, ResourceError):
        assert fault_of(once("it failed")) == "once"
    for bug in (TypeError("x"), KeyError("x"), MemoryError(), TimeoutError()):
        assert fault_of(bug) == "once"
    for end in (KeyboardInterrupt(), SystemExit(1)):
        assert fault_of(end) == "process"
    assert fault_of(UnsupportedError("an illegal memory access was encountered")) == "process"


def test_causes_in_a_circle_end() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert fault_of(one) == "once"


def test_what_torch_raises_here() -> None:
    """Its real types, as far as a machine without a GPU raises them."""
    with pytest.raises(RuntimeError) as memory:
        torch.empty(2**60)
    assert fault_of(memory.value) == "once"
    with pytest.raises(RuntimeError) as shape:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert fault_of(shape.value) == "once"
    assert fault_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")) == "once"
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)) as absent:
            torch.zeros(1, device="cuda")
        assert fault_of(absent.value) in ("once", "process")


def test_the_number_of_an_accelerator_error() -> None:
    if not hasattr(torch, "AcceleratorError"):
        pytest.skip("this torch has no AcceleratorError")
    for codes, fault in ((LASTING, "process"), (OF_ONE_CALL, "once")):
        for code, text in codes.items():
            error = torch.AcceleratorError(f"CUDA error: {text}")
            error.error_code = code
            assert fault_of(error) == fault, (code, text)
            assert fault_of(torch.AcceleratorError(f"CUDA error: {text}")) == fault, text


def test_the_list_of_the_cuda_runtime_itself() -> None:
    """Every error the installed runtime names: the texts above are its own, and it counts as lasting unless we know better."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    found = [path for place in places for path in place.rglob("libcudart.so*")]
    if not found:
        pytest.skip("no CUDA runtime is installed (nvidia-cuda-runtime)")
    library = ctypes.CDLL(str(found[0]))
    library.cudaGetErrorString.restype = ctypes.c_char_p
    texts = {code: library.cudaGetErrorString(code).decode() for code in range(1, 1000)}
    for code, text in {**LASTING, **OF_ONE_CALL}.items():
        assert texts[code] == text
    once = {code for code, text in texts.items() if fault_of(RuntimeError(f"CUDA error: {text}")) == "once"}
    assert set(OF_ONE_CALL) <= once
    assert not once & set(LASTING)
