"""Build a TensorRT-RTX engine of one or all Wan blocks at real size, self-attention in FP8 and in 16 bit: time and memory.

Random weights; sizes range up to twice the tokens of the case. Nothing needs a GPU, and nothing runs on one.

    python benchmarks/attention_engine.py                                    # Wan2.1-1.3B, 480p
    python benchmarks/attention_engine.py --blocks 30                        # the whole model
    python benchmarks/attention_engine.py --config wan2.1-14b --blocks 1 --kinds fp8
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.make_checkpoint import HeavyTailed  # noqa: E402
from dvdquant.artifact.transaction import ExportTransaction  # noqa: E402
from dvdquant.checkpoint.opening import open_checkpoint  # noqa: E402
from dvdquant.export.engines import BuildReport, build_engine  # noqa: E402
from dvdquant.export.graph.trace import profile_shapes, trace_graph  # noqa: E402
from dvdquant.export.graph.writer import GraphWriter  # noqa: E402
from dvdquant.export.passes.fp8_attention import fp8_attention  # noqa: E402
from dvdquant.export.passes.lowering.int8 import lower_int8  # noqa: E402
from dvdquant.export.passes.lowering.store import TensorStore  # noqa: E402
from dvdquant.model.families import Axis, Sizes  # noqa: E402
from dvdquant.model.plan import ModelPlan, build_skeleton, plan_model  # noqa: E402
from dvdquant.quantize.checkpoint import quantize_checkpoint  # noqa: E402
from dvdquant.recipe import get_recipe  # noqa: E402
from dvdquant.system.progress import Progress  # noqa: E402
from dvdquant.system.safetensors_writer import StreamingWriter  # noqa: E402

# Latent frames, height and width: 480p is 21 × 60 × 104, 32760 tokens.
SIZES = Sizes(Axis(1, 21, 41), Axis(16, 60, 60), Axis(16, 104, 104), text_tokens=512)
RECIPE = "weights-only"


def write_model(folder: Path, config: dict[str, object]) -> Path:
    """A checkpoint with random weights of ``config``."""
    draws = HeavyTailed(0)
    tensors = [(n, tuple(p.shape)) for n, p in build_skeleton(config, torch.bfloat16).named_parameters()]
    folder.mkdir()
    with StreamingWriter(
        folder / "diffusion_pytorch_model.safetensors", [(name, torch.bfloat16, shape) for name, shape in tensors]
    ) as writer:
        for name, shape in tensors:
            writer.write(name, draws.draw(shape))
        writer.finish()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(root: Path, plan: ModelPlan, kind: str, sms: list[str]) -> BuildReport:
    """One engine of the exported graph in ``root``."""
    model = ir.load(root / "onnx" / "transformer_a8.onnx")
    model.functions.clear()
    if kind == "fp8":
        fp8_attention(model, plan.family.tokens(*SIZES.at("max")))
    lower_int8(model, TensorStore(root / "onnx" / f"{kind}.bin", root / "onnx"))
    path = root / "onnx" / f"{kind}.onnx"
    ir.save(model, path)
    profile = profile_shapes(plan.family, SIZES)
    return build_engine(path, root / f"{kind}.engine", backend="rtx", sms=sms, profile=profile)


def main() -> None:
    """Print one line for each kind of attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan2.1-1.3b", help="a file of benchmarks/configs")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--kinds", default="16,fp8", help="of 16 and fp8, with commas between")
    parser.add_argument("--sm", default="8.9,12.0")
    options = parser.parse_args()
    config = json.loads((ROOT / "benchmarks" / "configs" / f"{options.config}.json").read_text())
    config["num_layers"] = options.blocks
    recipe = get_recipe(RECIPE)
    with tempfile.TemporaryDirectory() as scratch:
        source = open_checkpoint(write_model(Path(scratch) / "model", config))
        plan = plan_model(source.config, recipe, torch.bfloat16, source)
        base = trace_graph(plan, SIZES)
        with ExportTransaction(Path(scratch) / "work") as transaction:
            packed = quantize_checkpoint(source, plan, transaction, Progress("quiet"))
            GraphWriter(transaction.tree, plan, "transformer", base, packed.tensors).write(8, "tensorrt")
            print(f"{options.config}, blocks: {options.blocks}, {plan.family.tokens(*SIZES.at('opt'))} tokens, up to "
                  f"{plan.family.tokens(*SIZES.at('max'))}; SM {options.sm}")  # fmt: skip
            for kind in options.kinds.split(","):
                report = build(transaction.tree, plan, kind, options.sm.split(","))
                print(
                    f"attention {kind}: {report.seconds:.1f} s, {report.peak_rss_bytes / 1e9:.2f} GB resident, engine "
                    f"{report.bytes / 1e6:.1f} MB, fused {dict(report.attention)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
