"""Photograph the example workflow in a real ComfyUI: ``python docs/scripts/comfyui_picture.py COMFYUI_ROOT [EXPORT]``.

COMFYUI_ROOT is a checkout of ComfyUI with its requirements, the frontend package among them; Chromium and playwright draw
the page. The server runs on the CPU in a folder of its own with EXPORT, or an export of tiny-wan that is made for it. The
workflow is loaded as a user loads it, queued, and photographed when it has ended: what the nodes show was computed then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.processes import free_port  # noqa: E402

NODES = ROOT / "deploy" / "comfyui-dvdquant"
IMAGES = ROOT / "docs" / "images"
WORKFLOW = NODES / "example_workflows" / "tiny-wan.json"
START, FINISH = 180.0, 600.0  # seconds on a busy machine
SIZE = {"width": 1680, "height": 1000}

# ComfyUI imports torchvision and torchaudio at its top; where they lack, the tests' stand-ins are enough for this workflow.
SERVER = """
import importlib, runpy, sys
stand_ins = runpy.run_path({child!r}, run_name="child")["StandIns"]
sys.path.insert(0, {comfyui!r})
importlib.import_module("dvdquant.deploy.pipelines.transformer")
importlib.import_module("diffusers.models.transformers.transformer_wan")
sys.meta_path.append(stand_ins())
sys.argv = {arguments!r}
runpy.run_path({main!r}, run_name="__main__")
"""


def main(comfyui: Path, export: Path | None) -> None:
    """Write docs/images/comfyui.png.

    Args:
        comfyui: The checkout of ComfyUI.
        export: An export of tiny-wan, or None to make one.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base, export)
        port = free_port()
        server = start(comfyui, base, port)
        try:
            wait_for(f"http://127.0.0.1:{port}/object_info/DvdqLoadExport", server, base / "server.log")
            photograph(port, base, IMAGES / "comfyui.png")
        finally:
            server.terminate()
            server.wait(30)


def prepare(base: Path, export: Path | None) -> None:
    """Fill a base folder of ComfyUI: our nodes, tiny-wan and an export of it.

    Args:
        base: The folder.
        export: The export, or None to make one.
    """
    models = base / "models" / "dvdquant"
    models.mkdir(parents=True)
    for name in ("input", "output", "user", "custom_nodes"):
        (base / name).mkdir()
    (base / "custom_nodes" / NODES.name).symlink_to(NODES, target_is_directory=True)
    (models / "tiny-wan").symlink_to(ROOT / "examples" / "tiny-wan", target_is_directory=True)
    if export is not None:
        (models / "tiny-export").symlink_to(export, target_is_directory=True)
        return
    command = [sys.executable, "-m", "dvdquant", "export", str(models / "tiny-wan"), "-o", str(models / "tiny-export")]
    subprocess.run([*command, "--target", "graphs", "--recipe", "w4a4"], check=True, env=environment(), cwd=ROOT)


def environment() -> dict[str, str]:
    """Return the environment of the child processes: this checkout comes first."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def start(comfyui: Path, base: Path, port: int) -> subprocess.Popen[bytes]:
    """Start ComfyUI's server on the CPU.

    Args:
        comfyui: The checkout.
        base: The folder with models and nodes.
        port: The port.
    """
    arguments = [
        "main.py",
        "--cpu",
        "--base-directory",
        str(base),
        "--port",
        str(port),
        "--preview-method",
        "latent2rgb",
    ]
    arguments += ["--disable-api-nodes", "--database-url", f"sqlite:///{base / 'comfyui.db'}"]
    child = ROOT / "tests" / "support" / "comfyui_child.py"
    values = {"comfyui": str(comfyui), "child": str(child), "arguments": arguments, "main": str(comfyui / "main.py")}
    with (base / "server.log").open("wb") as log:
        command = [sys.executable, "-c", SERVER.format(**values)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=comfyui)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers.

    Args:
        url: An address of the server.
        server: Its process.
        log: What it says.
    """
    end = time.monotonic() + START
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if json.load(answer):
                    return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"ComfyUI does not answer:\n{log.read_text(errors='replace')[-3000:]}")


def photograph(port: int, base: Path, picture: Path) -> None:
    """Load the workflow in the page, run it, and write the picture.

    Args:
        port: The port of the server.
        base: The server's folder.
        picture: The PNG to write.
    """
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, device_scale_factor=1)  # type: ignore[arg-type]
        page.goto(f"http://127.0.0.1:{port}/", wait_until="load", timeout=120_000)
        page.wait_for_function(
            "window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 50", timeout=120_000
        )
        for setting in ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo"):
            page.evaluate("name => window.app.extensionManager.setting.set(name, false)", setting)
        workflow: Any = json.loads(WORKFLOW.read_text())
        # As a file that is dropped on the page: the frontend makes a tab of it and checks that it knows every node.
        page.evaluate(
            "async (workflow) => { await window.app.loadGraphData(workflow, true, true, 'tiny-wan') }", workflow
        )
        unknown = page.evaluate(
            "window.app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
        )
        if unknown:
            sys.exit(f"ComfyUI does not know {unknown}")
        page.evaluate("async () => { await window.app.queuePrompt(0, 1) }")
        history = finished(port, base)
        if history["status"]["status_str"] != "success":
            sys.exit(json.dumps(history["status"])[:3000])
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")
        fit(page)
        page.wait_for_timeout(2000)
        page.screenshot(path=str(picture))
        browser.close()


def fit(page: Any) -> None:
    """Move and scale the canvas so that every node is seen.

    Args:
        page: The page.
    """
    page.evaluate(
        """() => {
          const canvas = window.app.canvas, nodes = window.app.graph.nodes;
          const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1] - 40));
          const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
          const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
          const margin = 90, width = innerWidth - 2 * margin, height = innerHeight - 2 * margin;
          const scale = Math.min(width / (right - left), height / (bottom - top));
          canvas.ds.scale = scale;
          canvas.ds.offset = [margin / scale - left + (width / scale - (right - left)) / 2, margin / scale - top];
          canvas.setDirty(true, true);
        }"""
    )


def finished(port: int, base: Path) -> Any:
    """Return the record of the one run, once it has ended.

    Args:
        port: The port of the server.
        base: The server's folder.
    """
    end = time.monotonic() + FINISH
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/history", timeout=30) as answer:
            runs = list(json.load(answer).values())
        if runs and (runs[0]["status"]["completed"] or runs[0]["status"]["status_str"] == "error"):
            return runs[0]
        time.sleep(1)
    return sys.exit(f"the workflow did not end:\n{(base / 'server.log').read_text(errors='replace')[-3000:]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: comfyui_picture.py COMFYUI_ROOT [EXPORT]")
    places = [Path(text).resolve() for text in sys.argv[1:]]
    main(places[0], places[1] if len(places) > 1 else None)
