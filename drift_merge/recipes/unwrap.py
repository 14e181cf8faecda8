"""Names that a wrapped mllm was saved with: written without them, so that the output loads.

`torch.save(model.state_dict())` of a model within DDP, `torch.compile`, FSDP, Lightning or PEFT
puts the wrapper into every name. No loader looks for such names.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.folder.notes import CheckpointNote

# No class of a model calls a part of itself so; these count wherever they are.
_INSIDE = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_forward_module)\."
)
# A class may: these count only where every name of the checkpoint begins with them.
_LEADING = ("module.", "base_model.model.")
# What Lightning calls the model that it trains. Most models begin with it too, but for their head.
_ATTRIBUTE = "model."
_ADAPTER = re.compile(r"\.lora_[AB]\.|\.lora_embedding_[AB]")


def unwrap(mllm: Checkpoint) -> Checkpoint:
    """The same checkpoint under the names that its model has without wrappers.

    Raises:
        CheckpointError: two tensors would get one name, or a PEFT model was saved with its
            adapter unmerged.
    """
    names = dict(zip(mllm.tensors, mllm.tensors, strict=True))
    found = set(_INSIDE.findall("\n".join(names)))
    if found:
        names = {name: _INSIDE.sub("", name) for name in names}
    while leading := _find_leading(mllm, names):
        names = {name: _INSIDE.sub("", new.removeprefix(leading)) for name, new in names.items()}
        found.add(leading)
    if not found:
        return mllm
    if "base_model.model." in found and any(_ADAPTER.search(name) for name in names):
        raise CheckpointError(
            f"{mllm.source.given} is a PEFT model with its adapter beside the weights, unmerged.",
            remedy="Merge it first: PeftModel.merge_and_unload(), save_pretrained().",
        )
    tensors = {new: mllm.tensors[name]._replace(name=new) for name, new in names.items()}
    if len(tensors) < len(names):
        twice = next(n for n in names.values() if list(names.values()).count(n) > 1)
        raise CheckpointError(
            f"{mllm.source.given} holds {twice} twice, with and without {sorted(found)[0]!r}.",
            remedy="Save the model again without its wrapper.",
        )
    changed = sum(name != new for name, new in names.items())
    message = (
        f"{changed:,} names of {mllm.source.label} come from a wrapped model "
        f"({', '.join(sorted(found))}) and are written without the wrapper."
    )
    note = CheckpointNote("wrapped", message)
    return replace(mllm, tensors=dict(sorted(tensors.items())), notes=(*mllm.notes, note))


def _find_leading(mllm: Checkpoint, names: Mapping[str, str]) -> str:
    """The wrapper that every name begins with, or nothing."""
    for prefix in (*_LEADING, _ATTRIBUTE):
        if all(new.startswith(prefix) for new in names.values()):
            has_head = any(".lm_head." in new for new in names.values())
            if prefix != _ATTRIBUTE or (has_head and "auto_map" not in mllm.config):
                return prefix
    return ""
