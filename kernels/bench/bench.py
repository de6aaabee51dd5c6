"""Time the kernels of a GPU on the linear layers of three models, against lower bounds and against other libraries.

    python kernels/bench/bench.py                 the whole table, minutes
    python kernels/bench/bench.py --shapes Wan    only layers whose name or sizes contain "Wan"

Every number is the median of 20 calls after 30 ms of others, by CUDA events, on random data, with the L2 emptied before
each call. The table goes to ``kernels/bench/results/<date>-<gpu>-bench.md``, after every layer what there is so far.
``gpu_check.py`` checks whether results are right.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# The checks make the weights that are timed.
sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

import torch
from check_cases import make_weight
from cublaslt import CublasLtError, Int8Product
from peers import PEERS, REFUSALS, Peer, random_codes, random_tokens
from report import Machine, Row, Shape, floor_expand, floor_gemm, floor_rotate_quantize, free_path, to_markdown
from timing import CudaTimer, HostTimer, Timer, record_clocks

from dvdquant.errors import DvdquantError, UnsupportedError
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.cuda.find import load_library
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.repack import LayerShape
from dvdquant.system.devices import cuda_sm, resolve_device

__all__ = ["MODES", "SHAPES", "Mode", "result_path", "run", "to_markdown", "write"]

SHAPES = (
    Shape(118800, 3072, 3072, "HunyuanVideo"),
    Shape(118800, 3072, 12288, "HunyuanVideo"),
    Shape(118800, 12288, 3072, "HunyuanVideo"),
    Shape(32760, 5120, 5120, "Wan-14B"),
    Shape(75600, 5120, 13824, "Wan-14B"),
    Shape(32760, 1536, 8960, "Wan-1.3B"),
)
SQUARE = Shape(8192, 8192, 8192)
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Mode:
    """The activations of a quantized layer.

    Args:
        name: The name of the mode.
        act_bits: The bits of the codes.
        act_group: The channels per scale; 0 means the whole token.
    """

    name: str
    act_bits: int
    act_group: int

    def layer(self, shape: Shape) -> LayerShape:
        """Return the layer of a shape with mid-rise weights per row and the automatic rotation.

        Args:
            shape: The shape.
        """
        rotation = Rotation.for_features(shape.k, "auto")
        return LayerShape(
            shape.n, shape.k, 1, False, rotation.inner, rotation.outer, self.act_bits, self.act_group, "bf16"
        )


# The others and the peers are compared with the first mode.
MODES = (Mode("A8 token", 8, 0), Mode("A4 token", 4, 0), Mode("A4 group 128", 4, 128), Mode("A4 group 64", 4, 64))


def measure_copy(device: torch.device, timer: Timer) -> tuple[float, float]:
    """Return the milliseconds of a device copy, and its bytes per second, read and written ones together.

    Args:
        device: The device.
        timer: The timer.
    """
    source = random_codes(1, (1 << 30) if device.type == "cuda" else 1 << 20, device)
    target = torch.empty_like(source)
    milliseconds = timer.milliseconds(lambda: target.copy_(source))
    return milliseconds, 2 * source.numel() / milliseconds * 1e3


def measure_machine(device: torch.device, timer: Timer, square: Shape = SQUARE) -> tuple[Machine, list[Row]]:
    """Measure copy bandwidth and the rates of large square products, which the floors are made of.

    Args:
        device: The device.
        timer: The timer.
        square: The product whose rate is measured.

    Returns:
        The rates, and their rows of the table.
    """
    copy_ms, copy = measure_copy(device, timer)
    rows = [Row(None, "machine", "device copy", copy_ms, rate=f"{copy / 1e12:.2f} TB/s")]
    a, b = (random_tokens(square, device, seed) for seed in (0, 1))
    bf16_ms = timer.milliseconds(lambda: a @ b.t())
    bf16 = square.operations / bf16_ms * 1e3
    rows.append(Row(None, "machine", f"bf16 {square}", bf16_ms, rate=f"{bf16 / 1e12:.0f} TFLOP/s"))
    int8 = 0.0
    codes, weight = random_codes(square.m, square.k, device), random_codes(square.n, square.k, device, 1)
    try:
        product = Int8Product(codes, weight)
    except CublasLtError as error:
        rows.append(Row(None, "machine", f"cublasLt int8 {square}", None, note=f"absent: {error}"))
    else:
        product.choose(timer.brief().milliseconds)
        int8_ms = timer.milliseconds(product.run)
        product.close()
        int8 = square.operations / int8_ms * 1e3
        rows.append(Row(None, "machine", f"cublasLt int8 {square}", int8_ms, rate=f"{int8 / 1e12:.0f} TOPS"))
    return Machine(copy, int8, bf16), rows


def _tera(shape: Shape, milliseconds: float) -> str:
    """Return the rate of a product in words, such as "312 T/s"."""
    return f"{shape.operations / milliseconds / 1e9:.0f} T/s"


def measure_mode(
    kernels: CudaKernels, mode: Mode, x: torch.Tensor, shape: Shape, machine: Machine, timer: Timer
) -> list[Row]:
    """Return the rows of RQ, QL and both in one call for one layer, or one row without a time if the library refuses.

    The last rows are those of the weight that stays packed: its expansion, where the path has one, and both in one call.

    Args:
        kernels: The kernels.
        mode: The activations.
        x: The input, bf16 [M, K].
        shape: The shape of the layer.
        machine: The rates for the floors.
        timer: The timer.
    """
    layer, reference = mode.layer(shape), mode is MODES[0]
    try:
        plan = kernels.plan(layer)
    except UnsupportedError as error:
        return [Row(shape, "RQ+QL", mode.name, None, ours=True, note=str(error))]
    packed = make_weight(layer, "midrise", x.device, seed=2)
    prepared = kernels.prepare(layer, packed.stored())
    name = f"{mode.name} ({plan.path})"
    rq = floor_rotate_quantize(shape, plan.codes_bytes_per_token, plan.scale_rows, machine)
    ql = floor_gemm(shape, shape.m * plan.codes_bytes_per_token + plan.prepared_bytes, machine.int8, machine)
    rq_ms = timer.milliseconds(lambda: kernels.rotate_quantize(layer, x, packed.outer))
    rate = f"{rq * machine.copy / rq_ms / 1e12:.2f} TB/s"
    rows = [Row(shape, "RQ", name, rq_ms, True, rq, rate, reference=reference)]
    codes = kernels.rotate_quantize(layer, x, packed.outer)
    ql_ms = timer.milliseconds(lambda: kernels.linear_gemm(layer, *codes, prepared))
    rows.append(Row(shape, "QL", name, ql_ms, True, ql, _tera(shape, ql_ms), reference=reference))
    both_ms = timer.milliseconds(lambda: kernels.quant_linear(layer, x, packed.outer, prepared))
    resident = f"weight {plan.prepared_bytes / 2**20:.1f} MiB resident"
    rows.append(Row(shape, "RQ+QL", name, both_ms, True, rq + ql, _tera(shape, both_ms), resident, reference=reference))
    held = kernels.make_rows(layer, packed.stored())
    expand, name = 0.0, f"{name}, packed"
    if plan.codes != "s4":
        expand = floor_expand(shape, machine)
        expand_ms = timer.milliseconds(lambda: kernels.expand(layer, *held))
        rate = f"{expand * machine.copy / expand_ms / 1e12:.2f} TB/s"
        note = f"{expand_ms / both_ms:.1%} of the layer"
        rows.append(Row(shape, "EX", name, expand_ms, True, expand, rate, note))
    packed_ms = timer.milliseconds(lambda: kernels.packed_linear(layer, x, packed.outer, *held))
    resident = (
        f"weight {sum(part.nbytes for part in held) / 2**20:.1f} MiB resident, {packed_ms / both_ms - 1:+.1%} of time"
    )
    floor = rq + ql + expand
    rows.append(Row(shape, "RQ+QL", name, packed_ms, True, floor, _tera(shape, packed_ms), resident))
    return rows


def measure_peer(peer: Peer, x: torch.Tensor, shape: Shape, machine: Machine, timer: Timer) -> Row:
    """Return the row of a peer, without a time and with the reason if it is absent or refuses.

    Args:
        peer: The peer.
        x: The input, bf16 [M, K].
        shape: The shape of the layer.
        machine: The rates for the floors.
        timer: The timer.
    """
    try:
        prepared = peer.prepare(x, shape, timer)
        milliseconds = timer.milliseconds(prepared.call)
        prepared.close()
    except (ImportError, CublasLtError) as error:
        return Row(shape, peer.stage, peer.name, None, note=f"absent: {_first_line(error)}")
    except REFUSALS as error:
        return Row(shape, peer.stage, peer.name, None, note=f"refused: {_first_line(error)}")
    rate = machine.bf16 if prepared.kind == "bf16" else machine.int8
    floor = floor_gemm(shape, prepared.operand_bytes, rate, machine)
    return Row(shape, peer.stage, peer.name, milliseconds, False, floor, _tera(shape, milliseconds))


def _failed(error: BaseException) -> str:
    """Return the note of a row that failed."""
    return f"failed: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """Return the first line of an error, fit for a cell of a table."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].replace("|", "/")[:120]


def run(
    library: KernelLibrary,
    device: torch.device | str,
    *,
    shapes: Sequence[Shape] = SHAPES,
    peers: Sequence[Peer] = PEERS,
    square: Shape = SQUARE,
    timer: Timer | None = None,
    sm: int | None = None,
    seconds: float = 230.0,
    progress: Callable[[str], None] = lambda text: None,
    so_far: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure everything, and return the rows for :func:`to_markdown`. What fails is a row that says so.

    Args:
        library: The kernels, or anything with the methods of KernelLibrary.
        device: The device.
        shapes: The layers to measure.
        peers: The peers to measure.
        square: The product whose rate the floors use.
        timer: The timer; None means CUDA events on a GPU, the host's clock elsewhere.
        sm: The compute capability, major · 10 + minor; None means the device's own.
        seconds: Peers that would start later than this are left out, and the table says so.
        progress: A function that gets a line for every layer that starts, and for everything measured when it ends.
        so_far: A function that gets all rows after every layer, so that a run that is cut off keeps them.
    """
    device, start = torch.device(device), time.monotonic()
    if timer is None:
        timer = CudaTimer() if device.type == "cuda" else HostTimer()
    if sm is None:
        sm = cuda_sm(device)
    kernels = CudaKernels(library, sm)
    progress("machine")
    machine, rows = measure_machine(device, timer, square)
    for shape in shapes:
        progress(str(shape))
        first = len(rows)
        try:
            x = random_tokens(shape, device)
        except RuntimeError as error:
            rows.append(Row(shape, "RQ+QL", "x", None, ours=True, note=_failed(error)))
            continue
        for mode in MODES:
            try:
                rows += measure_mode(kernels, mode, x, shape, machine, timer)
            except (DvdquantError, RuntimeError) as error:
                rows.append(Row(shape, "RQ+QL", mode.name, None, ours=True, note=_failed(error)))
        for peer in peers:
            if time.monotonic() - start > seconds:
                rows.append(Row(shape, peer.stage, peer.name, None, note=f"left out: {seconds:.0f} s were over"))
            else:
                rows.append(measure_peer(peer, x, shape, machine, timer))
        for row in rows[first:]:
            took = "–" if row.milliseconds is None else f"{row.milliseconds:.4g} ms"
            progress(f"  {row.stage:5s} {row.name:36s} {took:>11s}  {row.rate or row.note}")
        so_far(rows)
        del x
        if device.type == "cuda":
            with suppress(RuntimeError):  # a device whose context is broken: the rows say so
                torch.cuda.empty_cache()
    return rows


def describe(device: torch.device, library: KernelLibrary) -> list[str]:
    """Return the facts about machine and software, one line each.

    Args:
        device: The device.
        library: The kernels.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return [
        f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}",
        f"kernels compiled for SM {', '.join(library.architectures)}",
        "median of 20 calls after 30 ms of others, CUDA events, L2 emptied before each, random data",
        "floors: RQ one read of x and one write of codes at copy speed; QL the product at the measured 8192³ rate",
    ]


def write(rows: Sequence[Row], environment: Sequence[str], gpu: str, path: Path) -> None:
    """Write the table.

    Args:
        rows: The rows of the table.
        environment: The lines about machine and software.
        gpu: The name of the GPU.
        path: The file, of :func:`result_path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_markdown(rows, f"Kernels on {gpu}, {path.name[:10]}", environment), encoding="utf-8")


def result_path(gpu: str, folder: Path = RESULTS) -> Path:
    """Return ``<date>-<gpu>-bench.md`` in a folder, with a number where that file is there.

    Args:
        gpu: The name of the GPU.
        folder: The folder.
    """
    return free_path(folder, datetime.date.today().isoformat(), gpu, "bench")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: The command line; None means that of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="CUDA device to run on (default: cuda)")
    parser.add_argument("--shapes", default="", metavar="TEXT", help="only layers whose name or sizes contain TEXT")
    parser.add_argument("--no-peers", action="store_true", help="only the kernels and bf16")
    parser.add_argument("--seconds", type=float, default=230.0, help="start no further peers after this (default: 230)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; return 0, or 2 with a message if nothing can be measured.

    Args:
        arguments: The command line; None means that of the process.
    """
    options = parse_arguments(arguments)
    shapes = [shape for shape in SHAPES if options.shapes.lower() in str(shape).lower()]
    if not shapes:
        print(f"no layer contains {options.shapes!r}; there are: {', '.join(map(str, SHAPES))}")
        return 2
    try:
        device = resolve_device(options.device)
    except DvdquantError as error:
        print(error)
        return 2
    if device.type != "cuda":
        print("the benchmark needs a CUDA device and a PyTorch with CUDA")
        return 2
    torch.cuda.set_device(device)
    gpu = torch.cuda.get_device_name(device)
    peers = PEERS[:1] if options.no_peers else PEERS
    path = result_path(gpu, options.output)
    try:
        library = load_library()
        facts = describe(device, library)
        with record_clocks(torch.cuda.current_device()) as clocks:
            rows = run(
                library,
                device,
                shapes=shapes,
                peers=peers,
                seconds=options.seconds,
                progress=print,
                so_far=lambda rows: write(rows, facts, gpu, path),
            )
    except DvdquantError as error:
        print(error)
        return 2
    write(rows, [*facts, str(clocks)], gpu, path)
    print(path.read_text(encoding="utf-8"), path, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
