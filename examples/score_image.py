"""Which tokens of an answer depend on seeing the image? A notebook in cells, and a script.

Run it beside a running system (`vaopd demo` or `vaopd up CONFIG`), cell by cell in an editor that supports `# %%`, or
as `python examples/score_image.py [URL]`. It needs only the client: pip install '.[http]'.
"""

# %% The API and its teachers
from __future__ import annotations

import sys
from pathlib import Path

from vaopd.http_client import ScoringClient, ask
from vaopd.http_types import DegradationModel

URL = next((argument for argument in sys.argv[1:] if argument.startswith("http")), "http://127.0.0.1:8080")
IMAGE = Path(__file__).parents[1] / "services" / "vaopd_api" / "page" / "examples" / "triangle.png"
QUESTION = "Find the perimeter of the triangle."
RIGHT = r"The sides are 3, 4 and 5. The perimeter is 3+4+5=12. So the answer is \boxed{12}."
MISREAD = r"The sides are 3, 4 and 6. The perimeter is 3+4+6=13. So the answer is \boxed{13}."

api = ScoringClient(URL)
for teacher in api.teachers():
    print(f"{teacher.model}: {teacher.vocab_size} tokens, {teacher.dtype}, degraded views {teacher.degradations}")

# %% Two answers, one of which misreads a digit
score = api.score(QUESTION, [RIGHT, MISREAD], images=[IMAGE], top_k=3)
for rollout in score.rollouts:
    print(f"\nweight {rollout.rollout_weight:.2f}, mean VA {rollout.mean_visual_advantage:.3f} nats per token")
    by_va = sorted(range(len(rollout.tokens)), key=lambda t: -rollout.visual_advantage[t])
    for t in by_va[:4]:
        print(f"  token {t:>2} {rollout.tokens[t].text!r:<8} VA {rollout.visual_advantage[t]:.3f}")

# %% What did the teacher expect in place of the misread digit?
rollout = score.rollouts[1]
differences = [
    seen - blurred for seen, blurred in zip(rollout.teacher_logprobs, rollout.degraded_logprobs, strict=True)
]
worst = min(range(len(differences)), key=differences.__getitem__)
expected = rollout.alternatives[worst][0] if rollout.alternatives else None
assert expected is not None
print(f"\n{rollout.tokens[worst].text!r} was read, the teacher sees {expected.text!r}: seeing costs the misread digit")
print(f"{-differences[worst]:.1f} nats. VA is cut off at 0, so such a token counts as if it had none.")

# %% How much detail does it take? One request per degradation, answered in the order of completion
strengths = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
requests = [
    ask(QUESTION, [RIGHT], images=[IMAGE], degradation=DegradationModel(strength=strength)) for strength in strengths
]
means = {}
for result in api.score_batch(requests):
    if result.score is None:
        print(f"strength {strengths[result.index]} was refused: {result.problem.detail if result.problem else ''}")
    else:
        means[strengths[result.index]] = result.score.rollouts[0].mean_visual_advantage
print("\npixelation to   mean VA")
for strength in sorted(means):
    print(f"{100 * strength:>10.0f} %   {means[strength]:.3f}  {'█' * round(100 * means[strength])}")

# %% What the teacher sees at 10 %
view = api.degrade(IMAGE)
print(f"\nThe degraded view is a PNG of {len(view)} bytes; in a notebook: IPython.display.Image(view, width=300)")
api.close()
