"""Rollouts of a student with LoRA: every engine's log-probs are those of the adapters last loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.rollouts import MAX_PIXELS, PlainStudent, ask, noise_image, random_student
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.config import LoraConfig
from vaopd.run.snapshots import publish_adapter, write_model
from vaopd.sampling.engine import RolloutEngine
from vaopd.types import PolicyVersion, RolloutGroup
from vaopd.vlm import vllm_start
from vaopd.vlm.adapters import add_adapters, describe_adapters, load_adapters, merge_adapters, name_adapters
from vaopd.vlm.model import Vlm

LORA = LoraConfig(rank=3, alpha=6)


class Published(NamedTuple):
    base: Path
    policies: list[PolicyVersion]
    references: list[PlainStudent]
    """Plain transformers on W + BA: tests/unit/test_adapters.py shows that this is the trainer's model."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("lora")
    base = Path(random_student(folder, version=0).path)
    student = Vlm.load(base)
    add_adapters(student, LORA, vision_tower=True)
    settings = describe_adapters(student.model, base=str(base))
    policies, references = [], []
    for version in range(2):
        generator = torch.Generator().manual_seed(version)
        state = name_adapters(student.model.state_dict())
        load_adapters(student.model, {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()})
        policies.append(publish_adapter(folder, version, state, settings=settings))
        (merged := folder / f"merged{version}").mkdir()
        tensors = merge_adapters(base, Path(policies[-1].path), dtype=torch.float32)
        write_model(merged, tensors, model_files_from=base)
        references.append(PlainStudent(PolicyVersion(version=version, path=str(merged), sha256="")))
    return Published(base, policies, references)


@pytest.fixture(params=["transformers", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vllm", "vllm, merged"))])
def engine(
    request: pytest.FixtureRequest, published: Published, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RolloutEngine]:
    settings = {"worker": "w", "dtype": "float32", "max_pixels": MAX_PIXELS, "lora": LORA}
    if request.param == "transformers":
        from vaopd.sampling.transformers_engine import TransformersEngine

        engine: RolloutEngine = TransformersEngine(published.base, **settings)
    else:
        pytest.importorskip("vllm")
        from vaopd.sampling.vllm_engine import VllmEngine

        if request.param == "vllm, merged":  # as for a family that vLLM's LoRA doesn't cover
            monkeypatch.setattr(vllm_start, "_EXACT_LORA", ())
        engine = VllmEngine(str(published.base), options={"max_model_len": 256}, **settings)
    yield engine
    engine.close()


@pytest.mark.numeric
def test_logprobs_are_those_of_the_adapters_after_each_update(engine: RolloutEngine, published: Published) -> None:
    # One image throughout: what the old adapters computed, features or keys, must not be met again.
    image = noise_image(0)
    for version, reference in enumerate(published.references):
        engine.load_policy(published.policies[version])
        request = ask(images=(image,), version=version, temperature=0.7, top_p=0.95)

        group = engine.generate([request])[0]

        assert isinstance(group, RolloutGroup), group
        for rollout in group.rollouts:
            error = reference.sampled_error(request, rollout.response_ids)
            assert_within(rollout.rollout_logprobs, reference.sampled_logprobs(request, rollout.response_ids), error)
            stale = published.references[1 - version].sampled_logprobs(request, rollout.response_ids)
            assert_noticed(stale, rollout.rollout_logprobs, error)
