"""extract_lora(): write a prior as a PEFT adapter for its MLLM."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from drift_merge.errors import RecipeError
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.priors.deltas import Deltas, open_deltas
from drift_merge.priors.manifest import Prior
from drift_merge.priors.verify import verify_prior
from drift_merge.recipes.words import DTYPE_CODES
from drift_merge.storage import fingerprints
from drift_merge.storage.manifests import to_json
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.outputs.existing import Overwrite, check_output
from drift_merge.trainers.extraction import adapter as files
from drift_merge.trainers.extraction.adapter import Adapter
from drift_merge.trainers.extraction.factors import Pair, factorize
from drift_merge.trainers.extraction.memory import Target, Targets, build, find_targets
from drift_merge.trainers.wiring import optional

_PREFIX = "base_model.model."  # what PEFT puts before the names of the model


def extract_lora(
    prior: Prior,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    dtype: str = "bfloat16",
    mllm: str | None = None,
    threads: int = 1,
    overwrite: Overwrite = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Adapter:
    """Write the leading directions of every matrix of a prior as a PEFT adapter.

    The adapter is held in memory until it is written, beside one delta a thread. Every byte of
    the prior is checked first. A run that is stopped leaves nothing, and begins anew.

    Args:
        prior: opened.
        out: directory to create.
        rank: directions of every layer; give this or `energy`.
        energy: share of |delta|^2 of every layer, in (0, 1]: as few directions as hold it.
        max_rank: with `energy`, no more than so many.
        dtype: of the factors.
        mllm: where the config of the MLLM is; the prior's own source by default.
        threads: layers at a time.
        overwrite: replace `out` after success.
        progress: called with the bytes of the deltas done (4 for each element).

    Raises:
        RecipeError: transformers is missing (extra `train`); an option is wrong; nothing is left.
        SourceError: there is no config of the MLLM, or no class of transformers for it.
        AlignmentError: prior and MLLM do not match.
        VerificationError: the prior was changed or damaged.
        OutputError: `out` exists, or cannot be written.
    """
    out = Path(out)
    asked = {"rank": rank, "energy": energy, "max_rank": max_rank, "dtype": dtype}
    _require(prior, rank, energy)
    transformers = optional("transformers", install="pip install 'drift_merge[train]'")
    check_output(out, [prior.path], overwrite=overwrite)
    source = prior.manifest["sources"]["mllm"]
    place = mllm or source["repo_id"] or source["source"]
    model = build(transformers, str(place), None if mllm else source["revision"])
    verify_prior(prior, threads=threads)
    plan = fingerprints.of_json({"lora": prior.manifest.get("seal"), "mllm": mllm, **asked})
    with (
        OutputDirectory(out, plan=plan, overwrite=overwrite) as output,
        open_deltas(prior) as deltas,
    ):
        targets = find_targets(model, prior, deltas.shapes)
        one = partial(
            _one,
            deltas=deltas,
            progress=progress,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            dtype=TORCH_DTYPES[DTYPE_CODES[dtype]],
        )
        with ThreadPoolExecutor(threads) as pool:
            pairs = list(pool.map(one, targets.layers))
        deltas.require_unchanged()
        made = _adapter(prior, targets, pairs, asked)
        if not output.is_published:
            _write(made, output)
            output.publish()
        else:
            output.tidy()
    return made


def _require(prior: Prior, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise RecipeError(
            "give either a rank or a share of the energy.", remedy="Add --rank 32, or --energy 0.9"
        )
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise RecipeError(
            f"rank is {rank} and energy {energy}; expected a rank of 1 or more, or an energy in"
            " (0, 1].",
            remedy="Add --rank 32, or --energy 0.9",
        )
    bad = [name for name, entry in prior.tensors.items() if "nonfinite" in entry]
    if bad:
        raise RecipeError(
            f"{prior.path} holds NaN or Inf ({bad[0]}), which has no singular directions.",
            remedy="Compute a prior of sound checkpoints, without --allow-nonfinite.",
        )


def _one(target: Target, *, deltas: Deltas, progress: Callable[[int], None], **how: Any) -> Any:
    delta = target.delta(deltas)
    pair = factorize(delta, target.module, **how)
    progress(delta.numel() * delta.itemsize)
    return pair


def _adapter(
    prior: Prior, targets: Targets, pairs: list[Pair | None], asked: dict[str, Any]
) -> Adapter:
    found = list(zip(targets.layers, pairs, strict=True))
    kept = {target.module: pair for target, pair in found if pair is not None}
    if not kept:
        why = f"all {len(found):,} layers are equal" if found else "it holds no linear layer"
        raise RecipeError(
            f"{prior.path} leaves nothing for an adapter: {why}, and "
            f"{len(targets.left_out):,} other tensors cannot be held by one.",
            remedy="Compute a prior with --modules attn,mlp of models that differ.",
        )
    equal = tuple(target.module for target, pair in found if pair is None)
    return Adapter(prior, kept, equal, targets.left_out, asked)


def _write(made: Adapter, output: OutputDirectory) -> None:
    tensors: dict[str, Tensor] = {}
    for name, pair in made.pairs.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.b
    output.write_file(files.WEIGHTS, save(tensors, {"format": "pt"}))
    output.write_file(files.CONFIG, to_json(files.config(made)))
    output.write_file(files.MANIFEST, to_json(files.manifest(made)))
    output.write_file(files.CARD, files.card(made))
