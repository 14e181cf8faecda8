"""What each file of a checkpoint's folder is, by its name."""

import pytest

from drift_merge.storage.folder.contents import COPY, DANGLING, TRAINING, LeftOut, sort_files

WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"

CARRIED = [
    *("config.json", "tokenizer.model", "params.json", "LICENSE", "assets/a/logo.png"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("vision-lora/adapter_model.safetensors", "speech-lora/adapter_config.json"),
    *("mm_projector.bin", "non_lora_trainables.bin", "spk_dict.pt", "token2wav/flow.pt"),
    *("speech_tokenizer.onnx", "assets/token2wav/campplus.onnx", "asr.nemo", "flow.safetensors"),
    *("vocoder/model.safetensors", "talker/model-00001-of-00002.safetensors"),
    *("talker/model.safetensors.index.json", "text_encoder/pytorch_model.bin"),
    *("scheduler/scheduler_config.json", "runs.py", "latest_notes.md", "modeling_runs.py"),
    *("model_vision.safetensors", "modeling.safetensors"),
]
COPIES = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
    *("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "tf_model.h5"),
    *("consolidated.00.pth", "model.safetensors", "model.fp16.safetensors", "flax_model.msgpack"),
    *("model-00003-of-00003.safetensors", "model.fp16-00001-of-00002.safetensors", "rust_model.ot"),
    *("model.safetensors.index.fp16.json", "m.Q4_K_M.gguf", "deep/er/mmproj.gguf", "model.onnx"),
    *("decoder_model_merged.onnx", "model.llamafile", "model-00001-of-00002.safetensors.bak"),
]
TRAININGS = [
    *("optimizer.pt", "optimizer.bin", "optimizer.safetensors", "scheduler.pt", "rng_state.pth"),
    *("rng_state_3.pth", "trainer_state.json", "training_args.bin", "latest", "zero_to_fp32.py"),
    *("random_states_0.pkl", "scaler.pt", "nohup.out", "train.log", "events.out.tfevents.1.host"),
    *("trainer_log.jsonl", "mp_rank_00_model_states.pt", "last.ckpt", "epoch=3-step=9.ckpt"),
]


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_no_copy_and_no_training_is_carried(name: str) -> None:
    found = sort_files({name: 7, WEIGHTS[0]: 1}, WEIGHTS)
    assert (dict(found.carried), found.left_out) == ({name: 7}, {})


@pytest.mark.parametrize(
    ("name", "reason"), [*((n, COPY) for n in COPIES), *((n, TRAINING) for n in TRAININGS)]
)
def test_copies_and_states_of_training_are_left_out_with_their_bytes(
    name: str, reason: str
) -> None:
    other = list(WEIGHTS)
    found = sort_files({name: 7}, [*other, INDEX] if name not in other else [INDEX])
    assert found.carried == {}
    assert found.left_out == {name: LeftOut(reason, 1, 7)}


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        *((f, TRAINING) for f in ("checkpoint-500", "global_step9", "wandb", "runs", "logs")),
        *((f, COPY) for f in ("original", "onnx", "openvino", "coreml", "gguf")),
        ("vision-lora/checkpoint-20", TRAINING),
    ],
)
def test_a_folder_is_left_out_as_one_with_the_number_of_its_files(folder: str, reason: str) -> None:
    files = {f"{folder}/config.json": 3, f"{folder}/a/b/model.safetensors": 10, f"{folder}/x": -1}
    found = sort_files(files, ())
    assert (found.carried, found.left_out) == ({}, {f"{folder}/": LeftOut(reason, 3, 13)})


def test_every_file_is_weight_carried_left_out_or_hidden_and_in_one_of_them_only() -> None:
    hidden = [".gitattributes", ".git/config", "__pycache__/m.pyc", "code/.DS_Store"]
    names = [*CARRIED, *COPIES, *TRAININGS, *hidden, *WEIGHTS, INDEX]
    found = sort_files(dict.fromkeys(names, 1), [*WEIGHTS, INDEX])
    accounted = {*found.carried, *found.left_out, *hidden, *WEIGHTS, INDEX}
    assert accounted == set(names)
    assert not set(found.carried) & set(found.left_out)
    assert list(found.carried) == sorted(found.carried)
    assert found.size_bytes == len(CARRIED)


def test_weights_are_weights_wherever_the_index_finds_them() -> None:
    names = ["runs/a.safetensors", "consolidated-00001-of-00001.safetensors"]
    assert sort_files(dict.fromkeys(names, 1), names) == sort_files({}, ())


def test_links_that_lead_elsewhere_are_kept_apart_and_those_to_nothing_left_out() -> None:
    astray = {"notes": "/etc/passwd", "gone": "", "optimizer.pt": "/x", WEIGHTS[0]: "/y"}
    found = sort_files({"notes": 5, "optimizer.pt": 1, WEIGHTS[0]: 1}, WEIGHTS, astray)
    assert found.astray == {"notes": "/etc/passwd"}
    assert found.carried == {}
    assert found.left_out["gone"] == LeftOut(DANGLING, 1, 0)
    assert set(found.left_out) == {"gone", "optimizer.pt"}
