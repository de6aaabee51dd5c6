"""A LoRA beside the quantized weights of a PyTorch session: what it adds, what it leaves as it was, and where it is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy import DvdqTransformer
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.original import load_original
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.sessions.lora_needs import lora_bytes, read_beside
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.switching.controller import StepController
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.model.layers import QuantLinear
from dvdquant.model.quantized_model import quant_linears
from tests.support import tiny_models as tiny
from tests.support.commands import in_process, refused
from tests.support.lora_files import RANK, blocks, low_rank, write_original, write_peft
from tests.support.running import PROMPT, drawn, run, short_wan, short_wan_export

BF16 = 2.0**-8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("m") / "wan", {**tiny.WAN, "num_layers": 1})


@pytest.fixture(scope="module")
def artifact(model: Path) -> Artifact:
    out = model.parent / "out"
    in_process(model, "-o", out, "--recipe", "rtn", "--target", "graphs", "--latent", "2x8x8", "--text-tokens", "4")
    return Artifact.open(out)


@pytest.fixture
def session(artifact: Artifact) -> Iterator[PyTorchSession]:
    with PyTorchSession(artifact) as opened:
        yield opened


def inputs(session: PyTorchSession) -> dict[str, Tensor]:
    return session.family.sample(session.sizes, session.dtype, 0, "opt")


def layers(session: PyTorchSession) -> dict[str, QuantLinear]:
    return quant_linears(session.model)


def seen(session: PyTorchSession, name: str) -> tuple[Tensor, Tensor]:
    """What the layer gets and gives in a step at 8 bits, in float64."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend((args[0].double(), output.double()))

    hook = layers(session)[name].register_forward_hook(note)
    try:
        session.run(inputs(session), 8)
    finally:
        hook.remove()
    return found[0], found[1]


def test_a_layer_gives_its_change_besides(session: PyTorchSession, model: Path, tmp_path: Path) -> None:
    """Two of the layers that are merged into one, a bias among them, at another scale than 1."""
    members = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_v"]
    name = next(n for n, layer in layers(session).items() if members[0] in layer.spec.members)
    spec = layers(session)[name].spec
    changes = low_rank(model, members, alpha=2.0)
    changes.added = {"blocks.0.attn1.to_v.bias": torch.randn(128) * 0.1}
    names = {f"blocks.0.attn1.to_{x}": f"blocks.0.self_attn.{x}" for x in "qv"}
    names["blocks.0.attn1.to_v.bias"] = "blocks.0.self_attn.v:diff_b"
    path = write_original(tmp_path / "lora.safetensors", changes, names)
    x, before = seen(session, name)
    session.set_loras([LoraSpec(path, 0.5)])
    x_again, after = seen(session, name)
    assert torch.equal(x, x_again)
    expected, size, start = torch.zeros_like(before), before.abs(), 0
    for member, rows in zip(spec.members, spec.rows):
        here = slice(start, start + rows)
        start += rows
        if member in changes.pairs:
            a, b = (t.double() for t in changes.pairs[member])
            expected[..., here] = 0.25 * (x @ a.T) @ b.T
            size[..., here] += 0.25 * (x.abs() @ a.abs().T) @ b.abs().T
        if f"{member}.bias" in changes.added:
            expected[..., here] += 0.5 * changes.added[f"{member}.bias"].double()
            size[..., here] += 0.5
    # A, B, A·x, B·(A·x), the bias and the sum are rounded to bf16 once each.
    assert bool(((after - before - expected).abs() <= 6 * BF16 * size).all())
    assert bool((expected.abs() > 20 * BF16 * size).any())


def test_the_whole_model_follows_the_fused_one(session: PyTorchSession, model: Path, tmp_path: Path) -> None:
    """Every layer of the blocks, and layers that stay in 16 bit: nearer to the 16-bit model with the LoRA than without."""
    changes = low_rank(model, [*blocks(model), "proj_out", "condition_embedder.time_proj"])
    spec = LoraSpec(write_peft(tmp_path / "lora.safetensors", changes), 0.5)
    given = inputs(session)

    def original(*beside: LoraSpec) -> Tensor:
        loaded = load_original(session.artifact, model, "transformer", session.device, torch.bfloat16, beside=beside)
        with torch.inference_mode():
            output: Tensor = loaded(**session.family.forward_kwargs(given), return_dict=False)[0].double()
        return output

    plain, held = session.run(given, 8).double(), session.resident_bytes()["weights"]
    session.set_loras([spec])
    ours, wanted = session.run(given, 8).double(), original(spec)
    # What 4 bits cost without a LoRA is the measure: with one, the weights underneath are the same.
    cost = (plain - original()).norm()
    assert (ours - wanted).norm() < 1.5 * cost
    assert (plain - wanted).norm() > 2 * (ours - wanted).norm()
    pairs = sum(a.numel() + b.numel() for name, (a, b) in changes.pairs.items() if "blocks" in name)
    assert session.resident_bytes()["weights"] >= held + 2 * pairs


def test_off_is_as_it_was_bit_by_bit(artifact: Artifact, model: Path, tmp_path: Path) -> None:
    layers = [*blocks(model), "proj_out", "patch_embedding"]
    first, second = (
        write_peft(tmp_path / f"{seed}.safetensors", low_rank(model, layers, seed=seed)) for seed in (1, 2)
    )
    with open_session(artifact, "transformer", backend="pytorch", device="cpu") as opened:
        assert isinstance(opened, PyTorchSession)
        given = inputs(opened)
        transformer = DvdqTransformer(opened, StepController("fixed", bits=8))

        def output() -> Tensor:
            return opened.run(given, 8)

        plain, held = output(), opened.resident_bytes()["weights"]
        transformer.load_lora_adapter(first, 0.5, "one")
        one = output()
        assert not torch.equal(one, plain)
        loras = read_beside(artifact, {"transformer": [LoraSpec(first, 0.5)]})["transformer"]
        assert opened.resident_bytes()["weights"] - held == lora_bytes(artifact, "transformer", loras, "pytorch")
        transformer.load_lora_adapter(second, adapter_name="two")
        both = output()
        assert not torch.equal(both, one)
        transformer.disable_lora()
        assert torch.equal(output(), plain)
        assert transformer.active_adapters() == []
        transformer.enable_lora()
        assert torch.equal(output(), both)
        transformer.set_adapters("one", 0.5)
        assert torch.equal(output(), one)
        assert transformer.active_adapters() == ["one"]
        transformer.set_adapters(["one", "two"], [0.5, 1.0])
        assert torch.equal(output(), both)
        with pytest.raises(CheckpointError, match="no LoRA file"):
            transformer.load_lora_adapter(tmp_path / "none.safetensors")
        assert torch.equal(output(), both)
        with pytest.raises(UnsupportedError, match="three"):
            transformer.set_adapters("three")
        with pytest.raises(UnsupportedError, match="2 scales for 1"):
            transformer.set_adapters("one", [1.0, 2.0])
        transformer.delete_adapters("two")
        assert torch.equal(output(), one)
        twin = copy.deepcopy(transformer)
        assert twin.active_adapters() == ["one"]
        with pytest.raises(UnsupportedError, match=r"load_lora_adapter\(FILE, scale\)"):
            transformer.load_lora_adapter({"a.lora_A.weight": plain}, network_alphas=None)  # type: ignore[arg-type]
        transformer.unload_lora()
        assert torch.equal(output(), plain)
        assert opened.resident_bytes()["weights"] == held
        assert twin.active_adapters() == []


def test_a_full_difference_of_a_packed_layer(session: PyTorchSession, tmp_path: Path) -> None:
    name = next(n for n, layer in layers(session).items() if "blocks.0.ffn.net.2" in layer.spec.members)
    change = torch.randn(128, 256) * 0.05
    save_file({"diffusion_model.blocks.0.ffn.2.diff": change}, tmp_path / "lora.safetensors")
    x, _ = seen(session, name)
    session.set_loras([LoraSpec(tmp_path / "lora.safetensors")])
    x, after = seen(session, name)
    loras = read_beside(session.artifact, {"transformer": list(session.loras)})["transformer"]
    assert lora_bytes(session.artifact, "transformer", loras, "pytorch") == 2 * change.numel()
    session.set_loras(())
    _, before = seen(session, name)
    size = before.abs() + x.abs() @ change.double().abs().T
    assert bool(((after - before - x @ change.double().T).abs() <= 4 * BF16 * size).all())


def test_backends_that_run_graphs_refuse_one(artifact: Artifact, model: Path, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "lora.safetensors", low_rank(model, blocks(model)[:1]))
    with open_session(artifact, "transformer", backend="onnxruntime", device="cpu") as opened:
        with pytest.raises(UnsupportedError) as error:
            opened.set_loras([LoraSpec(path)])
        assert "--backend pytorch" in str(error.value)
        assert "dvdq-export --lora" in str(error.value)
        opened.set_loras(())


def test_the_command_runs_one_beside_the_export(tmp_path: Path) -> None:
    out, transformer = short_wan_export(), short_wan() / "transformer"
    path = write_peft(tmp_path / "lora.safetensors", low_rank(transformer, blocks(transformer)[:2]))
    common = (
        out,
        "--prompt",
        PROMPT,
        "-o",
        tmp_path / "c.gif",
        "--device",
        "cpu",
        "--steps",
        1,
        "--lora",
        f"{path}:0.1",
    )
    # Nothing is said of a backend: PyTorch takes what graphs have no place for, and says so.
    said = drawn(*common, "--mode", "a8", "--trace", tmp_path / "t.json")
    assert "made without --lora-rank; so PyTorch runs it, and not onnxruntime" in said
    (clip,) = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert clip["executed"]["backend"] == "pytorch"
    assert clip["executed"]["lora"] == [{"path": str(path), "scale": 0.1}]
    drawn(*common, "--mode", "16")
    planned = run(*common, "--mode", "a8", "--dry-run", "--memory", "auto", "--log-format", "json")
    needs = next(json.loads(line) for line in planned.stderr.splitlines() if '"needs"' in line)
    loaded = {part["name"]: part["loaded"] for part in needs["parts"]}
    loras = read_beside(Artifact.open(out), {"transformer": [LoraSpec(path, 0.1)]})["transformer"]
    branches = loaded["transformer (LoRAs beside the weights)"]
    assert branches == lora_bytes(Artifact.open(out), "transformer", loras, "pytorch") > 0
    # The plan of the memory counts them too.
    steps = next(stage for stage in needs["memory"]["stages"] if "steps" in stage["stage"])
    assert steps["parts"]["packed weights"] == loaded["transformer (packed weights)"] + branches
    refused(run(*common, "--backend", "onnxruntime"), "pytorch")
    refused(run(*common, "--lora", f"transformer_2={path}.x"), "no LoRA file")
    assert RANK == 4
