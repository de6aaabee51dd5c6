"""NVFP4: the packed weight and the lowered graph against their definitions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from dvdquant.errors import ExportError
from dvdquant.export.passes.lowering.nvfp4 import lower_nvfp4, nvfp4_weight
from tests.support import quant_linear_graphs as qg
from tests.support.bounds import LAMBDA, product_error
from tests.support.nvfp4 import E2M1, TRT_FP4DynamicQuantize, nearest_e2m1, nvfp4_reference, to_e4m3


def test_nvfp4_weight_matches_the_definition() -> None:
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    weight[5, :16] *= 50
    packed, scales, amax = nvfp4_weight(weight)
    table = np.concatenate([E2M1, -E2M1])
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(70, 64)
    got = table[codes] * np.repeat(scales.astype(np.float64), 16, axis=1) * amax / 2688
    want = nvfp4_reference(weight.double().numpy() / amax, 1 / 2688) * amax
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)
    assert qg.relative(got, weight.double().numpy()) < 0.12


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_nvfp4_graph_computes_the_product_of_nvfp4_operands(from_checkpoint: bool) -> None:
    spec = qg.Spec("fp32", (128, 96), 4, 0, 0, "paper", 16)
    (layer,) = spec.build_layers()
    weight = layer.weight()
    if from_checkpoint:
        weight = weight + np.random.default_rng(4).standard_normal(weight.shape) * 1e-3
    source = (lambda name: torch.from_numpy(weight).float()) if from_checkpoint else None
    model = qg.graph(spec)
    assert lower_nvfp4(model, source)
    x = qg.outliers((1, 9, 128), 7, "fp32")
    proto = ir.to_proto(model)
    got = ReferenceEvaluator(proto, new_ops=[TRT_FP4DynamicQuantize]).run(None, {"x": x})[0]
    rotated = (x.astype(np.float64).reshape(1, 9, 8, 16) @ layer.hadamard).reshape(1, 9, 128)
    amax = np.maximum(np.abs(rotated).max(-1, keepdims=True), 2.0**-100)
    act = nvfp4_reference(rotated / amax, 1 / 2688) * amax
    # Its packing is checked above.
    packed, scales, top = nvfp4_weight(torch.from_numpy(weight).float())
    codes = np.concatenate([E2M1, -E2M1])[np.stack([packed & 15, packed >> 4], axis=-1).reshape(weight.shape)]
    want = act @ (codes * np.repeat(scales.astype(np.float64), 16, axis=1) * top / 2688).T + layer.bias
    # Ties of the 4-bit grid and of its 8-bit scales fall differently in fp32 and fp64. A value is at a tie if the error of
    # its rotation's sum turns the code; then it is one step of the grid off, at most 2 scales. A whole block is, by up to
    # 2⁻³ of its scale and so 2⁻³ of its values and a code more, where its scale is at a tie.
    blocks = rotated.reshape(1, 9, -1, 16)
    top_of = np.abs(blocks).max(-1, keepdims=True)
    sums = 2 * LAMBDA * 2.0**-24 * np.linalg.norm(x.astype(np.float64).reshape(blocks.shape), axis=-1, keepdims=True)
    noise = sums / np.where(top_of == 0, 1, top_of) + 16 * 2.0**-24
    raw = top_of / 6 * 2688 / amax[..., None]
    scale = to_e4m3(np.where(top_of == 0, 1.0, raw))
    scale_tie = (to_e4m3(raw * (1 - noise)) != scale) | (to_e4m3(raw * (1 + noise)) != scale)
    steps = scale / 2688 * amax[..., None]
    grid = blocks / steps
    error = sums / steps + np.abs(grid) * noise
    tie = nearest_e2m1(grid - error) != nearest_e2m1(grid + error)
    flips = np.where(scale_tie & (top_of > 0), np.abs(blocks) / 8 + 2 * steps, np.where(tie, 2 * steps, 0)).reshape(
        x.shape
    )
    weights = torch.from_numpy(codes * np.repeat(scales.astype(np.float64), 16, axis=1) * top / 2688)
    operand = torch.from_numpy(act)
    sizes = np.abs(want) + np.abs(layer.bias)
    bound = flips @ np.abs(weights.numpy()).T + product_error(operand, weights.T).numpy() + 16 * 2.0**-24 * sizes
    # The global scale of a token is off by its amax's error, and by roundings, in every term.
    bound += LAMBDA * noise.max() * np.sqrt(act**2 @ (weights.numpy() ** 2).T)
    assert (np.abs(got - want) <= bound).all()
    assert 0.02 < qg.relative(got, rotated @ weight.T + layer.bias) < 0.2


def test_nvfp4_refuses() -> None:
    with pytest.raises(ExportError, match="24 channels are no multiple of 16"):
        lower_nvfp4(qg.graph(qg.Spec(widths=(24, 16), block=1)))
    with pytest.raises(ExportError, match=r"weight source gave shape \(2, 2\)"):
        lower_nvfp4(qg.graph(qg.Spec(widths=(64, 32))), lambda name: torch.zeros(2, 2))
