"""The records that a manifest is made of, with the bounds that hold of a file from a stranger."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict  # typing's own from Python 3.12 on

__all__ = [
    "MAX_GUIDANCE",
    "MAX_STEPS",
    "OPEN",
    "STRICT",
    "AxisSizes",
    "Bits",
    "BuildEntry",
    "CheckedFile",
    "ComponentName",
    "ComputeCapability",
    "Count",
    "Digest",
    "EngineEntry",
    "ErrorShare",
    "GraphEntry",
    "LayerEntry",
    "LoraEntry",
    "Measured",
    "ProfileShapes",
    "Sampling",
    "Shapes",
    "Size",
    "Source",
    "Text",
    "Verified",
]
MAX_STEPS = 1000
MAX_GUIDANCE = 1000


def _check_model(text: str) -> str:
    """Return the text if it holds no NUL.

    Raises:
        ValueError: It holds one.
    """
    if "\0" in text:
        raise ValueError("a text without NUL")
    return text


def _check_order(sizes: list[int]) -> list[int]:
    """Return [MIN, OPT, MAX] if they are in ascending order.

    Raises:
        ValueError: They are not.
    """
    if sorted(sizes) != sizes:
        raise ValueError("[MIN, OPT, MAX] with MIN ≤ OPT ≤ MAX")
    return sizes


STRICT: ConfigDict = {"extra": "forbid", "strict": True}
OPEN: ConfigDict = {"extra": "allow", "strict": True}  # an entry may have more fields than this version reads
Text = Annotated[str, Field(max_length=4096)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Bits = Annotated[int, Field(ge=4, le=8, multiple_of=2)]
ErrorShare = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
ComputeCapability = Annotated[str, Field(pattern="^[0-9]{1,2}[.][0-9]$")]
# The same names that the exporter's --subfolder takes.
ComponentName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
AxisSizes = Annotated[
    list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(min_length=3, max_length=3), AfterValidator(_check_order)
]
ProfileShapes = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1, max_length=8)]],
    Field(min_length=3, max_length=3),
]


@with_config(OPEN)
class Shapes(TypedDict):
    """The sizes of the graphs, ``families.Sizes.to_json()``, and the dtype of activations.

    Attributes:
        frames: [MIN, OPT, MAX] of frames, in latent units.
        height: [MIN, OPT, MAX] of the height, in latent units.
        width: [MIN, OPT, MAX] of the width, in latent units.
        text_tokens: The length of the text embedding in tokens.
        batch: The number of samples in one call.
        dtype: The dtype of activations.
    """

    frames: AxisSizes
    height: AxisSizes
    width: AxisSizes
    text_tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    batch: Annotated[int, Field(ge=1, le=1 << 16)]
    dtype: Literal["bf16", "fp16"]


@with_config(STRICT)
class CheckedFile(TypedDict):
    """The checked form of :class:`dvdquant.system.files.FileEntry`.

    Attributes:
        sha256: The SHA-256 as 64 lower-case hex digits.
        bytes: The size in bytes.
    """

    sha256: Digest
    bytes: Size


@with_config(OPEN)
class Source(TypedDict):
    """The origin of the weights.

    Attributes:
        model: The MODEL argument of the export.
        class_name: The diffusers class.
        fingerprint: ``Checkpoint.fingerprint()``.
        pipeline: The folder or hub id that text encoder, VAE and scheduler come from, where it is not ``model``.
        transformer_2: The model of the second transformer, where it was named apart.
        config: The file that the config was read from, where it was named.
        format: The kind of file or folder, and whose names it has, in words.
        precision: What the weights were stored as, in words.
        notes: What was left out, assumed or applied, a sentence each.
        diffusers_folder: Whether it is a folder whose tensors have the names of diffusers.
        few_bits: The block types of 4 and 5 bits that weights were stored in.
    """

    model: Annotated[Text, AfterValidator(_check_model)]
    class_name: Text
    fingerprint: Text
    pipeline: NotRequired[Annotated[Text, AfterValidator(_check_model)]]
    transformer_2: NotRequired[Annotated[Text, AfterValidator(_check_model)]]
    config: NotRequired[Annotated[Text, AfterValidator(_check_model)]]
    format: NotRequired[Text]
    precision: NotRequired[Text]
    notes: NotRequired[Annotated[list[Text], Field(max_length=100)]]
    diffusers_folder: NotRequired[bool]
    few_bits: NotRequired[Annotated[list[Text], Field(max_length=100)]]


@with_config(OPEN)
class LoraEntry(TypedDict):
    """One LoRA that was fused into the weights.

    Attributes:
        component: The transformer that it went to.
        path: The file as it was then.
        sha256: The digest of the file.
        scale: Its strength.
        format: The format of its keys.
        layers: The number of its layers that were found in the transformer, which is all of them.
    """

    component: ComponentName
    path: Annotated[Text, AfterValidator(_check_model)]
    sha256: Digest
    scale: Annotated[float, Field(allow_inf_nan=False)]
    format: Text
    layers: Count


@with_config(STRICT)
class Sampling(TypedDict):
    """The sampling that the model was distilled for, where the exporter was told: the defaults of the runtime.

    Attributes:
        steps: The number of denoising steps.
        guidance: The guidance scale.
    """

    steps: NotRequired[Annotated[int, Field(ge=1, le=MAX_STEPS)]]
    guidance: NotRequired[Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]]


@with_config(OPEN)
class LayerEntry(TypedDict):
    """One quantized layer.

    The errors are relative mean squares, null for an all-zero weight. They are errors of the rotated weight, or errors
    of the outputs on predicted inputs if the recipe looks at inputs (:func:`dvdquant.recipe.error_name`).

    Attributes:
        name: The dotted name of the layer.
        members: The checkpoint's layers that are merged into it.
        features_in: K, the number of input channels.
        features_out: N, the number of output channels.
        rotation_block: The size of the Hadamard block in channels; 1 means no rotation.
        relative_mse: The error of the stored weight.
        relative_mse_minmax: The same error of the solver ``minmax`` (clip range at the extremes), for comparison.
        weight_mse: The error of the rotated weight over all rows, which ``--verify`` computes again. It is recorded if
            the recipe looks at inputs; older manifests lack it.
    """

    name: Text
    members: list[Text]
    features_in: Count
    features_out: Count
    rotation_block: Count
    relative_mse: ErrorShare | None
    relative_mse_minmax: ErrorShare | None
    weight_mse: NotRequired[ErrorShare | None]


@with_config(STRICT)
class Verified(TypedDict):
    """The extent of the last ``--verify``.

    Attributes:
        dvdquant: The version of dvdquant that verified.
        layers: The number of quantized layers that were compared with the checkpoint.
        rows: The number of their rows.
        kept: The number of tensors in 16 bit that were compared with the checkpoint.
        graphs: The graphs that ran and were judged.
    """

    dvdquant: Text
    layers: Count
    rows: Count
    kept: Size
    graphs: list[Text]


@with_config(OPEN)
class GraphEntry(TypedDict):
    """One ONNX graph.

    Attributes:
        path: The path of the file in the export.
        target: The target that it is for.
        act_bits: The bits of its activations: 4, 6 or 8.
    """

    path: Text
    target: Text
    act_bits: Bits


@with_config(STRICT)
class Measured(TypedDict):
    """The figures that the machine that built an engine found when it ran it.

    Attributes:
        gpu: The name of its GPU.
        milliseconds: The median time of one pass at the sizes that the engine is tuned for.
        passes: The number of passes that were timed.
        relative_error: The distance of its output from that of the PyTorch session, relative to the norm of the latter;
            null if that session did not fit into memory.
    """

    gpu: Text
    milliseconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    passes: Count
    relative_error: ErrorShare | None


@with_config(OPEN)
class EngineEntry(TypedDict):
    """One engine.

    Attributes:
        path: The path of the file in the export.
        backend: The library that built it.
        sm: The compute capabilities that it runs on, as ``["8.9", "12.0"]``.
        act_bits: The bits of the graph's activations: 4, 6 or 8.
        precision: A short name for the way in which the quantized layers run.
        executes: The same in words: the arithmetic that really runs.
        onnx_sha256: The SHA-256 of the graph that it was built from.
        versions: The versions of the builder.
        shapes: Its profile of sizes.
        attention: The number of attentions that run as one kernel, by the type of their queries; older manifests lack it.
        fused_layers: The number of quantized layers that one node computes with the residual, norm and modulation, or GELU,
            before them; older manifests lack it.
        version_compatible: Whether TensorRT's lean runtime of the same release runs it as well as TensorRT does; missing means
            no.
        kept_inputs: The bytes of its inputs that are not quantized, of which all engines of a transformer read one copy; older
            manifests lack it, and their engines hold a copy each.
        measured: What ``dvdq-build`` found when it ran the engine; only where it could.
    """

    path: Text
    backend: Text
    sm: Annotated[list[ComputeCapability], Field(max_length=100)]
    act_bits: Bits
    precision: Text
    executes: Text
    onnx_sha256: Digest
    versions: dict[Text, Text]
    shapes: dict[str, Any]
    attention: NotRequired[dict[Text, Annotated[int, Field(ge=0, lt=2**31)]]]
    fused_layers: NotRequired[Annotated[int, Field(ge=0, lt=2**20)]]
    version_compatible: NotRequired[bool]
    kept_inputs: NotRequired[Size]
    measured: NotRequired[Measured]


@with_config(OPEN)
class BuildEntry(TypedDict):
    """One engine that is to be built on another machine, by ``dvdq-build``.

    Attributes:
        engine: The path that the engine gets in the export.
        component: The transformer that it is of.
        graph: The path of the graph that its builder reads.
        backend: The library that builds it.
        sm: The compute capabilities that it is for.
        act_bits: The bits of the graph's activations: 4, 6 or 8.
        precision: A short name for the way in which the quantized layers run.
        executes: The same in words.
        onnx_sha256: The SHA-256 of the QuantLinear graph that ``graph`` was made from.
        profile: The [MIN, OPT, MAX] shapes of every input; null if all sizes are fixed.
        fp8_attentions: The number of attentions in the graph that have to become one FP8 kernel each.
        fused_layers: The number of layers in the graph that are fused with what comes before them; older manifests lack it.
        version_compatible: Whether it is built so that TensorRT's lean runtime runs it, too; missing means no.
        kept_inputs: The bytes of its inputs that are not quantized; missing means none, so that it holds its own copy of them.
        builder_bytes: The memory that the builder is estimated to take.
        held_bytes: The memory for weights that a session with this engine is estimated to hold.
        working_bytes: The memory that one call is estimated to work in, at the size the engine is tuned for; older manifests
            lack it.
        optimization_level: The builder's effort, 0 to 5; null means the builder's own.
        workspace_gib: The builder's workspace limit; null means the builder's own.
        command: The line that builds it by NVIDIA's own tool; empty if there is none.
    """

    engine: Text
    component: ComponentName
    graph: Text
    backend: Literal["tensorrt", "tensorrt_rtx"]
    sm: Annotated[list[ComputeCapability], Field(min_length=1, max_length=100)]
    act_bits: Bits
    precision: Literal["int8", "int4-weight-only", "nvfp4", "plugin"]
    executes: Text
    onnx_sha256: Digest
    profile: Annotated[dict[Text, ProfileShapes], Field(max_length=100)] | None
    fp8_attentions: Annotated[int, Field(ge=0, lt=2**20)]
    fused_layers: NotRequired[Annotated[int, Field(ge=0, lt=2**20)]]
    version_compatible: NotRequired[bool]
    kept_inputs: NotRequired[Size]
    builder_bytes: Size
    held_bytes: Size
    working_bytes: NotRequired[Size]
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None
    workspace_gib: Annotated[float, Field(gt=0, le=1024)] | None
    command: Annotated[str, Field(max_length=16384)]
