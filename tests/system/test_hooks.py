"""What is used of other packages without being public: in one place each, checked, and bounded in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from packaging.requirements import Requirement

from dvdquant.errors import UnsupportedError
from dvdquant.export.passes.lowering.nvfp4 import MODELOPT_REQUIREMENT
from dvdquant.model import diffusers_hooks
from dvdquant.system import torch_hooks
from dvdquant.system.hooks import hook

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "dvdquant/quantize/backends/jit.py",
    "dvdquant/system/torch_hooks.py",
    "dvdquant/model/diffusers_hooks.py",
    "export/passes/lowering/nvfp4.py",  # modelopt's
}
# A private name behind a module of another package; torch._check is documented.
PRIVATE = re.compile(
    r"\b(?:torch|diffusers|numba|onnxruntime|modelopt)(?:\.\w+)*\._(?!check\b|_)\w+"
    r"|(?<!self)(?<!cls)\._(?:parameters|buffers|modules|version|cache|compile_for_args|quantized_data)\b"
    r'|"_keep_in_fp32_modules"|"_keys_to_ignore_on_load_unexpected"'
)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """The checks remember what they found."""
    for check in (diffusers_hooks._check_declared, diffusers_hooks.check_pipeline_hooks):
        check.cache_clear()
    yield
    for check in (diffusers_hooks._check_declared, diffusers_hooks.check_pipeline_hooks):
        check.cache_clear()


def test_private_names_stand_in_their_places_alone() -> None:
    for room in ("dvdquant", "export", "deploy"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found = PRIVATE.findall(re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text()))
            assert not found or name in PLACES, (name, found)


def test_bounds_are_those_of_the_errors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {Requirement(text).name: Requirement(text) for text in project["dependencies"]}
    for text in (torch_hooks.REQUIREMENT, diffusers_hooks.REQUIREMENT, MODELOPT_REQUIREMENT):
        wanted = Requirement(text)
        assert bounds[wanted.name].specifier == wanted.specifier
        assert any(part.operator == "<" for part in wanted.specifier)
        assert wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    assert any(part.operator == "<" for part in bounds["numba"].specifier)


def test_this_diffusers_and_this_torch_have_all_of_them() -> None:
    diffusers_hooks.check_pipeline_hooks()
    model = diffusers.WanTransformer3DModel
    assert "time_embedder" in diffusers_hooks.fp32_modules(model)
    assert diffusers_hooks.ignored_tensors(model)
    assert diffusers_hooks.fp32_modules(object()) == set()
    assert torch_hooks.parse_to("cpu", torch.bfloat16) == (torch.device("cpu"), torch.bfloat16)
    assert torch_hooks.parse_to(torch.float16) == (None, torch.float16)
    assert issubclass(torch_hooks.trace_error(), Exception)
    limit = torch._dynamo.config.recompile_limit
    torch_hooks.allow_recompiles(limit)
    assert torch._dynamo.config.recompile_limit == limit
    x = torch.zeros(2)
    before = torch_hooks.tensor_version(x)
    x.add_(1)
    assert torch_hooks.tensor_version(x) == before + 1


def refused(caught: pytest.ExceptionInfo[UnsupportedError], package: str, name: str) -> None:
    assert f"{package} {importlib.metadata.version(package)} has no" in caught.value.what
    assert name in caught.value.what
    assert f"pip install '{package}>=" in str(caught.value.fix)


@pytest.mark.parametrize("path", ["torch:nn.no_such_thing", "torch.no_such_module:thing"])
def test_what_torch_lacks_is_named_with_its_version(path: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        hook("torch", path, "for a test", torch_hooks.REQUIREMENT)
    refused(caught, "torch", "no_such_")


@pytest.mark.parametrize("name", ["_keep_in_fp32_modules", "_keys_to_ignore_on_load_unexpected"])
def test_a_diffusers_that_names_them_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(diffusers.ModelMixin, name)
    read = {
        "_keep_in_fp32_modules": diffusers_hooks.fp32_modules,
        "_keys_to_ignore_on_load_unexpected": diffusers_hooks.ignored_tensors,
    }[name]
    with pytest.raises(UnsupportedError) as caught:
        read(object())
    refused(caught, "diffusers", name)


def test_a_pipeline_that_no_longer_says_that_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check every request would go on for ever, and nothing would fail."""
    monkeypatch.setattr(diffusers.DiffusionPipeline, "maybe_free_model_hooks", lambda self: None)
    with pytest.raises(UnsupportedError) as caught:
        diffusers_hooks.check_pipeline_hooks()
    refused(caught, "diffusers", "_reset_stateful_cache")


def test_a_transformer_that_is_not_told_its_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.cache_utils import CacheMixin

    monkeypatch.delattr(CacheMixin, "cache_context")
    with pytest.raises(UnsupportedError) as caught:
        diffusers_hooks.check_pipeline_hooks()
    refused(caught, "diffusers", "cache_context")
