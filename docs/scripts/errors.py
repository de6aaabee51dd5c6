"""The list of every error with its remedy, read out of the source: ``python docs/scripts/errors.py`` prints it.

An error is a call of a subclass of DvdquantError, or a pair of options that exclude each other (:class:`Clash`). Parts that
are filled in when it is raised stand as ``…``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dvdquant import errors
from dvdquant.clashes import Clash
from dvdquant.ops.cuda.errors import KernelError

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("dvdquant", "export", "deploy")
CLASSES = {name: getattr(errors, name) for name in errors.__all__ if name != "DvdquantError"}
CLASSES["KernelError"] = KernelError


@dataclass(frozen=True, order=True)
class Entry:
    """One error: its class, what it says, the remedy, and whether it lists what is available."""

    kind: str
    what: str
    fix: str
    lists: bool


def collect() -> list[Entry]:
    """Return every error of the source, without repetitions, in the order of its text."""
    nodes: list[ast.AST] = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            relative = path.relative_to(ROOT)
            if path.is_symlink() or any((ROOT / p).is_symlink() for p in relative.parents if str(p) != "."):
                continue
            nodes += ast.walk(ast.parse(path.read_text()))
    kinds = narrower(nodes)
    return sorted({entry for node in nodes if isinstance(node, ast.Call) and (entry := _entry(node, kinds))})


def narrower(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Return the classes of errors that say more in a trace, each with the listed class that a caller catches.

    Args:
        nodes: The syntax of the source.
    """
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.bases and node.name not in CLASSES]
    return {node.name: base for node in classes if (base := ast.unparse(node.bases[0])) in CLASSES}


def _entry(call: ast.Call, kinds: Mapping[str, str]) -> Entry | None:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "Clash" and len(call.args) > 1:
        remedy = next((_words(keyword.value) for keyword in call.keywords if keyword.arg == "fix"), Clash.fix)
        return Entry("UnsupportedError", _words(call.args[1]), remedy, lists=False)
    name = kinds.get(name, name)
    if name not in CLASSES or not call.args:
        return None
    fix = next((keyword.value for keyword in call.keywords if keyword.arg == "fix"), None)
    what = _words(call.args[0])
    lists = any(keyword.arg == "available" for keyword in call.keywords)
    return Entry(name, what, _words(fix) if fix is not None else "", lists) if what.strip(" …") else None


def _words(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.IfExp):
        return f"{_words(node.body)} / {_words(node.orelse)}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left) + _words(node.right)
    return "…"


def error_tables() -> str:
    """Return Markdown: a section for each class with its errors, remedies and places."""
    entries = collect()
    lines = []
    for kind, error in CLASSES.items():
        doc = (error.__doc__ or "").splitlines()[0]
        if general := error.remedy:
            doc += f" Where nothing better is known: {general}."
        lines += ["", f"## {kind}", "", doc, "", "| what is said | what to do |", "| --- | --- |"]
        lines += [f"| {_cell(e.what)} | {_remedy(e)} |" for e in entries if e.kind == kind]
    return "\n".join(lines)


def _remedy(entry: Entry) -> str:
    if not entry.fix:
        return "what is available stands in the error" if entry.lists else CLASSES[entry.kind].remedy
    return "the error says it" if not entry.fix.strip("… /") else _cell(entry.fix)


def _cell(text: str) -> str:
    text = " ".join(text.split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'"), ("*", "\\*")):
        text = text.replace(character, entity)
    return text.replace("_", "\\_").replace("[", "\\[")


if __name__ == "__main__":
    print(error_tables())
