"""VA-OPD in a plain PyTorch loop: transformers samples, a running teacher scores, AdamW steps.

    vaopd teacher configs/tiny.toml                                                     # in another terminal
    python examples/plain_pytorch_loop.py --student models/tiny-student --data data/handwritten-geometry --steps 20

There is no Redis and no rollout worker. For another trainer, copy the three functions in the middle: `make_request`,
`weigh` and `compare`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaopd.client import GroupFailure, SyncTeacherClient
from vaopd.data.loaders import load_prompts
from vaopd.divergence import fused_reverse_kl
from vaopd.images import decode
from vaopd.objective import group_weights, pad_rows, visual_advantage
from vaopd.payloads import decode as decode_payload
from vaopd.payloads import to_torch
from vaopd.types import GroupScore, Prompt, ScoreRequest, images_in_order
from vaopd.vlm.prompts import chat, tokenizer_fingerprint
from vaopd.vlm.torchvision_compat import ensure_torchvision


def make_request(group_id: str, prompt: Prompt, prompt_ids: Tensor, responses: list[Tensor]) -> ScoreRequest:
    """Makes one prompt group for the teacher from the token ids that the student read and sampled."""
    return ScoreRequest(
        group_id=group_id,
        prompt_token_ids=prompt_ids.cpu().numpy().astype(np.int32),
        responses=tuple(response.cpu().numpy().astype(np.int32) for response in responses),
        images=images_in_order(prompt.messages, prompt.images),
    )


def weigh(score: GroupScore) -> Tensor:
    """Returns the weight of every token of a group, its rollouts one after the other: (M,), which sum to 1."""
    teacher_KT, mask_KT = pad_rows(score.teacher_logprobs)
    degraded_KT, _ = pad_rows(score.degraded_logprobs)
    va_KT = visual_advantage(teacher_KT, degraded_KT, mask_KT)
    return group_weights(va_KT, mask_KT).token_weights[mask_KT]


def compare(hidden_MD: Tensor, head: Tensor, score: GroupScore, teacher_head: Tensor) -> Tensor:
    """Returns the exact reverse KL over the whole vocabulary, from the final hidden states of both models: (M,)."""
    teacher_hidden = decode_payload(score.payload)["hidden"].to(hidden_MD.device)
    return fused_reverse_kl(hidden_MD, head[: len(teacher_head)], teacher_hidden, teacher_head)


def prepare_inputs(prompt: Prompt, processor: Any) -> Any:
    """Renders the prompt by the student's chat template and processes its images."""
    images = [decode(image) for image in images_in_order(prompt.messages, prompt.images)]
    text = processor.apply_chat_template(chat(prompt.messages), tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=images or None, return_tensors="pt")


def sample(model: Any, inputs: Any, *, count: int, max_new_tokens: int, forbidden: list[int]) -> list[Tensor]:
    """Samples `count` responses, each up to its end-of-turn token, which is included."""
    ends = torch.tensor(model.generation_config.eos_token_id).flatten()
    with torch.no_grad():
        sequences = model.generate(
            **inputs, do_sample=True, temperature=0.7, top_p=0.95, top_k=0, num_return_sequences=count,
            max_new_tokens=max_new_tokens, suppress_tokens=forbidden,
        )  # fmt: skip
    responses = []
    for sequence in sequences[:, inputs["input_ids"].shape[1] :]:
        ended = torch.isin(sequence, ends.to(sequence.device)).nonzero()
        responses.append(sequence[: int(ended[0]) + 1] if len(ended) else sequence)
    return responses


def compute_hidden(model: Any, inputs: Any, responses: list[Tensor]) -> Tensor:
    """Returns the hidden states that predict each response token: (M, D). One sequence at a time, for simplicity."""
    rows = []
    length = inputs["input_ids"].shape[1]
    for response in responses:
        ids = torch.cat([inputs["input_ids"][0], response])[None]
        extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in extra:  # newer processors distinguish text and images by it
            extra["mm_token_type_ids"] = torch.nn.functional.pad(extra["mm_token_type_ids"], (0, len(response)))
        hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra)
        rows.append(hidden.last_hidden_state[0, length - 1 : -1])
    return torch.cat(rows)


def main() -> None:
    """Trains the student on the command line's data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--student", default="models/tiny-student", metavar="MODEL")
    parser.add_argument("--data", default="data/handwritten-geometry", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4, metavar="B", help="prompts in a step")
    parser.add_argument("--rollouts", type=int, default=4, metavar="K", help="rollouts of each")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    options = parser.parse_args()

    ensure_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(options.student)
    model: Any = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32)
    model.to(device)
    # A response must not contain image placeholders: neither model could read it.
    config = model.config
    forbidden = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    prompts = load_prompts(options.data, split="train")

    fingerprint = tokenizer_fingerprint(processor.tokenizer)
    with SyncTeacherClient(options.teacher, job="plain-loop", tokenizer_fingerprint=fingerprint) as teacher:
        teacher_head = to_torch(teacher.head()).to(device)
        for step in range(options.steps):
            batch = [prompts[(step * options.prompts + index) % len(prompts)] for index in range(options.prompts)]
            inputs = [prepare_inputs(prompt, processor).to(device) for prompt in batch]
            sampled = [
                sample(model, each, count=options.rollouts, max_new_tokens=64, forbidden=forbidden) for each in inputs
            ]
            groups = [
                make_request(str(index), prompt, inputs[index]["input_ids"][0], sampled[index])
                for index, prompt in enumerate(batch)
            ]
            total, mean_va = 0.0, 0.0
            for score in teacher.score(groups):  # in the order in which the teacher finishes them
                if isinstance(score, GroupFailure):
                    raise score.error
                index = int(score.group_id)
                hidden = compute_hidden(model, inputs[index], sampled[index])
                kl = compare(hidden, model.get_output_embeddings().weight, score, teacher_head)
                loss = (weigh(score).to(device) * kl).sum() / options.prompts
                loss.backward()
                total += float(loss.detach())
                mean_va += float(np.concatenate(score.visual_advantage).mean()) / options.prompts
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}/{options.steps}  loss {total:.4f}  mean VA {mean_va:.3f}", flush=True)


if __name__ == "__main__":
    main()
