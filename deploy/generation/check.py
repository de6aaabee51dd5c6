"""Checking a request before anything is loaded, without torch and diffusers: a server's front takes half a second to start.

The generators check with the same code. What they try besides is the scheduler of the model, which is diffusers' own:
its errors are of the model's folder, not of the request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.checkpoint.formats.files import names_file
from dvdquant.checkpoint.prompt_words import PromptWords
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.images import Picture, PictureCache, grey_picture
from dvdquant.deploy.generation.limits import Limits
from dvdquant.deploy.generation.request import (
    DISTILLED,
    GenerateRequest,
    VideoSize,
    check_request,
    default_fps,
    resolve_size,
)
from dvdquant.deploy.pipelines.call_defaults import call_defaults
from dvdquant.deploy.pipelines.parts import open_pipeline_folder, pipeline_for
from dvdquant.errors import CheckpointError, ShapeError, UnsupportedError
from dvdquant.model.families.pipelines import known_pipeline
from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.deploy.generation.text_embeds import TextEmbeds

__all__ = [
    "BATCHED",
    "PipelineChecker",
    "RequestChecker",
    "TableChecker",
    "open_checker",
    "sampling_defaults",
]

# Frames per second the models were trained at.
_FPS_TI2V = 24
_FPS = {"wan": 16, "hunyuan-video": 24, "cogvideox": 8, "ltx-video": 25}
# The images of a request and their keys in the cache, by the names of its fields.
_Opened = Mapping[str, tuple[Picture, Hashable]]
# Their pipelines call the transformer once a step, with the branches of guidance in one batch.
BATCHED = ("cogvideox", "ltx-video")


class RequestChecker(ABC):
    """The checks of requests against what an export and its model can make.

    Args:
        artifact: The export.
        limits: What is served at most.

    Attributes:
        given: The pipeline that :func:`open_checker` was given, or None for the model that the export was made from.
        decodes: Whether a VAE turns latents into pictures.
    """

    given: str | None = None
    decodes = True

    def __init__(self, artifact: Artifact, limits: Limits) -> None:
        self.artifact, self.limits = artifact, limits
        self.family = artifact.family(artifact.components[0])

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """Return ``request`` with steps, guidance and size filled in.

        Args:
            request: What is asked for.

        Raises:
            ShapeError: A number is out of range, outside the export's profile or beyond a limit, or a prompt is empty, too
                long or not of the model's words.
            UnsupportedError: The export has no graph for the mode, or fields contradict each other.
        """
        check_request(request, self.artifact)
        self._check_prompts(request)
        opened = self._check_images(request)
        size = self.size_of(request)
        default_steps, default_guidance = sampling_defaults(self.artifact, *self._own_defaults(request))
        steps = request.schedule.steps if request.mode == "planned" and request.schedule else request.steps
        filled = dataclasses.replace(
            request,
            steps=steps or default_steps,
            guidance=default_guidance if request.guidance is None else request.guidance,
            num_frames=size.frames,
            height=size.height,
            width=size.width,
        )
        self.limits.check(filled)
        self.tokens_of(filled)
        self._finish(filled, opened)
        return filled

    def tokens_of(self, request: GenerateRequest) -> int:
        """Return the number of video tokens of a request's clip.

        Args:
            request: The request.

        Raises:
            ShapeError: They are more than the graphs take.
        """
        return self.family.tokens(*self.size_of(request).latent)

    def pipeline_of(self, request: GenerateRequest) -> str:
        """Return the pipeline class that draws a request's clip; empty where there is no pipeline.

        Args:
            request: A checked request.
        """
        del request
        return ""

    def _finish(self, request: GenerateRequest, opened: _Opened) -> None:  # noqa: B027  (most have nothing to do)
        """Refuse a text that a file of embeddings does not hold with these images, and note whose images they are."""

    @abstractmethod
    def _check_images(self, request: GenerateRequest) -> _Opened:
        """Refuse images that the model does not take, that cannot be read, or that are missing. Return the others."""

    @abstractmethod
    def size_of(self, request: GenerateRequest) -> VideoSize:
        """Return the size of a request's clip, see :func:`.request.resolve_size`.

        Args:
            request: The request of a clip.
        """

    @abstractmethod
    def example(self) -> str:
        """Return a prompt that the model takes."""

    def images_taken(self) -> dict[str, str]:
        """Return for each image of a request, by its field, ``none``, ``optional`` or ``required``."""
        return {"image": "none", "last_image": "none"}

    def example_request(self) -> GenerateRequest:
        """Return a request that the model takes, with grey images where it needs them."""
        needed: dict[str, Any] = {
            name: grey_picture() for name, how in self.images_taken().items() if how == "required"
        }
        return GenerateRequest(self.example(), **needed)

    @abstractmethod
    def fps(self, frames: int) -> int:
        """Return the frames per second at which a clip of ``frames`` frames is meant to be seen.

        Args:
            frames: The number of frames of a clip.
        """

    @abstractmethod
    def _check_prompts(self, request: GenerateRequest) -> None:
        """Refuse prompts that the model cannot take."""

    @abstractmethod
    def _own_defaults(self, request: GenerateRequest) -> tuple[int, float]:
        """Return the model's own number of steps and guidance scale."""


class TableChecker(RequestChecker):
    """A checker for a model with a prompt table.

    Args:
        artifact: The export.
        words: The words of the model.
        limits: What is served at most.

    Raises:
        UnsupportedError: The transformer takes inputs that a table cannot give, or more than one sample.
    """

    decodes = False

    def __init__(self, artifact: Artifact, words: PromptWords, limits: Limits) -> None:
        super().__init__(artifact, limits)
        self.words = words
        names = [spec.name for spec in self.family.inputs(artifact.sizes)]
        if names != ["hidden_states", "timestep", "encoder_hidden_states"]:
            raise UnsupportedError(
                f"{words.root} has a prompt table, but its transformer takes {', '.join(names)}",
                available="models that take hidden_states, timestep and encoder_hidden_states",
            )
        if artifact.sizes.batch != 1:
            raise UnsupportedError(
                f"the export has batch {artifact.sizes.batch}; clips from a prompt table are made one at a time",
                fix="export again with --batch 1",
            )

    def size_of(self, request: GenerateRequest) -> VideoSize:
        """See :class:`RequestChecker`. Latents are pixels.

        Args:
            request: The request of a clip.
        """
        return resolve_size(request, self.artifact.sizes, (1, 1, 1), self.family.patch(), causal=False)

    def example(self) -> str:
        """See :class:`RequestChecker`."""
        return self.words.example()

    def fps(self, frames: int) -> int:
        """See :class:`RequestChecker`.

        Args:
            frames: The number of frames of a clip.
        """
        return default_fps(frames)

    def _check_prompts(self, request: GenerateRequest) -> None:
        self.words.parse(request.prompt)
        if request.negative_prompt is not None:
            self.words.parse(request.negative_prompt)

    def _check_images(self, request: GenerateRequest) -> _Opened:
        if request.image is not None or request.last_image is not None:
            raise UnsupportedError("a model with a prompt table draws from words alone", fix="leave the image out")
        return {}

    def _own_defaults(self, request: GenerateRequest) -> tuple[int, float]:
        del request
        return self.words.steps, self.words.guidance_scale


class PipelineChecker(RequestChecker):
    """A checker for a model in its own diffusers pipeline.

    Args:
        artifact: The export.
        source: The folder or hub id of the pipeline.
        limits: What is served at most.
        text_embeds: A file of text embeddings, which takes the place of the text encoders.

    Raises:
        CheckpointError: There is no pipeline, or parts are missing, or the file cannot be used.
        UnsupportedError: It is another pipeline than the export's, or has a transformer that the export lacks.
    """

    def __init__(self, artifact: Artifact, source: str, limits: Limits, text_embeds: str | Path | None = None) -> None:
        super().__init__(artifact, limits)
        self.text: TextEmbeds | None = None
        self.text_embeds = text_embeds
        if text_embeds is not None:
            from dvdquant.deploy.generation.text_embeds import load_text_embeds

            self.text = load_text_embeds(Path(text_embeds), self.family, artifact.sizes)
        self._pictures = PictureCache()
        self._checked: dict[int, Mapping[str, Hashable]] = {}  # id of a checked request -> keys of its images
        self.folder = open_pipeline_folder(source, self.family.name, text=self.text is None)
        if missing := sorted(set(self.folder.transformers) - set(artifact.components)):
            raise UnsupportedError(
                f"the pipeline {self.folder.root} also has {missing[0]}, which the export lacks",
                available=artifact.components,
                fix=f"export the whole pipeline: dvdq-export {source} -o {artifact.root} --replace",
            )

    def size_of(self, request: GenerateRequest) -> VideoSize:
        """See :class:`RequestChecker`. Of the frames a pipeline fills the last patch itself.

        Args:
            request: The request of a clip.
        """
        patch = (1, *self.family.patch()[1:])
        return resolve_size(request, self.artifact.sizes, self.family.vae_scale, patch, causal=True)

    def example(self) -> str:
        """See :class:`RequestChecker`."""
        return "a cat"

    def fps(self, frames: int) -> int:
        """See :class:`RequestChecker`.

        Args:
            frames: The number of frames of a clip.
        """
        del frames
        return _FPS_TI2V if self.family.vae_scale[1:] == (16, 16) else _FPS[self.family.name]

    def pipeline_of(self, request: GenerateRequest) -> str:
        """See :class:`RequestChecker`."""
        first, last = request.image is not None, request.last_image is not None
        return pipeline_for(self.folder, self.family, first=first, last=last)

    def images_taken(self) -> dict[str, str]:
        """See :class:`RequestChecker`."""
        taken = set()
        for first, last in ((False, False), (True, False), (False, True), (True, True)):
            with contextlib.suppress(UnsupportedError):
                pipeline_for(self.folder, self.family, first=first, last=last)
                taken.add((first, last))

        def said(place: int) -> str:
            given, missing = ({pair for pair in taken if pair[place] is there} for there in (True, False))
            return "none" if not given else "optional" if missing else "required"

        return {"image": said(0), "last_image": said(1)}

    def pictures(self, request: GenerateRequest) -> dict[str, Picture]:
        """Return the decoded images of a request, by the names of its fields.

        The same source is decoded once: what was checked is what the clip begins with, even if a file changes meanwhile.

        Args:
            request: The request. If :meth:`check` returned it, its images are those of that time.

        Raises:
            ShapeError: An image cannot be read, see :func:`.images.open_picture`.
        """
        return {name: picture for name, (picture, _) in self._opened(request).items()}

    def _opened(self, request: GenerateRequest) -> _Opened:
        """Return the images of a request and their keys, by the names of its fields."""
        known = self._checked.get(id(request), {})
        given = {"image": (request.image, "--image"), "last_image": (request.last_image, "--last-image")}
        return {
            name: self._pictures.open(source, option, known.get(name))
            for name, (source, option) in given.items()
            if source is not None
        }

    def _check_images(self, request: GenerateRequest) -> _Opened:
        self.pipeline_of(request)
        return self._opened(request)

    def _finish(self, request: GenerateRequest, opened: _Opened) -> None:
        if self.text is not None:
            self.text.check(request, opened["image"][0].sha256 if "image" in opened else None)
        if opened:
            self._checked[id(request)] = {name: key for name, (_, key) in opened.items()}
            weakref.finalize(request, self._checked.pop, id(request), None)

    def tokens_of(self, request: GenerateRequest) -> int:
        """Return the tokens of a clip, see :class:`RequestChecker`.

        A last image of LTX-Video is no part of the clip's own latents: its tokens are added.

        Args:
            request: The request.

        Raises:
            ShapeError: The export has not as many tokens.
        """
        size = self.size_of(request)
        tokens = self.family.tokens(*size.latent)
        if self.family.name != "ltx-video" or request.last_image is None:
            return tokens
        _, height, width = size.latent
        more = self.family.tokens(self.family.patch()[0], height, width)
        most = self.family.tokens(*self.artifact.sizes.at("max"))
        if tokens + more > most or not self.artifact.sizes.dynamic:
            raise ShapeError(
                f"a last image adds the tokens of one latent frame, {more}, to the {tokens} of the clip",
                available=f"{most} tokens in this export",
                fix=f"draw fewer frames, or export again with a range such as --num-frames "
                f"{size.frames}:{size.frames + self.family.vae_scale[0]}",
            )
        return tokens + more

    def _check_prompts(self, request: GenerateRequest) -> None:
        if request.negative_prompt and self.family.name in DISTILLED:
            raise UnsupportedError(
                f"{self.folder.class_name} is distilled and has no unconditional branch for a negative prompt",
                fix="leave --negative-prompt out",
            )

    def _own_defaults(self, request: GenerateRequest) -> tuple[int, float]:
        defaults = call_defaults(self.pipeline_of(request))
        return int(defaults["num_inference_steps"]), float(defaults["guidance_scale"])


def sampling_defaults(artifact: Artifact, steps: int, guidance: float) -> tuple[int, float]:
    """Return the steps and the guidance of a clip that asks for none: those recorded in the export, or else the model's.

    Args:
        artifact: The export.
        steps: The model's own number of steps.
        guidance: The model's own guidance scale.
    """
    recorded = artifact.manifest.sampling or {}
    return recorded.get("steps", steps), float(recorded.get("guidance", guidance))


def _transformer_alone(source: str) -> str | None:
    """Return in words what a model is that comes without the other parts of its pipeline; None for any other model."""
    if names_file(source):
        return "the single file"
    place = os.path.expanduser(source)
    if not os.path.isdir(place) or PromptWords.is_at(source):
        return None
    # A transformer's own folder of a diffusers pipeline is answered where the pipeline is opened.
    names = os.listdir(place)
    return None if {"model_index.json", "config.json"} & set(names) else "the files in"


def open_checker(
    artifact: Artifact,
    *,
    pipeline: str | Path | None = None,
    limits: Limits | None = None,
    text_embeds: str | Path | None = None,
) -> TableChecker | PipelineChecker:
    """Return the checker for the requests of an export.

    Args:
        artifact: The export.
        pipeline: The folder or hub id of the model, if it is no longer where the export was made from.
        limits: What is served at most; None sets no limit.
        text_embeds: A file of text embeddings, which takes the place of the text encoders.

    Raises:
        CheckpointError: The model's folder, or a part of the pipeline, is missing.
        UnsupportedError: There is no pipeline class for it.
    """
    recorded = artifact.manifest.source
    source = str(pipeline or recorded.get("pipeline") or recorded["model"])
    if source == recorded["model"] and (alone := _transformer_alone(source)):
        known = known_pipeline(
            artifact.manifest.family, artifact.config(artifact.components[0]), len(artifact.components)
        )
        name = known or "ORG/NAME"
        raise CheckpointError(
            f"the export was made from {alone} {shown(source)}, without text encoder, VAE and scheduler that diffusers reads",
            available=f"{recorded['class_name']} of family {artifact.manifest.family}"
            + (f"; its diffusers pipeline is {known}" if known else ""),
            fix="give the diffusers pipeline of the same model, a folder or a hub id, of which all but the transformers is "
            f"downloaded: --pipeline {name}; or at the export, which remembers it: dvdq-export --pipeline {name}",
        )
    checker: TableChecker | PipelineChecker
    if PromptWords.is_at(source):
        if text_embeds is not None:
            raise UnsupportedError("a model with a prompt table has no text encoder", fix="leave --text-embeds out")
        checker = TableChecker(artifact, PromptWords.read(source), limits or Limits())
    else:
        checker = PipelineChecker(artifact, source, limits or Limits(), text_embeds)
    checker.given = None if pipeline is None else str(pipeline)
    return checker
