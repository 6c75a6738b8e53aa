"""Many small students at once: a decoder of 94 thousand parameters for each run, all in one flat tensor (R, P).

One batch holds students of different seeds, objectives and learning rates: they share no parameter, and a run's result
doesn't depend on the runs beside it, but for rounding. On a GPU hundreds of runs take little longer than one; on a CPU
a few, so that their activations stay in the cache.

Before distillation a student learns to read, then to neglect it, and the teacher's eye learns to see. Texts and
pictures are drawn when they are needed, so there is no data set and no epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds import CELL_PX, PRIOR, Draws, Eye, Pictures, World, make_language, pick, pixelate

WIDTH, LAYERS, HEADS, INNER = 64, 2, 4, 128
_BEGIN = 0
BATCH, RATE, WARM_UP = 32, 3e-3, 40
TEACHER_STEPS, TEACHER_READING_STEPS, TEACHER_PIXELATED, EYE_STEPS = 1500, 1000, 0.3, 1500
Parameters = dict[str, Tensor]


class Architecture:
    """The students' shapes and their forward pass, for answers of one length and vocabulary."""

    def __init__(self, *, digits: int, length: int, vocabulary: int) -> None:
        self.digits, self.length, d = digits, length, WIDTH
        self._linear = {"eye_in": (CELL_PX**2, d), "eye_out": (d, d)}
        tables = {"slots": (digits, d), "tokens": (vocabulary, d), "places": (length, d)}
        self._normed = {"head": "norm"}
        """Linear layers and the norm before them."""
        for i in range(LAYERS):
            self._linear |= {f"{i}.qkv": (d, 3 * d), f"{i}.mix": (d, d), f"{i}.up": (d, INNER), f"{i}.down": (INNER, d)}
            self._normed |= {f"{i}.qkv": f"{i}.norm1", f"{i}.up": f"{i}.norm2"}
        self._linear["head"] = (d, vocabulary)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, (inputs, outputs) in self._linear.items():
            if norm := self._normed.get(name):
                self._shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
            self._shapes |= {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
            self._shapes |= tables if name == "eye_out" else {}
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]

    def initialise(self, seeds: Sequence[int]) -> Tensor:
        """Returns new students, one for each seed: (S, P)."""
        students = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            students.append(torch.cat([self._initialise_one(name, generator) for name in self._shapes]))
        return torch.stack(students)

    def _initialise_one(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self._shapes[name]
        if "norm" in name:
            return torch.full(shape, float(name.endswith("weight"))).flatten()
        if name in ("slots", "tokens", "places"):
            return 0.1 * torch.randn(shape, generator=generator).flatten()
        inputs = self._shapes[name.replace("bias", "weight")][0]
        scale = 0.5 if "mix.weight" in name or "down.weight" in name else 1.0
        return scale * (2 * torch.rand(shape, generator=generator).flatten() - 1) / math.sqrt(inputs)

    def compute_logits(self, students: Tensor, cells: Tensor, tokens: Tensor) -> Tensor:
        """Returns every place's logits: (R, P), cells (R, B, m, 10, 10), tokens (R, B·K, T) -> (R, B·K, T, V)."""
        p = self._unpack(students)
        seen = self._see(p, cells).repeat_interleave(tokens.shape[1] // cells.shape[1], 1)  # (R, N, m, D)
        shifted = F.pad(tokens[..., :-1], (1, 0), value=_BEGIN)
        x = torch.cat([seen, _look_up(p["tokens"], shifted) + p["places"][:, None]], 2)
        shape = x.shape
        x = x.flatten(1, 2)
        for i in range(LAYERS):
            x = self._apply_layer(p, i, x, shape)
        x = x.view(shape)[:, :, self.digits :].flatten(1, 2)
        return _apply(p, "head", _norm(x)).view(*tokens.shape, -1)

    @torch.inference_mode()
    def sample(
        self, students: Tensor, cells: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_p: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Samples by the numbers (R, B·K, T) in [0, 1): -> tokens (R, B·K, T) and their logits (R, B·K, T, V)."""
        p = self._unpack(students)
        runs, rollouts, length = uniform.shape
        seen = self._see(p, cells).repeat_interleave(rollouts // cells.shape[1], 1)
        shape, x, cache = seen.shape, seen.flatten(1, 2), []
        for i in range(LAYERS):
            cache.append(F.pad(_norm(x).view(-1, self.digits, WIDTH), (0, 0, 0, length)))
            x, p = self._apply_layer(p, i, x, shape), p | self._absorb(p, i)
        last, tokens, found = torch.full((runs, rollouts), _BEGIN, device=uniform.device), [], []
        for t in range(length):
            x, end = _look_up(p["tokens"], last) + p["places"][:, None, t], self.digits + t + 1
            for i, kept in enumerate(cache):
                normed = _norm(x)
                kept[:, end - 1] = normed.flatten(0, 1)
                query = _apply(p, f"{i}.query", normed).view(-1, HEADS, WIDTH)
                mixed = torch.bmm(torch.bmm(query, kept[:, :end].mT).softmax(-1), kept[:, :end])
                x = self._finish_layer(p, i, x + _apply(p, f"{i}.value", mixed.view(runs, rollouts, -1)))
            logits = _apply(p, "head", _norm(x))
            last = _pick_nucleus((logits / temperature).softmax(-1), uniform[..., t], top_p)
            tokens.append(last)
            found.append(logits)
        return torch.stack(tokens, -1), torch.stack(found, 2)

    def _absorb(self, p: Parameters, i: int) -> Parameters:
        """Returns layers that attend to the normed inputs themselves: one cache, half of the size, and fewer steps.

        q·k = (x W_q)·(x' W_k) = (x W_q W_kᵀ)·x', and the mix of values is the mix of inputs times W_v W_mix. The keys'
        shift adds the same to each score of a query, which the softmax ignores.
        """
        weight, shift = (p[f"{i}.qkv.{part}"].unflatten(2, (3, HEADS, -1)).unbind(2) for part in ("weight", "bias"))
        mix, scale = p[f"{i}.mix.weight"].unflatten(1, (HEADS, -1)), (WIDTH // HEADS) ** -0.5
        return {
            f"{i}.query.weight": torch.einsum("rdhi,rehi->rdhe", weight[0], scale * weight[1]).flatten(2),
            f"{i}.query.bias": torch.einsum("rdhi,rehi->rdhe", shift[0], scale * weight[1]).flatten(2),
            f"{i}.value.weight": torch.einsum("rdhi,rhio->rhdo", weight[2], mix).flatten(1, 2),
            f"{i}.value.bias": torch.einsum("rdhi,rhio->rdo", shift[2], mix) + p[f"{i}.mix.bias"],
        }

    def _unpack(self, students: Tensor) -> Parameters:
        """Returns the tensors by name, (R, …) each, with every norm's scale and shift in the linear layer after it."""
        parts = students.split(self._sizes, 1)
        p = {name: part.view(-1, *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        for name in self._linear:
            weight, bias = p[f"{name}.weight"], p[f"{name}.bias"][:, None]
            if norm := self._normed.get(name):
                bias = torch.baddbmm(bias, p[f"{norm}.bias"][:, None], weight)
                weight = p[f"{norm}.weight"][..., None] * weight
            p |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return p | {"tokens": p["tokens"].contiguous()}

    def _see(self, p: Parameters, cells: Tensor) -> Tensor:
        """Turns cells (R, B, m, 10, 10) into the embeddings of m image tokens, (R, B, m, D)."""
        flat = (cells.flatten(-2).flatten(1, 2) - 0.3) / 0.35
        seen = _apply(p, "eye_out", F.gelu(_apply(p, "eye_in", flat)))
        return seen.view(*cells.shape[:3], WIDTH) + p["slots"][:, None]

    def _apply_layer(self, p: Parameters, i: int, x: Tensor, shape: Sequence[int]) -> Tensor:
        runs, rollouts, tokens, _ = shape
        qkv = _apply(p, f"{i}.qkv", _norm(x)).view(runs * rollouts, tokens, 3, HEADS, WIDTH // HEADS)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), is_causal=True)
        return self._finish_layer(p, i, x + _apply(p, f"{i}.mix", mixed.transpose(1, 2).reshape(x.shape)))

    def _finish_layer(self, p: Parameters, i: int, x: Tensor) -> Tensor:
        return x + _apply(p, f"{i}.down", F.gelu(_apply(p, f"{i}.up", _norm(x))))


def _apply(p: Parameters, name: str, x: Tensor) -> Tensor:
    """Applies a linear layer, (R, M, in) -> (R, M, out), each run with its own weights."""
    return torch.baddbmm(p[f"{name}.bias"], x, p[f"{name}.weight"])


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _look_up(table: Tensor, tokens: Tensor) -> Tensor:
    """(R, V, D), (R, ...) -> (R, ..., D): each run's tokens in its own table."""
    first = torch.arange(len(table), device=table.device) * table.shape[1]
    return F.embedding(tokens + first.view(-1, *[1] * (tokens.dim() - 1)), table.flatten(0, 1))


def _pick_nucleus(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Samples from the smallest set of likeliest tokens with more than `top_p` of the probability."""
    if top_p >= 1:
        return pick(probabilities, uniform)
    ordered, ids = probabilities.sort(-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0)
    return ids.gather(-1, pick(kept, uniform)[..., None])[..., 0]


class AdamW:
    """AdamW for many students in one tensor (R, P), with gradient clipping and a learning rate for each."""

    def __init__(self, students: Tensor, *, betas: tuple[float, float], weight_decay: float) -> None:
        self._students, self._betas, self._decay = students, betas, weight_decay
        self._mean, self._square, self._steps = torch.zeros_like(students), torch.zeros_like(students), 0

    @torch.no_grad()
    def step(self, rates_R: Tensor) -> Tensor:
        """Takes a step along the gradient in `students.grad`, and returns its norm before clipping, (R,)."""
        gradient = self._students.grad
        assert gradient is not None
        norm_R = gradient.norm(dim=1)
        gradient = gradient * (1.0 / (norm_R + 1e-6)).clamp_max(1)[:, None]
        self._students.grad = None
        self._steps += 1
        first, second = self._betas
        self._mean.lerp_(gradient, 1 - first)
        self._square.lerp_(gradient.square(), 1 - second)
        root = (self._square / (1 - second**self._steps)).sqrt() + 1e-8
        rates = rates_R[:, None]
        self._students.mul_(1 - rates * self._decay)
        self._students.sub_(rates / (1 - first**self._steps) * self._mean / root)
        return norm_R


# ---------------------------------------------------------------------------------------------- pre-training


class School:
    """Pre-trains for worlds whose answers have one form and length."""

    def __init__(self, worlds: Sequence[World], eye: Eye, device: torch.device) -> None:
        self.worlds, self.eye, self.device = worlds, eye, device
        self.language = language = make_language(worlds, device)
        sizes = {"digits": language.digits, "length": language.length, "vocabulary": language.vocabulary}
        self.architecture = Architecture(**sizes)
        self.pictures = Pictures("train", device)

    def teach_students(self, pairs: Sequence[tuple[World, int]]) -> Tensor:
        """Returns the student of each world and seed, (pairs, P)."""
        device, size, m = self.device, BATCH, self.language.digits
        worlds, seeds = [world for world, _ in pairs], sorted({seed for _, seed in pairs})

        def gather(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device)

        seed_R, world_R = gather([seeds.index(s) for _, s in pairs]), gather([self.worlds.index(w) for w in worlds])
        reading_R, neglect_R = gather([w.reading_steps for w in worlds]), gather([w.neglect for w in worlds])
        steps_R = reading_R + gather([world.neglecting_steps for world in worlds])
        draws, prior = Draws(seeds, 2, device), gather(PRIOR)
        pools = {n: self.pictures.pool(seeds, n) for n in {world.scans_per_digit for world in worlds}}
        students = self.architecture.initialise([seed for _, seed in pairs]).to(device).requires_grad_()
        optimizer = AdamW(students, betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(int(steps_R.max())):
            numbers, text = draws.uniform(size, m, 4), draws.uniform(size, self.language.length)
            drawn = {n: self.pictures.draw(numbers[..., :2], pool) for n, pool in pools.items()}
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
        device, size = self.device, BATCH
        draws, first = Draws([0], 6, device), torch.zeros(1, dtype=torch.long, device=device)
        pool, hidden = self.pictures.pool([0], None), round(TEACHER_PIXELATED * BATCH)
        teacher = self.architecture.initialise([1_000]).to(device).requires_grad_()
        optimizer, steps = AdamW(teacher, betas=(0.9, 0.98), weight_decay=0.01), first + TEACHER_STEPS
        for step in range(TEACHER_STEPS):
            numbers, text = draws.uniform(size, self.language.digits, 3), draws.uniform(size, self.language.length)
            cells, digits = self.pictures.draw(numbers, pool)
            cells = torch.cat([pixelate(cells[:, :hidden]), cells[:, hidden:]], 1)
            # Of a pixelated digit it learns what that shows, no more.
            guessed = pick(self.eye.look(cells[:, :hidden]), numbers[:, :hidden, :, 2])
            digits = torch.cat([guessed, digits[:, hidden:]], 1)
            tokens = self.language.write(digits, text, first, by="teacher")
            self._compute_loss(teacher, cells, tokens, first + (step < TEACHER_READING_STEPS)).backward()
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


def train_eye() -> Eye:
    """Trains the eye on the training split, the same one for every world and seed."""
    torch.manual_seed(0)
    eye, pictures, draws = Eye(), Pictures("train", torch.device("cpu")), Draws([0], 1, torch.device("cpu"))
    optimizer = torch.optim.AdamW(eye.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EYE_STEPS)
    for _ in range(EYE_STEPS):
        cells, labels = pictures.draw(draws.uniform(40, 5, 2), pictures.pool([0], None))
        logits = eye(torch.cat([cells, pixelate(cells)]))
        loss = F.cross_entropy(logits.flatten(0, -2), torch.cat([labels, labels]).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return eye.eval()


def keep(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns a file's tensors, which are made first if there is no file."""
    if not path.exists():
        save_file({name: value.cpu().contiguous() for name, value in make().items()}, path)
    return load_file(path)
