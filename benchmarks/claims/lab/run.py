"""Runs the laboratory (`make claims-lab`): when does VA-OPD help a student that distils from a teacher?

    table.EXPERIMENTS ──► runs that the results lack ──► batches of one form and size
        each batch:  pre-trained students (kept in --work) ──► 80 steps of distillation ──► test pictures
    benchmarks/results/claims/lab.json ◄── a line for each run; `summary.py` makes the tables and the figure of it

No service runs: rollouts are sampled, scored and learnt from in this process, by the weights of `vaopd.objective`.
Results are written after every batch, so an interrupted laboratory continues where it stopped. `--device cuda` takes
hundreds of runs at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from student import AdamW, School, train_eye
from table import OBJECTIVES, WORLDS, Run, Scores, list_runs
from torch import Tensor
from worlds import Draws, Eye, Pictures, pixelate

from vaopd.objective import view_divergence

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "claims" / "lab.json"
STEPS, WARM_UP, WINDOW = 80, 10, 8
TEMPERATURE, TOP_P = 0.7, 0.95
BEFORE_PICTURES, VALIDATION_PICTURES, TEST_PICTURES = 96, 192, 384
ANSWERS_AT_ONCE = 16_384
"""Answers that are evaluated together, of all runs: their (N, T, V) logits fill half a gigabyte each time."""
BLIND_NATS, DIVERGENT_NATS = 1e-3, 0.1
"""Below this VA the image says nothing for a token; from this view divergence on, it says something of the place."""


class Batch(School):
    """Runs whose answers have one form and whose steps have one size, with all that they share."""

    def __init__(self, runs: Sequence[Run], eye: Eye, device: torch.device) -> None:
        names = sorted({run.world for run in runs})
        super().__init__([WORLDS[name] for name in names], eye, device)
        self.runs = runs
        self.world_R = torch.tensor([names.index(run.world) for run in runs], device=device)
        self.learned: Tensor | None = None
        """The network of a teacher that has learnt the process, (1, P)."""
        self.seeds = sorted({run.seed for run in runs})
        self.seed_R = torch.tensor([self.seeds.index(run.seed) for run in runs], device=device)

    def predict(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """Returns the teacher's log-probs: cells (R, B, m, 10, 10), tokens (R, B·K, T) -> (R, B·K, T, V)."""
        if self.learned is not None:
            with torch.no_grad():
                teachers = self.learned.expand(len(tokens), -1)
                return self.architecture.compute_logits(teachers, cells, tokens).log_softmax(-1)
        seen = self.eye.look(cells).repeat_interleave(tokens.shape[1] // cells.shape[1], 1)
        return self.language.predict(tokens, seen, self.world_R)


def distil(batch: Batch, students: Tensor) -> Iterator[dict[str, Any]]:
    """Trains the batch's runs from their students (R, P), and yields the numbers of each."""
    device, runs = batch.device, batch.runs
    prompts, siblings = runs[0].prompts, runs[0].siblings
    rates_R = torch.tensor([run.rate for run in runs], device=device)
    pictures, draws = Pictures("train", device), Draws(batch.seeds, 3, device)
    pool = pictures.pool(batch.seeds, None)
    students = students.clone().requires_grad_()
    optimizer = AdamW(students, betas=(0.9, 0.95), weight_decay=0.0)
    before = evaluate(batch, students, "test", BEFORE_PICTURES)
    during: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        cells, digits = pictures.draw(draws.uniform(prompts, batch.language.digits, 2), pool)
        numbers = draws.uniform(prompts * siblings, batch.language.length)
        # Of every seed the same pictures and the same random numbers for each of its runs.
        cells, digits, numbers = cells[batch.seed_R], digits[batch.seed_R], numbers[batch.seed_R]
        tokens = batch.architecture.sample(students, cells, numbers, temperature=TEMPERATURE, top_p=TOP_P)
        teacher, degraded = batch.predict(tokens, cells), batch.predict(tokens, pixelate(cells))
        student = batch.architecture.compute_logits(students, cells, tokens).log_softmax(-1)
        kl = (student.exp() * (student - teacher)).sum(-1)
        weights, advantage = weigh(batch, tokens, student.detach(), teacher, degraded, step=step)
        ((weights * kl).sum() / prompts).backward()
        shape = min(1, (step + 1) / WARM_UP) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        norm_R = optimizer.step(rates_R * shape)
        truth = batch.language.digit_token(digits).repeat_interleave(siblings, 1)
        overlooked = (view_divergence(teacher, degraded) >= DIVERGENT_NATS) & (advantage < BLIND_NATS)
        measured = measure(batch, tokens, truth, student.detach(), kl.detach(), advantage, overlooked, weights)
        during.append(measured | {"gradient_norm": norm_R})
    validation = evaluate(batch, students, "validation", VALIDATION_PICTURES)
    test = evaluate(batch, students, "test", TEST_PICTURES)
    means = {name: torch.stack([d[name] for d in during]).nanmean(0).tolist() for name in during[0]}
    # The curve is that of the rollouts, which cost nothing more: windows of steps, each of some hundred digits.
    curve = torch.stack([d["p_right"] for d in during]).unflatten(0, (-1, WINDOW)).nanmean(1)
    parts = {"before": before, "validation": validation, "test": test, "during": means}
    for r, run in enumerate(runs):
        found = {part: {name: values[r] for name, values in numbers.items()} for part, numbers in parts.items()}
        yield {**vars(run), **found, "curve": curve[:, r].tolist()}


def weigh(
    batch: Batch, tokens: Tensor, student: Tensor, teacher: Tensor, degraded: Tensor, *, step: int
) -> tuple[Tensor, Tensor]:
    """Applies each run's objective: -> its weights and the VA, (R, N, T) each."""
    valid = batch.language.valid(tokens)
    weights, advantage = torch.zeros(tokens.shape, device=batch.device), torch.zeros(tokens.shape, device=batch.device)
    for name in dict.fromkeys(run.objective for run in batch.runs):
        places = [r for r, run in enumerate(batch.runs) if run.objective == name]
        some = {"tokens": tokens, "valid": valid, "student": student, "teacher": teacher, "degraded": degraded}
        scores = Scores(
            **{key: values[places].flatten(0, 1) for key, values in some.items()},
            siblings=batch.runs[0].siblings,
            seeds=tuple(1000 * batch.runs[r].seed + step for r in places),
        )
        weights[places] = OBJECTIVES[name](scores).view(len(places), *tokens.shape[1:])
        advantage[places] = scores.advantage.view(len(places), *tokens.shape[1:])
    return weights, advantage


def measure(
    batch: Batch,
    tokens: Tensor,
    truth: Tensor,
    student: Tensor,
    kl: Tensor,
    advantage: Tensor,
    overlooked: Tensor,
    weights: Tensor,
) -> dict[str, Tensor]:
    """Returns a step's numbers, (R,) each. truth: the right digits' tokens, (R, N, m); student: log-probs."""
    valid, slots = batch.language.valid(tokens), batch.language.slots(tokens)
    read, right = slots >= 0, truth.gather(-1, slots.clamp_min(0))
    misread = read & (tokens != right)
    # 1 where a token weighs as much as in the plain mean of its rollout.
    relative = weights * valid.sum(-1, keepdim=True) * batch.runs[0].siblings
    total = _sum(kl, valid)
    rollouts = weights.sum(-1).view(len(tokens), -1, batch.runs[0].siblings)
    return {
        "p_right": _mean(student.gather(-1, right[..., None])[..., 0].exp(), read),
        "kl_share_read": _sum(kl, read) / total,
        "kl_share_misread": _sum(kl, misread) / total,
        "kl_share_blind": _sum(kl, valid & (advantage < BLIND_NATS)) / total,
        "kl_share_overlooked": _sum(kl, valid & overlooked) / total,
        "tokens_blind": _mean((advantage < BLIND_NATS).float(), valid),
        "tokens_read": _mean(read.float(), valid),
        "weight_read": _mean(relative, read),
        "weight_misread": _mean(relative, misread),
        "kl_other": _mean(kl, valid & ~read),
        "kl_read": _mean(kl, read),
        "read_right": 1 - _mean(misread.float(), read),
        "response_tokens": valid.sum(-1).float().mean(-1),
        "effective_siblings": (1 / rollouts.square().sum(-1)).mean(-1),
    }


@torch.no_grad()
def evaluate(batch: Batch, students: Tensor, split: Any, count: int) -> dict[str, list[float]]:
    """Measures students at temperature 1 on pictures that all of them share: lists over runs.

    p_right and greedy are of the digits to be read, given what the student has written before; all_right is the product
    over an answer's digits; answer is the sampled one. KLs are means over an answer's tokens, then over answers.
    """
    language, device = batch.language, batch.device
    pictures, draws = Pictures(split, device), Draws(batch.seeds, 5, device)
    drawn = pictures.draw(Draws([0], 4, device).uniform(count, language.digits, 2), pictures.pool([0], None))
    cells, digits = (part.expand(len(batch.runs), *part.shape[1:]) for part in drawn)
    numbers = draws.uniform(count, language.length)[batch.seed_R]
    at_once = max(1, ANSWERS_AT_ONCE // len(batch.runs))
    pieces = zip(*(part.split(at_once, 1) for part in (cells, digits, numbers)), strict=True)
    found = [_evaluate_some(batch, students, *piece) for piece in pieces]
    return {name: torch.cat([each[name] for each in found], 1).nanmean(1).tolist() for name in found[0]}


def _evaluate_some(batch: Batch, students: Tensor, cells: Tensor, digits: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """Returns the numbers of each answer, (R, N)."""
    language = batch.language
    tokens = batch.architecture.sample(students, cells, numbers)
    student = batch.architecture.compute_logits(students, cells, tokens).log_softmax(-1)
    slots, valid = language.slots(tokens), language.valid(tokens)
    kl = (student.exp() * (student - batch.predict(tokens, cells))).sum(-1)
    right, greedy = [], []
    for i in range(language.digits):
        here = slots == i
        place = here.int().argmax(-1)[..., None, None].expand(-1, -1, 1, language.vocabulary)
        at = student.gather(2, place)[:, :, 0]  # (R, N, V)
        wanted = language.digit_token(digits[..., i])
        # A digit that the response doesn't write counts as wrong.
        right.append(at.gather(-1, wanted[..., None])[..., 0].exp() * here.any(-1))
        greedy.append(((at.argmax(-1) == wanted) & here.any(-1)).float())
    other, read = valid & (slots < 0), slots >= 0
    return {
        "p_right": torch.stack(right).mean(0),
        "all_right": torch.stack(right).prod(0),
        "greedy": torch.stack(greedy).mean(0),
        "answer": (language.answers(tokens) == digits.amax(-1)).float(),
        "kl_other": torch.where(other, kl, 0).sum(-1) / other.sum(-1),
        "kl_read": torch.where(read, kl, 0).sum(-1) / read.sum(-1),
        "response_tokens": valid.sum(-1).float(),
    }


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sums over the marked tokens of each run: (R, N, T), (R, N, T) -> (R,)."""
    return torch.where(mask, values, 0).sum((1, 2))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The same as a mean; NaN where nothing is marked."""
    return _sum(values, mask) / mask.sum((1, 2))


def load_students(batch: Batch, folder: Path) -> Tensor:
    """Returns each run's pre-trained student, (R, P); those that the folder lacks are pre-trained first."""
    pairs = [(WORLDS[run.world], run.seed) for run in batch.runs]
    # The student doesn't depend on what its world is called and who will teach it.
    own = {pair: (replace(pair[0], name="", meaning="", learned_teacher=False), pair[1]) for pair in pairs}
    paths = {pair: folder / f"student-{_fingerprint(own[pair])}.safetensors" for pair in own}
    if missing := [pair for pair in own if not paths[pair].exists()]:
        for pair, student in zip(missing, batch.teach_students(missing).cpu(), strict=True):
            save_file({"student": student.clone()}, paths[pair])
    students = {pair: load_file(path)["student"] for pair, path in paths.items()}
    return torch.stack([students[pair] for pair in pairs]).to(batch.device)


def load_teacher(batch: Batch, folder: Path) -> Tensor | None:
    """Returns the batch's teacher if it is a network, (1, P); it is trained first if the folder lacks it."""
    (learned,) = {world.learned_teacher for world in batch.worlds}
    path = folder / f"teacher-{_fingerprint(batch.worlds)}.safetensors"
    if learned and not path.exists():
        save_file({"teacher": batch.teach_teacher().cpu()}, path)
    return load_file(path)["teacher"].to(batch.device) if learned else None


def load_eye(folder: Path, device: torch.device) -> Eye:
    """Returns the teacher's eye; it is trained first if the folder lacks it."""
    path = folder / "eye.safetensors"
    if not path.exists():
        save_file(train_eye().state_dict(), path)
    eye = Eye()
    eye.load_state_dict(load_file(path))
    return eye.to(device).eval()


def split_batches(runs: Sequence[Run], at_once: int) -> Iterator[list[Run]]:
    """Yields runs that can share a batch, at most `at_once` together, in the order of their experiments."""
    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        world = WORLDS[run.world]
        key = (world.form, world.words, world.learned_teacher, run.prompts, run.siblings)
        alike.setdefault(key, []).append(run)
    for group in alike.values():
        yield from (group[start : start + at_once] for start in range(0, len(group), at_once))


def tidy(value: Any, name: str = "") -> Any:
    """Rounds all numbers but rates to 4 decimals, since the tables have 3, and writes NaN as null."""
    if isinstance(value, dict):
        return {key: tidy(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [tidy(inner) for inner in value]
    if not isinstance(value, float) or name == "rate":
        return value
    return None if math.isnan(value) else round(value, 4)


def _fingerprint(of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def identify(run: dict[str, Any]) -> Run:
    """Returns the run that a line of the results is of."""
    return Run(**{name: run[name] for name in Run.__dataclass_fields__})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--at-once", type=int, help="runs in one batch; default: 24 on a CPU, 320 on a GPU")
    parser.add_argument("--world", action="append", choices=WORLDS, help="these worlds' runs only")
    parser.add_argument("--objective", action="append", choices=OBJECTIVES, help="these objectives' runs only")
    parser.add_argument("--rate", action="append", type=float, help="runs with these learning rates only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims-lab", help="pre-trained students")
    parser.add_argument("--stop-after-s", type=float, default=math.inf, help="begin no batch after so many seconds")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # batches of small products gain little from more, and results stay the same
    options.work.mkdir(parents=True, exist_ok=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    finished = json.loads(options.results.read_text())["runs"] if options.results.exists() else []
    done = {identify(run) for run in finished}
    wanted = [
        run
        for run in list_runs()
        if run.world in (options.world or WORLDS)
        and run.objective in (options.objective or OBJECTIVES)
        and run.rate in (options.rate or [run.rate])
    ]
    missing = [run for run in wanted if run not in done]
    batches = list(split_batches(missing, options.at_once or (24 if device.type == "cpu" else 320)))
    print(f"{len(missing)} of {len(wanted)} runs in {len(batches)} batches on {options.device}", flush=True)
    eye, started, trained = load_eye(options.work, device), time.perf_counter(), 0
    for runs in batches:
        if time.perf_counter() - started > options.stop_after_s:
            break
        batch = Batch(runs, eye, device)
        batch.learned = load_teacher(batch, options.work)
        finished += map(tidy, distil(batch, load_students(batch, options.work)))
        written = options.results.with_suffix(".tmp")
        lines = ",\n".join(json.dumps(run, allow_nan=False) for run in finished)
        written.write_text(f'{{"steps": {STEPS}, "runs": [\n{lines}\n]}}\n')
        written.replace(options.results)
        trained += len(runs)
        each_s = (time.perf_counter() - started) / trained
        left_min = each_s * (len(missing) - trained) / 60
        print(f"{trained} runs, {each_s:.1f} s each; about {left_min:.0f} minutes left", flush=True)


if __name__ == "__main__":
    main()
