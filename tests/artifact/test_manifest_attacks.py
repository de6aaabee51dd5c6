"""Hostile manifests, schedules, recipes and configs of an export: refused in one sentence, or shown, and never more."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dvdquant.artifact.manifest import MAX_VALUES, Manifest, load_manifest
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.cli.inspect import summary_text
from dvdquant.cli.plan import main as plan_main
from dvdquant.deploy.artifact import Artifact, family_of
from dvdquant.deploy.generation.request import delta_for_average
from dvdquant.deploy.report.charts import error_chart
from dvdquant.deploy.report.page import Report, render_report
from dvdquant.deploy.report.text import commands, executions, kept_groups, python_lines, recipe_text, size_text
from dvdquant.deploy.report.text import shown as shown_in_page
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.errors import DvdquantError, OutputError
from dvdquant.export.model_card import model_card
from dvdquant.recipe import Recipe, error_name
from tests.support import tiny_models as tiny
from tests.support.commands import refused
from tests.support.costs import Costs
from tests.support.written_exports import manifest

HASH = "a" * 64
ENGINE: dict[str, Any] = {
    "path": "engines/rtx-sm89/transformer_a4.engine",
    "backend": "tensorrt_rtx",
    "sm": ["8.9"],
    "act_bits": 4,
    "precision": "int8",
    "executes": "INT8 tensor cores, so no faster than a8",
    "onnx_sha256": HASH,
    "versions": {"tensorrt_rtx": "1.7.1"},
    "shapes": {},
    "optimization_level": 3,
}
GRAPHS = [{"path": f"onnx/transformer_a{bits}.onnx", "target": "tensorrt", "act_bits": bits} for bits in (4, 8)]


def whole() -> dict[str, Any]:
    """A manifest as JSON that holds something in every field."""
    names = [ENGINE["path"], *(graph["path"] for graph in GRAPHS), "config.json", "onnx/transformer.safetensors"]
    files = {name: {"sha256": HASH, "bytes": 7} for name in names}
    value = manifest(engines=[ENGINE], graphs=GRAPHS, files=files, export_key=HASH, nonfinite=["proj_out.weight"])
    data: dict[str, Any] = json.loads(value.to_json())
    return data


def schedule() -> dict[str, Any]:
    """A schedule as JSON, for the manifest above."""
    details = {"last_high": 2, "weighting": "step", "stairs": [[0.0, 0.1, 8.0], [0.1, None, 4.0]]}
    value = Schedule(fingerprint="f" * 64, recipe="w4a4", steps=3, delta=0.1, bits=(8, None, 4), average_bits=6.0,
                     prompts=("one",), seeds=(0,), details=details)  # fmt: skip
    data: dict[str, Any] = json.loads(json.dumps(value.to_json()))
    return data


def _with(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what stands at ``a/0/b``."""

    def change(data: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in parents:
            data = data[part]
        data[last] = value

    return change


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no sizes": (_with("shapes", {}), "shapes.frames is missing"),
    "two numbers for an axis": (_with("shapes/frames", [1, 2]), "shapes.frames is [1, 2]"),
    "a huge axis": (_with("shapes/height", [1, 1, 10**9]), "shapes.height[2] is 1000000000"),
    "a size of zero": (_with("shapes/width", [0, 1, 1]), "shapes.width[0] is 0"),
    "text tokens by text": (_with("shapes/text_tokens", "512"), "shapes.text_tokens is '512'"),
    "true for a batch": (_with("shapes/batch", True), "shapes.batch is True"),
    "a nested size": (_with("shapes/frames", [[1], 2, 3]), "shapes.frames[0] is [1]"),
    "a recipe without name": (_with("recipe", {"version": 1}), "name is missing"),
    "a recipe of numbers": (_with("recipe/weight", 4), "weight is 4"),
    "a name that is a list": (_with("recipe/name", ["w4a4"]), "name is ['w4a4']"),
    "globs that are a text": (_with("recipe/keep", "*"), "keep is '*'"),
    "fractional bits": (_with("recipe/activations", [{"bits": 4.0}]), "activations[0].bits is 4.0"),
    "a huge block": (_with("recipe/rotation", 10**40), "rotation block 1000"),
    "an engine that is a list": (_with("engines/0", []), "engines[0] is []"),
    "an SM that is none": (_with("engines/0/sm", ["8.9", "rm -rf"]), "engines[0].sm[1] is 'rm -rf'"),
    "an SM by number": (_with("engines/0/sm", [8.9]), "engines[0].sm[0] is 8.9"),
    "an SM of an escape": (_with("engines/0/sm", ["\x1b[2J"]), "engines[0].sm[0]"),
    "versions by number": (_with("engines/0/versions", {"tensorrt_rtx": 1}), "engines[0].versions.tensorrt_rtx is 1"),
    "7 bits": (_with("graphs/0/act_bits", 7), "graphs[0].act_bits is 7"),
    "a graph nowhere": (_with("graphs/0/path", "/etc/passwd"), "graphs[0].path is '/etc/passwd'"),
    "a component twice": (_with("components", ["transformer", "transformer"]), "components is"),
    "a component that is a path": (_with("components", ["../x"]), "components[0] is '../x'"),
    "no component": (_with("components", []), "components is []"),
    "huge features": (_with("layers/0/features_in", 10**100), "layers[0].features_in is 1000"),
    "an endless error": (_with("layers/0/relative_mse", 1e300), "layers[0].relative_mse is 1e+300"),
    "a negative error": (_with("layers/1/relative_mse_minmax", -0.5), "layers[1].relative_mse_minmax is -0.5"),
    "a layer of a number": (_with("layers/0/name", 7), "layers[0].name is 7"),
    "a file that is a list": (_with("files/config.json", []), "files.'config.json' is []"),
    "a file of huge size": (_with("files/config.json/bytes", 2**70), "bytes is 1180591620717411303424"),
    "no offset from UTC": (_with("created", "2026-01-01T00:00:00"), "created is '2026-01-01T00:00:00'"),
    "a time before all": (_with("created", "0000-00-00"), "created is '0000-00-00'"),
    "a model with NUL": (_with("source/model", "a\0b"), "source.model is"),
    "a name of a megabyte": (_with("family", "x" * (1 << 20)), "family is 'xxx"),
    "a format of a list": (_with("format_version", [1]), "format_version"),
    "an unknown field": (_with("code", "import os"), "unknown field 'code'"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_reader_refuses_in_one_sentence(name: str, tmp_path: Path) -> None:
    """The commands that read an export, and the classes: the field by its path, its value, and a way out."""
    change, words = ATTACKS[name]
    data = whole()
    change(data)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    for call in (lambda: load_manifest(tmp_path), lambda: Artifact.open(tmp_path)):
        with pytest.raises(OutputError) as caught:
            call()
        assert words in caught.value.what
        assert "\n" not in caught.value.what
        assert len(caught.value.what) < 400
    for arguments in ([], ["--json"], ["--check"], ["--html", str(tmp_path / "page.html")]):
        refused(CliRunner().invoke(inspect_main, [str(tmp_path), *arguments]), words)
    refused(CliRunner().invoke(plan_main, [str(tmp_path), "--prompt", "x"]), words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "many",
    [
        *("files", "shapes", "members"),
        *(pytest.param(name, marks=pytest.mark.stress) for name in ("layers", "components", "tools", "recipe", "sm")),
    ],
)
def test_a_manifest_of_a_million_entries(many: str, tmp_path: Path) -> None:
    """Where there are too many values, they are not even parsed; as many as are allowed cost seconds and little memory."""
    for count in (1_000_000, MAX_VALUES // 4) if many == "files" else (MAX_VALUES // 4,):
        data = whole()
        if many == "files":
            data["files"].update({f"f{i}": {} for i in range(count)})
        elif many in ("layers", "components"):
            data[many] = [3] * count
        elif many == "sm":
            data["engines"][0]["sm"] = [3] * count
        elif many == "members":
            data["layers"][0]["members"] = [3] * count
        else:
            data[many] = {**data[many], **{str(i): [] for i in range(count)}}
        (tmp_path / "manifest.json").write_text(json.dumps(data, separators=(",", ":")))
        del data
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        result = CliRunner().invoke(inspect_main, [str(tmp_path), "--json"])
        assert result.exit_code == (0 if many == "shapes" and count < MAX_VALUES else 2), result.output[:300]
        assert time.process_time() - start < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_fields_of_older_manifests_are_filled_in() -> None:
    """Readers look at fields of a recipe that an older version did not write."""
    data = whole()
    for name in ("weight", "keep", "rotation", "modulation", "attention", "inputs", "smooth", "random_signs", "shift"):
        data["recipe"].pop(name)
    show(Manifest.from_json(json.dumps(data)))


def show(value: Manifest) -> None:
    """All that is shown of a manifest: the summary, the card, the words and charts of the page, the command."""
    for layers in (False, True):
        summary_text(Path("out"), value, layers)
    model_card(value)
    render_report(Report(value, "out", checkpoint_bytes=5, parameters=(3, 2)))
    page = Manifest(**shown_in_page({name: getattr(value, name) for name in Manifest.__dataclass_fields__}))
    for each in (value, page):
        commands(each, "out", "a prompt", True)
        python_lines(each, "out", "a prompt", False)
    # The page has these of its own copy.
    recipe_text(value.recipe, value.family)
    size_text(value.shapes)
    kept_groups(value)
    executions(value)
    error_chart(value.layers, error_name(value.recipe))
    artifact = Artifact(Path("out"), value, {name: {} for name in value.components})
    artifact.rebuild_command()
    for component in value.components:
        artifact.bits(component)
        for backend in ("rtx", "tensorrt"):
            artifact.engines(component, backend, 4)


def read_manifest(raw: bytes) -> None:
    value = Manifest.from_json(raw)
    assert Manifest.from_json(value.to_json()) == value
    show(value)


def read_recipe(raw: bytes) -> None:
    recipe = Recipe.from_json(raw.decode("utf-8", "surrogateescape"))
    assert Recipe.from_json(recipe.to_json()) == recipe
    recipe.keeps("blocks.0.attn1.to_q", ("proj_out",))


class Read:
    """Readers that want a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "file.json"
        self.manifest = Manifest.from_json(json.dumps(whole()))

    def schedule(self, raw: bytes) -> None:
        self.path.write_bytes(raw)
        value = Schedule.load(self.path)
        render_report(Report(self.manifest, "out", schedule=value))
        value.check(self.manifest)
        delta_for_average(value, 6.0)

    def config(self, raw: bytes) -> None:
        from dvdquant.system.files import strict_json

        try:
            config = strict_json(raw)
        except ValueError:
            return
        if isinstance(config, dict):
            family_of(config, "config.json")


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 4, 8, 10**9, -(10**9), 2**63, 10**40, 0.0, -0.0, 0.5, 1e-300, 1e300, -1e300, 4.0,
    "", "x", "\x1b[31m", "\u202e", "\0", "../../etc/passwd", "/dev/zero", "4", "8.9", "bf16", "tensorrt", "x" * 5000, "<b>`|",
    "{{7*7}}", "%s%n", [], {}, [[]], [None], ["x", "x"], [1, 2, 3], [3, 2, 1], [1, 1, 2**40], {"": {}}, {"a": None},
    {"__class__": "os"}, [[[[[[]]]]]], {"version": 1}, "2026-01-01T00:00:00+00:00", "9999-12-31T23:59:59-23:59", "NaN",
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON value."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def mutated(data: Any, rng: random.Random) -> bytes:
    """JSON in which one to three places were set, removed, doubled, added to or swapped; one in five bytes by bytes."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        all_places = places(data)
        if not all_places:
            break
        path = rng.choice(all_places)
        parent = data
        for part in path[:-1]:
            parent = parent[part]
        kind = rng.randrange(6)
        if kind <= 2:
            parent[path[-1]] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 3:
            del parent[path[-1]]
        elif kind == 4 and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        elif kind == 4:
            parent[rng.choice(("extra", "", "../x", "\x1b", "path", "bytes"))] = copy.deepcopy(rng.choice(HOSTILE))
        else:
            other = data
            for part in rng.choice(all_places):
                other = other[part] if (isinstance(other, dict) and part in other) or (
                    isinstance(other, list) and part < len(other)) else other  # fmt: skip
            parent[path[-1]] = copy.deepcopy(other)
    raw = bytearray(json.dumps(data, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2 and raw:
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(raw))
            tokens = (b'"', b"{", b"[", b"]", b"\\u0000", b"\xff", b"null", b"1e999", b"NaN", b"9" * 40, b"-", b",")
            raw[place : place + rng.randint(0, 6)] = rng.choice(tokens)
    return bytes(raw)


@pytest.mark.parametrize("count", [800, pytest.param(25_000, marks=[pytest.mark.stress, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("kind", ["manifest", "recipe", "schedule", "config"])
def test_mutated_records(kind: str, count: int, tmp_path: Path) -> None:
    """Whatever is changed: it is refused by one of our errors, or every reader and everything that is shown takes it."""
    rng, files = random.Random(count), Read(tmp_path)
    data = {"manifest": whole(), "recipe": whole()["recipe"], "schedule": schedule(), "config": tiny.WAN}[kind]
    read = {"manifest": read_manifest, "recipe": read_recipe, "schedule": files.schedule, "config": files.config}[kind]
    said: list[DvdquantError] = []
    with Costs(f"records ({kind})") as costs:
        for _ in range(count):
            raw = mutated(data, rng)
            try:
                with costs.case():
                    read(raw)
            except DvdquantError as error:
                said.append(error)
    assert 0.05 * count < len(said) < count
    for text in {str(error) for error in said}:
        assert text.replace("\n", "").isprintable()
        assert len(text) < 3000
