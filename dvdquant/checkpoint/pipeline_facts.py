"""Facts about a transformer's inputs that only the pipeline around it tells, read from the files beside it.

The channels of a Wan transformer do not tell its VAE: models that are steered have conditions among their input
channels. The pipeline knows: ``vae/config.json`` has the scale of the latents, and ``model_index.json`` tells whether
every token has a timestep.

LTX-Video has pipelines of both kinds around one transformer, with a timestep per sample and per token. A graph with one
per token serves both, so every export gets that.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.checkpoint.untrusted import MAX_JSON, UntrustedFolder
from dvdquant.model.families import get_family
from dvdquant.model.families.configs import PIPELINE, PipelineFacts, refused
from dvdquant.model.families.ltx import LTXVideo
from dvdquant.model.families.wan import Wan

__all__ = ["with_pipeline_facts"]

_FIX = "download the pipeline again"
_Compression = Annotated[int, Field(ge=1, le=64)]


class _Index(BaseModel):
    """The field of ``model_index.json`` that concerns the transformer.

    Attributes:
        expand_timesteps: Every token has a timestep; None if the file does not say.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    expand_timesteps: bool | None = None


class _Vae(BaseModel):
    """The fields of the config of AutoencoderKLWan that concern the transformer, with their defaults in diffusers.

    Attributes:
        scale_factor_temporal: The number of frames per latent frame.
        scale_factor_spatial: The number of pixels per latent, in height and width.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    scale_factor_temporal: _Compression = 4
    scale_factor_spatial: _Compression = 8


def with_pipeline_facts(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with the facts of its pipeline in its config, if they change how the transformer is used.

    The config is stored in the export, so the export says the same wherever it is used. Files are read only inside the
    folder that was given as the model.

    Args:
        checkpoint: The opened transformer. Only that of a Wan or LTX-Video model can change.

    Raises:
        CheckpointError: A file of the pipeline cannot be read, or a field is out of form.
        UnsupportedError: The class of the transformer is unknown.
    """
    config = {name: value for name, value in checkpoint.config.items() if name != PIPELINE}
    alone = get_family(config)
    if isinstance(alone, LTXVideo):
        facts = PipelineFacts(timestep_per_token=True)
        return replace(checkpoint, config={**config, PIPELINE: facts.model_dump(exclude_none=True)})
    if not isinstance(alone, Wan):
        return checkpoint
    facts = _read(checkpoint)
    told = get_family({**config, PIPELINE: facts.model_dump(exclude_none=True)})
    assert isinstance(told, Wan)
    same = (told.vae_scale, told.per_token_timestep) == (alone.vae_scale, alone.per_token_timestep)
    return replace(checkpoint, config=config if same else {**config, PIPELINE: facts.model_dump(exclude_none=True)})


def _read(checkpoint: Checkpoint) -> PipelineFacts:
    """Return the facts from the files beside the transformer, or none if its own folder was given as the model.

    Raises:
        CheckpointError: A file cannot be read, or a field is out of form.
    """
    folder = checkpoint.root.parent
    given = os.path.realpath(os.path.expanduser(checkpoint.model))
    # The transformer's own folder was given, or a single file: what lies around it was not.
    if given == str(checkpoint.root) or checkpoint.source.file:
        return PipelineFacts()
    place = UntrustedFolder(folder, checkpoint.folder.allowed)
    index, vae = _fields(place, "model_index.json", _Index), _fields(place, "vae/config.json", _Vae)
    return PipelineFacts(
        vae_scale=[vae.scale_factor_temporal, vae.scale_factor_spatial, vae.scale_factor_spatial] if vae else None,
        timestep_per_token=index.expand_timesteps if index else None,
    )


def _fields(folder: UntrustedFolder, name: str, record: type[Any]) -> Any:
    """Return the fields of a JSON file of the pipeline, or None if there is no such file.

    Args:
        folder: The folder of the pipeline.
        name: The name of the file.
        record: The pydantic model of its fields.

    Raises:
        CheckpointError: The file cannot be read, or a field is out of form.
    """
    if not os.path.lexists(folder.root / name):
        return None
    try:
        return record.model_validate(folder.json(name, MAX_JSON, _FIX))
    except ValidationError as error:
        raise refused(str(folder.root / name), error, _FIX) from error
