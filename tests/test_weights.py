"Weights as a property: mean one, monotone, blind to the unit of the scores, exactly one where nothing is wrong; and what unfit input is told."
import math, warnings

import pytest, torch
from hypothesis import given, settings, strategies as st
from kd_aif.influence import CrossScores
from kd_aif.weights import (EMA, GRID, TRANSFORMS, Multiplicative, Replace, SampleWeights, balanced, calibrated_weights, conformal_intervals, decreasing_density,
                            effective_sample_size, p_value_distribution, share_of_null, weights_from_influence)

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
transforms = st.sampled_from(sorted(TRANSFORMS))
whole = st.lists(st.integers(-40, 40), min_size=1, max_size=60).map(lambda v: torch.tensor(v, dtype=torch.float64))     # many ties
betas = st.floats(0, 8)

MONOTONE = dict(affine=lambda s: 3*s - 7, cube=lambda s: s**3, exp=lambda s: (s/10).exp(), atan=lambda s: (s/10).atan(), ranks=lambda s: s.long().double())


def sample(n, share_bad, seed, shift=3., classes=3, m=200):
    "Scores of n training samples, a share of them bad, and of m good ones; classes differ in level and unit"
    g = torch.Generator().manual_seed(seed)
    y, z = torch.randint(classes, (n,), generator=g), torch.randint(classes, (m,), generator=g)
    bad = torch.rand(n, generator=g) < share_bad
    level = lambda labels, v: 10.*labels + (labels + 1)*v
    return level(y, torch.randn(n, generator=g) - shift*bad), level(z, torch.randn(m, generator=g)), y, z, bad


# Published form

@quick
@given(whole, transforms, betas)
def test_published_weights_have_mean_one_and_the_order_of_the_scores(scores, transform, beta):
    w = weights_from_influence(scores, transform, beta)
    assert w.shape == scores.shape and w.dtype == torch.float32
    assert float(w.double().mean()) == pytest.approx(1, abs=1e-5) and (w >= 0).all()
    assert (w[scores.argsort(stable=True)].diff() >= -1e-6).all()
    for value in scores.unique(): assert len(w[scores == value].unique()) == 1, 'equal scores, unequal weights'

@quick
@given(whole, st.sampled_from(['sigmoid', 'exp_minmax', 'rank']), betas, st.floats(.01, 100), st.floats(-50, 50))
def test_published_weights_do_not_depend_on_the_unit(scores, transform, beta, scale, offset):
    a, b = weights_from_influence(scores, transform, beta), weights_from_influence(scale*scores + (0 if transform == 'rank' else offset), transform, beta)
    assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)

@quick
@given(whole, st.randoms(use_true_random=False), transforms)
def test_published_weights_follow_their_samples(scores, random, transform):
    order = torch.tensor(random.sample(range(len(scores)), len(scores)))
    assert torch.allclose(weights_from_influence(scores[order], transform), weights_from_influence(scores, transform)[order], atol=1e-6)

@quick
@given(whole, st.sampled_from(['sigmoid', 'exp_minmax', 'rank']))
def test_without_strength_all_weights_are_one(scores, transform):
    assert torch.equal(weights_from_influence(scores, transform, 0.), torch.ones(len(scores)))

@pytest.mark.parametrize('transform', ['sigmoid', 'exp_minmax', 'rank'])
def test_more_strength_spreads_the_weights(transform):
    s = torch.linspace(-2, 3, 50)
    sizes = [effective_sample_size(weights_from_influence(s, transform, b)) for b in (0., .5, 1., 4.)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 1 and sizes[-1] < .9

def test_rank_is_one_rule_for_few_and_for_many_samples():
    s = torch.randn(2500, generator=torch.Generator().manual_seed(0)).mul(20).round()
    w = weights_from_influence(s, 'rank')
    below = (s[None] < s[:, None]).double().mean(1)
    assert torch.allclose(w.double(), below/below.mean(), atol=1e-5)

@pytest.mark.parametrize('transform', sorted(TRANSFORMS))
def test_a_great_strength_still_gives_weights(transform):
    w = weights_from_influence(torch.linspace(-1, 1, 20), transform, 1000.)
    assert torch.isfinite(w).all() and float(w.mean()) == pytest.approx(1, abs=1e-4) and (w.diff() >= -1e-6).all()

@pytest.mark.parametrize('scores, kwargs, error, message', [
    (torch.ones(3), dict(transform='softmax'), ValueError, "transform is 'softmax'; use one of sigmoid"),
    (torch.ones(3), dict(beta=-.5), ValueError, 'beta is -0.5; give a strength'),
    (torch.ones(3), dict(beta=math.nan), ValueError, 'beta is nan'),
    (torch.tensor([1., math.nan, math.inf]), {}, ValueError, 'scores has 2 values that are NaN or infinite'),
    (torch.ones(3, 2), {}, ValueError, r'scores has shape \(3, 2\); give one score per sample'),
    (torch.ones(0), {}, ValueError, 'scores is empty'),
    ([1., 2.], {}, TypeError, 'scores is a list; give a tensor')])
def test_unfit_scores_are_named(scores, kwargs, error, message):
    with pytest.raises(error, match=message): weights_from_influence(scores, **kwargs)


# Balance and effective size

@quick
@given(st.lists(st.tuples(st.just(0.) | st.floats(1e-6, 100), st.integers(0, 4)), min_size=1, max_size=40))
def test_balanced_is_mean_one_in_each_class_and_keeps_ratios(pairs):
    w, y = torch.tensor([p[0] for p in pairs], dtype=torch.float64), torch.tensor([p[1] for p in pairs])
    b = balanced(w, y)
    for c in y.unique():
        rows = y == c
        assert float(b[rows].mean()) == pytest.approx(1)
        if w[rows].any(): assert torch.allclose(b[rows]*w[rows].mean(), w[rows])
        else: assert (b[rows] == 1).all()
    assert 1/len(w) - 1e-9 <= effective_sample_size(b) <= 1 + 1e-9


# Conformal p-values

@quick
@given(whole, whole, st.integers(1, 4), seeds)
def test_intervals_by_counting(scores, reference, classes, seed):
    g = torch.Generator().manual_seed(seed)
    y, z = torch.randint(classes, (len(scores),), generator=g), torch.randint(classes, (len(reference),), generator=g)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        low, high = conformal_intervals(scores, reference, y, z)
    assert bool(caught) == (not set(y.tolist()) <= set(z.tolist()))
    for s, c, l, h in zip(scores, y, low, high):
        own = reference[z == c]
        if not len(own): assert (l, h) == (0, 1)                                # a class without reference is not judged
        else: assert float(l) == pytest.approx(int((own < s).sum())/(len(own) + 1)) and float(h) == pytest.approx((int((own <= s).sum()) + 1)/(len(own) + 1))
    assert (low >= 0).all() and (high <= 1).all() and (low < high).all()

@quick
@given(whole, whole, st.sampled_from(sorted(MONOTONE)))
def test_intervals_depend_on_ranks_alone(scores, reference, name):
    f = MONOTONE[name]
    for a, b in zip(conformal_intervals(scores, reference), conformal_intervals(f(scores), f(reference))): assert torch.equal(a, b)

@quick
@given(whole)
def test_p_values_of_the_reference_itself_are_uniform(reference):
    "Leave one out: the mean of the p-values' distribution over all choices of the sample is the diagonal at k/m."
    m = len(reference)
    parts = [conformal_intervals(reference[i:i+1], torch.cat([reference[:i], reference[i+1:]])) for i in range(m)] if m > 1 else [(torch.zeros(1).double(), torch.ones(1).double())]
    F = p_value_distribution(*(torch.cat(p) for p in zip(*parts)), torch.arange(m + 1)/m)
    assert torch.allclose(F, torch.arange(m + 1).double()/m, atol=1e-6)

@pytest.mark.parametrize('kwargs, message', [
    (dict(labels=torch.zeros(4, dtype=torch.long)), 'give both or neither'), (dict(reference_labels=torch.zeros(3, dtype=torch.long)), 'give both or neither'),
    (dict(labels=torch.zeros(3, dtype=torch.long), reference_labels=torch.zeros(3, dtype=torch.long)), 'labels has 3 entries for 4 scores'),
    (dict(labels=torch.zeros(4, dtype=torch.long), reference_labels=torch.zeros(4, dtype=torch.long)), 'reference_labels has 4 entries for 3 scores'),
    (dict(scores=torch.tensor([math.nan])), 'scores has 1 values'), (dict(reference=torch.tensor([math.inf, 0.])), 'reference has 1 values'),
    (dict(reference=torch.ones(0)), 'reference is empty'), (dict(scores=torch.ones(0)), 'scores is empty')])
@pytest.mark.parametrize('function', [conformal_intervals, calibrated_weights])
def test_unfit_comparisons_are_named(function, kwargs, message):
    with pytest.raises(ValueError, match=message): function(**(dict(scores=torch.ones(4), reference=torch.ones(3)) | kwargs))

@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=100))
def test_density_decreases_and_holds_all_mass(points):
    F = torch.tensor([sum(p <= float(t) for p in points)/len(points) for t in GRID]).double()
    F[0] = 0.
    f = decreasing_density(F)
    assert (f.diff() <= 1e-9).all() and (f >= -1e-12).all() and float((f*GRID.diff()).sum()) == pytest.approx(1)
    mass = torch.cat([f.new_zeros(1), (f*GRID.diff()).cumsum(0)])
    assert (mass >= F - 1e-9).all(), 'the majorant lies above the distribution'
    assert 0 <= share_of_null(F, 50) <= 1


# Calibrated weights

@quick
@given(st.floats(0, .9), seeds, st.integers(1, 4), st.booleans(), st.sampled_from([.05, 1.]))
def test_calibrated_weights_are_balanced_and_monotone_within_a_class(share, seed, classes, by_class, significance):
    s, r, y, z, bad = sample(300, share, seed, classes=classes)
    labels = (y, z) if by_class else ()
    w = calibrated_weights(s, r, *labels, significance=significance)
    assert w.values.dtype == torch.float32 and torch.isfinite(w.values).all() and (w.values >= 0).all()
    assert ((w.probability >= 0) & (w.probability <= 1)).all() and 0 <= w.clean_fraction <= 1 and 0 < w.p_value <= 1
    groups = y if by_class else torch.zeros_like(y)
    for c in groups.unique():
        rows = groups == c
        assert float(w.values[rows].mean()) == pytest.approx(1, abs=1e-4)
        order = s[rows].argsort()
        assert (w.probability[rows][order].diff() >= -1e-6).all() and (w.values[rows][order].diff() >= -1e-5).all()
    if w.p_value > significance: assert torch.equal(w.values, torch.ones(300)) and torch.equal(w.probability, torch.ones(300))

@quick
@given(seeds, st.floats(0, .8), st.sampled_from(sorted(MONOTONE)), st.booleans())
def test_calibrated_weights_depend_on_ranks_alone(seed, share, name, by_class):
    g, f = torch.Generator().manual_seed(seed), MONOTONE[name]
    s, r = (torch.randint(-40, 41, (n,), generator=g).double() for n in (150, 80))
    s -= 15*(torch.rand(150, generator=g) < share).double()
    labels = (torch.randint(3, (150,), generator=g), torch.randint(3, (80,), generator=g)) if by_class else ()
    a, b = calibrated_weights(s, r, *labels, significance=1), calibrated_weights(f(s), f(r), *labels, significance=1)
    assert torch.equal(a.values, b.values) and a.clean_fraction == b.clean_fraction and a.p_value == b.p_value

@quick
@given(seeds, st.integers(0, 2), st.floats(.1, 10), st.floats(-100, 100))
def test_the_unit_of_one_class_does_not_matter(seed, c, scale, offset):
    s, r, y, z, _ = sample(200, .4, seed)
    s, r = s.double(), r.double()
    t, u = torch.where(y == c, scale*s + offset, s), torch.where(z == c, scale*r + offset, r)
    assert torch.allclose(calibrated_weights(s, r, y, z).values, calibrated_weights(t, u, y, z).values, atol=1e-5)

@quick
@given(seeds, st.floats(0, .8), st.integers(1, 3), st.randoms(use_true_random=False))
def test_weights_follow_their_samples(seed, share, folds, random):
    s, r, y, z, _ = sample(120, share, seed)
    s, r, z = torch.stack([s + .1*k for k in range(folds)]), list(r.chunk(folds)), list(z.chunk(folds))
    order, other = torch.tensor(random.sample(range(120), 120)), torch.randperm(len(r[0]))
    a = calibrated_weights(s, r, y, z, significance=1)
    b = calibrated_weights(s[:, order], [r[0][other], *r[1:]], y[order], [z[0][other], *z[1:]], significance=1)
    assert torch.allclose(b.values, a.values[order], atol=1e-5)

@quick
@given(whole)
def test_exactly_one_when_training_samples_are_the_reference(scores):
    w = calibrated_weights(scores, scores)
    assert torch.equal(w.values, torch.ones(len(scores))) and torch.equal(w.probability, torch.ones(len(scores)))
    assert w.p_value > .05 and w.effective_sample_size == 1

@pytest.mark.parametrize('by_class', [True, False])
def test_exchangeable_data_are_left_exactly_alone(by_class):
    "At level 5 %: in at most a few of 60 draws is anything weighted, and otherwise every weight is exactly one."
    touched = 0
    for seed in range(60):
        s, r, y, z, _ = sample(400, 0., seed)
        w = calibrated_weights(s, r, *((y, z) if by_class else ()))
        touched += w.p_value <= .05
        assert w.p_value <= .05 or torch.equal(w.values, torch.ones(400))
    assert touched <= 8

def test_the_share_of_good_samples_and_the_bad_ones_are_found():
    for share in (.2, .5):
        s, r, y, z, bad = sample(2000, share, 1, m=600)
        w = calibrated_weights(s, r, y, z)
        assert abs(w.clean_fraction - 1 + share) < .08 and w.p_value < 1e-6
        assert w.values[~bad].mean() > 3*w.values[bad].mean()

def test_folds_are_averaged():
    s, r, y, z, _ = sample(400, .4, 0)
    one = calibrated_weights(s, r, y, z)
    two = calibrated_weights(torch.stack([s, s]), [r, r], y, [z, z])
    assert torch.allclose(two.probability, one.probability, atol=.1) and two.values.shape == (400,)

def test_a_class_without_reference_is_left_alone():
    s, r, y, z, bad = sample(600, .4, 3, classes=1)
    y = torch.arange(600) % 2                                                 # class 1 has no reference sample
    with pytest.warns(UserWarning, match='no reference sample of class 1;.*keep weight 1'): w = calibrated_weights(s, r, y, torch.zeros_like(z))
    assert torch.allclose(w.values[y == 1], torch.ones(300), atol=1e-5) and float(w.values[y == 0].mean()) == pytest.approx(1, abs=1e-4)
    assert w.values[bad & (y == 0)].mean() < .5 < 1.2 < w.values[~bad & (y == 0)].mean()

def test_a_class_in_the_reference_alone_changes_nothing():
    s, r, y, z, _ = sample(300, .4, 4)
    more, label = torch.cat([r, torch.full((50,), -99.)]), torch.cat([z, torch.full((50,), 7)])
    assert torch.allclose(calibrated_weights(s, more, y, label).probability, calibrated_weights(s, r, y, z).probability, atol=.02)

def test_only_bad_samples_still_give_weights():
    w = calibrated_weights(torch.zeros(50) - 9, torch.randn(100, generator=torch.Generator().manual_seed(0)))
    assert w.clean_fraction < .1 and torch.isfinite(w.values).all() and float(w.values.mean()) == pytest.approx(1, abs=1e-4)

def test_too_good_training_scores_are_said_and_nothing_else_is():
    s, r, y, z, _ = sample(1000, 0., 0, m=500)
    with pytest.warns(UserWarning, match='score better than the reference'): calibrated_weights(s + 3, r, y, z)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for share in (0., .4): calibrated_weights(*sample(1000, share, 0, m=500)[:4])

@pytest.mark.parametrize('significance', [-.1, 1.5])
def test_significance_is_a_fraction(significance):
    with pytest.raises(ValueError, match='significance is'): calibrated_weights(torch.ones(3), torch.ones(3), significance=significance)

def test_one_reference_per_fold():
    with pytest.raises(ValueError, match='reference has 1 folds, scores have 2; give one reference per fold'): calibrated_weights(torch.ones(2, 3), [torch.ones(3)])


# Weights that change

@quick
@given(whole, whole, st.floats(0, 1), st.floats(.1, 2))
def test_updates(first, second, m, eta):
    n = min(len(first), len(second)); a, b = first[:n], second[:n]
    wa, wb = weights_from_influence(a), weights_from_influence(b)
    def after(update):
        w = SampleWeights(n, beta=1., update=update); w.refresh(a); return w.refresh(b)
    assert torch.equal(after(Replace()), wb)
    assert torch.allclose(after(EMA(m)), m*(m + (1 - m)*wa) + (1 - m)*wb, atol=1e-5)
    assert torch.allclose(after(Multiplicative(eta)), balanced(wa**eta*wb**eta), atol=1e-4)
    for update in (Replace(), EMA(m), Multiplicative(eta)): assert float(after(update).mean()) == pytest.approx(1, abs=1e-4)

def test_calibration_is_kept_with_the_weights():
    s, r, y, z, _ = sample(300, .5, 0)
    crossed = CrossScores(s[None], torch.arange(300), y, (r,), (z,), 'local', damping=.1, residual=0., seconds={})
    weights = SampleWeights(300)
    assert weights.calibration is None and torch.equal(weights.values, torch.ones(300))
    assert torch.allclose(weights.refresh(crossed), calibrated_weights(s, r, y, z).values, atol=1e-5) and weights.calibration.clean_fraction < .8

@pytest.mark.parametrize('kwargs, message', [(dict(beta=-1.), 'beta is -1'), (dict(beta=1., transform='softmax'), 'transform is')])
def test_unfit_settings_are_named_before_any_score(kwargs, message):
    with pytest.raises(ValueError, match=message): SampleWeights(3, **kwargs)

def test_number_of_scores_must_fit():
    with pytest.raises(ValueError, match='scores: 4 for 3 samples'): SampleWeights(3, beta=1.).refresh(torch.ones(4))
