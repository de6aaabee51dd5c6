"""Sessions that take what comes before a layer into its kernel: all families, what is recognised, and when it is left alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import compiled, fusion, open_session, pytorch
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import UnsupportedError
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.quantized_model import make_weights, prepare_layers, set_activation
from dvdquant.ops.attention import ladder, operation
from dvdquant.ops.attention.libraries import REFERENCE
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.prepared_linear import handle_of, packed_linear, prepared_linear
from dvdquant.ops.repack import LayerShape
from tests.support import session_exports as made
from tests.support.commands import refused
from tests.support.lora_files import low_rank, write_peft
from tests.support.running import PROMPT, call, decode, drawn, run, short_wan_export

sys.path[:0] = [str(Path(__file__).parents[3] / "kernels" / folder) for folder in ("", "bench", "check")]

from host_library import HostLibrary  # noqa: E402

# How many layers of a traced block are fused, of each class of blocks.
FAMILIES = {"wan": {4}, "ltx-video": {3}, "cogvideox": {1}, "hunyuan-video": {0, 6}}


@pytest.fixture(autouse=True)
def _traced_anew() -> None:
    torch._dynamo.reset()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> CudaKernels:
    """The kernels' double, which every session takes for the device's kernels."""
    kernels = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: kernels)
    return kernels


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were fused, graph by graph."""
    found: list[int] = []
    fuse = fusion.fuse_graph
    monkeypatch.setattr(fusion, "fuse_graph", lambda graph: found.append(fuse(graph)) or found[-1])
    return found


def as_near(fused: Tensor, apart: Tensor, exact: Tensor) -> bool:
    """Whether the outputs are those of the same operations: as near to float64 as without, and no farther from each other."""
    error = made.relative(apart, exact)
    return made.relative(fused, exact) <= 1.2 * error + 1e-4 and made.relative(fused, apart) <= 1.5 * error + 1e-4


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("wan", "expanded"),
        pytest.param("ltx-video", "expanded", marks=pytest.mark.slow),
        pytest.param("wan", "packed", marks=pytest.mark.slow),
        pytest.param("ltx-video", "packed", marks=pytest.mark.stress),
        pytest.param("hunyuan-video", "expanded", marks=pytest.mark.slow),
        pytest.param("cogvideox", "expanded", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("double")
def test_a_fused_session_computes_the_same(name: str, weights: Any, counts: list[int]) -> None:
    """As near to the exact model as the operations apart, at both bit-widths, and at two sizes of a range."""
    artifact = Artifact.open(made.weights_export(name, ranges=name != "ltx-video"))
    small, usual = (artifact.family().sample(artifact.sizes, artifact.dtype, which=which) for which in ("min", "opt"))
    cases = [(8, usual), (4, usual), *([(8, small)] if artifact.sizes.dynamic else [])]
    with PyTorchSession(artifact, weights=weights) as session:
        assert not session.fused
        apart = [session.run(inputs, bits) for bits, inputs in cases]
    with PyTorchSession(artifact, weights=weights, fuse=True) as session:
        assert session.fused
        fused = [session.run(inputs, bits) for bits, inputs in cases]
    assert set(counts) == FAMILIES[name], counts
    for (bits, inputs), one, other in zip(cases, fused, apart):
        assert as_near(one, other, made.reference(artifact, "transformer", bits, inputs)[1]), bits


@pytest.mark.parametrize("name", ["wan", pytest.param("ltx-video", marks=pytest.mark.slow)])
def test_both_branches_of_guidance_in_one_batch(name: str, double: CudaKernels, counts: list[int]) -> None:
    """Every sample has its own modulation; a graph for one size."""
    artifact = Artifact.open(made.weights_export(name))
    plan, family = artifact.plan("transformer"), artifact.family()
    samples = [family.sample(artifact.sizes, artifact.dtype, seed) for seed in (1, 2)]
    # What is said of the sizes is the same for both.
    inputs = {
        key: torch.cat([one, two]) if one.ndim else one
        for (key, one), two in zip(samples[0].items(), samples[1].values())
    }
    model = made.quantized_model(artifact, "transformer", 8)
    prepare_layers(model, double, [plan.recipe.activation(8)], artifact.dtype, torch.device("cpu"))
    set_activation(model, plan.recipe.activation(8))
    make_weights(model)
    with torch.inference_mode():
        apart = GraphWrapper(model, family)(inputs)
        compiled.compile_blocks(model, dynamic=False, fuse=True, compile=False)
        fused = GraphWrapper(model, family)(inputs)
    assert set(counts) == FAMILIES[name]
    assert not torch.equal(fused[0], fused[1])
    assert as_near(fused, apart, made.reference(artifact, "transformer", 8, inputs)[1])


@pytest.mark.usefixtures("double")
def test_a_layer_with_a_lora_beside_it_is_left_alone(counts: list[int], tmp_path: Path) -> None:
    """Its branch reads what the layer reads. Without the LoRA again, it is fused again."""
    artifact = Artifact.open(made.weights_export("wan", ranges=False))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    changes = low_rank(artifact.root.parent / "model", ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2"])
    lora = LoraSpec(write_peft(tmp_path / "lora.safetensors", changes), 0.5, "transformer")
    with PyTorchSession(artifact, bits=[8]) as session:
        plain = session.run(inputs, 8)
        session.set_loras([lora])
        apart = session.run(inputs, 8)
    with PyTorchSession(artifact, bits=[8], fuse=True) as session:
        without = session.run(inputs, 8)
        counts.clear()
        session.set_loras([lora])
        fused = session.run(inputs, 8)
        assert 2 in counts  # of the first block: one by a norm, one by GELU less
        session.set_loras([])
        assert torch.equal(session.run(inputs, 8), without)
    change = made.relative(apart, plain)
    assert change > 0.1
    assert made.relative(fused, apart) < 0.1 * change


class Broken(HostLibrary):
    """A kernel that forgets the addend."""

    def prologue(self, layer: Any, prologue: Any, x: int, m: int) -> torch.Tensor:
        return super().prologue(layer, type(prologue)(**{**vars(prologue), "addend": 0}), x, m)


def test_a_wrong_kernel_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    artifact = Artifact.open(made.weights_export("wan"))
    for library, why in ((Broken(), "differ from those of its definition"), (None, "no kernels for this device")):
        kernels = None if library is None else CudaKernels(library, 90)  # type: ignore[arg-type]
        monkeypatch.setattr(pytorch, "usable_kernels", lambda device, kernels=kernels: kernels)
        with PyTorchSession(artifact, bits=[8], fuse=True) as session:
            assert not session.fused
        assert why in caplog.text


class WrongAt(HostLibrary):
    """Kernels of which one is wrong: of a form of weights, at a width of activations."""

    def __init__(self, form: str, bits: int) -> None:
        super().__init__()
        self.form, self.bits = form, bits

    def fused_linear(
        self, layer: Any, sm: int, prologue: Any, x: int, prepared: int, y: int, m: int, *rest: Any
    ) -> None:
        super().fused_linear(layer, sm, prologue, x, prepared, y, self._tokens("expanded", layer, m), *rest)

    def packed_fused_linear(
        self, layer: Any, sm: int, prologue: Any, x: int, weight: Any, rows: int, y: int, m: int, *rest: Any
    ) -> None:
        super().packed_fused_linear(layer, sm, prologue, x, weight, rows, y, self._tokens("packed", layer, m), *rest)

    def _tokens(self, form: str, layer: Any, m: int) -> int:
        """The last token is left out, as by a wrong bound of a loop."""
        return m - 1 if (form, layer.act_bits) == (self.form, self.bits) else m


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["packed", "expanded"])
def test_the_self_test_runs_what_the_session_will(
    form: str, bits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each width that was asked for, and weights as they are held; a kernel that no step calls is no matter."""
    artifact = Artifact.open(made.weights_export("wan", ranges=False))
    kernels = CudaKernels(WrongAt(form, bits), 90)  # type: ignore[arg-type]
    allocate = kernels.allocate
    monkeypatch.setattr(kernels, "allocate", lambda *given: allocate(*given).zero_())
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: kernels)
    for widths in ([4], [8], [4, 8]):
        for weights in ("packed", "expanded"):
            caplog.clear()
            with PyTorchSession(artifact, bits=widths, fuse=True, weights=weights) as session:  # type: ignore[arg-type]
                right = bits not in widths or weights != form
                assert session.fused is right, (widths, weights)
            assert (f"(a{bits}, {form}) differs from one that is not" in caplog.text) is not right


@pytest.mark.usefixtures("double")
def test_it_is_on_where_the_session_compiles() -> None:
    artifact = Artifact.open(made.weights_export("wan"))
    for options, fused in (({}, False), ({"compile": True}, True), ({"compile": True, "fuse": False}, False)):
        with PyTorchSession(artifact, bits=[8], **options) as session:
            assert session.fused is fused


WIDTH = 64


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """As diffusers' norms in fp32."""
    return torch.nn.functional.layer_norm(x.float(), (WIDTH,), weight, bias, 1e-6).type_as(x)


ROW, SAMPLE, TOKEN = (torch.linspace(-1, 2, n * WIDTH).reshape(*shape, WIDTH) for n, shape in
                      ((1, ()), (2, (2, 1)), (12, (2, 6))))  # fmt: skip


def in_place(x: Tensor, y: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    z = norm(x := x.clone())
    x += y
    return layer(z) + x


# What comes before a layer, x and y [2, 6, K] and the layer -> what the block gives; and whether the layer is fused.
BLOCKS: dict[str, tuple[Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Any], bool]] = {
    "norm": (lambda x, y, layer: layer(norm(x)), True),
    "a modulation of all tokens": (lambda x, y, layer: layer(norm(x) * ROW + ROW), True),
    "a modulation of each sample": (lambda x, y, layer: layer((norm(x) * (1 + SAMPLE) + SAMPLE).to(x.dtype)), True),
    "a modulation of each token": (lambda x, y, layer: layer((norm(x) * (1 + TOKEN) + TOKEN).to(x.dtype)), True),
    "a weight, and an addend of each sample": (lambda x, y, layer: layer((norm(x, ROW) + SAMPLE).to(x.dtype)), True),
    "a weight and a bias, modulated": (
        lambda x, y, layer: layer((norm(x, ROW, -ROW) * SAMPLE + TOKEN[:, :1]).to(x.dtype)),
        True,
    ),
    "a multiplier alone": (lambda x, y, layer: layer((norm(x) * SAMPLE).to(x.dtype)), True),
    "a sum that is needed later": (lambda x, y, layer: (layer(norm(h := x + layer(y))), h), True),
    "a gated sum": (
        lambda x, y, layer: (layer(norm(h := (x.float() + layer(y) * SAMPLE).type_as(x))), h.float() * 2),
        True,
    ),
    "a sum that is needed before": (lambda x, y, layer: layer(norm(h := x + layer(y)) * h.mean()), False),
    "GELU by tanh": (lambda x, y, layer: layer(torch.nn.functional.gelu(x, approximate="tanh")), True),
    "another GELU": (lambda x, y, layer: layer(torch.nn.functional.gelu(x)), False),
    "a norm that others read": (lambda x, y, layer: (layer(z := norm(x)), z), False),
    "a change in place in between": (in_place, False),
    "rounded to another dtype": (lambda x, y, layer: layer(norm(x).to(torch.float16).to(x.dtype)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_recognised(name: str, double: CudaKernels) -> None:
    """Of one layer behind every kind of operations: fused or not, it computes the same."""
    block, fuses = BLOCKS[name]
    shape = LayerShape(WIDTH, WIDTH, block=WIDTH, act_bits=8)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 6, WIDTH, generator=generator).to(torch.bfloat16)
    codes = torch.randint(-128, 128, (WIDTH, WIDTH // 2), dtype=torch.int8, generator=generator)
    ones = torch.ones(WIDTH)
    packed = (codes, 0.01 * ones, torch.ones(WIDTH, 1, dtype=torch.uint8), 0 * ones, 0 * ones)
    rest = (torch.ones(1, 1), double.prepare(shape, packed), None, handle_of(double), WIDTH, 1, False, WIDTH, 8, 0)
    found: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(fusion.fuse_graph(graph))
        return graph.forward

    with torch.inference_mode():
        apart = block(x, y, lambda z: prepared_linear(z.to(torch.bfloat16), *rest))
        run = torch.compile(
            lambda a, b: block(a, b, lambda z: prepared_linear(z.to(torch.bfloat16), *rest)),
            backend=backend,
            fullgraph=True,
        )
        fused = run(x, y)
    assert found == [1 if fuses else 0]
    for one, other in zip(*((value if isinstance(value, tuple) else (value,)) for value in (fused, apart))):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert made.relative(one, other) < 0.01


@pytest.mark.parametrize(("sm", "bits"), [(89, 4), (89, 8), (90, 4)])
def test_packed_layers_are_fused_on_every_path(sm: int, bits: int) -> None:
    """Those too that a path of 4 bits multiplies as they are (SM 8.x), with the outputs of the operations apart."""
    kernels = CudaKernels(HostLibrary(), sm)  # type: ignore[arg-type]
    shape = LayerShape(WIDTH, WIDTH, block=WIDTH, act_bits=bits)
    assert (kernels.plan(shape).codes == "s4") == (sm == 89 and bits == 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, WIDTH, generator=generator).to(torch.bfloat16)
    codes = torch.randint(-128, 128, (WIDTH, WIDTH // 2), dtype=torch.int8, generator=generator)
    ones = torch.ones(WIDTH)
    held = kernels.make_rows(shape, (codes, 0.01 * ones, torch.ones(WIDTH, 1, dtype=torch.uint8), 0 * ones, 0 * ones))
    rest = (torch.ones(1, 1), *held, None, handle_of(kernels), 1, False, WIDTH, bits, 0)

    def block(x: Tensor) -> Tensor:
        return packed_linear(torch.nn.functional.gelu(x, approximate="tanh"), *rest)

    found: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(fusion.fuse_graph(graph))
        return graph.forward

    with torch.inference_mode():
        fused, apart = torch.compile(block, backend=backend, fullgraph=True)(x), block(x)
    assert found == [1]
    assert made.relative(fused, apart) < 0.01


def test_where_it_does_not_apply() -> None:
    artifact = Artifact.open(made.weights_export("wan"))
    with pytest.raises(UnsupportedError, match="does not take fuse"):
        open_session(artifact, backend="onnxruntime", device="cpu", fuse=True)
    out = short_wan_export()
    refused(run(*call(out, "--prompt", PROMPT, "--fuse", "-o", "clip.mp4")), "--fuse runs in PyTorch")
    refused(run(out, "--prompt", PROMPT, "--fuse", "--mode", "16", "-o", "clip.mp4"), "--fuse", "leave one")


@pytest.mark.parametrize(
    ("name", "attentions", "kinds_of"),
    [
        ("wan", 1, ("fp8", "int8")),
        pytest.param("ltx-video", 1, ("fp8",), marks=pytest.mark.slow),
        pytest.param("hunyuan-video", 2, ("fp8",), marks=pytest.mark.slow),  # a double and a single block
        pytest.param("cogvideox", 1, ("fp8",), marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("double")
def test_q_and_k_come_to_8_bit_attention_by_one_kernel(
    name: str, attentions: int, kinds_of: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norm, rope, rotation and codes of q and k, from the second call on; before, and for int8, in 16 bit."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    found: list[int] = []
    fuse = fusion.fuse_attention
    monkeypatch.setattr(fusion, "fuse_attention", lambda *given: found.append(fuse(*given)) or found[-1])
    kinds: list[torch.dtype] = []
    rope = operation.run_rope_quantize
    monkeypatch.setattr(
        operation, "run_rope_quantize", lambda *given: kinds.append((made := rope(*given)).dtype) or made
    )
    artifact = Artifact.open(made.weights_export(name, ranges=False))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    with PyTorchSession(artifact, bits=[8]) as session:
        sixteen = session.run(inputs, 8)
    for kind in kinds_of:
        options = {"bits": [8], "attention": kind, "attention_backend": "reference"}
        with PyTorchSession(artifact, **options) as session:
            apart = session.run(inputs, 8)
        torch._dynamo.reset()
        with PyTorchSession(artifact, **options, fuse=True) as session:
            session.run(inputs, 8)
            kinds.clear()
            fused = session.run(inputs, 8)
        codes = torch.float8_e4m3fn if kind == "fp8" else torch.bfloat16
        assert set(kinds) == {codes}
        # Rounded less often than apart, and as far from attention in 16 bit.
        distance = made.relative(apart, sixteen)
        assert 0.5 * distance < made.relative(fused, sixteen) < 1.3 * distance
    assert sum(found) == attentions * len(kinds_of)


@pytest.mark.usefixtures("double")
def test_a_library_that_refuses_codes_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passed its self-test in 16 bit; what it refuses at the second call goes on in 16 bit, with operands of that kind."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    seen: list[torch.dtype] = []
    definition = REFERENCE["fp8"].load()

    def kernel(q: Tensor, *rest: Any) -> Tensor:
        seen.append(q.dtype)
        if q.dtype == torch.float8_e4m3fn:
            raise RuntimeError("no kernel for these codes")
        return definition(q, *rest)

    artifact = Artifact.open(made.weights_export("wan", ranges=False))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    options = {"bits": [8], "attention": "fp8", "attention_backend": "reference", "fuse": True}
    outputs = []
    for load in (None, lambda: kernel):
        torch._dynamo.reset()
        with PyTorchSession(artifact, **options) as session:
            assert session.attention is not None
            session.attention.rungs = () if load is None else (replace(REFERENCE["fp8"], load=load),)
            outputs.append([session.run(inputs, 8) for _ in range(3)])
            assert session.attention.choice == "16"
    sixteen, fallen = outputs
    assert made.relative(fallen[0], sixteen[0]) > 1e-4
    assert torch.equal(fallen[1], sixteen[1])
    assert torch.equal(fallen[2], sixteen[1])
    assert seen.count(torch.float8_e4m3fn) == 1


@pytest.mark.usefixtures("double")
def test_fusing_goes_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    artifact = Artifact.open(made.weights_export("wan", ranges=False))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    outputs = []
    for compile in (False, True):
        torch._dynamo.reset()
        with PyTorchSession(artifact, bits=[8], fuse=True, compile=compile) as session:
            outputs.append(session.run(inputs, 8))
    assert torch.equal(*outputs)


@pytest.mark.stress
@pytest.mark.usefixtures("double")
def test_inductors_code_around_fused_layers_computes_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler that users get, here its C++ for the CPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    artifact = Artifact.open(made.weights_export("wan"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    exact = made.reference(artifact, "transformer", 8, inputs)[1]
    with PyTorchSession(artifact, bits=[8]) as session:
        apart = made.relative(session.run(inputs, 8), exact)
    with PyTorchSession(artifact, bits=[8], compile=True) as session:
        assert session.fused
        assert made.relative(session.run(inputs, 8), exact) <= 1.5 * apart


@pytest.mark.stress
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("policy", ["forecast", "line"])
def test_a_step_cache_skips_the_same_steps(policy: str, tmp_path: Path) -> None:
    """Of a session that fuses, whose outputs differ by their rounding: the same decisions, and nearly the same clip."""
    clips, frames = [], []
    for option in ("--no-fuse", "--fuse"):
        torch._dynamo.reset()
        clip, trace = tmp_path / f"clip{option}.mp4", tmp_path / f"trace{option}.json"
        cache = ("--prompt", PROMPT, "--steps", 16, "--cache", 0.1, "--cache-policy", policy, "--backend", "pytorch")
        drawn(*call(short_wan_export(), *cache, option, "-o", clip, "--trace", trace))
        (found,) = json.loads(trace.read_text())["clips"]
        clips.append(found)
        frames.append(decode(clip).astype(float))
    apart, fused = clips
    assert (apart["executed"]["fused"], fused["executed"]["fused"]) == (False, True)
    assert 0 < apart["summary"]["skipped"] < apart["summary"]["calls"]
    assert apart["blocks"] == fused["blocks"]
    assert abs(frames[0] - frames[1]).mean() < 2
