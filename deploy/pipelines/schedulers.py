"""The scheduler of a model, from an untrusted file that is checked and tried before anything large is loaded.

diffusers accepts whatever ``scheduler_config.json`` says. Some values fail in the constructor, some when the timesteps
are made, and some in the first step, minutes later. So the fields are checked against bounds, the scheduler is built,
its timesteps are made as the pipeline makes them, and every step is taken once on a tensor of sixteen numbers.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes the one of typing from Python 3.12 on only

from dvdquant.checkpoint.untrusted import MAX_JSON, UntrustedFolder
from dvdquant.errors import CheckpointError
from dvdquant.system.files import strict_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CONDITIONS",
    "SCHEDULERS",
    "SchedulerConfig",
    "build_scheduler",
    "check_scheduler_config",
    "open_scheduler",
    "open_table_scheduler",
    "read_scheduler_config",
    "rehearse",
    "set_timesteps",
]

FOLDER, FILE, INDEX = "scheduler", "scheduler_config.json", "model_index.json"
_LIMIT = "lambda_min_clipped"  # the field that diffusers writes as minus infinity
_NO_LIMIT = re.compile(rb'("lambda_min_clipped"\s*:\s*)-Infinity\b')
MAX_TRAIN_TIMESTEPS = 100_000  # a thousand in every published model; tables of this length take a second at most

_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
_UNIPC = "UniPCMultistepScheduler"
CONDITIONS = "LTXConditionPipeline"
"""The class that takes images as conditions at frames of the clip."""
# It has timesteps of its own, and steps every token at its own one.
_PER_TOKEN = _FLOW[:1]
# The scheduler classes that each family's pipeline can be run with. The pipelines of HunyuanVideo and LTX-Video make
# their own sigmas, which DPMSolverMultistepScheduler and FlowMatchHeunDiscreteScheduler do not take.
SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "wan": (*_FLOW, "FlowMatchHeunDiscreteScheduler", _UNIPC, "DPMSolverMultistepScheduler"),
    "hunyuan-video": (*_FLOW, _UNIPC),
    "ltx-video": (*_FLOW, _UNIPC),
    "cogvideox": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
}

_Positive = Annotated[float, Field(gt=0, le=1000)]
_Number = Annotated[float, Field(ge=-1000, le=1000)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Beta = Annotated[float, Field(gt=0, lt=1)]
_Length = Annotated[int, Field(ge=1, le=1 << 24)]


@with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
class SchedulerConfig(TypedDict, total=False):
    """The fields of the schedulers above. A field of another scheduler is ignored, as diffusers does."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=MAX_TRAIN_TIMESTEPS)]
    shift: _Positive
    flow_shift: _Positive
    use_dynamic_shifting: bool
    base_shift: _Number | None
    max_shift: _Number | None
    base_image_seq_len: _Length
    max_image_seq_len: _Length
    invert_sigmas: bool
    shift_terminal: Annotated[float, Field(ge=0, lt=1)] | None
    use_karras_sigmas: bool | None
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    use_flow_sigmas: bool | None
    use_lu_lambdas: bool | None
    time_shift_type: Literal["exponential", "linear"]
    stochastic_sampling: bool
    beta_start: _Beta
    beta_end: _Beta
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    trained_betas: Annotated[list[_Beta], Field(min_length=2, max_length=MAX_TRAIN_TIMESTEPS)] | None
    solver_order: Annotated[int, Field(ge=1, le=3)]
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
    thresholding: bool
    dynamic_thresholding_ratio: _Share
    sample_max_value: _Positive
    predict_x0: bool
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
    solver_type: Literal["bh1", "bh2", "midpoint", "heun", "logrho"]
    lower_order_final: bool
    euler_at_final: bool
    disable_corrector: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1000)]
    solver_p: None
    timestep_spacing: Literal["linspace", "leading", "trailing"]
    steps_offset: Annotated[int, Field(ge=0, le=1000)]
    final_sigmas_type: Literal["zero", "sigma_min"]
    rescale_betas_zero_snr: bool
    sigma_min: Annotated[float, Field(gt=0, le=1000)] | None
    sigma_max: Annotated[float, Field(gt=0, le=1000)] | None
    clip_sample: bool
    clip_sample_range: _Positive
    set_alpha_to_one: bool
    snr_shift_scale: _Positive
    lambda_min_clipped: Annotated[float, Field(ge=-1e6, le=1e6)]
    variance_type: Literal["learned", "learned_range"] | None
    upscale_mode: Literal["nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"]
    scale_factors: list[_Positive] | None


_ADAPTER: TypeAdapter[SchedulerConfig] = TypeAdapter(SchedulerConfig)
_QUIET = threading.RLock()


def open_scheduler(root: Path, family: str, pipeline: str | None = None) -> Any:
    """Build the scheduler of a model's folder, of the class that its ``model_index.json`` names.

    Args:
        root: The folder of the model.
        family: The name of the family whose pipeline will use it.
        pipeline: The class of the pipeline, if it is not the family's for text.

    Raises:
        CheckpointError: The file does not exist, the family's pipeline cannot use the class, or a field is out of
            bounds.
    """
    name = _class_of(root)
    usable = _PER_TOKEN if pipeline == CONDITIONS else SCHEDULERS[family]
    if name not in usable:
        raise CheckpointError(
            f"{root / INDEX}: the scheduler is a {name!r:.80}, which this pipeline cannot use",
            available=usable,
            fix="give a pipeline with one of these by --pipeline, or put DvdqTransformer into your own",
        )
    path = root / FOLDER / FILE
    return build_scheduler(_read(root, f"{FOLDER}/{FILE}"), name, path)


def open_table_scheduler(folder: Path) -> Any:
    """Return the scheduler of a model with a prompt table, flow matching Euler, tried for a few steps.

    Args:
        folder: The folder of the model.

    Raises:
        CheckpointError: The scheduler is missing, is of another class, is malformed, or gives no steps.
    """
    path = folder / FOLDER / FILE
    config = _read(folder, f"{FOLDER}/{FILE}")
    if config.get("_class_name") != _FLOW[0]:
        raise CheckpointError(
            f"{path} is a {config.get('_class_name')!r:.80}", available=_FLOW[0], fix="get the model's folder again"
        )
    rehearse(build_scheduler(config, _FLOW[0], path), "wan", 4, path)
    return build_scheduler(config, _FLOW[0], path)


def build_scheduler(config: Mapping[str, Any], class_name: str, path: Path) -> Any:
    """Build the scheduler of an untrusted config.

    Args:
        config: The values of ``scheduler_config.json``.
        class_name: One of :data:`SCHEDULERS`.
        path: The file that errors name.

    Raises:
        CheckpointError: A field is malformed (the error names it), or the class refuses the fields.
    """
    check_scheduler_config(config, path)
    import diffusers

    with _said_once(path):
        return getattr(diffusers, class_name).from_config({**config, "_class_name": class_name})


def check_scheduler_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a field whose value no published scheduler has.

    Such values are tables that take memory, or numbers that give no noise levels.

    Args:
        config: The values of ``scheduler_config.json``.
        path: The file that errors name.

    Raises:
        CheckpointError: A field is out of bounds. The error names the field, its value and the allowed values.
    """
    try:
        _ADAPTER.validate_python({name: value for name, value in config.items() if not name.startswith("_")})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path}: {where} is {first['input']!r:.80}: {first['msg']}", fix="get the model's scheduler again"
        ) from None


def set_timesteps(scheduler: Any, family: str, steps: int, tokens: int, pipeline: str | None = None) -> None:
    """Make the timesteps of a request as the family's pipeline does.

    Args:
        scheduler: The scheduler, which is changed.
        family: The name of the family.
        steps: The number of steps of the request.
        tokens: The number of video tokens of the clip. LTX's pipeline shifts the schedule by it.
        pipeline: The class of the pipeline, if it is not the family's for text.
    """
    import numpy as np

    if pipeline == CONDITIONS:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

        scheduler.set_timesteps(timesteps=linear_quadratic_schedule(steps) * 1000)
    elif family == "hunyuan-video":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    elif family == "ltx-video":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=_shift_of(scheduler.config, tokens))
    else:
        scheduler.set_timesteps(steps)


def rehearse(scheduler: Any, family: str, steps: int, path: Path, tokens: int = 1, pipeline: str | None = None) -> None:
    """Take every step of a request once, on a tensor of sixteen numbers.

    Args:
        scheduler: The scheduler, which is changed.
        family: The name of the family.
        steps: The number of steps of the request.
        path: The file that errors name.
        tokens: The number of video tokens of the clip.
        pipeline: The class of the pipeline, if it is not the family's for text.

    Raises:
        CheckpointError: There are no timesteps, too many or too few, or some that are not finite or that rise. Or a
            step fails or gives NaN or infinities.
    """
    import torch  # here, because a pipeline's folder is checked without torch

    # Some schedulers draw random noise, which must not change what the caller draws afterwards.
    with _said_once(path), torch.random.fork_rng(devices=[]):
        set_timesteps(scheduler, family, steps, tokens, pipeline)
        timesteps = scheduler.timesteps
        _check_timesteps(timesteps, scheduler, steps, path)
        # Pipelines that make their own sigmas let the scheduler find the step from the timestep.
        if family in ("wan", "hunyuan-video"):
            scheduler.set_begin_index(0)
        last = _walk(scheduler, timesteps)
    if not bool(torch.isfinite(last).all()):
        raise _unusable(path, f"a step of {steps} gives NaN or infinities")


def _walk(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return a sample after all steps of a model whose outputs are noise."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 1, 2, 2)
    sample = torch.randn(shape, generator=generator)
    before = None
    for index, timestep in enumerate(timesteps):
        output = torch.randn(shape, generator=generator)
        if type(scheduler).__name__ == "CogVideoXDPMScheduler":
            earlier = timesteps[index - 1] if index else None
            sample, before = scheduler.step(output, before, timestep, earlier, sample, return_dict=False)
        else:
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


def _check_timesteps(timesteps: Any, scheduler: Any, steps: int, path: Path) -> None:
    import torch

    order = int(scheduler.order)
    wanted = order * steps - (order - 1)  # a solver of order 2 evaluates every step but one twice
    if not isinstance(timesteps, torch.Tensor) or timesteps.shape != (wanted,):
        raise _unusable(path, f"it makes {len(timesteps)} timesteps of {steps} steps")
    values = timesteps.double()
    if not bool(torch.isfinite(values).all()):
        raise _unusable(path, "its timesteps are not finite")
    if bool((values.diff() > 0).any()) or (wanted > order and not values[0] > values[-1]):
        raise _unusable(path, f"its timesteps do not fall: {values[0]:g} to {values[-1]:g}")


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used: {why}", fix="get the model's scheduler again, or try another number of steps"
    )


def _shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """Return μ of LTX's pipeline: on the line through (base length, base shift) and (longest, largest shift)."""
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (long - short)
    return float(tokens * slope + low - slope * short)


@contextlib.contextmanager
def _said_once(path: Path) -> Iterator[None]:
    """Turn whatever diffusers raises over a config into CheckpointError, and silence its warnings.

    The warnings are about what is tried here.
    """
    logger = logging.getLogger("diffusers")
    # The level and the filters are the process's: a second thread would put back what the first one had set.
    with _QUIET:
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except CheckpointError:
            raise
        except Exception as error:  # numpy, torch, scipy and diffusers: no common base
            raise _unusable(path, f"{type(error).__name__}: {error!s:.300}") from error
        finally:
            logger.setLevel(level)


def _class_of(root: Path) -> str:
    entry = _read(root, INDEX).get("scheduler")
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise CheckpointError(
            f"{root / INDEX}: the scheduler is {entry!r:.80}", available='["diffusers", "<class>"]', fix="get it again"
        )
    return entry[1]


def read_scheduler_config(folder: UntrustedFolder, name: str, fix: str) -> dict[str, Any]:
    """Return the JSON object of a scheduler's file.

    diffusers writes minus infinity, which is no JSON, for a limit that is not set. That field is left out: the class has the same
    default.

    Args:
        folder: The folder of the model or of the scheduler.
        name: The name of the file in it.
        fix: The way out that the error names.

    Raises:
        CheckpointError: It is missing, too large, or no JSON object.
    """
    try:
        raw = folder.read(name, MAX_JSON)
        if _NO_LIMIT.search(raw):
            config = strict_json(_NO_LIMIT.sub(rb"\1null", raw))
            if isinstance(config, dict):
                return {key: value for key, value in config.items() if key != _LIMIT or value is not None}
    except (OSError, ValueError):
        pass  # said below, in words
    return folder.json(name, MAX_JSON, fix)


def _read(root: Path, name: str) -> dict[str, Any]:
    return read_scheduler_config(UntrustedFolder.at(root), name, "get the model's folder again")
