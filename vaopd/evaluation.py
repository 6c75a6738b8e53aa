r"""Judges responses: the first committed answer counts, and equality is mathematical.

>>> committed_answer(r"Either \boxed{12} or \boxed{13}.")
'12'
>>> is_correct(r"So it is \boxed{\frac{1}{2}}.", "0.5")
True
>>> avg_at_n([[True, False], [True, True]])
0.75
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from vaopd.errors import InvalidInput
from vaopd.types import GroupId, Prompt, RolloutRequest, SamplingSettings

if TYPE_CHECKING:
    from vaopd.config import Config

MAX_ANSWER_CHARS = 300
"""A longer "answer" is a runaway response; it is compared as text only."""

_BOXED = re.compile(r"\\f?boxed\s*\{")
# "The answer is 12." or "Answer: 12": up to the end of the sentence; a point between digits doesn't end it.
_ANSWER_IS = re.compile(r"\banswer\s*(?:is|:)\s*:?\s*(.+?)(?:\.(?!\d)|[\n;]|$)", re.IGNORECASE)
# Expressions that can keep a computer algebra system busy for ever: towers and large exponents, and factorials.
# math-verify's own timeout is a signal, which only the main thread may set, so these are compared as text instead.
_COSTLY = re.compile(r"(\^|\*\*).*(\^|\*\*)|(\^|\*\*)\s*\{?\s*-?\d{4,}|!|\\(sum|prod|int|lim)\b", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutResult:
    """A held-out accuracy: mean correctness over prompts and samples (avg@n), with its standard error over prompts.

    Both in [0, 1].
    """

    accuracy: float
    standard_error: float
    prompts: int
    samples: int

    def __str__(self) -> str:
        of = f"avg@{self.samples}, {self.prompts} problems"
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%} ({of})"


def held_out_prompts(config: Config) -> Sequence[Prompt]:
    """Loads the first `evaluation.prompts` of the validation split, shuffled with seed 42 whatever the run's seed."""
    from vaopd.data.loaders import load_prompts
    from vaopd.files.hub import read_control_tokens

    return load_prompts(
        config.data.validation_source or config.data.source,
        split=config.data.validation_split,
        limit=config.evaluation.prompts,
        shuffle_seed=42,  # method.md
        instruction=config.data.instruction or None,
        control_tokens=read_control_tokens(config.student.model),
    )


def held_out_requests(prompts: Sequence[Prompt], *, version: int, config: Config) -> Iterator[RolloutRequest]:
    """Yields a request for each held-out prompt, to be answered by policy version `version`."""
    settings = SamplingSettings(
        temperature=config.evaluation.temperature,
        top_p=1.0,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
    )
    for index, prompt in enumerate(prompts):
        yield RolloutRequest(
            group_id=str(GroupId(purpose="eval", step=version, index=index)),
            messages=prompt.messages,
            images=prompt.images,
            num_rollouts=config.evaluation.samples,
            sampling=settings,
            policy_version=version,
        )


def held_out_result(correct: Mapping[str, Sequence[bool]]) -> HeldOutResult:
    """Computes the accuracy from each prompt's samples, right or wrong, by group id; equally many for all."""
    rows = list(correct.values())
    accuracy = avg_at_n(rows)
    means = np.array([np.mean(row) for row in rows])
    return HeldOutResult(
        accuracy=accuracy,
        standard_error=float(means.std() / math.sqrt(len(means))),
        prompts=len(rows),
        samples=len(rows[0]),
    )


def committed_answer(text: str) -> str | None:
    r"""Returns the first answer that the response commits to, or None.

    It is the content of the first complete \boxed{…}; without one, the text after the first "answer is".
    """
    for start in _BOXED.finditer(text):
        content = _read_balanced(text, start.end())
        if content is not None:
            return content.strip() or None
    said = _ANSWER_IS.search(text)
    if said is None:
        return None
    return said.group(1).strip().strip("$*").strip() or None


def is_correct(response_text: str, answer: str) -> bool:
    """Whether the response's committed answer equals the reference; without one it is wrong.

    Raises InvalidInput when the reference is empty.
    """
    if not answer.strip():
        raise InvalidInput("the reference answer is empty, so no answer can be compared with it; drop or correct it")
    committed = committed_answer(response_text)
    # ViRL39K writes its references as \boxed{…}.
    reference = committed_answer(answer) if _BOXED.match(answer.strip()) else answer.strip()
    return committed is not None and _are_equal(committed, reference or answer.strip())


def avg_at_n(correct: Sequence[Sequence[bool]]) -> float:
    """Returns avg@n: the mean, over questions, of the share of right samples (not best-of, not a vote)."""
    if not correct or not all(len(samples) for samples in correct):
        raise InvalidInput(f"avg@n needs at least one question and one sample of each, got {len(correct)} questions")
    return sum(sum(samples) / len(samples) for samples in correct) / len(correct)


def _read_balanced(text: str, start: int) -> str | None:
    """Returns the text from `start` to the brace that closes the one before it; None if the response was cut off."""
    depth = 1
    for end in range(start, len(text)):
        if text[end] in "{}" and text[end - 1] != "\\":
            depth += 1 if text[end] == "{" else -1
            if depth == 0:
                return text[start:end]
    return None


@lru_cache(maxsize=4096)
def _are_equal(committed: str, answer: str) -> bool:
    if committed == answer:
        return True
    if max(len(committed), len(answer)) > MAX_ANSWER_CHARS or _COSTLY.search(committed) or _COSTLY.search(answer):
        return False
    from math_verify import parse, verify

    # It warns, once per process, that it runs without its timeout: that is intended (see _COSTLY).
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    reference = parse(f"${answer}$", parsing_timeout=None)
    given = parse(f"${committed}$", parsing_timeout=None)
    return bool(verify(reference, given, timeout_seconds=None))
