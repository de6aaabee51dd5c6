"""``dvdq-serve``: an HTTP server that draws clips with exports, by OpenAI's video API."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.clashes import refuse_clashes
from dvdquant.cli.clip_options import session_clashes
from dvdquant.cli.common import CUDA_GRAPHS, FUSE, ExamplesCommand, runs_on
from dvdquant.cli.paths import MODEL, PATH, WORD
from dvdquant.deploy.serve.model_names import named, named_export
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.system.devices import DEVICE_WORDS, check_device_word
from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.deploy.serve.settings import Limits, ModelSource, ObjectStore, SessionSettings

EXAMPLES = """
# one export on every GPU of this machine; a page at http://127.0.0.1:8000
dvdq-serve out/wan --data /srv/dvdquant

# two models under names of their own, two GPUs, for others in the network
dvdq-serve small=out/wan-1.3b large=out/wan-14b --device cuda:0,cuda:1 --host 0.0.0.0 --api-key-file keys.txt

# one of several servers: the queue in Postgres, clips in an object store
dvdq-serve out/wan --store postgresql://dvdq@db/jobs --files s3://clips/wan --s3-endpoint http://minio:9000

# a model repository for NVIDIA's Triton server
dvdq-serve out/wan --triton-repository models

# a worker behind NVIDIA Dynamo's frontend
DYN_DISCOVERY_BACKEND=etcd dvdq-serve out/wan --dynamo

# a schedule that dvdq-plan made, fewer jobs in the queue, clips kept for a week
dvdq-serve out/wan --schedule out/wan/schedule.json --queue 16 --keep-hours 168
"""

KEY_VARIABLE = "DVDQ_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MODULES = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


@click.command(cls=ExamplesCommand, examples=EXAMPLES)
@click.argument("exports", nargs=-1, required=True, type=WORD, metavar="[NAME=]OUT...")
@click.option(
    "--data",
    type=PATH,
    default=Path("dvdq-data"),
    show_default=True,
    metavar="FOLDER",
    help="Queue, state and clips. A server that starts again on it goes on where the last one ended.",
)
@click.option(
    "--store",
    type=WORD,
    metavar="URL",
    envvar="DVDQ_STORE",
    help="postgresql://user@host/database: a queue that several servers share, with --data on a shared disk.  "
    "[default: a file in --data, or $DVDQ_STORE]",
)
@click.option(
    "--files",
    type=WORD,
    metavar="URL",
    envvar="DVDQ_FILES",
    help="s3://bucket/prefix for the clips, instead of --data; keys come from the variables AWS_ACCESS_KEY_ID and so on.  "
    "[default: --data, or $DVDQ_FILES]",
)
@click.option(
    "--s3-endpoint",
    type=WORD,
    metavar="URL",
    envvar="DVDQ_S3_ENDPOINT",
    help="The server of --files, such as http://minio:9000.  [default: Amazon's, or $DVDQ_S3_ENDPOINT]",
)
@click.option(
    "--s3-link-seconds",
    type=click.FloatRange(0, 604_800),
    default=0,
    help="Send clients to a signed address there that lasts so long.  [default: clips go through this server]",
)
@click.option("--host", type=WORD, default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0 takes a free one."
)
@click.option(
    "--api-key-file",
    type=PATH,
    metavar="FILE",
    help=f"Keys that are let in, one a line.  [default: the one in ${KEY_VARIABLE}, if it is set]",
)
@click.option("--open", "is_open", is_flag=True, help="Serve everybody who reaches --host, without a key.")
@click.option(
    "--allow-host",
    multiple=True,
    type=WORD,
    metavar="NAME",
    help="A name that the Host header may have, besides those of this machine.  [default: any, if --host is not loopback]",
)
@click.option(
    "--pipeline", multiple=True, type=MODEL, metavar="[NAME=]PATH", help="Text encoder, VAE and scheduler of an export."
)
@click.option(
    "--schedule",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="A schedule of dvdq-plan; requests name it by its stem.",
)
@click.option("--queue", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Jobs that may wait.")
@click.option(
    "--max-steps", type=click.IntRange(1, 1000), default=100, show_default=True, help="Denoising steps of a request."
)
@click.option(
    "--max-pixels", type=click.IntRange(1), help="Frames x height x width of a request.  [default: the export's]"
)
@click.option(
    "--max-prompt", type=click.IntRange(1, 4096), default=4096, show_default=True, help="Characters of a prompt."
)
@click.option(
    "--max-body",
    type=click.IntRange(1024),
    default=1 << 20,
    show_default=True,
    help="Bytes of a request without pictures.",
)
@click.option(
    "--max-picture",
    type=click.IntRange(1024, 64 << 20),
    default=16 << 20,
    show_default=True,
    help="Bytes of a picture.",
)
@click.option(
    "--keep-hours", type=click.FloatRange(0.01), default=24.0, show_default=True, help="Hours until a clip is deleted."
)
@click.option(
    "--drain-seconds", type=click.FloatRange(0), default=120.0, show_default=True, help="For running jobs when stopped."
)
@click.option(
    "--stall-seconds",
    type=click.FloatRange(1),
    default=1800.0,
    show_default=True,
    help="Without a step, until a worker is ended.",
)
@click.option(
    "--triton-repository",
    type=PATH,
    metavar="FOLDER",
    help="Serve nothing, and write a model repository for NVIDIA's Triton server: dvdq_step and dvdq_video.",
)
@click.option(
    "--dynamo",
    is_flag=True,
    help="Serve no HTTP, and draw what an NVIDIA Dynamo frontend sends; Dynamo's settings come from DYN_* variables.",
)
@click.option("--no-warm-up", is_flag=True, help="Take jobs before each engine has run once.")
@click.option(
    "--no-spare",
    is_flag=True,
    help="Keep no spare process; it takes 0.6 GiB of memory, none of a GPU, and replaces a worker that dies.",
)
@runs_on
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Worker processes a device.")
@click.option("--compile", is_flag=True, help="Run in PyTorch and compile the transformer's blocks.")
@click.option("--fuse/--no-fuse", default=None, help=FUSE)
@click.option("--cuda-graphs", is_flag=True, help=CUDA_GRAPHS)
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", show_default=True)
@click.option("-v", "--verbose", count=True, help="More log; twice for everything.")
@click.version_option(__version__, prog_name="dvdq-serve")
def main(exports: tuple[str, ...], **options: Any) -> None:
    """Serve the exports in folders OUT over HTTP: OpenAI's /v1/videos, a live page, metrics."""
    require_packages()
    check_session_options(options)
    if options["triton_repository"] is not None:
        write_triton(exports, options)
        return
    if options["dynamo"]:
        run_dynamo(exports, options)
        return
    keys = read_keys(options["api_key_file"])
    check_open(options["host"], bool(keys), options["is_open"])
    models = read_models(exports, options["pipeline"], options["schedule"])
    names = devices(options["device"], options["workers"])
    for name in names:
        check_device_word(name)

    from dvdquant.deploy.serve.gate import key_digest
    from dvdquant.deploy.serve.server import serve
    from dvdquant.deploy.serve.settings import ServerSettings

    serve(
        ServerSettings(
            models=models,
            data=options["data"],
            store=options["store"],
            files=read_files(options["files"], options["s3_endpoint"], options["s3_link_seconds"]),
            host=options["host"],
            port=options["port"],
            devices=names,
            backend=options["backend"],
            compile=options["compile"],
            fuse=options["fuse"],
            cuda_graphs=options["cuda_graphs"],
            weights=options["weights"],
            limits=read_limits(options),
            api_keys=tuple(key_digest(key) for key in keys),
            allowed_hosts=hosts(options["host"], options["allow_host"]),
            keep=3600 * options["keep_hours"],
            stall=options["stall_seconds"],
            drain=options["drain_seconds"],
            warm_up=not options["no_warm_up"],
            spare=not options["no_spare"],
            log_format=options["log_format"],
            verbose=options["verbose"],
        )
    )


def check_session_options(options: dict[str, Any]) -> None:
    """Refuse options of sessions that have no effect, before an export is opened.

    Args:
        options: The options of the command.

    Raises:
        UnsupportedError: Two options exclude each other.
    """
    refuse_clashes(session_clashes(options))


def write_triton(exports: tuple[str, ...], options: dict[str, Any]) -> None:
    """Write a model repository for Triton.

    Args:
        exports: One export.
        options: ``triton_repository``, ``pipeline``, and those of sessions.

    Raises:
        UnsupportedError: There are several exports, or the device is unknown.
        OutputError: The export cannot be used, or the folder cannot be written.
    """
    if options["schedule"]:
        raise UnsupportedError("a model repository takes no schedules", fix="leave --schedule out")
    model = read_one(exports, options, "a model repository")

    from dvdquant.deploy.serve.triton_repository import write_repository

    folder = options["triton_repository"]
    for path in write_repository(folder, model, read_sessions(options)):
        click.echo(path)


def run_dynamo(exports: tuple[str, ...], options: dict[str, Any]) -> None:
    """Run as a worker of NVIDIA Dynamo until the process is stopped.

    Args:
        exports: One export.
        options: ``pipeline``, ``schedule``, ``log_format``, ``verbose``, those of sessions and the limits.

    Raises:
        UnsupportedError: There are several exports, the device is unknown, or Dynamo is not installed.
        DvdquantError: The export or its model cannot be used.
    """
    model = read_one(exports, options, "a worker of Dynamo")
    if importlib.util.find_spec("dynamo") is None or importlib.util.find_spec("dynamo.common") is None:
        raise UnsupportedError("--dynamo needs NVIDIA Dynamo", fix="pip install 'dvdquant[serve-dynamo]'")

    from dvdquant.deploy.serve.dynamo_worker import serve_dynamo
    from dvdquant.deploy.serve.logs import setup_server_log

    setup_server_log(options["log_format"], options["verbose"])
    serve_dynamo(model, read_sessions(options), read_limits(options))


def read_sessions(options: dict[str, Any]) -> SessionSettings:
    """Return how a server that keeps its own queue opens sessions.

    Args:
        options: ``backend``, ``device``, ``compile``, ``fuse``, ``cuda_graphs`` and ``weights``.
    """
    from dvdquant.deploy.serve.settings import SessionSettings

    return SessionSettings(**{each.name: options[each.name] for each in fields(SessionSettings)})


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
    models = read_models(exports, options["pipeline"], options["schedule"])
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


def require_packages() -> None:
    """UnsupportedError naming what the server needs and this environment lacks."""
    missing = [package for module, package in _MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UnsupportedError(f"dvdq-serve needs {', '.join(missing)}", fix="pip install 'dvdquant[serve]'")


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
    """Refuse to start a server that others reach and nobody said that they may.

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


def hosts(host: str, more: tuple[str, ...]) -> tuple[str, ...]:
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
        UnsupportedError: Options for an object store without one.
    """
    from dvdquant.deploy.serve.settings import ObjectStore

    if address is None:
        if link_seconds:
            raise UnsupportedError("--s3-link-seconds is for clips in an object store", fix="give --files s3://bucket")
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


def read_models(
    exports: tuple[str, ...], pipelines: tuple[str, ...], schedules: tuple[Path, ...]
) -> tuple[ModelSource, ...]:
    """Return the models to serve; their manifests are read, nothing else.

    Args:
        exports: ``OUT`` or ``NAME=OUT``.
        pipelines: ``PATH`` for the only export, or ``NAME=PATH``.
        schedules: Files of dvdq-plan; each belongs to the exports it was made for.

    Raises:
        UnsupportedError: Two models have one name, or a name is of no use in requests.
        OutputError: A folder is no export, or a schedule belongs to none of them.
    """
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.deploy.serve.settings import ModelSource

    places: dict[str, str] = {}
    for text in exports:
        name, place = named_export(text)
        if name in places:
            raise UnsupportedError(f"two models are called {name}", fix=f"give one another name: NAME={shown(place)}")
        places[name] = place
    parts: dict[str, str] = {}
    for text in pipelines:
        name, place = named(text) or (next(iter(places)), text)
        if name not in places or (named(text) is None and len(places) > 1):
            raise UnsupportedError(
                f"--pipeline {shown(text)} is for no model here", available=sorted(places), fix="give NAME=PATH"
            )
        parts[name] = place
    manifests = {name: load_manifest(Path(place)) for name, place in places.items()}
    plans = read_schedules(schedules, manifests)
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


if __name__ == "__main__":
    main()
