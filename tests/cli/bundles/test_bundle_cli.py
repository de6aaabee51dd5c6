"""``dvdq-bundle``: what it packs for a device, what its page says, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from dvdquant.artifact.bundle import open_bundle, write_bundle
from dvdquant.artifact.layout import PLUGIN_PLACE
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.unpack import unpack_bundle
from dvdquant.artifact.verify_files import verify_files
from dvdquant.backends import Backend
from dvdquant.cli.build import main as build_main
from dvdquant.cli.bundle import main as bundle_main
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.export.elsewhere import SCRIPT
from dvdquant.export.on_device import plan_on_device
from dvdquant.hardware.make_lines import make_plugin
from tests.support.device_build import A4, A8, ORIN, build_here, engine_of, pack, plugin_library
from tests.support.device_build import made as made


def not_packed(*arguments: object) -> str:
    """What ``dvdq-bundle`` says where it refuses."""
    result = CliRunner().invoke(bundle_main, [str(a) for a in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def page_of(bundle: Path) -> str:
    """The page that a bundle holds."""
    with tarfile.open(bundle) as tar:
        return tar.extractfile("README.md").read().decode()  # type: ignore[union-attr]


def export_for(sm: str, made: Path, out: Path, backend: str = "tensorrt") -> Path:
    """A copy of the export whose engines are for another GPU."""
    shutil.copytree(made, out)
    manifest = load_manifest(out)
    builds = tuple({**entry, "sm": [sm], "backend": backend} for entry in manifest.builds)
    (out / "manifest.json").write_text(dataclasses.replace(manifest, builds=builds).to_json())  # type: ignore[arg-type]
    return out


def test_a_bundle_is_all_that_a_device_needs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so", machine="aarch64")
    for place in ("dvdquant.system.plugin_file", "dvdquant.plugin_library"):  # the device, an Orin
        monkeypatch.setattr(f"{place}.machine_name", lambda: "aarch64")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some-1.0-py3-none-any.whl").write_bytes(b"a wheel")
    said = pack(made, tmp_path / "orin.tar", "--plugin", plugin, "--wheels", tmp_path / "wheels")
    assert "dvdq-build orin.tar -o orin --plugin bundled" in said
    assert "has no wheel of dvdquant" in said
    assert "python3-libnvinfer-lean" in page_of(tmp_path / "orin.tar")
    assert "wheels has no wheel of accelerate==" in said
    # Refused before anything is unpacked.
    there = tmp_path / "device"
    thor = dataclasses.replace(ORIN, name="Thor", sm="11.0")
    for gpu, version, text in (
        (thor, "11.4.0.1", "is for SM 8.7, and this GPU (Thor) has SM 11.0"),
        (None, "11.4.0.1", "the driver of this machine names none"),
        (ORIN, "10.3.0", "is for TensorRT 11, and this machine has 10.3.0"),
        (dataclasses.replace(ORIN, memory_bytes=10**6), "11.4.0.1", "of device memory"),
    ):
        monkeypatch.setattr("dvdquant.system.gpu.read_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr("dvdquant.backends.load_backend", lambda name, v=version: Backend(name, None, v))
        result = CliRunner().invoke(build_main, [str(tmp_path / "orin.tar"), "-o", str(there), "--plugin", "bundled"])
        assert result.exit_code == 2
        assert text in result.output
    # A bundle without a plugin library is for that SM just as well, and says what it lacks; one whose library has other kernels
    # is no use on this GPU.
    pack(made, tmp_path / "bare.tar")
    others = plugin_library(tmp_path / "others.so", machine="aarch64", kernels="90;110")
    write_bundle(tmp_path / "others.tar", made, load_manifest(made), {PLUGIN_PLACE: others})
    library = ("--plugin", "bundled")
    for gpu, bundle, options, text in (
        (thor, "bare.tar", (), "is for SM 8.7, and this GPU (Thor) has SM 11.0"),
        (thor, "bare.tar", ("--dry-run",), "--plugin FILE, for it holds no plugin library"),
        (ORIN, "bare.tar", (), "holds none"),
        (ORIN, "bare.tar", library, "holds none"),
        (ORIN, "orin.tar", (), "--plugin bundled takes that of the bundle"),
        (
            ORIN,
            "others.tar",
            library,
            "others.tar/plugins/libdvdquant_plugins.so are for 90, 110, and this GPU has SM 8.7",
        ),
        (ORIN, "others.tar", ("--dry-run",), "are for 90, 110, and this GPU has SM 8.7"),
        (ORIN, "orin.tar", ("--plugin", str(others)), "others.so are for 90, 110"),
        (ORIN, "orin.tar", (*library, "--bits", "6"), "has no engine of 6 bits to build"),
    ):
        monkeypatch.setattr("dvdquant.system.gpu.read_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr("dvdquant.backends.load_backend", lambda name: Backend(name, None, "11.4.0.1"))
        result = CliRunner().invoke(build_main, [str(tmp_path / bundle), "-o", str(there), *options])
        assert result.exit_code == 2
        assert text in result.output
    assert not there.exists()
    whole = (tmp_path / "orin.tar").read_bytes()
    (tmp_path / "changed.tar").write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    with (
        open_bundle(tmp_path / "changed.tar") as changed,
        pytest.raises(OutputError, match="is not as dvdq-bundle wrote"),
    ):
        unpack_bundle(changed, there)
    assert not there.exists()
    # Unpacked, built, and the second time neither.
    done = build_here(monkeypatch, tmp_path / "orin.tar", "-o", there, "--plugin", "bundled")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(there)
    verify_files(there, manifest)
    assert [e["path"] for e in manifest.engines] == [A4, A8]
    assert {
        "requirements.txt",
        "plugins/libdvdquant_plugins.so",
        "wheels/some-1.0-py3-none-any.whl",
    } <= manifest.files.keys()
    assert engine_of(there, A4)["libraries"] == [str(there / "plugins" / "libdvdquant_plugins.so")]


def test_wheels_that_are_there_are_not_named_as_lacking(made: Path, tmp_path: Path) -> None:
    pack(made, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        required = tar.extractfile("requirements.txt").read().decode().split()  # type: ignore[union-attr]
    (tmp_path / "wheels").mkdir()
    for line in required:
        name, _, version = line.partition("==")
        platform = "any" if name == "click" else "manylinux2014_aarch64.manylinux_2_17_aarch64"
        if name != "numba":
            (tmp_path / "wheels" / f"{name.replace('-', '_')}-{version}-py3-none-{platform}.whl").touch()
    (tmp_path / "wheels" / "numba-0.1-py3-none-any.whl").touch()
    said = pack(made, tmp_path / "a.tar", "--wheels", tmp_path / "wheels")
    (numba,) = (line for line in required if line.startswith("numba=="))
    assert f"wheels has no wheel of {numba}: without internet" in said


def test_a_library_that_is_no_use_on_the_device_is_not_packed(made: Path, tmp_path: Path) -> None:
    """Each refusal names what it is and what was wanted, and has the line that makes the right one."""
    good = plugin_library(tmp_path / "good.so", machine="aarch64")
    (tmp_path / "other.so").write_bytes(good.read_bytes().replace(b"@dvdquant", b"@anything"))
    pc = plugin_library(tmp_path / "pc.so", machine="x86_64")
    kernels = plugin_library(tmp_path / "kernels.so", None, "aarch64")
    bare = plugin_library(tmp_path / "bare.so", machine="aarch64", kernels="")
    thor = plugin_library(tmp_path / "thor.so", machine="aarch64", kernels="90a;110")
    wanted = "wanted is one for SM 8.7 on aarch64"
    for library, words in (
        (tmp_path / "other.so", ("is another library or program, for aarch64", wanted)),
        (kernels, ("holds dvdquant's kernels without the plugin, for aarch64", wanted)),
        (tmp_path / "none.so", ("cannot be read: No such file", wanted)),
        (pc, ("is for x86_64, and GPUs of SM 8.7 (Orin Nano, Orin NX, AGX Orin) sit in machines with aarch64",)),
        (bare, ("has no kernels for SM 8.7", "loads them from another file, which a bundle does not hold")),
        (thor, ("has no kernels for SM 8.7", "kernels for 90a, 110")),
    ):
        said = not_packed(made, "-o", tmp_path / "x.tar", "--plugin", library)
        for text in (str(library), *words, make_plugin("aarch64", ["8.7"])):
            assert text in said
    assert "leave --machine out" in not_packed(made, "-o", tmp_path / "x.tar", "--plugin", good, "--machine", "x86_64")
    rtx = export_for("12.1", made, tmp_path / "rtx", "tensorrt_rtx")
    assert "has TensorRT-RTX engines alone, which load none" in not_packed(
        rtx, "-o", tmp_path / "x.tar", "--plugin", good
    )
    assert not (tmp_path / "x.tar").exists()


def test_the_processor_is_that_of_the_gpu_or_the_one_that_is_asked_for(made: Path, tmp_path: Path) -> None:
    spark = export_for("12.1", made, tmp_path / "spark", "tensorrt_rtx")
    hopper = export_for("9.0", made, tmp_path / "hopper")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.13.0-cp312-cp312-manylinux_2_28_aarch64.whl").touch()
    wheels, target = ("--wheels", tmp_path / "wheels"), tmp_path / "a.tar"
    said = pack(spark, target, *wheels)
    assert "for SM 12.1 on aarch64" in said
    assert "manylinux2014_aarch64" in said
    assert "x86_64" not in said
    assert "--machine is x86_64, and GPUs of SM 12.1 (GB10) sit in machines with aarch64" in not_packed(
        spark, "-o", target, "--machine", "x86_64"
    )
    # An H100 sits beside x86-64, a GH200 of the same SM beside ARM.
    assert "aarch64, and the device is Linux on x86_64" in not_packed(hopper, "-o", target, *wheels)
    said = pack(hopper, target)
    assert "for SM 9.0 on x86_64" in said
    assert "GH200 sit in machines with aarch64: --machine aarch64" in said
    said = pack(hopper, target, *wheels, "--machine", "aarch64")
    assert "for SM 9.0 on aarch64" in said
    assert "sit in machines" not in said
    library = plugin_library(tmp_path / "arm.so", machine="aarch64", kernels="80;90a;compute_80")
    assert "on aarch64" in pack(hopper, target, "--plugin", library)
    assert f"{library} is for aarch64, and --machine is x86_64" in not_packed(
        hopper, "-o", target, "--plugin", library, "--machine", "x86_64"
    )


def test_the_page_asks_for_what_the_engines_need(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    # 1. TensorRT without a plugin library: what is missing, what makes it, and lines that name it.
    said, line = pack(made, target), "dvdq-build a.tar -o a --plugin libdvdquant_plugins.so"
    assert line in said
    assert "dvdq-build there refuses them without --plugin" in said
    assert make_plugin("aarch64", ["8.7"]) in said
    page = page_of(target)
    for text in (
        f"4. `{line}`",
        "3. The plugin library, which TensorRT engines need and this bundle does not hold",
        'make kernels SM="87" && make plugin`',
        'make kernels HOST=aarch64 SM="87" && make plugin HOST=aarch64 TENSORRT_ROOT=FOLDER',
        f"`{PLUGIN_PLACE}`, which is missing",
        "JetPack brings the last two",
        "By estimate, a build takes up to",
        "TensorRT's own builder has not been measured",
    ):
        assert text in page, page
    assert "the line ends with it" not in page
    # 2. With one, and for two GPUs.
    both = export_for("11.0", made, tmp_path / "both")
    builds = (*load_manifest(made).builds, *load_manifest(both).builds)
    (both / "manifest.json").write_text(dataclasses.replace(load_manifest(both), builds=builds).to_json())
    pack(both, target)
    assert "does not say the GPU's SM, the line ends with it: 8.7 or 11.0." in page_of(target)
    pack(made, target, "--plugin", plugin_library(tmp_path / "arm.so", machine="aarch64"))
    page = page_of(target)
    assert "3. `dvdq-build a.tar -o a --plugin bundled`" in page
    assert "and TensorRT 11 with its Python module" in page
    assert "missing" not in page
    # 3. Of a server: no JetPack there.
    pack(export_for("9.0", made, tmp_path / "hopper"), target)
    page = page_of(target)
    assert "JetPack" not in page
    assert "build/plugins-aarch64" not in page
    # 4. TensorRT-RTX, which pip installs, and which loads no plugin.
    pack(export_for("12.1", made, tmp_path / "spark", "tensorrt_rtx"), target)
    page = page_of(target).partition("# `")[0]
    assert "1. Python 3.11 or newer and the GPU's driver." in page
    assert "3. `dvdq-build a.tar -o a`" in page
    for text in ("JetPack", "plugin", "system-site-packages", "the system's TensorRT", SCRIPT, "own builder"):
        assert text not in page, page


def test_what_cannot_be_packed(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no wheel" in not_packed(made, "-o", tmp_path / "x.tar", "--wheels", tmp_path / "empty")
    for wheel, words in (
        (
            "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl",
            "is for manylinux_2_28_x86_64, and the device is Linux on aarch64",
        ),
        ("torch-2.13.0-cp312-cp312-win_arm64.whl", "is for win_arm64"),
        ("torch.whl", "has not the name of a wheel"),
    ):
        (tmp_path / "empty" / wheel).touch()
        assert words in not_packed(made, "-o", tmp_path / "x.tar", "--wheels", tmp_path / "empty")
        (tmp_path / "empty" / wheel).unlink()
    assert "is a folder" in not_packed(made, "-o", tmp_path)
    bare = Path(shutil.copytree(made, tmp_path / "bare"))
    manifest = dataclasses.replace(load_manifest(bare), builds=())
    (bare / "manifest.json").write_text(manifest.to_json())
    assert "no engine that is left to be built" in not_packed(bare, "-o", tmp_path / "x.tar")
    with pytest.raises(UnsupportedError, match="has no engine that was left to be built"):
        plan_on_device(bare, manifest, ORIN)
    assert not (tmp_path / "x.tar").exists()
