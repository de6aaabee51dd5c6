"""report.html: what it says is what the manifest says, it needs nothing besides itself, and no name in it becomes markup."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import GenerateRequest, generate
from dvdquant.deploy.generation.original import load_original
from dvdquant.deploy.generation.original_calls import OriginalRunner
from dvdquant.deploy.pipelines.schedulers import open_table_scheduler
from dvdquant.deploy.report.page import check_place, write_report
from dvdquant.deploy.report.samples import Sample, make_samples, sample_prompts
from dvdquant.deploy.report.text import commands, python_lines
from dvdquant.deploy.sessions import open_session
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.system.progress import Progress
from tests.support.commands import in_process, refused, run
from tests.support.exporting import TINY_WAN
from tests.support.report_pages import STEPS, Page, full_report, planned, report_export, report_source


@pytest.fixture(scope="module")
def source() -> Path:
    return report_source()


@pytest.fixture(scope="module")
def out() -> Path:
    return report_export()


@pytest.fixture(scope="module")
def manifest(out: Path) -> Manifest:
    return load_manifest(out)


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


def inspect(*arguments: object) -> str:
    result = CliRunner().invoke(inspect_main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


# ------------------------------------------------------------------------------------------------------ a real export


def test_report_is_a_file_of_the_export(out: Path, manifest: Manifest) -> None:
    assert "report.html" in manifest.files
    verify_files(out, manifest)
    assert sorted(manifest.files) == sorted(
        str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.name not in ("manifest.json", ".lock")
    )


def test_page_is_well_formed(page: Page) -> None:
    assert page.faults == []


def test_page_needs_nothing_besides_itself(page: Page) -> None:
    elements = {tag for tag, _ in page.pairs}
    assert not elements & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
        "use",
        "image",
        "foreignobject",
    }
    assert not [pair for pair in page.pairs if pair[1].startswith("on") or pair[1] in ("href", "xlink:href", "srcset")]
    assert all(value.startswith("data:image/png;base64,") for value in page.of("img", "src"))
    styles = re.search(r"<style>(.*?)</style>", page.source, re.S)
    assert styles is not None
    assert not re.search(r"url\(|@import|expression", styles[1])
    assert "http:" not in page.source
    assert "https:" not in page.source
    (policy,) = [v for v in page.of("meta", "content") if v.startswith("default-src")]
    assert policy.startswith("default-src 'none';")


def test_page_holds_the_numbers_of_the_manifest(page: Page, manifest: Manifest) -> None:
    ours = [e["relative_mse"] for e in manifest.layers if e["relative_mse"] is not None]
    theirs = [e["relative_mse_minmax"] for e in manifest.layers if e["relative_mse_minmax"] is not None]
    mean, minmax = sum(ours) / len(ours), sum(theirs) / len(theirs)
    assert f"{mean:.5f}" in page.text
    assert f"{100 * (1 - mean / minmax):.0f} % less than min-max ({minmax:.5f})" in page.text
    weights = sum(e["features_in"] * e["features_out"] for e in manifest.layers)
    assert f"{weights / 1e6:.2f} million" in page.text
    for path, entry in manifest.files.items():
        if path != "report.html":
            assert path in page.text
            assert entry["sha256"][:16] in page.text
    worst = sorted(manifest.layers, key=lambda e: -(e["relative_mse"] or 0))[:10]
    places = [
        page.text.index(f"{e['name']} {e['features_in']} → {e['features_out']} {e['rotation_block']}") for e in worst
    ]
    assert places == sorted(places)
    for name in (*manifest.kept, *manifest.tools, manifest.created[:10], manifest.source["class_name"]):
        assert name in page.text


def test_parameters_are_those_of_the_checkpoint(page: Page, source: Path) -> None:
    from dvdquant.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(source, component="transformer")
    elements = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    found = re.search(r"([\d.]+) million, ([\d.]+) million parameters kept", page.text)
    assert found is not None
    assert float(found[1]) + float(found[2]) == pytest.approx(elements / 1e6, abs=0.011)
    assert f"checkpoint {checkpoint.nbytes / 2**20:.1f} MiB" in page.text


def test_every_layer_is_in_the_chart(page: Page, manifest: Manifest) -> None:
    for entry in manifest.layers:
        assert (
            f"{entry['name']} {entry['features_in']} → {entry['features_out']}: {entry['relative_mse']:.3g}"
            in page.text
        )
    assert page.of("circle", "class").count("dot ours") == len(manifest.layers) + 1  # one in the legend


def test_verification_and_sample_are_shown(page: Page) -> None:
    assert page.text.count("within the bounds") == 2
    assert f"Seed 0, {STEPS} steps" in page.text
    assert len(page.of("img", "src")) == 3
    assert page.text.count("dB to 16 bit") == 2
    assert "Output error per step" in page.text


def test_the_python_lines_run(out: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = PromptTable.open(TINY_WAN).example()
    lines = python_lines(manifest, out, prompt, table=True)
    assert lines in html.unescape((out / "report.html").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "report.html", "exec"), {})
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    hostile = python_lines(manifest, 'it\'s "there"', "\\ ' \"\n", table=False)
    compile(hostile, "report.html", "exec")
    assert "WanPipeline.from_pretrained" in hostile


def test_the_commands_are_taken(out: Path, manifest: Manifest) -> None:
    """By their parsers, with the arguments as a shell would split them."""
    from dvdquant.cli.plan import main as plan_main
    from dvdquant.cli.run import main as run_main

    parsers = {"dvdq-run": run_main, "dvdq-plan": plan_main, "dvdq-inspect": inspect_main}
    for schedule in (False, True):
        for _, line in commands(manifest, f"{out}/it's here", 'a "cat" $HOME `x`', schedule):
            name, *words = shlex.split(line)
            context = parsers[name].make_context(name, words)
            assert context.params["out"] == Path(f"{out}/it's here")
            if name != "dvdq-inspect":
                assert context.params["prompt"] == ('a "cat" $HOME `x`',)


def test_again_without_work_renews_only_the_report(out: Path, source: Path, manifest: Manifest) -> None:
    planned(manifest, 8, 8, 4).save(out / "schedule.json")
    options = ("--target", "graphs", "--recipe", "w4a4", "--latent", "8x24x24", "--text-tokens", 5)
    in_process(source, "-o", out, *options, "--report", "--samples", 0)
    again = load_manifest(out)
    verify_files(out, again)
    weights = [n for n in manifest.files if n.startswith("onnx/")]
    assert {n: manifest.files[n] for n in weights} == {n: again.files[n] for n in weights}
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.faults == []
    assert "δ 0.1375, 5.50 bits on average predicted over 3 steps" in page.text
    assert "Sample:" not in page.text
    assert (out / "schedule.json").is_file()


# ------------------------------------------------------------------------------------------------------- dvdq-inspect


def test_inspect_writes_a_page_anywhere(out: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert "page.html" in inspect(out, "--html", tmp_path / "new" / "page.html")
    assert Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8")).faults == []
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_inspect_never_replaces_a_file_of_the_export(out: Path, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(out / "report.html")
    for place in (out / "report.html", tmp_path / "link.html"):
        with pytest.raises(OutputError, match="hash of"):
            check_place(place, out, manifest)
    with pytest.raises(OutputError, match="suffix"):
        check_place(out / "README.md", out, manifest)
    refused(CliRunner().invoke(inspect_main, [str(out), "--html", str(out / "report.html")]), "--report")
    verify_files(out, load_manifest(out))


def test_samples_without_a_page_are_refused(out: Path, tmp_path: Path) -> None:
    refused(CliRunner().invoke(inspect_main, [str(out), "--samples", "1"]), "--samples without --html")
    refused(run(TINY_WAN, "-o", tmp_path / "x", "--samples", 1), "--samples without --report")
    refused(run(TINY_WAN, "-o", tmp_path / "x", "--report", "--samples", 17), "0 to 16")
    assert not (tmp_path / "x").exists()


def test_what_is_missing_is_said_on_the_page(out: Path, manifest: Manifest, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    planned(Manifest.from_json(manifest.to_json().replace(manifest.source["fingerprint"], "0" * 64)), 8, 4).save(
        copy / "schedule.json"
    )
    text = (copy / "manifest.json").read_text().replace(manifest.source["model"], "somebody/elsewhere")
    (copy / "manifest.json").write_text(text)
    (copy / "onnx" / "transformer.safetensors").write_bytes(b"\0" * 16)
    inspect(copy, "--html", tmp_path / "page.html", "--samples", 1)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    for words in ("schedule.json is left out", "no samples", "not counted", "size of the checkpoint not at hand"):
        assert words in page.text


# ----------------------------------------------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def sample(out: Path, source: Path) -> Sample:
    (made,) = make_samples(out, str(source), 1, None, Progress())
    return made


def test_errors_are_those_along_the_originals_trajectory(out: Path, source: Path, sample: Sample) -> None:
    """Recomputed step by step with the scheduler and the original model, without a generator."""
    import torch

    artifact, table, scheduler = Artifact.open(out), PromptTable.open(source), open_table_scheduler(source)
    model = load_original(artifact, source, "transformer", torch.device("cpu"), torch.float32)
    original = OriginalRunner(model, artifact.family())
    scheduler.set_timesteps(STEPS)
    latents = torch.randn((1, 3, 8, 24, 24), generator=torch.Generator().manual_seed(0))
    with open_session(artifact, "transformer", device="cpu") as session:
        for step, timestep in enumerate(scheduler.timesteps):
            outputs, apart, norm = [], {4: 0.0, 8: 0.0}, 0.0
            for words in (table.encode(sample.prompt), table.encode(None)):
                inputs = {
                    "hidden_states": latents.to(artifact.dtype),
                    "timestep": timestep.reshape(1).float(),
                    "encoder_hidden_states": words.to(artifact.dtype),
                }
                exact = {n: t.float() for n, t in inputs.items()}
                outputs.append(original.run(exact))
                norm += float(outputs[-1].double().square().sum())
                for bits in apart:
                    apart[bits] += float((session.run(inputs, bits).double() - outputs[-1].double()).square().sum())
            for bits, value in apart.items():
                assert sample.errors[f"a{bits}"][step] == pytest.approx(math.sqrt(value / norm), rel=1e-6)
            velocity = outputs[1] + table.guidance_scale * (outputs[0] - outputs[1])
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    assert sum(sample.errors["a4"]) > sum(sample.errors["a8"]) > 0


def test_pictures_are_the_frames(out: Path, source: Path, sample: Sample) -> None:
    from PIL import Image

    row = next(r for r in sample.rows if r.name == "a4")
    request = GenerateRequest(sample.prompt, steps=STEPS, mode="a4")
    frames = generate(Artifact.open(out), request, pipeline=source, device="cpu").frames
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(row.picture.partition(",")[2]))))
    assert image.shape == (row.height, row.width, 4) == (96, 8 * 96 + 7 * 4, 4)
    assert np.array_equal(
        image[::4, : 8 * 100 : 4][:, [25 * f + c for f in range(8) for c in range(24)], :3], np.hstack(list(frames))
    )


def test_prompts_differ_and_are_known() -> None:
    table = PromptTable.open(TINY_WAN)
    prompts = sample_prompts(table, 8)
    assert prompts[0] == table.example()
    assert len(set(prompts)) == len(prompts) >= 4
    for prompt in prompts:
        table.encode(prompt)


def test_samples_need_a_prompt_table(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="prompt table"):
        make_samples(out, str(tmp_path), 1, None, Progress())


# ------------------------------------------------------------------------------------------------------------ browser


def test_a_browser_draws_it(page: Page, out: Path, tmp_path: Path) -> None:
    """Without an error of the page, and more than one colour in the picture."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a Chromium browser: none of {', '.join(names)} is on the PATH")
    from PIL import Image

    shot = tmp_path / "page.png"
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,2400", f"--screenshot={shot}"]
    done = subprocess.run([*command, (out / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert shot.is_file(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    image = Image.open(shot).convert("RGB")
    assert image.size == (1100, 2400)
    assert len(image.getcolors(1 << 24) or []) > 50


def test_write_is_whole_or_not_at_all(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("before")
    (tmp_path / "page.html").chmod(0o644)
    write_report(tmp_path / "page.html", full_report(manifest, "plain"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OutputError):
        write_report(tmp_path / "page.html" / "below.html", full_report(manifest, "plain"))
