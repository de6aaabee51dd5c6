"""The diffusers pipelines of every family with tiny random parts, made without a download; exports of their transformers.

A pipeline here is the real class with its real scheduler, VAE, text encoders and tokenizers; only their sizes and weights
are ours. The transformer is exported as a user would export it, and the *reference* is diffusers' own transformer with the
stored 4-bit weights, in the export's dtype or in float64.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dvdquant.export.options import ExportOptions
from dvdquant.export.pipeline import run_export
from dvdquant.export.plan import plan_export
from dvdquant.export.verify.graph import load_quantized
from dvdquant.export.verify.reference import as_float64
from dvdquant.model.plan import ModelPlan
from dvdquant.model.quantized_model import set_activation
from dvdquant.quantize.checkpoint import plan_shards
from dvdquant.recipe import RECIPES, Recipe
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import read_header
from tests.support import tiny_models as tiny
from tests.support.folders import shared_folder
from tests.support.traces import without_graphs

WORDS = ["a", "cat", "dog", "runs", "sits", "in", "the", "rain", "snow", "red", "blue"]
TOKENS = 12
# One block each: what is compared here stands around the blocks. Graphs of more are judged in tests/export.
WAN_TI2V = {**tiny.WAN_ONE, "in_channels": 48, "out_channels": 48}
LTX = {**tiny.LTX, "num_layers": 1}
COGVIDEOX = {**tiny.COGVIDEOX, "num_layers": 1}
# Image to video as in Wan 2.2: noise, a mask and condition latents on the channel axis, no image embedding.
WAN_I2V = {**tiny.WAN_ONE, "in_channels": 12}
# A second patch of time, as CogVideoX 1.5 has it.
COGVIDEOX_15 = {**COGVIDEOX, "patch_size_t": 2, "patch_bias": False}


@dataclass(frozen=True)
class Kind:
    """One pipeline to test: the transformer's config, latent sizes F×H×W, and the call's sizes in frames and pixels."""

    config: dict[str, Any]
    latent: str
    video: tuple[int, int, int]

    @property
    def size(self) -> dict[str, int]:
        """As the pipeline takes it."""
        frames, height, width = self.video
        return {"num_frames": frames, "height": height, "width": width}


KINDS = {
    "wan": Kind(tiny.WAN_ONE, "2x4x4", (5, 32, 32)),
    "wan-i2v": Kind(WAN_I2V, "2x4x4", (5, 32, 32)),
    "wan-ti2v": Kind(WAN_TI2V, "2x4x4", (5, 64, 64)),
    "hunyuan-video": Kind(tiny.HUNYUAN, "2x4x4", (5, 32, 32)),
    "cogvideox": Kind(COGVIDEOX, "2x4x4", (5, 32, 32)),
    "cogvideox-2b": Kind({**tiny.COGVIDEOX_2B, "num_layers": 1}, "3x8x8", (9, 64, 64)),
    "cogvideox-1.5": Kind(COGVIDEOX_15, "2x4x4", (5, 32, 32)),
    "ltx-video": Kind(LTX, "2x3x4", (9, 96, 128)),
}


# ------------------------------------------------------------------------------------------------------------- the parts


def tokenizer(length: int = TOKENS) -> Any:
    """A fast tokenizer of a dozen words, with an end token and right padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def text_encoder(kind: str, width: int) -> nn.Module:
    """One of ``umt5``, ``t5``, ``llama``, ``clip`` with hidden size ``width``, in bf16."""
    import transformers

    vocabulary = 3 + len(WORDS)
    torch.manual_seed(1)
    if kind in ("umt5", "t5"):
        sizes = {"vocab_size": vocabulary, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        name = "UMT5" if kind == "umt5" else "T5"
        model = getattr(transformers, f"{name}EncoderModel")(getattr(transformers, f"{name}Config")(**sizes))
    else:
        sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3}
        sizes |= {
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": 2,
        }
        if kind == "llama":
            model = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
        else:
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    return model.to(torch.bfloat16).eval()


def vae(kind: str) -> nn.Module:
    """A VAE with the family's own class and compression."""
    import diffusers

    torch.manual_seed(2)
    if kind.startswith("wan"):
        sizes: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        channels = KINDS[kind].config["out_channels"]
        sizes |= {"z_dim": channels, "latents_mean": [0.1] * channels, "latents_std": [1.1] * channels}
        if kind.startswith("wan-ti2v"):
            sizes |= {
                "is_residual": True,
                "patch_size": 2,
                "in_channels": 12,
                "out_channels": 12,
                "scale_factor_spatial": 16,
            }
            sizes |= {"decoder_base_dim": 4}
        return diffusers.AutoencoderKLWan(**sizes).eval()
    if kind == "hunyuan-video":
        model = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        return model.eval()
    if kind.startswith("cogvideox"):
        model = diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        )
        return model.to(torch.bfloat16).eval()  # the pipeline decodes in the text encoder's dtype
    model = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return model.eval()


def scheduler(kind: str) -> Any:
    """The scheduler the family is published with."""
    import diffusers

    if kind.startswith("wan"):
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        )
    if kind.startswith("cogvideox"):
        return diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        )
    if kind == "ltx-video":
        return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)


def build_pipeline(kind: str, transformer: Any, **more: Any) -> Any:
    """The family's text-to-video pipeline around ``transformer``."""
    import diffusers

    width = KINDS[kind].config.get("text_dim") or KINDS[kind].config.get("text_embed_dim") or 32
    parts: dict[str, Any] = {"transformer": transformer, "vae": vae(kind), "scheduler": scheduler(kind)}
    if kind == "hunyuan-video":
        parts |= {"text_encoder": text_encoder("llama", width), "tokenizer": tokenizer(77)}
        parts |= {"text_encoder_2": text_encoder("clip", 16), "tokenizer_2": tokenizer(77)}
        pipeline = diffusers.HunyuanVideoPipeline(**parts, **more)
    else:
        encoder = text_encoder("umt5" if kind.startswith("wan") else "t5", width)
        parts |= {"text_encoder": encoder, "tokenizer": tokenizer()}
        names = {"wan": "Wan", "cogvideox": "CogVideoX", "ltx": "LTX"}
        if kind == "wan-ti2v":
            more = {"expand_timesteps": True, **more}
        name = "WanImageToVideo" if kind == "wan-i2v" else names[kind.partition("-")[0]]
        pipeline = getattr(diffusers, f"{name}Pipeline")(**parts, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(kind: str, steps: int = 3, **more: Any) -> dict[str, Any]:
    """Keyword arguments of one call, prompt included; latents come back unless ``output_type`` says otherwise."""
    call: dict[str, Any] = {
        "prompt": "a red cat runs in the rain",
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    call |= dict(max_sequence_length=TOKENS, generator=torch.Generator().manual_seed(0), **KINDS[kind].size)
    if kind == "hunyuan-video":
        call["prompt_template"] = {"template": "the dog {}", "crop_start": 2}
    if kind == "wan-i2v":
        generator = torch.Generator().manual_seed(1)
        call["image"] = torch.rand(1, 3, 32, 32, generator=generator)
        # Its text path needs the package ftfy, which diffusers does not require.
        embeddings = torch.randn(2, 1, TOKENS, 32, generator=generator).to(torch.bfloat16)
        call |= {"prompt": None, "prompt_embeds": embeddings[0], "negative_prompt_embeds": embeddings[1]}
    return {**call, **more}


# ------------------------------------------------------------------------------------------- the export, its reference


@dataclass
class Exported:
    """An export in ``out`` of the checkpoint in ``source``, with what is needed to load it into PyTorch."""

    kind: str
    source: Path
    out: Path
    plans: dict[str, ModelPlan]
    sessions: dict[tuple[str, str], Any] = field(default_factory=dict)

    def reference(self, bits: int, component: str = "transformer") -> nn.Module:
        """Diffusers' own transformer with the stored weights and ``bits``-bit activations, in the export's dtype."""
        plan = self.plans[component]
        tensors = {
            name: (relative, info)
            for relative in plan_shards(plan, component)
            for name, info in read_header(self.out / relative).tensors.items()
        }
        return load_quantized(plan, tensors, self.out, bits)

    def use(self, model: nn.Module, bits: int, component: str = "transformer") -> None:
        """Switch a reference to other activation bits."""
        set_activation(model, self.plans[component].recipe.activation(bits))

    def open(self, backend: str = "onnxruntime", **options: Any) -> Any:
        """A DvdqTransformer of it. An open session of the backend is used again: opening is most of a tiny run."""
        from dvdquant.deploy import DvdqTransformer

        key = (backend, options.get("component") or options.get("subfolder") or "transformer")
        session = self.sessions.get(key)
        if session is not None and not session.closed:
            with mock.patch("dvdquant.deploy.pipelines.transformer.open_session", return_value=session):
                return DvdqTransformer.from_pretrained(self.out, backend=backend, **options)
        opened = DvdqTransformer.from_pretrained(self.out, backend=backend, **options)
        self.sessions[key] = opened.session
        return opened


def export_kind(
    kind: str,
    folder: Path,
    *,
    batch: int = 1,
    components: int = 1,
    latent: str | None = None,
    text_tokens: int = TOKENS,
    recipe: Recipe = RECIPES["w4a4"],
    graphs: bool = True,
) -> Exported:
    """Write random weights of ``kind`` into ``folder``/source and export graphs of them into ``folder``/out.

    An export that is there already is taken as it is. Without ``graphs`` it is for PyTorch alone, and made in a fraction of
    the time.
    """
    source = folder / "source"
    names = ["transformer", "transformer_2"][:components]
    there = (folder / "out" / "manifest.json").exists()
    for seed, name in enumerate(() if there else names):
        tiny.write_checkpoint(source / name, KINDS[kind].config, seed=seed)
    if components > 1 and not there:
        entries = ", ".join(f'"{name}": ["diffusers", "WanTransformer3DModel"]' for name in names)
        (source / "model_index.json").write_text(f'{{"_class_name": "WanPipeline", {entries}}}')
    options = ExportOptions(
        model=str(source if components > 1 else source / "transformer"),
        out=folder / "out",
        recipe=recipe,
        targets=("graphs",),
        latent=latent or KINDS[kind].latent,
        text_tokens=text_tokens,
        batch=batch,
    )
    plan = plan_export(options)
    if not there:
        with contextlib.nullcontext() if graphs else without_graphs():
            run_export(plan, Progress())
    return Exported(kind, source, folder / "out", dict(zip(plan.components, plan.plans)))


_EXPORTS: dict[tuple[Any, ...], Exported] = {}


def exported(kind: str, **options: Any) -> Exported:
    """:func:`export_kind`, done once in a test run; that of Wan has two transformers."""
    if kind == "wan" and not options:
        options = {"components": 2}
    key = (kind, *sorted(options.items()))
    if key not in _EXPORTS:
        name = "-".join(["kind", kind, *(f"{option}-{value}" for option, value in key[1:])])
        folder = shared_folder(name, lambda made: export_kind(kind, made, **options))
        _EXPORTS[key] = export_kind(kind, folder, **options)
    return _EXPORTS[key]


@dataclass
class Call:
    """One call of a pipeline's transformer: its arguments and the sample it returned."""

    arguments: dict[str, Any]
    sample: Tensor


def record_calls(transformer: nn.Module) -> list[Call]:
    """A list that every later call of ``transformer`` is added to."""
    calls: list[Call] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        # Contiguous, as sessions run: PyTorch sums a strided matrix product in another order.
        kept = {
            name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        calls.append(Call(kept, output[0].clone()))

    transformer.register_forward_hook(note, with_kwargs=True)
    return calls


def latents_of_steps(pipe: Any, **call: Any) -> list[Tensor]:
    """The latents after every step of one call."""
    steps = []

    def keep(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(values["latents"].clone())
        return values

    result = pipe(**call, callback_on_step_end=keep).frames
    if call["output_type"] == "latent":
        assert torch.equal(result, steps[-1])
    return steps


class Judge(nn.Module):
    """The float64 model behind the face of the 16-bit one: its dtype and config to the pipeline, float64 inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.exact = as_float64(model)
        self.config, self.cache_context = model.config, model.cache_context
        self.dtype, self.device = model.dtype, model.device

    def forward(self, **arguments: Any) -> Any:
        """As the model's own, floats widened on the way in and the sample rounded on the way out.

        Without the rounding the pipeline would behave otherwise: HunyuanVideo's casts t to the dtype of its latents.
        """
        assert arguments["return_dict"] is False
        (sample,) = self.exact(**{name: self._wide(value) for name, value in arguments.items()})
        return (sample.to(self.dtype),)

    def _wide(self, value: Any) -> Any:
        same = isinstance(value, Tensor) and value.dtype == self.dtype
        return value.double() if same else value


def relative(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm())
