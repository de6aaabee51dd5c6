r"""dvdq-serve on a Ray cluster: the HTTP interface and the workers as deployments of Ray Serve.

    DVDQ_STORE=postgresql://dvdq@db/jobs DVDQ_API_KEY=… serve run dvdquant.deploy.serve.ray_app:app \
        models=out/wan files=s3://clips/wan max_workers=8

Ray places the workers (one GPU each), starts them again, and changes their number. Jobs go another way than Ray's requests: the
interface writes them into the store, and the workers pull them from there, as those of ``dvdq-serve`` do. So a job outlives
every process of the cluster, and a worker that dies loses nothing but its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from dvdquant.artifact.manifest import load_manifest
from dvdquant.clashes import refuse_clashes, session_clashes
from dvdquant.deploy.serve.bridges.queue_policy import STORE_VARIABLE
from dvdquant.deploy.serve.bridges.ray_figures import RayFigures
from dvdquant.deploy.serve.expiry import expire_for_ever
from dvdquant.deploy.serve.http.app import make_app
from dvdquant.deploy.serve.http.gate import key_digest
from dvdquant.deploy.serve.logs import log_event, setup_server_log
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.request.model_names import named_export
from dvdquant.deploy.serve.service import Service
from dvdquant.deploy.serve.settings import (
    EngineSettings,
    Limits,
    ModelSource,
    ObjectStore,
    ServerSettings,
    WorkerSettings,
    fields_of,
)
from dvdquant.deploy.serve.store.stores import open_store
from dvdquant.deploy.serve.workers.worker import Worker
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.weights import WeightPolicy
from dvdquant.ops.attention.libraries import check_library
from dvdquant.recipe import Attention, Recipe
from dvdquant.system.devices import BackendWord
from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.deploy.generation.session_options import WrapSession

__all__ = ["RayArguments", "app", "bind_app"]

KEY_VARIABLE = "DVDQ_API_KEY"
_LAST_SECONDS = 30.0  # that a worker gets to put its job back, after its time to drain
_LOOK_SECONDS = 2.0  # between two looks of the interface at the workers
_PATIENCE = 10.0  # seconds for an answer of a worker

log = logging.getLogger(__name__)


class RayArguments(BaseModel):
    """The arguments that ``serve run`` takes as NAME=VALUE.

    The store and the API key are in the environment, because Ray shows arguments.

    Attributes:
        models: Exports with commas between them, each OUT or NAME=OUT; every node reaches them by this path.
        pipeline: Text encoder, VAE and scheduler, if they are not the exported model's own.
        files: ``s3://bucket/prefix`` for the clips; without it, a folder below ``data``, which every node must reach.
        s3_endpoint: The server of ``files``, if it is not Amazon's.
        data: A folder of the node.
        min_workers: The least number of workers; 0 lets go of every GPU while nothing waits.
        max_workers: The greatest number of workers.
        jobs_per_worker: Jobs that wait or run for each worker.
        up_seconds: How long more workers must be wanted before they start.
        down_seconds: How long fewer must be wanted before some stop.
        gpus: GPUs of a worker; 0 runs it on the CPU.
        cpus: CPU cores of a worker.
        interfaces: Replicas of the HTTP interface.
        open: True to serve without an API key whoever reaches Ray's proxy.
        backend: See :class:`.settings.EngineSettings`, and so are the next seven.
        compile: Compile the transformer's blocks.
        fuse: Whether what comes before quantized layers is in their kernels; without it, where ``compile`` is on.
        cuda_graphs: Repeat steps as CUDA graphs, where launches count.
        attention: ``16``, ``int8`` or ``fp8`` in PyTorch sessions; without it, the recipe's.
        attention_backend: The library that computes it; without it, the first that is right and faster.
        weights: ``auto``, ``packed`` or ``expanded``: how sessions hold quantized weights.
        plugins: TensorRT plugin libraries with commas between them; every node reaches them by these paths.
        queue: Jobs that may wait.
        max_steps: Denoising steps of a request.
        keep_hours: Hours until a clip is deleted.
        drain_seconds: Seconds that a running job gets when its worker is stopped.
        stall_seconds: Seconds without a step until a worker is ended.
        warm_up: Run each engine once before jobs are taken.
    """

    model_config = ConfigDict(extra="forbid")

    models: str
    pipeline: str | None = None
    files: str | None = None
    s3_endpoint: str | None = None
    data: str = os.path.join(tempfile.gettempdir(), "dvdq-data")
    min_workers: int = Field(1, ge=0)
    max_workers: int = Field(1, ge=1)
    jobs_per_worker: float = Field(1.0, gt=0)
    up_seconds: float = Field(10.0, ge=0)
    down_seconds: float = Field(300.0, ge=0)
    gpus: float = Field(1.0, ge=0)
    cpus: float = Field(1.0, ge=0)
    interfaces: int = Field(1, ge=1)
    open: bool = False
    backend: BackendWord = "auto"
    compile: bool = False
    fuse: bool | None = None
    cuda_graphs: bool = False
    attention: Attention | None = None
    attention_backend: str | None = None
    weights: WeightPolicy = "auto"
    plugins: tuple[str, ...] = ()
    queue: int = Field(64, ge=1)
    max_steps: int = Field(100, ge=1, le=1000)
    keep_hours: float = Field(24.0, gt=0)
    drain_seconds: float = Field(120.0, ge=0)
    stall_seconds: float = Field(1800.0, ge=1)
    warm_up: bool = True

    @field_validator("plugins", mode="before")
    @classmethod
    def _split_plugins(cls, value: Any) -> Any:
        """Take paths with commas between them apart, as ``serve run`` gives them."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    def server(self) -> ServerSettings:
        """Return the settings of the interface.

        Raises:
            UnsupportedError: There is no API key, and nobody said that everybody may come; two arguments exclude each
                other, or the recipe of an export that this node reaches; or no library of attention has the name.
            OutputError: A folder that this node reaches is no export.
        """
        refuse_clashes(session_clashes(fields_of(EngineSettings, self)))
        if self.attention_backend is not None:
            check_library(self.attention_backend)
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key and not self.open:
            raise UnsupportedError(
                f"Ray's proxy may be reached from other machines, and {KEY_VARIABLE} is not set",
                available=f"the variable {KEY_VARIABLE} on every node, or open=true to serve everybody",
                fix="set it before ray start",
            )
        if self.s3_endpoint is not None and self.files is None:
            raise UnsupportedError("s3_endpoint is for clips in an object store", fix="give files=s3://bucket")
        settings = ServerSettings(
            models=_models(self.models, self.pipeline),
            data=Path(self.data),
            files=None if self.files is None else ObjectStore(self.files, self.s3_endpoint),
            devices=(),
            **fields_of(EngineSettings, self),
            limits=Limits(queue=self.queue, steps=self.max_steps),
            api_keys=(key_digest(key),) if key else (),
            keep=3600 * self.keep_hours,
            drain=self.drain_seconds,
            stall=self.stall_seconds,
            warm_up=self.warm_up,
        )
        for model in settings.models:
            if Path(model.out).is_dir():  # else the interface looks, on a node that reaches it
                settings.check_for(Recipe.from_json(load_manifest(Path(model.out)).recipe))
        return settings


def _models(text: str, pipeline: str | None) -> tuple[ModelSource, ...]:
    places = [named_export(part.strip()) for part in text.split(",")]
    if len(dict(places)) != len(places):
        raise UnsupportedError(f"two models of {shown(text, 200)} have one name", fix="give NAME=OUT")
    return tuple(ModelSource(name, place, pipeline) for name, place in places)


def _open(settings: ServerSettings | WorkerSettings) -> Any:
    """Return store and files; the address of the store is in the environment of the node."""
    url = os.environ.get(STORE_VARIABLE)
    if not url:
        raise UnsupportedError(
            f"{STORE_VARIABLE} is not set: interface and workers share their queue in Postgres",
            available="postgresql://user:password@host/database",
            fix="set it on every node, before ray start",
        )
    Path(settings.data).mkdir(parents=True, exist_ok=True, mode=0o700)
    return open_store(settings.data, settings.keep, url, settings.files)


class WorkerReplica:
    """A worker of one device in a replica of Ray Serve: it pulls jobs until the replica is stopped.

    Args:
        settings: What the worker needs to know; its name is made here.
        drain: Seconds that a running job gets at the end.
        wrap_session: See :class:`.worker.Worker`.
    """

    def __init__(self, settings: WorkerSettings, drain: float, wrap_session: WrapSession | None = None) -> None:
        name = f"ray-{os.getpid()}-{secrets.token_hex(4)}"
        setup_server_log(settings.log_format, settings.verbose, worker=name)
        settings = dataclasses.replace(settings, name=name)
        self.drain = drain
        self.figures = RayFigures()
        self.models: dict[str, Any] = {}
        store, files = _open(settings)
        self.store = store
        self.worker = Worker(settings, store, files, self._told, wrap_session)
        self.worker.open()
        self._thread = threading.Thread(target=self.worker.run, name="worker", daemon=True)
        self._thread.start()

    def _told(self, event: str, **fields: Any) -> None:
        if event == "ready":
            self.models = fields["models"]
        self.figures.take({"event": event, **fields})

    def facts(self) -> dict[str, Any]:
        """Return what the worker is, and what runs its models."""
        return {"label": self.worker.settings.name, "pid": os.getpid(), "models": self.models}

    def check_health(self) -> None:
        """Let Ray start another process where this one cannot go on.

        Raises:
            RuntimeError: The worker has ended.
        """
        if not self._thread.is_alive():
            raise RuntimeError(f"the worker has ended with code {self.worker.code}")

    def __del__(self) -> None:
        """Drain: Ray calls it before it stops the replica, and waits."""
        worker = getattr(self, "worker", None)
        thread = getattr(self, "_thread", None)
        if worker is None or thread is None or not thread.is_alive():
            return
        log_event(log, "draining", seconds=self.drain)
        worker.stop()
        thread.join(self.drain)
        if thread.is_alive():
            worker.let_go()
            thread.join(_LAST_SECONDS)
        self.store.close()


@dataclasses.dataclass(frozen=True)
class _Seen:
    """See :class:`.service.WorkerState`."""

    label: str
    ready: bool
    facts: dict[str, Any]


class RayWorkers:
    """The workers as the interface sees them. They look at the store by themselves, so nothing is told to them.

    Args:
        handle: Ray's handle of the workers' deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._seen: tuple[_Seen, ...] = ()
        threading.Thread(target=self._look, name="look", daemon=True).start()

    @property
    def ready(self) -> tuple[_Seen, ...]:
        """Return the workers that take jobs."""
        return self._seen

    @property
    def workers(self) -> tuple[_Seen, ...]:
        """Return the workers that are known."""
        return self._seen

    def tell(self, event: str, **fields: Any) -> None:
        """Do nothing, see :meth:`.service.Workers.tell`: a worker sees a cancel at its next step."""

    def reload(self) -> None:
        """Do nothing: exports are opened anew by deploying the application anew."""

    def _look(self) -> None:
        pause = threading.Event()
        while not pause.wait(_LOOK_SECONDS):
            try:
                count = _running()
                said = self._handle.facts.remote().result(timeout_s=_PATIENCE) if count else {}
            except Exception as error:  # noqa: BLE001  Ray's errors are many; a worker that starts does not answer
                log.info("no worker answers: %s: %s", type(error).__name__, error)
                count, said = 0, {}
            self._seen = (_Seen("ray", True, said.get("models", {})),) * count


def _running() -> int:
    """Return the number of replicas that run."""
    name = serve.get_replica_context().app_name
    found = serve.status().applications[name].deployments["workers"].replica_states
    return int(found.get("RUNNING", 0))


class Interface:
    """The HTTP interface in a replica of Ray Serve.

    Args:
        settings: The settings of a server without workers of its own.
        workers: Ray's handle of the workers' deployment.
    """

    def __init__(self, settings: ServerSettings, workers: Any) -> None:
        setup_server_log(settings.log_format, settings.verbose)
        store, files = _open(settings)
        self.service = Service(settings, store, files, RayWorkers(workers), ServerMetrics())
        self._expiry = asyncio.ensure_future(expire_for_ever(self.service))

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application that Ray's proxy passes requests to."""
        return make_app(self.service)

    def __del__(self) -> None:
        """End the threads, and the connections to the store."""
        expiry, service = getattr(self, "_expiry", None), getattr(self, "service", None)
        if expiry is None or service is None:
            return  # it could not be made
        with contextlib.suppress(RuntimeError):  # its loop has ended, and the task with it
            expiry.cancel()
        service.close()
        service.store.close()


def app(args: RayArguments) -> Any:
    """Return the application for ``serve run`` and ``serve build``.

    Args:
        args: See :class:`RayArguments`.

    Raises:
        UnsupportedError: Arguments contradict each other, or the environment lacks what they need.
    """
    return bind_app(args)


def bind_app(args: RayArguments, wrap_session: WrapSession | None = None) -> Any:
    """Return the application.

    Args:
        args: See :class:`RayArguments`.
        wrap_session: See :class:`.worker.Worker`; Ray pickles it.

    Raises:
        UnsupportedError: Arguments contradict each other, or the environment lacks what they need.
    """
    settings = args.server()
    if not os.environ.get(STORE_VARIABLE):
        _open(settings)  # says what is missing
    worker = settings.worker("ray", "cuda:0" if args.gpus else "cpu")
    scaling = AutoscalingConfig(
        min_replicas=args.min_workers,
        max_replicas=max(args.min_workers, args.max_workers),
        upscale_delay_s=args.up_seconds,
        downscale_delay_s=args.down_seconds,
        policy=AutoscalingPolicy(
            policy_function="dvdquant.deploy.serve.bridges.queue_policy:QueuePolicy",
            policy_kwargs={"jobs_per_worker": args.jobs_per_worker},
        ),
    )
    workers = serve.deployment(WorkerReplica).options(
        name="workers",
        autoscaling_config=scaling,
        ray_actor_options={"num_gpus": args.gpus, "num_cpus": args.cpus},
        graceful_shutdown_timeout_s=args.drain_seconds + _LAST_SECONDS + 10,
        health_check_period_s=5,
        health_check_timeout_s=60,
    )
    interface = serve.deployment(serve.ingress()(Interface)).options(
        name="interface",
        num_replicas=args.interfaces,
        ray_actor_options={"num_cpus": min(0.1, args.cpus)},
        max_ongoing_requests=1000,
    )
    return interface.bind(settings, workers.bind(worker, args.drain_seconds, wrap_session))
