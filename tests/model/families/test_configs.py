"""What a config.json may say: hostile values of every field are refused in words, and cost neither memory nor time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import CheckpointError, DvdquantError, UnsupportedError
from dvdquant.export.estimate import estimate_export
from dvdquant.export.options import ExportOptions
from dvdquant.export.sizes import resolve_sizes
from dvdquant.model import outline
from dvdquant.model.families import FAMILIES, get_family
from dvdquant.model.families.configs import MOST_BLOCKS
from dvdquant.model.plan import build_skeleton, plan_model
from dvdquant.recipe import RECIPES, get_recipe
from dvdquant.system.files import hash_file
from tests.support import tiny_models as tiny
from tests.support.children import in_child
from tests.support.commands import SIZES, refused, run
from tests.support.costs import Costs
from tests.support.exporting import with_changes

CONFIGS: dict[str, dict[str, Any]] = {
    **tiny.CONFIGS,
    "cogvideox-learned": with_changes(tiny.COGVIDEOX, use_learned_positional_embeddings=True),
    "cogvideox-1.5": with_changes(tiny.COGVIDEOX, patch_size_t=2, ofs_embed_dim=32),
    "wan-i2v": with_changes(tiny.WAN, image_dim=32, added_kv_proj_dim=128, in_channels=36),
}
# A field of each class, what it is set to, and what the message names.
HOSTILE: dict[str, list[tuple[dict[str, Any], str]]] = {
    "wan": [
        ({"attention_head_dim": 63}, "attention_head_dim"),
        ({"attention_head_dim": 10**400}, "attention_head_dim"),
        ({"num_attention_heads": -2}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_attention_heads": 2.0}, "num_attention_heads"),
        ({"num_attention_heads": 60000, "attention_head_dim": 60000}, "attention_head_dim"),
        ({"in_channels": None}, "in_channels"),
        ({"in_channels": {"a": [1]}}, "in_channels"),
        ({"out_channels": 0}, "out_channels"),
        ({"patch_size": 2}, "patch_size"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": [1, 2, 2, 2]}, "patch_size"),
        ({"patch_size": [1, "2", 2]}, "patch_size[1]"),
        ({"patch_size": [0, 2, 2]}, "patch_size[0]"),
        ({"patch_size": [64, 64, 64]}, "patch_size"),
        ({"qk_norm": "bogus"}, "qk_norm"),
        ({"qk_norm": ["rms_norm_across_heads"]}, "qk_norm"),
        ({"cross_attn_norm": 1}, "cross_attn_norm"),
        ({"eps": -1e-6}, "eps"),
        ({"eps": "small"}, "eps"),
        ({"eps": 10**400}, "eps"),
        ({"freq_dim": 1}, "freq_dim"),
        ({"num_layers": 10**6}, "num_layers"),
        ({"num_layers": -1}, "num_layers"),
        ({"image_dim": 0}, "image_dim"),
        ({"image_dim": 16, "added_kv_proj_dim": 100}, "does not run"),
        ({"rope_max_seq_len": 0}, "rope_max_seq_len"),
        ({"rope_max_seq_len": 1_000_000, "attention_head_dim": 256}, "rope_max_seq_len"),
        ({"ffn_dim": 2**70}, "ffn_dim"),
    ],
    "hunyuan-video": [
        ({"rope_axes_dim": [16, 24]}, "rope_axes_dim"),
        ({"rope_axes_dim": [16, 24, 25]}, "rope_axes_dim"),
        ({"rope_axes_dim": [15, 25, 24]}, "rope_axes_dim"),
        ({"rope_axes_dim": {}}, "rope_axes_dim"),
        ({"qk_norm": "bogus"}, "qk_norm"),
        ({"qk_norm": "l2"}, "qk_norm"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"mlp_ratio": 1e300}, "mlp_ratio"),
        ({"rope_theta": 1e300}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"guidance_embeds": "yes"}, "guidance_embeds"),
        ({"image_condition_type": "video"}, "image_condition_type"),
        ({"num_layers": 400, "num_single_layers": 400}, "num_single_layers"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"pooled_projection_dim": False}, "pooled_projection_dim"),
    ],
    "cogvideox-2b": [
        ({"activation_fn": "bogus"}, "activation_fn"),
        ({"timestep_activation_fn": "bogus"}, "timestep_activation_fn"),
        ({"timestep_activation_fn": 3}, "timestep_activation_fn"),
        ({"out_channels": None}, "out_channels"),
        ({"dropout": 2}, "dropout"),
        ({"freq_shift": 64}, "freq_shift"),
        ({"temporal_compression_ratio": 0}, "temporal_compression_ratio"),
        ({"temporal_interpolation_scale": 0}, "temporal_interpolation_scale"),
        ({"spatial_interpolation_scale": 1e-300}, "spatial_interpolation_scale"),
        ({"sample_width": 2000, "sample_height": 2000, "sample_frames": 49}, "sample_width"),
        ({"sample_width": 2000, "num_attention_heads": 300, "sample_height": 60}, "sample_width"),
        ({"max_text_seq_length": 65536, "text_embed_dim": 65536}, "max_text_seq_length"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_bias": None}, "patch_bias"),
    ],
    "ltx-video": [
        ({"activation_fn": "bogus"}, "activation_fn"),
        ({"qk_norm": None}, "qk_norm"),
        ({"qk_norm": "rms_norm"}, "qk_norm"),
        ({"caption_channels": 0}, "caption_channels"),
        ({"cross_attention_dim": 100}, "does not run"),
        ({"num_attention_heads": [2]}, "num_attention_heads"),
        ({"norm_eps": True}, "norm_eps"),
        ({"attention_bias": 0}, "attention_bias"),
    ],
}
CASES = [(name, changes, named) for name, cases in HOSTILE.items() for changes, named in cases]


def plan(config: dict[str, Any], recipe: str = "w4a4") -> Any:
    return plan_model(config, get_recipe(recipe), torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_record_has_the_fields_and_defaults_of_diffusers(family: Any) -> None:
    import diffusers

    (class_name,) = family.class_names
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    theirs = {
        n: list(p.default) if isinstance(p.default, tuple) else p.default for n, p in parameters.items() if n != "self"
    }
    assert family.record().model_dump() == theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_stays_what_it_says(name: str) -> None:
    """Also one that diffusers has loaded, with tuples and fields of its own."""
    model: Any = build_skeleton(CONFIGS[name], torch.bfloat16)
    checked = get_family(CONFIGS[name]).config
    assert CONFIGS[name].items() <= checked.items()
    assert (
        get_family(dict(model.config) | {"_class_name": checked["_class_name"], "unknown": {"x": [None]}}).config
        == checked
    )


@pytest.mark.parametrize(("name", "changes", "named"), CASES, ids=lambda value: str(value)[:60])
def test_a_hostile_value_is_refused(name: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as info:
        plan(with_changes(CONFIGS[name], **changes))
    text = str(info.value)
    assert named in text
    assert "config.json" in text
    assert info.value.fix
    assert len(text) < 1500


@pytest.mark.parametrize(
    "key", ["self", "forward", "_use_default_values", "dtype", "a b\x1b[31m", "quantization_config"]
)
def test_unknown_fields_do_nothing(key: str) -> None:
    """``_use_default_values`` makes diffusers forget the fields it names, and ``self`` is an argument of every method."""
    made = plan({**tiny.WAN, key: ["num_layers", "ffn_dim"]})
    assert made.shapes == plan(tiny.WAN).shapes
    assert key not in made.family.config


def test_a_field_that_only_diffusers_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later diffusers may have a field that changes the model: it is not dropped silently."""
    import diffusers

    class Later(diffusers.WanTransformer3DModel):  # type: ignore[misc]
        def __init__(self, sparse: bool = False, **fields: Any) -> None:
            pass

    known = inspect.signature(diffusers.WanTransformer3DModel.__init__)
    extra = inspect.Parameter("sparse", inspect.Parameter.KEYWORD_ONLY, default=False)
    Later.__init__.__signature__ = known.replace(parameters=[*known.parameters.values(), extra])  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers, "WanTransformer3DModel", Later)
    with pytest.raises(UnsupportedError, match="sparse"):
        plan({**tiny.WAN, "sparse": True})


def test_an_export_with_a_hostile_config(tmp_path: Path) -> None:
    """Its manifest vouches for the config: whoever made the export can."""
    source, out = tiny.write_checkpoint(tmp_path / "model", tiny.WAN_ONE), tmp_path / "out"
    assert run(source, "-o", out, "--target", "graphs", "--recipe", "w4a8", *SIZES).exit_code == 0
    Artifact.open(out).plan()
    for changes, named in HOSTILE["wan"]:
        _rewrite(out, with_changes(tiny.WAN_ONE, **changes))
        with pytest.raises(CheckpointError) as info:
            Artifact.open(out).plan()
        assert named in str(info.value)
    _rewrite(out, {**tiny.WAN_ONE, "self": 1, "forward": None})
    assert Artifact.open(out).family().config == get_family(tiny.WAN_ONE).config


def _rewrite(out: Path, config: dict[str, Any]) -> None:
    (out / "config.json").write_text(json.dumps(config))
    manifest = json.loads((out / "manifest.json").read_text())
    entry = hash_file(out / "config.json")
    manifest["files"]["config.json"] = dict(entry)
    manifest["config_sha256"] = entry["sha256"]
    (out / "manifest.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------------- the costs

# The most that passes the bounds on the numbers, and what is just beyond those on their products.
COSTLY: dict[str, dict[str, Any]] = {
    "wan table": with_changes(tiny.WAN, rope_max_seq_len=1_000_000, attention_head_dim=256),
    "wan largest": with_changes(
        tiny.WAN, num_attention_heads=256, attention_head_dim=256, ffn_dim=1 << 17, text_dim=1 << 17
    ),
    "wan rotary": with_changes(tiny.WAN, rope_max_seq_len=(64 << 20) // 8 // 64),
    "wan blocks": with_changes(tiny.WAN, num_layers=MOST_BLOCKS),
    "hunyuan blocks": with_changes(tiny.HUNYUAN, num_layers=MOST_BLOCKS // 2, num_single_layers=MOST_BLOCKS // 2 - 1),
    "cogvideox table": with_changes(tiny.COGVIDEOX_2B, sample_width=2000, num_attention_heads=30, sample_height=60),
    "cogvideox positions": with_changes(tiny.COGVIDEOX_2B, sample_width=1024, sample_height=1024, sample_frames=13),
    "cogvideox learned": with_changes(
        tiny.COGVIDEOX, use_learned_positional_embeddings=True, sample_width=1024, sample_height=1024, sample_frames=13
    ),
    "cogvideox text": with_changes(tiny.COGVIDEOX, max_text_seq_length=1 << 13, text_embed_dim=1 << 13),
}


def plan_costs(names: tuple[str, ...], rows: Path) -> None:
    """Plan each config in this process, and write (name, bytes above the peak before, seconds of a processor) of each."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    plan(tiny.WAN)
    outline.forget_outlines()  # of what this process planned before
    gc.freeze()
    gc.enable()  # as in every process that was not forked
    gc.set_threshold(700, 10, 10)
    found = []
    for name in names:
        before, started = peak(), time.process_time()
        with contextlib.suppress(DvdquantError):
            plan(COSTLY[name])
        found.append([name, peak() - before, time.process_time() - started])
    rows.write_text(json.dumps(found))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("wan blocks", "cogvideox learned"), id="some"),
        pytest.param(tuple(COSTLY), id="all", marks=pytest.mark.stress),
    ],
)
def test_a_dry_run_costs_little_whatever_the_config_says(names: tuple[str, ...], tmp_path: Path) -> None:
    """Each under 300 MB above what a small model takes, and seconds of a processor: 2 to 5, by which one it is.

    In a process of their own, which begins with what this one holds; what this one holds and does not use is given back.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    assert in_child(lambda: plan_costs(names, tmp_path / "rows.json")) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row[0] for row in rows] == list(names)
    for name, nbytes, seconds in rows:
        assert nbytes < 300 << 20, (name, nbytes)
        assert seconds < 10, (name, seconds)


def test_published_sizes_are_within_the_bounds() -> None:
    """From the configs of Wan2.1-14B, HunyuanVideo, CogVideoX-2B, 5B image to video and 1.5, LTX-Video."""
    wan = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096}
    get_family(
        with_changes(tiny.WAN, **wan, rope_max_seq_len=1024, image_dim=1280, added_kv_proj_dim=5120, in_channels=36)
    )
    get_family({"_class_name": "HunyuanVideoTransformer3DModel"})
    get_family({"_class_name": "LTXVideoTransformer3DModel"})
    cogvideox = {"_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 48, "num_layers": 42}
    get_family({"_class_name": "CogVideoXTransformer3DModel"})
    learned = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    get_family({**cogvideox, **learned, "in_channels": 32})
    sizes = {"sample_width": 300, "sample_height": 300, "sample_frames": 81, "patch_size_t": 2, "ofs_embed_dim": 512}
    get_family({**cogvideox, **sizes, "use_rotary_positional_embeddings": True, "patch_bias": False})


def test_repeated_blocks_are_planned_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block runs for all of its kind: with every block run, the plan is the same, whatever is kept of some."""
    recipe = get_recipe("w4a4").with_globs(("*blocks.1.attn*.to_k", "*blocks.0.ff*"), ())
    configs = [with_changes(CONFIGS[n], num_layers=3) for n in ("wan-i2v", "hunyuan-video", "cogvideox", "ltx-video")]
    fast = [plan_model(config, recipe, torch.bfloat16) for config in configs]
    monkeypatch.setattr(outline, "drop_repeated_blocks", lambda model: {})
    outline.forget_outlines()
    try:
        for config, made in zip(configs, fast):
            whole = plan_model(config, recipe, torch.bfloat16)
            assert made.layers == whole.layers
            assert dict(made.kept) == dict(whole.kept)
            assert made.kept_linears == whole.kept_linears
    finally:
        outline.forget_outlines()


# ------------------------------------------------------------------------------------------------------------- mutations

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 63, 64, 128, 255, 4096, 65536, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**300,
    0.0, -0.0, 0.5, 1e-300, 1e300, 2.0, "", "2", "gelu", "silu", "rms_norm", "x" * 5000, "\x1b]0;\u202e", "\ud800",
    [], [1], [1, 2, 2], [2, 2, 2], [1, 2, 2, 2], [[1]], [None] * 3, [16, 24, 24], ["1"] * 3, [10**30] * 3, [64, 64, 64],
    {}, {"a": {"b": [1]}},
]  # fmt: skip


def mutate(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """One to three fields of the class set to something, scaled, left out, or swapped."""
    config = with_changes(config)
    fields = [name for name in get_family(config).config if not name.startswith("_")]
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(fields)
        kind = chance.randrange(6)
        old = config.get(name)
        if kind == 0:
            config.pop(name, None)
        elif kind == 1 and isinstance(old, int) and not isinstance(old, bool):
            config[name] = chance.choice([old + 1, old * 2, old // 2, -old, old * 1000, old + 2, old * 10**20])
        elif kind == 2 and isinstance(old, list):
            config[name] = chance.choice([old[:-1], old * 2, old[::-1], [*old[:-1], chance.choice(VALUES)]])
        elif kind == 3:
            config[name] = config.get(chance.choice(fields))
        elif kind == 4:
            config[chance.choice([name.upper(), "_" + name, name + " "])] = chance.choice(VALUES)
        else:
            config[name] = chance.choice(VALUES)
    return config


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", [50, pytest.param(16_000, marks=pytest.mark.stress)])
def test_mutated_configs_are_planned_or_refused(count: int, tmp_path: Path) -> None:
    """Never another class of error, never seconds, never memory; with the checkpoint they are meant for, as in a dry run."""
    opened = {n: open_checkpoint(tiny.write_checkpoint(tmp_path / n, config)) for n, config in CONFIGS.items()}
    chance = random.Random(count)
    recipes = [get_recipe(name) for name in RECIPES]
    options = ExportOptions("model", tmp_path / "out", recipes[0])
    planned = longest = 0
    with Costs("config.json, planned") as costs:
        for index in range(count):
            name = chance.choice(list(CONFIGS))
            config = mutate(CONFIGS[name], chance)
            # Some without the checkpoint, as an export is opened: its own weights are looked at later.
            checkpoint = opened[name] if chance.random() < 0.95 else None
            try:
                with costs.case():
                    made = plan_model(config, chance.choice(recipes), torch.bfloat16, checkpoint)
                    planned += 1
                    resolve_sizes(made.family, options)
                    json.dumps(estimate_export([made], [], options, 0, 0).to_json(), allow_nan=False)
            except DvdquantError as error:
                longest = max(longest, len(str(error)))
            except Exception as error:
                raise AssertionError(f"mutation {index} of {name}: {config!r:.2000}") from error
    assert 0 < planned < count
    assert longest < 3000


def test_the_command_says_which_field(tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "model", tiny.HUNYUAN)
    changes: list[tuple[dict[str, Any], str]] = [*HOSTILE["hunyuan-video"][:3], ({"mlp_ratio": 3.0}, "ff.net")]
    for change, named in changes:
        (source / "config.json").write_text(json.dumps(with_changes(tiny.HUNYUAN, **change)))
        refused(run(source, "-o", tmp_path / "out", "--dry-run", *SIZES), named)
