"""The check of an exported graph: ONNX Runtime against the quantized PyTorch model, with float64 as the judge.

There are four questions, each with a bound of its own:

1. Every quantized layer alone, on the x it had in the graph: :mod:`dvdquant.export.verify.layers`.
2. The parts between the layers (norms, attention, residuals, the split of merged rows): PyTorch runs with the graph's
   own outputs in the place of every quantized layer, and the inputs of the next layers are compared.
3. The whole graph. 4-bit activations are chaotic at rounding ties: a difference in the last bit of x̃ flips a code, and
   the flip moves every later layer. So the question is not whether two executors agree to 1e-3, but whether the graph
   is as close to the exact (float64) quantized model as PyTorch in the graph's own dtype is. The bound is three times
   that distance.
4. Of a graph whose attention runs in FP8 in the engines: every attention alone, on the operands that it had in the graph
   (:mod:`dvdquant.export.verify.attention`). In 2 and 3, PyTorch then rounds to e4m3 in the same places.

5. Of a graph whose layers the engines fuse with what comes before them: 1 to 3 again on the definition of the fused nodes.

A graph with reserved inputs for LoRAs gets random matrices there, and PyTorch has the same branches: 2 and 3 judge them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from dvdquant.export.passes.fp8_attention import AttentionScales, fp8_attention
from dvdquant.export.passes.fuse_prologues import expand_prologues, fuse_prologues
from dvdquant.export.verify.attention import (
    AttentionCheck,
    attention_intermediates,
    judge_attention,
    with_fp8_attention,
)
from dvdquant.export.verify.intermediates import (
    Intermediate,
    add_intermediates,
    find_intermediates,
    load_graph,
    run_graph,
)
from dvdquant.export.verify.layers import LayersCheck, choose_layers, judge_layers, token_step
from dvdquant.export.verify.reference import Free, Reference, relative_distance
from dvdquant.export.verify.tolerance import UNIT
from dvdquant.model.families import Axis, Sizes
from dvdquant.model.loading import fill_quantized
from dvdquant.model.lora_inputs import install_lora_inputs, random_lora
from dvdquant.model.plan import ModelPlan, quantized_skeleton
from dvdquant.system.safetensors_reader import TensorInfo, stored_reader

__all__ = [
    "BetweenCheck",
    "GraphCheck",
    "Verifier",
    "change_text",
    "load_quantized",
    "verify_graph",
]

FACTOR = 2.0
# The factor for the whole graph. Between the layers, ONNX Runtime rounds after every operator where PyTorch computes
# several as one. If the grids leave little error, that is most of it (2.0 times PyTorch's distance on small CogVideoX
# models in bf16).
GRAPH_FACTOR = 3.0
ATOL = 1e-6
# The number of 16-bit operators in a row that ONNX Runtime rounds one by one and PyTorch computes as one.
ROUNDINGS = 8
# Beyond these the whole graph is not run: attention scores of all heads and float64 on a CPU would not end.
WHOLE_TOKENS = 4096
WHOLE_PRODUCTS = 1 << 42  # tokens times quantized weights
BETWEEN_BYTES = 1 << 30  # the most that all layers' inputs and outputs may take


@dataclass(frozen=True)
class BetweenCheck:
    """The worst of all places between quantized layers.

    The errors are relative L2 distances from float64, if every quantized layer has the given output.

    Args:
        place: The layer that receives the value, or ``sample`` for the graph's output.
        error: The distance of ONNX Runtime.
        bound: Twice the distance of PyTorch in the graph's dtype, and some roundings.
        places: The number of places that were compared.
    """

    place: str
    error: float
    bound: float
    places: int

    @property
    def passed(self) -> bool:
        """Return whether every place is within its bound (NaN is not)."""
        return self.error <= self.bound


@dataclass(frozen=True)
class GraphCheck:
    """The check of one graph.

    Distances are relative L2 of the output, ‖y − y₆₄‖ / ‖y₆₄‖; they are None if the graph is too large to run here.

    Args:
        graph: The name of the graph.
        error: The distance of ONNX Runtime from the float64 quantized model.
        reference_error: The distance of PyTorch in the graph's dtype from the same model.
        difference: The distance of ONNX Runtime from PyTorch in the graph's dtype.
        flipped_codes: The share of activation codes in which PyTorch in the graph's dtype differs from float64, 0 to 1.
        layers: The checks of the layers one by one.
        between: The check of the places between them, or None if they were not compared.
        tokens: The number of tokens of the transformer at the checked sizes, video and text.
        attention: The attentions in FP8 one by one; empty for a graph that has them in 16 bit.
        lora_rank: The rank of the branches that had random matrices; 0 for a graph without them.
    """

    graph: str
    error: float | None
    reference_error: float | None
    difference: float | None
    flipped_codes: float | None
    layers: LayersCheck
    between: BetweenCheck | None
    tokens: int
    attention: tuple[AttentionCheck, ...] = ()
    lora_rank: int = 0

    @property
    def bound(self) -> float | None:
        """Return the largest error that passes, or None if the graph was not run as a whole."""
        return None if self.reference_error is None else GRAPH_FACTOR * self.reference_error + ATOL

    @property
    def passed(self) -> bool:
        """Return whether the graph, its layers and the places between them are within their bounds (NaN is not)."""
        return not self.faults()

    def faults(self) -> list[str]:
        """Return the parts that are out of bounds, each as a clause, the most telling first."""
        found = [
            f"layer {c.name} is {c.error:.2e} from float64 on the input it had, and {c.bound:.2e} is the bound"
            for c in self.layers.failed[:3]
        ]
        if len(self.layers.failed) > 3:
            found.append(f"{len(self.layers.failed) - 3} more layers are out of bounds")
        if not self.layers.judged:
            found.append("no layer was judged")
        found += [
            f"{c.name} in FP8 is {c.excess:.3g} times its bound from float64 on the operands it had ({c.part})"
            for c in self.attention
            if not c.passed
        ][:3]
        if self.between is not None and not self.between.passed:
            found.append(
                f"what {self.between.place} receives is {self.between.error:.2e} from float64 with the layers' outputs "
                f"given, and {self.between.bound:.2e} is the bound"
            )
        if self.error is not None and self.bound is not None and not self.error <= self.bound:
            found.append(
                f"ONNX Runtime is {self.error:.2e} from the exact quantized model, PyTorch {self.reference_error:.2e}, "
                "and three times that is the bound"
            )
        return found

    def lines(self) -> list[str]:
        """Return lines for people: the whole graph, the layers, and the places between them."""
        worst = self.layers.worst
        if self.error is None or self.bound is None:
            first = (
                f"verify {self.graph}: not run as a whole ({self.tokens} tokens); layers on inputs PyTorch gave them"
            )
        else:
            first = (
                f"verify {self.graph}: {self.error:.1e} from the exact quantized model (bound {self.bound:.1e}, "
                f"PyTorch {self.reference_error:.1e})"
            )
        lines = [
            first,
            f"  layers: {len(self.layers.judged)} of {self.layers.total} judged, worst {worst.excess:.2g} of its bound "
            f"({worst.name})",
        ]
        if self.between is not None:
            lines.append(
                f"  between layers: {self.between.places} places compared, worst "
                f"{self.between.error / self.between.bound:.2g} of its bound ({self.between.place})"
            )
        if self.lora_rank:
            lines.append(f"  LoRA: random matrices of rank {self.lora_rank} were in the reserved inputs")
        if self.attention:
            hardest = max(self.attention, key=lambda check: check.excess)
            lines.append(
                f"  FP8 attention: {len(self.attention)} judged, worst {hardest.excess:.2g} of its bound ({hardest.name})"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the check as a plain dict, with the bounds and the verdicts."""
        own = {name: getattr(self, name) for name in ("graph", "error", "reference_error", "difference")}
        between = None if self.between is None else {**asdict(self.between), "passed": self.between.passed}
        return {
            **own,
            "flipped_codes": self.flipped_codes,
            "bound": self.bound,
            "tokens": self.tokens,
            "layers": self.layers.to_json(),
            "between": between,
            "attention": [check.to_json() for check in self.attention],
            "lora_rank": self.lora_rank,
            "passed": self.passed,
        }


def load_quantized(plan: ModelPlan, tensors: Mapping[str, tuple[str, TensorInfo]], root: Path, bits: int) -> nn.Module:
    """Return the quantized PyTorch model of an export, in its own dtype.

    Args:
        plan: The plan of the model.
        tensors: Name -> (weight file relative to ``root``, place in it), as in
            :class:`dvdquant.quantize.checkpoint.PackedWeights`.
        root: The folder of the export.
        bits: The bits of the activations, one of the recipe's.

    Raises:
        ShapeError: A stored tensor has another shape or dtype.
        RecipeError: The recipe has no activations of so many bits.
    """
    model = quantized_skeleton(plan, bits)

    fill_quantized(model, plan, stored_reader(root, tensors))
    return model


def change_text(fp8: bool, fused: bool) -> str:
    """Return how an engine runs a graph, in words; nothing where it runs it as it is.

    Args:
        fp8: Whether its attention is in FP8.
        fused: Whether layers are fused with what comes before them.
    """
    changes = ["FP8 attention"] * fp8 + ["fused layers"] * fused
    return f"with {' and '.join(changes)}" if changes else ""


class Verifier:
    """The judge of the graphs of one transformer on random inputs; PyTorch's results are computed once per bit-width.

    Args:
        plan: The plan of the model.
        sizes: The sizes of the graphs, in latent units.
        model: The quantized model; see :func:`load_quantized`.
        seed: The seed of the inputs.
        which: The point of the ranges to run at: ``min``, ``opt`` or ``max``.
        worst: The names of layers that must be among the judged ones if there are too many to judge all.

    Attributes:
        chosen: The names of the layers that are judged.
        tokens: The number of tokens at these sizes, video and text.
        whole: True if graphs run as a whole; else layers run on inputs that PyTorch gives them at small sizes.
        between: True if the places between the layers are compared.
        step: Every ``step``-th token is judged.
        inputs: The inputs of the graph by name.
        lora: What is in its inputs for LoRAs, by name.
    """

    def __init__(
        self,
        plan: ModelPlan,
        sizes: Sizes,
        model: nn.Module,
        *,
        seed: int = 0,
        which: str = "opt",
        worst: Iterable[str] = (),
    ) -> None:
        self.plan = plan
        self.lora = random_lora(plan, seed)
        install_lora_inputs(model, plan.lora_rank, plan.dtype, self.lora)
        self.reference = Reference(plan, model)
        self.chosen = choose_layers(plan.layers, worst)
        self.tokens = plan.family.tokens(*sizes.at(which)) + sizes.text_tokens
        self.video_tokens = plan.family.tokens(*sizes.at("max"))
        products = self.tokens * sizes.batch * plan.quantized_weights
        self.whole = self.tokens <= WHOLE_TOKENS and products <= WHOLE_PRODUCTS
        specs = [spec for spec in plan.layers if spec.name in self.chosen]
        self.step = token_step(specs, sizes.batch * (self.tokens if self.whole else sizes.text_tokens))
        if not self.whole:
            frames, height, width = (Axis.fixed(size) for size in plan.family.probe())
            sizes = Sizes(frames, height, width, sizes.text_tokens, sizes.batch)
        self.inputs = plan.family.sample(sizes, plan.dtype, seed, which)
        # The values are every layer's x and y, in ONNX Runtime in fp32 at most.
        values = sum(spec.features + spec.out_features for spec in plan.layers) * self.tokens * sizes.batch
        self.between = self.whole and 4 * values <= BETWEEN_BYTES
        self._free: dict[tuple[int, bool], Free] = {}
        self._seen: dict[int, dict[str, Tensor]] = {}

    def check(
        self,
        path: Path,
        bits: int,
        advance: Callable[[str], None] = lambda done: None,
        fp8: bool = False,
        fused: bool = False,
    ) -> GraphCheck:
        """Check one graph.

        Args:
            path: The ONNX file, in the folder of the weight files.
            bits: The bits of its activations.
            advance: A function that is called with a name for each judged layer and once for the rest.
            fp8: Check it with its attention in FP8, as engines run it.
            fused: Check it with its layers fused with what comes before them, as the definition of those nodes has it.

        Raises:
            ExportError: ONNX Runtime cannot run the graph, or a layer is missing in it.
        """
        scales: list[AttentionScales] = []
        attentions = 0

        def edit(graph: ir.Model) -> None:
            nonlocal attentions
            attentions = sum(node.op_type == "Attention" for node in graph.graph)
            if fp8:
                scales.extend(fp8_attention(graph, self.video_tokens))
            if fused:
                fuse_prologues(graph)
                expand_prologues(graph)

        model = load_graph(path, edit if fp8 or fused else None)
        intermediates = find_intermediates(
            model, [spec.name for spec in self.plan.layers] if self.between else self.chosen
        )
        self.reference.use(bits)
        title = f"{path.name} {change_text(fp8, fused)}".rstrip()
        with with_fp8_attention(scales, attentions):
            wanted = attention_intermediates(model, scales) if self.whole else {}
            xs, seen = self._run(model, intermediates, path, wanted) if self.whole else (self._probed(bits), None)
            judged = {name: intermediates[name] for name in self.chosen}
            checks = judge_layers(model, judged, xs, self.reference.layers, self.plan.dtype, path.parent, advance)
            layers = LayersCheck(tuple(checks), len(self.plan.layers))
            between = self._check_between(seen) if seen is not None and self.between else None
            sample = None if seen is None else seen["sample"]
            check = self._graph_check(title, (bits, fp8), sample, layers, between)
        if seen is not None and scales:
            check = replace(check, attention=tuple(judge_attention(seen, each, self.plan.dtype) for each in scales))
        advance(title)
        return check

    def _run(
        self, model: ir.Model, intermediates: Mapping[str, Intermediate], path: Path, more: Mapping[str, ir.Value]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the whole graph once.

        Args:
            model: The prepared graph.
            intermediates: The inputs and outputs of its layers, by name.
            path: The ONNX file, for its folder and for errors.
            more: Further values to read, by name.

        Returns:
            x of the chosen layers by name, with every ``step``-th token, and the output as ``sample`` with ``more``. If the
            places between the layers are compared, the second dict also has ``to <layer>`` (its input) and
            ``from <layer>`` (its output).
        """
        wanted = {"sample": model.graph.outputs[0], **more}
        if self.between:
            wanted |= {f"to {name}": intermediate.x for name, intermediate in intermediates.items()}
            wanted |= {f"from {name}": intermediate.y for name, intermediate in intermediates.items()}
        strided = add_intermediates(model, {name: intermediates[name].x for name in self.chosen}, self.step)
        names = add_intermediates(model, wanted)
        got = run_graph(model, path.parent, {**self.inputs, **self.lora}, path.name)
        return {key: got[name] for key, name in strided.items()}, {key: got[name] for key, name in names.items()}

    def _probed(self, bits: int) -> dict[str, Tensor]:
        """Return x of the chosen layers by name, from a run of PyTorch at small sizes."""
        if bits not in self._seen:
            seen = self.reference.layer_inputs(self.inputs, bits, self.step)
            self._seen = {bits: {name: seen[name] for name in self.chosen}}
        return self._seen[bits]

    def _check_between(self, seen: Mapping[str, Tensor]) -> BetweenCheck:
        """Return the place furthest beyond its bound, or closest to it.

        Args:
            seen: The values of the graph's run, as ``sample``, ``to <layer>`` and ``from <layer>``.
        """
        ys = {key.removeprefix("from "): value for key, value in seen.items() if key.startswith("from ")}
        near, exact = self.reference.led(self.inputs, ys)
        checks = []
        for place, reference in exact.items():
            got = seen["sample" if place == "sample" else f"to {place}"]
            if got.shape != reference.shape:
                checks.append(BetweenCheck(place, float("inf"), 1.0, len(exact)))
                continue
            bound = FACTOR * relative_distance(near[place], reference) + ROUNDINGS * UNIT[self.plan.dtype]
            checks.append(BetweenCheck(place, relative_distance(got, reference), bound, len(exact)))
        return max(checks, key=lambda c: (not c.passed, c.error / c.bound))

    def _graph_check(
        self, name: str, kind: tuple[int, bool], got: Tensor | None, layers: LayersCheck, between: BetweenCheck | None
    ) -> GraphCheck:
        """Return the check of one graph.

        Args:
            name: The name of the graph.
            kind: The bits of its activations, and whether its attention is in FP8.
            got: Its output, or None if it was not run as a whole.
            layers: The checks of its layers.
            between: The check of the places between them, or None.
        """
        rank = self.plan.lora_rank
        if got is None:
            return GraphCheck(name, None, None, None, None, layers, between, self.tokens, lora_rank=rank)
        if kind not in self._free:
            self._free[kind] = self.reference.free(self.inputs, kind[0])
        free = self._free[kind]
        return GraphCheck(
            graph=name,
            error=relative_distance(got, free.exact),
            reference_error=relative_distance(free.same_dtype, free.exact),
            difference=relative_distance(got, free.same_dtype),
            flipped_codes=free.flipped_codes,
            layers=layers,
            between=between,
            tokens=self.tokens,
            lora_rank=rank,
        )


def verify_graph(
    path: Path, plan: ModelPlan, sizes: Sizes, model: nn.Module, bits: int, *, seed: int = 0, which: str = "opt"
) -> GraphCheck:
    """Check one graph with :class:`Verifier`.

    Args:
        path: The ONNX file, in the folder of the weight files.
        plan: The plan of the model.
        sizes: The sizes of the graph, in latent units.
        model: The quantized model; see :func:`load_quantized`.
        bits: The bits of the graph's activations.
        seed: The seed of the inputs.
        which: The point of the ranges to run at: ``min``, ``opt`` or ``max``.

    Raises:
        ExportError: See :meth:`Verifier.check`.
    """
    return Verifier(plan, sizes, model, seed=seed, which=which).check(path, bits)
