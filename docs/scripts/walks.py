"""Walk through the pages for six users, command by command, in a new environment, and keep what the commands said.

``make walks`` builds the wheel and runs ``python docs/scripts/walks.py dist/*.whl``: the wheel goes with what it requires into an
environment of its own, each walk into a folder of its own, and its transcript to docs/walks. ``make wheel-check`` is the walk
``install`` alone, from ``/``, without a transcript. A command that ends otherwise than it should ends the walk with what it
said. The walk of ComfyUI needs COMFYUI_ROOT, a checkout of it, and is left out without.

The commands are those of the pages with other words (:data:`INSTEAD`): no published model is at hand, so dry runs read headers
of Wan2.1-1.3B with no weights behind them, and the trained toy model is what is exported and drawn.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "walks"
CONFIG = ROOT / "benchmarks" / "configs" / "wan2.1-1.3b.json"
MODEL, HOLLOW, TOY = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-1.3B-Diffusers", "tiny-wan"
# What a page's command says, and what is said instead.
INSTEAD = {
    MODEL: TOY,
    f"./{HOLLOW}": TOY,
    '"a cat walks on grass"': '"ring red right large black"',
    "/srv/dvdquant": "served",
}
URL = "http://127.0.0.1:8000"
LIMIT = 1200  # seconds a command may take on a busy machine
COMFYUI = ("aiohttp", "alembic", "av", "einops", "scipy", "sentencepiece", "sqlalchemy", "torchsde")
# What differs from run to run.
_VARIES = (
    (re.compile(r"\b\d+(?:\.\d+)?(?= (?:s|ms|min)\b)"), "…"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:+.]+"), "…"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "…"),
    (re.compile(r"video_[0-9a-f]+"), "video_…"),
    (re.compile(r'("(?:created_at|completed_at|expires_at|seconds|encode_seconds)": ?)[^,}]+'), r"\1…"),
    (re.compile(r"(?m)^\w+: [\d.]+ M of [\d.]+ M weights, .*\n"), ""),  # a stage that takes more than a minute
    (re.compile(r"(?<=weights in )… min (?=… s)"), ""),
    (re.compile(r"(?<= of )[\d.]+ GiB(?=, with [\d.]+ MiB for libraries)"), "… GiB"),
    (re.compile(r"[\d.]+ GiB free at|[\d.]+ GiB of memory free"), lambda found: "… GiB" + found[0].partition("GiB")[2]),
    (re.compile(r"\[\d+\]|pid \d+"), "…"),
    (re.compile(r"(?m)^(transformer +a\d) .*"), r"\1  …"),  # a row of dvdq bench
    (re.compile(r"(?m)^( +\d+ +a\d +)\d\.\d{3}"), r"\1…"),  # of a trace
    (re.compile(r'("time": )[\d.]+'), r"\1…"),
    (re.compile(r'("pid": )\d+'), r"\1…"),
    (re.compile(r'("worker": "[a-z]+-\d-)[0-9a-f]+'), r"\1…"),
)


@dataclass(frozen=True)
class Step:
    """A command of a walk.

    Args:
        line: The command as the page gives it.
        why: What is said before it.
        more: Options that the toy model needs, or that shorten the walk.
        code: The exit code that it must have.
        on_page: The page gives it; else the walk adds it.
        server: It goes on while the next steps run, and is ended with the walk.
    """

    line: str
    why: str = ""
    more: str = ""
    code: int = 0
    on_page: bool = True
    server: bool = False

    @property
    def command(self) -> str:
        """Return the command that runs."""
        hollow = "--dry-run" in self.line and "export" in self.line
        words = self.line
        for said, instead in INSTEAD.items():
            words = words.replace(said, HOLLOW if hollow and instead == TOY else instead)
        return f"{words} {self.more}".strip()


@dataclass(frozen=True)
class Walk:
    """A user's way through a page.

    Args:
        name: The name of the transcript.
        title: Who walks.
        page: The page, below docs.
        steps: The commands.
    """

    name: str
    title: str
    page: str
    steps: tuple[Step, ...]


DRAW = 'dvdq-run out/wan --prompt "a cat walks on grass"'
FIRST = "Is everything there that it needs?"
WORKFLOW = (
    f"python {ROOT}/tests/support/comfyui_child.py $COMFYUI_ROOT ComfyUI {ROOT}/deploy/comfyui-dvdquant results.pt workflow"
    ' >log 2>&1 && python -c \'import torch; print(*torch.load("results.pt")["workflow"]["texts"], sep="\\n")\''
)
WALKS = (
    Walk(
        "install", "The installed wheel, run from /", "quickstart.md",
        (
            Step("dvdq doctor"),
            Step("dvdq export $HOME/tiny-wan -o $HOME/out/wan --target graphs", on_page=False),
            Step("dvdq inspect $HOME/out/wan --check", on_page=False),
            Step('dvdq run $HOME/out/wan --prompt "a cat walks on grass" -o $HOME/clip.mp4 --steps 4', on_page=False),
            Step("python -m dvdquant --version", on_page=False),
        ),
    ),
    Walk(
        "rtx", "The owner of an RTX 4090", "for/rtx.md",
        (
            Step("dvdq doctor", FIRST),
            Step(f'dvdq-export {MODEL} -o out/wan --gpu "RTX 4090" --dry-run', "What do I gain, and what does it take?"),
            Step(f'dvdq-export {MODEL} -o out/wan --gpu "RTX 4090"', "Make it."),
            Step("dvdq-inspect out/wan --check", "Is it whole?"),
            Step(f"{DRAW} --memory auto --dry-run", "Does a clip fit?"),
            Step(f"{DRAW} -o cat.mp4 --trace cat.json", "Draw. Without a GPU that is ONNX Runtime on the CPU.", "--steps 8"),
            Step("dvdq bench out/wan", "How long does one call take here?", "--repeats 3"),
        ),
    ),
    Walk(
        "laptop", "The owner of a laptop with an RTX 4060", "for/laptop.md",
        (
            Step("dvdq doctor", FIRST),
            Step(
                f'dvdq-export {MODEL} -o out/wan --gpu "RTX 4060 Laptop" --dry-run',
                "What does a laptop with 8 GB gain, and does the pipeline fit?",
            ),
            Step(f'dvdq-export {MODEL} -o out/wan --gpu "RTX 4060 Laptop"', "Make it."),
            Step(
                f'dvdq-export {MODEL} -o out/wan --gpu "RTX 4060 Laptop" --resume',
                "Again, as after a laptop that slept: what is there is not made twice.", on_page=False,
            ),
            Step(f"{DRAW} --memory auto --dry-run", "What will a run hold, and when?"),
            Step(
                f"{DRAW} --memory auto -o cat.mp4 --trace cat.json",
                "Draw. Without a GPU that is ONNX Runtime on the CPU.", "--steps 8",
            ),
            Step("dvdq bench out/wan", "How long does one call take here?", "--repeats 3"),
        ),
    ),
    Walk(
        "windows", "The user of WSL2", "for/windows.md",
        (
            Step("dvdq doctor", FIRST),
            Step(
                f"dvdq-export {MODEL} -o out/wan --gpu auto --dry-run",
                "Here is Linux without a GPU, as in WSL without a driver: `--gpu auto` finds no card.", code=2,
            ),
            Step(
                f'dvdq-export {MODEL} -o out/wan --gpu "RTX 5080" --dry-run', "So the card is named.", on_page=False,
            ),
            Step(f'dvdq-export {MODEL} -o out/wan --gpu "RTX 5080"', "Make it.", on_page=False),
            Step(
                f"{DRAW} --memory auto -o cat.mp4", "Draw. Without a GPU that is ONNX Runtime on the CPU.", "--steps 8",
            ),
        ),
    ),
    Walk(
        "server", "The operator of a server with an H100", "for/server.md",
        (
            Step(f"dvdq-export {MODEL} -o out/wan --gpu H100 --dry-run", "What does an H100 gain?"),
            Step(f"dvdq-export {MODEL} -o out/wan --gpu H100 --verify", "Make it, and have every layer judged."),
            Step("dvdq-serve out/wan --data /srv/dvdquant", "Serve it.", server=True),
            Step(
                f'curl -s {URL}/v1/videos -F prompt="a cat walks on grass" -F num_inference_steps=4',
                "Ask for a clip, as with OpenAI's API.", on_page=False,
            ),
            Step(f"sleep 20; curl -s {URL}/v1/videos", "Is it done?", on_page=False),
            Step(f"curl -s {URL}/metrics | grep -c ^dvdq", "How many figures are there for Prometheus?", on_page=False),
        ),
    ),
    Walk(
        "jetson", "The engineer with a Jetson Orin", "for/jetson.md",
        (
            Step(
                f"dvdq-export ./{HOLLOW} -o out/orin --target tensorrt --sm 8.7 --dry-run",
                "On the workstation: what will it be, and which Jetson has room for it?",
            ),
            Step(f"dvdq-export ./{HOLLOW} -o out/orin --target tensorrt --sm 8.7", "Make graphs and weights."),
            Step(
                "dvdq-bundle out/orin -o orin.tar",
                "Pack them. The page packs the plugin's library as well, which wants a cross compiler.", on_page=False,
            ),
            Step(
                "dvdq-build orin.tar --dry-run",
                "On the device: what would be built? Here there is neither a Jetson nor TensorRT, and it says so.", code=2,
            ),
            Step("dvdq-build orin.tar -o orin", "So nothing is unpacked.", code=2, on_page=False),
        ),
    ),
    Walk(
        "comfyui", "The user of ComfyUI", "for/comfyui.md",
        (
            Step(
                'dvdq-export MODEL -o ComfyUI/models/dvdquant/wan --gpu "RTX 4090"',
                "An export, where ComfyUI looks for models.", "--target graphs --recipe w4a4",
            ),
            Step("cp ComfyUI/workflow.json . && ls ComfyUI/models/dvdquant", "The workflow names it.", on_page=False),
            Step(
                WORKFLOW, "The example workflow in ComfyUI's own executor. What the node Step trace shows:", on_page=False,
            ),
        ),
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Walk, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--only", nargs="+", choices=[walk.name for walk in WALKS], default=[w.name for w in WALKS[1:]])
    parser.add_argument(
        "--environment", type=Path, help="where the environment is, or is made and kept; else a temporary one"
    )
    parser.add_argument("--check", action="store_true", help="only walk: leave docs/walks as they are")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dvdq-walks-") as folder:
        place = Path(folder)
        environment = options.environment or place / "environment"
        install(options.wheel.resolve(), environment, "comfyui" in options.only and "COMFYUI_ROOT" in os.environ)
        for walk in (each for each in WALKS if each.name in options.only):
            if walk.name == "comfyui" and "COMFYUI_ROOT" not in os.environ:
                print("comfyui: left out, COMFYUI_ROOT names no checkout")
                continue
            text = transcript(walk, environment, place / walk.name)
            if not options.check and walk is not WALKS[0]:
                PAGES.mkdir(exist_ok=True)
                (PAGES / f"{walk.name}.md").write_text(text, encoding="utf-8")
            print(f"{walk.name}: {len(walk.steps)} commands")
    print("PASS")
    return 0


def install(wheel: Path, environment: Path, comfyui: bool) -> None:
    """Make the environment, if it is not there.

    Args:
        wheel: The wheel.
        environment: Its folder.
        comfyui: Install what ComfyUI imports, too.
    """
    python = environment / "bin" / "python"
    there = python.exists()
    if not there:
        print(f"installing {wheel.name} and what it requires (2.6 GB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    extra = COMFYUI if comfyui else ()
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        f"{wheel}[serve]",
        *extra,
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run(command, check=True)
    if there:  # of another build, with the same version
        subprocess.run([*command[:5], "--force-reinstall", "--no-deps", str(wheel)], check=True)


def transcript(walk: Walk, environment: Path, place: Path) -> str:
    """Walk, and return the page.

    Args:
        walk: The walk.
        environment: The environment that the wheel is installed in.
        place: A folder for it.
    """
    prepare(walk, place, environment)
    variables = {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(place), "HF_HUB_OFFLINE": "1",
        "COLUMNS": "110", "COMFYUI_ROOT": os.environ.get("COMFYUI_ROOT", ""),
    }  # fmt: skip
    cwd = Path("/") if walk.name == "install" else place
    lines = [
        f"# {walk.title}",
        "",
        f"The commands of [the page](../{walk.page}), as they ran on a CPU in a new environment with the wheel (`make walks`). "
        f"Dry runs read headers of `{HOLLOW}` with no weights behind them; exports and clips are of the trained toy model, which "
        "knows other words than cats. Times, dates and identifiers are left out (…).",
    ]
    with servers() as started:
        for step in walk.steps:
            command = step.command
            print(f"  $ {shown(command, place, environment)}", flush=True)
            if step.server:
                log = place / "server.log"
                with log.open("wb") as file:
                    line = ["bash", "-c", f"exec {command}"]
                    started.append(subprocess.Popen(line, env=variables, cwd=cwd, stdout=file, stderr=file))
                wait(started[-1], log)
                said = log.read_text(errors="replace")
            else:
                done = subprocess.run(
                    ["bash", "-c", command], env=variables, cwd=cwd, text=True, timeout=LIMIT, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, check=False,
                )  # fmt: skip
                said = done.stdout
                if done.returncode != step.code:
                    raise SystemExit(
                        f"{command}\n{said[-6000:]}\nFAIL: exit code {done.returncode} instead of {step.code}"
                    )
            words = [f"## {step.why}", ""] if step.why else []
            lines += ["", *words, "```text", f"$ {shown(command, place, environment)}"]
            lines += [shown(said, place, environment).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def prepare(walk: Walk, place: Path, environment: Path) -> None:
    """Lay out what the user has: the toy model, headers of the real one, ComfyUI's folder."""
    place.mkdir(parents=True)
    shutil.copytree(ROOT / "examples" / TOY, place / TOY)
    if any("export" in step.line and "--dry-run" in step.line for step in walk.steps):
        make = [str(environment / "bin" / "python"), str(ROOT / "benchmarks" / "make_checkpoint.py"), str(CONFIG)]
        subprocess.run([*make, str(place / HOLLOW / "transformer"), "--hollow"], check=True, capture_output=True)
    if walk.name == "comfyui":
        nodes = ROOT / "deploy" / "comfyui-dvdquant"
        models = place / "ComfyUI" / "models" / "dvdquant"
        models.mkdir(parents=True)
        (models / TOY).symlink_to(place / TOY)
        (place / "MODEL").symlink_to(place / TOY)
        workflow = (nodes / "example_workflows" / "tiny-wan.json").read_text()
        (place / "ComfyUI" / "workflow.json").write_text(workflow.replace('"tiny-export"', '"wan"'))


@contextmanager
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield a list whose processes are ended with the walk."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def wait(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server is ready for work.

    Raises:
        SystemExit: It ended, or never was.
    """
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{URL}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server does not answer:\n{log.read_text(errors='replace')[-4000:]}")


def shown(text: str, place: Path, environment: Path) -> str:
    """Return what was said without places, times and identifiers."""
    for path, name in ((environment, ".venv"), (place, "~"), (ROOT, "dvdquant")):
        text = text.replace(str(path), name)
    text = re.sub(r"[^\n]*\r(?!\n)", "", text)
    for pattern, instead in _VARIES:
        text = pattern.sub(instead, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
