"""Count the kernels that torch.compile makes of one transformer block at full size, without a GPU.

The block's quantized layers and its attention are opaque operations. Inductor writes Triton code for what lies between them;
this script makes it write that code for an SM 9.0 device that is not there, and counts launches and the bytes that they move.
Nothing is compiled to machine code and nothing runs.

    python benchmarks/compiled_launches.py                       # Wan 14B, 480p
    python benchmarks/compiled_launches.py --width 1536 --ffn 8960 --heads 12
    python benchmarks/compiled_launches.py --save block.py       # the code itself

Needs triton (``pip install triton``), which PyTorch for CUDA brings along.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dvdquant.model.layers import TENSORS, QuantLinear  # noqa: E402
from dvdquant.model.plan import plan_model, quantized_skeleton  # noqa: E402
from dvdquant.ops.prepared_linear import prepared_linear  # noqa: E402
from dvdquant.recipe import get_recipe  # noqa: E402

SM = 90


@torch.library.custom_op("dvdquant_bench::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand for the attention library: [B, S, H, d] each, the shape of q out."""
    return torch.empty_like(q)


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


class TracedLayer(QuantLinear):
    """A quantized layer in a trace: its prepared tensors are buffers, and its forward is the operation alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y: Tensor = prepared_linear(x, self.outer, self.prepared, self.pre_quant, *self.constants)
        return y


def wan_block(width: int, ffn: int, heads: int, bits: int) -> nn.Module:
    """Return one block of a quantized Wan with placeholders for its weights.

    Args:
        width: channels of the model.
        ffn: channels inside of the feed-forward network.
        heads: attention heads.
        bits: of the activations.
    """
    config = {
        "_class_name": "WanTransformer3DModel", "num_layers": 1, "num_attention_heads": heads,
        "attention_head_dim": width // heads, "ffn_dim": ffn, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
        "freq_dim": 256, "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "patch_size": [1, 2, 2],
    }  # fmt: skip
    plan = plan_model(config, get_recipe("w4a4"), torch.bfloat16)
    model = quantized_skeleton(plan, bits)
    grid = plan.recipe.activation(bits)
    for layer in [module for module in model.modules() if isinstance(module, QuantLinear)]:
        spec = layer.spec
        rotation = spec.rotation
        layer.__class__ = TracedLayer
        for name in TENSORS:
            layer._buffers[name] = None
        layer.register_buffer(
            "prepared", torch.empty(spec.out_features * spec.features, dtype=torch.uint8, device="meta")
        )
        layer.register_buffer("outer", torch.empty(rotation.outer, rotation.outer, device="meta"))
        smoothed = spec.smoothed or spec.shifted
        rows = torch.empty(spec.features // 8, 2, 8, dtype=torch.bfloat16, device="meta") if smoothed else None
        layer.register_buffer("pre_quant", rows)
        chosen = spec.activation(grid)
        layer.constants = (
            1,
            spec.out_features,
            spec.groups,
            spec.float_zero_point,
            rotation.inner,
            chosen.bits,
            chosen.group_size,
        )
    return model.get_submodule("blocks.0")


def trace(
    block: nn.Module, width: int, heads: int, tokens: int, text: int
) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Return the block's graph and its inputs, on a CUDA device that is not there."""
    import diffusers.models.transformers.transformer_wan as wan
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    def of_cpu(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    mode = FakeTensorMode()
    with mode:
        weights = {n: of_cpu(t) for n, t in (*block.named_parameters(), *block.named_buffers())}
        head = width // heads
        tables = [torch.empty(1, tokens, 1, head) for _ in range(2)]
        inputs = [
            torch.empty(1, tokens, width, dtype=torch.bfloat16),
            torch.empty(1, text, width, dtype=torch.bfloat16),
            torch.empty(1, 6, width, dtype=torch.bfloat16),
            *tables,
            *weights.values(),
        ]

    def call(x: Tensor, words: Tensor, time: Tensor, cosines: Tensor, sines: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(block, dict(zip(weights, values)), (x, words, time, (cosines, sines)))
        return y

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        y: Tensor = attention(q, k, v)
        return y

    with torch.no_grad(), mode, mock.patch.object(wan, "dispatch_attention_fn", attend):
        pure = torch.func.functionalize(call, remove="mutations")
        graph = make_fx(pure, decomposition_table=select_decomp_table())(*inputs)
        # Before the tensors pretend to be on a GPU: these passes copy some of them, which asks for a real one.
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(graph, is_inference=True)

    def to_cuda(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return type(value)(map(to_cuda, value)) if isinstance(value, (tuple, list)) else value

    with mode:
        for node in graph.graph.nodes:
            node.kwargs = {k: torch.device("cuda", 0) if k == "device" else v for k, v in node.kwargs.items()}
            node.meta.pop("tensor_meta", None)
            if "val" in node.meta:
                node.meta["val"] = to_cuda(node.meta["val"])
        inputs = [to_cuda(tensor) for tensor in inputs]
    return graph, inputs


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Make torch and triton believe in an H100, as far as writing code goes."""
    import torch._dynamo.device_interface as interfaces
    import torch.utils._triton as has
    import triton
    from triton.backends.compiler import GPUTarget

    properties = types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30, gcnArchName="",
        shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = {
        "is_available": True, "get_device_properties": properties, "get_compute_capability": SM, "device_count": 1,
        "current_device": 0, "is_triton_capable": True, "raise_if_triton_unavailable": None, "is_bf16_supported": True,
    }  # fmt: skip
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", SM, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0, is_active=lambda: True, get_benchmarker=lambda: None,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            said = staticmethod(lambda *_, answer=answer, **__: answer)
            stack.enter_context(mock.patch.object(interfaces.CudaInterface, name, said))
        for name, answer in {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
            "get_device_capability": (9, 0),
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(has, "has_triton", return_value=True))
        triton.runtime.driver.set_active(target)
        yield


def triton_code(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> tuple[str, int]:
    """Return the Python that inductor would run for the graph, and the bytes that its own kernels read and write."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = next(m for t in inputs if (m := getattr(t, "fake_mode", None)) is not None)
    with mode, torch.no_grad(), V.set_fake_mode(mode):
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code = lowering.codegen()
            moved = sum(
                node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes if not node.is_extern()
            )
    first = code[0]
    return (first.value if hasattr(first, "value") else str(first)), moved


def main() -> None:
    """Print launches and opaque calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=5120, help="channels; 5120 is Wan 14B")
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=32760, help="32760 is 81 frames of 480x832")
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--bits", type=int, default=8, choices=(4, 8))
    parser.add_argument("--save", type=Path, help="write inductor's code there")
    given = parser.parse_args()
    block = wan_block(given.width, given.ffn, given.heads, given.bits)
    graph, inputs = trace(block, given.width, given.heads, given.tokens, given.text)
    with pretended_gpu():
        code, moved = triton_code(graph, inputs)
    if given.save is not None:
        given.save.write_text(code)
    launches = re.findall(r"\b(triton_\w+)\.run\(", code)
    for name in launches:
        print(name)
    layers = len(re.findall(r"prepared_linear\.default\(", code))
    print(f"{len(launches)} launches that move {moved / 1e9:.1f} GB; opaque: {layers} quantized layers, "
          f"{code.count('attention.default(')} attentions")  # fmt: skip


if __name__ == "__main__":
    main()
