"""What each file of a checkpoint's folder is; pure functions over names and sizes.

The same rules serve a local directory, the Hub's listing of a repository, and the Hub's cache.
What no rule knows is carried over byte for byte: remote code may read it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

COPY = "a second copy of the weights"
TRAINING = "a state of training"
DANGLING = "a link that leads to nothing"

# Folders whatever their depth, and files whatever their folder.
_TRAINING_FOLDERS = (
    *("checkpoint-*", "global_step*", "wandb", "runs", "tensorboard", "tb_logs", "mlruns"),
    *("swanlog", "lightning_logs", "logs", "ray_results", "pytorch_model_fsdp_*", "optimizer_*"),
)
_TRAINING_FILES = (
    *("optimizer*.pt", "optimizer*.bin", "optimizer*.safetensors", "scheduler*.pt"),
    *("scheduler*.bin", "scaler*.pt", "sampler*.bin", "rng_state*", "random_states_*"),
    *("trainer_state.json", "training_args.*", "trainer_log.jsonl", "training_loss*.png"),
    *("all_results.json", "train_results.json", "eval_results.json", "latest", "zero_to_fp32.py"),
    *("events.out.tfevents.*", "*.log", "nohup.out", "slurm-*.out", "custom_checkpoint_*"),
    *("*_optim_states.pt", "*_model_states.pt", "last*.ckpt", "epoch=*.ckpt"),
)
_COPY_FOLDERS = ("original", "onnx", "openvino", "coreml", "gguf")
# Beside config.json alone: in a folder of its own such a file is another model's.
_COPIES = (
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "pytorch_model*.safetensors*"),
    *("consolidated*.safetensors", "consolidated*.index.json", "consolidated*.pt"),
    *("consolidated*.pth", "tf_model*.h5", "tf_model*.index.json", "flax_model*.msgpack"),
    *("flax_model*.index.json", "rust_model.ot", "model*.onnx", "model*.onnx[._]data"),
    *("decoder_model*.onnx*", "encoder_model*.onnx*", "openvino_model*", "model.ckpt", "model.pt"),
    *("model.pth", "model.bin", "model-*-of-*.bin", "weights.npz", "*.llamafile", "*.tflite"),
    *("*.task", "*.litertlm", "*.mlmodel", "*.safetensors.bak"),
)
_GGUF = ("*.gguf", "*.ggml")
# What a loader takes for the model: shards that the index does not name, and variants.
_MODEL = re.compile(
    r"model(\.(fp16|bf16|fp32|fp8|int8|int4|8bit|4bit|ema|non_ema))?(-\d+-of-\d+)?"
    r"(\.(fp16|bf16|fp32|fp8|int8|int4|8bit|4bit|ema|non_ema))?\.safetensors(\.index(\.\w+)?\.json)?"
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.nemo", "*.ckpt", "*.npz")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file, or a folder with all that is below it, that an output does not take over."""

    reason: str  # COPY, TRAINING or DANGLING
    num_files: int
    size_bytes: int  # as far as it is known


@dataclass(frozen=True, slots=True)
class Folder:
    """Every file of a checkpoint but its weights, by its path relative to it, with `/`."""

    carried: Mapping[str, int] = field(default_factory=dict)  # bytes; -1 where unknown; sorted
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)  # folders end with `/`; sorted
    astray: Mapping[str, str] = field(default_factory=dict)  # links out of it, and their targets

    @property
    def size_bytes(self) -> int:
        """Bytes of all carried files, as far as they are known."""
        return sum(max(0, size) for size in self.carried.values())


def sort_files(
    files: Mapping[str, int], weights: Collection[str], astray: Mapping[str, str] | None = None
) -> Folder:
    """Say of every file whether it is carried over or left out.

    Args:
        files: bytes of every file by its path relative to the checkpoint; -1 where unknown.
        weights: those that hold the model's tensors, and their index; in neither of the answers.
        astray: links that lead out of the folder, and where to; "" for nowhere.

    Returns:
        The account. Hidden files and Python's caches are no files of a model, so not in it.
    """
    carried: dict[str, int] = {}
    left_out: dict[str, LeftOut] = {}
    taken = set(weights)
    for name in sorted(set(files) - taken):
        if _is_hidden(name):
            continue
        found = _why_left_out(name)
        if found is None:
            carried[name] = files[name]
            continue
        key, reason = found
        old = left_out.get(key, LeftOut(reason, 0, 0))
        size = old.size_bytes + max(0, files[name])
        left_out[key] = LeftOut(reason, old.num_files + 1, size)
    lost = {n: t for n, t in (astray or {}).items() if n not in taken and is_sidecar(n)}
    left_out |= {name: LeftOut(DANGLING, 1, 0) for name, target in lost.items() if not target}
    lost = {name: target for name, target in sorted(lost.items()) if target}
    for name in lost:
        carried.pop(name, None)  # a merge refuses them
    return Folder(carried, dict(sorted(left_out.items())), lost)


def is_sidecar(name: str) -> bool:
    """Whether a file that is not among the weights is carried over."""
    return not _is_hidden(name) and _why_left_out(name) is None


def is_foreign_weight(name: str) -> bool:
    """Whether a carried file looks like weights: an adapter's, or another model's."""
    return _matches(name, _WEIGHTS)


def is_training_state(name: str) -> bool:
    """Whether a file is a state of training by its name."""
    return _matches(name.rpartition("/")[2], _TRAINING_FILES)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def _why_left_out(name: str) -> tuple[str, str] | None:
    """What stands for a file in the account of what is left out, and why; None if it is carried."""
    *folders, leaf = name.split("/")
    for depth, folder in enumerate(folders, start=1):
        if _matches(folder, _TRAINING_FOLDERS):
            return "/".join(folders[:depth]) + "/", TRAINING
    if folders and folders[0] in _COPY_FOLDERS:
        return f"{folders[0]}/", COPY
    if _matches(leaf, _TRAINING_FILES):
        return name, TRAINING
    is_copy = not folders and (_matches(leaf, _COPIES) or _MODEL.fullmatch(leaf))
    return (name, COPY) if is_copy or _matches(leaf, _GGUF) else None


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
