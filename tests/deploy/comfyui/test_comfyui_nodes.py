"""The ComfyUI nodes without ComfyUI: conversions, names of conditions, steps, exports that are offered, and refusals.

What needs ComfyUI itself is in test_comfyui.py.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dvdquant.artifact.manifest import load_manifest
from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.comfyui import nodes, places
from dvdquant.deploy.comfyui.calls import BranchNames, fit_text, pad_to_patch, refuse_foreign, step_of, wan_arguments
from dvdquant.deploy.comfyui.sampling import OPTION, Settings
from dvdquant.deploy.comfyui.transformer import ExportedTransformer
from dvdquant.deploy.sessions import compiled
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.errors import DvdquantError, OutputError, ShapeError, UnsupportedError
from dvdquant.model.families import Axis, Sizes, get_family
from dvdquant.ops.attention import ladder
from tests.support import tiny_models as tiny
from tests.support.comfyui import NODES
from tests.support.comfyui_child import to_prompt
from tests.support.exporting import TINY_WAN
from tests.support.session_exports import copy_of, deep_export, family_export
from tests.support.tiny_pipelines import WAN_TI2V

SIZES = Sizes(Axis(2, 3, 4), Axis(4, 8, 12), Axis(6, 8, 10), text_tokens=12)
CPU = torch.device("cpu")


def export() -> Path:
    """Graphs of a tiny Wan, without engines."""
    return family_export("wan", "fp16")


OPEN = "dvdquant.deploy.generation.session_options.open_session"
LEVELS = [1.0, 0.9, 0.6, 0.2, 0.0]


# ---------------------------------------------------------------------------------------------------------- the folder


def load_folder() -> types.ModuleType:
    """The folder as ComfyUI loads it: by its path, under a name that is no name of a package."""
    spec = importlib.util.spec_from_file_location(str(NODES).replace(".", "_x_"), NODES / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A double of ComfyUI's list of folders; returns its models/dvdquant."""
    folders: dict[str, list[str]] = {}
    double = types.ModuleType("folder_paths")
    double.models_dir = str(tmp_path / "models")  # type: ignore[attr-defined]
    double.add_model_folder_path = lambda name, path: folders.setdefault(name, [path])  # type: ignore[attr-defined]
    double.get_folder_paths = lambda name: folders[name]  # type: ignore[attr-defined]
    double.get_filename_list = lambda name: ["style.safetensors"]  # type: ignore[attr-defined]
    double.get_full_path = lambda name, file: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", double)
    place = tmp_path / "models" / "dvdquant"
    place.mkdir(parents=True)
    return place


def test_the_folder_gives_every_node(host: Path) -> None:
    module = load_folder()
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in module.NODE_CLASS_MAPPINGS.values():
        declared = node.INPUT_TYPES()
        names = {**declared["required"], **declared.get("optional", {})}
        code = getattr(node, node.FUNCTION).__code__
        assert set(names) == set(code.co_varnames[1 : code.co_argcount])
        assert all(spec[1].get("tooltip") for spec in names.values())
        assert node.DESCRIPTION.endswith(".")
    project = tomllib.loads((NODES / "pyproject.toml").read_text())
    assert project["project"]["name"] == NODES.name
    assert project["tool"]["comfy"]["PublisherId"]


def test_the_folder_without_the_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dvdquant.deploy.comfyui.nodes", None)
    with pytest.raises(ImportError, match="needs the package dvdquant"):
        load_folder()


@pytest.mark.parametrize("path", sorted((NODES / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(host: Path, path: Path) -> None:
    graph = json.loads(path.read_text())
    ours = {**graph, "nodes": [node for node in graph["nodes"] if node["type"] in nodes.NODE_CLASS_MAPPINGS]}
    prompt = to_prompt(ours, nodes.NODE_CLASS_MAPPINGS)
    assert {"DvdqLoadExport", "DvdqBitSchedule", "DvdqStepTrace"} <= {node["class_type"] for node in prompt.values()}
    for node in prompt.values():
        declared = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()["required"]  # type: ignore[attr-defined]
        assert declared.keys() <= node["inputs"].keys()


# ------------------------------------------------------------------------------------------------ the exports on offer


def test_only_exports_in_the_folder_are_offered(host: Path) -> None:
    assert nodes.LoadExport.INPUT_TYPES()["required"]["export"][0] == [places.NOTHING]
    made = export()
    (host / "linked").symlink_to(made, target_is_directory=True)
    copy_of(made, host / "deeper" / "copied")
    (host / "empty").mkdir()
    (host / "tiny-wan").symlink_to(TINY_WAN, target_is_directory=True)
    assert places.exports([host]) == ["deeper/copied", "linked"]
    assert places.tables([host]) == ["tiny-wan"]
    assert places.find("linked", [host]) == host / "linked"
    for name in ("../models/dvdquant/linked", str(made), "empty", "", "deeper"):
        with pytest.raises(OutputError, match=r"models/dvdquant") as refused:
            places.find(name, [host])
        assert "linked" in str(refused.value)
    before = nodes.LoadExport.IS_CHANGED("deeper/copied")
    manifest = host / "deeper" / "copied" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert nodes.LoadExport.IS_CHANGED("deeper/copied") != before


# ------------------------------------------------------------------------------------------------------- conversions


def test_conditions_get_names_and_the_positive_one_comes_first() -> None:
    names = BranchNames()
    both = names.parts(4, [1, 0], ["n", "p"])
    assert [(part.branch, part.start, part.stop) for part in both] == [("cond", 2, 4), ("uncond", 0, 2)]
    assert [part.branch for part in names.parts(1, [1], ["n"])] == ["uncond"]
    areas = names.parts(3, [0, 1, 0], ["second", "n", "p"])
    assert [(part.branch, part.start) for part in areas] == [("cond", 2), ("cond 2", 0), ("uncond", 1)]
    assert [part.branch for part in names.parts(3, [2, 1, 0])] == ["cond", "uncond", "condition 2"]
    with pytest.raises(ShapeError, match="5 samples for 2 conditions"):
        names.parts(5, [0, 1])


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (0.95, 0), (0.9, 1), (0.6 + 1e-7, 2), (0.6 - 1e-7, 2), (0.3, 2), (0.2, 3), (0.1, 3), (1.2, 0)],
)
def test_a_call_belongs_to_the_step_that_has_begun(sigma: float, step: int) -> None:
    assert step_of(LEVELS, sigma) == step


@pytest.mark.parametrize("size", [(3, 8, 8), (3, 7, 9), (1, 5, 2)])
def test_padding_continues_circularly(size: tuple[int, int, int]) -> None:
    latents = torch.randn(1, 4, *size)
    padded = pad_to_patch(latents, (1, 2, 2))
    frames, height, width = size
    assert padded.shape[2:] == (frames, height + height % 2, width + width % 2)
    assert torch.equal(padded[..., :height, :width], latents)
    assert torch.equal(padded[..., height:, :width], latents[..., : height % 2, :])
    assert torch.equal(padded[..., :height, width:], latents[..., : width % 2])


def test_text_is_padded_with_zeros_or_cut_where_it_is_zero() -> None:
    text = torch.randn(2, 5, 32)
    longer = fit_text(text, 12, 32)
    assert longer.shape == (2, 12, 32)
    assert torch.equal(longer[:, :5], text)
    assert not longer[:, 5:].any()
    assert torch.equal(fit_text(longer, 5, 32), text)
    assert fit_text(text, 5, 32) is text
    for wrong in (None, torch.randn(2, 32), torch.randn(2, 5, 16)):
        with pytest.raises(ShapeError, match="CLIPLoader"):
            fit_text(wrong, 5, 32)
    with pytest.raises(ShapeError, match="--text-tokens 5"):
        fit_text(text, 4, 32)


def test_arguments_of_wan() -> None:
    plain = get_family(tiny.WAN)
    latents, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 12, 32)
    arguments = wan_arguments(latents, torch.tensor([500.0, 500.0]), text, None, plain, SIZES)
    assert list(arguments) == ["hidden_states", "timestep", "encoder_hidden_states"]
    assert arguments["hidden_states"] is latents
    with pytest.raises(ShapeError, match=r"\[2, 16, 3, 8, 8\]"):
        wan_arguments(torch.randn(2, 16, 3, 8, 8), torch.ones(2), text, None, plain, SIZES)
    # One timestep per frame becomes one per token, frame after frame.
    ti2v = get_family(WAN_TI2V)
    frames = torch.tensor([[0.0, 7.0, 9.0], [0.0, 7.0, 8.0]])
    tokens = wan_arguments(torch.randn(2, 48, 3, 8, 8), frames, text, None, ti2v, SIZES)["timestep"]
    assert tokens.shape == (2, 3 * 16)
    assert torch.equal(tokens.reshape(2, 3, 16), frames[..., None].expand(2, 3, 16))
    with pytest.raises(ShapeError, match="timesteps"):
        wan_arguments(torch.randn(2, 48, 3, 8, 8), frames[:, :2], text, None, ti2v, SIZES)


@pytest.mark.parametrize("both", [None, 514])
def test_image_embeddings(both: int | None) -> None:
    config = {**tiny.WAN, "in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 128, "pos_embed_seq_len": both}
    family = get_family(config)
    images = torch.randn(2, both or 257, 8)
    arguments = wan_arguments(torch.randn(2, 12, 3, 8, 8), torch.ones(2), torch.randn(2, 12, 32), images, family, SIZES)
    given = arguments["encoder_hidden_states_image"]
    assert given.shape == ((4, 257, 8) if both else (2, 257, 8))
    assert torch.equal(given.reshape(images.shape), images)
    with pytest.raises(UnsupportedError, match="CLIPVisionEncode"):
        wan_arguments(torch.randn(2, 12, 3, 8, 8), torch.ones(2), torch.randn(2, 12, 32), None, family, SIZES)


def test_what_acts_inside_of_a_model_is_refused() -> None:
    refuse_foreign({"patches": {"attn1_patch": []}}, None, {"denoise_mask": torch.ones(1), "y": None})
    cases: list[tuple[dict[str, Any], object, dict[str, Any], str]] = [
        ({"patches_replace": {"dit": {("double_block", 0): len}}}, None, {}, "dit"),
        ({}, {"output": []}, {}, "ControlNet"),
        ({}, None, {"reference_latent": torch.ones(1)}, "reference_latent"),
    ]
    for options, control, more, word in cases:
        with pytest.raises(UnsupportedError, match=word) as refused:
            refuse_foreign(options, control, more)
        assert "original checkpoint" in str(refused.value)


# ---------------------------------------------------------------------------------------------------- the transformer


@pytest.fixture(scope="module")
def transformer() -> ExportedTransformer:
    return ExportedTransformer(export(), "", "pytorch", CPU)


def options(settings: Settings, sigma: float, order: tuple[int, ...] = (1, 0)) -> dict[str, Any]:
    """What ComfyUI passes with a call."""
    return {
        OPTION: settings, "cond_or_uncond": list(order), "uuids": list(order),
        "sigmas": torch.tensor([sigma]), "sample_sigmas": torch.tensor(LEVELS),
    }  # fmt: skip


def inputs(samples: int = 2, height: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 4, 3, height, 8, generator=generator), torch.randn(samples, 9, 32, generator=generator)


def test_one_batch_equals_a_call_for_each_condition(transformer: ExportedTransformer) -> None:
    latents, text = inputs(4)
    settings = Settings(mode="a8")
    with transformer.sampling(settings, LEVELS):
        output = transformer(latents, torch.full((4,), 900.0), text, transformer_options=options(settings, 0.9))
    assert output.shape == latents.shape
    session = transformer.session
    for row in range(4):
        call = {
            "hidden_states": latents[row : row + 1],
            "timestep": torch.tensor([900.0]),
            "encoder_hidden_states": fit_text(text[row : row + 1], 12, 32),
        }
        assert torch.equal(session.run(call, 8), output[row : row + 1])
    assert [(record.step, record.branch, record.bits) for record in settings.trace.records] == [
        (1, "cond/0", 8), (1, "cond/1", 8), (1, "uncond/0", 8), (1, "uncond/1", 8)
    ]  # fmt: skip


def test_sizes_between_patches_are_padded_and_cut(transformer: ExportedTransformer) -> None:
    latents, text = inputs(1, height=7)
    settings = Settings(mode="a8")
    given = options(settings, 1.0, (0,))
    with transformer.sampling(settings, LEVELS):
        output = transformer(latents, torch.tensor([1000.0]), text, transformer_options=given)
        whole = transformer(pad_to_patch(latents, (1, 2, 2)), torch.tensor([1000.0]), text, transformer_options=given)
    assert output.shape == latents.shape
    assert torch.equal(output, whole[..., :7, :])


def test_a_call_outside_of_a_sampler_runs_on_the_high_engine(transformer: ExportedTransformer) -> None:
    latents, text = inputs(1)
    output = transformer(latents, torch.tensor([600.0]), text)
    settings = Settings(mode="a8")
    with transformer.sampling(settings, LEVELS):
        same = transformer(latents, torch.tensor([600.0]), text, transformer_options=options(settings, 0.6, (0,)))
    assert torch.equal(output, same)


def test_unloading_frees_the_session_and_the_next_call_opens_it() -> None:
    transformer = ExportedTransformer(export(), "transformer", "onnxruntime", CPU)
    assert not transformer.loaded
    assert list(transformer.parameters()) == []
    held = transformer.load()
    assert transformer.loaded
    assert held >= transformer.weight_bytes() * 0.5
    session = transformer.session
    transformer.unload()
    transformer.unload()
    assert session.closed
    latents, text = inputs(1)
    assert transformer(latents, torch.tensor([600.0]), text).isfinite().all()
    transformer.unload()


def test_the_order_of_the_calls_does_not_change_the_bits(transformer: ExportedTransformer) -> None:
    """The positive condition decides, whether it is called in one batch, first, or last."""
    found = []
    for calls in ([(1, 0)], [(0,), (1,)], [(1,), (0,)]):
        settings = Settings(mode="switch", delta=0.35, last_high=1, weighting="none")
        latents, text = inputs(2)
        steps = []
        with transformer.sampling(settings, LEVELS):
            for level in LEVELS[:-1]:
                for order in calls:
                    rows = [(1, 0).index(index) for index in order]
                    scaled = latents[rows] * torch.tensor([1.0, 1 + level])[rows].reshape(-1, 1, 1, 1, 1)
                    times = torch.full((len(rows),), 1000 * level)
                    transformer(scaled, times, text[rows], transformer_options=options(settings, level, order))
            steps = [(r.step, r.bits) for r in settings.trace.records if r.branch == "cond"]
        found.append(steps)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4


def test_settings_that_contradict_the_sampler(transformer: ExportedTransformer, tmp_path: Path) -> None:
    cases = [
        (Settings(first_step=2), UnsupportedError, "total_steps is 0"),
        (Settings(total_steps=4, first_step=1), UnsupportedError, "up to 3 steps"),
        (Settings(mode="a6"), UnsupportedError, "mode a6"),
        (Settings(mode="planned"), OutputError, "dvdq-plan"),
        (Settings(delta=-1.0), UnsupportedError, "δ is -1"),
    ]
    for settings, kind, words in cases:
        with pytest.raises(kind, match=words), transformer.sampling(settings, LEVELS):
            pass
    # A plan beside the export is followed, and only with its number of steps.
    out = copy_of(export(), tmp_path / "out")
    manifest = load_manifest(out)
    Schedule(
        manifest.source["fingerprint"],
        manifest.recipe["name"],
        4,
        0.1,
        (8, 4, 4, 8),
        6.0,
        components=manifest.components,
    ).save(out / "schedule.json")
    planned = ExportedTransformer(out, "transformer", "pytorch", CPU)
    latents, text = inputs(1)
    settings = Settings(mode="planned")
    with planned.sampling(settings, LEVELS):
        for level in LEVELS[:-1]:
            planned(latents, torch.tensor([1000 * level]), text, transformer_options=options(settings, level, (0,)))
    assert [record.bits for record in settings.trace.records] == [8, 4, 4, 8]
    with pytest.raises(OutputError, match="planned for 4 steps, and 2"), planned.sampling(settings, LEVELS[2:]):
        pass
    planned.unload()


def test_plugin_libraries_come_from_the_environment_alone(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only to backends that may run TensorRT engines: a library is named once for all nodes."""
    asked: list[tuple[str, tuple[Path, ...]]] = []

    def opens(*_: Any, backend: str, plugins: tuple[Path, ...], **__: Any) -> Any:
        asked.append((backend, plugins))
        return types.SimpleNamespace(backend=backend)

    monkeypatch.setattr(OPEN, opens)
    libraries = (tmp_path / "one.so", tmp_path / "two.so")
    for path in libraries:
        path.touch()
    for given in ("", f"{libraries[0]}:{libraries[1]}"):
        monkeypatch.setenv("DVDQ_PLUGINS", given)
        for backend in ("auto", "tensorrt", "pytorch"):
            assert ExportedTransformer(export(), "", backend, CPU).session.backend == backend
    assert [plugins for _, plugins in asked[:3]] == [(), (), ()]
    assert asked[3:] == [("auto", libraries), ("tensorrt", libraries), ("pytorch", ())]
    monkeypatch.setenv("DVDQ_PLUGINS", str(tmp_path / "none.so"))
    with pytest.raises(UnsupportedError, match=r"none\.so is not there"):
        _ = ExportedTransformer(export(), "", "auto", CPU).session
    assert "plugin" not in str(nodes.LoadExport.INPUT_TYPES())


def test_what_a_step_runs_on_reaches_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []

    def opens(*_: Any, **given: Any) -> Any:
        opened.append(given)
        return types.SimpleNamespace(backend="pytorch")

    monkeypatch.setattr(OPEN, opens)
    asked = {"compile": True, "fuse": False, "cuda_graphs": True, "attention": "int8", "attention_backend": "cudnn"}
    asked |= {"weights": "packed"}
    for given in ({}, asked):
        assert ExportedTransformer(export(), "", "pytorch", CPU, **given).session.backend == "pytorch"
    usual = {"compile": False, "fuse": None, "cuda_graphs": False, "attention": None, "attention_backend": None}
    usual |= {"weights": "auto"}
    for found, wanted in zip(opened, (usual, asked)):
        assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("backend", "given", "said"),
    [
        ("rtx", {"compile": True}, "tensorrt_rtx does not take compile"),
        ("onnxruntime", {"fuse": True}, "onnxruntime does not take fuse"),
        ("tensorrt", {"attention_backend": "cudnn"}, "tensorrt takes no library for attention"),
        ("rtx", {"weights": "packed"}, "hold their weights as they were built"),
        ("auto", {"weights": "thin"}, "thin"),
        ("auto", {"attention": "int4"}, "unknown attention 'int4'"),
        ("auto", {"attention": "int8", "attention_backend": "flash"}, "unknown attention library 'flash'"),
    ],
)
def test_options_that_exclude_each_other_are_refused_by_the_node(
    backend: str, given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """When the node runs, before a sampler asks for a session: the export is not even there."""
    with pytest.raises(UnsupportedError, match=said) as refused:
        ExportedTransformer(tmp_path, "", backend, CPU, **given)
    assert refused.value.fix


def test_a_compiled_step_with_attention_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled though ComfyUI's call of the transformer is not, and give the bits of an eager session."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    chosen = {"attention": "int8", "attention_backend": "reference"}
    eager = ExportedTransformer(deep_export("wan"), "", "pytorch", CPU, **chosen)
    sample = eager.family.sample(eager.artifact.sizes, eager.dtype)
    x, timestep, text = (sample[name] for name in ("hidden_states", "timestep", "encoder_hidden_states"))
    wanted = eager(x, timestep, text)
    torch._dynamo.reset()
    counters.clear()
    made = ExportedTransformer(deep_export("wan"), "", "pytorch", CPU, compile=True, **chosen)
    assert torch.equal(made(x, timestep, text), wanted)
    assert counters["stats"]["unique_graphs"] >= 1
    for transformer in (eager, made):
        attention = transformer.session.attention
        assert attention is not None
        assert attention.to_json()["library"] == "reference"
        transformer.unload()


def test_what_is_no_wan_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError):
        ExportedTransformer(tmp_path, "", "auto", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "family", lambda *_: get_family(tiny.LTX))
        with pytest.raises(UnsupportedError, match="export of ltx-video"):
            ExportedTransformer(export(), "", "auto", CPU)
    with pytest.raises(DvdquantError, match="transformer_3"):
        ExportedTransformer(export(), "transformer_3", "auto", CPU)
    with pytest.raises(UnsupportedError, match="mps"):
        ExportedTransformer(export(), "", "auto", torch.device("mps"))
    transformer = ExportedTransformer(export(), "", "onnxruntime", CPU)
    _, text = inputs(1)
    with pytest.raises(ShapeError, match="--height"):
        transformer(torch.randn(1, 4, 3, 16, 8), torch.tensor([600.0]), text)
    assert Artifact.open(export()).components[0] == transformer.component


# ----------------------------------------------------------------------------------------------------------- the nodes


class Model:
    """As much of ComfyUI's ModelPatcher as the nodes touch."""

    def __init__(self) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {OPTION: Settings()}}

    def clone(self) -> Model:
        twin = Model()
        twin.model_options = copy.deepcopy(self.model_options)  # as ComfyUI does
        return twin


def test_a_workflow_of_before_loads_an_export_as_before(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its three values are the first inputs still, and the later ones have what was usual."""
    (host / "made").symlink_to(export(), target_is_directory=True)
    loaded: list[tuple[tuple[object, ...], dict[str, Any]]] = []
    model = types.ModuleType("dvdquant.deploy.comfyui.model")  # the real one needs ComfyUI
    model.load_model = lambda *given, **more: loaded.append((given, more)) or len(loaded)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dvdquant.deploy.comfyui.model", model)
    declared = nodes.LoadExport.INPUT_TYPES()
    assert list(declared["required"]) == ["export", "transformer", "backend"]
    graph = {
        "nodes": [{"id": 1, "type": "DvdqLoadExport", "widgets_values": ["made", "first", "pytorch"]}],
        "links": [],
    }
    prompt = to_prompt(graph, nodes.NODE_CLASS_MAPPINGS)
    assert nodes.LoadExport().load(**prompt["1"]["inputs"]) == (1,)
    assert nodes.LoadExport().load("made", "first", "pytorch") == (2,)
    usual: dict[str, Any] = {"compile": False, "fuse": None, "cuda_graphs": False, "attention": None}
    usual |= {"attention_backend": None, "weights": "auto"}
    assert loaded == [((host / "made", "", "pytorch"), usual)] * 2
    # Each of the later ones by what the editor offers.
    choices = {"compile": True, "fuse": "no", "cuda_graphs": True, "attention": "fp8", "attention_backend": "cudnn"}
    choices |= {"weights": "expanded"}
    assert list(declared["optional"]) == list(choices)
    for name, value in choices.items():
        kind = declared["optional"][name][0]
        assert kind == "BOOLEAN" if value is True else value in kind
    nodes.LoadExport().load("made", "first", "auto", **choices)  # type: ignore[arg-type]
    assert loaded[2][1] == {**choices, "fuse": False}
    with pytest.raises(UnsupportedError, match="fuse is 'maybe'"):
        nodes.LoadExport().load("made", "first", "auto", fuse="maybe")


def test_nodes_change_a_copy_and_give_it_a_trace_of_its_own(host: Path) -> None:
    model = Model()
    (other,) = nodes.BitSchedule().set(model, "a4", 0.2, 3, "none", 0.0)
    before, after = (m.model_options["transformer_options"][OPTION] for m in (model, other))
    assert before == Settings()
    assert (after.mode, after.delta, after.last_high, after.weighting) == ("a4", 0.2, 3, "none")
    assert after.trace is not before.trace
    assert other.clone().model_options["transformer_options"][OPTION] is after
    (other,) = nodes.BitSchedule().set(model, "a8", 0.2, 3, "none", 0.1, 0, 0, "magcache")
    settings = other.model_options["transformer_options"][OPTION]
    assert (settings.cache, settings.cache_policy) == (0.1, "magcache")
    with pytest.raises(UnsupportedError, match="cache to 0"):
        nodes.BitSchedule().set(model, "planned", 0.2, 3, "none", 0.1)
    stranger = types.SimpleNamespace(model_options={"transformer_options": {}})
    for call in (
        lambda: nodes.BitSchedule().set(stranger, "a4", 0.2, 3, "none", 0.0),
        lambda: nodes.StepTrace().read({}, stranger),
        lambda: nodes.LoraBeside().add(object(), "style.safetensors", 1.0),
    ):
        with pytest.raises(UnsupportedError):
            call()


def test_step_trace(transformer: ExportedTransformer) -> None:
    model = Model()
    latent = {"samples": torch.zeros(1)}
    empty = nodes.StepTrace().read(latent, model)["result"]
    assert empty[1] == "no sampler has run this model yet"
    settings = model.model_options["transformer_options"][OPTION]
    latents, text = inputs(1)
    with transformer.sampling(settings, LEVELS):
        for level in LEVELS[:-1]:
            transformer(latents, torch.tensor([1000 * level]), text, transformer_options=options(settings, level, (0,)))
    answer = nodes.StepTrace().read(latent, model)
    passed, table, text_json, picture = answer["result"]
    assert passed is latent
    assert answer["ui"]["text"] == [table]
    assert len(table.splitlines()) == 3 + 4
    calls = json.loads(text_json)["calls"]
    assert [call["step"] for call in calls] == [0, 1, 2, 3]
    assert json.loads(text_json)["steps"] == 4
    assert picture.ndim == 4
    assert picture.shape[-1] == 3
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1


def test_words_and_frames_of_a_prompt_table(host: Path) -> None:
    (host / "tiny-wan").symlink_to(TINY_WAN, target_is_directory=True)
    positive, negative = nodes.TableWords().encode("tiny-wan", "ring red right large black")
    table = PromptTable.open(TINY_WAN)
    assert torch.equal(positive[0][0], table.encode("ring red right large black"))
    assert torch.equal(negative[0][0], table.encode(None))
    with pytest.raises(ShapeError, match="did you mean"):
        nodes.TableWords().encode("tiny-wan", "rinq red right large black")
    (frames,) = nodes.TableFrames().show({"samples": torch.zeros(2, 3, 4, 6, 6)})
    assert frames.shape[0] == 8
    assert frames.dtype == torch.float32
    assert torch.allclose(frames, torch.tensor(128 / 255))
    with pytest.raises(ShapeError):
        nodes.TableFrames().show({"samples": torch.zeros(1, 3, 6, 6)})


def test_the_branch_that_leads_decides_from_the_first_step_on() -> None:
    controller = StepController("switch", delta=0.5, last_high=0, weighting="none")
    controller.reset(3)
    controller.lead("cond")
    for step, (cond, uncond) in enumerate([(None, None), (0.1, 9.0), (0.1, 9.0)]):
        timestep = 900.0 - 300 * step
        decision = controller.decide("uncond", step, timestep)
        assert decision.bits == (8 if step < 2 else 4)
        controller.ran("uncond", step, timestep, decision.bits, uncond)
        controller.ran("cond", step, timestep, decision.bits, cond)
