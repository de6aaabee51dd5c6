"""The options of ``dvdq-serve``, read and checked before PyTorch is loaded."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.deploy.serve.request.model_names import named, named_export
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.system.devices import DEVICE_WORDS, check_device_word
from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.deploy.serve.settings import Limits, ModelSource, ObjectStore, SessionSettings

__all__ = [
    "KEY_VARIABLE",
    "LOOPBACK",
    "allowed_names",
    "check_open",
    "devices",
    "gpus",
    "read_files",
    "read_keys",
    "read_limits",
    "read_models",
    "read_one",
    "read_schedules",
    "read_sessions",
    "session_options",
]

KEY_VARIABLE = "DVDQ_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def read_sessions(options: dict[str, Any]) -> SessionSettings:
    """Return how a server that keeps its own queue opens sessions.

    Args:
        options: ``backend``, ``device``, ``compile``, ``fuse``, ``cuda_graphs``, ``attention``,
            ``attention_backend``, ``weights`` and ``plugins``.
    """
    from dvdquant.deploy.serve.settings import SessionSettings

    return SessionSettings(**{name: options[name] for name in session_options()})


def session_options() -> tuple[str, ...]:
    """Return the names of the options that say how sessions are opened."""
    from dvdquant.deploy.serve.settings import SessionSettings

    return tuple(each.name for each in fields(SessionSettings))


def read_one(exports: tuple[str, ...], options: dict[str, Any], what: str) -> ModelSource:
    """Return the one model of a command that takes no others, with its device checked.

    Args:
        exports: What was named.
        options: ``pipeline``, ``schedule``, ``device``.
        what: What is for one export.

    Raises:
        UnsupportedError: There are several, or the device is unknown.
        OutputError: The export cannot be used.
    """
    models = read_models(exports, options)
    if len(models) != 1:
        raise UnsupportedError(f"{what} is for one export", fix="start the command once for each")
    check_device_word(options["device"])
    return models[0]


def read_limits(options: dict[str, Any]) -> Limits:
    """Return what one request may ask for, and how many may wait.

    Args:
        options: The options of the command.
    """
    from dvdquant.deploy.serve.settings import Limits

    return Limits(
        queue=options["queue"],
        steps=options["max_steps"],
        pixels=options["max_pixels"],
        prompt=options["max_prompt"],
        body=options["max_body"],
        picture=options["max_picture"],
    )


def read_keys(path: Path | None) -> list[str]:
    """Return the API keys: those of the file, or that of the environment.

    Args:
        path: The file, or None.

    Raises:
        OutputError: The file cannot be read, holds no key, or a key is too short.
    """
    if path is None:
        keys = [os.environ[KEY_VARIABLE].strip()] if os.environ.get(KEY_VARIABLE) else []
    else:
        from dvdquant.system.files import read_limited

        try:
            lines = read_limited(path, 1 << 20).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", fix="name a text file"
            ) from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise OutputError(f"{path} holds no key", fix="write one key a line")
    if any(len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise OutputError(
            "an API key is shorter than 16 characters, or holds a space or a character that no header carries",
            fix="make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return keys


def check_open(host: str, has_keys: bool, is_open: bool) -> None:
    """Refuse a server that other machines reach without a key, unless ``--open`` allows it.

    Args:
        host: The address to listen at.
        has_keys: Whether there are API keys.
        is_open: Whether ``--open`` was given.

    Raises:
        UnsupportedError: There are neither keys nor ``--open``, and the address is no loopback.
    """
    if host not in LOOPBACK and not has_keys and not is_open:
        raise UnsupportedError(
            f"--host {host} is reached from other machines, and there is no API key",
            available="--api-key-file FILE, the variable " + KEY_VARIABLE + ", or --open to serve everybody",
            fix="give keys",
        )


def allowed_names(host: str, more: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that the Host header may have: on the loopback interface those of it, or a page could rebind a name.

    Args:
        host: The address to listen at.
        more: The values of ``--allow-host``.
    """
    own = (*LOOPBACK[:2], "[::1]")
    named = tuple(name.lower() for name in more)
    return (*own, *named) if host in LOOPBACK or named else ()


def read_files(address: str | None, endpoint: str | None, link_seconds: float) -> ObjectStore | None:
    """Return the object store of the clips, or None for the data folder.

    Args:
        address: ``s3://bucket/prefix``, or None.
        endpoint: The address of its server, or None.
        link_seconds: See :class:`.settings.ObjectStore`.

    Raises:
        UnsupportedError: Options for an object store are given, and no object store is.
    """
    from dvdquant.deploy.serve.settings import ObjectStore

    if address is None:
        for option, given in (("--s3-link-seconds", link_seconds), ("--s3-endpoint", endpoint)):
            if given:
                raise UnsupportedError(f"{option} is for clips in an object store", fix="give --files s3://bucket")
        return None
    return ObjectStore(address, endpoint, link_seconds)


def devices(text: str, workers: int) -> tuple[str, ...]:
    """Return the device of each worker.

    Args:
        text: ``auto`` (every GPU, or the CPU), or devices with commas between them.
        workers: Processes a device.

    Raises:
        UnsupportedError: There is no device in the text.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UnsupportedError(f"--device {shown(text)!r} names no device", available=DEVICE_WORDS, fix="name one")
    if names == ["auto"] and (count := gpus()) > 1:
        names = [f"cuda:{index}" for index in range(count)]
    return tuple(name for name in names for _ in range(workers))


def gpus(root: Path = Path("/dev")) -> int:
    """Return the number of GPUs that this process may use, without asking CUDA.

    Args:
        root: The folder of device files.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len([path for path in root.glob("nvidia*") if path.name[6:].isdecimal()])


def read_models(exports: tuple[str, ...], options: dict[str, Any]) -> tuple[ModelSource, ...]:
    """Return the models to serve; their manifests are read, nothing else.

    Args:
        exports: ``OUT`` or ``NAME=OUT``.
        options: ``pipeline``, each ``PATH`` for the only export, or ``NAME=PATH``; ``schedule``, files of dvdq-plan, each of
            the exports it was made for; and those of :func:`read_sessions`.

    Raises:
        UnsupportedError: Two models have one name, a name is of no use in requests, or an export's recipe excludes an option
            of sessions.
        OutputError: A folder is no export, or a schedule belongs to none of them.
    """
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.deploy.serve.settings import ModelSource
    from dvdquant.recipe import Recipe

    places: dict[str, str] = {}
    for text in exports:
        name, place = named_export(text)
        if name in places:
            raise UnsupportedError(f"two models are called {name}", fix=f"give one another name: NAME={shown(place)}")
        places[name] = place
    parts: dict[str, str] = {}
    for text in options["pipeline"]:
        name, place = named(text) or (next(iter(places)), text)
        if name not in places or (named(text) is None and len(places) > 1):
            raise UnsupportedError(
                f"--pipeline {shown(text)} is for no model here", available=sorted(places), fix="give NAME=PATH"
            )
        parts[name] = place
    manifests = {name: load_manifest(Path(place)) for name, place in places.items()}
    sessions = read_sessions(options)
    for manifest in manifests.values():
        sessions.check_for(Recipe.from_json(manifest.recipe))
    plans = read_schedules(options["schedule"], manifests)
    return tuple(ModelSource(name, place, parts.get(name), plans[name]) for name, place in places.items())


def read_schedules(paths: tuple[Path, ...], manifests: dict[str, Manifest]) -> dict[str, dict[str, str]]:
    """Return the schedules of each model, by their names in requests.

    Args:
        paths: The files.
        manifests: The manifests of the models.

    Raises:
        OutputError: A file is no schedule, or for no model here; the error is that of the last model tried.
    """
    from dvdquant.deploy.switching.schedule import Schedule

    found: dict[str, dict[str, str]] = {name: {} for name in manifests}
    for path in paths:
        refusal: OutputError | None = None
        fits = False
        for name, manifest in manifests.items():
            try:
                Schedule.load(path, manifest)
            except OutputError as error:
                refusal = error
            else:
                found[name][path.stem] = os.path.abspath(path)
                fits = True
        if not fits and refusal is not None:
            raise refusal
    return found
