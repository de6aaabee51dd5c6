"""What mkdocs asks for while it builds the site: tables from the code, the list of errors, pages that live elsewhere.

A page holds ``<!-- table: NAME -->`` where a generated table goes, ``<!-- file: PATH -->`` where a page of the repository
goes, and ``<!-- notebook: PATH -->`` where a notebook with its outputs goes. So nothing generated is kept in docs/, and
nothing can be out of date.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import errors  # noqa: E402
import notebook  # noqa: E402
import rooms  # noqa: E402
import tables  # noqa: E402

TABLES: dict[str, Callable[[], str]] = {
    **tables.TABLES,
    "errors": errors.error_tables,
    "schema": tables.schema_tables,
    "rooms": rooms.drawing,
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with its tables filled in and its files taken in."""
    here = os.path.dirname(page.file.src_uri)
    markdown = re.sub(r"<!-- table: ([\w-]+) -->", lambda match: TABLES[match[1]](), markdown)
    markdown = re.sub(r"<!-- notebook: (\S+) -->", lambda match: notebook.page(ROOT / match[1]), markdown)
    return re.sub(r"<!-- file: (\S+) -->", lambda match: _page(match[1], here), markdown)


def _page(name: str, here: str) -> str:
    """Return a page of the repository without its first heading, its links to files outside of docs/ as plain text.

    Args:
        name: the page, from the root of the repository. here: folder, inside docs/, of the page that takes it in.
    """
    text = (ROOT / name).read_text()
    text = re.sub(r"\A# .*\n", "", text)
    folder = (ROOT / name).parent

    def link(match: re.Match[str]) -> str:
        target = match[2]
        inside = (folder / target.partition("#")[0]).resolve()
        docs = ROOT / "docs"
        if re.match(r"\w+:|#", target):
            return match[0]
        if inside.is_relative_to(docs):
            return f"[{match[1]}]({os.path.relpath(inside, docs / here)})"
        return f"{match[1]} (`{inside.relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)
