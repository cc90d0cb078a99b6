"""Rank graduation: identities that hold for all data"""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import roc_auc_score

from kd_aif.trust.rank_graduation import bootstrap_estimate, class_rga, class_rgr, rga, rge, rgf, rgr

numbers = st.lists(st.integers(-5, 5), min_size=3, max_size=40)


@st.composite
def pairs(draw):
    y = draw(numbers.filter(lambda v: len(set(v)) > 1))
    return np.array(y, float), np.array(
        draw(st.lists(st.integers(0, 6), min_size=len(y), max_size=len(y))), float
    )


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_rga_reversed_is_one_minus_rga(data):
    y, predicted = data
    assert rga(y, -predicted) == pytest.approx(1 - rga(y, predicted), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_only_the_order_of_predictions_and_the_scale_of_y_matter(data):
    y, predicted = data
    expected = rga(y, predicted)
    assert rga(3 * y - 7, np.exp(predicted)) == pytest.approx(expected, abs=1e-12)
    order = np.random.default_rng(len(y)).permutation(len(y))
    assert rga(y[order], predicted[order]) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=4, max_size=60))
def test_rga_of_two_classes_is_the_area_under_the_roc_curve(data):
    y, predicted = np.array(data, float).T
    if len(set(y)) == 2:
        assert rga(y, predicted) == pytest.approx(roc_auc_score(y, predicted), abs=1e-12)


def test_nothing_changed_is_robust_fair_and_unexplained():
    y = np.random.default_rng(0).normal(size=50)
    assert [rgr(y, y), rgf(y, y), rge(y, y)] == pytest.approx([1, 1, 0], abs=1e-12)
    p = np.random.default_rng(1).dirichlet(np.ones(4), 30)
    assert class_rgr(p, p) == pytest.approx(1, abs=1e-12)


def test_a_class_without_samples_has_no_weight():
    p = np.random.default_rng(2).dirichlet(np.ones(3), 40)
    y = (p[:, 1] > p[:, 0]).astype(int)
    two = [rga(y == c, p[:, c]) for c in range(2)]
    assert class_rga(y, p) == pytest.approx(np.average(two, weights=np.bincount(y)), abs=1e-12)


def test_a_resample_with_one_class_does_not_spoil_the_interval():
    y, p = np.array([0, 0, 0, 0, 0, 1]), np.linspace(0, 1, 6)
    estimate = bootstrap_estimate(class_rga, y, np.c_[1 - p, p], n_resamples=50)
    assert np.isfinite([estimate.low, estimate.high]).all()


@pytest.mark.parametrize(
    ('y', 'predicted', 'message'),
    [
        ([1, 2], [1, np.inf], 'predicted has shape'),
        ([[1, 2]], [1, 2], 'y has shape'),
        ([1], [1], 'y has shape'),
        ([2, 2, 2], [1, 2, 3], '2 throughout'),
        ([1, 2, 3], [1, 2], '3 values'),
    ],
)
def test_bad_input(y, predicted, message):
    with pytest.raises(ValueError, match=message):
        rga(y, predicted)
