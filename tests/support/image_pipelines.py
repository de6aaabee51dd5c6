"""Pipelines that draw from images, with tiny random parts, as folders that ``dvdq-run`` takes; exports of their transformers."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dvdquant.recipe import RECIPES
from tests.support import tiny_models as tiny
from tests.support import tiny_pipelines
from tests.support.folders import shared_folder
from tests.support.tiny_pipelines import KINDS, LTX, TOKENS, Exported, Kind

WAN_CLIP = {**tiny.WAN_ONE, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 128}
HUNYUAN_CONCAT = {**tiny.HUNYUAN, "in_channels": 9, "image_condition_type": "latent_concat", "guidance_embeds": False}
KINDS.update(
    {
        "wan-i2v-22": Kind(tiny_pipelines.WAN_I2V, "2x4x4", (5, 32, 32)),
        "wan-ti2v-5b": Kind(tiny_pipelines.WAN_TI2V, "2x4x4", (5, 64, 64)),
        "ltx-i2v": Kind(LTX, "2:3x3x4", (9, 96, 128)),
        "wan-i2v-21": Kind(WAN_CLIP, "2x4x4", (5, 32, 32)),
        "wan-flf2v": Kind({**WAN_CLIP, "pos_embed_seq_len": 514}, "2x4x4", (5, 32, 32)),
        "ltx-condition": Kind(LTX, "2:3x3x4", (9, 96, 128)),
        "cogvideox-i2v": Kind({**tiny_pipelines.COGVIDEOX, "in_channels": 8}, "2x4x4", (5, 32, 32)),
        "hunyuan-concat": Kind(HUNYUAN_CONCAT, "2x4x4", (5, 32, 32)),
        "hunyuan-token": Kind({**tiny.HUNYUAN, "image_condition_type": "token_replace"}, "2x4x4", (5, 32, 32)),
    }
)
# What of the normal run draws with graphs, too: its trace is that of a pipeline in test_pipelines.py. The graphs of the others
# are judged in tests/export, those of their families with text in test_pipelines.py.
WITH_GRAPHS = ("wan-i2v-22",)
# What stands before the words in the text of HunyuanVideo: the image, every second or fourth token of 576.
_TEXT = {"hunyuan-concat": TOKENS + 288, "hunyuan-token": TOKENS + 144}


@dataclass(frozen=True)
class ImageModel:
    """An export, the pipeline's folder, and what a request of it has to give."""

    kind: str
    made: Exported
    pipeline: Path

    @property
    def class_name(self) -> str:
        """The pipeline class that draws from an image."""
        names = {"wan": "WanImageToVideoPipeline", "ltx": "LTXImageToVideoPipeline"}
        names |= {"cogvideox": "CogVideoXImageToVideoPipeline", "hunyuan": "HunyuanVideoImageToVideoPipeline"}
        return "LTXConditionPipeline" if self.kind == "ltx-condition" else names[self.kind.partition("-")[0]]

    @property
    def last(self) -> bool:
        """Whether a last image is given, too."""
        return self.kind in ("wan-flf2v", "ltx-condition")


@functools.cache
def image_model(kind: str, graphs: bool | None = None) -> ImageModel:
    """Return the export and the pipeline of a kind, made once in a test run; nobody writes into them.

    Args:
        kind: A key of ``KINDS``.
        graphs: Whether the export can run on ONNX Runtime; by default those of ``WITH_GRAPHS`` can.
    """
    with_graphs = kind in WITH_GRAPHS if graphs is None else graphs
    name = "ltx" if kind.startswith("ltx") else kind  # one export for two pipelines
    folder = shared_folder(f"images-{name}-{with_graphs}", lambda made: _export(kind, made, with_graphs))
    made = _export(kind, folder, with_graphs)
    pipeline = shared_folder(f"images-pipeline-{kind}-{with_graphs}", lambda here: _save_pipeline(kind, made, here))
    return ImageModel(kind, made, pipeline)


def _export(kind: str, folder: Path, graphs: bool) -> Exported:
    """Export a kind into a folder, or take what is there."""
    components = 2 if kind == "wan-i2v-22" else 1
    recipe = RECIPES["w4a4"]
    if kind != "wan-i2v-21":  # a graph less; and the traces are those of the pipelines that draw from text
        recipe = dataclasses.replace(recipe, name="eight-bit", activations=recipe.activations[1:])
    tokens = _TEXT.get(kind, TOKENS)
    return tiny_pipelines.export_kind(
        kind, folder, components=components, text_tokens=tokens, recipe=recipe, graphs=graphs
    )


def _save_pipeline(kind: str, made: Exported, folder: Path) -> None:
    """Write the pipeline of an export as a folder, with the transformers of its source."""
    import diffusers

    originals = [
        getattr(diffusers, KINDS[kind].config["_class_name"]).from_pretrained(
            made.source / name, torch_dtype=torch.bfloat16
        )
        for name in made.plans
    ]
    _build(kind, *originals).save_pretrained(folder)


def _build(kind: str, transformer: Any, transformer_2: Any = None) -> Any:
    """The pipeline as it is published: TI2V-5B and LTX under the class that draws from text."""
    import diffusers
    import transformers

    parts: dict[str, Any] = {"transformer": transformer, "scheduler": tiny_pipelines.scheduler(kind)}
    width = KINDS[kind].config.get("text_dim") or KINDS[kind].config.get("text_embed_dim") or 32
    if kind.startswith("hunyuan"):
        parts["scheduler"] = tiny_pipelines.scheduler("hunyuan-video")
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
        parts |= {"vae": tiny_pipelines.vae("hunyuan-video"), "image_processor": processor}
        parts |= {"text_encoder": _llava(width), "tokenizer": _header_tokenizer()}
        parts |= {
            "text_encoder_2": tiny_pipelines.text_encoder("clip", 16),
            "tokenizer_2": tiny_pipelines.tokenizer(77),
        }
        return diffusers.HunyuanVideoImageToVideoPipeline(**parts)
    parts |= {"vae": tiny_pipelines.vae(kind), "tokenizer": tiny_pipelines.tokenizer()}
    parts |= {"text_encoder": tiny_pipelines.text_encoder("umt5" if kind.startswith("wan") else "t5", width)}
    if kind == "ltx-condition":
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.LTXConditionPipeline(**parts)
    if kind == "ltx-i2v":
        parts["scheduler"] = tiny_pipelines.scheduler("ltx-video")
        return diffusers.LTXPipeline(**parts)
    if kind == "cogvideox-i2v":
        return diffusers.CogVideoXImageToVideoPipeline(**parts)
    if kind == "wan-ti2v-5b":
        return diffusers.WanPipeline(**parts, expand_timesteps=True)
    if kind == "wan-i2v-22":
        return diffusers.WanImageToVideoPipeline(**parts, transformer_2=transformer_2, boundary_ratio=0.7)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=2))
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return diffusers.WanImageToVideoPipeline(
        **parts, image_encoder=vision.to(torch.bfloat16).eval(), image_processor=processor
    )


def _llava(width: int) -> nn.Module:
    """A text encoder that sees 576 patches of an image."""
    import transformers

    torch.manual_seed(4)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=48, patch_size=2),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=4,
        pad_token_id=0,
    )
    return transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


def _header_tokenizer() -> Any:
    """A tokenizer with the marks of HunyuanVideo's template; the words of the template are unknown to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "</s>", "<unk>", "<|end_header_id|>", "<image>", "<|start_header_id|>", "<|eot_id|>"]
    vocabulary = {word: index for index, word in enumerate([*marks, *tiny_pipelines.WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=marks[3:],
        model_max_length=1024,
    )


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """A smooth coloured image that is no clip's size."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)
