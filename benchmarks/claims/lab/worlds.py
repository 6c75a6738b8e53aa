"""The laboratory's worlds: handwritten digits to read, answers about them, and a teacher that knows both processes.

    Pictures ──► cells and digits ──► write: texts to learn from, by the habits of student or teacher
    Eye ──► what a clear or pixelated cell shows ──► predict: the teacher's log p(next token) after any prefix

A world is one line of `WORLDS`. Worlds with answers of one form and length share a language (`Words` or `Phrases`), so
that their runs can share a batch. The teacher isn't learnt, apart from its eye.

Shapes: R runs (or S seeds), N rollouts of a run, T response tokens, V vocabulary, m digits of a picture. `world_R` is
the place of each run's world among those that its language was made for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaopd.data.handwritten_geometry import COMMON_FIRST, load_scans

CELL_PX = 10
"""A scan of 8×8 px lies at one of nine places in a cell of 10×10; a picture is a row of m cells."""
_SHIFTS = 9
_EYE_FLOOR = 1e-3
"""The probability that the teacher leaves to every digit, however sure its eye is."""
PRIOR = (0.22, 0.17, 0.13, 0.11, 0.09, 0.08, 0.07, 0.05, 0.05, 0.03)
"""The student's habit: which digit it writes where it doesn't look."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A teacher and the students' past. The student first learns to read, then, perhaps, to neglect the picture."""

    name: str
    meaning: str
    form: Literal["words", "phrases"] = "words"
    words: int = 12
    """Of form "words": words before each digit."""
    second_order: float = 0.6
    """Of form "words": how much of the next word depends on the word before the last one too."""
    same_habits: bool = False
    """Whether the student's second-order habits are the teacher's."""
    scans_per_digit: int | None = None
    """The student has seen so few scans of each digit, and misreads others with confidence. None: all of them."""
    reading_steps: int = 200
    """Pre-training on true digits, with an extra loss on them."""
    neglecting_steps: int = 100
    """Then so many steps in which most digits come from a prior."""
    neglect: float = 0.6
    """The share of digits that come from the prior in these steps."""
    learned_teacher: bool = False
    """Whether the teacher is a network that has learnt the process, in place of the process itself."""


def _list_worlds() -> dict[str, World]:
    misreads: dict[str, Any] = {"scans_per_digit": 2, "neglecting_steps": 0}
    phrases: dict[str, Any] = {"form": "phrases"}
    neglects, confident = "a student that can read and neglects it", "a student that misreads with confidence"
    lines: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("base", f"85 tokens, other habits of language, {neglects}", {}),
        ("learned teacher", "the same, under a network that has learnt the process", {"learned_teacher": True}),
        ("long", "the same with 157 tokens", {"words": 24}),
        ("short", "the same with 37 tokens", {"words": 4}),
        ("same habits", "85 tokens, no gap of language", {"same_habits": True}),
        ("misreaders", f"85 tokens, other habits, {confident}", misreads | {"reading_steps": 300}),
        (
            "short misreaders",
            f"37 tokens, little language, {confident}",
            misreads | {"words": 4, "second_order": 0.0, "reading_steps": 700},
        ),
        (
            "phrases",
            f"four phrasings as in the product, {neglects}",
            phrases | {"reading_steps": 280, "neglecting_steps": 120},
        ),
        ("phrases, misreaders", f"four phrasings, {confident}", phrases | misreads | {"reading_steps": 500}),
    )
    return {name: World(name=name, meaning=meaning, **settings) for name, meaning, settings in lines}


WORLDS = _list_worlds()


class Draws:
    """Random numbers of several seeds, in [0, 1): a seed's do not depend on which other seeds are drawn."""

    def __init__(self, seeds: Sequence[int], purpose: int, device: torch.device) -> None:
        self._device = device
        self._generators = [torch.Generator().manual_seed(1_000_003 * purpose + seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Returns (S, *shape)."""
        drawn = torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])
        return drawn.to(self._device)


class Pictures:
    """Draws pictures, rows of m cells, from the scans of one split."""

    def __init__(self, split: Literal["train", "validation", "test"], device: torch.device) -> None:
        scans = load_scans(split)
        stacked = torch.tensor(np.concatenate([scans[digit] for digit in range(10)]), dtype=torch.get_default_dtype())
        self._labels = torch.tensor(np.repeat(np.arange(10), [len(scans[digit]) for digit in range(10)])).to(device)
        padded = F.pad(stacked, (2, 2, 2, 2))
        places = itertools.product(range(3), repeat=2)
        self._cells = torch.stack([padded[:, 2 - y : 12 - y, 2 - x : 12 - x] for y, x in places]).to(device)

    def pool(self, seeds: Sequence[int], scans_per_digit: int | None) -> Tensor:
        """Chooses the scans that each seed's student has seen: (S, n) indices."""
        if scans_per_digit is None:
            return torch.arange(len(self._labels), device=self._labels.device).expand(len(seeds), -1)
        labels = self._labels.cpu().numpy()
        chosen = [
            np.concatenate([rng.choice(np.flatnonzero(labels == d), scans_per_digit, replace=False) for d in range(10)])
            for rng in map(np.random.default_rng, seeds)
        ]
        return torch.tensor(np.stack(chosen), device=self._labels.device)

    def draw(self, uniform: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Draws from numbers (S, B, m, 2) and a pool (S, n): -> cells (S, B, m, 10, 10) and digits (S, B, m)."""
        places = (uniform[..., 0] * pool.shape[1]).long().flatten(1)
        scans = pool.gather(1, places).view(uniform.shape[:-1])
        return self._cells[(uniform[..., 1] * _SHIFTS).long(), scans], self._labels[scans]


def pixelate(cells: Tensor) -> Tensor:
    """Pixelates whole pictures to 10 % of each side, as `vaopd.degradation` does: (..., m, 10, 10) -> the same."""
    m = cells.shape[-3]
    pictures = cells.transpose(-3, -2).reshape(-1, 1, CELL_PX, CELL_PX * m)
    small = F.interpolate(pictures, size=(1, m), mode="bilinear", antialias=True, align_corners=False)
    return small.view(*cells.shape[:-2], 1, 1).expand(cells.shape).contiguous()


class Eye(nn.Module):
    """The teacher's eye, trained on clear and on pixelated cells, so that it knows how little the latter show."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (nn.Linear(CELL_PX**2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.layers = nn.Sequential(*sizes)

    def forward(self, cells: Tensor) -> Tensor:
        return self.layers((cells.flatten(-2) - 0.3) / 0.35)

    @torch.no_grad()
    def look(self, cells: Tensor) -> Tensor:
        """Returns the probability of each digit, (..., m, 10, 10) -> (..., m, 10)."""
        return (1 - 10 * _EYE_FLOOR) * self(cells).softmax(-1) + _EYE_FLOOR


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draws one index of each row: (..., V), (...) -> (...); the probabilities need not sum to 1."""
    cumulated = probabilities.cumsum(-1)
    drawn = (cumulated <= uniform[..., None] * cumulated[..., -1:]).sum(-1)
    return drawn.clamp_max(probabilities.shape[-1] - 1)


# ------------------------------------------------------------------------------------------------- languages

_WORD, _READ, _LARGEST = -1, -2, -3
"""Places of a template that are filled in: a word, a digit that is read or copied, the answer."""


class Words:
    """Answers of fixed length: m times (words, marker, digit), words, ANS, the largest of the digits, EOS.

    The next word is a mixture of a bigram and a second-order table with five successors of each context. The student's
    pre-training has the same bigrams, and another second-order table unless the world says otherwise.
    """

    digits, dictionary, successors, floor = 5, 64, 5, 0.02
    smoothing = 2e-4
    """The probability that is spread over all tokens at every place."""

    def __init__(self, worlds: Sequence[World], device: torch.device) -> None:
        m, (words,) = self.digits, {world.words for world in worlds}
        self._eos, ans, markers, self.zero = 1, 2, 3, 3 + m
        self._first_word = self.zero + 10
        self.vocabulary = self._first_word + self.dictionary
        template = [token for i in range(m) for token in [*[_WORD] * words, markers + i, _READ]]
        self._template = [*template, *[_WORD] * words, ans, _LARGEST, self._eos]
        self.length = len(self._template)
        placed = torch.tensor(self._template)
        self._reads = [t for t, token in enumerate(self._template) if token == _READ]
        slots = torch.full((self.length,), -1)
        slots[self._reads] = torch.arange(m)
        self._slots, self._answer = slots.to(device), self._template.index(_LARGEST)
        self._words = (placed == _WORD).nonzero()[:, 0].to(device)
        # The places of the last two words before each word; the first ones have none, which counts as word 0.
        order = torch.arange(len(self._words), device=device)
        self._before = [(self._words[(order - back).clamp_min(0)], order >= back) for back in (2, 1)]
        fixed = torch.zeros(self.length, self.vocabulary)
        fixed[placed >= 0, placed[placed >= 0]] = 1
        tables = {
            by: torch.stack([self._make_table(w, by) for w in worlds]).to(device) for by in ("teacher", "student")
        }
        self._tables, self._fixed = tables, _smooth(fixed, self).to(device)
        self._expected, self._certain = _smooth(tables["teacher"], self), float(_smooth(torch.ones(1), self))

    def write(self, digits: Tensor, uniform: Tensor, world_R: Tensor, *, by: str = "student") -> Tensor:
        """Writes answers about digits (R, N, m) by numbers (R, N, T) in [0, 1): -> tokens (R, N, T)."""
        before = last = torch.zeros_like(digits[..., 0])
        tokens = []
        for t, token in enumerate(self._template):
            if token == _WORD:
                table = self._tables[by][world_R[:, None], before * self.dictionary + last]
                before, last = last, pick(table, uniform[..., t])
                tokens.append(self._first_word + last)
            elif token == _READ:
                tokens.append(self.zero + digits[..., self._reads.index(t)])
            else:
                tokens.append(self.zero + digits.amax(-1) if token == _LARGEST else torch.full_like(last, token))
        return torch.stack(tokens, -1)

    def predict(self, tokens: Tensor, seen: Tensor, world_R: Tensor) -> Tensor:
        """Returns the teacher's log-probs after every prefix, (R, N, T, V); seen: the digits', (R, N, m, 10)."""
        expected = self._fixed.expand(*tokens.shape, -1).clone()
        words = (tokens - self._first_word).clamp_min(0)
        before, last = (torch.where(there, words[..., places], 0) for places, there in self._before)
        context = before * self.dictionary + last
        expected[..., self._words, self._first_word :] = self._expected[world_R[:, None, None], context]
        expected[..., self._reads, self.zero : self.zero + 10] = _smooth(seen, self)
        read = (tokens[..., self._reads] - self.zero).clamp(0, 9).amax(-1)
        expected[..., self._answer, :].scatter_(-1, (self.zero + read)[..., None], self._certain)
        return expected

    def valid(self, tokens: Tensor) -> Tensor:
        """Marks a response's tokens, (R, N, T)."""
        return torch.ones_like(tokens, dtype=torch.bool)

    def slots(self, tokens: Tensor) -> Tensor:
        """Returns which of the m digits is read at each place, −1 for none: (R, N, T)."""
        return self._slots.expand(tokens.shape)

    def answers(self, tokens: Tensor) -> Tensor:
        """Returns the digit that each response answers, (R, N); out of 0 to 9 where it answers none."""
        return tokens[..., self._answer] - self.zero

    def _make_table(self, world: World, by: str) -> Tensor:
        """Returns the next word's probabilities after any two words, (W·W, W)."""
        shared, own = np.random.default_rng(100), np.random.default_rng(999)
        pairs, triples = self._draw_table(shared, 1), self._draw_table(shared, self.dictionary)
        if by == "student" and not world.same_habits:
            triples = self._draw_table(own, self.dictionary)
        mixed = (1 - world.second_order) * pairs + world.second_order * triples
        mixed = (1 - self.floor) * mixed + self.floor / self.dictionary
        return torch.tensor(mixed.reshape(-1, self.dictionary), dtype=torch.get_default_dtype())

    def _draw_table(self, rng: np.random.Generator, contexts: int) -> np.ndarray:
        weights = 1 / np.arange(1, self.successors + 1)
        table = np.zeros((contexts * self.dictionary, self.dictionary))
        for row in table:
            row[rng.choice(self.dictionary, self.successors, replace=False)] = weights / weights.sum()
        return table.reshape(contexts, self.dictionary, self.dictionary)


class Phrases:
    """Answers like the product's: three read digits after one of four phrasings each, copies of them, the largest.

    A phrase's words are its own, so that after its first word the rest is certain. Teacher and student prefer opposite
    phrasings. Lengths differ by phrasing; after the end nothing is valid.
    """

    digits, lengths = 3, (10, 6, 14, 3)
    smoothing = 1e-3
    _begin, _eos, _ans, _copy, _marker, zero = 0, 1, 2, 3, 4, 7

    def __init__(self, worlds: Sequence[World], device: torch.device) -> None:
        m, ids = self.digits, itertools.count(self.zero + 10)
        phrases = [[[next(ids) for _ in range(length)] for length in self.lengths] for _ in range(m + 1)]
        self.vocabulary = v = next(ids)
        rows = []
        for chosen in itertools.product(range(len(self.lengths)), repeat=m + 1):
            row = []  # of tokens; −1 − i stands for the i-th digit, with the largest as the last one
            for i, choice in enumerate(chosen):
                row += [*phrases[i][choice], *([self._marker + i, -1 - i] if i < m else [])]
            rows.append([*row, self._copy, *(-1 - i for i in range(m)), self._ans, -1 - m, self._eos])
        self.length = max(map(len, rows))
        self._templates = torch.tensor([row + [self._eos] * (self.length - len(row)) for row in rows]).to(device)
        preferred = torch.tensor(COMMON_FIRST, device=device)
        self._prefers = {"teacher": preferred, "student": preferred.flip(0)}

        # What is expected in each context: the last token, or after a digit (from v on) what the digit follows:
        # the beginning, marker i, ANS, or the j-th digit (j = 1 … m) of the copy.
        expected = torch.zeros(v + 2 * m + 2, v)
        self._filled = torch.full((len(expected),), -1, device=device)
        """The digit that a context is certain of: one that was read, or the largest (m)."""
        for i, phrasings in enumerate(phrases):
            for phrase, p in zip(phrasings, COMMON_FIRST, strict=True):
                expected[[v + i, self._begin] if i == 0 else v + i, phrase[0]] = p
                expected[phrase, [*phrase[1:], self._marker + i if i < m else self._copy]] = 1
        expected[[self._eos, v + m + 1], self._eos] = expected[-1, self._ans] = 1
        self._filled[[self._copy, *range(v + m + 2, v + 2 * m + 1)]] = torch.arange(m, device=device)
        self._filled[self._ans] = m
        self._expected, self._certain = _smooth(expected, self).to(device), float(_smooth(torch.ones(1), self))
        self._after_digit = torch.full((v,), v, device=device)
        dividers = [*range(self._marker, self._marker + m), self._ans, self._copy]
        self._after_digit[dividers] = v + 1 + torch.tensor([*range(m), m, m], device=device)

    def write(self, digits: Tensor, uniform: Tensor, world_R: Tensor, *, by: str = "student") -> Tensor:
        chosen = torch.zeros_like(digits[..., 0])
        for i in range(self.digits + 1):
            choice = pick(self._prefers[by].expand(*chosen.shape, -1), uniform[..., i])
            chosen = chosen * len(self.lengths) + choice
        tokens, values = self._templates[chosen], torch.cat([digits, digits.amax(-1, keepdim=True)], -1)
        return torch.where(tokens < 0, self.zero + values.gather(-1, (-1 - tokens).clamp_min(0)), tokens)

    def predict(self, tokens: Tensor, seen: Tensor, world_R: Tensor) -> Tensor:
        m, zero, last = self.digits, self.zero, self._shift(tokens)
        places = torch.arange(self.length, device=tokens.device).expand(tokens.shape)
        is_digit = (last >= zero) & (last < zero + 10)
        since = torch.where((last >= self._ans) & (last < zero), places, -1).cummax(-1).values
        divider = torch.where(since >= 0, last.gather(-1, since.clamp_min(0)), self._begin)
        copied = torch.where(divider == self._copy, (places - since).clamp_max(m), 0)
        context = torch.where(is_digit, self._after_digit[divider] + copied, last)
        expected = self._expected[context]

        # The digit that was last written after each marker, 0 for none.
        follows = F.pad(last[..., :-1], (1, 0), value=self._begin) - self._marker
        wrote = [torch.where(is_digit & (follows == i), places, -1).cummax(-1).values for i in range(m)]
        read = [torch.where(w >= 0, last.gather(-1, w.clamp_min(0)) - zero, 0) for w in wrote]
        values, filled = torch.stack([*read, torch.stack(read).amax(0)], -1), self._filled[context][..., None]
        target = zero + values.gather(-1, filled.clamp_min(0))
        expected.scatter_(-1, target, torch.where(filled >= 0, self._certain, expected.gather(-1, target)))
        shown = _smooth(seen, self)
        for i in range(m):
            here = (last == self._marker + i)[..., None]
            digits = expected[..., zero : zero + 10]
            digits.copy_(torch.where(here, shown[..., None, i, :], digits))
        return expected

    def valid(self, tokens: Tensor) -> Tensor:
        ended = (tokens == self._eos).long().cumsum(-1)
        return (ended == 0) | ((ended == 1) & (tokens == self._eos))

    def slots(self, tokens: Tensor) -> Tensor:
        slots = self._shift(tokens) - self._marker
        return torch.where((slots >= 0) & (slots < self.digits) & self.valid(tokens), slots, -1)

    def answers(self, tokens: Tensor) -> Tensor:
        ans = (tokens == self._ans) & self.valid(tokens)
        place = (ans.int().argmax(-1, keepdim=True) + 1).clamp_max(self.length - 1)
        return torch.where(ans.any(-1), tokens.gather(-1, place)[..., 0] - self.zero, -1)

    def _shift(self, tokens: Tensor) -> Tensor:
        """Returns the token before each place."""
        return F.pad(tokens[..., :-1], (1, 0), value=self._begin)


def make_language(worlds: Sequence[World], device: torch.device) -> Words | Phrases:
    """Returns the form that these worlds share."""
    return {"words": Words, "phrases": Phrases}[worlds[0].form](worlds, device)


def _smooth(p: Tensor, language: Words | Phrases) -> Tensor:
    """Returns the log of probabilities of which a little is spread over the whole vocabulary."""
    return (p * (1 - language.smoothing) + language.smoothing / language.vocabulary).log()
