"""Every merge method on small files, and the same arithmetic on whole tensors in memory.

Names are worked out here by hand (the pair stores its tower as `model.NAME` on both sides), so
that a fault of the alignment cannot hide one of the stream.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from drift_merge.engine.job import RunOptions
from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.options import OPTIONS
from drift_merge.merges.make import MadeMerge, make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import MERGE_MODULES
from drift_merge.storage.fingerprints import key_of
from tests import checkpoints as c
from tests.maths.methods.driver import merge_with, settings_for
from tests.runs import as_stored, as_tensor

LAYERS = 2
GIVEN = {"t": 0.3, "density": 0.4}  # options that some variants have no default for
WEIGHTS = (0.6, -0.25)  # of the reasoners, where a variant has no default
KEEP_LAYERS = "0:1"  # layer-swap's own default would keep every layer of a small tower
MERGED = re.compile(r"model\.(layers\.|norm\.)")
RANDOM = ("dare-linear", "dare-ties", "della", "della-linear")


class Case(NamedTuple):
    """One method in one variant, with or without a base."""

    name: str
    variant: str
    has_base: bool

    @property
    def num_reasoners(self) -> int:
        """Two where the method takes several."""
        return 2 if METHODS[self.name].reasoners[1] is None else 1

    def reasoners(self, sources: "Sources") -> tuple[Path, ...]:
        """As many as there are, and no more than the method takes."""
        return sources.reasoners[: self.num_reasoners]

    @property
    def options(self) -> dict[str, float]:
        """What its variant has no default for."""
        required = METHODS[self.name].required.get(self.variant, ())
        return {key: value for key, value in GIVEN.items() if key in required}

    @property
    def weights(self) -> tuple[float, ...]:
        """What is given; () where the variant has a default."""
        required = METHODS[self.name].required.get(self.variant, ())
        return WEIGHTS[: self.num_reasoners] if "weight" in required else ()


def _cases() -> list[Case]:
    bases = {"none": [False], "required": [True], "optional": [False, True]}
    return [
        Case(method.name, variant, has_base)
        for method in METHODS.values()
        for variant in method.variants
        for has_base in bases[method.base]
    ]


def name_of(case: Case) -> str:
    """For the ids of tests."""
    return f"{case.name}-{case.variant}" + ("-base" if case.has_base else "")


CASES = _cases()


class Sources(NamedTuple):
    """Checkpoint directories of one tower."""

    reasoners: tuple[Path, ...]
    mllm: Path
    base: Path

    def flags(self, case: Case) -> list[str]:
        """The sources as `verify` takes them."""
        reasoners = [str(path) for path in self.reasoners[: case.num_reasoners]]
        flags = [word for path in reasoners for word in ("--reasoner", path)]
        return [*flags, "--mllm", str(self.mllm), *(["--base", str(self.base)] * case.has_base)]

    def arguments(self, case: Case) -> list[str]:
        """The sources as a merge method takes them."""
        reasoners = [str(path) for path in self.reasoners[: case.num_reasoners]]
        return [*reasoners, str(self.mllm), *(["--base", str(self.base)] if case.has_base else [])]


def write_sources(
    directory: Path,
    *,
    layers: int = LAYERS,
    num_shards: tuple[int, int, int, int] = (1, 1, 1, 1),
    order: int = 1,
    changes: dict[str, tuple[int, ...]] | None = None,
    dtypes: tuple[str, str, str, str] = ("BF16", "F32", "BF16", "F16"),
) -> Sources:
    """Two reasoners, an mllm and a base; the same values every time.

    Args:
        directory: where.
        layers: of the tower.
        num_shards: of reasoner, reasoner, mllm and base.
        order: -1 stores the tensors of every file in reverse.
        changes: shapes of some tensors of the tower, by stored name.
        dtypes: of reasoner, reasoner, mllm and base.
    """
    shapes = c.text_shapes(layers) | (changes or {})
    found = {}
    for number, name in enumerate(("one", "two", "mllm", "base")):
        is_mllm = name == "mllm"
        own = shapes | c.vision_shapes() if is_mllm else shapes
        tensors = c.random_tensors(own, number + 1, dtype=dtypes[number])
        found[name] = c.write_checkpoint(
            directory / name,
            dict(list(tensors.items())[::order]),
            c.mllm_config(layers) if is_mllm else c.text_config(layers),
            num_shards=num_shards[number],
            sidecars=c.SIDECARS if is_mllm else None,
        )
    return Sources((found["one"], found["two"]), found["mllm"], found["base"])


def recipe_of(case: Case, sources: Sources, **changes: Any) -> Recipe:
    """The request of a case; `changes` are fields of `Recipe` and options."""
    own = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
    values: dict[str, Any] = {"modules": MERGE_MODULES, "weights": case.weights}
    values |= {"variant": case.variant} | changes
    kept = {"keep_layers": KEEP_LAYERS} if case.name == "layer-swap" else {}
    values["options"] = case.options | kept | changes.get("options", {}) | own
    return Recipe(
        method=case.name,
        reasoners=tuple(map(str, sources.reasoners[: case.num_reasoners])),
        mllm=str(sources.mllm),
        base=str(sources.base) if case.has_base else None,
        **values,
    )


def run_merge(
    case: Case,
    sources: Sources,
    out: Path,
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
    **changes: Any,
) -> MadeMerge:
    """Make the merge of a case, without the command line."""
    prepared = prepare(recipe_of(case, sources, **changes), quiet=True)
    options = RunOptions(threads=threads, progress=progress)
    return make_merge(prepared, prepared.plan(), out, options)


def is_kept(case: Case, name: str) -> bool:
    """Whether layer-swap leaves a tensor to the mllm."""
    return case.name == "layer-swap" and "layers.0." in name


def in_memory(
    case: Case,
    sources: Sources,
    *,
    selected: re.Pattern[str] = MERGED,
    seed: int = 0,
    **options: Any,
) -> c.Tensors:
    """The checkpoint that `run_merge` must write, computed on whole tensors."""
    mllm = c.read_tensors(sources.mllm)
    reasoners = [c.read_tensors(path) for path in sources.reasoners[: case.num_reasoners]]
    base = c.read_tensors(sources.base) if case.has_base else {}
    found = {}
    for name, own in mllm.items():
        found[name] = own
        if selected.match(name) and not is_kept(case, name):
            canonical = name.removeprefix("model.")
            inputs = [own, *(tensors[name] for tensors in reasoners), base.get(name)]
            found[name] = merged_tensor(case, inputs, key_of(seed, case.name, canonical), options)
    return found


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """What a worker of the stream has: a dot product of torch rounds by the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merged_tensor(
    case: Case, inputs: list[c.Stored | None], key: int, options: dict[str, Any] | None = None
) -> c.Stored:
    """One tensor of the output from the mllm's, the reasoners' and the base's (or None)."""
    own, *reasoners, base = inputs
    settings = settings_for(
        case.name,
        own.shape,
        variant=case.variant,
        weights=case.weights or None,
        reasoners=len(reasoners),
        key=key,
        **case.options | (options or {}),
    )
    with torch.inference_mode(), one_torch_thread():
        result = merge_with(
            settings,
            case.name,
            as_tensor(own),
            [as_tensor(reasoner) for reasoner in reasoners],
            None if base is None else as_tensor(base),
        )
    return as_stored(result, own.dtype)
