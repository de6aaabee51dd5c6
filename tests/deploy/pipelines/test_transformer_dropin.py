"""DvdqTransformer by itself: what a pipeline reads of it, what it refuses, and the adapters of all families."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.deploy.pipelines.adapters import ADAPTERS, LTXVideoAdapter, get_adapter
from dvdquant.deploy.pipelines.unsupported import REFUSED
from dvdquant.deploy.switching.defaults import DEFAULT_DELTA, LAST_HIGH, WEIGHTINGS
from dvdquant.errors import EngineError, OutputError, ShapeError, UnsupportedError
from dvdquant.model.families import FAMILIES, Axis, Family, Sizes, get_family
from dvdquant.model.plan import build_skeleton
from tests.support import tiny_models
from tests.support import tiny_pipelines as tiny
from tests.support.tiny_pipelines import Exported, arguments, build_pipeline, relative

DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def wan() -> Exported:
    return tiny.exported("wan")


@pytest.fixture
def transformer(wan: Exported) -> Any:
    return wan.open("pytorch")


def family(config: dict[str, Any], **changes: Any) -> Family:
    """As an artifact makes it: with diffusers' defaults for what the config leaves out."""
    model: Any = build_skeleton({**config, **changes}, DTYPE)
    return get_family({**model.config, **config, **changes})


# ------------------------------------------------------------------------------------------------ what pipelines read


def test_face(transformer: Any, wan: Exported) -> None:
    import diffusers

    assert isinstance(transformer, diffusers.ModelMixin)
    assert transformer.dtype == DTYPE
    assert transformer.device == torch.device("cpu")
    assert not transformer.training
    own = diffusers.WanTransformer3DModel.load_config(wan.source / "transformer")
    for name, value in own.items():
        assert transformer.config[name] == value, name
    assert transformer.config.patch_size == [1, 2, 2]
    assert transformer.config.in_channels == 4
    assert transformer.state_dict()["placement"].numel() == 0
    assert transformer.num_parameters() == 0
    assert transformer.get_memory_footprint() == sum(transformer.session.resident_bytes().values()) > 10_000
    for text in ("WanTransformer3DModel", "a4 and a8", "pytorch", "cpu"):
        assert text in repr(transformer)


def test_a_config_that_says_where_it_was_loaded_from(wan: Exported) -> None:
    """diffusers writes that into the config.json of a model it saves."""
    from dvdquant.deploy.pipelines.transformer import DvdqTransformer

    opened: Any = wan.open("pytorch")
    session = opened.session
    session.family.config = {**session.family.config, "_name_or_path": "somebody/elses"}
    again = DvdqTransformer(session, opened.runner.controller)
    assert again.config["_name_or_path"] == str(session.artifact.root)
    assert again.config["patch_size"] == [1, 2, 2]


@pytest.mark.parametrize("kind", ["cogvideox", "ltx-video", "hunyuan-video"])
def test_config_has_diffusers_defaults(kind: str) -> None:
    """Pipelines read keys that a config.json may lack."""
    made = tiny.exported(kind)
    opened = made.open()
    reference: Any = made.reference(8)
    for name, value in reference.config.items():
        if not name.startswith("_"):
            assert opened.config[name] == value, name
            assert getattr(opened.config, name) == value


def test_both_kinds_of_result(transformer: Any) -> None:
    inputs = transformer.session.family.sample(transformer.session.sizes, DTYPE)
    (as_tuple,) = transformer(**inputs, return_dict=False)
    transformer.begin_request()
    result = transformer(**inputs)
    assert torch.equal(result.sample, as_tuple)
    transformer.begin_request()
    positional = transformer(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    assert torch.equal(positional.sample, as_tuple)
    transformer.begin_request()
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    assert torch.equal(transformer(**wide).sample, as_tuple)  # cast to the export's dtype
    with pytest.raises(TypeError, match="no_such"):
        transformer(**inputs, no_such=1)


def test_import_is_lazy() -> None:
    """The package brings neither PyTorch nor diffusers; tests/test_import_graph.py has it that none brings ONNX Runtime."""
    code = (
        "import sys, dvdquant, dvdquant.deploy; assert not {'torch', 'diffusers', 'onnxruntime'} & set(sys.modules);"
        "assert 'DvdqTransformer' in dir(dvdquant)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    import dvdquant
    from dvdquant import deploy

    assert dvdquant.DvdqTransformer is deploy.DvdqTransformer
    assert deploy.DvdqTransformer.__module__ == "dvdquant.deploy.pipelines.transformer"
    with pytest.raises(AttributeError, match="Nothing"):
        deploy.Nothing  # noqa: B018


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_method(transformer: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name) as caught:
        getattr(transformer, name)("anything", key=1)
    assert caught.value.fix
    assert name in caught.value.what


def test_refuses_diffusers_own_entry_points(transformer: Any, tmp_path: Path) -> None:
    """The same through the pipeline and with diffusers' real configurations."""
    import diffusers

    pipe = build_pipeline("wan", transformer)
    caches = [
        diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2),
        diffusers.FasterCacheConfig(),
        diffusers.FirstBlockCacheConfig(threshold=0.1),
    ]
    for config in caches:
        with pytest.raises(UnsupportedError, match="enable_cache") as caught:
            pipe.transformer.enable_cache(config)
        assert "cache=" in str(caught.value.fix)
    pipe.transformer.disable_cache()
    with pytest.raises(UnsupportedError, match="save_pretrained") as caught:
        pipe.save_pretrained(tmp_path / "saved")
    assert "transformer=DvdqTransformer" in str(caught.value.fix)
    assert not (tmp_path / "saved" / "transformer").exists()
    with pytest.raises(UnsupportedError, match="attention_kwargs") as caught:
        pipe(**arguments("wan", attention_kwargs={"scale": 0.5}))
    assert "LoRA" in str(caught.value.fix)
    pipe(**arguments("wan", steps=1, attention_kwargs={}))


def test_refuses_hooks_given_as_functions(transformer: Any) -> None:
    """diffusers.hooks.apply_…: by their own names, and nothing is left behind."""
    from diffusers import hooks

    at: dict[str, Any] = {"current_timestep_callback": lambda: 500}
    calls: dict[str, Callable[[], Any]] = {
        "apply_first_block_cache": lambda: hooks.apply_first_block_cache(
            transformer, hooks.FirstBlockCacheConfig(threshold=0.1)
        ),
        "apply_faster_cache": lambda: hooks.apply_faster_cache(transformer, hooks.FasterCacheConfig(**at)),
        "apply_pyramid_attention_broadcast": lambda: hooks.apply_pyramid_attention_broadcast(
            transformer, hooks.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **at)
        ),
        "apply_layerwise_casting": lambda: hooks.apply_layerwise_casting(transformer, torch.float16, DTYPE),
        "apply_group_offloading": lambda: hooks.apply_group_offloading(transformer, "cpu", num_blocks_per_group=1),
        "apply_layer_skip": lambda: hooks.apply_layer_skip(transformer, hooks.LayerSkipConfig(indices=[0])),
    }
    for name, options in (
        ("MagCache", {"num_inference_steps": 3, "calibrate": True}),
        ("TaylorSeerCache", {}),
        ("SeaCache", {}),
        ("TextKVCache", {}),
    ):
        function = {"MagCache": "mag", "TaylorSeerCache": "taylorseer", "SeaCache": "sea", "TextKVCache": "text_kv"}[
            name
        ]
        apply, config = getattr(hooks, f"apply_{function}_cache", None), getattr(hooks, f"{name}Config", None)
        if apply is not None and config is not None:  # later than the oldest diffusers that is supported
            calls[apply.__name__] = lambda apply=apply, config=config, options=options: apply(  # type: ignore[misc]
                transformer, config(**options)
            )
    for name, call in calls.items():
        with pytest.raises(UnsupportedError, match=name) as caught:
            call()
        assert caught.value.fix
    with pytest.raises(UnsupportedError, match="group_offloading"):
        hooks.apply_group_offloading(transformer, "cpu", offload_type="leaf_level")
    with pytest.raises(UnsupportedError, match="layerwise_casting"):
        hooks.apply_layerwise_casting(transformer, torch.float16, DTYPE, skip_modules_pattern=None)
    with pytest.raises(UnsupportedError, match="hook"):
        hooks.HookRegistry.check_if_exists_or_initialize(transformer)
    assert not hasattr(transformer, "_diffusers_hook")
    assert list(transformer.named_children()) == []
    assert [name for name, _ in transformer.named_modules()] == [""]
    build_pipeline("wan", transformer)(**arguments("wan", steps=1))


def test_state_that_is_loaded_or_pickled(transformer: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="load_state_dict") as caught:
        transformer.load_state_dict({"blocks.0.weight": torch.zeros(2)}, strict=False)
    assert "export it" in str(caught.value.fix)
    with pytest.raises(UnsupportedError, match="load_state_dict"):
        transformer.load_state_dict({}, strict=False)
    assert transformer.load_state_dict(transformer.state_dict()).missing_keys == []
    for thing in (transformer, build_pipeline("wan", transformer)):
        with pytest.raises(UnsupportedError, match="pickle") as caught:
            pickle.dumps(thing)
        assert "from_pretrained(OUT)" in str(caught.value.fix)
    with pytest.raises(UnsupportedError, match="pickle"):
        torch.save(transformer, tmp_path / "saved.pt")


def test_from_pipe_keeps_it(transformer: Any) -> None:
    """Every part in its own dtype where none is given; another dtype is refused as by .to(), and casts nothing."""
    import diffusers

    pipe = build_pipeline("wan", transformer)
    assert pipe.vae.dtype == torch.float32  # as the model cards load it: Wan's VAE loses detail in bf16
    for options in ({}, {"transformer": transformer}):
        made = diffusers.WanPipeline.from_pipe(pipe, **options)
        assert type(made) is diffusers.WanPipeline
        assert made.transformer is transformer
        assert made.vae is pipe.vae
        assert [made.text_encoder.dtype, made.vae.dtype] == [DTYPE, torch.float32]
    video = diffusers.WanVideoToVideoPipeline.from_pipe(pipe)
    assert video.transformer is transformer
    assert video.vae.dtype == torch.float32
    with pytest.raises(UnsupportedError, match="float32"):
        diffusers.WanPipeline.from_pipe(pipe, dtype=torch.float32)
    assert [pipe.text_encoder.dtype, pipe.vae.dtype] == [DTYPE, torch.float32]
    with pytest.raises(UnsupportedError, match="custom_pipeline"):
        diffusers.WanPipeline.from_pipe(pipe, custom_pipeline="anything")
    made.set_progress_bar_config(disable=True)
    expected = build_pipeline("wan", transformer)(**arguments("wan", steps=2)).frames
    assert torch.equal(made(**arguments("wan", steps=2)).frames, expected)
    made.to(torch.bfloat16)  # it can be cast afterwards
    assert pipe.vae.dtype == DTYPE
    pipe = build_pipeline("wan", transformer)
    for options in ({"torch_dtype": DTYPE}, {"dtype": DTYPE}):
        assert diffusers.WanPipeline.from_pipe(pipe, **options).vae.dtype == DTYPE


def test_from_pipe_of_others_is_as_before(wan: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the very arguments, whatever they are, and a process without an exported transformer has it untouched."""
    import diffusers

    pipe = build_pipeline("wan", wan.reference(8))
    made = diffusers.WanPipeline.from_pipe(pipe)
    assert made.transformer is pipe.transformer
    assert made.text_encoder.dtype == torch.float32
    for arguments_of in ((), (None,), ("a",)):
        with pytest.raises((TypeError, AttributeError)):
            diffusers.WanPipeline.from_pipe(*arguments_of)
    seen: list[Any] = []
    own = classmethod(lambda cls, *args, **kwargs: seen.append((cls, args, kwargs)))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pipe", own)
    before = diffusers.DiffusionPipeline.from_pipe.__func__
    wan.open("pytorch")
    assert diffusers.DiffusionPipeline.from_pipe.__func__ is not before
    diffusers.WanPipeline.from_pipe(pipe, variant=1)
    assert seen == [(diffusers.WanPipeline, (pipe,), {"variant": 1})]


@pytest.mark.slow
def test_a_compiled_caller_runs_the_engines_as_they_are(transformer: Any) -> None:
    pipe = build_pipeline("wan", transformer)
    expected = pipe(**arguments("wan", steps=2)).frames
    pipe.transformer = torch.compile(transformer)
    assert torch.equal(pipe(**arguments("wan", steps=2)).frames, expected)


def test_options_that_contradict_each_other(wan: Exported) -> None:
    """As dvdq-run refuses them, and before anything is opened."""
    plan = [8, 4, 4]
    rule = lambda info: 8  # noqa: E731
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "a8", "schedule": plan}, "schedule"),
        ({"mode": "a8", "delta": 0.1}, "delta"),
        ({"mode": "a4", "delta": 0.1}, "delta"),
        ({"mode": "a4", "delta": 0.0}, "delta"),
        ({"mode": "a8", "callback": rule}, "callback"),
        ({"mode": "a8", "last_high": 2}, "last_high"),
        ({"mode": "a8", "weighting": "step"}, "weighting"),
        ({"mode": "planned", "callback": rule}, "callback"),
        ({"mode": "callback", "schedule": plan}, "schedule"),
        ({"schedule": plan, "callback": rule}, "callback"),
        ({"schedule": plan, "delta": 0.1}, "delta"),
        ({"callback": rule, "delta": 0.1}, "delta"),
        ({"schedule": plan, "last_high": 0}, "last_high"),
        ({"schedule": plan, "cache": 0.1}, "cache"),
        ({"schedule": plan, "cache_policy": "easycache"}, "cache"),
    ]
    for options, text in cases:
        with pytest.raises(UnsupportedError, match=text) as caught:
            wan.open("pytorch", **options)
        assert caught.value.fix
    for options in (
        {"schedule": plan},
        {"mode": "planned", "schedule": plan},
        {"callback": rule},
        {"mode": "a8", "cache": 0.1},
        {"mode": "a8", "cache_policy": "magcache", "last_high": 3},
    ):
        wan.open("pytorch", **options)
    controller = wan.open("pytorch").runner.controller
    assert (controller.delta, controller.last_high, controller.weighting) == (DEFAULT_DELTA, LAST_HIGH, WEIGHTINGS[0])
    published = wan.open("pytorch", last_high=0, weighting="none").runner.controller
    assert (published.last_high, published.weighting) == (0, "none")


def test_options_of_diffusers_own_loading(wan: Exported) -> None:
    """The dtype under both of its names, and what an export cannot differ in."""
    for options in (
        {"dtype": DTYPE},
        {"torch_dtype": DTYPE},
        {"dtype": "bfloat16"},
        {"dtype": "auto"},
        {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": True},
    ):
        assert wan.open("pytorch", **options).dtype == DTYPE
    for options, text in (
        ({"dtype": torch.float16}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": {"default": DTYPE}}, "dtype"),
        ({"use_safetensors": False}, "use_safetensors"),
        ({"device_map": "cuda"}, "device_map"),
    ):
        with pytest.raises(UnsupportedError, match=text):
            wan.open("pytorch", **options)


def test_refuses_other_dtypes_and_devices(
    transformer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = build_pipeline("wan", transformer)
    changes: list[Callable[[], Any]] = [
        lambda: transformer.to(torch.float32),
        lambda: transformer.to("cpu", torch.float16),
        lambda: transformer.to(dtype=torch.float64),
        lambda: transformer.to(torch.zeros(1)),
        lambda: pipe.to(torch.float32),
        transformer.half,
        transformer.float,
        transformer.double,
    ]
    for change in changes:
        with pytest.raises(UnsupportedError, match="does not apply") as caught:
            change()
        assert "bfloat16" in str(caught.value)
        assert "--dtype" in str(caught.value.fix)
    for same in (transformer.to(DTYPE), transformer.bfloat16(), transformer.cpu(), transformer.to("cpu", DTYPE)):
        assert same is transformer
    for move in (lambda: transformer.to("cuda"), transformer.cuda, lambda: transformer.cuda(1)):
        with pytest.raises(UnsupportedError, match="opened on cpu") as caught:
            move()
        assert "device='cuda" in str(caught.value.fix)
    # As on a GPU: the CPU is where offloading moves things, another GPU is not where the engines are.
    monkeypatch.setattr(transformer.session, "device", torch.device("cuda:0"))
    with caplog.at_level(logging.INFO, "dvdquant.deploy.pipelines.fixed_place"):
        transformer.to("cpu").to("cuda").to("cuda:0").cpu()
    assert len([r for r in caplog.records if "stay on cuda:0" in r.getMessage()]) == 1
    with pytest.raises(UnsupportedError, match="cuda:1"):
        transformer.to("cuda:1")


def test_refuses_training(transformer: Any) -> None:
    with pytest.raises(UnsupportedError, match="training"):
        transformer.train()
    assert transformer.eval() is transformer
    inputs = transformer.session.family.sample(transformer.session.sizes, DTYPE)
    inputs["hidden_states"].requires_grad_()
    with pytest.raises(UnsupportedError, match="gradients"):
        transformer(**inputs)
    with torch.no_grad():
        transformer(**inputs)
    assert not transformer.is_gradient_checkpointing
    transformer.disable_gradient_checkpointing()


def test_refuses_what_the_export_lacks(wan: Exported, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"mode": "a6"}, UnsupportedError, "a6"),
        ({"mode": "fast"}, UnsupportedError, "fast"),
        ({"mode": "planned"}, UnsupportedError, "schedule"),
        ({"component": "transformer_3"}, OutputError, "transformer_3"),
        ({"subfolder": "vae"}, OutputError, "vae"),
        ({"torch_dtype": torch.float16}, UnsupportedError, "float16"),
        ({"backend": "openvino"}, UnsupportedError, "openvino"),
        ({"variant": "fp16"}, UnsupportedError, "variant"),
        ({"delta": -1.0}, UnsupportedError, "-1"),
    ]
    for options, error, text in cases:
        with pytest.raises(error, match=text):
            wan.open(**{"backend": "pytorch", **options})
    with pytest.raises(OutputError, match="no manifest"):
        type(wan.open("pytorch")).from_pretrained(tmp_path)
    opened = wan.open("pytorch", subfolder="transformer_2", torch_dtype=DTYPE)
    assert opened.session.component == "transformer_2"
    opened.close()
    with pytest.raises(EngineError, match=r"closed(?s:.*)fix: open the export anew.*DvdqTransformer\.from_pretrained"):
        opened(**opened.session.family.sample(opened.session.sizes, DTYPE))


@pytest.mark.parametrize("name", ["text", "height", "frames"])
def test_refuses_sizes_outside_the_profile(transformer: Any, name: str) -> None:
    """Through the pipeline, in its user's words."""
    pipe = build_pipeline("wan", transformer)
    more: dict[str, Any] = {"text": {"max_sequence_length": 20}, "height": {"height": 64}, "frames": {"num_frames": 9}}
    with pytest.raises(ShapeError) as caught:
        pipe(**arguments("wan", **more[name]))
    message = str(caught.value)
    expected = {
        "text": ("20 tokens", "takes 12", "max_sequence_length=12", "--text-tokens 20"),
        "height": ("height", "32", "64", "--height"),
        "frames": ("frames", "9 frames", "--num-frames"),
    }
    for text in expected[name]:
        assert text in message, message
    pipe(**arguments("wan", steps=1))


# --------------------------------------------------------------------------------------------------------- adapters


def test_every_family_has_an_adapter() -> None:
    assert set(ADAPTERS) == {known.name for known in FAMILIES}


def test_ltx_coordinates_are_diffusers_to_the_bit() -> None:
    """What the graph makes of them (the quotient by the base sizes) equals the grid of diffusers' own rope."""
    known = family(tiny.LTX)
    adapter = get_adapter(known, tiny_models.FIXED, DTYPE)
    assert isinstance(adapter, LTXVideoAdapter)
    rope: Any = build_skeleton(tiny.LTX, DTYPE).rope
    assert (rope.base_num_frames, rope.base_height, rope.base_width) == adapter.base
    latents = torch.zeros(2, 21 * 16 * 22, 8)
    for scale in ((8 / 25, 32, 32), (8 / 24, 32.0, 32.0), (0.123, 31.7, 28.3), None):
        grid = rope._prepare_video_coords(2, 21, 16, 22, scale, latents.device)
        coords = adapter.coordinates(latents, (21, 16, 22), scale)
        assert coords.shape == (2, 3, 21 * 16 * 22)
        ours = torch.stack([coords[:, i] / base for i, base in enumerate(adapter.base)], dim=-1)
        assert torch.equal(ours, grid)


def test_ltx_takes_ready_coordinates() -> None:
    adapter = get_adapter(family(tiny.LTX), tiny_models.FIXED, DTYPE)
    given: dict[str, Any] = adapter.family.sample(tiny_models.FIXED, DTYPE)
    coords = given["video_coords"].clone()
    assert torch.equal(adapter.inputs({**given, "num_frames": 3, "height": 8, "width": 8})["video_coords"], coords)
    del given["video_coords"]
    with pytest.raises(ShapeError, match="height"):
        adapter.inputs({**given, "num_frames": 3, "width": 8})
    with pytest.raises(ShapeError, match="encoder_attention_mask"):
        adapter.inputs({**given, "encoder_attention_mask": torch.zeros(1, 1, 12)})
    mask = adapter.inputs({**given, "num_frames": 3, "height": 8, "width": 8})["encoder_attention_mask"]
    assert mask.dtype == torch.int64


@pytest.mark.parametrize("last_frame", [False, True])
def test_wan_image_embeddings_follow_their_sample(last_frame: bool) -> None:
    """Image-to-video 2.1: one embedding a sample, or two that follow each other; a split keeps them together."""
    changes: dict[str, Any] = {"image_dim": 24, "added_kv_proj_dim": 128, "in_channels": 12}
    changes |= {"pos_embed_seq_len": 514} if last_frame else {}
    known = family(tiny_models.WAN, **changes)
    each = 2 if last_frame else 1
    adapter = get_adapter(known, tiny_models.FIXED, DTYPE)
    inputs = known.sample(Sizes(*(Axis.fixed(n) for n in (3, 8, 8)), text_tokens=12, batch=3), DTYPE)
    slices = list(adapter.slices(adapter.inputs(inputs)))
    assert [count for _, count in slices] == [1, 1, 1]
    for sample, (part, _) in enumerate(slices):
        image = inputs["encoder_hidden_states_image"][sample * each : (sample + 1) * each]
        assert torch.equal(part["encoder_hidden_states_image"], image)
        assert torch.equal(part["hidden_states"], inputs["hidden_states"][sample : sample + 1])
    with pytest.raises(ShapeError, match="encoder_hidden_states_image"):
        adapter.inputs({name: tensor for name, tensor in inputs.items() if not name.endswith("image")})
    with pytest.raises(UnsupportedError, match="encoder_hidden_states_image"):
        get_adapter(family(tiny_models.WAN), tiny_models.FIXED, DTYPE).inputs(inputs)


def test_timesteps() -> None:
    """Numbers, vectors and one per token, exact in fp32."""
    exact = 123.4567890123
    wan = get_adapter(family(tiny_models.WAN), tiny_models.FIXED, DTYPE)
    given: dict[str, Any] = wan.family.sample(tiny_models.FIXED, DTYPE)
    for value in (exact, torch.tensor(exact), torch.tensor([exact]), torch.tensor([exact], dtype=torch.float64)):
        timestep = wan.inputs({**given, "timestep": value})["timestep"]
        assert torch.equal(timestep, torch.tensor([exact]))
    assert torch.equal(wan.inputs({**given, "timestep": torch.tensor(999)})["timestep"], torch.tensor([999.0]))
    with pytest.raises(ShapeError, match="expand_timesteps=False"):
        wan.inputs({**given, "timestep": torch.full((1, 48), 500.0)})
    per_token = get_adapter(family(tiny.WAN_TI2V), tiny_models.FIXED, DTYPE)
    given = per_token.family.sample(tiny_models.FIXED, DTYPE)
    tokens = torch.arange(48.0)[None]
    assert torch.equal(per_token.inputs({**given, "timestep": tokens})["timestep"], tokens)
    same = per_token.inputs({**given, "timestep": torch.tensor([exact])})["timestep"]
    assert torch.equal(same, torch.full((1, 48), exact))


def test_guidance_is_dropped_only_where_the_model_ignores_it() -> None:
    distilled = get_adapter(family(tiny_models.HUNYUAN), tiny_models.FIXED, DTYPE)
    plain = get_adapter(family(tiny_models.HUNYUAN, guidance_embeds=False), tiny_models.FIXED, DTYPE)
    given: dict[str, Any] = distilled.family.sample(tiny_models.FIXED, DTYPE)
    given["guidance"] = torch.tensor([6000.0], dtype=DTYPE)  # the pipeline's: 6.0 · 1000 in its transformer's dtype
    taken = distilled.inputs(given)["guidance"]
    assert taken.dtype == torch.float32
    assert float(taken) == float(given["guidance"])
    assert "guidance" not in plain.inputs(given)
    with pytest.raises(ShapeError, match="guidance"):
        distilled.inputs({name: value for name, value in given.items() if name != "guidance"})


def test_cogvideox_rotary_tables() -> None:
    rotary = get_adapter(family(tiny_models.COGVIDEOX), tiny_models.FIXED, DTYPE)
    additive = get_adapter(family(tiny_models.COGVIDEOX_2B), tiny_models.FIXED, DTYPE)
    given: dict[str, Any] = rotary.family.sample(tiny_models.FIXED, DTYPE)
    tables: tuple[Tensor, Tensor] = (given.pop("rotary_cos"), given.pop("rotary_sin"))
    inputs = rotary.inputs({**given, "image_rotary_emb": tables})
    assert torch.equal(inputs["rotary_cos"], tables[0])
    assert torch.equal(inputs["rotary_sin"], tables[1])
    additive.inputs({**given, "image_rotary_emb": None})
    with pytest.raises(UnsupportedError, match="image_rotary_emb"):
        additive.inputs({**given, "image_rotary_emb": tables})
    with pytest.raises(ShapeError, match="rotary_cos"):
        rotary.inputs(given)
    with pytest.raises(UnsupportedError, match="timestep_cond"):
        rotary.inputs({**given, "image_rotary_emb": tables, "timestep_cond": torch.zeros(1)})


@pytest.mark.slow
def test_ti2v_with_one_timestep_for_all_tokens() -> None:
    """Called without expand_timesteps, the model's own arithmetic is per sample; the graph's, per token, agrees."""
    made = tiny.exported("wan-ti2v")
    plain: dict[str, Any] = {"expand_timesteps": False}
    ours = build_pipeline("wan-ti2v", made.open(mode="a8"), **plain)(**arguments("wan-ti2v", steps=2)).frames
    reference = made.reference(8)
    same = build_pipeline("wan-ti2v", reference, **plain)(**arguments("wan-ti2v", steps=2)).frames
    exact = build_pipeline("wan-ti2v", tiny.Judge(reference), **plain)(**arguments("wan-ti2v", steps=2)).frames
    assert relative(ours, exact) <= 2 * relative(same, exact) + 1e-6
