"""Sessions whose blocks are compiled: no break in the graph, the outputs of eager mode, one function for all blocks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import compiled, open_session, pytorch
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import UnsupportedError
from dvdquant.model.quantized_model import make_weights, prepare_layers, quant_linears
from dvdquant.ops.attention import ladder
from dvdquant.ops.cuda.errors import KernelError
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.prepared_linear import handle_of, prepared_linear
from dvdquant.ops.repack import LayerShape
from tests.support import session_exports as made
from tests.support.commands import refused
from tests.support.exporting import TINY_WAN
from tests.support.running import PROMPT, call, decode, drawn, run, short_wan_export

sys.path[:0] = [str(Path(__file__).parents[3] / "kernels" / folder) for folder in ("", "bench", "check")]

from check_cases import make_tokens, make_weight  # noqa: E402
from host_library import HostLibrary  # noqa: E402

ROOT = Path(__file__).parents[3]
FAMILIES = ("wan", "hunyuan-video", "cogvideox", "ltx-video")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "wan" else [pytest.mark.slow]) for name in FAMILIES],
)
@pytest.mark.parametrize("kernels", [True, pytest.param(False, marks=pytest.mark.stress)], ids=["kernels", "reference"])
def test_a_compiled_session_gives_what_an_eager_one_gives(
    name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a rounding of its own (aot_eager): bit by bit, with every block in one graph and both bit-widths."""
    double = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: double if kernels else None)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    artifact = Artifact.open(made.deep_export(name))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    with PyTorchSession(artifact) as session:
        wanted = {bits: session.run(inputs, bits) for bits in (4, 8)}
    torch._dynamo.reset()
    counters.clear()
    with PyTorchSession(artifact, compile=True, fuse=False) as session:
        for bits in (8, 4, 8):
            assert torch.equal(session.run(inputs, bits), wanted[bits])
    assert not counters["graph_break"]
    # One function a class of blocks and a bit-width, however many blocks there are; another where the first block's
    # input has other strides than the rest.
    classes = {type(block) for block in compiled.repeated_blocks(made.quantized_model(artifact, "transformer", 8))}
    assert counters["stats"]["unique_graphs"] <= 2 * 2 * len(classes)


def test_the_weight_is_made_before_the_compiled_step() -> None:
    """Inside of a compiled function nothing can be made: there the operation only takes what is there."""
    artifact = Artifact.open(made.weights_export("wan"))
    double = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    model = made.quantized_model(artifact, "transformer", 8)
    recipe = artifact.plan("transformer").recipe
    prepare_layers(model, double, [recipe.activation(8)], artifact.dtype, torch.device("cpu"))
    layers = quant_linears(model).values()
    assert not any(layer.kernel.nbytes for layer in layers if layer.kernel)
    make_weights(model)
    assert all(layer.kernel.nbytes for layer in layers if layer.kernel)


def test_what_compile_does_not_go_with() -> None:
    artifact = Artifact.open(made.weights_export("wan"))
    with pytest.raises(UnsupportedError, match="does not take compile"):
        open_session(artifact, backend="onnxruntime", device="cpu", compile=True)
    out = short_wan_export()
    refused(run(*call(out, "--prompt", PROMPT, "--compile", "-o", "clip.mp4")), "--compile runs in PyTorch")
    refused(run(out, "--prompt", PROMPT, "--compile", "--mode", "16", "-o", "clip.mp4"), "--compile", "leave one")


def test_a_compiled_run_draws_a_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    short = (short_wan_export(), "--pipeline", TINY_WAN, "--steps", 1, "--device", "cpu", "--prompt", PROMPT)
    drawn(*short, "--compile", "-o", tmp_path / "compiled.mp4")
    drawn(*short, "--backend", "pytorch", "-o", tmp_path / "eager.mp4")
    assert (decode(tmp_path / "compiled.mp4") == decode(tmp_path / "eager.mp4")).all()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no repeated blocks"):
        compiled.compile_blocks(torch.nn.Linear(2, 2))


def test_the_operation_by_itself() -> None:
    """PyTorch's own checks of a custom operation, and the library that a compiled model was made for is gone."""
    double = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    shape = LayerShape(16, 256, block=256)
    packed = make_weight(shape, "midrise", torch.device("cpu"), seed=3)
    prepared = double.prepare(shape, packed.stored())
    x = make_tokens(shape, 5, torch.device("cpu"), 1)
    arguments = (x, packed.outer, prepared, None, handle_of(double), 16, 1, False, 256, 8, 0)
    torch.library.opcheck(torch.ops.dvdquant.prepared_linear.default, arguments)
    assert torch.equal(prepared_linear(*arguments), double.quant_linear(shape, x, packed.outer, prepared))
    del double
    gc.collect()
    with pytest.raises(KernelError, match="are gone"):
        prepared_linear(*arguments)


def test_compiled_code_outlives_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / "dvdquant" / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert compiled.cache_folder() == tmp_path / "own"


# Runs a compiled session, keeps its output, and says how many graphs were compiled and how many were taken from the cache.
_RUN = """
import sys
import torch
from torch._dynamo.utils import counters
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.ops.attention import ladder
from dvdquant.ops.attention.operation import number_of
path, output, attention, sessions = sys.argv[1:]
artifact = Artifact.open(path)
ladder.MIN_TOKENS = 16
for _ in range(int(sessions)):  # the numbers of sessions that were open before
    number_of(ladder.Attention("int8", ()))
options = {} if attention == "16" else {"attention": attention, "attention_backend": "reference"}
with PyTorchSession(artifact, compile=True, **options) as session:
    torch.save(session.run(artifact.family().sample(artifact.sizes, artifact.dtype), 8), output)
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["16", pytest.param("int8", marks=pytest.mark.stress)])
def test_inductors_code_computes_the_same_and_a_second_process_compiles_nothing(
    attention: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler that users get, here its C++ for the CPU. It rounds less often between operations than eager mode.

    The key of its cache does not depend on what is compiled to.
    """
    artifact = Artifact.open(made.weights_export("wan"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    exact = made.reference(artifact, "transformer", 8, inputs)[1]
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    options = {} if attention == "16" else {"attention": attention, "attention_backend": "reference"}
    with PyTorchSession(artifact, **options) as session:
        eager = made.relative(session.run(inputs, 8), exact)
    cache = tmp_path / "cache"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # inductor's own processes would hold the output open
    told, errors = [], []
    for sessions in ("0", "3"):
        command = [sys.executable, "-c", _RUN, str(artifact.root), str(tmp_path / "output.pt"), attention, sessions]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        told.append([int(word) for word in done.stdout.split()[-2:]])
        errors.append(made.relative(torch.load(tmp_path / "output.pt", weights_only=True), exact))
    assert max(errors) <= 1.5 * eager
    assert any(cache.rglob("*.so"))
    (compiled_first, _), (compiled_again, taken) = told
    assert compiled_first > 0
    assert (compiled_again, taken) == (0, compiled_first)
