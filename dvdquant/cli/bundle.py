"""``dvdq-bundle``: an export as one tar for a machine without internet, with what builds its engines there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dvdquant import __version__
from dvdquant.cli.bundles.bundle_page import build_line, bundle_page, sms_of
from dvdquant.cli.bundles.bundle_wheels import download_line, lacking_wheels, required_packages
from dvdquant.cli.shared.common import ExamplesCommand, echo, setup_logging
from dvdquant.cli.shared.paths import EXPORT, PATH
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.capabilities import sm_number
from dvdquant.hardware.gpus import MACHINES
from dvdquant.hardware.make_lines import make_wheel
from dvdquant.text import amount, shell_line

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.system.plugin_file import PluginFile

EXAMPLES = """
# graphs, weights and the plugin library that was built for the device
dvdq-bundle out/orin -o orin.tar --plugin build/plugins-aarch64/libdvdquant_plugins.so

# for a GH200, whose processor is ARM: an H100 of the same SM sits beside x86-64
dvdq-bundle out/gh200 -o gh200.tar --machine aarch64

# with wheels that were downloaded for it, so that nothing has to be fetched there
dvdq-bundle out/orin -o orin.tar --plugin libdvdquant_plugins.so --wheels wheels/
"""


@click.command(cls=ExamplesCommand, examples=EXAMPLES)
@click.argument("out", type=EXPORT)
@click.option("-o", "--output", "target", required=True, type=PATH, help="The tar to write.")
@click.option("--plugin", type=PATH, help="TensorRT plugin library, built for the device.")
@click.option("--wheels", type=PATH, help="Folder of wheels for the device, which are packed too.")
@click.option(
    "--machine",
    type=click.Choice(MACHINES),
    help="Processor of the device, where its GPU leaves that open (GH200 beside H100).  "
    "[default: that of the plugin library, of the GPU, or x86_64]",
)
@click.option("-v", "--verbose", count=True)
@click.version_option(__version__, prog_name="dvdq-bundle")
def main(out: Path, target: Path, plugin: Path | None, wheels: Path | None, machine: str | None, verbose: int) -> None:
    """Pack the export in OUT, without its engines, for dvdq-build on the device that they are for.

    The tar holds graphs, weights and configs as they are, the plugin library and wheels where they are given, the list of
    the wheels that the device needs, and a page that says what to do there.
    """
    setup_logging(verbose, "text")
    from dvdquant.artifact.bundle import write_bundle
    from dvdquant.artifact.layout import PLUGIN_PLACE
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.export.model_card import model_card
    from dvdquant.system.progress import Progress

    manifest = load_manifest(out)
    if not manifest.builds:
        raise UnsupportedError(
            f"{out} has no engine that is left to be built on a device",
            fix="export with --target tensorrt --sm X.Y, or with --build device",
        )
    if target.is_dir():
        raise UnsupportedError(f"{target} is a folder", fix="name the file to write, such as bundle.tar")
    sms = sms_of(manifest)
    library = None if plugin is None else _read_library(plugin, manifest, machine)
    processor = _machine(sms, library, machine)
    if library is not None:
        _check_library(library, manifest, processor)
    # 1. The export without engines and report: they are of another machine.
    listed = {
        n: e
        for n, e in manifest.files.items()
        if not n.startswith("engines/") and n not in ("README.md", "report.html")
    }
    others: dict[str, Path | bytes] = {}
    if plugin is not None:
        others[PLUGIN_PLACE] = plugin
    required = required_packages(manifest)
    lacking = []
    if wheels is not None:
        files = sorted(wheels.glob("*.whl"))
        lacking = lacking_wheels(wheels, [file.name for file in files], required, processor)
        others |= {f"wheels/{file.name}": file for file in files}
    others["requirements.txt"] = "".join(f"{line}\n" for line in required).encode()
    packed = replace(manifest, engines=(), files=listed)
    # 2. The page. The card of the export tells what it is, the first part what to do.
    own = any(name.startswith("wheels/dvdquant-") for name in others)
    page = bundle_page(packed, target, processor, library, wheels=wheels is not None, own=own)
    others["README.md"] = (page + model_card(packed).partition("---\n\n")[2]).encode()
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
    echo(f"{target} written: {count} files, {amount(target.stat().st_size)}, for SM {', '.join(sms)} on {processor}")
    echo(f"SHA-256   {digest}")
    echo(f"on the device: {build_line(packed, target, library)}")
    for line in _notes(packed, library, processor, machine is not None):
        echo(line)
    if wheels is not None and not own:
        echo(f"{wheels} has no wheel of dvdquant, which the device needs as well: `{make_wheel(processor)}`")
    if lacking:
        echo(
            f"{wheels} has no wheel of {', '.join(lacking)}: without internet the device must have these already; "
            f"else {download_line(processor)}"
        )
    if wheels is None:
        echo(
            f"without internet there: tar -xf {shell_line([target.name])} requirements.txt && {download_line(processor)}, "
            "and then --wheels wheels"
        )


def _notes(manifest: Manifest, library: PluginFile | None, processor: str, asked: bool) -> list[str]:
    """Return what the user may have overlooked.

    Args:
        manifest: The manifest that the bundle holds.
        library: The plugin library that it holds, or None.
        processor: The processor of the device.
        asked: Whether the user said so.
    """
    from dvdquant.artifact.layout import PLUGIN_PLACE
    from dvdquant.export.elsewhere import SCRIPT
    from dvdquant.hardware.gpus import cards_with
    from dvdquant.hardware.make_lines import make_plugin

    lines = []
    if library is None and (sms := sms_of(manifest, "tensorrt")):
        lines += [
            f"without a plugin library: TensorRT engines need one, dvdq-build there refuses them without --plugin, and {SCRIPT} "
            f"looks for it at {PLUGIN_PLACE}; make it here and pack it with --plugin: {make_plugin(processor, sms)}; or make it "
            "there, as the README.md of the bundle says"
        ]
    others = [card for sm in sms_of(manifest) for card in cards_with(sm, "aarch64")]
    if library is None and not asked and processor == "x86_64" and others:
        lines += [f"for a machine with x86_64; {', '.join(others)} sit in machines with aarch64: --machine aarch64"]
    return lines


def _read_library(path: Path, manifest: Manifest, asked: str | None) -> PluginFile:
    """Return what the plugin library is for.

    Args:
        path: The file.
        manifest: The manifest of the export.
        asked: What ``--machine`` says, or None.

    Raises:
        UnsupportedError: It is none, or no engine loads one; the error says what makes one for the device.
    """
    from dvdquant.hardware.make_lines import make_plugin
    from dvdquant.system.plugin_file import read_plugin

    if not (sms := sms_of(manifest, "tensorrt")):
        raise UnsupportedError(
            "--plugin is for TensorRT engines, and this export has TensorRT-RTX engines alone, which load none",
            fix="leave --plugin out",
        )
    try:
        return read_plugin(path)
    except UnsupportedError as error:
        wanted = _machine(sms_of(manifest), None, asked)
        raise UnsupportedError(
            f"{error.what}; wanted is one for SM {', '.join(sms)} on {wanted}",
            fix=f"{error.fix}: {make_plugin(wanted, sms)}",
        ) from error


def _machine(sms: list[str], library: PluginFile | None, asked: str | None) -> str:
    """Return the processor of the device.

    Args:
        sms: The compute capabilities of the engines.
        library: The plugin library, or None.
        asked: What ``--machine`` says, or None.

    Raises:
        UnsupportedError: The plugin library, ``--machine`` and what the GPUs are sold with do not agree.
    """
    from dvdquant.hardware.gpus import cards_with, machine_of
    from dvdquant.hardware.make_lines import make_plugin

    known = None
    for sm in sms:
        if (its := machine_of(sm)) is None:
            continue
        known = its
        cards = f"GPUs of SM {sm} ({', '.join(cards_with(sm, its))}) sit in machines with {its}"
        if asked not in (None, its):
            raise UnsupportedError(
                f"--machine is {asked}, and {cards}",
                fix="leave --machine out, or export for GPUs of the other machine alone",
            )
        if library is not None and library.machine != its:
            raise UnsupportedError(
                f"{library.path} is for {library.machine}, and {cards}",
                fix=f"build the library for it: {make_plugin(its, sms)}",
            )
    if library is not None and asked not in (None, library.machine):
        raise UnsupportedError(
            f"{library.path} is for {library.machine}, and --machine is {asked}",
            fix=f"build the library for it: {make_plugin(str(asked), sms)}; or leave --machine out",
        )
    # GPUs that are cards sit in machines of either kind, where x86-64 is the more usual.
    return asked or (None if library is None else library.machine) or known or "x86_64"


def _check_library(library: PluginFile, manifest: Manifest, machine: str) -> None:
    """Refuse a plugin library that is no use to the engines of the bundle.

    Args:
        library: The plugin library.
        manifest: The manifest of the export.
        machine: The processor of the device.

    Raises:
        UnsupportedError: It lacks kernels for one of them.
    """
    from dvdquant.hardware.make_lines import make_plugin
    from dvdquant.ops.cuda.architectures import serves

    sms = sms_of(manifest, "tensorrt")
    lacking = [sm for sm in sms if not serves(library.architectures, sm_number(sm))]
    if lacking:
        raise UnsupportedError(
            f"{library.path} has no kernels for SM {', '.join(lacking)}, which the engines are for",
            available=f"kernels for {', '.join(library.architectures)}"
            if library.architectures
            else "no kernels: the library loads them from another file, which a bundle does not hold",
            fix=f"build it with them: {make_plugin(machine, sms)}",
        )


if __name__ == "__main__":
    main()
