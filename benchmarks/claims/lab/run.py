"""Runs the laboratory (`make claims-lab`): when does VA-OPD help a student that distils from a teacher?

    EXPERIMENTS ──► runs that the results lack ──► batches of one form and size
        each batch:  pre-trained students (kept in --work) ──► 80 steps of distillation ──► test pictures
    benchmarks/results/claims/lab.json ◄── a line for each run; `summary.py` makes the tables and the figure of it

No service runs: rollouts are sampled, scored and learnt from in this process, by the weights of `vaopd.objective`.
Results are written after every batch, so an interrupted laboratory continues where it stopped. `--device cuda` takes
hundreds of runs at once.

A new objective is one line of `OBJECTIVES`: it takes the `Scores` of a run's prompt groups, and returns each token's
weight (N, T). The weights of a group's tokens add up to 1, and the loss is the mean over groups of Σ weight·KL.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from student import AdamW, School, keep, train_eye
from torch import Tensor
from worlds import WORLDS, Draws, Eye, Pictures, pixelate

from vaopd import objective as library
from vaopd.files.durable import write_atomic

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "claims" / "lab.json"
STEPS, WARM_UP, WINDOW = 80, 10, 8
TEMPERATURE, TOP_P = 0.7, 0.95
BEFORE_PICTURES, VALIDATION_PICTURES, TEST_PICTURES = 96, 192, 384
BLIND_NATS, DIVERGENT_NATS = 1e-3, 0.1
"""Below this VA the image says nothing for a token; from this view divergence on, it says something of the place."""
RUNS_AT_ONCE, ANSWERS_AT_ONCE = {"cpu": 4, "cuda": 320}, {"cpu": 256, "cuda": 16_384}
"""Runs in one batch, and answers that are evaluated together, of all runs."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an objective may look at: N rollouts, K siblings of a group side by side; log-probs (N, T, V)."""

    tokens: Tensor
    """(N, T), as the student sampled them."""
    valid: Tensor
    """(N, T) bool: the response mask."""
    student: Tensor
    teacher: Tensor
    degraded: Tensor
    siblings: int
    seed: int = 0
    """Of random draws."""

    def select(self, r: int, seed: int) -> Scores:
        """Returns one run's scores, where these have a leading dimension of runs."""
        return replace(self, seed=seed, **{k: v[r] for k, v in vars(self).items() if isinstance(v, Tensor)})

    @property
    def uniform(self) -> Tensor:
        """Equal rollout weights, (N,)."""
        return torch.full_like(self.valid[:, 0], 1 / self.siblings, dtype=self.teacher.dtype)

    @property
    def both_views(self) -> tuple[Tensor, Tensor]:
        """The sampled tokens' log-probs in the original and the degraded view, (N, T) each."""
        picked = self.tokens[..., None]
        return self.teacher.gather(-1, picked)[..., 0], self.degraded.gather(-1, picked)[..., 0]

    @property
    def advantage(self) -> Tensor:
        """VA, (N, T)."""
        return library.visual_advantage(*self.both_views, self.valid)

    @property
    def divergence(self) -> Tensor:
        """How much the teacher's whole distribution depends on the image, (N, T)."""
        return library.view_divergence(self.teacher, self.degraded)

    def weigh_rollouts(self, scores: Tensor | None = None, *, deviation_floor: float = 0.0) -> Tensor:
        """The paper's rollout weights, (N,), by mean VA or other scores (N,)."""
        scores = library.mean_visual_advantage(self.advantage, self.valid) if scores is None else scores
        return library.rollout_weights(scores.view(-1, self.siblings), deviation_floor=deviation_floor).flatten()

    def weigh_tokens(self, score: Tensor | None = None, rollouts: Tensor | None = None, **settings: float) -> Tensor:
        """Token groups, (N, T): by VA or another score (N, T), within equal or other rollout weights (N,)."""
        score = self.advantage if score is None else score
        return library.token_weights(score, self.valid, self.uniform if rollouts is None else rollouts, **settings)

    def mask(self, which: str, *, ties: str = "earlier") -> Tensor:
        """Standard OPD without a tenth of each rollout's tokens."""
        options: dict[str, Any] = {"which": which, "fraction": 0.1, "ties": ties, "seed": self.seed}
        return library.mean_weights(library.masked_response(self.advantage, self.valid, **options), self.uniform)


OBJECTIVES: dict[str, Callable[[Scores], Tensor]] = {
    "standard": lambda s: library.mean_weights(s.valid, s.uniform),
    "va_opd": lambda s: s.weigh_tokens(rollouts=s.weigh_rollouts()),
    "token_groups": lambda s: s.weigh_tokens(),
    "token_groups_6_percent": lambda s: s.weigh_tokens(high_fraction=0.06),
    "rollout_weights": lambda s: library.mean_weights(s.valid, s.weigh_rollouts()),
    "rollout_weights_floor": lambda s: library.mean_weights(s.valid, s.weigh_rollouts(deviation_floor=0.02)),
    # By the sum, which longer rollouts don't lower.
    "rollout_weights_sum": lambda s: library.mean_weights(s.valid, s.weigh_rollouts(s.advantage.sum(-1))),
    "mask_top": lambda s: s.mask("top"),
    "mask_bottom": lambda s: s.mask("bottom"),
    "mask_bottom_random_ties": lambda s: s.mask("bottom", ties="random"),
    "mask_random": lambda s: s.mask("random"),
    "view_divergence": lambda s: s.weigh_tokens(s.divergence),
    # By |log p − log p̃| of the sampled token, which is large where the image speaks against it, too.
    "absolute": lambda s: s.weigh_tokens(library.absolute_advantage(*s.both_views, s.valid)),
    # By VA's expectation over the student's own distribution.
    "expected": lambda s: s.weigh_tokens(library.expected_advantage(s.student, s.teacher, s.degraded)),
    "view_divergence_and_rollouts": lambda s: s.weigh_tokens(s.divergence, s.weigh_rollouts()),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Objectives that are compared in one world; the first one is the baseline. All share seeds and pictures."""

    world: str
    objectives: tuple[str, ...]
    rates: tuple[float, ...]
    """With several, each objective's own is chosen on validation pictures."""
    prompts: int = 8
    siblings: int = 4
    seeds: int = 5
    steps: int = STEPS


MAIN = ("standard", "va_opd", "view_divergence")
LENGTH = ("standard", "va_opd", "rollout_weights", "rollout_weights_floor", "rollout_weights_sum")
"""Do rollout weights by mean VA shorten answers? Asked where phrasings differ in length."""
LONG = 400
_CONFIDENT = ("phrases, misreaders", "short misreaders", "misreaders")
_OTHERS = (*_CONFIDENT, "short", "same habits", "phrases", "long", "learned teacher")
EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(world="base", objectives=MAIN, rates=(3e-4, 1e-3, 3e-3, 6e-3)),
    Experiment(world="base", objectives=("standard", *(o for o in OBJECTIVES if o not in MAIN)), rates=(1e-3,)),
    *(Experiment(world=world, objectives=MAIN, rates=(1e-3, 3e-3, 6e-3)) for world in _OTHERS),
    Experiment(world="base", objectives=MAIN[:2], rates=(1e-3,), prompts=4, siblings=8),
    Experiment(world="base", objectives=MAIN[:2], rates=(1e-3,), prompts=16, siblings=4),
    Experiment(world="phrases", objectives=LENGTH, rates=(1e-3,), steps=LONG),
)


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """One student under one objective."""

    world: str
    objective: str
    rate: float
    prompts: int
    siblings: int
    seed: int
    steps: int = STEPS


def list_runs() -> Iterator[Run]:
    """Yields every run of the experiments once, in their order."""
    yield from dict.fromkeys(
        Run(world=e.world, objective=name, rate=rate, prompts=e.prompts, siblings=e.siblings, seed=seed, steps=e.steps)
        for e in EXPERIMENTS
        for rate in e.rates
        for name in e.objectives
        for seed in range(e.seeds)
    )


class Batch(School):
    """Runs whose answers have one form and whose steps have one size, with all that they share."""

    def __init__(self, runs: Sequence[Run], eye: Eye, device: torch.device) -> None:
        names = sorted({run.world for run in runs})
        super().__init__([WORLDS[name] for name in names], eye, device)
        self.runs, self.siblings = runs, runs[0].siblings
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
    device, runs, steps = batch.device, batch.runs, batch.runs[0].steps
    rates_R = torch.tensor([run.rate for run in runs], device=device)
    draws, pool = Draws(batch.seeds, 3, device), batch.pictures.pool(batch.seeds, None)
    students = students.clone().requires_grad_()
    optimizer = AdamW(students, betas=(0.9, 0.95), weight_decay=0.0)
    before = evaluate(batch, students, "test", BEFORE_PICTURES)
    during: list[dict[str, Tensor]] = []
    for step in range(steps):
        cells, digits = batch.pictures.draw(draws.uniform(runs[0].prompts, batch.language.digits, 2), pool)
        numbers = draws.uniform(runs[0].prompts * batch.siblings, batch.language.length)
        # Of every seed the same pictures and the same random numbers for each of its runs.
        cells, digits, numbers = cells[batch.seed_R], digits[batch.seed_R], numbers[batch.seed_R]
        tokens, _ = batch.architecture.sample(students, cells, numbers, temperature=TEMPERATURE, top_p=TOP_P)
        student = batch.architecture.compute_logits(students, cells, tokens).log_softmax(-1)
        scores = Scores(
            tokens=tokens,
            valid=batch.language.valid(tokens),
            student=student.detach(),
            teacher=batch.predict(tokens, cells),
            degraded=batch.predict(tokens, pixelate(cells)),
            siblings=batch.siblings,
        )
        kl = (student.exp() * (student - scores.teacher)).sum(-1)
        alone = [scores.select(r, 1000 * run.seed + step) for r, run in enumerate(runs)]
        weights = torch.stack([OBJECTIVES[run.objective](one) for run, one in zip(runs, alone, strict=True)])
        ((weights * kl).sum() / runs[0].prompts).backward()
        shape = min(1, (step + 1) / WARM_UP) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        norm_R = optimizer.step(rates_R * shape)
        right = (batch.language.zero + digits).repeat_interleave(batch.siblings, 1)
        measured = measure(scores, batch.language.slots(tokens), right, kl.detach(), weights)
        during.append(measured | {"gradient_norm": norm_R})
    parts = {
        "before": before,
        "validation": evaluate(batch, students, "validation", VALIDATION_PICTURES),
        "test": evaluate(batch, students, "test", TEST_PICTURES),
        "during": {name: torch.stack([d[name] for d in during]).nanmean(0).tolist() for name in during[0]},
    }
    # The curve is that of the rollouts, which cost nothing more: windows of steps, each of some hundred digits.
    curve = torch.stack([d["p_right"] for d in during]).unflatten(0, (-1, WINDOW)).nanmean(1)
    for r, run in enumerate(runs):
        found = {part: {name: values[r] for name, values in numbers.items()} for part, numbers in parts.items()}
        yield {**vars(run), **found, "curve": curve[:, r].tolist()}


def measure(scores: Scores, slots: Tensor, truth: Tensor, kl: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns a step's numbers, (R,) each. slots, kl, weights: (R, N, T); truth: the right digits' tokens, (R, N, m).

    A relative weight is 1 where a token weighs as much as in the plain mean of its rollout.
    """
    valid, read, right = scores.valid, slots >= 0, truth.gather(-1, slots.clamp_min(0))
    misread = read & (scores.tokens != right)
    teacher, degraded = scores.both_views
    blind = valid & (teacher - degraded < BLIND_NATS)
    relative = weights * valid.sum(-1, keepdim=True) * scores.siblings
    rollouts = weights.sum(-1).unflatten(-1, (-1, scores.siblings))

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum((1, 2)) / mask.sum((1, 2))

    def share(of: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, of, 0).sum((1, 2)) / torch.where(valid, of, 0).sum((1, 2))

    return {
        "p_right": mean(scores.student.gather(-1, right[..., None])[..., 0].exp(), read),
        "kl_share_read": share(kl, read),
        "kl_share_misread": share(kl, misread),
        "kl_share_blind": share(kl, blind),
        "kl_share_overlooked": share(kl, blind & (scores.divergence >= DIVERGENT_NATS)),
        "tokens_blind": mean(blind.float(), valid),
        "tokens_read": mean(read.float(), valid),
        "weight_read": mean(relative, read),
        "weight_misread": mean(relative, misread),
        "kl_other": mean(kl, valid & ~read),
        "kl_read": mean(kl, read),
        "read_right": 1 - mean(misread.float(), read),
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
    at_once = max(1, ANSWERS_AT_ONCE[device.type] // len(batch.runs))
    pieces = zip(*(part.split(at_once, 1) for part in (cells, digits, numbers)), strict=True)
    found = [_evaluate_some(batch, students, *piece) for piece in pieces]
    return {name: torch.cat([each[name] for each in found], 1).nanmean(1).tolist() for name in found[0]}


def _evaluate_some(batch: Batch, students: Tensor, cells: Tensor, digits: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """Returns the numbers of each answer, (R, N)."""
    language = batch.language
    tokens, logits = batch.architecture.sample(students, cells, numbers)
    student, slots, valid = logits.log_softmax(-1), language.slots(tokens), language.valid(tokens)
    kl = (student.exp() * (student - batch.predict(tokens, cells))).sum(-1)
    here = slots[..., None, :] == torch.arange(language.digits, device=slots.device)[:, None]  # (R, N, m, T)
    there, wanted = here.any(-1), language.zero + digits
    at = student.gather(2, here.int().argmax(-1)[..., None].expand(*wanted.shape, student.shape[-1]))  # (R, N, m, V)
    # A digit that the response doesn't write counts as wrong.
    right = at.gather(-1, wanted[..., None])[..., 0].exp() * there
    other, read = valid & (slots < 0), slots >= 0
    return {
        "p_right": right.mean(-1),
        "all_right": right.prod(-1),
        "greedy": ((at.argmax(-1) == wanted) & there).float().mean(-1),
        "answer": (language.answers(tokens) == digits.amax(-1)).float(),
        "kl_other": torch.where(other, kl, 0).sum(-1) / other.sum(-1),
        "kl_read": torch.where(read, kl, 0).sum(-1) / read.sum(-1),
        "response_tokens": valid.sum(-1).float(),
    }


def prepare(runs: Sequence[Run], folder: Path, device: torch.device) -> tuple[Batch, Tensor]:
    """Returns a batch and its students (R, P); what pre-training the folder lacks is done first."""

    def name(kind: str, of: object) -> Path:
        return folder / f"{kind}-{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}.safetensors"

    eye = Eye().to(device).eval()
    eye.load_state_dict(keep(folder / "eye.safetensors", lambda: train_eye().state_dict()))
    batch = Batch(runs, eye, device)
    if batch.worlds[0].learned_teacher:
        made = keep(name("teacher", batch.worlds), lambda: {"teacher": batch.teach_teacher()})
        batch.learned = made["teacher"].to(device)
    # The student doesn't depend on what its world is called and who will teach it.
    own = [(replace(WORLDS[run.world], name="", meaning="", learned_teacher=False), run.seed) for run in runs]
    paths = [name("student", pair) for pair in own]
    missing = {path: (WORLDS[run.world], run.seed) for path, run in zip(paths, runs, strict=True) if not path.exists()}
    if missing:
        for path, student in zip(missing, batch.teach_students(list(missing.values())), strict=True):
            keep(path, lambda made=student: {"student": made})
    return batch, torch.stack([load_file(path)["student"] for path in paths]).to(device)


def split_batches(runs: Sequence[Run], at_once: int) -> list[list[Run]]:
    """Splits runs into batches that can share a forward, at most `at_once` together, in the order of their first."""
    alike: defaultdict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        world = WORLDS[run.world]
        alike[world.form, world.words, world.learned_teacher, run.prompts, run.siblings, run.steps].append(run)
    batches = [same[at : at + at_once] for same in alike.values() for at in range(0, len(same), at_once)]
    return sorted(batches, key=lambda batch: runs.index(batch[0]))


def write(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the results, a line for each run, with 4 decimals since the tables have 3, and NaN as null."""
    parse: dict[str, Any] = {"parse_float": lambda x: round(float(x), 4), "parse_constant": lambda _: None}
    lines = ",\n".join(json.dumps(json.loads(json.dumps(run), **parse), allow_nan=False) for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f'{{"steps": {STEPS}, "runs": [\n{lines}\n]}}\n')


def identify(run: dict[str, Any]) -> Run:
    """Returns the run that a line of the results is of."""
    return Run(**{name: run[name] for name in Run.__dataclass_fields__ if name in run})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=RUNS_AT_ONCE, help="cpu or cuda")
    parser.add_argument("--at-once", type=int, help=f"runs in one batch; default: {RUNS_AT_ONCE}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims-lab", help="pre-trained students")
    parser.add_argument("--stop-after-s", type=float, default=math.inf, help="begin no batch after so many seconds")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)  # small products gain little from more, and results stay the same
    options.work.mkdir(parents=True, exist_ok=True)
    finished = json.loads(options.results.read_text())["runs"] if options.results.exists() else []
    done = {identify(run) for run in finished}
    missing = [run for run in list_runs() if run not in done]
    batches = split_batches(missing, options.at_once or RUNS_AT_ONCE[device.type])
    print(f"{len(missing)} runs are missing: {len(batches)} batches on {device}", flush=True)
    started, trained = time.perf_counter(), 0
    for runs in itertools.takewhile(lambda _: time.perf_counter() - started <= options.stop_after_s, batches):
        finished += distil(*prepare(runs, options.work, device))
        write(finished, options.results)
        trained += len(runs)
        each_s = (time.perf_counter() - started) / trained
        left_min = each_s * (len(missing) - trained) / 60
        print(f"{trained} runs, {each_s:.1f} s each; about {left_min:.0f} minutes left", flush=True)


if __name__ == "__main__":
    main()
