"""LoRAs in the inputs that an export reserves for them: graphs, engines, and the command, against PyTorch and float64."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy import DvdqTransformer
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import needs
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.generation.memory_plan import Loaded
from dvdquant.deploy.generation.original import load_original
from dvdquant.deploy.sessions import engine_choice, open_session
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.sessions.engines import TensorRTSession
from dvdquant.deploy.sessions.lora_inputs import LoraInputs
from dvdquant.deploy.sessions.lora_needs import lora_bytes, read_beside
from dvdquant.deploy.switching.controller import StepController
from dvdquant.errors import CheckpointError, EngineError, UnsupportedError
from dvdquant.export.verify.graph import ATOL, GRAPH_FACTOR, Verifier
from dvdquant.export.verify.reference import as_float64
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.lora_inputs import (
    install_lora_inputs,
    is_lora_input,
    lora_input_shapes,
    random_lora,
    reserved_bytes,
    step_flops,
)
from dvdquant.model.plan import layer_tokens
from dvdquant.model.quantized_model import set_activation
from tests.support import session_exports as made
from tests.support import tiny_pipelines
from tests.support.commands import in_process, refused
from tests.support.commands import run as export
from tests.support.engine_double import Library
from tests.support.folders import shared_folder
from tests.support.lora_files import RANK, Changes, blocks, low_rank, write_original, write_peft
from tests.support.running import drawn, run, wan_pipeline

RESERVED = 8
NORM, TABLE = "blocks.0.norm2.weight", "blocks.0.scale_shift_table"
BIAS = "blocks.0.attn1.to_v.bias"
SIZES = ("--latent", tiny_pipelines.KINDS["wan"].latent, "--text-tokens", str(tiny_pipelines.TOKENS))


@pytest.fixture(scope="module")
def model() -> Path:
    return wan_pipeline()[0].parent / "source" / "transformer"


@pytest.fixture(scope="module")
def artifact(model: Path) -> Artifact:
    """Graphs and TensorRT-RTX engines of the same weights as those of :func:`wan_pipeline`, verified."""

    def make(folder: Path) -> None:
        recipe = ["--recipe", "w4a4", "--target", "rtx", "--sm", "8.9", "--keep-graphs"]
        in_process(model, "-o", folder / "out", *recipe, *SIZES, "--lora-rank", RESERVED, "--verify")

    return Artifact.open(shared_folder("lora-inputs", make) / "out")


@pytest.fixture
def session(artifact: Artifact) -> Iterator[EngineSession]:
    with open_session(artifact, backend="onnxruntime", device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer of the blocks, and a bias, a norm and a table besides, in the authors' names."""
    stored = load_file(model / "diffusion_pytorch_model.safetensors")
    changes = low_rank(model, blocks(model), alpha=2.0)
    changes.added = {name: torch.randn(stored[name].shape) * 0.05 for name in (BIAS, NORM, TABLE)}
    names = {layer: layer for layer in changes.pairs}
    names |= {BIAS: "blocks.0.self_attn.v:diff_b", NORM: "blocks.0.norm3:diff", TABLE: "blocks.0:diff_m"}
    return write_original(tmp_path_factory.mktemp("lora") / "lora.safetensors", changes, names)


def inputs(session: EngineSession) -> dict[str, Tensor]:
    return session.family.sample(session.sizes, session.dtype, 0, "opt")


def exact(artifact: Artifact, spec: LoraSpec, bits: int, given: dict[str, Tensor]) -> Tensor:
    """The output of the quantized model with a LoRA, all of it in float64, the LoRA as the file holds it."""
    held = made.quantized_model(artifact, "transformer", bits)
    found = LoraInputs(artifact, "transformer").values([spec], lambda name: held.get_parameter(name))
    plan = artifact.plan()
    wide = as_float64(held)
    zeros = {name: torch.zeros(shape) for name, shape in lora_input_shapes(plan.layers, plan.lora_rank).items()}
    install_lora_inputs(wide, plan.lora_rank, torch.float64, {n: found.get(n, z).double() for n, z in zeros.items()})
    for name in found.keys() - zeros.keys():
        wide.get_parameter(name).data = found[name].double()
    set_activation(wide, plan.recipe.activation(bits))
    with torch.no_grad():
        result: Tensor = GraphWrapper(wide, plan.family)(
            {name: t.double() if t.dtype == plan.dtype else t for name, t in given.items()}
        )
    return result


def test_without_a_lora_graphs_give_what_they_gave_bit_by_bit(artifact: Artifact, session: EngineSession) -> None:
    """The packed weights, and the outputs of both bit-widths, beside the export that reserves nothing."""
    plain = Artifact.open(wan_pipeline()[0])
    for name in plain.weight_files("transformer"):
        if name.endswith(".safetensors"):
            assert plain.manifest.files[name]["sha256"] == artifact.manifest.files[name]["sha256"]
    with open_session(plain, backend="onnxruntime", device="cpu") as without:
        for bits in (4, 8):
            assert torch.equal(session.run(inputs(session), bits), without.run(inputs(session), bits))
        # What is reserved, as the session holds it: ONNX Runtime computes bfloat16 in float32.
        more = session.resident_bytes()["weights"] - without.resident_bytes()["weights"]
        assert more == lora_bytes(artifact, "transformer", None, "onnxruntime")


def test_a_lora_in_a_graph_is_the_branch_of_pytorch(artifact: Artifact, session: EngineSession, lora: Path) -> None:
    """As close to float64 as the exporter demands of a graph, and as PyTorch's own branch in 16 bit is."""
    spec, given = LoraSpec(lora, 0.7), inputs(session)
    with open_session(artifact, backend="pytorch", device="cpu") as pytorch:
        pytorch.set_loras([spec])
        session.set_loras([spec])
        for bits in (4, 8):
            wanted = exact(artifact, spec, bits, given)
            theirs = made.relative(pytorch.run(given, bits), wanted)
            ours = made.relative(session.run(given, bits), wanted)
            assert ours <= GRAPH_FACTOR * theirs + ATOL
    session.set_loras(())
    assert made.relative(session.run(given, 8), wanted) > 3 * ours


def test_it_follows_the_16_bit_model_that_it_is_fused_into(
    artifact: Artifact, session: EngineSession, model: Path, lora: Path
) -> None:
    given = inputs(session)

    def original(*beside: LoraSpec) -> Tensor:
        loaded = load_original(artifact, model, "transformer", session.device, torch.bfloat16, beside=beside)
        with torch.inference_mode():
            output: Tensor = loaded(**session.family.forward_kwargs(given), return_dict=False)[0].double()
        return output

    plain = session.run(given, 8).double()
    session.set_loras([LoraSpec(lora, 0.7)])
    ours, wanted = session.run(given, 8).double(), original(LoraSpec(lora, 0.7))
    # What 4 bits cost without a LoRA is the measure: with one, the weights underneath are the same.
    cost = (plain - original()).norm()
    assert (ours - wanted).norm() < 1.5 * cost
    assert (plain - wanted).norm() > 2 * (ours - wanted).norm()


def test_on_off_scale_and_two_at_once(artifact: Artifact, session: EngineSession, model: Path, tmp_path: Path) -> None:
    layers = [*blocks(model), "proj_out", "patch_embedding"]
    one, two = (write_peft(tmp_path / f"{seed}.safetensors", low_rank(model, layers, seed=seed)) for seed in (1, 2))
    transformer = DvdqTransformer(session, StepController("fixed", bits=8))
    given, held = inputs(session), session.resident_bytes()["weights"]

    def output() -> Tensor:
        return session.run(given, 8)

    plain = output()
    transformer.load_lora_adapter(one, 0.5, "one")
    first = output()
    # Two of its layers stay in 16 bit: a changed copy of each lies beside what is stored.
    loras = read_beside(artifact, {"transformer": [LoraSpec(one, 0.5)]})["transformer"]
    needed, reserved = (lora_bytes(artifact, "transformer", given, "onnxruntime") for given in (loras, None))
    assert session.resident_bytes()["weights"] - held == needed - reserved > 0
    transformer.load_lora_adapter(two, adapter_name="two")  # 4 and 4 fill the rank of 8
    both = output()
    assert not torch.equal(first, plain)
    assert not torch.equal(both, first)
    transformer.disable_lora()
    assert torch.equal(output(), plain)
    transformer.enable_lora()
    assert torch.equal(output(), both)
    transformer.set_adapters("one", 0.5)
    assert torch.equal(output(), first)
    transformer.set_adapters(["one", "two"], [1.0, 1.0])
    with pytest.raises(UnsupportedError) as error:
        transformer.load_lora_adapter(one, adapter_name="three")
    assert "rank 12" in str(error.value)
    assert f"reserves {RESERVED}" in str(error.value)
    assert "--lora-rank 12" in str(error.value)
    transformer.unload_lora()
    assert torch.equal(output(), plain)
    assert session.resident_bytes()["weights"] == held
    with open_session(artifact, backend="onnxruntime", device="cpu") as other:  # shares the private copy of the weights
        assert torch.equal(other.run(given, 8), plain)


def test_what_has_no_place_is_refused_and_changes_nothing(
    session: EngineSession, artifact: Artifact, model: Path, lora: Path, tmp_path: Path
) -> None:
    given = inputs(session)
    session.set_loras([LoraSpec(lora)])
    before = session.run(given, 8)
    a, b = torch.randn(RESERVED + 1, 128), torch.randn(128, RESERVED + 1)
    large = write_peft(tmp_path / "large.safetensors", Changes({"blocks.0.attn1.to_q": (a, b)}, alpha=9.0))
    save_file({"diffusion_model.blocks.0.ffn.2.diff": torch.zeros(128, 256)}, tmp_path / "whole.safetensors")
    for path, words in (
        (large, f"rank {RESERVED + 1} in blocks.0.attn1.to_q"),
        (tmp_path / "whole.safetensors", "whole matrix of blocks.0.ffn.net.2"),
    ):
        with pytest.raises(UnsupportedError) as error:
            session.set_loras([LoraSpec(path)])
        assert words in str(error.value)
        assert "--backend pytorch" in str(error.value)
        # Where nobody has chosen a backend, the one that has a place for it takes it, and says so.
        with open_generator(artifact, pipeline=wan_pipeline()[1], device="cpu", lora=[LoraSpec(path)]) as free:
            assert free.options.backend == "pytorch"
            (note,) = free.notes(free.checker.example_request())
            assert words in note
            assert "PyTorch runs it, and not onnxruntime" in note
    with open_generator(artifact, pipeline=wan_pipeline()[1], device="cpu", lora=[LoraSpec(lora)]) as free:
        assert free.options.backend == "auto"
    with pytest.raises(CheckpointError, match="no LoRA file"):
        session.set_loras([LoraSpec(tmp_path / "none.safetensors")])
    assert torch.equal(session.run(given, 8), before)
    assert session.loras == (LoraSpec(lora),)
    small = write_peft(tmp_path / "small.safetensors", low_rank(model, blocks(model)[:1]))
    with (
        open_session(Artifact.open(wan_pipeline()[0]), backend="onnxruntime", device="cpu") as plain,
        pytest.raises(UnsupportedError, match=r"without --lora-rank(?s:.*)--lora-rank 64"),
    ):
        plain.set_loras([LoraSpec(small)])


def graph_inputs(path: Path) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """The tensors of an engine that is built from this graph, as :class:`Library` takes them."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {onnx.TensorProto.BFLOAT16: "BF16", onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF"}
    found = {}
    for values, output in ((graph.input, False), (graph.output, True)):
        for value in values:
            tensor = value.type.tensor_type
            found[value.name] = (kinds[tensor.elem_type], tuple(d.dim_value for d in tensor.shape.dim), output)
    return found


def test_engines_read_a_lora_where_the_session_writes_it(
    artifact: Artifact, lora: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph that TensorRT-RTX built, and a double of the library that reads the addresses which the session gave."""
    plan = artifact.plan()
    tensors = graph_inputs(artifact.root / "onnx/transformer_a8_rtx_int8.onnx")
    assert {name for name in tensors if is_lora_input(name)} == set(lora_input_shapes(plan.layers, RESERVED))
    assert {NORM, TABLE, "proj_out.weight"} <= set(tensors)
    assert "patch_embedding.weight" not in tensors
    read: dict[str, Tensor] = {}

    def compute(given: dict[str, Tensor], name: str) -> Tensor:
        read.clear()
        read.update(given)
        return given["hidden_states"]

    library = Library(tensors, compute)
    monkeypatch.setattr(engine_choice, "device_sm", lambda device: "8.9")
    monkeypatch.setattr(engine_choice, "load_backend", lambda name: library.backend)
    with TensorRTSession(artifact, device=torch.device("cpu")) as session:
        given = inputs(session)
        # Reserved inputs and what stays in 16 bit lie beside the engines, once for both.
        there = session.resident_bytes()
        request: Any = SimpleNamespace(mode="a8")
        counted = needs.transformer_bytes(artifact, [request], "tensorrt_rtx", False, None, "auto", {})
        assert counted[Loaded("engines", (4, 8))] == there["weights"] + there["engines"]

        def seen(bits: int = 8) -> dict[str, Tensor]:
            session.run(given, bits)
            return {name: value for name, value in read.items() if name not in given}

        plain = seen()
        assert all(not value.any() for name, value in plain.items() if is_lora_input(name))
        stored = load_file(artifact.root / "onnx/transformer.safetensors")
        assert all(torch.equal(plain[name], stored[name]) for name in (NORM, TABLE, "proj_out.weight"))
        session.set_loras([LoraSpec(lora, 0.7)])
        wanted = LoraInputs(artifact, "transformer").values([LoraSpec(lora, 0.7)], lambda name: stored[name])
        for bits in (4, 8):  # both engines read one memory
            changed = seen(bits)
            assert {name for name in changed if not torch.equal(changed[name], plain[name])} == set(wanted)
            assert all(torch.equal(changed[name], value.to(changed[name].dtype)) for name, value in wanted.items())
        kernel = write_peft(tmp_path / "kernel.safetensors", low_rank(model, ["patch_embedding"]))
        with pytest.raises(UnsupportedError, match=r"patch_embedding.weight, which is a constant of the engines"):
            session.set_loras([LoraSpec(kernel)])
        session.set_loras(())
        assert all(torch.equal(value, plain[name]) for name, value in seen().items())


def test_what_it_costs_is_counted(artifact: Artifact, model: Path, tmp_path: Path) -> None:
    """Bytes and operations of the dry run, by hand."""
    plan = artifact.plan()
    tokens, text = plan.family.tokens(*artifact.sizes.at("opt")), artifact.sizes.text_tokens
    seen = layer_tokens(plan, artifact.sizes)
    elements = operations = quantized = 0
    for spec in plan.layers:
        own = RESERVED * (len(spec.members) * spec.features + spec.out_features)
        elements += own + spec.out_features
        rows = text if spec.name.endswith("attn2.to_k+to_v") else tokens
        assert seen[spec.name] == rows, spec.name
        operations += 2 * rows * own
        quantized += 2 * rows * spec.features * spec.out_features
    assert (reserved_bytes(plan, RESERVED), reserved_bytes(plan, 0)) == (2 * elements, 0)
    assert step_flops(plan, artifact.sizes, RESERVED) == (operations, quantized)
    assert step_flops(plan, artifact.sizes, 0) == (0.0, quantized)
    dry = ("-o", tmp_path / "out", "--target", "graphs", *SIZES, "--lora-rank", RESERVED, "--dry-run")
    found: dict[str, Any] = json.loads(export(model, *dry, "--log-format", "json").stdout)["lora_rank"]
    assert found["bytes"] == {"transformer": 2 * elements}
    assert found["flops_per_step"] == {"transformer": operations}
    assert found["quantized_flops_per_step"] == {"transformer": quantized}
    assert "reserved for LoRAs, rank 8" in in_process(model, *dry)
    refused(export(model, *dry[:-3], "--lora-rank", 2000, "--dry-run"), "--lora-rank is 2000", "1 to 1024")
    held = sum(t.nbytes for t in random_lora(plan).values())
    assert held == 2 * elements


def test_the_command_loads_one_into_the_graph(artifact: Artifact, lora: Path, tmp_path: Path) -> None:
    pipeline = wan_pipeline()[1]
    common: tuple[object, ...] = (
        artifact.root,
        "--pipeline",
        pipeline,
        "--prompt",
        "a cat",
        "--steps",
        1,
        "--mode",
        "a8",
    )
    common += ("-o", tmp_path / "c.gif", "--device", "cpu", "--backend", "onnxruntime")
    drawn(*common, "--lora", f"{lora}:0.5", "--trace", tmp_path / "t.json")
    (clip,) = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert clip["executed"]["lora"] == [{"path": str(lora), "scale": 0.5}]
    assert clip["executed"]["backend"] == "onnxruntime"
    loras = read_beside(artifact, {"transformer": [LoraSpec(lora, 0.5)]})["transformer"]
    room = lora_bytes(artifact, "transformer", loras, "onnxruntime")
    said = run(*common, "--dry-run", "--log-format", "json", "--lora", f"{lora}:0.5").stderr
    needs = next(json.loads(line) for line in said.splitlines() if '"needs"' in line)
    loaded = {p["name"]: p["loaded"] for p in needs["parts"]}
    assert loaded["transformer (LoRAs beside the weights)"] == room
    # The plan of the memory counts it too.
    for stage in needs["memory"]["stages"][1:]:
        assert stage["parts"]["packed weights"] == loaded["transformer (packed weights)"] + room
    refused(run(*common, "--lora", lora, "--lora", f"{lora}:0.2", "--lora", lora), f"rank {3 * RANK}", "--lora-rank")


def test_a_graph_without_the_branch_is_found(artifact: Artifact) -> None:
    """``--verify`` says it of a graph that lacks what its manifest promises, and a session does not open it."""
    plain = Artifact.open(wan_pipeline()[0])
    held = made.quantized_model(artifact, "transformer", 8)
    check = Verifier(artifact.plan(), artifact.sizes, held).check(plain.root / plain.graph("transformer", 8), 8)
    assert not check.passed
    other = Artifact(plain.root, dataclasses.replace(plain.manifest, lora_rank=RESERVED), plain.configs)
    with pytest.raises(EngineError, match=r"has no input blocks.0"):
        open_session(other, backend="onnxruntime", device="cpu")
