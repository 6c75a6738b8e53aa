"""VA-OPD in TRL: a GRPOTrainer whose completions are scored by a running teacher; no reward, no policy gradient.

    vaopd teacher configs/tiny.toml                                                     # in another terminal
    python examples/trl_trainer.py --student models/tiny-student --data data/handwritten-geometry --steps 20

TRL samples `num_generations` completions of each prompt, which is a prompt group, and keeps the optimizer, the
schedule, logging, checkpoints and the ranks. Two of its methods are replaced: one asks the teacher, one computes the
loss. Both are internals of TRL: written for and tested with 1.16 (pip install 'trl==1.16.*'), on one rank.
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from plain_pytorch_loop import weigh
from torch import Tensor

from vaopd.client import GroupFailure, SyncTeacherClient
from vaopd.data.loaders import load_prompts
from vaopd.divergence import fused_reverse_kl
from vaopd.images import decode
from vaopd.payloads import decode as decode_payload
from vaopd.payloads import to_torch
from vaopd.types import EncodedImage, Prompt, ScoreRequest, TextPart, images_in_order
from vaopd.vlm.prompts import tokenizer_fingerprint
from vaopd.vlm.torchvision_compat import ensure_torchvision

ensure_torchvision()  # TRL imports torchvision; this helps a CUDA build of it beside a CPU torch, and does nothing else
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Returns rewards of 0, which GRPO requires; the teacher's distribution replaces them here."""
    return [0.0] * len(completions)


class VisualAdvantageTrainer(GRPOTrainer):
    """Asks `teacher` once for each prompt group; `teacher_head` (V, D) turns its hidden states into logits."""

    def __init__(self, *, teacher: SyncTeacherClient, teacher_head: Tensor, **options: Any) -> None:
        super().__init__(reward_funcs=no_reward, **options)
        self._teacher = teacher
        self._teacher_head = teacher_head.to(self.accelerator.device)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds token weights and the teacher's hidden states, padded to C tokens, to TRL's batch of N completions.

        The rollout weights compare siblings, so they are computed here, before TRL shuffles and splits the batch.
        """
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        count = self.num_generations
        if len(inputs) % count:
            raise ValueError(
                f"{len(inputs)} completions on a rank are no whole groups of {count}; make "
                "per_device_train_batch_size x steps_per_generation a multiple of num_generations"
            )
        mask_NC = batch["completion_mask"].bool()
        weights_NC = torch.zeros(mask_NC.shape, device=mask_NC.device)
        hidden_NCD = weights_NC.new_zeros(*mask_NC.shape, self._teacher_head.shape[1])
        requests = [
            ScoreRequest(
                group_id=str(start),
                prompt_token_ids=select_ids(batch["prompt_ids"][start], batch["prompt_mask"][start]),
                responses=tuple(
                    select_ids(batch["completion_ids"][n], mask_NC[n]) for n in range(start, start + count)
                ),
                images=tuple(encode(image) for image in inputs[start].get("images") or ()),
            )
            for start in range(0, len(inputs), count)
        ]
        for score in self._teacher.score(requests):
            if isinstance(score, GroupFailure):
                raise score.error
            rows = slice(int(score.group_id), int(score.group_id) + count)
            mask_KC = mask_NC[rows]
            weights_NC[rows] = weights_NC[rows].masked_scatter(mask_KC, weigh(score).to(weights_NC))
            hidden_NCD[rows] = hidden_NCD[rows].masked_scatter(
                mask_KC[..., None], decode_payload(score.payload)["hidden"].to(hidden_NCD)
            )
            self._metrics["train"]["mean_va"].append(float(np.concatenate(score.visual_advantage).mean()))
        return {**batch, "token_weights": weights_NC, "teacher_hidden": hidden_NCD}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Returns the microbatch's share of (1/B) Σ weights · KL over the step's B groups; TRL adds the shares up."""
        ids_NT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        seen = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
        outputs = model(
            input_ids=ids_NT,
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            **{name: inputs[name] for name in seen if name in inputs},
            output_hidden_states=True,
            logits_to_keep=1,  # all of them would take (N, C, V)
            use_cache=False,
        )
        mask_NC = inputs["completion_mask"].bool()
        hidden_NCD = outputs.hidden_states[-1][:, -mask_NC.shape[1] - 1 : -1]  # each predicts the token after it
        head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        kl_M = fused_reverse_kl(
            hidden_NCD[mask_NC], head[: len(self._teacher_head)], inputs["teacher_hidden"][mask_NC], self._teacher_head
        )
        groups = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps / self.num_generations
        return (inputs["token_weights"][mask_NC] * kl_M).sum() / groups


def select_ids(padded: Tensor, mask: Tensor) -> np.ndarray:
    """Returns the token ids without their padding, as the teacher's client takes them."""
    return padded[mask.bool()].cpu().numpy().astype(np.int32)


def encode(image: PIL.Image.Image) -> EncodedImage:
    """Encodes the pixels that the student sees."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return EncodedImage(data=file.getvalue())


def make_row(prompt: Prompt) -> dict[str, Any]:
    """Returns the prompt as TRL reads it: a conversation, and its images beside it."""
    question = "".join(p.text for m in prompt.messages for p in m.content if isinstance(p, TextPart)).strip()
    images = [decode(image).convert("RGB") for image in images_in_order(prompt.messages, prompt.images)]
    return {"prompt": [{"role": "user", "content": question}], "images": images}


def configure(
    folder: str, *, steps: int, prompts: int, rollouts: int, learning_rate: float, forbidden: list[int]
) -> Any:
    """Takes one optimizer step per `prompts` whole groups, each group a microbatch; samples as the paper does."""
    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=rollouts,
        gradient_accumulation_steps=prompts,
        num_generations=rollouts,
        max_completion_length=64,
        temperature=0.7,
        top_p=0.95,
        top_k=0,
        # A response must not contain image placeholders: neither model could read it.
        generation_kwargs={"suppress_tokens": forbidden},
        beta=0.0,  # no reference model
        learning_rate=learning_rate,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        disable_dropout=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )


def main() -> None:
    """Trains the student on the command line's data and saves it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--student", default="models/tiny-student", metavar="MODEL")
    parser.add_argument("--data", default="data/handwritten-geometry", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4, metavar="B", help="prompts in a step")
    parser.add_argument("--rollouts", type=int, default=4, metavar="K", help="rollouts of each")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--output", default="runs/trl", metavar="FOLDER", help="where the student is saved")
    options = parser.parse_args()

    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(options.student)
    model: Any = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    fingerprint = tokenizer_fingerprint(processor.tokenizer)
    prompts = load_prompts(options.data, split="train")
    needed = range(min(len(prompts), options.steps * options.prompts))
    with SyncTeacherClient(options.teacher, job="trl", tokenizer_fingerprint=fingerprint) as teacher:
        trainer = VisualAdvantageTrainer(
            teacher=teacher,
            teacher_head=to_torch(teacher.head()),
            model=model,
            processing_class=processor,
            train_dataset=datasets.Dataset.from_list([make_row(prompts[index]) for index in needed]),
            args=configure(
                options.output,
                steps=options.steps,
                prompts=options.prompts,
                rollouts=options.rollouts,
                learning_rate=options.learning_rate,
                forbidden=[getattr(model.config, name) for name in names],
            ),
        )
        trainer.train()
        trainer.save_model(options.output)


if __name__ == "__main__":
    main()
