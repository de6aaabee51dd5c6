"""The PyTorch backend: the diffusers transformer with QuantLinear modules, on the CPU or a GPU."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import EngineError
from dvdquant.export.onnx import GraphWrapper
from dvdquant.export.verify import fill_quantized
from dvdquant.layers import QuantLinear, prepare_layers, set_activation
from dvdquant.model import quantized_skeleton
from dvdquant.ops.cuda_linear import usable_kernels
from dvdquant.recipe import Recipe

from .base import EngineSession
from .weights import WeightFiles

__all__ = ["PyTorchSession"]

log = logging.getLogger(__name__)


class PyTorchSession(EngineSession):
    """One model for all bit-widths: switching sets the activation grid of its QuantLinear modules.

    On the CPU the weights are the mapped files themselves. On a GPU that the kernels are built for, each layer is held as
    they multiply it, once per path that the session's bit-widths take: as 4 or 8 bits a weight, see ``kernels/README.md``.
    On another GPU the packed weights are copied there.
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
        kernels = usable_kernels(self.device)
        plan = artifact.plan(component)
        self._recipe = plan.recipe
        self._advice = None if kernels is None or 8 not in self.bits else bits_advice(kernels.sm, plan.recipe)
        self._current = self.bits[0]
        self._files = WeightFiles(artifact, component)
        try:
            model = quantized_skeleton(plan, self._current)
            fill_quantized(model, plan, self._files.tensor)
            if kernels is not None:
                grids = [plan.recipe.activation(width) for width in self.bits]
                for name, reason in prepare_layers(model, kernels, grids, plan.dtype, self.device).items():
                    log.info("%s stays packed: %s", name, reason)
            self._model: nn.Module | None = GraphWrapper(model.to(self.device), self.family)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the weights of {component} do not fit {self.device}: {error}", fix="close other sessions"
            ) from error
        if self.device.type != "cpu":
            self._files.drop_pages()

    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        model = self._model
        assert model is not None
        if bits == 4 and self._advice:
            _say_once(self._advice)
        if bits != self._current:
            set_activation(model, self._recipe.activation(bits))
            self._current = bits
        with torch.inference_mode():
            output: Tensor = model(inputs)
        # A copy made out here is an ordinary tensor, which schedulers may change in place.
        return output.to(self.dtype, copy=True)

    def resident_bytes(self) -> dict[str, int]:
        """``workspace`` is the least: the largest layer's, of its kernels at the export's largest size, or its weight in fp32,
        which the reference op expands in each call."""
        if self._model is None:
            return {"weights": 0, "engines": 0, "workspace": 0}
        held = {t.data_ptr(): t.nbytes for t in (*self._model.parameters(), *self._model.buffers())}
        layers = [m for m in self._model.modules() if isinstance(m, QuantLinear)]
        kernels = [layer.kernel for layer in layers if layer.kernel is not None]
        tokens = self.family.tokens(*self.sizes.at("max")) * self.sizes.batch
        scratch = [kernel.workspace_bytes(tokens) for kernel in kernels]
        scratch += [4 * layer.spec.out_features * layer.spec.features for layer in layers if layer.kernel is None]
        weights = sum(held.values()) + sum(kernel.nbytes for kernel in kernels)
        return {"weights": weights, "engines": 0, "workspace": max(scratch)}

    def _close(self) -> None:
        self._model = None
        self._files.close()


def bits_advice(sm: int, recipe: Recipe) -> str | None:
    """What to say before a step with 4-bit activations on a GPU whose tensor cores gain nothing by them."""
    if sm < 90:
        return None
    time = "save no time here"
    if sm == 90 and recipe.activation(4).group_size:
        time = "take longer here, with their scales per group"
    return (
        f"SM {sm / 10} has no 4-bit integer tensor cores: steps with 4-bit activations {time}, and 8 bits are nearer to the "
        "original; --mode a8 runs all steps so"
    )


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)
