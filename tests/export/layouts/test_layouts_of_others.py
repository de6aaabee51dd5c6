"""``--also-write comfy``: the file that ComfyUI loads, read by comfy-kitchen itself and held against the export beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvdquant.artifact.manifest import load_manifest
from dvdquant.errors import ShapeError
from dvdquant.export.layouts.comfy import regular_codes
from dvdquant.export.options import ALSO_WRITE
from dvdquant.model.layers import QuantLinear, RotationTable
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.numerics.hadamard import Rotation, hadamard_matrix, rotate, rotate_inverse
from dvdquant.numerics.packing import pack_int4, unpack_int4
from dvdquant.numerics.regular_hadamard import regular_hadamard, regular_order, regular_signs
from dvdquant.recipe import get_recipe
from tests.support import tiny_models as tiny
from tests.support.commands import digests, in_process, logged, refused, run
from tests.support.folders import process_folder, shared_folder

pytestmark = pytest.mark.usefixtures("without_graphs")

SIZES = ["--latent", "3x8x8", "--text-tokens", "12", "--target", "graphs"]
ORDERS = [1, 4, 16, 64, 256]


@pytest.fixture(scope="module")
def kitchen() -> Any:
    return pytest.importorskip("comfy_kitchen", reason="needs comfy-kitchen: the extra dvdquant[attention]")


@pytest.fixture(scope="module")
def made() -> Path:
    """An export of a tiny Wan with one file for ComfyUI, and its model in ``model`` beside it."""

    def make(folder: Path) -> None:
        source = tiny.write_checkpoint(folder / "model", tiny.WAN)
        in_process(source, "-o", folder / "out", *SIZES, "--also-write", "comfy")

    return shared_folder("comfy-layout", make) / "out"


@pytest.fixture(scope="module")
def plan() -> ModelPlan:
    return plan_model(tiny.WAN, get_recipe("convrot"), torch.bfloat16)


# ------------------------------------------------------------------------------------------------------ the rotation


@pytest.mark.parametrize("order", ORDERS)
def test_signs_sylvester_and_a_signed_order_make_the_regular_matrix(order: int) -> None:
    places, signs = regular_order(order)
    assert sorted(places.tolist()) == list(range(order))
    assert set(signs.tolist()) <= {-1, 1}
    turned = regular_signs(order, order)[:, None].double() * hadamard_matrix(order)
    assert torch.equal(turned[:, places] * signs, regular_hadamard(order))


@pytest.mark.parametrize("order", [2, 8, 0, -4])
def test_only_powers_of_four_have_one(order: int) -> None:
    with pytest.raises(ShapeError, match="powers of four"):
        regular_hadamard(order)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_it_is_the_matrix_of_comfy_kitchen(kitchen: Any, order: int) -> None:
    from comfy_kitchen.backends.eager.convrot_w4a4 import _build_hadamard

    assert torch.equal(_build_hadamard(order, dtype=torch.float64), regular_hadamard(order))


@pytest.mark.parametrize("block", [16, 64, 256])
def test_codes_in_their_order_are_the_same_weight(kitchen: Any, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (12, 512), generator=generator, dtype=torch.int8)
    scale = torch.rand(12, generator=generator) + 0.01
    signed = rotate_inverse(codes.double() * scale[:, None].double(), Rotation(512, block, 1))
    ours = signed * regular_signs(block, 512).double()
    theirs = kitchen.dequantize_convrot_w4a4_weight(
        regular_codes(pack_int4(codes).view(torch.int8), block), scale, convrot_groupsize=block
    )
    assert float((theirs.double() - ours).norm() / ours.norm()) < 1e-6


# ---------------------------------------------------------------------------------------------------------- the file


def test_every_layer_is_the_weight_of_the_export(kitchen: Any, made: Path, plan: ModelPlan) -> None:
    """Loaded as ComfyUI does: by the marker of each layer, into comfy-kitchen's own tensor."""
    theirs, ours = (
        load_file(made / "comfy/transformer_w4a4.safetensors"),
        load_file(made / "onnx/transformer.safetensors"),
    )
    source = load_file(made.parent / "model" / "diffusion_pytorch_model.safetensors")
    members = [(spec, member) for spec in plan.layers for member in spec.members]
    markers = [name.removesuffix(".comfy_quant") for name in theirs if name.endswith(".comfy_quant")]
    assert len(markers) == len(members)
    for (spec, member), name in zip(members, markers, strict=True):
        start = sum(spec.rows[: spec.members.index(member)])
        rows = slice(start, start + spec.rows[spec.members.index(member)])
        tensor = quantized(theirs, name, spec.features)
        steps = unpack_int4(ours[f"{spec.name}.weight"][rows]).double() * ours[f"{spec.name}.weight_scale"][rows, None]
        exact = rotate_inverse(steps, spec.rotation) * ours[f"{spec.name}.pre_quant_scale"]
        loaded = tensor.dequantize().double()
        assert float((loaded - exact).norm() / exact.norm()) < 1e-6, name
        assert torch.equal(theirs[f"{name}.bias"], ours[f"{spec.name}.bias"][rows]), name
        assert torch.equal(theirs[f"{name}.bias"], source[f"{member}.bias"].float()), "nothing was shifted into it"
    # Rounded by the largest value of a row, as comfy-kitchen quantizes, outputs are further off.
    layers = load_manifest(made).layers
    assert sum(entry["relative_mse"] for entry in layers) < 0.5 * sum(entry["relative_mse_minmax"] for entry in layers)


def quantized(tensors: dict[str, torch.Tensor], name: str, features: int) -> Any:
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    facts = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
    assert facts.pop("format") == "convrot_w4a4"
    scale, layout = tensors[f"{name}.weight_scale"], "TensorCoreConvRotW4A4Layout"
    shape = (len(scale), features)
    params = get_layout_class(layout).Params(scale=scale, orig_dtype=torch.float32, orig_shape=shape, **facts)
    return QuantizedTensor(tensors[f"{name}.weight"], layout, params)


def test_the_other_tensors_are_there_by_the_names_of_the_authors(made: Path, plan: ModelPlan) -> None:
    theirs, ours = (
        load_file(made / "comfy/transformer_w4a4.safetensors"),
        load_file(made / "onnx/transformer.safetensors"),
    )
    names = {
        "head.modulation": "scale_shift_table",
        "blocks.1.modulation": "blocks.1.scale_shift_table",
        "head.head.weight": "proj_out.weight",
        "blocks.0.norm3.bias": "blocks.0.norm2.bias",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
        "patch_embedding.weight": "patch_embedding.weight",
    }
    for name, own in names.items():
        assert torch.equal(theirs[name], ours[own]), name
    assert "blocks.0.self_attn.q.weight" in theirs
    layers = sum(len(spec.members) for spec in plan.layers)
    assert len(theirs) == 4 * layers + len(plan.kept), "no other tensor: readers know every name"


@pytest.mark.parametrize("bits", [4, 8])
def test_comfy_kitchen_computes_what_the_export_does(kitchen: Any, made: Path, plan: ModelPlan, bits: int) -> None:
    """The activations' grids agree as well: a scale per token, codes −7 to 7 of the rotated input."""
    spec = next(spec for spec in plan.layers if spec.name.endswith("ffn.net.2"))
    name = spec.name.replace("ffn.net.2", "ffn.2")
    tensors = load_file(made / "comfy/transformer_w4a4.safetensors")
    layer = QuantLinear(spec, get_recipe("convrot").activation(bits), RotationTable([spec.rotation]))
    layer.load(load_file(made / "onnx/transformer.safetensors"))
    x = torch.randn(40, spec.features, generator=torch.Generator().manual_seed(1))
    weight, bias = quantized(tensors, name, spec.features), tensors[f"{name}.bias"]
    if bits == 8:  # comfy-kitchen's eager kernel multiplies 4 bits alone; what 8 bits are is this
        turned = rotate(x * regular_signs(spec.rotation.block, spec.features), spec.rotation)
        step = turned.abs().amax(-1, keepdim=True) / 127
        held = rotate_inverse((turned / step).round() * step, spec.rotation)
        x8 = held * regular_signs(spec.rotation.block, spec.features)
        theirs = x8 @ weight.dequantize().T + bias
    else:
        theirs = torch.nn.functional.linear(x, weight, bias)
    ours = layer(x)
    # Different sums meet a tie of the activations' rounding now and then: one step of one code, in few tokens.
    off = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert float(off.median()) < 1e-5
    assert float(off.max()) < 0.1


def test_another_layout_is_added_to_the_export_that_is_there(kitchen: Any, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_process(made.parent / "model", "-o", out, *SIZES, "--also-write", "comfy")
    before = digests(out, "onnx", "comfy")
    assert before == digests(made, "onnx", "comfy")
    (out / "comfy/transformer_w4a4.safetensors").write_bytes(b"damaged")
    events = logged(made.parent / "model", "-o", out, *SIZES, "--also-write", "comfy-a8", "--also-write", "comfy")
    stages = {event.get("stage") for event in events}
    assert "layouts" in stages
    assert "quantize" not in stages
    after = digests(out, "onnx", "comfy")
    assert {name: after[name] for name in before} == before
    first, second = (load_file(out / f"comfy/transformer_{name}.safetensors") for name in ("w4a4", "w4a8"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if name.endswith(".comfy_quant"):
            facts = [json.loads(bytes(each[name].tolist())) for each in (first, second)]
            assert [each.pop("linear_dtype") for each in facts] == ["int4", "int8"]
            assert facts[0] == facts[1]
        else:
            assert torch.equal(tensor, second[name]), name
    assert "is up to date" in in_process(made.parent / "model", "-o", out, *SIZES, *also(*ALSO_WRITE))
    assert "is up to date" in in_process(made.parent / "model", "-o", out, *SIZES, "--recipe", "convrot")
    assert digests(out, "comfy").keys() == {name for name in after if name.startswith("comfy/")}


def also(*layouts: str) -> list[str]:
    return [word for layout in layouts for word in ("--also-write", layout)]


# ------------------------------------------------------------------------------------------------------ what is refused

REFUSED = [
    (["--recipe", "w4a4", *also("comfy")], ["another grid than ConvRot", "smoothed channels", "--recipe convrot"]),
    (["--recipe", "w4a8", *also("comfy-a8")], ["weight groups of 32", "zero-point float", "--recipe convrot"]),
    (also("modelopt"), ["FP8 or NVFP4", "ModelOpt itself"]),
    (also("sglang"), ["reads the one of ComfyUI", "--also-write comfy"]),
    (also("nunchaku"), ["unknown layout 'nunchaku'", "comfy, comfy-a8"]),
]


@pytest.mark.parametrize(("words", "named"), REFUSED, ids=[words[-1] for words, _ in REFUSED])
def test_what_has_another_grid_is_refused_before_any_work(
    words: list[str], named: list[str], made: Path, tmp_path: Path
) -> None:
    refused(run(made.parent / "model", "-o", tmp_path / "out", *SIZES, *words), *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["hunyuan-video", "cogvideox", "ltx-video"])
def test_families_that_comfyui_cuts_in_another_way_are_refused_or_lead_back(family: str, tmp_path: Path) -> None:
    source = tiny.write_checkpoint(process_folder(f"comfy-{family}") / "model", tiny.CONFIGS[family])
    result = run(source, "-o", tmp_path / "out", *SIZES, *also("comfy"), "--dry-run")
    if family == "ltx-video":
        assert result.exit_code == 0, result.output
        assert "comfy/transformer_w4a4.safetensors" in result.output
    else:
        refused(result, "has other layers in ComfyUI", "Wan")


def test_a_layer_that_their_kernels_do_not_take_is_named(tmp_path: Path) -> None:
    config = {**tiny.WAN, "ffn_dim": 96}
    source = tiny.write_checkpoint(tmp_path / "model", config)
    refused(run(source, "-o", tmp_path / "out", *SIZES, *also("comfy"), "--dry-run"), "ffn.net.2 has 96", "--keep")
