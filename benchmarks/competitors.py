"""Plain transformers implementations to compare the engine and the trainer's forward with.

*usual*: each rollout by itself with its image, logits of all positions, log-softmax, gather. *careful*: the rollouts of
a group in one right-padded batch, each row with its image, LM head on response rows only; optionally the image's
features are computed once for all of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import timing
import torch

from vaopd.vlm.prompts import PreparedPrompt
from vaopd_teacher.engines.engine import PreparedGroup


def make_inputs(model: Any, prompts: Sequence[PreparedPrompt], rows: Sequence[np.ndarray]) -> dict[str, Any]:
    """Returns a right-padded batch as a processor does; every row has its own image."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.from_numpy(row)
        mask[index, : len(row)] = 1
    images = [image for prompt in prompts for image in prompt.images]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": torch.cat([image.pixel_values for image in images]),
        "image_grid_thw": torch.tensor([image.grid for image in images]),
    }
    return {name: tensor.to(timing.DEVICE) for name, tensor in inputs.items()} | {"use_cache": False}


def list_rows(group: PreparedGroup) -> list[tuple[PreparedPrompt, np.ndarray]]:
    """Returns prompt and response of each row in both views, original first."""
    return [(prompt, ids) for prompt in (group.original, group.degraded) for ids in group.responses]


@torch.inference_mode()
def score_usual(model: Any, group: PreparedGroup, *, vocab_size: int | None = None) -> np.ndarray:
    """Scores the rollouts one by one: (2·M,) log-probs of the response tokens, over the first `vocab_size` ids."""
    parts = []
    for prompt, response in list_rows(group):
        inputs = make_inputs(model, [prompt], [np.concatenate((prompt.token_ids, response))])
        logits = model(**inputs).logits[:, :-1, :vocab_size].float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
        parts.append(logprobs[0, len(prompt.token_ids) - 1 :].cpu().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def score_careful(model: Any, group: PreparedGroup, *, share_image: bool, vocab_size: int | None = None) -> np.ndarray:
    """Scores both views as one batch: (2·M,) log-probs of the response tokens, over the first `vocab_size` ids."""
    prompts, responses = zip(*list_rows(group), strict=True)
    hidden = compute_response_hidden(model, prompts, responses, share_image=share_image)
    ids = torch.from_numpy(np.concatenate(responses)).to(hidden.device)
    logits = (hidden @ model.get_output_embeddings().weight.T)[:, :vocab_size].float()
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).cpu().numpy()


def compute_response_hidden(
    model: Any, prompts: Sequence[PreparedPrompt], responses: Sequence[np.ndarray], *, share_image: bool
) -> torch.Tensor:
    """Computes the hidden states (M, D) that predict the response tokens; row i is prompts[i] and responses[i]."""
    rows = [np.concatenate((p.token_ids, r[:-1])) for p, r in zip(prompts, responses, strict=True)]
    inputs = make_inputs(model, prompts, rows)
    if share_image:
        del inputs["pixel_values"]
        inputs["mm_encoder_outputs"] = {"image": share_features(model, prompts)}
    hidden = model.model(**inputs).last_hidden_state
    starts = [len(prompt.token_ids) - 1 for prompt in prompts]
    return torch.cat(
        [hidden[i, start : start + len(r)] for i, (start, r) in enumerate(zip(starts, responses, strict=True))]
    )


def share_features(model: Any, prompts: Sequence[PreparedPrompt]) -> Any:
    """Runs the vision tower once over the distinct images, and repeats its output for their rows."""
    images = [image for prompt in prompts for image in prompt.images]
    distinct = list({id(image): image for image in images}.values())
    features = model.model.get_image_features(
        torch.cat([image.pixel_values for image in distinct]).to(timing.DEVICE),
        torch.tensor([image.grid for image in distinct], device=timing.DEVICE),
        return_dict=True,
    )
    place = {id(image): index for index, image in enumerate(distinct)}
    order = [place[id(image)] for image in images]
    features.pooler_output = [features.pooler_output[i] for i in order]
    features.deepstack_features = [[layer[i] for i in order] for layer in features.deepstack_features]
    return features
