"""Run a notebook, and turn one that has run into a page.

``python docs/scripts/notebook.py`` runs examples/wan2.1/wan2.1.ipynb on the toy model and keeps what it said in the file,
which the site shows. The tests run the same file with other parameters.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "wan2.1" / "wan2.1.ipynb"
SHOWN = {"OUT": "out/tiny-wan", "LORA": "made", "SERVE_PORT": 8014}
TIMEOUT = 1200  # seconds a cell
# Bars and other control sequences of a terminal.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|.*\r(?!\n)")


def run(path: Path, folder: Path, parameters: Mapping[str, Any]) -> Any:
    """Run a notebook in a kernel of its own, and return it with its outputs.

    Args:
        path: The notebook.
        folder: The folder that it runs in.
        parameters: Values for names of the cell that is tagged ``parameters``.

    Raises:
        ValueError: A name is none of that cell.
        CellExecutionError: A cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    index = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    known = {
        target.id
        for node in ast.parse(notebook.cells[index].source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if unknown := sorted(set(parameters) - known):
        raise ValueError(f"the notebook has no parameter {unknown[0]}; it has {', '.join(sorted(known))}")
    given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(given))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(path.parent)])
    try:
        NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    del notebook.cells[index + 1]
    return notebook


def said(notebook: Any) -> str:
    """Return everything that a notebook printed.

    Args:
        notebook: A notebook that has run.
    """
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def page(path: Path) -> str:
    """Return a notebook that has run as Markdown, its headings one level lower.

    Args:
        path: The notebook.
    """
    import json

    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"^#", "##", source, flags=re.MULTILINE))
            continue
        parts.append(f"```py\n{source}\n```")
        text = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
        if text.strip():
            parts.append("```text\n" + _CONTROL.sub("", text).strip("\n").replace("```", "'''") + "\n```")
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                data = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f"![what this cell shows](data:image/png;base64,{data})")
    return "\n\n".join(parts)


def main() -> None:
    """Run the notebook as the site shows it, and write it back."""
    import nbformat

    notebook = run(NOTEBOOK, NOTEBOOK.parent, SHOWN)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            # Bars and logs belong to a terminal; where the file lies is nobody's business.
            cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.name == "stdout"]
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = _CONTROL.sub("", output.text).replace(f"{ROOT}/", "")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n")
    print(said(notebook)[-2000:], file=sys.stderr)


if __name__ == "__main__":
    main()
