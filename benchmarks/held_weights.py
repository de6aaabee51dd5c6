"""Count the device memory for the weights of published models, packed and expanded, on every GPU.

    python benchmarks/held_weights.py                        # the table of docs/hardware.md
    python benchmarks/held_weights.py --model wan2.1-14b --recipe w4a8 --bits 8
    python benchmarks/held_weights.py --library              # every layer is asked of the kernels' library, too
    python benchmarks/held_weights.py --before               # what the plugin held until 2026-11-28, and what it holds now
    python benchmarks/held_weights.py --auto                 # what --weights auto holds where packed weights cost too much
    python benchmarks/held_weights.py --kept                 # and the largest tensors that stay in 16 bit

Nothing is downloaded and no weight is read: the layers come from the model's published config on meta tensors, the bytes of
each form from the layouts of the kernels. The cost of packed weights is modelled (:mod:`dvdquant.model.held_weights`), at
480 × 832 and 81 frames.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import CONFIGS, config_of
from dvdquant.hardware.capabilities import CAPABILITIES, sm_number
from dvdquant.model.families import Axis, Sizes
from dvdquant.model.held_weights import HeldWeights, held_weights, largest_kept, shape_of
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.model.weight_choice import choose_weights
from dvdquant.ops.cuda.find import load_library
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.packed_rows import group_bytes
from dvdquant.recipe import get_recipe

GIB = 2**30
# Pixels and frames of the cost.
HEIGHT, WIDTH, FRAMES = 480, 832, 81


def models() -> list[str]:
    """Return the names of the published configs, the smallest model first."""
    return sorted((path.stem for path in CONFIGS.glob("*.json")), key=_order)


def _order(name: str) -> tuple[int, str]:
    known = ["wan2.1-1.3b", "ltx-video-2b", "wan2.2-5b", "cogvideox-5b", "hunyuan-video", "wan2.1-14b"]
    return (known.index(name) if name in known else len(known), name)


def plan_of(name: str, recipe: str) -> ModelPlan:
    """Return the plan of a model.

    Args:
        name: The name of its config.
        recipe: The name of the recipe.
    """
    return plan_model(config_of(name), get_recipe(recipe), torch.bfloat16)


def sizes_of(plan: ModelPlan) -> Sizes:
    """Return the sizes in latents of a clip of 480 × 832 and some 81 frames.

    Args:
        plan: The plan of the model.
    """
    scales = plan.family.vae_scale
    height, width = (
        Axis.fixed(size // scale // patch * patch)
        for size, scale, patch in zip((HEIGHT, WIDTH), scales[1:], plan.family.patch()[1:])
    )
    frames = plan.family.latent_frames(FRAMES) // plan.family.patch()[0] * plan.family.patch()[0]
    return Sizes(Axis.fixed(frames), height, width, plan.family.default_text_tokens)


def asked(plan: ModelPlan, library: KernelLibrary, sm: int, bits: Sequence[int]) -> tuple[int, int]:
    """Return the packed and the expanded bytes of the quantized layers as the kernels' library gives them.

    Args:
        plan: The plan of the model.
        library: The kernels' library; no GPU is needed.
        sm: The compute capability, major · 10 + minor.
        bits: The activation bits.
    """
    packed = expanded = 0
    for spec in plan.layers:
        layers = [shape_of(spec, plan, width) for width in bits]
        forms = {found.form: found.prepared_bytes for found in (library.plan_layer(layer, sm) for layer in layers)}
        packed += spec.out_features * spec.features // 2 + sum(group_bytes(layers[0]))
        packed += library.rows_bytes(layers[0], sm)
        expanded += sum(forms.values())
    return packed, expanded


def rows(name: str, recipe: str, bits: Sequence[int], library: KernelLibrary | None) -> list[str]:
    """Return the lines of the table of one model: one for each group of GPUs that hold the same.

    Args:
        name: The name of its config.
        recipe: The name of the recipe.
        bits: The activation bits.
        library: The library that every count is compared with, or None.

    Raises:
        SystemExit: The library counts otherwise.
    """
    return _lines(name, recipe, bits, _cells, library)


def before_rows(name: str, recipe: str, bits: Sequence[int]) -> list[str]:
    """Return the lines of what the plugin held of one model until 2026-11-28, and what it holds now: one for each group of GPUs.

    Args:
        name: The name of its config.
        recipe: The name of the recipe.
        bits: The activation bits.
    """
    return _lines(name, recipe, bits, _before_cells)


def _lines(
    name: str,
    recipe: str,
    bits: Sequence[int],
    cells: Callable[[Sequence[HeldWeights]], str],
    library: KernelLibrary | None = None,
) -> list[str]:
    """Return a line for each group of GPUs that hold the same. SystemExit where the library counts otherwise."""
    plan = plan_of(name, recipe)
    sizes = sizes_of(plan)
    found: dict[tuple[int, int], list[tuple[str, HeldWeights]]] = {}
    for sm, facts in CAPABILITIES.items():
        if not facts.kernels or facts.refused:
            continue
        held = held_weights(plan, sm_number(sm), bits, sizes)
        if library is not None and asked(plan, library, sm_number(sm), bits) != (held.packed, held.expanded):
            raise SystemExit(f"{name} on SM {sm}: the kernels' library counts otherwise")
        found.setdefault((held.expanded, held.packed), []).append((sm, held))
    lines = []
    for number, group in enumerate(found.values()):
        head = f"{name} | {2 * plan.all_weights / GIB:.2f}" if number == 0 else " | "
        lines.append(f"| {head} | {_sms([sm for sm, _ in group])} | {cells([held for _, held in group])} |")
    return lines


def auto_rows(name: str, recipe: str, bits: Sequence[int]) -> list[str]:
    """Return the lines of what ``auto`` holds of one model: one for each GPU on which packed weights cost more than the limit.

    Args:
        name: The name of its config.
        recipe: The name of the recipe.
        bits: The activation bits.
    """
    plan = plan_of(name, recipe)
    sizes, lines = sizes_of(plan), []
    for sm, facts in CAPABILITIES.items():
        if not facts.kernels or facts.refused:
            continue
        held = held_weights(plan, sm_number(sm), bits, sizes)
        choices = {plugin: choose_weights(held, "auto", plugin=plugin) for plugin in (False, True)}
        torch_form = choices[False]
        if torch_form.form == "packed":
            continue
        cells = [f"{100 * held.cost:.1f}", f"{100 * torch_form.share:.0f}"]
        for plugin, choice in choices.items():
            packed, expanded = held.nbytes("packed", plugin) / GIB, held.nbytes("expanded", plugin) / GIB
            cells.append(f"{packed:.2f} / **{choice.nbytes / GIB:.2f}** / {expanded:.2f}")
        lines.append(f"| {name} | {sm} | {' | '.join(cells)} | {100 * torch_form.cost:.1f} |")
    return lines


def both_kept(held: HeldWeights) -> int:
    """Return what engines with the plugin held until 2026-11-28: packed inputs, and a copy in each form that a path multiplies.

    Of a weight on a GPU with 4-bit tensor cores that was half a byte packed, half a byte for them, and one for 8 bits. What is
    not quantized is counted once.

    Args:
        held: The bytes of the transformer on the GPU.
    """
    return held.kept + held.stored + held.expanded


def _sms(sms: Sequence[str]) -> str:
    return ", ".join(sms) if len(sms) < 5 else f"{sms[0]} to {sms[-1]}"


def _cells(group: Sequence[HeldWeights]) -> str:
    first = group[0]
    costs = sorted(100 * held.cost for held in group)
    cost = f"{costs[0]:.1f}" if costs[0] == costs[-1] else f"{costs[0]:.1f} to {costs[-1]:.1f}"
    sizes = (
        first.nbytes("expanded"), first.nbytes("expanded", plugin=True),
        first.nbytes("packed"), first.nbytes("packed", plugin=True),
        first.kept + first.stored, first.kept,
    )  # fmt: skip
    return " | ".join([*(f"{size / GIB:.2f}" for size in sizes), f"{first.scratch / 2**20:.0f}", cost])


def _before_cells(group: Sequence[HeldWeights]) -> str:
    held = group[0]
    sizes = (both_kept(held), held.nbytes("packed", plugin=True), held.nbytes("expanded", plugin=True))
    return " | ".join(f"{size / GIB:.2f}" for size in sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables.

    Args:
        arguments: The command line; None means that of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=models(), help="only this one; repeat it for several")
    parser.add_argument("--recipe", default="w4a4-g64", help="the recipe (default: w4a4-g64)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], help="the widths that are loaded (default: 4 8)")
    parser.add_argument("--library", action="store_true", help="compare with the built library of the kernels")
    parser.add_argument("--kept", action="store_true", help="list the largest tensors in 16 bit, too")
    parser.add_argument(
        "--auto", action="store_true", help="what --weights auto holds where packed weights cost too much"
    )
    parser.add_argument("--before", action="store_true", help="what the plugin held until 2026-11-28")
    options = parser.parse_args(arguments)
    if options.before:
        print("| model | bf16, GiB | SM | plugin until 2026-11-28 | now, packed | now, expanded |")
        print("|---|---|---|---|---|---|")
        for name in options.model or models():
            for line in before_rows(name, options.recipe, options.bits):
                print(line)
        return
    if options.auto:
        print("| model | SM | all packed, % of a step | of it expanded, % | PyTorch, GiB | plugin, GiB | % of a step |")
        print("|---|---|---|---|---|---|---|")
        for name in options.model or models():
            for line in auto_rows(name, options.recipe, options.bits):
                print(line)
        return
    library = load_library() if options.library else None
    print(
        "| model | bf16, GiB | SM | expanded, PyTorch | expanded, plugin | packed, PyTorch | packed, plugin "
        "| files | of it not quantized | scratch, MiB | cost of a step, % [modelled] |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.model or models():
        for line in rows(name, options.recipe, options.bits, library):
            print(line)
    for name in (options.model or models()) if options.kept else ():
        print(f"\n{name}, not quantized:")
        for tensor in largest_kept(plan_of(name, options.recipe)):
            print(f"  {tensor.nbytes / 2**20:8.1f} MiB  {tensor.name} {list(tensor.shape)}")


if __name__ == "__main__":
    main()
