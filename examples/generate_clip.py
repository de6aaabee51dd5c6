"""Generate a clip from Python and see why each step ran on which engine: ``generate_clip.py OUT PROMPT CLIP.mp4``."""

import sys
from pathlib import Path

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import GenerateRequest, generate
from dvdquant.deploy.generation.request import default_fps
from dvdquant.deploy.generation.video import enlarge, write_mp4


def main(out: Path, prompt: str, clip: Path) -> None:
    """Draw ``prompt`` with the export in ``out`` and print a line for every step."""
    request = GenerateRequest(prompt, steps=20, delta=0.2)
    result = generate(Artifact.open(out), request)
    for record in result.trace:
        if record.branch.startswith("cond"):
            print(f"step {record.step:2}  a{record.bits}  {record.reason}")
    write_mp4(clip, enlarge(result.frames), default_fps(len(result.frames)))
    print(f"{result.summary['average_bits']:.2f} activation bits on average, {result.seconds:.1f} s, {clip}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: generate_clip.py OUT PROMPT CLIP.mp4")
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
