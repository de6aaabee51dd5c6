"""What runs inside of a real ComfyUI: ``python comfyui_child.py COMFYUI_ROOT BASE NODES RESULTS SCENARIO…``.

ComfyUI's modules keep global state and read the command line, so they get a process of their own. Results are written by
``torch.save``; the test that started this compares them with our own runtime.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GUIDANCE, STEPS, SEED, SHIFT = 3.0, 12, 7, 3.0
WORDS = "ring red right large black"


class _Absent(types.ModuleType):
    """Stands for torchvision or torchaudio, which ComfyUI imports at its top and sampling does not use."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and torchaudio where they are not installed, as modules whose every name is an empty class."""

    names = ("torchvision", "torchaudio")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        wanted = fullname.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return


def start(root: Path, base: Path, nodes: Path) -> Any:
    """Import ComfyUI on the CPU with ``base`` for its models and outputs, and load our nodes as ComfyUI does."""
    importlib.import_module("dvdquant.deploy.pipelines.transformer")  # diffusers asks for torchvision, too
    importlib.import_module("diffusers.models.transformers.transformer_wan")
    sys.meta_path.append(StandIns())  # last: an installed torchvision is taken
    sys.argv = ["main.py", "--cpu", "--base-directory", str(base), "--preview-method", "latent2rgb"]
    sys.path.insert(0, str(root))
    importlib.import_module("comfy.options").enable_args_parsing()
    comfy_nodes = importlib.import_module("nodes")
    assert asyncio.run(comfy_nodes.load_custom_node(str(nodes)))
    return comfy_nodes


class Bench:
    """ComfyUI's parts, and the toy model's conditioning."""

    def __init__(self, comfy_nodes: Any) -> None:
        self.nodes = comfy_nodes
        self.samplers = importlib.import_module("comfy.samplers")
        self.sample = importlib.import_module("comfy.sample")
        self.management = importlib.import_module("comfy.model_management")
        classes = comfy_nodes.NODE_CLASS_MAPPINGS
        self.positive, self.negative = classes["DvdqTableWords"]().encode("tiny-wan", WORDS)
        self.latent = torch.zeros(1, 3, 8, 24, 24)
        self.noise = self.sample.prepare_noise(self.latent, SEED)

    def model(self, backend: str = "pytorch") -> Any:
        return self.nodes.NODE_CLASS_MAPPINGS["DvdqLoadExport"]().load("tiny-export", "first", backend)[0]

    def bits(self, model: Any, mode: str = "switch", delta: float = 0.1, **more: Any) -> Any:
        options = {"last_high": 2, "weighting": "step", "cache": 0.0, **more}
        return self.nodes.NODE_CLASS_MAPPINGS["DvdqBitSchedule"]().set(model, mode, delta, **options)[0]

    def sigmas(self, steps: int = STEPS) -> torch.Tensor:
        """Those of diffusers' flow matching Euler scheduler with a shift."""
        plain = torch.linspace(1.0, 1 / 1000, steps, dtype=torch.float64)
        return torch.cat([SHIFT * plain / (1 + (SHIFT - 1) * plain), torch.zeros(1)]).float()

    def run(self, model: Any, sampler: str = "euler", sigmas: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        more = {"latent_image": self.latent, "disable_pbar": True, "seed": SEED, **more}
        chosen = self.samplers.sampler_object(sampler)
        levels = self.sigmas() if sigmas is None else sigmas
        with torch.inference_mode():
            return self.sample.sample_custom(
                model, self.noise, GUIDANCE, chosen, levels, self.positive, self.negative, **more
            ).clone()

    def trace(self, model: Any) -> list[tuple[int, str, int | None, str]]:
        trace = model.model_options["transformer_options"]["dvdquant"].trace
        return [(record.step, record.branch, record.bits, record.reason) for record in trace.records]


def refusal(action: Callable[[], object]) -> str:
    """The words that an action is refused with."""
    try:
        action()
    except Exception as error:  # noqa: BLE001  (the test reads which)
        return f"{type(error).__name__}: {error}"
    return "not refused"


# -------------------------------------------------------------------------------------------------------- the scenarios


def same_latents(bench: Bench, base: Path) -> dict[str, Any]:
    """The same noise and noise levels at each width, switched, and with the conditions in calls of their own."""
    results: dict[str, Any] = {"noise": bench.noise, "sigmas": bench.sigmas()}
    for backend in ("pytorch", "onnxruntime"):
        loaded = bench.model(backend)
        for mode in ("a8", "a4", "switch"):
            model = bench.bits(loaded, mode)
            results[f"{backend}-{mode}"] = bench.run(model)
            results[f"{backend}-{mode}-trace"] = bench.trace(model)
    model = bench.bits(bench.model(), "switch")
    model.model.memory_usage_factor = 1e15  # ComfyUI finds no room for both conditions in one batch
    results["apart"], results["apart-trace"] = bench.run(model), bench.trace(model)
    return results


def samplers(bench: Bench, base: Path) -> dict[str, Any]:
    """ComfyUI's other samplers: how many steps and calls, and whether the clip is finite."""
    results: dict[str, Any] = {}
    loaded = bench.model()
    for name in ("heun", "dpmpp_2m", "dpmpp_2s_ancestral", "euler_ancestral", "uni_pc", "lcm", "res_multistep"):
        model = bench.bits(loaded)
        latents = bench.run(model, name, bench.sigmas(6))
        results[name] = (bool(latents.isfinite().all()), bench.trace(model))
    model = bench.bits(loaded, total_steps=12, first_step=0)
    levels = bench.sigmas(12)
    half = bench.run(model, sigmas=levels[:7])
    results["first half"] = bench.trace(model)
    model = bench.bits(loaded, total_steps=12, first_step=6)
    whole = bench.run(model, sigmas=levels[6:], latent_image=half)
    results["second half"] = (bool(whole.isfinite().all()), bench.trace(model))
    results["too many"] = refusal(lambda: bench.run(bench.bits(loaded, total_steps=12, first_step=6)))
    return results


def refusals(bench: Bench, base: Path) -> dict[str, Any]:
    """What a workflow may ask for and an export does not have."""
    loader = importlib.import_module("comfy.sd")
    results: dict[str, Any] = {}
    model = bench.model()
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256)}
    results["lora"] = refusal(lambda: loader.load_lora_for_models(model, None, lora, 1.0, 1.0))
    results["save"] = refusal(lambda: model.model.state_dict_for_saving())
    results["merge"] = refusal(lambda: model.get_key_patches("diffusion_model."))
    patched = model.clone()
    patched.set_model_attn1_patch(lambda *a: a)
    results["patch"] = refusal(lambda: bench.run(patched))
    bench.noise = torch.zeros(1, 3, 8, 48, 48)
    results["size"] = refusal(lambda: bench.run(model, latent_image=torch.zeros(1, 3, 8, 48, 48)))
    bench.noise = torch.zeros(1, 16, 8, 24, 24)
    results["channels"] = refusal(lambda: bench.run(model, latent_image=torch.ones(1, 16, 8, 24, 24)))
    results["missing"] = refusal(
        lambda: bench.nodes.NODE_CLASS_MAPPINGS["DvdqLoadExport"]().load("../../etc", "first", "auto")
    )
    return results


def memory(bench: Bench, base: Path) -> dict[str, Any]:
    """ComfyUI's memory management loads and frees the session; an interrupted run leaves nothing behind."""
    results: dict[str, Any] = {}
    model = bench.bits(bench.model(), "switch")
    transformer = model.model.diffusion_model
    results["before"] = transformer.loaded
    first = bench.run(model)
    results["loaded"] = transformer.loaded
    results["sizes"] = (model.model_size(), model.loaded_size(), sum(transformer.session.resident_bytes().values()))
    copy = bench.bits(model, "switch")
    bench.run(copy)
    results["shared"] = copy.model.diffusion_model is transformer
    bench.management.unload_all_models()
    results["unloaded"] = not transformer.loaded
    interrupted = bench.management.InterruptProcessingException

    def interrupt(step: int, *_: Any) -> None:
        if step == 3:
            raise interrupted

    results["interrupted"] = refusal(lambda: bench.run(model, callback=interrupt))
    results["cut"] = len(bench.trace(model))
    results["again"] = torch.equal(first, bench.run(model))
    latent_preview = importlib.import_module("latent_preview")
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    results["preview"] = previewer.decode_latent_to_preview(first).size
    return results


def lora(bench: Bench, base: Path) -> dict[str, Any]:
    """A LoRA beside the weights by our own node; at 0 it is as if it were not there."""
    add = bench.nodes.NODE_CLASS_MAPPINGS["DvdqLora"]().add
    model = bench.bits(bench.model(), "a8")
    plain = bench.run(model)
    with_lora = bench.run(add(model, "style.safetensors", 1.0)[0])
    return {
        "changes": float((with_lora - plain).norm() / plain.norm()),
        "off": torch.equal(plain, bench.run(add(model, "style.safetensors", 0.0)[0])),
        "plain again": torch.equal(plain, bench.run(model)),
        "wrong backend": refusal(lambda: bench.run(add(bench.model("onnxruntime"), "style.safetensors", 1.0)[0])),
        "latents": with_lora,
        "settings": add(model, "style.safetensors", 1.0)[0].model_options["transformer_options"]["dvdquant"].loras[0],
    }


def workflow(bench: Bench, base: Path) -> dict[str, Any]:
    """The example workflow, checked and executed by ComfyUI's own executor."""
    execution = importlib.import_module("execution")
    for extra in ("nodes_model_advanced", "nodes_hunyuan", "nodes_preview_any"):
        path = Path(bench.nodes.__file__).parent / "comfy_extras" / f"{extra}.py"
        assert asyncio.run(bench.nodes.load_custom_node(str(path), module_parent="comfy_extras"))
    graph = json.loads((base / "workflow.json").read_text())
    prompt = to_prompt(graph, bench.nodes.NODE_CLASS_MAPPINGS)
    valid = asyncio.run(execution.validate_prompt("1", prompt, None))
    if not valid[0]:
        return {"valid": False, "errors": repr(valid)}

    class Server:
        client_id, last_node_id, last_prompt_id = None, None, None

        def send_sync(self, *_: Any) -> None:
            return

    executor = execution.PromptExecutor(Server())
    executor.execute(prompt, "1", {}, valid[2])
    outputs = executor.history_result["outputs"]
    texts = [line for output in outputs.values() for line in output.get("text", ())]
    images = [image["filename"] for output in outputs.values() for image in output.get("images", ())]
    return {"valid": True, "success": executor.success, "texts": texts, "images": images,
            "messages": repr(executor.status_messages)[-3000:]}  # fmt: skip


def to_prompt(graph: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    """A graph as the editor saves it, in the form that the server executes."""
    links = {link[0]: (str(link[1]), link[2]) for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] not in classes:
            assert node["type"] in ("Note", "MarkdownNote"), node["type"]
            continue
        declared = classes[node["type"]].INPUT_TYPES()
        inputs: dict[str, Any] = {}
        values = iter(node.get("widgets_values") or [])
        wired = {entry["name"]: links[entry["link"]] for entry in node.get("inputs", ()) if entry.get("link")}
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            kind = spec[0]
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                if name in declared.get("optional", {}):
                    # A workflow that was saved before the input was there lacks its value: the editor gives its default.
                    first = kind[0] if isinstance(kind, list) else None
                    inputs[name] = next(values, dict(*spec[1:]).get("default", first))
                else:
                    inputs[name] = next(values)
                if name == "seed":
                    next(values)  # what happens to the seed after a run
            if name in wired:
                inputs[name] = list(wired[name])
        assert next(values, None) is None, f"{node['type']} has more values than inputs"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


SCENARIOS = {each.__name__: each for each in (same_latents, samplers, refusals, memory, lora, workflow)}


def main() -> None:
    root, base, nodes, results = (Path(argument) for argument in sys.argv[1:5])
    wanted = sys.argv[5:]
    comfy_nodes = start(root, base, nodes)
    found = {name: SCENARIOS[name](Bench(comfy_nodes), base) for name in wanted}
    torch.save(found, results)


if __name__ == "__main__":
    main()
