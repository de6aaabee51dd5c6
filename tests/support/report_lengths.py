"""Report files of more than 500 lines and functions of more than 60: questions to ask, not errors.

``python tests/support/report_lengths.py`` or ``make lengths``. Lines of a function do not count its docstring.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("dvdquant", "export", "deploy", "kernels", "benchmarks")
MOST_OF_FILE, MOST_OF_FUNCTION = 500, 60


def own_files() -> list[Path]:
    """Return the Python files of the project, without what its symbolic links lead to."""
    return sorted(
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not any(part.is_symlink() for part in path.parents if part != ROOT and ROOT in part.parents)
    )


def functions(tree: ast.Module) -> list[tuple[str, int, int]]:
    """Return (name, first line, number of lines without the docstring) of every function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                text = node.body[0]
                lines -= (text.end_lineno or text.lineno) - text.lineno + 1
            found.append((node.name, node.lineno, lines))
    return found


def main() -> None:
    """Print both lists, longest first."""
    files, long = [], []
    for path in own_files():
        text = path.read_text(encoding="utf-8")
        files.append((text.count("\n"), path.relative_to(ROOT)))
        for name, line, lines in functions(ast.parse(text)):
            long.append((lines, f"{path.relative_to(ROOT)}:{line} {name}"))
    print(f"files of more than {MOST_OF_FILE} lines")
    for lines, place in sorted(files, reverse=True):
        if lines > MOST_OF_FILE:
            print(f"  {lines:5d}  {place}")
    print(f"functions of more than {MOST_OF_FUNCTION} lines")
    for lines, where in sorted(long, reverse=True):
        if lines > MOST_OF_FUNCTION:
            print(f"  {lines:5d}  {where}")


if __name__ == "__main__":
    main()
