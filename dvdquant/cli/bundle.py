"""``dvdq-bundle``: an export as one tar for a machine without internet, with what builds its engines there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dvdquant import __version__
from dvdquant.cli.common import ExamplesCommand, echo, setup_logging
from dvdquant.cli.paths import EXPORT, PATH
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.capabilities import JETSONS
from dvdquant.text import amount, shell_line

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.system.plugin_file import PluginFile

_WHEEL = f"dvdquant-{__version__}-*.whl"
# Of another processor than this machine's, or the builder of another target.
_NOT_THERE = ("tensorrt-rtx", "nvidia-modelopt")

EXAMPLES = """
# graphs, weights and the plugin library that was built for the device
dvdq-bundle out/orin -o orin.tar --plugin build/plugins-aarch64/libdvdquant_plugins.so

# with wheels that were downloaded for it, so that nothing has to be fetched there
dvdq-bundle out/orin -o orin.tar --plugin libdvdquant_plugins.so --wheels wheels/
"""


@click.command(cls=ExamplesCommand, examples=EXAMPLES)
@click.argument("out", type=EXPORT)
@click.option("-o", "--output", "target", required=True, type=PATH, help="The tar to write.")
@click.option("--plugin", type=PATH, help="TensorRT plugin library, built for the device.")
@click.option("--wheels", type=PATH, help="Folder of wheels for the device, which are packed too.")
@click.option("-v", "--verbose", count=True)
@click.version_option(__version__, prog_name="dvdq-bundle")
def main(out: Path, target: Path, plugin: Path | None, wheels: Path | None, verbose: int) -> None:
    """Pack the export in OUT, without its engines, for dvdq-build on the device that they are for.

    The tar holds graphs, weights and configs as they are, the plugin library and wheels where they are given, the list of
    the wheels that the device needs, and a page that says what to do there.
    """
    setup_logging(verbose, "text")
    from dvdquant.artifact.bundle import write_bundle
    from dvdquant.artifact.layout import PLUGIN_PLACE
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.export.model_card import model_card
    from dvdquant.system.plugin_file import read_plugin
    from dvdquant.system.progress import Progress

    manifest = load_manifest(out)
    if not manifest.builds:
        raise UnsupportedError(
            f"{out} has no engine that is left to be built on a device",
            fix="export with --target tensorrt --sm X.Y, or with --build device",
        )
    if target.is_dir():
        raise UnsupportedError(f"{target} is a folder", fix="name the file to write, such as bundle.tar")
    sms = sorted({sm for entry in manifest.builds for sm in entry["sm"]}, key=float)
    library = None if plugin is None else read_plugin(plugin)
    machine = _machine(sms, library)
    # 1. The export without engines and report: they are of another machine.
    listed = {
        n: e
        for n, e in manifest.files.items()
        if not n.startswith("engines/") and n not in ("README.md", "report.html")
    }
    others: dict[str, Path | bytes] = {}
    if plugin is not None:
        others[PLUGIN_PLACE] = plugin
    required = _requirements(manifest)
    lacking = []
    if wheels is not None:
        files = sorted(wheels.glob("*.whl"))
        lacking = _lacking(wheels, [file.name for file in files], required, machine)
        others |= {f"wheels/{file.name}": file for file in files}
    others["requirements.txt"] = "".join(f"{line}\n" for line in required).encode()
    packed = replace(manifest, engines=(), files=listed)
    # 2. The page. The card of the export tells what it is, the first part what to do.
    own = any(name.startswith("wheels/dvdquant-") for name in others)
    page = _page(packed, target, machine, library, wheels is not None, own) + model_card(packed).partition("---\n\n")[2]
    others["README.md"] = page.encode()
    total = sum(entry["bytes"] for entry in listed.values())
    with Progress("text").stage("bundle", total, "B") as stage:
        digest = write_bundle(
            target,
            out,
            packed,
            others,
            progress=stage.update,
        )
    count = 1 + len(listed) + len(others)  # the manifest is a file, too
    echo(f"{target} written: {count} files, {amount(target.stat().st_size)}, for SM {', '.join(sms)}")
    echo(f"SHA-256   {digest}")
    echo(f"on the device: {_build_line(target, library)}")
    if library is None and any(entry["backend"] == "tensorrt" for entry in manifest.builds):
        echo("without a plugin library: TensorRT engines need one, which --plugin packs, or which is built there")
    if wheels is not None and not own:
        echo(f"{wheels} has no wheel of dvdquant, which the device needs as well: {_make_wheel(machine)}")
    if lacking:
        echo(
            f"{wheels} has no wheel of {', '.join(lacking)}: without internet the device must have these already; "
            f"else {_download(machine)}"
        )
    if wheels is None:
        echo(
            f"without internet there: tar -xf {target.name} requirements.txt && {_download(machine)}, and then --wheels wheels"
        )


def _machine(sms: list[str], library: PluginFile | None) -> str:
    """Return the processor of the device."""
    if library is not None:
        return library.machine
    # Jetsons are ARM; other GPUs sit in machines of either kind, where x86-64 is the more usual.
    return "aarch64" if any(sm in JETSONS for sm in sms) else "x86_64"


def _download(machine: str) -> str:
    """Return the command that fetches the wheels for a device, all but dvdquant's own."""
    # Wheels for glibc 2.34 and older: pip does not count down by itself.
    platforms = f"$(seq -f '--platform manylinux_2_%g_{machine}' 34 -1 17) --platform manylinux2014_{machine}"
    return f"pip download -r requirements.txt --only-binary=:all: {platforms} --python-version 3.12 -d wheels"


def _lacking(folder: Path, wheels: list[str], required: list[str], machine: str) -> list[str]:
    """Return those of the required packages that no wheel is of.

    Args:
        folder: The folder of the wheels, for the error.
        wheels: The names of the files, ``name-version[-build]-python-abi-platform.whl`` (PEP 427).
        required: The packages, ``name==version``; a version may be missing.
        machine: The processor of the device.

    Raises:
        UnsupportedError: There is no wheel, or one is for another system or processor than the device's.
    """
    if not wheels:
        raise UnsupportedError(f"{folder} holds no wheel", fix=f"fill it: {_download(machine)}")
    there = set()
    for wheel in wheels:
        parts = wheel.removesuffix(".whl").split("-")
        if len(parts) not in (5, 6):
            raise UnsupportedError(
                f"{folder / wheel} has not the name of a wheel",
                fix="take it out, or give the file the name that it was made with",
            )
        if not any(tag == "any" or ("linux" in tag and tag.endswith(f"_{machine}")) for tag in parts[-1].split(".")):
            raise UnsupportedError(
                f"{folder / wheel} is for {parts[-1]}, and the device is Linux on {machine}",
                fix=f"empty the folder and fill it: {_download(machine)}",
            )
        there |= {_canonical(parts[0]), f"{_canonical(parts[0])}=={parts[1].partition('+')[0]}"}
    lacking = []
    for line in required:
        name, pinned, version = line.partition("==")
        name = _canonical(_name_of(name))
        if (f"{name}=={version}" if pinned else name) not in there:
            lacking.append(line)
    return lacking


def _name_of(requirement: str) -> str:
    """Return the name that a requirement begins with, or "" where it has none."""
    import re

    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return "" if found is None else found[0]


def _canonical(name: str) -> str:
    """Return the name of a package as indexes compare it (PEP 503)."""
    import re

    return re.sub(r"[-_.]+", "-", name).lower()


def _make_wheel(machine: str) -> str:
    """Return the command that makes the wheel of dvdquant for a device."""
    import platform

    return "`make wheel`" if machine == platform.machine() else f"`make wheel HOST={machine}`"


def _build_line(target: Path, library: PluginFile | None) -> str:
    words = ["dvdq-build", target.name, "-o", target.name.removesuffix(".tar")]
    return shell_line([*words, *(["--plugin", "bundled"] if library is not None else [])])


def _requirements(manifest: Manifest) -> list[str]:
    """Return the packages that dvdquant needs there, at the versions of this machine, which this export was made with.

    dvdquant itself is in no index and is installed from its wheel, without what only its other targets need.
    """
    import importlib.metadata

    lines = []
    for requirement in importlib.metadata.requires("dvdquant") or ():
        name = _name_of(requirement)
        if not name or "extra ==" in requirement:
            continue
        rtx = any(entry["backend"] == "tensorrt_rtx" for entry in manifest.builds)
        if name in _NOT_THERE and not (rtx and name == "tensorrt-rtx"):
            continue
        try:
            lines.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(requirement.partition(";")[0].strip())
    return lines


def _page(manifest: Manifest, target: Path, machine: str, library: PluginFile | None, wheels: bool, own: bool) -> str:
    """Return what to do on the device, as Markdown; ``own`` where the wheels have that of dvdquant."""
    from dvdquant.artifact.layout import PLUGIN_PLACE
    from dvdquant.export.elsewhere import SCRIPT

    sms = ", ".join(sorted({sm for entry in manifest.builds for sm in entry["sm"]}, key=float))
    backends = {entry["backend"] for entry in manifest.builds}
    folder = target.name.removesuffix(".tar")
    source = "--no-index --find-links wheels" if wheels else "--find-links wheels"
    wheel = f"wheels/{_WHEEL}" if own else _WHEEL
    builder = max(entry["builder_bytes"] for entry in manifest.builds)
    held = max(entry["held_bytes"] for entry in manifest.builds)
    steps = [
        f"1. Python 3.11 or newer, the GPU's driver{' and TensorRT with its Python module' if 'tensorrt' in backends else ''}"
        + (f" {library.tensorrt_major}" if library is not None and library.tensorrt_major else "")
        + ". JetPack brings the last two.",
        f"2. The packages of `requirements.txt`, in a virtual environment that sees TensorRT: "
        f"`tar -xf {shell_line([target.name])} requirements.txt{' wheels' if wheels else ''} && "
        f"python3 -m venv --system-site-packages env && env/bin/pip install {source} -r requirements.txt`"
        + ("." if wheels else f". Without internet: fetch them elsewhere by `{_download(machine)}`.")
        + f" Then dvdquant by its wheel: `env/bin/pip install --no-deps {wheel}`"
        + ("." if own else f", which {_make_wheel(machine)} makes."),
        f"3. `{_build_line(target, library)}`. It refuses what does not fit before it works, and can be repeated with "
        "`--resume`.",
        f"4. `dvdq-run {folder}{f' --plugin {folder}/{PLUGIN_PLACE}' if library else ''} --prompt …`, "
        "where the model's text encoder and VAE are at hand (`--pipeline FOLDER`).",
    ]
    lean = [
        "",
        "`dvdq-build --version-compatible` builds engines that TensorRT's lean runtime of the same release runs, too. They keep "
        "running when TensorRT is updated or taken away, where the lean runtime of the release that built them stays: NVIDIA's "
        "Debian package `python3-libnvinfer-lean`, or `pip install tensorrt-lean-cu13==RELEASE`. They may be slower, and none "
        "has run yet.",
    ]
    return "\n".join(
        [
            f"# Bundle for SM {sms} ({machine})",
            "",
            f"Made by dvdquant {__version__}. A build takes up to {amount(builder)} of memory, the weights of one transformer "
            f"then up to {amount(held)}.",
            "",
            *steps,
            *(lean if "tensorrt" in backends else []),
            "",
            f"By hand, without Python: `{SCRIPT}` holds the lines of TensorRT's own builder."
            if "tensorrt" in backends
            else "",
            "",
            "A bundle holds machine code. Build only one that you trust, and compare its SHA-256 with what dvdq-bundle said.",
            "",
            "",
        ]
    )


if __name__ == "__main__":
    main()
