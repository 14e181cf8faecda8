"""verl: the FSDP engine's optimizer, hooked where verl makes it.

    # drift_verl.py on PYTHONPATH, with VERL_USE_EXTERNAL_MODULES=drift_verl in the environment
    from drift_merge.trainers.verl import install
    install("prior/", alpha=1.0)

Every engine that trains a language model head is biased (SFT, and the actor in RL); critics and
reference policies are not. FSDP2 only (`strategy: fsdp2`), since FSDP1 flattens parameters. The
state is in `drift_merge.json` of each checkpoint; metrics are `engine.drift.metrics()`.
"""

import json
from pathlib import Path
from typing import Any

import torch

from drift_merge.trainers.wiring import Wiring, optional

STATE_FILE = "drift_merge.json"


def install(prior: Any, **options: Any) -> None:
    """Let every FSDP engine with a language model head attach the prior to its optimizer.

    Args:
        prior: as for `attach`.
        options: as for `hf.DriftCallback`.

    Raises:
        RecipeError: an unknown option, or verl is not installed.
    """
    Wiring(prior, options)  # a typo fails here, before a model is loaded
    engines = optional("verl.workers.engine.fsdp.transformer_impl", install="pip install verl")
    engine, critic = engines.FSDPEngineWithLMHead, engines.FSDPEngineWithValueHead
    build, save, load = engine._build_optimizer, engine.save_checkpoint, engine.load_checkpoint

    def build_optimizer(self: Any, module: Any) -> Any:
        optimizer = build(self, module)
        self.drift = None
        if not isinstance(self, critic):
            steps = self.optimizer_config.total_training_steps
            self.drift = Wiring(prior, options).start(
                module, optimizer=optimizer, total_steps=steps if steps > 0 else None
            )
        return optimizer

    def save_checkpoint(self: Any, local_path: str, *args: Any, **kwargs: Any) -> None:
        save(self, local_path, *args, **kwargs)
        if getattr(self, "drift", None) is not None and torch.distributed.get_rank() == 0:
            text = json.dumps(self.drift.state_dict()) + "\n"
            Path(local_path, STATE_FILE).write_text(text, encoding="utf-8")

    def load_checkpoint(self: Any, local_path: str, *args: Any, **kwargs: Any) -> None:
        file = Path(local_path, STATE_FILE)  # read first: verl may delete what it has loaded
        text = file.read_text(encoding="utf-8") if file.is_file() else None
        load(self, local_path, *args, **kwargs)
        if text is not None and getattr(self, "drift", None) is not None:
            self.drift.load_state_dict(json.loads(text))

    engine._build_optimizer = build_optimizer
    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
