"""Computes a lower bound for scoring a prompt group: operations, bytes, and a device's time for them.

`python benchmarks/floor.py` prints tables for the paper's setting, Qwen3-VL-8B as the teacher on one H100. The other
commands use `count_scoring_cost` for their own model and shapes. It counts matrix products (two operations per weight
and token), attention (causal if it is) and the bytes that must move. It leaves out norms, rotations, activation
functions, launches and any loss against the device's peak, so it is a lower bound. The ratio of two bounds is the gain
from less work if both sides are equally well implemented.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vaopd.vlm import memory

PUBLISHED_PARAMETERS = 8.77e9
# H100 SXM, NVIDIA's data sheet: bf16 on the tensor cores without sparsity, HBM3.
H100_FLOPS, H100_BYTES_PER_S = 989e12, 3.35e12
ITEM_BYTES = 2  # bf16
SETTINGS = ((400, 500), (650, 1000), (1000, 2000), (1500, 4000))
"""(P, R): settings within the paper's range."""
TEXT_TOKENS = 50
"""Tokens of a prompt that are text; the others are its image's."""

Side = Literal["engine", "known image", "careful", "shared image", "usual"]
SIDES: tuple[Side, ...] = ("engine", "known image", "shared image", "careful", "usual")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Operations, bytes moved, and the logits' bytes, the most memory besides weights and activations."""

    flops: float
    bytes: float
    logits_bytes: float

    @property
    def h100_s(self) -> float:
        """Seconds on an H100 if compute and memory traffic overlap completely."""
        return max(self.flops / H100_FLOPS, self.bytes / H100_BYTES_PER_S)


class Model:
    """The matrices of a Qwen3-VL, (in, out) each, from its sizes."""

    def __init__(self, sizes: memory.Model) -> None:
        self.vocabulary, self.width, self.layers = sizes.vocabulary, sizes.hidden, sizes.layers
        self.heads_width, self.kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.text_matrices = [
            (self.width, self.heads_width),
            (self.width, 2 * self.kv_width),
            (self.heads_width, self.width),
            (self.width, 2 * sizes.mlp),
            (sizes.mlp, self.width),
        ]
        self.vision_width, self.depth = sizes.vision_hidden, sizes.vision_depth
        self.vision_matrices = [
            (self.vision_width, 3 * self.vision_width),
            (self.vision_width, self.vision_width),
            (self.vision_width, sizes.vision_mlp),
            (sizes.vision_mlp, self.vision_width),
        ]
        self.merged = memory.MERGE**2
        joined = self.merged * self.vision_width
        self.merger_matrices = [(joined, joined), (joined, self.width)]
        self.mergers = 1 + sizes.deepstack
        self.patch_matrix = (3 * 2 * memory.PATCH_PX**2, self.vision_width)
        self.positions, self.tied = sizes.vision_positions, sizes.tied

    @classmethod
    def of(cls, config: Any) -> Model:
        """Reads the sizes of transformers' configuration."""
        return cls(memory.Model.from_config(config.to_dict(), name="the benchmark's model"))

    @property
    def text_weights(self) -> int:
        return self.layers * _count_weights(self.text_matrices)

    @property
    def vision_weights(self) -> int:
        return (
            self.depth * _count_weights(self.vision_matrices)
            + self.mergers * _count_weights(self.merger_matrices)
            + _count_weights([self.patch_matrix])
        )

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Number of weights, without norms and biases."""
        embeddings = self.head_weights * (1 if self.tied else 2)
        return self.text_weights + self.vision_weights + embeddings + self.positions * self.vision_width

    def count_vision_cost(self, image_tokens: int) -> tuple[float, float]:
        """Counts operations and bytes of activations for one image; every patch attends to every patch."""
        patches = self.merged * image_tokens
        layer = 2 * patches * _count_weights(self.vision_matrices) + 4 * patches**2 * self.vision_width
        merger = 2 * image_tokens * _count_weights(self.merger_matrices)
        flops = self.depth * layer + self.mergers * merger + 2 * patches * _count_weights([self.patch_matrix])
        moved = patches * self.depth * _count_widths(self.vision_matrices) + patches * _count_widths(
            [self.patch_matrix]
        )
        moved += self.mergers * image_tokens * _count_widths(self.merger_matrices)
        return flops, ITEM_BYTES * moved

    def count_text_cost(self, tokens: int, pairs: int, keys: int) -> tuple[float, float]:
        """Counts operations and bytes of activations of the text layers.

        pairs: of a query and a key that it attends to.
        keys: keys that have to be read for them.
        """
        flops = 2 * tokens * self.text_weights + 4 * self.heads_width * pairs * self.layers
        moved = self.layers * (tokens * _count_widths(self.text_matrices) + 2 * keys * self.kv_width)
        return flops, ITEM_BYTES * moved


def _count_weights(matrices: Sequence[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices)


def _count_widths(matrices: Sequence[tuple[int, int]]) -> int:
    """Counts the numbers read and written per token if every matrix's input and output pass through memory once."""
    return sum(rows + columns for rows, columns in matrices)


def count_scoring_cost(model: Model, side: Side, *, prompt: int, image_tokens: int, lengths: Sequence[int]) -> Cost:
    """Counts the cost of both views of one group.

    side: the implementation, as in benchmarks/competitors.py.
    lengths: tokens of each response.
    """
    rollouts, longest = len(lengths), max(lengths)
    own_pairs = [_count_causal_pairs(length) + length * prompt for length in lengths]
    if side in ("engine", "known image"):
        tokens, heads, forwards = prompt + sum(lengths), sum(lengths), 1
        pairs, keys = _count_causal_pairs(prompt) + sum(own_pairs), prompt + sum(prompt + length for length in lengths)
    else:
        rows = lengths if side == "usual" else [longest] * rollouts  # one by one, or padded
        tokens = sum(prompt + length for length in rows)
        pairs, keys = sum(_count_causal_pairs(prompt + length) for length in rows), tokens
        heads = tokens if side == "usual" else sum(lengths)
        forwards = 2 * rollouts if side == "usual" else 1
    images = {"engine": 1, "shared image": 1, "known image": 0}.get(side, rollouts)
    vision_flops, vision_bytes = model.count_vision_cost(image_tokens)
    text_flops, text_bytes = model.count_text_cost(tokens, pairs, keys)
    # A logit: written, read and widened to float32, read for the log-sum-exp; or written again by a log-softmax.
    per_logit = 2 * ITEM_BYTES + 4 + 4 + (4 if side == "usual" else 0)
    flops = 2 * (images * vision_flops + text_flops + 2 * heads * model.head_weights)
    weights = model.text_weights + model.head_weights + (model.vision_weights if images else 0)
    moved = ITEM_BYTES * weights * forwards
    moved += 2 * (images * vision_bytes + text_bytes + per_logit * heads * model.vocabulary)
    if side == "usual":
        logit_rows = prompt + longest  # of one rollout at a time
    elif side in ("engine", "known image"):
        logit_rows = min(1024, 2 * heads)  # one chunk
    else:
        logit_rows = 2 * heads
    kept = ITEM_BYTES + 4 + (4 if side == "usual" else 0)
    return Cost(flops=flops, bytes=moved, logits_bytes=kept * logit_rows * model.vocabulary)


def count_training_flops(
    model: Model,
    side: Literal["shared", "per sequence", "image shared"],
    *,
    prompt: int,
    image_tokens: int,
    lengths: Sequence[int],
) -> float:
    """Counts the operations of one view's forward and backward (twice the forward).

    At the heads: both models' forwards and the student's backward.
    """
    matching: dict[str, Side] = {"shared": "engine", "per sequence": "careful", "image shared": "shared image"}
    cost = count_scoring_cost(model, matching[side], prompt=prompt, image_tokens=image_tokens, lengths=lengths)
    head = 2 * sum(lengths) * model.head_weights
    return 3 * (cost.flops / 2 - head) + 4 * head


def _count_causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--groups", type=int, default=16, help="prompt groups of an optimizer step")
    options = parser.parse_args()
    model = Model(memory.MODELS["8B"])
    print(
        f"Qwen3-VL-8B: {model.parameters / 1e9:.2f} B parameters counted, {PUBLISHED_PARAMETERS / 1e9} B published; "
        f"text {model.text_weights / 1e9:.2f} B, vision {model.vision_weights / 1e9:.2f} B, head and embeddings "
        f"{model.head_weights / 1e9:.2f} B each.\n"
        f"One H100 SXM: {H100_FLOPS / 1e12:.0f} TFLOP/s in bf16 without sparsity, {H100_BYTES_PER_S / 1e12:.2f} TB/s.\n"
        f"K = {options.rollouts}; a step is {options.groups} groups; {TEXT_TOKENS} tokens of a prompt are text.\n"
    )
    print_floors(model, options.rollouts, options.groups)
    print_growth(model)


def count_cost_at(model: Model, side: Side, setting: tuple[int, int], rollouts: int) -> Cost:
    prompt, response = setting
    lengths = [response] * rollouts
    return count_scoring_cost(model, side, prompt=prompt, image_tokens=prompt - TEXT_TOKENS, lengths=lengths)


def print_floors(model: Model, rollouts: int, groups: int) -> None:
    header = (
        "P", "R", "side", "TFLOP per group", "GB moved", "compute, ms", "memory, ms", "floor per step, s",
        "of the engine's", "logits at once, GB",
    )  # fmt: skip
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for prompt, response in SETTINGS:
        engine_s = count_cost_at(model, "engine", (prompt, response), rollouts).h100_s
        for side in SIDES:
            cost = count_cost_at(model, side, (prompt, response), rollouts)
            cells = (
                prompt, response, side, f"{cost.flops / 1e12:.0f}", f"{cost.bytes / 1e9:.0f}",
                f"{1000 * cost.flops / H100_FLOPS:.0f}", f"{1000 * cost.bytes / H100_BYTES_PER_S:.0f}",
                f"{groups * cost.h100_s:.1f}", f"{cost.h100_s / engine_s:.2f} ×", f"{cost.logits_bytes / 1e9:.1f}",
            )  # fmt: skip
            print("| " + " | ".join(str(cell) for cell in cells) + " |")


def print_growth(model: Model) -> None:
    """Prints the gain for several K, and the sizes of the parts."""
    header = (
        "P", "R", "usual over engine: K 1", "K 4", "K 8", "K 16", "tokens of a K 4 group, both views",
        "hidden payload per rollout, MB", "vision features per view, MB",
    )  # fmt: skip
    print("\n| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for prompt, response in SETTINGS:
        factors = []
        for rollouts in (1, 4, 8, 16):
            usual, engine = (count_cost_at(model, side, (prompt, response), rollouts) for side in ("usual", "engine"))
            factors.append(usual.h100_s / engine.h100_s)
        payload = response * (2 * model.width + 12) / 1e6
        features = (prompt - TEXT_TOKENS) * model.mergers * model.width * ITEM_BYTES / 1e6
        tokens = 2 * (prompt + 4 * response)
        cells = (prompt, response, *(f"{f:.2f} ×" for f in factors), tokens, f"{payload:.1f}", f"{features:.1f}")
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
