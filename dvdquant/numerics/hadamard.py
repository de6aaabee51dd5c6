"""Hadamard matrices of every constructible order, and the fast rotation of weights and activations by channels.

Orders are ``2^a · p``: Sylvester's doubling for the power of two, Paley's constructions I and II over GF(q) for ``p``.
Every matrix here is computed from the quadratic residues of its field; nothing is read from a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError

__all__ = ["MAX_INNER", "Rotation", "hadamard_matrix", "kept_hadamard_matrix", "rotate", "rotate_inverse"]

# The inner factor is stored in every graph, and the kernels hold it in shared memory: 1024² fp32 is 4 MiB. A larger
# rotation puts the rest of its order into the outer factor.
MAX_INNER = 1024
# Without dvdquant's kernels, a rotation is a dense product in 16 bit that costs block/N of the layer's own product.
# Beyond 256 the gain in error is not worth the time, and the matrices of a small engine are larger than its weights.
AUTO_BLOCK = 256
# Up to this order, one dense product is faster than two thinner ones (measured on AVX-512; AVX2 agrees within a few %).
_DENSE_STAGE = 64
# The number of elements rotated at a time: the stages of one slice then find their input in the L3 cache.
_SLICE = 1 << 20


@dataclass(frozen=True)
class Rotation:
    """A block-diagonal orthonormal rotation ``x̃ = x · (I ⊗ outer ⊗ hadamard)`` of the last axis.

    ``x`` [..., K] is seen as [..., q, p, b] with K = q·p·b, and ``x̃ = outerᵀ @ (x @ hadamard)``.

    Args:
        features: K, the length of the rotated axis.
        inner: b, the order of the Sylvester factor, a power of two. :meth:`for_features` takes at most ``MAX_INNER``.
        outer: p, the order of the outer factor: 1, a power of two, a Paley order, or a Paley order times a power of
            two.

    Raises:
        ShapeError: inner·outer does not divide features, or inner is no power of two.
        UnsupportedError: No Hadamard matrix of order outer can be constructed.
    """

    features: int
    inner: int
    outer: int

    def __post_init__(self) -> None:
        if self.inner < 1 or self.outer < 1 or self.inner & (self.inner - 1):
            raise ShapeError(
                f"rotation factors {self.inner} and {self.outer}: the inner one is a power of two, both ≥ 1",
                fix="take the factors that Rotation.for_features finds",
            )
        if self.features < 1 or self.features % self.block:
            raise ShapeError(
                f"rotation block {self.block} does not divide {self.features} channels",
                fix=f"use block {_nearest_block(max(self.features, 1), self.block)}",
            )
        if _core(self.outer) is None:
            raise UnsupportedError(
                f"no Hadamard matrix of order {self.outer} can be constructed",
                fix="take rotation auto, or a power of two",
            )

    @property
    def block(self) -> int:
        """Return the number of channels that are mixed with each other, ``inner · outer``."""
        return self.inner * self.outer

    @property
    def identity(self) -> bool:
        """Return whether the rotation leaves every channel unchanged."""
        return self.block == 1

    @classmethod
    def for_features(cls, features: int, spec: str | int) -> Rotation:
        """Return the rotation that a recipe asks for.

        Args:
            features: K, the number of input channels.
            spec: ``auto`` takes the largest power of four up to 256 that divides K (its entries are powers of two, so
                they are exact in every dtype). ``regular`` is the same: what is regular of it are the signs before it
                (:mod:`dvdquant.numerics.regular_hadamard`). ``full`` takes the whole row, with the smallest Paley core. ``none``
                takes no rotation. An integer takes a block of that many channels, which divides K.

        Raises:
            ShapeError: The block does not divide K.
            UnsupportedError: ``spec`` is unknown, or the block has no constructible Hadamard matrix. ``fix`` then names
                the largest block of K that has one.
        """
        if spec == "none":
            return cls(features, 1, 1)
        if spec in ("auto", "regular"):
            exponent = min((features & -features).bit_length() - 1, AUTO_BLOCK.bit_length() - 1)
            return cls(features, 4 ** (exponent // 2), 1)
        if spec != "full" and (isinstance(spec, bool) or not isinstance(spec, int)):
            raise UnsupportedError(
                f"rotation {spec!r} is unknown", available="auto, full, none, regular, or a block size"
            )
        block = features if spec == "full" else int(spec)
        if block < 1 or features % block:
            raise ShapeError(
                f"rotation block {block} does not divide {features} channels",
                fix=f"use block {_nearest_block(features, block)}",
            )
        core = _core(block)
        if core is None:
            raise UnsupportedError(
                f"no Hadamard matrix of order {block} can be constructed (for {features} channels)",
                available="orders 2^a·p with p = q+1 (q ≡ 3 mod 4) or 2(q+1) (q ≡ 1 mod 4), q a prime power",
                fix=f"use rotation block {_largest_block(features)}, or 'auto'",
            )
        inner = min(block // core, MAX_INNER)
        return cls(features, inner, block // inner)

    def matrices(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return new copies of ``(hadamard [inner, inner], outer [outer, outer])``, both orthonormal.

        Args:
            dtype: The dtype of both matrices.
            device: The device of both matrices.
        """
        return (
            _normalized(self.inner).to(device=device, dtype=dtype, copy=True),
            _normalized(self.outer).to(device=device, dtype=dtype, copy=True),
        )


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the orthonormal Hadamard matrix [n, n], ``core ⊗ Sylvester`` with the smallest core and entries ±1/√n.

    Args:
        n: The order, at least 1.
        dtype: The floating dtype of the matrix.

    Raises:
        UnsupportedError: No construction here reaches order n. ``fix`` names the largest divisor of n that is an order
            with a construction.
    """
    signs = _signs(n)
    if signs is None:
        raise UnsupportedError(
            f"no Hadamard matrix of order {n} can be constructed",
            available="1, 2, and orders 2^a·p with p = q+1 (q ≡ 3 mod 4) or 2(q+1) (q ≡ 1 mod 4), q a prime power",
            fix=f"use order {_largest_block(n)}" if n > 0 else "use a positive order",
        )
    return torch.from_numpy(signs).to(dtype) / math.sqrt(n)


_kept: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def kept_hadamard_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal Hadamard matrix [n, n] on a device, the same tensor at every call. Nobody writes into it.

    A copy to a GPU at every call would wait for the GPU, and could not be part of a CUDA graph.

    Args:
        n: The order, at least 1.
        dtype: The floating dtype of the matrix.
        device: The device that the matrix lies on.

    Raises:
        UnsupportedError: No construction here reaches order n.
    """
    key = (n, dtype, device)
    if (found := _kept.get(key)) is not None:
        return found
    matrix = hadamard_matrix(n, torch.promote_types(dtype, torch.float32)).to(device, dtype)
    if type(matrix) is Tensor:  # not one of a trace, which ends with it
        _kept[key] = matrix
    return matrix


def rotate(x: Tensor, rotation: Rotation, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate every block of the last axis, ``x̃ = outerᵀ @ (x @ hadamard)``, in O(K log K) per row.

    Args:
        x: [..., K] of a floating dtype, on any device, with any strides.
        rotation: The rotation, with features K.
        dtype: The dtype of the result. By default it is the dtype of the computation: fp64 for fp64, fp32 for all
            others.

    Returns:
        x̃ [..., K], a new tensor. ``rotate(x) · rotate(w)ᵀ == x · wᵀ`` up to rounding.

    Raises:
        ShapeError: The last axis is not K.
        UnsupportedError: x is not floating point.
    """
    return _apply(x, rotation, dtype, inverse=False)


def rotate_inverse(x: Tensor, rotation: Rotation, dtype: torch.dtype | None = None) -> Tensor:
    """Undo :func:`rotate` on every block of the last axis: ``x = outer @ (x̃ @ hadamardᵀ)``.

    Args:
        x: x̃ [..., K] of a floating dtype, on any device, with any strides.
        rotation: The rotation, with features K.
        dtype: The dtype of the result. By default it is the dtype of the computation: fp64 for fp64, fp32 for all
            others.

    Returns:
        x [..., K], a new tensor.

    Raises:
        ShapeError: The last axis is not K.
        UnsupportedError: x is not floating point.
    """
    return _apply(x, rotation, dtype, inverse=True)


def _apply(x: Tensor, rotation: Rotation, dtype: torch.dtype | None, *, inverse: bool) -> Tensor:
    """Check the input, and rotate it in one piece or, on a CPU, in slices that fit the cache.

    Args:
        x: [..., K] of a floating dtype.
        rotation: The rotation, with features K.
        dtype: The dtype of the result; None means the dtype of the computation.
        inverse: Apply the inverse rotation instead.

    Raises:
        ShapeError: The last axis is not K.
        UnsupportedError: x is not floating point.
    """
    if x.ndim == 0 or x.shape[-1] != rotation.features:
        raise ShapeError(
            f"a rotation of {rotation.features} channels got a tensor of shape {tuple(x.shape)}",
            fix="make a rotation for the last axis with Rotation.for_features, or move the axis of channels there",
        )
    if not x.dtype.is_floating_point:
        raise UnsupportedError(f"cannot rotate a tensor of {x.dtype}", available="floating point dtypes")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = dtype or compute
    stages = [s.to(device=x.device, dtype=compute) for s in _stages(rotation.inner)]
    outer = _normalized(rotation.outer).to(device=x.device, dtype=compute)
    outer = outer if inverse else outer.T
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= _SLICE:
        return _rotate_rows(x.to(compute), rotation, stages, outer).to(dtype)
    rows = x.reshape(-1, rotation.features)
    result = torch.empty(rows.shape, dtype=dtype)
    step = max(1, _SLICE // rotation.features)
    for start in range(0, len(rows), step):
        part = rows[start : start + step].to(compute)
        result[start : start + step] = _rotate_rows(part, rotation, stages, outer)
    return result.reshape(x.shape)


def _rotate_rows(x: Tensor, rotation: Rotation, stages: list[Tensor], outer: Tensor) -> Tensor:
    """Multiply by one factor of ``outer ⊗ stages[0] ⊗ … ⊗ stages[-1]`` at a time, the fastest varying axis first.

    Args:
        x: [..., K], fp32 or fp64.
        rotation: The rotation, with features K.
        stages: Symmetric Sylvester factors [n, n] whose Kronecker product has the order ``rotation.inner``.
        outer: The factor [p, p] that multiplies from the left: ``outerᵀ`` to rotate, ``outer`` to rotate back.
    """
    shape = x.shape
    if rotation.identity:
        return x.clone()
    y = x
    below = 1  # the product of the orders of the axes that are already rotated
    for stage in reversed(stages):
        order = stage.shape[0]
        if below == 1:
            y = y.reshape(-1, order) @ stage
        else:
            # Sylvester factors are symmetric, so the factor on the left needs no transpose.
            y = stage @ y.reshape(-1, order, below)
        below *= order
    if rotation.outer > 1:
        y = outer @ y.reshape(-1, rotation.outer, below)
    return y.reshape(shape)


@lru_cache(maxsize=64)
def _stages(order: int) -> tuple[Tensor, ...]:
    """Return fp64 Sylvester factors of about equal order ≤ ``_DENSE_STAGE``; their Kronecker product has this order."""
    exponent = order.bit_length() - 1
    if exponent == 0:
        return ()
    count = -(-exponent // (_DENSE_STAGE.bit_length() - 1))
    sizes = [2 ** (exponent // count + (i < exponent % count)) for i in range(count)]
    return tuple(_normalized(size) for size in sizes)


@lru_cache(maxsize=64)
def _normalized(order: int) -> Tensor:
    """Return the orthonormal Hadamard matrix [order, order] in fp64 from a cache; the caller must not change it."""
    return hadamard_matrix(order)


@lru_cache(maxsize=256)
def _core(order: int) -> int | None:
    """Return the smallest order p with order = 2^a·p, where p is 1 or a Paley order, or None if there is none."""
    if order < 1:
        return None
    odd = order // (order & -order)
    core = odd
    while core <= order:
        if core == 1 or _paley_field(core) is not None:
            return core
        core *= 2
    return None


@lru_cache(maxsize=16)
def _signs(order: int) -> npt.NDArray[np.int8] | None:
    """Return the Hadamard matrix [order, order] of ±1 from a cache, or None if no construction reaches the order."""
    core = _core(order)
    if core is None:
        return None
    signs = np.ones((1, 1), np.int8) if core == 1 else _paley(core)
    sylvester = np.ones((1, 1), np.int8)
    doubling = np.array([[1, 1], [1, -1]], np.int8)
    while len(signs) * len(sylvester) < order:
        sylvester = np.kron(doubling, sylvester)
    return np.kron(signs, sylvester)


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """Return ``(construction, prime, degree)`` of the field behind a Paley matrix of this order, or None."""
    if order % 4:
        return None
    for construction, q in ((1, order - 1), (2, order // 2 - 1)):
        if q % 4 == (3 if construction == 1 else 1):
            power = _prime_power(q)
            if power is not None:
                return construction, *power
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return ``(prime, degree)`` with q = prime^degree, or None if q is no power of a prime."""
    if q < 2:
        return None
    prime = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    degree = 0
    while q % prime == 0:
        q //= prime
        degree += 1
    return (prime, degree) if q == 1 else None


def _paley(order: int) -> npt.NDArray[np.int8]:
    """Return Paley's matrix of signs; the order must have a field.

    Construction I (q ≡ 3 mod 4): ``I + S``, S = [[0, 1ᵀ], [−1, Q]] skew. Construction II (q ≡ 1 mod 4):
    ``S ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]]``, S = [[0, 1ᵀ], [1, Q]] symmetric. Q[i, j] = χ(aᵢ − aⱼ).

    Raises:
        UnsupportedError: No finite field gives a Paley matrix of this order.
    """
    field = _paley_field(order)
    if field is None:
        raise UnsupportedError(
            f"no Paley matrix of order {order}",
            fix="take an order q + 1 (q ≡ 3 mod 4) or 2(q + 1) (q ≡ 1 mod 4), q a prime power",
        )
    construction, prime, degree = field
    q = prime**degree
    bordered = np.ones((q + 1, q + 1), np.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _residue_matrix(prime, degree)
    if construction == 1:
        bordered[1:, 0] = -1
        return bordered + np.eye(q + 1, dtype=np.int8)
    mix, diagonal = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(bordered, mix) + np.kron(np.eye(q + 1, dtype=np.int8), diagonal)


def _residue_matrix(prime: int, degree: int) -> npt.NDArray[np.int8]:
    """Return χ(aᵢ − aⱼ) [q, q] over GF(prime^degree): 0 on the diagonal, 1 for squares, −1 for the others.

    The base-``prime`` digits of i, lowest first, are the coefficients of the polynomial of element i.
    """
    q = prime**degree
    weights = prime ** np.arange(degree)
    digits = np.arange(q)[:, None] // weights % prime
    modulus = _irreducible(prime, degree)
    character = np.full(q, -1, np.int8)
    for element in digits:
        character[int(_square(element, modulus, prime) @ weights)] = 1
    character[0] = 0
    difference = (digits[:, None, :] - digits[None, :, :]) % prime
    matrix: npt.NDArray[np.int8] = character[difference @ weights]
    return matrix


def _square(element: npt.NDArray[np.int64], modulus: tuple[int, ...], prime: int) -> npt.NDArray[np.int64]:
    """Return element² modulo the monic ``modulus`` (coefficients lowest first, without the leading 1)."""
    degree = len(modulus)
    powers = np.convolve(element, element) % prime
    for top in range(len(powers) - 1, degree - 1, -1):
        powers[top - degree : top] -= powers[top] * np.array(modulus)
        powers %= prime
    return powers[:degree]


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """Return the first monic irreducible polynomial over GF(prime), without its leading 1, found by trial division."""
    if degree == 1:
        return (0,)
    factors = [f for d in range(1, degree // 2 + 1) for f in product(range(prime), repeat=d)]
    for candidate in product(range(prime), repeat=degree):
        if not any(_divides(factor, candidate, prime) for factor in factors):
            return candidate
    raise AssertionError("unreachable: every finite field has an irreducible polynomial of every degree")


def _divides(factor: Iterable[int], candidate: Iterable[int], prime: int) -> bool:
    """Return whether one monic polynomial divides another (both lowest first, without the leading 1)."""
    divisor = [*factor, 1]
    rest = [*candidate, 1]
    while len(rest) >= len(divisor):
        lead = rest[-1]
        shift = len(rest) - len(divisor)
        for i, coefficient in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - lead * coefficient) % prime
        rest.pop()
    return not any(rest)


def _divisors(n: int) -> list[int]:
    """Return all divisors of n in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _largest_block(features: int) -> int:
    """Return the largest divisor of ``features`` that is the order of a Hadamard matrix."""
    return max(d for d in _divisors(features) if _core(d) is not None)


def _nearest_block(features: int, wanted: int) -> int:
    """Return the divisor of ``features`` nearest to ``wanted`` that is the order of a Hadamard matrix."""
    return min((d for d in _divisors(features) if _core(d) is not None), key=lambda d: (abs(d - wanted), d))
