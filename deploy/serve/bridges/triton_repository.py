"""A model repository for NVIDIA's Triton server: one step of an export, and whole clips with progress and cancel.

Both are models of Triton's Python backend. Their code is a few lines that find this package; the rest is in
:mod:`.triton_models`, so that a newer dvdquant needs no new repository.
"""

from __future__ import annotations

import json
import os
import site
from pathlib import Path
from typing import TYPE_CHECKING

import dvdquant
from dvdquant.errors import OutputError
from dvdquant.system.whole_file import write_whole

if TYPE_CHECKING:
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.serve.settings import ModelSource, SessionSettings

__all__ = ["write_repository"]

_CODE = """\
# The interpreter in Triton's stub is isolated: neither PYTHONPATH nor a virtual environment reaches it.
import os
import site
import sys

if os.environ.get("DVDQ_NUMPY"):  # a numpy 1 for a stub that knows no numpy 2, such as that of Triton 2.51
    sys.path.insert(0, os.environ["DVDQ_NUMPY"])
for _place in os.environ.get("DVDQ_SITE", {place!r}).split(os.pathsep):
    site.addsitedir(_place)

from dvdquant.deploy.serve.triton_models import {name} as TritonPythonModel  # noqa: E402, F401
"""
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP32", "bfloat16": "TYPE_FP32", "int64": "TYPE_INT64"}


def write_repository(folder: Path, source: ModelSource, sessions: SessionSettings) -> list[Path]:
    """Write the models ``dvdq_step`` and ``dvdq_video``; return their files.

    Args:
        folder: The repository. Other models in it stay.
        source: The export, with the absolute path under which the server finds it.
        sessions: How the server opens sessions; the device ``auto`` is the GPU that Triton gives the instance.

    Raises:
        OutputError: The folder cannot be written, or the export cannot be used.
    """
    from dvdquant.deploy.artifact import Artifact

    artifact = Artifact.open(source.out)
    settings = {
        "export": source.out, "pipeline": source.pipeline or "", "model": source.name,
        "sessions": json.dumps(sessions.arguments()),
    }  # fmt: skip
    kind = "KIND_CPU" if sessions.device == "cpu" else "KIND_GPU"
    texts = {"dvdq_step": _step_config(artifact), "dvdq_video": _video_config()}
    places = os.pathsep.join([str(Path(dvdquant.__file__).resolve().parents[1]), *site.getsitepackages()])
    written = []
    for name, text in texts.items():
        parameters = "".join(
            f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}\n'
            for key, value in settings.items()
        )
        config = f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\n{text}instance_group [ {{ count: 1 kind: {kind} }} ]\n'
        code = _CODE.format(place=places, name="StepModel" if name == "dvdq_step" else "VideoModel")
        for path, content in (
            (folder / name / "config.pbtxt", config + parameters),
            (folder / name / "1/model.py", code),
        ):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path.parent} cannot be made: {error.strerror}", fix="name another folder"
                ) from error
            write_whole(path, content.encode())
            written.append(path)
    return written


def _step_config(artifact: Artifact) -> str:
    """Return inputs and outputs of one call of the transformer, with its activation bits among the inputs."""
    family, sizes = artifact.family(artifact.components[0]), artifact.sizes
    sample = family.sample(sizes, artifact.dtype, 0)
    lines = []
    for name, tensor in sample.items():
        kind = _TYPES[str(tensor.dtype).removeprefix("torch.")]
        lines.append(f'  {{ name: "{name}" data_type: {kind} dims: [ {", ".join(["-1"] * tensor.dim())} ] }},\n')
    lines.append('  { name: "bits" data_type: TYPE_INT32 dims: [ 1 ] }\n')
    rank = sample["hidden_states"].dim()
    output = f'output [ {{ name: "sample" data_type: TYPE_FP32 dims: [ {", ".join(["-1"] * rank)} ] }} ]\n'
    return f"input [\n{''.join(lines)}]\n{output}"


def _video_config() -> str:
    return """\
input [
  { name: "prompt" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "request" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [
  { name: "progress" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "bits" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "mp4" data_type: TYPE_UINT8 dims: [ -1 ] }
]
model_transaction_policy { decoupled: true }
"""
