"""What is used of other packages without being public: in one place each, checked, and bounded in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from packaging.requirements import Requirement
from torch import Tensor, nn

from dvdquant.deploy.sessions import attention, compiled
from dvdquant.deploy.sessions import onnxruntime as onnxruntime_session
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
    checks: tuple[Any, ...] = (
        diffusers_hooks._check_declared,
        diffusers_hooks.check_pipeline_hooks,
        diffusers_hooks.check_stage_hooks,
        attention._registered,
    )
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
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
    assert bounds["onnxruntime-gpu"].specifier == Requirement(onnxruntime_session.REQUIREMENT).specifier
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


# --------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("name", ["_execution_device", "_unpack_latents", "_denormalize_latents"])
def test_a_pipeline_whose_stages_do_not_come_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before it is loaded: the last two are called after all denoising."""
    owner = next(kind for kind in diffusers.LTXConditionPipeline.__mro__ if name in vars(kind))
    for kind in ("LTXPipeline", "LTXConditionPipeline"):
        diffusers_hooks.check_stage_hooks(kind, latents=True)
    diffusers_hooks.check_stage_hooks.cache_clear()
    monkeypatch.delattr(owner, name)
    with pytest.raises(UnsupportedError) as caught:
        diffusers_hooks.check_stage_hooks("LTXConditionPipeline", latents=True)
    refused(caught, "diffusers", name)
    if name != "_execution_device":
        diffusers_hooks.check_stage_hooks("WanPipeline", latents=False)


def test_blocks_that_are_named_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check other modules than the blocks would be compiled, and nothing would fail."""
    assert diffusers_hooks.repeated_block_names(diffusers.WanTransformer3DModel) == ("WanTransformerBlock",)
    diffusers_hooks._check_declared.cache_clear()
    monkeypatch.delattr(diffusers.ModelMixin, "_repeated_blocks")
    with pytest.raises(UnsupportedError) as caught:
        compiled.repeated_blocks(nn.Module())
    refused(caught, "diffusers", "_repeated_blocks")


# ------------------------------------------------------------------------------------------------------------ attention


class _Transformer(nn.Module):
    """One block with self-attention."""

    def __init__(self, processor: object) -> None:
        super().__init__()
        block = nn.Module()
        block.attn1 = nn.Module()
        block.attn1.processor = processor
        self.blocks = nn.ModuleList([block])


def test_attention_that_can_be_taken_over() -> None:
    assert diffusers_hooks.attention_is_dispatched(WanAttnProcessor())
    assert not diffusers_hooks.attention_is_dispatched(CogVideoXAttnProcessor2_0())
    attention.check_attention(_Transformer(WanAttnProcessor()))


@pytest.mark.parametrize("name", ["_attention_backend", "_parallel_config"])
def test_a_processor_that_routes_attention_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check its attention would stay in 16 bit, and nothing would fail."""
    monkeypatch.delattr(WanAttnProcessor, name)
    with pytest.raises(UnsupportedError) as caught:
        attention.check_attention(_Transformer(WanAttnProcessor()))
    refused(caught, "diffusers", name)
    assert "WanAttnProcessor" in caught.value.what


def test_a_processor_that_calls_pytorch_otherwise() -> None:
    class Renamed(CogVideoXAttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, *inputs: Any) -> Any:
            return torch.nn.functional.softmax(inputs[0], -1)

    with pytest.raises(UnsupportedError) as caught:
        attention.check_attention(_Transformer(Renamed()))
    refused(caught, "diffusers", "Renamed")


def test_a_model_whose_attention_is_not_found() -> None:
    with pytest.raises(UnsupportedError) as caught:
        attention.check_attention(nn.Module())
    refused(caught, "diffusers", "Module")


def test_a_dispatch_that_hands_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check every layer would look like attention to text, and stay in 16 bit."""
    dispatch = attention_dispatch.dispatch_attention_fn

    def forgets(*tensors: Tensor, backend: Any, parallel_config: Any) -> Tensor:
        out: Tensor = dispatch(*tensors, backend=backend)
        return out

    with monkeypatch.context() as patched:
        patched.setattr(attention_dispatch, "dispatch_attention_fn", forgets)
        with pytest.raises(UnsupportedError) as caught:
            attention.check_attention(_Transformer(WanAttnProcessor()))
        refused(caught, "diffusers", "_parallel_config")
        patched.setattr(attention_dispatch, "dispatch_attention_fn", lambda query, key, value: query)
        with pytest.raises(UnsupportedError) as caught:
            attention.check_attention(_Transformer(WanAttnProcessor()))
        refused(caught, "diffusers", "attention dispatch")
        patched.delattr(attention_dispatch, "_AttentionBackendRegistry")
        with pytest.raises(UnsupportedError) as caught:
            attention.check_attention(_Transformer(WanAttnProcessor()))
        refused(caught, "diffusers", "_AttentionBackendRegistry")
    attention.check_attention(_Transformer(WanAttnProcessor()))
