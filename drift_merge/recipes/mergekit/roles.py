"""Who is who in a file of mergekit's: mllm, reasoners, base."""

from collections.abc import Callable
from dataclasses import dataclass

from drift_merge.maths.methods import METHODS
from drift_merge.recipes.mergekit.document import Document

_OURS = {"ramplus_tl": "ram-plus"}  # names that are not ours with underscores


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What must be known of a source before it is given a role."""

    is_multimodal: bool
    num_layers: int  # of its language tower


Look = Callable[[str], SourceFacts]


@dataclass(frozen=True, slots=True)
class Roles:
    """Who is who in our terms."""

    mllm: str
    reasoners: list[str]
    base: str | None = None

    @property
    def is_origin(self) -> bool:
        """Whether the mllm itself is the base of the task vectors."""
        return self.base == self.mllm


def find_mllm(document: Document, look: Look) -> str:
    """The multimodal source: `base_model`, or the only one among the models.

    Raises:
        RecipeError: there is none, or more than one.
    """
    named = list(dict.fromkeys([*document.models, *([document.base] if document.base else [])]))
    seen = {source: look(source) for source in named}
    found = [source for source in named if seen[source].is_multimodal]
    if len(found) == 1:
        _check_layers(document, seen[found[0]].num_layers)
        return found[0]
    if found:
        raise document.refuse(
            "models",
            f"{', '.join(found)} are all multimodal, and only language towers are merged",
            "Name one MLLM and text LLMs of its family.",
        )
    raise document.refuse(
        "models",
        f"none of {', '.join(named)} is multimodal",
        "Name the MLLM as base_model or among the models.",
    )


def _check_layers(document: Document, num_layers: int) -> None:
    if document.num_layers not in (None, num_layers):
        raise document.refuse(
            "slices",
            f"layer_range ends at {document.num_layers}; the MLLM has {num_layers} layers",
            "Merge all layers with `models`; for some of them use --layers or a gradient.",
        )


def look_at(source: str) -> SourceFacts:
    """Open a source, its config and its headers alone."""
    from drift_merge.names.lineage import has_vision_config
    from drift_merge.names.towers import canonical_names
    from drift_merge.recipes.sources import as_model
    from drift_merge.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source, headers_only=True, quiet=True)
    tower = canonical_names(as_model(checkpoint))
    is_multimodal = has_vision_config(checkpoint.config) or bool(tower.outside)
    return SourceFacts(is_multimodal, tower.num_layers)


def our_name(method: str) -> str:
    """Our name of a method of mergekit."""
    return _OURS.get(method, method.replace("_", "-"))


def _task_vectors(document: Document, mllm: str) -> Roles:
    others = [model for model in document.merged if model != mllm]
    if document.base is None and METHODS[our_name(document.method)].base == "required":
        raise document.refuse("base_model", "it is missing", "Name the common ancestor.")
    if not others:
        raise document.refuse("models", "there is no text LLM to merge", "Add one.")
    if document.base != mllm:
        return Roles(mllm, others, document.base)
    if document.method == "model_stock":
        raise not_origin(document, "its angles would count the mllm too")
    if document.method == "multislerp" and len(others) == 1:
        raise not_origin(document, "with one other model the result is that model")
    return Roles(mllm, others, mllm)


def not_origin(document: Document, why: str) -> Exception:
    """The error for a method that needs another origin than the mllm."""
    return document.refuse(
        "base_model",
        f"{document.method} on the MLLM itself: {why}",
        "Name the text ancestor as base_model, and the MLLM among the models.",
    )


def _all_alike(document: Document, mllm: str) -> Roles:
    named = dict.fromkeys([*document.models, *([document.base] if document.base else [])])
    others = [model for model in named if model != mllm]
    if not others:
        raise document.refuse("models", "there is no text LLM to merge", "Add one.")
    return Roles(mllm, others)


def _two(document: Document, mllm: str) -> Roles:
    roles = _all_alike(document, mllm)
    if document.base is None or len(roles.reasoners) != 1:
        raise document.refuse(
            "models",
            f"{document.method} takes base_model and one other model",
            "Name the MLLM as base_model and the text LLM in models.",
        )
    if document.base != mllm and document.method != "slerp":
        raise document.refuse(
            "base_model",
            f"{document.method} from a text LLM to the MLLM is not the same the other way round",
            "Name the MLLM as base_model and the text LLM in models.",
        )
    return roles


def _two_merged(document: Document, mllm: str) -> Roles:
    others = [model for model in document.merged if model != mllm]
    if document.base == mllm:
        raise not_origin(document, "its two models would both be text LLMs")
    if len(others) != 1:
        raise document.refuse(
            "models",
            f"{document.method} takes two models; got {len(document.merged)}",
            "Name the MLLM and one text LLM.",
        )
    return Roles(mllm, others, document.base)


def _copied(document: Document, mllm: str) -> Roles:
    others = [model for model in document.merged if model != mllm]
    if document.base != mllm or len(others) != 1:
        raise document.refuse(
            "merge_method",
            "passthrough copies layers of one model",
            "Name the MLLM as base_model and one text LLM, whose tower takes its place.",
        )
    return Roles(mllm, others)


ROLES = {
    "delta": _task_vectors,
    "set": _all_alike,
    "pair": _two,
    "nuslerp": _two_merged,
    "passthrough": _copied,
}
