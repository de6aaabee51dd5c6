"""A quantized model in PyTorch: its tensors are put into the skeleton, and it takes the inputs of the graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dvdquant.errors import ShapeError
from dvdquant.model.families import Family
from dvdquant.model.plan import ModelPlan
from dvdquant.model.quantized_model import quant_linears

__all__ = ["GraphWrapper", "fill_quantized"]


class GraphWrapper(nn.Module):
    """The transformer with the graph's inputs as one dictionary and one tensor as output.

    It takes a dictionary because torch.export loses the shape ranges of ``**kwargs``.

    Args:
        model: The transformer.
        family: The model family.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self._family = family

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Run the transformer and return the sample.

        Args:
            inputs: The inputs of the graph by name.
        """
        output: Tensor = self.model(**self._family.forward_kwargs(inputs), return_dict=False)[0]
        return output


def fill_quantized(model: nn.Module, plan: ModelPlan, read: Callable[[str], Tensor]) -> None:
    """Put the stored tensors into a :func:`dvdquant.model.plan.quantized_skeleton`.

    Args:
        model: The skeleton, which is changed in place.
        plan: The plan that it was built from.
        read: A function that returns a stored tensor by its name.

    Raises:
        ShapeError: A packed tensor has another shape or dtype, or one that stays has another shape or no floating dtype.
    """
    for layer in quant_linears(model).values():
        layer.load({name: read(name) for name in layer.spec.tensors()})
    for name, (_, shape) in plan.kept.items():
        value = read(name)
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise ShapeError(
                f"{name} is {value.dtype} {tuple(value.shape)}", available=f"expected floating point {shape}"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))
