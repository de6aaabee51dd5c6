"""List the engines of an export from its manifest alone, as a deployment script would: ``list_engines.py OUT``."""

import json
import sys
from pathlib import Path


def main(out: Path) -> None:
    """Print path, size, SMs, activation bits and what executes of every engine in the export folder ``out``."""
    manifest = json.loads((out / "manifest.json").read_text())
    for engine in manifest["engines"]:
        mib = manifest["files"][engine["path"]]["bytes"] / 2**20
        print(f"\n{out / engine['path']}  ({mib:.1f} MiB)")
        print(f"  on SM {', '.join(engine['sm'])}, {engine['act_bits']}-bit activations: {engine['executes']}")
    print(f"\nmanifest  {out / 'manifest.json'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: list_engines.py OUT")
    main(Path(sys.argv[1]))
