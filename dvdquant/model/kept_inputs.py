"""What is not quantized and is an input of engines, so that the engines of all bit-widths read one copy of it."""

from __future__ import annotations

import torch

from dvdquant.model.plan import ModelPlan

__all__ = ["LARGE", "kept_inputs", "kept_inputs_bytes"]

# In every published model the matrices of embedders, modulation and the last projection are at least this large. Norms, biases
# and tables of modulation are smaller: they are 0.2 % of the weights or less, and builders fold them into what is next to them.
LARGE = 128 << 10


def kept_inputs(plan: ModelPlan, plugin: bool) -> dict[str, int]:
    """Return the tensors in 16 or 32 bit that are inputs of a transformer's engines: name -> bytes.

    1. Engines with the plugin read those of :data:`LARGE` bytes or more from outside. As constants, each engine would hold its
       own copy. Products with a matrix that is an input read the same bytes, and the builder may only not rearrange it once and
       for all: it reads few megabytes a step in another order, or transposes them.
    2. Engines that have a place for LoRAs read all of them from outside, because a LoRA may change each.
    3. The kernel and the bias of a convolution stay constants: builders choose kernels by them.
    4. Other engines hold what is not quantized in themselves, as they hold the quantized weights.

    Args:
        plan: The plan of the model.
        plugin: Whether the engines have the TensorRT plugin.
    """
    if not plan.lora_rank and not plugin:
        return {}
    least = 0 if plan.lora_rank else LARGE
    kernels = {name for name, (_, shape) in plan.kept.items() if name.endswith(".weight") and len(shape) > 2}
    biases = {f"{name.removesuffix('.weight')}.bias" for name in kernels}
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in plan.kept.items()}
    return {name: size for name, size in sizes.items() if size >= least and name not in kernels | biases}


def kept_inputs_bytes(plan: ModelPlan, plugin: bool) -> int:
    """Return the bytes of :func:`kept_inputs` together.

    Args:
        plan: The plan of the model.
        plugin: Whether the engines have the TensorRT plugin.
    """
    return sum(kept_inputs(plan, plugin).values())
