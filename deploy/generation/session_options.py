"""How a generator of clips opens its sessions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import EngineSession, asks_for_pytorch, check_options, open_session
from dvdquant.deploy.sessions.guidance_pair import paired
from dvdquant.hardware.weights import WeightPolicy
from dvdquant.ops.attention.libraries import refuse_library_in_16_bit
from dvdquant.recipe import Recipe

__all__ = ["SessionOptions", "WrapSession"]

WrapSession = Callable[[EngineSession], EngineSession]


@dataclass(frozen=True)
class SessionOptions:
    """The options by which a generator opens its sessions.

    Args:
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; of the original model as well.
        wrap: Applied to every session as soon as it is open, to watch or replace what it runs; None leaves it.
        compile: Run in PyTorch, with the transformer's blocks compiled.
        attention: ``16``, ``int8`` or ``fp8`` instead of the recipe's attention, in PyTorch sessions.
        attention_backend: The library that computes it instead of the first of the ladder that fits.
        plugins: The TensorRT plugin libraries that engines need.
        offload: Keep the pipeline's other parts in the host's memory, and move each to the device while it runs.
        vae_tiling: Encode and decode images in tiles, one after the other.
        cfg_parallel: A second device for the second branch of guidance, or None to run both on ``device``.
        alternate: Load the text encoder first, and free it before the transformer is loaded.
        text_bits: Bits of the text encoder's weights: 16, 4, or 8 with torchao.
        bits: The activation bits that are loaded; None loads all of the export's.
        weights: ``auto``, ``packed`` or ``expanded``: how sessions hold quantized weights.
        fuse: Run in PyTorch, with what comes before quantized layers in their kernels; None where ``compile`` is on.
        cuda_graphs: Repeat steps as CUDA graphs, where launches count.
    """

    backend: str = "auto"
    device: str = "auto"
    wrap: WrapSession | None = None
    compile: bool = False
    attention: str | None = None
    attention_backend: str | None = None
    plugins: Sequence[Path] = ()
    offload: bool = False
    vae_tiling: bool = False
    cfg_parallel: str | None = None
    alternate: bool = False
    text_bits: int = 16
    bits: tuple[int, ...] | None = None
    weights: WeightPolicy = "auto"
    fuse: bool | None = None
    cuda_graphs: bool = False

    @property
    def in_pytorch(self) -> bool:
        """Return whether the other options make sessions run in PyTorch, whatever backend fits best."""
        return asks_for_pytorch(self.compile, self.fuse, self.attention_backend)

    def check(self) -> None:
        """Refuse options that do not go together or name nothing, before a session is opened.

        Raises:
            UnsupportedError: See :func:`.sessions.check_options`.
        """
        check_options(
            self.backend,
            self.plugins,
            self.compile,
            self.attention,
            self.attention_backend,
            self.weights,
            self.fuse,
        )

    def check_for(self, recipe: Recipe) -> None:
        """Refuse what :meth:`check` refuses, and what an export's recipe excludes, before anything of it is loaded.

        Args:
            recipe: The recipe of the export.

        Raises:
            UnsupportedError: See :func:`.sessions.open_session`.
        """
        self.check()
        refuse_library_in_16_bit(self.attention or recipe.attention, self.attention_backend)

    def open(self, artifact: Artifact, component: str, loras: Sequence[LoraSpec]) -> EngineSession:
        """Open the session of one transformer; where a LoRA or the wrapper fails, it is closed again.

        Args:
            artifact: The export.
            component: ``transformer`` or ``transformer_2``.
            loras: LoRAs to run beside its weights.

        Raises:
            DvdquantError: See :func:`.sessions.open_session` and :meth:`EngineSession.set_loras`.
        """
        session = self._session(artifact, component, self.device)
        if self.cfg_parallel is not None:
            session = paired(session, lambda device: self._session(artifact, component, device), self.cfg_parallel)
        try:
            if loras:
                session.set_loras(loras)
            return session if self.wrap is None else self.wrap(session)
        except BaseException:
            session.close()
            raise

    def _session(self, artifact: Artifact, component: str, device: str) -> EngineSession:
        return open_session(
            artifact,
            component,
            backend=self.backend,
            device=device,
            bits=self.bits,
            compile=self.compile,
            attention=self.attention,
            attention_backend=self.attention_backend,
            plugins=self.plugins,
            weights=self.weights,
            fuse=self.fuse,
            cuda_graphs=self.cuda_graphs,
        )
