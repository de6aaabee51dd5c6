"""scheduler_config.json is not trusted: what it makes wrong is said before a model is loaded, and costs little."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.deploy.pipelines import schedulers
from dvdquant.deploy.pipelines.schedulers import SCHEDULERS, build_scheduler, open_scheduler, rehearse, set_timesteps
from dvdquant.errors import CheckpointError, DvdquantError
from tests.support.costs import Costs
from tests.support.tiny_pipelines import KINDS, arguments, build_pipeline

PATH = Path("scheduler/scheduler_config.json")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "flow_shift": 3.0, "use_flow_sigmas": True,
    "prediction_type": "flow_prediction", "solver_order": 2, "beta_start": 0.0001, "beta_end": 0.02, "sigma_min": None,
}  # fmt: skip
DPM = {
    **UNIPC,
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
}
LTX = {**FLOW, "use_dynamic_shifting": True, "shift": 1.0, "shift_terminal": 0.1, "base_shift": 0.95, "max_shift": 2.05,
       "base_image_seq_len": 1024, "max_image_seq_len": 4096}  # fmt: skip
COG = {
    "_class_name": "CogVideoXDDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0, "timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0,
}  # fmt: skip
COG_DPM = {**COG, "_class_name": "CogVideoXDPMScheduler"}
HEUN = {**FLOW, "_class_name": "FlowMatchHeunDiscreteScheduler"}
LCM = {**FLOW, "_class_name": "FlowMatchLCMScheduler"}
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("wan", FLOW), ("wan", UNIPC), ("wan", DPM), ("wan", HEUN), ("wan", LCM), ("hunyuan-video", {**FLOW, "shift": 7.0}),
    ("hunyuan-video", UNIPC), ("ltx-video", LTX), ("ltx-video", FLOW), ("cogvideox", COG), ("cogvideox", COG_DPM),
]  # fmt: skip


def attempt(config: Mapping[str, Any], family: str, steps: int = 20, tokens: int = 4000) -> None:
    """Build the scheduler of a config and take every step."""
    rehearse(build_scheduler(config, config["_class_name"], PATH), family, steps, PATH, tokens)


@pytest.mark.parametrize(("family", "config"), PUBLISHED)
def test_what_models_are_published_with(family: str, config: dict[str, Any]) -> None:
    # A schedule that is stretched to end at a given noise level has no room in one step: diffusers divides zero by zero.
    for steps in (2 if config.get("shift_terminal") else 1, 2, 20, 50):
        attempt(config, family, steps)
    if config.get("shift_terminal"):
        with pytest.raises(CheckpointError, match="not finite"):
            attempt(config, family, 1)
    assert config["_class_name"] in SCHEDULERS[family]


def test_timesteps_are_those_of_the_pipelines_own_code() -> None:
    """The helper of diffusers' pipelines, called as they call it."""
    import numpy as np
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift, retrieve_timesteps

    for family, config in PUBLISHED:
        ours, theirs = (build_scheduler(config, config["_class_name"], PATH) for _ in range(2))
        set_timesteps(ours, family, 12, 5000)
        if family == "ltx-video":
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            mu = calculate_shift(5000, *(theirs.config[name] for name in names))
            wanted, _ = retrieve_timesteps(theirs, 12, "cpu", None, sigmas=np.linspace(1.0, 1 / 12, 12), mu=mu)
        elif family == "hunyuan-video":
            wanted, _ = retrieve_timesteps(theirs, 12, "cpu", sigmas=np.linspace(1.0, 0.0, 13)[:-1])
        else:
            wanted, _ = retrieve_timesteps(theirs, 12, "cpu")
        assert torch.equal(ours.timesteps, wanted)


def test_a_rehearsal_draws_no_noise_of_the_callers() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    attempt({**DPM, "algorithm_type": "sde-dpmsolver++"}, "wan")
    attempt(LCM, "wan")
    assert torch.equal(torch.randn(4), expected)


HOSTILE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("wan", FLOW, {"num_train_timesteps": 0}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": 1}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": -1000}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": 150_000_000}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": 1000.0}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": True}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": None}, "num_train_timesteps"),
    ("wan", FLOW, {"num_train_timesteps": 10**400}, "num_train_timesteps"),
    ("wan", FLOW, {"use_dynamic_shifting": True}, "mu"),
    ("hunyuan-video", FLOW, {"use_dynamic_shifting": True}, "mu"),
    ("wan", UNIPC, {"use_dynamic_shifting": True}, "mu"),
    ("wan", FLOW, {"shift": 0}, "shift"),
    ("wan", FLOW, {"shift": -3.0}, "shift"),
    ("wan", FLOW, {"shift": 1e300}, "shift"),
    ("wan", FLOW, {"shift": 1e-300}, "timesteps"),
    ("wan", FLOW, {"shift": float("nan")}, "shift"),
    ("wan", FLOW, {"shift": float("inf")}, "shift"),
    ("wan", FLOW, {"shift": [3.0]}, "shift"),
    ("wan", UNIPC, {"flow_shift": 0.0}, "flow_shift"),
    ("wan", UNIPC, {"flow_shift": 1e-30}, "timesteps"),
    ("wan", UNIPC, {"solver_order": 0}, "solver_order"),
    ("wan", UNIPC, {"solver_order": 10**9}, "solver_order"),
    ("wan", UNIPC, {"solver_type": "newton"}, "solver_type"),
    ("wan", UNIPC, {"disable_corrector": 3}, "disable_corrector"),
    ("wan", UNIPC, {"solver_p": {"_class_name": "DDIMScheduler"}}, "solver_p"),
    ("wan", UNIPC, {"timestep_spacing": "odd"}, "timestep_spacing"),
    ("wan", UNIPC, {"trained_betas": [0.1] * 200_000}, "trained_betas"),
    ("wan", UNIPC, {"trained_betas": "0.1"}, "trained_betas"),
    ("wan", FLOW, {"invert_sigmas": True}, "do not fall"),
    ("wan", FLOW, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "sigmas"),
    ("wan", FLOW, {"time_shift_type": "cubic"}, "time_shift_type"),
    ("wan", FLOW, {"shift_terminal": 1.0}, "shift_terminal"),
    ("ltx-video", LTX, {"base_image_seq_len": 4096}, "ZeroDivisionError"),
    ("ltx-video", LTX, {"max_shift": 1e9}, "max_shift"),
    ("ltx-video", LTX, {"max_shift": None}, "TypeError"),
    ("ltx-video", LTX, {"base_image_seq_len": 4095, "max_shift": 1000.0, "base_shift": -1000.0}, "cannot be used"),
    ("ltx-video", HEUN, {}, "sigmas"),
    ("cogvideox", COG, {"beta_start": -1.0}, "beta_start"),
    ("cogvideox", COG, {"beta_end": 2.0}, "beta_end"),
    ("cogvideox", COG, {"beta_schedule": "random"}, "beta_schedule"),
    ("cogvideox", COG, {"prediction_type": "epsilon"}, "NaN"),
    ("cogvideox", COG, {"snr_shift_scale": 0}, "snr_shift_scale"),
    ("cogvideox", COG, {"num_train_timesteps": 10}, "num_inference_steps"),
    ("cogvideox", COG, {"timestep_spacing": "linspace", "num_train_timesteps": 20, "steps_offset": -5}, "steps_offset"),
    ("wan", COG, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": {}}, "shift"),
]


@pytest.mark.parametrize(("family", "config", "change", "text"), HOSTILE)
def test_a_hostile_config(family: str, config: dict[str, Any], change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        attempt({**config, **change}, family)
    message = str(caught.value)
    assert text in message
    assert str(PATH) in message
    assert len(message) < 1000
    assert caught.value.fix


def folder(tmp_path: Path, config: Any, index: Any) -> Path:
    (tmp_path / "scheduler").mkdir(exist_ok=True)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_class_is_one_that_the_pipeline_can_use(tmp_path: Path) -> None:
    """It is the one that model_index.json names, as for diffusers."""
    good = folder(tmp_path, FLOW, {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]})
    assert open_scheduler(good, "wan").config.shift == 3.0
    for name in ("KarrasVeScheduler", "AutoencoderKLWan", "os", "", "FlowMatchEulerDiscreteScheduler.step"):
        bad = folder(tmp_path, FLOW, {"scheduler": ["diffusers", name]})
        with pytest.raises(CheckpointError) as caught:
            open_scheduler(bad, "wan")
        assert "UniPCMultistepScheduler" in str(caught.value.available)
    for entry in (None, [None, None], "x", ["diffusers"], ["diffusers", 3], {}):
        with pytest.raises(CheckpointError, match="the scheduler is"):
            open_scheduler(folder(tmp_path, FLOW, {"scheduler": entry}), "wan")
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    folder(tmp_path, FLOW, index)
    for text in (
        "",
        "[]",
        "null",
        '{"shift": NaN}',
        '{"shift": 1, "shift": 2}',
        "{" * 100_000,
        '{"shift": 1e999}',
        "\udcff",
    ):
        (tmp_path / "scheduler" / "scheduler_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
            open_scheduler(tmp_path, "wan")
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_scheduler(tmp_path, "wan")
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        open_scheduler(tmp_path, "wan")


# ------------------------------------------------------------------------------------------------------ which pair works

# The config of each class, as a model of the family is published with it.
CONFIGS = {(family, config["_class_name"]): config for family, config in PUBLISHED} | {
    ("hunyuan-video", "FlowMatchLCMScheduler"): LCM,
    ("ltx-video", "FlowMatchLCMScheduler"): LCM,
    ("ltx-video", "UniPCMultistepScheduler"): UNIPC,
}
PAIRS = [(family, name) for family, names in SCHEDULERS.items() for name in names]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """diffusers' own transformers, of random weights: the loop is the pipeline's and the scheduler's."""
    import diffusers

    made = {}
    for family in SCHEDULERS:
        config = {key: value for key, value in KINDS[family].config.items() if key != "_class_name"}
        torch.manual_seed(0)
        made[family] = getattr(diffusers, KINDS[family].config["_class_name"])(**config).to(torch.bfloat16).eval()
    return made


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_listed_scheduler_runs_a_whole_loop_of_the_real_pipeline(
    family: str, name: str, models: dict[str, Any], tmp_path: Path
) -> None:
    root = folder(tmp_path, CONFIGS[family, name], {"scheduler": ["diffusers", name]})
    scheduler = open_scheduler(root, family)
    rehearse(scheduler, family, 4, PATH, 4000)
    pipe = build_pipeline(family, models[family])
    pipe.scheduler = open_scheduler(root, family)
    latents = pipe(**arguments(family, steps=4)).frames
    assert torch.isfinite(latents).all()
    assert len(pipe.scheduler.timesteps) == (7 if "Heun" in name else 4)


@pytest.mark.parametrize("family", SCHEDULERS)
def test_a_scheduler_that_is_not_listed_is_refused(family: str, tmp_path: Path) -> None:
    import diffusers

    names = {name for name in dir(diffusers) if name.endswith("Scheduler")} - set(SCHEDULERS[family])
    assert {"DPMSolverSinglestepScheduler", "EulerDiscreteScheduler"} < names
    for name in sorted(names):
        root = folder(tmp_path, UNIPC, {"scheduler": ["diffusers", name]})
        with pytest.raises(CheckpointError, match=name) as caught:
            open_scheduler(root, family)
        assert SCHEDULERS[family][0] in str(caught.value.available)


@pytest.mark.parametrize("family", ["hunyuan-video", "ltx-video"])
@pytest.mark.parametrize("config", [DPM, HEUN])
def test_a_class_that_is_left_out_cannot_run(family: str, config: dict[str, Any], models: dict[str, Any]) -> None:
    """If diffusers learns it one day, it can be listed."""
    pipe = build_pipeline(family, models[family])
    pipe.scheduler = build_scheduler(config, config["_class_name"], PATH)
    with pytest.raises(ValueError, match="does not support custom sigmas"):
        pipe(**arguments(family, steps=4))


def test_threads_that_try_schedulers_leave_the_level_of_the_log(tmp_path: Path) -> None:
    root = folder(tmp_path, FLOW, {"scheduler": ["diffusers", FLOW["_class_name"]]})
    logger = logging.getLogger("diffusers")
    level = logger.level
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(rehearse, open_scheduler(root, "wan"), "wan", 20, PATH) for _ in range(24)]:
            future.result(60)
    assert logger.level == level


# ---------------------------------------------------------------------------------------------------------------- fuzzing

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 10, 1000, 100_000, 10**7, 10**20, -(10**20), 0.0, 1.0, -1.0, 0.5, 1e-8, 1e-30, 1e8, 1e300,
    5e-324, float("nan"), float("inf"), "", "linear", "zero", "epsilon", "v_prediction", "sample", "flow_prediction", "linspace",
    "leading", "trailing", "exponential", "bh1", "heun", "sde-dpmsolver++", [], [0.1, 0.2], [0], {}, {"a": 1}, "\u202e\x1b[2J",
]  # fmt: skip
FIELDS = sorted(schedulers.SchedulerConfig.__annotations__)


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Mutate published configs; how many were taken and how many refused. Anything but our own error is a failure."""
    generator, outcomes, longest = random.Random(seed), {"taken": 0, "refused": 0}, 0
    with Costs("scheduler_config.json") as costs:
        for index in range(count):
            family, config = PUBLISHED[index % len(PUBLISHED)]
            changed = dict(config)
            for _ in range(generator.randint(1, 3)):
                names = [*FIELDS, "_class_name", "unknown"] if generator.random() < 0.5 else sorted(config)
                name = generator.choice(names)
                if generator.random() < 0.1:
                    changed.pop(name, None)
                elif isinstance(changed.get(name), (int, float)) and generator.random() < 0.4:
                    changed[name] = changed[name] * generator.choice([0, -1, 1e-6, 0.5, 2, 1000, 1e30])
                else:
                    changed[name] = generator.choice(VALUES)
            try:
                with costs.case():
                    # The class is model_index.json's, whatever the config says.
                    scheduler = build_scheduler(changed, config["_class_name"], PATH)
                    steps, size = generator.choice([1, 2, 3, 7, 20]), generator.choice([1, 600, 30_000])
                    rehearse(scheduler, family, steps, PATH, size)
            except DvdquantError as error:
                outcomes["refused"] += 1
                longest = max(longest, len(str(error)))
            else:
                outcomes["taken"] += 1
    assert longest < 1500
    return outcomes


def test_mutated_configs() -> None:
    outcomes = fuzz(300, 0)
    assert min(outcomes.values()) > 30


@pytest.mark.stress
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mutated_configs_5000() -> None:
    outcomes = fuzz(6000, 1)
    assert sum(outcomes.values()) == 6000
