"""README.md says what the code does: links, commands, tables and the picture."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = (".", "benchmarks", "deploy", "docs", "examples/tiny-wan", "kernels", "plugins")
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _commands(text: str) -> list[list[str]]:
    """Words of every make, dvdq-… and python line in the console blocks of a page, and of dvdq-… in code spans."""
    blocks = re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    joined = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").strip() for line in joined.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


def _command(name: str) -> click.Command:
    module, _, function = PROJECT["scripts"][name].partition(":")
    command = getattr(import_module(module), function)
    assert isinstance(command, click.Command)
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset|href)=\"([^\"#]+)", page.read_text())
    for link in filter(None, (a or b for a, b in links)):
        if not re.match(r"\w+:", link):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_named_files_exist() -> None:
    names = re.findall(r"`((?:tests|benchmarks|export|dvdquant|docs|examples)/[\w./-]+)`", README)
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    makefile = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, *arguments in _commands(page.read_text()):
        program = Path(name).name
        if program == "make":
            targets = [word for word in arguments if "=" not in word]
            assert set(targets) <= makefile, targets
        elif program in PROJECT["scripts"]:
            _command(program).make_context(program, arguments)
        elif program == "python":
            assert (ROOT / arguments[0]).exists(), arguments
        else:
            pytest.fail(f"{page.relative_to(ROOT)} has a command this test does not know: {name}")


def test_the_two_commands_are_there() -> None:
    commands = _commands(README)
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands


def test_options_named_in_the_text_exist() -> None:
    """Each `--option` in a code span belongs to some command."""
    known = {o for name in PROJECT["scripts"] for p in _command(name).params for o in (*p.opts, *p.secondary_opts)}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w=-])--[a-z][a-z-]+", " ".join(re.findall(r"`[^`]+`", prose))))
    assert {"--dry-run", "--resume", "--verify"} <= named
    assert named - known == set()


def test_tables_are_what_the_code_says() -> None:
    tables = _script("tables")
    for name, make in tables.TABLES.items():
        content = README.partition(f"<!-- {name}:begin -->\n")[2].partition(f"\n<!-- {name}:end -->")[0]
        assert content == make(), f"table {name} is old: make docs"
    assert tables.fill(README) == README


def test_table_of_what_executes_names_every_sm() -> None:
    from dvdquant.export.realize import RTX_SMS, TENSORRT_SMS

    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in _script("tables").executes_table().splitlines()
    ]
    for target, sms in (("`rtx`", RTX_SMS), ("`tensorrt`", TENSORRT_SMS)):
        for graph in ("a4", "a8"):
            listed = [sm for r in rows if r[0].startswith(target) and r[2] == graph for sm in r[1].split(", ")]
            assert sorted(listed) == sorted(sms)


def test_every_dependency_is_explained() -> None:
    section = README.partition("## What each dependency is for")[2].partition("\n## ")[0]
    for requirement in PROJECT["dependencies"]:
        name = re.split(r"[<>=\[ ]", requirement, maxsplit=1)[0]
        assert f"`{name}`" in section, name


def test_every_family_is_named() -> None:
    from dvdquant.families import FAMILIES

    spoken = README.lower().replace("-", "").replace(" ", "")
    for family in FAMILIES:
        for class_name in family.class_names:
            assert class_name.split("Transformer")[0].lower() in spoken


def test_picture_is_what_its_script_draws() -> None:
    text = (ROOT / "docs" / "chain.svg").read_text()
    assert text == _script("chain").draw()
    assert "docs/chain.svg" in README
    root = ElementTree.fromstring(text)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height


def _examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_pipeline_example_is_valid() -> None:
    """It needs a real checkpoint to run; its imports and the arguments it gives are checked. Pipelines run in test_pipelines."""
    from dvdquant.deploy import DvdqTransformer
    from dvdquant.deploy.controller import StepRecord

    (example,) = [text for text in _examples() if "WanPipeline" in text]
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    (made,) = [call for call in calls if ast.unparse(call.func) == "DvdqTransformer.from_pretrained"]
    arguments = [ast.literal_eval(a) for a in made.args]
    keywords = {k.arg: ast.literal_eval(k.value) for k in made.keywords if k.arg}
    signature = inspect.signature(DvdqTransformer.from_pretrained)
    signature.bind(*arguments, **keywords)
    assert set(keywords) <= set(signature.parameters)
    assert {"step", "bits", "reason"} <= {f.name for f in dataclasses.fields(StepRecord)}


def test_python_example_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example runs up to and including the plan; the export itself is what `make demo` does."""
    (example,) = [text for text in _examples() if "run_export" in text]
    head, mark, _ = example.partition("result = run_export(")
    assert mark
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(f"{head}plan = plan_export(options)\n", names)
    plan = names["plan"]
    assert [e.act_bits for e in plan.engines] == [4, 8]  # type: ignore[attr-defined]


def test_demo_output_names_the_engines_of_the_demo() -> None:
    """The engine folders in the pasted output are those the demo's options give today."""
    from dvdquant.export.realize import plan_engines
    from dvdquant.recipe import get_recipe

    demo = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    words = shlex.split(demo.replace("\\\n", " ").partition("dvdq-export")[2].partition("|")[0])
    sms = [words[i + 1] for i, word in enumerate(words) if word == "--sm"]
    assert sms == ["8.0", "8.6", "8.9", "12.0"]
    recipe = get_recipe("w4a4")
    planned = plan_engines("tensorrt_rtx", sms, recipe.activations, recipe=recipe, from_checkpoint=True)
    pasted = README.partition("```text\n")[2].partition("```")[0]
    for engine in planned:
        assert f"on SM {', '.join(engine.sms)}, {engine.act_bits}-bit activations: {engine.executes}" in pasted
