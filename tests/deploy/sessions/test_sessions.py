"""Sessions on the CPU: every family on PyTorch and ONNX Runtime against float64, shared weights, refused inputs, closing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.deploy import sessions
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.pipelines.transformer import DvdqTransformer
from dvdquant.deploy.sessions import EngineSession, open_session
from dvdquant.deploy.sessions import pytorch as pytorch_module
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.pytorch import PyTorchSession, bits_advice
from dvdquant.deploy.timing.bench import bench
from dvdquant.errors import DvdquantError, EngineError, ShapeError, UnsupportedError
from dvdquant.export.verify.graph import ATOL, FACTOR
from dvdquant.model.families import Sizes
from dvdquant.model.layers import QuantLinear
from dvdquant.onnx.runtime_options import runtime_options
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.recipe import get_recipe
from tests.support import session_exports as made
from tests.support.exporting import REPOSITORY
from tests.support.kernel_layers import double
from tests.support.running import short_wan_export

CASES = [("wan", "fp16"), ("wan", "bf16"), ("hunyuan-video", "bf16"), ("cogvideox", "bf16"), ("ltx-video", "bf16")]
MARKS = {case: [pytest.mark.stress] for case in CASES} | {CASES[0]: [pytest.mark.slow], CASES[1]: []}


def sample(artifact: Artifact, which: str = "opt", seed: int = 0) -> dict[str, Tensor]:
    return artifact.family().sample(artifact.sizes, artifact.dtype, seed, which)


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize(
    # The steps of the others in a pipeline are judged as strictly (test_pipelines.py), and their graphs by the exporter.
    ("name", "dtype"),
    [pytest.param(*case, id="-".join(case), marks=MARKS[case]) for case in CASES],
)
def test_every_family_on_both_backends(name: str, dtype: str) -> None:
    """At three sizes where there are ranges: in bf16."""
    artifact = Artifact.open(made.family_export(name, dtype))
    with (
        PyTorchSession(artifact) as pytorch,
        OnnxRuntimeSession(artifact) as packed,
        OnnxRuntimeSession(artifact, weights="expanded") as expanded,
    ):
        for which, seed, widths in (("opt", 0, (4, 8, 4)), ("max", 1, (4,)), ("min", 2, (8,))):
            inputs = sample(artifact, which, seed)
            references = {bits: made.reference(artifact, "transformer", bits, inputs) for bits in set(widths)}
            for bits in widths:
                same, exact = references[bits]
                bound = FACTOR * made.relative(same, exact) + ATOL
                got = pytorch.run(inputs, bits)
                # The very same operators on the very same bytes.
                assert torch.equal(got, same)
                for session in (packed, expanded):
                    y = session.run(inputs, bits)
                    assert (y.dtype, y.shape, y.device.type) == (artifact.dtype, same.shape, "cpu")
                    error = made.relative(y, exact)
                    assert error <= bound, (which, bits, session.weights, error, bound)


def test_two_transformers_have_their_own_weights() -> None:
    artifact = Artifact.open(made.engine_export())
    inputs = sample(artifact)
    outputs = {}
    for component in artifact.components:
        same, exact = made.reference(artifact, component, 8, inputs)
        with open_session(artifact, component, backend="onnxruntime", device="cpu", bits=[8]) as session:
            outputs[component] = session.run(inputs, 8)
        assert made.relative(outputs[component], exact) <= FACTOR * made.relative(same, exact) + ATOL
    assert made.relative(outputs["transformer_2"], outputs["transformer"]) > 0.1


@pytest.fixture(params=["onnxruntime", "pytorch"])
def session(request: pytest.FixtureRequest) -> Iterator[EngineSession]:
    artifact = Artifact.open(made.family_export("wan"))
    with open_session(artifact, backend=request.param, device="cpu") as opened:
        assert opened.backend == request.param
        yield opened


def test_outputs_are_the_callers_own(session: EngineSession) -> None:
    """A later run, a change in place and closing leave what was returned before alone; inputs are not written to."""
    first_inputs, second_inputs = (sample(session.artifact, seed=seed) for seed in (0, 1))
    before = {name: tensor.clone() for name, tensor in first_inputs.items()}
    first = session.run(first_inputs, 4)
    kept = first.clone()
    second = session.run(second_inputs, 4)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    again = session.run(first_inputs, 4)
    assert torch.equal(again, kept)
    assert all(torch.equal(before[name], first_inputs[name]) for name in before)
    again.add_(1)  # schedulers do
    assert torch.equal(session.run(first_inputs, 4), kept)
    session.close()
    assert torch.equal(first, kept)


def test_dtypes_and_strides_are_taken_care_of(session: EngineSession) -> None:
    inputs = sample(session.artifact)
    wanted = session.run(inputs, 8)
    other = {n: t.double() if t.is_floating_point() else t.int() for n, t in inputs.items()}
    latents = other["hidden_states"]
    other["hidden_states"] = latents.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not other["hidden_states"].is_contiguous()
    assert torch.equal(session.run(other, 8), wanted)


def test_threads_take_turns(session: EngineSession) -> None:
    inputs = sample(session.artifact)
    wanted = {bits: session.run(inputs, bits) for bits in (4, 8)}
    wrong: list[int] = []

    def work(bits: int) -> None:
        for _ in range(5):
            if not torch.equal(session.run(inputs, bits), wanted[bits]):
                wrong.append(bits)

    threads = [threading.Thread(target=work, args=(bits,)) for bits in (4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not torch.equal(wanted[4], wanted[8])


# --------------------------------------------------------------------------------------------------------- bad inputs


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda inputs: inputs.__delitem__(name)


def _with(name: str, change: Callable[[Tensor], object]) -> Callable[[dict[str, Tensor]], None]:
    return lambda inputs: inputs.__setitem__(name, change(inputs[name]))  # type: ignore[arg-type]


def _latent(*shape: int) -> Callable[[dict[str, Tensor]], None]:
    return _with("hidden_states", lambda x: torch.zeros(shape, dtype=x.dtype))


# what is done to the inputs, and texts of the message
BAD_INPUTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], list[str]]] = {
    "missing": (_without("timestep"), ["lack timestep", "encoder_hidden_states"]),
    "unknown": (lambda i: i.update(guidance=torch.ones(1)), ["unknown guidance", "hidden_states"]),
    "no tensor": (_with("timestep", lambda t: t.tolist()), ["timestep is a list", "torch.Tensor"]),
    "dtype": (_with("hidden_states", lambda x: x.long()), ["hidden_states is torch.int64", "bfloat16", "cast it"]),
    "rank": (_with("hidden_states", lambda x: x[0]), ["4 axes instead of 5", "[1, 4, frames, height, width]"]),
    "batch": (_latent(2, 4, 3, 8, 8), ["a batch of 2", "exported for 1", "--batch 2"]),
    "channels": (_latent(1, 16, 3, 8, 8), ["16 instead of 4 on axis 1"]),
    "text tokens": (
        _with("encoder_hidden_states", lambda x: x[:, :7]),
        ["7 text tokens", "exported for 12", "--text-tokens 7"],
    ),
    "too high": (
        _latent(1, 4, 3, 20, 8),
        ["height is 20 latents (160 pixels)", "height 4..12 latents (32..96 pixels)", "--height 32:160"],
    ),
    "too high and no multiple of the patch": (
        _latent(1, 4, 3, 15, 8),
        ["height is 15 latents (120 pixels)", "--height 32:128"],
    ),
    "too few frames": (
        _latent(1, 4, 1, 8, 8),
        ["frames is 1 latents (1 frames)", "frames 2..4 latents (5..13 frames)", "--num-frames 1:13"],
    ),
    "no multiple of the patch": (
        _latent(1, 4, 3, 8, 7),
        ["width is 7 latents (56 pixels)", "patch size 2", "6 latents (48 pixels), 8 latents (64 pixels)"],
    ),
}


@pytest.fixture(scope="module", params=["onnxruntime", "pytorch"])
def lasting(request: pytest.FixtureRequest) -> Iterator[EngineSession]:
    """A session that is refused many inputs, one after the other."""
    with open_session(Artifact.open(made.family_export("wan")), backend=request.param, device="cpu") as opened:
        yield opened


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_inputs_are_refused_in_words(kind: str, lasting: EngineSession) -> None:
    damage, texts = BAD_INPUTS[kind]
    inputs = sample(lasting.artifact)
    damage(inputs)
    with pytest.raises(ShapeError) as caught:
        lasting.run(inputs, 8)
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert caught.value.available
    # The session is as good as before.
    assert lasting.run(sample(lasting.artifact), 8).isfinite().all()


def test_bad_inputs_of_other_families() -> None:
    cog = Artifact.open(made.weights_export("cogvideox"))
    ltx = Artifact.open(made.weights_export("ltx-video"))
    with open_session(cog, device="cpu", backend="pytorch", bits=[8]) as session:
        inputs = sample(cog)
        inputs["rotary_cos"] = inputs["rotary_cos"][:-1]
        with pytest.raises(ShapeError, match=r"tokens is 48 in rotary_sin but 47 in rotary_cos"):
            session.run(inputs, 8)
        inputs["rotary_sin"] = inputs["rotary_sin"][:-1]
        with pytest.raises(ShapeError, match=r"rotary_cos has 47 tokens, the latents make 48"):
            session.run(inputs, 8)
    with open_session(ltx, device="cpu", backend="pytorch", bits=[8]) as session:
        inputs = sample(ltx)
        for name, axis in (("hidden_states", 1), ("timestep", 1), ("video_coords", 2)):
            inputs[name] = torch.cat([inputs[name]] * 4, axis)
        with pytest.raises(
            ShapeError, match=r"768 video tokens(?s:.)*48..480 tokens: frames 2..4 latents \(9..25 frames"
        ):
            session.run(inputs, 8)
        with pytest.raises(ShapeError, match=r"encoder_attention_mask is torch\.float32"):
            session.run(_floating_mask(ltx), 8)


def _floating_mask(artifact: Artifact) -> dict[str, Tensor]:
    inputs = sample(artifact)
    return {**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"].float()}


def test_bits_and_closing(session: EngineSession) -> None:
    inputs = sample(session.artifact)
    with pytest.raises(EngineError, match=r"no 6-bit activations\n  available: 4 bits, 8 bits\n  fix: "):
        session.run(inputs, 6)
    assert session.resident_bytes()["weights"] > 0
    session.close()
    session.close()
    assert session.resident_bytes() == {"weights": 0, "engines": 0, "workspace": 0}
    with pytest.raises(EngineError, match=f"the {session.backend} session of transformer is closed"):
        session.run(inputs, 8)


def test_what_open_session_refuses() -> None:
    artifact = Artifact.open(made.family_export("wan"))
    cases: list[tuple[dict[str, object], str]] = [
        ({"backend": "openvino"}, "unknown backend 'openvino'\n  available: auto, tensorrt_rtx"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "cuda:99"}, "there is no device cuda:99: PyTorch sees no CUDA device\n  available: cpu"),
        ({"bits": [6]}, "no graph of transformer with 6-bit activations\n  available: 4 bits, 8 bits"),
        ({"bits": []}, "no activation bits were asked for"),
        ({"component": "vae"}, "no component 'vae'\n  available: transformer, transformer_2"),
    ]
    for arguments, text in cases:
        with pytest.raises(DvdquantError) as caught:
            open_session(artifact, **arguments)  # type: ignore[arg-type]
        assert text in str(caught.value)
    with pytest.raises(UnsupportedError, match="weights is 'folded'"):
        OnnxRuntimeSession(artifact, weights="folded")  # type: ignore[arg-type]


def test_auto_says_why(caplog: pytest.LogCaptureFixture) -> None:
    artifact = Artifact.open(made.family_export("wan"))
    with caplog.at_level("INFO", "dvdquant.deploy.sessions"), open_session(artifact, device="cpu") as session:
        assert (session.backend, session.bits) == ("onnxruntime", (4, 8))
    assert "transformer on cpu: onnxruntime (no CUDA device)" in caplog.text


def test_what_runs_where_no_engine_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels where they are built, else whichever of ONNX Runtime and PyTorch reaches the GPU."""
    import onnxruntime

    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    class Library:
        def serves(self, sm: int) -> bool:
            return sm == 90

    for sm, found in ((90, "pytorch"), (75, "onnxruntime")):
        monkeypatch.setattr(sessions, "kernels_for", lambda device, sm=sm: CudaKernels(Library(), sm))  # type: ignore[arg-type]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        assert sessions.without_engine(gpu)[0] == found
    assert sessions.without_engine(gpu)[1] == ["the CUDA kernels are built for other GPUs"]
    assert sessions.without_engine(cpu) == ("onnxruntime", [])
    monkeypatch.setattr(sessions, "kernels_for", lambda device: None)
    for providers, name in ((["CUDAExecutionProvider", "CPUExecutionProvider"], "onnxruntime"), ([], "pytorch")):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda found=providers: found)
        chosen, reasons = sessions.without_engine(gpu)
        assert chosen == name
        assert "make kernels" in reasons[0]


def test_four_bits_are_advised_against_where_they_gain_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytorch_module.warn_once.cache_clear()  # a test before may have had such a GPU
    plain, grouped = get_recipe("w4a4"), get_recipe("w4a4-g64")
    assert bits_advice(89, plain) is None
    assert "save no time here" in str(bits_advice(120, grouped))
    assert "take longer here" in str(bits_advice(90, grouped))
    artifact = Artifact.open(made.family_export("wan"))
    monkeypatch.setattr(pytorch_module, "usable_kernels", lambda device: double(90))
    with PyTorchSession(artifact) as session:
        session.run(sample(artifact), 8)
        assert "4-bit" not in caplog.text
        for _ in range(2):
            session.run(sample(artifact), 4)
    assert caplog.text.count("SM 9.0 has no 4-bit integer tensor cores") == 1


def test_onnxruntime_without_its_cuda_provider_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    artifact = Artifact.open(made.family_export("wan"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="no CUDA provider here") as caught:
        OnnxRuntimeSession(artifact, device=torch.device("cuda"))
    assert "onnxruntime-gpu" in str(caught.value)


def test_an_onnxruntime_that_is_too_old_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.delattr(onnxruntime.OrtValue, "__dlpack__")
    with pytest.raises(UnsupportedError, match="does not hand its outputs") as caught:
        OnnxRuntimeSession(Artifact.open(made.family_export("wan")))
    assert onnxruntime.__version__ in caught.value.what
    assert "pip install 'onnxruntime-gpu>=1.26'" in str(caught.value.fix)


def test_a_failing_backend_is_an_engine_error(session: EngineSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's own exception is the cause, and the session goes on."""
    import onnxruntime

    cause = RuntimeError("device fell off")

    def fail(*_: object) -> Tensor:
        raise cause

    called = {"onnxruntime": (onnxruntime.InferenceSession, "run_with_iobinding"), "pytorch": (QuantLinear, "forward")}
    with monkeypatch.context() as patched:
        patched.setattr(*called[session.backend], fail)
        with pytest.raises(EngineError, match="failed in transformer a4: device fell off") as caught:
            session.run(sample(session.artifact), 4)
        assert caught.value.__cause__ is cause
        cause = torch.OutOfMemoryError("16 GiB")
        with pytest.raises(EngineError, match="out of device memory") as caught:
            session.run(sample(session.artifact), 4)
        assert "smaller size" in str(caught.value.fix)
        for error in (RuntimeError("Failed to allocate memory for requested buffer of size 8"), MemoryError()):
            cause = error
            with pytest.raises(EngineError, match="ran out of memory") as caught:
                session.run(sample(session.artifact), 4)
            assert "smaller size" in str(caught.value.fix)
    assert session.run(sample(session.artifact), 4).isfinite().all()


def test_onnxruntime_is_set_up_in_one_place() -> None:
    """Sessions and checks run the same graphs by the same options: no fusion drops a cast, no arena keeps the scratch."""
    import onnxruntime

    options = runtime_options(3)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (3, False)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    files = [path for room in ("dvdquant", "deploy", "export") for path in (REPOSITORY / room).rglob("*.py")]
    assert [path.name for path in files if "onnxruntime.SessionOptions()" in path.read_text()] == ["runtime_options.py"]


def test_onnxruntimes_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of another size, past the check: ONNX Runtime's message comes through."""
    artifact = Artifact.open(made.family_export("wan"))
    with OnnxRuntimeSession(artifact, bits=[8]) as session:
        monkeypatch.setattr(session, "check_inputs", lambda inputs: None)
        inputs = sample(artifact)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :7]
        with pytest.raises(EngineError, match=r"onnxruntime failed in transformer a8: .*encoder_hidden_states"):
            session.run(inputs, 8)


def test_sessions_run_from_a_read_only_folder(tmp_path: Path) -> None:
    """Nothing is written beside an export, and no file of it is held by name."""
    out = made.copy_of(made.family_export("wan"), tmp_path / "out")
    listing = sorted(p.relative_to(out) for p in out.rglob("*"))
    for path in [*out.rglob("*"), out]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    artifact = Artifact.open(out)
    inputs = sample(artifact)
    try:
        with OnnxRuntimeSession(artifact, bits=[8]) as session:
            wanted = session.run(inputs, 8)
            assert sorted(p.relative_to(out) for p in out.rglob("*")) == listing
            for path in [*out.rglob("*"), out]:
                path.chmod(0o755 if path.is_dir() else 0o644)
            # A new export renames its files into place: the session goes on with those it opened.
            (out / "onnx/transformer.safetensors").unlink()
            (out / "onnx/transformer.safetensors").write_bytes(b"another export")
            assert torch.equal(session.run(inputs, 8), wanted)
    finally:
        for path in [out, *out.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_batches_and_fixed_sizes_in_words() -> None:
    """The words of a fixed profile."""
    artifact = Artifact.open(made.family_export("wan"))
    from dvdquant.deploy.sessions.inputs import check_inputs
    from dvdquant.model.families import Axis

    sizes = Sizes(Axis.fixed(3), Axis.fixed(8), Axis.fixed(8), 12)
    inputs = artifact.family().sample(Sizes(Axis.fixed(3), Axis.fixed(10), Axis.fixed(8), 12), torch.bfloat16)
    with pytest.raises(ShapeError) as caught:
        check_inputs(artifact.family(), sizes, inputs)
    assert "height 8 latents (64 pixels)" in str(caught.value)
    assert "--height 64:80" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
def test_on_a_gpu(backend: str) -> None:
    if backend == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("needs ONNX Runtime's CUDA provider: pip install onnxruntime-gpu")
    artifact = Artifact.open(made.family_export("wan"))
    inputs = sample(artifact)
    with open_session(artifact, backend=backend, device="cuda") as session:
        for bits in (4, 8):
            same, exact = made.reference(artifact, "transformer", bits, inputs)
            y = session.run(inputs, bits)
            assert y.device.type == "cuda"
            assert made.relative(y.cpu(), exact) <= FACTOR * made.relative(same, exact) + ATOL
        assert session.resident_bytes()["weights"] > 0


# ------------------------------------------------------------------------------------------------------------- plugins


class Asked(Exception):
    """A TensorRT session was asked for, with these plugin libraries."""


@pytest.fixture
def engines_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of TensorRT sessions, which need TensorRT and a GPU."""

    def session(*_: Any, plugins: Any, **options: Any) -> None:
        assert options["backend"] == "tensorrt"
        raise Asked(plugins)

    monkeypatch.setattr("dvdquant.deploy.sessions.engines.TensorRTSession", session)


def _open_pipeline_transformer(out: Path, **options: Any) -> None:
    DvdqTransformer.from_pretrained(out, **options)


def _open_session(out: Path, **options: Any) -> None:
    open_session(Artifact.open(out), **options)


def _bench(out: Path, **options: Any) -> None:
    bench(Artifact.open(out), **options)


def _draw(out: Path, **options: Any) -> None:
    with open_generator(Artifact.open(out), **options) as generator:
        generator.generate(GenerateRequest("circle red right small black", steps=3))


@pytest.mark.parametrize("opens", [_open_session, _open_pipeline_transformer, _bench, _draw])
def test_plugins_reach_the_engines(opens: Callable[..., None], engines_double: None, tmp_path: Path) -> None:
    out = short_wan_export()
    one, two = tmp_path / "one.so", tmp_path / "two.so"
    one.touch()
    two.touch()
    here = {"backend": "tensorrt", "device": "cpu"}
    for given, wanted in ((one, (one,)), (str(one), (one,)), ([str(one), two], (one, two)), ((), ())):
        with pytest.raises(Asked) as caught:
            opens(out, plugins=given, **here)
        assert caught.value.args[0] == wanted
    with pytest.raises(UnsupportedError, match=r"three\.so is not there") as missing:
        opens(out, plugins=[one, tmp_path / "three.so"], **here)
    assert missing.value.fix
    for wrong in (3, None, [None], "", [b"x"]):
        with pytest.raises(UnsupportedError, match="plugins holds"):
            opens(out, plugins=wrong, **here)
    for backend in ("pytorch", "onnxruntime", "rtx"):
        with pytest.raises(UnsupportedError, match=f"for TensorRT engines, and backend is {backend}"):
            opens(out, plugins=one, **{**here, "backend": backend})
