"""The NVFP4 row of the quality benchmark: a simulated layer against the lowered graph of a real export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.deploy.artifact import Artifact
from dvdquant.export.passes.lowering.nvfp4 import lower_nvfp4
from dvdquant.export.verify.intermediates import Intermediate, cut_out, find_intermediates
from dvdquant.onnx.prepare import prepare_for_onnxruntime
from dvdquant.quantize.hessian import InputHessian
from dvdquant.quantize.layer import rotated_weight
from dvdquant.system.safetensors_reader import read_header, read_tensor
from tests.support import session_exports as made
from tests.support.nvfp4 import TRT_FP4DynamicQuantize
from tests.support.quality_scripts import script

IN_BF16 = ("rotate", "abs", "amax", "act", "act_typed", "weight_typed", "weight_t", "product", "output")
LAYERS = ("blocks.0.attn1.to_q+to_k+to_v", "blocks.0.attn1.to_out.0", "blocks.0.ffn.net.2")


@pytest.fixture(scope="module")
def lowered() -> Any:
    """(plan, checkpoint, stored tensors, graph of LAYERS alone) of an export by w4a4, its a4 graph lowered to NVFP4."""
    artifact = Artifact.open(made.recipe_export("w4a4"))
    plan = artifact.plan("transformer")
    checkpoint = open_checkpoint(artifact.root.parent / "model")
    stored: dict[str, Tensor] = {}
    for name in artifact.weight_files("transformer"):
        if name.endswith(".safetensors"):
            tensors = read_header(artifact.root / name).tensors
            stored |= {key: read_tensor(artifact.root / name, info) for key, info in tensors.items()}
    specs = {spec.name: spec for spec in plan.layers}
    model = ir.load(artifact.root / "onnx" / "transformer_a4.onnx")
    model.functions.clear()
    # What balances a layer's channels stands before it, under names of its own.
    inputs = {}
    for node in [n for n in model.graph if n.op_type == "QuantLinear"]:
        layer = node.inputs[1].name.removesuffix(".weight")
        inputs[layer] = node.inputs[0]
        for kind in ["Mul"] * specs[layer].smoothed + ["Sub"] * specs[layer].shifted:
            before = inputs[layer].producer()
            assert before.op_type == kind
            before.name, inputs[layer] = f"{layer}.{kind}", before.inputs[0]
    lower_nvfp4(model, lambda name: rotated_weight(checkpoint, specs[name], stored[f"{name}.pre_quant_scale"]))
    for node in model.graph:  # the lowering leaves types to the reader; the bf16 ones are rounded where they are known
        if node.name.rpartition(".")[2] in IN_BF16:
            node.outputs[0].dtype = ir.DataType.BFLOAT16
    points = find_intermediates(model, LAYERS)
    model = cut_out(model, {k: Intermediate(k, inputs[k], p.y, lowered=True) for k, p in points.items()})
    return plan, checkpoint, stored, ir.external_data.load_to_model(prepare_for_onnxruntime(model))


def simulated(parts: Any, name: str, changed: dict[str, Any]) -> Any:
    """The layer as the benchmark simulates it, of what the export stored; ``changed`` spoils it."""
    stored = parts[2]
    simulate, methods = script("simulate"), script("methods")
    spec, (weight, bias) = spec_of(parts, name), unquantized(parts, name)
    layer = simulate.Layer(name, spec, weight, bias, weight[:0], hessian=InputHessian(*[torch.zeros(1)] * 3, 1))
    with pytest.MonkeyPatch.context() as patch:  # the export's own prediction, whatever a new one would differ by
        shift = stored[f"{name}.pre_quant_shift"] if spec.shifted else None
        inputs = methods.LayerInputs(1 / stored[f"{name}.pre_quant_scale"], torch.zeros(1), 0.1, shift)
        patch.setattr(methods, "layer_inputs", lambda *_: replace(inputs, **changed))
        return simulate.SimulatedGroup(layer, methods.nvfp4_engine(layer, 4))


def graph_output(parts: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    model = parts[3]
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[TRT_FP4DynamicQuantize])
    found = evaluator.run(None, {f"{name}::x": value.float().numpy() for name, value in x.items()})
    return dict(zip(LAYERS, map(torch.from_numpy, found)))


def test_the_row_is_what_the_engine_graph_computes(lowered: Any) -> None:
    """Every operation in the graph's own order and roundings; sums in another order turn a code now and then."""
    generator = torch.Generator().manual_seed(3)
    x = {}
    for name in LAYERS:
        features = spec_of(lowered, name).features
        values = torch.randn(2, 24, features, generator=generator) * torch.rand(features, generator=generator) * 4
        values[0, 0] = 0
        x[name] = values.bfloat16()
    exact = graph_output(lowered, x)
    for name in LAYERS:
        y = simulated(lowered, name, {})(x[name]).float()
        size = exact[name].norm()
        plain = torch.nn.functional.linear(x[name].float(), *unquantized(lowered, name))
        lost = (exact[name] - plain).norm() / size
        assert 0.05 < lost < 0.8, name
        assert (y - exact[name]).norm() / size < 0.05 * lost, name
        assert (y == exact[name]).float().mean() > 0.95, name
        # A simulation that leaves something out is far away.
        for part in ("smooth_scale", "shift"):
            if part == "smooth_scale" or f"{name}.pre_quant_shift" in lowered[2]:
                spoiled = None if part == "shift" else torch.ones(spec_of(lowered, name).features)
                other = simulated(lowered, name, {part: spoiled})(x[name]).float()
                assert (other - exact[name]).norm() / size > 0.2 * lost, (name, part)


def spec_of(parts: Any, name: str) -> Any:
    return next(s for s in parts[0].layers if s.name == name)


def unquantized(parts: Any, name: str) -> tuple[Tensor, Tensor]:
    members = spec_of(parts, name).members
    weight, bias = (torch.cat([parts[1].read(f"{m}.{kind}").float() for m in members]) for kind in ("weight", "bias"))
    return weight, bias


@pytest.mark.parametrize(("features", "rotation"), [(256, "auto"), (1024, 128), (64, "none")])
def test_the_compiled_operand_is_the_operand(features: int, rotation: str | int) -> None:
    """Bit by bit but for what a sum in another order turns; blocks of zeros and of tiny values as well."""
    nvfp4, grid, chosen = script("nvfp4"), script("grid"), script("methods").Rotation.for_features(features, rotation)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, features, generator=generator) * torch.rand(features, generator=generator)
    x[0], x[1, 16:], x[2, :16] = 0, 0, x[2, :16] * 1e-7
    scale = torch.exp2(torch.randint(-3, 3, (features,), generator=generator).float())
    shift = torch.randn(features, generator=generator).bfloat16().float()
    weight = torch.randn(32, features, generator=generator)
    for parts in ((scale, shift), (None, None)):
        layer = nvfp4.Nvfp4Linear(weight, torch.zeros(32), chosen, *parts)
        act, amax = layer.operand(x)
        found = grid.rotated_to_nvfp4(x, parts[1], parts[0], chosen, layer.power)
        if found is None:
            pytest.skip("no g++: the operand runs in tensor operations")
        assert (found[0] == act).float().mean() > 0.999
        assert (found[1] == amax).float().mean() > 0.97
        assert torch.isfinite(act.float()).all()
        assert torch.equal(layer(x), layer(x))
