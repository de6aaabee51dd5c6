"""Which norms and ropes before attention are taken into one kernel: as diffusers' functions write them, traced and run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as rope_over_channels
from torch import Tensor

from dvdquant.deploy.sessions.rope_fusion import fuse_attention
from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.ops.attention import operation
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.prepared_linear import handle_of

sys.path[:0] = [str(Path(__file__).parents[3] / "kernels" / folder) for folder in ("", "bench", "check")]

from host_library import HostLibrary  # noqa: E402

BATCH, VIDEO, TEXT, HEADS, HEAD = 2, 5, 3, 2, 32
CHANNELS = HEADS * HEAD
BOUNDS = torch.tensor([12.0, 12.0])
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Chosen:
    """Attention in fp32, which takes codes or not."""

    def __init__(self, takes_codes: bool) -> None:
        self.takes_codes = takes_codes

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor) -> Tensor:
        if self.takes_codes and q.dtype == torch.float8_e4m3fn:
            q, k = (part.float() * bound / E4M3_MAX for part, bound in zip((q, k), bounds))
        q, k, wide = (part.float().transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, wide, scale=scale).transpose(1, 2).to(v.dtype)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of which the two channels of a pair have the same."""
    made = torch.rand(*shape[:-1], shape[-1] // 2, generator=torch.Generator().manual_seed(1)) * 6
    return made.cos().repeat_interleave(2, -1), made.sin().repeat_interleave(2, -1)


def norm(seed: int, **options: Any) -> RMSNorm:
    """A norm over a head, with a weight."""
    made = RMSNorm(HEAD, eps=1e-6, **options).to(torch.bfloat16)
    if made.weight is not None:
        made.weight.data = 1 + 0.3 * torch.randn(HEAD, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return made


TABLES = angles(VIDEO, HEAD)
WIDE_TABLES = {samples: angles(samples, VIDEO, CHANNELS) for samples in (1, BATCH)}
NORMS = [norm(seed) for seed in range(4)]
PLAIN = norm(0, elementwise_affine=False)
OVER_ALL = [torch.nn.RMSNorm(CHANNELS, 1e-5, dtype=torch.bfloat16) for _ in range(2)]
LAYER_NORMS = [torch.nn.LayerNorm(HEAD, 1e-6, dtype=torch.bfloat16) for _ in range(2)]
for made in LAYER_NORMS:
    torch.nn.init.uniform_(made.weight, 0.5, 1.5)
    torch.nn.init.uniform_(made.bias, -0.5, 0.5)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1))


def over_channels(samples: int) -> Callable[..., Any]:
    """As LTX-Video: norm and rope over all channels, with rows of the tables for all samples or for each."""

    def block(x: Tensor, text: Tensor, attend: Attend) -> Any:
        tables = WIDE_TABLES[samples]
        q, k = (heads(rope_over_channels(norm(x), tables)) for norm in OVER_ALL)
        return attend(q, k, heads(x))

    return block


def double(x: Tensor, text: Tensor, attend: Attend) -> Any:
    """As a double block of HunyuanVideo: the text has its own norms."""
    video = [apply_rotary_emb(norm(heads(x)), TABLES, sequence_dim=1) for norm in NORMS[:2]]
    q, k = (torch.cat([one, norm(heads(text))], dim=1) for one, norm in zip(video, NORMS[2:]))
    return attend(q, k, heads(torch.cat([x, text], dim=1)))


def single(x: Tensor, text: Tensor, attend: Attend) -> Any:
    """As a single block of HunyuanVideo: one norm over all tokens."""
    whole = torch.cat([x, text], dim=1)
    q, k = (norm(heads(whole)) for norm in NORMS[:2])
    q, k = (
        torch.cat([apply_rotary_emb(part[:, :-TEXT], TABLES, sequence_dim=1), part[:, -TEXT:]], dim=1)
        for part in (q, k)
    )
    return attend(q, k, heads(whole))


def in_place(over_text: int) -> Callable[..., Any]:
    """As CogVideoX: layer norms, and rope written over the video behind the text."""

    def block(x: Tensor, text: Tensor, attend: Attend) -> Any:
        whole = torch.cat([text, x], dim=1)
        parts = [norm(whole.view(BATCH, -1, HEADS, HEAD).transpose(1, 2)) for norm in LAYER_NORMS]
        for part in parts:
            part[:, :, over_text:] = apply_rotary_emb(part[:, :, TEXT:], TABLES)
        return attend(*(part.transpose(1, 2) for part in parts), heads(whole))

    return block


def alone(x: Tensor, text: Tensor, attend: Attend) -> Any:
    """A norm over each head without a weight, and rope, of the video alone."""
    q = apply_rotary_emb(PLAIN(heads(x)), TABLES, sequence_dim=1)
    return attend(q, apply_rotary_emb(PLAIN(heads(x * 2)), TABLES, sequence_dim=1), heads(x))


def read_twice(x: Tensor, text: Tensor, attend: Attend) -> Any:
    q = apply_rotary_emb(kept := NORMS[0](heads(x)), TABLES, sequence_dim=1)
    k = apply_rotary_emb(NORMS[1](heads(x)), TABLES, sequence_dim=1)
    return attend(q, k, heads(x)) + kept


def two_tables(x: Tensor, text: Tensor, attend: Attend) -> Any:
    cosines, sines = TABLES
    q = apply_rotary_emb(NORMS[0](heads(x)), (cosines, sines), sequence_dim=1)
    return attend(q, apply_rotary_emb(NORMS[1](heads(x)), (sines, cosines), sequence_dim=1), heads(x))


def other_pairs(x: Tensor, text: Tensor, attend: Attend) -> Any:
    """Rope of channels half a head apart."""
    q, k = (apply_rotary_emb(norm(heads(x)), TABLES, use_real_unbind_dim=-2, sequence_dim=1) for norm in NORMS[:2])
    return attend(q, k, heads(x))


def text_in_front(x: Tensor, text: Tensor, attend: Attend) -> Any:
    """Joined in the other order: the kernel would turn the text."""
    video = [apply_rotary_emb(norm(heads(x)), TABLES, sequence_dim=1) for norm in NORMS[:2]]
    q, k = (torch.cat([norm(heads(text)), one], dim=1) for one, norm in zip(video, NORMS[2:]))
    return attend(q, k, heads(torch.cat([text, x], dim=1)))


BLOCKS = {
    "LTX-Video": (over_channels(1), True),
    "LTX-Video, rows of each sample": (over_channels(BATCH), True),
    "HunyuanVideo, double": (double, True),
    "HunyuanVideo, single": (single, True),
    "CogVideoX": (in_place(TEXT), True),
    "CogVideoX, from behind": (in_place(-VIDEO), False),
    "a norm without a weight": (alone, True),
    "a norm that others read": (read_twice, False),
    "q and k turned otherwise": (two_tables, False),
    "other pairs": (other_pairs, False),
    "text in front": (text_in_front, False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two samples: fused or not, it computes the same, in 16 bits and by codes."""
    torch._dynamo.reset()
    block, fuses = BLOCKS[name]
    monkeypatch.setattr(operation, "kernels_of", lambda number: kernels)
    kernels = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(BATCH, tokens, CHANNELS, generator=generator).bfloat16() for tokens in (VIDEO, TEXT))
    found: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(fuse_attention(graph, handle_of(kernels)))
        return graph.forward

    for codes, most in ((False, 0.01), (True, 0.05)):
        torch._dynamo.reset()
        chosen = Chosen(codes)
        number = operation.number_of(chosen)  # type: ignore[arg-type]

        def attend(q: Tensor, k: Tensor, v: Tensor, number: int = number) -> Tensor:
            return operation.attention(q, k, v, BOUNDS, HEAD**-0.5, number)

        with torch.inference_mode():
            apart = block(x, text, attend)
            fused = torch.compile(lambda a, b, attend=attend: block(a, b, attend), backend=backend, fullgraph=True)(
                x, text
            )
        assert (fused.shape, fused.dtype) == (apart.shape, apart.dtype)
        assert (fused - apart).norm() < most * apart.norm()
    assert found == [int(fuses)] * 2
