"""``dvdq bench``: how long a call of each engine of an export takes on this machine, beside the original model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.clashes import refuse_clashes, session_clashes
from dvdquant.cli.shared.attention_options import takes_attention
from dvdquant.cli.shared.common import (
    CUDA_GRAPHS,
    FUSE,
    ExamplesCommand,
    echo,
    loading,
    runs_on,
    setup_logging,
    table,
    takes_plugins,
)
from dvdquant.cli.shared.paths import EXPORT, PATH, WORD
from dvdquant.system.devices import check_device_word
from dvdquant.system.whole_file import check_writable, write_whole
from dvdquant.text import amount, json_text

if TYPE_CHECKING:
    from dvdquant.deploy.timing.bench import BenchResult

EXAMPLES = """
# every bit-width on what dvdq run would take here
dvdq bench out/wan

# what the export gains here over the original model, eager and compiled
dvdq bench out/wan --original

# one backend and width, the largest size of the export, all samples as JSON
dvdq bench out/wan --backend pytorch --bits 8 --size max --json

# more calls, and the result in a file
dvdq bench out/wan --repeats 50 --seconds 300 -o bench.json
"""

_YES = {True: "yes", False: "no"}


@click.command(cls=ExamplesCommand, examples=EXAMPLES)
@click.argument("out", type=EXPORT)
@click.option("--bits", type=click.Choice(["4", "6", "8"]), multiple=True, help="Activation bits.  [default: all]")
@click.option("--component", "components", type=WORD, multiple=True, help="Such as transformer_2.  [default: all]")
@click.option(
    "--size", "which", type=click.Choice(["min", "opt", "max"]), default="opt", show_default=True,
    help="Of an export for a range of sizes: the least, the one it is tuned for, the greatest.",
)  # fmt: skip
@click.option(
    "--warm-up",
    type=click.IntRange(0, 1000),
    default=2,
    show_default=True,
    help="Calls after the first that do not count.",
)
@click.option(
    "--repeats", type=click.IntRange(1, 100_000), default=20, show_default=True, help="Counted calls, at most."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 86_400),
    default=60.0,
    show_default=True,
    help="No turn begins after this time.",
)
@runs_on
@click.option("--compile", is_flag=True, help="Run in PyTorch and compile the transformer's blocks.")
@click.option("--fuse/--no-fuse", default=None, help=FUSE)
@click.option("--cuda-graphs", is_flag=True, help=CUDA_GRAPHS)
@takes_plugins
@takes_attention
@click.option(
    "--original",
    is_flag=True,
    help="Time the model that the export was made of, too, in 16 bits (fp32 on a CPU) with random weights, eager and "
    "compiled by PyTorch. Its weights need not fit the device: its blocks share them.",
)
@click.option("-o", "--output", type=PATH, metavar="PATH", help="Write the result with all samples as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print that JSON instead of the table.")
@click.option("-v", "--verbose", count=True, help="More log; twice for the libraries' too.")
@click.version_option(__version__, prog_name="dvdq bench")
def main(out: Path, bits: tuple[str, ...], output: Path | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Time the export in folder OUT: one call of its transformer at each bit-width, on random inputs.

    A call is one forward pass; a step with guidance is two. Text encoder, scheduler and VAE are not in it.
    """
    setup_logging(verbose, "text")
    refuse_clashes(session_clashes(options))
    check_device_word(options["device"])
    from dvdquant.artifact.manifest import load_manifest

    manifest = load_manifest(out)  # before PyTorch, which takes seconds to load
    if output is not None:
        check_writable(output, make_folder=False)
    loading("PyTorch and the runtime", "json" if as_json else "text")
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.timing.bench import bench
    from dvdquant.system.progress import Progress

    widths = tuple(int(each) for each in bits) or None
    progress = Progress("quiet" if as_json else "text")
    result = bench(Artifact.of(out, manifest), bits=widths, progress=progress, **options)
    if output is not None:
        write_whole(output, (json_text(result.to_json(), indent=1) + "\n").encode())
    echo(json_text(result.to_json(), indent=1) if as_json else _text(result))


def _text(result: BenchResult) -> str:
    """Return the table: times in milliseconds, and how many times as fast as the original or the widest."""
    rows = []
    for each in result.timings:
        low, high = each.quartiles
        rows.append(
            (
                each.component,
                each.name,
                f"{1e3 * each.median:.2f}",
                f"{1e3 * low:.2f} to {1e3 * high:.2f}",
                f"{1e3 * min(each.seconds):.2f}",
                len(each.seconds),
                f"{1e3 * each.first:.0f}",
                f"{result.baseline(each.component).median / each.median:.2f}",
            )
        )
    header = ("transformer", "", "median, ms", "middle half", "least", "calls", "first", "times as fast")
    held = {name: sum(sizes.values()) for name, sizes in result.resident_bytes.items()}
    executes = dict.fromkeys(f"{each.name}: {each.executes}" for each in result.timings)
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in result.sizes.items())
    return "\n".join(
        [
            table(header, rows, right=(2, 3, 4, 5, 6, 7)),
            *executes,
            *(f"{name} not timed: {reason}" for name, reason in result.not_timed.items()),
            *(f"{name}: times as fast as {result.baseline(name).name}" for name in _compared(result)),
            f"inputs: {shapes}",
            f"held between calls: {', '.join(f'{name} {amount(size)}' for name, size in held.items())}; "
            f"weights {result.weights}",
            *dict.fromkeys(_switched_text(result, name) for name in result.attention),
            f"measured here: {result.backend} on {result.device}; {result.machine}",
        ]
    )


def _compared(result: BenchResult) -> list[str]:
    """Return the transformers that have more than one row, one of which the others are held against."""
    rows = Counter(each.component for each in result.timings)
    return [name for name, count in rows.items() if count > 1]


def _switched_text(result: BenchResult, name: str) -> str:
    """Return which attention ran in a transformer, and whether it was fused and its steps repeated."""
    ran = result.attention[name]
    if isinstance(ran, dict):
        ran = f"{ran['format']}, by {ran['library']}" if ran["library"] else f"16, not {ran['wanted']}"
    return f"attention {ran}; fused: {_YES[result.fused[name]]}; CUDA graphs: {_YES[result.cuda_graphs[name]]}"


if __name__ == "__main__":
    main()
