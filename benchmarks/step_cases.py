"""The configurations, video sizes and ways of running that step_time.py measures and step_budget.py predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dvdquant.hardware.weights import WeightForm
from dvdquant.model.families import Axis, Family, Sizes
from dvdquant.ops.attention.libraries import LIBRARIES


@dataclass(frozen=True)
class Case:
    """A configuration at a video size.

    Args:
        config: The name of a file in ``configs``.
        latent: The size in latents: frames, height, width.
        text_tokens: The number of text tokens.
        depths: The two depths, in blocks, that are built.
    """

    config: str
    latent: tuple[int, int, int]
    text_tokens: int
    depths: tuple[int, int] = (1, 3)

    @property
    def name(self) -> str:
        """Return the name, such as ``wan2.1-14b 21x90x160``."""
        return f"{self.config} {'x'.join(map(str, self.latent))}"


CASES = (
    Case("wan2.1-1.3b", (21, 60, 104), 512),
    Case("wan2.1-14b", (21, 60, 104), 512),
    Case("wan2.1-14b", (21, 90, 160), 512),
    Case("hunyuan-video", (33, 90, 160), 256),
    # 2550 tokens, 17 frames of 480 x 272: few enough for CUDA graphs, enough for 8-bit attention.
    Case("wan2.1-1.3b", (5, 34, 60), 512),
)


@dataclass(frozen=True)
class Flavour:
    """One way of running the model.

    Args:
        bits: 16 for bf16, else the activation bits of the quantized model.
        compiled: Whether the blocks are compiled.
        attention: ``16``, ``int8`` or ``fp8``.
        weights: ``packed`` or ``expanded``, how the kernels hold quantized weights.
        fused: Whether what comes before a quantized layer is in its kernel.
        library: What computes 8-bit attention, of :data:`LIBRARIES`, or ``reference``; None tries those of the GPU.
        masked: Whether padded words and the mask over them stay, as diffusers has it. Sessions cut the words off.
        batch: The samples of one call: 2 are both branches of guidance.
        graphs: Whether steps are repeated as CUDA graphs.
    """

    bits: int
    compiled: bool = False
    attention: str = "16"
    weights: WeightForm = "expanded"
    fused: bool = False
    library: str | None = None
    masked: bool = False
    batch: int = 1
    graphs: bool = False

    @property
    def name(self) -> str:
        """Return the name, such as ``a8 compiled, fp8 attention``."""
        width = "bf16" if self.bits == 16 else f"a{self.bits}"
        attention = "" if self.attention == "16" else f"{self.attention} attention"
        words = {
            "fused": self.fused,
            attention + ("" if self.library is None else f" by {self.library}"): attention,
            "packed": self.weights == "packed",
            "with the mask": self.masked,
            "guidance in one batch": self.batch == 2,
            "CUDA graphs": self.graphs,
        }
        how = "compiled" if self.compiled else "eager"
        return ", ".join([f"{width} {how}", *(word for word, said in words.items() if said)])


# What is switched on one by one. The honest baseline is the second: bf16, compiled.
FLAVOURS = (
    Flavour(16),
    Flavour(16, compiled=True),
    Flavour(16, compiled=True, masked=True),
    Flavour(8),
    Flavour(4),
    Flavour(8, compiled=True),
    Flavour(4, compiled=True),
    Flavour(8, compiled=True, fused=True),
    Flavour(4, compiled=True, fused=True),
    Flavour(8, attention="fp8"),
    Flavour(8, compiled=True, attention="int8"),
    Flavour(8, compiled=True, attention="fp8"),
    Flavour(4, compiled=True, attention="int8"),
    Flavour(8, compiled=True, attention="fp8", fused=True),
    Flavour(4, compiled=True, attention="int8", fused=True),
    Flavour(8, weights="packed"),
    Flavour(4, weights="packed"),
    Flavour(8, compiled=True, weights="packed"),
    Flavour(8, compiled=True, weights="packed", fused=True),
    Flavour(4, compiled=True, weights="packed", fused=True),
    Flavour(16, compiled=True, batch=2),
    Flavour(8, compiled=True, batch=2),
    Flavour(8, compiled=True, fused=True, batch=2),
    Flavour(16, compiled=True, graphs=True),
    Flavour(8, compiled=True, graphs=True),
    # What ``dvdq run --compile --cuda-graphs`` runs, which fuses.
    Flavour(8, compiled=True, fused=True, graphs=True),
    Flavour(4, compiled=True, fused=True, graphs=True),
)


def with_libraries(flavours: Sequence[Flavour], libraries: Sequence[str]) -> list[Flavour]:
    """Return the flavours with each of 8-bit attention in place once for every library.

    A library computes one format, so that a flavour in int8 and its like in fp8 become one.

    Args:
        flavours: The flavours.
        libraries: Names of :data:`LIBRARIES`, or ``reference``, which computes both formats; none leaves all as they are.
    """
    if not libraries:
        return list(flavours)
    found: dict[Flavour, None] = {}
    for flavour in flavours:
        if flavour.attention == "16":
            found[flavour] = None
            continue
        for name in libraries:
            kind = LIBRARIES[name].kind if name in LIBRARIES else flavour.attention
            found[replace(flavour, attention="fp8" if kind == "fp8" else "int8", library=name)] = None
    return list(found)


# The number of blocks of each kind per block of depth: two single-stream ones for every dual-stream one, as in the real
# model (20 and 40).
DEPTH_KEYS = {"num_layers": 1, "num_single_layers": 2}


def select_cases(texts: list[str] | None) -> list[Case]:
    """Return the cases whose name contains one of the texts; all without texts."""
    return [case for case in CASES if not texts or any(text in case.name for text in texts)]


def shallow(config: dict[str, Any], depth: int, scale: int) -> dict[str, Any]:
    """Return a config of fewer blocks, with the proportion of the two kinds kept.

    Args:
        config: The config of the model.
        depth: The number of blocks.
        scale: The number that widths are divided by.
    """
    small = {**config, **{key: depth * times for key, times in DEPTH_KEYS.items() if key in config}}
    if scale > 1:
        small["num_attention_heads"] = max(1, config["num_attention_heads"] // scale)
        if "ffn_dim" in config:
            small["ffn_dim"] = max(64, config["ffn_dim"] // scale)
    return small


def inputs_of(family: Family, case: Case, scale: int, device: torch.device, batch: int = 1) -> dict[str, Tensor]:
    """Return random graph inputs at the case's size, by name.

    Args:
        family: The model family.
        case: The case.
        scale: The number that sizes are divided by.
        device: The device of the tensors.
        batch: The number of samples.
    """
    patch = family.patch()
    latent = [max(p, size // scale // p * p) for p, size in zip(patch, case.latent)]
    frames, height, width = (Axis.fixed(size) for size in latent)
    sizes = Sizes(frames, height, width, max(8, case.text_tokens // scale), batch)
    return {name: tensor.to(device) for name, tensor in family.sample(sizes, torch.bfloat16).items()}
