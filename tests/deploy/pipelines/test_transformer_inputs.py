"""Inputs of the drop-in transformer for other numbers of samples, missing, of other types, or without sense."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.deploy.pipelines.adapters import Adapter, get_adapter
from dvdquant.errors import DvdquantError, ShapeError
from dvdquant.model.families import Axis, Family, Sizes, get_family
from dvdquant.model.plan import build_skeleton
from tests.support import tiny_models
from tests.support import tiny_pipelines as tiny
from tests.support.tiny_pipelines import Exported, arguments, build_pipeline

DTYPE = torch.bfloat16
I2V: dict[str, Any] = {**tiny_models.WAN, "image_dim": 24, "added_kv_proj_dim": 128, "in_channels": 12}
CONFIGS: dict[str, dict[str, Any]] = {
    "wan": tiny_models.WAN,
    "wan-image": I2V,
    "wan-two-images": {**I2V, "pos_embed_seq_len": 514},
    "wan-per-token": tiny.WAN_TI2V,
    "hunyuan-video": tiny_models.HUNYUAN,
    "cogvideox": tiny_models.COGVIDEOX,
    "ltx-video": tiny.LTX,
}


def sizes(batch: int) -> Sizes:
    return Sizes(*(Axis.fixed(size) for size in (3, 8, 8)), text_tokens=12, batch=batch)


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    """As an artifact makes them: with diffusers' defaults for what the config leaves out."""
    found = {}
    for name, config in CONFIGS.items():
        model: Any = build_skeleton(config, DTYPE)
        found[name] = get_family({**model.config, **config})
    return found


@pytest.fixture(scope="module")
def wan() -> Exported:
    return tiny.exported("wan")


def given_to(known: Family, batch: int) -> dict[str, Any]:
    """Graph inputs by the names that the pipeline uses."""
    inputs: dict[str, Any] = known.sample(sizes(batch), DTYPE)
    if "rotary_cos" in inputs:
        inputs["image_rotary_emb"] = (inputs.pop("rotary_cos"), inputs.pop("rotary_sin"))
    return inputs


def batched(adapter: Adapter) -> list[tuple[str, int]]:
    """Inputs that have a row for every sample, but for the latents, and how many."""
    rows = [(spec.name, adapter.rows_per_sample(spec)) for spec in adapter.specs if spec.name != "hidden_states"]
    return [(name, each) for name, each in rows if each is not None]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("exported", [1, 2])
def test_one_row_is_for_all_samples_and_other_numbers_are_refused(
    families: dict[str, Family], name: str, exported: int
) -> None:
    known = families[name]
    adapter = get_adapter(known, sizes(exported), DTYPE)
    given = given_to(known, 3)
    inputs = batched(adapter)
    assert {"timestep", "encoder_hidden_states"} <= {one for one, _ in inputs}
    for one, each in inputs:
        short = given[one][:each]
        taken = adapter.inputs({**given, one: short})[one]
        assert torch.equal(taken.to(short.dtype), torch.cat([short] * 3))
        assert sum(count for _, count in adapter.slices(adapter.inputs({**given, one: short}))) == 3
        for rows in (0, 2 * each, 4 * each, *((1, 3) if each == 2 else ())):
            wrong = torch.cat([given[one], given[one]])[:rows]
            with pytest.raises(ShapeError, match=one) as caught:
                adapter.inputs({**given, one: wrong})
            if rows > 1 and rows % each == 0:
                assert f"for {rows // each} samples, and the latents have 3" in caught.value.what
    only = {one: given[one][:each] for one, each in inputs}
    wide = adapter.inputs({**given, **only})
    assert all(wide[one].shape[0] == 3 * each for one, each in inputs)
    with pytest.raises(ShapeError):
        adapter.inputs({**given, "hidden_states": given["hidden_states"][:1]})


def test_one_embedding_for_two_videos(wan: Exported) -> None:
    """As diffusers' own transformer takes it, which broadcasts; bit for bit what two rows give."""
    embeddings = torch.randn(2, 1, tiny.TOKENS, 32, generator=torch.Generator().manual_seed(4)).to(DTYPE)
    results = []
    for model, rows, videos in (
        (wan.open("pytorch", mode="a8"), 1, 2),
        (wan.open("pytorch", mode="a8"), 2, 1),
        (wan.reference(8), 1, 2),
    ):
        texts = embeddings.repeat(1, rows, 1, 1)
        call = {"prompt": None, "prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        more = arguments("wan", steps=2, num_videos_per_prompt=videos, **call)
        results.append(build_pipeline("wan", model)(**{**more, "generator": generators}).frames)
    ours, repeated, theirs = results
    assert ours.shape[0] == 2
    assert torch.equal(ours, repeated)
    # A matrix product over two samples may sum in another order than one over each, and 8-bit codes flip at ties.
    assert tiny.relative(ours, theirs) < 0.1
    assert not torch.equal(ours[0], ours[1])


def test_a_third_prompt_is_not_dropped(wan: Exported) -> None:
    transformer = wan.open("pytorch", mode="a8")
    inputs = transformer.session.family.sample(transformer.session.sizes, DTYPE)
    two = torch.cat([inputs["hidden_states"]] * 2)
    three = torch.cat([inputs["encoder_hidden_states"]] * 3)
    with pytest.raises(ShapeError, match="for 3 samples, and the latents have 2"):
        transformer(two, inputs["timestep"], three)
    with pytest.raises(ShapeError, match="timestep"):
        transformer(two, torch.tensor([1.0, 2.0, 3.0]), inputs["encoder_hidden_states"])


WRONG: list[tuple[str, Any, str]] = [
    ("hidden_states", "latents", "hidden_states is a str"),
    ("hidden_states", torch.zeros(()), "hidden_states is float32"),
    ("hidden_states", torch.zeros(0, 4, 3, 8, 8), "no sample"),
    ("hidden_states", torch.zeros(1, 4, 3, 8, 8, dtype=torch.int64), "hidden_states is int64"),
    ("timestep", "now", "timestep is a str"),
    ("timestep", float("nan"), "the timestep is nan"),
    ("timestep", torch.tensor([float("inf")]), "the timestep is inf"),
    ("timestep", torch.zeros(0), "timestep has shape"),
    ("timestep", torch.zeros(1, dtype=torch.complex64), "timestep is complex64"),
    ("encoder_hidden_states", [[1.0], [2.0, 3.0]], "encoder_hidden_states is a list"),
    ("encoder_hidden_states", torch.zeros(12), "1 axes instead of 3"),
    ("encoder_hidden_states", {}, "encoder_hidden_states is a dict"),
    ("encoder_hidden_states", torch.zeros(1, 12, 32).to_sparse(), "a dense tensor|encoder_hidden_states is"),
    ("encoder_hidden_states", torch.zeros(1, 12, 31), "encoder_hidden_states"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_an_input_without_sense(wan: Exported, name: str, value: Any, text: str) -> None:
    transformer = wan.open("pytorch", mode="a8")
    inputs: dict[str, Any] = {**transformer.session.family.sample(transformer.session.sizes, DTYPE), name: value}
    with pytest.raises(ShapeError, match=text):
        transformer(**{key: tensor for key, tensor in inputs.items() if tensor is not None})
    assert transformer.trace == []


def test_sizes_of_ltx_without_sense(families: dict[str, Family]) -> None:
    """Nothing is computed of numbers that do not fit the latents: a billion frames take no memory."""
    adapter = get_adapter(families["ltx-video"], sizes(1), DTYPE)
    given = given_to(families["ltx-video"], 1)
    del given["video_coords"]
    good = {"num_frames": 3, "height": 8, "width": 8}
    adapter.inputs({**given, **good})
    for wrong in (10**9, -3, 0, 3.5, "3", float("nan"), [3], 2):
        with pytest.raises(ShapeError, match="num_frames"):
            adapter.inputs({**given, **good, "num_frames": wrong})
    for scale in (3, "abc", (1.0, 2.0), (1.0, 2.0, "x"), {}, torch.ones(3, 3)):
        with pytest.raises(ShapeError, match="rope_interpolation_scale"):
            adapter.inputs({**given, **good, "rope_interpolation_scale": scale})


def test_rotary_tables_without_sense(families: dict[str, Family]) -> None:
    adapter = get_adapter(families["cogvideox"], sizes(1), DTYPE)
    given = given_to(families["cogvideox"], 1)
    for wrong in (
        3,
        "ab",
        torch.zeros(2, 3),
        (torch.zeros(3, 2),),
        (1, 2, 3),
        (None, None),
        ("a", "b"),
        (torch.zeros(2), 1),
    ):
        with pytest.raises(ShapeError):
            adapter.inputs({**given, "image_rotary_emb": wrong})


# ---------------------------------------------------------------------------------------------------------------- fuzzing


def values(generator: random.Random, tensor: Any) -> Any:
    """Something else in the place of an input."""
    plain: list[Any] = [
        None,
        0,
        1.5,
        "text",
        [],
        {},
        (),
        True,
        float("nan"),
        object(),
        [1, [2]],
        b"x",
        torch.device("cpu"),
    ]
    if not isinstance(tensor, Tensor) or generator.random() < 0.25:
        return generator.choice(plain)
    shapes = [
        lambda t: t[:0], lambda t: t[..., :0], lambda t: t[0], lambda t: t[None], lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t] * 3), lambda t: t.flatten(), lambda t: t.transpose(0, -1), lambda t: t[..., :-1],
        lambda t: t[..., ::2], lambda t: t.sum(),
    ]  # fmt: skip
    kinds = [
        torch.float64, torch.float32, torch.float16, torch.int64, torch.int8, torch.bool, torch.complex64, torch.uint8,
        torch.float8_e4m3fn,
    ]  # fmt: skip
    choice = generator.random()
    if choice < 0.5:
        return generator.choice(shapes)(tensor)
    if choice < 0.8:
        return tensor.to(generator.choice(kinds))
    return (
        tensor * generator.choice([0.0, float("nan"), float("inf"), 1e30, -1.0])
        if tensor.is_floating_point()
        else -tensor
    )


EXTRA = [
    ("attention_kwargs", {"scale": 0.5}), ("attention_kwargs", {}), ("attention_kwargs", None), ("attention_kwargs", 3),
    ("encoder_hidden_states_image", torch.zeros(1, 257, 24)), ("return_dict", False), ("timestep_cond", torch.zeros(1)),
    ("guidance", None), ("num_frames", 3), ("video_coords", None),
]  # fmt: skip


def fuzz(transformer: Any, adapters: list[Adapter], count: int, seed: int) -> dict[str, int]:
    """Mutated calls of the transformer and of the other families' adapters; what came of them."""
    generator = random.Random(seed)
    outcomes, longest = {"ran": 0, "refused": 0}, 0
    for index in range(count):
        real = index % (len(adapters) + 1) == 0
        known = transformer.session.family if real else adapters[index % len(adapters)].family
        given: dict[str, Any] = (
            known.sample(transformer.session.sizes, DTYPE) if real else given_to(known, generator.randint(1, 3))
        )
        for name in generator.sample(sorted(given), generator.randint(0, 2)):
            if generator.random() < 0.2:
                del given[name]
            else:
                given[name] = values(generator, given[name])
        if generator.random() < 0.3:
            name, value = generator.choice(EXTRA)
            given[name] = value
        try:
            if real:
                output = transformer(**given)
                sample = output[0]
                assert sample.shape[0] == given["hidden_states"].shape[0]
            else:
                adapter = adapters[index % len(adapters)]
                for part, _ in adapter.slices(adapter.inputs(adapter.bind((), given))):
                    assert all(isinstance(tensor, Tensor) for tensor in part.values())
        except DvdquantError as error:
            outcomes["refused"] += 1
            longest = max(longest, len(str(error)))
        except TypeError as error:
            # As of any function that is called with a name it does not have, or without one it needs.
            assert "argument" in str(error)  # noqa: PT017
            outcomes["refused"] += 1
        else:
            outcomes["ran"] += 1
    assert longest < 2000
    return outcomes


def fuzzed(wan: Exported, families: dict[str, Family], count: int, seed: int) -> dict[str, int]:
    adapters = [get_adapter(known, sizes(1 + index % 2), DTYPE) for index, known in enumerate(families.values())]
    return fuzz(wan.open("pytorch", delta=1.0), adapters, count, seed)


def test_mutated_calls(wan: Exported, families: dict[str, Family]) -> None:
    assert min(fuzzed(wan, families, 400, 0).values()) > 50


@pytest.mark.stress
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mutated_calls_20000(wan: Exported, families: dict[str, Family]) -> None:
    """Every eighth of them goes through the engines."""
    assert sum(fuzzed(wan, families, 20_000, 1).values()) == 20_000
