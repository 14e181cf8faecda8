"""Laws that hold for any pair of models (hypothesis)."""

import random

from hypothesis import given
from hypothesis import strategies as st

from drift_merge.names.align import align
from drift_merge.names.tensors import Model
from drift_merge.names.towers import canonical_names
from tests.names import families as f
from tests.strategies import quick

PREFIXES = st.sampled_from(["", "model.", "language_model.model.", "llm.model.", "a.b."])
TAILS = st.sampled_from(
    [
        f.layer(),
        f.layer(bias=False),
        f.layer(qk_norm=True),
        f.fuse_tails(f.layer()),
        f.fuse_tails(f.layer(bias=False)),
        f.experts(2),
        f.fused_experts(2),
        f.fused_experts(2, transposed=True),
        f.experts(2, width=4),
        f.fused_experts(2, width=4, transposed=True),
    ]
)
EXTRAS = st.dictionaries(
    st.sampled_from(
        [
            "visual.blocks.0.attn.qkv.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "language_model.model.rotary_emb.inv_freq",
            "v_head.weight",
            "model.mm_projector.0.weight",
            "talker.model.layers.0.self_attn.q_proj.weight",
            "layers.9.odd.weight",
        ]
    ),
    st.sampled_from([(), (3,), (2, 3)]),
)


@st.composite
def models(draw, label):
    shapes = f.decoder(
        draw(PREFIXES),
        draw(st.sampled_from([None, "lm_head."])),
        layers=draw(st.integers(1, 3)),
        tails=draw(TAILS),
    )
    shapes.update(draw(EXTRAS))
    gone = draw(st.lists(st.sampled_from(sorted(shapes)), max_size=3))
    kept = {n: s for n, s in shapes.items() if n not in gone or "embed" in n or "layers.0" in n}
    other = draw(st.booleans())
    if other:
        kept = {n: tuple(x + 1 for x in s) if n.endswith("bias") else s for n, s in kept.items()}
    return Model(label, {**kept, f"visual.{label}": (1,)}, {"num_key_value_heads": f.KV})


def account(alignment):
    return sorted((sorted(r.reasoner), sorted(r.mllm), r.status, r.name) for r in alignment.records)


@quick
@given(models("one"), models("two"))
def test_records_are_a_partition_of_both_models(one, two):
    result = align(one, two, modules="attn,mlp,norm")
    for side, model in (("reasoner", one), ("mllm", two)):
        names = [name for record in result.records for name in getattr(record, side)]
        assert sorted(names) == sorted(model.shapes)
    assert all(record.reasoner or record.mllm for record in result.records)


@quick
@given(models("one"), models("two"))
def test_swapping_the_models_mirrors_the_records(one, two):
    """But that what the mllm alone has may be its own insertion, and the reasoner's may not."""

    def told(record, *, is_turned=False):
        a, b, status, name = record
        status = status if a and b else "one side"
        return (b, a, status, name) if is_turned else (a, b, status, name)

    there = account(align(one, two, modules="attn,mlp,norm"))
    back = account(align(two, one, modules="attn,mlp,norm"))
    assert sorted(map(told, there)) == sorted(told(r, is_turned=True) for r in back)


@quick
@given(models("one"), models("two"), st.randoms(use_true_random=False))
def test_the_order_of_the_files_does_not_matter(one, two, rng):
    def shuffled(model, rng: random.Random):
        items = list(model.shapes.items())
        rng.shuffle(items)
        return Model(model.label, dict(items), model.config)

    assert align(one, two) == align(shuffled(one, rng), shuffled(two, rng))


@quick
@given(models("one"))
def test_canonical_names_are_injective_and_idempotent(one):
    tower = canonical_names(one)
    names = {c: one.shapes[s] for s, c in tower.canonical.items()}
    assert len(names) == len(tower.canonical)
    again = canonical_names(Model("again", names))
    assert dict(again.canonical) == {name: name for name in names}
    assert again.num_layers == tower.num_layers


@quick
@given(models("one"), models("two"))
def test_parts_cover_every_pair_exactly_once_and_stay_inside_what_is_stored(one, two):
    data = f.fill(one.shapes)
    for pair in align(one, two, modules="attn,mlp,norm").pairs:
        assert pair.shape == two.shapes[pair.mllm]
        f.assemble(pair, data)


@quick
@given(models("one"), models("two"))
def test_counts_and_pairs_agree_with_the_records(one, two):
    result = align(one, two)
    selected = [r for r in result.records if r.status not in ("not_selected", "outside_tower")]
    matched = [r for r in selected if r.status == "matched"]
    assert (result.num_selected, result.num_matched) == (len(selected), len(matched))
    stored = {name for record in matched for name in record.mllm}
    assert stored == {pair.mllm for pair in result.pairs}
    assert len(stored) == len(result.pairs)
