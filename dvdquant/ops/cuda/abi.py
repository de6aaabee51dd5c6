"""The C interface as kernels/include/dvdquant/kernels.h says it: structs, signatures, and the version of both."""

from __future__ import annotations

import ctypes

__all__ = [
    "ABI_VERSION",
    "GridOutStruct",
    "GridStruct",
    "LayerStruct",
    "PlanStruct",
    "PrologueStruct",
    "RopeStruct",
    "WeightStruct",
    "declare",
]

ABI_VERSION = 7


class LayerStruct(ctypes.Structure):
    """``dvdq_layer``: shape and grids of a layer."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "weight_groups")),
        *((name, ctypes.c_int32) for name in ("float_zero_point", "block", "outer", "act_bits", "act_group", "dtype")),
    ]


class WeightStruct(ctypes.Structure):
    """``dvdq_weight``: addresses of the canonical tensors of a packed weight."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "group_scale", "zero", "bias")]


class PrologueStruct(ctypes.Structure):
    """``dvdq_prologue``: what becomes of x before it is rotated."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "gate", "multiplier", "addend", "hidden")),
        *((name, ctypes.c_int64) for name in ("gate_tokens", "gate_stride", "modulate_tokens", "modulate_stride")),
        *((name, ctypes.c_int32) for name in ("norm", "gelu")),
        ("eps", ctypes.c_float),
    ]


_ROPE_SIZES = ("channels", "stride", "period", "rope_channels", "rope_first", "rope_tokens")


class RopeStruct(ctypes.Structure):
    """``dvdq_rope``: what q or k goes through before attention."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _ROPE_SIZES),
        *((name, ctypes.c_int32) for name in ("head", "dtype", "norm", "rotated", "per_channel")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "cosines", "sines", "bound")),
    ]


class PlanStruct(ctypes.Structure):
    """``dvdq_plan``: what a device needs for a layer, which the library writes."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("path", "codes", "scale_rows", "needs_sums")),
        *((name, ctypes.c_int64) for name in ("prepared_bytes", "codes_bytes_per_token")),
    ]


class GridStruct(ctypes.Structure):
    """``dvdq_grid``: the grid that is searched for a weight."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "groups")),
        *((name, ctypes.c_int32) for name in ("zero_point", "solver")),
    ]


class GridOutStruct(ctypes.Structure):
    """``dvdq_grid_out``: addresses of the grid that is written."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "group_scale", "zero")]


def declare(library: ctypes.CDLL) -> None:
    """Give every call of an opened library its result and argument types.

    Args:
        library: What ctypes opened.

    Raises:
        AttributeError: The library lacks one of the calls.
    """
    layer, i32, i64, pointer = ctypes.POINTER(LayerStruct), ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    signatures: dict[str, tuple[type, list[type]]] = {
        "last_error": (ctypes.c_char_p, []),
        "abi_version": (i32, []),
        "architectures": (ctypes.c_char_p, []),
        "path_name": (ctypes.c_char_p, [i32]),
        "plan_layer": (i32, [layer, i32, ctypes.POINTER(PlanStruct)]),
        "workspace_bytes": (i32, [layer, i32, i64, ctypes.POINTER(i64)]),
        "prepare_weight": (i32, [layer, i32, ctypes.POINTER(WeightStruct), pointer, i64, pointer]),
        "rotate_quantize": (i32, [layer, i32, *[pointer] * 6, i64, pointer]),
        "linear_gemm": (i32, [layer, i32, *[pointer] * 5, i64, pointer, i64, pointer]),
        "quant_linear": (i32, [layer, i32, *[pointer] * 5, i64, pointer, i64, pointer]),
        "rows_bytes": (i32, [layer, i32, ctypes.POINTER(i64)]),
        "make_rows": (i32, [layer, i32, ctypes.POINTER(WeightStruct), pointer, i64, pointer]),
        "expand_weight": (i32, [layer, i32, ctypes.POINTER(WeightStruct), *[pointer] * 2, i64, pointer]),
        "packed_workspace_bytes": (i32, [layer, i32, i64, ctypes.POINTER(i64)]),
        "packed_linear": (
            i32,
            [layer, i32, *[pointer] * 3, ctypes.POINTER(WeightStruct), *[pointer] * 2, i64, pointer, i64, pointer],
        ),
        "fused_quantize": (i32, [layer, i32, ctypes.POINTER(PrologueStruct), *[pointer] * 5, i64, pointer]),
        "fused_linear": (
            i32,
            [layer, i32, ctypes.POINTER(PrologueStruct), *[pointer] * 4, i64, pointer, i64, pointer],
        ),
        "rope_quantize": (i32, [ctypes.POINTER(RopeStruct), *[pointer] * 2, i64, pointer]),
        "search_grid": (i32, [ctypes.POINTER(GridStruct), pointer, ctypes.POINTER(GridOutStruct), pointer]),
        "gptq_round": (
            i32,
            [ctypes.POINTER(GridStruct), pointer, ctypes.POINTER(GridOutStruct), pointer, i64, pointer],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"dvdq_{name}")
        function.restype, function.argtypes = result, arguments
