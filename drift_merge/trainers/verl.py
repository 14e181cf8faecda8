"""verl: the FSDP engine's optimizer, hooked where verl makes it.

    # drift_verl.py on PYTHONPATH, with VERL_USE_EXTERNAL_MODULES=drift_verl in the environment
    from drift_merge.trainers.verl import install
    install("prior/", alpha=1.0)

Every engine that trains a language model head is biased (SFT, and the actor in RL); critics and
reference policies are not. FSDP2 only (`strategy: fsdp2`), since FSDP1 flattens parameters; the
engines of other strategies (megatron, veomni, torchtitan, automodel, mindspeed) are refused. The
state is in `drift_merge.json` of each checkpoint; metrics are `engine.drift.metrics()`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from drift_merge.errors import RecipeError
from drift_merge.trainers.wiring import Wiring, optional

STATE_FILE = "drift_merge.json"
_LANGUAGE = "language_model"  # verl's word for a model with a language model head
_VALUE = "value_model"
_OURS = "_drift_merge"  # attribute of the functions that are put into verl's classes


def install(prior: Any, **options: Any) -> None:
    """Let every FSDP engine with a language model head attach the prior to its optimizer.

    Args:
        prior: as for `attach`.
        options: as for `hf.DriftCallback`.

    Raises:
        RecipeError: an unknown option, verl is not installed, or this was called before.
    """
    Wiring(prior, options)  # a typo fails here, before a model is loaded
    engines = optional("verl.workers.engine.fsdp.transformer_impl", install="pip install verl")
    engine, critic = engines.FSDPEngineWithLMHead, engines.FSDPEngineWithValueHead
    if getattr(engine._build_optimizer, _OURS, False):
        raise RecipeError(
            "install() was called before: the engines have their prior.",
            remedy="Call it once; several priors are a list: install([first, second],"
            " weights=[1.0, 0.5])",
        )
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

    setattr(build_optimizer, _OURS, True)
    engine._build_optimizer = build_optimizer
    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    _refuse_others(engines)


def _refuse_others(engines: Any) -> None:
    """Let engines that make their optimizer elsewhere refuse to train a language model head."""
    registry = getattr(engines, "EngineRegistry", None)
    tables = {} if registry is None else registry._engines
    critics = _Critics(engines.FSDPEngineWithValueHead, tables)
    known = [kind for table in tables.get(_LANGUAGE, {}).values() for kind in table.values()]
    for kind in (*known, *_subclasses(engines.FSDPEngineWithLMHead)):
        _require_hooked(kind, critics)
    if registry is None:
        return
    find = registry.get_engine_cls

    def get_engine_cls(model_type: str, backend: str) -> Any:
        found = find(model_type, backend)  # other engines are imported when they are asked for
        if model_type == _LANGUAGE:
            _require_hooked(found, critics)
        return found

    registry.get_engine_cls = staticmethod(get_engine_cls)


class _Critics:
    """Engines with a value head, which are trained without a prior."""

    def __init__(self, kind: Any, tables: Any) -> None:
        self._kind, self._tables = kind, tables

    def __contains__(self, engine: Any) -> bool:
        tables = self._tables.get(_VALUE, {}).values()
        kinds = [self._kind, *(kind for table in tables for kind in table.values())]
        return isinstance(engine, tuple(kinds))


def _subclasses(kind: Any) -> Iterator[Any]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def _require_hooked(kind: Any, critics: _Critics) -> None:
    """Make a class refuse to be trained unless its optimizer is made where we hook it."""
    build = getattr(kind, "_build_optimizer", None)
    if getattr(build, _OURS, False) or getattr(kind.__init__, _OURS, False):
        return
    begin = kind.__init__

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        is_trained = not getattr(getattr(self, "engine_config", None), "forward_only", False)
        if is_trained and self not in critics:
            raise RecipeError(
                f"verl's {type(self).__name__} makes its optimizer itself: it would train without"
                " the prior.",
                remedy="Set the strategy of the actor to fsdp2"
                " (actor_rollout_ref.actor.strategy=fsdp2; SFT: engine.strategy=fsdp2), or take"
                " install() out to train without a prior.",
            )

    setattr(refuse, _OURS, True)
    kind.__init__ = refuse
