"""What is used of other packages without being public: in one place each, checked, and bounded in pyproject.toml."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import sys
import threading
import tomllib
import types
from collections.abc import Callable, Iterator
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

from dvdquant.deploy.generation import in_pipeline, text_encoder, text_four_bits, transformers_hooks
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.generation.session_options import SessionOptions
from dvdquant.deploy.serve.http import uvicorn_hooks
from dvdquant.deploy.sessions import attention, compiled, fusion
from dvdquant.deploy.sessions import onnxruntime as onnxruntime_session
from dvdquant.errors import UnsupportedError
from dvdquant.export import pipeline
from dvdquant.export.passes.lowering import modelopt_hooks
from dvdquant.model import diffusers_hooks
from dvdquant.system import hub_client, torch_hooks
from dvdquant.system.hooks import hook

ROOT = Path(__file__).resolve().parents[2]
# The hook modules. Each is the one place of its library.
PLACES = {
    "dvdquant/model/diffusers_hooks.py",
    "dvdquant/quantize/backends/jit.py",  # numba
    "dvdquant/system/hub_client.py",
    "dvdquant/system/torch_hooks.py",
    "deploy/generation/transformers_hooks.py",
    "deploy/serve/http/uvicorn_hooks.py",
    "export/passes/lowering/modelopt_hooks.py",
}
# Python documents them, and so does torch._check; the last one is a folder of ours.
DOCUMENTED = {"_exit", "_getframe", "_check", "_native"}
NAME = r"_[A-Za-z](?:\w*[A-Za-z0-9])?\b"
DEFINITION = re.compile(
    rf"\b(?:def|class)\s+({NAME})|\b(?:self|cls)\.({NAME})(?=[, \w.]*(?::[^=\n]+)? = )|^\s*({NAME})\s*[:=]", re.M
)
# Not decorated: a validator is handed to its library by its decorator.
METHOD = re.compile(rf"^(?! *@).*\n +(?:async )?def ({NAME})", re.M)
USE = re.compile(rf"\.({NAME})|[\"']({NAME})[\"']|\bimport\s+(?:\([^)]*?)?({NAME})|\bfrom\s+\S*?\.({NAME})")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """The checks remember what they found."""
    checks: tuple[Any, ...] = (
        diffusers_hooks.check_declared,
        diffusers_hooks.check_pipeline_hooks,
        diffusers_hooks.check_stage_hooks,
        attention.registered_backend,
        modelopt_hooks.check_nvfp4,
        torch_hooks.check_example_values,
        transformers_hooks.check_packing_hooks,
    )
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


def sources() -> dict[str, str]:
    """The product's own files, by name."""
    found = {}
    for room in ("dvdquant", "export", "deploy"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not any((ROOT / parent).is_symlink() for parent in Path(name).parents if parent.name):
                found[name] = path.read_text()
    return found


def matches(pattern: re.Pattern[str], text: str) -> set[str]:
    return {name for found in pattern.findall(text) for name in ((found,) if isinstance(found, str) else found) if name}


def of_libraries() -> set[str]:
    """Private names of what nearly every module of ours touches, which ours must not be taken for."""
    kinds: tuple[Any, ...] = (
        nn.Module(), Tensor, torch.fx.Node, diffusers.DiffusionPipeline, diffusers.ModelMixin, diffusers.SchedulerMixin,
    )  # fmt: skip
    return {name for kind in kinds for name in dir(kind) if re.fullmatch(NAME, name)}


def foreign(text: str, ours: set[str], theirs: set[str]) -> set[str]:
    """The private names of others that a file uses. ``theirs`` count as ours only behind self or cls.

    Args:
        text: The source of the file.
        ours: Private names that the product defines.
        theirs: Private names of libraries that this file does not define itself.
    """
    found: set[str] = set()

    def judge(name: object, own_object: bool = False) -> None:
        private = isinstance(name, str) and re.fullmatch(NAME, name) and name not in DOCUMENTED
        if private and (name not in ours or (name in theirs and not own_object)):
            found.add(str(name))

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            judge(node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            judge(node.args[1].value if isinstance(node.args[1], ast.Constant) else "")
        elif isinstance(node, ast.ImportFrom):
            for name in (*(node.module or "").split("."), *(alias.name for alias in node.names)):
                judge(name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                for name in alias.name.split("."):
                    judge(name)
    return found


def uses_of_others(files: dict[str, str]) -> dict[str, set[str]]:
    """The private names of other packages that files use, hook modules and all. Parsed is only what may have some."""
    ours = {name for text in files.values() for name in matches(DEFINITION, text)}
    used = {name: matches(USE, text) for name, text in files.items()}
    theirs = of_libraries()
    found = {}
    for name, text in files.items():
        strangers = theirs - matches(DEFINITION, text)
        if used[name] - DOCUMENTED - (ours - strangers):
            found[name] = foreign(text, ours, strangers)
    # A private method that none of our files calls is one that a library calls: ours stands in its place.
    called = set().union(*used.values())
    for name, text in files.items():
        if methods := matches(METHOD, text) - called:
            found[name] = found.get(name, set()) | methods
    return {name: names for name, names in found.items() if names}


def test_private_names_stand_in_their_places_alone() -> None:
    files = sources()
    assert len(files) > 300
    found = uses_of_others(files)
    assert not {name: names for name, names in found.items() if name not in PLACES}
    wanted = {"_execution_device", "_parallel_config", "_repeated_blocks", "_unpack_latents"}
    assert wanted <= found["dvdquant/model/diffusers_hooks.py"] | {"_repeated_blocks"}
    asks = {name for name, text in files.items() if re.search(r"^from dvdquant\.system\.hooks import", text, re.M)}
    assert asks <= PLACES


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("device = pipe._execution_device", "_execution_device"),
        ("return value._ortvalue.to_dlpack()", "_ortvalue"),
        ("from diffusers.models.attention_dispatch import _AttentionBackendRegistry", "_AttentionBackendRegistry"),
        ("from huggingface_hub.utils import _http", "_http"),
        ("import torch._dynamo.config", "_dynamo"),
        ("from torch._dynamo import config", "_dynamo"),
        ("names = getattr(model, '_repeated_blocks', None)", "_repeated_blocks"),
        ("if hasattr(quantized, '_quantized_data'): pass", "_quantized_data"),
        ("children = module._modules", "_modules"),
        ("self._buffers['weight'] = None", "_buffers"),
        ("class Ours(Theirs):\n    def _process_before_loading(self): ...", "_process_before_loading"),
    ],
)
def test_a_new_private_use_is_found(line: str, name: str) -> None:
    files = {"ours.py": "def _modules(): ...\nself._own = 1\nself._own\n", "new.py": line}
    assert uses_of_others(files) == {"new.py": {name}}


def test_what_is_our_own_or_documented_is_not() -> None:
    files = {
        "ours.py": "def _part(): ...\nself._own: int = 1\nclass A:\n    def _kept(self): ...\n",
        "new.py": "other._own; _part(); self._kept(); os._exit(1); torch._check(x); x.__dict__; member._name_; '_suffix'",
        "record.py": "class Record(BaseModel):\n    @field_validator('x')\n    @classmethod\n    def _split(cls, value): ...",
    }
    assert uses_of_others(files) == {}


def test_bounds_are_those_of_the_errors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = (*project["dependencies"], *project["optional-dependencies"]["serve"])
    bounds = {Requirement(text).name: Requirement(text) for text in texts}
    assert bounds["onnxruntime-gpu"].specifier == Requirement(onnxruntime_session.REQUIREMENT).specifier
    for text in (
        diffusers_hooks.REQUIREMENT,
        hub_client.REQUIREMENT,
        modelopt_hooks.REQUIREMENT,
        torch_hooks.REQUIREMENT,
        transformers_hooks.REQUIREMENT,
        uvicorn_hooks.REQUIREMENT,
    ):
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
    diffusers_hooks.check_declared.cache_clear()
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


# -------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize(
    ("module", "option", "sets"),
    [
        ("torch._dynamo.config", "recompile_limit", lambda: torch_hooks.allow_recompiles(64)),
        ("torch._dynamo.config", "skip_nnmodule_hook_guards", torch_hooks.notice_module_hooks),
        ("torch._inductor.config", "compile_threads", torch_hooks.compile_in_this_process),
    ],
)
def test_options_of_the_compiler(
    module: str, option: str, sets: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are set, and one that is gone is not set without an effect."""
    config = importlib.import_module(module)
    before = getattr(config, option)
    try:
        sets()
        wanted = {"recompile_limit": max(64, before), "skip_nnmodule_hook_guards": False, "compile_threads": 1}
        assert getattr(config, option) == wanted[option]
    finally:
        setattr(config, option, before)
    without = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, without)
    with pytest.raises(UnsupportedError) as caught:
        sets()
    refused(caught, "torch", option)
    assert not hasattr(without, option)


def test_a_compiler_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends import registry

    assert callable(torch_hooks.compiler_named("eager"))
    monkeypatch.delattr(registry, "lookup_backend")
    with pytest.raises(UnsupportedError) as caught:
        torch_hooks.compiler_named("eager")
    refused(caught, "torch", "lookup_backend")


def test_lines_of_code_are_left_out_of_a_trace_and_noted_after_it() -> None:
    from torch.fx import config

    before = config.do_not_emit_stack_traces
    with torch_hooks.without_stack_traces():
        assert config.do_not_emit_stack_traces is True
    assert config.do_not_emit_stack_traces is before


def test_a_graph_without_example_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check nothing would be fused, and nothing would fail."""
    new_backend = fusion.fusing_backend.__wrapped__
    new_backend(None)
    torch_hooks.check_example_values.cache_clear()
    monkeypatch.setattr(torch_hooks, "EXAMPLE_KEY", "another_value")
    with pytest.raises(UnsupportedError) as caught:
        new_backend(None)
    refused(caught, "torch", "another_value")


# -------------------------------------------------------------------------------- transformers, modelopt, the hub, uvicorn


@pytest.mark.parametrize(
    "name", ["_process_model_before_weight_loading", "param_needs_quantization", "get_quantize_ops"]
)
def test_a_transformers_that_packs_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is loaded; the encoder would else be in 16 bit."""
    from transformers.quantizers.base import HfQuantizer

    text_encoder.check_text_bits(4)
    transformers_hooks.check_packing_hooks.cache_clear()
    monkeypatch.delattr(HfQuantizer, name)
    with pytest.raises(UnsupportedError) as caught:
        text_encoder.check_text_bits(4)
    refused(caught, "transformers", name)


def test_a_transformers_that_no_longer_calls_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.base import HfQuantizer

    monkeypatch.setattr(HfQuantizer, "preprocess_model", lambda self, model: model)
    with pytest.raises(UnsupportedError) as caught:
        text_encoder.check_text_bits(4)
    refused(caught, "transformers", "_process_model_before_weight_loading")


def test_a_text_encoder_whose_layers_were_not_packed() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(text_four_bits.FOUR_BIT_GROUP, 4)
            self.odd = nn.Linear(text_four_bits.FOUR_BIT_GROUP + 1, 4)

        def get_output_embeddings(self) -> None: ...

    encoder = Encoder()
    with pytest.raises(UnsupportedError) as caught:
        text_four_bits.check_packed(encoder)
    refused(caught, "transformers", "Encoder")
    text_four_bits.put_layers_in(encoder)
    text_four_bits.check_packed(encoder)


def test_a_modelopt_without_its_packed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    modelopt_hooks.check_nvfp4()
    modelopt_hooks.check_nvfp4.cache_clear()

    class Quantizer:
        @staticmethod
        def quantize(weight: Tensor, block: int, **more: Any) -> tuple[object, Tensor, Tensor]:
            return object(), weight, weight

    monkeypatch.setattr("modelopt.torch.quantization.qtensor.NVFP4QTensor", Quantizer)
    with pytest.raises(UnsupportedError) as caught:
        modelopt_hooks.check_nvfp4()
    refused(caught, "nvidia-modelopt", "_quantized_data")


def test_a_hub_whose_client_is_made_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import _http

    hub_client.limit_waiting()
    monkeypatch.delattr(_http, "_GLOBAL_CLIENT_FACTORY")
    with pytest.raises(UnsupportedError) as caught:
        hub_client.limit_waiting()
    refused(caught, "huggingface_hub", "_GLOBAL_CLIENT_FACTORY")


def test_a_hub_with_another_http_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused where the client is made, before a request is sent."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    class Client:
        event_hooks: dict[str, list[Any]] = {"request": [], "response": []}

    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", Client)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)
    hub_client.limit_waiting()
    with pytest.raises(UnsupportedError) as caught:
        huggingface_hub.get_session()
    refused(caught, "huggingface_hub", "SyncByteStream")


def test_a_uvicorn_that_takes_signals_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check a signal would end the server before its jobs."""
    import uvicorn

    async def serve(self: Any, sockets: Any = None) -> None: ...

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    with pytest.raises(UnsupportedError) as caught:
        importlib.reload(uvicorn_hooks)
    refused(caught, "uvicorn", "capture_signals")


# ------------------------------------------------------------------------------------------------------ before the work


def test_stages_are_checked_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No transformer and no part is opened: the generator here has none."""
    generator = object.__new__(in_pipeline.PipelineGenerator)
    family = types.SimpleNamespace(name="ltx-video", image_tokens=lambda: 0)
    monkeypatch.setattr(in_pipeline.PipelineGenerator, "family", family, raising=False)
    vars(generator).update(
        check=lambda request: request,
        checker=types.SimpleNamespace(text=None, pipeline_of=lambda request: "LTXPipeline"),
        folder=types.SimpleNamespace(parts=(), transformers=()),
        _encoded={},
        _encoding=threading.RLock(),
        _denoising=threading.RLock(),
        _loading=threading.Lock(),
    )
    monkeypatch.delattr(diffusers.LTXPipeline, "_denormalize_latents")
    # The whole pipeline, and the text encoder alone, before the transformer.
    for alternate, begin in ((False, generator.prepare), (True, generator.encode_prompt)):
        vars(generator).update(options=SessionOptions(device="cpu", alternate=alternate), _engines={}, _pipes={})
        with pytest.raises(UnsupportedError) as caught:
            begin(GenerateRequest("a cat"))
        refused(caught, "diffusers", "_denormalize_latents")


def test_nvfp4_is_checked_before_an_export_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lost() -> None:
        raise UnsupportedError("modelopt has no packed bytes", fix="another release")

    monkeypatch.setattr(pipeline, "check_nvfp4", lost)
    monkeypatch.setattr(pipeline, "require_memory", lambda *more: None)
    monkeypatch.setattr(pipeline, "require_disk", lambda *more: None)
    options = types.SimpleNamespace(report=False, out=tmp_path / "out")
    estimate = types.SimpleNamespace(disk_bytes=0)
    plan: Any = types.SimpleNamespace(options=options, estimate=estimate, plans=(), engines=(), makes_nvfp4=True)
    progress: Any = None
    with pytest.raises(UnsupportedError, match="packed bytes"):
        pipeline.run_export(plan, progress)
    assert not options.out.exists()
