"""What each family quantizes, merges and keeps, its inputs, and the sizes it accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dvdquant.errors import CheckpointError, ShapeError, UnsupportedError
from dvdquant.export.options import ExportOptions
from dvdquant.export.sizes import resolve_sizes
from dvdquant.model.families import FAMILIES, Axis, Sizes, get_family
from dvdquant.model.plan import ModelPlan, build_skeleton, plan_model, quantized_skeleton
from dvdquant.recipe import RECIPES, get_recipe
from tests.support import tiny_models as tiny
from tests.support.exporting import with_changes

I2V = with_changes(tiny.WAN, image_dim=32, added_kv_proj_dim=128, in_channels=36, pos_embed_seq_len=None)
TI2V = with_changes(tiny.WAN, in_channels=48, out_channels=48)
COGVIDEOX_15 = with_changes(tiny.COGVIDEOX, patch_size_t=2, ofs_embed_dim=32, sample_frames=9)
LEARNED = with_changes(tiny.COGVIDEOX, use_learned_positional_embeddings=True)
FLF = with_changes(I2V, pos_embed_seq_len=514)
CONFIGS = {
    **tiny.CONFIGS,
    "wan-i2v": I2V,
    "wan-flf": FLF,
    "wan-ti2v": TI2V,
    "cogvideox-1.5": COGVIDEOX_15,
    "cogvideox-i2v": LEARNED,
}

SELF = ["attn1.to_q+to_k+to_v", "attn1.to_out.0"]
CROSS = ["attn2.to_q", "attn2.to_k+to_v", "attn2.to_out.0"]
FF = ["ff.net.0.proj", "ff.net.2"]
# Layers of one block, in module order, as published architectures have them.
BLOCKS: dict[str, dict[str, list[str]]] = {
    "wan": {"blocks": [*SELF, *CROSS, "ffn.net.0.proj", "ffn.net.2"]},
    "wan-ti2v": {"blocks": [*SELF, *CROSS, "ffn.net.0.proj", "ffn.net.2"]},
    "wan-i2v": {"blocks": [*SELF, *CROSS, "attn2.add_k_proj+add_v_proj", "ffn.net.0.proj", "ffn.net.2"]},
    "wan-flf": {"blocks": [*SELF, *CROSS, "attn2.add_k_proj+add_v_proj", "ffn.net.0.proj", "ffn.net.2"]},
    "hunyuan-video": {
        "transformer_blocks": [
            "attn.to_q+to_k+to_v",
            "attn.add_q_proj+add_k_proj+add_v_proj",
            "attn.to_out.0",
            "attn.to_add_out",
            *FF,
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ],
        "single_transformer_blocks": ["attn.to_q+to_k+to_v", "proj_mlp", "proj_out"],
    },
    "cogvideox": {"transformer_blocks": [*SELF, *FF]},
    "cogvideox-2b": {"transformer_blocks": [*SELF, *FF]},
    "cogvideox-1.5": {"transformer_blocks": [*SELF, *FF]},
    "cogvideox-i2v": {"transformer_blocks": [*SELF, *FF]},
    "ltx-video": {"transformer_blocks": [*SELF, *CROSS, *FF]},
}
COGVIDEOX_KEPT = {"patch_embed", "time_embedding", "norm_out", "proj_out", "transformer_blocks.norm"}
KEPT = {
    "wan": {"condition_embedder", "proj_out"},
    "wan-ti2v": {"condition_embedder", "proj_out"},
    "wan-i2v": {"condition_embedder", "proj_out"},
    "wan-flf": {"condition_embedder", "proj_out"},
    "hunyuan-video": {
        "context_embedder",
        "time_text_embed",
        "proj_out",
        "norm_out",
        "transformer_blocks.norm",
        "single_transformer_blocks.norm",
    },
    "cogvideox": COGVIDEOX_KEPT,
    "cogvideox-2b": COGVIDEOX_KEPT,
    "cogvideox-i2v": COGVIDEOX_KEPT,
    "cogvideox-1.5": {*COGVIDEOX_KEPT, "ofs_embedding"},
    "ltx-video": {"proj_in", "time_embed", "caption_projection", "proj_out"},
}


def plan(config: dict[str, Any], recipe: str = "w4a4", dtype: torch.dtype = torch.bfloat16) -> ModelPlan:
    return plan_model(config, get_recipe(recipe), dtype)


def kind(name: str) -> str:
    """``transformer_blocks.3.norm1.linear`` -> ``transformer_blocks.norm``; other names to their first part."""
    parts = name.split(".")
    return f"{parts[0]}.norm" if "blocks" in parts[0] and parts[2].startswith("norm") else parts[0]


# -------------------------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_and_merged_layers(name: str) -> None:
    made = plan(CONFIGS[name])
    config = CONFIGS[name]
    counts = {
        "blocks": "num_layers",
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }
    expected = [
        f"{blocks}.{index}.{layer}"
        for blocks, layers in BLOCKS[name].items()
        for index in range(config[counts[blocks]])
        for layer in layers
    ]
    assert [spec.name for spec in made.layers] == expected
    for spec in made.layers:
        joined = spec.name.rpartition(".")[2].split("+")
        assert [m.rpartition(".")[2] for m in spec.members] == joined
        assert len(spec.rows) == len(spec.biases) == len(spec.members)


@pytest.mark.parametrize("name", CONFIGS)
def test_kept_layers(name: str) -> None:
    made = plan(CONFIGS[name])
    assert {kind(layer) for layer in made.kept_linears} == KEPT[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_planned_once(name: str) -> None:
    """A parameter is quantized (a weight or bias of a member) or kept, none both, none neither."""
    made = plan(CONFIGS[name])
    parameters = dict(build_skeleton(CONFIGS[name], torch.bfloat16).named_parameters())
    members = [m for spec in made.layers for m in spec.members]
    assert len(members) == len(set(members))
    quantized = {f"{m}.weight" for m in members}
    quantized |= {f"{m}.bias" for spec in made.layers for m, has in zip(spec.members, spec.biases) if has}
    assert quantized.isdisjoint(made.kept)
    assert quantized | set(made.kept) == set(parameters) == set(made.shapes)
    assert all(made.shapes[n] == tuple(p.shape) for n, p in parameters.items())
    linears = {n for n, m in build_skeleton(CONFIGS[name], torch.bfloat16).named_modules() if isinstance(m, nn.Linear)}
    assert linears == {*members, *made.kept_linears}
    assert made.quantized_weights == sum(parameters[f"{m}.weight"].numel() for m in members)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_members_really_share_their_input(name: str) -> None:
    """Run the model with random weights and compare the inputs of the members of every merged layer."""
    made = plan(CONFIGS[name], dtype=torch.float32)
    model = build_skeleton(CONFIGS[name], torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        owner, _, child = parameter_name.rpartition(".")
        value = torch.randn(parameter.shape, generator=generator) * 0.05
        model.get_submodule(owner)._parameters[child] = nn.Parameter(value, requires_grad=False)
    seen: dict[str, torch.Tensor] = {}

    def record(layer: str) -> Any:
        return lambda _module, args: seen.update({layer: args[0].clone()})

    for spec in made.layers:
        for member in spec.members:
            model.get_submodule(member).register_forward_pre_hook(record(member))
    inputs = made.family.sample(sizes_for(name), torch.float32)
    with torch.no_grad():
        output = model(**made.family.forward_kwargs(inputs), return_dict=False)[0]
    assert bool(torch.isfinite(output).all())
    shared = {}
    for spec in made.layers:
        first, *others = (seen[m] for m in spec.members)
        assert all(torch.equal(first, other) for other in others), spec.name
        shared[spec.name] = first
    # And the other way round: layers of one parent with equal inputs were merged.
    for a in made.layers:
        for b in made.layers:
            same_parent = a.members[0].rpartition(".")[0] == b.members[0].rpartition(".")[0]
            if a.name < b.name and same_parent and shared[a.name].shape == shared[b.name].shape:
                assert not torch.equal(shared[a.name], shared[b.name]), (a.name, b.name)


def sizes_for(name: str) -> Sizes:
    if name == "cogvideox-1.5":
        return Sizes(Axis.fixed(4), Axis.fixed(8), Axis.fixed(8), text_tokens=12)
    return tiny.FIXED


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_rotation_and_groups_follow_the_recipe(name: str, recipe: str) -> None:
    made = plan(CONFIGS[name], recipe)
    for spec in made.layers:
        size = made.recipe.weight.group_size or spec.features
        assert spec.groups == spec.features // size
        k = spec.features
        power = k & -k
        auto = power if power.bit_length() % 2 else power // 2
        block = {"full": k, "none": 1, "auto": auto, "regular": auto}[str(made.recipe.rotation)]
        assert spec.rotation.block == block
        shapes = {n.rpartition(".")[2]: s for n, (_, s) in spec.tensors().items()}
        n = sum(spec.rows)
        assert shapes == {
            "weight": (n, k // 2),
            "weight_scale": (n,),
            "weight_group_scale": (n, spec.groups),
            "weight_zero": (n, spec.groups) if made.recipe.weight.zero_point == "float" else (n,),
            "bias": (n,),
            **{f"pre_quant_{n}": (k,) for n, there in (("shift", spec.shifted), ("scale", spec.smoothed)) if there},
        }


def test_keep_and_force() -> None:
    recipe = get_recipe("w4a4").with_globs(("*.attn1.to_k", "blocks.1.ffn.*"), ("proj_out",))
    made = plan_model(tiny.WAN, recipe, torch.bfloat16)
    names = [spec.name for spec in made.layers]
    assert "blocks.0.attn1.to_q+to_v" in names
    assert "proj_out" in names
    assert not any(n.startswith("blocks.1.ffn") for n in names)
    assert "blocks.0.attn1.to_k" in made.kept_linears
    assert "proj_out" not in made.kept_linears


def test_modules_that_diffusers_keeps_in_fp32() -> None:
    made = plan(tiny.WAN)
    stored = {name: dtype for name, (dtype, _) in made.kept.items()}
    assert stored["scale_shift_table"] == torch.float32
    assert stored["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert stored["blocks.0.norm2.weight"] == torch.float32
    assert stored["condition_embedder.text_embedder.linear_1.weight"] == torch.bfloat16
    assert stored["proj_out.weight"] == torch.bfloat16


def test_quantized_skeleton_has_the_planned_layers() -> None:
    made = plan(tiny.HUNYUAN)
    model = quantized_skeleton(made, 4)
    for spec in made.layers:
        assert model.get_submodule(spec.name).act_bits == 4
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert left == set(made.kept_linears)


def test_learned_position_embeddings_are_part_of_the_checkpoint() -> None:
    """A persistent buffer (CogVideoX-5B image to video): stored, not recomputed."""
    made = plan(LEARNED)
    assert made.kept["patch_embed.pos_embedding"] == (torch.bfloat16, (1, 12 + 3 * 4 * 4, 128))
    assert "patch_embed.pos_embedding" not in plan(tiny.COGVIDEOX_2B).kept


def test_a_layer_that_no_group_divides() -> None:
    config = with_changes(tiny.WAN, ffn_dim=200)
    with pytest.raises(UnsupportedError) as info:
        plan(config, "w4a4-g128")
    assert "blocks.0.ffn.net.2" in str(info.value)
    assert "200" in str(info.value)
    assert info.value.fix
    assert "--keep" in info.value.fix
    plan_model(config, get_recipe("w4a4-g128").with_globs(("*.ffn.net.2",)), torch.bfloat16)


def test_a_layer_without_a_hadamard_matrix() -> None:
    """K = 4·47 = 188 has none by Paley's constructions (187 = 11·17, 93 = 3·31)."""
    config = with_changes(tiny.WAN, ffn_dim=188)
    with pytest.raises(UnsupportedError) as info:
        plan(config, "paper")
    assert "188" in str(info.value)
    assert info.value.fix
    plan(config, "w4a4")


def test_defaults_of_diffusers_fill_the_config() -> None:
    """config.json of a published model may leave out what is a default."""
    config = {k: v for k, v in tiny.WAN.items() if k not in ("patch_size", "image_dim", "eps")}
    made = plan(config)
    assert made.family.patch() == (1, 2, 2)
    assert [s.name for s in made.layers] == [s.name for s in plan(tiny.WAN).layers]


def test_unknown_class_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError) as info:
        get_family({"_class_name": "FluxTransformer2DModel"})
    assert "FluxTransformer2DModel" in str(info.value)
    for family in FAMILIES:
        for name in family.class_names:
            assert name in str(info.value)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": "two"}, {"num_layers": -3.5}, {"ffn_dim": 0}, {"patch_size": [1, 2]}]
)
def test_config_that_diffusers_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as info:
        plan(with_changes(tiny.WAN, **changes))
    assert "WanTransformer3DModel" in str(info.value)
    assert info.value.fix


# --------------------------------------------------------------------------------------------------- inputs and sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_run_and_repeat(name: str) -> None:
    family = plan(CONFIGS[name]).family
    sizes = sizes_for(name)
    first, again, other = (family.sample(sizes, torch.bfloat16, seed) for seed in (0, 0, 1))
    assert [s.name for s in family.inputs(sizes)] == list(first)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)
    axes = family.axes(sizes)
    for spec in family.inputs(sizes):
        assert tuple(first[spec.name].shape) == spec.sizes(axes)


def test_image_to_video_has_the_image_embedding() -> None:
    specs = {s.name: s for s in plan(I2V).family.inputs(tiny.FIXED)}
    assert specs["encoder_hidden_states_image"].shape == (1, 257, 32)
    both = plan(with_changes(I2V, pos_embed_seq_len=514)).family
    assert {s.name: s for s in both.inputs(tiny.FIXED)}["encoder_hidden_states_image"].shape == (2, 257, 32)
    assert "encoder_hidden_states_image" not in {s.name for s in plan(tiny.WAN).family.inputs(tiny.FIXED)}


def test_ti2v_has_its_own_vae_and_a_timestep_per_token() -> None:
    family = plan(TI2V).family
    assert family.vae_scale == (4, 16, 16)
    assert plan(tiny.WAN).family.vae_scale == (4, 8, 8)
    specs = {s.name: s for s in family.inputs(tiny.FIXED)}
    assert specs["timestep"].shape == (1, "tokens")
    assert resolve(TI2V, height="704", width="1280", num_frames="121").at("opt") == (31, 44, 80)


def resolve(config: dict[str, Any], **options: Any) -> Sizes:
    made = ExportOptions(model="m", out=Path("out"), recipe=get_recipe("w4a4"), **options)
    return resolve_sizes(plan({**config, **{k: 1024 for k in config if k == "rope_max_seq_len"}}).family, made)


@pytest.mark.parametrize(
    ("name", "options", "latent", "tokens"),
    [
        ("wan", {}, (21, 60, 104), 21 * 30 * 52),
        ("wan", {"num_frames": "17", "height": "256", "width": "320"}, (5, 32, 40), 5 * 16 * 20),
        ("wan", {"num_frames": "1"}, (1, 60, 104), 30 * 52),
        ("hunyuan-video", {"num_frames": "129", "height": "720", "width": "1280"}, (33, 90, 160), 33 * 45 * 80),
        ("cogvideox", {}, (13, 60, 90), 13 * 30 * 45),
        ("ltx-video", {"num_frames": "161", "height": "512", "width": "704"}, (21, 16, 22), 21 * 16 * 22),
        ("wan", {"latent": "8x24X24"}, (8, 24, 24), 8 * 12 * 12),
    ],
)
def test_pixels_to_latents(name: str, options: dict[str, str], latent: tuple[int, ...], tokens: int) -> None:
    sizes = resolve(CONFIGS[name], **options)
    assert sizes.at("opt") == latent == sizes.at("min") == sizes.at("max")
    assert not sizes.dynamic
    assert plan(CONFIGS[name]).family.tokens(*latent) == tokens


def test_ranges() -> None:
    sizes = resolve(tiny.WAN, height="480:720", width="832:1024:1280", num_frames="33:81")
    assert (sizes.frames, sizes.height, sizes.width) == (Axis(9, 21, 21), Axis(60, 90, 90), Axis(104, 128, 160))
    assert sizes.dynamic
    assert Sizes.from_json(sizes.to_json()) == sizes
    assert resolve(tiny.WAN, latent="2:4x8:8:12x6").height == Axis(8, 8, 12)
    assert str(Axis(2, 3, 4)) == "2:3:4"
    assert str(Axis.fixed(3)) == "3"


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (tiny.WAN, {"height": "479"}, ["--height", "479", "464 or 480"]),
        (tiny.WAN, {"width": "480:485"}, ["--width", "485", "8"]),
        (tiny.WAN, {"latent": "4x9x8"}, ["height", "9", "8 or 10"]),
        (tiny.WAN, {"latent": "4x1x8"}, ["height", "1", "2 or 2"]),
        (tiny.WAN, {"latent": "4x8"}, ["--latent", "4x8", "FRAMESxHEIGHTxWIDTH"]),
        (tiny.WAN, {"latent": "4x8x8x8"}, ["--latent"]),
        (tiny.WAN, {"latent": "0x8x8"}, ["--latent", "'0'"]),
        (tiny.WAN, {"latent": "-4x8x8"}, ["--latent", "'-4'"]),
        (tiny.WAN, {"latent": "4x8xwide"}, ["--latent", "'wide'"]),
        (tiny.WAN, {"latent": "4x12:8x8"}, ["--latent", "12:8"]),
        (tiny.WAN, {"latent": "4x8:4:12x8"}, ["--latent", "8:4:12"]),
        (tiny.WAN, {"latent": "4x8x8", "height": "64"}, ["--latent", "--height"]),
        (tiny.WAN, {"text_tokens": 0}, ["--text-tokens", "0"]),
        (tiny.WAN, {"text_tokens": -5}, ["--text-tokens", "-5"]),
        (tiny.WAN, {"batch": 0}, ["--batch", "0"]),
        (tiny.WAN, {"num_frames": "10.5"}, ["--num-frames", "10.5"]),
        (COGVIDEOX_15, {"latent": "3x8x8"}, ["frames", "3", "2 or 4"]),
        (tiny.COGVIDEOX_2B, {"latent": "3x4:8x8"}, ["additive position", "ranges"]),
        (tiny.COGVIDEOX_2B, {"latent": "3x8x8", "text_tokens": 5}, ["5 text tokens", "12"]),
        (
            with_changes(tiny.COGVIDEOX, use_learned_positional_embeddings=True),
            {"latent": "3x8x10"},
            ["learned position", "8×8"],
        ),
    ],
)
def test_bad_sizes(config: dict[str, Any], options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ShapeError) as info:
        resolve(config, **options)
    for text in named:
        assert text in str(info.value)
    assert info.value.available or info.value.fix


def test_frames_that_the_causal_vae_cannot_have() -> None:
    """17 frames are 5 latents; 16 are 4 latents and a remainder, which the VAE would drop without a word."""
    assert resolve(tiny.WAN, num_frames="17").frames == Axis.fixed(5)
    with pytest.raises(ShapeError, match="13 or 17"):
        resolve(tiny.WAN, num_frames="16")
