"""Draw the rooms and who imports whom, from the imports themselves: ``python docs/scripts/rooms.py`` prints the SVG."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOX_WIDTH, BOX_HEIGHT, GAP, ROW = 148, 32, 16, 62
# Files of the package itself that stand above all rooms.
ABOVE = ("__init__", "__main__", "api")
# Where statements stand in statements. An import is one, so no expression is looked through.
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
FACE = "font: 13px system-ui, 'DejaVu Sans', sans-serif"


def imports() -> dict[str, set[str]]:
    """Return room -> rooms it imports. A room is a folder below dvdquant, export or deploy, or the files beside them."""
    found: dict[str, set[str]] = {}
    for top in ("dvdquant", "export", "deploy"):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT / top)
            if any((ROOT / top / part).is_symlink() for part in (relative, *relative.parents)):
                continue
            room = _room(top, relative.parts)
            targets = found.setdefault(room, set())
            for node in _running(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                targets |= {_room_of(name) for name in names if name.startswith("dvdquant.")} - {room}
    return {room: targets & found.keys() for room, targets in found.items()}


def for_types_only(node: ast.AST) -> bool:
    """Return whether the node is ``if TYPE_CHECKING:``. Its body never runs; its ``else`` does."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement but those under ``if TYPE_CHECKING``, which never run."""
    for block in _BLOCKS:
        if block == "body" and for_types_only(tree):
            continue
        for child in getattr(tree, block, ()):
            yield child
            yield from _running(child)


def _room(top: str, parts: tuple[str, ...]) -> str:
    if len(parts) > 1:
        return f"{top}/{parts[0]}"
    name = parts[0].removesuffix(".py")
    if name in ABOVE or (top == "dvdquant" and name == "__init__"):
        return "dvdquant.*" if top == "dvdquant" else f"{top}.*"
    return f"{top}/{name}"


def _room_of(module: str) -> str:
    parts = module.split(".")[1:]
    top = parts.pop(0) if parts[:1] in (["export"], ["deploy"]) else "dvdquant"
    return _room(top, (parts[0] if parts else "__init__",)) if len(parts) < 2 else f"{top}/{parts[0]}"


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the graph without arrows that a longer way makes: a uses b, b uses c, so a may use c."""

    def reach(room: str, seen: set[str]) -> set[str]:
        for target in graph[room] - seen:
            seen.add(target)
            reach(target, seen)
        return seen

    far = {room: set().union(*(reach(t, set()) - {t} for t in targets)) for room, targets in graph.items()}
    return {room: targets - far[room] for room, targets in graph.items()}


def levels(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the rooms by floor: each stands above all that it uses; rooms that use each other's files share a floor."""
    height: dict[str, int] = {}

    def of(room: str, above: tuple[str, ...]) -> int:
        if room not in height:
            below = [of(target, (*above, room)) for target in graph[room] if target not in (*above, room)]
            height[room] = 1 + max(below, default=-1)
        return height[room]

    for room in graph:
        of(room, ())
    floors: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for room in sorted(graph):
        floors[height[room]].append(room)
    return floors


def drawing() -> str:
    """Return the SVG: floors from the commands at the top down to what uses nothing."""
    graph = imports()
    floors = levels(graph)
    widest = max(len(floor) for floor in floors)
    width, rows = widest * (BOX_WIDTH + GAP) + GAP, len(floors)
    place: dict[str, tuple[float, float]] = {}
    for level, floor in enumerate(floors):
        left = (width - len(floor) * (BOX_WIDTH + GAP) + GAP) / 2
        for number, room in enumerate(floor):
            place[room] = (left + number * (BOX_WIDTH + GAP), (rows - 1 - level) * ROW + 10)
    lines, boxes = [], []
    for room, targets in sorted(reduced(graph).items()):
        x, y = place[room]
        for target in sorted(targets):
            tx, ty = place[target]
            if ty > y:
                start, end = (x + BOX_WIDTH / 2, y + BOX_HEIGHT), (tx + BOX_WIDTH / 2, ty)
                lines.append(f'<path class="use" d="M{start[0]:.0f} {start[1]:.0f}L{end[0]:.0f} {end[1]:.0f}"/>')
        kind = room.replace(".", "/").split("/")[0]
        boxes.append(f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"/>')
        boxes.append(f'<text x="{x + BOX_WIDTH / 2:.0f}" y="{y + 22:.0f}" text-anchor="middle">{room}</text>')
    style = (
        f"text{{{FACE};fill:#1f2328}} .use{{stroke:#8c959f;stroke-opacity:.45;fill:none}} rect{{stroke:#57606a}}"
        " .dvdquant{fill:#ddf4ff} .export{fill:#dafbe1} .deploy{fill:#fff8c5}"
    )
    size = f'viewBox="0 0 {width} {rows * ROW - ROW + BOX_HEIGHT + 20}"'
    body = "".join((*lines, *boxes))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="max-width:100%"><style>{style}</style>{body}</svg>'


if __name__ == "__main__":
    print(drawing())
