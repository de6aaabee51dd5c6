"""The process of a worker, and what its server says to it.

A process of its own, because an error of CUDA stays until the process ends, and because a clip that kills it must not
take the server along.

    python -m dvdquant.deploy.serve.workers.worker_process FD

``FD`` is the worker's end of the channel; the first message is its settings. If it is ``hold``, the process is a spare one:
it imports what those settings need, and waits for its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.deploy.serve.logs import log_event, setup_server_log
from dvdquant.deploy.serve.settings import ModelSource, ObjectStore, WorkerSettings
from dvdquant.deploy.serve.store.stores import open_store
from dvdquant.deploy.serve.workers.channel import Channel, Link
from dvdquant.deploy.serve.workers.left_workers import Berth
from dvdquant.deploy.serve.workers.worker import Worker, memory_facts, open_model
from dvdquant.errors import DvdquantError
from dvdquant.system.garbage import collect_less_often

if TYPE_CHECKING:
    from dvdquant.deploy.generation.generator import Generator
    from dvdquant.deploy.generation.session_options import WrapSession

__all__ = ["main", "settings_json", "workers_folder"]

_LAST_SECONDS = 20.0  # that a worker without a server gets to let go of its job
_ALONE_SECONDS = 60.0  # that a worker waits for the next server

log = logging.getLogger(__name__)


def main(words: list[str] | None = None, wrap_session: WrapSession | None = None) -> int:
    """Run a worker of a server; return the exit code.

    Args:
        words: The number of the inherited socket. The default is the command line.
        wrap_session: See :class:`Worker`.
    """
    (number,) = sys.argv[1:] if words is None else words
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which tells us
    collect_less_often()
    channel = Channel(socket.socket(fileno=int(number)))
    os.dup2(2, 1)  # what a library prints belongs into the log
    messages = iter(channel)
    first = next(messages, None)
    if first is not None and first["event"] == "hold":
        with _ends_with(channel):
            _import_for(_settings(first["settings"]))
        first = next(messages, None)
    if first is None:
        return 0  # the server was gone before it said anything
    settings = _settings(first["settings"])
    setup_server_log(settings.log_format, settings.verbose, worker=settings.name)
    store, files = open_store(settings.data, settings.keep, settings.store, settings.files)
    link = Link(channel)
    worker = Worker(settings, store, files, link.send, wrap_session)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    berth = None if store.shared else _berth(settings)
    threading.Thread(target=_obey, args=(worker, messages, link, berth), daemon=True).start()
    try:
        try:
            worker.open()
        except DvdquantError as error:
            log.error("the worker cannot start: %s", error)
            own = error.fix if error.has_own_fix else None
            link.send("refused", kind=type(error).__name__, what=error.what, available=error.available, fix=own)
            return 2
        code = worker.run()
    finally:
        if berth is not None:
            berth.close()
        store.close()
    link.send("gone")
    return code


@contextlib.contextmanager
def _ends_with(channel: Channel) -> Iterator[None]:
    """End the process in the middle of the block if the server ends: a spare one is of no use to the next server."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if channel.is_closed():
                os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _import_for(settings: WorkerSettings) -> None:
    """Import what workers with these settings import, and open what they open, short of engines and devices."""
    setup_server_log(settings.log_format, settings.verbose, worker="spare")
    for source in settings.models:
        try:
            generator = open_model(settings, source)
            _import_parts(generator)
            generator.close()
        except Exception as error:  # noqa: BLE001  the worker that needs the export refuses it, or imports what is missing
            log.warning("the spare worker has not prepared %s: %s: %s", source.name, type(error).__name__, error)
    import dvdquant.deploy.generation.video  # noqa: F401

    log_event(log, "spare_ready", resident_bytes=memory_facts()["resident_bytes"])


def _import_parts(generator: Generator) -> None:
    """Import the scheduler, the pipeline's class, what describes the transformer, and the backend of a model."""
    from dvdquant.deploy.sessions import full_name  # as open_model has by now: it imports PyTorch

    generator.check(generator.checker.example_request())
    for component in generator.artifact.components:
        generator.artifact.plan(component)
    name = generator.checker.pipeline_of(generator.checker.example_request())
    if name:
        getattr(importlib.import_module("diffusers"), name)
    backend = full_name(generator.options.backend)
    for module in ("onnxruntime", "tensorrt_rtx", "tensorrt"):
        if backend in ("auto", module):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
                if module == "onnxruntime":
                    importlib.import_module("dvdquant.deploy.sessions.onnxruntime")


def _berth(settings: WorkerSettings) -> Berth | None:
    """Return the place at which the next server finds this worker, or None where there can be none."""
    try:
        return Berth(workers_folder(settings.data), settings.name)
    except OSError as error:
        log.warning("a server that is started anew will not find this worker: %s", error)
        return None


def _obey(worker: Worker, messages: Iterator[dict[str, Any]], link: Link, berth: Berth | None) -> None:
    """Do what the server says. Without a server, wait for the next one for a while, then let go of the job and end."""
    told = _obey_one_server(worker, messages)
    end = time.monotonic() + _ALONE_SECONDS
    while berth is not None and not told:
        link.channel = None
        worker.begin_alone()
        channel = berth.wait(end - time.monotonic())
        if channel is None:
            break
        messages = iter(channel)
        first = next(messages, None)
        if first is None:
            continue
        if first["event"] != "settings" or _settings(first["settings"], worker.settings.name) != worker.settings:
            channel.send("other")
            break
        log_event(log, "worker_goes_on", text="another server goes on with this worker")
        channel.send("goes_on")
        link.channel = channel
        worker.end_alone()
        told = _obey_one_server(worker, messages)
        end = time.monotonic() + _ALONE_SECONDS
    worker.let_go()
    # A call of an engine cannot be interrupted; the lease runs out, so no job is lost.
    time.sleep(_LAST_SECONDS)
    os._exit(1)


def _obey_one_server(worker: Worker, messages: Iterator[dict[str, Any]]) -> bool:
    """Do what one server says until it is gone; return whether it has told the worker to end."""
    told = False
    for message in messages:
        kind = message["event"]
        if kind == "wake":
            worker.wake()
        elif kind == "stop":
            told = True
            worker.stop()
        elif kind == "let_go":
            told = True
            worker.let_go()
        elif kind == "reload":
            worker.reload()
        elif kind == "cancel":
            worker.cancel(message["video"])
    return told


def _settings(data: dict[str, Any], name: str | None = None) -> WorkerSettings:
    """Return the settings of a message, under another name if one is given."""
    models = tuple(ModelSource(**model) for model in data["models"])
    files = None if data["files"] is None else ObjectStore(**data["files"])
    return WorkerSettings(**{**data, "models": models, "files": files, **({} if name is None else {"name": name})})


def workers_folder(data: str | Path) -> Path:
    """Return the folder in which the next server finds the workers of the last one.

    Args:
        data: The data folder.
    """
    return Path(data) / "workers"


def settings_json(settings: WorkerSettings) -> dict[str, Any]:
    """Return the settings as the first message carries them.

    Args:
        settings: What the worker needs to know, of plain values.
    """
    return dataclasses.asdict(settings)


if __name__ == "__main__":
    sys.exit(main())
