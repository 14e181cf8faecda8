"""Groups, places and scales."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.reports.figures import Group, TensorFigures, cells, largest, scale_of
from drift_merge.reports.histogram import Histogram
from drift_merge.reports.places import LANGUAGE, Place, kinds_of, part_of, place_of
from drift_merge.reports.verdict import label_of, verdict
from tests.reports.suite import naive


def figures_of(a, b, name="layers.0.mlp.up_proj.weight"):
    known = naive(a, b)
    known.pop("sign_agreement")
    return TensorFigures(name, LANGUAGE, "mlp", a.shape, **known)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_group_is_one_vector(sizes, seed):
    rng = np.random.default_rng(seed)
    pairs = [(rng.normal(size=n), np.round(rng.normal(size=n), 1)) for n in sizes]
    for a, b in pairs:
        a[0] = b[0]
    group = Group(tuple(figures_of(a, b) for a, b in pairs))
    whole = naive(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    for key in ("norm_delta", "cosine", "equal", "max_abs_delta"):
        value = whole[key]
        close = value if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
        assert getattr(group, key) == close


def test_a_group_leaves_out_what_is_not_known():
    unknown = TensorFigures("layers.0.x", LANGUAGE, "mlp", (2,), None, None, None, None)
    known = figures_of(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    both, alone = Group((unknown, known)), Group((known,))
    assert (both.cosine, both.relative_norm) == (alone.cosine, alone.relative_norm)
    assert both.num_unknown == 1
    assert Group((unknown,)).cosine is None
    assert Group((unknown,)).norm_delta is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("visual.blocks.0.attn.qkv.weight", "vision tower"),
        ("visual.merger.mlp.0.weight", "connector"),
        ("model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", "vision tower"),
        ("multi_modal_projector.linear_1.weight", "connector"),
        ("model.connector.modality_projection.proj.weight", "connector"),
        ("mlp1.1.weight", "connector"),
        ("audio_tower.layers.0.fc1.weight", "audio"),
        ("talker.weight", "other"),
    ],
)
def test_parts_are_told_by_their_names(name, part):
    assert part_of(name, is_tower=False) == part


def test_experts_share_a_place_and_layers_come_in_order():
    assert place_of("layers.11.mlp.experts.7.up_proj.weight", LANGUAGE) == Place(
        LANGUAGE, 11, "mlp.experts.up_proj"
    )
    assert place_of("visual.blocks.2.attn.qkv.bias", "vision tower").layer == 2
    assert place_of("visual.merger.mlp.0.weight", "connector").layer is None
    tensors = [
        figures_of(np.ones(2), np.ones(2), f"layers.{layer}.{kind}.weight")
        for layer in (10, 9)
        for kind in ("mlp.down_proj", "self_attn.o_proj", "input_layernorm", "self_attn.q_proj")
    ]
    grouped = cells(tensors)
    assert [place.layer for place in grouped] == [9] * 4 + [10] * 4
    order = ["input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    assert kinds_of(grouped) == order


def test_a_few_biases_do_not_set_the_scale():
    rng = np.random.default_rng(0)
    groups = []
    for at in range(10):
        b = rng.normal(size=1000)
        groups.append(Group((figures_of(b * (1.1 + at / 100), b),)))
    odd = rng.normal(size=3)
    groups.append(Group((figures_of(odd * 50, odd),)))
    scale = scale_of(groups, "relative_norm")
    assert (scale.low, scale.high) == pytest.approx((0.1, 0.19))
    assert (scale.has_lower, scale.has_higher) == (False, True)


def test_noise_does_not_fill_a_scale_and_one_value_is_a_scale_of_its_own():
    b = np.random.default_rng(0).normal(size=(3, 100))
    groups = [Group((figures_of(b[i] * (1.5 + i / 1000), b[i]),)) for i in range(3)]
    scale = scale_of(groups, "relative_norm")
    assert scale.high - scale.low == pytest.approx(0.0501, rel=1e-3)
    one = scale_of(groups[:1], "relative_norm")
    assert one.low == one.high
    assert scale_of([Group(())], "cosine") is None


@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=40
    )
)
def test_the_histogram_counts_every_entry_in_its_power_of_two(values):
    histogram = Histogram()
    histogram.add(torch.tensor(values, dtype=torch.float32))
    found = histogram.plain()
    tiny = sum(abs(value) < 2.0**-126 for value in values)
    assert found["zeros"] == tiny
    assert found["zeros"] + sum(n for _, n in found["bins"]) == len(values)
    for exponent, count in found["bins"]:
        assert count == sum(2.0**exponent <= abs(v) < 2.0 ** (exponent + 1) for v in values)


def test_the_histogram_keeps_what_is_not_finite_apart():
    histogram = Histogram()
    histogram.add(torch.tensor([float("nan"), float("inf"), -1.0, 0.0], dtype=torch.bfloat16))
    assert histogram.plain() == {"zeros": 1, "nonfinite": 2, "bins": [[0, 1]]}


def test_the_largest_are_ten_and_finite():
    rng = np.random.default_rng(0)
    tensors = [figures_of(rng.normal(size=4), np.ones(4), f"layers.{n}.x") for n in range(12)]
    tensors.append(TensorFigures("layers.12.x", LANGUAGE, "mlp", (2,), None, None, None, None))
    found = largest(tensors)
    assert len(found) == 10
    assert [t.norm_delta for t in found] == sorted((t.norm_delta for t in found), reverse=True)


@pytest.mark.parametrize(
    ("cosine", "label"),
    [
        (0.0, "Neither merge nor prior"),
        (0.299, "Neither merge nor prior"),
        (0.3, "Use as a prior"),
        (0.75, "Use as a prior"),
        (0.8, "Between: measure both"),
        (0.97, "Merge"),
        (1.0, "Merge"),
    ],
)
def test_the_verdict_follows_the_published_bands(cosine, label):
    assert label_of(cosine) == label
    found = verdict(cosine, 0.5)
    assert found.label == label
    assert f"{cosine:.3f}" in found.sentences[1]


def test_there_is_no_verdict_on_what_is_not_known_and_none_needed_on_equals():
    assert verdict(None, 0.1).label == "No verdict"
    assert verdict(1.0, 0.0).label == "Equal"
