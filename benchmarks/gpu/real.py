"""The recipe's own student samples on its own data, and its teacher scores that against a plain forward."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import groups
import numpy as np
import PIL.Image
import timing
import torch

from benchmarks.gpu.measure import Check, measure_s
from benchmarks.gpu.models import make_engine
from benchmarks.gpu.recipe import CONFIG, list_settings
from benchmarks.gpu.teacher import COMPARED_TOKENS, score_plainly
from vaopd.config import Config, load_config
from vaopd.data.loaders import load_prompts
from vaopd.degradation import degrade
from vaopd.files.hub import model_folder
from vaopd.run.snapshots import describe_model
from vaopd.sampling.build import build_engine
from vaopd.types import Degradation, GroupId, Prompt, RolloutGroup
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines.engine import PreparedGroup
from vaopd_trainer.prompt_order import make_request

GROUPS = 16 if timing.ON_GPU else 2


def run(check: Check) -> None:
    check.models.drop()
    with tempfile.TemporaryDirectory(prefix="vaopd-real-") as name:
        # Without a GPU in this process: vLLM takes half a minute to start, and the phase `recipe` has it.
        engine = [] if timing.ON_GPU else ["rollout.engine=transformers"]
        config = load_config(CONFIG, [*list_settings(Path(name)), *engine])
        data = config.data
        prompts = load_prompts(data.source, split=data.train_split, limit=GROUPS, instruction=data.instruction or None)
        sampled = sample(check, config, list(prompts))
        score(check, config, list(prompts), sampled)


def sample(check: Check, config: Config, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
    """Samples every prompt's rollouts at once, with weights that are loaded as a policy version's are."""
    requests = [
        make_request(prompt, group=GroupId(purpose="train", step=0, index=index), version=0, config=config)
        for index, prompt in enumerate(prompts)
    ]
    start = time.perf_counter()
    with closing(build_engine(config, worker="benchmark")) as engine:
        started = time.perf_counter()
        policy = describe_model(model_folder(config.student.model, role="student"))
        written = time.perf_counter()
        engine.load_policy(policy)
        loaded = time.perf_counter()
        found = engine.generate(requests)
        ended = time.perf_counter()
    sampled = [group for group in found if isinstance(group, RolloutGroup)]
    lengths = [len(rollout.response_ids) for group in sampled for rollout in group.rollouts]
    rate = sum(lengths) / (ended - loaded)
    check.tell(
        f"{config.rollout.engine} samples {len(lengths)} rollouts",
        f"{ended - loaded:.1f} s, {rate:.0f} tokens/s, lengths {min(lengths)} to {max(lengths)}, mean "
        f"{np.mean(lengths):.0f}; started in {started - start:.1f} s, weights loaded in {loaded - written:.2f} s",
        target="all groups",
        ok=len(sampled) == len(requests),
        tokens_s=rate,
        load_s=loaded - written,
    )
    return sampled


@torch.inference_mode()
def score(check: Check, config: Config, prompts: Sequence[Prompt], sampled: Sequence[RolloutGroup]) -> None:
    """Scores each group alone, both views; compares those that are small enough with a plain forward."""
    vlm = Vlm.load(
        config.teacher.model,
        dtype=config.teacher.dtype,
        device=timing.DEVICE,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )
    prepared = [prepare(vlm, prompt, group) for prompt, group in zip(prompts, sampled, strict=True)]
    engine = make_engine(vlm)
    (result,) = groups.score(engine, prepared[:1])  # warm
    seconds = [measure_s(lambda one=one: groups.score(engine, [one]), repeats=1, warm=0) for one in prepared]
    tokens = [2 * (len(one.original.token_ids) + sum(map(len, one.responses))) for one in prepared]
    check.tell(
        f"{Path(config.teacher.model).name} scores {len(prepared)} groups, one a forward",
        f"{1e3 * np.mean(seconds):.0f} ms a group, {sum(tokens) / sum(seconds):.0f} tokens/s of both views; mean "
        f"visual advantage {result.columns['visual_advantage'].mean():.4f} in the first",
        tokens_s=sum(tokens) / sum(seconds),
        ms=1e3 * float(np.mean(seconds)),
    )
    small = [one for one in prepared if sum(map(len, one.responses)) <= COMPARED_TOKENS][:4]
    for one in small:
        plain = score_plainly(vlm, one)
        spread = np.abs(plain - score_plainly(vlm, one, rows_at_once=1)).mean()
        difference = np.abs(plain - groups.logprobs(groups.score(engine, [one])))
        check.tell(
            f"log-probs of {one.group_id} against a plain forward",
            f"differ by {difference.mean():.1e} nats in the mean, {difference.max():.1e} at most; two plain ones by "
            f"{spread:.1e}",
            target="mean ≤ 0.02, or what plain ones differ by",
            ok=difference.mean() <= max(0.02, 1.1 * spread),
            mean_nats=float(difference.mean()),
        )


def prepare(vlm: Vlm, prompt: Prompt, group: RolloutGroup) -> PreparedGroup:
    """Prepares a sampled group as the teacher's service does."""
    pictures = {image.sha256: PIL.Image.open(io.BytesIO(image.data)).convert("RGB") for image in prompt.images}
    original, degraded = (
        vlm.render(prompt.messages, {name: vlm.prepare_image(view(picture)) for name, picture in pictures.items()})
        for view in (lambda picture: picture, lambda picture: degrade(picture, Degradation(), seed=0))
    )
    return PreparedGroup(
        group_id=group.group_id,
        original=original,
        degraded=degraded,
        responses=tuple(rollout.response_ids.astype(np.int64) for rollout in group.rollouts),
        payload="hidden",
        top_k=0,
    )
