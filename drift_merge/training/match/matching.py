"""Match the deltas of a prior to the parameters of a live model, and account for both.

Names in memory differ from those on the disk, wrappers add to them, and fused parameters
hold several deltas. Nothing is left out without a number and a name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from shlex import quote

from torch import nn

from drift_merge.errors import AlignmentError
from drift_merge.names.modules import ModuleSelection, classify, layer_of, parse_selection
from drift_merge.names.naming import name_tower
from drift_merge.names.pairing import TowerSide, tower_side
from drift_merge.names.tensors import Model, Part, Shape, matrix_shape
from drift_merge.training.lora.layers import Adapted
from drift_merge.training.match.account import Account, Asked
from drift_merge.training.match.coverage import Coverage
from drift_merge.training.match.lines import Hints, Line, Place
from drift_merge.training.match.live import LiveModel, is_quantized, list_parameters
from drift_merge.training.match.pairs import pair_live
from drift_merge.training.units import Origin, Unit

COMPUTE = "drift-prior compute REASONER MLLM -o PRIOR"


@dataclass(frozen=True, slots=True)
class Matching:
    """The units to bias, and the account of everything else."""

    units: tuple[Unit, ...]
    coverage: Coverage
    adapted: Mapping[str, Adapted]  # of the units that are adapted, by the name of the parameter
    by_value: Mapping[str, str] = field(default_factory=dict)
    # canonical name -> name in memory, of pairs that recorded values made

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


def match(
    model: nn.Module,
    tensors: Mapping[str, Shape],
    *,
    label: str = "the prior",
    modules: str | Sequence[str] = "attn,mlp",
    layers: str | int | Sequence[int | str] | None = None,
    is_strict: bool = True,
    command: str | None = None,
    hints: Hints | None = None,
    needs_values: bool = True,
) -> Matching:
    """Match a prior's tensors to the parameters of a model.

    Args:
        model: any module, wrapped or not, with the names of transformers in memory or on disk.
        tensors: canonical name -> shape of every delta.
        label: what the user calls the prior, for messages.
        modules: as `--modules`, "attn,mlp"; or a sequence of such words.
        layers: as `--layers`, "0:28"; or numbers; None for all.
        is_strict: refuse selected tensors without a partner; otherwise warn with their number.
        command: how to compute a prior of these modules, for messages.
        hints: of the prior's manifest and of the user, where names alone do not tell.
        needs_values: refuse a model on the meta device, whose names and shapes are enough here.

    Raises:
        AlignmentError: no tower, tensors without a partner, nothing to train, quantized weights.
        RecipeError: modules, layers or the map cannot be read.
    """
    live = list_parameters(model, needs_values=needs_values)
    ours = _prior_side(tensors, label)
    paired = pair_live(model, live, ours, hints or Hints())
    words = joined(modules) or ""
    selection = parse_selection(words, joined(layers), paired.num_layers)
    account = Account(
        Asked(label, words, command or f"{COMPUTE} --modules {quote(words)}"),
        ours,
        live,
        hints or Hints(),
    )
    for line in sorted(paired.lines, key=lambda line: _order(line.names[0])):
        if any(selection.takes(name) for name in line.names):
            _take(line, selection, live, ours, account)
    if account.hints.computed is not None:
        account.leave_insertions(parse_selection(*account.hints.computed, paired.num_layers))
    account.require_plain()
    account.require_partners(is_strict=is_strict)
    by_value = {name: stored for name, stored in paired.by_value.items() if selection.takes(name)}
    coverage = account.coverage(tuple(by_value))
    account.require_trainable(coverage)
    adapted = {
        u.parameter_name: live.adapted[u.parameter_name] for u in account.units if u.is_adapted
    }
    return Matching(tuple(account.units), coverage, adapted, by_value)


def joined(value: str | int | Sequence[int | str] | None) -> str | None:
    """Options of the command line as text: a list must not be read character by character."""
    if value is None or isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) else ",".join(map(str, value))


def _prior_side(tensors: Mapping[str, Shape], label: str) -> TowerSide:
    prior = Model(label, dict(tensors))
    names = {name: name for name in prior.shapes}
    return tower_side(prior, name_tower(prior, names, "layers.", mapped={}, side="reasoner"))


def _order(name: str) -> tuple[int, int, str]:
    """The embedding first, then by layers: of tied parameters the first name is biased."""
    ranks = {"embed_tokens": 0, "layers": 1}
    return ranks.get(name.partition(".")[0], 2), layer_of(name) or 0, name


def _take(
    line: Line, selection: ModuleSelection, live: LiveModel, ours: TowerSide, account: Account
) -> None:
    """Put one selected line into the account."""
    if line.status == "only_mllm":
        (place,) = line.places
        if place.stored in live.buffers:
            account.buffers.append(place.stored)
        elif account.has(live.parameters[place.stored]):
            account.tied.append(place.name)
        else:
            account.lacking.append(place)
    elif line.status != "matched":
        account.mismatched.append(line)
    else:
        account.num_matched += len(line.prior)
        for place in line.places:
            if line.is_converted or selection.takes(place.name):
                _take_parameter(place, live, ours, account)


def _take_parameter(place: Place, live: LiveModel, ours: TowerSide, account: Account) -> None:
    stored = place.stored
    if stored in live.buffers:
        account.buffers.append(stored)
        return
    parameter, is_adapted = live.parameters[stored], stored in live.adapted
    if not is_adapted and is_quantized(parameter):
        # Beside adapters a quantized weight is one that nobody meant to train.
        (account.frozen if live.adapted else account.quantized).append(stored)
        return
    if not is_adapted and parameter is not None and not parameter.requires_grad:
        account.frozen.append(stored)
        return
    if account.has(parameter):
        account.tied.append(place.name)
        return
    shape = live.shapes[stored]
    for part in place.parts:
        begin, unit_shape = _rows_of(part, shape, place.name)
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
        account.add(unit)


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
    # Rows that are cut out of a matrix follow each other in it, at a distance of whole rows.
    is_transposed = len(stored) > 1 and part.col_stride != 1 and part.row_stride != cols
    return Origin(row, col, is_transposed, 1 if is_transposed else max(1, part.row_stride // cols))
