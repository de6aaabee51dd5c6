"""A quantized model in PyTorch: its tensors put into the skeleton, and its call with the inputs of the graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dvdquant.model.families import Family
from dvdquant.model.layers import QuantLinear
from dvdquant.model.plan import ModelPlan

__all__ = ["GraphWrapper", "fill_quantized"]


class GraphWrapper(nn.Module):
    """The transformer with the graph's inputs as one dictionary and one tensor as output.

    A dictionary, because torch.export loses the shape ranges of ``**kwargs``.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self._family = family

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Family inputs -> sample."""
        output: Tensor = self.model(**self._family.forward_kwargs(inputs), return_dict=False)[0]
        return output


def fill_quantized(model: nn.Module, plan: ModelPlan, read: Callable[[str], Tensor]) -> None:
    """Put the stored tensors into a :func:`dvdquant.model.plan.quantized_skeleton`; ``read`` gives one by its name."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.load({name: read(name) for name in module.spec.tensors()})
    for name in plan.kept:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(read(name), requires_grad=False))
