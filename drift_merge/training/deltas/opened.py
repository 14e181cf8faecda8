"""Priors that are open for training: one or several, whole, or with a control in their place."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.priors.deltas import Deltas, open_deltas
from drift_merge.priors.manifest import MANIFEST, Prior, open_prior
from drift_merge.storage.manifests import check_seal
from drift_merge.storage.sources import parse_source
from drift_merge.training.deltas.controls import Control, ControlDeltas

_MOST_HELD = 16  # deltas whose factors are kept widened on a CPU


@dataclass(frozen=True, slots=True, eq=False)
class OpenPrior:
    """A prior with its shards mapped."""

    prior: Prior
    deltas: Deltas | ControlDeltas

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every delta."""
        return self.deltas.shapes

    @property
    def seal(self) -> str:
        """The fingerprint of the manifest, which holds those of all deltas."""
        return str(self.prior.manifest.get("seal"))

    def source(self, side: str) -> str:
        """The checkpoint that the prior was computed from: "reasoner" or "mllm"."""
        found = self.prior.manifest["sources"][side]
        if found["repo_id"]:
            return f"{found['repo_id']}@{found['revision']}"
        return str(found["source"])

    def command(self, *, modules: str | None = None, mllm: str | None = None) -> str:
        """The command that computes a prior like this one.

        Args:
            modules: other ones, as `--modules`.
            mllm: another checkpoint, or a word that stands for it.
        """
        parameters, sources = (self.prior.manifest[key] for key in ("parameters", "sources"))
        named = {
            side: f"{source['repo_id']}@{source['revision']}"
            if source["repo_id"]
            else source["source"]
            for side, source in sources.items()
        }
        options = {
            "-o": f"{self.prior.path.name}-2",
            "--base": named.get("base"),
            "--modules": modules or parameters["modules"],
            "--layers": parameters["layers"],
        }
        words = ["drift-prior", "compute", named["reasoner"], mllm or named["mllm"]]
        words += [word for pair in options.items() if pair[1] is not None for word in pair]
        return shlex.join(words)


def load_prior(where: str | Path) -> Prior:
    """Open a prior: its manifest is read and its seal checked, no delta is.

    Args:
        where: a directory, or a Hub id `org/name[@revision]`, which is downloaded.

    Raises:
        SourceError: there is no prior.
        CheckpointError: its manifest is broken, or of a newer format.
        VerificationError: its manifest was changed after it was written.
    """
    path = Path(where)
    if not path.is_dir() and parse_source(str(where)).kind != "local":
        from drift_merge.hub.cache import fetch_prior
        from drift_merge.priors.verify import verify_prior

        _, path = fetch_prior(str(where), verify=lambda found: verify_prior(open_prior(found)))
    prior = open_prior(path)
    check_seal(prior.manifest, path / MANIFEST)
    return prior


def open_for_training(prior: Prior | str | Path) -> OpenPrior:
    """Map a prior's shards and compare their headers with the manifest.

    Raises:
        CheckpointError: a tensor is missing or has another shape; see also `load_prior`.
    """
    loaded = prior if isinstance(prior, Prior) else load_prior(prior)
    return OpenPrior(loaded, open_deltas(loaded))


def combine_weights(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    """The weight of every prior: what the user gave, or 1 each.

    Raises:
        RecipeError: another number of weights than priors, or all are 0.
    """
    found = tuple(map(float, weights)) if weights is not None else (1.0,) * count
    if len(found) != count or not any(found):
        raise RecipeError(
            f"weights is {weights!r}; expected {count} numbers, one per prior, not all 0.",
            remedy="E.g. attach(model, [first, second], weights=[1.0, -0.5])",
        )
    return found


def controlled(opened: Sequence[OpenPrior], control: Control | None) -> list[OpenPrior]:
    """The priors, or the one prior with a control in place of its deltas.

    Raises:
        RecipeError: a control for several priors: the norm of their sum is in no manifest.
    """
    if control is None:
        return list(opened)
    if len(opened) > 1:
        raise RecipeError(
            "a control has the norms of one prior; there are several.",
            remedy="Attach one prior with control=, and compare with that prior alone.",
        )
    (one,) = opened
    assert isinstance(one.deltas, Deltas)
    return [replace(one, deltas=ControlDeltas(one.deltas, control, one.prior.tensors))]


def open_all(priors: Sequence[Prior | str | Path]) -> list[OpenPrior]:
    """Open one or several priors; all must hold the same tensors.

    Raises:
        RecipeError: none is given.
        AlignmentError: they hold other tensors, or of other shapes.
    """
    if not priors:
        raise RecipeError("there is no prior: the list is empty.", remedy="Give one at least.")
    opened = [open_for_training(prior) for prior in priors]
    first = opened[0]
    for other in opened[1:]:
        names = sorted(first.shapes.keys() | other.shapes.keys())
        differ = [name for name in names if first.shapes.get(name) != other.shapes.get(name)]
        if differ:
            raise AlignmentError(
                f"{len(differ):,} tensors of {first.prior.path} and {other.prior.path} differ in"
                f" shape or are in one of them only, e.g. {differ[0]}.",
                remedy="Compute all priors against the same mllm, with the same --modules and"
                " --layers.",
            )
    return opened
