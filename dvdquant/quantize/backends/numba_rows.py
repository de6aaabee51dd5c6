"""Compiled passes over rows of weights: Walsh–Hadamard transform, packing, errors. Memory speed, all cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from dvdquant.numerics.array_types import F32, F64, I8, U8
from dvdquant.quantize.backends.jit import jit

__all__ = ["for_row_parts", "hadamard_rows", "pack_rows", "squared_errors"]


# Rows transformed together: one per SIMD lane, so that every butterfly is a vector operation whatever its stride.
_LANES = 16


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of one process: a forked child inherits the pool, but none of its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"dvdquant-rows-{process}")


def for_row_parts(rows: int, work: Callable[[slice], None], multiple: int = _LANES) -> None:
    """Call ``work`` for slices that cover ``rows``, on as many threads as PyTorch may use; re-raise what it raises.

    Args:
        rows: Number of rows.
        work: Called with one slice of rows, in any thread.
        multiple: Rows of a slice are a multiple of this, but for the last.
    """
    threads = max(1, torch.get_num_threads())
    pool = _pool(os.getpid(), threads)
    parts = 4 * threads
    step = max(multiple, -(-rows // parts) // multiple * multiple)
    for job in [pool.submit(work, slice(i, min(i + step, rows))) for i in range(0, rows, step)]:
        job.result()


@jit
def hadamard_rows(w: F32, order: int, scale: float) -> None:
    """Multiply every block of each row with the Sylvester matrix times ``scale``, in place.

    Args:
        w: fp32 [R, K], changed in place.
        order: Columns of a block, a power of two that divides K.
        scale: Factor of the result; order^(−1/2) makes the transform orthonormal.
    """
    # tile, fp32 [order, _LANES]: one block of _LANES rows, transposed.
    tile = np.empty((order, _LANES), np.float32)
    group_scale = np.float32(scale)
    for first in range(0, w.shape[0], _LANES):
        lanes = min(_LANES, w.shape[0] - first)
        for start in range(0, w.shape[1], order):
            for lane in range(lanes):
                row = w[first + lane, start : start + order]
                for k in range(order):
                    tile[k, lane] = row[k]
            half = 1
            while half < order:
                for block in range(0, order, 2 * half):
                    for k in range(block, block + half):
                        for lane in range(_LANES):
                            a, b = tile[k, lane], tile[k + half, lane]
                            tile[k, lane], tile[k + half, lane] = a + b, a - b
                half *= 2
            for lane in range(lanes):
                row = w[first + lane, start : start + order]
                for k in range(order):
                    row[k] = tile[k, lane] * group_scale


@jit
def pack_rows(codes: I8, packed: I8) -> None:
    """Pack two codes to a byte, low nibble = even k.

    Args:
        codes: int8 [R, K], −8..7.
        packed: int8 [R, K/2], written.
    """
    for r in range(codes.shape[0]):
        for k in range(packed.shape[1]):
            packed[r, k] = np.int8((codes[r, 2 * k] & 15) | (codes[r, 2 * k + 1] << 4))


@jit
def squared_errors(w: F32, codes: I8, scale: F32, group_scale: U8, zero: F32, out: F64) -> None:
    """Add ‖w‖² and ‖w − ŵ‖² to ``out``, summed in fp32 within a group and in fp64 between groups.

    Args:
        w: fp32 [R, K].
        codes: int8 [R, K], −8..7.
        scale: fp32 [R].
        group_scale: uint8 [R, groups], 255 = 1.0.
        zero: fp32 [R, 1] or [R, groups], from :func:`dvdquant.numerics.packing.expand_zero`.
        out: fp64 [2], added to: ‖w‖² and ‖w − ŵ‖².
    """
    size = w.shape[1] // group_scale.shape[1]
    for r in range(w.shape[0]):
        for g in range(group_scale.shape[1]):
            centre = zero[r, min(g, zero.shape[1] - 1)]
            step = scale[r] * (np.float32(group_scale[r, g]) / np.float32(255.0))
            energy, error = np.float32(0.0), np.float32(0.0)
            for k in range(g * size, (g + 1) * size):
                value = w[r, k]
                difference = value - step * (np.float32(codes[r, k]) - centre)
                energy += value * value
                error += difference * difference
            out[0] += energy
            out[1] += error
