"""Compile the quantizer's loops once, in one process, before test processes need them.

Else every test process would wait for the one that compiles, or compile what that one has not come to.
"""

from __future__ import annotations

import torch

from dvdquant.numerics.hadamard import Rotation
from dvdquant.quantize.bgr import quantize_weight, refine_grid
from dvdquant.quantize.error_table import squared_errors_of
from dvdquant.quantize.gptq import gptq_round
from dvdquant.quantize.layer import _packed, rotate_rows
from dvdquant.recipe import SOLVERS, ZERO_POINTS, WeightSpec


def main() -> None:
    """Call every compiled function with every kind of argument it is compiled for."""
    weight = rotate_rows(torch.randn(32, 256), Rotation.for_features(256, "auto"))
    for zero_point in ZERO_POINTS:
        for solver in SOLVERS:
            for group in (0, 32):
                refine_grid(weight, group, zero_point, solver)
                if zero_point == "paper" and group:
                    continue
                quantized = quantize_weight(weight, WeightSpec(group, zero_point, solver))  # type: ignore[arg-type]
                squared_errors_of(weight, quantized)
                _packed(quantized.codes)
                gptq_round(weight, quantized, torch.eye(256))


if __name__ == "__main__":
    main()
