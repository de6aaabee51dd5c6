"""The PyTorch backend: the diffusers transformer with QuantLinear modules, on the CPU or a GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import EngineError
from dvdquant.export.onnx import GraphWrapper
from dvdquant.export.verify import fill_quantized
from dvdquant.layers import QuantLinear, set_activation
from dvdquant.model import quantized_skeleton
from dvdquant.ops.cuda_linear import kernels_for

from .base import EngineSession
from .weights import WeightFiles

__all__ = ["PyTorchSession"]

log = logging.getLogger(__name__)


class PyTorchSession(EngineSession):
    """One model for all bit-widths: switching sets the activation grid of its QuantLinear modules.

    On the CPU the weights are the mapped files themselves; on a GPU they are copied there once.
    """

    backend = "pytorch"

    def __init__(
        self,
        artifact: Artifact,
        component: str = "transformer",
        bits: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(artifact, component, bits, device or torch.device("cpu"))
        plan = artifact.plan(component)
        self._recipe = plan.recipe
        self._current = self.bits[0]
        self._files = WeightFiles(artifact, component)
        try:
            model = quantized_skeleton(plan, self._current)
            fill_quantized(model, plan, lambda name: self._files.tensor(name).to(self.device))
            # What is left are tables the skeleton computed.
            self._model: nn.Module | None = GraphWrapper(model.to(self.device), self.family)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the weights of {component} do not fit {self.device}: {error}", fix="close other sessions"
            ) from error
        if self.device.type != "cpu":
            self._files.drop_pages()
            kernels = kernels_for(self.device)
            advice = None if kernels is None else bits_advice(kernels.sm, self.bits)
            if advice:
                log.warning(advice)

    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        model = self._model
        assert model is not None
        if bits != self._current:
            set_activation(model, self._recipe.activation(bits))
            self._current = bits
        with torch.inference_mode():
            output: Tensor = model(inputs)
        # A copy made out here is an ordinary tensor, which schedulers may change in place.
        return output.to(self.dtype, copy=True)

    def resident_bytes(self) -> dict[str, int]:
        """``workspace`` is the least: the largest layer's weight in fp32, which the reference op expands in each call."""
        if self._model is None:
            return {"weights": 0, "engines": 0, "workspace": 0}
        tensors = [*self._model.parameters(), *self._model.buffers()]
        held = {t.data_ptr(): t.nbytes for t in tensors}
        layers = [m.spec for m in self._model.modules() if isinstance(m, QuantLinear)]
        largest = max(4 * spec.out_features * spec.features for spec in layers)
        return {"weights": sum(held.values()), "engines": 0, "workspace": largest}

    def _close(self) -> None:
        self._model = None
        self._files.close()


def bits_advice(sm: int, bits: Sequence[int]) -> str | None:
    """What to say where a session switches to 4 bits on a GPU whose tensor cores gain nothing by it."""
    if sm < 90 or len(bits) < 2:
        return None
    return (
        f"SM {sm / 10} has no 4-bit integer tensor cores: steps with 4-bit activations save no time here, with scales per "
        "group they take longer, and 8 bits are nearer to the original; --mode a8 runs all steps so"
    )
