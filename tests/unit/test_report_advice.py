"""What `vaopd watch` and the report say of the regime that a run is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vaopd.report.advice import STEPS, describe_regime
from vaopd.run.records import Run


def a_run(values: dict[str, float], *, steps: int = STEPS, **objective: Any) -> Run:
    return Run(
        folder=Path("r"),
        config_text="",
        config={"objective": objective},
        train=tuple({"step": step, **values} for step in range(steps)),
        evaluations=(),
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kl_unseen_share": 0.68}, "68% of the divergence lies on tokens with no visual advantage"),
        ({"high_ties_share": 0.5}, "50% of the high group has the same VA"),
        ({"va_spread": 0.004}, "differs by 0.004 nats only"),
    ],
)
def test_each_regime_has_its_sentence(values: dict[str, float], words: str) -> None:
    [sentence] = describe_regime(a_run(values))
    assert words in sentence
    assert describe_regime(a_run(values, steps=STEPS - 1)) == []
    assert describe_regime(a_run(values, variant="standard")) == []


def test_a_remedy_that_was_taken_is_not_recommended() -> None:
    values = {"kl_unseen_share": 0.9, "high_ties_share": 0.9, "va_spread": 0.0}
    assert len(describe_regime(a_run(values))) == 3
    assert describe_regime(a_run(values, token_score="view_divergence", rollout_deviation_floor=0.02)) == []
    assert len(describe_regime(a_run(values, variant="rollout_weights"))) == 1


def test_nothing_is_said_of_a_good_regime_or_of_numbers_that_are_not_there() -> None:
    assert describe_regime(a_run({"kl_unseen_share": 0.1, "high_ties_share": 0.0, "va_spread": 0.1})) == []
    assert describe_regime(a_run({})) == []
