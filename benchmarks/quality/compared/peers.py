"""Quantizers of other packages, run by those packages themselves, in the form the quality benchmark compares.

Each function takes a :class:`simulate.Layer` and the activation width and returns a :class:`simulate.Simulated`. What
the package itself computes and what is chosen here (because it offers several forms, or none for this width) is said
in each docstring. Whatever calibrates does so on ``layer.inputs``. All weights have 4 bits.

Packages are imported inside the functions: one that is not installed is left out of :func:`available_peers`, and
:func:`missing_peers` says how to get it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.simulation.grid import Grid
from benchmarks.quality.simulation.simulate import Layer, Simulated
from dvdquant.errors import DvdquantError
from dvdquant.numerics.hadamard import Rotation
from dvdquant.system.threads import one_thread

__all__ = [
    "PEERS",
    "PeerError",
    "available_peers",
    "codebook_w4a8",
    "convrot_w4a4",
    "hqq",
    "missing_peers",
    "smoothquant",
    "smoothquant_half",
    "svdquant",
    "versions",
]

Peer = Callable[[Layer, int], Simulated]

# Channels per scale in the INT4 form of the SVDQuant paper, and in HQQ's own default.
GROUP = 64
LOW_RANK = 32


class PeerError(DvdquantError, ValueError):
    """A peer does not support this width or this layer, has nothing to calibrate on, or is not installed."""


def smoothquant(layer: Layer, act_bits: int) -> Simulated:
    """Quantize with SmoothQuant of modelopt and its default α = 1: ``divide_j = max|x_j|^α / max|W_j|^(1−α)``.

    modelopt: calibration, smoothing, and the 4-bit weight (symmetric, one scale per output channel, by maximum), from
    its ``INT8_SMOOTHQUANT_CFG``. Here: its algorithm smooths 8-bit quantizers only, so it smooths at 8 and the weight
    quantizer is set to 4 bits afterwards, its maxima unchanged; activations dynamic per token instead of its static
    per-tensor scale, which favours it.

    Args:
        layer: The layer, with the inputs that it had.
        act_bits: Bits of the activations: 8, 6 or 4.

    Raises:
        PeerError: act_bits is not 8, 6 or 4; ``layer.inputs`` is empty.
    """
    return _smoothquant("SmoothQuant (modelopt)", layer, act_bits, {"method": "smoothquant"})


def smoothquant_half(layer: Layer, act_bits: int) -> Simulated:
    """Quantize as :func:`smoothquant` with the paper's α = ½, the fairer choice for 4-bit weights.

    Args:
        layer: The layer, with the inputs that it had.
        act_bits: Bits of the activations: 8, 6 or 4.

    Raises:
        PeerError: As of :func:`smoothquant`.
    """
    return _smoothquant("SmoothQuant α ½ (modelopt)", layer, act_bits, {"method": "smoothquant", "alpha": 0.5})


def svdquant(layer: Layer, act_bits: int, low_rank: int = LOW_RANK) -> Simulated:
    """Quantize with SVDQuant of modelopt: ``y = A(x̂) Ŵᵀ + (x̂ Lᵀ) Uᵀ``, ``x̂ = x / divide``, Ŵ the residual of an SVD.

    modelopt: the smoothing (its search over α by the output error of the 4-bit weight), the SVD, the 4-bit residual.
    Here: groups of 64 for weights and activations, the INT4 form of the SVDQuant paper, as modelopt publishes an NVFP4
    configuration only; and the activations' grid, as modelopt has no dynamic integer blocks. Its search and its SVD do
    not look at the activation quantizer. The branch reads the unquantized input and computes in 16 bit, as there.

    The rank is not scaled with the layer: ``16 r (N + K) / (N K)`` bits per weight come on top of the 4 of the residual
    and ¼ of its scales, which is 4 more for N = K = 256 at rank 32, and ⅓ for 3072.

    Args:
        layer: The layer, with the inputs that it had.
        act_bits: Bits of the activations: 8, 6 or 4.
        low_rank: The rank of the branch.

    Raises:
        PeerError: act_bits is not 8, 6 or 4; 64 does not divide K; ``layer.inputs`` is empty.
    """
    _require("SVDQuant (modelopt)", layer, act_bits, group=GROUP, calibrates=True)
    weight = {"num_bits": 4, "block_sizes": {-1: GROUP, "type": "static"}}
    quantizers = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight},
    ]
    algorithm = {"method": "svdquant", "lowrank": low_rank}
    linear = modelopt_linear(layer, {"quant_cfg": quantizers, "algorithm": algorithm})
    branch = linear.weight_quantizer
    return Simulated(
        _modelopt_weight(linear),
        activation=Grid(act_bits, GROUP),
        divide=_divisor(linear),
        low_rank=(branch.svdquant_lora_a.detach(), branch.svdquant_lora_b.detach()),
    )


def svdquant_share(layer: Layer, act_bits: int) -> Simulated:
    """Quantize as :func:`svdquant` with a rank in proportion to the layer, K/96.

    The rank is 32 where K is 3072: a third of a bit more per weight than without the branch.

    Args:
        layer: The layer, with the inputs that it had.
        act_bits: Bits of the activations: 8, 6 or 4.

    Raises:
        PeerError: As of :func:`svdquant`.
    """
    return svdquant(layer, act_bits, max(1, round(layer.spec.features * LOW_RANK / 3072)))


def hqq(layer: Layer, act_bits: int) -> Simulated:
    """Quantize with HQQ: 4 bits in groups of 64 along the input, a real-valued zero-point, its own solver and settings.

    HQQ: the weight, codes packed and unpacked by it, scale and zero-point left in fp32 (its layer rounds them to 16
    bit). Here: it quantizes weights only, so activations are per token.

    Args:
        layer: The layer.
        act_bits: Bits of the activations: 8, 6 or 4.

    Raises:
        PeerError: act_bits is not 8, 6 or 4; 64 does not divide K.
    """
    _require("HQQ", layer, act_bits, group=GROUP)
    with _quiet():
        from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]

        codes, meta = Quantizer.quantize(
            layer.weight, nbits=4, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32
        )
        weight = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    return Simulated(weight, activation=Grid(act_bits))


def convrot_w4a4(layer: Layer, act_bits: int = 4) -> Simulated:
    """Quantize with ConvRot W4A4 of comfy-kitchen: block Hadamard rotation, symmetric int4 per output channel and per token.

    comfy-kitchen: everything, by its CPU backend (``whole``); it takes x in fp32 here, and the result is rounded to
    bf16 as that of every other method. ``weight`` is its dequantized weight, rotated back, for looking at only. Here:
    its rotation is 256 where that divides K, otherwise the largest power of four that does.

    Args:
        layer: The layer.
        act_bits: Bits of the activations: 4.

    Raises:
        PeerError: act_bits is not 4; 64 does not divide K, which the package insists on.
    """
    _require("ConvRot W4A4 (comfy-kitchen)", layer, act_bits, group=64)
    with _quiet():
        from comfy_kitchen import tensor as ck
    block = Rotation.for_features(layer.spec.features, "auto").block
    codes, scales = ck.quantize_convrot_w4a4_weight(layer.weight.contiguous(), convrot_groupsize=block)

    def product(x: Tensor) -> Tensor:
        y: Tensor = ck.convrot_w4a4_linear(x, codes, scales, convrot_groupsize=block)
        return y.to(torch.bfloat16)

    return Simulated(ck.dequantize_convrot_w4a4_weight(codes, scales, convrot_groupsize=block), whole=product)


def codebook_w4a8(layer: Layer, act_bits: int = 8) -> Simulated:
    """Quantize with W4A8 of comfy-kitchen: a rotation, a codebook of 16 values, fp8 scales, decoded to int8.

    A scale is for 16 channels, and the int8 form has one scale per output channel. comfy-kitchen: everything with its
    defaults, by its CPU backend (``whole``): int8 activations per token, bf16 result. ``weight`` and the rotation are as
    in :func:`convrot_w4a4`.

    Args:
        layer: The layer.
        act_bits: Bits of the activations: 8.

    Raises:
        PeerError: act_bits is not 8; 16 does not divide K, which the package insists on.
    """
    _require("codebook W4A8 (comfy-kitchen)", layer, act_bits, group=16)
    with _quiet():
        from comfy_kitchen import tensor as ck
    block = Rotation.for_features(layer.spec.features, "auto").block
    codes, relative, channel, correction, codebook = ck.quantize_w4a8_int8_weight(
        layer.weight.contiguous(), convrot_groupsize=block
    )
    packed: dict[str, Any] = {"codebook": codebook, "correction": correction, "convrot_groupsize": block}

    def product(x: Tensor) -> Tensor:
        y: Tensor = ck.w4a8_int8_linear(x, codes, relative, channel, **packed, out_dtype=torch.bfloat16)
        return y

    weight = ck.dequantize_w4a8_int8_weight(codes, relative, channel, **packed, output_dtype=torch.float32)
    return Simulated(weight, whole=product)


# Display name → (function, activation widths it supports).
PEERS: dict[str, tuple[Peer, tuple[int, ...]]] = {
    "SmoothQuant (modelopt)": (smoothquant, (8, 6, 4)),
    "SmoothQuant α ½ (modelopt)": (smoothquant_half, (8, 6, 4)),
    "SVDQuant (modelopt)": (svdquant, (8, 6, 4)),
    "SVDQuant rank K/96 (modelopt)": (svdquant_share, (8, 6, 4)),
    "HQQ": (hqq, (8, 6, 4)),
    "ConvRot W4A4 (comfy-kitchen)": (convrot_w4a4, (4,)),
    "codebook W4A8 (comfy-kitchen)": (codebook_w4a8, (8,)),
}

# Display name → (module, distribution).
_MODELOPT, _COMFY = ("modelopt", "nvidia-modelopt"), ("comfy_kitchen", "comfy-kitchen")
_PACKAGES: dict[str, tuple[str, str]] = {
    "SmoothQuant (modelopt)": _MODELOPT,
    "SmoothQuant α ½ (modelopt)": _MODELOPT,
    "SVDQuant (modelopt)": _MODELOPT,
    "SVDQuant rank K/96 (modelopt)": _MODELOPT,
    "HQQ": ("hqq", "hqq"),
    "ConvRot W4A4 (comfy-kitchen)": _COMFY,
    "codebook W4A8 (comfy-kitchen)": _COMFY,
}


def available_peers() -> dict[str, tuple[Peer, tuple[int, ...]]]:
    """Return the part of ``PEERS`` whose package is installed."""
    return {name: peer for name, peer in PEERS.items() if _installed(name)}


def missing_peers() -> dict[str, str]:
    """Return display name → the command that installs its package, for the rest of ``PEERS``."""
    return {name: f"pip install {_PACKAGES[name][1]}" for name in PEERS if not _installed(name)}


def versions() -> dict[str, str]:
    """Return distribution → version of the packages of :func:`available_peers`."""
    distributions = dict.fromkeys(_PACKAGES[name][1] for name in available_peers())
    return {distribution: importlib.metadata.version(distribution) for distribution in distributions}


def _installed(name: str) -> bool:
    """Return whether the package of a peer is installed."""
    return importlib.util.find_spec(_PACKAGES[name][0]) is not None


def _require(name: str, layer: Layer, act_bits: int, group: int = 1, calibrates: bool = False) -> None:
    """Refuse a peer that is not installed, and a layer or a width that it does not take.

    Args:
        name: Display name of the peer.
        layer: The layer.
        act_bits: Bits of the activations.
        group: What the input channels of the layer must be a multiple of.
        calibrates: Whether it needs inputs of the layer.

    Raises:
        PeerError: One of these.
    """
    widths = PEERS[name][1]
    if act_bits not in widths:
        raise PeerError(
            f"{name} has no {act_bits}-bit activations", available=[str(w) for w in widths], fix="use one of these"
        )
    if layer.spec.features % group:
        raise PeerError(
            f"{name} needs input channels in multiples of {group}: {layer.name} has {layer.spec.features}",
            fix="leave this layer out",
        )
    if calibrates and not len(layer.inputs):
        raise PeerError(f"{name} calibrates, and {layer.name} has no inputs", fix="give layers_of the inputs it had")
    if not _installed(name):
        raise PeerError(f"{name} is not installed", fix=missing_peers()[name])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what packages print, log below ERROR or warn of; exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _smoothquant(name: str, layer: Layer, act_bits: int, algorithm: dict[str, Any]) -> Simulated:
    """Quantize with one of modelopt's smoothing algorithms.

    Args:
        name: Display name of the peer.
        layer: The layer, with the inputs that it had.
        act_bits: Bits of the activations.
        algorithm: The algorithm, as modelopt's configuration has it.

    Raises:
        PeerError: The width is none of the peer's, or ``layer.inputs`` is empty.
    """
    _require(name, layer, act_bits, calibrates=True)
    with _quiet():
        from modelopt.torch.quantization import INT8_SMOOTHQUANT_CFG
    linear = modelopt_linear(layer, {**INT8_SMOOTHQUANT_CFG, "algorithm": algorithm})
    linear.weight_quantizer.num_bits = 4
    activation = Grid(act_bits)
    return Simulated(_modelopt_weight(linear), activation=activation, divide=_divisor(linear))


def modelopt_linear(layer: Layer, config: dict[str, Any]) -> Any:
    """Return the layer as modelopt's quantized Linear without bias, calibrated on ``layer.inputs``, with its own weight.

    Args:
        layer: The layer, with the inputs that it had.
        config: Modelopt's configuration.
    """
    with _quiet():
        import modelopt.torch.quantization as mtq

        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        # Matrices of a toy are too small for more: SVDs took 100 times as long on cores shared with other processes.
        with torch.no_grad(), one_thread():
            quantized = mtq.quantize(nn.Sequential(linear), config, lambda model: model(layer.inputs))
    return quantized[0]


def _modelopt_weight(linear: Any) -> Tensor:
    """Return what the codes of modelopt's weight stand for, fp32 [N, K]."""
    with torch.no_grad(), _quiet():
        return linear.weight_quantizer(linear.weight).detach()  # type: ignore[no-any-return]


def _divisor(linear: Any) -> Tensor:
    """Return what the input is divided by, fp32 [K]: modelopt multiplies by ``pre_quant_scale``."""
    return 1 / linear.input_quantizer.pre_quant_scale.detach().float().reshape(-1)  # type: ignore[no-any-return]
