"""The first and the last stage of the diffusers pipelines: from a prompt to embeddings, and from latents to pictures.

A pipeline's call has no way to stop before the VAE and go on there later, so what follows its loop stands here, by
family: the latents are scaled back, and the VAE decodes them. The arithmetic is that of the call, bit by bit.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.errors import EngineError
from dvdquant.model.diffusers_hooks import denormalize_latents, execution_device, unpack_latents
from dvdquant.model.families import Family
from dvdquant.model.families.hunyuan_video import IMAGE_TOKENS, TEMPLATE_TOKENS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decode_video", "encode_text", "frames_of", "twin", "words_of"]


def twin(class_name: str, pipe: Any) -> Any:
    """Return a pipeline of another class around the parts of ``pipe``.

    Args:
        class_name: A pipeline class of diffusers, which takes these parts.
        pipe: The pipeline.
    """
    import diffusers

    of_class = getattr(diffusers, class_name)
    settings = {**pipe.config, **pipe.components}
    names = inspect.signature(of_class.__init__).parameters
    made = of_class(**{name: settings[name] for name in names if name in settings})
    made.set_progress_bar_config(disable=True)
    return made


def words_of(family: Family, tokens: int) -> int:
    """Return the length that a pipeline is asked for: that of the words, where tokens of an image stand before them.

    Args:
        family: The family of the pipeline.
        tokens: The length of the text embedding.
    """
    image = family.image_tokens()
    return tokens - image + TEMPLATE_TOKENS if image else tokens


def encode_text(
    pipe: Any, family: Family, request: GenerateRequest, tokens: int, image: Image | None = None
) -> dict[str, Tensor]:
    """Return the embeddings of a request, by the names of the arguments of the pipeline's call.

    Args:
        pipe: The pipeline, with its text encoders and tokenizers.
        family: The family of the pipeline.
        request: The request, with its guidance filled in.
        tokens: The length of the text embedding.
        image: The first frame, for text encoders that see it.
    """
    names: tuple[str, ...]
    if family.name == "hunyuan-video":
        names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        seen = {}
        if kept := family.image_tokens():  # of 576, every second or fourth, as the pipeline's call has it
            seen = {"image": image, "image_embed_interleave": IMAGE_TOKENS // kept}
        found = pipe.encode_prompt(prompt=request.prompt, max_sequence_length=words_of(family, tokens), **seen)
    else:
        if type(pipe).__name__ == "WanImageToVideoPipeline" and importlib.util.find_spec("ftfy") is None:
            # This class cleans text with a package that its twin for text alone can do without.
            pipe = twin("WanPipeline", pipe)
        found = pipe.encode_prompt(
            request.prompt,
            request.negative_prompt,
            do_classifier_free_guidance=request.guided,
            max_sequence_length=tokens,
        )
        names = ("prompt_embeds", "negative_prompt_embeds")
        if family.name == "ltx-video":
            names = (
                "prompt_embeds",
                "prompt_attention_mask",
                "negative_prompt_embeds",
                "negative_prompt_attention_mask",
            )
    return {name: value for name, value in zip(names, found) if value is not None}


def decode_video(pipe: Any, family: Family, request: GenerateRequest, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the VAE makes of the last latents, [1, 3, F, H, W] around 0.

    Args:
        pipe: The pipeline, with its VAE.
        family: The family of the pipeline.
        request: The request, with its size filled in.
        latents: The latents as the pipeline's loop left them.
        dtype: The dtype of the text embeddings.
    """
    video: Tensor = _DECODERS[family.name](pipe, family, request, latents.to(execution_device(pipe)), dtype)
    return video


def _wan(pipe: Any, family: Family, request: GenerateRequest, latents: Tensor, dtype: torch.dtype) -> Tensor:
    del family, request, dtype
    vae, latents = pipe.vae, latents.to(pipe.vae.dtype)

    def by_channel(values: list[float]) -> Tensor:
        return torch.tensor(values).view(1, vae.config.z_dim, 1, 1, 1)

    mean = by_channel(vae.config.latents_mean).to(latents.device, latents.dtype)
    inverse = 1.0 / by_channel(vae.config.latents_std).to(latents.device, latents.dtype)
    video: Tensor = vae.decode(latents / inverse + mean, return_dict=False)[0]
    return video


def _hunyuan(pipe: Any, family: Family, request: GenerateRequest, latents: Tensor, dtype: torch.dtype) -> Tensor:
    del request, dtype
    concatenated = family.config.get("image_condition_type") == "latent_concat"
    video: Tensor = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
    # Beside latents of the image, the first ones are the image's own: not a part of the clip.
    return video[:, :, 4:] if concatenated else video


def _cogvideox(pipe: Any, family: Family, request: GenerateRequest, latents: Tensor, dtype: torch.dtype) -> Tensor:
    del dtype
    # CogVideoX 1.5 fills its first patch of time with frames that nobody asked for.
    filled = latents.shape[1] - ((request.num_frames or 1) - 1) // family.vae_scale[0] - 1
    video: Tensor = pipe.decode_latents(latents[:, filled:])
    return video


def _ltx(pipe: Any, family: Family, request: GenerateRequest, latents: Tensor, dtype: torch.dtype) -> Tensor:
    time, height, width = family.patch()
    assert height == width
    _, down, across = family.vae_scale
    vae = pipe.vae
    rows, columns = (request.height or down) // down, (request.width or across) // across
    if latents.ndim == 3:  # the pipeline with conditions has unpacked them
        size = (family.latent_frames(request.num_frames or 1), rows, columns)
        latents = unpack_latents(pipe, latents, size, (height, time))
    latents = denormalize_latents(pipe, latents).to(dtype)
    # A VAE that takes a timestep is told 0, the pipeline's default: no noise is mixed in.
    timestep = torch.zeros(1, device=latents.device, dtype=dtype) if vae.config.timestep_conditioning else None
    video: Tensor = vae.decode(latents.to(vae.dtype), timestep, return_dict=False)[0]
    return video


_DECODERS: dict[str, Callable[[Any, Family, GenerateRequest, Tensor, torch.dtype], Tensor]] = {
    "wan": _wan,
    "hunyuan-video": _hunyuan,
    "cogvideox": _cogvideox,
    "ltx-video": _ltx,
}


def frames_of(video: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the pictures of a video as uint8 [F, H, W, 3]: round(255 · clamp(x / 2 + 1/2, 0, 1)).

    Frame by frame, on the device of the video: no copy is larger than one frame, and the host gets one byte a value.

    Args:
        video: What the VAE gave, [1, 3, F, H, W], of any floating dtype.

    Raises:
        EngineError: It holds NaN or infinities.
    """
    _, channels, count, height, width = video.shape
    frames = np.empty((count, height, width, channels), np.uint8)
    for index in range(count):
        frame = video[0, :, index]
        if not bool(torch.isfinite(frame).all()):
            raise EngineError("the VAE gave NaN or infinities", fix="decode in float32, or check the pipeline's VAE")
        unit = (frame * 0.5 + 0.5).clamp(0, 1)  # in the VAE's dtype, as diffusers does
        whole = (unit.to(torch.float64) * 255).round_().to(torch.uint8)
        frames[index] = whole.permute(1, 2, 0).cpu().numpy()
    return frames
