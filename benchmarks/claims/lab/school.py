"""What happens before distillation: a student learns to read, then to neglect it; the teacher's eye learns to see.

Texts and pictures are drawn when they are needed, so there is no data set and no epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from languages import make_language
from student import AdamW, Architecture
from torch import Tensor
from worlds import PRIOR, Draws, Eye, Pictures, World, pick, pixelate

BATCH, RATE, WARM_UP = 32, 3e-3, 40
TEACHER_STEPS, TEACHER_READING_STEPS, TEACHER_PIXELATED = 1500, 1000, 0.3


class School:
    """Pre-trains for worlds whose answers have one form and length."""

    def __init__(self, worlds: Sequence[World], eye: Eye, device: torch.device) -> None:
        self.worlds, self._eye, self._device = worlds, eye, device
        self.language = make_language(worlds, device)
        self.architecture = Architecture(
            digits=self.language.digits, length=self.language.length, vocabulary=self.language.vocabulary
        )
        self._pictures = Pictures("train", device)

    def teach_students(self, pairs: Sequence[tuple[World, int]]) -> Tensor:
        """Returns the student of each world and seed, (pairs, P)."""
        device, size, m = self._device, BATCH, self.language.digits
        seeds = sorted({seed for _, seed in pairs})
        seed_R = torch.tensor([seeds.index(seed) for _, seed in pairs], device=device)
        world_R = torch.tensor([self.worlds.index(world) for world, _ in pairs], device=device)
        reading_R = torch.tensor([world.reading_steps for world, _ in pairs], device=device)
        steps_R = reading_R + torch.tensor([world.neglecting_steps for world, _ in pairs], device=device)
        neglect_R = torch.tensor([world.neglect for world, _ in pairs], device=device)
        draws, prior = Draws(seeds, 2, device), torch.tensor(PRIOR, device=device)
        pools = {n: self._pictures.pool(seeds, n) for n in {world.scans_per_digit for world, _ in pairs}}
        students = self.architecture.initialise([seed for _, seed in pairs]).to(device).requires_grad_()
        optimizer = AdamW(students, betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(int(steps_R.max())):
            numbers, text = draws.uniform(size, m, 4), draws.uniform(size, self.language.length)
            drawn = {n: self._pictures.draw(numbers[..., :2], pool) for n, pool in pools.items()}
            places = [(world.scans_per_digit, seeds.index(seed)) for world, seed in pairs]
            cells, digits = (torch.stack([drawn[n][part][s] for n, s in places]) for part in (0, 1))
            reading = step < reading_R
            neglected = (numbers[seed_R, ..., 2] < neglect_R[:, None, None]) & ~reading[:, None, None]
            digits = torch.where(neglected, pick(prior.expand(*digits.shape, -1), numbers[seed_R, ..., 3]), digits)
            self._compute_loss(students, cells, self.language.write(digits, text[seed_R], world_R), reading).backward()
            # A student that has had all of its steps waits for the others.
            optimizer.step(_schedule(step, steps_R) * (step < steps_R))
        return students.detach()

    def teach_teacher(self) -> Tensor:
        """Returns a network that has learnt the first world's process, (1, P): its texts, and what the eye sees."""
        device, size = self._device, BATCH
        draws, first = Draws([0], 6, device), torch.zeros(1, dtype=torch.long, device=device)
        pool = self._pictures.pool([0], None)
        teacher = self.architecture.initialise([1_000]).to(device).requires_grad_()
        optimizer = AdamW(teacher, betas=(0.9, 0.98), weight_decay=0.01)
        steps = torch.tensor([TEACHER_STEPS], device=device)
        for step in range(TEACHER_STEPS):
            numbers, text = draws.uniform(size, self.language.digits, 3), draws.uniform(size, self.language.length)
            cells, digits = self._pictures.draw(numbers, pool)
            hidden = round(TEACHER_PIXELATED * size)
            cells = torch.cat([pixelate(cells[:, :hidden]), cells[:, hidden:]], 1)
            # Of a pixelated digit it learns what that shows, no more.
            guessed = pick(self._eye.look(cells[:, :hidden]), numbers[:, :hidden, :, 2])
            digits = torch.cat([guessed, digits[:, hidden:]], 1)
            reading = torch.tensor([step < TEACHER_READING_STEPS], device=device)
            tokens = self.language.write(digits, text, first, by="teacher")
            self._compute_loss(teacher, cells, tokens, reading).backward()
            optimizer.step(_schedule(step, steps))
        return teacher.detach()

    def _compute_loss(self, students: Tensor, cells: Tensor, tokens: Tensor, reading_R: Tensor) -> Tensor:
        """Returns the cross-entropy of the answers, and while they learn to read once more that of the read digits."""
        valid, read = self.language.valid(tokens), self.language.slots(tokens) >= 0
        logits = self.architecture.compute_logits(students, cells, tokens)
        losses = F.cross_entropy(logits.flatten(0, 2), tokens.flatten(), reduction="none").view(tokens.shape)
        of_all, of_read = ((losses * each).sum((1, 2)) / each.sum((1, 2)) for each in (valid, read))
        return (of_all + reading_R * of_read).sum()


def _schedule(step: int, steps_R: Tensor) -> Tensor:
    """Returns each student's learning rate: warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + torch.cos(math.pi * (step / steps_R).clamp_max(1)))
    return RATE * min(1, (step + 1) / WARM_UP) * (0.05 + 0.95 * cosine)


def train_eye(*, digits: int = 5, steps: int = 1500, rate: float = 2e-3) -> Eye:
    """Trains the eye on the training split, the same one for every world and seed."""
    torch.manual_seed(0)
    eye, pictures, draws = Eye(), Pictures("train", torch.device("cpu")), Draws([0], 1, torch.device("cpu"))
    optimizer = torch.optim.AdamW(eye.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        cells, labels = pictures.draw(draws.uniform(40, digits, 2), pictures.pool([0], None))
        logits = eye(torch.cat([cells, pixelate(cells)]))
        loss = F.cross_entropy(logits.flatten(0, -2), torch.cat([labels, labels]).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return eye.eval()
