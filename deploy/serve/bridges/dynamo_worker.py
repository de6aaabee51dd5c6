"""A worker of NVIDIA Dynamo that draws clips: Dynamo's frontend takes ``/v1/videos``, and sends each request to a worker.

Dynamo's own settings come from its environment variables (``DYN_NAMESPACE``, ``DYN_DISCOVERY_BACKEND``, ...), as those of its
other workers do. Requests wait in this process, and are lost with it; Dynamo has no queue that outlives its processes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dynamo.common.backend import DiffusionEngine, EngineConfig, Worker, WorkerConfig
from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup, DynamoRuntimeConfig
from dynamo.common.storage import get_fs, upload_to_fs
from dynamo.llm import ModelInput
from dynamo.llm import exceptions as answers

from dvdquant.deploy.faults import fault_of
from dvdquant.deploy.serve.bridges.direct import DirectModel, DrawnClip
from dvdquant.deploy.serve.bridges.dynamo_request import fields_of
from dvdquant.deploy.serve.logs import log_event
from dvdquant.deploy.serve.request.wording import public_text
from dvdquant.deploy.serve.settings import Limits, ModelSource, SessionSettings
from dvdquant.errors import Cancelled, DvdquantError, UnsupportedError

__all__ = ["VideoEngine", "serve_dynamo"]

R = TypeVar("R")
_THREADS = 2  # one clip is drawn while another one is encoded

log = logging.getLogger(__name__)


class VideoEngine(DiffusionEngine):
    """An export as Dynamo calls it: a request of ``/v1/videos`` in, one answer with the clip out.

    Args:
        source: The export and the model of its pipeline.
        sessions: How its sessions are opened.
        limits: What one request may ask for.
        store: Where clips go that are asked for by address: a URL of fsspec.
        address: The address under which clients find that place, or None to answer with the URL itself.
    """

    def __init__(
        self, source: ModelSource, sessions: SessionSettings, *, limits: Limits, store: str, address: str | None
    ) -> None:
        self.source, self.sessions, self.limits = source, sessions, limits
        self.store, self.address = store, address
        self._model: DirectModel | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "draw")
        self._stops: dict[str, threading.Event] = {}

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[VideoEngine, WorkerConfig]:
        """Refuse: ``dvdq-serve --dynamo`` makes the engine, with options of its own.

        Args:
            argv: Options of Dynamo.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("the engine takes no options of Dynamo", fix="dvdq-serve OUT --dynamo")

    async def start(self, worker_id: int) -> EngineConfig:
        """Open the export, and run each engine once.

        Args:
            worker_id: Dynamo's number of the worker.
        """
        del worker_id

        def opened() -> DirectModel:
            model = DirectModel(self.source, self.sessions, self.limits)
            model.generator.warm_up()
            return model

        self._model = await self._in_thread(opened)
        return EngineConfig(model=self.source.name, served_model_name=self.source.name)

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Draw the clip of a request, and yield the answer.

        Args:
            request: The body of ``/v1/videos`` as Dynamo's frontend forwards it.
            context: Dynamo's context of the request; its id names it in :meth:`abort`.
        """
        model, begin = self._model, time.perf_counter()
        assert model is not None
        stop = self._stops.setdefault(context.id(), threading.Event())

        def drawn() -> DrawnClip:
            try:
                return model.draw(checked, pictures, cancel=stop)
            except Cancelled:
                # Here, because nobody waits any more where Dynamo closes the generator.
                log_event(log, "request_cancelled", request=context.id())
                raise

        try:
            fields, by_address = fields_of(request)
            checked, pictures = model.check(fields)
            clip = await self._in_thread(drawn)
            place = await self._delivered(context.id(), clip, by_address)
        except Exception as error:  # whatever it is, Dynamo needs a class of its own to choose the HTTP status by
            raise _answer(error) from error
        finally:
            stop.set()  # whoever closes this generator early no longer wants the clip
            self._stops.pop(context.id(), None)
        yield {
            "id": context.id(),
            "object": "video",
            "model": self.source.name,
            "status": "completed",
            "progress": 100,
            "created": int(time.time()),
            "data": [{"output_format": "mp4", "fps": round(clip.fps), **place}],
            "inference_time_s": round(time.perf_counter() - begin, 3),
        }

    async def abort(self, context: Any) -> None:
        """End a request before its next call of the transformer.

        Args:
            context: Dynamo's context of the request.
        """
        if (stop := self._stops.get(context.id())) is not None:
            stop.set()

    async def cleanup(self) -> None:
        """Free the engines. A clip that is being drawn ends with an error."""
        for stop in list(self._stops.values()):
            stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._model is not None:
            self._model.close()

    async def _delivered(self, request_id: str, clip: DrawnClip, by_address: bool) -> dict[str, str]:
        if not by_address:
            return {"b64_json": base64.b64encode(clip.mp4).decode()}
        return {"url": await upload_to_fs(get_fs(self.store), f"videos/{request_id}.mp4", clip.mp4, self.address)}

    async def _in_thread(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _answer(error: Exception) -> Any:
    """Return an error as Dynamo sends it: of the class that decides the HTTP status, and without a path of this machine."""
    if isinstance(error, answers.DynamoException):
        return error
    text = public_text(error, "; ") if isinstance(error, DvdquantError) else type(error).__name__
    if isinstance(error, Cancelled):
        return answers.Cancelled(text)
    fault = fault_of(error)
    if fault == "request":
        return answers.InvalidArgument(text)
    log.error("a request failed", exc_info=error)
    return answers.EngineShutdown(text) if fault == "process" else answers.Unknown(text)


def serve_dynamo(source: ModelSource, sessions: SessionSettings, limits: Limits) -> None:
    """Register the export with Dynamo and draw what its frontend sends, until the process is stopped.

    Args:
        source: The export and the model of its pipeline.
        sessions: How its sessions are opened.
        limits: What one request may ask for.
    """
    parser = argparse.ArgumentParser()
    DynamoRuntimeArgGroup().add_arguments(parser)
    runtime = DynamoRuntimeConfig.from_cli_args(parser.parse_args([]))  # the environment alone
    runtime.validate()
    config = WorkerConfig.from_runtime_config(
        runtime,
        source.name,
        source.name,
        model_input=ModelInput.Text,
        endpoint_types="videos",
        component="dvdquant",
        enable_kv_routing=False,
    )
    engine = VideoEngine(
        source,
        sessions,
        limits=limits,
        store=runtime.media_output_fs_url,
        address=runtime.media_output_http_url,
    )

    async def run() -> None:
        await Worker(engine, config).run()

    asyncio.run(run())
