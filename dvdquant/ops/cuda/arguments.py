"""What callers pass to the kernel library and get from it, and how that becomes the structs of its C interface."""

from __future__ import annotations

from dataclasses import dataclass

from dvdquant.errors import UnsupportedError
from dvdquant.ops.cuda.abi import GridOutStruct, GridStruct, LayerStruct, PrologueStruct, RopeStruct, WeightStruct
from dvdquant.ops.repack import LayerShape

__all__ = [
    "CODES",
    "DTYPES",
    "GRID_SOLVERS",
    "GRID_ZERO_POINTS",
    "NORMS",
    "ROPE_NORMS",
    "GridPointers",
    "GridShape",
    "LayerPlan",
    "ProloguePointers",
    "RopePointers",
    "WeightPointers",
    "grid_out_struct",
    "grid_struct",
    "layer_struct",
    "prologue_struct",
    "rope_struct",
    "weight_struct",
]

DTYPES = ("bf16", "fp16")
CODES = ("s4", "s8", "e4m3")
NORMS = ("none", "layer", "rms")
ROPE_NORMS = ("none", "all", "head", "layer")
GRID_ZERO_POINTS = ("midrise", "symmetric", "float")
GRID_SOLVERS = ("minmax", "search")


@dataclass(frozen=True)
class GridShape:
    """``dvdq_grid``: the grid that is searched for a weight [n, k] on a device.

    Args:
        n: Rows of the weight.
        k: Input features of the weight.
        groups: Segments per row; each has its own group scale.
        zero_point: One of :data:`GRID_ZERO_POINTS`.
        solver: One of :data:`GRID_SOLVERS`.
    """

    n: int
    k: int
    groups: int
    zero_point: str
    solver: str


@dataclass(frozen=True)
class GridPointers:
    """``dvdq_grid_out``: device addresses of a grid; see :class:`dvdquant.quantize.bgr.QuantizedWeight`.

    Args:
        codes: Address of int8 [n, k].
        scale: Address of fp32 [n].
        group_scale: Address of uint8 [n, groups].
        zero: Address of fp32 [n], or of uint8 [n, groups] for the ``float`` zero-point.
    """

    codes: int
    scale: int
    group_scale: int
    zero: int


@dataclass(frozen=True)
class LayerPlan:
    """``dvdq_plan``: what a device needs for a layer.

    Args:
        path: One of :data:`dvdquant.ops.repack.PATHS`.
        codes: Format of the activation codes that rotate_quantize writes: ``s4``, ``s8`` or ``e4m3``.
        scale_rows: Activation scales per token.
        needs_sums: Whether the GEMM reads the token sums.
        prepared_bytes: Bytes of the prepared weight.
        codes_bytes_per_token: Bytes of the codes of one token.
    """

    path: str
    codes: str
    scale_rows: int
    needs_sums: bool
    prepared_bytes: int
    codes_bytes_per_token: int

    @property
    def form(self) -> tuple[str, int]:
        """Return the key of the prepared weight's bytes: paths with codes of one kind multiply the same buffer."""
        return self.codes, self.prepared_bytes


@dataclass(frozen=True)
class WeightPointers:
    """``dvdq_weight``: device addresses of the canonical tensors of a packed weight.

    Args:
        codes: Address of int8 [n, k/2], packed 4-bit codes.
        scale: Address of fp32 [n].
        group_scale: Address of uint8 [n, groups].
        zero: Address of fp32 [n], or of uint8 [n, groups] with float zero-points.
        bias: Address of fp32 [n]; 0 for none.
    """

    codes: int
    scale: int
    group_scale: int
    zero: int
    bias: int = 0


@dataclass(frozen=True)
class ProloguePointers:
    """``dvdq_prologue``: what becomes of x before it is rotated; see :class:`dvdquant.ops.fused.Prologue`.

    Args:
        y: Address of [m, k] of x's dtype, added to x; 0 for none.
        gate: Address of fp32 rows of [k]; 0 for ones.
        multiplier: Address of fp32 rows of [k]; 0 for ones.
        addend: Address of fp32 rows of [k]; 0 for zeros.
        hidden: Address of [m, k] of x's dtype, where the sum is written; 0 for nowhere.
        gate_tokens: Tokens that read one row of the gate; 0 for one row for all.
        gate_stride: Floats between rows of the gate.
        modulate_tokens: Tokens that read one row of multiplier and addend; 0 for one row for all.
        modulate_stride: Floats between rows of multiplier and addend.
        norm: One of :data:`NORMS`.
        gelu: Whether it is GELU alone.
        eps: What the norm adds to the variance.
    """

    y: int = 0
    gate: int = 0
    multiplier: int = 0
    addend: int = 0
    hidden: int = 0
    gate_tokens: int = 0
    gate_stride: int = 0
    modulate_tokens: int = 0
    modulate_stride: int = 0
    norm: str = "none"
    gelu: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class RopePointers:
    """``dvdq_rope``: what q or k goes through before attention; see :class:`dvdquant.ops.attention.rope.Rope`.

    Args:
        channels: Channels of a token, all heads.
        head: Channels of a head.
        dtype: ``bf16`` or ``fp16``, of x and of the result where it has no codes.
        stride: Elements of x from one token to the next.
        period: Tokens of a sample.
        rope_channels: Channels of a row of the tables, a head's or all; 0 for no rope.
        rope_first: The token of a sample that the tables' first row is for.
        rope_tokens: Rows of the tables.
        norm: One of :data:`ROPE_NORMS`.
        rotated: Whether each head is multiplied by the Hadamard matrix.
        per_channel: Whether a row of the tables has a value for each channel, else for each pair.
        eps: What the norm adds to the mean of squares.
        weight: Address of fp32 [channels] or [head]; 0 for ones.
        bias: Address of as many, added behind the weight; 0 for zeros.
        cosines: Address of fp32 [rope_tokens, rope_channels / 2 or rope_channels]; 0 without rope.
        sines: Address of the sines, as the cosines.
        bound: Address of fp32 [1], what becomes 448; 0 for 16 bits out.
    """

    channels: int
    head: int
    dtype: str
    stride: int
    period: int
    rope_channels: int = 0
    rope_first: int = 0
    rope_tokens: int = 0
    norm: str = "none"
    rotated: bool = False
    per_channel: bool = False
    eps: float = 0.0
    weight: int = 0
    bias: int = 0
    cosines: int = 0
    sines: int = 0
    bound: int = 0


def layer_struct(layer: LayerShape) -> LayerStruct:
    """Return ``dvdq_layer`` of a layer.

    Args:
        layer: Shape and grids of the layer.

    Raises:
        UnsupportedError: The kernels have no such activations.
    """
    if layer.dtype not in DTYPES:
        raise UnsupportedError(f"the kernels have no {layer.dtype} activations", available=DTYPES)
    return LayerStruct(
        layer.n,
        layer.k,
        layer.weight_groups,
        int(layer.float_zero_point),
        layer.block,
        layer.outer,
        layer.act_bits,
        layer.act_group,
        DTYPES.index(layer.dtype),
    )


def weight_struct(weight: WeightPointers) -> WeightStruct:
    """Return ``dvdq_weight`` of a packed weight.

    Args:
        weight: Addresses of the packed tensors.
    """
    return WeightStruct(weight.codes, weight.scale, weight.group_scale, weight.zero, weight.bias or None)


def prologue_struct(prologue: ProloguePointers) -> PrologueStruct:
    """Return ``dvdq_prologue`` of a prologue.

    Args:
        prologue: What becomes of x before it is rotated.

    Raises:
        UnsupportedError: The kernels have no such norm.
    """
    if prologue.norm not in NORMS:
        raise UnsupportedError(f"the kernels have no {prologue.norm!r} norm", available=NORMS)
    fields = {**vars(prologue), "norm": NORMS.index(prologue.norm), "gelu": int(prologue.gelu)}
    return PrologueStruct(**fields)


def rope_struct(rope: RopePointers) -> RopeStruct:
    """Return ``dvdq_rope`` of what q or k goes through.

    Args:
        rope: Sizes, addresses and settings of it.

    Raises:
        UnsupportedError: The kernels have no such dtype or norm.
    """
    if rope.dtype not in DTYPES:
        raise UnsupportedError(f"the kernels take no {rope.dtype!r} of q and k", available=DTYPES)
    if rope.norm not in ROPE_NORMS:
        raise UnsupportedError(f"the kernels have no {rope.norm!r} norm of q and k", available=ROPE_NORMS)
    fields = {**vars(rope), "dtype": DTYPES.index(rope.dtype), "norm": ROPE_NORMS.index(rope.norm)}
    return RopeStruct(**fields)


def grid_struct(grid: GridShape) -> GridStruct:
    """Return ``dvdq_grid`` of a grid that is searched.

    Args:
        grid: Shape, zero-point and solver of the grid.

    Raises:
        UnsupportedError: The kernels have no such solver or zero-point.
    """
    if grid.zero_point not in GRID_ZERO_POINTS or grid.solver not in GRID_SOLVERS:
        raise UnsupportedError(
            f"the kernels have no {grid.solver} of {grid.zero_point} zero-points",
            available=[*GRID_SOLVERS, *GRID_ZERO_POINTS],
        )
    return GridStruct(
        grid.n, grid.k, grid.groups, GRID_ZERO_POINTS.index(grid.zero_point), GRID_SOLVERS.index(grid.solver)
    )


def grid_out_struct(out: GridPointers) -> GridOutStruct:
    """Return ``dvdq_grid_out`` of a grid's addresses.

    Args:
        out: Addresses of the grid.
    """
    return GridOutStruct(out.codes, out.scale, out.group_scale, out.zero)
