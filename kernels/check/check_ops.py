"""The checks of gpu_check above the library: the torch op, CUDA graphs, and models made of QuantLinear modules."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from check_cases import make_tokens, make_weight
from check_compare import Verdict, check_equal, decode_prepared, exact_codes
from check_kernels import Bench, Outcome, Tally, reachable_layers
from torch import Tensor, nn

import dvdquant.model.layers
from dvdquant.model.layers import QuantLinear
from dvdquant.model.quantized_model import prepare_layers, quant_linears, set_activation
from dvdquant.ops.cuda_linear import CudaKernels, reference_policy, run_quant_linear
from dvdquant.ops.linear_gemm import decode_codes
from dvdquant.ops.packed_layer import DTYPES, PackedLayer
from dvdquant.ops.prepared_cache import PreparedCache
from dvdquant.ops.quant_linear import quant_linear, smooth_quant_linear
from dvdquant.ops.reference import dequantize_weight, quant_linear_reference
from dvdquant.ops.repack import LayerShape
from dvdquant.ops.smooth import apply_pre_quant, pack_pre_quant, smooth_input
from dvdquant.recipe import ActivationSpec
from dvdquant.system.capture import capture_step

REPOSITORY = Path(__file__).resolve().parents[2]
Op = Callable[..., Tensor]


def kernel_op(bench: Bench) -> Op:
    """Return ``dvdquant::quant_linear`` as the bench's device runs it.

    On a GPU it is the registered op, elsewhere the op through the kernels' binding.

    Args:
        bench: The kernels and the device.
    """
    if bench.device.type == "cuda":
        return quant_linear
    cache = PreparedCache()

    def run(x: Tensor, *arguments: Any) -> Tensor:
        """Run the op through its binding."""
        *tensors, act_bits, act_group = arguments
        return run_quant_linear(bench.kernels, cache, x, PackedLayer(*tensors), act_bits, act_group)

    return run


def arguments(packed: PackedLayer, layer: LayerShape) -> tuple[Any, ...]:
    """Return the arguments of the op after x.

    Args:
        packed: The tensors of the layer.
        layer: The layer.
    """
    return (*packed.stored(), packed.hadamard, packed.outer, layer.act_bits, layer.act_group)


def check_op(bench: Bench, tokens: int = 33) -> Iterator[Outcome]:
    """Yield the checks of the op end to end against its definition in float64.

    Inputs are whole, strided and empty, and weights are changed in place.

    Args:
        bench: The kernels and the device.
        tokens: M, the number of tokens, at least 32.
    """
    tally, op = Tally(), kernel_op(bench)
    for path, grid, layer in reachable_layers(bench, 1536, rotation="full"):
        packed = make_weight(layer, grid.zero, bench.device, seed=11)
        x = make_tokens(layer, tokens, bench.device, seed=12)
        rest, where = arguments(packed, layer), f"{path}, {grid}"
        with reference_policy("raise"):
            y = op(x, *rest)
            tally.add("op against float64", _end_to_end(bench, layer, packed, x, y), where)
            strided = torch.stack((x, -x), dim=-1)[..., 0]
            tally.add("op on strided x", check_equal(op(strided, *rest), y, "y"), where)
            batched = op(x[:32].reshape(2, 4, 4, layer.k), *rest)
            tally.add("op on [..., K]", check_equal(batched.reshape(32, layer.n), y[:32], "y"), where)
            tally.add("op without tokens", Verdict(op(x[:0], *rest).shape == (0, layer.n)), where)
            packed.scale.mul_(2)
            packed.bias.mul_(2)
            doubled = op(x, *rest)
        # Powers of two change no rounding, except of fp16 numbers that pass its range or were subnormal.
        same = (2 * y == doubled) | ~torch.isfinite(doubled) | (y.abs() < 2.0**-13)
        tally.add("op after weights changed in place", Verdict(bool(same.all())), where)
    yield from tally.rows.values()


def check_pre_quant(bench: Bench, tokens: int = 33, rows: int = 136) -> Iterator[Outcome]:
    """Yield the check that a smooth scale and shift in the kernel give the same bits as a smoothed x.

    K 1920 cuts a strip of the kernel.

    Args:
        bench: The kernels and the device.
        tokens: M, the number of tokens.
        rows: N, the number of output channels.
    """
    tally, cache = Tally(), PreparedCache()
    for features, rotation in ((1536, "full"), (1536, "auto"), (1920, "auto")):
        for path, grid, layer in reachable_layers(bench, features, rows, rotation):
            packed = make_weight(layer, grid.zero, bench.device, seed=11)
            x = make_tokens(layer, tokens, bench.device, seed=12)
            scale, shift = make_pre_quant(layer, bench.device)
            for parts in ((scale, shift), (scale, None), (None, shift)):
                y = run_quant_linear(bench.kernels, cache, x, packed, layer.act_bits, layer.act_group, *parts)
                smoothed = apply_pre_quant(x, pack_pre_quant(parts[0], parts[1], x.dtype))
                apart = run_quant_linear(bench.kernels, cache, smoothed, packed, layer.act_bits, layer.act_group)
                where = f"{path}, K {features}, {rotation}, {grid}"
                tally.add("balance in the kernel", check_equal(y, apart, "y"), where)
    yield from tally.rows.values()


def make_pre_quant(layer: LayerShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make scales ±2⁻³ to ±2³ and shifts of variance 1, fp32 [K] each.

    Args:
        layer: The layer.
        device: The device of the tensors.
    """
    generator = torch.Generator(device).manual_seed(13)
    powers = torch.randint(-3, 4, (layer.k,), generator=generator, device=device)
    signs = 2 * torch.randint(0, 2, (layer.k,), generator=generator, device=device) - 1
    return signs * torch.exp2(powers), torch.randn(layer.k, generator=generator, device=device)


def _end_to_end(bench: Bench, layer: LayerShape, packed: PackedLayer, x: Tensor, y: Tensor) -> Verdict:
    """Check ‖y − y₆₄‖ ≤ 2‖y_ref − y₆₄‖ + what codes at ties moved + what expanding the weight to 8 bits moved.

    y₆₄ is the definition in float64, and y_ref the PyTorch reference in fp32, rounded to the same dtype.

    Args:
        bench: The kernels.
        layer: The layer.
        packed: Its tensors.
        x: The input [M, K].
        y: The result of the op [M, N].
    """
    rest = arguments(packed, layer)
    exact = quant_linear_reference(x.double(), *rest, compute=torch.float64)  # type: ignore[misc]
    reference = quant_linear_reference(x, *rest)
    path = bench.kernels.plan(layer).path
    codes, scales, _ = bench.kernels.rotate_quantize(layer, x, packed.outer)
    steps = scales.T.double().repeat_interleave(layer.k // len(scales), dim=1)
    values = decode_codes(codes, path)
    ideal = exact_codes(layer, packed, x)
    near = (ideal.grid - ideal.grid.floor() - 0.5).abs() <= ideal.margin
    # Only codes that a tie can move are excused; wrong codes are not.
    moved = (values - torch.round(ideal.grid).reshape(values.shape)) * near.reshape(values.shape)
    weight = dequantize_weight(packed.weight, packed.scale, packed.group_scale, packed.zero, torch.float64)
    prepared = bench.kernels.prepare(layer, packed.stored())
    expanded, _ = decode_prepared(layer, path, prepared)
    ties = (moved * steps) @ weight.T
    rounded = (values * steps) @ (expanded - weight).T
    error = (y.double() - exact).norm()
    bound = 2 * (reference.double() - exact).norm() + ties.norm() + rounded.norm()
    passed = bool(error <= bound) and bool(torch.isfinite(y).all())
    share = float(error / bound)
    return Verdict(passed, share, int((moved != 0).sum()), f"{float(error / exact.norm()):.3g} relative to float64")


def check_graph(bench: Bench) -> Iterator[Outcome]:
    """Yield the check that a captured quant_linear, replayed on new inputs, equals eager calls.

    Args:
        bench: The kernels and the device, a GPU.
    """
    tally = Tally()
    for path, grid, layer in reachable_layers(bench, 1536, rotation="full"):
        packed = make_weight(layer, grid.zero, bench.device, seed=13)
        rest = (*make_pre_quant(layer, bench.device), *arguments(packed, layer))
        static = make_tokens(layer, 129, bench.device, seed=14)
        with reference_policy("raise"), torch.inference_mode():
            smooth_quant_linear(static, *rest)
            captured, replay = capture_step(functools.partial(_smooth_step, rest), {"x": static}, bench.device)
            for seed in (15, 16):
                fresh = make_tokens(layer, 129, bench.device, seed=seed)
                static.copy_(fresh)
                captured.fill_(float("nan"))
                replay()
                tally.add(
                    "CUDA graph replay = eager", check_equal(captured, smooth_quant_linear(fresh, *rest), "y"), path
                )
            # The same with a weight that stays packed: its scratch belongs to the graph.
            held = bench.kernels.make_rows(layer, packed.stored())
            packed_step = functools.partial(_packed_step, bench.kernels, layer, packed.outer, held)
            captured, replay = capture_step(packed_step, {"x": static}, bench.device)
            for seed in (17, 18):
                fresh = make_tokens(layer, 129, bench.device, seed=seed)
                static.copy_(fresh)
                captured.fill_(float("nan"))
                replay()
                wanted = packed_step({"x": fresh})
                tally.add("CUDA graph replay = eager, packed weight", check_equal(captured, wanted, "y"), path)
    yield from tally.rows.values()


def _smooth_step(rest: tuple[Any, ...], inputs: dict[str, Tensor]) -> Tensor:
    y: Tensor = smooth_quant_linear(inputs["x"], *rest)
    return y


def _packed_step(
    kernels: CudaKernels, layer: LayerShape, outer: Tensor, held: tuple[Tensor, Tensor], inputs: dict[str, Tensor]
) -> Tensor:
    return kernels.packed_linear(layer, inputs["x"], outer, *held)


def check_streams(
    bench: Bench, threads: int = 3, calls: int = 20, features: int = 1536, rows: int = 3080
) -> Iterator[Outcome]:
    """Yield the check that threads, each with a stream of its own, do not disturb each other's packed weights.

    All run the same layers in different orders, so that the scratch of one would be written while another reads it, if
    they shared any.

    Args:
        bench: The kernels and the device.
        threads: The number of threads.
        calls: The number of calls of each.
        features: K, the number of input channels.
        rows: N, the number of output channels.
    """
    cases: list[tuple[str, LayerShape, Tensor, Tensor, tuple[Tensor, Tensor]]] = []
    wanted: list[Tensor] = []
    for path, grid, layer in reachable_layers(bench, features, rows):
        packed = make_weight(layer, grid.zero, bench.device, seed=19 + len(cases))
        x = make_tokens(layer, 129, bench.device, seed=20)
        held = bench.kernels.make_rows(layer, packed.stored())
        cases.append((path, layer, x, packed.outer, held))
        wanted.append(bench.kernels.quant_linear(layer, x, packed.outer, bench.kernels.prepare(layer, packed.stored())))
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    kernels, tally = CudaKernels(bench.kernels.library, bench.kernels.sm), Tally()  # guards would serialize the threads

    def work(number: int) -> list[tuple[int, Tensor]]:
        """Run the layers in this thread's order; return what came out."""
        own = bench.device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.Stream(bench.device)) if own else nullcontext()  # type: ignore[no-untyped-call]
        found = []
        with stream:
            for call in range(calls):
                index = (call * (number + 1) + number) % len(cases)
                _, layer, x, outer, held = cases[index]
                found.append((index, kernels.packed_linear(layer, x, outer, *held)))
            if own:
                torch.cuda.current_stream(bench.device).synchronize()
        return found

    with ThreadPoolExecutor(threads) as pool:
        results = [found for each in pool.map(work, range(threads)) for found in each]
    for index, y in results:
        tally.add("packed weights on several streams", check_equal(wanted[index], y, "y"), cases[index][0])
    yield from tally.rows.values()


# -------------------------------------------------------------------------------------------------------------- models


@contextmanager
def layers_run(op: Op) -> Iterator[None]:
    """Let QuantLinear modules call ``op`` instead of ``dvdquant::quant_linear`` while the block runs.

    Args:
        op: The op, with the arguments of ``dvdquant::quant_linear``.
    """
    names = vars(dvdquant.model.layers)
    before = {name: names[name] for name in ("quant_linear", "smooth_quant_linear")}
    names["quant_linear"] = op
    if op is not quant_linear:
        names["smooth_quant_linear"] = lambda x, scale, shift, *rest: op(smooth_input(x, scale, shift), *rest)
    try:
        yield
    finally:
        names.update(before)


def check_model(bench: Bench) -> Iterator[Outcome]:
    """Yield the checks of models of QuantLinear modules on the device.

    They are no further from fp32 on the CPU than twice the distance of the reference op, and give the same bits when
    only prepared weights, or only packed ones, are left.

    Args:
        bench: The kernels and the device.
    """
    yield from compare_model(bench, "a stack of QuantLinear modules", *make_stack(bench))
    if importlib.util.find_spec("diffusers") is None:
        yield Outcome("tiny Wan (diffusers)", True, 0, note="not run: diffusers is not installed")
        return
    tiny, inputs = _tiny_wan()
    for bits in (8, 4):
        model = copy.deepcopy(tiny)
        set_activation(model, ActivationSpec(bits))
        yield from compare_model(bench, f"tiny Wan (diffusers), a{bits}", model, inputs)


def compare_model(bench: Bench, name: str, model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[Outcome]:
    """Yield the checks of one model.

    Args:
        bench: The kernels and the device.
        name: The name of the model.
        model: The model, on the CPU; it is moved to the device.
        inputs: Its inputs by name, on the CPU.
    """
    with torch.inference_mode():
        wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        exact = copy.deepcopy(model).float()(**wide)[0].double()
        model = model.to(bench.device)
        here = {k: v.to(bench.device) for k, v in inputs.items()}
        with layers_run(quant_linear_reference):
            reference = model(**here)[0].double().cpu()
        with layers_run(kernel_op(bench)), reference_policy("raise"):
            y = model(**here)[0].double().cpu()
        grids = {ActivationSpec(m.act_bits, m.act_group) for m in quant_linears(model).values()}
        left: dict[str, str] = {}
        same = True
        for form in ("expanded", "packed"):
            left |= prepare_layers(model, bench.kernels, list(grids), DTYPES["bf16"], bench.device, form)
            same = same and not left and torch.equal(model(**here)[0].double().cpu(), y)
    error, bound = (y - exact).norm(), 2 * (reference - exact).norm()
    passed = bool(error <= bound) and bool(torch.isfinite(y).all())
    yield Outcome(name, passed, 1, float(error / bound), note=f"{float(error / exact.norm()):.3g} relative to fp32")
    yield Outcome(f"{name}, only prepared or packed weights held", same, 1, note="; ".join(left.values()))


class _Stack(nn.Module):
    """Two residual QuantLinear blocks.

    Args:
        bench: The kernels and the device; the stack does not depend on them.
    """

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        from dvdquant.model.layers import LayerSpec, RotationTable
        from dvdquant.numerics.hadamard import Rotation

        rotation = Rotation.for_features(256, "auto")
        self.table = RotationTable([rotation])
        self.blocks = nn.ModuleList()
        for index, bits in enumerate((8, 8)):
            spec = LayerSpec(f"blocks.{index}", (f"blocks.{index}",), (256,), 256, (True,), rotation, 1)
            layer = QuantLinear(spec, ActivationSpec(bits), self.table)
            shape = LayerShape(256, 256, 1, False, rotation.inner, rotation.outer, bits)
            packed = make_weight(shape, "midrise", torch.device("cpu"), seed=20 + index)
            layer.load(dict(zip(spec.tensors(), packed.stored())))
            self.blocks.append(layer)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Run the blocks: [M, 256] -> ([M, 256],).

        Args:
            x: The input [M, 256].
        """
        for block in self.blocks:
            x = x + block(torch.nn.functional.gelu(x))
        return (x,)


def make_stack(bench: Bench) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a stack of quantized modules on the CPU, and its inputs by name.

    Args:
        bench: The kernels and the device.
    """
    x = make_tokens(LayerShape(256, 256), 97, torch.device("cpu"), seed=22)
    return _Stack(bench), {"x": x.to(DTYPES["bf16"])}


def _tiny_wan() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return examples/tiny-wan, quantized with recipe w4a4 in bf16, with 8-bit activations, and the inputs of one step."""
    from dvdquant.artifact.transaction import ExportTransaction
    from dvdquant.checkpoint.opening import open_checkpoint
    from dvdquant.export.verify.graph import load_quantized
    from dvdquant.model.plan import plan_model
    from dvdquant.quantize.checkpoint import quantize_checkpoint
    from dvdquant.recipe import get_recipe
    from dvdquant.system.progress import Progress

    checkpoint = open_checkpoint(REPOSITORY / "examples" / "tiny-wan")
    plan = plan_model(checkpoint.config, get_recipe("w4a4"), torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder, ExportTransaction(Path(folder) / "export") as transaction:
        packed = quantize_checkpoint(checkpoint, plan, transaction, Progress())
        model = load_quantized(plan, packed.tensors, transaction.tree, 8)
        # The copy leaves the mapped files, which are deleted with the folder.
        model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(23)
    config = checkpoint.config
    latent = torch.randn(1, config["in_channels"], 4, 16, 16, generator=generator)
    text = torch.randn(1, 7, config["text_dim"], generator=generator)
    inputs = {"hidden_states": latent.bfloat16(), "timestep": torch.tensor([500.0]),
              "encoder_hidden_states": text.bfloat16()}  # fmt: skip
    return model, inputs
