"""What stands where ComfyUI's models have their transformer: an export, opened when ComfyUI loads the model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.comfyui.calls import refuse_foreign, wan_arguments
from dvdquant.deploy.comfyui.places import plugin_libraries
from dvdquant.deploy.comfyui.sampling import OPTION, SamplingRun, Settings
from dvdquant.deploy.generation.session_options import SessionOptions
from dvdquant.deploy.pipelines.adapters import get_adapter
from dvdquant.deploy.sessions import EngineSession
from dvdquant.errors import UnsupportedError

__all__ = ["ExportedTransformer"]

log = logging.getLogger(__name__)
_TIMESTEPS = 1000.0


class _Face(nn.Module):
    """An embedding without weights, whose shape tells ComfyUI the number of input channels.

    Args:
        channels: The input channels of the transformer.
    """

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, channels), persistent=False)


class ExportedTransformer(nn.Module):
    """The transformer of an export with the face of ComfyUI's ``WanModel``. It holds no parameters.

    The session is opened at :meth:`load`, at the latest by the first call, and freed by :meth:`unload`.

    Args:
        root: The export folder.
        component: ``transformer``, ``transformer_2``, or "" for the first of the export.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        device: The device that ComfyUI computes on.
        options: More fields of :class:`.SessionOptions`, such as ``compile``.

    Raises:
        OutputError: The folder is no export, or has no such component.
        UnsupportedError: ComfyUI's nodes do not know the model's family or the device, or options exclude each other.
    """

    def __init__(self, root: Path, component: str, backend: str, device: torch.device, **options: Any) -> None:
        super().__init__()
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"ComfyUI computes on {device}", available="cpu, cuda", fix="use an NVIDIA GPU")
        self._options = SessionOptions(backend=backend, device=str(device), **options)
        self._options.check()
        self.artifact = Artifact.open(root)
        self._options.check_for(self.artifact.recipe)
        self.component = component or self.artifact.components[0]
        self.family = self.artifact.family(self.component)
        if self.family.name != "wan":
            raise UnsupportedError(
                f"{root} is an export of {self.family.name}",
                available="Wan 2.1 and 2.2",
                fix="use it in its diffusers pipeline: dvdquant.DvdqTransformer",
            )
        self.dtype = self.artifact.dtype  # what ComfyUI casts latents and text to
        self.patch_embedding = _Face(self.family.config["in_channels"])
        self._adapter = get_adapter(self.family, self.artifact.sizes, self.dtype)
        self._session: EngineSession | None = None
        self._run: SamplingRun | None = None

    # -------------------------------------------------------------------------------------------------------- memory

    @property
    def session(self) -> EngineSession:
        """Return the session, which is opened if it is not."""
        if self._session is None:
            how = self._options
            if how.backend in ("auto", "tensorrt"):
                how = dataclasses.replace(how, plugins=plugin_libraries())
            self._session = how.open(self.artifact, self.component, ())
            log.info("dvdquant: %s runs on %s", self.artifact.root.name, self._session.backend)
        return self._session

    def load(self) -> int:
        """Open the session, and return the bytes that it holds."""
        return sum(self.session.resident_bytes().values())

    def unload(self) -> None:
        """Free weights and engines. The next call opens them again."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    @property
    def loaded(self) -> bool:
        """Return whether the session is open."""
        return self._session is not None

    def weight_bytes(self) -> int:
        """Return the bytes of the weight files, which a session takes at least."""
        files = self.artifact.manifest.files
        return sum(files[name]["bytes"] for name in self.artifact.weight_files(self.component))

    # ------------------------------------------------------------------------------------------------------- sampling

    @contextlib.contextmanager
    def sampling(self, settings: Settings, sigmas: Sequence[float]) -> Iterator[SamplingRun]:
        """Run the calls in the ``with`` block as the steps of one sampler.

        Args:
            settings: What the nodes asked for.
            sigmas: The noise levels of the sampler, falling, one more than it has steps.

        Raises:
            UnsupportedError: The settings contradict the export or the sampler.
        """
        session, before = self.session, self._run
        if session.loras != settings.loras:
            session.set_loras(settings.loras)
        run = self._run = SamplingRun(session, self._adapter, settings, sigmas)
        try:
            yield run
        finally:
            run.runner.forget_outputs()
            self._run = before

    @torch.compiler.disable  # a compiled caller runs the engines as they are
    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        control: object = None,
        **more: Any,
    ) -> Tensor:
        """Run the transformer as ComfyUI calls its ``WanModel``.

        Args:
            x: Latents with their conditions on the channel axis, [B, C, F, H, W].
            timestep: 1000 · σ, [B] or [B, F].
            context: The text embedding, [B, L, D].
            clip_fea: The embedding of CLIP vision, or None.
            time_dim_concat: Refused: reference frames after the clip.
            transformer_options: ComfyUI's options of this call.
            control: Refused: the output of a ControlNet.
            **more: Refused, but for the mask of Wan 2.2 TI2V, which is in the timesteps already.

        Returns:
            The velocity, [B, C_out, F, H, W], in the export's dtype on the device of ``x``.

        Raises:
            ShapeError: Latents or text do not fit the export.
            UnsupportedError: The call asks for what an engine does not have.
            EngineError: The engine failed, or gave NaN at the highest bits too.
        """
        options = transformer_options or {}
        refuse_foreign(options, control, {**more, "time_dim_concat": time_dim_concat})
        arguments = wan_arguments(x, timestep, context, clip_fea, self.family, self.artifact.sizes)
        indices, ids = options.get("cond_or_uncond") or [0], options.get("uuids") or []
        sigma = _sigma(options, timestep)
        with contextlib.ExitStack() as stack:
            run = self._run
            if run is None:  # a node that calls the model by itself, outside of a sampler
                settings = options.get(OPTION) or Settings(mode=f"a{self.session.bits[-1]}")
                run = stack.enter_context(self.sampling(settings, _levels(options, sigma)))
            output = run.call(arguments, sigma, indices, ids)
        frames, height, width = x.shape[2:]
        return output[:, :, :frames, :height, :width].to(x.device)


def _sigma(options: dict[str, Any], timestep: Tensor) -> float:
    """Return the noise level of a call: ComfyUI's own number, or that of the timestep."""
    sigmas = options.get("sigmas")
    return float(timestep.max()) / _TIMESTEPS if sigmas is None else float(sigmas.max())


def _levels(options: dict[str, Any], sigma: float) -> list[float]:
    sigmas = options.get("sample_sigmas")
    return [sigma, 0.0] if sigmas is None else [float(level) for level in sigmas]
