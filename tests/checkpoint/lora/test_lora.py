"""A LoRA fused while a checkpoint is read: the same codes as of a folder that was fused in fp32 beforehand, in every format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from dvdquant.checkpoint.lora import terms
from dvdquant.checkpoint.lora.fuse import components_of, model_fingerprint, with_loras
from dvdquant.checkpoint.lora.names import aliases
from dvdquant.checkpoint.lora.spec import LoraSpec, parse_lora, parse_loras
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, DvdquantError, UnsupportedError
from tests.support import tiny_models as tiny
from tests.support.lora_files import (
    RANK,
    Changes,
    blocks,
    fused_folder,
    low_rank,
    packed,
    write_flat,
    write_original,
    write_peft,
)

WAN = {**tiny.WAN, "num_layers": 1}
WAN_I2V = {**WAN, "in_channels": 12, "image_dim": 32, "added_kv_proj_dim": 128}
CONFIGS = {
    "wan": WAN,
    "wan-i2v": WAN_I2V,
    "hunyuan-video": tiny.HUNYUAN,
    "ltx-video": {**tiny.LTX, "num_layers": 1},
    "cogvideox": {**tiny.COGVIDEOX, "num_layers": 1},
}
WAN_NAMES = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, made once."""
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        if not (root / name).exists():
            tiny.write_checkpoint(root / name, CONFIGS[name])
        return root / name

    return of


def wan_name(layer: str) -> str:
    """A layer of a block as Wan's authors call it."""
    for ours, theirs in {**WAN_NAMES, "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}.items():
        layer = layer.replace(f".{ours}", f".{theirs}")
    return layer


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name).float() for name in checkpoint.tensors}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --------------------------------------------------------------------------------------------------------- right values


def wan_with_differences(folder: Path) -> tuple[Changes, dict[str, str]]:
    """Everything that lightx2v's files hold: low-rank changes, biases, norms, modulation, head, patch embedding."""
    changes = low_rank(folder, [*blocks(folder), "proj_out", "condition_embedder.time_proj"], alpha=2.0)
    names = {layer: wan_name(layer) for layer in blocks(folder)}
    names |= {"proj_out": "head.head", "condition_embedder.time_proj": "time_projection.1"}
    added = {
        "blocks.0.attn1.to_q.bias": "blocks.0.self_attn.q:diff_b",
        "blocks.0.ffn.net.2.bias": "blocks.0.ffn.2:diff_b",
        "blocks.0.norm2.weight": "blocks.0.norm3:diff",
        "blocks.0.norm2.bias": "blocks.0.norm3:diff_b",
        "blocks.0.attn2.norm_k.weight": "blocks.0.cross_attn.norm_k:diff",
        "blocks.0.scale_shift_table": "blocks.0:diff_m",
        "scale_shift_table": "head:diff_m",
        "patch_embedding.weight": "patch_embedding:diff",
        "patch_embedding.bias": "patch_embedding:diff_b",
        "condition_embedder.text_embedder.linear_1.weight": "text_embedding.0:diff",
    }
    generator, tensors = torch.Generator().manual_seed(5), load_file(folder / "diffusion_pytorch_model.safetensors")
    changes.added = {name: torch.randn(tensors[name].shape, generator=generator) * 0.1 for name in added}
    return changes, {**names, **added}


def peft(**how: Any) -> Callable[[Path, Path, str], tuple[Path, Changes]]:
    def write(folder: Path, path: Path, family: str) -> tuple[Path, Changes]:
        changes = low_rank(folder, blocks(folder), alpha=2.0)
        if how.get("how") == "none":
            changes.alpha = float(RANK)
        return write_peft(path, changes, **how), changes

    return write


def original(folder: Path, path: Path, family: str) -> tuple[Path, Changes]:
    if family == "wan":
        changes, names = wan_with_differences(folder)
    else:  # LTX calls its blocks as diffusers does
        changes = low_rank(folder, [*blocks(folder), "proj_in"], alpha=2.0)
        names = {layer: layer for layer in blocks(folder)} | {"proj_in": "patchify_proj"}
    return write_original(path, changes, names), changes


def flat(prefix: str) -> Callable[[Path, Path, str], tuple[Path, Changes]]:
    def write(folder: Path, path: Path, family: str) -> tuple[Path, Changes]:
        changes = low_rank(folder, blocks(folder), alpha=2.0)
        names = {layer: wan_name(layer) if family == "wan" else layer for layer in blocks(folder)}
        return write_flat(path, changes, names, prefix), changes

    return write


FORMATS: dict[str, tuple[str, str, Callable[[Path, Path, str], tuple[Path, Changes]]]] = {
    "diffusers, alpha in the metadata": ("wan", "diffusers", peft()),
    "diffusers, without alpha": ("wan", "diffusers", peft(how="none")),
    "peft, alpha beside the file": ("wan", "diffusers", peft(prefix="base_model.model.", how="file")),
    "peft, named adapter": ("wan", "diffusers", peft(prefix="", infix=".default", how="keys")),
    "original with differences": ("wan", "original", original),
    "kohya": ("wan", "kohya", flat("lora_unet_")),
    "kohya, two underscores": ("wan", "kohya", flat("lora_unet__")),
    "hunyuan, diffusers": ("hunyuan-video", "diffusers", peft()),
    "ltx, diffusers": ("ltx-video", "diffusers", peft(how="keys")),
    "ltx, original": ("ltx-video", "original", original),
    "ltx, kohya": ("ltx-video", "kohya", flat("lora_unet_")),
    "cogvideox, diffusers": ("cogvideox", "diffusers", peft()),
    "cogvideox, kohya": ("cogvideox", "kohya", flat("lora_transformer_")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_a_folder_fused_in_fp32(name: str, folder: Any, tmp_path: Path) -> None:
    family, format, write = FORMATS[name]
    model = folder(family)
    path, changes = write(model, tmp_path / "lora.safetensors", family)
    (lora,) = with_loras(open_checkpoint(model), [LoraSpec(path)]).lora.fused  # type: ignore[union-attr]
    assert (lora.format, lora.rank) == (format, (RANK, RANK))
    assert lora.layers >= len(changes.pairs)
    ours = packed(model, tmp_path / "ours", LoraSpec(path, 0.5))
    assert ours == packed(fused_folder(model, tmp_path / "fused", (changes, 0.5)), tmp_path / "beforehand")


@pytest.mark.parametrize("comfy", [False, True])
@pytest.mark.parametrize("kohya", [False, True])
def test_hunyuan_layers_that_its_authors_join(comfy: bool, kohya: bool, folder: Any, tmp_path: Path) -> None:
    model = folder("hunyuan-video")
    joined = {
        "double_blocks.0.img_attn.qkv" if comfy else "double_blocks.0.img_attn_qkv": [
            f"transformer_blocks.0.attn.to_{x}" for x in "qkv"
        ],
        "double_blocks.0.txt_attn.qkv" if comfy else "double_blocks.0.txt_attn_qkv": [
            f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"
        ],
        "single_blocks.0.linear1": [
            *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv"
        if comfy
        else "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [
            f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{x}" for x in "qkv"
        ],
    }
    single = {
        "double_blocks.0.img_mlp.2" if comfy else "double_blocks.0.img_mlp.fc2": "transformer_blocks.0.ff.net.2",
        "double_blocks.0.txt_mod.lin"
        if comfy
        else "double_blocks.0.txt_mod.linear": "transformer_blocks.0.norm1_context.linear",
        "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
        "time_in.in_layer" if comfy else "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    }
    parts = low_rank(
        model, [*(layer for layers in joined.values() for layer in layers), *single.values(), "norm_out.linear"]
    )
    theirs, biases = {}, {}
    for name, layers in joined.items():
        # One A for all of the parts, as it is one layer.
        a = parts.pairs[layers[0]][0]
        for layer in layers:
            parts.pairs[layer] = (a, parts.pairs[layer][1])
        theirs[name] = (a, torch.cat([parts.pairs[layer][1] for layer in layers]))
        biases[name] = [torch.randn(len(parts.pairs[layer][1])) for layer in layers]
        parts.added |= {f"{layer}.bias": bias for layer, bias in zip(layers, biases[name])}
    theirs |= {name: parts.pairs[layer] for name, layer in single.items()}
    # Shift before scale, and the other way round in diffusers.
    a, b = parts.pairs["norm_out.linear"]
    theirs["final_layer.adaLN_modulation.1"] = (a, b.roll(len(b) // 2, 0))
    tensors = {}
    for name, (a, b) in theirs.items():
        layer = f"lora_unet_{name.replace('.', '_')}" if kohya else f"diffusion_model.{name}"
        tensors |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b.contiguous()}
        if name in biases:
            tensors[f"{layer}.diff_b"] = torch.cat(biases[name])
    save_file(tensors, tmp_path / "lora.safetensors")
    fused = open_checkpoint(fused_folder(model, tmp_path / "fused", (parts, 0.5)))
    same(
        tensors_of(with_loras(open_checkpoint(model), [LoraSpec(tmp_path / "lora.safetensors", 0.5)])),
        tensors_of(fused),
    )


def test_several_at_once_with_their_scales(folder: Any, tmp_path: Path) -> None:
    model = folder("wan")
    first, names = wan_with_differences(model)
    second = low_rank(model, blocks(model)[:5], seed=9)
    paths = [write_original(tmp_path / "a.safetensors", first, names), write_peft(tmp_path / "b.safetensors", second)]
    specs = [LoraSpec(paths[0], 0.125), LoraSpec(paths[1], -1.5), LoraSpec(paths[1], 0.25)]
    loras = [(first, 0.125), (second, -1.5), (second, 0.25)]
    ours = packed(model, tmp_path / "ours", *specs)
    assert ours == packed(fused_folder(model, tmp_path / "fused", *loras), tmp_path / "beforehand")


def test_a_scale_of_zero_changes_nothing(folder: Any, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a.safetensors", low_rank(folder("wan"), blocks(folder("wan"))))
    plain = open_checkpoint(folder("wan"))
    same(tensors_of(with_loras(plain, [LoraSpec(path, 0.0)])), tensors_of(plain))


def test_layers_larger_than_a_chunk(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, changes = peft()(folder("wan"), tmp_path / "a.safetensors", "wan")
    monkeypatch.setattr(terms, "CHUNK_WEIGHTS", 64 * 128)
    fused = open_checkpoint(fused_folder(folder("wan"), tmp_path / "fused", (changes, 1.0)))
    same(tensors_of(with_loras(open_checkpoint(folder("wan")), [LoraSpec(path)])), tensors_of(fused))


def test_a_text_to_video_lora_on_an_image_to_video_model(folder: Any, tmp_path: Path) -> None:
    """It has no layers for the image, and its patch embedding knows the noisy latents alone."""
    text, image = folder("wan"), folder("wan-i2v")
    changes, names = wan_with_differences(text)
    path = write_original(tmp_path / "a.safetensors", changes, names)
    checkpoint = with_loras(open_checkpoint(image), [LoraSpec(path)])
    assert checkpoint.lora is not None
    assert "first 4 of 12 input channels" in " ".join(checkpoint.lora.fused[0].notes)
    patch = changes.added["patch_embedding.weight"]
    changes.added["patch_embedding.weight"] = torch.cat([patch, torch.zeros(128, 8, *patch.shape[2:])], 1)
    same(tensors_of(checkpoint), tensors_of(open_checkpoint(fused_folder(image, tmp_path / "fused", (changes, 1.0)))))


def test_a_low_rank_convolution(folder: Any, tmp_path: Path) -> None:
    """Kernels keep their shape in A; of a text-to-video LoRA, its channels."""
    changes = low_rank(folder("wan"), ["patch_embedding"])
    a, b = changes.pairs["patch_embedding"]
    kernel = a.reshape(RANK, 4, 1, 2, 2)
    prefix = "diffusion_model.patch_embedding.lora"
    save_file(
        {f"{prefix}_down.weight": kernel, f"{prefix}_up.weight": b[:, :, None, None, None].clone()}, tmp_path / "a"
    )
    fused = open_checkpoint(fused_folder(folder("wan"), tmp_path / "fused", (changes, 1.0)))
    same(tensors_of(with_loras(open_checkpoint(folder("wan")), [LoraSpec(tmp_path / "a")])), tensors_of(fused))
    wide = torch.cat([kernel, torch.zeros(RANK, 8, 1, 2, 2)], 1).flatten(1)
    changes.pairs["patch_embedding"] = (wide, b)
    fused = open_checkpoint(fused_folder(folder("wan-i2v"), tmp_path / "wide", (changes, 1.0)))
    same(tensors_of(with_loras(open_checkpoint(folder("wan-i2v")), [LoraSpec(tmp_path / "a")])), tensors_of(fused))


def test_settings_of_peft(folder: Any, tmp_path: Path) -> None:
    """alpha of single layers, and alpha over the root of the rank."""
    model, layers = folder("wan"), ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2"]
    changes = low_rank(model, layers)
    path = write_peft(tmp_path / "a.safetensors", changes, prefix="base_model.model.", how="file")
    settings = {"lora_alpha": 2, "r": 8, "alpha_pattern": {"attn1.to_q": 16}, "use_rslora": True, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = tensors_of(with_loras(open_checkpoint(model), [LoraSpec(path)]))
    stored = tensors_of(open_checkpoint(model))
    for layer, alpha in zip(layers, (16, 2)):
        a, b = changes.pairs[layer]
        assert torch.equal(found[f"{layer}.weight"], stored[f"{layer}.weight"] + (b @ a) * (alpha / RANK**0.5))


def test_a_file_for_two_transformers_gives_each_its_own(folder: Any, tmp_path: Path) -> None:
    model, layer = folder("wan"), "blocks.0.attn1.to_q"
    both = [low_rank(model, [layer], seed=seed) for seed in (1, 2)]
    tensors = {}
    for name, changes in zip(("transformer", "transformer_2"), both):
        tensors |= {f"{name}.{layer}.lora_{x}.weight": v for x, v in zip("AB", changes.pairs[layer])}
    save_file(tensors, tmp_path / "a.safetensors")
    for name, changes in zip(("transformer", "transformer_2"), both):
        checkpoint = with_loras(open_checkpoint(model), [LoraSpec(tmp_path / "a.safetensors", 1.0, name)])
        fused = open_checkpoint(fused_folder(model, tmp_path / name, (changes, 1.0)))
        assert torch.equal(checkpoint.read(f"{layer}.weight"), fused.read(f"{layer}.weight"))


CONVERTERS = {
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "wan-i2v": single_file_utils.convert_wan_transformer_to_diffusers,
    "hunyuan-video": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "ltx-video": single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
}
# Names of HunyuanVideo that only ComfyUI has, and layers that are split: diffusers' converter does not know these.
COMFY = re.compile(
    r"(time_in|guidance_in|txt_in\.\w+)\.(in|out)_layer|.*(_attn|\.norm)\.(?!fc)\w+.*|.*\.lin|.*mlp\.[02]|.*qkv|.*linear1"
)
FIRST = re.compile(r"(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.[02]")


@pytest.mark.parametrize("name", CONVERTERS)
def test_names_are_those_that_diffusers_converts(name: str, folder: Any) -> None:
    """Its converter of whole checkpoints is another's work on the same question."""
    checkpoint = open_checkpoint(folder(name))
    table = aliases(checkpoint.class_name, {n: info.shape for n, info in checkpoint.tensors.items()})
    converted, found = CONVERTERS[name], set()
    for alias, (place, *_) in table.items():
        comfy = name == "hunyuan-video" and COMFY.fullmatch(alias) and not FIRST.fullmatch(alias)
        if not place.original or comfy:
            continue
        kind = ".weight" if place.weight.endswith(".weight") else ""
        value = torch.zeros(checkpoint.tensors[place.weight].shape)
        assert list(converted({alias + kind: value})) == [place.weight], alias
        found.add(place.weight)
    least = {"wan": 20, "wan-i2v": 30, "hunyuan-video": 25, "ltx-video": 8}[name]
    assert len(found) >= least


def test_every_linear_layer_of_wan_has_its_authors_name(folder: Any) -> None:
    checkpoint = open_checkpoint(folder("wan-i2v"))
    table = aliases(checkpoint.class_name, {n: info.shape for n, info in checkpoint.tensors.items()})
    named = {place.weight for places in table.values() for place in places if place.original}
    without = [n for n, info in checkpoint.tensors.items() if len(info.shape) >= 2 and n not in named]
    assert without == ["patch_embedding.weight"]  # which has the same name


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprints_tell_loras_and_scales_apart(folder: Any, tmp_path: Path) -> None:
    model = folder("wan")
    paths = [write_peft(tmp_path / f"{s}.safetensors", low_rank(model, blocks(model)[:2], seed=s)) for s in (1, 2)]
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(paths[0].read_bytes())

    def of(*specs: LoraSpec) -> str:
        return with_loras(open_checkpoint(model), specs).fingerprint()

    a, b = (LoraSpec(path) for path in paths)
    different = [of(), of(a), of(b), of(a, b), of(b, a), of(a, a), of(LoraSpec(paths[0], 0.5))]
    assert len(set(different)) == len(different)
    assert of(LoraSpec(moved)) == of(a)
    plain, fused = open_checkpoint(model), with_loras(open_checkpoint(model), [a])
    whole = [model_fingerprint(pair) for pair in ((plain,), (plain, plain), (plain, fused), (fused, plain))]
    assert whole[0] == whole[1] == plain.fingerprint()
    assert len(set(whole)) == 3


# ------------------------------------------------------------------------------------------------------ what is asked for


def test_the_text_of_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    for text, (path, scale, component) in {
        "a.safetensors": ("a.safetensors", 1.0, None),
        "a.safetensors:0.8": ("a.safetensors", 0.8, None),
        "a:-2": ("a", -2.0, None),
        "a:2": ("a:2", 1.0, None),  # a file of this name
        "transformer_2=x/a.safetensors:1e-1": ("x/a.safetensors", 0.1, "transformer_2"),
        "transformer=a": ("a", 1.0, "transformer"),
        "x:y/a": ("x:y/a", 1.0, None),
    }.items():
        assert parse_lora(text) == LoraSpec(Path(path), scale, component), text
    assert parse_loras([Path("a:2"), LoraSpec(Path("b"), 3.0), "c:4"]) == (
        LoraSpec(Path("a:2")), LoraSpec(Path("b"), 3.0), LoraSpec(Path("c"), 4.0),
    )  # fmt: skip


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:-1e999", "a:x", ":1", "transformer=", "transformer_2=:1", "\0"])
def test_options_out_of_form(text: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        parse_lora(text)
    assert error.value.available
    with pytest.raises(UnsupportedError):
        parse_loras(["a"] * 65)


def test_the_transformer_that_a_lora_goes_to() -> None:
    specs = [LoraSpec(Path("a")), LoraSpec(Path("b"), 1.0, "transformer_2")]
    found = components_of(specs, ["transformer", "transformer_2"])
    assert [[s.path.name for s in found[name]] for name in found] == [["a"], ["b"]]
    assert components_of(specs[:1], ["transformer_2"])["transformer_2"][0].component == "transformer_2"
    with pytest.raises(UnsupportedError, match="transformer_2") as error:
        components_of(specs, ["transformer"])
    assert error.value.available == ["transformer"] or "transformer" in str(error.value.available)


# -------------------------------------------------------------------------------------------------------------- refusals

Q = "diffusion_model.blocks.0.self_attn.q"
A, B = torch.zeros(RANK, 128), torch.zeros(128, RANK)
PAIR = {f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B}
REFUSED: dict[str, tuple[dict[str, torch.Tensor], tuple[str, ...]]] = {
    "another model": (
        {f"double_blocks.0.img_attn_qkv.lora_{x}.weight": v for x, v in zip("AB", (A, B))},
        ("0 of 1 layers", "double_blocks.0.img_attn_qkv", "WanTransformer3DModel", "blocks.0"),
    ),
    "some layers match": (
        {**PAIR, "diffusion_model.blocks.9.self_attn.q.lora_down.weight": A},
        ("1 of 2 layers", "blocks.9.self_attn.q", "k not in KEYS"),
    ),
    "image to video": (
        {**PAIR, **{f"diffusion_model.blocks.0.cross_attn.k_img.lora_{x}.weight": v for x, v in zip("AB", (A, B))}},
        ("k_img", "image to video"),
    ),
    "text encoder": ({**PAIR, "lora_te1_layers_0.lora_down.weight": A}, ("lora_te1", "text encoder")),
    "unknown keys": ({**PAIR, f"{Q}.reshape_weight": A}, ("reshape_weight",)),
    "dora": ({**PAIR, f"{Q}.dora_scale": A}, ("DoRA", "dora_scale", "export the folder")),
    "dora of peft": ({**PAIR, f"{Q}.lora_magnitude_vector": A}, ("DoRA",)),
    "lokr": ({f"{Q}.lokr_w1": A, f"{Q}.lokr_w2": A}, ("LoKr", "lokr_w1")),
    "loha": ({f"{Q}.hada_w1_a": A}, ("LoHa",)),
    "locon": ({**PAIR, f"{Q}.lora_mid.weight": A}, ("lora_mid",)),
    "no lora": ({"blocks.0.attn1.to_q.weight": A}, ("is no LoRA", "blocks.0.attn1.to_q.weight")),
    "a vae": ({"encoder.conv_in.weight": A, "decoder.conv_in.weight": A}, ("is no LoRA", "a VAE")),
    "a model of the authors": (
        {"blocks.0.self_attn.q.weight": A},
        ("is no LoRA", "a model itself is given as MODEL", "MODEL"),
    ),
    "one factor": ({f"{Q}.lora_down.weight": A}, ("lora_down", "has no lora_up")),
    "the other factor": ({f"{Q}.lora_up.weight": B}, ("has no lora_down",)),
    "alpha alone": ({**PAIR, "blocks.0.ffn.0.alpha": torch.ones(())}, ("blocks.0.ffn.0.alpha", "beside it")),
    "ranks differ": ({**PAIR, f"{Q}.lora_up.weight": torch.zeros(128, 3)}, ("lora_up", "[128, 3]", "[128, 4]")),
    "features differ": ({**PAIR, f"{Q}.lora_down.weight": torch.zeros(4, 64)}, ("lora_down", "[4, 64]", "[4, 128]")),
    "rows differ": ({**PAIR, f"{Q}.lora_up.weight": torch.zeros(64, 4)}, ("[64, 4]", "[128, 4]")),
    "rank of zero": (
        {f"{Q}.lora_down.weight": torch.zeros(0, 128), f"{Q}.lora_up.weight": torch.zeros(128, 0)},
        ("lora_down",),
    ),
    "rank above the layer": (
        {f"{Q}.lora_down.weight": torch.zeros(129, 128), f"{Q}.lora_up.weight": torch.zeros(128, 129)},
        ("the rank 129", "128"),
    ),
    "a scalar": ({f"{Q}.lora_down.weight": torch.zeros(()), f"{Q}.lora_up.weight": torch.zeros(())}, ("lora_down",)),
    "low rank of a norm": (
        {"blocks.0.norm3.lora_down.weight": A, "blocks.0.norm3.lora_up.weight": B},
        ("norm2.weight", "low-rank"),
    ),
    "a difference of another shape": ({"blocks.0.norm3.diff": torch.zeros(64)}, ("norm3.diff", "[64]", "[128]")),
    "fewer rows of a table": ({"blocks.0.diff_m": torch.zeros(1, 3, 128)}, ("diff_m", "[1, 3, 128]")),
    "a bias that is not there": ({"blocks.0.self_attn.norm_q.diff_b": torch.zeros(128)}, ("has none",)),
    "integers": ({**PAIR, f"{Q}.lora_down.weight": A.to(torch.int8)}, ("I8",)),
    "not finite": ({**PAIR, f"{Q}.lora_up.weight": B + float("nan")}, ("lora_up", "512 NaN")),
    "alpha is not finite": ({**PAIR, f"{Q}.alpha": torch.tensor(float("inf"))}, ("alpha", "inf")),
    "alpha of two": ({**PAIR, f"{Q}.alpha": torch.ones(2)}, ("alpha", "one number")),
    "one layer twice": ({**PAIR, "blocks.0.self_attn.q.lora_down.weight": A}, ("lora_down",)),
    "nothing": ({}, ("is no LoRA", "no tensors")),
}


def refusal(model: Path, path: Path, scale: float = 1.0) -> DvdquantError:
    with pytest.raises(DvdquantError) as error:
        with_loras(open_checkpoint(model), [LoraSpec(path, scale)])
    assert error.value.fix
    assert path.name in str(error.value)
    return error.value


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_names_and_a_way_out(name: str, folder: Any, tmp_path: Path) -> None:
    tensors, said = REFUSED[name]
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "lora.safetensors")
    text = str(refusal(folder("wan"), tmp_path / "lora.safetensors"))
    for words in said:
        assert words in text, (words, text)


def test_a_change_that_fp32_does_not_hold(folder: Any, tmp_path: Path) -> None:
    save_file({f"{Q}.lora_down.weight": A + 1, f"{Q}.lora_up.weight": B + 1}, tmp_path / "lora.safetensors")
    checkpoint = with_loras(open_checkpoint(folder("wan")), [LoraSpec(tmp_path / "lora.safetensors", 1e38)])
    with pytest.raises(CheckpointError, match="more than fp32 holds"):
        checkpoint.read("blocks.0.attn1.to_q.weight")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"r": 0}, "r is 0"),
        ({"alpha_pattern": {"(a+)+$": 1.0}}, "regular expression"),
        ([], "JSON object"),
    ],
)
def test_settings_that_cannot_be_used(settings: Any, said: str, folder: Any, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(PAIR, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert said in str(refusal(folder("wan"), path))
