"""Every family's adapter against transformers' own processor and forward, one rollout at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tests.support import tolerance
from tests.support.families import FAMILIES, ask, family_vlm, plain_inputs, plain_logprobs, plain_model
from tests.support.models import model_folder
from tests.support.teacher import drawing, encoded, question
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.divergence import token_logprobs
from vaopd.errors import ConfigError, InvalidInput
from vaopd.vlm.families import find_family
from vaopd.vlm.model import Segment, Vlm
from vaopd.vlm.prompts import PromptReader, load_processor

PICTURES = {"no image": [], "one image": [drawing(0)], "two images": [drawing(1, (128, 64)), drawing(2, (96, 96))]}


def in_float64(family: str, **options: int) -> tuple[Vlm, Any]:
    """The model and transformers' own, in the precision in which nothing but mistakes tells the two apart."""
    return family_vlm(family, dtype="float64", **options), plain_model(family, dtype="float64", **options)


def error(vlm: Vlm, logprobs: torch.Tensor) -> torch.Tensor:
    """Of log-probs that come out of two whole forwards."""
    return tolerance.forward(vlm.config, dtype=torch.float64) * logprobs.abs().max()


def responses(vlm: Vlm, *lengths: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(len(lengths))
    return tuple(rng.integers(0, 200, length) for length in lengths)  # plain text tokens in every tiny vocabulary


def shared_logprobs(vlm: Vlm, *segments: Segment) -> list[torch.Tensor]:
    """One (T_k,) per response, from one forward over all segments."""
    ids = [ids for segment in segments for ids in segment.responses]
    flat = token_logprobs(vlm.compute_response_hidden(segments), vlm.head, torch.from_numpy(np.concatenate(ids)))
    return list(flat.split([len(response) for response in ids]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_a_prompt_is_read_as_the_processor_reads_it(family: str, pictures: list[PIL.Image.Image]) -> None:
    vlm = family_vlm(family)
    messages = question("How long is it?", [encoded(picture) for picture in pictures])
    expected = plain_inputs(vlm, messages, pictures)["input_ids"][0].tolist()
    prompt = ask(vlm, pictures)
    assert prompt.token_ids.tolist() == expected
    assert vlm.read_token_ids(prompt.token_ids, prompt.images).images == prompt.images


def test_an_image_in_tiles_has_a_run_of_placeholders_for_each_tile() -> None:
    """128 × 64 px in tiles of 64 px: two beside each other and one of the whole, 4 tokens each."""
    vlm = family_vlm("smolvlm")
    (image,) = ask(vlm, [drawing(1, (128, 64))]).images
    assert image.grid == (3, 1, 2)
    assert vlm.family.runs(image) == [4, 4, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_with_a_placeholder_too_few_is_refused(family: str) -> None:
    vlm = family_vlm(family)
    prompt = ask(vlm, PICTURES["one image"])
    last = np.flatnonzero(prompt.token_ids == vlm.family.image_token_id(vlm.config))[-1]
    with pytest.raises(InvalidInput, match="placeholder runs"):
        vlm.read_token_ids(np.delete(prompt.token_ids, last), prompt.images)


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
@torch.no_grad()
def test_siblings_that_share_a_prompt_score_as_each_would_alone(family: str, pictures: list[PIL.Image.Image]) -> None:
    vlm, plain = in_float64(family)
    segment = Segment(prompt=ask(vlm, pictures), responses=responses(vlm, 9, 1, 17, 9, 16))
    for ids, shared in zip(segment.responses, shared_logprobs(vlm, segment), strict=True):
        expected = plain_logprobs(plain, vlm, pictures, ids)
        assert_within(shared, expected, error(vlm, expected))


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_view_a_neighbour_and_a_sibling_out_of_place_are_noticed(family: str) -> None:
    """Another picture in the prompt, two pictures swapped, and a response that sees a token of its sibling."""
    vlm, plain = in_float64(family)
    ids, sibling = responses(vlm, 9, 5)
    one, two = PICTURES["one image"], PICTURES["two images"]
    expected = plain_logprobs(plain, vlm, two, ids)
    assert_noticed(plain_logprobs(plain, vlm, two[::-1], ids), expected, error(vlm, expected))
    assert_noticed(plain_logprobs(plain, vlm, [*one, two[1]], ids), expected, error(vlm, expected))
    seen = plain_logprobs(plain, vlm, two, np.concatenate((sibling[:1], ids)))[1:]
    assert_noticed(seen, expected, error(vlm, expected))


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_segments_in_one_forward_dont_see_each_other(family: str) -> None:
    vlm, plain = in_float64(family)
    shown = [PICTURES["two images"], [], PICTURES["one image"]]
    segments = [Segment(prompt=ask(vlm, pictures), responses=responses(vlm, 5, 12)) for pictures in shown]
    scored = iter(shared_logprobs(vlm, *segments))
    for pictures, segment in zip(shown, segments, strict=True):
        for ids in segment.responses:
            expected = plain_logprobs(plain, vlm, pictures, ids)
            assert_within(next(scored), expected, error(vlm, expected))


@pytest.mark.numeric
@pytest.mark.parametrize("window", [4, 24])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_a_sliding_window_reaches_back_into_the_prompt_as_far_as_it_would_alone(family: str, window: int) -> None:
    vlm, plain = in_float64(family, sliding_window=window)
    _, a_token_further = in_float64(family, sliding_window=window + 1)
    pictures = PICTURES["one image"]
    segment = Segment(prompt=ask(vlm, pictures), responses=responses(vlm, 9, 30, 8))
    for ids, shared in zip(segment.responses, shared_logprobs(vlm, segment), strict=True):
        expected = plain_logprobs(plain, vlm, pictures, ids)
        assert_within(shared, expected, error(vlm, expected))
        assert_noticed(plain_logprobs(a_token_further, vlm, pictures, ids), expected, error(vlm, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_vision_token_may_stand_in_a_response(family: str) -> None:
    vlm = family_vlm(family)
    prompt = ask(vlm, PICTURES["one image"])
    placeholder = vlm.family.image_token_id(vlm.config)
    assert placeholder in vlm.vision_token_ids
    with pytest.raises(InvalidInput, match="vision placeholder"):
        vlm.check_response(np.array([5, placeholder]), prompt, max_tokens=512)


def test_tokens_after_the_first_eos_are_refused() -> None:
    """As a padded batch has them: the first EOS is a valid token, those after it are masked."""
    vlm = family_vlm("qwen3_vl")
    prompt = ask(vlm, [])
    eos = vlm.eos_ids[0]
    vlm.check_response(np.array([5, 6, eos]), prompt, max_tokens=512)
    for padding in ([eos], [eos] * 5, [0, 0]):
        with pytest.raises(InvalidInput, match=rf"has {len(padding)} tokens after its first EOS \(id {eos}\)"):
            vlm.check_response(np.array([5, 6, eos, *padding]), prompt, max_tokens=512)


@pytest.mark.parametrize(
    ("declared", "eos_ids"), [("[473, 471]", (473, 471)), ("471", (471, 473)), ("473", (473,)), ("null", (473,))]
)
def test_generation_config_and_tokenizer_both_name_ends_of_a_response(
    tmp_path: Path, declared: str, eos_ids: tuple[int, ...]
) -> None:
    """In the tiny tokenizer 473 is <|im_end|>, its EOS, and 471 <|endoftext|>."""
    folder = shutil.copytree(model_folder("student"), tmp_path / "student")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": json.loads(declared)}))
    assert PromptReader.open(folder).eos_ids == eos_ids


def test_a_pixel_bound_that_crosses_the_processor_s_own_is_refused() -> None:
    """The tiny models' processor scales to at least 1024 and at most 147456 pixels."""
    for bounds in ({"max_pixels": 1000}, {"min_pixels": 147_457}):
        with pytest.raises(ConfigError, match=r"data\.min_pixels and data\.max_pixels: .*; set both"):
            load_processor(model_folder("student"), **bounds)
    load_processor(model_folder("student"), max_pixels=1024)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_a_layout_the_model_is_transformers_own_padding_included(family: str) -> None:
    """Generation calls the same model without a layout, with padded prompts too."""
    vlm, plain = family_vlm(family), plain_model(family)
    ids = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    logits = [model(input_ids=ids, attention_mask=mask).logits for model in (vlm.model, plain)]
    assert torch.equal(logits[0][1], logits[1][1])
    assert torch.equal(logits[0][0, 2:], logits[1][0, 2:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_the_model_generates_from_a_prepared_prompt_what_transformers_does(
    family: str, pictures: list[PIL.Image.Image]
) -> None:
    vlm, plain = family_vlm(family), plain_model(family)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    messages = question("How long is it?", [encoded(picture) for picture in pictures])
    expected = plain.generate(**plain_inputs(vlm, messages, pictures), **settings)
    prompt = ask(vlm, pictures)
    ids = torch.from_numpy(prompt.token_ids)[None]
    inputs = vlm.family.make_generation_inputs(vlm.model, ids, prompt.images)
    assert torch.equal(vlm.model.generate(ids, **inputs, **settings), expected)


def test_a_family_without_an_adapter_is_named_with_those_that_have_one() -> None:
    with pytest.raises(
        ConfigError, match=r"'llava' has no adapter; known: idefics3, internvl, qwen2_5_vl, qwen3_vl, sm"
    ):
        find_family("llava")
