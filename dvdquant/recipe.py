"""Recipes: what is quantized and how, as one frozen, versioned value that travels with every artifact."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from dvdquant.errors import RecipeError
from dvdquant.system.files import strict_json
from dvdquant.system.records import brief, first_problem

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "RECIPES",
    "RECIPE_VERSION",
    "ActivationSpec",
    "Recipe",
    "WeightSpec",
    "error_name",
    "fitted_words",
    "get_recipe",
    "looks_at_inputs",
]

RECIPE_VERSION = 1
GROUP_SIZES = (0, 16, 32, 64, 128)
ZERO_POINTS = ("paper", "midrise", "symmetric", "real")
SOLVERS = ("search", "paper", "minmax")
INPUTS = ("ignored", "synthetic")
MAX_BLOCK = 1 << 20
MAX_GLOBS = 10_000
_STRICT = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class WeightSpec:
    """The weight grid: ``W ≈ scale · factor[group] · (codes − zero)`` with 4-bit signed codes of the rotated weight.

    Args:
        group_size: input channels that share a scale; 0 is the whole row (one scale per output channel).
        zero_point: ``paper`` a free integer per row; ``midrise`` −0.5 for all (codes stand for odd multiples of half a
            step); ``symmetric`` 0 for all; ``real`` a number per group in steps of 1/16, found together with the scale
            (8 bits more per group, and the least error).
        solver: ``search`` reaches the per-row optimum; ``paper`` is bounded init and descent as published; ``minmax``
            keeps the clip range at the extremes (the baseline).
    """

    __pydantic_config__ = _STRICT

    group_size: int = 0
    zero_point: Literal["paper", "midrise", "symmetric", "real"] = "midrise"
    solver: Literal["search", "paper", "minmax"] = "search"
    bits: int = 4


@dataclass(frozen=True)
class ActivationSpec:
    """The activation grid: symmetric codes, one fp32 scale per (token, group of ``group_size`` channels), online.

    Args:
        bits: 4, 6 or 8. 6 exists in simulation only (δ-GBS reaches an average of 6 by switching 4 and 8).
        group_size: channels that share a scale; 0 is the whole token.
    """

    __pydantic_config__ = _STRICT

    bits: int
    group_size: int = 0


@dataclass(frozen=True)
class Recipe:
    """What one export does. ``Recipe.from_json(recipe.to_json()) == recipe`` holds for every valid recipe.

    Args:
        activations: one graph, and one engine per target, is exported for each entry.
        rotation: Hadamard block along the input channels. ``auto`` takes the largest power of four up to 256 that
            divides K (its entries are powers of two, exact in every dtype); ``full`` the whole row; ``none`` no
            rotation; an integer that block.
        inputs: ``synthetic`` predicts the second moments of every layer's input without data, by one run of the model on
            synthetic latents (``quantize/hessian.py``), and rounds the codes with feedback (``quantize/gptq.py``);
            ``ignored`` looks at the weights alone, as the paper does.
        balance: multiply every input channel by a power of two, and its column of the weight by the inverse, so that
            outlier channels do not take the activation grid for themselves. Needs ``inputs="synthetic"``.
        signs: give these powers of two random signs, so that the rotation adds up no inputs of one sign. Needs ``balance``.
        shift: subtract the predicted mean from the inputs of layers where weights determine it, and add its product with the
            weights to the bias: what has a grid is smaller then. Needs ``inputs="synthetic"``.
        modulation: the linears that turn the timestep into shifts, scales and gates, where a family has a large one in
            every block: ``keep`` leaves them in 16 bit, ``a8`` packs their weights too and never gives them less than
            8-bit activations. They are a quarter of HunyuanVideo's weights, and every token sees their error.
        keep: globs of layer names that stay in 16 bit besides the family's own defaults.
        force: globs of layer names that are quantized although the family's defaults keep them.
    """

    __pydantic_config__ = _STRICT

    name: str
    activations: tuple[ActivationSpec, ...]
    weight: WeightSpec = field(default_factory=WeightSpec)
    rotation: str | int = "auto"
    inputs: Literal["ignored", "synthetic"] = "ignored"
    balance: bool = False
    signs: bool = False
    shift: bool = False
    modulation: Literal["keep", "a8"] = "keep"
    keep: tuple[str, ...] = ()
    force: tuple[str, ...] = ()
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        _check(self)

    def activation(self, bits: int) -> ActivationSpec:
        """The activation grid of the graph with ``bits`` bits; RecipeError if the recipe has none."""
        for spec in self.activations:
            if spec.bits == bits:
                return spec
        raise RecipeError(
            f"recipe {self.name!r} has no {bits}-bit activations", available=[f"{a.bits}" for a in self.activations]
        )

    @property
    def modulation_activation(self) -> ActivationSpec:
        """The least activation grid of a modulation linear: the recipe's own 8-bit one, or one scale per token."""
        return next((a for a in self.activations if a.bits == 8), ActivationSpec(8))

    def keeps(self, layer: str, family_keeps: tuple[str, ...]) -> bool:
        """Whether ``layer`` (its dotted module name) stays in 16 bit."""
        if any(fnmatchcase(layer, glob) for glob in self.force):
            return False
        return any(fnmatchcase(layer, glob) for glob in (*family_keeps, *self.keep))

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the manifest."""
        data = asdict(self)
        data["activations"] = [asdict(a) for a in self.activations]
        data["keep"], data["force"] = list(self.keep), list(self.force)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Recipe:
        """Inverse of :meth:`to_json`; RecipeError names the field that is missing, unknown or out of range."""
        from pydantic import ValidationError  # here: the commands' help needs recipes, not their schema

        try:
            text = data if isinstance(data, str) else json.dumps(data, allow_nan=False)
            known = strict_json(text.encode())
        except (TypeError, ValueError) as error:
            raise RecipeError(f"the recipe is not JSON: {error}") from error
        if not isinstance(known, dict):
            raise RecipeError(f"a recipe is a JSON object, not {type(known).__name__}")
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
            problem = first_problem(error, known)  # RecipeError where _check found it
            if problem.state == "is unknown":
                raise RecipeError(f"the recipe has an unknown field '{problem.field}'") from error
            raise RecipeError(f"recipe field {problem.field} {problem.state}", available=problem.allowed) from error
        return recipe

    def with_globs(self, keep: tuple[str, ...] = (), force: tuple[str, ...] = ()) -> Recipe:
        """The same recipe with more layers kept or forced."""
        return replace(self, keep=(*self.keep, *keep), force=(*self.force, *force))


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe)


def _check(recipe: Recipe) -> None:
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
    _one_of("inputs", recipe.inputs, INPUTS)
    _one_of("balance", recipe.balance, (False, True))
    if recipe.balance and recipe.inputs != "synthetic":
        raise RecipeError("a recipe that balances channels needs to know their inputs", fix="set inputs to 'synthetic'")
    _one_of("signs", recipe.signs, (False, True))
    if recipe.signs and not recipe.balance:
        raise RecipeError(
            "signs are those of the balance, and this recipe has none", fix="set balance, or signs to false"
        )
    _one_of("shift", recipe.shift, (False, True))
    if recipe.shift and recipe.inputs != "synthetic":
        raise RecipeError("a recipe that shifts inputs needs to know their mean", fix="set inputs to 'synthetic'")
    _one_of("modulation", recipe.modulation, ("keep", "a8"))
    if not recipe.activations:
        raise RecipeError("a recipe needs at least one activation grid", fix="add activations of 4 or 8 bits")
    bits = [a.bits for a in recipe.activations]
    if len(set(bits)) != len(bits):
        raise RecipeError(f"two activation grids of the same bits in {bits}", fix="one per bit-width")
    for spec in recipe.activations:
        _one_of("activations.bits", spec.bits, (4, 6, 8))
        _one_of("activations.group_size", spec.group_size, GROUP_SIZES)
    rotation = recipe.rotation
    if isinstance(rotation, bool) or not isinstance(rotation, (str, int)):
        raise RecipeError(f"rotation {rotation!r} is neither a name nor a block size")
    if isinstance(rotation, str):
        _one_of("rotation", rotation, ("auto", "full", "none"))
    elif rotation < 2:
        raise RecipeError(f"rotation block {rotation} is too small", fix="use 'none', 'auto', 'full' or a block ≥ 2")
    elif rotation > MAX_BLOCK:
        raise RecipeError(
            f"rotation block {brief(rotation)} is too large", available=f"at most {MAX_BLOCK}", fix="use 'full'"
        )


def _one_of(field_name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{field_name} is {brief(value)}", available=[repr(a) for a in allowed])


_A4, _A8 = ActivationSpec(4), ActivationSpec(8)


def _refined(
    name: str, activations: tuple[ActivationSpec, ...], weight: WeightSpec = WeightSpec(), fitted: bool = True
) -> Recipe:
    """With all that is known of the inputs without data; ``fitted`` to the narrow grid of 4-bit activations or not."""
    return Recipe(name, activations, weight, inputs="synthetic", balance=True, signs=fitted, shift=fitted)


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        # One scale per row and per token: runs on every integer tensor core, both graphs.
        _refined("w4a4", (_A4, _A8)),
        # 8-bit activations only; weight groups cost memory alone where the GEMM is 8-bit, and decide the error there. Signs
        # and shifts gain nothing on a grid of 255 levels.
        _refined("w4a8", (_A8,), WeightSpec(group_size=32, zero_point="real"), fitted=False),
        # Scales per 128 channels on both sides for the 4-bit graph. The kernels read a byte per group for the scale anyway;
        # one more for the zero-point takes 15 to 22 % off the error of the weights.
        _refined("w4a4-g128", (ActivationSpec(4, 128), _A8), WeightSpec(group_size=128, zero_point="real")),
        _refined("w4a4-g64", (ActivationSpec(4, 64), _A8), WeightSpec(group_size=64, zero_point="real")),
        # The same without a look at the inputs: BGR on the rotated weights alone. Quantizes without running the model.
        Recipe("weights-only", (_A4, _A8)),
        # Algorithm 1 as published: integer zero-points, bounded init and descent, whole-row rotation.
        Recipe("paper", (_A4, _A8), WeightSpec(zero_point="paper", solver="paper"), rotation="full"),
        # Round to nearest on the min-max range, unrotated: the baseline everything is measured against.
        Recipe("rtn", (_A4, _A8), WeightSpec(zero_point="paper", solver="minmax"), rotation="none"),
    )
}


def get_recipe(name: str) -> Recipe:
    """A named recipe; RecipeError lists the names there are."""
    try:
        return RECIPES[name]
    except KeyError:
        raise RecipeError(
            f"unknown recipe {name!r}", available=RECIPES, fix="pick one of these with --recipe"
        ) from None


def error_name(recipe: Mapping[str, Any]) -> str:
    """What ``relative_mse`` of a manifest's layers is an error of, under a recipe as ``to_json`` gives it."""
    return "output error on predicted inputs" if looks_at_inputs(recipe) else "weight error"


def fitted_words(recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe as ``to_json`` gives it does to inputs before the rotation, for people."""
    signs = " with random signs" if recipe.get("signs") else ""
    words = [f"channels balanced by powers of two{signs}"] if recipe.get("balance") else []
    return words + ["predicted means subtracted"] * bool(recipe.get("shift"))


def looks_at_inputs(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe as ``to_json`` gives it predicts the inputs of layers; those of older manifests do not say."""
    return recipe.get("inputs") == "synthetic"
