"""cuDNN's FP8 attention: one graph per shape, with one scale each for q, k, v and, on SM 9.0, the output.

On SM 9.0 cuDNN writes the output in e4m3. An output is a weighted mean of v, so v's largest value bounds it, and its scale is
known before. On SM 10.0 the output is in 16 bit. The largest p and output are not asked for: they would cost up to as much as
the attention itself.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.ops.attention.e4m3 import e4m3_operands
from dvdquant.system.devices import cuda_sm

__all__ = ["CudnnAttention"]

_SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


class CudnnAttention:
    """A kernel as :mod:`.libraries` describes it, with its graphs by shape."""

    def __init__(self) -> None:
        self._cudnn: Any = importlib.import_module("cudnn")
        self._graphs: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self._handles: dict[torch.device, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        """Return attention, see :mod:`.libraries`."""
        codes, steps = e4m3_operands(q, k, v, bounds, v_per_head=False)
        wide = cuda_sm(q.device) >= 100
        key = (q.device, q.shape, k.shape, v.dtype, scale)
        if key not in self._graphs:
            self._graphs[key] = self._build(codes, scale, v.dtype if wide else None)
        graph, tensors = self._graphs[key]
        out = torch.empty(q.shape, dtype=v.dtype if wide else torch.float8_e4m3fn, device=q.device)
        one = torch.ones((1, 1, 1, 1), dtype=torch.float32, device=q.device)
        scalars = dict(zip(_SCALARS[:3], (step.reshape(1, 1, 1, 1) for step in steps)))
        v_step = scalars["descale_v"]
        scalars |= {"descale_s": one / E4M3_MAX, "scale_s": one * E4M3_MAX, "scale_o": one if wide else 1 / v_step}
        values = {tensors[name]: value for name, value in scalars.items()}
        values |= {tensors[name]: code for name, code in zip("qkv", codes)}
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
        self._cudnn.set_stream(handle=self._handle(q.device), stream=torch.cuda.current_stream(q.device).cuda_stream)
        graph.execute({**values, tensors["o"]: out}, workspace, handle=self._handle(q.device))
        return out if wide else (out.float() * v_step).to(v.dtype)

    def _handle(self, device: torch.device) -> Any:
        if device not in self._handles:
            self._handles[device] = self._cudnn.create_handle()
        return self._handles[device]

    def _build(
        self, codes: tuple[Tensor, ...], scale: float, out_dtype: torch.dtype | None
    ) -> tuple[Any, dict[str, Any]]:
        """Return a graph for operands [B, S, H, d], with its plans, and its tensors by name."""
        graph, tensors = self.describe(codes, scale, out_dtype, self._handle(codes[0].device))
        graph.build_operation_graph()
        graph.create_execution_plans([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return graph, tensors

    def describe(
        self, codes: tuple[Tensor, ...], scale: float, out_dtype: torch.dtype | None, handle: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Return the graph as it is written down, found valid, and its tensors by name. It needs no GPU.

        Args:
            codes: e4m3 codes of q [B, S, H, d], and of k and v [B, T, H, d], contiguous.
            scale: What scores are multiplied by.
            out_dtype: The dtype of the result, or None for e4m3 codes.
            handle: cuDNN's, of the device, or None.
        """
        types = self._cudnn.data_type
        graph = self._cudnn.pygraph(
            io_data_type=types.FP8_E4M3,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=handle,
        )
        tensors = {
            name: graph.tensor(name=name, data_type=types.FP8_E4M3, **_place(x)) for name, x in zip("qkv", codes)
        }
        scalar = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1], "data_type": types.FLOAT}
        tensors |= {name: graph.tensor(name=name, **scalar) for name in _SCALARS}
        out, _, p_amax, out_amax = graph.sdpa_fp8(
            **tensors, attn_scale=scale, use_causal_mask=False, generate_stats=False
        )
        written = {None: types.FP8_E4M3, torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF}[out_dtype]
        place = _place(codes[0])
        out.set_output(True).set_dim(place["dim"]).set_stride(place["stride"]).set_data_type(written)
        for unused in (p_amax, out_amax):
            unused.set_output(False).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(types.FLOAT)
        graph.validate()
        return graph, {**tensors, "o": out}


def _place(x: Tensor) -> dict[str, list[int]]:
    """Return shape and strides as cuDNN names them, [B, H, S, d], of a contiguous [B, S, H, d]."""
    batch, tokens, heads, d = x.shape
    return {"dim": [batch, heads, tokens, d], "stride": [tokens * heads * d, d, heads * d, 1]}
