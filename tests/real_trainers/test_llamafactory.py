"""LLaMA-Factory's own training on a tiny LLaVA; skipped where it is not installed.

It pins other versions than .ci/engines: run it in an environment of its own.
"""

import json

import pytest

pytest.importorskip("llamafactory")

from tests.real_trainers import tiny

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


def test_run_exp_trains_with_the_prior_and_logs_its_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    setup = tiny.make_setup("llava", tmp_path)
    tiny.write_llava_processor(setup.mllm)
    (tmp_path / "rows.json").write_text(json.dumps(tiny.conversations(tmp_path)))
    tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant")}
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": tags,
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"tiny": entry}))
    from drift_merge.trainers.llamafactory import run_exp

    out = tmp_path / "out"
    arguments = {
        "model_name_or_path": str(setup.mllm),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "tiny",
        "dataset_dir": str(tmp_path),
        "template": "llava",
        "cutoff_len": 64,
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "preprocessing_num_workers": 1,
    }
    run_exp(setup.prior, args=arguments, alpha=1.0, schedule="linear")
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["drift/alpha"] for log in state["log_history"][:2]] == [1.0, 0.5]
    assert state["log_history"][0]["drift/bias_ratio"] > 0
    assert state["stateful_callbacks"]["drift_merge"]["handle"]["steps"] == 2
