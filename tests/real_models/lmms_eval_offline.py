"""Run the real lmms-eval by `drift-merge evaluate`, offline, on a CPU: a tiny LLaVA, a local task.

    python -m venv kit && kit/bin/pip install lmms-eval==0.7.3 decord 'filelock<3.20'     # 7 GB
    python tests/real_models/lmms_eval_offline.py --python kit/bin/python

Needs transformers here, to make the model. Prints the command's JSON; exits with its code.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.evaluation.tiny_llava import make_llava_pair

TASK = """dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
task: drift_local
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: acc_score
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"acc_score": float(len(results[0]) % 2 == doc["answer"])}
"""
DATA = """
import sys
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
pictures = [Picture.new("RGB", (28, 28), (20 * i, 0, 0)) for i in range(6)]
rows = {"image": pictures, "question": [f"word{i + 3}" for i in range(6)],
        "answer": [i % 2 for i in range(6)]}
features = Features({"image": Image(), "question": Value("string"), "answer": Value("int64")})
DatasetDict({"test": Dataset.from_dict(rows, features=features)}).save_to_disk(sys.argv[1])
"""


def main() -> int:
    """Make pair, merge, task and data; evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", required=True, help="interpreter that has lmms-eval")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_llava_pair(folder)
        tasks = folder / "tasks"
        tasks.mkdir()
        (tasks / "drift_local.yaml").write_text(TASK.format(data=folder / "data"))
        (tasks / "utils.py").write_text(UTILS)
        subprocess.run([given.python, "-c", DATA, str(folder / "data")], check=True)
        drift_merge = [sys.executable, "-m", "drift_merge"]
        merged = folder / "merged"
        make = ["linear", str(folder / "reasoner"), str(folder / "mllm"), "-o", str(merged), "-q"]
        subprocess.run([*drift_merge, *make], check=True)
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "XDG_CACHE_HOME": name}
        done = subprocess.run(
            [
                *(*drift_merge, "evaluate", str(merged), "--with", "lmms-eval", "--json"),
                *("--python", given.python, "--tasks", "drift_local", "--kit-path", str(tasks)),
                *("--kit-device", "cpu", "--model-args", "device_map=cpu"),
            ],
            env=os.environ | offline,
            check=False,
        )
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
