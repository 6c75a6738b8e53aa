"""The two forms of answers, and what a teacher that knows the form expects at every place.

    write        answers to learn from, by the habits of student or teacher: digits (R, N, m), numbers -> (R, N, T)
    predict      the teacher's log p(next token) after any prefix: tokens, the digits' probabilities -> (R, N, T, V)
    valid        a response's tokens, (R, N, T) bool
    slots        which of the m digits is read at a place, -1 for none: (R, N, T)
    answers      the digit that each response answers, -1 for no digit: (R, N)
    digit_token  the digits' token ids

`world_R` is the place of each run's world among the worlds that the language was made for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from worlds import World, pick

Writer = Literal["student", "teacher"]
_WORD, _READ, _LARGEST = -1, -2, -3
"""Places of a template that are filled in: a word, a digit that is read or copied, the answer."""


class Words:
    """Answers of fixed length: m times (words, marker, digit), words, ANS, the largest of the digits, EOS.

    The next word is a mixture of a bigram and a second-order table with five successors of each context. The student's
    pre-training has the same bigrams, and another second-order table unless the world says otherwise.
    """

    digits = 5
    dictionary = 64
    successors = 5
    floor = 0.02
    smoothing = 2e-4
    """The probability that is spread over all tokens at every place."""

    def __init__(self, worlds: Sequence[World], device: torch.device) -> None:
        m, (words,) = self.digits, {world.words for world in worlds}
        self._eos, ans, markers, self._zero = 1, 2, 3, 3 + m
        self._first_word = self._zero + 10
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
        self._fixed = fixed.to(device)
        self._by_teacher = torch.stack([self._make_table(world, student=False) for world in worlds]).to(device)
        self._by_student = torch.stack([self._make_table(world, student=True) for world in worlds]).to(device)

    def write(self, digits: Tensor, uniform: Tensor, world_R: Tensor, *, by: Writer = "student") -> Tensor:
        tables = {"student": self._by_student, "teacher": self._by_teacher}[by]
        before = last = torch.zeros_like(digits[..., 0])
        tokens = []
        for t, token in enumerate(self._template):
            if token == _WORD:
                table = tables[world_R[:, None], before * self.dictionary + last]
                before, last = last, pick(table, uniform[..., t])
                tokens.append(self._first_word + last)
            elif token == _READ:
                tokens.append(self._zero + digits[..., self._reads.index(t)])
            else:
                tokens.append(self._zero + digits.amax(-1) if token == _LARGEST else torch.full_like(last, token))
        return torch.stack(tokens, -1)

    def predict(self, tokens: Tensor, seen: Tensor, world_R: Tensor) -> Tensor:
        p = self._fixed.expand(*tokens.shape, -1).clone()
        words = (tokens - self._first_word).clamp_min(0)
        before, last = (torch.where(there, words[..., places], 0) for places, there in self._before)
        p[..., self._words, self._first_word :] = self._by_teacher[
            world_R[:, None, None], before * self.dictionary + last
        ]
        p[..., self._reads, self._zero : self._zero + 10] = seen
        read = (tokens[..., self._reads] - self._zero).clamp(0, 9).amax(-1)
        p[..., self._answer, :].scatter_(-1, (self._zero + read)[..., None], 1.0)
        return (p * (1 - self.smoothing) + self.smoothing / self.vocabulary).log()

    def valid(self, tokens: Tensor) -> Tensor:
        return torch.ones_like(tokens, dtype=torch.bool)

    def slots(self, tokens: Tensor) -> Tensor:
        return self._slots.expand(tokens.shape)

    def answers(self, tokens: Tensor) -> Tensor:
        return _as_digit(tokens[..., self._answer] - self._zero)

    def digit_token(self, digits: Tensor) -> Tensor:
        return self._zero + digits

    def _make_table(self, world: World, *, student: bool) -> Tensor:
        """Returns the next word's probabilities after any two words, (W·W, W)."""
        shared, own = np.random.default_rng(100), np.random.default_rng(999)
        pairs, triples = self._draw_table(shared, 1), self._draw_table(shared, self.dictionary)
        if student and not world.same_habits:
            triples = self._draw_table(own, self.dictionary)
        mixed = (1 - world.second_order) * pairs + world.second_order * triples
        mixed = (1 - self.floor) * mixed + self.floor / self.dictionary
        return torch.tensor(mixed.reshape(-1, self.dictionary), dtype=torch.float32)

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

    digits = 3
    lengths = (10, 6, 14, 3)
    teacher_prefers = (0.55, 0.25, 0.15, 0.05)
    smoothing = 1e-3

    def __init__(self, worlds: Sequence[World], device: torch.device) -> None:
        m, choices = self.digits, len(self.lengths)
        self._begin, self._eos, self._ans, self._copy = 0, 1, 2, 3
        self._marker, self._zero = 4, 4 + m
        ids = itertools.count(self._zero + 10)
        phrases = [[[next(ids) for _ in range(length)] for length in self.lengths] for _ in range(m + 1)]
        self.vocabulary = next(ids)
        rows, digits = [], []
        for chosen in itertools.product(range(choices), repeat=m + 1):
            row, digit = [], []
            for i, choice in enumerate(chosen):
                row += phrases[i][choice] + ([self._marker + i, _READ] if i < m else [])
                digit += [-1] * len(phrases[i][choice]) + ([-1, i] if i < m else [])
            row += [self._copy, *[_READ] * m, self._ans, _LARGEST, self._eos]
            digit += [-1, *range(m), -1, m, -1]
            rows.append(row)
            digits.append(digit)
        self.length = max(map(len, rows))
        self._templates = torch.tensor([row + [self._eos] * (self.length - len(row)) for row in rows]).to(device)
        self._which = torch.tensor([row + [-1] * (self.length - len(row)) for row in digits]).to(device)
        # A token's certain successor, −1 where there is a choice.
        successor = torch.full((self.vocabulary,), -1)
        for i, phrasings in enumerate(phrases):
            for phrase in phrasings:
                following = [*phrase[1:], self._marker + i if i < m else self._copy]
                successor[phrase] = torch.tensor(following)
        successor[self._eos] = self._eos
        self._successor = successor.to(device)
        self._starts = torch.zeros(m + 1, self.vocabulary)
        for i, phrasings in enumerate(phrases):
            self._starts[i, [phrase[0] for phrase in phrasings]] = torch.tensor(self.teacher_prefers)
        self._starts = self._starts.to(device)
        preferred = torch.tensor(self.teacher_prefers, device=device)
        self._prefers: dict[Writer, Tensor] = {"teacher": preferred, "student": preferred.flip(0)}

    def write(self, digits: Tensor, uniform: Tensor, world_R: Tensor, *, by: Writer = "student") -> Tensor:
        chosen = torch.zeros_like(digits[..., 0])
        for i in range(self.digits + 1):
            choice = pick(self._prefers[by].expand(*chosen.shape, -1), uniform[..., i])
            chosen = chosen * len(self.lengths) + choice
        tokens, which = self._templates[chosen], self._which[chosen]
        values = torch.cat([digits, digits.amax(-1, keepdim=True)], -1)
        filled = self._zero + values.gather(-1, which.clamp_min(0))
        return torch.where(which >= 0, filled, tokens)

    def predict(self, tokens: Tensor, seen: Tensor, world_R: Tensor) -> Tensor:
        """After a prefix that has left the form, every token is as likely as any other."""
        m, zero, shape = self.digits, self._zero, tokens.shape
        last = torch.cat([torch.full_like(tokens[..., :1], self._begin), tokens[..., :-1]], -1)
        places = torch.arange(shape[-1], device=tokens.device).expand(shape)
        is_digit = (last >= zero) & (last < zero + 10)
        divides = ((last >= self._marker) & (last < self._marker + m)) | (last == self._copy) | (last == self._ans)
        since = torch.where(divides, places, -1).cummax(-1).values  # the place after the last marker, COPY or ANS
        divider = torch.where(since >= 0, last.gather(-1, since.clamp_min(0)), self._begin)
        distance = places - since

        p = torch.zeros(*shape, self.vocabulary, device=tokens.device)
        certain = self._successor[last]
        read = [self._find_read(last, places, i) for i in range(m)]
        largest = torch.stack(read).amax(0)
        for j in range(m):  # in the copy, the j-th digit follows j digits
            after = (last == self._copy) if j == 0 else is_digit & (divider == self._copy) & (distance == j)
            certain = torch.where(after, zero + read[j], certain)
        certain = torch.where(is_digit & (divider == self._copy) & (distance >= m), self._ans, certain)
        certain = torch.where(last == self._ans, zero + largest, certain)
        certain = torch.where(is_digit & (divider == self._ans), self._eos, certain)
        p.scatter_(-1, certain.clamp_min(0)[..., None], (certain >= 0).float()[..., None])
        p += ((last == self._begin) | (is_digit & (divider == self._begin)))[..., None] * self._starts[0]
        for i in range(m):
            p += (is_digit & (divider == self._marker + i))[..., None] * self._starts[i + 1]
            p[..., zero : zero + 10] += (last == self._marker + i)[..., None] * seen[..., None, i, :]
        total = p.sum(-1, keepdim=True)
        p = torch.where(total > 0, p, 1 / self.vocabulary)
        return (p * (1 - self.smoothing) + self.smoothing / self.vocabulary).log()

    def valid(self, tokens: Tensor) -> Tensor:
        ended = (tokens == self._eos).long().cumsum(-1)
        return (ended == 0) | ((ended == 1) & (tokens == self._eos))

    def slots(self, tokens: Tensor) -> Tensor:
        last = torch.cat([torch.full_like(tokens[..., :1], self._begin), tokens[..., :-1]], -1)
        reads = (last >= self._marker) & (last < self._marker + self.digits) & self.valid(tokens)
        return torch.where(reads, last - self._marker, -1)

    def answers(self, tokens: Tensor) -> Tensor:
        ans = (tokens == self._ans) & self.valid(tokens)
        place = (ans.int().argmax(-1, keepdim=True) + 1).clamp_max(self.length - 1)
        return torch.where(ans.any(-1), _as_digit(tokens.gather(-1, place)[..., 0] - self._zero), -1)

    def digit_token(self, digits: Tensor) -> Tensor:
        return self._zero + digits

    def _find_read(self, last: Tensor, places: Tensor, i: int) -> Tensor:
        """Returns the digit that was last written after marker i, 0 for none: (R, N, T)."""
        marked = torch.cat([torch.zeros_like(last[..., :1]), (last == self._marker + i)[..., :-1].long()], -1) > 0
        after = torch.where(marked & (last >= self._zero) & (last < self._zero + 10), places, -1).cummax(-1).values
        return torch.where(after >= 0, last.gather(-1, after.clamp_min(0)) - self._zero, 0)


def make_language(worlds: Sequence[World], device: torch.device) -> Words | Phrases:
    """Returns the form that these worlds share."""
    return {"words": Words, "phrases": Phrases}[worlds[0].form](worlds, device)


def _as_digit(values: Tensor) -> Tensor:
    return torch.where((values >= 0) & (values < 10), values, -1)
