"""Steps that are repeated as CUDA graphs: what is captured and when, on a double of the capture. No GPU has run it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.pipelines.transformer import DvdqTransformer
from dvdquant.deploy.sessions import open_session, replay
from dvdquant.deploy.sessions.attention import install_attention
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.sessions.replay import GraphReplay, why_not
from dvdquant.model.families import Sizes
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import build_skeleton, plan_model
from dvdquant.ops.cuda.errors import KernelError
from dvdquant.recipe import get_recipe
from dvdquant.system.torch_hooks import close_capture_pool
from tests.support import session_exports as made
from tests.support import tiny_models

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A capture that repeats a step on the memory that it was made with, and writes where it wrote: as a CUDA graph does."""
    made_captures: list[Any] = []

    def capture(step: replay.Step, inputs: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Callable[[], Any]]:
        output = step(inputs)
        made_captures.append(inputs)
        return output, lambda: output.copy_(step(inputs))

    monkeypatch.setattr(replay, "capture_step", capture)
    return made_captures


def step_of(calls: list[tuple[int, ...]]) -> replay.Step:
    def step(inputs: dict[str, Tensor]) -> Tensor:
        calls.append(tuple(inputs["x"].shape))
        return inputs["x"] * 2 + inputs["t"]

    return step


def given(value: float, size: int = 3) -> dict[str, Tensor]:
    return {"x": torch.full((size,), value), "t": torch.tensor(1.0)}


def test_a_step_is_captured_when_it_comes_again(captured: list[Any]) -> None:
    """Outputs are those of a plain step, and stay as they are when the next one runs."""
    graphs = GraphReplay(step_of([]), "transformer", CUDA)
    outputs = [graphs(given(float(i)), 8) for i in range(4)]
    assert [float(output[0]) for output in outputs] == [1.0, 3.0, 5.0, 7.0]
    assert len(captured) == 1
    assert graphs.nbytes == 4 * (3 + 1 + 3)


def test_each_width_and_each_shape_has_its_own(captured: list[Any]) -> None:
    graphs = GraphReplay(step_of([]), "transformer", CUDA)
    for state in (8, 4, 8, 4):
        for size in (3, 5):
            assert torch.equal(graphs(given(2.0, size), state), torch.full((size,), 5.0))
    assert len(captured) == 4
    last = range(6, 6 + replay.MOST_CAPTURES)
    for size in last:
        for _ in range(2):
            graphs(given(1.0, size), 8)
    assert graphs.nbytes == sum(4 * (size + 1 + size) for size in last)
    graphs.forget()
    assert graphs.nbytes == 0
    before = len(captured)
    graphs(given(1.0), 8)
    assert len(captured) == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "when stream is capturing"),
        (KernelError("its weight is prepared at the first call"), "its weight is prepared at the first call"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (TypeError(), "TypeError"),
    ],
    ids=["capture", "kernels", "memory", "hook"],
)
def test_what_cannot_be_captured_runs_as_usual(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, captured: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises; and what was captured before is dropped, with its memory."""
    capture, freed = replay.capture_step, []

    def refuse_another(step: replay.Step, inputs: dict[str, Tensor], device: torch.device) -> Any:
        if captured:
            raise error
        return capture(step, inputs, device)

    monkeypatch.setattr(replay, "capture_step", refuse_another)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(graphs.nbytes))
    graphs = GraphReplay(step_of([]), "transformer", CUDA)
    for state in (8, 4, 8):
        assert [float(graphs(given(float(i)), state)[0]) for i in range(4)] == [1.0, 3.0, 5.0, 7.0]
    assert (len(captured), graphs.nbytes, freed) == (1, 0, [0])
    assert caplog.text.count(said) == 1
    assert "more" not in caplog.text


def test_an_error_of_the_step_itself_surfaces(captured: list[Any]) -> None:
    """It fails while it is captured, and again when it runs as usual: that is what the caller sees."""
    failing = False

    def step(inputs: dict[str, Tensor]) -> Tensor:
        if failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs["x"] * 2

    graphs = GraphReplay(step, "transformer", CUDA)
    graphs(given(1.0), 8)
    failing = True
    with pytest.raises(torch.OutOfMemoryError):
        graphs(given(1.0), 8)
    failing = False
    assert float(graphs(given(2.0), 8)[0]) == 4.0
    assert not captured


def test_a_capture_without_the_kernels_of_its_step_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where they run on another stream than the one that is captured: the first output would be that of all steps."""
    monkeypatch.setattr(replay, "capture_step", lambda step, inputs, device: (step(inputs), lambda: None))
    graphs = GraphReplay(step_of([]), "transformer", CUDA)
    assert [float(graphs(given(float(i)), 8)[0]) for i in range(4)] == [1.0, 3.0, 5.0, 7.0]
    assert caplog.text.count("gives something else when it is repeated") == 1
    assert graphs.nbytes == 0


class _Cuda:
    """What a capture calls of ``torch.cuda``, each call with its device."""

    CUDAGraph = type("CUDAGraph", (), {"replay": lambda self: None})

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.under_way = 0
        self.current: Any = "the caller's stream"
        self.fails: str | None = None

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize", device))

    def Stream(self, device: torch.device) -> Any:
        return ("stream", device)

    def graph_pool_handle(self) -> Any:
        return (0, 7)

    def current_device(self) -> int:
        return 1

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.calls.append(("device", device))
        yield

    def current_stream(self, device: torch.device) -> Any:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As of PyTorch 2.11 to 2.13: where a capture cannot begin or end, its stream stays the current one."""
        self.under_way += 1
        assert self.under_way == 1
        assert pool == (0, 7)
        self.calls.append((stream, capture_error_mode))
        before, self.current = self.current, stream
        try:
            if self.fails == "begin":
                raise RuntimeError("no capture begins")
            with contextlib.suppress(RuntimeError):
                yield
            if self.fails == "end":
                raise RuntimeError("the capture was invalidated")
            self.current = before
        finally:
            self.under_way -= 1


def test_a_capture_is_on_a_stream_of_its_device_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sessions on two devices in two threads one captures at a time, and the other may allocate meanwhile."""
    cuda = _Cuda()
    monkeypatch.setattr(replay.torch, "cuda", cuda)
    inside, go = threading.Event(), threading.Event()

    def first(inputs: dict[str, Tensor]) -> Tensor:
        inside.set()
        assert go.wait(20)
        return inputs["x"]

    devices = [torch.device("cuda", index) for index in (1, 0)]
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(replay.capture_step, first, given(1.0), devices[0])
        assert inside.wait(20)
        two = pool.submit(replay.capture_step, step_of([]), given(2.0), devices[1])
        with pytest.raises(TimeoutError):
            two.result(timeout=0.2)
        go.set()
        assert float(one.result()[0][0]) == 1.0
        assert float(two.result()[0][0]) == 5.0
    streams = [call for call in cuda.calls if call[1] == "thread_local"]
    assert streams == [(("stream", device), "thread_local") for device in devices]
    assert [call[1] for call in cuda.calls if call[0] == "device"] == devices


@pytest.mark.parametrize("fails", ["begin", "end"])
def test_the_callers_stream_is_back_after_a_capture_that_fails(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all work of the thread would go on on the stream of the capture, not ordered with that of others."""
    cuda, freed = _Cuda(), []
    cuda.fails = fails
    monkeypatch.setattr(replay.torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: freed.append(("ended", *of)), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: freed.append(("released", *of)), raising=False)
    with pytest.raises(RuntimeError, match=r"no capture begins|was invalidated"):
        replay.capture_step(step_of([]), given(1.0), torch.device("cuda", 1))
    assert cuda.current == "the caller's stream"
    # PyTorch's allocator takes the capture for one that goes on, and would free no cached memory any more.
    assert freed == [("ended", 1, (0, 7)), ("released", 1, (0, 7))]
    cuda.fails = None
    output, _ = replay.capture_step(step_of([]), given(1.0), torch.device("cuda", 1), "a stream of the caller")
    assert float(output[0]) == 3.0
    assert len(freed) == 2, "a graph that was captured keeps its memory"
    assert cuda.calls[-1] == ("a stream of the caller", "thread_local")


def test_memory_of_a_capture_that_was_ended_is_the_graph_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives it back when it goes; twice would end the process."""

    def ended(device: int, pool: Any) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: pytest.fail("given back twice"), raising=False)
    close_capture_pool(0, (0, 7))


def test_where_it_is_off() -> None:
    assert why_not(CUDA, False, 3999) is None
    assert "no CUDA device" in str(why_not(CPU, False, 10))
    assert "ranges" in str(why_not(CUDA, True, 10))
    assert "more than 4000 tokens" in str(why_not(CUDA, False, 32760))


def test_a_session_repeats_its_steps(
    monkeypatch: pytest.MonkeyPatch, captured: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """With switches between the widths; off, with the reason, where there is no GPU."""
    artifact = Artifact.open(made.family_export("wan"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    with open_session(artifact, backend="pytorch", device="cpu", cuda_graphs=True) as session:
        wanted = {bits: session.run(inputs, bits) for bits in (4, 8)}
    reason = "not captured as CUDA graphs: there is no CUDA device"
    assert reason in caplog.text
    caplog.clear()
    DvdqTransformer.from_pretrained(artifact.root, backend="pytorch", device="cpu", cuda_graphs=True).close()
    assert reason in caplog.text
    monkeypatch.setattr("dvdquant.deploy.sessions.pytorch.why_not", lambda *_: None)
    with PyTorchSession(artifact, cuda_graphs=True) as session:
        for bits in (8, 4, 8, 4, 8, 4):
            assert torch.equal(session.run(inputs, bits), wanted[bits])
    assert len(captured) == 2


class _Crossings(TorchDispatchMode):
    """Operations that read or write tensors of two devices; one number from the host is no tensor for CUDA either."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.ndim]
        if len({x.device for x in tensors}) > 1:
            self.found.append(str(func))
        return out


def crossings(step: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> list[str]:
    """What a step copies between the devices, where tensors without data are those of a GPU. To read a value raises there."""
    on_gpu = {name: torch.empty_like(x, device="meta") for name, x in inputs.items()}
    with torch.inference_mode(), _Crossings() as seen:
        step(on_gpu)
    return seen.found


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        *((config, tiny_models.FIXED) for config in tiny_models.CONFIGS.values()),
        (tiny_models.COGVIDEOX_15, tiny_models.EVEN),
    ],
    ids=[*tiny_models.CONFIGS, "cogvideox-1.5"],
)
def test_a_step_copies_nothing_from_the_host_and_reads_nothing(config: dict[str, Any], sizes: Sizes) -> None:
    """Neither can be captured. What diffusers does between the layers is the same for all weights."""
    plan = plan_model(config, get_recipe("w4a4"), torch.bfloat16)
    model = build_skeleton(plan.family.config, torch.bfloat16)
    install_attention(model, None)
    step = GraphWrapper(model, plan.family).to("meta")
    assert crossings(step, plan.family.sample(sizes, torch.bfloat16)) == []


def test_a_copy_from_the_host_would_be_seen() -> None:
    x = {"x": torch.ones(3)}
    (copy,) = crossings(lambda inputs: inputs["x"] * torch.arange(3).to(inputs["x"].device), x)
    assert copy.startswith("aten.to.")
    with pytest.raises(RuntimeError, match="meta"):
        crossings(lambda inputs: inputs["x"] * float(inputs["x"].sum()), x)
