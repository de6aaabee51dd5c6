"""Checking a request before anything is loaded, without torch and diffusers: a server's front takes half a second to start.

The generators check with the same code. What they try besides is the scheduler of the model, which is diffusers' own:
its errors are of the model's folder, not of the request.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path

from dvdquant.checkpoint.formats.files import given_file
from dvdquant.checkpoint.prompt_words import PromptWords
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.limits import Limits
from dvdquant.deploy.generation.request import GenerateRequest, VideoSize, check_request, default_fps, resolve_size
from dvdquant.deploy.pipelines.call_defaults import call_defaults
from dvdquant.deploy.pipelines.parts import open_pipeline_folder
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.text import shown

__all__ = ["PipelineChecker", "RequestChecker", "TableChecker", "open_checker", "sampling_defaults"]

# Frames per second the models were trained at.
_FPS = {"wan": 16, "hunyuan-video": 24, "cogvideox": 8, "ltx-video": 25}
# Guidance-distilled: the scale is an input of the transformer, and there is no unconditional branch.
_DISTILLED = ("hunyuan-video",)


class RequestChecker(ABC):
    """What an export and its model can make.

    Args:
        artifact: The export.
        limits: What is served at most.
    """

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
        size = self.size_of(request)
        default_steps, default_guidance = sampling_defaults(self.artifact, *self._own_defaults())
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
        return filled

    @abstractmethod
    def size_of(self, request: GenerateRequest) -> VideoSize:
        """Return the size of a request's clip, see :func:`.request.resolve_size`.

        Args:
            request: The request of a clip.
        """

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
    def _own_defaults(self) -> tuple[int, float]:
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

    def _own_defaults(self) -> tuple[int, float]:
        return self.words.steps, self.words.guidance_scale


class PipelineChecker(RequestChecker):
    """A checker for a model in its own diffusers pipeline.

    Args:
        artifact: The export.
        source: The folder or hub id of the pipeline.
        limits: What is served at most.

    Raises:
        CheckpointError: There is no pipeline, or parts are missing.
        UnsupportedError: It is another pipeline than the export's, or has a transformer that the export lacks.
    """

    def __init__(self, artifact: Artifact, source: str, limits: Limits) -> None:
        super().__init__(artifact, limits)
        self.folder = open_pipeline_folder(source, self.family.name)
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

    def fps(self, frames: int) -> int:
        """See :class:`RequestChecker`.

        Args:
            frames: The number of frames of a clip.
        """
        del frames
        return _FPS[self.family.name]

    def _check_prompts(self, request: GenerateRequest) -> None:
        if request.negative_prompt and self.family.name in _DISTILLED:
            raise UnsupportedError(
                f"{self.folder.class_name} is distilled and has no unconditional branch for a negative prompt",
                fix="leave --negative-prompt out",
            )

    def _own_defaults(self) -> tuple[int, float]:
        defaults = call_defaults(self.folder.class_name)
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


def open_checker(
    artifact: Artifact, *, pipeline: str | Path | None = None, limits: Limits | None = None
) -> TableChecker | PipelineChecker:
    """Return the checker for the requests of an export.

    Args:
        artifact: The export.
        pipeline: The folder or hub id of the model, if it is no longer where the export was made from.
        limits: What is served at most; None sets no limit.

    Raises:
        CheckpointError: The model's folder, or a part of the pipeline, is missing.
        UnsupportedError: There is no pipeline class for it.
    """
    source = str(pipeline or artifact.manifest.source["model"])
    if pipeline is None and given_file(source) is not None:
        raise CheckpointError(
            f"the export was made from the single file {shown(source)}, which has no text encoder, VAE and scheduler",
            available=f"{artifact.manifest.source['class_name']} of family {artifact.manifest.family}",
            fix="give the diffusers pipeline of the same model with --pipeline FOLDER or a hub id; its transformer is not used",
        )
    if PromptWords.is_at(source):
        return TableChecker(artifact, PromptWords.read(source), limits or Limits())
    return PipelineChecker(artifact, source, limits or Limits())
