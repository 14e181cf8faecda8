"""torchtitan: a prior for its Trainer, attached once the checkpoint is loaded.

    trainer = config.build()                       # as in torchtitan.train
    from drift_merge.trainers.torchtitan import attach_to
    attach_to(trainer, "prior/", alpha=1.0)
    trainer.train()

The hook is registered on `trainer.optimizers`, the container of all optimizers, as torchtitan
does for its own load balancing. Names must be Hugging Face's (its transformers backend) or those
of a layout that drift_merge knows; torchtitan's own Llama permutes q and k, and is refused. To
resume a checkpoint that was trained without the prior: `exclude_from_loading=["drift_merge"]`.
"""

import json
from typing import Any

from drift_merge.errors import RecipeError
from drift_merge.trainers.wiring import Expectation, Wiring
from drift_merge.training.handle import Handle

STATE = "drift_merge"  # key among the states of a checkpoint


class _State:
    """The handle's state as one string, because a checkpoint's structure is known before it is."""

    def __init__(self) -> None:
        self.handle: Handle | None = None
        self.saved = ""

    def state_dict(self) -> dict[str, str]:
        return {"state": "" if self.handle is None else json.dumps(self.handle.state_dict())}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        self.saved = state_dict["state"]


def attach_to(trainer: Any, prior: Any, **options: Any) -> None:
    """Let a torchtitan Trainer attach the prior when its training begins.

    Args:
        trainer: built, not yet trained.
        prior: as for `attach`.
        options: as for `hf.DriftCallback`.

    Raises:
        RecipeError: an unknown option, or the model is cut into pipeline stages.
    """
    wiring, state = Wiring(prior, options), _State()
    if len(trainer.model_parts) != 1:
        raise RecipeError(
            f"the model is cut into {len(trainer.model_parts)} pipeline stages on this rank.",
            remedy="Train without pipeline parallelism: --parallelism.pipeline_parallel_degree 1",
        )
    expected = Expectation(
        "torchtitan has made a step without having loaded a checkpoint (checkpointer.load): the"
        " prior is attached there, and was not.",
        "Train with Trainer.train() of torchtitan, which loads first.",
        trainer.model_parts[0],
    )
    wiring.expectations.append(expected)
    load = trainer.checkpointer.load

    def load_and_attach(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        state.handle = wiring.start(
            trainer.model_parts[0],
            optimizer=trainer.optimizers,
            total_steps=trainer.config.training.steps,
            state=json.loads(state.saved) if state.saved else None,
        )
        return result

    trainer.checkpointer.load = load_and_attach
    if hasattr(trainer.checkpointer, "states"):  # not where checkpoints are switched off
        states = trainer.checkpointer.states
        number = sum(key.startswith(STATE) for key in states)  # of priors before this one
        states[STATE + (f"_{number + 1}" if number else "")] = state
