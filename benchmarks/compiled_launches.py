"""Count the kernels that torch.compile makes of one transformer block at full size, without a GPU.

The block's quantized layers and its attention are opaque operations. Inductor writes Triton code for what lies between them;
this script makes it write that code for an SM 9.0 device that is not there, and counts launches and the bytes that they move.
Nothing is compiled to machine code and nothing runs.

    python benchmarks/compiled_launches.py                       # Wan 14B, 480p
    python benchmarks/compiled_launches.py --width 1536 --ffn 8960 --heads 12
    python benchmarks/compiled_launches.py --fuse                # with norms and GELU in the layers' kernels
    python benchmarks/compiled_launches.py --fuse --rope         # and with norm and rope of q and k in 8-bit attention's
    python benchmarks/compiled_launches.py --ranged              # one code for all sizes
    python benchmarks/compiled_launches.py --save block.py       # the code itself

Needs triton (``pip install triton``), which PyTorch for CUDA brings along.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dvdquant.deploy.sessions.fusion import fuse_graph  # noqa: E402
from dvdquant.deploy.sessions.rope_fusion import fuse_attention  # noqa: E402
from dvdquant.model.layers import TENSORS, QuantLinear  # noqa: E402
from dvdquant.model.plan import plan_model, quantized_skeleton  # noqa: E402
from dvdquant.model.quantized_model import quant_linears  # noqa: E402
from dvdquant.ops.attention import operation  # noqa: E402
from dvdquant.ops.prepared_linear import prepared_linear  # noqa: E402
from dvdquant.recipe import get_recipe  # noqa: E402

SM = 90


@torch.library.custom_op("dvdquant_bench::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand for the attention library.

    Args:
        q: The queries [B, S, H, d].
        k: The keys, in the same form.
        v: The values, in the same form.

    Returns:
        A tensor of the shape of q.
    """
    return torch.empty_like(q)


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return a tensor of the shape of q, for traces."""
    return torch.empty_like(q)


class TracedLayer(QuantLinear):
    """A quantized layer in a trace: its prepared tensors are buffers, and its forward is the operation alone."""

    constants: tuple[int | bool, ...]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: The input [..., K].

        Returns:
            The output [..., N].
        """
        y: Tensor = prepared_linear(x, self.outer, self.prepared, self.pre_quant, *self.constants)
        return y


def wan_block(width: int, ffn: int, heads: int, bits: int) -> nn.Module:
    """Return one block of a quantized Wan with placeholders for its weights.

    Args:
        width: The channels of the model.
        ffn: The channels inside of the feed-forward network.
        heads: The number of attention heads.
        bits: The bits of the activations.
    """
    config = {
        "_class_name": "WanTransformer3DModel", "num_layers": 1, "num_attention_heads": heads,
        "attention_head_dim": width // heads, "ffn_dim": ffn, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
        "freq_dim": 256, "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "patch_size": [1, 2, 2],
    }  # fmt: skip
    plan = plan_model(config, get_recipe("w4a4"), torch.bfloat16)
    model = quantized_skeleton(plan, bits)
    grid = plan.recipe.activation(bits)
    for layer in quant_linears(model).values():
        spec = layer.spec
        rotation = spec.rotation
        layer.__class__ = TracedLayer
        assert isinstance(layer, TracedLayer)
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
    block: nn.Module,
    width: int,
    heads: int,
    tokens: int,
    text: int,
    fuse: bool = False,
    rope: bool = False,
    ranged: bool = False,
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Return the block's graph and its inputs, on a CUDA device that is not there.

    Args:
        block: The block; see :func:`wan_block`.
        width: The channels of the model.
        heads: The number of attention heads.
        tokens: The number of video tokens.
        text: The number of text tokens.
        fuse: Take what comes before the layers into their kernels first, as sessions do.
        rope: Take norm and rope of q and k into a kernel, too, as before 8-bit attention.
        ranged: Leave the numbers of tokens open, as sessions of exports for a range of sizes do.
    """
    import diffusers.models.transformers.transformer_wan as wan
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    def of_cpu(tensor: Tensor) -> Tensor:
        """Return a fake tensor of the same shape and dtype on the CPU."""
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def sampled(video: int | torch.SymInt, words: int | torch.SymInt) -> list[Tensor]:
        """Return what a block gets for so many tokens: x, the words, the time, and the two tables of rope."""
        return [
            torch.empty(1, video, width, dtype=torch.bfloat16),
            torch.empty(1, words, width, dtype=torch.bfloat16),
            torch.empty(1, 6, width, dtype=torch.bfloat16),
            *(torch.empty(1, video, 1, width // heads) for _ in range(2)),
        ]

    # 1. Make fake inputs and weights on the CPU. With ranged sizes the numbers of tokens are symbols.
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    lengths = {size: _symbol(shapes, size) if ranged else size for size in (tokens, text)}
    with mode:
        weights = {n: of_cpu(t) for n, t in (*block.named_parameters(), *block.named_buffers())}
        inputs: list[Any] = [*sampled(lengths[tokens], lengths[text]), *weights.values()]

    # 2. Trace the block, with attention as an opaque operation.
    def call(x: Tensor, words: Tensor, time: Tensor, cosines: Tensor, sines: Tensor, *values: Tensor) -> Tensor:
        """Run the block with the given weights."""
        y: Tensor = torch.func.functional_call(block, dict(zip(weights, values)), (x, words, time, (cosines, sines)))
        return y

    def renewed(value: Any) -> Any:
        """Return a fake value like one of the compiler's, whose open sizes are ours."""
        if isinstance(value, Tensor):
            return torch.empty([renewed(size) for size in value.shape], dtype=value.dtype)
        if not isinstance(value, torch.SymInt):
            return value
        size = value.node.hint
        if size not in lengths:
            lengths[size] = _symbol(shapes, size)
        return lengths[size]

    def fused() -> tuple[Callable[..., Tensor], list[Any]]:
        """Return the block as sessions fuse it, and what it takes. The memory is asked for and never touched."""
        held: list[Any] = []

        def keep(graph: torch.fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
            """Keep the graph in place of compiling it."""
            if rope:
                fuse_attention(graph, number=1)
            fuse_graph(graph)
            held.extend((graph, values))
            return lambda *_: (values[0],)

        x, words, time, *tables = sampled(tokens, text)
        compiled = torch.compile(block.to_empty(device="cpu"), backend=keep, fullgraph=True, dynamic=ranged)
        # Open sizes make the norms' epsilons inputs as well; as constants they are what inductor makes of them.
        with torch._dynamo.config.patch(specialize_float=True):
            compiled(x, words, time, tables)
        graph, values = held
        with mode:
            return (lambda *given: graph(*given)[0]), [renewed(value) for value in values]

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """Stand for diffusers' attention."""
        y: Tensor
        if rope and q.shape == k.shape:
            y = operation.attention(q, k, v, None, q.shape[-1] ** -0.5, number)
        else:
            y = attention(q, k, v)
        return y

    number = torch.tensor(1)  # of a session that is not there
    whole: Callable[..., Tensor] = call
    with torch.no_grad(), mock.patch.object(wan, "dispatch_attention_fn", attend):
        if fuse:
            whole, inputs = fused()
    with torch.no_grad(), mode, mock.patch.object(wan, "dispatch_attention_fn", attend):
        pure = torch.func.functionalize(whole, remove="mutations")
        graph = make_fx(pure, decomposition_table=select_decomp_table())(*inputs)
        # Before the tensors pretend to be on a GPU: these passes copy some of them, which asks for a real one.
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(graph, is_inference=True)

    # 3. Move the graph to the GPU that is not there.
    def to_cuda(value: Any) -> Any:
        """Return the value with its tensors on the GPU that is not there."""
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return type(value)(map(to_cuda, value)) if isinstance(value, (tuple, list)) else value

    with mode:
        for node in graph.graph.nodes:
            node.kwargs = {k: torch.device("cuda", 0) if k == "device" else v for k, v in node.kwargs.items()}
            node.meta.pop("tensor_meta", None)
            if "val" in node.meta:
                node.meta["val"] = to_cuda(node.meta["val"])
        inputs = [to_cuda(value) for value in inputs]
    return graph, inputs


def _symbol(shapes: ShapeEnv, value: int) -> torch.SymInt:
    """Return an open number for the shapes of fake tensors, which is ``value`` where inductor needs an example."""
    source = ConstantSource(f"size_{value}")
    symbol = shapes.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
    made = shapes.create_symintnode(symbol, hint=value, source=source)
    assert isinstance(made, torch.SymInt)
    return made


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Make torch and triton believe in an H100, as far as writing code goes."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.scheduler as scheduler
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
        for place in (has, scheduler):
            stack.enter_context(mock.patch.object(place, "has_triton", return_value=True))
        triton.runtime.driver.set_active(target)
        yield


def triton_code(graph: torch.fx.GraphModule, inputs: list[Any]) -> tuple[str, int]:
    """Return the Python that inductor would run for the graph, and the bytes that its own kernels read and write.

    Args:
        graph: The graph; see :func:`trace`.
        inputs: Its inputs.
    """
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = next(m for t in inputs if (m := getattr(t, "fake_mode", None)) is not None)
    with mode, torch.no_grad(), V.set_fake_mode(mode):
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
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
    parser.add_argument("--fuse", action="store_true", help="take norms, residuals and GELU into the layers' kernels")
    parser.add_argument("--rope", action="store_true", help="with --fuse: also norm and rope of q and k into a kernel")
    parser.add_argument("--ranged", action="store_true", help="one code for all sizes, as for exports of a range")
    parser.add_argument("--save", type=Path, help="write inductor's code there")
    given = parser.parse_args()
    if given.rope and not given.fuse:
        parser.error("--rope goes with --fuse")
    block = wan_block(given.width, given.ffn, given.heads, given.bits)
    graph, inputs = trace(
        block, given.width, given.heads, given.tokens, given.text, given.fuse, given.rope, given.ranged
    )
    with pretended_gpu():
        code, moved = triton_code(graph, inputs)
    if given.save is not None:
        given.save.write_text(code)
    launches = re.findall(r"\b(triton_\w+)\.run\(", code)
    for name in launches:
        print(name)
    layers, fused = (len(re.findall(rf"{name}_linear\.default\(", code)) for name in ("prepared", "fused"))
    also = f" and {fused} fused ones" if fused else ""
    print(f"{len(launches)} launches that move {moved / 1e9:.2f} GB; opaque: {layers} quantized layers{also}, "
          f"{code.count('attention.default(')} attentions")  # fmt: skip


if __name__ == "__main__":
    main()
