"""The settings of a server, and those that its workers get."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dvdquant.hardware.weights import WeightPolicy
from dvdquant.ops.attention.libraries import library_for, refuse_library_in_16_bit
from dvdquant.recipe import Attention, Recipe

__all__ = [
    "EngineSettings",
    "Limits",
    "ModelSource",
    "ObjectStore",
    "ServerSettings",
    "SessionSettings",
    "WorkerSettings",
    "fields_of",
]


@dataclass(frozen=True)
class ModelSource:
    """An export that is served.

    Args:
        name: Its name in requests.
        out: The export folder.
        pipeline: Folder or hub id of text encoder, VAE and scheduler, or None for the exported model's own.
        schedules: Names in requests -> files of dvdq-plan.
    """

    name: str
    out: str
    pipeline: str | None = None
    schedules: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings by which engines run, on whatever device.

    Args:
        backend: See :func:`.open_generator`.
        compile: Compile the transformer's blocks.
        fuse: Whether what comes before quantized layers is in their kernels; None where ``compile`` is on.
        cuda_graphs: Repeat steps as CUDA graphs, where launches count.
        attention: ``16``, ``int8`` or ``fp8`` in PyTorch sessions; None is the recipe's.
        attention_backend: The library that computes it; None takes the first that is right and faster.
        weights: ``auto``, ``packed`` or ``expanded``: how sessions hold quantized weights.
        plugins: The absolute paths of TensorRT plugin libraries that engines need. They are text, which JSON holds.
    """

    backend: str = "auto"
    compile: bool = False
    fuse: bool | None = None
    cuda_graphs: bool = False
    attention: Attention | None = None
    attention_backend: str | None = None
    weights: WeightPolicy = "auto"
    plugins: tuple[str, ...] = ()

    def check_for(self, recipe: Recipe) -> None:
        """Refuse settings that an export's recipe excludes, before a worker starts.

        Args:
            recipe: The recipe of the export.

        Raises:
            UnsupportedError: A library of attention was asked for, and attention is in 16 bit.
        """
        refuse_library_in_16_bit(self.attention or recipe.attention, self.attention_backend)


@dataclass(frozen=True, kw_only=True)
class SessionSettings(EngineSettings):
    """The settings by which sessions are opened: how engines run, and where.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    device: str = "auto"

    def check_for(self, recipe: Recipe) -> None:
        """See :meth:`EngineSettings.check_for`; refuse a library that a CPU has none of, too, where that is the device.

        Args:
            recipe: The recipe of the export.

        Raises:
            UnsupportedError: See above, or the library of attention needs a GPU.
        """
        super().check_for(recipe)
        if self.attention_backend is not None and self.device in ("cpu", "cpu:0"):
            library_for(self.attention or recipe.attention, None, self.attention_backend)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of :func:`.open_generator` and :func:`.open_session` by their names."""
        return fields_of(SessionSettings, self)


def fields_of(kind: type[EngineSettings], settings: object) -> dict[str, Any]:
    """Return the values that settings have of a kind's fields, by their names.

    Args:
        kind: The settings whose fields are wanted.
        settings: Settings that have these fields, and maybe more.
    """
    return {each.name: getattr(settings, each.name) for each in fields(kind)}


@dataclass(frozen=True)
class ObjectStore:
    """A place for clips that several machines reach; keys are in the environment alone.

    Args:
        address: ``s3://bucket/prefix``.
        endpoint: The address of a server that is not Amazon's, or None.
        link_seconds: Seconds for which a client may fetch a clip there by itself; 0 sends it through the server.
    """

    address: str
    endpoint: str | None = None
    link_seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The limits of one request, and of the number that may wait.

    Args:
        queue: Jobs that may wait.
        steps: Denoising steps.
        pixels: Frames x height x width, or None for what the export takes.
        prompt: Characters of a prompt.
        body: Bytes of a request without its pictures.
        picture: Bytes of a picture.
        picture_pixels: Pixels of a picture.
        free_disk: Bytes that must be free in the data folder.
    """

    queue: int = 64
    steps: int = 100
    pixels: int | None = None
    prompt: int = 4096
    body: int = 1 << 20
    picture: int = 16 << 20
    picture_pixels: int = 24_000_000
    free_disk: int = 256 << 20

    @property
    def body_with_pictures(self) -> int:
        """Return the bytes of a request with two pictures, which base64 makes longer by a third."""
        return self.body + 2 * (self.picture * 4 // 3 + 1024)


@dataclass(frozen=True)
class WorkerSettings(SessionSettings):
    """The settings of a worker process, with those by which it opens sessions (:class:`SessionSettings`).

    Args:
        name: Its name in the store.
        models: The exports.
        data: The data folder.
        store: The address of a shared store, or None for the file in the data folder.
        files: The object store of the clips, or None for the data folder.
        lease: Seconds of a lease.
        keep: Seconds that a clip is kept.
        stall: Seconds without a sign of life after which a job counts as hanging.
        warm_up: Draw a short clip with each engine before the first request.
        log_format: ``json`` or ``text``.
        verbose: 0 to 2.
    """

    name: str
    models: tuple[ModelSource, ...]
    data: str
    store: str | None = None
    files: ObjectStore | None = None
    lease: float = 10.0
    keep: float = 86400.0
    stall: float = 1800.0
    warm_up: bool = True
    log_format: str = "json"
    verbose: int = 0


@dataclass(frozen=True)
class ServerSettings(EngineSettings):
    """The settings of the server, with those by which its workers run engines (:class:`EngineSettings`).

    Args:
        models: The exports.
        data: The data folder: queue, state, clips.
        store: The address of a shared store, or None for the file in the data folder.
        files: The object store of the clips, or None for the data folder.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        devices: One worker process for each.
        limits: What a request may ask for.
        api_keys: SHA-256 digests of the keys that are let in; with none, everybody is.
        allowed_hosts: Names that the Host header may have; empty allows all.
        keep: Seconds that a clip is kept.
        lease: Seconds of a lease.
        stall: Seconds without a sign of life after which a job counts as hanging.
        drain: Seconds that running jobs get when the server is stopped.
        warm_up: Draw a short clip with each engine before the first request.
        spare: Keep one more process that has imported everything, to take the place of a worker that dies.
        log_format: ``json`` or ``text``.
        verbose: 0 to 2.
    """

    models: tuple[ModelSource, ...]
    data: Path
    store: str | None = None
    files: ObjectStore | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    devices: tuple[str, ...] = ("auto",)
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[bytes, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    keep: float = 86400.0
    lease: float = 10.0
    stall: float = 1800.0
    drain: float = 120.0
    warm_up: bool = True
    spare: bool = True
    log_format: str = "json"
    verbose: int = 0

    def worker(self, name: str, device: str) -> WorkerSettings:
        """Return the settings of one worker.

        Args:
            name: Its name in the store.
            device: Its device.
        """
        return WorkerSettings(
            name=name,
            models=self.models,
            data=str(self.data),
            store=self.store,
            files=self.files,
            device=device,
            **fields_of(EngineSettings, self),
            lease=self.lease,
            keep=self.keep,
            stall=self.stall,
            warm_up=self.warm_up,
            log_format=self.log_format,
            verbose=self.verbose,
        )
