"""What the scale of v is worth in an engine's FP8 attention: the bound from weights, or the largest v of predicted inputs.

    python -m benchmarks.quality value_scales --steps 20 --every 4       the table in docs/quality/index.md

Self-attention of the toy model is computed as the engine's graph has it (``export/verify/attention.py``), with one static scale
for v in each block. ``bound`` is the pass's own (``export/passes/fp8_attention.py``). ``predicted`` is twice the largest value in
a forward on the quantizer's synthetic inputs, ``predicted-exact`` that value itself. ``clips`` is the largest one on the held-out
clips, which no export has.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path

from benchmarks.quality.attention import AttentionRunner
from benchmarks.quality.page import MODEL, PAGE, write_table

MARGIN = 2.0  # by which real values may be larger than predicted ones


class _EngineAttention:
    """Computes the attentions of one model in their order, each with its scale of v."""

    def __init__(self, largest: Sequence[float]) -> None:
        self.largest, self.calls = largest, 0
        self.seen = [0.0] * len(largest)
        self.cut = [0] * len(largest)  # values beyond the scale, which e4m3 cuts off

    def __call__(self, q: Any, k: Any, v: Any, scale: float, bounds: Any) -> Any:
        import numpy as np
        import torch

        from dvdquant.export.passes.fp8_attention import AttentionScales
        from dvdquant.export.verify.attention import quantized_attention
        from dvdquant.numerics.dtypes import E4M3_MAX
        from dvdquant.numerics.hadamard import hadamard_matrix

        block, self.calls = self.calls % len(self.largest), self.calls + 1
        q, k, heads_v = (t.to(torch.bfloat16).float().transpose(1, 2) for t in (q, k, v))
        largest, channels = self.largest[block], q.shape[-1]
        self.seen[block] = max(self.seen[block], float(heads_v.abs().max()))
        self.cut[block] += int((heads_v.abs() > largest).sum())
        scales = AttentionScales(
            name="",
            order=block,
            fold=np.ones(channels, np.float32),  # the session has folded the norms
            rotation=hadamard_matrix(channels, torch.float32).numpy(),
            q=float(bounds[0]) * scale / E4M3_MAX,
            k=float(bounds[1]) / E4M3_MAX,
            v=largest / E4M3_MAX,
            p=1 / E4M3_MAX,
        )
        return quantized_attention(q, k, heads_v, scales).transpose(1, 2).to(v.dtype)


def bounds_from_weights(model: Any) -> list[float]:
    """Return the bound of v in each block that follows from weights, as the pass states it.

    Args:
        model: Wan's transformer.
    """
    from dvdquant.export.passes.fp8_attention import MODULATED

    found = []
    for block in model.blocks:
        linear = block.attn1.to_v
        longest = float(linear.weight.float().norm(dim=1).max())
        found.append(MODULATED * math.sqrt(linear.in_features) * longest + float(linear.bias.abs().max()))
    return found


def predicted(model: Any, config: dict[str, Any]) -> list[float]:
    """Return the largest v of each block in one forward on the quantizer's synthetic inputs.

    Args:
        model: Wan's transformer in fp32.
        config: Its config.
    """
    import torch

    from dvdquant.model.families import get_family
    from dvdquant.quantize.synthetic_inputs import synthetic_inputs

    family = get_family(config)
    found = [0.0] * len(model.blocks)

    def watch(block: int, _: Any, __: Any, v: Any) -> None:
        found[block] = float(v.abs().max())

    hooks = [
        block.attn1.to_v.register_forward_hook(functools.partial(watch, index))
        for index, block in enumerate(model.blocks)
    ]
    with torch.inference_mode():
        model(**family.forward_kwargs(synthetic_inputs(family)), return_dict=False)
    for hook in hooks:
        hook.remove()
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, default=Path("out/quality-attention"))
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a clip")
    parser.add_argument("--every", type=int, default=4, help="step errors at every so many steps, and the last")
    parser.add_argument("--linears", nargs="+", choices=("bf16", "w4a8"), default=["bf16"])
    parser.add_argument("--page", type=Path, default=PAGE, help="whose block 'value-scales' is written anew")
    options = parser.parse_args()

    from benchmarks.quality.report import interval
    from dvdquant.checkpoint.opening import open_checkpoint
    from dvdquant.ops.attention.operation import number_of
    from dvdquant.text import markdown_table

    options.work.mkdir(parents=True, exist_ok=True)
    runner = AttentionRunner(options.model.resolve(), options.work, options.steps, options.every, 8)
    runner.worker.held_out(runner.name)
    source = runner.worker.bench(runner.name).model
    bounds = bounds_from_weights(source)
    guessed = predicted(source, open_checkpoint(str(options.model / "transformer")).config)
    lines = []
    for linears in options.linears:
        model = runner.model(linears, "16")
        seen = [math.inf] * len(bounds)
        scales = {"bound": bounds, "predicted": [MARGIN * each for each in guessed], "predicted-exact": guessed}
        for name in ("16 bit", *scales, "clips"):
            made: Any = _EngineAttention(seen if name == "clips" else scales.get(name, bounds))
            runner.state.number = 0 if name == "16 bit" else number_of(made)
            found = runner.worker.step_errors(runner.name, model, options.every)
            per_clip: dict[int, list[float]] = {}
            for clip, _, _, error in found:
                per_clip.setdefault(clip, []).append(error)
            mean, low, high = interval({clip: sum(each) / len(each) for clip, each in per_clip.items()})
            ratio, cut = "–", "–"
            if name != "16 bit":
                seen = made.seen if name == "bound" else seen
                ratios = [a / b for a, b in zip(made.largest, seen)]
                ratio, cut = f"{min(ratios):.2f} to {max(ratios):.2f}", str(sum(made.cut))
            lines.append([linears, name, ratio, cut, f"{mean:.5f} ± {(high - low) / 2:.5f}"])
            print(*lines[-1], flush=True)
    head = ["linear layers", "scale of v", "times the largest v of the clips", "values cut off", "step error"]
    table = markdown_table(head, lines)
    write_table(options.page, "value-scales", table, f"{options.steps} steps a clip, 8 clips", "value_scales")
    return 0


if __name__ == "__main__":
    sys.exit(main())
