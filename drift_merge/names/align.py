"""Pair the tensors of a reasoner with those of an MLLM's language tower.

The reasoner is a text LLM, or another fine-tuning of the same MLLM, whose own vision tower is then
outside the tower, and counted.

Every stored tensor of both models ends in exactly one record. Fused and split storage,
transposed experts and other vocabularies are bridged by views of the reasoner's data
(`Part`, `RowMap`); nothing here touches data.
"""

import shlex
from dataclasses import replace

from drift_merge.errors import AlignmentError
from drift_merge.names.account import take_account
from drift_merge.names.advice.offers import Attempt, offer_names, offer_towers
from drift_merge.names.embeddings import VocabularySource, pair_rows
from drift_merge.names.layouts import is_other_sense
from drift_merge.names.lineage import (
    has_vision_config,
    is_encoder_decoder,
    lineage,
    weigh_findings,
)
from drift_merge.names.modules import DEFAULT_MODULES, parse_selection
from drift_merge.names.name_map import NameMap, SideMap
from drift_merge.names.pairing import TowerSide, pair_up, tower_side
from drift_merge.names.refusals import require_complete
from drift_merge.names.second_names import find_second_names, second_name_findings
from drift_merge.names.tensors import Alignment, Finding, Model, RowMap
from drift_merge.names.towers import agree, choose, find_towers, likely_lists, tower_score
from drift_merge.names.vocabulary import compare_vocabularies

__all__ = ["align", "require_complete"]


def align(
    reasoner: Model,
    mllm: Model,
    *,
    modules: str = DEFAULT_MODULES,
    layers: str | None = None,
    name_map: NameMap | None = None,
    vocabularies: VocabularySource = None,
    rows_by_number: bool = False,
    is_tower: bool = False,
    has_router_biases: bool = False,
) -> Alignment:
    """Pair the reasoner's tensors with those of the mllm's language tower.

    Of a group that one side fuses (q, k and v; gate and up; experts) there is one record,
    named after the fused tensor, and one pair for each tensor that the mllm stores.

    Args:
        reasoner: names, shapes and config of the reasoner, a text LLM or an MLLM. Where a shape
            is unknown (None) names decide, and the pair has no parts.
        mllm: the same of the multimodal model.
        modules: comma list, see `modules.parse_selection`.
        layers: e.g. "0:28" in the mllm's canonical numbers; None for all.
        name_map: what a `--map` file says.
        vocabularies: token -> id of the reasoner and of the mllm, or what reads both; it is
            called if a tensor with a row per token is selected, unless both models are the same.
        rows_by_number: rows of the reasoner are those of the mllm, as in a prior.
        is_tower: `mllm` is nothing but a language tower (the tensors of a prior), so that it
            need not have a vision tower.
        has_router_biases: see `modules.parse_selection`.

    Returns:
        The alignment, complete or not: see `require_complete`.

    Raises:
        AlignmentError: if a side has no language tower or several alike, the arguments are
            swapped, or embed or head is selected without vocabularies.
        RecipeError: if modules, layers or the map cannot be understood.
    """
    maps = name_map or NameMap()

    def attempt(tried: NameMap) -> Alignment:
        return _align(
            reasoner,
            mllm,
            tried,
            modules=modules,
            layers=layers,
            vocabularies=vocabularies,
            rows_by_number=rows_by_number,
            is_tower=is_tower,
            has_router_biases=has_router_biases,
        )

    try:
        found = attempt(maps)
    except AlignmentError as error:
        error.remedy = _remedy_with_map(error, reasoner, mllm, maps, attempt)
        raise
    if found.num_matched == found.num_selected:
        return found
    return replace(found, offer=offer_names(found, maps, attempt))


def _align(
    reasoner: Model,
    mllm: Model,
    maps: NameMap,
    *,
    modules: str,
    layers: str | None,
    vocabularies: VocabularySource,
    rows_by_number: bool,
    is_tower: bool,
    has_router_biases: bool,
) -> Alignment:
    for model, side_map, side in ((reasoner, maps.reasoner, "reasoner"), (mllm, maps.mllm, "mllm")):
        _refuse_encoder_decoder(model, side_map, side)
    ours, theirs = _choose_towers(reasoner, mllm, maps)
    roles = [] if is_tower else _check_roles(ours, theirs)
    selection = parse_selection(
        modules, layers, theirs.tower.num_layers, has_router_biases=has_router_biases
    )
    second = find_second_names(ours, theirs)
    theirs = second.side
    drafts, hints = pair_up(ours, theirs)
    findings = [*roles, *lineage(reasoner.config, mllm.config), *hints]
    row_maps: dict[str, RowMap] = {}
    if not rows_by_number and not _is_same(reasoner, mllm):
        drafts, row_maps, both = pair_rows(drafts, selection, ours, theirs, vocabularies)
        findings += compare_vocabularies(*both) if both else ()
    findings += second_name_findings(second)
    account = take_account(
        drafts, selection, ours, theirs, findings=findings, row_maps=row_maps, second=second
    )
    return weigh_findings(account)


def _remedy_with_map(
    error: AlignmentError, reasoner: Model, mllm: Model, maps: NameMap, attempt: Attempt
) -> str:
    """The remedy of an error, with a map of both sides where one of them has no tower found."""
    lists = {}
    for model, side_map, side in ((reasoner, maps.reasoner, "reasoner"), (mllm, maps.mllm, "mllm")):
        try:
            _refuse_encoder_decoder(model, side_map, side)
            find_towers(model, side=side, name_map=side_map)
        except AlignmentError:
            lists[side] = likely_lists(model)
    offer = offer_towers(lists, maps, attempt) if lists else ""
    if not offer:
        return error.remedy
    return f"If these lists of layers are the language towers, give this file with --map:\n{offer}"


def _is_same(one: Model, other: Model) -> bool:
    return one is other or (one.label == other.label and one.shapes == other.shapes)


def _refuse_encoder_decoder(model: Model, side_map: SideMap, side: str) -> None:
    """Refuse a model whose decoder reads an encoder, unless the map says which tower is meant."""
    if side_map.tower is not None or not is_encoder_decoder(model.config):
        return
    raise AlignmentError(
        f"{model.label} is an encoder-decoder (is_encoder_decoder in its config.json): its decoder"
        " reads an encoder in every layer, which a decoder alone does not.",
        remedy="Choose a model whose text LLM is a decoder alone. To pair the decoders all the"
        " same, name their lists of layers in a file given with --map: drift-prior guide layouts",
    )


def _choose_towers(reasoner: Model, mllm: Model, maps: NameMap) -> tuple[TowerSide, TowerSide]:
    """Take the two towers that agree best; a thinker, not a talker."""
    ours = find_towers(reasoner, side="reasoner", name_map=maps.reasoner)
    theirs = find_towers(mllm, side="mllm", name_map=maps.mllm)
    if len(ours) == 1 and len(theirs) == 1:
        return tower_side(reasoner, ours[0]), tower_side(mllm, theirs[0])
    one = [tower_side(reasoner, tower) for tower in ours]
    other = [tower_side(mllm, tower) for tower in theirs]
    best = [[agree(a.shapes, b.shapes) for b in other] for a in one]
    by_row = [
        (max(row), *tower_score(reasoner, a.tower, None)) for row, a in zip(best, one, strict=True)
    ]
    chosen = one[ours.index(choose(ours, by_row, reasoner, "reasoner"))]
    by_column = [(agree(chosen.shapes, b.shapes), *tower_score(mllm, b.tower, None)) for b in other]
    return chosen, other[theirs.index(choose(theirs, by_column, mllm, "mllm"))]


def _check_roles(ours: TowerSide, theirs: TowerSide) -> list[Finding]:
    if _sees(theirs):
        return _inserted(ours, "reasoner") + _inserted(theirs, "mllm")
    labels = (theirs.model.label, ours.model.label)
    if _sees(ours):
        raise AlignmentError(
            f"swapped arguments: {ours.model.label} has a vision tower and {theirs.model.label}"
            f" has none; the reasoner comes first, the mllm second.",
            remedy=f"drift-prior align {shlex.join(labels)}",
        )
    message = f"{theirs.model.label} has no tensor outside its language tower: not an MLLM."
    remedy = "Nothing to do if two text LLMs are meant; otherwise check the second argument."
    return [Finding("no_vision", "warning", message, remedy)]


def _sees(side: TowerSide) -> bool:
    outside = side.tower.outside
    if outside and has_vision_config(side.model.config):
        return True
    return any(is_other_sense(name) for name in outside)


def _inserted(one: TowerSide, side: str) -> list[Finding]:
    findings = []
    if one.tower.mtp:
        shown = ", ".join(map(str, one.tower.mtp))
        message = (
            f"The {side} has {len(one.tower.mtp)} blocks of multi-token prediction (layers {shown})"
            ": they are not counted as layers, and outside the tower if the other model has none."
        )
        remedy = "Nothing to do: they serve speculative decoding alone."
        findings.append(Finding("mtp", "info", message, remedy))
    numbers = one.tower.inserted
    if not numbers:
        return findings
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    message = (
        f"The {side} has {len(numbers)} inserted cross-attention layers ({shown}); they are"
        f" outside the language tower, and the other layers are numbered without them."
    )
    remedy = "Nothing to do: layer i is the i-th layer with self-attention."
    return [*findings, Finding("inserted_layers", "info", message, remedy)]
