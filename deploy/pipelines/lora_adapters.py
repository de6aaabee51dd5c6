"""LoRAs that a transformer runs beside its quantized weights, by the methods that diffusers has for adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.pipelines.unsupported import refuse
from dvdquant.deploy.sessions import EngineSession
from dvdquant.errors import UnsupportedError

__all__ = ["Adapters", "LoraAdapters"]


@dataclasses.dataclass
class Adapters:
    """The LoRAs beside the weights of a session, which all transformers on the session share.

    Args:
        specs: The LoRAs by name.
        on: Whether they run.
    """

    specs: dict[str, LoraSpec] = dataclasses.field(default_factory=dict)
    on: bool = True


class LoraAdapters:
    """The part of a transformer that loads LoRAs and switches them.

    Attributes:
        _session: The session that runs them.
        _adapters: Those that are loaded.
    """

    _session: EngineSession
    _adapters: Adapters

    def load_lora_adapter(
        self, path: str | Path, scale: float = 1.0, adapter_name: str = "default", **unknown: Any
    ) -> None:
        """Run a LoRA beside the quantized weights, in 16 bit; an adapter of this name that is there already is replaced.

        It is a branch of its own next to every layer that it changes: W_q·x + scale · alpha / rank · B·(A·x). LoRAs that
        were fused when the model was exported stay in the weights.

        Args:
            path: The safetensors file.
            scale: Its strength.
            adapter_name: Its name, for :meth:`set_adapters` and :meth:`delete_adapters`.
            **unknown: Refused: a pipeline's ``load_lora_weights`` comes with tensors that it has converted.

        Raises:
            UnsupportedError: The export reserves no inputs for it and the backend is not ``pytorch``, its rank is larger than
                what is reserved, or it is no path.
            CheckpointError: The file is no LoRA of this model.
        """
        if unknown or not isinstance(path, (str, Path)):
            refuse(
                "load_lora_weights of a pipeline",
                "a LoRA is read from its file here",
                "call pipe.transformer.load_lora_adapter(FILE, scale)",
            )
        self._set_loras(
            {**self._adapters.specs, adapter_name: LoraSpec(Path(path).expanduser(), float(scale))}, self._adapters.on
        )

    def set_adapters(self, adapter_names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Run these adapters at these scales, and no others; the others stay loaded at scale 0.

        Args:
            adapter_names: The names they were loaded under.
            weights: A scale for each, or one for all. The default is 1.

        Raises:
            UnsupportedError: No adapter has such a name, or there are more or fewer scales than names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        scales = list(weights) if isinstance(weights, Sequence) else [1.0 if weights is None else weights] * len(names)
        if len(scales) != len(names):
            raise UnsupportedError(
                f"{len(scales)} scales for {len(names)} adapters", fix="give one for each, or one for all"
            )
        self._require_adapters(names)
        chosen = dict(zip(names, scales))
        loras = {n: dataclasses.replace(s, scale=float(chosen.get(n, 0.0))) for n, s in self._adapters.specs.items()}
        self._set_loras(loras, True)

    def active_adapters(self) -> list[str]:
        """Return the names of the adapters that run."""
        return [name for name, spec in self._adapters.specs.items() if spec.scale and self._adapters.on]

    def enable_lora(self) -> None:
        """Switch the loaded adapters on again."""
        self._set_loras(self._adapters.specs, True)

    def disable_lora(self) -> None:
        """Switch the loaded adapters off: the outputs are those of the export, bit by bit."""
        self._set_loras(self._adapters.specs, False)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unload some adapters.

        Args:
            adapter_names: The names they were loaded under.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._require_adapters(names)
        self._set_loras(
            {name: spec for name, spec in self._adapters.specs.items() if name not in names}, self._adapters.on
        )

    def unload_lora(self) -> None:
        """Unload all adapters."""
        self._set_loras({}, True)

    def _require_adapters(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self._adapters.specs]:
            raise UnsupportedError(
                f"no adapter is called {unknown[0]!r:.100}",
                available=list(self._adapters.specs),
                fix="load_lora_adapter first",
            )

    def _set_loras(self, loras: Mapping[str, LoraSpec], on: bool) -> None:
        self._session.set_loras([spec for spec in loras.values() if spec.scale] if on else ())
        self._adapters.specs, self._adapters.on = dict(loras), on
