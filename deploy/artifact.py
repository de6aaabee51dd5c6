"""Read access to an export: its manifest, its configs, and the places of its graphs and engines.

Opening an export reads and checks JSON only. Nothing is deserialized or executed here. :mod:`dvdquant.deploy.sessions`
does that, after it has compared the hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.artifact.entries import EngineEntry, GraphEntry
from dvdquant.artifact.layout import constants_path, graph_path, is_engine_of, is_weight_path
from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.artifact.verify_files import read_verified
from dvdquant.checkpoint.recorded_source import had_few_bits
from dvdquant.errors import DvdquantError, EngineError, OutputError, UnsupportedError
from dvdquant.model.families import Family, Sizes, get_family
from dvdquant.recipe import RECIPES, Recipe
from dvdquant.system.files import strict_json
from dvdquant.text import shell_line

if TYPE_CHECKING:
    import torch

    from dvdquant.model.plan import ModelPlan

__all__ = ["Artifact", "family_of"]

MAX_CONFIG = 4 << 20  # bytes; the configs of published transformers have some kilobytes


@dataclass(frozen=True)
class Artifact:
    """An export folder that was opened and checked.

    Args:
        root: The export folder.
        manifest: The checked content of the manifest file.
        configs: A mapping from each component to the transformer's own config.json.
        _cache: Results of :meth:`family` and :meth:`plan`, kept between calls.
    """

    root: Path
    manifest: Manifest
    configs: dict[str, dict[str, Any]]
    _cache: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, out: str | Path) -> Artifact:
        """Open an export and check its manifest and its configs.

        Args:
            out: The export folder.

        Raises:
            OutputError: The folder is no export, its manifest is malformed, or a config differs from its hash.
            UnsupportedError: This version does not know the transformer class.
            CheckpointError: No model of the class has such a config.
        """
        root = Path(out)
        return cls.of(root, load_manifest(root))

    @classmethod
    def of(cls, root: Path, manifest: Manifest) -> Artifact:
        """Read the configs of an export whose manifest is known, also one that is not in its place yet.

        Args:
            root: The folder of its files.
            manifest: What they are.

        Raises:
            OutputError: A config differs from its hash.
            UnsupportedError: This version does not know the transformer class.
            CheckpointError: No model of the class has such a config.
        """
        artifact = cls(root, manifest, {})
        for component in manifest.components:
            name = "config.json" if component == manifest.components[0] else f"{component}.config.json"
            artifact.configs[component] = _read_config(root, manifest, name)
        return artifact

    # ------------------------------------------------------------------------------------------------ what is in it

    @property
    def components(self) -> tuple[str, ...]:
        """Return ``("transformer",)``, or with ``"transformer_2"`` for Wan 2.2."""
        return self.manifest.components

    @property
    def sizes(self) -> Sizes:
        """Return the sizes of the graphs: latent sizes (fixed or ranges), text tokens and batch."""
        return Sizes.from_json(self.manifest.shapes)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations and of everything that is not quantized: bfloat16 or float16."""
        return _dtypes()[self.manifest.shapes["dtype"]]

    @property
    def recipe(self) -> Recipe:
        """Return the recipe that the export was made with."""
        return Recipe.from_json(self.manifest.recipe)

    def config(self, component: str = "transformer") -> dict[str, Any]:
        """Return the transformer's own config.

        Args:
            component: One of :attr:`components`.

        Raises:
            OutputError: The export has no such component. The error lists the components that it has.
        """
        if component not in self.configs:
            raise OutputError(
                f"the export has no component {component!r:.100}", available=self.components, fix="pick one of these"
            )
        return self.configs[component]

    def family(self, component: str = "transformer") -> Family:
        """Return the model family. Diffusers' defaults fill in the fields that the config leaves out.

        Args:
            component: One of :attr:`components`.

        Raises:
            OutputError: The export has no such component.
            UnsupportedError: The family cannot be made from the config, or cannot give inputs of the export's sizes.
        """
        key = ("family", component)
        if key not in self._cache:
            where = f"the config of {component} in {self.root}"
            self._cache[key] = family_of(self.config(component), where, self.sizes)
        family: Family = self._cache[key]
        return family

    def plan(self, component: str = "transformer") -> ModelPlan:
        """Return the plan of the export: the layers that are quantized, and how.

        Args:
            component: One of :attr:`components`.

        Raises:
            OutputError: The export has no such component.
            EngineError: This version of dvdquant would decide otherwise than the version that wrote the export.
        """
        key = ("plan", component)
        if key not in self._cache:
            from dvdquant.model.plan import plan_model

            plan = replace(
                plan_model(self.config(component), self.recipe, self.dtype), lora_rank=self.manifest.lora_rank
            )
            layers = len(plan.layers)
            start = self.components.index(component) * layers
            written = [(e["name"], e["rotation_block"]) for e in self.manifest.layers[start : start + layers]]
            if written != [(spec.name, spec.rotation.block) for spec in plan.layers]:
                raise EngineError(
                    f"dvdquant {self.manifest.dvdquant_version} quantized other layers of {component} than this version would",
                    fix=f"export again: {self.rebuild_command()}",
                )
            self._cache[key] = plan
        cached: ModelPlan = self._cache[key]
        return cached

    def bits(self, component: str = "transformer") -> tuple[int, ...]:
        """Return the exported activation bits in ascending order, such as (4, 8).

        Args:
            component: One of :attr:`components`.
        """
        self.config(component)
        return tuple(sorted({g["act_bits"] for g in self._graphs(component)}))

    def _graphs(self, component: str) -> list[GraphEntry]:
        wanted = [g for g in self.manifest.graphs if g["target"] == "tensorrt"]
        return [g for g in wanted if g["path"] == graph_path(component, g["act_bits"], "tensorrt")]

    def graph(self, component: str, bits: int) -> str:
        """Return the relative path of the graph with QuantLinear nodes.

        Args:
            component: One of :attr:`components`.
            bits: Activation bits, one of :meth:`bits`.

        Raises:
            OutputError: The export has no such component.
            EngineError: The export has no graph with these bits. The error names the bits that it has.
        """
        self.config(component)
        for entry in self._graphs(component):
            if entry["act_bits"] == bits:
                return entry["path"]
        raise EngineError(
            f"the export has no graph of {component} with {bits}-bit activations",
            available=[f"{b} bits" for b in self.bits(component)],
            fix="use one of these, or export with a recipe that has it",
        )

    def engines(self, component: str, backend: str, bits: int) -> tuple[EngineEntry, ...]:
        """Return the engines of one transformer and one bit-width, for any SM.

        Args:
            component: One of :attr:`components`.
            backend: The name of a TensorRT backend, or an alias of it.
            bits: Activation bits.

        Raises:
            OutputError: The export has no such component.
            UnsupportedError: The backend is unknown.
        """
        from dvdquant.backends import backend_name

        self.config(component)
        name = backend_name(backend)
        return tuple(
            entry
            for entry in self.manifest.engines
            if backend_name(entry["backend"]) == name
            and entry["act_bits"] == bits
            and is_engine_of(entry["path"], component, bits)
        )

    def kept_inputs(self, component: str, backend: str, bits: Sequence[int]) -> list[int]:
        """Return the bytes of the inputs that are not quantized, for each engine of a transformer that one GPU would load.

        Engines of older exports have none. Where engines of a width are for several GPUs, the least counts.

        Args:
            component: One of :attr:`components`.
            backend: The name of a TensorRT backend, or an alias of it.
            bits: Activation bits; a width without an engine, built or left to be built, is left out.

        Raises:
            OutputError: The export has no such component.
            UnsupportedError: The backend is unknown.
        """
        from dvdquant.backends import backend_name

        name, found = backend_name(backend), []
        for width in bits:
            sizes = [entry.get("kept_inputs", 0) for entry in self.engines(component, backend, width)]
            sizes += [
                entry.get("kept_inputs", 0)
                for entry in self.manifest.builds
                if (entry["component"], backend_name(entry["backend"]), entry["act_bits"]) == (component, name, width)
            ]
            found += [min(sizes)] if sizes else []
        return found

    def weight_files(self, component: str) -> tuple[str, ...]:
        """Return the relative paths of the files with one transformer's tensors: first packed weights, then constants.

        Args:
            component: One of :attr:`components`.

        Raises:
            OutputError: The export has no weight file of the component.
        """
        names = sorted(name for name in self.manifest.files if is_weight_path(name, component))
        if not names:
            raise OutputError(
                f"the export has no weight file of {component}",
                available=sorted(self.manifest.files)[:8],
                fix="export again",
            )
        constants = constants_path(component)
        return (*names, *((constants,) if constants in self.manifest.files else ()))

    def read(self, name: str) -> bytes:
        """Return the bytes of one file, which are hashed as they are read.

        Args:
            name: The path of the file, relative to the export folder.

        Raises:
            OutputError: The bytes are not those that the manifest vouches for.
        """
        return read_verified(self.root, self.manifest, name)

    # ------------------------------------------------------------------------------------------------ making it again

    def rebuild_command(
        self,
        *,
        sm: str | None = None,
        target: str | None = None,
        options: Sequence[str] = (),
        recipe: str | None = None,
    ) -> str:
        """Return the ``dvdq-export`` command line that makes what is missing, with the options of this export.

        For TensorRT, ``PLUGIN_LIBRARY`` stands for the path of the built plugin library.

        Args:
            sm: The compute capability to build engines for, such as "8.9". The default is all that the export has.
            target: ``rtx`` or ``tensorrt``. The default is all targets that the export has.
            options: Size options that replace those of the export, such as ``["--height", "480:720"]``.
            recipe: The name of another recipe; the default is that of the export.
        """
        manifest = self.manifest
        # 1. Source and recipe.
        recipes = ["--recipe", recipe] if recipe else _recipe_options(manifest.recipe)
        words = ["dvdq-export", manifest.source["model"], "-o", str(self.root), *recipes]
        for option, key in (("--transformer-2", "transformer_2"), ("--config", "config"), ("--pipeline", "pipeline")):
            if key in manifest.source:
                words += [option, str(manifest.source[key])]  # type: ignore[literal-required]
        # 2. Targets and the SMs to build for.
        targets = {target} if target else {e["backend"].removeprefix("tensorrt_") for e in manifest.engines}
        if any(g["target"] == "onnx" for g in manifest.graphs):
            targets.add("onnx")  # without this target the graphs would be made again
        for name in sorted(targets) or ["graphs"]:
            words += ["--target", name]
        if "tensorrt" in targets:
            words += ["--plugin", "PLUGIN_LIBRARY"]
            if any(entry.get("version_compatible") for entry in manifest.engines):
                words += ["--version-compatible"]
        sms = {sm} if sm else {item for entry in manifest.engines for item in entry["sm"]}
        for name in sorted(sms, key=_version):
            words += ["--sm", name]
        # 3. Dtype and sizes.
        words += ["--dtype", manifest.shapes["dtype"], *(options or _size_options(self.sizes))]
        words += ["--text-tokens", str(self.sizes.text_tokens)]
        if self.sizes.batch != 1:
            words += ["--batch", str(self.sizes.batch)]
        # 4. LoRAs, and the runtime's defaults.
        for lora in manifest.lora:
            words += ["--lora", f"{lora['component']}={lora['path']}:{lora['scale']!r}"]
        if manifest.lora_rank:
            words += ["--lora-rank", str(manifest.lora_rank)]
        for name, value in (manifest.sampling or {}).items():
            words += [f"--{name}", f"{value:g}"]
        # 5. Other options, where they differ from their defaults.
        if self.components[0] != "transformer":
            words += ["--subfolder", self.components[0]]
        if manifest.nonfinite:
            words.append("--allow-nonfinite")
        if had_few_bits(manifest.source):
            words.append("--allow-low-bits")
        if options or recipe:
            words.append("--replace")
        return shell_line(words)


def _dtypes() -> dict[str, torch.dtype]:
    from dvdquant.numerics.dtypes import DTYPES

    return DTYPES


def _read_config(root: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    if name in manifest.files and manifest.files[name]["bytes"] > MAX_CONFIG:
        raise OutputError(
            f"{root / name} is said to have {manifest.files[name]['bytes']} bytes",
            available=f"at most {MAX_CONFIG}",
            fix="export again",
        )
    try:
        config = strict_json(read_verified(root, manifest, name))
    except ValueError as error:
        raise OutputError(f"{root / name} is not valid JSON: {error}", fix="export again") from error
    if not isinstance(config, dict):
        raise OutputError(f"{root / name} is not a JSON object", fix="export again")
    family_of(config, str(root / name))
    return config


def family_of(config: dict[str, Any], where: str, sizes: Sizes | None = None) -> Family:
    """Return the family of a config.

    Args:
        config: The transformer's config. Its values are not trusted.
        where: The name of the config in error messages.
        sizes: Sizes that the family must give inputs for, or None to skip this check.

    Raises:
        UnsupportedError: The family cannot be made from the config, or cannot give inputs of ``sizes``.
    """
    try:
        family = get_family(config)
        if sizes is not None:
            family.patch()
            family.inputs(sizes)
            family.tokens(*sizes.at("opt"))
        return family
    except DvdquantError:
        raise
    except Exception as error:  # a config is free text: computing with odd values can fail in many ways
        kind = type(error).__name__
        raise UnsupportedError(f"{where} is not what its family needs: {kind} {error}", fix="export again") from error


def _version(sm: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in sm.split("."))


def _size_options(sizes: Sizes) -> list[str]:
    axes = [f"{a.min}:{a.opt}:{a.max}" if a.dynamic else str(a.opt) for a in (sizes.frames, sizes.height, sizes.width)]
    return ["--latent", "x".join(axes)]


def _recipe_options(data: dict[str, Any]) -> list[str]:
    recipe = Recipe.from_json(data)
    words = ["--recipe", recipe.name]
    base = RECIPES.get(recipe.name)
    if base is None:
        return words
    if len(recipe.activations) < len(base.activations):
        words += ["--activations", str(recipe.activations[0].bits)]
    if recipe.modulation != base.modulation:
        words += ["--modulation", recipe.modulation]
    if recipe.attention != base.attention:
        words += ["--attention", recipe.attention]
    for option, globs, known in (("--keep", recipe.keep, base.keep), ("--force", recipe.force, base.force)):
        for glob in globs[len(known) :]:
            words += [option, glob]
    return words
