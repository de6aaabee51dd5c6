"""Tiny configurations of every supported family, and checkpoints of them with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dvdquant.model.families import Axis, Sizes

WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
HUNYUAN: dict[str, Any] = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 32,
    "pooled_projection_dim": 16,
    "rope_theta": 256.0,
    "rope_axes_dim": [16, 24, 24],
    "image_condition_type": None,
}
COGVIDEOX: dict[str, Any] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 12,
    "use_rotary_positional_embeddings": True,
}
COGVIDEOX_15: dict[str, Any] = {**COGVIDEOX, "num_layers": 1, "patch_size_t": 2, "ofs_embed_dim": 32}
COGVIDEOX_2B: dict[str, Any] = {**COGVIDEOX, "use_rotary_positional_embeddings": False}
LTX: dict[str, Any] = {
    "_class_name": "LTXVideoTransformer3DModel",
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "num_layers": 2,
    "caption_channels": 32,
}
CONFIGS = {"wan": WAN, "hunyuan-video": HUNYUAN, "cogvideox": COGVIDEOX, "cogvideox-2b": COGVIDEOX_2B, "ltx-video": LTX}

# Where one block shows what is tested: its graph traces, runs and quantizes in half the time.
WAN_ONE: dict[str, Any] = {**WAN, "num_layers": 1}

FIXED = Sizes(Axis.fixed(3), Axis.fixed(8), Axis.fixed(8), text_tokens=12)
EVEN = Sizes(Axis.fixed(4), Axis.fixed(8), Axis.fixed(8), text_tokens=12)  # as many frames as CogVideoX 1.5 takes
SMALL = Sizes(Axis.fixed(2), Axis.fixed(8), Axis.fixed(8), text_tokens=4)  # as the commands of the tests
RANGES = Sizes(Axis(2, 3, 4), Axis(4, 8, 12), Axis(6, 8, 10), text_tokens=12)


def write_checkpoint(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A diffusers transformer folder with heavy-tailed random weights."""
    from dvdquant.model.plan import build_skeleton

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in build_skeleton(config, torch.float32).named_parameters():
        shape = tuple(parameter.shape)
        value = torch.randn(shape, generator=generator)
        if len(shape) >= 2 and "table" not in name:
            value = value * (1 + value.abs()) / shape[-1] ** 0.5
        elif name.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        tensors[name] = value.to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
