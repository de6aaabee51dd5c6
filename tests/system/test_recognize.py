"""Foreign formats: each is told by its names before shapes are compared, and the error says what it is and what helps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.errors import CheckpointError
from dvdquant.system.recognize import BLOCK_SCALED, CONTENTS, FOLDERS, TENSORS, recognize_tensors
from tests.support.checkpoint_folders import CONFIG, entry, raw_safetensors, save_plain, write_index

ROOT = Path(__file__).parents[2]
SINGLE = "diffusion_pytorch_model.safetensors"
WEIGHT = "blocks.0.attn1.to_q.weight"
LAYER = "blocks.0.attn1.to_q"

# One example of names for every row of TENSORS, as the tools that write the format choose them.
EXAMPLES: dict[str, list[str]] = {
    "svdquant": [
        f"{LAYER}.qweight",
        f"{LAYER}.wscales",
        f"{LAYER}.lora_down",
        f"{LAYER}.lora_up",
        f"{LAYER}.smooth_factor",
    ],
    "bitsandbytes": [WEIGHT, f"{WEIGHT}.absmax", f"{WEIGHT}.quant_map", f"{WEIGHT}.quant_state.bitsandbytes__nf4"],
    "gptq-awq": [f"{LAYER}.qweight", f"{LAYER}.qzeros", f"{LAYER}.scales", f"{LAYER}.g_idx"],
    "quanto": [f"{WEIGHT}._data", f"{WEIGHT}._scale", f"{LAYER}.input_scale", f"{LAYER}.output_scale"],
    "torchao": [f"{LAYER}._weight_qdata", f"{LAYER}._weight_scale", f"{LAYER}.bias"],
    "nvfp4": [WEIGHT, f"{WEIGHT}_scale", f"{WEIGHT}_scale_2", f"{LAYER}.input_scale"],
    "mxfp8": [WEIGHT, f"{WEIGHT}_scale_inv"],
    "peft": [f"base_model.model.{LAYER}.base_layer.weight", f"base_model.model.{LAYER}.lora_A.default.weight"],
    "dora": [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", f"{LAYER}.lora_magnitude_vector"],
    "lora": [f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"],
    "lokr-loha": ["diffusion_model.blocks.0.self_attn.q.lokr_w1", "diffusion_model.blocks.0.self_attn.q.alpha"],
    "alpha": ["blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.alpha"],
    "base_model.model.": [f"base_model.model.{WEIGHT}"],
    "module.": [f"module.{WEIGHT}"],
    "_orig_mod.": [f"_orig_mod.{WEIGHT}"],
    "_fsdp": [f"_fsdp_wrapped_module.{WEIGHT}"],
    **{
        prefix: [f"{prefix}{WEIGHT}"]
        for prefix in ("transformer.", "model.", "dit.", "net.", "state_dict.", "ema.", "student.")
    },
    "cogvideox-original": ["transformer.layers.0.attention.query_key_value.weight"],
    "flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "txt_in.weight"],
    "sd3": ["joint_blocks.0.context_block.attn.qkv.weight"],
    "unet": ["input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"],
    "vae": ["encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"],
    "text-encoder": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
}
MORE: dict[str, tuple[str, list[str]]] = {
    "kohya": ("lora", ["lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.alpha"]),
    "original lora": ("lora", ["diffusion_model.blocks.0.self_attn.q.lora_up.weight"]),
    "differences": ("lokr-loha", ["diffusion_model.blocks.0.self_attn.q.diff_b"]),
    "bitsandbytes 8": ("bitsandbytes", [WEIGHT, f"{LAYER}.SCB"]),
    "compiled inside": ("_orig_mod.", ["blocks.0._orig_mod.attn1.to_q.weight"]),
    "wan vae": ("vae", ["encoder.conv1.weight", "decoder.conv1.weight", "decoder.middle.0.residual.0.gamma"]),
    "wan t5": ("text-encoder", ["token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"]),
    "llama": ("text-encoder", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]),
    "clip": ("text-encoder", ["text_model.encoder.layers.0.self_attn.q_proj.weight"]),
    "flux of ComfyUI": (
        "flux",
        ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.txt_in.weight"],
    ),
}
# What the advice must name: the way out of this format and not of another.
WAYS = {
    "lora": "--lora FILE",
    "dora": "fuse it into its model with the tool",
    "module.": "removeprefix('module.')",
    "vae": "transformer/",
}


def _save(path: Path, names: list[str]) -> None:
    """A safetensors file with these names, of one float each."""
    header = {name: entry(shape=(1,), offsets=(4 * i, 4 * i + 4)) for i, name in enumerate(names)}
    path.write_bytes(raw_safetensors(header, bytes(4 * len(names))))


def test_every_row_has_an_example() -> None:
    assert EXAMPLES.keys() == TENSORS.keys()
    assert {format for format, _ in MORE.values()} <= TENSORS.keys()


@pytest.mark.parametrize("case", [*EXAMPLES, *MORE])
def test_names_of_tensors(tmp_path: Path, case: str) -> None:
    """In a diffusers folder, in a folder without a config, under an odd name, and as a file given as MODEL."""
    row, names = MORE[case] if case in MORE else (case, EXAMPLES[case])
    found = TENSORS[row][1]
    whole, odd, bare = tmp_path / "whole", tmp_path / "odd", tmp_path / "bare"
    for folder in (whole, odd, bare):
        folder.mkdir()
    for folder in (whole, odd):
        (folder / "config.json").write_text(json.dumps(CONFIG))
    _save(whole / SINGLE, names)
    _save(odd / "my_model_v3.safetensors", names)
    _save(bare / "my_model_v3.safetensors", names)
    for model in (whole, odd, bare, bare / "my_model_v3.safetensors"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(model)
        assert found.what in caught.value.what
        assert caught.value.fix == found.fix
        assert WAYS.get(row, "") in found.fix


def test_names_of_the_supported_transformers_are_not_foreign() -> None:
    """All tensors of the four families, and their common extensions, as diffusers names them."""
    from tests.support import tiny_models

    assert recognize_tensors(open_checkpoint(ROOT / "examples" / "tiny-wan").tensors) is None
    import diffusers
    import torch

    for config in (tiny_models.WAN, tiny_models.HUNYUAN, tiny_models.COGVIDEOX, tiny_models.LTX):
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = getattr(diffusers, config["_class_name"])(**settings)
        assert recognize_tensors(model.state_dict()) is None
    assert (
        recognize_tensors(["blocks.0.attn2.norm_added_q.weight", "condition_embedder.image_embedder.ff.net.2.bias"])
        is None
    )


STARTS: dict[str, bytes] = {
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(64),
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "html": b"\n<!DOCTYPE html><html><head><title>Sign in</title>",
    "json-error": b'{"error":"Repository not found"}',
    "zip-pickle": b"PK\x03\x04" + bytes(60),
    "pickle": b"\x80\x02}q\x00.",
    "hdf5": b"\x89HDF\r\n\x1a\n",
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(20),
    "xet": b"# xet version 0\nfilesize = 1\n",
    "zeros": bytes(10000),
}


def test_every_content_has_an_example() -> None:
    assert STARTS.keys() == CONTENTS.keys()


@pytest.mark.parametrize("row", STARTS)
def test_contents(tmp_path: Path, row: str) -> None:
    """As the weights of a folder, in a shard, under an odd name without a config, and given as MODEL."""
    found = CONTENTS[row][1]
    for name in ("single", "sharded"):
        save_plain(tmp_path / name, 1 if name == "single" else 2)
    (tmp_path / "single" / SINGLE).write_bytes(STARTS[row])
    (tmp_path / "sharded" / "diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(STARTS[row])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "wan.safetensors").write_bytes(STARTS[row])
    # As a file of its own a GGUF file is read, whatever it is called.
    odd = () if row == "gguf" else (tmp_path / "odd", tmp_path / "odd" / "wan.safetensors")
    for model in (tmp_path / "single", tmp_path / "sharded", *odd):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(model)
        assert found.what in caught.value.what
        assert caught.value.fix == found.fix


@pytest.mark.parametrize("row", ["git-lfs", "html"])
@pytest.mark.parametrize("name", ["config.json", f"{SINGLE}.index.json", "model_index.json"])
def test_contents_in_place_of_json(tmp_path: Path, row: str, name: str) -> None:
    save_plain(tmp_path / "m", 2)
    (tmp_path / "m" / name).write_bytes(STARTS[row])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m")
    assert name in caught.value.what
    assert CONTENTS[row][1].what in caught.value.what
    assert caught.value.fix == CONTENTS[row][1].fix


NAMES: dict[str, list[str]] = {
    "wan original": ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "diffusion_pytorch_model.pth"],
    "hunyuan original": ["hunyuan-video-t2v-720p/"],
    "peft folder": ["adapter_config.json", "adapter_model.safetensors"],
    "lora file": ["pytorch_lora_weights.safetensors"],
    "interrupted": ["model-00001-of-00002.safetensors.incomplete"],
    "git-lfs clone": [".git/", ".gitattributes", "README.md"],
}


def test_every_folder_has_an_example() -> None:
    assert NAMES.keys() == FOLDERS.keys()


@pytest.mark.parametrize("row", NAMES)
def test_folders(tmp_path: Path, row: str) -> None:
    for name in NAMES[row]:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert FOLDERS[row][1].what in caught.value.what
    assert caught.value.fix == FOLDERS[row][1].fix


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "WanModel", "model_type": "vace", "dim": 1536}, "a relative of Wan"),
        ({"_class_name": "WanModel_S2V", "dim": 5120}, "a relative of Wan"),
        ({"model_type": "animate", "dim": 5120}, "a relative of Wan"),
        ({"_class_name": "AutoencoderKLWan", "z_dim": 16}, "the VAE AutoencoderKLWan"),
        ({"architectures": ["UMT5EncoderModel"], "model_type": "umt5"}, "the text encoder UMT5EncoderModel"),
        ({"architectures": ["LlamaModel"], "model_type": "llama"}, "the text encoder LlamaModel"),
        ({"architectures": ["ViTForImageClassification"]}, "transformers library"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel of an image model"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel of an image model"),
        ({"_class_name": "UniPCMultistepScheduler"}, "configuration of a UniPCMultistepScheduler"),
        ({**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}, 'quant_method "bitsandbytes"'),
    ],
)
def test_configs(tmp_path: Path, config: dict[str, object], said: str) -> None:
    save_plain(tmp_path / "m", config=config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m")
    assert said in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("code", BLOCK_SCALED)
def test_dtypes_of_block_scales(tmp_path: Path, code: str) -> None:
    save_plain(tmp_path / "m")
    (tmp_path / "m" / SINGLE).write_bytes(raw_safetensors({"x": entry(code, (24,))}, bytes(24)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m")
    assert BLOCK_SCALED[code] in caught.value.what


# ------------------------------------------------------------------------------------------------------- sets of weights

SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"


def _both(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / SHARD)
    write_index(folder, dict.fromkeys([f"blocks.{i}.weight" for i in range(6)], SHARD))


def _newer(folder: Path) -> None:
    _both(folder)
    os.utime(folder / SHARD, ns=(1, 1))


def _older(folder: Path) -> None:
    _both(folder)
    os.utime(folder / SINGLE, ns=(1, 1))


@pytest.mark.parametrize("change", [_both, _newer, _older, lambda f: shutil.copy(f / SINGLE, f / SHARD)])
def test_two_sets_of_weights(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """Neither is taken, whatever their times: a copy does not keep them."""
    save_plain(tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m")
    assert SINGLE in caught.value.what
    assert "-00001-of-00001" in caught.value.what or "index.json" in caught.value.what
    assert "move one of them away" in str(caught.value.fix)


def test_variants(tmp_path: Path) -> None:
    """As in diffusers: beside the full weights a variant is not looked at; alone it is not taken without being asked."""
    saved = save_plain(tmp_path / "m")
    (tmp_path / "m" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not even looked at")
    assert open_checkpoint(tmp_path / "m").tensors.keys() == set(saved)
    (tmp_path / "m" / SINGLE).unlink()
    for name in ("fp16", "fp16-00001-of-00002", "non_ema"):
        for path in (tmp_path / "m").glob("*.safetensors"):
            path.rename(tmp_path / "m" / f"diffusion_pytorch_model.{name}.safetensors")
        with pytest.raises(CheckpointError, match=f"only the variant '{name.partition('-')[0]}'"):
            open_checkpoint(tmp_path / "m")


def test_shards_without_their_index(tmp_path: Path) -> None:
    save_plain(tmp_path / "m", 2)
    (tmp_path / "m" / f"{SINGLE}.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds shards") as caught:
        open_checkpoint(tmp_path / "m")
    assert f"download {SINGLE}.index.json" in str(caught.value)


@pytest.mark.parametrize("place", [".cache/huggingface/download/transformer", "transformer"])
def test_interrupted_downloads(tmp_path: Path, place: str) -> None:
    save_plain(tmp_path / "transformer", 2)
    (tmp_path / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "x.incomplete").write_bytes(b"")
    with pytest.raises(CheckpointError, match="download was interrupted"):
        open_checkpoint(tmp_path)
