"""The peers of the kernels. Every peer is optional: one that cannot run is reported with the reason.

Peers of stage QL multiply codes that are already quantized; those of stage RQ+QL take bf16 activations. Weights of
peers are quantized from random bf16 weights by the peer's own functions, outside of the timed calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cublaslt import CublasLtError, Int8Product
from report import Shape, Stage
from timing import Timer
from torch import Tensor

__all__ = ["PEERS", "Peer", "Prepared", "random_codes", "random_tokens"]

# The errors that a library may raise for a shape, a type or a device that it does not run.
REFUSALS = (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError)


@dataclass(frozen=True)
class Prepared:
    """A call to time.

    Args:
        call: The call.
        kind: The rate for the floor: ``int8`` or ``bf16``.
        operand_bytes: The bytes of both operands.
        close: A function to call at the end.
    """

    call: Callable[[], object]
    kind: str
    operand_bytes: int
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer:
    """A library that runs the same layers.

    Args:
        name: The name.
        stage: The stage that it is compared in: QL or RQ+QL.
        prepare: A function of (x, shape, timer). It raises ImportError, CublasLtError or one of REFUSALS if the peer
            cannot run.
    """

    name: str
    stage: Stage
    prepare: Callable[[Tensor, Shape, Timer], Prepared]


def random_tokens(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """Return bf16 [M, K] with a few large channels, as transformers have; never zeros, on which a GPU is faster.

    Args:
        shape: The layer.
        device: The device.
        seed: The seed of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    gain = torch.rand(shape.k, generator=generator, device=device).neg_().exp_()
    gain[:: max(1, shape.k // 16)] *= 8
    x = torch.randn((shape.m, shape.k), generator=generator, device=device, dtype=torch.bfloat16)
    return x.mul_(gain)


def random_codes(rows: int, columns: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return int8 [rows, columns], uniform over -127..127.

    Args:
        rows: The number of rows.
        columns: The number of columns.
        device: The device.
        seed: The seed of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), generator=generator, device=device, dtype=torch.int8)


def _weight(x: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return a random weight, bf16 [N, K], and bias, bf16 [N]."""
    generator = torch.Generator(x.device).manual_seed(1)
    weight = torch.randn((shape.n, shape.k), generator=generator, device=x.device, dtype=torch.bfloat16)
    bias = torch.randn(shape.n, generator=generator, device=x.device, dtype=torch.bfloat16)
    return weight.mul_(shape.k**-0.5), bias


def _operands(shape: Shape, bytes_per_element: int) -> int:
    """Return the bytes of both operands of a product."""
    return bytes_per_element * shape.k * (shape.m + shape.n)


def linear_bf16(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
    """Prepare ``F.linear`` with bias.

    Args:
        x: The input, bf16 [M, K].
        shape: The layer.
        timer: Not used.
    """
    weight, bias = _weight(x, shape)
    return Prepared(lambda: torch.nn.functional.linear(x, weight, bias), "bf16", _operands(shape, 2))


def cublaslt_int8(output: torch.dtype) -> Callable[[Tensor, Shape, Timer], Prepared]:
    """Return the peer's ``prepare`` for cublasLt, with the fastest of its heuristics.

    Args:
        output: The dtype of y: int32, or int8 (which writes a quarter).
    """

    def prepare(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
        """Prepare the product, and choose its algorithm by the timer.

        Raises:
            CublasLtError: cublasLt is not there, or refuses the product.
        """
        if x.device.type != "cuda":
            raise CublasLtError("not on a CUDA device")
        codes, weight = random_codes(shape.m, shape.k, x.device), random_codes(shape.n, shape.k, x.device, 1)
        product = Int8Product(codes, weight, output)
        product.choose(timer.brief().milliseconds)
        return Prepared(product.run, "int8", _operands(shape, 1), product.close)

    return prepare


def int_mm(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
    """Prepare ``torch._int_mm`` with int32 output.

    Args:
        x: The input, bf16 [M, K], for its device.
        shape: The layer.
        timer: Not used.
    """
    codes, weight = random_codes(shape.m, shape.k, x.device), random_codes(shape.n, shape.k, x.device, 1).t()
    return Prepared(lambda: torch._int_mm(codes, weight), "int8", _operands(shape, 1))


def scaled_mm(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
    """Prepare ``torch._scaled_mm``: fp8 with a scale per row of both operands, bf16 output and bias.

    Args:
        x: The input, bf16 [M, K].
        shape: The layer.
        timer: Not used.
    """
    weight, bias = _weight(x, shape)
    codes, codes_scale = _to_fp8(x)
    weight8, weight_scale = _to_fp8(weight)

    def call() -> Tensor:
        """Multiply the fp8 operands."""
        return torch._scaled_mm(
            codes,
            weight8.t(),
            scale_a=codes_scale,
            scale_b=weight_scale.t(),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return Prepared(call, "int8", _operands(shape, 1))


def _to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [R, K] as e4m3 with a scale per row, fp32 [R, 1]."""
    scale = values.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale.to(values.dtype)).to(torch.float8_e4m3fn), scale.contiguous()


def comfy_w4a8(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
    """Prepare comfy-kitchen with rotation, int8 activations and 4-bit weights in groups of 16.

    Args:
        x: The input, bf16 [M, K].
        shape: The layer.
        timer: Not used.
    """
    import comfy_kitchen

    weight, bias = _weight(x, shape)
    codes, relative, channel, correction, codebook = comfy_kitchen.quantize_w4a8_int8_weight(weight)

    def call() -> Tensor:
        """Run the layer."""
        result: Tensor = comfy_kitchen.w4a8_int8_linear(
            x, codes, relative, channel, codebook=codebook, correction=correction, bias=bias
        )
        return result

    return Prepared(call, "int8", _operands(shape, 1))


def comfy_w4a4(kind: str) -> Callable[[Tensor, Shape, Timer], Prepared]:
    """Return the peer's ``prepare`` for comfy-kitchen with rotation, and 4-bit activations and weights in groups of 64.

    Args:
        kind: The type that codes are multiplied as: ``int4`` or ``int8``.
    """

    def prepare(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
        """Prepare the layer."""
        import comfy_kitchen

        weight, bias = _weight(x, shape)
        codes, scales = comfy_kitchen.quantize_convrot_w4a4_weight(weight)
        return Prepared(
            lambda: comfy_kitchen.convrot_w4a4_linear(x, codes, scales, bias, linear_dtype=kind),
            "int8",
            _operands(shape, 1),
        )

    return prepare


def comfy_int8(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
    """Prepare comfy-kitchen with rotation, int8 activations per token and int8 weights per row.

    Args:
        x: The input, bf16 [M, K].
        shape: The layer.
        timer: Not used.
    """
    import comfy_kitchen
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    weight, bias = _weight(x, shape)
    codes, parameters = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=True)
    scale = parameters.scale
    return Prepared(lambda: comfy_kitchen.int8_linear(x, codes, scale, bias, convrot=True), "int8", _operands(shape, 1))


def torchao_int8(x: Tensor, shape: Shape, timer: Timer) -> Prepared:
    """Prepare torchao, compiled: int8 activations per token, int8 weights per row, no rotation.

    Args:
        x: The input, bf16 [M, K].
        shape: The layer.
        timer: Not used.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    weight, bias = _weight(x, shape)
    layer = torch.nn.Linear(shape.k, shape.n, device=x.device, dtype=x.dtype).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(layer)
    return Prepared(lambda: compiled(x), "int8", _operands(shape, 1))


PEERS = (
    Peer("F.linear bf16 + bias", "RQ+QL", linear_bf16),
    Peer("cublasLt int8, int32 out", "QL", cublaslt_int8(torch.int32)),
    Peer("cublasLt int8, int8 out", "QL", cublaslt_int8(torch.int8)),
    Peer("torch._int_mm", "QL", int_mm),
    Peer("torch._scaled_mm fp8 by row + bias", "QL", scaled_mm),
    Peer("comfy-kitchen int8 rotated", "RQ+QL", comfy_int8),
    Peer("comfy-kitchen W4A8", "RQ+QL", comfy_w4a8),
    Peer("comfy-kitchen W4A4 as int4", "RQ+QL", comfy_w4a4("int4")),
    Peer("comfy-kitchen W4A4 as int8", "RQ+QL", comfy_w4a4("int8")),
    Peer("torchao int8 compiled", "RQ+QL", torchao_int8),
)
