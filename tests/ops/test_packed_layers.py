"""Sessions and layers whose weights stay packed: the outputs of expanded ones, from one copy. On the library's double."""

from __future__ import annotations

import logging
import sys
import weakref
from pathlib import Path

import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import open_session, pytorch
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import UnsupportedError
from dvdquant.model import weight_choice
from dvdquant.model.held_weights import held_weights
from dvdquant.model.quantized_model import quant_linears
from dvdquant.ops.cuda.errors import KernelError
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.prepared_linear import handle_of, packed_linear
from dvdquant.ops.repack import LayerShape
from tests.support import session_exports as made
from tests.support.kernel_layers import CPU, double, small_layer, tokens

sys.path[:0] = [str(Path(__file__).parents[2] / "kernels" / folder) for folder in ("", "check")]

from check_cases import make_tokens, make_weight  # noqa: E402
from host_library import HostLibrary  # noqa: E402

from dvdquant.recipe import ActivationSpec  # noqa: E402


@pytest.mark.parametrize(
    ("name", "sm"),
    [
        ("hunyuan-video", 90),
        ("w4a4-g64", 90),
        ("w4a4", 80),
        pytest.param("w4a4-g64", 89, marks=pytest.mark.stress),
        pytest.param("cogvideox", 120, marks=pytest.mark.stress),
        pytest.param("ltx-video", 110, marks=pytest.mark.stress),
    ],
)
def test_sessions_of_packed_weights_give_the_same_bits_and_hold_them_once(
    name: str, sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = name.startswith("w4a4")
    artifact = Artifact.open(made.weights_export(*("wan", name) if recipe else (name,)))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: double(sm))
    counted = held_weights(artifact.plan("transformer"), sm, (4, 8), artifact.sizes)
    outputs, added, spaces = {}, {}, {}
    for form in ("expanded", "packed"):
        with PyTorchSession(artifact, weights=form) as session:  # type: ignore[arg-type]
            assert session.weights == form
            start = session.resident_bytes()["weights"]
            outputs[form] = {}
            for bits in (8, 4, 8):
                outputs[form][bits] = session.run(inputs, bits)
                held = session.resident_bytes()["weights"] - start
                if form == "packed":
                    assert added.setdefault(form, held) == held  # the second width adds nothing
            added[form], spaces[form] = held, session.resident_bytes()["workspace"]
            layers = list(quant_linears(session.model).values())
            pre_quants = sum(4 * m.spec.features for m in layers if m.spec.smoothed or m.spec.shifted)
            assert held - pre_quants == (counted.packed if form == "packed" else counted.expanded)
    for bits in (4, 8):
        assert torch.equal(outputs["packed"][bits], outputs["expanded"][bits])
    assert added["packed"] < added["expanded"]
    # What a weight is expanded into is in the workspace of a call.
    assert 0 <= spaces["packed"] - spaces["expanded"] <= counted.scratch


def test_the_count_decides_where_nothing_else_was_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: double(80))
    with caplog.at_level(logging.INFO, logger="dvdquant"), PyTorchSession(artifact) as session:
        # So few tokens, that expanding takes longer than the product: nothing of any size stays packed.
        assert session.weights == "expanded"
    assert "weights are expanded (auto)" in caplog.text
    # 4-bit tensor cores multiply the packed weight: nothing to pay.
    with PyTorchSession(artifact, bits=[4]) as session:
        assert session.weights == "packed"


def test_a_session_holds_some_layers_so_and_some_so(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: double(90))
    counted = held_weights(artifact.plan("transformer"), 90, (4, 8), artifact.sizes)
    with PyTorchSession(artifact, weights="packed") as session:
        wanted = {bits: session.run(inputs, bits) for bits in (4, 8)}
    # A limit that half of the traffic keeps.
    monkeypatch.setattr(weight_choice, "COST_LIMIT", counted.cost / 2)
    choice = weight_choice.choose_weights(counted, "auto")
    assert choice.form == "mixed"
    with PyTorchSession(artifact) as session:
        assert session.weights == "mixed"
        start = session.resident_bytes()["weights"]
        for bits in (8, 4, 8):
            assert torch.equal(session.run(inputs, bits), wanted[bits])
        layers = list(quant_linears(session.model).values())
        forms = {m.spec.name: m.kernel.form for m in layers if m.kernel is not None}
        assert {name for name, form in forms.items() if form == "expanded"} == choice.expanded
        assert set(forms.values()) == {"packed", "expanded"}
        pre_quants = sum(4 * m.spec.features for m in layers if m.spec.smoothed or m.spec.shifted)
        assert session.resident_bytes()["weights"] - start - pre_quants == choice.nbytes - counted.kept


def test_policies_that_a_backend_does_not_have() -> None:
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    with pytest.raises(UnsupportedError, match="unknown weights 'thin'"):
        open_session(artifact, device="cpu", weights="thin")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="as they were built, not packed"):
        open_session(artifact, backend="rtx", device="cpu", weights="packed")
    with pytest.raises(UnsupportedError, match="PyTorch on cpu keeps weights packed"):
        open_session(artifact, backend="pytorch", device="cpu", weights="expanded")
    with open_session(artifact, backend="pytorch", device="cpu", weights="packed") as session:
        assert session.weights == "packed"
    graphs = Artifact.open(made.recipe_export("w4a4"))
    with open_session(graphs, backend="onnxruntime", device="cpu", weights="expanded") as session:
        assert session.weights == "expanded"


def test_nothing_of_the_files_is_held_once_a_layer_is_packed() -> None:
    layer = small_layer()
    wanted, x = layer(tokens()), tokens()
    small = weakref.ref(layer.get_buffer("weight_scale"))
    layer.prepare(double(90), [ActivationSpec(8), ActivationSpec(4)], torch.bfloat16, CPU, "packed")
    assert small() is not None
    first = layer(x)
    assert small() is None
    # It can be prepared again, from what it holds.
    layer.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    assert torch.equal(layer(x), first)
    layer.prepare(double(80), [ActivationSpec(8), ActivationSpec(4)], torch.bfloat16, CPU, "packed")
    assert torch.equal(layer(x), first)
    assert (first - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_the_operation_by_itself() -> None:
    kernels = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    shape = LayerShape(16, 256, block=256)
    packed = make_weight(shape, "midrise", CPU, seed=3)
    x = make_tokens(shape, 5, CPU, 1)
    codes, rows = kernels.make_rows(shape, packed.stored())
    arguments = (x, packed.outer, codes, rows, None, handle_of(kernels), 1, False, 256, 8, 0)
    torch.library.opcheck(torch.ops.dvdquant.packed_linear.default, arguments)
    wanted = kernels.quant_linear(shape, x, packed.outer, kernels.prepare(shape, packed.stored()))
    assert torch.equal(packed_linear(*arguments), wanted)
    assert torch.equal(kernels.expand(shape, codes, rows), kernels.prepare(shape, packed.stored()))
    with pytest.raises(KernelError, match="are gone"):
        packed_linear(*arguments[:5], 0, *arguments[6:])
