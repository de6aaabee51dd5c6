"""``dvdq-serve``: an HTTP server that draws clips with exports, by OpenAI's video API."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from dvdquant import __version__
from dvdquant.clashes import refuse_clashes, session_clashes
from dvdquant.cli.serve_options import (
    KEY_VARIABLE,
    allowed_names,
    check_open,
    devices,
    read_files,
    read_keys,
    read_limits,
    read_models,
    read_one,
    read_sessions,
    session_options,
)
from dvdquant.cli.shared.attention_options import takes_attention
from dvdquant.cli.shared.common import CUDA_GRAPHS, FUSE, ExamplesCommand, refuse_besides, runs_on, takes_plugins
from dvdquant.cli.shared.paths import MODEL, PATH, WORD
from dvdquant.errors import UnsupportedError
from dvdquant.system.devices import check_device_word
from dvdquant.system.plugin_file import plugin_paths

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
@takes_attention
@takes_plugins
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", show_default=True)
@click.option("-v", "--verbose", count=True, help="More log; twice for everything.")
@click.version_option(__version__, prog_name="dvdq-serve")
def main(exports: tuple[str, ...], **options: Any) -> None:
    """Serve the exports in folders OUT over HTTP: OpenAI's /v1/videos, a live page, metrics."""
    require_packages()
    refuse_clashes(session_clashes(options))
    options["plugins"] = tuple(map(str, plugin_paths(options["plugins"])))
    if options["triton_repository"] is not None:
        write_triton(exports, options)
        return
    if options["dynamo"]:
        run_dynamo(exports, options)
        return
    keys = read_keys(options["api_key_file"])
    check_open(options["host"], bool(keys), options["is_open"])
    models = read_models(exports, options)
    names = devices(options["device"], options["workers"])
    for name in names:
        check_device_word(name)

    from dvdquant.deploy.serve.http.gate import key_digest
    from dvdquant.deploy.serve.server import serve
    from dvdquant.deploy.serve.settings import EngineSettings, ServerSettings

    serve(
        ServerSettings(
            models=models,
            data=options["data"],
            store=options["store"],
            files=read_files(options["files"], options["s3_endpoint"], options["s3_link_seconds"]),
            host=options["host"],
            port=options["port"],
            devices=names,
            **{each.name: options[each.name] for each in fields(EngineSettings)},
            limits=read_limits(options),
            api_keys=tuple(key_digest(key) for key in keys),
            allowed_hosts=allowed_names(options["host"], options["allow_host"]),
            keep=3600 * options["keep_hours"],
            stall=options["stall_seconds"],
            drain=options["drain_seconds"],
            warm_up=not options["no_warm_up"],
            spare=not options["no_spare"],
            log_format=options["log_format"],
            verbose=options["verbose"],
        )
    )


def write_triton(exports: tuple[str, ...], options: dict[str, Any]) -> None:
    """Write a model repository for Triton.

    Args:
        exports: One export.
        options: ``triton_repository``, ``pipeline``, and those of sessions.

    Raises:
        UnsupportedError: There are several exports, the device is unknown, or another option has no effect.
        OutputError: The export cannot be used, or the folder cannot be written.
    """
    refuse_besides(
        "--triton-repository writes files and serves nothing",
        ("triton_repository", "pipeline", *session_options(), "log_format", "verbose"),
        "leave out what does not apply, or --triton-repository",
    )
    model = read_one(exports, options, "a model repository")

    from dvdquant.deploy.serve.bridges.triton_repository import write_repository

    folder = options["triton_repository"]
    for path in write_repository(folder, model, read_sessions(options)):
        click.echo(path)


def run_dynamo(exports: tuple[str, ...], options: dict[str, Any]) -> None:
    """Run as a worker of NVIDIA Dynamo until the process is stopped.

    Args:
        exports: One export.
        options: ``pipeline``, ``schedule``, ``log_format``, ``verbose``, those of sessions and the limits.

    Raises:
        UnsupportedError: There are several exports, the device is unknown, another option has no effect, or Dynamo is not
            installed.
        DvdquantError: The export or its model cannot be used.
    """
    limits = ("max_steps", "max_pixels", "max_prompt", "max_picture")
    refuse_besides(
        "--dynamo serves no HTTP, keeps no queue, and warms up in any case",
        ("dynamo", "pipeline", "schedule", *session_options(), *limits, "log_format", "verbose"),
        "leave out what does not apply, or --dynamo",
    )
    model = read_one(exports, options, "a worker of Dynamo")
    if importlib.util.find_spec("dynamo") is None or importlib.util.find_spec("dynamo.common") is None:
        raise UnsupportedError("--dynamo needs NVIDIA Dynamo", fix="pip install 'dvdquant[serve-dynamo]'")

    from dvdquant.deploy.serve.bridges.dynamo_worker import serve_dynamo
    from dvdquant.deploy.serve.logs import setup_server_log

    setup_server_log(options["log_format"], options["verbose"])
    serve_dynamo(model, read_sessions(options), read_limits(options))


def require_packages() -> None:
    """Refuse to run without the packages of the server.

    Raises:
        UnsupportedError: Some are missing; the error names them.
    """
    missing = [package for module, package in _MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UnsupportedError(f"dvdq-serve needs {', '.join(missing)}", fix="pip install 'dvdquant[serve]'")


if __name__ == "__main__":
    main()
