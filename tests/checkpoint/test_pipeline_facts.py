"""The VAE of a Wan transformer is known by what it returns, or by the pipeline beside it; never by its input channels."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.artifact.entries import Source
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.pipeline_facts import with_pipeline_facts
from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.pipelines.adapters import get_adapter
from dvdquant.deploy.report.page import collect
from dvdquant.errors import CheckpointError
from dvdquant.export.options import ExportOptions, with_table_defaults
from dvdquant.export.plan import ExportPlan, plan_export
from dvdquant.model.families import get_family
from dvdquant.model.families.configs import PIPELINE
from dvdquant.model.families.wan import Wan
from dvdquant.model.plan import plan_model
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, refused, run
from tests.support.exporting import TINY_WAN, with_changes
from tests.support.written_exports import manifest

WAN21, WAN22 = (4, 8, 8), (4, 16, 16)


def config(inside: int, outside: int | None) -> dict[str, Any]:
    return with_changes(tiny.WAN, num_layers=1, in_channels=inside, out_channels=outside, rope_max_seq_len=256)


def pipeline(folder: Path, inside: int, outside: int, index: Any = None, vae: Any = None) -> Path:
    """A pipeline's folder with what an export reads of it; None leaves the file out."""
    tiny.write_checkpoint(folder / "transformer", config(inside, outside))
    parts = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps({**parts, **(index or {})}))
    if vae is not None:
        (folder / "vae").mkdir()
        (folder / "vae/config.json").write_text(vae if isinstance(vae, str) else json.dumps(vae))
    return folder


def planned(model: Path, **options: Any) -> ExportPlan:
    made = ExportOptions(str(model), model.parent / "out", get_recipe("w4a8"), targets=("graphs",), **options)
    return plan_export(made)


@pytest.mark.parametrize(
    ("inside", "outside", "scale", "per_token"),
    [
        (16, 16, WAN21, False),  # text to video
        (36, 16, WAN21, False),  # image to video
        (48, 16, WAN21, False),  # Fun-Control
        (48, 48, WAN22, True),  # TI2V-5B
        (96, 48, WAN22, True),  # edit, of 5B
        (100, 48, WAN22, True),  # image to video, of 5B
        (48, None, WAN22, True),  # diffusers returns as many channels as go in
    ],
)
def test_the_output_channels_decide(
    inside: int, outside: int | None, scale: tuple[int, int, int], per_token: bool
) -> None:
    family = plan_model(config(inside, outside), get_recipe("w4a8"), torch.bfloat16).family
    assert isinstance(family, Wan)
    assert family.vae_scale == scale
    specs = {spec.name: spec for spec in family.inputs(tiny.FIXED)}
    assert specs["timestep"].shape == ((1, "tokens") if per_token else (1,))
    assert specs["hidden_states"].shape[1] == inside
    assert family.default_video == ((121, 704, 1280) if scale == WAN22 else (81, 480, 832))


@pytest.mark.parametrize(
    ("inside", "outside", "index", "vae", "scale", "per_token"),
    [
        (48, 16, {}, {}, WAN21, False),
        (48, 48, {"expand_timesteps": True}, {"scale_factor_spatial": 16}, WAN22, True),
        (96, 48, {"expand_timesteps": False}, {"scale_factor_spatial": 16, "scale_factor_temporal": 4}, WAN22, False),
        (96, 48, {}, None, WAN22, True),
        (16, 16, {"expand_timesteps": True}, {}, WAN21, True),
        (
            12,
            4,
            {"expand_timesteps": False},
            {"scale_factor_spatial": 32, "scale_factor_temporal": 8},
            (8, 32, 32),
            False,
        ),
    ],
)
def test_the_pipeline_decides(
    inside: int,
    outside: int,
    index: dict[str, Any],
    vae: Any,
    scale: tuple[int, int, int],
    per_token: bool,
    tmp_path: Path,
) -> None:
    model = pipeline(tmp_path / "model", inside, outside, index, vae)
    plan = planned(model, height="256", width="320", num_frames="17")
    assert plan.plans[0].family.vae_scale == scale
    assert plan.sizes.at("opt") == (16 // scale[0] + 1, 256 // scale[1], 320 // scale[2])
    assert (len(plan.plans[0].family.inputs(plan.sizes)[1].shape) == 2) == per_token
    alone = get_family(config(inside, outside))
    assert isinstance(alone, Wan)
    # Where the transformer alone tells the same, the export is what it was.
    assert (PIPELINE in plan.checkpoints[0].config) == (
        (scale, per_token) != (alone.vae_scale, alone.per_token_timestep)
    )


def test_what_the_pipeline_said_is_in_the_export(tmp_path: Path) -> None:
    """An edit model of 5B whose pipeline gives one timestep per sample: its graph, its plan and its calls have that shape."""
    model = pipeline(tmp_path / "model", 96, 48, {"expand_timesteps": False}, {"scale_factor_spatial": 16})
    out = tmp_path / "out"
    in_process(model, "-o", out, "--target", "graphs", "--recipe", "w4a8", *SIZES)
    artifact = Artifact.open(out)
    family = artifact.family()
    assert isinstance(family, Wan)
    assert family.vae_scale == WAN22
    assert not family.per_token_timestep
    assert artifact.plan().family.inputs(artifact.sizes) == family.inputs(artifact.sizes)
    latents, text = torch.zeros(1, 96, 2, 8, 8), torch.zeros(1, 4, 32)
    adapter = get_adapter(family, artifact.sizes, torch.bfloat16)
    inputs = adapter.inputs({"hidden_states": latents, "timestep": torch.tensor([5.0]), "encoder_hidden_states": text})
    assert inputs["timestep"].shape == (1,)
    import onnx

    (graph,) = artifact.manifest.graphs
    shapes = {
        i.name: len(i.type.tensor_type.shape.dim)
        for i in onnx.load(out / graph["path"], load_external_data=False).graph.input
    }
    assert shapes["timestep"] == 1


@pytest.mark.stress  # how it is planned is above
def test_fun_control_runs_as_wan_21(tmp_path: Path) -> None:
    """48 channels in, 16 out: one timestep per sample, and an export that can be opened."""
    model = pipeline(tmp_path / "model", 48, 16)
    out = tmp_path / "out"
    in_process(model, "-o", out, "--target", "graphs", "--recipe", "w4a8", *SIZES)
    family = Artifact.open(out).family()
    assert family.vae_scale == WAN21
    assert family.inputs(Artifact.open(out).sizes)[1].shape == (1,)


def test_another_pipeline_is_another_export(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model", 96, 48, {}, {"scale_factor_spatial": 16})
    before = planned(model, latent="2x8x8").key
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": False}))
    assert planned(model, latent="2x8x8").key != before


def test_a_transformer_given_alone_is_not_asked_about_its_neighbours(tmp_path: Path) -> None:
    """What lies outside of the folder that was given is not read, and a config does not say what its pipeline does."""
    model = pipeline(tmp_path / "model", 48, 48, {"expand_timesteps": False}, {"scale_factor_spatial": 32})
    checkpoint = open_checkpoint(model / "transformer")
    assert with_pipeline_facts(checkpoint).config == checkpoint.config
    assert planned(model / "transformer", latent="2x8x8").plans[0].family.vae_scale == WAN22
    path = model / "transformer/config.json"
    path.write_text(json.dumps({**config(48, 48), PIPELINE: {"vae_scale": [1, 1, 1]}}))
    assert PIPELINE not in with_pipeline_facts(open_checkpoint(model / "transformer")).config


@pytest.mark.parametrize(
    ("index", "vae", "named"),
    [
        ({"expand_timesteps": "yes"}, None, "expand_timesteps"),
        ({"expand_timesteps": 1}, None, "expand_timesteps"),
        ({}, {"scale_factor_spatial": 0}, "scale_factor_spatial"),
        ({}, {"scale_factor_spatial": 10**30}, "scale_factor_spatial"),
        ({}, {"scale_factor_temporal": None}, "scale_factor_temporal"),
        ({}, [1], "vae/config.json"),
        ({}, "{oops", "vae/config.json"),
        ({}, '{"a":' * 9999 + "1" + "}" * 9999, "vae/config.json"),
    ],
)
def test_a_hostile_pipeline(index: dict[str, Any], vae: Any, named: str, tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model", 48, 16, index, vae)
    refused(run(model, "-o", tmp_path / "out", "--dry-run", *SIZES), named)


def test_a_vae_that_is_a_link_or_a_pipe(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model", 48, 16, {}, {})
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    path = model / "vae/config.json"
    path.unlink()
    path.symlink_to(secret)
    refused(run(model, "-o", tmp_path / "out", "--dry-run", *SIZES), "outside the folder")
    path.unlink()
    os.mkfifo(path)
    refused(run(model, "-o", tmp_path / "out", "--dry-run", *SIZES), "vae/config.json")


# -------------------------------------------------------------------------------------------------------- prompt tables


def test_the_prompt_table_decides_the_defaults(tmp_path: Path) -> None:
    """Five words a prompt, clips of 8 frames of 24 × 24. The tests of dvdq-run run on a default export, which has these."""

    def sizes(**options: Any) -> tuple[tuple[int, int, int], int]:
        made = planned(TINY_WAN, **options).sizes
        return made.at("opt"), made.text_tokens

    def planned(model: Path, **options: Any) -> ExportPlan:
        return plan_export(
            ExportOptions(str(model), tmp_path / "out", get_recipe("w4a4"), targets=("graphs",), **options)
        )

    assert sizes() == ((8, 24, 24), 5)
    assert sizes(text_tokens=7) == ((8, 24, 24), 7)
    assert sizes(latent="4x16x16") == ((4, 16, 16), 5)
    assert sizes(height="480", width="832") == ((21, 60, 104), 5)
    # The transformer alone has no table beside it.
    assert planned(TINY_WAN / "transformer").sizes.text_tokens == 512
    options = ExportOptions(str(TINY_WAN / "transformer"), tmp_path, get_recipe("w4a4"))
    assert with_table_defaults(options) is options


def test_a_damaged_prompt_table_is_refused(tmp_path: Path) -> None:
    model = tiny.write_checkpoint(tmp_path / "model/transformer", tiny.WAN).parent
    (model / "prompts.json").write_text('{"words": 1}')
    assert PromptTable.is_at(model)
    with pytest.raises(CheckpointError, match=r"prompts"):
        planned(model, latent="2x8x8")
    assert planned(model, latent="2x8x8", text_tokens=4).sizes.text_tokens == 4


@pytest.mark.parametrize("facts", [True, False])
def test_a_report_knows_the_size_of_a_source_whose_pipeline_speaks(tmp_path: Path, facts: bool) -> None:
    """What the pipeline says is a part of the fingerprint, so the report looks at the source as the exporter did."""
    vae = {"scale_factor_temporal": 4, "scale_factor_spatial": 16} if facts else None
    model = pipeline(tmp_path / "m", 16, 16, {"expand_timesteps": True} if facts else None, vae)
    plan = planned(model)
    (checkpoint,) = plan.checkpoints
    assert (PIPELINE in checkpoint.config) == facts
    source = Source(model=str(model), class_name=checkpoint.class_name, fingerprint=checkpoint.fingerprint())
    report = collect(tmp_path, manifest(source=source), Progress("text"))
    assert report.checkpoint_bytes == checkpoint.nbytes
    (model / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "WanTransformer3DModel"]}))
    (model / "transformer/config.json").write_text(json.dumps({**checkpoint.config, "eps": 1e-5}))
    assert collect(tmp_path, manifest(source=source), Progress("text")).checkpoint_bytes is None
