"""The weights of a diffusers folder in the formats that others use: names of the authors, single files, fp8, GGUF.

The names are made by replacing words, the other way round than diffusers' own converters do it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny_models as tiny
from tests.support.exporting import with_changes

SINGLE = "diffusion_pytorch_model.safetensors"
# Of a published width of heads, so that shapes tell the config; the long rotary table is the published one.
WAN = with_changes(
    tiny.WAN,
    num_attention_heads=1,
    attention_head_dim=128,
    num_layers=2,
    rope_max_seq_len=1024,
    in_channels=16,
    out_channels=16,
)
WAN_I2V = with_changes(WAN, in_channels=36, image_dim=64, added_kv_proj_dim=128)
HUNYUAN = with_changes(
    tiny.HUNYUAN,
    num_attention_heads=1,
    attention_head_dim=128,
    rope_axes_dim=[16, 56, 56],
    in_channels=16,
    out_channels=16,
)
LTX = with_changes(
    tiny.LTX,
    activation_fn="gelu-approximate",
    qk_norm="rms_norm_across_heads",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    attention_bias=True,
    attention_out_bias=True,
)
Tensors = dict[str, torch.Tensor]


def folder_tensors(folder: Path) -> Tensors:
    """The tensors of a transformer folder."""
    return load_file(folder / SINGLE)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """A diffusers folder of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / SINGLE)
    return folder


def _replaced(name: str, words: Iterable[tuple[str, str]]) -> str:
    for ours, theirs in words:
        name = name.replace(ours, theirs)
    return name


_WAN = (
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (".norm_added_k.", ".norm_k_img."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("proj_out", "head.head"),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".scale_shift_table", ".modulation"),
    (".norm2.", ".norm3."),
)


def wan_original(tensors: Tensors) -> Tensors:
    """As the authors of Wan name them."""
    return {
        "head.modulation" if name == "scale_shift_table" else _replaced(name, _WAN): value
        for name, value in tensors.items()
    }


def ltx_original(tensors: Tensors) -> Tensors:
    """As the authors of LTX-Video name them."""
    words = (("proj_in", "patchify_proj"), ("time_embed.", "adaln_single."), ("norm_q", "q_norm"), ("norm_k", "k_norm"))
    return {_replaced(name, words): value for name, value in tensors.items()}


_REFINER = (
    ("context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2"),
    ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("norm_out.linear", "adaLN_modulation.1"),
    ("attn.to_out.0", "self_attn_proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
)
_HUNYUAN = (
    ("single_transformer_blocks", "single_blocks"),
    ("transformer_blocks", "double_blocks"),
    ("x_embedder", "img_in"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    ("attn.norm_added_q", "txt_attn_q_norm"),
    ("attn.norm_added_k", "txt_attn_k_norm"),
    ("attn.to_add_out", "txt_attn_proj"),
    ("norm1_context.linear", "txt_mod.linear"),
    ("norm1.linear", "img_mod.linear"),
    ("ff_context.net.0.proj", "txt_mlp.fc1"),
    ("ff_context.net.2", "txt_mlp.fc2"),
    (".ff.net.0.proj", ".img_mlp.fc1"),
    (".ff.net.2", ".img_mlp.fc2"),
    (".norm.linear", ".modulation.linear"),
)
_SINGLE_BLOCK = (("proj_out", "linear2"), ("attn.norm_q", "q_norm"), ("attn.norm_k", "k_norm"))
_DOUBLE_BLOCK = (
    ("attn.norm_q", "img_attn_q_norm"),
    ("attn.norm_k", "img_attn_k_norm"),
    ("attn.to_out.0", "img_attn_proj"),
)


def hunyuan_original(tensors: Tensors) -> Tensors:
    """As the authors of HunyuanVideo name them; queries, keys and values joined."""
    made: Tensors = {}
    joined: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, value in tensors.items():
        if name.startswith("norm_out.linear."):
            scale, shift = value.chunk(2)
            made[name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")] = torch.cat([shift, scale])
            continue
        if name.startswith("proj_out."):
            made[name.replace("proj_out", "final_layer.linear")] = value
            continue
        if name.startswith("context_embedder."):
            theirs, prefix = _replaced(name, _REFINER), "self_attn_qkv"
        else:
            theirs, prefix = _replaced(name, _HUNYUAN), "img_attn_qkv"
            theirs = _replaced(theirs, _SINGLE_BLOCK if theirs.startswith("single_blocks") else _DOUBLE_BLOCK)
        for order, part in enumerate(
            (".to_q.", ".to_k.", ".to_v.", ".add_q_proj.", ".add_k_proj.", ".add_v_proj.", "proj_mlp.")
        ):
            if part in theirs:
                target = prefix if order < 3 else "txt_attn_qkv"
                if theirs.startswith("single_blocks"):
                    target = "linear1"
                whole = theirs.replace(f"attn{part}", f"{target}.") if order < 6 else theirs.replace(part, "linear1.")
                joined.setdefault(whole, []).append((order, value))
                break
        else:
            made[theirs] = value
    for name, parts in joined.items():
        made[name] = torch.cat([value for _, value in sorted(parts, key=lambda part: part[0])])
    return made


_COMFY = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"),
    (".k_norm.weight", ".norm.key_norm.scale"),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)


def hunyuan_comfy(tensors: Tensors) -> Tensors:
    """As ComfyUI saves HunyuanVideo."""
    return {_replaced(name, _COMFY): value for name, value in hunyuan_original(tensors).items()}


ORIGINAL: dict[str, Callable[[Tensors], Tensors]] = {
    "wan": wan_original,
    "wan-i2v": wan_original,
    "ltx": ltx_original,
    "hunyuan": hunyuan_original,
    "hunyuan-comfy": hunyuan_comfy,
}
CONFIGS = {"wan": WAN, "wan-i2v": WAN_I2V, "ltx": LTX, "hunyuan": HUNYUAN, "hunyuan-comfy": HUNYUAN}


def save_single(path: Path, tensors: Tensors, prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    """A single file; the prefix before every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {prefix + name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(named, path, metadata=metadata)
    return path


# --------------------------------------------------------------------------------------------------------------- fp8


def scaled_fp8(tensors: Tensors, key: str = "scale_weight", rows: bool = False) -> tuple[Tensors, Tensors]:
    """(tensors with fp8 weights and their scales, what they stand for in fp32). The linear layers of blocks are scaled."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, value in tensors.items():
        if not name.endswith(".weight") or value.ndim != 2 or "blocks" not in name:
            stored[name] = meant[name] = value
            continue
        wide = value.float()
        largest = wide.abs().amax(dim=1, keepdim=True) if rows else wide.abs().max().reshape(1)
        scale = largest / 448
        stored[name] = (wide / scale).to(torch.float8_e4m3fn)
        stored[f"{name.removesuffix('.weight')}.{key}"] = scale
        meant[name] = stored[name].float() * scale
    if key == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return stored, meant


# -------------------------------------------------------------------------------------------------------------- GGUF


def gguf_text(text: str) -> bytes:
    """A string of a GGUF file."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value: Any) -> bytes:
    """A typed value: text, 32-bit count or list of 32-bit numbers."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<II", 4, value)


def gguf_bytes(
    entries: list[tuple[str, tuple[int, ...], int, bytes]],
    values: Mapping[str, Any],
    alignment: int = 32,
    version: int = 3,
) -> bytes:
    """A GGUF file of (name, shape in the order of PyTorch, number of the type, data)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(values))
    for key, value in values.items():
        head += gguf_text(key) + gguf_value(value)
    offset, body = 0, b""
    for name, shape, kind, data in entries:
        head += gguf_text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, offset)
        body += data + bytes(-len(data) % alignment)
        offset = len(body)
    return head + bytes(-len(head) % alignment) + body
