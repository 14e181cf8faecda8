"""Files that stand beside the weights of an mllm: weights of others, copies, training states."""

from tests import checkpoints as c

ADAPTER = c.shard_bytes({"lora": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, b"abc")
OTHERS: dict[str, bytes] = {  # weights of others, and what belongs to them
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": ADAPTER,
    "speech-lora/adapter_config.json": b"{}",
    "speech-lora/adapter_model.safetensors": ADAPTER,
    "vocoder/model-00001-of-00002.safetensors": ADAPTER,
    "vocoder/model.safetensors.index.json": b"{}",
    "flow.safetensors": ADAPTER,
    "asr.nemo": bytes(range(256)) * 40,
}
LEFT: dict[str, bytes] = {
    "pytorch_model.bin": b"12345",
    "consolidated.safetensors": b"no shard of ours",
    "model-00007-of-00009.safetensors": b"of an earlier save",
    "original/params.json": b"{}",
    "checkpoint-500/model.safetensors": b"old",
    "checkpoint-500/trainer_state.json": b"{}",
    "wandb/debug.log": b"home",
    "optimizer.pt": b"x",
}
