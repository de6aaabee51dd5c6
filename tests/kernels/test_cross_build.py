"""Libraries for another processor, under its emulator: the kernels' plans, and the plugin by its harness.

The kernels' library is what ``make kernels HOST=aarch64 SM="87 110"`` leaves in build/kernels-aarch64; nothing here compiles
CUDA. Tests that need a cross compiler, qemu-user, TensorRT's headers or that library skip where it is not there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from benchmarks.held_weights import models, plan_of
from dvdquant.errors import DvdquantError
from dvdquant.model.held_weights import shape_of
from dvdquant.ops.cuda.abi import ABI_VERSION
from dvdquant.ops.cuda.architectures import serves
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.repack import LayerShape
from dvdquant.system.plugin_file import read_plugin
from tests.support.plugin_build import configure

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
BUILT = ROOT / "build" / "kernels-aarch64" / "libdvdquant_kernels.so"
COMPILER, EMULATOR, ROOT_OF_IT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
FOR_ARM = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")

LAYERS = [
    LayerShape(64, 1024, 1, False, 256, 1, 8, 0),
    LayerShape(64, 1024, 1, False, 256, 1, 4, 0),
    LayerShape(5120, 13824, 1, False, 512, 27, 4, 0),
    LayerShape(64, 1024, 8, True, 256, 1, 4, 128),
    LayerShape(3072, 3072, 1, True, 128, 1, 8, 128),
    LayerShape(64, 1000, 1, False, 1, 1, 8, 0),
]


def needs(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: g++-aarch64-linux-gnu, qemu-user)")


def emulated(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [word for name, value in variables.items() for word in ("-E", f"{name}={value}")]
    return subprocess.run(
        [EMULATOR, "-L", ROOT_OF_IT, *words, *map(str, command)], capture_output=True, text=True, timeout=300
    )


def published_layers() -> list[LayerShape]:
    """The layers of the published models whose held bytes docs/hardware.md lists, each form once."""
    plans = [plan_of(name, "w4a4-g64") for name in models()]
    return list(dict.fromkeys(shape_of(spec, plan, bits) for plan in plans for spec in plan.layers for bits in (4, 8)))


def test_the_library_for_arm_plans_as_that_for_this_machine(tmp_path: Path) -> None:
    """Also the layers of whole models: what they take on a Jetson is what is counted for it."""
    needs(COMPILER, EMULATOR, "g++")
    if not BUILT.is_file():
        pytest.skip('needs the library: make kernels HOST=aarch64 SM="87 110"')
    program = tmp_path / "plans"
    subprocess.run(
        [COMPILER, "-std=c++17", f"-I{KERNELS / 'include'}", KERNELS / "check" / "plans.cpp", "-ldl", "-o", program],
        check=True,
        timeout=120,
    )
    sms = (75, 80, 86, 87, 89, 90, 100, 110, 120)
    layers = [*LAYERS, *published_layers()]
    assert len(layers) > 40
    lines = [
        " ".join(map(str, (sm, *(int(v) for v in dataclasses.astuple(layer)[:8])))) for sm in sms for layer in layers
    ]
    done = emulated(program, BUILT, *[word for line in lines for word in line.split()])
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[0] == {"abi": ABI_VERSION, "architectures": "87;110"}
    sys.path.insert(0, str(KERNELS))
    try:
        import build

        here = KernelLibrary(build.build_emulated())
    finally:
        sys.path.remove(str(KERNELS))
    wanted = []
    for sm in sms:
        for layer in layers:
            try:
                plan = here.plan_layer(layer, sm)
                spaces = [here.workspace_bytes(layer, sm, 1000), here.rows_bytes(layer, sm)]
                wanted.append([plan.path, plan.prepared_bytes, *spaces, here.packed_workspace_bytes(layer, sm, 1000)])
            except DvdquantError as error:
                wanted.append(error.what)
    assert told[1:] == wanted
    assert [serves(tuple(told[0]["architectures"].split(";")), sm) for sm in sms] == [sm in (87, 110) for sm in sms]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the plugin for aarch64, without its kernels."""
    needs(COMPILER, EMULATOR, "cmake")
    return configure(tmp_path_factory.mktemp("plugin"), *FOR_ARM)


@pytest.mark.tensorrt_headers
def test_the_plugin_for_arm_passes_its_harness(plugin: Path) -> None:
    folder = plugin
    library = folder / "libdvdquant_plugins.so"
    facts = read_plugin(library)
    assert facts.machine == "aarch64"
    assert facts.tensorrt_major in (10, 11)
    device = folder / "host_device"
    for sm, checks in product((87, 110), ("contract", "missing-kernels", "registration", "other-version")):
        variables = {}
        if checks != "missing-kernels":
            variables = {"LD_LIBRARY_PATH": str(device), "HOST_CUDA_SM": str(sm)}
            variables |= {"DVDQUANT_KERNELS": str(device / "libhost_kernels.so")}
        variables |= {"DVDQUANT_PLUGIN_REGISTER": "1"} if checks == "registration" else {}
        done = emulated(folder / "harness", library, checks, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 failed" in done.stdout


@pytest.mark.tensorrt_headers
def test_the_plugin_for_arm_holds_its_kernels(plugin: Path) -> None:
    """As `make plugin HOST=aarch64` links it; it comes last, because it builds the folder anew."""
    archive = BUILT.with_suffix(".a")
    runtime = next(BUILT.parent.glob("cudart-aarch64/nvidia/*/lib/libcudart_static.a"), None)
    if runtime is None or not archive.is_file():
        pytest.skip('needs the archive: make kernels HOST=aarch64 SM="87 110"')
    configure(plugin, *FOR_ARM, f"-DDVDQUANT_KERNELS_ARCHIVE={archive}", f"-DCUDART_STATIC={runtime}")
    facts = read_plugin(plugin / "libdvdquant_plugins.so")
    assert (facts.machine, facts.architectures) == ("aarch64", ("87", "110"))
