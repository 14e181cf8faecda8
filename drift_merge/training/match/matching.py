"""Match the deltas of a prior to the parameters of a live model, and account for both.

Names in memory differ from those on the disk, wrappers add to them, and fused parameters
hold several deltas. Nothing is left out without a number and a name.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import nn

from drift_merge.errors import AlignmentError
from drift_merge.names.modules import ModuleSelection, classify, layer_of, parse_selection
from drift_merge.names.naming import name_tower
from drift_merge.names.pairing import DraftRecord, TowerSide, pair_up, tower_side
from drift_merge.names.tensors import Model, Part, Shape, matrix_shape
from drift_merge.names.towers import canonical_names
from drift_merge.training.lora.layers import Adapted
from drift_merge.training.match.coverage import Coverage, some
from drift_merge.training.match.live import LiveModel, is_quantized, list_parameters
from drift_merge.training.units import Origin, Unit

COMPUTE = "drift-prior compute REASONER MLLM -o PRIOR"


@dataclass(frozen=True, slots=True)
class Matching:
    """The units to bias, and the account of everything else."""

    units: tuple[Unit, ...]
    coverage: Coverage
    adapted: Mapping[str, Adapted]  # of the units that are adapted, by the name of the parameter

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients will be biased: factors where a weight is adapted."""
        found: dict[str, nn.Parameter] = {}
        for unit in self.units:
            if unit.is_adapted:
                factors = self.adapted[unit.parameter_name].factors
                found |= {factor.name: factor.parameter for factor in factors}
            elif unit.parameter is not None:
                found[unit.parameter_name] = unit.parameter
        return found


@dataclass(slots=True)
class _Account:
    """What has been found so far."""

    units: list[Unit] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    quantized: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)  # other shape, or not in the model
    lacking: list[str] = field(default_factory=list)  # in the model, not in the prior
    seen: set[tuple[int, int]] = field(default_factory=set)  # parameter, first element
    num_matched: int = 0


def match(
    model: nn.Module,
    tensors: Mapping[str, Shape],
    *,
    label: str = "the prior",
    modules: str | Sequence[str] = "attn,mlp",
    layers: str | int | Sequence[int | str] | None = None,
    is_strict: bool = True,
    command: str = COMPUTE,
) -> Matching:
    """Match a prior's tensors to the parameters of a model.

    Args:
        model: any module, wrapped or not, with the names of transformers in memory or on disk.
        tensors: canonical name -> shape of every delta.
        label: what the user calls the prior, for messages.
        modules: as `--modules`, "attn,mlp"; or a sequence of such words.
        layers: as `--layers`, "0:28"; or numbers; None for all.
        is_strict: refuse selected tensors without a partner; otherwise warn with their number.
        command: how to compute the prior again, for messages.

    Raises:
        AlignmentError: no tower, tensors without a partner, nothing to train, quantized weights.
        RecipeError: modules or layers cannot be read.
    """
    live = list_parameters(model)
    ours, theirs = _sides(live, tensors, label)
    words = _joined(modules) or ""
    selection = parse_selection(words, _joined(layers), theirs.tower.num_layers)
    drafts, _ = pair_up(ours, theirs)
    account = _Account()
    for draft in sorted(drafts, key=lambda draft: _order(draft.name)):
        if any(selection.takes(name) for name in draft.mllm or draft.reasoner):
            _take(draft, selection, live, ours, theirs, account)
    _require_plain(account)
    _require_partners(account, label, words, tensors, command, is_strict=is_strict)
    coverage = Coverage(
        selected=account.num_matched + len(account.mismatched) + len(account.lacking),
        matched=account.num_matched,
        units=len(account.units),
        elements=sum(unit.numel for unit in account.units),
        frozen=tuple(account.frozen),
        tied=tuple(account.tied),
        unmatched=(*account.mismatched, *account.lacking),
    )
    _require_trainable(coverage)
    adapted = {
        u.parameter_name: live.adapted[u.parameter_name] for u in account.units if u.is_adapted
    }
    return Matching(tuple(account.units), coverage, adapted)


def _joined(value: str | int | Sequence[int | str] | None) -> str | None:
    """Options of the command line as text: a list must not be read character by character."""
    if value is None or isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) else ",".join(map(str, value))


def _sides(
    live: LiveModel, tensors: Mapping[str, Shape], label: str
) -> tuple[TowerSide, TowerSide]:
    prior = Model(label, dict(tensors))
    names = {name: name for name in prior.shapes}
    ours = tower_side(prior, name_tower(prior, names, "layers.", mapped={}, side="reasoner"))
    model = live.model()
    return ours, tower_side(model, canonical_names(model, like=tensors))


def _order(name: str) -> tuple[int, int, str]:
    """The embedding first, then by layers: of tied parameters the first name is biased."""
    ranks = {"embed_tokens": 0, "layers": 1}
    return ranks.get(name.partition(".")[0], 2), layer_of(name) or 0, name


def _take(
    draft: DraftRecord,
    selection: ModuleSelection,
    live: LiveModel,
    ours: TowerSide,
    theirs: TowerSide,
    account: _Account,
) -> None:
    """Put one selected draft into the account."""
    if draft.status == "only_mllm":
        stored = theirs.stored[draft.name]
        parameter = live.parameters[stored]
        if parameter is not None and (id(parameter), 0) in account.seen:
            account.tied.append(draft.name)
        else:
            account.lacking.append(draft.name)
    elif draft.status != "matched":
        account.mismatched.append(draft.name)
    else:
        account.num_matched += len(draft.reasoner)
        for name, parts in zip(draft.mllm, draft.views, strict=True):
            if selection.takes(name):
                _take_parameter(name, parts, live, ours, theirs, account)


def _take_parameter(
    name: str,
    parts: tuple[Part, ...],
    live: LiveModel,
    ours: TowerSide,
    theirs: TowerSide,
    account: _Account,
) -> None:
    stored = theirs.stored[name]
    parameter, is_adapted = live.parameters[stored], stored in live.adapted
    if not is_adapted and is_quantized(parameter):
        # Beside adapters a quantized weight is one that nobody meant to train.
        (account.frozen if live.adapted else account.quantized).append(stored)
        return
    if not is_adapted and parameter is not None and not parameter.requires_grad:
        account.frozen.append(stored)
        return
    if parameter is not None and (id(parameter), 0) in account.seen:
        account.tied.append(name)
        return
    shape = live.shapes[stored]
    for part in parts:
        begin, unit_shape = _rows_of(part, shape, name)
        if parameter is not None:
            account.seen.add((id(parameter), begin))
        unit = Unit(
            name=part.name,
            parameter_name=stored,
            parameter=parameter,
            module=classify(part.name),
            layer=layer_of(part.name),
            shape=unit_shape,
            begin=begin,
            origin=_origin(part, ours.shapes[part.name] or ()),
            is_adapted=is_adapted,
        )
        account.units.append(unit)


def _rows_of(part: Part, shape: Shape, name: str) -> tuple[int, Shape]:
    """First element and shape of a part, whose rows must be whole."""
    cols = shape[-1] if len(shape) > 1 else 1
    if part.cols != cols:
        raise AlignmentError(
            f"{name}: the model holds {part.name} as columns of a fused and transposed tensor,"
            " which training cannot bias.",
            remedy="Compute the prior from a checkpoint that stores this tensor as the model"
            " holds it, fused.",
        )
    if part.rows * part.cols == prod(shape):
        return 0, shape
    return part.row * cols, (part.rows,) if len(shape) == 1 else (part.rows, cols)


def _origin(part: Part, stored: Shape) -> Origin:
    cols = matrix_shape(stored)[1]
    row, col = divmod(part.offset, cols)
    is_row = len(stored) < 2
    return Origin(row, col, is_transposed=not is_row and part.row_stride != cols)


def _require_plain(account: _Account) -> None:
    if account.quantized:
        raise AlignmentError(
            f"{len(account.quantized):,} selected parameters are quantized, e.g."
            f" {account.quantized[0]}: a delta cannot be added to packed values.",
            remedy="Train LoRA adapters (PEFT) on the quantized model, or load it unquantized.",
        )


def _require_partners(
    account: _Account,
    label: str,
    modules: str,
    tensors: Mapping[str, Shape],
    command: str,
    *,
    is_strict: bool,
) -> None:
    missing = [*account.mismatched, *account.lacking]
    if not missing and account.num_matched:
        return
    total = len(missing) + account.num_matched
    if total == 0:
        raise AlignmentError(
            f"modules {modules!r} and layers select no tensor of {label} or of the model.",
            remedy=f"The prior holds {_held(tensors)}.",
        )
    message = f"{len(missing):,} of {total:,} selected tensors have no partner of the same shape."
    if account.mismatched:
        message += f"\n  not in the model, or of another shape there: {some(account.mismatched)}"
    if account.lacking:
        message += f"\n  not in {label}, which holds {_held(tensors)}: {some(account.lacking)}"
    remedy = _remedy(account, modules, command)
    if is_strict or account.num_matched == 0:
        raise AlignmentError(message, remedy=remedy)
    warnings.warn(f"{message} They train without a bias.", stacklevel=4)


def _remedy(account: _Account, modules: str, command: str) -> str:
    if any(classify(name) in ("embed", "head") for name in account.mismatched):
        return (
            "The vocabulary of the model was resized or is another one: leave embed and head out,"
            " e.g. modules='attn,mlp'."
        )
    if account.lacking and not account.mismatched:
        return f"Select less, or compute a prior with them: {command} --modules {modules}"
    return (
        "Give the model that the prior was computed for, or pass strict=False to train these"
        " tensors without a bias."
    )


def _held(tensors: Iterable[str]) -> str:
    counts = Counter(map(classify, tensors))
    return ", ".join(f"{module} ({count:,})" for module, count in sorted(counts.items()))


def _require_trainable(coverage: Coverage) -> None:
    if coverage.units == 0:
        raise AlignmentError(
            f"All {len(coverage.frozen):,} matched parameters are frozen (requires_grad is"
            f" False), e.g. {some(coverage.frozen)}: there is nothing to bias.",
            remedy="Unfreeze the language tower, or select modules that are trained.",
        )
