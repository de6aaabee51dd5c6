"""Count the bytes of live tensors of published VAEs, transformers and text encoders, on tensors without data.

``python -m benchmarks.working_memory [PART...]`` prints what :mod:`dvdquant.model.working_memory` estimates beside
what was counted. A part is run under PyTorch's FakeTensorMode at its published size, so that nothing is computed and no memory
is needed; a dispatch mode adds every new storage and takes away those that are freed. Workspaces of libraries are not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.published import config_of
from dvdquant.model.families import Axis, Family, Sizes, get_family
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.working_memory import TEXT_BYTES, decode_bytes, step_bytes_at

MIB = 1 << 20


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are alive, and the most at once.

    Args:
        known: Tensors that are not counted, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}
        for tensor in known:
            self._note(tensor, counted=False)

    def _note(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes() if counted else 0
        self.now += self._seen[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made."""
        del types
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._note(value)
        return made


@dataclass(frozen=True)
class Counted:
    """What was counted of one call.

    Args:
        weights: Parameters of the module.
        peak: The most bytes of live tensors at once, beside the weights.
    """

    weights: int
    peak: int


def count(make: Callable[[], nn.Module], call: Callable[[nn.Module], Callable[[], Any]], dtype: torch.dtype) -> Counted:
    """Return what a call of a module works in.

    Args:
        make: Makes the module.
        call: Makes the inputs of a module, and returns the call.
        dtype: The dtype of the weights.
    """
    with FakeTensorMode(), torch.no_grad():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            module = make().eval()
        finally:
            torch.set_default_dtype(before)
        run = call(module)
        with LiveBytes([*module.parameters(), *module.buffers()]) as live:
            run()
        return Counted(sum(p.numel() for p in module.parameters()), live.peak)


# ------------------------------------------------------------------------------------------------------------- the VAEs

VAES: dict[str, tuple[str, dict[str, Any], torch.dtype, int]] = {
    "wan": ("AutoencoderKLWan", {}, torch.float32, 16),
    "wan-48": (
        "AutoencoderKLWan",
        {
            "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12, "is_residual": True,
            "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
        },
        torch.float32, 48,
    ),
    "hunyuan-video": ("AutoencoderKLHunyuanVideo", {}, torch.bfloat16, 16),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": (128, 256, 256, 512), "layers_per_block": 3, "latent_channels": 16,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        },
        torch.bfloat16, 16,
    ),
    "ltx-video": ("AutoencoderKLLTXVideo", {}, torch.bfloat16, 128),
}  # fmt: skip


def count_decode(name: str, frames: int, height: int, width: int, *, tiled: bool) -> Counted:
    """Return what a published VAE works in while it decodes.

    Args:
        name: A key of :data:`VAES`.
        frames: Frames of the clip.
        height: Its height in pixels.
        width: Its width in pixels.
        tiled: Whether it decodes in tiles.
    """
    import diffusers

    class_name, config, dtype, channels = VAES[name]
    time, down, across = family_of(name).vae_scale

    def make() -> nn.Module:
        vae: nn.Module = getattr(diffusers, class_name)(**config)
        if tiled:
            vae.enable_tiling()  # type: ignore[operator]
        return vae

    def call(vae: Any) -> Callable[[], Any]:
        latents = torch.empty(1, channels, (frames - 1) // time + 1, height // down, width // across, dtype=dtype)
        more = (None,) if name == "ltx-video" else ()
        return lambda: vae.decode(latents, *more, return_dict=False)[0]

    return count(make, call, dtype)


# ----------------------------------------------------------------------------------------------------- the transformers


def family_of(name: str) -> Family:
    """Return the family of a VAE of :data:`VAES`.

    Args:
        name: The key.
    """
    known = {"wan": "wan2.1-1.3b", "wan-48": "wan2.2-5b", "cogvideox": "cogvideox-5b", "ltx-video": "ltx-video-2b"}
    return get_family(config_of(known.get(name, name)))


# Name -> latent size and text tokens.
STEPS: dict[str, tuple[tuple[int, int, int], int]] = {
    "wan2.1-1.3b": ((21, 60, 104), 512),
    "wan2.1-14b": ((21, 60, 104), 512),
    "wan2.2-5b": ((31, 44, 80), 512),
    "hunyuan-video": ((21, 60, 104), 256),
    "cogvideox-5b": ((13, 60, 90), 226),
    "ltx-video-2b": ((16, 16, 24), 128),
}


def count_step(name: str) -> tuple[Counted, int]:
    """Return what two blocks of a published transformer work in, and the estimate; more blocks work in no more.

    Args:
        name: A key of :data:`STEPS`.
    """
    import diffusers

    latent, text = STEPS[name]
    config = config_of(name) | {"num_layers": 2}
    if "num_single_layers" in config:
        config["num_single_layers"] = 2
    family = get_family(config)
    frames, height, width = map(Axis.fixed, latent)
    sizes = Sizes(frames, height, width, text)

    def make() -> nn.Module:
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        return GraphWrapper(getattr(diffusers, config["_class_name"])(**options), family)

    def call(module: nn.Module) -> Callable[[], Any]:
        axes = family.axes(sizes)
        inputs = {
            spec.name: torch.ones(spec.sizes(axes), dtype=spec.dtype or torch.bfloat16) for spec in family.inputs(sizes)
        }
        return lambda: module(inputs)

    return count(make, call, torch.bfloat16), step_bytes_at(family, sizes, latent)


# --------------------------------------------------------------------------------------------------- the text encoders


def count_text(name: str) -> tuple[Counted, int]:
    """Return what a published text encoder works in, and the number of its weights in linear layers.

    Args:
        name: ``umt5-xxl``, ``t5-xxl`` or ``llama-3-8b``.
    """
    import transformers

    t5 = {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    made: dict[str, tuple[Any, Any, int]] = {
        "umt5-xxl": (transformers.UMT5EncoderModel, transformers.UMT5Config(vocab_size=256384, **t5), 512),
        "t5-xxl": (transformers.T5EncoderModel, transformers.T5Config(vocab_size=32128, **t5), 226),
        "llama-3-8b": (
            transformers.LlamaModel,
            transformers.LlamaConfig(
                vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8,
            ),
            351,
        ),
    }  # fmt: skip
    kind, config, tokens = made[name]
    linear: list[int] = []

    def call(module: nn.Module) -> Callable[[], Any]:
        linear.append(sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)))
        words = torch.ones(1, tokens, dtype=torch.long)
        return lambda: module(input_ids=words, attention_mask=words)

    return count(lambda: kind(config), call, torch.bfloat16), linear[0]


def main(wanted: list[str]) -> None:
    """Print estimates beside counts.

    Args:
        wanted: Names of VAEs, transformers or text encoders; empty for all.
    """
    for name in VAES:
        for frames, height, width in ((33, 480, 832), (81, 480, 832), (33, 736, 1280)) if chosen(name, wanted) else ():
            for tiled in (False, True):
                found = count_decode(name, frames, height, width, tiled=tiled)
                guess = decode_bytes(family_of(name), frames, height, width, tiled=tiled)
                how = "in tiles" if tiled else "whole"
                print(
                    f"VAE {name}, {found.weights / 1e6:.0f} M weights, {frames} frames of {height} × {width} {how}: "
                    f"counted {found.peak / MIB:.0f} MiB, estimated {guess / MIB:.0f} MiB",
                    flush=True,
                )
    for name in STEPS:
        if chosen(name, wanted):
            found, guess = count_step(name)
            print(f"step of {name}: counted {found.peak / MIB:.0f} MiB, estimated {guess / MIB:.0f} MiB", flush=True)
    for name in ("umt5-xxl", "t5-xxl", "llama-3-8b"):
        if chosen(name, wanted):
            found, linear = count_text(name)
            print(
                f"{name}: {found.weights} weights, {linear} of them in linear layers; counted {found.peak / MIB:.0f} MiB, "
                f"estimated {TEXT_BYTES / MIB:.0f} MiB",
                flush=True,
            )


def chosen(name: str, wanted: list[str]) -> bool:
    """Return whether a part was asked for."""
    return not wanted or name in wanted


if __name__ == "__main__":
    main(sys.argv[1:])
