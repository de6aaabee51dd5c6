"""Models as others store them: every tensor and the config are those of the diffusers folder of the same weights."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dvdquant.checkpoint.formats.hunyuan_video import HUNYUAN_VIDEO
from dvdquant.checkpoint.opening import open_checkpoint, read_config_file
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.model.families import get_family
from dvdquant.model.plan import build_skeleton, plan_model
from dvdquant.recipe import get_recipe
from tests.support import other_formats as formats
from tests.support import tiny_models as tiny
from tests.support.changed_bytes import mutated
from tests.support.exporting import with_changes
from tests.support.mutations import open_mutations

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.model.")
LTX_CONFIG = {
    "config": json.dumps({"transformer": {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2}})
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder for every row of formats.CONFIGS."""
    root = tmp_path_factory.mktemp("folders")
    return {key: tiny.write_checkpoint(root / key, config) for key, config in formats.CONFIGS.items()}


def require_same(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Every tensor to the last bit, and every field of the config that its class has."""
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        read = checkpoint.read(name)
        assert torch.equal(read.float(), value.float()), name
        assert checkpoint.tensors[name].shape == tuple(value.shape) == tuple(read.shape)
        assert str(read.dtype).removeprefix("torch.") in ("float32", "bfloat16", "float16")
    assert get_family(checkpoint.config).config == get_family(config).config


def metadata(key: str) -> dict[str, str] | None:
    return LTX_CONFIG if key == "ltx" else None


# ----------------------------------------------------------------------------------------------------- names, prefixes


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        # Every layout, and every prefix of one of them.
        pytest.param(key, prefix, marks=[] if key == "wan" or prefix == PREFIXES[1] else pytest.mark.stress)
        for key in formats.CONFIGS
        for prefix in PREFIXES
    ],
)
def test_single_file(tmp_path: Path, folders: dict[str, Path], key: str, prefix: str) -> None:
    """The authors' names and ComfyUI's, with every prefix; the config comes from the shapes."""
    tensors = formats.folder_tensors(folders[key])
    file = formats.save_single(tmp_path / "m.safetensors", formats.ORIGINAL[key](tensors), prefix, metadata(key))
    checkpoint = open_checkpoint(file)
    require_same(checkpoint, tensors, formats.CONFIGS[key])
    assert "authors" in checkpoint.source.layout
    assert prefix in checkpoint.source.layout
    assert checkpoint.source.precision == "bf16"
    plan_model(checkpoint.config, get_recipe("w4a8"), torch.bfloat16, checkpoint)
    assert Checkpoint.components(file) == ["transformer"]


@pytest.mark.parametrize("key", ["wan", "wan-i2v", "ltx", "hunyuan"])
def test_single_file_with_the_names_of_diffusers(tmp_path: Path, folders: dict[str, Path], key: str) -> None:
    tensors = formats.folder_tensors(folders[key])
    file = formats.save_single(tmp_path / "m.safetensors", tensors, "", metadata(key))
    require_same(open_checkpoint(file), tensors, formats.CONFIGS[key])


def test_the_names_are_those_of_diffusers_own_converters(folders: dict[str, Path]) -> None:
    """An independent opinion of what every name becomes; HunyuanVideo's converter knows the published width alone."""
    from diffusers.loaders.single_file_utils import (
        convert_hunyuan_video_transformer_to_diffusers,
        convert_ltx_transformer_checkpoint_to_diffusers,
        convert_wan_transformer_to_diffusers,
    )

    for key, convert in {
        "wan": convert_wan_transformer_to_diffusers,
        "wan-i2v": convert_wan_transformer_to_diffusers,
        "ltx": convert_ltx_transformer_checkpoint_to_diffusers,
    }.items():
        tensors = formats.folder_tensors(folders[key])
        converted = convert(dict(formats.ORIGINAL[key](tensors)))
        assert converted.keys() == tensors.keys()
        assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    wide = with_changes(formats.HUNYUAN, num_attention_heads=24)
    ours = {
        name: torch.empty(p.shape, device="meta") for name, p in build_skeleton(wide, torch.bfloat16).named_parameters()
    }
    theirs = formats.hunyuan_original(ours)
    converted = convert_hunyuan_video_transformer_to_diffusers(dict(theirs))
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in ours.items()
    }
    pieces = HUNYUAN_VIDEO.pieces({name: tuple(value.shape) for name, value in theirs.items()})
    assert {piece.name for made in pieces.values() for piece in made} == ours.keys()


def test_a_file_of_a_whole_pipeline(tmp_path: Path, folders: dict[str, Path]) -> None:
    """VAE and text encoders are left out, and that is said."""
    tensors = formats.folder_tensors(folders["ltx"])
    whole = {f"model.diffusion_model.{name}": value for name, value in formats.ltx_original(tensors).items()}
    whole |= {"vae.decoder.conv_in.conv.weight": torch.zeros(2), "text_encoders.t5.weight": torch.zeros(2)}
    checkpoint = open_checkpoint(formats.save_single(tmp_path / "ltx.safetensors", whole, "", LTX_CONFIG))
    require_same(checkpoint, tensors, formats.LTX)
    assert "2 tensors of other parts (text_encoders, vae) are left out" in checkpoint.source.notes


def test_a_file_by_a_link(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The hub's cache keeps its files so: a link in snapshots, the file among the blobs."""
    tensors = formats.folder_tensors(folders["wan"])
    formats.save_single(tmp_path / "blobs" / "0123abcd", formats.wan_original(tensors))
    link = tmp_path / "snapshots" / "wan.safetensors"
    link.parent.mkdir()
    link.symlink_to("../blobs/0123abcd")
    require_same(open_checkpoint(link), tensors, formats.WAN)


# ------------------------------------------------------------------------------------------------------------- folders

ORIGINAL_CONFIG = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 128,
    "eps": 1e-6,
    "ffn_dim": 256,
    "freq_dim": 64,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 1,
    "num_layers": 2,
    "out_dim": 16,
    "text_len": 512,
}


def original_folder(folder: Path, tensors: formats.Tensors, config: Mapping[str, Any] = ORIGINAL_CONFIG) -> Path:
    """The repository of Wan's authors, in two shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    named = list(formats.wan_original(tensors).items())
    where = {}
    for index in (0, 1):
        name = f"diffusion_pytorch_model-{index + 1:05d}-of-00002.safetensors"
        part = {key: value.contiguous() for key, value in named[index::2]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    (folder / "Wan2.1_VAE.pth").write_bytes(b"never opened")
    return folder


def test_the_authors_folder(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Their config.json says how many heads there are, whatever their width."""
    tensors = formats.folder_tensors(folders["wan"])
    require_same(open_checkpoint(original_folder(tmp_path / "a", tensors)), tensors, formats.WAN)
    two = with_changes(formats.WAN, num_attention_heads=2, attention_head_dim=64)
    told = original_folder(tmp_path / "b", tensors, {**ORIGINAL_CONFIG, "num_heads": 2})
    require_same(open_checkpoint(told), tensors, two)


def test_the_authors_folder_of_two_transformers(tmp_path: Path, folders: dict[str, Path]) -> None:
    tensors = formats.folder_tensors(folders["wan"])
    other = {name: value * 2 for name, value in tensors.items()}
    original_folder(tmp_path / "high_noise_model", tensors)
    original_folder(tmp_path / "low_noise_model", other)
    (tmp_path / "configuration.json").write_text("{}")
    assert Checkpoint.components(tmp_path) == ["transformer", "transformer_2"]
    require_same(open_checkpoint(tmp_path), tensors, formats.WAN)
    require_same(open_checkpoint(tmp_path, component="transformer_2"), other, formats.WAN)


@pytest.mark.parametrize("field", ["dim", "ffn_dim", "in_dim", "out_dim", "num_layers", "freq_dim"])
def test_a_config_of_another_model(tmp_path: Path, folders: dict[str, Path], field: str) -> None:
    tensors = formats.folder_tensors(folders["wan"])
    model = original_folder(tmp_path / "m", tensors, {**ORIGINAL_CONFIG, field: 256 + 64 * (field == "ffn_dim")})
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json") as caught:
        open_checkpoint(model)
    assert field in caught.value.what


@pytest.mark.parametrize("changes", [{"num_heads": 3}, {"num_heads": "2"}, {"eps": -1.0}, {"dim": 1.5}])
def test_a_config_out_of_form(tmp_path: Path, folders: dict[str, Path], changes: dict[str, Any]) -> None:
    model = original_folder(tmp_path / "m", formats.folder_tensors(folders["wan"]), {**ORIGINAL_CONFIG, **changes})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert caught.value.fix


HIGH, LOW = "wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"


def comfy_folder(folder: Path, tensors: formats.Tensors, *names: str) -> Path:
    """A folder of ComfyUI's: these transformers, each other by a factor, beside files of other models."""
    for index, name in enumerate(names):
        values = {key: value * (index + 1) for key, value in formats.wan_original(tensors).items()}
        formats.save_single(folder / name, values)
    formats.save_single(folder / "wan_2.1_vae.safetensors", {"decoder.conv1.weight": torch.zeros(2)})
    lora = {f"diffusion_model.blocks.0.self_attn.q.lora_{end}.weight": torch.zeros(2, 2) for end in ("up", "down")}
    formats.save_single(folder / "lightx2v.safetensors", lora)
    (folder / "put_models_here").write_text("")
    return folder


@pytest.mark.parametrize("place", ["", "diffusion_models", "split_files/diffusion_models", "models/diffusion_models"])
def test_a_folder_of_comfyui(tmp_path: Path, folders: dict[str, Path], place: str) -> None:
    """Its only transformer is taken; of the two halves of one model, that for high noise is the first."""
    tensors = formats.folder_tensors(folders["wan"])
    comfy_folder(tmp_path / "one" / place, tensors, HIGH)
    assert Checkpoint.components(tmp_path / "one") == ["transformer"]
    require_same(open_checkpoint(tmp_path / "one"), tensors, formats.WAN)
    comfy_folder(tmp_path / "two" / place, tensors, LOW, HIGH)
    assert Checkpoint.components(tmp_path / "two") == ["transformer", "transformer_2"]
    low, high = (open_checkpoint(tmp_path / "two", component=name) for name in ("transformer_2", "transformer"))
    require_same(low, tensors, formats.WAN)
    require_same(high, {name: value * 2 for name, value in tensors.items()}, formats.WAN)


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("Wan2.2-T2V-A14B-HighNoise-Q8_0.safetensors", "Wan2.2-T2V-A14B-LowNoise-Q8_0.safetensors"),
        (
            "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
            "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors",
        ),
        ("wan2.2 high noise.safetensors", "wan2.2 low noise.safetensors"),
    ],
)
def test_names_of_halves(tmp_path: Path, folders: dict[str, Path], high: str, low: str) -> None:
    """As those who publish them write them."""
    comfy_folder(tmp_path, formats.folder_tensors(folders["wan"]), low, high)
    assert [open_checkpoint(tmp_path, component=name).source.file for name in Checkpoint.components(tmp_path)] == [
        high,
        low,
    ]


def test_links_of_a_folder_of_comfyui(tmp_path: Path, folders: dict[str, Path]) -> None:
    """A link to another disk is the user's own where it is named; in a folder it is told of."""
    file = formats.save_single(
        tmp_path / "disk" / "w.safetensors", formats.wan_original(formats.folder_tensors(folders["wan"]))
    )
    link = tmp_path / "models" / "wan.safetensors"
    link.parent.mkdir()
    link.symlink_to(file)
    with pytest.raises(CheckpointError, match="link that reads outside") as caught:
        open_checkpoint(tmp_path / "models")
    assert "give the file itself" in str(caught.value.fix)
    require_same(open_checkpoint(link), formats.folder_tensors(folders["wan"]), formats.WAN)


@pytest.mark.parametrize(
    "names", [(HIGH, LOW, "other.safetensors"), (HIGH, "wan2.2_i2v_low_noise.safetensors"), ("a.gguf", HIGH)]
)
def test_a_folder_of_several_models(tmp_path: Path, folders: dict[str, Path], names: tuple[str, ...]) -> None:
    comfy_folder(tmp_path, formats.folder_tensors(folders["wan"]), *names)
    with pytest.raises(CheckpointError, match="nothing says which is meant") as caught:
        open_checkpoint(tmp_path)
    assert all(name in str(caught.value.available) for name in names)
    assert "--transformer-2" in str(caught.value.fix)


def test_a_file_beside_a_config(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Under any name, the only transformer in a folder belongs to the config.json there."""
    config = with_changes(formats.WAN, num_attention_heads=2, attention_head_dim=64, eps=1e-5)
    tensors = formats.folder_tensors(folders["wan"])
    formats.save_single(tmp_path / "my_wan.safetensors", formats.wan_original(tensors))
    (tmp_path / "config.json").write_text(json.dumps(config))
    require_same(open_checkpoint(tmp_path), tensors, config)
    # The same config given with the file alone.
    require_same(open_checkpoint(tmp_path / "my_wan.safetensors", config=config), tensors, config)


def test_a_file_of_a_folder(tmp_path: Path) -> None:
    """Given alone, it has the config.json of its folder: no shape tells that there are two heads."""
    folder = tiny.write_checkpoint(tmp_path / "m", tiny.WAN)
    require_same(open_checkpoint(folder / formats.SINGLE), formats.folder_tensors(folder), tiny.WAN)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="_class_name"):
        open_checkpoint(folder / formats.SINGLE)
    # Another's config.json beside a file of another name is not its own.
    other = formats.save_single(folder / "wan.safetensors", formats.folder_tensors(folder))
    assert open_checkpoint(other).config["num_attention_heads"] == 1
    # A folder of diffusers without its config.json is not complete, and no single file.
    (folder / "config.json").unlink()
    other.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(folder)
    shard = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    (folder / formats.SINGLE).rename(shard)
    with pytest.raises(CheckpointError, match="one shard of several"):
        open_checkpoint(shard)


# ------------------------------------------------------------------------------------------------------------------ fp8


@pytest.mark.parametrize("key", ["wan", "ltx", "hunyuan", "hunyuan-comfy"])
@pytest.mark.parametrize(("scale", "rows"), [("scale_weight", False), ("weight_scale", True)])
def test_fp8_with_scales(tmp_path: Path, folders: dict[str, Path], key: str, scale: str, rows: bool) -> None:
    """Applied in fp32, to the rows of joined linears as well."""
    original = formats.ORIGINAL[key](formats.folder_tensors(folders[key]))
    stored, meant = formats.scaled_fp8(original, scale, rows)
    plain = open_checkpoint(formats.save_single(tmp_path / "plain.safetensors", meant, "", metadata(key)))
    checkpoint = open_checkpoint(
        formats.save_single(tmp_path / "m.safetensors", stored, "model.diffusion_model.", metadata(key))
    )
    require_same(checkpoint, {name: plain.read(name) for name in plain.tensors}, formats.CONFIGS[key])
    assert checkpoint.source.precision.startswith("fp8 (e4m3) with scales")
    assert "scales are applied in fp32" in checkpoint.source.notes


def test_fp8_with_the_labels_of_comfyui(tmp_path: Path, folders: dict[str, Path]) -> None:
    stored, meant = formats.scaled_fp8(formats.wan_original(formats.folder_tensors(folders["wan"])), "weight_scale")
    label = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    labels = {
        f"{name.removesuffix('.weight_scale')}.comfy_quant": torch.tensor(
            list(json.dumps(label).encode()), dtype=torch.uint8
        )
        for name in stored
        if name.endswith(".weight_scale")
    }
    inputs = {f"{name.removesuffix('.comfy_quant')}.input_scale": torch.ones(()) for name in labels}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"blocks.0.ffn.0": label}})}
    plain = open_checkpoint(formats.save_single(tmp_path / "plain.safetensors", meant))
    file = formats.save_single(tmp_path / "m.safetensors", {**stored, **labels, **inputs}, "", header)
    require_same(open_checkpoint(file), {name: plain.read(name) for name in plain.tensors}, formats.WAN)


@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_fp8_of_modelopt(tmp_path: Path, folders: dict[str, Path], algorithm: str) -> None:
    """A diffusers folder whose config.json says how it was quantized, with scales of activations besides."""
    stored, meant = formats.scaled_fp8(formats.folder_tensors(folders["wan"]), "weight_scale", algorithm != "FP8")
    scales = [name for name in stored if name.endswith(".weight_scale")]
    stored |= {name.replace(".weight_scale", ".input_scale"): torch.ones(()) for name in scales}
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    quantized = {
        "config_groups": {"group_0": {"input_activations": eight, "weights": eight, "targets": ["Linear"]}},
        "ignore": ["proj_out"],
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.40.0"},
        "quant_method": "modelopt",
    }
    folder = formats.write_folder(tmp_path / "m", {**formats.WAN, "quantization_config": quantized}, stored)
    checkpoint = open_checkpoint(folder)
    require_same(checkpoint, meant, formats.WAN)
    assert "quantization_config" not in checkpoint.config
    assert not checkpoint.source.is_diffusers


def test_fp8_without_scales(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Taken as it is, and said."""
    tensors = {
        name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value
        for name, value in formats.folder_tensors(folders["wan"]).items()
    }
    for model in (
        formats.write_folder(tmp_path / "m", formats.WAN, tensors),
        formats.save_single(tmp_path / "m.safetensors", formats.wan_original(tensors)),
    ):
        checkpoint = open_checkpoint(model)
        assert checkpoint.read("blocks.0.attn1.to_q.weight").dtype is torch.float8_e4m3fn
        assert checkpoint.source.precision.startswith("fp8 (e4m3)")
        assert any("have no scales" in note for note in checkpoint.source.notes)


def _drop_a_scale(t: formats.Tensors) -> None:
    del t["blocks.0.ffn.0.scale_weight"]


def _drop_a_weight(t: formats.Tensors) -> None:
    del t["blocks.0.ffn.0.weight"]


def _scale_of_blocks(t: formats.Tensors) -> None:
    t["blocks.0.ffn.0.scale_weight"] = torch.ones(2, 1)


def _scale_of_integers(t: formats.Tensors) -> None:
    t["blocks.0.ffn.0.scale_weight"] = torch.ones((), dtype=torch.int32)


def _weight_of_integers(t: formats.Tensors) -> None:
    t["blocks.0.ffn.0.weight"] = torch.zeros(256, 128, dtype=torch.int8)


def _two_scales(t: formats.Tensors) -> None:
    t["blocks.0.ffn.0.weight_scale"] = torch.ones(())


def _labelled(**label: Any) -> Any:
    def change(t: formats.Tensors) -> None:
        t["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(json.dumps(label).encode()), dtype=torch.uint8)

    return change


def _no_label(t: formats.Tensors) -> None:
    t["blocks.0.ffn.0.comfy_quant"] = torch.zeros(3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop_a_scale, "have none, such as 'blocks.0.ffn.0.weight'"),
        (_drop_a_weight, "the scale 'blocks.0.ffn.0.scale_weight' of no weight"),
        (_scale_of_blocks, "scales of blocks"),
        (_scale_of_integers, "I32"),
        (_weight_of_integers, "stored as I8 with a scale"),
        (_two_scales, "two scales of 'blocks.0.ffn.0.weight'"),
        (_labelled(format="int8_tensorwise"), "int8_tensorwise"),
        (_labelled(format="float8_e4m3fn", convrot=True), "convrot"),
        (_labelled(), "quantized for ComfyUI"),
        (_no_label, "labels of quantized layers cannot be read"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, folders: dict[str, Path], change: Any, said: str) -> None:
    stored, _ = formats.scaled_fp8(formats.wan_original(formats.folder_tensors(folders["wan"])))
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(formats.save_single(tmp_path / "m.safetensors", stored))
    assert said in caught.value.what
    assert "fp8" in str(caught.value.fix)


# --------------------------------------------------------------------------------------------------- the config, refusals


@pytest.mark.parametrize("key", ["wan", "ltx", "hunyuan"])
def test_widths_that_tell_no_heads(tmp_path: Path, folders: dict[str, Path], key: str) -> None:
    """No guess: the config.json is asked for."""
    config = {
        "wan": with_changes(formats.WAN, attention_head_dim=96),
        "ltx": formats.LTX,
        "hunyuan": with_changes(formats.HUNYUAN, attention_head_dim=64, rope_axes_dim=[16, 24, 24]),
    }[key]
    tensors = formats.folder_tensors(tiny.write_checkpoint(tmp_path / "folder", config))
    file = formats.save_single(tmp_path / "m.safetensors", formats.ORIGINAL[key](tensors))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file)
    assert "not known" in caught.value.what
    assert "--config FILE" in str(caught.value.fix)
    require_same(open_checkpoint(file, config=config), tensors, config)


def test_a_config_of_another_class(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Given, or beside the file."""
    file = formats.save_single(tmp_path / "m.safetensors", formats.wan_original(formats.folder_tensors(folders["wan"])))
    (tmp_path / "config.json").write_text(json.dumps(formats.HUNYUAN))
    for config in (None, formats.HUNYUAN):
        with pytest.raises(CheckpointError, match="HunyuanVideoTransformer3DModel") as caught:
            open_checkpoint(file, config=config)
        assert "WanTransformer3DModel" in str(caught.value.available)
    require_same(open_checkpoint(file, config=formats.WAN), formats.folder_tensors(folders["wan"]), formats.WAN)
    assert read_config_file(folders["wan"]) == read_config_file(folders["wan"] / "config.json") == formats.WAN


def test_hunyuan_video_named_as_image_to_video(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Its shapes are those of text to video where the image replaces a token: the config.json alone tells."""
    tensors = formats.folder_tensors(folders["hunyuan"])
    file = formats.save_single(tmp_path / "hunyuan_video_I2V_720.safetensors", formats.hunyuan_original(tensors))
    with pytest.raises(CheckpointError, match="named as image to video") as caught:
        open_checkpoint(file)
    assert "--config" in str(caught.value.fix)
    config = with_changes(formats.HUNYUAN, image_condition_type="token_replace")
    require_same(open_checkpoint(file, config=config), tensors, config)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vace_blocks.0.before_proj.weight", "Wan VACE"),
        ("face_adapter.fuser_blocks.0.linear1_kv.weight", "Wan Animate"),
        ("casual_audio_encoder.weights", "Wan S2V"),
        ("control_adapter.conv.weight", "camera control"),
        ("ref_conv.weight", "reference image"),
        ("fps_embedding.weight", "SkyReels-V2"),
    ],
)
def test_relatives_that_are_not_supported(tmp_path: Path, folders: dict[str, Path], name: str, said: str) -> None:
    tensors = formats.wan_original(formats.folder_tensors(folders["wan"]))
    with pytest.raises(CheckpointError, match="not supported") as caught:
        open_checkpoint(formats.save_single(tmp_path / "m.safetensors", {**tensors, name: torch.zeros(2)}))
    assert said in caught.value.what


def test_what_is_missing_or_strange_is_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    tensors = formats.wan_original(formats.folder_tensors(folders["wan"]))
    for name in ("patch_embedding.weight", "head.head.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight"):
        less = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match="lacks its"):
            open_checkpoint(formats.save_single(tmp_path / "m.safetensors", less))
        flat = {**tensors, name: torch.zeros(2)}
        with pytest.raises(CheckpointError, match="axes"):
            open_checkpoint(formats.save_single(tmp_path / "m.safetensors", flat))
    less = {key: value for key, value in tensors.items() if not key.startswith("blocks.0.")}
    with pytest.raises(CheckpointError):
        open_checkpoint(formats.save_single(tmp_path / "m.safetensors", less))
    more = formats.save_single(tmp_path / "m.safetensors", {**tensors, "blocks.0.extra.weight": torch.zeros(2)})
    checkpoint = open_checkpoint(more)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.extra\.weight") as caught:
        plan_model(checkpoint.config, get_recipe("w4a8"), torch.bfloat16, checkpoint)
    assert "m.safetensors" in caught.value.what
    twice = {**tensors, "blocks.0.attn1.to_q.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(formats.save_single(tmp_path / "m.safetensors", twice))


def test_a_file_has_no_other_transformer(tmp_path: Path, folders: dict[str, Path]) -> None:
    file = formats.save_single(tmp_path / "m.safetensors", formats.folder_tensors(folders["wan"]))
    for arguments in ({"component": "transformer_2"}, {"subfolder": "transformer"}):
        with pytest.raises((CheckpointError, UnsupportedError), match="is a file"):
            open_checkpoint(file, **arguments)


def test_the_advice_for_pickles_works(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the error says is run as it is written; the file it makes is read."""
    tensors = formats.folder_tensors(folders["wan"])
    monkeypatch.chdir(tmp_path)
    torch.save({"module": formats.wan_original(tensors)}, "FILE.pt")
    with pytest.raises(CheckpointError, match="run code when loaded") as caught:
        open_checkpoint("FILE.pt")
    _, _, code = str(caught.value.fix).partition("give the new file: ")
    assert "weights_only=True" in code
    import safetensors.torch  # noqa: F401

    exec(code.replace("FILE, ", "'FILE.pt', "), {"torch": torch, "safetensors": __import__("safetensors")})
    require_same(open_checkpoint("FILE.safetensors"), tensors, formats.WAN)


def test_fingerprints(tmp_path: Path, folders: dict[str, Path]) -> None:
    """A scale is part of it, the place and the time are not; a file that changes is refused when it is read."""
    stored, _ = formats.scaled_fp8(formats.wan_original(formats.folder_tensors(folders["wan"])))
    file = formats.save_single(tmp_path / "a" / "m.safetensors", stored)
    first = open_checkpoint(file)
    (tmp_path / "b").mkdir()
    assert open_checkpoint(shutil.copy(file, tmp_path / "b")).fingerprint() == first.fingerprint()
    stored["blocks.1.ffn.2.scale_weight"] *= 2
    other = open_checkpoint(formats.save_single(tmp_path / "b" / "m.safetensors", stored))
    assert other.fingerprint() != first.fingerprint()
    formats.save_single(file, stored)
    with pytest.raises(CheckpointError, match="has changed since"):
        first.read("proj_out.weight")


# --------------------------------------------------------------------------------------------------------------- fuzzing


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """A single file whose header has a well-formed change: names, shapes, dtypes and metadata of tensors that exist."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        name, other = rng.choice(names), rng.choice(names)
        way = rng.randrange(6)
        if way == 0:
            header[rng.choice(("", "model.", "blocks.0.", "x" * 300, "\x1b[31m")) + name] = (
                header.pop(name, None) or header[other]
            )
        elif way == 1:
            header[name], header[other] = header.get(other), header.get(name)
        elif way == 2 and isinstance(header.get(name), dict):
            shape = header[name]["shape"]
            header[name]["shape"] = rng.choice(
                (shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], [], shape[:1])
            )
        elif way == 3:
            header.pop(name, None)
        elif way == 4 and isinstance(header.get(name), dict):
            header[name]["dtype"] = rng.choice(("F8_E4M3", "F8_E5M2", "I8", "U8", "F16", "BF16", "F32"))
        else:
            values = (
                "{",
                "[]",
                '{"layers": []}',
                '{"layers": {"a": 1}}',
                '{"transformer": {"num_attention_heads": 0}}',
                "[" * 500,
            )
            header["__metadata__"] = {rng.choice(("config", "_quantization_metadata")): rng.choice(values)}
    text = json.dumps({name: value for name, value in header.items() if value is not None}).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize("key", ["wan", "hunyuan", "ltx"])
@pytest.mark.parametrize("count", [60, pytest.param(7_000, marks=pytest.mark.stress)])
def test_mutations(tmp_path: Path, folders: dict[str, Path], key: str, count: int) -> None:
    """Of bytes, and of headers that are still well-formed: every one is read or refused."""
    stored, _ = formats.scaled_fp8(
        formats.ORIGINAL[key](formats.folder_tensors(folders[key])), "weight_scale", rows=True
    )
    data = formats.save_single(tmp_path / "m.safetensors", stored, "model.diffusion_model.", metadata(key)).read_bytes()
    head = 8 + struct.unpack("<Q", data[:8])[0]
    ways = {"bytes": lambda rng: mutated(data, head, rng), "headers": lambda rng: changed_header(data, rng)}
    for way, change in ways.items():
        good = open_mutations(f"single files, {way} ({key})", "m.safetensors", count // 2, count, change)
        assert way == "headers" or good < count // 2
