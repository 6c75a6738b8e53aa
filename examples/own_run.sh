#!/usr/bin/env bash
# From data of your own to a published model: check, train, report, evaluate, load with transformers and vLLM, push.
# Usage: examples/own_run.sh [FOLDER], with the environment active; docs/your_own_run.md explains each step.
# STEPS=60 takes some minutes on two cores; the default of 2 only shows the way.
set -euo pipefail
models=$(cd "$(dirname "$0")/../models" && pwd)
folder=${1:-own-run}
mkdir -p "$folder"
cd "$folder"

echo "== data: JSON Lines with the columns prompt, picture and label, and the pictures beside it"
vaopd data handwritten-geometry source --train 64 --validation 8 --test 1
python - <<'PYTHON'
import json
from pathlib import Path
from vaopd.data.loaders import load_prompts

for split in ("train", "validation"):
    Path(f"own/{split}").mkdir(parents=True, exist_ok=True)
    with open(f"own/{split}.jsonl", "w") as lines:
        for number, prompt in enumerate(load_prompts("source", split=split)):
            picture = f"{split}/{number}.png"
            Path("own", picture).write_bytes(prompt.images[0].data)
            text = prompt.messages[0].content[-1].text
            lines.write(json.dumps({"prompt": text, "picture": picture, "label": prompt.answer}) + "\n")
PYTHON

echo "== configuration"
vaopd init own.toml --name own --student "$models/tiny-student" --teacher "$models/tiny-teacher" --data own \
  --steps "${STEPS:-2}" --force
vaopd data check own.toml

echo "== run"
small=(--set rollout.engine=transformers --set rollout.max_new_tokens=32 --set evaluation.prompts=8
  --set evaluation.samples=1 --set evaluation.temperature=0)
vaopd up own.toml "${small[@]}" --set trainer.prompts_per_step=4 --set trainer.learning_rate=6e-4 --no-api \
  --set teacher.address=127.0.0.1:0
vaopd report runs/own
vaopd eval own.toml --model runs/own/model "${small[@]}" --json >accuracy.json

echo "== the model in plain transformers"
python - <<'PYTHON'
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("runs/own/model")
processor = AutoProcessor.from_pretrained("runs/own/model")
# A picture, not a path: transformers reads paths by torchvision's decoder, which PyPI's build lacks beside a CPU torch.
image = Image.open("own/validation/0.png")
content = [{"type": "image", "image": image}, {"type": "text", "text": "Find the perimeter."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
new = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
print("transformers:", processor.decode(new, skip_special_tokens=True))
PYTHON

echo "== the model in plain vLLM"
VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1 python - <<'PYTHON'
from PIL import Image
from vllm import LLM, SamplingParams

llm = LLM("runs/own/model", dtype="float32", enforce_eager=True, max_model_len=256, limit_mm_per_prompt={"video": 0})
content = [
    {"type": "image_pil", "image_pil": Image.open("own/validation/0.png")},
    {"type": "text", "text": "Find the perimeter."},
]
(reply,) = llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=16, temperature=0))
print("vLLM:", reply.outputs[0].text)
PYTHON

echo "== what would be published"
vaopd push runs/own YOUR_NAME/own --dry-run
