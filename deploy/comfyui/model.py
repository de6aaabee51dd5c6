"""An export as a MODEL of ComfyUI. Importing this module needs ComfyUI.

ComfyUI's own classes of the Wan models stay in charge of latents, noise, timesteps and conditions; only their
transformer is another. Their memory management sees the bytes that the session holds, loads it and frees it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import torch

from dvdquant.deploy.comfyui.sampling import OPTION, Settings
from dvdquant.deploy.comfyui.transformer import ExportedTransformer
from dvdquant.errors import ShapeError, UnsupportedError

__all__ = ["ExportPatcher", "load_model"]

_WAN, _WAN_22 = 16, 48  # output channels of the two VAEs


class PlainLatents(comfy.latent_formats.LatentFormat):
    """Latents that are not scaled, such as those of the toy models, whose three channels are red, green and blue.

    Args:
        channels: The number of channels.
    """

    latent_dimensions = 3

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels
        if channels == 3:  # previews need no decoder
            self.latent_rgb_factors = [[float(row == column) for column in range(3)] for row in range(3)]


class WrappedTransformer(ExportedTransformer):
    """An exported transformer that runs the wrappers which nodes put around a model's transformer."""

    def forward(self, x: Any, timestep: Any, context: Any = None, clip_fea: Any = None, **more: Any) -> Any:
        """Run the transformer, see :meth:`ExportedTransformer.forward`.

        Args:
            x: The latents, [B, C, F, H, W].
            timestep: The timestep of each sample, [B].
            context: The text embedding, [B, L, D].
            clip_fea: The embedding of CLIP vision, or None.
            **more: The other arguments.
        """
        options = more.pop("transformer_options", None) or {}
        extra = more.pop("time_dim_concat", None)
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(super().forward, self, wrappers)
        return executor.execute(x, timestep, context, clip_fea, extra, options, **more)


class _Exported:
    """The differences of an export from ComfyUI's own model: it cannot be saved as a checkpoint, and says which latents fit."""

    latent_format: Any

    def concat_cond(self, **given: Any) -> Any:
        """Return the conditions on the channel axis, as ComfyUI's model does, for latents that are of this model.

        Args:
            **given: ComfyUI's conditions and the noise.

        Raises:
            ShapeError: The latents have another number of channels.
        """
        channels, noise = self.latent_format.latent_channels, given["noise"]
        if noise.shape[1] != channels:
            raise ShapeError(
                f"the latents are {list(noise.shape)}",
                available=f"[batch, {channels}, frames, height, width]",
                fix="use an empty latent of this kind of model (EmptyHunyuanLatentVideo for Wan)",
            )
        return super().concat_cond(**given)  # type: ignore[misc]

    def state_dict_for_saving(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to save.

        Raises:
            UnsupportedError: An export holds packed weights, no checkpoint.
        """
        raise UnsupportedError("an export cannot be saved as a checkpoint", fix="copy the export's folder")


class ExportedWan(_Exported, comfy.model_base.WAN21):
    """ComfyUI's model of Wan 2.1 and Wan 2.2 14B around an export."""


class ExportedWan22(_Exported, comfy.model_base.WAN22):
    """ComfyUI's model of Wan 2.2 TI2V 5B around an export."""


class ExportPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's holder of a model, which refuses what would change weights that are packed."""

    def add_patches(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse LoRAs of ComfyUI's own loaders, which would have no effect here.

        Raises:
            UnsupportedError: Always; the error names the ways that work.
        """
        raise UnsupportedError(
            "ComfyUI's LoRA loaders change a model's weights, and those of an export are packed",
            available="the node LoRA for dvdquant export (export with --lora-rank, or backend pytorch), or dvdq-export --lora",
            fix="replace the LoRA loader by one of these",
        )

    def get_key_patches(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse merging of models.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "an export cannot be merged with another model: its weights are packed", fix="merge before the export"
        )


def load_model(root: Path, component: str = "", backend: str = "auto", **options: Any) -> ExportPatcher:
    """Return a MODEL for an export. Nothing is loaded before ComfyUI asks for it.

    Args:
        root: The export folder.
        component: ``transformer``, ``transformer_2``, or "" for the first of the export.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        **options: More fields of :class:`.SessionOptions`, such as ``compile``.

    Raises:
        OutputError: The folder is no export, or has no such component.
        UnsupportedError: It is no export of a Wan model, ComfyUI computes on another device than CPU or CUDA, or options
            exclude each other.
    """
    device = comfy.model_management.get_torch_device()
    transformer = WrappedTransformer(root, component, backend, device, **options)
    patcher = ExportPatcher(
        _base_model(transformer),
        load_device=device,
        offload_device=comfy.model_management.unet_offload_device(),
        size=max(1, transformer.weight_bytes()),
    )
    patcher.model_options["transformer_options"][OPTION] = Settings()
    kinds = comfy.patcher_extension
    patcher.add_wrapper_with_key(kinds.WrappersMP.SAMPLER_SAMPLE, OPTION, _sample)
    patcher.add_callback_with_key(kinds.CallbacksMP.ON_LOAD, OPTION, _load)
    patcher.add_callback_with_key(kinds.CallbacksMP.ON_DETACH, OPTION, _detach)
    return patcher


def _base_model(transformer: ExportedTransformer) -> Any:
    """Return ComfyUI's model of the export's kind, with the exported transformer in it."""
    config = transformer.family.config
    channels = transformer.family.latent_channels()
    unet = {
        "image_model": "wan2.1",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],  # for the estimate of activations
        "in_dim": config["in_channels"],
        "dtype": transformer.dtype,
        "disable_unet_model_creation": True,
    }
    of_wan_22 = channels == _WAN_22
    kind = comfy.supported_models.WAN22_T2V if of_wan_22 else comfy.supported_models.WAN21_T2V
    settings = kind(unet)
    if channels not in (_WAN, _WAN_22):
        settings.latent_format = PlainLatents(channels)
    image_to_video = of_wan_22 or config["in_channels"] != channels
    model = (ExportedWan22 if of_wan_22 else ExportedWan)(settings, image_to_video=image_to_video)
    model.diffusion_model = transformer
    return model


def _sample(executor: Any, guider: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], *rest: Any) -> Any:
    """Run a sampler as one run of the transformer. ComfyUI's interruptions end it as well."""
    options = extra_args.get("model_options", {}).get("transformer_options", {})
    transformer: ExportedTransformer = guider.model_patcher.model.diffusion_model
    with transformer.sampling(options.get(OPTION) or Settings(), sigmas.tolist()):
        return executor(guider, sigmas, extra_args, *rest)


def _load(patcher: Any, *_: Any) -> None:
    """Open the session when ComfyUI loads the model, and report what it holds: all of it or nothing."""
    patcher.size = max(1, patcher.model.diffusion_model.load())
    patcher.model.model_loaded_weight_memory = patcher.size


def _detach(patcher: Any, unpatch_all: bool = True) -> None:
    """Free the session when ComfyUI unloads the model; a copy of it that takes its place keeps the session."""
    if unpatch_all:
        patcher.model.diffusion_model.unload()
