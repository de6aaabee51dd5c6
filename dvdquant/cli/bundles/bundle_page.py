"""The page of a bundle: what to do with it on the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dvdquant import __version__
from dvdquant.cli.bundles.bundle_wheels import download_line
from dvdquant.hardware.capabilities import JETSONS
from dvdquant.hardware.make_lines import make_plugin, make_wheel
from dvdquant.text import amount, shell_line

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.system.plugin_file import PluginFile

__all__ = ["build_line", "bundle_page", "sms_of"]

_WHEEL = f"dvdquant-{__version__}-*.whl"


def sms_of(manifest: Manifest, backend: str | None = None) -> list[str]:
    """Return the compute capabilities that the engines to build are for.

    Args:
        manifest: The manifest of the export.
        backend: The builder whose engines are meant; None means all.
    """
    return sorted(
        {sm for entry in manifest.builds if backend in (None, entry["backend"]) for sm in entry["sm"]}, key=float
    )


def build_line(manifest: Manifest, target: Path, library: PluginFile | None) -> str:
    """Return the line that builds the engines on the device.

    Args:
        manifest: The manifest of the export.
        target: The file of the bundle.
        library: The plugin library that it holds, or None.
    """
    words = ["dvdq-build", target.name, "-o", _folder(target)]
    return shell_line([*words, *_plugin_text(manifest, library, "bundled")])


def bundle_page(
    manifest: Manifest, target: Path, machine: str, library: PluginFile | None, *, wheels: bool, own: bool
) -> str:
    """Return what to do on the device, as Markdown.

    Args:
        manifest: The manifest that the bundle holds.
        target: The file of the bundle.
        machine: The processor of the device.
        library: The plugin library that the bundle holds, or None.
        wheels: Whether it holds wheels.
        own: Whether they have that of dvdquant.
    """
    from dvdquant.artifact.layout import PLUGIN_PLACE
    from dvdquant.export.elsewhere import SCRIPT

    tensorrt = sms_of(manifest, "tensorrt")
    folder = _folder(target)
    quoted, tar = shell_line([folder]), shell_line([target.name])
    by_hand = f"mkdir {quoted} && tar -xf {tar} -C {quoted} && sh {quoted}/{SCRIPT}"
    steps = [
        _system_step(manifest, library),
        _packages_step(target, machine, bool(tensorrt), wheels, own),
        *([_plugin_step(tensorrt, machine)] if tensorrt and library is None else []),
        f"`{build_line(manifest, target, library)}`. It refuses what does not fit before it works, and can be repeated with "
        "`--resume`.",
        f"`{_run_line(manifest, folder, library)} --prompt …`, where the model's text encoder and VAE are at hand "
        "(`--pipeline FOLDER`).",
    ]
    lines = [f"# Bundle for SM {', '.join(sms_of(manifest))} ({machine})", "", _sizes(manifest), ""]
    lines += [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    if tensorrt:
        lines += [
            "",
            "`dvdq-build --version-compatible` builds engines that TensorRT's lean runtime of the same release runs, too. They "
            "keep running when TensorRT is updated or taken away, where the lean runtime of the release that built them stays: "
            "NVIDIA's Debian package `python3-libnvinfer-lean`, or `pip install tensorrt-lean-cu13==RELEASE`. They may be "
            "slower, and none has run yet.",
            "",
            f"By hand, without Python: `{by_hand}`, with TensorRT's `trtexec` in the PATH. It loads "
            + (f"`{PLUGIN_PLACE}`." if library else f"`{PLUGIN_PLACE}`, which is missing: put the library there first.")
            + (
                f" Where `nvidia-smi` does not say the GPU's SM, the line ends with it: {' or '.join(tensorrt)}."
                if len(tensorrt) > 1
                else ""
            ),
        ]
    lines += [
        "",
        "A bundle holds machine code. Build only one that you trust, and compare its SHA-256 with what dvdq-bundle said.",
        "",
        "",
    ]
    return "\n".join(lines)


def _folder(target: Path) -> str:
    """Return the folder that a bundle is unpacked into."""
    return target.name.removesuffix(".tar")


def _plugin_text(manifest: Manifest, library: PluginFile | None, bundled: str) -> list[str]:
    """Return the option for the plugin library; ``bundled`` is what it says where the bundle holds it."""
    if not sms_of(manifest, "tensorrt"):
        return []
    return ["--plugin", bundled if library is not None else "libdvdquant_plugins.so"]


def _run_line(manifest: Manifest, folder: str, library: PluginFile | None) -> str:
    """Return the line that draws a clip, without the prompt."""
    from dvdquant.artifact.layout import PLUGIN_PLACE

    return shell_line(["dvdq-run", folder, *_plugin_text(manifest, library, f"{folder}/{PLUGIN_PLACE}")])


def _sizes(manifest: Manifest) -> str:
    """Return what the engines take, and how that is known."""
    builder = max(entry["builder_bytes"] for entry in manifest.builds)
    held = max(entry["held_bytes"] for entry in manifest.builds)
    unknown = " TensorRT's own builder has not been measured." if sms_of(manifest, "tensorrt") else ""
    return (
        f"Made by dvdquant {__version__}. By estimate, a build takes up to {amount(builder)} of memory, and the weights of one "
        f"transformer then up to {amount(held)}. The first figure is worked out from builds of TensorRT-RTX engines on "
        f"x86-64.{unknown}"
    )


def _system_step(manifest: Manifest, library: PluginFile | None) -> str:
    """Return what the device's system has to have."""
    if not (tensorrt := sms_of(manifest, "tensorrt")):
        return "Python 3.11 or newer and the GPU's driver. TensorRT-RTX comes with the packages of the next step."
    release = f" {library.tensorrt_major}" if library is not None else ""
    jetpack = " JetPack brings the last two." if all(sm in JETSONS for sm in tensorrt) else ""
    return f"Python 3.11 or newer, the GPU's driver, and TensorRT{release} with its Python module.{jetpack}"


def _packages_step(target: Path, machine: str, tensorrt: bool, wheels: bool, own: bool) -> str:
    """Return how the packages are installed on the device."""
    option, sees = (" --system-site-packages", " that sees the system's TensorRT") if tensorrt else ("", "")
    source = " --no-index --find-links wheels" if wheels else ""
    wheel = f"wheels/{_WHEEL}" if own else _WHEEL
    return (
        f"The packages of `requirements.txt`, in a virtual environment{sees}: "
        f"`tar -xf {shell_line([target.name])} requirements.txt{' wheels' if wheels else ''} && "
        f"python3 -m venv{option} env && env/bin/pip install{source} -r requirements.txt`."
        + (
            ""
            if wheels
            else f" Without internet: fetch them elsewhere, for Python 3.12, by `{download_line(machine)}`, copy the folder "
            "`wheels`, and give pip `--no-index --find-links wheels` as well."
        )
        + f" Then dvdquant by its wheel: `env/bin/pip install --no-deps {wheel}`"
        + ("." if own else f", which `{make_wheel(machine)}` makes in a checkout.")
        + " The commands below are in `env/bin`."
    )


def _plugin_step(sms: list[str], machine: str) -> str:
    """Return how the plugin library is made that the bundle lacks."""
    library = "libdvdquant_plugins.so"
    words = (
        "The plugin library, which TensorRT engines need and this bundle does not hold. A checkout of dvdquant on the device "
        f"makes it, with internet, nvcc, cmake, a C++ compiler and TensorRT's headers: `{make_plugin(machine, sms, machine)}` "
        f"gives `build/plugins/{library}` (not tried on a device yet)."
    )
    if machine == "aarch64":
        words += (
            f" A checkout on x86-64 makes it, too: `{make_plugin(machine, sms, 'x86_64')}` gives "
            f"`build/plugins-aarch64/{library}`, where FOLDER holds `include/NvInfer.h` of the device's TensorRT."
        )
    return f"{words} Copy it beside this bundle."
