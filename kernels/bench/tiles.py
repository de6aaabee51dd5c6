"""Which tile and which walk over the tiles S8_WGMMA should take: every variant on the layers of the benchmark, on SM 9.0.

    python kernels/bench/tiles.py --build     compile the variants only (nvcc, no GPU; a minute each)
    python kernels/bench/tiles.py             compile what is missing, check each against the others, time them

``swizzle`` is how many tiles consecutive CTAs walk along one side before the other (CUTLASS's max_swizzle_size).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1], HERE.parent, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from bench import SHAPES  # noqa: E402
from build import content_key  # noqa: E402
from cublaslt import CublasLtError, Int8Product  # noqa: E402
from peers import random_codes  # noqa: E402
from report import Shape  # noqa: E402
from timing import CudaTimer  # noqa: E402
from toolchain import BuildError, find_cutlass, find_nvcc, whole_file  # noqa: E402

BUILD = HERE.parents[1] / "build"
EXTRA = (Shape(32760, 1536, 4608, "Wan-1.3B"), Shape(32760, 2048, 8192, "LTX-Video"))
SWIZZLES = (1, 4, 8)


@dataclass(frozen=True)
class Variant:
    """A tile of m x n x 128 in a cluster; two warpgroups on one tile (cooperative), or in turns (ping-pong)."""

    m: int
    n: int
    cluster: tuple[int, int]
    pingpong: bool

    @property
    def name(self) -> str:
        """``128x256 cooperative 2x1``."""
        schedule = "ping-pong" if self.pingpong else "cooperative"
        return f"{self.m}x{self.n} {schedule} {self.cluster[0]}x{self.cluster[1]}"

    def build(self) -> Path:
        """The variant as a shared library, compiled unless one of the same sources is there."""
        nvcc, cutlass = find_nvcc(BUILD / "kernels"), find_cutlass(BUILD / "kernels")
        sizes = {"TILE_M": self.m, "TILE_N": self.n, "CLUSTER_M": self.cluster[0], "CLUSTER_N": self.cluster[1],
                 "PINGPONG": int(self.pingpong)}  # fmt: skip
        command = [nvcc.program, "-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr"]
        command += [f"-D{name}={value}" for name, value in sizes.items()]
        command += ["-I", str(HERE.parent / "include"), "-I", str(HERE.parent / "csrc"), "-isystem", str(cutlass)]
        command += ["-gencode=arch=compute_90a,code=sm_90a", "-shared"]
        key = content_key(HERE / "tiles.cu", command, nvcc.version)
        path = BUILD / "tiles" / f"{self.name.replace(' ', '-')}-{key}.so"
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        command += [str(HERE / "tiles.cu"), str(HERE.parent / "csrc" / "error.cpp")]
        with whole_file(path) as temporary:
            done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True)
            if done.returncode != 0:
                raise BuildError(f"{self.name} does not compile:\n{done.stderr[-4000:]}")
        return path


VARIANTS = (
    Variant(128, 256, (2, 1), False),
    Variant(128, 256, (1, 2), False),
    Variant(128, 256, (1, 1), False),
    Variant(256, 128, (2, 1), False),
    Variant(256, 128, (1, 2), False),
    Variant(64, 256, (2, 1), True),
    Variant(128, 128, (2, 1), True),
)


class Problem:
    """Random operands of a layer, and y of the variant that ran last."""

    def __init__(self, shape: Shape) -> None:
        self.shape, device = shape, torch.device("cuda")
        generator = torch.Generator(device).manual_seed(0)
        self.codes = random_codes(shape.m, shape.k, device)
        self.weight = random_codes(shape.n, shape.k, device, 1)
        self.vectors = [torch.rand(size, generator=generator, device=device) for size in (shape.m, shape.n, shape.n)]
        self.y = torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device=device)

    def run(self, library: ctypes.CDLL, swizzle: int) -> None:
        """One product on torch's current stream."""
        operands = (self.codes, self.weight, *self.vectors, self.y)
        sizes = (self.shape.m, self.shape.n, self.shape.k)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = library.run_tile(*(ctypes.c_void_p(t.data_ptr()) for t in operands), *map(ctypes.c_int64, sizes), swizzle, stream)  # fmt: skip # noqa: E501
        if status:
            raise RuntimeError(f"status {status}")

    def error(self, rows: int = 64) -> float:
        """Largest error of some rows of y against float64, as a share of the largest output of its row."""
        some = torch.randint(0, self.shape.m, (rows,), device=self.y.device)
        token, row, bias = (v.double() for v in self.vectors)
        exact = (self.codes[some].double() @ self.weight.double().T) * token[some, None] * row + bias
        off = (self.y[some].double() - exact).abs() / exact.abs().amax(dim=1, keepdim=True)
        return float(torch.nan_to_num(off, nan=float("inf")).max())


def measure(shape: Shape, libraries: dict[str, ctypes.CDLL], timer: CudaTimer) -> list[tuple[float, str]]:
    """(milliseconds, what), best first; a variant whose y differs from the first one's is an error."""
    problem, rows = Problem(shape), []
    wanted: torch.Tensor | None = None
    for name, library in libraries.items():
        for swizzle in SWIZZLES:
            problem.y.fill_(float("nan"))
            problem.run(library, swizzle)
            if wanted is None:
                wanted = problem.y.clone()
                if problem.error() > 2.0**-8:
                    raise RuntimeError(f"{name}: y is {problem.error():.3g} off float64 on {shape}")
            elif not torch.equal(wanted, problem.y):
                raise RuntimeError(f"{name}, swizzle {swizzle}: y differs on {shape}")
            call = lambda library=library, swizzle=swizzle: problem.run(library, swizzle)  # noqa: E731
            rows.append((timer.milliseconds(call), f"{name}, swizzle {swizzle}"))
    try:
        product = Int8Product(problem.codes, problem.weight)
        product.choose(timer.brief().milliseconds)
        rows.append((timer.milliseconds(product.run), "cublasLt int8, int32 out"))
        product.close()
    except CublasLtError as error:
        print(f"cublasLt: {error}")
    return sorted(rows)


def main() -> int:
    """0, or 2 with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile only")
    options = parser.parse_args()
    try:
        libraries = {variant.name: variant.build() for variant in VARIANTS}
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    if options.build:
        print(f"{len(libraries)} variants in {BUILD / 'tiles'}")
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("these kernels run on a GPU with SM 9.0; --build compiles them without one", file=sys.stderr)
        return 2
    opened = {name: ctypes.CDLL(str(path)) for name, path in libraries.items()}
    timer = CudaTimer(10, 2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; median of 10, L2 emptied before each")
    for shape in (*SHAPES, *EXTRA):
        print(f"\n{shape}")
        for milliseconds, what in measure(shape, opened, timer):
            print(f"  {milliseconds:8.3f} ms  {shape.operations / milliseconds / 1e9:6.0f} TOPS  {what}", flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
