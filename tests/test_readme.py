"""README.md and the pages of docs/ say what the code does: links, commands, options, tables, examples and the picture."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
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

from dvdquant.cli.commands import COMMANDS
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = (
    ".",
    "benchmarks",
    "benchmarks/quality",
    "benchmarks/switching",
    "deploy",
    "examples/tiny-wan",
    "examples/wan2.1",
    "kernels",
    "plugins",
)
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md")) + DOCS
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _script(name: str) -> ModuleType:
    return load_script(ROOT / "docs" / "scripts" / f"{name}.py")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    names = re.findall(
        r"`((?:tests|benchmarks|export|deploy|dvdquant|docs|examples|kernels|plugins)/[\w./*-]+)`", page.read_text()
    )
    assert [name for name in names if not list(ROOT.glob(name.rstrip("/")))] == []


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    makefile = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, *arguments in _commands(page.read_text()):
        program = Path(name).name
        if program == "make":
            targets = [word for word in arguments if "=" not in word]
            assert set(targets) <= makefile, targets
        elif program == "dvdq" and arguments[0] in COMMANDS:
            with contextlib.suppress(click.exceptions.Exit):  # --list-gpus ends the command
                import_module(COMMANDS[arguments[0]].module).main.make_context(program, arguments[1:])
        elif program in PROJECT["scripts"]:
            with contextlib.suppress(click.exceptions.Exit):
                _command(program).make_context(program, arguments)
        elif program == "python":
            assert arguments[:2] == ["-m", "pip"] or (ROOT / arguments[0]).exists(), arguments
        elif name.startswith("_DVDQ_"):
            assert name.partition("_COMPLETE=")[0].removeprefix("_").lower().replace("_", "-") in PROJECT["scripts"]
        elif name == "eval":
            assert any(f"_{known.upper().replace('-', '_')}_COMPLETE" in arguments[0] for known in PROJECT["scripts"])
        elif program in ("tritonserver", "serve"):
            pass  # of NVIDIA's server and of Ray
        else:
            pytest.fail(f"{page.relative_to(ROOT)} has a command this test does not know: {name}")


def test_walks_take_the_commands_of_their_pages() -> None:
    """The transcripts are of these commands, in this order; `make walks` makes them anew."""
    walks = _script("walks")
    for walk in walks.WALKS:
        page = (ROOT / "docs" / walk.page).read_text()
        assert [step.line for step in walk.steps if step.on_page and step.line not in page] == []
        if walk.name == "install":
            continue
        transcript = (ROOT / "docs" / "walks" / f"{walk.name}.md").read_text()
        ran = [line.removeprefix("$ ") for line in transcript.splitlines() if line.startswith("$ ")]
        assert ran == [walks.shown(step.command, Path("/place"), Path("/environment")) for step in walk.steps]


def test_the_two_commands_are_there() -> None:
    commands = _commands(README)
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda p: str(p.relative_to(ROOT)))
def test_options_named_in_the_text_exist(page: Path) -> None:
    """Each `--option` in a code span belongs to some command."""
    commands = [_command("dvdq"), *(import_module(entry.module).main for entry in COMMANDS.values())]
    known = {o for command in commands for p in command.params for o in (*p.opts, *p.secondary_opts)}
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    spans = [span for span in re.findall(r"`[^`]+`", prose) if "benchmarks/" not in span and "pip " not in span]
    named = set(re.findall(r"(?<![\w=-])--[a-z][a-z0-9-]+", " ".join(spans)))
    # Of scripts of benchmarks/quality and benchmarks/serving, named in their pages.
    quality, serving = {"--add-to", "--parts", "--delta-chunks", "--clips"}, {"--only", "--requests", "--save"}
    assert named - known <= {*quality, *serving, "--help"}


def test_pages_take_in_the_generated_tables() -> None:
    marks = {name for page in DOCS for name in re.findall(r"<!-- table: ([\w-]+) -->", page.read_text())}
    assert marks == {"executes", "gpus", "rates", "recipes", "errors", "schema", "rooms", "seen"}


def test_table_of_what_executes_names_every_sm() -> None:
    from dvdquant.export.engines.precision import RTX_SMS, TENSORRT_SMS

    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in _script("tables").executes_table().splitlines()
    ]
    for target, sms in (("`rtx`", RTX_SMS), ("`tensorrt`", TENSORRT_SMS)):
        for graph in ("a4", "a8"):
            listed = [sm for r in rows if r[0].startswith(target) and r[2] == graph for sm in r[1].split(", ")]
            assert sorted(listed) == sorted(sms)


def test_the_table_of_gpus_is_that_of_the_code() -> None:
    """``python docs/scripts/tables.py`` prints it."""
    assert _script("tables").short_gpu_table() in README


def test_every_dependency_is_explained() -> None:
    section = (
        (ROOT / "CONTRIBUTING.md").read_text().partition("## What each dependency is for")[2].partition("\n## ")[0]
    )
    for requirement in PROJECT["dependencies"]:
        name = re.split(r"[<>=,\[ ]", requirement, maxsplit=1)[0]
        assert f"`{name}`" in section, name


def test_every_family_is_named() -> None:
    from dvdquant.model.families import FAMILIES

    spoken = README.lower().replace("-", "").replace(" ", "")
    for family in FAMILIES:
        for class_name in family.class_names:
            assert class_name.split("Transformer")[0].lower() in spoken


def test_picture_is_what_its_script_draws() -> None:
    text = (ROOT / "docs" / "images" / "chain.svg").read_text()
    assert text == _script("chain").draw()
    assert "docs/images/chain.svg" in README
    root = ElementTree.fromstring(text)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height


def _examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


EXAMPLES = [(page, text) for page in (ROOT / "README.md", *DOCS) for text in _examples(page)]


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[str(page.relative_to(ROOT)) for page, _ in EXAMPLES])
def test_examples_use_the_public_face_as_it_is(page: Path, example: str) -> None:
    """They need a real checkpoint to run; what they take from dvdquant and the arguments they give are checked."""
    import dvdquant

    tree = ast.parse(example)
    modules = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in modules if name.startswith("dvdquant.")}, "the public face is dvdquant itself"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func).startswith("dvdquant.")]
    assert ours
    for call in ours:
        function: object = dvdquant
        for name in ast.unparse(call.func).split(".")[1:]:
            function = getattr(function, name)
        assert callable(function)
        arguments = [ast.literal_eval(a) for a in call.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        signature = inspect.signature(function)
        signature.bind(*arguments, **keywords)
        assert set(keywords) <= set(signature.parameters)


def test_steps_of_a_trace_have_what_the_example_prints() -> None:
    from dvdquant.deploy.switching.controller import StepRecord

    assert {"step", "bits", "reason"} <= {f.name for f in dataclasses.fields(StepRecord)}


def test_export_from_python_plans_as_the_command_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The README's export up to and including the plan, also after `make demo`; the export itself is what that does."""
    import dvdquant
    from dvdquant.export import pipeline
    from dvdquant.export.plan import ExportPlan
    from dvdquant.hardware.advice import choose

    plans: list[ExportPlan] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pipeline, "run_export", lambda plan, progress, write_report: plans.append(plan))
    line = next(line for line in README.splitlines() if "dvdquant.export_model(" in line)
    exec(line.removeprefix("result = "), {"dvdquant": dvdquant})
    assert [engine.act_bits for engine in plans.pop().engines] == [4, 8]
    dvdquant.export_model("examples/tiny-wan", tmp_path / "out", latent="8x24x24", text_tokens=5)
    (plan,) = plans
    assert [engine.act_bits for engine in plan.engines] == [8], "a4 gains nothing on SM 8.9"
    defaults = {p.name: p.get_default(click.Context(_command("dvdq-export"))) for p in _command("dvdq-export").params}
    options = plan.options
    choice = choose((), (), (), defaults["recipe"])
    assert (options.recipe.name, options.targets, options.sms) == (choice.recipe, choice.targets, choice.sms)
    assert (options.dtype, options.device, options.batch) == (defaults["dtype"], defaults["device"], defaults["batch"])


def test_the_public_face_is_lazy_and_complete() -> None:
    import subprocess
    import sys

    code = (
        "import sys, dvdquant\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "assert set(dvdquant.__all__) <= set(dir(dvdquant))\n"
        "dvdquant.export_model, dvdquant.plan_schedule, dvdquant.inspect_export, dvdquant.Recipe\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    listed = subprocess.run([sys.executable, "-m", "dvdquant"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert all(name in listed.stdout for name in PROJECT["scripts"])


# --------------------------------------------------------------------------------------------------------------- errors


@functools.cache
def _nodes() -> list[ast.AST]:
    """The syntax of the whole product."""
    paths = [path for room in ("dvdquant", "export", "deploy") for path in (ROOT / room).rglob("*.py")]
    return [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]


def _said() -> set[str]:
    """Every text of the product's source, with … where it is filled in."""
    found = set()
    for node in _nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.add("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
    return {" ".join(text.split()) for text in found}


def test_every_error_that_a_class_of_its_own_raises_is_listed() -> None:
    """A narrower class of error stands under the class that it is."""
    page = _script("errors")
    classes = [node for node in _nodes() if isinstance(node, ast.ClassDef) and node.bases]
    bases = {node.name: ast.unparse(node.bases[0]) for node in classes}
    assert {name for name, base in bases.items() if base == "DvdquantError"} <= set(page.CLASSES)
    assert page.narrower(_nodes()) == {
        "EncoderError": "OutputError",
        "ListedFileError": "OutputError",
        "NotBuiltError": "EngineError",
    }


def test_what_troubleshooting_quotes_is_said_by_the_code() -> None:
    strings = _said()
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quotes = [q for bold in re.findall(r"\*\*(.+?)\*\*", page, re.DOTALL) for q in re.findall(r'"([^"]+)"', bold)]
    assert len(quotes) > 8
    for quote in quotes:
        parts = [re.escape(" ".join(part.split())) for part in quote.split("…") if part.strip()]
        pattern = re.compile(".*?".join(parts))
        assert any(pattern.search(text) for text in strings), quote
