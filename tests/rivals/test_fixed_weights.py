"Fixed weights: means, histograms, hand computation, self-influence as a score, faults."

import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from weight_cases import cut, double, linear, random, train, val

from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.self_influence import self_influence
from kd_aif.influence.solvers import Exact
from kd_aif.rivals.fixed_weights import (
    effective_number_weights,
    inverse_frequency,
    oracle_weights,
    random_weights_like,
    self_influence_cross,
    self_influence_weights,
    small_loss_weights,
)
from kd_aif.weights.calibration import calibrated_weights
from kd_aif.weights.sample_weights import SampleWeights

quick = hypothesis_settings(max_examples=40, deadline=None)
labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)


@quick
@given(labels, st.integers(0, 5))
def test_random_weights_keep_the_histogram_of_each_class(y, seed):
    w = random(len(y)).abs()
    found = random_weights_like(w, y, seed)
    assert all(torch.equal(found[y == c].sort().values, w[y == c].sort().values) for c in range(5))
    assert torch.equal(random_weights_like(w, None, seed).sort().values, w.sort().values) and torch.equal(
        found, random_weights_like(w, y, seed)
    )


def test_random_weights_are_random_within_the_class():
    y, w = torch.arange(3000) % 3, torch.arange(3000.0)
    assert abs(float(torch.corrcoef(torch.stack([random_weights_like(w, y), w]))[0, 1])) < 0.06


@quick
@given(labels, st.integers(0, 2**60))
def test_oracle_has_mean_one_in_every_class(y, bits):
    is_noisy = torch.tensor([bits >> i & 1 for i in range(len(y))]).bool()
    w = oracle_weights(is_noisy, y)
    for c in y.unique():
        own = y == c
        assert float(w[own].mean()) == pytest.approx(1, abs=1e-5)
        if is_noisy[own].all():
            assert (w[own] == 1).all()
        else:
            assert (w[own & is_noisy] == 0).all() and len(w[own & ~is_noisy].unique()) == 1
    assert float(oracle_weights(is_noisy).mean()) == pytest.approx(1, abs=1e-5)


@quick
@given(labels, st.floats(0, 0.99999))
def test_class_weights_have_mean_one_and_favour_the_rare(y, beta):
    counts, inverse, effective = (
        torch.bincount(y, minlength=6),
        inverse_frequency(y, 6),
        effective_number_weights(y, 6, beta),
    )
    present = y.unique()
    for w in (inverse, effective):
        assert float(w.mean()) == pytest.approx(1, abs=1e-4) and (w > 0).all()
    for c in present:
        assert float(inverse[y == c].sum()) == pytest.approx(len(y) / len(present), rel=1e-4)
    order = counts[y].argsort()
    for w in (inverse, effective):
        assert (w[order].diff() <= 1e-5).all()
    assert effective.max() / effective.min() <= inverse.max() / inverse.min() * 1.0001, (
        'the effective number lies between ones and inverse frequency'
    )


def test_effective_number_by_hand():
    y = torch.tensor([0, 0, 0, 1])
    e = torch.tensor([(1 - 0.5**3) / (1 - 0.5), 1.0])
    raw = 1 / e[y]
    assert torch.allclose(effective_number_weights(y, 2, 0.5), raw / raw.mean())


@pytest.mark.parametrize('weigh', [small_loss_weights, self_influence_weights])
def test_what_is_suspicious_weighs_less(weigh):
    values, y = random(200).exp(), torch.arange(200) % 3
    w = weigh(values, y, 2.0)
    for c in range(3):
        assert (
            float(w[y == c].mean()) == pytest.approx(1, abs=1e-4)
            and (w[y == c][values[y == c].argsort()].diff() <= 1e-6).all()
        )
    assert (
        torch.equal(weigh(values, beta=0.0), torch.ones(200))
        and torch.equal(weigh(torch.ones(4)), torch.ones(4))
        and w.dtype == torch.float32
    )


def test_self_influence_as_cross_scores():
    "The same samples on both sides are treated alike, though their indices coincide; calibration then changes nothing."
    a, again = ([double(b) for b in cut(train, 16)] for _ in range(2))
    model = linear()
    found = self_influence_cross(
        model, batch_cross_entropy, a, again, solver=Exact(damping=0.1), progress=False
    )
    assert (
        torch.allclose(found.values[0], found.reference[0])
        and (found.values <= 0).all()
        and found.index.tolist() == list(range(60))
        and torch.equal(found.labels, found.reference_labels[0])
    )
    alone = self_influence(model, batch_cross_entropy, a, Exact(damping=0.1), progress=False)
    assert torch.allclose(-found.values[0], alone.values), (
        'twice the same samples have the same mean curvature'
    )
    assert torch.equal(
        calibrated_weights(found.values, found.reference, found.labels, found.reference_labels).values,
        torch.ones(60),
    )
    assert torch.equal(SampleWeights(60).refresh(found), torch.ones(60))


def test_self_influence_cross_reads_each_set():
    found = self_influence_cross(
        linear(),
        batch_cross_entropy,
        [double(b) for b in cut(train, 16)],
        [double(b) for b in cut(val, 7)],
        progress=False,
    )
    assert (
        found.values.shape == (1, 60)
        and found.reference[0].shape == (40,)
        and torch.equal(found.reference_labels[0], val['y'])
    )


# Faults


@pytest.mark.parametrize(
    'make, message',
    [
        (
            lambda: random_weights_like(torch.ones(3), train['y']),
            'labels has 60 entries for 3 weights; give one label per sample',
        ),
        (
            lambda: random_weights_like(torch.tensor([1.0, float('nan')])),
            'weights has NaN or infinite values',
        ),
        (lambda: random_weights_like([1.0, 2.0]), 'weights is a list'),
        (lambda: random_weights_like(torch.ones(0)), 'one number per sample'),
        (
            lambda: oracle_weights(torch.zeros(3, dtype=torch.bool), train['y']),
            'labels has 60 entries for 3 is_noisy',
        ),
        (lambda: oracle_weights(torch.zeros(60), train['y']), r'give a tensor \(n,\) of bool'),
        (lambda: inverse_frequency(train['y'], 2), 'below n_classes = 2'),
        (lambda: inverse_frequency(train['y'] - 1, 3), 'labels are from -1'),
        (lambda: inverse_frequency(train['y'].float(), 3), r'give a tensor \(n,\) of int64'),
        (lambda: inverse_frequency(train['y'][:0], 3), 'labels is empty'),
        (lambda: effective_number_weights(train['y'], 3, 1.5), 'beta is 1.5'),
        (lambda: effective_number_weights(train['y'], 3, 1.0), 'use inverse_frequency'),
        (lambda: small_loss_weights(torch.tensor([1.0, float('inf')])), 'losses has NaN or infinite'),
        (lambda: small_loss_weights(torch.ones(3), beta=-1.0), 'beta is -1'),
        (lambda: self_influence_weights(torch.ones(2, 2)), r'values is of shape \(2, 2\)'),
    ],
)
def test_faults_name_argument_and_remedy(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
