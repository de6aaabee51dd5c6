"""Names of models that cannot be read here: known formats, told by first bytes, names of files and names of tensors.

A user who gives another format is told its name and how to make it usable. This comes before shapes are compared with a
config that does not belong to it. Each row of a table is one format, and the first row that fits is taken. Nothing is
imported, so every reader may ask.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

__all__ = [
    "BLOCK_SCALED",
    "CONTENTS",
    "FOLDERS",
    "PICKLED_FILE",
    "PREFIXES",
    "SNIFFED",
    "TENSORS",
    "Found",
    "recognize_bytes",
    "recognize_config",
    "recognize_folder",
    "recognize_tensors",
    "tensor_names",
]

SNIFFED = 1 << 16
"""Bytes of the start of a file that :func:`recognize_bytes` wants."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.")
"""What ComfyUI puts before the names of a transformer."""
MAX_NAMES = 20_000
MAX_LENGTH = 300

_ORIGINAL = "use the model's 16-bit checkpoint in diffusers format"
_DOWNLOAD = "download it again (hf download ORG/NAME --local-dir FOLDER)"
PICKLED_FILE = (
    "convert it in a place you trust, and give the new file: d = torch.load(FILE, weights_only=True, map_location='cpu'); "
    "safetensors.torch.save_file({k: v.clone() for k, v in d.get('module', d).items()}, 'FILE.safetensors')"
)

# Codes of the safetensors format that only parts of block-scaled weights have.
BLOCK_SCALED = {
    "F8_E8M0": "MXFP8 or MXFP4 weights (block scales)",
    "F4": "FP4 weights (NVFP4 or MXFP4)",
    "F6_E2M3": "MXFP6 weights",
    "F6_E3M2": "MXFP6 weights",
    "F8_E4M3FNUZ": "weights in AMD's own fp8",
    "F8_E5M2FNUZ": "weights in AMD's own fp8",
}


@dataclass(frozen=True)
class Found:
    """A known format.

    Args:
        what: The name of the format, as the end of "it is …".
        fix: The way to get a usable model.
        state: ``pickled`` where loading it runs code, ``not downloaded`` where the file stands for one that never came.
    """

    what: str
    fix: str
    state: Literal["foreign", "pickled", "not downloaded"] = "foreign"


# ----------------------------------------------------------------------------------------------------- the first bytes

# Name -> (a regular expression that the first bytes match, the format).
CONTENTS: dict[str, tuple[re.Pattern[bytes], Found]] = {
    "gguf": (re.compile(rb"GGUF"), Found("a GGUF file", "name it NAME.gguf and give that file as MODEL")),
    "git-lfs": (
        re.compile(rb"version https://git-lfs"),
        Found(
            "a pointer of Git LFS, not the weights themselves",
            f"run git lfs pull in that folder, or {_DOWNLOAD}",
            "not downloaded",
        ),
    ),
    "html": (
        re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE),
        Found(
            "a web page, not the weights: the download failed or needs a login",
            f"log in and {_DOWNLOAD}",
            "not downloaded",
        ),
    ),
    "json-error": (
        re.compile(rb'\s*\{\s*"(error|message|detail)"'),
        Found(
            "the text of an error, not the weights: the download failed", f"log in and {_DOWNLOAD}", "not downloaded"
        ),
    ),
    "zip-pickle": (
        re.compile(rb"PK\x03\x04"),
        Found("a zip archive, as PyTorch saves pickled weights, which run code when loaded", PICKLED_FILE, "pickled"),
    ),
    "pickle": (
        re.compile(rb"\x80[\x02-\x05]"),
        Found("a pickle, which runs code when loaded", PICKLED_FILE, "pickled"),
    ),
    "hdf5": (re.compile(rb"\x89HDF\r\n"), Found("an HDF5 file of Keras or TensorFlow", _ORIGINAL)),
    "gzip": (re.compile(rb"\x1f\x8b"), Found("a gzip archive", "unpack it and give the folder")),
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd"), Found("a zstd archive", "unpack it and give the folder")),
    "xet": (
        re.compile(rb"# xet version"),
        Found("a pointer of the hub's Xet storage, not the weights themselves", _DOWNLOAD, "not downloaded"),
    ),
    "zeros": (
        re.compile(rb"\x00{4096}"),
        Found("a file of zeros: space was reserved and the download never filled it", _DOWNLOAD, "not downloaded"),
    ),
}


def recognize_bytes(start: bytes) -> Found | None:
    """Return the format of a file by its first bytes, or None if they fit no known format.

    Args:
        start: The first bytes of the file, ``SNIFFED`` of them if there are so many.
    """
    return next((found for pattern, found in CONTENTS.values() if pattern.match(start)), None)


# ---------------------------------------------------------------------------------------------------- names of tensors


def _any(pattern: str) -> re.Pattern[str]:
    """Return the compiled pattern."""
    return re.compile(pattern)


_LORA_FIX = "give the model that it changes as MODEL, and this file with --lora FILE[:SCALE]"
_OTHER_FIX = "fuse it into its model with the tool that trained it, and give the folder of the whole model"
_STRIP = "save it without the prefix: save_file({{k.removeprefix({0!r}): v for k, v in tensors.items()}}, FILE)"

# Name -> (patterns that all must be found among the names, the format). The order matters: a quantized format that has
# low-rank parts of its own comes before LoRA, and a format with two scales before one with a single scale.
TENSORS: dict[str, tuple[tuple[re.Pattern[str], ...], Found]] = {
    "svdquant": (
        (_any(r"\.(wscales|wtscale|wcscales|smooth_factor(_orig)?|smooth_orig)$"),),
        Found("a SVDQuant (Nunchaku) checkpoint, already in 4 bits", _ORIGINAL),
    ),
    "bitsandbytes": (
        (_any(r"\.(absmax|nested_absmax|quant_map|quant_state\.bitsandbytes__\w+|SCB|weight_format)$"),),
        Found("a bitsandbytes checkpoint, already in 4 or 8 bits", _ORIGINAL),
    ),
    "gptq-awq": (
        (_any(r"\.(qweight|qzeros|g_idx|weight_packed)$"),),
        Found("a GPTQ or AWQ checkpoint, already quantized", _ORIGINAL),
    ),
    "quanto": (
        (_any(r"\.weight\._(data|scale|shift)$"),),
        Found("a quanto checkpoint, already quantized", _ORIGINAL),
    ),
    "torchao": (
        (_any(r"(weight[._:]_?qdata|\.tensor_impl\b|layout_tensor|weight:_?\w*(int_data|scale))"),),
        Found("a torchao checkpoint, already quantized", _ORIGINAL),
    ),
    "nvfp4": (
        (_any(r"\.weight_(scale_2|double_scale|global_scale)$"),),
        Found("an NVFP4 checkpoint: 4-bit weights with block scales", _ORIGINAL),
    ),
    "mxfp8": (
        (_any(r"\.(weight_scale_inv|weight_block_scale|block_scale|weight_scales)$"),),
        Found(
            "an MXFP8 or block-scaled fp8 checkpoint: its weights mean nothing without their block scales", _ORIGINAL
        ),
    ),
    "peft": (
        (_any(r"\.base_layer\.(weight|bias)$"),),
        Found(
            "a model with a LoRA that is not fused",
            "fuse it before you save: pipe.fuse_lora(); pipe.unload_lora_weights(); "
            "pipe.transformer.save_pretrained(FOLDER)",
        ),
    ),
    "dora": (
        (_any(r"(\.dora_scale$|lora_magnitude_vector)"),),
        Found("a DoRA (a LoRA with magnitudes), not a model", _OTHER_FIX),
    ),
    "lora": (
        (
            _any(
                r"((^|\.)lora_(A|B|down|up)(\.|$)|^lora_(unet|te\d?|transformer)_|\.lora\.(up|down)\.|\.processor\..*_lora\.)"
            ),
        ),
        Found("a LoRA (low-rank changes to a model), not a model", _LORA_FIX),
    ),
    "lokr-loha": (
        (_any(r"\.(lokr_w[12](_[ab])?|hada_[wt][12](_[ab])?|oft_blocks|diff(_b|_m)?)$"),),
        Found(
            "changes to a model (LoKr, LoHa or differences), not a model",
            f"{_LORA_FIX}; it takes differences, and a LoKr or LoHa is fused by the tool that trained it",
        ),
    ),
    "alpha": (
        (_any(r"^(?=.{0,400}(attn|attention|ffn|ff|mlp|to_[qkv]|linear)).*\.alpha$"),),
        Found("a LoRA or a model with parts of one (.alpha)", _LORA_FIX),
    ),
    "base_model.model.": (
        (_any(r"^base_model\.model\."),),
        Found("a model saved out of its PEFT wrapper (prefix base_model.model.)", _STRIP.format("base_model.model.")),
    ),
    "module.": (
        (_any(r"^module\."),),
        Found("a model saved out of its DataParallel wrapper (prefix module.)", _STRIP.format("module.")),
    ),
    "_orig_mod.": (
        (_any(r"(^|\.)_orig_mod\."),),
        Found(
            "a model saved out of torch.compile (prefix _orig_mod.)",
            "save it without: save_file({k.replace('_orig_mod.', ''): v for k, v in tensors.items()}, FILE)",
        ),
    ),
    "_fsdp": (
        (_any(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."),),
        Found("a model saved out of its training wrapper (FSDP, DeepSpeed)", "unwrap it before it is saved"),
    ),
    **{
        prefix: (
            (_any(rf"^{re.escape(prefix)}(blocks|transformer_blocks|single_transformer_blocks)\.\d+\."),),
            Found(f"a transformer whose tensors have the prefix {prefix} of what was around it", _STRIP.format(prefix)),
        )
        for prefix in ("transformer.", "model.", "dit.", "net.", "state_dict.", "ema.", "student.")
    },
    "cogvideox-original": (
        (_any(r"^(model\.diffusion_model\.)?transformer\.layers\.\d+\.attention\.(query_key_value|dense)\."),),
        Found(
            "a CogVideoX transformer with the names of its authors (SAT)",
            "get the diffusers repository (THUDM/CogVideoX-5b)",
        ),
    ),
    "flux": (
        # ComfyUI names the blocks of HunyuanVideo alike; its text input has blocks of its own.
        (_any(r"^double_blocks\.\d+\.img_attn\.qkv\."), _any(r"^txt_in\.(weight|bias)$")),
        Found("an image model (FLUX)", "give a video model"),
    ),
    "sd3": (
        (_any(r"^joint_blocks\.\d+\."),),
        Found("an image model (Stable Diffusion 3)", "give a video model"),
    ),
    "unet": (
        (
            _any(
                r"^(input_blocks\.\d+\.|down_blocks\.\d+\.(attentions|resnets)\.\d+\.(transformer_blocks|time_emb_proj))"
            ),
        ),
        Found("a UNet, as image models before diffusion transformers have it", "give a video diffusion transformer"),
    ),
    "vae": (
        (_any(r"^(first_stage_model\.)?decoder\.(conv_in|conv1|mid_block|mid|middle|up_blocks|upsamples|up)\b"),),
        Found("a VAE, not a transformer", "give the pipeline's folder, or its transformer/"),
    ),
    "text-encoder": (
        (
            _any(
                r"^(shared\.weight$|encoder\.block\.\d+\.layer\.\d+\.|text_model\.|(language_)?model\.(language_model\.)?"
                r"layers\.\d+\.(self_attn|mlp)\.|blocks\.\d+\.pos_embedding\.embedding\.|encoder\.embed_tokens)"
            ),
        ),
        Found("a text encoder, not a transformer", "give the pipeline's folder, or its transformer/"),
    ),
}


def recognize_tensors(names: Iterable[str]) -> Found | None:
    """Return the foreign format that these names of tensors belong to, or None; ComfyUI's prefixes do not hide it.

    Args:
        names: The names of the tensors. Only the first ``MAX_NAMES`` count.
    """
    wanted = [name[-MAX_LENGTH:] if len(name) > MAX_LENGTH else name for name in islice(names, MAX_NAMES)]
    wanted += [name.removeprefix(prefix) for prefix in PREFIXES for name in wanted if name.startswith(prefix)]
    for patterns, found in TENSORS.values():
        if all(any(map(pattern.search, wanted)) for pattern in patterns):
            return found
    return None


# Without a way back (++ and }+): most quotes of a header begin no name, and the text after each is read once.
_NAME_OF_A_TENSOR = re.compile(rb'"((?:[^"\\]++|\\.){1,300}+)"\s*:\s*\{\s*"(?:dtype|shape|data_offsets)')


def tensor_names(start: bytes) -> list[str] | None:
    """Return the names of tensors in the start of a safetensors file as far as it goes, or None if it is no such file.

    The names are for telling the format of a file that is not going to be read. Nothing else is checked.

    Args:
        start: The first bytes of the file.
    """
    if len(start) < 10 or start[8:9] != b"{" or not 2 <= struct.unpack("<Q", start[:8])[0] <= 100_000_000:
        return None
    return [name.decode("utf-8", "replace") for name in _NAME_OF_A_TENSOR.findall(start, 8)]


# --------------------------------------------------------------------------------------------------- names of the files


def _holds(names: Collection[str], *wanted: str) -> bool:
    """Return whether all of ``wanted`` are among the names."""
    return all(name in names for name in wanted)


def _ends(names: Iterable[str], *endings: str) -> str | None:
    """Return the first name that ends in one of ``endings`` (lower case), or None."""
    return next((name for name in names if name.lower().endswith(endings)), None)


_WAN_21 = Found(
    "Wan in the format of its authors, without its weights in safetensors",
    "get the diffusers repository (Wan-AI/Wan2.1-T2V-1.3B-Diffusers)",
)
_ADAPTER = Found("a LoRA folder of PEFT, not a model", _LORA_FIX)
_HUNYUAN = Found(
    "HunyuanVideo in the format of its authors",
    "get the diffusers repository (hunyuanvideo-community/HunyuanVideo)",
)
_INTERRUPTED = Found("a download that was interrupted", f"finish it: {_DOWNLOAD}")

# Name -> (a function that says if the names in a folder fit, the format), for folders that cannot be opened as a model.
FOLDERS: dict[str, tuple[Any, Found]] = {
    "wan original": (
        lambda names: any(
            re.fullmatch(r"(Wan2\.\d_VAE|models_t5_umt5-xxl-enc-bf16)\.(pth|safetensors)", n) for n in names
        ),
        _WAN_21,
    ),
    "hunyuan original": (lambda names: _holds(names, "hunyuan-video-t2v-720p"), _HUNYUAN),
    "peft folder": (lambda names: bool({"adapter_config.json", "adapter_model.safetensors"} & set(names)), _ADAPTER),
    "lora file": (lambda names: "pytorch_lora_weights.safetensors" in names, _ADAPTER),
    "interrupted": (
        lambda names: _ends(names, ".incomplete", ".crdownload", ".aria2", ".part") is not None,
        _INTERRUPTED,
    ),
    "git-lfs clone": (
        lambda names: _holds(names, ".git", ".gitattributes"),
        Found("a clone without a model in it", "run git lfs pull in it, and give the folder with config.json"),
    ),
}


def recognize_folder(names: Collection[str]) -> Found | None:
    """Return the format of a folder by the names in it, or None if they fit no known format.

    Args:
        names: The names of the folder's entries.
    """
    return next((found for fits, found in FOLDERS.values() if fits(names)), None)


_IMAGE = re.compile(r".*2D(Condition)?Model|.*DiT2DModel|UNet.*")
_TEXT_ENCODER = re.compile(r"(T5|UMT5|MT5|CLIP|Llama|Llava|Qwen|Gemma|Mistral|Siglip|Bert)\w*")


def recognize_config(config: Mapping[str, Any]) -> Found | None:
    """Return the format that a ``config.json`` belongs to, or None if it may be of a diffusers video transformer.

    Args:
        config: The content of the file.
    """
    name = config.get("_class_name")
    name = name if isinstance(name, str) else ""
    kind, architectures = config.get("model_type"), config.get("architectures")
    if re.fullmatch(r"(Vace)?WanModel(_\w+)?", name) or (not name and kind in ("vace", "s2v", "animate")):
        return Found(
            f"a relative of Wan in the format of its authors ({name or 'WanModel'}, model_type {json.dumps(kind):.40})",
            "give text to video or image to video of Wan 2.1 or 2.2",
        )
    if re.match(r"(Asymmetric|Consistency)?Autoencoder|VQModel|AutoencoderTiny", name):
        return Found(f"the VAE {name:.80}, not a transformer", "give the pipeline's folder, or its transformer/")
    if _IMAGE.fullmatch(name):
        return Found(f"the {name:.80} of an image model", "give a video model")
    if name.endswith(("Scheduler", "Pipeline")):
        return Found(f"the configuration of a {name:.80}, not a transformer", "give the folder of the transformer")
    if not name and isinstance(architectures, list) and architectures:
        first = architectures[0] if isinstance(architectures[0], str) else ""
        if _TEXT_ENCODER.match(first):
            return Found(
                f"the text encoder {first:.80}, not a transformer", "give the pipeline's folder, or its transformer/"
            )
        return Found(f"the {first:.80} of the transformers library", "give a diffusers video transformer")
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized:
        method = json.dumps(quantized.get("quant_method", "?"))
        return Found(f"a checkpoint that is already quantized (quant_method {method:.60})", _ORIGINAL)
    return None
