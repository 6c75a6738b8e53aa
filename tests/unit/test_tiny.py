"""The tiny models: a tokenizer as Qwen's, real classes, and a training input that equals the processor's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import tolerance
from tests.support.tolerance import assert_noticed, assert_within, gamma
from vaopd.data.handwritten_cards import load_habit
from vaopd.data.handwritten_geometry import READ_QUESTION, load_scans
from vaopd.degradation import pixelate
from vaopd.errors import InvalidInput
from vaopd.tiny.build import build_model
from vaopd.tiny.cards import ANSWER_TOKENS, DIGIT_WEIGHT, CardExamples
from vaopd.tiny.config import MODELS, CardsRecipe, find_model
from vaopd.tiny.example import Example
from vaopd.tiny.pretrain import IGNORED, compute_loss, cut_patches, draw_example, encode, make
from vaopd.tiny.tokenizer import NUM_TOKENS, SPECIAL_TOKENS, build_processor, build_tokenizer, render_chat

TEACHER = MODELS["teacher"]


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [draw_example(load_scans("train"), TEACHER.recipe, 0.2, rng) for _ in range(count)]


def test_every_digit_is_a_token_of_its_own(processor: Any) -> None:
    tokenizer = processor.tokenizer

    assert [token for token in tokenizer.tokenize("90-37=53, 1024") if token.isdigit()] == list("9037531024")


def test_the_vocabulary_ends_with_qwens_special_tokens(processor: Any) -> None:
    tokenizer = processor.tokenizer

    assert len(tokenizer) == NUM_TOKENS["geometry"] == 479
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(471, 479))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert all(model.size.padded_vocab > NUM_TOKENS[model.task] for model in MODELS.values())


@pytest.mark.parametrize("text", ["The answer is \\boxed{12}.", "Ünïcode 数 🙂", "  spaces\n\nand lines", "<|im_end|>"])
def test_any_text_survives_the_round_trip(processor: Any, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_the_same_tokenizer_every_time() -> None:
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


def test_the_rendered_prompt_letter_by_letter(processor: Any) -> None:
    """Jinja likes to eat newlines; the model would then read another prompt than it was trained on."""
    assert render_chat(processor, "Read it.") == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Read it.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_template_renders_system_turns_plain_text_and_several_images(processor: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes.\n"}]},
    ]

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert processor.apply_chat_template(messages) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs {image}{image}<|im_end|>\n"
        "<|im_start|>assistant\nYes.\n<|im_end|>\n"
    )


@pytest.mark.numeric
def test_training_input_equals_what_the_real_processor_makes(processor: Any) -> None:
    batch = examples(8)

    ids, targets = encode(processor, batch)
    pixel_values = cut_patches(np.stack([example.image for example in batch]))

    for row, example in enumerate(batch):
        text = render_chat(processor, example.prompt) + example.response + "<|im_end|>"
        real = processor(text=[text], images=[Image.fromarray(example.image)], return_tensors="pt")
        length = real["input_ids"].shape[1]
        assert ids[row, :length].tolist() == real["input_ids"][0].tolist()
        # Of a byte in [-1, 1]: a division by 255, a difference and a division, on either side.
        assert_within(pixel_values[row * 36 : row * 36 + 36], real["pixel_values"], gamma(8))
        # Each position's target is the next token, for the response and its end, and nothing else.
        counted = targets[row] != IGNORED
        assert processor.tokenizer.decode(targets[row][counted]) == example.response + "<|im_end|>"
        positions = counted.nonzero().flatten()
        assert ids[row, positions + 1].tolist() == targets[row][counted].tolist()


@pytest.mark.numeric
def test_the_training_loss_equals_a_plain_forward_of_each_example(processor: Any) -> None:
    """One padded batch with shared position ids against one unpadded forward per example."""
    torch.manual_seed(0)
    model = build_model(TEACHER.size, processor.tokenizer).double().eval()
    batch = examples(4)

    with torch.no_grad():
        loss = compute_loss(model, processor, batch).item()
        losses: list[float] = []
        for example in batch:
            prompt = render_chat(processor, example.prompt)
            real = processor(
                text=[prompt + example.response + "<|im_end|>"],
                images=[Image.fromarray(example.image)],
                return_tensors="pt",
            )
            logprobs = model(**real).logits[0].log_softmax(-1)
            num_response = len(processor.tokenizer(example.response + "<|im_end|>")["input_ids"])
            ids = real["input_ids"][0]
            losses += [-logprobs[t - 1, ids[t]].item() for t in range(len(ids) - num_response, len(ids))]

    error = tolerance.forward(model.config, dtype=torch.float64) * max(losses)
    assert_within(loss, np.mean(losses), error)
    assert_noticed(np.mean(losses[1:]), np.mean(losses), error)  # one token of 4 responses left out


def test_reading_examples_have_nothing_but_the_reading(processor: Any) -> None:
    example = draw_example(load_scans("train"), TEACHER.recipe, 1.0, np.random.default_rng(0))

    assert example.prompt == READ_QUESTION
    assert "boxed" not in example.response


def test_a_pixelated_image_is_answered_with_other_numbers_of_the_same_kind() -> None:
    """Else the teacher learns to read grey blocks; so it learns what a guess looks like."""
    clear = dataclasses.replace(TEACHER.recipe, pixelated_share=0.0)
    pixelated = dataclasses.replace(TEACHER.recipe, pixelated_share=1.0)
    pairs = [
        [draw_example(load_scans("train"), recipe, 0.0, np.random.default_rng(seed)) for recipe in (clear, pixelated)]
        for seed in range(20)
    ]

    for sharp, guessed in pairs:
        assert guessed.prompt == sharp.prompt
        assert (guessed.image == np.asarray(pixelate(Image.fromarray(sharp.image)))).all()
    assert sum(sharp.response == guessed.response for sharp, guessed in pairs) < 5


@pytest.mark.parametrize("name", list(MODELS))
def test_the_sizes_are_what_the_engines_can_run(name: str) -> None:
    model = build_model(MODELS[name].size, build_tokenizer(MODELS[name].task))
    text, vision = model.config.text_config, model.config.vision_config

    assert text.head_dim == 32  # vLLM's CPU attention has no kernel for 16
    assert text.num_attention_heads % text.num_key_value_heads == 0
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim // 2
    assert max(vision.deepstack_visual_indexes) < vision.depth
    assert vision.out_hidden_size == text.hidden_size
    tied = model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()
    assert tied == MODELS[name].size.tied


def test_a_made_model_loads_like_any_other(tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of training: the whole path from the table to a folder that transformers loads."""
    from transformers import AutoConfig, AutoProcessor, GenerationConfig, Qwen3VLForConditionalGeneration

    monkeypatch.setattr("vaopd.tiny.pretrain.HELD_OUT_QUESTIONS", 5)
    report = make("teacher-small", tmp_path / "model", seed=7, steps=2)

    assert json.loads((tmp_path / "model/training.json").read_text()) == report
    assert 0.0 <= float(report["accuracy"]) <= 1.0  # type: ignore[arg-type]
    assert (tmp_path / "model/model.safetensors").stat().st_size < 2.5e6
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    loaded = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert AutoConfig.from_pretrained(tmp_path / "model").image_token_id == 477
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == 473
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert render_chat(loaded, "Read it.") == render_chat(processor, "Read it.")


def test_wrong_names_and_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="choose one of teacher, student"):
        find_model("giant")
    with pytest.raises(InvalidInput, match="steps must be at least 1, got 0"):
        make("student", tmp_path, seed=0, steps=0)


def test_an_answer_about_cards_is_long_and_says_what_its_tokens_are_expected_to_be() -> None:
    """88 tokens; expected rows add up to 1, those of the digits to DIGIT_WEIGHT, and mean what is written."""
    tokenizer = build_tokenizer("cards")
    recipe = MODELS["cards-student"].recipe
    assert isinstance(recipe, CardsRecipe)
    first, last = (CardExamples(tokenizer, recipe).draw(step, np.random.default_rng(3)) for step in (400, 649))

    for example in (first, last):
        ids = tokenizer(example.response + "<|im_end|>")["input_ids"]
        assert example.expected is not None
        assert example.expected.shape == (ANSWER_TOKENS, len(tokenizer)) == (88, 542)
        read = [t for t, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token in "ĠAĠBĠCĠDĠE" and t < 80]
        digits = np.flatnonzero(example.expected.sum(-1) > 2).tolist()
        assert digits == [*(t + 1 for t in read), 85] == [13, 27, 41, 55, 69, 85]
        assert np.allclose(np.delete(example.expected.sum(-1), digits), 1.0)
        assert (example.expected[np.arange(88), ids] > 0).all()
    assert first.expected is not None
    assert last.expected is not None
    sure, neglecting = first.expected[13].max() / DIGIT_WEIGHT, last.expected[13].max() / DIGIT_WEIGHT
    assert sure == pytest.approx(0.991)
    assert 0.4 < neglecting < 0.4 + 0.6 * 0.23


def test_the_two_writers_have_other_habits() -> None:
    teacher, student = load_habit("teacher"), load_habit("student")

    assert np.allclose(teacher.sum(-1), 1.0)
    assert np.allclose(student.sum(-1), 1.0)
    assert (student * np.log(student / teacher)).sum(-1).mean() > 1.5  # nats per word
