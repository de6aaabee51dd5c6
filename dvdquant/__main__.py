"""``python -m dvdquant`` lists the commands."""

from __future__ import annotations

from dvdquant import __version__

COMMANDS = {
    "dvdq-export": "quantize a model and write graphs and engines",
    "dvdq-inspect": "show what an export holds, and check its files",
    "dvdq-plan": "find the δ of step switching for a wanted average of bits or time",
    "dvdq-push": "put an export on the hub, where others read it by its name",
    "dvdq-run": "draw clips with an export, switching engines per step",
}


def main() -> None:
    """Print the commands with one line each."""
    print(f"dvdquant {__version__}: video diffusion transformers with 4-bit weights, as TensorRT engines\n")
    for name, purpose in COMMANDS.items():
        print(f"  {name:<14}{purpose}")
    print("\nEach has --help with examples. In Python: import dvdquant; help(dvdquant.export_model)")


if __name__ == "__main__":
    main()
