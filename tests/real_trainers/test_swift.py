"""ms-swift's own training on a tiny LLaVA; skipped where it is not installed.

It pins other versions than .ci/engines: run it in an environment of its own.
"""

import json

import pytest

pytest.importorskip("swift.callbacks")

from tests.real_trainers import tiny

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


def test_a_plugin_registers_the_callback_that_the_command_line_names(tmp_path, monkeypatch):
    monkeypatch.setenv("USE_HF", "1")
    setup = tiny.make_setup("llava", tmp_path)
    tiny.write_llava_processor(setup.mllm)
    rows = "".join(json.dumps(row) + "\n" for row in tiny.conversations(tmp_path))
    (tmp_path / "rows.jsonl").write_text(rows)
    plugin = tmp_path / "drift_plugin.py"
    plugin.write_text(
        "from drift_merge.trainers.swift import register\n"
        f"register({str(setup.prior)!r}, alpha=1.0, schedule='linear')\n"
    )
    from swift.arguments import SftArguments
    from swift.pipelines import sft_main

    sft_main(
        SftArguments(
            model=str(setup.mllm),
            model_type="llava1_5_hf",
            dataset=[str(tmp_path / "rows.jsonl")],
            tuner_type="full",
            output_dir=str(tmp_path / "out"),
            add_version=False,
            external_plugins=[str(plugin)],
            callbacks=["drift"],
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            logging_steps=1,
            save_steps=2,
            learning_rate=0.01,
            torch_dtype="float32",
            use_cpu=True,
            report_to=["none"],
            split_dataset_ratio=0,
            max_length=128,
            dataset_num_proc=1,
            dataloader_num_workers=0,
        )
    )
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["drift/alpha"] for log in state["log_history"][:2]] == [1.0, 0.5]
    assert state["log_history"][0]["drift/bias_ratio"] > 0
