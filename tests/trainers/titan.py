"""What the torchtitan adapter needs of a Trainer, after torchtitan 0.3.0."""

from types import SimpleNamespace


class Checkpointer:
    """`load` gives every state what was found, as torch.distributed.checkpoint does."""

    def __init__(self):
        self.states, self.found = {}, None

    def load(self, *, step):
        for state in self.states.values():
            structure = state.state_dict()
            if self.found is not None:
                assert self.found.keys() == structure.keys()  # DCP wants equal structures
                state.load_state_dict(self.found)
        return True


class StandIn:
    """A Trainer that was built and not yet trained."""

    def __init__(self, model, optimizers, *, steps, parts=1):
        self.model_parts = [model] * parts
        self.optimizers = optimizers
        self.checkpointer = Checkpointer()
        self.config = SimpleNamespace(training=SimpleNamespace(steps=steps))
