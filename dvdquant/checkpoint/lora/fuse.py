"""Read LoRAs for a checkpoint: find the weights that each layer changes, check shapes and values, count.

:meth:`Checkpoint.read` is the only place that hands out weights, so a fuse there is that of the whole export. Nothing of a
LoRA stays in memory but its header: its two factors are read when their layer is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dvdquant.checkpoint.lora.file import OWN_FUSE, LoraFile
from dvdquant.checkpoint.lora.keys import Layer, foreign_kind, group
from dvdquant.checkpoint.lora.names import Place, aliases
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.lora.terms import FusedLora, Loras, Term
from dvdquant.checkpoint.reader import Checkpoint, count_nonfinite
from dvdquant.checkpoint.untrusted import few
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.system.recognize import recognize_tensors
from dvdquant.system.safetensors_reader import TensorInfo
from dvdquant.text import shown

__all__ = ["components_of", "lora_lines", "model_fingerprint", "read_loras", "with_loras"]

_REMOVE = (
    "give the LoRA of this model; keys that are of no use can be left out: "
    "save_file({k: v for k, v in load_file(FILE).items() if k not in KEYS}, NEW)"
)


def with_loras(checkpoint: Checkpoint, specs: Sequence[LoraSpec]) -> Checkpoint:
    """Return the checkpoint with ``specs`` fused into what it reads; without one, as it is. Raises as :func:`read_loras`.

    Args:
        checkpoint: The opened checkpoint.
        specs: The LoRAs to fuse.
    """
    if not specs:
        return checkpoint
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return replace(checkpoint, lora=read_loras(checkpoint.class_name, shapes, specs))


def read_loras(class_name: str, shapes: Mapping[str, tuple[int, ...]], specs: Sequence[LoraSpec]) -> Loras:
    """Return the changes that ``specs`` make to a transformer.

    Every file is opened, and what it holds is compared with the transformer and read once: a fuse does not fail later.

    Args:
        class_name: The diffusers class.
        shapes: The shape of every tensor of its checkpoint, by name.
        specs: The LoRAs.

    Raises:
        CheckpointError: A file is no LoRA, is of another model or of another kind, or has values that are not finite.
    """
    fused: list[FusedLora] = []
    terms: dict[str, list[Term]] = {}
    names = aliases(class_name, shapes)
    for spec in specs:
        lora, changes = _Reader(class_name, shapes, spec, names).read()
        fused.append(lora)
        for name, term in changes:
            terms.setdefault(name, []).append(term)
    return Loras(tuple(fused), {name: tuple(value) for name, value in terms.items()})


class _Reader:
    """One file against one transformer."""

    def __init__(
        self,
        class_name: str,
        shapes: Mapping[str, tuple[int, ...]],
        spec: LoraSpec,
        names: Mapping[str, tuple[Place, ...]],
    ) -> None:
        self.class_name, self.shapes, self.spec, self.names = class_name, shapes, spec, names
        self.path = shown(spec.path)
        self.file = LoraFile.open(spec.path)
        self.tensors = self.file.header.tensors
        self.flat: dict[str, str] = {}
        for name in names:
            self.flat.setdefault(name.replace(".", "_"), name)
        self.ranks: list[int] = []
        self.notes: list[str] = []
        self.changes: list[tuple[str, Term]] = []

    def read(self) -> tuple[FusedLora, list[tuple[str, Term]]]:
        """Return what is fused, and the changes by tensor."""
        # 1. What the keys are about.
        if foreign := foreign_kind(self.tensors):
            what, key = foreign
            raise CheckpointError(
                f"{self.path} is {what}: {key!r:.200}",
                available="low-rank changes (LoRA) and differences",
                fix=OWN_FUSE,
            )
        layers, unknown = group(self.tensors)
        if not layers:
            raise self._no_lora(unknown)
        layers = self._of_component(layers)
        # 2. Where they lie in the transformer.
        places = {id(layer): self._find(layer) for layer in layers}
        lost = [next(iter(layer.parts.values())) for layer in layers if not places[id(layer)]] + unknown
        if lost:
            raise self._unmatched(layers, lost)
        # 3. Whether they fit there.
        for layer in layers:
            self._check(layer, places[id(layer)])
        # 4. Their values. All of them have the size of layers by now, so this costs no more than the model itself.
        for info in {
            id(part): part for _, term in self.changes for part in (term.up, term.down, term.diff) if part
        }.values():
            self._check_values(info)
        ranks = (min(self.ranks), max(self.ranks)) if self.ranks else (0, 0)
        lora = FusedLora(
            self.spec,
            self.file.digest(),
            self.file.header.file_size,
            self._format(layers, places),
            len(layers),
            ranks,
            tuple(dict.fromkeys(self.notes)),
        )
        return lora, self.changes

    # ------------------------------------------------------------------------------------------------------- matching

    def _of_component(self, layers: list[Layer]) -> list[Layer]:
        """Return the layers for this transformer, where the file names those of several."""
        named = {layer.component for layer in layers if layer.component is not None}
        if len(named) < 2:
            return layers
        own = self.spec.component or "transformer"
        if own not in named:
            raise CheckpointError(
                f"{self.path} holds layers of {', '.join(sorted(named))}, and it is for {own}",
                fix=f"name the transformer: --lora {sorted(named)[0]}=FILE",
            )
        return [layer for layer in layers if layer.component in (own, None)]

    def _find(self, layer: Layer) -> tuple[Place, ...]:
        name = self.flat.get(layer.name, "") if layer.flat else layer.name
        return self.names.get(name, ())

    def _format(self, layers: list[Layer], places: Mapping[int, tuple[Place, ...]]) -> str:
        if any(layer.flat for layer in layers):
            return "kohya"
        originals = any(place.original for layer in layers for place in places[id(layer)])
        return "original" if originals or any(layer.prefixed for layer in layers) else "diffusers"

    def _no_lora(self, keys: list[str]) -> CheckpointError:
        found = recognize_tensors(keys)
        what = f": it is {found.what}" if found else ""
        return CheckpointError(
            f"{self.path} is no LoRA{what}",
            available=few(keys, 4) or "no tensors",
            fix="give a file with keys such as blocks.0.attn1.to_q.lora_A.weight; a model itself is given as MODEL",
        )

    def _unmatched(self, layers: list[Layer], lost: list[str]) -> CheckpointError:
        known = len(layers) - sum(not self._find(layer) for layer in layers)
        total = len(layers) + len(lost) - (len(layers) - known)
        text = any(key.startswith(("lora_te", "text_encoder", "lora_clip")) for key in lost)
        image = any(part in key for key in lost for part in ("k_img", "v_img", "add_k_proj", "add_v_proj", "img_emb"))
        what = f"{self.path}: {known} of {total} layers were found in this {self.class_name}; "
        what += f"nothing is called {', '.join(repr(name) for name in few(lost, 4))}"
        what += f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        if text:
            fix = "keys of a text encoder change no transformer: leave them out, as in save_file({k: v for k, v in "
            fix += "load_file(FILE).items() if 'lora_te' not in k and 'text_encoder' not in k}, NEW)"
        elif image and known:
            fix = "it is for image to video, and this model is not: give the LoRA for text to video"
        else:
            fix = _REMOVE if known else "give a LoRA that was trained for this model"
        return CheckpointError(what, available=f"layers such as {', '.join(few(self._examples(), 3))}", fix=fix)

    def _examples(self) -> list[str]:
        return [name for name, places in self.names.items() if ".0." in name and not places[0].original]

    # -------------------------------------------------------------------------------------------------- shapes, values

    def _check(self, layer: Layer, places: tuple[Place, ...]) -> None:
        """Note the changes of one layer. CheckpointError unless its parts belong together and fit each of ``places``."""
        infos = {kind: self.tensors[key] for kind, key in layer.parts.items()}
        for info in infos.values():
            if not info.dtype.startswith(("F", "BF")):
                raise self._unfit(info, f"is stored as {info.dtype}", "floating-point values")
        pair = "down" in infos, "up" in infos
        if pair[0] != pair[1]:
            have, lack = ("down", "up") if pair[0] else ("up", "down")
            raise self._unfit(infos[have], f"has no lora_{lack} beside it", "both factors of each layer")
        if not pair[0] and ({"alpha", "bias"} & infos.keys()):
            odd = infos["alpha"] if "alpha" in infos else infos["bias"]
            raise self._unfit(odd, "has no lora_down and lora_up beside it", "both factors of each layer")
        factor = self.spec.scale
        if pair[0]:
            factor *= self._strength(layer, infos)
        for place in places:
            if pair[0]:
                channels = self._check_pair(infos["down"], infos["up"], place)
                self._note(place.weight, factor, place, channels, up=infos["up"], down=infos["down"])
            if "diff" in infos:
                channels = self._check_diff(infos["diff"], place.weight, place)
                self._note(place.weight, self.spec.scale, place, channels, diff=infos["diff"])
            for kind, strength in (("bias", factor), ("diff_b", self.spec.scale)):
                if kind in infos:
                    if place.bias is None:
                        raise self._unfit(infos[kind], f"changes the bias of {place.weight}, which has none", "")
                    self._check_diff(infos[kind], place.bias, place)
                    self._note(place.bias, strength, place, None, diff=infos[kind])

    def _note(
        self,
        name: str,
        factor: float,
        place: Place,
        channels: int | None,
        *,
        up: TensorInfo | None = None,
        down: TensorInfo | None = None,
        diff: TensorInfo | None = None,
    ) -> None:
        self.changes.append((name, Term(self.file, factor, up, down, diff, place, channels)))

    def _strength(self, layer: Layer, infos: Mapping[str, TensorInfo]) -> float:
        """Return alpha / rank, by the file's own alpha or PEFT's settings; 1 where neither says it."""
        rank = infos["down"].shape[0] if infos["down"].shape else 0
        if rank < 1:
            raise self._unfit(infos["down"], f"is {list(infos['down'].shape)}", "[rank, features]")
        self.ranks.append(rank)
        if "alpha" in infos:
            info = infos["alpha"]
            if math.prod(info.shape) != 1:
                raise self._unfit(info, f"is {list(info.shape)}", "one number")
            alpha = float(self.file.read(info).reshape(()))
            if not math.isfinite(alpha):
                raise self._unfit(info, f"is {alpha}", "a finite number")
            return alpha / rank
        settings = self.file.settings
        known = None if settings is None else settings.alpha(layer.name)
        if known is None:
            return 1.0
        return known / (math.sqrt(rank) if settings is not None and settings.use_rslora else rank)

    def _check_pair(self, down: TensorInfo, up: TensorInfo, place: Place) -> int | None:
        """Return the input channels that a low-rank change is about, None for all. CheckpointError unless it fits."""
        shape = self.shapes[place.weight]
        rank, features = down.shape[0], math.prod(shape[1:])
        if len(shape) < 2:
            raise self._unfit(down, f"is a low-rank change to {place.weight}, which is {list(shape)}", "")
        limit = max(place.height, features)
        if rank > limit:
            raise self._unfit(down, f"has the rank {rank}", f"up to {limit}, the features of {place.weight}")
        if len(up.shape) < 2 or up.shape[0] != place.height or math.prod(up.shape[1:]) != rank:
            raise self._unfit(up, f"is {list(up.shape)}", f"[{place.height}, {rank}], for {place.weight}")
        if _plain(down.shape[1:]) in (_plain(shape[1:]), _plain((features,))):
            return None
        if self._is_of_fewer_channels(down, shape):
            return down.shape[1]
        raise self._unfit(down, f"is {list(down.shape)}", f"{[rank, *shape[1:]]}, for {place.weight}")

    def _check_diff(self, info: TensorInfo, name: str, place: Place) -> int | None:
        """Check a difference as :meth:`_check_pair` checks a pair."""
        shape = self.shapes[name]
        whole = (place.height, *shape[1:]) if place.rows is not None else shape
        if (info.shape == whole) if place.rows is not None else (_plain(info.shape) == _plain(whole)):
            return None
        if place.rows is None and info.shape[:1] == shape[:1] and self._is_of_fewer_channels(info, shape):
            return info.shape[1]
        raise self._unfit(info, f"is {list(info.shape)}", f"{list(whole)}, for {name}")

    def _is_of_fewer_channels(self, info: TensorInfo, shape: tuple[int, ...]) -> bool:
        """Return whether a convolution of the LoRA takes only the first input channels of the model's.

        A text-to-video LoRA knows the noisy latents, and an image-to-video model has its conditions behind them.
        """
        if not 4 <= len(info.shape) == len(shape) or info.shape[2:] != shape[2:] or not 0 < info.shape[1] < shape[1]:
            return False
        self.notes.append(
            f"{shown(info.name)} is for the first {info.shape[1]} of {shape[1]} input channels, as of a text-to-video LoRA; "
            "the others stay as they are"
        )
        return True

    def _unfit(self, info: TensorInfo, state: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {info.name!r:.200} {state}",
            available=wanted or None,
            fix="give a LoRA that was trained for this model, and download it again if it should be one",
        )

    def _check_values(self, info: TensorInfo) -> None:
        count, first = count_nonfinite(self.file.read(info))
        if count:
            raise self._unfit(info, f"holds {count} NaN or infinite values, the first at index {list(first)}", "")


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of one element: tables are stored as [1, 6, D] and [6, D]."""
    return tuple(n for n in shape if n != 1)


def components_of(specs: Sequence[LoraSpec], components: Sequence[str]) -> dict[str, list[LoraSpec]]:
    """Return the LoRAs of each transformer; one that names none goes to ``transformer``, or to the only one there is.

    Args:
        specs: The LoRAs that were given.
        components: The names of the transformers.

    Raises:
        UnsupportedError: One names a transformer that the model has not.
    """
    found: dict[str, list[LoraSpec]] = {name: [] for name in components}
    first = "transformer" if "transformer" in found or len(components) != 1 else components[0]
    for spec in specs:
        name = spec.component or first
        if name not in found:
            raise UnsupportedError(
                f"the LoRA {shown(spec.path)} is for {name}, which the model has not",
                available=components,
                fix="name one of these: --lora transformer_2=FILE",
            )
        found[name].append(replace(spec, component=name))
    return found


def model_fingerprint(checkpoints: Sequence[Checkpoint]) -> str:
    """Return what tells one model of one transformer or more from another.

    It is the fingerprint of the first and, where a LoRA is fused into another, that one's too.

    Args:
        checkpoints: The transformers of the model.

    Raises:
        CheckpointError: A file has gone or has changed since it was opened.
    """
    first = checkpoints[0].fingerprint()
    others = [checkpoint.lora.identity() if checkpoint.lora else b"" for checkpoint in checkpoints[1:]]
    if not any(others):
        return first
    kind, _, value = first.rpartition("-")
    return f"{kind}-{hashlib.sha256(b'|'.join([value.encode(), *others])).hexdigest()}"


def lora_lines(components: Sequence[str], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return what is said of the LoRAs before an export: each file, what was found of it, and a transformer that has none.

    Args:
        components: The names of the transformers.
        checkpoints: The opened checkpoints, one per transformer.
    """
    lines = []
    for component, checkpoint in zip(components, checkpoints):
        for lora in checkpoint.lora.fused if checkpoint.lora else ():
            lines.append(f"LoRA {shown(lora.spec.path)} into {component}: {lora.words()}")
            lines += [f"  {note}" for note in lora.notes]
    without = [name for name, checkpoint in zip(components, checkpoints) if checkpoint.lora is None]
    if lines and without:
        lines.append(f"no LoRA for {', '.join(without)}: --lora {without[0]}=FILE gives it one")
    return lines
