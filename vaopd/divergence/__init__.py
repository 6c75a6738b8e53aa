"""Per-token divergences between student and teacher over the logical vocabulary, at temperature 1.

`measures.py` has the formulas, `targets.py` the forms in which the teacher's distribution arrives, `fused.py` goes
through the tokens in chunks. In: hidden states and LM head of the student, a target of the teacher. Out: a divergence
per token in nats, and its gradients.

Shapes: M response tokens, m of them in a chunk, V logical vocabulary, D_S and D_T hidden sizes.
"""

from vaopd.divergence.fused import (
    CHUNK_LOGITS,
    fused_divergence,
    fused_loss,
    fused_loss_and_logprobs,
    fused_reverse_kl,
    token_logprobs,
    top_k_logprobs,
)
from vaopd.divergence.head import head_logits, pad_head
from vaopd.divergence.measures import DIVERGENCES, reverse_kl
from vaopd.divergence.targets import FullTarget, SampledTarget, Target, TopKTarget

__all__ = [
    "CHUNK_LOGITS",
    "DIVERGENCES",
    "FullTarget",
    "SampledTarget",
    "Target",
    "TopKTarget",
    "fused_divergence",
    "fused_loss",
    "fused_loss_and_logprobs",
    "fused_reverse_kl",
    "head_logits",
    "pad_head",
    "reverse_kl",
    "token_logprobs",
    "top_k_logprobs",
]
