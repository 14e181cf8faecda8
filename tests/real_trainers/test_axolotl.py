"""Axolotl's own training on a tiny LLaVA, from its YAML; skipped where it is not installed.

It pins other versions than .ci/engines: run it in an environment of its own.
"""

import json

import pytest

pytest.importorskip("axolotl.integrations.base")

from tests.real_trainers import tiny

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


def test_the_plugin_of_the_yaml_trains_with_the_prior(tmp_path, monkeypatch):
    import yaml

    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    setup = tiny.make_setup("llava", tmp_path)
    tiny.write_llava_processor(setup.mllm)
    lines = [json.loads(line) for line in tiny.write_questions(tmp_path).read_text().splitlines()]
    rows = []
    for line in lines:
        image = {"type": "image", "path": str(tmp_path / line["image"])}
        asked = [image, {"type": "text", "text": line["question"]}]
        answer = [{"type": "text", "text": line["answer"]}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base_model": str(setup.mllm),
        "processor_type": "AutoProcessor",
        "plugins": ["drift_merge.trainers.axolotl.DriftPlugin"],
        "drift_prior": str(setup.prior),
        "drift_alpha": {"attn": 1.0, "mlp": 0.5},
        "drift_schedule": "linear",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "chat_template": "llava",
        "datasets": [
            {
                "path": str(tmp_path / "rows.jsonl"),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
            }
        ],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "num_epochs": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "bf16": False,
        "tf32": False,
        "use_cpu": True,
        "val_set_size": 0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    loaded = load_cfg(str(tmp_path / "config.yaml"))
    train(cfg=loaded, dataset_meta=load_datasets(cfg=loaded))
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logs = state["log_history"][:2]
    assert [log["drift/attn/alpha"] for log in logs] == [1.0, 0.5]
    assert [log["drift/mlp/alpha"] for log in logs] == [0.5, 0.25]
    assert logs[0]["drift/bias_ratio"] > 0
