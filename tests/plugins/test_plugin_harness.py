"""The TensorRT plugin library, driven by a host program through the interfaces TensorRT calls.

Without a GPU the program's device is the host (plugins/harness/host_cuda.cpp and host_kernels.cpp): that shows what the
plugin asks, refuses, passes on, prepares and frees, not what the CUDA kernels compute. With a GPU the last test runs the
same program on the real ones.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.fused import Prologue, apply_prologue, run_fused_linear
from dvdquant.ops.packed_rows import rows_bytes
from dvdquant.ops.reference import quant_linear_reference
from dvdquant.ops.repack import LayerShape
from dvdquant.ops.smooth import apply_pre_quant, pack_pre_quant
from tests.support.plugin_build import configure

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.tensorrt_headers

INPUTS = ("x", "weight", "weight_scale", "weight_group_scale", "weight_zero", "bias", "hadamard", "outer")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {torch.float32: "fp32", torch.int8: "int8", torch.uint8: "int8", torch.int32: "int32"}
# Rounding y to its type, of which the reference is not guilty: half a unit in the last place.
HALF_ULP = {"bf16": 2.0**-8, "fp16": 2.0**-11}


@dataclass(frozen=True)
class Case:
    """One layer. ``wide``: the stored bytes arrive as INT32, as TensorRT's parser makes them of UINT8 initializers."""

    shape: tuple[int, ...]
    rows: int
    act_bits: int
    act_group: int = 0
    block: int = 1
    outer: int = 1
    groups: int = 1
    float_zero_point: bool = False
    wide: bool = False
    dtype: str = "bf16"

    @property
    def narrowed(self) -> int:
        """Bytes of groups that lie beside the rows, because they did not arrive as bytes."""
        return self.rows * self.groups * (1 + self.float_zero_point) if self.wide and self.groups > 1 else 0

    def tensors(self) -> dict[str, Tensor]:
        """The inputs as the op takes them, x heavy in outliers."""
        seed = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        features = self.shape[-1]
        x = torch.randn(self.shape, generator=seed) * torch.exp2(torch.randn(features, generator=seed))
        zero = (
            torch.randint(0, 256, (self.rows, self.groups), generator=seed, dtype=torch.uint8)
            if self.float_zero_point
            else torch.randint(-15, 15, (self.rows,), generator=seed) / 2
        )
        values = (
            x.to(DTYPES[self.dtype]),
            torch.randint(-128, 128, (self.rows, features // 2), generator=seed, dtype=torch.int8),
            torch.rand(self.rows, generator=seed) / 64 + 1e-3,
            torch.randint(1, 256, (self.rows, self.groups), generator=seed, dtype=torch.uint8),
            zero,
            torch.randn(self.rows, generator=seed),
            hadamard_matrix(self.block).float(),
            torch.linalg.qr(torch.randn(self.outer, self.outer, generator=seed, dtype=torch.float64))[0].float()
            if self.outer > 1
            else torch.ones(1, 1),
        )
        return dict(zip(INPUTS, values, strict=True))

    def exact(self) -> Tensor:
        """y in float64, of the very inputs that are bound."""
        tensors = self.tensors()
        tensors["x"] = tensors["x"].double()
        # Both are exact in float64 up to the fp32 rounding of 1/sqrt(block), which the kernels do not have.
        tensors["hadamard"] = hadamard_matrix(self.block).double()
        return quant_linear_reference(
            **tensors, act_bits=self.act_bits, act_group=self.act_group, compute=torch.float64
        )

    def write(self, folder: Path) -> Path:
        """case.txt and one file of raw bytes per input."""
        folder.mkdir()
        lines = [f"field act_bits {self.act_bits}", f"field act_group {self.act_group}", f"layer {folder.name}"]
        for name, tensor in self.tensors().items():
            stored = tensor.int() if self.wide and tensor.dtype == torch.uint8 else tensor
            kind = self.dtype if name == "x" else TYPES[stored.dtype]
            lines.append(f"tensor {name} {kind} {' '.join(map(str, stored.shape))}")
            raw = stored.contiguous().view(torch.int16) if name == "x" else stored.contiguous()
            (folder / f"{name}.bin").write_bytes(raw.numpy().tobytes())
        lines.append(f"result y {self.dtype} {' '.join(map(str, (*self.shape[:-1], self.rows)))}")
        (folder / "case.txt").write_text("\n".join(lines))
        return folder

    def read(self, folder: Path, name: str) -> Tensor:
        """What the program wrote, in float64."""
        raw = torch.from_numpy(np.fromfile(folder / name, np.int16))
        return raw.view(DTYPES[self.dtype]).double().reshape(*self.shape[:-1], self.rows)


@dataclass(frozen=True)
class FusedCase(Case):
    """A layer of what its prologue makes of x. ``gate_rows``, ``rows``: leading axes of the gate, and of the modulation."""

    norm: str = "none"
    gelu: bool = False
    residual: bool = False
    gate_rows: tuple[int, ...] | None = None
    rows_of: tuple[int, ...] | None = None
    balanced: bool = False

    def extras(self) -> dict[str, Tensor]:
        """What the node reads behind its eight inputs."""
        seed = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()) + 1)
        features, kind = self.shape[-1], DTYPES[self.dtype]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=seed)

        found = {}
        if self.residual:
            found["y"] = draw(*self.shape).to(kind)
        if self.gate_rows is not None:
            found["gate"] = draw(*self.gate_rows, features)
        if self.rows_of is not None:
            found |= {"multiplier": 1 + draw(*self.rows_of, features), "addend": draw(*self.rows_of, features)}
        if self.balanced:
            scale = 2.0 ** torch.randint(-2, 3, (features,), generator=seed)
            found["pre_quant"] = pack_pre_quant(scale, draw(features), kind)
        return found

    def prologue(self) -> Prologue:
        """The same as the library's own call takes it: [M, K] and rows of K."""
        flat = {name: part.reshape(-1, self.shape[-1]) for name, part in self.extras().items() if name != "pre_quant"}
        return Prologue(**flat, norm=self.norm, gelu=self.gelu, eps=1e-5)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The output and the sum in float64, each rounding of the definition done once."""
        tensors = self.tensors()
        x, prologue, kind = tensors["x"].reshape(-1, self.shape[-1]), self.prologue(), DTYPES[self.dtype]
        wide = {
            name: None if part is None else part.double()
            for name, part in vars(prologue).items()
            if name in ("y", "gate", "multiplier", "addend")
        }
        _, hidden = apply_prologue(x.double(), Prologue(**wide))
        hidden = hidden.to(kind).double()
        after = Prologue(
            multiplier=wide["multiplier"], addend=wide["addend"], norm=self.norm, gelu=self.gelu, eps=prologue.eps
        )
        z = apply_prologue(hidden, after)[0].to(kind)
        if self.balanced:
            z = apply_pre_quant(z, self.extras()["pre_quant"])
        tensors |= {"x": z.double(), "hadamard": hadamard_matrix(self.block).double()}
        y = quant_linear_reference(**tensors, act_bits=self.act_bits, act_group=self.act_group, compute=torch.float64)
        return y.reshape(*self.shape[:-1], self.rows), hidden.reshape(self.shape)

    def write(self, folder: Path) -> Path:
        """As of every case, with the attributes and inputs of the fused node."""
        super().write(folder)
        *lines, last = (folder / "case.txt").read_text().splitlines()
        extras = self.extras()
        lines += [f"text reads {','.join(extras)}", f"text norm {self.norm}", f"field gelu {int(self.gelu)}"]
        lines.append("real eps 1e-5")
        for name, tensor in extras.items():
            kind = "fp32" if tensor.dtype == torch.float32 else self.dtype
            lines.append(f"tensor {name} {kind} {' '.join(map(str, tensor.shape))}")
            raw = tensor.contiguous() if kind == "fp32" else tensor.contiguous().view(torch.int16)
            (folder / f"{name}.bin").write_bytes(raw.numpy().tobytes())
        lines.append(last)
        if self.residual:
            lines.append(f"result hidden {self.dtype} {' '.join(map(str, self.shape))}")
        (folder / "case.txt").write_text("\n".join(lines))
        return folder


FUSED = {
    # Wan: a gated residual, a layer norm, a modulation by sample and the balance; then a residual and rows for all.
    "wan-modulated": FusedCase(
        (2, 5, 256), 40, 8, block=64, norm="layer", residual=True, gate_rows=(2, 1), rows_of=(2, 1), balanced=True
    ),
    "wan-affine": FusedCase((2, 3, 256), 24, 4, block=256, norm="layer", residual=True, rows_of=(), dtype="fp16"),
    "per-token-rms": FusedCase(
        (3, 128), 16, 4, act_group=64, block=32, norm="rms", rows_of=(3,), groups=2, float_zero_point=True, wide=True
    ),
    "gelu": FusedCase((1, 7, 512), 24, 4, block=256, gelu=True, balanced=True),
}

CASES = {
    "a4-token-rotated": Case((2, 5, 96), 40, act_bits=4, block=8, outer=12),
    "a8-token-fp16": Case((7, 128), 24, act_bits=8, block=128, dtype="fp16"),
    "a4-group-float-zero": Case(
        (1, 3, 2, 256), 33, act_bits=4, act_group=64, groups=8, float_zero_point=True, block=64
    ),
    "a8-wide-bytes": Case((4, 64), 9, act_bits=8, groups=2, float_zero_point=True, wide=True, block=32),
    "a8-no-rotation": Case((1, 32), 1, act_bits=8, wide=True, dtype="fp16"),
    "vector": Case((64,), 5, act_bits=4, groups=4, block=32, outer=2),
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder, with address and undefined-behaviour sanitizers."""
    return configure(
        tmp_path_factory.mktemp("plugin"), "-DCMAKE_BUILD_TYPE=Debug", "-DDVDQUANT_SANITIZE=address,undefined"
    )


def run(build: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The harness; variables that are not given are unset."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "DVDQUANT_KERNELS", "DVDQUANT_WEIGHTS")
    }
    return subprocess.run(
        [str(build / "harness"), str(build / "libdvdquant_plugins.so"), *arguments],
        capture_output=True,
        text=True,
        env=clean | environment,
        timeout=300,
    )


def host_device(build: Path, sm: int = 90) -> dict[str, str]:
    """The variables that make the host the device."""
    folder = build / "host_device"
    kernels = str(folder / "libhost_kernels.so")
    return {"LD_LIBRARY_PATH": str(folder), "DVDQUANT_KERNELS": kernels, "HOST_CUDA_SM": str(sm)}


def check(done: subprocess.CompletedProcess[str], device: bool) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
    assert ("with a device" in done.stdout) is device


def test_the_interfaces_answer_as_tensorrt_expects(sanitized: Path) -> None:
    check(run(sanitized, "contract", **host_device(sanitized)), device=True)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a CUDA driver")
def test_without_a_driver_everything_but_planning_works_and_planning_says_why(sanitized: Path) -> None:
    check(run(sanitized, "contract"), device=False)
    kernels = host_device(sanitized)["DVDQUANT_KERNELS"]
    check(run(sanitized, "missing-driver", DVDQUANT_KERNELS=kernels), device=False)


@pytest.mark.parametrize("environment", [{}, {"DVDQUANT_KERNELS": "/nowhere/libdvdquant_kernels.so"}])
def test_missing_kernels_are_named(sanitized: Path, environment: dict[str, str]) -> None:
    check(run(sanitized, "missing-kernels", **environment), device=False)


def test_it_registers_itself_where_the_program_only_opens_it(sanitized: Path) -> None:
    asked = host_device(sanitized) | {"DVDQUANT_PLUGIN_REGISTER": "1"}
    check(run(sanitized, "registration", **asked), device=False)
    check(run(sanitized, "registration", "lean", **asked), device=False)
    # Not unless asked: loadLibrary would refuse it.
    unasked = run(sanitized, "registration", **host_device(sanitized))
    assert unasked.returncode == 1
    assert "count == 2" in unasked.stderr
    alone = run(sanitized, "missing-kernels", DVDQUANT_PLUGIN_REGISTER="1")
    assert "TensorRT" in alone.stderr
    assert "not in this process" in alone.stderr


def test_a_tensorrt_of_another_major_version_is_refused(sanitized: Path) -> None:
    for which in ((), ("lean",)):
        done = run(sanitized, "other-version", *which, **host_device(sanitized))
        check(done, device=False)
        built, found = re.findall(r"TensorRT (\d+)", done.stderr)[:2]
        assert built != found, "the version that it is built for, and the one that is here"


@pytest.mark.tensorrt_lean
def test_the_real_lean_runtime_takes_it(tmp_path: Path) -> None:
    """Its registry needs no GPU. In a process of its own: without a driver, a later call of the library may end it."""
    build = configure(tmp_path, "-DCMAKE_BUILD_TYPE=Release")
    code = """
import os, sys, tensorrt_lean
registry = tensorrt_lean.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
print(sorted(c.name for c in registry.all_creators if c.plugin_namespace == "dvdquant"), flush=True)
os._exit(0)
"""
    command = [sys.executable, "-c", code, str(build / "libdvdquant_plugins.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "['FusedQuantLinear', 'QuantLinear']\n", done.stderr


def test_only_the_two_doors_are_exported(sanitized: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    command = ["nm", "-D", "--defined-only", str(sanitized / "libdvdquant_plugins.so")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == {"getCreators", "setLoggerFinder"}


@pytest.mark.parametrize("form", ["packed", "expanded"])
def test_enqueue_passes_the_layer_on(sanitized: Path, tmp_path: Path, form: str) -> None:
    folders = {name: case.write(tmp_path / name) for name, case in CASES.items()}
    done = run(sanitized, "run", *map(str, folders.values()), **host_device(sanitized) | {"DVDQUANT_WEIGHTS": form})
    check(done, device=True)
    for name, case in CASES.items():
        exact = case.exact()
        y = case.read(folders[name], "y.bin")
        # The host kernels sum in double: what is left is y's own rounding (and fp32's, once).
        torch.testing.assert_close(
            y, exact, rtol=HALF_ULP[case.dtype] * 1.01, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        for other in ("y_graph.bin", "y_twin.bin", "y_old.bin"):
            assert torch.equal(y, case.read(folders[name], other)), (name, other)
        # What is held beside the bound weight: the rows, or all of it again.
        held = 8 * case.rows * 3 + case.narrowed if form == "packed" else 8 * case.rows * (case.shape[-1] + 1)
        assert f"{folders[name]}: holds {held} bytes" in done.stdout


@pytest.mark.parametrize("form", ["packed", "expanded"])
def test_a_fused_node_passes_on_what_comes_before_its_layer(sanitized: Path, tmp_path: Path, form: str) -> None:
    folders = {name: case.write(tmp_path / name) for name, case in FUSED.items()}
    done = run(
        sanitized, "run-fused", *map(str, folders.values()), **host_device(sanitized) | {"DVDQUANT_WEIGHTS": form}
    )
    check(done, device=True)
    for name, case in FUSED.items():
        held = 8 * case.rows * 3 + case.narrowed if form == "packed" else 8 * case.rows * (case.shape[-1] + 1)
        assert f"{folders[name]}: holds {held} bytes" in done.stdout
        exact, hidden = case.exact()
        y = case.read(folders[name], "y.bin")
        # A norm in another order of sums may round z to the other side, which moves few codes by one.
        assert (y - exact).norm() <= 2e-3 * exact.norm() + HALF_ULP[case.dtype] * exact.norm(), name
        for other in ("y_graph.bin", "y_twin.bin", "y_old.bin"):
            assert torch.equal(y, case.read(folders[name], other)), (name, other)
        if case.residual:
            got = torch.from_numpy(np.fromfile(folders[name] / "hidden.bin", np.int16)).view(DTYPES[case.dtype])
            assert torch.equal(got.double().reshape(case.shape), hidden), name


@pytest.mark.parametrize(
    ("sm", "form", "added"), [(90, "packed", 0), (80, "packed", 0), (90, "expanded", 0), (80, "expanded", 1)]
)
def test_the_two_widths_share_a_weight_where_they_can(
    sanitized: Path, tmp_path: Path, sm: int, form: str, added: int
) -> None:
    folder = CASES["a4-token-rotated"].write(tmp_path / "layer")
    done = run(sanitized, "run", str(folder), **host_device(sanitized, sm) | {"DVDQUANT_WEIGHTS": form})
    check(done, device=True)
    assert f"other width allocates {added}\n" in done.stdout


def test_the_layers_that_are_named_are_expanded_and_no_others(sanitized: Path, tmp_path: Path) -> None:
    """A layer is named by its whole name; where its path multiplies 4 bits, what is bound serves."""
    for name, sm, named, expanded in (
        ("vector", 90, "other,vector", True), ("vector", 90, "vectors,a.vector,vec", False), ("vector", 80, "vector", False),
    ):  # fmt: skip
        case, folder = CASES[name], tmp_path / f"{sm}-{expanded}" / name
        folder.parent.mkdir()
        done = run(
            sanitized,
            "run",
            str(case.write(folder)),
            **host_device(sanitized, sm) | {"DVDQUANT_WEIGHTS": f"mixed:{named}"},
        )
        check(done, device=True)
        held = 8 * case.rows * (case.shape[-1] + 1) if expanded else 8 * case.rows * 3 + case.narrowed
        assert f"{folder}: holds {held} bytes" in done.stdout
        # What no node is called is told once, however many contexts ask.
        for word in named.split(","):
            warned = [line for line in done.stdout.splitlines() if "warning: " in line]
            assert sum(word in re.split(r"[\s,]+", line) for line in warned) == (word != name), done.stdout


def test_an_unknown_layer_is_told_with_the_names_nearest_to_it(sanitized: Path, tmp_path: Path) -> None:
    names = ("blocks.0.ffn", "blocks.1.ffn", "blocks.1.attn", "proj")
    folders = [CASES["vector"].write(tmp_path / name) for name in names]
    done = run(
        sanitized, "run", *map(str, folders), **host_device(sanitized) | {"DVDQUANT_WEIGHTS": "mixed:proj,blocks.2.ffn"}
    )
    check(done, device=True)
    assert done.stdout.count("warning: ") == 1
    warning, available, fix = done.stdout[done.stdout.index("warning: ") :].splitlines()[:3]
    assert "DVDQUANT_WEIGHTS" in warning
    assert re.findall(r"blocks\S+ffn|proj", warning) == ["blocks.2.ffn"]
    assert available.startswith("  available: 4 layers")
    assert re.findall(r"[\w.]*(?:ffn|attn|proj)", available) == ["blocks.0.ffn", "blocks.1.ffn", "blocks.1.attn"]
    assert fix.startswith("  fix: ")


def test_an_unknown_form_of_weights_is_refused(sanitized: Path, tmp_path: Path) -> None:
    folder = CASES["vector"].write(tmp_path / "layer")
    done = run(sanitized, "run", str(folder), **host_device(sanitized) | {"DVDQUANT_WEIGHTS": "thin"})
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "DVDQUANT_WEIGHTS" in line]
    assert "thin" in line
    for form in ("packed", "expanded", "mixed:"):
        assert form in done.stderr


def test_an_unsupported_gpu_is_refused_in_the_kernels_words(sanitized: Path, tmp_path: Path) -> None:
    folder = CASES["vector"].write(tmp_path / "layer")
    done = run(sanitized, "run", str(folder), **host_device(sanitized, 75))
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if "layer on SM 75" in line)
    assert "no kernels" in line
    assert re.search(r"available: 80\b", line)


@pytest.fixture(scope="module")
def emulated() -> Path:
    """The kernels' own device code compiled for the host, behind the same C ABI."""
    command = [sys.executable, str(ROOT / "kernels/build.py"), "--emulated"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("sm", [80, 90])
def test_enqueue_on_the_emulated_kernels(sanitized: Path, emulated: Path, tmp_path: Path, sm: int) -> None:
    folders = {name: case.write(tmp_path / name) for name, case in CASES.items()}
    done = run(
        sanitized,
        "run",
        *map(str, folders.values()),
        **host_device(sanitized, sm) | {"DVDQUANT_KERNELS": str(emulated)},
    )
    check(done, device=True)
    expanded = {name: case.read(folders[name], "y_old.bin") for name, case in CASES.items()}
    for name, case in CASES.items():
        exact, y = case.exact(), case.read(folders[name], "y.bin")
        # An engine that holds weights expanded computes the same bits.
        assert torch.equal(y, expanded[name]), name
        shape = LayerShape(case.rows, case.shape[-1], case.groups, case.float_zero_point)
        assert f"{folders[name]}: holds {rows_bytes(shape) + case.narrowed} bytes" in done.stdout
        plain = quant_linear_reference(**case.tensors(), act_bits=case.act_bits, act_group=case.act_group).double()
        allowed = 2 * (plain - exact).norm() / exact.norm()
        if case.groups > 1:
            # Rounded again to 8 bits per row: steps of max/127, uniform errors, an rms weight above a third of the max.
            allowed = allowed + 3 / 127 / 12**0.5
        assert (y - exact).norm() <= allowed * exact.norm(), name


class AlignedKernels(CudaKernels):
    """Kernels whose buffers lie as a GPU's allocator lays them; PyTorch's on a CPU does not."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        whole = torch.zeros(size + 256, dtype=torch.uint8, device=device)
        start = -whole.data_ptr() % 256
        return whole[start : start + size].view(dtype).reshape(shape)


def has_the_bits_of_the_own_call(
    folder: Path, case: FusedCase, kernels: CudaKernels, device: str, stored: tuple[str, ...]
) -> None:
    tensors = {name: tensor.to(device) for name, tensor in case.tensors().items()}
    prologue = Prologue(
        **{name: part.to(device) if isinstance(part, Tensor) else part for name, part in vars(case.prologue()).items()}
    )
    pre_quant = case.extras().get("pre_quant")
    layer = LayerShape(
        case.rows, case.shape[-1], case.groups, case.float_zero_point, case.block, 1, case.act_bits, case.act_group,
        case.dtype,
    )  # fmt: skip
    prepared = kernels.prepare(layer, tuple(tensors[field] for field in INPUTS[1:6]))
    x = tensors["x"].reshape(-1, case.shape[-1])
    y, hidden = run_fused_linear(
        kernels, layer, x, prologue, prepared, None if pre_quant is None else pre_quant.to(device)
    )
    for name in stored:
        assert torch.equal(case.read(folder, name).reshape(y.shape), y.cpu().double()), (folder.name, name)
    if case.residual:
        got = np.fromfile(folder / "hidden.bin", np.int16)
        assert np.array_equal(got, hidden.cpu().view(torch.int16).numpy().reshape(-1)), folder.name


@pytest.mark.parametrize("sm", [80, 90])
def test_a_fused_node_has_the_bits_of_the_librarys_own_call(
    sanitized: Path, emulated: Path, tmp_path: Path, sm: int
) -> None:
    folders = {name: case.write(tmp_path / name) for name, case in FUSED.items()}
    environment = host_device(sanitized, sm) | {"DVDQUANT_KERNELS": str(emulated)}
    done = run(sanitized, "run-fused", *map(str, folders.values()), **environment)
    check(done, device=True)
    kernels = AlignedKernels(KernelLibrary(emulated), sm)
    for name, case in FUSED.items():
        stored = ("y.bin", "y_graph.bin", "y_twin.bin", "y_old.bin")
        has_the_bits_of_the_own_call(folders[name], case, kernels, "cpu", stored)
        # What plans of memory count of a layer that is not fused: its rows, and no second copy of its codes.
        shape = LayerShape(case.rows, case.shape[-1], case.groups, case.float_zero_point)
        assert f"{folders[name]}: holds {rows_bytes(shape) + case.narrowed} bytes" in done.stdout


@pytest.fixture
def kernels() -> Path:
    """The library of the CUDA kernels."""
    path = Path(os.environ.get("DVDQUANT_KERNELS", ROOT / "build/kernels/libdvdquant_kernels.so"))
    if not path.is_file():
        pytest.skip(f"needs the CUDA kernels ({path}): make kernels")
    return path


@pytest.mark.gpu
def test_a_fused_node_on_the_gpu_has_the_bits_of_the_librarys_own_call(kernels: Path, tmp_path: Path) -> None:
    build = configure(tmp_path / "build")
    folders = {name: case.write(tmp_path / name) for name, case in FUSED.items()}
    check(run(build, "run-fused", *map(str, folders.values()), DVDQUANT_KERNELS=str(kernels)), device=True)
    major, minor = torch.cuda.get_device_capability()
    opened = CudaKernels(KernelLibrary(kernels), 10 * major + minor)
    for name, case in FUSED.items():
        has_the_bits_of_the_own_call(folders[name], case, opened, "cuda", ("y.bin", "y_graph.bin"))


@pytest.mark.gpu
def test_enqueue_on_the_gpu(kernels: Path, tmp_path: Path) -> None:
    build = configure(tmp_path / "build")
    cases = {
        "a4": Case((2, 131, 1536), 768, act_bits=4, block=128, outer=12),
        "a8": Case((333, 1024), 512, act_bits=8, block=1024, dtype="fp16"),
        "a4-group": Case((100, 1024), 256, act_bits=4, act_group=128, block=128),
    }
    folders = {name: case.write(tmp_path / name) for name, case in cases.items()}
    check(run(build, "run", *map(str, folders.values()), DVDQUANT_KERNELS=str(kernels)), device=True)
    for name, case in cases.items():
        exact, y = case.exact(), case.read(folders[name], "y.bin")
        tensors = case.tensors()
        plain = quant_linear_reference(**tensors, act_bits=case.act_bits, act_group=case.act_group).double()
        # PyTorch's fp32 error at the same types: a code that rounds the other way, and y's rounding.
        allowed = 2 * (plain - exact).norm() + HALF_ULP[case.dtype] * exact.norm()
        assert (y - exact).norm() <= allowed, name
        assert torch.equal(y, case.read(folders[name], "y_graph.bin")), name
