"""All that is used of transformers without being public: how a model's weights are packed while they are loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dvdquant.errors import UnsupportedError
from dvdquant.system.hooks import hook, lost_hook, require_name

__all__ = ["REQUIREMENT", "check_packing_hooks", "lost_packing", "register_packing"]

REQUIREMENT = "transformers>=5.3,<5.30"

_WHY = "to load a text encoder in 4 bits"
_QUANTIZER = "transformers.quantizers.base:HfQuantizer"
_BEFORE = "_process_model_before_weight_loading"


@functools.cache
def check_packing_hooks() -> None:
    """Refuse a transformers that packs weights in another way, before anything is loaded.

    A method of ours whose name transformers does not call would leave a text encoder in 16 bit, without an error.

    Raises:
        UnsupportedError: A name is gone, or transformers does not call it any more; with a release that does.
    """
    for path in (
        "transformers.core_model_loading:ConversionOps.convert",
        "transformers.quantizers.auto:register_quantization_config",
        "transformers.quantizers.auto:register_quantizer",
        "transformers.utils.quantization_config:QuantizationConfigMixin",
        *(f"{_QUANTIZER}.{name}" for name in (_BEFORE, "param_needs_quantization", "get_quantize_ops")),
    ):
        hook("transformers", path, _WHY, REQUIREMENT)
    require_name("transformers", f"{_QUANTIZER}.preprocess_model", _BEFORE, _WHY, REQUIREMENT)


def lost_packing(class_name: str) -> UnsupportedError:
    """Return the error for a model whose layers transformers left as they were.

    Args:
        class_name: The class of the model.
    """
    return lost_hook("transformers", f"call of the quantizer that packs {class_name}", _WHY, REQUIREMENT)


def register_packing(
    method: str, pack: Callable[[Tensor], Tensor], put_layers_in: Callable[[Any], None], layer: type[nn.Module]
) -> type[Any]:
    """Tell transformers of a method of quantization; return the class of its configuration.

    Args:
        method: The name of the method.
        pack: A function that packs a weight as the checkpoint has it.
        put_layers_in: A function that replaces layers of a model before their weights are loaded.
        layer: The class of the layers whose ``weight`` is packed.

    Raises:
        UnsupportedError: See :func:`check_packing_hooks`.
    """
    check_packing_hooks()
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Pack(ConversionOps):
        """A weight as the checkpoint has it -> its packed rows."""

        def convert(self, input_dict: dict[str, Any], **more: Any) -> dict[str, Tensor]:
            del more
            found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
            return {name: nn.Parameter(pack(value), requires_grad=False) for name, value in found.items()}

    @register_quantization_config(method)
    class Config(QuantizationConfigMixin):
        """Nothing is to be said: all layers are packed that can be."""

        def __init__(self, **more: Any) -> None:
            del more
            self.quant_method = method

    @register_quantizer(method)
    class Quantizer(HfQuantizer):
        """Replaces layers before their weights are loaded."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **more: Any) -> None:
            del more
            put_layers_in(model)

        def param_needs_quantization(self, model: nn.Module, param_name: str, **more: Any) -> bool:
            del more
            owner, _, kind = param_name.rpartition(".")
            return kind == "weight" and isinstance(model.get_submodule(owner), layer)

        def get_quantize_ops(self) -> Any:
            return Pack()

        def is_serializable(self, **more: Any) -> bool:
            del more
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    return Config
