"""A new engine on the GPU that it was built on: it runs, computes what the PyTorch session computes, and its time is taken."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dvdquant.artifact.entries import EngineEntry, Measured
from dvdquant.backends import backend_name
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import EngineSession, open_session
from dvdquant.deploy.sessions.engine_choice import device_sm
from dvdquant.errors import EngineError
from dvdquant.system.out_of_memory import ran_out_of_memory

__all__ = ["check_engine", "judge_output", "measure"]

PASSES = 5
# Two right executors of a network with 4-bit activations differ by flipped codes, a few hundredths of the output; a wrong
# weight, scale or shape makes it another picture. NVFP4 and 16-bit products are other quantizers.
LARGEST_ERROR = {"plugin": 0.25, "int8": 0.25, "int4-weight-only": 0.5, "nvfp4": 0.75}


def check_engine(tree: Path, entry: EngineEntry, component: str, plugins: Sequence[Path]) -> Measured | None:
    """Run an engine and return what was measured; None where PyTorch sees no GPU that it is for.

    Args:
        tree: An export that holds the engine.
        entry: Its entry.
        component: The transformer that it is of.
        plugins: The plugin libraries.

    Raises:
        EngineError: It does not run, or computes something else than the PyTorch session.
    """
    if not torch.cuda.is_available() or device_sm(torch.device("cuda")) not in entry["sm"]:
        return None
    artifact, bits = Artifact.open(tree), entry["act_bits"]
    inputs = artifact.family(component).sample(artifact.sizes, artifact.dtype)
    name = backend_name(entry["backend"])
    with open_session(artifact, component, backend=name, device="cuda", bits=[bits], plugins=plugins) as session:
        output, seconds = measure(session, inputs, bits)
    _free()
    exact = None
    try:
        with open_session(artifact, component, backend="pytorch", device="cuda", bits=[bits]) as session:
            exact = session.run(inputs, bits).cpu()
    except (EngineError, torch.OutOfMemoryError) as error:
        if not ran_out_of_memory(error):
            raise
    _free()
    return Measured(
        gpu=torch.cuda.get_device_name(),
        milliseconds=round(1000 * seconds, 3),
        passes=PASSES,
        relative_error=judge_output(entry, output, exact),
    )


def measure(session: EngineSession, inputs: dict[str, Tensor], bits: int) -> tuple[Tensor, float]:
    """Return the output of a session on the CPU, and the median time of a pass in seconds, after one to warm up.

    Args:
        session: The session.
        inputs: The inputs of the graph, by name.
        bits: The activation bits.
    """
    output = session.run(inputs, bits).cpu()
    taken = []
    for _ in range(PASSES):
        begun = time.perf_counter()
        session.run(inputs, bits).cpu()
        taken.append(time.perf_counter() - begun)
    return output, statistics.median(taken)


def judge_output(entry: EngineEntry, output: Tensor, exact: Tensor | None) -> float | None:
    """Return the relative error of an engine's output, or None if there is nothing to compare it with.

    Args:
        entry: The entry of the engine.
        output: Its output.
        exact: The output of the PyTorch session, or None.

    Raises:
        EngineError: The output is not finite, is constant, or is another one.
    """
    values = output.float()
    if not bool(values.isfinite().all()) or float(values.std()) == 0:
        raise EngineError(
            f"{entry['path']} runs, and its output is not finite or constant",
            fix="update the driver and TensorRT, and build again; --no-check keeps the engine unchecked",
        )
    if exact is None:
        return None
    error = float((values - exact.float()).norm() / exact.float().norm())
    if not error <= LARGEST_ERROR.get(entry["precision"], 0.25):
        raise EngineError(
            f"{entry['path']} computes something else than the PyTorch session: relative error {error:.3f}",
            available=f"at most {LARGEST_ERROR.get(entry['precision'], 0.25)}",
            fix="build again with another release of TensorRT; --no-check keeps the engine unchecked",
        )
    return error


def _free() -> None:
    """Give the memory of a closed session back before the next one is opened."""
    gc.collect()
    torch.cuda.empty_cache()
