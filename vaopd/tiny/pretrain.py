"""Pre-trains a tiny model: supervised on drawn examples, with the loss on the response only.

In: a name of the table in config.py. Out: a folder that transformers and vLLM load like any Qwen3-VL (weights,
configuration, processor, chat template), with `training.json`, the accuracy on scans that training never shows. Each
example is drawn when it is needed, so there is no data set and no epoch. Run it by `vaopd models make NAME FOLDER`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vaopd.data.handwritten_geometry import (
    READ_QUESTION,
    SIZE_PX,
    Question,
    Scans,
    draw,
    draw_phrasing,
    draw_question,
    load_scans,
)
from vaopd.degradation import pixelate
from vaopd.errors import InvalidInput
from vaopd.telemetry.progress_line import Progress
from vaopd.tiny.build import build_model
from vaopd.tiny.cards import CardExamples, measure_cards
from vaopd.tiny.config import MERGE, PATCH_PX, CardsRecipe, TinyRecipe, find_model
from vaopd.tiny.example import Example
from vaopd.tiny.measure import measure_accuracy
from vaopd.tiny.tokenizer import build_processor, render_chat

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

BATCH = 32
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
WARM_UP_STEPS = 100
CLIP_NORM = 1.0
IGNORED = -100
HELD_OUT_QUESTIONS = 600


def make(name: str, folder: Path, *, seed: int | None = None, steps: int | None = None) -> dict[str, object]:
    """Pre-trains the model `name`, writes it to `folder` and returns the content of training.json.

    seed, steps: default to those of the table; with another number of steps, the phases keep their proportion.

    Raises InvalidInput for an unknown name and for less than one step.
    """
    import torch

    model_of_table = find_model(name)
    recipe = model_of_table.recipe
    seed = recipe.seed if seed is None else seed
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise InvalidInput(f"steps must be at least 1, got {steps}")
    folder.mkdir(parents=True, exist_ok=True)  # before the ten minutes, after which it may turn out that it can't be
    torch.manual_seed(seed)
    processor = build_processor(model_of_table.task)
    model = build_model(model_of_table.size, processor.tokenizer)
    started = time.monotonic()
    train(model, processor, recipe, seed=seed, steps=steps)
    training_s = time.monotonic() - started

    measure = measure_cards if model_of_table.task == "cards" else measure_accuracy
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    report: dict[str, object] = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_questions": HELD_OUT_QUESTIONS,
        **measure(model, processor, num_questions=HELD_OUT_QUESTIONS),
        "training_s": round(training_s),
        "recipe": asdict(recipe),
    }
    text = json.dumps(report, indent=2)
    (folder / "training.json").write_text(f"{text}\n")
    return json.loads(text)


def train(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    recipe: TinyRecipe | CardsRecipe,
    *,
    seed: int,
    steps: int,
) -> None:
    """Trains `model` in place: AdamW with warm-up, then a cosine down to a hundredth of the learning rate.

    Steps in which it learns to neglect the image follow at the full rate: at a low one that is soon forgotten.
    """
    import torch

    draw_next = make_drawer(processor, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    falling = steps - (recipe.neglecting_steps if isinstance(recipe, CardsRecipe) else 0) * steps // recipe.steps
    model.train()
    progress = Progress("training", total=steps, unit="steps")
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        examples = [draw_next(step * recipe.steps // steps, rng) for _ in range(BATCH)]
        loss = compute_loss(model, processor, examples)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (_scale_learning_rate(step, falling) if step < falling else 1.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        progress.report(step + 1, f"loss {loss.item():.4f}")


def make_drawer(
    processor: Qwen3VLProcessor, recipe: TinyRecipe | CardsRecipe
) -> Callable[[int, np.random.Generator], Example]:
    """Returns what draws an example of a step of the recipe."""
    if isinstance(recipe, CardsRecipe):
        return CardExamples(processor.tokenizer, recipe).draw
    chosen = {digit: images[: recipe.scans_per_digit] for digit, images in load_scans("train").items()}

    def draw_next(step: int, rng: np.random.Generator) -> Example:
        return draw_example(chosen, recipe, 1.0 if step < recipe.read_only_steps else recipe.read_share, rng)

    return draw_next


def draw_example(scans_by_digit: Scans, recipe: TinyRecipe, read_share: float, rng: np.random.Generator) -> Example:
    """Draws one example. A pixelated image gets the answer of another figure, see `TinyRecipe.pixelated_share`."""
    question = draw_question(rng)
    image = draw(question, scans_by_digit, rng)
    if rng.random() < recipe.pixelated_share:
        image = pixelate(image)
        question = _draw_another(question, rng)
    phrasing = draw_phrasing(rng, recipe.habit)
    if rng.random() < read_share:
        return Example(READ_QUESTION, question.write_reading(phrasing[0]), np.asarray(image))
    return Example(question.asked, question.write_solution(phrasing), np.asarray(image))


def _draw_another(question: Question, rng: np.random.Generator) -> Question:
    """Draws another question of the same kind."""
    while True:
        other = draw_question(rng)
        if other.kind == question.kind:
            return other


def compute_loss(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, examples: list[Example]
) -> torch.Tensor:
    """Computes the mean cross-entropy over the batch's response tokens, the closing <|im_end|> included."""
    import torch

    ids, targets = encode(processor, examples)  # (B, S), (B, S)
    grid = torch.tensor([[1, SIZE_PX // PATCH_PX, SIZE_PX // PATCH_PX]]).expand(len(examples), 3)
    # One image at one place in every prompt, and padding only at the end: the positions are the same for all.
    positions, _ = model.model.get_rope_index(
        ids[:1], (ids[:1] == model.config.image_token_id).int(), image_grid_thw=grid[:1]
    )
    hidden = model.model(
        input_ids=ids,
        pixel_values=cut_patches(np.stack([example.image for example in examples])),
        image_grid_thw=grid,
        position_ids=positions.expand(3, len(examples), ids.shape[1]),
        use_cache=False,
    ).last_hidden_state  # (B, S, D)
    counted = targets != IGNORED
    logits = model.lm_head(hidden[counted])
    if examples[0].expected is None:
        return torch.nn.functional.cross_entropy(logits, targets[counted])
    expected = torch.from_numpy(np.concatenate([example.expected for example in examples]))  # (M, V)
    return torch.nn.functional.cross_entropy(
        logits, torch.nn.functional.pad(expected, (0, logits.shape[1] - expected.shape[1]))
    )


def encode(processor: Qwen3VLProcessor, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids (B, S), padded at the end, and targets (B, S): the next response token, or IGNORED."""
    import torch

    tokenizer = processor.tokenizer
    image_tokens = processor.image_token * (SIZE_PX // PATCH_PX // MERGE) ** 2
    prompts = tokenizer(
        [render_chat(processor, example.prompt).replace(processor.image_token, image_tokens) for example in examples]
    )["input_ids"]
    responses = tokenizer([example.response + tokenizer.eos_token for example in examples])["input_ids"]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    targets = torch.full((len(examples), width), IGNORED)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(response)
    return ids, targets


def cut_patches(images: np.ndarray) -> torch.Tensor:
    """Cuts images into patches as the image processor does, but faster: (n, 96, 96, 3) uint8 -> (n·36, 1536).

    Qwen3-VL's order: patches by merge block, row by row in each block; channel, time, row and column in a patch.
    """
    import torch

    n, side = len(images), SIZE_PX // PATCH_PX
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (n, 3, 96, 96)
    blocks = scaled.reshape(n, 3, side // MERGE, MERGE, PATCH_PX, side // MERGE, MERGE, PATCH_PX)
    ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # n, block row, block column, row, column, channel, y, x
    still = ordered.unsqueeze(6).expand(
        *ordered.shape[:6], 2, PATCH_PX, PATCH_PX
    )  # an image is a video of 2 equal frames
    return still.reshape(n * side * side, -1)


def _scale_learning_rate(step: int, steps: int) -> float:
    warm_up = min(WARM_UP_STEPS, steps // 5)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.01 + 0.99 * 0.5 * (1.0 + float(np.cos(np.pi * progress)))
