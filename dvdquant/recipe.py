"""Recipes: one frozen, versioned value that says what is quantized and how, and is stored in every export."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from dvdquant.errors import RecipeError
from dvdquant.system.files import strict_json
from dvdquant.system.records import brief, first_problem

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "ATTENTION",
    "Attention",
    "RECIPES",
    "RECIPE_VERSION",
    "ActivationSpec",
    "Recipe",
    "WeightSpec",
    "error_name",
    "fitted_text",
    "get_recipe",
    "looks_at_inputs",
]

RECIPE_VERSION = 2
_NAMES_OF_VERSION_1 = {"balance": "smooth", "signs": "random_signs"}
GROUP_SIZES = (0, 16, 32, 64, 128)
ZERO_POINTS = ("paper", "midrise", "symmetric", "float")
SOLVERS = ("search", "paper", "minmax")
INPUTS = ("ignored", "synthetic")
Attention = Literal["16", "int8", "fp8"]
ATTENTION: tuple[Attention, ...] = ("16", "int8", "fp8")
ROTATIONS = ("auto", "full", "none", "regular")
MAX_BLOCK = 1 << 20
MAX_GLOBS = 10_000
_STRICT = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class WeightSpec:
    """The weight grid: ``W ≈ scale · group_scale[group] · (codes − zero)`` with 4-bit signed codes of the rotated weight.

    Args:
        group_size: The number of input channels that share a scale: 16, 32, 64 or 128. 0 means the whole row (one scale
            per output channel).
        zero_point: ``paper`` is a free integer per row. ``midrise`` is −0.5 for all (codes stand for odd multiples of
            half a step). ``symmetric`` is 0 for all. ``float`` is a number per group in steps of 1/16, found together
            with the scale (8 bits more per group, and the least error).
        solver: ``search`` reaches the per-row optimum. ``paper`` is bounded init and descent as published. ``minmax``
            keeps the clip range at the extremes (the baseline).
        bits: The bits of the codes, always 4.
    """

    __pydantic_config__ = _STRICT

    group_size: int = 0
    zero_point: Literal["paper", "midrise", "symmetric", "float"] = "midrise"
    solver: Literal["search", "paper", "minmax"] = "search"
    bits: int = 4


@dataclass(frozen=True)
class ActivationSpec:
    """The activation grid: symmetric codes, one fp32 scale per (token, group of ``group_size`` channels), online.

    Args:
        bits: 4, 6 or 8. 6 exists in simulation only (δ-GBS reaches an average of 6 by switching 4 and 8).
        group_size: The number of channels that share a scale: 16, 32, 64 or 128. 0 means the whole token.
    """

    __pydantic_config__ = _STRICT

    bits: int
    group_size: int = 0


@dataclass(frozen=True)
class Recipe:
    """The recipe of an export. ``Recipe.from_json(recipe.to_json()) == recipe`` holds for every valid recipe.

    Args:
        name: The name of the recipe.
        activations: The activation grids. One graph, and one engine per target, is exported for each.
        weight: The weight grid.
        rotation: The Hadamard block along the input channels. ``auto`` takes the largest power of four up to 256 that
            divides K (its entries are powers of two, exact in every dtype). ``full`` takes the whole row, ``none`` no
            rotation, and an integer a block of that many channels. ``regular`` has the blocks of ``auto`` and the regular
            Hadamard matrix, and codes from −7 to 7: the grid of ConvRot, which others load. It needs a symmetric scale per
            row, predicted inputs, and none of the three fields below.
        inputs: ``synthetic`` predicts the second moments of every layer's input without data, by one run of the model
            on synthetic latents (``quantize/hessian.py``), and rounds the codes with feedback (``quantize/gptq.py``).
            ``ignored`` looks at the weights alone, as the paper does.
        smooth: Multiply every input channel by a power of two, and its column of the weight by the inverse, so that
            outlier channels do not take the activation grid for themselves. It needs ``inputs="synthetic"``.
        random_signs: Give these powers of two random signs, so that the rotation does not add up inputs of one sign. It needs
            ``smooth``.
        shift: Subtract the predicted mean from the inputs of the layers whose mean input is determined by weights, and
            add its product with the weights to the bias. The values on the grid are smaller then. It needs
            ``inputs="synthetic"``.
        modulation: The treatment of the linears that turn the timestep into shifts, scales and gates, in families with
            a large one in every block. ``keep`` leaves them in 16 bit. ``a8`` packs their weights too and never gives
            them less than 8-bit activations. They are a quarter of HunyuanVideo's weights, and every token sees their
            error.
        attention: The format of self-attention over long sequences: in PyTorch sessions that of
            ``ops/attention/definition.py``, in engines FP8 for ``int8`` and ``fp8`` where the SM has it
            (``export/passes/fp8_attention.py``). ``16`` leaves it in 16 bit; a recipe without this field reads so.
            Attention to text stays in 16 bit always, and so do short sequences: below 2048 tokens in PyTorch sessions,
            up to 256 in engines.
        keep: Globs of layer names that stay in 16 bit besides the family's own defaults.
        force: Globs of layer names that are quantized although the family's defaults keep them.
        version: The version of this format.

    Raises:
        RecipeError: A field is out of range, or two fields contradict each other.
    """

    __pydantic_config__ = _STRICT

    name: str
    activations: tuple[ActivationSpec, ...]
    weight: WeightSpec = field(default_factory=WeightSpec)
    rotation: str | int = "auto"
    inputs: Literal["ignored", "synthetic"] = "ignored"
    smooth: bool = False
    random_signs: bool = False
    shift: bool = False
    modulation: Literal["keep", "a8"] = "keep"
    attention: Attention = "16"
    keep: tuple[str, ...] = ()
    force: tuple[str, ...] = ()
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        _check(self)

    def activation(self, bits: int) -> ActivationSpec:
        """Return the activation grid of one of the graphs.

        Args:
            bits: The bits of the graph's activations.

        Raises:
            RecipeError: The recipe has no such graph.
        """
        for spec in self.activations:
            if spec.bits == bits:
                return spec
        raise RecipeError(
            f"recipe {self.name!r} has no {bits}-bit activations", available=[f"{a.bits}" for a in self.activations]
        )

    @property
    def modulation_activation(self) -> ActivationSpec:
        """Return the least activation grid of a modulation linear.

        It is the recipe's own 8-bit grid, or 8 bits with one scale per token if the recipe has none.
        """
        return next((a for a in self.activations if a.bits == 8), ActivationSpec(8))

    def keeps(self, layer: str, family_keeps: tuple[str, ...]) -> bool:
        """Return whether a layer stays in 16 bit.

        Args:
            layer: The dotted module name of the layer.
            family_keeps: Globs of the layers that the family keeps in 16 bit.
        """
        if any(fnmatchcase(layer, glob) for glob in self.force):
            return False
        return any(fnmatchcase(layer, glob) for glob in (*family_keeps, *self.keep))

    def with_activations(self, bits: Sequence[int]) -> Recipe:
        """Return the same recipe with the activation grids of some bits alone.

        Args:
            bits: The bits; none of them means all of the recipe's.

        Raises:
            RecipeError: The recipe has no such activations.
        """
        return replace(self, activations=tuple(map(self.activation, bits)) or self.activations)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a plain dict for the manifest."""
        data = asdict(self)
        data["activations"] = [asdict(a) for a in self.activations]
        data["keep"], data["force"] = list(self.keep), list(self.force)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Recipe:
        """Read a recipe from JSON, the inverse of :meth:`to_json`.

        Args:
            data: The recipe as :meth:`to_json` gives it, or as JSON text.

        Raises:
            RecipeError: A field is missing, unknown or out of range; the error names it.
        """
        from pydantic import ValidationError  # imported here: the help of the commands needs recipes without pydantic

        try:
            text = data if isinstance(data, str) else json.dumps(data, allow_nan=False)
            known = strict_json(text.encode())
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"the recipe is not JSON: {error}",
                fix="correct the file at that line and column; names and texts stand in double quotes",
            ) from error
        if not isinstance(known, dict):
            raise RecipeError(
                f"a recipe is a JSON object, not {type(known).__name__}",
                fix="put the fields between braces: dvdq-export --recipe NAME --dry-run shows what a recipe is",
            )
        if type(known.get("version")) is int and known["version"] == 1:
            known = _from_version_1(known)
            text = json.dumps(known)
        if type(known.get("version")) is not int or known["version"] != RECIPE_VERSION:
            raise RecipeError(
                f"recipe version {brief(known.get('version'))} is unknown",
                available=str(RECIPE_VERSION),
                fix="re-export with this version of dvdquant, or install the version that wrote it",
            )
        for name in ("activations", "keep", "force"):
            if isinstance(known.get(name), list) and len(known[name]) > MAX_GLOBS:
                raise RecipeError(f"recipe field {name} has {len(known[name])} items", available=f"at most {MAX_GLOBS}")
        try:
            recipe: Recipe = _adapter().validate_json(text)
        except ValidationError as error:
            problem = first_problem(error, known)  # raises the RecipeError if _check found the problem
            if problem.is_unknown:
                raise RecipeError(
                    f"the recipe has an unknown field '{problem.field}'",
                    fix="remove the field, or correct its name: docs/recipes.md lists them all",
                ) from error
            raise RecipeError(f"recipe field {problem.field} {problem.state}", available=problem.allowed) from error
        return recipe

    def with_globs(self, keep: tuple[str, ...] = (), force: tuple[str, ...] = ()) -> Recipe:
        """Return the same recipe with more layers kept or forced.

        Args:
            keep: Globs of further layers that stay in 16 bit.
            force: Globs of further layers that are quantized.
        """
        return replace(self, keep=(*self.keep, *keep), force=(*self.force, *force))

    def with_options(
        self,
        *,
        keep: Sequence[str] = (),
        force: Sequence[str] = (),
        activations: Sequence[int] = (),
        modulation: str | None = None,
        attention: str | None = None,
    ) -> Recipe:
        """Return the same recipe with what the options of an export say of it.

        Args:
            keep: Globs of further layers that stay in 16 bit.
            force: Globs of further layers that are quantized.
            activations: Bits of the activations that are made; none leaves all of them.
            modulation: ``keep`` or ``a8`` for the blocks' modulation linears; None leaves the recipe's.
            attention: ``16``, ``int8`` or ``fp8`` for self-attention; None leaves the recipe's.

        Raises:
            RecipeError: The recipe has no such activations, or cannot have such a value.
        """
        changed = self.with_globs(tuple(keep), tuple(force)).with_activations(activations)
        given = {"modulation": modulation, "attention": attention}
        return replace(changed, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    """Return pydantic's checker of recipes, built once."""
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe)


def _from_version_1(known: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe of version 1 with the names of this version."""
    renamed = {_NAMES_OF_VERSION_1.get(name, name): value for name, value in known.items()}
    weight = renamed.get("weight")
    if isinstance(weight, dict) and weight.get("zero_point") == "real":
        renamed["weight"] = weight | {"zero_point": "float"}
    return renamed | {"version": RECIPE_VERSION}


def _check(recipe: Recipe) -> None:
    """Check a recipe.

    Raises:
        RecipeError: A field is out of range, or two fields contradict each other.
    """
    # 1. The grid of the weights.
    weight = recipe.weight
    _one_of("weight.bits", weight.bits, (4,))
    _one_of("weight.group_size", weight.group_size, GROUP_SIZES)
    _one_of("weight.zero_point", weight.zero_point, ZERO_POINTS)
    _one_of("weight.solver", weight.solver, SOLVERS)
    if weight.zero_point == "paper" and weight.group_size:
        raise RecipeError(
            "zero_point 'paper' is one integer per row and cannot be combined with weight groups",
            fix="use weight.group_size 0, or zero_point 'midrise'",
        )
    # 2. What is done with the inputs of a layer before its rotation.
    _one_of("inputs", recipe.inputs, INPUTS)
    _one_of("smooth", recipe.smooth, (False, True))
    if recipe.smooth and recipe.inputs != "synthetic":
        raise RecipeError("a recipe that balances channels needs to know their inputs", fix="set inputs to 'synthetic'")
    _one_of("random_signs", recipe.random_signs, (False, True))
    if recipe.random_signs and not recipe.smooth:
        raise RecipeError(
            "random_signs are those of the smooth scales, and this recipe has none",
            fix="set smooth, or random_signs to false",
        )
    _one_of("shift", recipe.shift, (False, True))
    if recipe.shift and recipe.inputs != "synthetic":
        raise RecipeError("a recipe that shifts inputs needs to know their mean", fix="set inputs to 'synthetic'")
    _check_regular(recipe)
    # 3. Modulation, attention and the grids of activations.
    _one_of("modulation", recipe.modulation, ("keep", "a8"))
    _one_of("attention", recipe.attention, ATTENTION)
    if not recipe.activations:
        raise RecipeError("a recipe needs at least one activation grid", fix="add activations of 4 or 8 bits")
    bits = [a.bits for a in recipe.activations]
    if len(set(bits)) != len(bits):
        raise RecipeError(f"two activation grids of the same bits in {bits}", fix="one per bit-width")
    for spec in recipe.activations:
        _one_of("activations.bits", spec.bits, (4, 6, 8))
        _one_of("activations.group_size", spec.group_size, GROUP_SIZES)
    # 4. The rotation.
    rotation = recipe.rotation
    if isinstance(rotation, bool) or not isinstance(rotation, (str, int)):
        raise RecipeError(
            f"rotation {rotation!r} is neither a name nor a block size",
            fix="give auto, full, none, or the power of two of a block, such as 128",
        )
    if isinstance(rotation, str):
        _one_of("rotation", rotation, ROTATIONS)
    elif rotation < 2:
        raise RecipeError(f"rotation block {rotation} is too small", fix="use 'none', 'auto', 'full' or a block ≥ 2")
    elif rotation > MAX_BLOCK:
        raise RecipeError(
            f"rotation block {brief(rotation)} is too large", available=f"at most {MAX_BLOCK}", fix="use 'full'"
        )


def _check_regular(recipe: Recipe) -> None:
    """Check that a recipe of the regular rotation has ConvRot's grid.

    Raises:
        RecipeError: It asks for what that grid does not have.
    """
    if recipe.rotation != "regular":
        return
    if recipe.weight.zero_point != "symmetric" or recipe.weight.group_size:
        raise RecipeError(
            "rotation 'regular' has one scale per row and codes around zero",
            fix="set weight.zero_point to 'symmetric' and weight.group_size to 0, or take rotation 'auto'",
        )
    if recipe.inputs != "synthetic" or recipe.smooth or recipe.shift:
        raise RecipeError(
            "rotation 'regular' predicts inputs, and neither balances nor shifts channels",
            fix="set inputs to 'synthetic', smooth and shift to false, or take rotation 'auto'",
        )


def _one_of(field_name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check that a field has one of the allowed values.

    Raises:
        RecipeError: It has another one.
    """
    if value not in allowed:
        raise RecipeError(f"{field_name} is {brief(value)}", available=[repr(a) for a in allowed])


_A4, _A8 = ActivationSpec(4), ActivationSpec(8)


def _refined(
    name: str, activations: tuple[ActivationSpec, ...], weight: WeightSpec = WeightSpec(), fitted: bool = True
) -> Recipe:
    """Return a recipe that uses all that is known of the inputs without data.

    Args:
        name: The name of the recipe.
        activations: The activation grids.
        weight: The weight grid.
        fitted: Use signs and shifts too, which fit the inputs to the narrow grid of 4-bit activations.
    """
    return Recipe(name, activations, weight, inputs="synthetic", smooth=True, random_signs=fitted, shift=fitted)


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        # One scale per row and per token: both graphs run on every integer tensor core.
        _refined("w4a4", (_A4, _A8)),
        # 8-bit activations only. With an 8-bit GEMM, weight groups cost memory alone, and they decide the error. Signs
        # and shifts gain nothing on a grid of 255 levels.
        _refined("w4a8", (_A8,), WeightSpec(group_size=32, zero_point="float"), fitted=False),
        # Scales per 128 channels on both sides for the 4-bit graph. The kernels read a byte per group for the scale
        # anyway. One more byte for the zero-point takes 15 to 22 % off the error of the weights.
        _refined("w4a4-g128", (ActivationSpec(4, 128), _A8), WeightSpec(group_size=128, zero_point="float")),
        _refined("w4a4-g64", (ActivationSpec(4, 64), _A8), WeightSpec(group_size=64, zero_point="float")),
        # The grid of ConvRot, which ComfyUI and SGLang multiply with their own kernels: --also-write comfy.
        Recipe("convrot", (_A4, _A8), WeightSpec(zero_point="symmetric"), rotation="regular", inputs="synthetic"),
        # w4a4 without a look at the inputs: BGR on the rotated weights alone. It quantizes without running the model.
        Recipe("weights-only", (_A4, _A8)),
        # Algorithm 1 as published: integer zero-points, bounded init and descent, whole-row rotation.
        Recipe("paper", (_A4, _A8), WeightSpec(zero_point="paper", solver="paper"), rotation="full"),
        # Round to nearest on the min-max range, without rotation: the baseline of all measurements.
        Recipe("rtn", (_A4, _A8), WeightSpec(zero_point="paper", solver="minmax"), rotation="none"),
    )
}


def get_recipe(name: str) -> Recipe:
    """Return a named recipe.

    Args:
        name: One of the names in ``RECIPES``.

    Raises:
        RecipeError: There is no such recipe; the error lists the names.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise RecipeError(
            f"unknown recipe {name!r}", available=RECIPES, fix="pick one of these with --recipe"
        ) from None


def error_name(recipe: Mapping[str, Any]) -> str:
    """Return in words what kind of error ``relative_mse`` of a manifest's layers is.

    Args:
        recipe: The recipe of the export as ``to_json`` gives it.
    """
    return "output error on predicted inputs" if looks_at_inputs(recipe) else "weight error"


def fitted_text(recipe: Mapping[str, Any]) -> list[str]:
    """Return in words what a recipe does to inputs before the rotation.

    Args:
        recipe: The recipe as ``to_json`` gives it.
    """
    random_signs = " with random signs" if recipe.get("random_signs") else ""
    words = [f"channels balanced by powers of two{random_signs}"] if recipe.get("smooth") else []
    return words + ["predicted means subtracted"] * bool(recipe.get("shift"))


def looks_at_inputs(recipe: Mapping[str, Any]) -> bool:
    """Return whether a recipe predicts the inputs of layers; older manifests do not say, which counts as no.

    Args:
        recipe: The recipe as ``to_json`` gives it.
    """
    return recipe.get("inputs") == "synthetic"
