"""What a training needs of memory and disk, from headers alone, and what would fit.

Exact: weights, gradients, the optimizer's state. Estimated: activations, from the sizes of a layer.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from drift_merge.errors import OutputError, RecipeError
from drift_merge.storage.shards import free_bytes
from drift_merge.storage.sizes import size
from drift_merge.trainers.sft.request import TrainingJob, TrainingRequest
from drift_merge.trainers.sft.trained import Trained

ASSUMED_LENGTH = 2048  # tokens of an example, where --max-length does not say
_STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.04}  # an element: two moments, and scales of blocks
_LOGIT_BYTES = 12  # an element: the logits, their float32 and its gradient
_SAVED_PER_LAYER = 8, 4  # of the hidden size and of the mlp's width, without checkpointing


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # an estimate

    @property
    def exact(self) -> int:
        """What is needed whatever the examples are."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """With the estimate of activations."""
        return self.exact + self.activations

    def rows(self) -> list[list[str]]:
        """For a table."""
        return [[name, size(value)] for name, value in (*asdict(self).items(), ("sum", self.total))]


def memory_of(request: TrainingRequest, trained: Trained) -> Memory:
    """What each process needs."""
    shards = request.processes if request.fsdp else 1
    learned, wide = elements_of(request, trained)
    is_bf16 = request.precision == "bf16"
    weights = wide * 4 + (trained.total if request.lora else 0) * (2 if is_bf16 else 4)
    if is_bf16 and not request.fsdp and not request.lora:
        weights += 2 * learned  # autocast keeps a copy until the end of a pass
    copies = 2 if request.processes > 1 and not request.fsdp else 1  # DDP's buckets
    return Memory(
        weights=weights // shards,
        gradients=4 * copies * learned // shards,
        optimizer=int(_STATE_BYTES[request.optimizer] * learned) // shards,
        activations=_activations(request, trained),
    )


def elements_of(request: TrainingRequest, trained: Trained) -> tuple[int, int]:
    """Elements that are learned, and elements that are held in float32."""
    if request.lora:
        factors = trained.factors(request.lora)
        return factors, factors
    return (trained.total if request.train_all else trained.tower), trained.total


def _activations(request: TrainingRequest, trained: Trained) -> int:
    tokens = request.batch_size * (request.max_length or ASSUMED_LENGTH)
    element = 2 if request.precision == "bf16" else 4
    of_hidden, of_width = _SAVED_PER_LAYER
    layer = (of_hidden * trained.hidden + of_width * trained.width) * element
    if request.gradient_checkpointing:
        kept = trained.num_layers * trained.hidden * element + 2 * layer
    else:
        kept = trained.num_layers * layer
    return tokens * (kept + trained.vocabulary * _LOGIT_BYTES)


def room_of(device: str, local_processes: int) -> int | None:
    """Bytes that one process may use on a device; None where that is not known."""
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            free: int = torch.cuda.mem_get_info()[0]
            return free
        if device == "cuda":
            return None
    return _host_bytes(local_processes)


def _host_bytes(local_processes: int) -> int | None:
    found = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        found.append(int(limit) - int(used))
    return min(found) // local_processes if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def require_memory(job: TrainingJob, room: int | None) -> None:
    """Refuse a run that cannot fit, and say what would.

    Raises:
        RecipeError: weights, gradients and optimizer alone need more than there is.
    """
    need = memory_of(job.request, job.trained)
    if room is None or need.exact <= room:
        return
    fitting = [words for words, other in _others(job.request) if _fits(other, job.trained, room)]
    raise RecipeError(
        f"this run cannot fit: weights, gradients and optimizer need {size(need.exact)} on each"
        f" device, before activations ({size(need.activations)}), and {size(room)} are free.",
        remedy="What would fit: " + "; ".join(fitting[:3])
        if fitting
        else "Nothing of this size fits here: take a device with more memory, or a smaller model.",
    )


def _fits(request: TrainingRequest, trained: Trained, room: int) -> bool:
    return memory_of(request, trained).total <= room


def _others(request: TrainingRequest) -> Iterator[tuple[str, TrainingRequest]]:
    """Requests that need less, with the options that make them, the nearest first."""
    if request.optimizer == "adamw" and not request.fsdp:
        yield "--optimizer adamw_8bit", replace(request, optimizer="adamw_8bit")
    for count in (2, 4, 8, 16, 32, 64):
        if count > request.processes:
            words = f"torchrun --nproc-per-node {count} --no-python drift-prior train ... --fsdp"
            yield words, replace(request, processes=count, fsdp=True, optimizer="adamw")
    lora = replace(request, lora=request.lora or 16, batch_size=1, gradient_checkpointing=True)
    yield f"--lora {lora.lora} --batch-size 1", lora
    bf16 = replace(lora, precision="bf16")
    yield f"--lora {lora.lora} --batch-size 1 --precision bf16", bf16


def disk_of(job: TrainingJob) -> tuple[int, int]:
    """Bytes of the checkpoints that stand at one time, and of the output.

    A new checkpoint is whole before the oldest is removed.
    """
    request, trained = job.request, job.trained
    learned, wide = elements_of(request, trained)
    of_optimizer = int(_STATE_BYTES[request.optimizer] * learned)
    copies = 2 if request.fsdp else 1  # the trainer writes FSDP's weights in two forms
    checkpoint = copies * 4 * wide + of_optimizer
    written = -(-job.num_steps // request.save_steps)
    output = 4 * wide if request.lora else job.output_itemsize * trained.total
    return checkpoint * min(request.save_total_limit + 1, written), output


def require_disk(job: TrainingJob, run: Path) -> None:
    """Refuse to begin where the checkpoints and the output have no place.

    Raises:
        OutputError: with the number of bytes that are missing.
    """
    checkpoints, output = disk_of(job)
    held = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    place = run.parent
    while not place.exists():
        place = place.parent
    needed, free = checkpoints + output - held, free_bytes(place)
    if needed > free:
        raise OutputError(
            f"the run needs {size(needed)} beside {run.with_suffix('')}: {size(checkpoints)} for"
            f" checkpoints, {size(output)} for the output; {size(free)} are free.",
            remedy="Free some space, write elsewhere with -o, or keep fewer checkpoints:"
            f" --save-total-limit 1 --save-steps {max(job.num_steps, 1)}",
        )


def summary(job: TrainingJob, room: int | None) -> dict[str, Any]:
    """The estimate as plain data."""
    need = memory_of(job.request, job.trained)
    checkpoints, output = disk_of(job)
    return {
        "memory": asdict(need) | {"total": need.total, "free": room},
        "disk": {"checkpoints": checkpoints, "output": output},
        "trained_elements": elements_of(job.request, job.trained)[0],
        "assumed_length": job.request.max_length or ASSUMED_LENGTH,
    }
