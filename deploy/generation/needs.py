"""What a run takes: the parts of the model, the bytes of their weights, and when each is in memory. Nothing is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dvdquant.artifact.entries import EngineEntry
from dvdquant.checkpoint.lora.terms import Loras
from dvdquant.checkpoint.untrusted import UntrustedFolder
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.admission import stage_bytes
from dvdquant.deploy.generation.check import PipelineChecker, RequestChecker
from dvdquant.deploy.generation.memory_plan import (
    FOUR_BIT_GROUP,
    INT8_ROW,
    PACKED,
    Loaded,
    RunBytes,
    engine_choices,
    four_bit_bytes,
)
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.generation.text_encoder import TEXT_BITS
from dvdquant.deploy.sessions.lora_needs import lora_bytes
from dvdquant.deploy.sessions.private_copy import bytes_beside
from dvdquant.hardware.capabilities import sm_number
from dvdquant.hardware.weights import HeldForm, WeightPolicy
from dvdquant.system.safetensors_reader import TensorInfo, read_header, read_header_from

__all__ = ["Part", "parts_of_run", "run_bytes", "transformer_bytes"]

_ENGINES = ("rtx", "tensorrt", "tensorrt_rtx")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Matrices that are looked up and not multiplied with, or of no use to a text encoder; they stay in 16 bit.
_EMBEDDING = re.compile(r"embed|shared|attention_bias|lm_head|wte|wpe")


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Args:
        name: The part, such as ``vae``.
        stored: Bytes of its weights on the disk.
        loaded: Bytes of its weights in memory.
        resident: When they are on the device, in words.
        stays: Whether they stay there.
    """

    name: str
    stored: int
    loaded: int
    resident: str
    stays: bool

    def to_json(self) -> dict[str, Any]:
        """Return the part for JSON."""
        return asdict(self)


def parts_of_run(
    checker: RequestChecker,
    requests: Sequence[GenerateRequest],
    backend: str,
    *,
    offload: bool,
    alternate: bool = False,
    text_bits: int = 16,
    loras: Mapping[str, Loras] | None = None,
    sm: str | None = None,
    weights: WeightPolicy = "auto",
) -> list[Part]:
    """Return the parts that a run of checked requests loads, in the order in which they are used.

    Args:
        checker: What the export and its model can make.
        requests: The requests of one prompt.
        backend: The backend that runs: ``onnxruntime``, ``pytorch``, ``tensorrt_rtx`` (or ``rtx``) or ``tensorrt``.
        offload: Whether the pipeline's other parts are on the device only while they are used.
        alternate: Whether the text encoder is freed before the transformer is loaded.
        text_bits: Bits of the text encoder's weights.
        loras: LoRAs that run beside the quantized weights, by transformer.
        sm: The compute capability, where our kernels run; else None.
        weights: How quantized weights are held there.
    """
    found = []
    # 1. The pipeline's own parts.
    for name, tensors in _pipeline_parts(checker, requests).items():
        text = _is_text(name)
        loaded = _loaded_bytes(checker, name, tensors, text_bits if text else 16)
        when = {"vae": "the frames are decoded", "image_encoder": "the image is encoded"}.get(name, "text is encoded")
        when += " and the image is encoded" if name == "vae" and _have_images(requests) else ""
        comes = offload or (alternate and text)
        resident = f"while {when}" if comes else "once the text is encoded" if alternate else "all the time"
        found.append(Part(name, sum(t.nbytes for t in tensors), loaded, resident, not comes))
    # 2. The transformers: packed weights or engines, and the original beside them.
    always = "once the text is encoded" if alternate else "all the time"
    for component in checker.artifact.components:
        if any(request.mode != "16" for request in requests):
            what, stored, held = _executed(checker.artifact, component, backend, sm, weights)
            found.append(Part(f"{component} ({what})", stored, held, always, stays=True))
            beside = None if loras is None else loras.get(component)
            if room := lora_bytes(checker.artifact, component, beside, backend):
                stored = 0 if beside is None else sum(lora.nbytes for lora in beside.fused)
                words = "room for LoRAs" if beside is None else "LoRAs beside the weights"
                found.append(Part(f"{component} ({words})", stored, room, always, stays=True))
        if any(request.mode == "16" for request in requests):
            original = 2 * _parameters(checker.artifact, component)
            found.append(Part(f"{component} (16 bit)", original, original, always, stays=True))
    return found


def run_bytes(
    checker: RequestChecker,
    requests: Sequence[GenerateRequest],
    backend: str,
    base: int,
    *,
    narrow: bool,
    sm: str | None = None,
    weights: WeightPolicy = "auto",
    loras: Mapping[str, Loras] | None = None,
    shared: bool = False,
) -> RunBytes:
    """Return the bytes of a run of checked requests, for :mod:`.memory_plan`.

    Args:
        checker: What the export and its model can make.
        requests: The requests of one prompt.
        backend: As for :func:`parts_of_run`.
        base: Bytes that libraries and the program take.
        narrow: Whether a run that switches may load one bit-width instead.
        sm: The compute capability, where our kernels run; else None.
        weights: How quantized weights are held there.
        loras: LoRAs that run beside the quantized weights, by transformer.
        shared: Whether a GPU runs that shares the host's memory, where a copy of the weight files may lie beside them.
    """
    parts = _pipeline_parts(checker, requests)
    sixteen = {name: _loaded_bytes(checker, name, tensors, 16) for name, tensors in parts.items()}
    encoders = {name: tensors for name, tensors in parts.items() if _is_text(name)}
    text = {
        bits: sum(_loaded_bytes(checker, name, tensors, bits) for name, tensors in encoders.items())
        for bits in (TEXT_BITS if encoders else ())
    }
    stages = {tiled: [stage_bytes(checker, r, vae_tiling=tiled) for r in requests] for tiled in (False, True)}
    return RunBytes(
        text=text,
        image=sixteen.get("image_encoder", 0),
        vae=sixteen.get("vae", 0),
        transformer=transformer_bytes(checker.artifact, requests, backend, narrow, sm, weights, loras or {}),
        step=max(step for step, _ in stages[False]) * (2 if backend == "onnxruntime" else 1),  # it computes in fp32
        decode={tiled: max(decode for _, decode in each) for tiled, each in stages.items()},
        base=base,
        copy=_copied_bytes(checker.artifact) if shared and any(r.mode != "16" for r in requests) else 0,
    )


def _copied_bytes(artifact: Artifact) -> int:
    """Return the bytes of private copies of all weight files, as far as they lie in memory and not on a disk."""
    return bytes_beside(sum(_file_bytes(artifact, component) for component in artifact.components))


def _file_bytes(artifact: Artifact, component: str) -> int:
    return sum(artifact.manifest.files[name]["bytes"] for name in artifact.weight_files(component))


def transformer_bytes(
    artifact: Artifact,
    requests: Sequence[GenerateRequest],
    backend: str,
    narrow: bool,
    sm: str | None,
    weights: WeightPolicy,
    loras: Mapping[str, Loras],
) -> dict[Loaded, int]:
    """Return the bytes of what may be loaded of the transformers, by the form and the widths that are loaded.

    Args:
        artifact: The export.
        requests: The requests of one prompt; their modes say what runs.
        backend: As for :func:`parts_of_run`.
        narrow: Whether a run that switches may load one bit-width instead.
        sm: The compute capability, where our kernels run; else None.
        weights: How quantized weights are held there.
        loras: LoRAs that run beside the quantized weights, by transformer.
    """
    modes = {request.mode for request in requests}
    beside = sum(2 * _parameters(artifact, component) for component in artifact.components) if "16" in modes else 0
    if modes == {"16"}:
        return {Loaded("original"): beside}
    beside += sum(lora_bytes(artifact, name, loras.get(name), backend) for name in artifact.components)
    bits = artifact.bits(artifact.components[0])
    # 1. Engines that hold their weights themselves: each width has its own.
    plugin = any(_has_plugin(artifact, component, backend) for component in artifact.components)
    if backend in _ENGINES and not plugin:
        names = artifact.components
        each = {width: sum(_engine_bytes(artifact, c, backend, (width,)) for c in names) for width in bits}
        beside += sum(max(artifact.kept_inputs(c, backend, bits), default=0) for c in names)
        return {loaded: size + beside for loaded, size in engine_choices(each, narrow=narrow).items()}
    # 2. A runtime that keeps what the files hold.
    if sm is None:
        held_by_all = sum(_executed(artifact, component, backend)[2] for component in artifact.components)
        return {PACKED: held_by_all + beside}
    # 3. Our kernels: packed once for all widths, expanded, or some layers so and some so.
    policies: tuple[WeightPolicy, ...] = ("auto", "packed") if weights == "auto" else (weights,)
    found: dict[Loaded, int] = {}
    by_component = [_held_by_kernels(artifact, name, backend, sm, policies) for name in artifact.components]
    for i in range(len(policies)):
        held = [choices[i] for choices in by_component]
        forms = {form for form, _ in held}
        form = forms.pop() if len(forms) == 1 else "mixed"
        found.setdefault(Loaded(form), beside + sum(nbytes for _, nbytes in held))
    return found


def _held_by_kernels(
    artifact: Artifact, component: str, backend: str, sm: str, policies: Sequence[WeightPolicy]
) -> list[tuple[HeldForm, int]]:
    """Return how our kernels hold one transformer under each policy, and the bytes, those of engines with the plugin included."""
    from dvdquant.model.held_weights import held_weights
    from dvdquant.model.weight_choice import choose_weights

    bits, plugin = artifact.bits(component), _has_plugin(artifact, component, backend)
    shared = artifact.kept_inputs(component, backend, bits) if plugin else None
    held = held_weights(artifact.plan(component), sm_number(sm), bits, artifact.sizes, shared)
    choices = [choose_weights(held, policy, plugin=plugin) for policy in policies]
    # The files of engines hold their constants, which the count of weights has, too.
    engines = _engine_bytes(artifact, component, backend, bits) - held.constants if plugin else 0
    return [(choice.form, choice.nbytes + engines) for choice in choices]


def _pipeline_parts(checker: RequestChecker, requests: Sequence[GenerateRequest]) -> dict[str, list[TensorInfo]]:
    """Return the tensors of the pipeline's parts that a run loads, beside its transformers: encoders first, the VAE last."""
    if not isinstance(checker, PipelineChecker):
        return {}
    without = checker.folder.text_parts if checker.text is not None else ()
    names = [name for name in checker.folder.parts if name not in without]
    folder = UntrustedFolder.at(checker.folder.root)
    found = {}
    for name in sorted(names, key=lambda part: (part == "vae", not _is_text(part), part)):
        tensors = list(_part_tensors(folder, name))
        if tensors and (name != "image_encoder" or _have_images(requests)):
            found[name] = tensors
    return found


def _have_images(requests: Sequence[GenerateRequest]) -> bool:
    return any(r.image is not None or r.last_image is not None for r in requests)


def _is_text(part: str) -> bool:
    return part.startswith("text")


def _loaded_bytes(checker: RequestChecker, part: str, tensors: Sequence[TensorInfo], bits: int) -> int:
    """Return the bytes of a part in memory."""
    width = 4 if part == "vae" and checker.family.name == "wan" else 2  # this VAE stays in fp32
    loaded = 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        linear = len(tensor.shape) == 2 and not _EMBEDDING.search(tensor.name)
        if bits == 8 and linear:
            loaded += count + INT8_ROW * tensor.shape[0]
        elif bits == 4 and linear and tensor.shape[1] % FOUR_BIT_GROUP == 0:
            loaded += four_bit_bytes(count, tensor.shape[0])
        else:
            loaded += count * width if tensor.dtype in _FLOATS else tensor.nbytes
    return loaded


def _part_tensors(folder: UntrustedFolder, name: str) -> Iterator[TensorInfo]:
    """Yield the tensors of a part's weights; the folder was checked when it was opened."""
    if not folder.has_folder(name):
        return
    place = folder.sub(name)
    for file in place.names():
        if file.endswith(".safetensors"):
            fd = place.open(file)
            try:
                yield from read_header_from(fd, place.root / file).tensors.values()
            finally:
                os.close(fd)


def _executed(
    artifact: Artifact, component: str, backend: str, sm: str | None = None, policy: WeightPolicy = "auto"
) -> tuple[str, int, int]:
    """Return what runs of one transformer, in words, and its bytes on the disk and in memory."""
    packed = _file_bytes(artifact, component)
    plugin = _has_plugin(artifact, component, backend)
    bits = artifact.bits(component)
    engines = _engine_bytes(artifact, component, backend, bits) if backend in _ENGINES else 0
    if sm is not None and (plugin or backend not in _ENGINES):
        ((form, held),) = _held_by_kernels(artifact, component, backend, sm, [policy])
        return f"{'engines, ' if plugin else ''}{Loaded(form)}", packed + engines, held
    if backend not in _ENGINES:
        return str(PACKED), packed, packed
    inputs = max(artifact.kept_inputs(component, backend, bits), default=0)
    if not plugin:
        return "engines", engines, engines + inputs
    from dvdquant.model.held_weights import packed_inputs

    return "engines, packed weights", engines + packed, engines + inputs + packed_inputs(artifact.plan(component))


def _engines(artifact: Artifact, component: str, backend: str, bits: Sequence[int]) -> list[EngineEntry]:
    return [entry for width in bits for entry in artifact.engines(component, backend, width)]


def _has_plugin(artifact: Artifact, component: str, backend: str) -> bool:
    """Return whether engines take the packed weights as inputs of the plugin, instead of holding weights themselves."""
    if backend not in _ENGINES:
        return False
    found = _engines(artifact, component, backend, artifact.bits(component))
    return any(entry["precision"] == "plugin" for entry in found)


def _engine_bytes(artifact: Artifact, component: str, backend: str, bits: Sequence[int]) -> int:
    """Return the bytes of a transformer's engines of some bit-widths, on the GPU where they are largest."""
    files, by_place = artifact.manifest.files, dict[str, int]()
    for entry in _engines(artifact, component, backend, bits):
        place = entry["path"].rpartition("/")[0]  # one folder an SM
        by_place[place] = by_place.get(place, 0) + files[entry["path"]]["bytes"]
    return max(by_place.values(), default=0)


def _parameters(artifact: Artifact, component: str) -> int:
    """Return the number of parameters of the original transformer."""
    layers = {entry["name"]: entry["features_in"] * entry["features_out"] for entry in artifact.manifest.layers}
    seen, others = set(), 0
    for name in artifact.weight_files(component):
        if not name.endswith(".safetensors"):
            continue
        for tensor, info in read_header(artifact.root / name).tensors.items():
            layer, _, kind = tensor.rpartition(".")
            if layer in layers:
                seen.add(layer)
            if layer not in layers or kind == "bias":
                others += math.prod(info.shape)
    return sum(layers[layer] for layer in seen) + others
