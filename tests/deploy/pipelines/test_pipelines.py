"""DvdqTransformer inside the real diffusers pipelines of every family, against diffusers' own transformer with the same
4-bit weights.

On the PyTorch backend the two are the same arithmetic and agree to the bit. ONNX Runtime rounds elsewhere, and 4-bit codes
flip at ties, so its distance from the float64 model is compared with that of the 16-bit PyTorch model: at most
twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dvdquant.errors import CheckpointError
from tests.support import tiny_pipelines as tiny
from tests.support.tiny_pipelines import Exported, Judge, arguments, build_pipeline, relative

FACTOR, ATOL = 2.0, 1e-6
UNBATCHED = ("wan", "wan-ti2v", "wan-i2v", "hunyuan-video")  # guidance by two calls; the others batch the two branches
FAST = ("wan", "hunyuan-video", "cogvideox", "ltx-video")
STRESS = [pytest.param(kind, 4, marks=pytest.mark.stress) for kind in FAST[2:]]
OTHERS = ("wan-ti2v", "wan-i2v", "cogvideox-2b", "cogvideox-1.5")
SLOW = [
    (kind, 8) if kind in ("wan-ti2v", "wan-i2v") else pytest.param(kind, 8, marks=pytest.mark.stress) for kind in OTHERS
]

Export = Callable[..., Exported]


@pytest.fixture(scope="module")
def export() -> Export:
    return lambda kind, **options: tiny.exported(kind, **options)


# ------------------------------------------------------------------------------------------- same numbers as diffusers


@pytest.mark.parametrize(
    ("kind", "bits"), [*((kind, 8) for kind in FAST), *((kind, 4) for kind in FAST[:2]), *STRESS, *SLOW]
)
def test_every_step_is_as_exact_as_pytorch(export: Export, kind: str, bits: int) -> None:
    """Every call of a whole request on ONNX Runtime, judged on the very arguments the pipeline passed; and the latents
    after every step, which carry the errors of all steps before."""
    made = export(kind)
    transformer = made.open(mode=f"a{bits}")
    calls = tiny.record_calls(transformer)
    latents = tiny.latents_of_steps(build_pipeline(kind, transformer), **arguments(kind))
    reference = made.reference(bits)
    judge = Judge(reference)
    assert len(calls) == 3 * (2 if kind.startswith("wan") else 1)
    for call in calls:
        with torch.no_grad():
            (exact,), (same_dtype,) = judge(**call.arguments), reference(**call.arguments)
        assert call.sample.shape == same_dtype.shape
        assert call.sample.dtype == same_dtype.dtype == torch.bfloat16
        assert relative(call.sample, exact) <= FACTOR * relative(same_dtype, exact) + ATOL
    exact_steps = tiny.latents_of_steps(build_pipeline(kind, judge), **arguments(kind))
    same_dtype_steps = tiny.latents_of_steps(build_pipeline(kind, reference), **arguments(kind))
    for ours, exact, same_dtype in zip(latents, exact_steps, same_dtype_steps, strict=True):
        assert ours.dtype == same_dtype.dtype
        assert relative(ours, exact) <= FACTOR * relative(same_dtype, exact) + ATOL
    assert [(r.bits, r.step) for r in transformer.trace if r.branch.partition("/")[0] != "uncond"] == [
        (bits, step) for step in range(3) for _ in range(1 if kind.startswith(("wan", "hun")) else 2)
    ]


@pytest.mark.parametrize("kind", [*FAST, "wan-i2v"])
def test_frames_equal_those_of_pytorch(export: Export, kind: str) -> None:
    """From the prompt to the decoded frames, with negative prompt, on the PyTorch backend."""
    made = export(kind)
    more: dict[str, Any] = {"output_type": "np"}
    if kind != "wan-i2v":
        more["negative_prompt"] = "snow"
    if kind == "hunyuan-video":
        more["true_cfg_scale"] = 3.0
    transformer = made.open("pytorch", mode="a8")
    frames = build_pipeline(kind, transformer)(**arguments(kind, **more)).frames
    expected = build_pipeline(kind, made.reference(8))(**arguments(kind, **more)).frames
    assert frames.shape == expected.shape
    assert np.isfinite(frames).all()
    assert frames.std() > 0
    if kind in UNBATCHED:
        np.testing.assert_array_equal(frames, expected)
        assert {r.branch for r in transformer.trace} == {"cond", "uncond"}
    else:
        # A matrix product over two samples may sum in another order than one over each.
        exact = build_pipeline(kind, Judge(made.reference(8)))(**arguments(kind, **more)).frames
        bound = FACTOR * np.linalg.norm(expected - exact) + ATOL * np.linalg.norm(exact)
        assert np.linalg.norm(frames - exact) <= bound


@pytest.mark.parametrize("kind", FAST)
def test_a_switched_run_is_the_reference_at_the_bits_of_its_trace(export: Export, kind: str) -> None:
    """δ between the changes of the steps, so that both engines run; each output is that of the engine in the trace."""
    made = export(kind)
    # Batched guidance, split into two calls, is compared per slice; so guidance stays off here.
    more: dict[str, Any] = {"guidance_scale": 1.0}
    probe = made.open("pytorch", mode="a8")
    build_pipeline(kind, probe)(**arguments(kind, steps=6, **more))
    changes = sorted(r.change for r in probe.trace if r.change is not None)
    transformer = made.open("pytorch", delta=1.05 * changes[1])
    calls = tiny.record_calls(transformer)
    build_pipeline(kind, transformer)(**arguments(kind, steps=6, **more))
    trace = transformer.trace
    assert [r.step for r in trace] == list(range(6))
    assert trace[0].reason == "no history"
    assert {r.bits for r in trace} == {4, 8}
    reference = made.reference(8)
    for record, call in zip(trace, calls, strict=True):
        made.use(reference, record.bits)
        with torch.no_grad():
            assert torch.equal(reference(**call.arguments)[0], call.sample)


def test_no_rounding_of_timesteps(export: Export) -> None:
    """Fractional timesteps reach the graph exactly; HunyuanVideo's pipeline rounds them itself, and that is kept."""
    seen: dict[str, list[float]] = {}
    for kind in ("ltx-video", "hunyuan-video"):
        transformer = export(kind).open(mode="a8")
        calls = tiny.record_calls(transformer)
        pipe = build_pipeline(kind, transformer)
        pipe(**arguments(kind))
        passed = [float(call.arguments["timestep"][0]) for call in calls]
        seen[kind] = [r.timestep for r in transformer.trace]
        assert sorted(set(seen[kind])) == sorted(set(passed))
        exact = [float(t) for t in pipe.scheduler.timesteps]
        assert any(t != round(t) for t in exact)
        assert (passed == exact) == (kind == "ltx-video")


# ------------------------------------------------------------------------------------------------ batches and guidance


@pytest.mark.parametrize("kind", ["wan", "ltx-video"])
def test_a_larger_batch_is_split(export: Export, kind: str) -> None:
    """Two prompts, two videos each, through an export of batch 1: every slice on the same engine, results as if whole."""
    made = export(kind)
    more: dict[str, Any] = {"prompt": ["a cat sits", "the dog runs in snow"], "num_videos_per_prompt": 2}
    transformer = made.open(delta=0.5)
    calls = tiny.record_calls(transformer)
    result = build_pipeline(kind, transformer)(**arguments(kind, steps=2, **more)).frames
    assert result.shape[0] == 4
    assert not torch.equal(result[0], result[2])
    batch = 8 if kind == "ltx-video" else 4  # LTX batches the branch without a prompt too
    branches = ["cond_uncond"] if kind == "ltx-video" else ["cond", "uncond"]
    assert [r.branch for r in transformer.trace] == 2 * [f"{b}/{i}" for b in branches for i in range(batch)]
    for step in range(2):
        assert len({r.bits for r in transformer.trace if r.step == step}) == 1
    bits = [next(r.bits for r in transformer.trace if r.step == step) for step in range(2)]
    reference = made.reference(8)
    judge = Judge(reference)
    for index, call in enumerate(calls):
        made.use(reference, bits[index // len(branches)])
        made.use(judge.exact, bits[index // len(branches)])
        with torch.no_grad():
            (exact,), (same_dtype,) = judge(**call.arguments), reference(**call.arguments)
        assert call.sample.shape == exact.shape
        assert relative(call.sample, exact) <= FACTOR * relative(same_dtype, exact) + ATOL


def test_a_batch_that_does_not_fill_the_engine(export: Export) -> None:
    """Three videos through an export of batch 2: the last call repeats its sample and gives one back."""
    two, one = export("wan", batch=2, graphs=False), export("wan")
    more: dict[str, Any] = {"num_videos_per_prompt": 3, "guidance_scale": 1.0, "steps": 2}
    filled = two.open("pytorch", mode="a8")
    result = build_pipeline("wan", filled)(**arguments("wan", **more)).frames
    assert [r.branch for r in filled.trace] == ["cond/0", "cond/1"] * 2
    single = build_pipeline("wan", one.open("pytorch", mode="a8"))(**arguments("wan", **more)).frames
    judge = build_pipeline("wan", Judge(one.reference(8)))(**arguments("wan", **more)).frames
    assert result.shape == single.shape
    assert relative(result, judge) <= FACTOR * relative(single, judge) + ATOL


@pytest.mark.parametrize("kind", FAST)
def test_without_guidance_there_is_one_branch(export: Export, kind: str) -> None:
    transformer = export(kind).open(mode="a4")
    build_pipeline(kind, transformer)(**arguments(kind, steps=2, guidance_scale=1.0))
    branch = "cond" if kind in UNBATCHED else "cond_uncond"
    assert [(r.branch, r.bits) for r in transformer.trace] == [(branch, 4)] * 2


# ------------------------------------------------------------------------------------------- two transformers, images


@pytest.fixture(scope="module")
def wan22(export: Export) -> Exported:
    return export("wan")


def test_wan22_switches_between_two_exports(wan22: Exported) -> None:
    """Each transformer has its own controller; the history of the second begins at its first step."""
    first, second = (wan22.open("pytorch", component=name, delta=1e9, last_high=0) for name in wan22.plans)
    calls = {0: tiny.record_calls(first), 1: tiny.record_calls(second)}
    pipe = build_pipeline("wan", first, transformer_2=second, boundary_ratio=0.8)
    for _ in range(2):  # the second request begins anew in both
        pipe(**arguments("wan", steps=5, guidance_scale_2=2.0))
        steps = [sorted({r.step for r in t.trace}) for t in (first, second)]
        assert steps[0] + steps[1] == list(range(5))
        assert len(steps[0]) >= 2
        assert len(steps[1]) >= 2
        for transformer, own in zip((first, second), steps):
            decided = [(r.bits, r.reason) for r in transformer.trace if r.branch == "cond"]
            assert decided[0] == (8, "no history")
            assert all(bits == 4 for bits, _ in decided[2:])
            assert [r.step for r in transformer.trace] == [step for step in own for _ in range(2)]
    references = [wan22.reference(8, name) for name in wan22.plans]
    for index, (transformer, name) in enumerate(zip((first, second), wan22.plans)):
        last = calls[index][-len(transformer.trace) :]
        for record, call in zip(transformer.trace, last, strict=True):
            wan22.use(references[index], record.bits, name)
            with torch.no_grad():
                assert torch.equal(references[index](**call.arguments)[0], call.sample)
    assert not torch.equal(references[0].patch_embedding.weight, references[1].patch_embedding.weight)


def test_wan22_after_an_exception_in_the_second_stage(wan22: Exported) -> None:
    """Nothing reports that request's end, and the next one calls transformer_2 at the very step where the other ended."""
    first, second = (wan22.open("pytorch", component=name, delta=1e9, last_high=0) for name in wan22.plans)
    pipe = build_pipeline("wan", first, transformer_2=second, boundary_ratio=0.8)
    boundary = None

    def stop(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal boundary
        if second.trace:
            boundary = step
            raise RuntimeError("stopped")
        return values

    with pytest.raises(RuntimeError, match="stopped"):
        pipe(**arguments("wan", steps=5), callback_on_step_end=stop)
    assert boundary is not None
    pipe(**arguments("wan", steps=5))
    assert [r.step for r in first.trace] == [step for step in range(boundary) for _ in range(2)]
    assert [r.step for r in second.trace] == [step for step in range(boundary, 5) for _ in range(2)]
    assert second.trace[0].reason == "no history"
    assert second.trace[0].change is None


# -------------------------------------------------------------------------------------------------- loading a pipeline


def test_pipeline_from_pretrained(export: Export, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder with its 16-bit transformer, loaded with ours in its place."""
    import diffusers

    made = export("wan")
    original = diffusers.WanTransformer3DModel.from_pretrained(made.source / "transformer")
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    build_pipeline("wan", original).save_pretrained(folder)
    transformer = made.open(mode="a8")
    pipe = diffusers.WanPipeline.from_pretrained(folder, transformer=transformer, torch_dtype=torch.bfloat16)
    assert pipe.transformer is transformer
    assert pipe.text_encoder.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(**arguments("wan", steps=2, output_type="np")).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    assert np.isfinite(frames).all()
    assert [r.step for r in transformer.trace] == [0, 0, 1, 1]


def test_a_scheduler_that_fails_later_is_refused_before_anything_is_loaded(
    export: Export, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the generator that the commands use, in a pipeline's folder."""
    import diffusers

    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation import in_pipeline as pipeline_generate
    from dvdquant.deploy.generation import session_options
    from dvdquant.deploy.generation.generate import open_generator
    from dvdquant.deploy.generation.request import GenerateRequest

    def loads(*_args: Any, **_options: Any) -> None:
        raise AssertionError("something was loaded")

    made = export("wan")
    original = diffusers.WanTransformer3DModel.from_pretrained(made.source / "transformer")
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    build_pipeline("wan", original).save_pretrained(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    good = json.loads(path.read_text())
    monkeypatch.setattr(session_options, "open_session", loads)
    monkeypatch.setattr(pipeline_generate, "load_original", loads)
    for change, text in (
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"use_dynamic_shifting": True}, "mu"),
        ({"flow_shift": 1e-30}, "timesteps"),
    ):
        path.write_text(json.dumps({**good, **change}))
        for mode in ("a8", "16"):
            with (
                pytest.raises(CheckpointError, match=text) as caught,
                open_generator(Artifact.open(made.out), pipeline=folder) as generator,
            ):
                generator.prepare(GenerateRequest("a red cat", steps=3, mode=mode))
            assert "scheduler_config.json" in caught.value.what
    path.write_text(json.dumps(good))
    with open_generator(Artifact.open(made.out), pipeline=folder) as generator:
        assert generator.check(GenerateRequest("a red cat", steps=3, mode="a8")).steps == 3
