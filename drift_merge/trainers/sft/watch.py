"""What the trainer is watched by: progress, and checkpoints that are whole."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.sft.publish import flush
from drift_merge.trainers.sft.ranks import rank, wait_for_all
from drift_merge.trainers.sft.request import WHOLE
from drift_merge.trainers.wiring import optional

REPORT = "report.json"  # in the checkpoint of the last step: what was measured of it
StepProgress = Callable[[int, int, Mapping[str, Any]], None]  # step, of how many, last log
_callback = optional("transformers.trainer_callback", install="pip install 'drift_merge[train]'")


class CompleteError(Exception):
    """The checkpoint that the trainer goes on from is that of the last step."""


class Watch(_callback.TrainerCallback):  # type: ignore[misc, name-defined]
    """Reports progress, marks checkpoints that are whole, and removes the oldest."""

    def __init__(
        self, progress: StepProgress, save_total_limit: int, drift: DriftCallback | None
    ) -> None:
        """Keep what is told of steps, the number of checkpoints that stay, and what biases."""
        self._progress, self._limit, self._drift = progress, save_total_limit, drift
        self._log: dict[str, Any] = {}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make no step too many: the trainer looks whether it has made all only after the next."""
        if state.global_step >= state.max_steps:
            raise CompleteError

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the step."""
        if rank() == 0:
            self._progress(state.global_step, state.max_steps, self._log)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the numbers for the progress."""
        self._log = dict(logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Flush a checkpoint and mark it; only then remove those before.

        The trainer's own save_total_limit removes them before the new one is on the disk.
        """
        wait_for_all()  # each process writes its part
        handle = (
            self._drift.handle if self._drift and state.global_step >= state.max_steps else None
        )
        report = handle.report() if handle else None  # of all processes together
        if rank() == 0:
            run = Path(args.output_dir)
            folder = run / f"checkpoint-{state.global_step}"
            if report is not None:
                (folder / REPORT).write_text(json.dumps(report))
            for path in folder.rglob("*"):
                flush(path)
            (folder / WHOLE).touch()
            steps = sorted(_step_of(path) for path in run.glob("checkpoint-*"))
            for step in steps[: -self._limit]:
                shutil.rmtree(run / f"checkpoint-{step}")


def last_report(checkpoint: Path | None) -> dict[str, Any] | None:
    """What was measured of the last step of all, if that is the one that was gone on from.

    No step has been made since then, and so nothing measured.
    """
    if checkpoint is None or not (checkpoint / REPORT).exists():
        return None
    report: dict[str, Any] = json.loads((checkpoint / REPORT).read_text())
    return report


def _step_of(path: Path) -> int:
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else -1
