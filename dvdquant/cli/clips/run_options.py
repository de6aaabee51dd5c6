"""The options of ``dvdq-run`` as one record, and the refusal of those that contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvdquant.clashes import Clash, refuse_clashes
from dvdquant.cli.clips.clip_options import loading_clashes
from dvdquant.deploy.switching.defaults import CachePolicy
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hardware.weights import WeightPolicy

__all__ = ["RunOptions", "check_options", "no_prompts", "parse_cache", "parse_memory"]


@dataclass(frozen=True)
class RunOptions:
    """The options of ``dvdq-run``, each by its name, as :mod:`dvdquant.cli.run` describes and click reads them."""

    prompt: tuple[str, ...]
    prompts: Path | None
    negative_prompt: str | None
    image: Path | None
    last_image: Path | None
    height: int | None
    width: int | None
    num_frames: int | None
    seed: int
    steps: int | None
    guidance: float | None
    mode: str | None
    delta: float | None
    weighting: str | None
    last_high: int | None
    schedule: Path | None
    average_bits: float | None
    cache: str | None
    cache_policy: CachePolicy | None
    compare: bool
    text_embeds: Path | None
    output: Path | None
    gif: Path | None
    strip: Path | None
    trace: Path | None
    fps: float | None
    save_text_embeds: Path | None
    dry_run: bool
    memory: str | None
    offload: bool
    alternate: bool
    text_encoder_bits: str | None
    vae_tiling: bool
    pipeline: str | None
    lora: tuple[str, ...]
    backend: str
    device: str
    weights: WeightPolicy
    plugins: tuple[Path, ...]
    compile: bool
    fuse: bool | None
    cuda_graphs: bool
    attention: str | None
    attention_backend: str | None
    cfg_parallel: str | None


def no_prompts(settings: RunOptions) -> bool:
    """Return whether the prompts are those of the file of text embeddings.

    Args:
        settings: The options of the command.
    """
    return settings.text_embeds is not None and not settings.prompt and settings.prompts is None


def check_options(settings: RunOptions) -> None:
    """Refuse options that contradict each other, naming the one to leave out.

    Args:
        settings: The options of the command.

    Raises:
        UnsupportedError: Two of them contradict each other.
    """
    refuse_clashes([*loading_clashes(vars(settings)), *_written(settings), *_switched(settings), *_placed(settings)])
    if settings.output is None and not settings.save_text_embeds and not settings.dry_run:
        raise UnsupportedError("nothing says where the clip goes", fix="give -o clip.mp4, or --dry-run")
    parse_cache(settings.cache)


def _written(settings: RunOptions) -> list[Clash]:
    """Return the pairs of options of what is written."""
    return [
        Clash(
            settings.save_text_embeds and settings.output,
            "--save-text-embeds draws nothing, so -o does not apply",
        ),
        Clash(
            settings.save_text_embeds and settings.text_embeds,
            "--save-text-embeds loads a text encoder, and --text-embeds takes its place",
        ),
        Clash(
            settings.save_text_embeds and settings.dry_run,
            "--save-text-embeds writes a file, and --dry-run nothing",
        ),
        Clash(
            settings.save_text_embeds and settings.alternate,
            "--save-text-embeds loads the text encoder alone, and --alternate the transformer after it",
        ),
        Clash(
            settings.save_text_embeds and settings.memory,
            "--save-text-embeds draws nothing, so --memory does not apply",
        ),
        Clash(
            settings.text_embeds and settings.alternate,
            "--text-embeds takes the text encoder's place, so --alternate does not apply",
        ),
    ]


def _switched(settings: RunOptions) -> list[Clash]:
    """Return the pairs of options of which engine each step runs on."""
    mode, cache_policy = settings.mode, settings.cache_policy
    fixed = mode in ("a4", "a8", "16")
    delta_decides_not = fixed or (settings.schedule and settings.average_bits is None)
    skips = None if settings.cache in (None, "off") else "--cache"
    skips = skips if cache_policy is None else "--cache-policy"
    return [
        Clash(settings.compare and mode, f"--compare draws every mode, so --mode {mode} does not apply"),
        Clash(
            settings.delta is not None and fixed,
            f"--delta switches engines, and --mode {mode} does not",
        ),
        Clash(
            settings.schedule and fixed,
            f"--schedule says the bits of each step, and so does --mode {mode}",
        ),
        Clash(
            settings.schedule and settings.delta is not None,
            "--schedule says the bits of each step, so --delta does not apply",
        ),
        Clash(
            settings.weighting is not None and delta_decides_not,
            "--weighting is for switching engines by delta",
        ),
        Clash(
            settings.last_high is not None and delta_decides_not,
            "--last-high is for switching engines by delta",
        ),
        Clash(
            settings.average_bits is not None and not settings.schedule,
            "--average-bits is read from a schedule, and none was given",
            fix="give --schedule PATH, made by dvdq-plan",
        ),
        Clash(
            settings.schedule and settings.average_bits is None and skips,
            f"--schedule says which steps are skipped, so {skips} does not apply",
        ),
        Clash(
            skips and mode == "16",
            f"{skips} skips steps of the engines, and --mode 16 runs the original checkpoint",
        ),
        Clash(
            settings.cache == "off" and cache_policy,
            f"--cache-policy {cache_policy} skips steps, and --cache is off",
        ),
    ]


def _placed(settings: RunOptions) -> list[Clash]:
    """Return the pairs of options of where and how the engines run."""
    original, backend = settings.mode == "16", settings.backend  # the original checkpoint runs in PyTorch
    return [
        Clash(
            settings.compile and original,
            "--compile is for the quantized transformer, and --mode 16 runs the original",
        ),
        Clash(
            settings.cuda_graphs and original,
            "--cuda-graphs is for the quantized transformer, and --mode 16 runs the original",
        ),
        Clash(
            settings.fuse and original,
            "--fuse is for the quantized transformer, and --mode 16 runs the original",
        ),
        Clash(
            settings.cfg_parallel is not None and settings.compare,
            "--cfg-parallel is for the engines, and --compare also runs the original checkpoint",
        ),
        Clash(
            original and backend not in ("auto", "pytorch"),
            f"--mode 16 runs the original checkpoint in PyTorch, so --backend {backend} does not apply",
        ),
    ]


def parse_memory(text: str | None) -> int | Literal["auto"] | None:
    """Return ``auto``, or the bytes of a size such as 16GiB.

    Args:
        text: The value of ``--memory``, or None.

    Raises:
        ShapeError: It is neither.
    """
    from dvdquant.system.memory import parse_amount

    return "auto" if text == "auto" else None if text is None else parse_amount(text, "--memory")


def parse_cache(text: str | None) -> float | None:
    """Return the threshold, or None for ``off``.

    Args:
        text: The value of ``--cache``, or None.

    Raises:
        ShapeError: It is neither.
    """
    if text is None or text == "off":
        return None
    try:
        return float(text)
    except ValueError:
        raise ShapeError(
            f"--cache is {text!r:.80}", available="a number from 0 up, or off", fix="give --cache 0.02 or --cache off"
        ) from None
