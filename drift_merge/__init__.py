"""drift_merge: move the reasoning of a text LLM into a multimodal LLM.

Three jobs over one streaming engine: align the names of a text LLM with an MLLM's language
tower and stream theta_reasoner - theta_mllm (a prior); write merges as complete checkpoints;
feed a prior into training. This is the public face; everything else may change.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drift_merge import trainers as trainers
    from drift_merge.api.merges import apply as apply
    from drift_merge.api.merges import linear as linear
    from drift_merge.api.merges import merge as merge
    from drift_merge.api.merges import run as run
    from drift_merge.api.merges import sweep as sweep
    from drift_merge.api.priors import align as align
    from drift_merge.api.priors import compress as compress
    from drift_merge.api.priors import compute as compute
    from drift_merge.api.searches import search as search
    from drift_merge.errors import AlignmentError as AlignmentError
    from drift_merge.errors import CheckpointError as CheckpointError
    from drift_merge.errors import DriftMergeError as DriftMergeError
    from drift_merge.errors import EvaluationError as EvaluationError
    from drift_merge.errors import OutputError as OutputError
    from drift_merge.errors import RecipeError as RecipeError
    from drift_merge.errors import SourceError as SourceError
    from drift_merge.errors import VerificationError as VerificationError
    from drift_merge.evaluation.scores import Scores as Scores
    from drift_merge.hub.publish import pull as pull
    from drift_merge.hub.publish import push as push
    from drift_merge.maths import injection as injection
    from drift_merge.maths.methods import METHODS as METHODS
    from drift_merge.maths.methods import Method as Method
    from drift_merge.maths.methods.own import merge_method as merge_method
    from drift_merge.merges.manifest import Merge as Merge
    from drift_merge.merges.manifest import open_merge as open_merge
    from drift_merge.merges.verify import verify_merge as verify_merge
    from drift_merge.names.tensors import Alignment as Alignment
    from drift_merge.priors.deltas import open_deltas as open_deltas
    from drift_merge.priors.manifest import Prior as Prior
    from drift_merge.priors.manifest import open_prior as open_prior
    from drift_merge.priors.verify import verify_prior as verify_prior
    from drift_merge.recipes.recipe import Recipe as Recipe
    from drift_merge.trainers.extraction.extract import extract_lora as extract_lora
    from drift_merge.training.attach import attach as attach
    from drift_merge.training.deltas.opened import load_prior as load_prior
    from drift_merge.training.handle import Handle as Handle

# torch says so once where numpy is not installed; it is no dependency, and nothing here needs it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)

# Loaded on first use: the commands' --help must not wait for what they do not need.
_FACE = {
    "drift_merge.api.priors": ("align", "compress", "compute"),
    "drift_merge.api.merges": ("apply", "linear", "merge", "run", "sweep"),
    "drift_merge.api.searches": ("search",),
    "drift_merge.evaluation.scores": ("Scores",),
    "drift_merge.errors": (
        *("AlignmentError", "CheckpointError", "DriftMergeError", "EvaluationError"),
        "OutputError",
        *("RecipeError", "SourceError", "VerificationError"),
    ),
    "drift_merge.maths.methods": ("METHODS", "Method"),
    "drift_merge.maths.methods.own": ("merge_method",),
    "drift_merge.recipes.recipe": ("Recipe",),
    "drift_merge.merges.manifest": ("Merge", "open_merge"),
    "drift_merge.merges.verify": ("verify_merge",),
    "drift_merge.names.tensors": ("Alignment",),
    "drift_merge.priors.manifest": ("Prior", "open_prior"),
    "drift_merge.priors.deltas": ("open_deltas",),
    "drift_merge.priors.verify": ("verify_prior",),
    "drift_merge.hub.publish": ("pull", "push"),
    "drift_merge.trainers.extraction.extract": ("extract_lora",),
    "drift_merge.training.attach": ("attach",),
    "drift_merge.training.deltas.opened": ("load_prior",),
    "drift_merge.training.handle": ("Handle",),
}
_HOME = {name: module for module, names in _FACE.items() for name in names}
# Whole modules: rules of your own (`injection.Sums`), and the adapters (`drift_merge.trainers.hf`).
_MODULES = {"injection": "drift_merge.maths.injection", "trainers": "drift_merge.trainers"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'drift_merge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*_HOME, *_MODULES})
