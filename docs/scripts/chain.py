"""Draw the chain of README.md as docs/images/chain.svg: ``python docs/scripts/chain.py``."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 344
BOX_WIDTH, GAP, MARGIN, TOP, BOX_HEIGHT = 172, 30, 10, 10, 126

# Neutral greys where a viewer ignores the media query: both read on white and on black.
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
  .title { font-size: 16px; font-weight: 600; }
  .note, .plain, .later-title { fill: #7d8590; font-size: 13px; }
  .later-title { font-size: 16px; font-weight: 600; }
  .box { fill: #ddf4ff; stroke: #0969da; stroke-width: 1.5; }
  .later { fill: none; stroke: #848d97; stroke-width: 1.5; stroke-dasharray: 6 4; }
  .bar { fill: #dafbe1; stroke: #1a7f37; stroke-width: 1.5; }
  .arrow { stroke: #848d97; stroke-width: 2; fill: none; }
  .head { fill: #848d97; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #0c2d4d; stroke: #4493f8; }
    .bar { fill: #0f2d1a; stroke: #3fb950; }
    text { fill: #e6edf3; }
    .plain, .note, .later-title { fill: #9198a1; }
  }
"""

# Title, what it is, how it is checked.
STAGES = (
    (
        "checkpoint",
        ("diffusers folder or", "hub id; safetensors", "read tensor by tensor"),
        ("Wan · HunyuanVideo", "CogVideoX · LTX-Video"),
    ),
    (
        "quantize",
        ("Hadamard rotation;", "4-bit grid per row", "by BGR, without data"),
        ("error of each layer", "beside min-max"),
    ),
    (
        "packed weights",
        ("4-bit codes and scales", "in one file, which", "every graph reads"),
        ("packing is exact", "both ways"),
    ),
    (
        "ONNX graphs",
        ("a4 and a8, each as", "QuantLinear nodes", "and as standard QDQ"),
        ("--verify: ONNX Runtime", "against fp64 PyTorch"),
    ),
    (
        "engines",
        ("TensorRT-RTX, a4, a8", "for SM 8.0 8.6 8.9 12.x", "built without a GPU"),
        ("operand types read back", "from the builder"),
    ),
)
# Column, kind of box, title, what it is.
BELOW = (
    (2, "later", "TensorRT + plugin", "the same two graphs, own CUDA kernels"),
    (4, "box", "runtime", "picks a4, a8 or skip per step (δ-GBS)"),
)


def _left(column: int) -> int:
    return MARGIN + column * (BOX_WIDTH + GAP)


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="middle">{escape(words)}</text>'


def _box(x: int, y: int, width: int, height: int, kind: str) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'


def _arrow(points: str) -> str:
    return f'<path class="arrow" d="{points}" marker-end="url(#head)"/>'


def _stages() -> list[str]:
    parts = []
    for column, (title, lines, checks) in enumerate(STAGES):
        left = _left(column)
        middle = left + BOX_WIDTH / 2
        parts += [_box(left, TOP, BOX_WIDTH, BOX_HEIGHT, "box"), _text(middle, TOP + 30, title, "title")]
        parts += [_text(middle, TOP + 58 + 22 * i, line, "small") for i, line in enumerate(lines)]
        parts += [_text(middle, TOP + BOX_HEIGHT + 24 + 19 * i, line, "note") for i, line in enumerate(checks)]
        if column:
            y = TOP + BOX_HEIGHT // 2
            parts.append(_arrow(f"M{left - GAP + 3} {y}H{left - 9}"))
    return parts


def _below() -> list[str]:
    y, height = 274, 60
    parts = [_text(_left(0) + BOX_WIDTH / 2, y + 27, "dashed: compiled,", "plain")]
    parts.append(_text(_left(0) + BOX_WIDTH / 2, y + 45, "has not run yet", "plain"))
    for column, kind, title, words in BELOW:
        left = _left(column - 1)
        width = 2 * BOX_WIDTH + GAP
        title_kind, words_kind = ("later-title", "plain") if kind == "later" else ("title", "small")
        parts += [_box(left, y, width, height, kind), _text(left + width / 2, y + 25, title, title_kind)]
        parts += [_text(left + width / 2, y + 46, words, words_kind)]
    right = _left(3)
    return [*parts, _arrow(f"M{right - GAP + 3} {y + height // 2}H{right - 9}")]


def draw() -> str:
    """The picture as SVG text; the same text every time."""
    bar = TOP + BOX_HEIGHT + 62
    words = "manifest.json, written last: hash of every file, error of every layer, what executes on each SM"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'aria-label="checkpoint to quantize to packed weights to ONNX graphs to engines">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="4" refY="5" markerWidth="5" markerHeight="5" '
            'orient="auto"><path class="head" d="M0 0L10 5L0 10z"/></marker></defs>',
            *_stages(),
            _box(_left(0), bar, WIDTH - 2 * MARGIN, 40, "bar"),
            _text(WIDTH / 2, bar + 25, words, "small"),
            *_below(),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    (Path(__file__).resolve().parents[1] / "images" / "chain.svg").write_text(draw())
