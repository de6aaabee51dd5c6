"""The check of what is stored against the checkpoint, tensor by tensor: all that a graph check takes for granted.

The judge of graphs compares them with the stored weights, so a wrong weight makes both wrong. Here a layer is right if
the stored tensors say the checkpoint's layer, ``W·x + b ≈ Ŵ·rotate((x − shift) · scale) + bias``:

1. ``pre_quant_scale`` are powers of two in range with the signs of the layer's name. ``pre_quant_shift`` is exact in
   the graph's dtype, and ``bias = b + W·shift`` to the last bit of fp32.
2. The weight error of all rows is the recorded one, to the rounding of its sums. The codes are also checked
   independently of that record: codes without feedback are the nearest ones on their grid, every one; with feedback a
   row's error stays below what feedback can make of the nearest codes' error; and quantizing sampled rows again finds
   no better grid.
3. Tensors that stay in 16 bit are the checkpoint's, bit by bit, after the cast.

One tensor of the checkpoint is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.artifact.entries import LayerEntry
from dvdquant.errors import ExportError
from dvdquant.export.verify.tolerance import LAMBDA, UNIT
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.numerics.packing import expand_zero, unpack_int4
from dvdquant.numerics.regular_hadamard import regular_signs
from dvdquant.quantize.backends.numba_rows import for_row_parts
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.quantize.hessian import random_signs_of
from dvdquant.quantize.layer import CHUNK_WEIGHTS, rotate_rows
from dvdquant.quantize.layer_inputs import DAMPING
from dvdquant.system.safetensors_reader import TensorInfo, read_tensor

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = ["StoredCheck", "verify_stored"]

# So many rows of a layer are quantized again, or in small layers so many that they have SAMPLED_WEIGHTS weights.
SAMPLED_ROWS = 64
SAMPLED_WEIGHTS = 1 << 18
# The stored grid may be so much worse than a new search over the sampled rows. The searches on a GPU and on a CPU are
# held to 0.1 % of each other; a scale that is 5 % off costs 1.5 %.
GRID_SLACK = 3e-3
# Feedback minimizes e·(M + λ·level)·eᵀ, and white errors e₀ of the nearest codes give it (1 + λ)·level·‖e₀‖², so that
# ‖e‖² ≤ (1 + λ)/λ · ‖e₀‖². λ is never below DAMPING.
FEEDBACK = (1 + DAMPING) / DAMPING
# Relative errors below the square of fp32's rounding are no errors.
FLOOR = 1e-12
_FINE = UNIT[torch.float32]


@dataclass(frozen=True)
class StoredCheck:
    """The comparison of one transformer with its checkpoint.

    Args:
        component: The name of the transformer's folder.
        layers: The number of quantized layers.
        rows: The number of all their rows.
        sampled: The number of rows that were quantized again.
        kept: The number of tensors that stay in 16 bit.
        worst: The layer whose sampled rows a new search improves most.
        gain: The improvement of that layer, relative to the error of the new search.
    """

    component: str
    layers: int
    rows: int
    sampled: int
    kept: int
    worst: str
    gain: float

    def lines(self) -> list[str]:
        """Return lines for people."""
        return [
            f"verify {self.component}: {self.layers} quantized layers ({self.rows} rows, {self.sampled} of them quantized "
            f"again) and {self.kept} tensors in 16 bit are the checkpoint's"
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the check as a plain dict."""
        return {
            "component": self.component,
            "layers": self.layers,
            "rows": self.rows,
            "sampled": self.sampled,
            "kept": self.kept,
            "worst": self.worst,
            "gain": self.gain,
        }


def verify_stored(
    component: str,
    tree: Path,
    checkpoint: Checkpoint,
    plan: ModelPlan,
    tensors: Mapping[str, tuple[str, TensorInfo]],
    entries: Sequence[LayerEntry],
    allow_nonfinite: bool = False,
    advance: Callable[[int, str], None] = lambda weights, name: None,
) -> StoredCheck:
    """Compare all that is stored of one transformer with its checkpoint.

    Args:
        component: The name of the transformer's folder.
        tree: The folder of the export.
        checkpoint: The checkpoint.
        plan: The plan of the model.
        tensors: Name -> (weight file relative to ``tree``, place in it), as in
            :class:`dvdquant.quantize.checkpoint.PackedWeights`.
        entries: The manifest's lines of this transformer's layers, in the order of the plan.
        allow_nonfinite: NaN and infinities of the checkpoint count as 0, because they are stored so.
        advance: A function that is called with the number of weights that were compared, and the name of their tensor
            or layer.

    Raises:
        ExportError: A layer or a tensor is not the checkpoint's; the error names the first one, and the difference.
    """
    run = _Stored(component, tree, checkpoint, plan, tensors, allow_nonfinite)
    run.check_table(entries)
    sampled, worst, gain = 0, "", 0.0
    for spec, entry in zip(plan.layers, entries):
        rows, better = run.check_layer(spec, entry)
        sampled += rows
        if better >= gain:
            worst, gain = spec.name, better
        advance(spec.out_features * spec.features, spec.name)
    for name in plan.kept:
        run.check_kept(name)
        advance(torch.Size(plan.kept[name][1]).numel(), name)
    rows = sum(spec.out_features for spec in plan.layers)
    return StoredCheck(component, len(plan.layers), rows, sampled, len(plan.kept), worst, gain)


class _Stored:
    """The stored tensors of one transformer beside its checkpoint.

    Args:
        component: The name of the transformer's folder.
        tree: The folder of the export.
        checkpoint: The checkpoint.
        plan: The plan of the model.
        tensors: Name -> (weight file relative to ``tree``, place in it).
        allow_nonfinite: NaN and infinities of the checkpoint count as 0.

    Attributes:
        gptq: True if codes were rounded with GPTQ.
    """

    def __init__(
        self,
        component: str,
        tree: Path,
        checkpoint: Checkpoint,
        plan: ModelPlan,
        tensors: Mapping[str, tuple[str, TensorInfo]],
        allow_nonfinite: bool,
    ) -> None:
        self.component, self.tree, self.checkpoint = component, tree, checkpoint
        self.plan, self.tensors = plan, tensors
        self.allow_nonfinite = allow_nonfinite
        self.gptq = plan.recipe.inputs == "synthetic"

    def check_table(self, entries: Sequence[LayerEntry]) -> None:
        """Check that the manifest's table of layers says what the plan says.

        Args:
            entries: The lines of this transformer's layers.

        Raises:
            ExportError: The table says something else.
        """
        specs = self.plan.layers
        if len(entries) != len(specs):
            raise self._wrong(
                "the table of layers", f"the manifest lists {len(entries)} quantized layers of {len(specs)}"
            )
        for spec, entry in zip(specs, entries):
            there = (entry["name"], *entry["members"], entry["features_in"], entry["features_out"])
            if (*there, entry["rotation_block"]) != (
                spec.name, *spec.members, spec.features, spec.out_features, spec.rotation.block,
            ):  # fmt: skip
                raise self._wrong(
                    spec.name, f"the manifest has the layer {entry['name']!r} of another form in its place"
                )

    def check_kept(self, name: str) -> None:
        """Check that a tensor in 16 bit is the checkpoint's, bit by bit.

        Args:
            name: The name of the tensor.

        Raises:
            ExportError: It is not.
        """
        dtype, shape = self.plan.kept[name]
        expected, stored = self._source(name).to(dtype), self._read(name)
        if stored.dtype != dtype or tuple(stored.shape) != shape or not _same_bits(stored, expected):
            raise self._wrong(name, f"it is no {str(dtype).removeprefix('torch.')} copy of that tensor")

    def check_layer(self, spec: LayerSpec, entry: LayerEntry) -> tuple[int, float]:
        """Check one quantized layer.

        Args:
            spec: The layer.
            entry: Its line in the manifest.

        Returns:
            The number of sampled rows, and the relative gain of a new search on them.

        Raises:
            ExportError: The layer is not the checkpoint's.
        """
        # 1. Read the stored tensors, and check those that need no weight.
        stored = {}
        for full, (dtype, shape) in spec.tensors().items():
            tensor = self._read(full)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise self._wrong(full, f"it is {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(shape)}")
            stored[full.removeprefix(spec.name + ".")] = tensor
        self._check_inputs(spec, stored)
        self._check_grid(spec, stored)
        # 2. Rotate the checkpoint's weight part by part, and judge the stored codes. sums is [N, 4], see stored_rows.
        sample = _Sample(spec)
        sums = np.empty((spec.out_features, 4))
        biases, start = [], 0
        for member, rows, has_bias in zip(spec.members, spec.rows, spec.biases):
            weight = self._source(f"{member}.weight")
            bias = self._source(f"{member}.bias").double() if has_bias else torch.zeros(rows, dtype=torch.float64)
            step = max(1, CHUNK_WEIGHTS // spec.features)
            for first in range(0, rows, step):
                part = weight[first : first + step].to(torch.float32, copy=True)
                here = slice(start + first, start + first + len(part))
                if spec.shifted:
                    bias[first : first + step] += part.double() @ stored["pre_quant_shift"].double()
                if spec.smoothed:
                    part.div_(stored["pre_quant_scale"])
                rotated = rotate_rows(part, spec.rotation)
                self._judge(spec, rotated, stored, here, sums[here])
                sample.add(rotated, here)
            biases.append(bias)
            start += rows
        # 3. Compare the sums with bounds and records.
        self._check_bias(spec, stored["bias"], torch.cat(biases))
        self._check_recorded(spec, entry, sums)
        self._check_codes(spec, sums)
        return sample.count, self._check_search(spec, sample, sums)

    # ------------------------------------------------------------------------------------------------ what is compared

    def _check_inputs(self, spec: LayerSpec, stored: Mapping[str, Tensor]) -> None:
        """Check pre_quant_shift and pre_quant_scale.

        Raises:
            ExportError: One has values that it cannot have.
        """
        if spec.shifted:
            shift = stored["pre_quant_shift"]
            if not _same_bits(shift.to(self.plan.dtype).float(), shift) or not bool(shift.isfinite().all()):
                raise self._wrong(spec.name, f"pre_quant_shift holds values that {self.plan.dtype} does not have")
        if spec.smoothed:
            scale = stored["pre_quant_scale"]
            random_signs = torch.ones(spec.features)
            if spec.regular:
                random_signs = regular_signs(spec.rotation.block, spec.features)
                if not torch.equal(scale, random_signs):
                    raise self._wrong(spec.name, "pre_quant_scale are not the signs of the regular rotation")
                if bool((unpack_int4(stored["weight"]) < -7).any()):
                    raise self._wrong(spec.name, "weight holds code -8, which the regular rotation does not have")
            if spec.random_signs and not spec.rotation.identity:
                random_signs = random_signs_of(spec.name, spec.features)
            mantissa, exponent = torch.frexp(scale * random_signs)
            # Divisors are 2⁻³ to 2¹², and frexp's mantissa of a power of two is a half.
            if not bool(((mantissa == 0.5) & (exponent >= -11) & (exponent <= 4)).all()):
                raise self._wrong(
                    spec.name, "pre_quant_scale are not powers of two from 2^-12 to 2^3 with the layer's signs"
                )

    def _check_grid(self, spec: LayerSpec, stored: Mapping[str, Tensor]) -> None:
        """Check that scales, group scales and zero-points are those of a grid of the recipe's kind.

        Raises:
            ExportError: One has values that it cannot have.
        """
        scale, group_scale, zero = stored["weight_scale"], stored["weight_group_scale"], stored["weight_zero"]
        kind = self.plan.recipe.weight.zero_point
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise self._wrong(spec.name, "weight_scale holds values that are not positive")
        if not bool((group_scale > 0).all()) or (spec.groups == 1 and not bool((group_scale == 255).all())):
            raise self._wrong(spec.name, "weight_group_scale holds values that no grid has")
        fine = {
            "midrise": lambda: (zero == -0.5) | (zero == 0),
            "symmetric": lambda: zero == 0,
            "paper": lambda: (zero == zero.round()) & zero.isfinite(),
            "float": lambda: torch.ones_like(zero, dtype=torch.bool),
        }[kind]()
        if not bool(fine.all()):
            raise self._wrong(spec.name, f"weight_zero holds values that the {kind} grid does not have")

    def _judge(
        self, spec: LayerSpec, rotated: Tensor, stored: Mapping[str, Tensor], here: slice, out: np.ndarray
    ) -> None:
        """Judge some rows with :func:`dvdquant.export.verify.stored_rows.judge_rows`, on several threads.

        Args:
            spec: The layer.
            rotated: The rotated weight of the rows, fp32 [R, K].
            stored: The stored tensors of the layer, by short name.
            here: The rows.
            out: The result, fp64 [R, 4], which is filled.
        """
        from dvdquant.export.verify.stored_rows import judge_rows  # numba takes a second to import

        rows = rotated.contiguous().numpy()
        packed, scale, group_scale = (
            stored[name][here].numpy() for name in ("weight", "weight_scale", "weight_group_scale")
        )
        zero = expand_zero(stored["weight_zero"][here]).numpy()
        # The error of a sum of at most `block` terms in fp32, or of the rounded quotient if there is no rotation.
        unit = 2 * LAMBDA * _FINE if not spec.rotation.identity else 8 * _FINE

        def work(part: slice) -> None:
            """Judge a part of the rows."""
            judge_rows(rows[part], packed[part], scale[part], group_scale[part], zero[part], unit, out[part])

        for_row_parts(len(rows), work)

    def _check_bias(self, spec: LayerSpec, stored: Tensor, expected: Tensor) -> None:
        """Check the bias.

        Args:
            spec: The layer.
            stored: The stored bias, fp32 [N].
            expected: The checkpoint's bias plus weight · pre_quant_shift, fp64 [N].

        Raises:
            ExportError: They differ by more than a rounding.
        """
        # The sums are fp64 on both sides. They differ by a rounding of fp32 if they fall on two sides of a tie.
        difference = (stored.double() - expected).abs()
        bound = 2 * _FINE * expected.abs() + FLOOR
        if not bool((difference <= bound).all()):
            row = int((difference - bound).nan_to_num(nan=float("inf")).argmax())
            words = " + weight · pre_quant_shift" if spec.shifted else ""
            raise self._wrong(
                spec.name,
                f"bias[{row}] is {float(stored[row]):.6g}, and the checkpoint's bias{words} is {float(expected[row]):.6g}",
            )

    def _check_recorded(self, spec: LayerSpec, entry: LayerEntry, sums: np.ndarray) -> None:
        """Check that the error of the weight is the recorded one.

        Raises:
            ExportError: It is another one.
        """
        recorded = entry.get("weight_mse") if self.gptq else entry["relative_mse"]
        energy, error = sums[:, 0].sum(), sums[:, 1].sum()
        if recorded is None:  # an all-zero weight, or a manifest of before this was recorded
            return
        found = error / energy if energy else float("inf")
        # On one side a group's terms are summed in fp32, with a random error of √n roundings for each of the layer's
        # many groups. An error that all groups share, such as the rounding of the scales, is some roundings.
        groups = spec.out_features * spec.groups
        slack = (LAMBDA * (spec.features / spec.groups / groups) ** 0.5 + 4) * _FINE
        if not abs(found - recorded) <= slack * recorded + FLOOR:
            raise self._wrong(
                spec.name, f"the relative error of its weight is {found:.6g}, and {recorded:.6g} was recorded for it"
            )

    def _check_codes(self, spec: LayerSpec, sums: np.ndarray) -> None:
        """Check that the codes are the nearest ones, or with feedback that the error of no row is beyond its bound.

        Raises:
            ExportError: A row is out of bounds.
        """
        if not self.gptq:
            row = int(sums[:, 3].argmax())
            if not sums[row, 3] <= 0:
                raise self._wrong(spec.name, f"row {row} has a code {sums[row, 3] + 0.5:.3g} steps from the weight")
            return
        energy, error, nearest, _ = sums.T
        bad = ~(error <= FEEDBACK * nearest + FLOOR * energy)
        if bad.any():
            row = int(bad.argmax())
            raise self._wrong(
                spec.name,
                f"row {row} is off by {error[row] / max(energy[row], 1e-300):.3g} of its energy, and "
                f"{FEEDBACK * nearest[row] / max(energy[row], 1e-300):.3g} is the bound of its grid",
            )

    def _check_search(self, spec: LayerSpec, sample: _Sample, sums: np.ndarray) -> float:
        """Check that a new search on sampled rows finds no better grid, and return its relative gain.

        Args:
            spec: The layer.
            sample: The sampled rows of its rotated weight.
            sums: The result of :meth:`_judge` for all rows, fp64 [N, 4].

        Raises:
            ExportError: It finds a better grid.
        """
        rotated = sample.rows()
        again = quantize_weight(rotated, self.plan.recipe.weight).dequantize(torch.float64)
        best = float((rotated.double() - again).square().sum())
        energy, _, nearest, _ = sums[sample.places].sum(0)
        if not nearest <= (1 + GRID_SLACK) * best + FLOOR * energy:
            raise self._wrong(
                spec.name,
                f"on its grid the nearest codes of {sample.count} rows are off by {nearest / max(energy, 1e-300):.4g} of "
                f"their energy, and on a new one by {best / max(energy, 1e-300):.4g}",
            )
        return float(nearest / best - 1) if best else 0.0

    def _wrong(self, name: str, how: str) -> ExportError:
        """Return the error for something stored that is not the checkpoint's."""
        return ExportError(
            f"{name} of {self.component}: what is stored is not the checkpoint's: {how}",
            fix="remove the output folder and export again; if that says the same, report it with the model's config.json",
        )

    # ------------------------------------------------------------------------------------------------------- reading

    def _read(self, name: str) -> Tensor:
        """Read a stored tensor.

        Raises:
            ExportError: It is not in the weight files.
        """
        if name not in self.tensors:
            raise self._wrong(name, "it is not in the weight files")
        relative, info = self.tensors[name]
        return read_tensor(self.tree / relative, info)

    def _source(self, name: str) -> Tensor:
        """Read a tensor of the checkpoint, with 0 for NaN and infinities if they are allowed."""
        value = self.checkpoint.read(name)
        if self.allow_nonfinite and value.dtype.is_floating_point:
            wide = value.float() if value.dtype.itemsize == 1 else value  # fp8 has no comparisons
            value = torch.where(wide.isfinite(), wide, torch.zeros((), dtype=wide.dtype))
        return value


class _Sample:
    """The rows of a layer that are quantized again: evenly spread, the first and the last among them.

    Args:
        spec: The layer.

    Attributes:
        places: The numbers of the rows, ascending.
    """

    def __init__(self, spec: LayerSpec) -> None:
        count = min(spec.out_features, max(SAMPLED_ROWS, SAMPLED_WEIGHTS // spec.features))
        self.places = np.unique(np.linspace(0, spec.out_features - 1, count).round().astype(int))
        self._rows: list[Tensor] = []

    @property
    def count(self) -> int:
        """Return the number of sampled rows."""
        return len(self.places)

    def add(self, rotated: Tensor, here: slice) -> None:
        """Take the sampled ones of some rows.

        Args:
            rotated: The rotated weight of the rows, fp32 [R, K].
            here: The rows.
        """
        wanted = self.places[(self.places >= here.start) & (self.places < here.stop)] - here.start
        self._rows.append(rotated[torch.from_numpy(wanted)].clone())

    def rows(self) -> Tensor:
        """Return the sampled rows of the rotated weight, fp32 [count, K]."""
        return torch.cat(self._rows)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one dtype have the same bytes; −0 is not 0, and a NaN is itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)))
