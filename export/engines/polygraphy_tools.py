"""Polygraphy on exported ONNX files: a summary of the graph, and TensorRT-RTX's own verdict on the parts that it takes.

Polygraphy chooses between TensorRT and TensorRT-RTX by an environment variable that it reads at import, once per
process. So it runs in a process of its own, through its command line, and never inside the exporter.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from dvdquant.errors import EngineError
from dvdquant.export.engines.network import read_model
from dvdquant.system.out_of_memory import says_no_memory

__all__ = ["UnsupportedPart", "onnx_summary", "rtx_unsupported"]

_MAIN = "import sys; from polygraphy.tools import main; sys.exit(main())"
_NOISE = re.compile(r"^\[[WIV]\] ('colored' module|Loading |RUNNING|PASSED|Will generate)")

LIMIT_SECONDS = 900.0  # it parses a graph without weights, in seconds

UnsupportedPart = tuple[str, str, str]
"""(operator, node name, the parser's reason)."""


def onnx_summary(path: Path, detail: Literal["basic", "layers", "attrs"] = "basic") -> str:
    """Summarize an ONNX file: inputs, outputs, dtypes, shapes and node count; weights are not read.

    Args:
        path: The ONNX file.
        detail: ``basic``, or the thing that Polygraphy shows besides: ``layers`` (every node) or ``attrs`` (their
            attributes).

    Raises:
        EngineError: Polygraphy is missing or cannot read the file.
    """
    read_model(path)
    arguments = ["inspect", "model", str(path), "--model-type", "onnx", "--ignore-external-data"]
    text = _polygraphy(arguments + ([] if detail == "basic" else ["--show", detail]), path.parent)
    return "\n".join(line.removeprefix("[I] ") for line in text.splitlines() if not _NOISE.match(line)).strip()


def rtx_unsupported(path: Path) -> list[UnsupportedPart]:
    """Return the parts of an ONNX file that TensorRT-RTX's parser refuses, an empty list if it takes the whole graph.

    This is a check before a long build: minutes of quantization should not end in a parser error.

    Args:
        path: The ONNX file.

    Raises:
        EngineError: Polygraphy or TensorRT-RTX is missing, or the file cannot be read.
    """
    # Polygraphy calls a file it cannot decode fully supported.
    read_model(path)
    with tempfile.TemporaryDirectory(prefix="dvdq-polygraphy-") as folder:
        # It writes the supported parts into its working directory.
        arguments = ["inspect", "capability", str(path.absolute())]
        text = _polygraphy(arguments, Path(folder))
    if "fully supported" in text:
        return []
    parts = [_part(line) for line in text.partition("===== Summary =====")[2].splitlines() if line.count("|") >= 3]
    if len(parts) < 2:
        raise EngineError(
            f"polygraphy gave no verdict on {path}:\n{text.strip()}",
            fix="run it again with -v; dvdq doctor shows the versions of polygraphy and ONNX Runtime",
            out_of_memory=says_no_memory(text.replace(str(path.absolute()), "")),
        )
    return parts[1:]


def _part(line: str) -> UnsupportedPart:
    """Return one row of Polygraphy's table: stack trace | operator | node | reason (which may hold bars of its own)."""
    _, operator, node, reason = (cell.strip() for cell in line.split("|", 3))
    return operator, node, reason


def _polygraphy(arguments: list[str], folder: Path) -> str:
    """Run Polygraphy's command line, and return its output.

    Args:
        arguments: The arguments; the third one is the ONNX file.
        folder: The working directory.

    Raises:
        EngineError: The file is missing, or Polygraphy cannot be started, fails, or gives no answer in time.
    """
    if not Path(arguments[2]).is_file():
        # It only warns about a missing file, then calls the empty graph fully supported.
        raise EngineError(f"{arguments[2]} does not exist", fix="name the file of a graph; dvdq-inspect OUT lists them")
    environment = dict(os.environ, POLYGRAPHY_USE_TENSORRT_RTX="1")
    # Never let it install packages behind the user's back.
    environment.pop("POLYGRAPHY_AUTOINSTALL_DEPS", None)
    command = [sys.executable, "-c", _MAIN, *arguments]
    what = f"polygraphy {' '.join(arguments[:2])}"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
            env=environment,
            timeout=LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{what} gave no answer on {arguments[2]} within {LIMIT_SECONDS:.0f} s", fix="try again on an idle machine"
        ) from None
    except OSError as error:
        raise EngineError(f"{what} cannot be started: {error.strerror}", fix="free memory, then try again") from error
    if done.returncode < 0:
        raise EngineError(
            f"{what} was killed by {signal.Signals(-done.returncode).name} on {arguments[2]}",
            fix="free memory, then try again",
        )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()[-12:]
        raise EngineError(
            f"{what} failed on {arguments[2]}:\n    " + "\n    ".join(lines),
            fix="pip install polygraphy tensorrt-rtx",
        )
    return done.stdout
