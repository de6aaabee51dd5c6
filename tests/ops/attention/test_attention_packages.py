"""Our calls of the libraries of 8-bit attention, in the packages themselves: what a CPU can tell of them.

The packages' own Python runs, on tensors without values (PyTorch's fake tensors), and cuDNN's frontend checks our graph.
No kernel runs. ``make attention-check`` fetches the packages; where they are installed, that is enough.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dvdquant.ops.attention.cudnn_fp8 import CudnnAttention
from dvdquant.ops.attention.libraries import LIBRARIES

SHAPE = (2, 256, 4, 128)


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages that ``make attention-check`` unpacked can be imported; one without its compiled part is forgotten."""
    if folder := os.environ.get("DVDQ_ATTENTION"):
        monkeypatch.syspath_prepend(str(Path(folder).absolute()))
    yield
    for name in [name for name in sys.modules if name.startswith("fa3_fwd")]:
        del sys.modules[name]


def found(package: str) -> Path:
    """The file of a package's top module, without importing it; skips where it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {package}: make attention-check")
    return Path(spec.origin)


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_the_version_is_one_that_is_known(library: Any) -> None:
    reason = library.installed()
    if reason is not None and "not installed" in reason:
        pytest.skip(f"needs {library.package}: make attention-check")
    if library.name == "sageattention-2" and "too old" in (reason or ""):
        pytest.skip("needs sageattention 2.2, which is built from its source")
    assert reason is None


class _Seen(TorchDispatchMode):
    """Keeps the shapes that an operation is called with, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.shapes[str(func)] = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_comfy_kitchen_takes_the_call(dtype: torch.dtype) -> None:
    """Its operation has heads before tokens, ours tokens before heads."""
    found("comfy_kitchen")
    kernel = LIBRARIES["comfy-kitchen"].load()
    with FakeTensorMode(), _Seen() as seen:
        q, k = (torch.empty(SHAPE[0], tokens, *SHAPE[2:], dtype=dtype, device="cuda") for tokens in (256, 320))
        out = kernel(q, k, k, 128**-0.5, None)
    assert (out.shape, out.dtype, out.device.type) == (SHAPE, dtype, "cuda")
    assert seen.shapes["comfy_kitchen.int8_attention.default"] == [(2, 4, 256, 128), (2, 4, 320, 128), (2, 4, 320, 128)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fa3_fwd_takes_the_call(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiled part needs PyTorch for CUDA and is left out; its own fake kernel says what comes back."""
    found("fa3_fwd_interface")
    compiled = "fa3_fwd._C"
    monkeypatch.setitem(sys.modules, compiled, ModuleType(compiled))
    kernel = LIBRARIES["fa3-fwd"].load()
    with FakeTensorMode():
        q = torch.empty(SHAPE, dtype=torch.float8_e4m3fn)
        k = torch.empty(2, 320, *SHAPE[2:], dtype=torch.float8_e4m3fn)
        out = kernel(q, k, torch.empty(k.shape, dtype=dtype), 128**-0.5, torch.empty(2))
    assert (out.shape, out.dtype) == (SHAPE, dtype)


def test_sageattention_has_the_arguments() -> None:
    """It imports Triton, so its source is read: our call binds to the signature that stands there."""
    source = found("sageattention").with_name("core.py")
    functions = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    arguments = functions["sageattn"].args
    needed = len(arguments.args) - len(arguments.defaults)
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    signature = inspect.Signature(
        [
            inspect.Parameter(a.arg, kind, default=none if place < needed else None)
            for place, a in enumerate(arguments.args)
        ]
    )
    given: dict[str, Any] = {}

    def sageattn(*args: Any, **more: Any) -> Any:
        given.update(signature.bind(*args, **more).arguments)
        return args[0]

    library = ModuleType("sageattention")
    library.sageattn = sageattn  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "sageattention", library)
        kernel = LIBRARIES["sageattention-1"].load()
    kernel(*(torch.empty(SHAPE) for _ in range(3)), 0.1, None)
    assert (given["tensor_layout"], given["is_causal"], given["sm_scale"]) == ("NHD", False, 0.1)
    assert given["smooth_k"] is False, "it subtracts the mean in place"


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16])
def test_cudnn_builds_the_graph(out_dtype: torch.dtype | None) -> None:
    """The frontend infers every tensor and takes the operations; plans need a GPU. ``None``: codes come out, SM 9.0."""
    cudnn: Any = pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend: make attention-check")
    q = torch.empty(SHAPE, dtype=torch.float8_e4m3fn)
    k = torch.empty(2, 320, *SHAPE[2:], dtype=torch.float8_e4m3fn)
    graph, tensors = CudnnAttention().describe((q, k, k), 128**-0.5, out_dtype, None)
    graph.build_operation_graph()
    types = cudnn.data_type
    written = {None: types.FP8_E4M3, torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF}[out_dtype]
    assert tensors["o"].get_data_type() == written
    assert list(tensors["o"].get_dim()) == [2, 4, 256, 128]
    assert list(tensors["o"].get_stride()) == [256 * 4 * 128, 128, 4 * 128, 1]
