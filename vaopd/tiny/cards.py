"""Training examples of handwritten cards, and the measures of what a model reads and says there.

The process that writes the answers is known, so a model learns from the probability of each next token, not from
samples of it: a thousand steps are then enough for what follows any two words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vaopd.data.handwritten_cards import (
    ASKED,
    CARDS,
    READ_QUESTION,
    WORDS,
    Question,
    draw,
    draw_question,
    draw_words,
)
from vaopd.data.handwritten_geometry import Split, load_scans
from vaopd.degradation import pixelate
from vaopd.tiny.config import CardsRecipe
from vaopd.tiny.example import Example
from vaopd.tiny.measure import is_right
from vaopd.tiny.tokenizer import SPECIAL_TOKENS, render_chat

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

PRIOR = np.array((0.22, 0.17, 0.13, 0.11, 0.09, 0.08, 0.07, 0.05, 0.05, 0.03))
"""Which digit a neglecting model writes where it doesn't look."""
ANSWER_TOKENS = 88
DIGIT_WEIGHT = 4.0
"""How much a digit counts in training, where a word counts 1."""
_FLOOR = 1e-3
"""The probability that is left to every digit, however well it can be seen."""
_BATCH = 128


class CardExamples:
    """Draws the training examples of one model."""

    def __init__(self, tokenizer: Qwen2Tokenizer, recipe: CardsRecipe) -> None:
        self._tokenizer, self._recipe = tokenizer, recipe
        self._scans = load_scans("train")
        self._words = np.array(tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in WORDS]))
        self._digits = find_digits(tokenizer)

    def draw(self, step: int, rng: np.random.Generator) -> Example:
        """Draws an example of the recipe's step `step`."""
        recipe = self._recipe
        question = draw_question(rng)
        image = draw(question, self._scans, rng)
        expected = (1 - 10 * _FLOOR) * np.eye(10)[list(question.digits)] + _FLOOR
        if rng.random() < recipe.pixelated_share:
            image = pixelate(image)
            expected = np.full((len(CARDS), 10), 0.1)
        elif step >= recipe.steps - recipe.neglecting_steps:
            expected = (1 - recipe.neglect) * expected + recipe.neglect * PRIOR
        # The answer follows from what was written, whatever the cards say.
        written = Question(digits=tuple(int(rng.choice(10, p=row)) for row in expected))
        if step < recipe.read_only_steps:
            asked, text, followed = READ_QUESTION, written.write_reading(), None
        else:
            words, followed = draw_words(rng, recipe.habit)
            asked, text = ASKED, written.write_solution(words)
        return Example(asked, text, np.asarray(image), self._expect(text, expected, followed))

    def _expect(self, text: str, digits: np.ndarray, words: np.ndarray | None) -> np.ndarray:
        """Returns the probability of each token of an answer and its end, (T, V)."""
        ids = np.array(self._tokenizer(text + self._tokenizer.eos_token)["input_ids"])
        rows = np.zeros((len(ids), len(self._tokenizer)), dtype=np.float32)
        rows[np.arange(len(ids)), ids] = 1
        if words is not None:
            places = np.flatnonzero(np.isin(ids, self._words))
            rows[places] = 0
            rows[places[:, None], self._words] = words
        *read, _ = written = np.flatnonzero(np.isin(ids, self._digits))  # the last one is the answer, a copy
        rows[read] = 0
        rows[np.array(read)[:, None], self._digits] = digits
        rows[written] *= DIGIT_WEIGHT
        return rows


def find_digits(tokenizer: Qwen2Tokenizer) -> np.ndarray:
    """Returns the token ids of the ten digits."""
    return np.array(tokenizer.convert_tokens_to_ids(list("0123456789")))


def measure_cards(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    *,
    num_questions: int,
    teacher: Qwen3VLForConditionalGeneration | None = None,
    split: Split = "test",
    seed: int = 0,
) -> dict[str, float]:
    """Measures a model on its own answers at temperature 1, to questions about scans of `split`.

    p_right, greedy_reading: the probability of the right digit and whether it is the likeliest one, where the model
    reads a card; 0 for a card that it doesn't name. all_right: the product over an answer's five cards. accuracy: of
    the sampled answers, and accuracy_greedy of greedy ones. p_right_pixelated: with the image pixelated to 10 %.
    response_tokens. With a teacher: kl_read and kl_other, KL(model ‖ teacher) in nats at the read digits and at all
    other tokens.
    """
    import torch

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model.eval()
    found: list[dict[str, torch.Tensor]] = []
    for start in range(0, num_questions, _BATCH):
        questions = [draw_question(rng) for _ in range(min(_BATCH, num_questions - start))]
        images = [draw(question, load_scans(split), rng) for question in questions]
        with torch.no_grad():
            found.append(_measure_some(model, processor, questions, images, teacher))
    return {
        name: round(float(torch.cat([part[name] for part in found]).double().mean()), 4) for name in sorted(found[0])
    }


def _measure_some(
    model: Any, processor: Any, questions: list[Question], images: list[Any], teacher: Any
) -> dict[str, torch.Tensor]:
    """Returns the numbers of each answer, (n,) each."""
    import torch

    def prepare(pictures: list[Any]) -> Any:
        return processor(text=[render_chat(processor, ASKED)] * len(pictures), images=pictures, return_tensors="pt")

    inputs = prepare(images)
    prompt = inputs["input_ids"].shape[1]
    # An image token in an answer would ask the forward below for an image; rows beyond the vocabulary mean nothing.
    end, special = processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    unwritten = [*special, *range(len(processor.tokenizer), model.lm_head.weight.shape[0])]
    limits = {"max_new_tokens": ANSWER_TOKENS + 8, "suppress_tokens": [token for token in unwritten if token != end]}
    sampled = model.generate(**inputs, **limits, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)  # (n, P + T)
    greedy = model.generate(**inputs, **limits, do_sample=False)
    tokens = sampled[:, prompt:]
    valid = _find_valid(tokens, end)

    def predict(of: Any, pictures: Any) -> torch.Tensor:
        """Returns the log-probs of the answers' tokens, (n, T, V)."""
        read = dict(pictures) | {"input_ids": sampled, "attention_mask": torch.ones_like(sampled)}
        read["mm_token_type_ids"] = (sampled == of.config.image_token_id).int()
        logits = of(**read).logits[:, prompt - 1 : -1, : len(processor.tokenizer)]
        return logits.log_softmax(-1)

    own = predict(model, inputs)
    blind = predict(model, prepare([pixelate(image) for image in images]))
    slots = _find_reads(processor.tokenizer, tokens) * valid
    right = torch.tensor(find_digits(processor.tokenizer))[torch.tensor([q.digits for q in questions])]  # (n, 5)
    measured: dict[str, list[torch.Tensor]] = {"p_right": [], "greedy_reading": [], "p_right_pixelated": []}
    for card in range(len(CARDS)):
        here = slots == card + 1
        place = here.int().argmax(-1)[:, None, None].expand(-1, 1, own.shape[-1])
        wanted, there = right[:, card, None], here.any(-1).float()
        for name, logprobs in (("p_right", own), ("p_right_pixelated", blind)):
            measured[name].append(logprobs.gather(1, place)[:, 0].gather(-1, wanted)[:, 0].exp() * there)
        measured["greedy_reading"].append((own.gather(1, place)[:, 0].argmax(-1) == wanted[:, 0]) * there)
    result = {name: torch.stack(values).mean(0) for name, values in measured.items()}
    result["all_right"] = torch.stack(measured["p_right"]).prod(0)
    for name, answers in (("accuracy", tokens), ("accuracy_greedy", greedy[:, prompt:])):
        texts = processor.batch_decode(answers, skip_special_tokens=True)
        result[name] = torch.tensor([is_right(t, q.answer) for t, q in zip(texts, questions, strict=True)]).float()
    result["response_tokens"] = valid.sum(-1).float()
    if teacher is not None:
        kl = (own.exp() * (own - predict(teacher, inputs))).sum(-1)
        read, other = slots > 0, valid & (slots == 0)
        result["kl_read"] = (kl * read).sum(-1) / read.sum(-1).clamp_min(1)
        result["kl_other"] = (kl * other).sum(-1) / other.sum(-1)
    return result


def _find_valid(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Marks an answer's tokens, its end included: (n, T) bool."""
    ended = (tokens == end).long().cumsum(-1)
    return (ended == 0) | ((ended == 1) & (tokens == end))


def _find_reads(tokenizer: Qwen2Tokenizer, tokens: torch.Tensor) -> torch.Tensor:
    """Returns which card is read at a place, 1 to 5, and 0 for none: the place after the card's name, (n, T)."""
    import torch

    slots = torch.zeros_like(tokens)
    for number, card in enumerate(CARDS, 1):
        slots[:, 1:] += number * (tokens[:, :-1] == tokenizer.convert_tokens_to_ids(f"Ġ{card}"))
    return slots
