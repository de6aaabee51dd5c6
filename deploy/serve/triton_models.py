"""The models that Triton's Python backend runs; ``triton_python_backend_utils`` exists in its stub alone.

Outputs go by DLPack, because an older stub takes arrays of numpy 2 for empty ones.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import torch
import triton_python_backend_utils as backend

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.faults import fault_of
from dvdquant.deploy.serve.bridges.direct import DirectModel
from dvdquant.deploy.serve.request.wording import public_text
from dvdquant.deploy.serve.settings import ModelSource, SessionSettings
from dvdquant.deploy.sessions import open_session
from dvdquant.errors import Cancelled, DvdquantError, ShapeError, UnsupportedError
from dvdquant.system.files import strict_json
from dvdquant.system.torch_hooks import compile_in_this_process

__all__ = ["StepModel", "VideoModel", "triton_error"]

log = logging.getLogger(__name__)


class StepModel:
    """One call of the transformer: the graph's inputs and ``bits`` in, ``sample`` in fp32 out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engines.

        Args:
            args: What Triton says of the instance.
        """
        settings = _settings(args)
        self.session = open_session(Artifact.open(settings["export"]), **_sessions(settings, args).arguments())
        self.names = [spec.name for spec in self.session.family.inputs(self.session.sizes)]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, or say what is wrong with it.

        Args:
            requests: Triton's requests.
        """
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = {name: torch.from_numpy(_input(request, name)) for name in self.names}
            bits = int(_input(request, "bits").ravel()[0])
            if bits not in self.session.bits:
                raise UnsupportedError(
                    f"the export has no {bits}-bit activations", available=[f"{b} bits" for b in self.session.bits]
                )
            with torch.inference_mode():
                output = self.session.run(inputs, bits).float().cpu().contiguous()
        except Exception as error:  # noqa: BLE001  it is the answer
            return backend.InferenceResponse(error=triton_error(error))
        return backend.InferenceResponse([backend.Tensor.from_dlpack("sample", output)])

    def finalize(self) -> None:
        """Free the engines."""
        self.session.close()


class VideoModel:
    """A clip: ``prompt``, and ``request`` as JSON in the names of ``/v1/videos``; a response a step, then the mp4."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model.

        Args:
            args: What Triton says of the instance.
        """
        settings = _settings(args)
        self.model = DirectModel(
            ModelSource(settings["model"], settings["export"], settings["pipeline"] or None),
            _sessions(settings, args),
        )

    def execute(self, requests: list[Any]) -> None:
        """Answer each request with several responses.

        Args:
            requests: Triton's requests.
        """
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._draw(request, sender)
            except Exception as error:  # noqa: BLE001  it is the answer
                response = backend.InferenceResponse(error=triton_error(error))
                sender.send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _draw(self, request: Any, sender: Any) -> None:
        checked, pictures = self.model.check(self._fields(request))
        if pictures:
            # The interpreter of the stub cannot start the process that decodes them.
            raise UnsupportedError("pictures are not taken through Triton", fix="use dvdq-serve")

        def step(record: Any) -> None:
            if request.is_cancelled():
                raise Cancelled("the client has cancelled the request")
            if record.step not in seen:
                seen.add(record.step)
                percent = min(99, 100 * (record.step + 1) // checked.steps)
                sender.send(_response(percent, record.bits or 0, torch.zeros(0, dtype=torch.uint8)))

        seen: set[int] = set()
        clip = self.model.draw(checked, {}, step)
        data = torch.frombuffer(bytearray(clip.mp4), dtype=torch.uint8)
        sender.send(_response(100, 0, data), flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _fields(self, request: Any) -> dict[str, Any]:
        more = backend.get_input_tensor_by_name(request, "request")
        fields: Any = {}
        if more is not None:
            try:
                fields = strict_json(_text(more.as_numpy()).encode(), max_depth=8)
            except ValueError as error:
                raise ShapeError(
                    f"request is no valid JSON: {error}", fix="put one JSON object into the input request"
                ) from None
            if not isinstance(fields, dict):
                raise ShapeError("request is no JSON object", fix='send an object such as {"num_inference_steps": 30}')
        return {**fields, "prompt": _text(_input(request, "prompt"))}

    def finalize(self) -> None:
        """Free the model."""
        self.model.close()


def _settings(args: dict[str, str]) -> dict[str, str]:
    parameters = json.loads(args["model_config"])["parameters"]
    return {name: value["string_value"] for name, value in parameters.items()}


def _sessions(settings: dict[str, str], args: dict[str, str]) -> SessionSettings:
    """Return how sessions are opened, with the GPU that Triton gives the instance in the place of ``auto``."""
    # A repository of before names backend and device alone.
    given = settings.get("sessions") or json.dumps({name: settings[name] for name in ("backend", "device")})
    sessions = SessionSettings(**json.loads(given))
    if sessions.compile:
        # Inductor compiles in processes that it starts from the interpreter's own program, which is Triton's stub here.
        compile_in_this_process()
    if sessions.device != "auto" or args.get("model_instance_kind") != "GPU":
        return sessions
    return replace(sessions, device=f"cuda:{args['model_instance_device_id']}")


def _input(request: Any, name: str) -> Any:
    return backend.get_input_tensor_by_name(request, name).as_numpy()


def _text(values: Any) -> str:
    value = values.ravel()[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _response(progress: int, bits: int, data: torch.Tensor) -> Any:
    tensors = {
        "progress": torch.tensor([progress], dtype=torch.int32),
        "bits": torch.tensor([bits], dtype=torch.int32),
        "mp4": data,
    }
    return backend.InferenceResponse([backend.Tensor.from_dlpack(name, value) for name, value in tensors.items()])


def triton_error(error: Exception) -> Any:
    """Return an error as Triton sends it: with a code of gRPC, and no path of this machine.

    Args:
        error: The error of a request. One that is no fault of the request is logged.
    """
    # Of an error that is not ours, the log of the server has the text.
    text = public_text(error, "; ") if isinstance(error, DvdquantError) else type(error).__name__
    if fault_of(error) == "request":
        code = backend.TritonError.CANCELLED if isinstance(error, Cancelled) else backend.TritonError.INVALID_ARG
    else:
        log.error("a request failed", exc_info=error)
        code = backend.TritonError.INTERNAL
    return backend.TritonError(text, code)
