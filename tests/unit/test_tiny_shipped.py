"""The models in `models/`: what the model card promises about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vaopd.tiny.cards import measure_cards
from vaopd.tiny.config import MODELS, UNSHIPPED
from vaopd.tiny.measure import measure_accuracy
from vaopd.tiny.tokenizer import build_tokenizer
from vaopd.vlm.torchvision_compat import ensure_torchvision

FOLDER = Path(__file__).parents[2] / "models"


def load(name: str) -> tuple[Any, Any]:
    ensure_torchvision()
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    folder = FOLDER / f"tiny-{name}"
    return Qwen3VLForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNSHIPPED])
def test_each_model_is_of_the_size_in_the_table(name: str) -> None:
    model, processor = load(name)
    size = MODELS[name].size

    assert model.dtype == torch.float32
    assert model.lm_head.weight.shape == (size.padded_vocab, size.hidden)
    assert model.config.text_config.num_hidden_layers == size.layers
    assert model.config.vision_config.depth == size.vision_depth
    # One tokenizer for a task: the student's response ids mean the same to every teacher.
    assert processor.tokenizer.get_vocab() == build_tokenizer(MODELS[name].task).get_vocab()


@pytest.mark.parametrize("pair", ["tiny", "tiny-cards"])
def test_teacher_and_student_together_stay_under_ten_megabytes(pair: str) -> None:
    files = [file for name in ("teacher", "student") for file in (FOLDER / f"{pair}-{name}").iterdir()]

    assert sum(file.stat().st_size for file in files) < 10e6


@pytest.mark.parametrize(("name", "lowest", "highest"), [("teacher", 0.92, 1.0), ("student", 0.24, 0.46)])
def test_the_measured_accuracy_can_be_measured_again(name: str, lowest: float, highest: float) -> None:
    """The card's number is of 600 questions; these 120 have a standard error of 0.02 (teacher) and 0.04 (student)."""
    model, processor = load(name)

    measured = measure_accuracy(model, processor, num_questions=120, seed=1)["accuracy"]

    assert lowest <= measured <= highest
    assert json.loads((FOLDER / f"tiny-{name}/training.json").read_text())["held_out_questions"] == 600


def test_the_student_of_the_cards_can_read_and_does_not_look() -> None:
    """What VA-OPD assumes; 64 answers have 320 read digits, so a standard error of 0.02 to 0.03."""
    student, processor = load("cards-student")
    teacher, _ = load("cards-teacher")

    measured = measure_cards(student, processor, num_questions=64, teacher=teacher, seed=1)
    taught = measure_cards(teacher, processor, num_questions=64, seed=1)

    assert measured["greedy_reading"] > 0.75
    assert measured["p_right"] < 0.5
    assert measured["response_tokens"] > 80
    assert 5 * measured["kl_read"] < 0.1 * 83 * measured["kl_other"]  # nearly all of the divergence is language
    assert taught["p_right"] > 0.9
    assert 0.05 < taught["p_right_pixelated"] < 0.2  # one in ten: it doesn't read grey blocks, and is not sure of any
