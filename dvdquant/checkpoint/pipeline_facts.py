"""What the pipeline around a transformer says about its inputs, read from the files beside it.

The channels of a Wan transformer do not tell its VAE: models that are steered have conditions among their input channels.
The pipeline knows: ``vae/config.json`` has the scale of the latents, ``model_index.json`` whether every token has a timestep.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.checkpoint.untrusted import UntrustedFolder
from dvdquant.model.families import get_family
from dvdquant.model.families.configs import PIPELINE, PipelineFacts, refused
from dvdquant.model.families.wan import Wan

__all__ = ["with_pipeline_facts"]

MAX_JSON = 1 << 20
_FIX = "download the pipeline again"
_Compression = Annotated[int, Field(ge=1, le=64)]


class _Index(BaseModel):
    """The field of ``model_index.json`` that concerns the transformer."""

    model_config = ConfigDict(strict=True, extra="ignore")

    expand_timesteps: bool | None = None


class _Vae(BaseModel):
    """The fields of the config of AutoencoderKLWan that concern the transformer, with their defaults in diffusers."""

    model_config = ConfigDict(strict=True, extra="ignore")

    scale_factor_temporal: _Compression = 4
    scale_factor_spatial: _Compression = 8


def with_pipeline_facts(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with what its pipeline says in its config, where that is another thing than the transformer alone tells.

    The config is stored in the export, so that it says the same wherever that is used. Files are read only inside the folder
    that was given as the model.

    Raises:
        CheckpointError: a file of the pipeline that cannot be read, or a field out of form.
    """
    config = {name: value for name, value in checkpoint.config.items() if name != PIPELINE}
    alone = get_family(config)
    if not isinstance(alone, Wan):
        return checkpoint
    facts = _read(checkpoint)
    told = get_family({**config, PIPELINE: facts.model_dump(exclude_none=True)})
    assert isinstance(told, Wan)
    same = (told.vae_scale, told.per_token_timestep) == (alone.vae_scale, alone.per_token_timestep)
    return replace(checkpoint, config=config if same else {**config, PIPELINE: facts.model_dump(exclude_none=True)})


def _read(checkpoint: Checkpoint) -> PipelineFacts:
    folder = checkpoint.root.parent
    given = os.path.realpath(os.path.expanduser(checkpoint.model))
    # The transformer's own folder was given, or a single file: what lies around it was not.
    if given == str(checkpoint.root) or checkpoint.source.file:
        return PipelineFacts()
    place = UntrustedFolder.at(folder)
    index, vae = _fields(place, "model_index.json", _Index), _fields(place, "vae/config.json", _Vae)
    return PipelineFacts(
        vae_scale=[vae.scale_factor_temporal, vae.scale_factor_spatial, vae.scale_factor_spatial] if vae else None,
        timestep_per_token=index.expand_timesteps if index else None,
    )


def _fields(folder: UntrustedFolder, name: str, record: type[Any]) -> Any:
    """The fields of a JSON file of the pipeline, or None where there is no such file."""
    if not os.path.lexists(folder.root / name):
        return None
    try:
        return record.model_validate(folder.json(name, MAX_JSON, _FIX))
    except ValidationError as error:
        raise refused(str(folder.root / name), error, _FIX) from error
