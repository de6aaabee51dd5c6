"""From a checkpoint to clips and numbers: ``python examples/wan2.1/wan.py MODEL OUT --prompt TEXT``.

MODEL is a hub id, a folder or a ComfyUI file. Every step is a line that you could type yourself; it is printed before it
runs. The notebook beside this file takes the same steps one by one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvdquant.cli.main import main as command

PATIENCE = 600.0  # seconds that a server may take to be ready, and a clip to be drawn


def dvdq(*words: object) -> None:
    """Run a command of dvdquant in this process, and print it as it is typed.

    Args:
        words: What follows ``dvdq``. An empty list or None is left out.
    """
    line = [str(word) for word in words if word is not None]
    print("$ dvdq " + shlex.join(line), flush=True)
    command(line, standalone_mode=False)


def option(name: str, value: object) -> list[object]:
    """Return an option and its value, or nothing for None.

    Args:
        name: The option, such as ``--lora``.
        value: Its value, or None.
    """
    return [] if value is None else [name, value]


def widths(trace: Path) -> list[dict[str, Any]]:
    """Return a row for every clip of a trace: mode, average bits, milliseconds of a call, PSNR.

    Args:
        trace: The file that ``dvdq run --trace`` wrote.
    """
    rows = []
    for clip in json.loads(trace.read_text())["clips"]:
        calls = [record for record in clip["records"] if record["bits"] is not None]
        bits = {record["step"]: record["bits"] for record in calls}
        rows.append(
            {
                "mode": clip["request"]["mode"],
                "bits": sum(bits.values()) / len(bits),
                "ms a call": 1000 * sum(record["seconds"] for record in calls) / len(calls),
                "dB to 16 bit": clip["psnr_to_16_bit"],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned text.

    Args:
        rows: Mappings with the same keys.
    """

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    across = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, across)).rstrip() for line in cells)


@contextmanager
def serving(out: Path, data: Path, port: int, *options: object) -> Iterator[str]:
    """Start ``dvdq serve`` and yield its address once it draws; stop it at the end.

    Args:
        out: The export.
        data: The folder of its jobs.
        port: The port.
        options: Further options of the command.
    """
    words = [out, "--data", data, "--port", port, *options]
    print("$ dvdq serve " + shlex.join(map(str, words)), flush=True)
    log = data.with_suffix(".log")
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "dvdquant", "serve", *map(str, words)], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait(lambda: ask(f"{address}/ready", none_on_error=True) is not None, server, log)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def ask(url: str, body: Mapping[str, Any] | None = None, *, none_on_error: bool = False) -> Any:
    """Return the JSON of an address.

    Args:
        url: The address.
        body: What is posted; None asks with GET.
        none_on_error: Whether no answer, or a refusal, is None and not an error.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
    except OSError:
        if none_on_error:
            return None
        raise
    return json.loads(text)


def wait(done: Any, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a function says so.

    Args:
        done: The function.
        server: The server, which must not end meanwhile.
        log: What it says.
    """
    end = time.monotonic() + PATIENCE
    while not done():
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server does not answer:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def ask_for_a_clip(address: str, clip: Path, **body: Any) -> dict[str, Any]:
    """Ask a server for a clip by OpenAI's video API, wait for it and save it. Return its job.

    Args:
        address: The address of the server.
        clip: The file to write.
        body: The fields of the request.
    """
    job = ask(f"{address}/v1/videos", body)
    end = time.monotonic() + PATIENCE
    while job["status"] in ("queued", "in_progress") and time.monotonic() < end:
        time.sleep(0.2)
        job = ask(f"{address}/v1/videos/{job['id']}")
    if job["status"] != "completed":
        raise RuntimeError(json.dumps(job))
    with urllib.request.urlopen(f"{address}/v1/videos/{job['id']}/content", timeout=60) as answer:
        clip.write_bytes(answer.read())
    return dict(job)


def main(arguments: Sequence[str] | None = None) -> None:
    """Take all steps.

    Args:
        arguments: The words of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="hub id, folder, or a ComfyUI file")
    parser.add_argument("out", type=Path, help="folder for the export; clips go into OUT-clips")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--gpu", help='the card, such as "RTX 4090", or auto; left out: graphs for any machine')
    parser.add_argument("--pipeline", help="the diffusers pipeline, if MODEL is a single file")
    parser.add_argument("--lora", help="a LoRA as FILE or FILE:SCALE, to run beside the weights")
    parser.add_argument("--image", type=Path, help="the first frame, of models that draw from one")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--memory", help="what a run may take on the device, such as 16GiB")
    parser.add_argument("--serve", type=int, metavar="PORT", help="draw one clip through the server, too")
    given = parser.parse_args(arguments)
    clips = given.out.with_name(given.out.name + "-clips")
    clips.mkdir(parents=True, exist_ok=True)
    # 1. What it takes and gives, then the export itself.
    how = option("--gpu", given.gpu) if given.gpu else ["--target", "graphs", "--recipe", "w4a4"]
    dvdq("export", given.model, "-o", given.out, *how, "--dry-run")
    dvdq("export", given.model, "-o", given.out, *how)
    # 2. Every file against its hash.
    dvdq("inspect", given.out, "--check")
    # 3. A clip, with why each step ran on which engine.
    draw = [given.out, "--prompt", given.prompt, *option("--pipeline", given.pipeline), *option("--steps", given.steps)]
    draw += [*option("--image", given.image), *option("--memory", given.memory)]
    dvdq("run", *draw, "-o", clips / "clip.mp4", "--trace", clips / "clip.json", "--strip", clips / "clip.png")
    # 4. A LoRA beside the weights.
    if given.lora:
        dvdq("run", *draw, "--backend", "pytorch", "--lora", given.lora, "-o", clips / "lora.mp4")
    # 5. The server.
    if given.serve:
        more = option("--pipeline", given.pipeline)
        with serving(given.out, clips / "serve", given.serve, *more) as address:
            body = {"prompt": given.prompt, **({"num_inference_steps": given.steps} if given.steps else {})}
            job = ask_for_a_clip(address, clips / "served.mp4", **body)
            print(f"{job['id']}: {clips / 'served.mp4'}")
    # 6. Numbers of this machine.
    print(table(widths(clips / "clip.json")))
    dvdq("bench", given.out, "--repeats", 5)


if __name__ == "__main__":
    main()
