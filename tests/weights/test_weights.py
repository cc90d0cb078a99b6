"Weights as a property: mean one, monotone, blind to the unit of the scores, exactly one where nothing is wrong; and what unfit input is told."

import math, warnings

import pytest, torch
from hypothesis import given, settings, strategies as st
from kd_aif.influence.cross_scores import CrossScores
from kd_aif.weights.calibration import (
    DENSITIES,
    GRID,
    calibrated_weights,
    class_clean_fractions,
    effective_count,
    p_value_distribution,
    two_groups,
    weights_from_intervals,
)
from kd_aif.weights.conformal import conformal_intervals, pooled_reference_intervals, standardised
from kd_aif.weights.sample_weights import SampleWeights, joint_weights
from kd_aif.weights.transforms import (
    EMA,
    TRANSFORMS,
    Multiplicative,
    Replace,
    mean_one_within_class,
    effective_sample_size,
    weights_from_influence,
)

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
transforms = st.sampled_from(sorted(TRANSFORMS))
whole = st.lists(st.integers(-40, 40), min_size=1, max_size=60).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)  # many ties
betas = st.floats(0, 8)
densities = st.sampled_from(DENSITIES)

MONOTONE = dict(
    affine=lambda s: 3 * s - 7,
    cube=lambda s: s**3,
    exp=lambda s: (s / 10).exp(),
    atan=lambda s: (s / 10).atan(),
    ranks=lambda s: s.long().double(),
)


def sample(n, share_bad, seed, shift=3.0, classes=3, m=200):
    "Scores of n training samples, a share of them (one number, or one for each class) bad, and of m good ones; classes differ in level and unit"
    g = torch.Generator().manual_seed(seed)
    y, z = torch.randint(classes, (n,), generator=g), torch.randint(classes, (m,), generator=g)
    bad = torch.rand(n, generator=g) < (
        torch.tensor(share_bad)[y] if isinstance(share_bad, list) else share_bad
    )
    level = lambda labels, v: 10.0 * labels + (labels + 1) * v
    return (
        level(y, torch.randn(n, generator=g) - shift * bad),
        level(z, torch.randn(m, generator=g)),
        y,
        z,
        bad,
    )


# Published form


@quick
@given(whole, transforms, betas)
def test_published_weights_have_mean_one_and_the_order_of_the_scores(scores, transform, beta):
    w = weights_from_influence(scores, transform, beta)
    assert w.shape == scores.shape and w.dtype == torch.float32
    assert float(w.double().mean()) == pytest.approx(1, abs=1e-5) and (w >= 0).all()
    assert (w[scores.argsort(stable=True)].diff() >= -1e-6).all()
    for value in scores.unique():
        assert len(w[scores == value].unique()) == 1, 'equal scores, unequal weights'


@quick
@given(
    whole, st.sampled_from(['sigmoid', 'exp_minmax', 'rank']), betas, st.floats(0.01, 100), st.floats(-50, 50)
)
def test_published_weights_do_not_depend_on_the_unit(scores, transform, beta, scale, offset):
    a, b = (
        weights_from_influence(scores, transform, beta),
        weights_from_influence(scale * scores + (0 if transform == 'rank' else offset), transform, beta),
    )
    assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@quick
@given(whole, st.randoms(use_true_random=False), transforms)
def test_published_weights_follow_their_samples(scores, random, transform):
    order = torch.tensor(random.sample(range(len(scores)), len(scores)))
    assert torch.allclose(
        weights_from_influence(scores[order], transform),
        weights_from_influence(scores, transform)[order],
        atol=1e-6,
    )


@quick
@given(whole, st.sampled_from(['sigmoid', 'exp_minmax', 'rank']))
def test_without_strength_all_weights_are_one(scores, transform):
    assert torch.equal(weights_from_influence(scores, transform, 0.0), torch.ones(len(scores)))


@pytest.mark.parametrize('transform', ['sigmoid', 'exp_minmax', 'rank'])
def test_more_strength_spreads_the_weights(transform):
    s = torch.linspace(-2, 3, 50)
    sizes = [effective_sample_size(weights_from_influence(s, transform, b)) for b in (0.0, 0.5, 1.0, 4.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 1 and sizes[-1] < 0.9


def test_rank_is_one_rule_for_few_and_for_many_samples():
    s = torch.randn(2500, generator=torch.Generator().manual_seed(0)).mul(20).round()
    w = weights_from_influence(s, 'rank')
    below = (s[None] < s[:, None]).double().mean(1)
    assert torch.allclose(w.double(), below / below.mean(), atol=1e-5)


@pytest.mark.parametrize('transform', sorted(TRANSFORMS))
def test_a_great_strength_still_gives_weights(transform):
    w = weights_from_influence(torch.linspace(-1, 1, 20), transform, 1000.0)
    assert (
        torch.isfinite(w).all()
        and float(w.mean()) == pytest.approx(1, abs=1e-4)
        and (w.diff() >= -1e-6).all()
    )


@pytest.mark.parametrize(
    'scores, kwargs, error, message',
    [
        (torch.ones(3), dict(transform='softmax'), ValueError, "transform is 'softmax'; use one of 'sigmoid'"),
        (torch.ones(3), dict(beta=-0.5), ValueError, 'beta is -0.5; give a strength'),
        (torch.ones(3), dict(beta=math.nan), ValueError, 'beta is nan'),
        (
            torch.tensor([1.0, math.nan, math.inf]),
            {},
            ValueError,
            'scores has 2 values that are NaN or infinite',
        ),
        (torch.ones(3, 2), {}, ValueError, r'scores has shape \(3, 2\); give one score per sample'),
        (torch.ones(0), {}, ValueError, 'scores is empty'),
        ([1.0, 2.0], {}, TypeError, 'scores is a list; give a tensor'),
    ],
)
def test_unfit_scores_are_named(scores, kwargs, error, message):
    with pytest.raises(error, match=message):
        weights_from_influence(scores, **kwargs)


# Balance and effective size


@quick
@given(st.lists(st.tuples(st.just(0.0) | st.floats(1e-6, 100), st.integers(0, 4)), min_size=1, max_size=40))
def test_weights_of_mean_one_in_each_class_keep_their_ratios(pairs):
    w, y = torch.tensor([p[0] for p in pairs], dtype=torch.float64), torch.tensor([p[1] for p in pairs])
    b = mean_one_within_class(w, y)
    for c in y.unique():
        rows = y == c
        assert float(b[rows].mean()) == pytest.approx(1)
        if w[rows].any():
            assert torch.allclose(b[rows] * w[rows].mean(), w[rows])
        else:
            assert (b[rows] == 1).all()
    assert 1 / len(w) - 1e-9 <= effective_sample_size(b) <= 1 + 1e-9


# Conformal p-values


@quick
@given(whole, whole, st.integers(1, 4), seeds)
def test_intervals_by_counting(scores, reference, classes, seed):
    g = torch.Generator().manual_seed(seed)
    y, z = (
        torch.randint(classes, (len(scores),), generator=g),
        torch.randint(classes, (len(reference),), generator=g),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        low, high = conformal_intervals(scores, reference, y, z)
    assert bool(caught) == (not set(y.tolist()) <= set(z.tolist()))
    for s, c, l, h in zip(scores, y, low, high):
        own = reference[z == c]
        if not len(own):
            assert (l, h) == (0, 1)  # a class without reference is not judged
        else:
            assert float(l) == pytest.approx(int((own < s).sum()) / (len(own) + 1)) and float(
                h
            ) == pytest.approx((int((own <= s).sum()) + 1) / (len(own) + 1))
    assert (low >= 0).all() and (high <= 1).all() and (low < high).all()


@quick
@given(whole, whole, st.sampled_from(sorted(MONOTONE)))
def test_intervals_depend_on_ranks_alone(scores, reference, name):
    f = MONOTONE[name]
    for a, b in zip(conformal_intervals(scores, reference), conformal_intervals(f(scores), f(reference))):
        assert torch.equal(a, b)


@quick
@given(whole)
def test_p_values_of_the_reference_itself_are_uniform(reference):
    "Leave one out: the mean of the p-values' distribution over all choices of the sample is the diagonal at k/m."
    m = len(reference)
    parts = (
        [
            conformal_intervals(reference[i : i + 1], torch.cat([reference[:i], reference[i + 1 :]]))
            for i in range(m)
        ]
        if m > 1
        else [(torch.zeros(1).double(), torch.ones(1).double())]
    )
    F = p_value_distribution(*(torch.cat(p) for p in zip(*parts)), torch.arange(m + 1) / m)
    assert torch.allclose(F, torch.arange(m + 1).double() / m, atol=1e-6)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(labels=torch.zeros(4, dtype=torch.long)), 'give both or neither'),
        (dict(reference_labels=torch.zeros(3, dtype=torch.long)), 'give both or neither'),
        (
            dict(labels=torch.zeros(3, dtype=torch.long), reference_labels=torch.zeros(3, dtype=torch.long)),
            'labels has 3 entries for 4 scores',
        ),
        (
            dict(labels=torch.zeros(4, dtype=torch.long), reference_labels=torch.zeros(4, dtype=torch.long)),
            'reference_labels has 4 entries for 3 scores',
        ),
        (dict(scores=torch.tensor([math.nan])), 'scores has 1 values'),
        (dict(reference=torch.tensor([math.inf, 0.0])), 'reference has 1 values'),
        (dict(reference=torch.ones(0)), 'reference is empty'),
        (dict(scores=torch.ones(0)), 'scores is empty'),
    ],
)
@pytest.mark.parametrize('function', [conformal_intervals, calibrated_weights])
def test_unfit_comparisons_are_named(function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(**(dict(scores=torch.ones(4), reference=torch.ones(3)) | kwargs))


# The reference pooled over classes


def differing(n, r, seed, C=8):
    "Good scores of n training and r reference samples in each class (numbers, or lists); classes differ in location and scale"
    g = torch.Generator().manual_seed(seed)
    place, spread = (
        3 * torch.randn(C, generator=g).double(),
        torch.randn(C, generator=g).double().mul(0.4).exp(),
    )
    y, z = (
        torch.arange(C).repeat_interleave(torch.tensor([k] * C if isinstance(k, int) else k)) for k in (n, r)
    )
    level = lambda labels: place[labels] + spread[labels] * torch.randn(len(labels), generator=g).double()
    return level(y), level(z), y, z


@quick
@given(seeds, st.floats(0.01, 100), st.floats(-50, 50))
def test_shared_intervals_do_not_depend_on_the_unit(seed, scale, offset):
    s, r, y, z = differing(20, 6, seed)
    for a, b in zip(
        pooled_reference_intervals(s, r, y, z),
        pooled_reference_intervals(scale * s + offset, scale * r + offset, y, z),
    ):
        assert torch.allclose(a, b, atol=1e-6)


@quick
@given(seeds)
def test_shared_intervals_follow_their_samples(seed):
    s, r, y, z = differing(20, 6, seed)
    g = torch.Generator().manual_seed(seed)
    i, j, names = (
        torch.randperm(len(s), generator=g),
        torch.randperm(len(r), generator=g),
        torch.randperm(8, generator=g),
    )
    for a, b in zip(
        pooled_reference_intervals(s, r, y, z),
        pooled_reference_intervals(s[i], r[j], names[y[i]], names[z[j]]),
    ):
        assert torch.allclose(a[i], b, atol=1e-9)


@quick
@given(seeds, st.integers(1, 40))
def test_one_class_shares_with_nobody(seed, m):
    "The ranks are those within the class, and never further off than a step"
    g = torch.Generator().manual_seed(seed)
    s, r = torch.randn(30, generator=g), torch.randn(m, generator=g)
    one = lambda t: torch.zeros(len(t), dtype=torch.long)
    for a, b in zip(conformal_intervals(s, r), pooled_reference_intervals(s, r, one(s), one(r))):
        assert (a - b).abs().max() <= 2 / (m + 1)


@pytest.mark.parametrize(
    'n, r',
    [
        (400, 100),
        (400, 20),
        (400, 5),
        ([2000, 1000, 500, 250, 120, 60, 30, 15], 50),
        ([15, 30, 60, 120, 250, 500, 1000, 2000], [100, 50, 25, 12, 10, 8, 6, 5]),
    ],
)
def test_shared_p_values_of_good_samples_are_uniform(n, r):
    "Also under a long tail beside balanced reference samples, and with a handful of reference samples in a class"
    F = torch.stack(
        [p_value_distribution(*pooled_reference_intervals(*differing(n, r, seed))[:2]) for seed in range(20)]
    ).mean(0)
    assert (F - GRID).abs().max() < 0.03


def test_ranks_without_the_classes_shares_are_not_uniform_under_a_tail():
    "What the weights of the reference samples are for: the scores of the frequent class have another shape than those of all classes together"
    weighted, equal = [], []
    for seed in range(20):
        s, r, y, z = differing([4000, 50, 50, 50, 50, 50, 50, 50], 50, seed)
        s[y == 0], r[z == 0] = s[y == 0].exp(), r[z == 0].exp()
        for found, ends in (
            (weighted, pooled_reference_intervals(s, r, y, z)),
            (equal, conformal_intervals(*standardised(s, r, y, z))),
        ):
            found.append(p_value_distribution(*ends))
    off = [float((torch.stack(found).mean(0) - GRID).abs().max()) for found in (weighted, equal)]
    assert off[0] < 0.03 and off[1] > 2 * off[0]


@pytest.mark.parametrize('r', [1, 2, 3])
def test_few_equal_or_lone_reference_scores(r):
    "One or two reference samples in a class, ties, constants: intervals stay intervals"
    s, ref, y, z = differing(10, r, 0)
    for scores, reference in (
        (s, ref),
        (s.round(), ref.round()),
        (torch.zeros_like(s), torch.zeros_like(ref)),
    ):
        low, high = pooled_reference_intervals(scores, reference, y, z)
        assert (
            torch.isfinite(low).all() and (low >= 0).all() and (high <= 1 + 1e-9).all() and (low < high).all()
        )
    low, high = pooled_reference_intervals(torch.zeros_like(s), torch.zeros_like(ref), y, z)
    assert (low == 0).all() and torch.allclose(high, torch.ones_like(high))  # ties say nothing


@pytest.mark.parametrize('rate, comparable', [(0.7, True), (1.0, False)])
def test_a_class_in_which_nothing_is_as_good_speaks_against_the_reference(rate, comparable):
    "Much noise in one class is weighed; a class without a single good sample makes the comparison as a whole one of different kinds"
    s, r, y, z, bad = sample(3000, [rate, 0.2, 0.2], 5, shift=4.0, m=600)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        w = calibrated_weights(s, r, y, z)
    assert w.reference_is_comparable == comparable and w.clean_fraction > 0.3
    assert (
        any('of one class' in str(c.message) for c in caught) != comparable
        and (w.values == 1).all() != comparable
    )


def test_a_class_without_reference_does_not_share():
    s, r, y, z = differing(30, 10, 0)
    with pytest.warns(UserWarning, match='no reference sample of class 3'):
        low, high = pooled_reference_intervals(s, r[z != 3], y, z[z != 3])
    assert (low[y == 3] == 0).all() and (high[y == 3] == 1).all() and (high - low)[y != 3].max() < 0.1


def test_location_of_a_reference_sample_is_that_of_the_others():
    "Its own score has no part in what it is compared with: far-off scores stay as far off as those of training samples"
    many = [standardised(*differing(50, 4, seed)) for seed in range(60)]
    train, ref = (sum(float(v.square().mean()) for v in side) / 60 for side in zip(*many))
    assert train == pytest.approx(ref, rel=0.15)


@quick
@given(seeds, st.sampled_from([0.0, 0.3]))
def test_the_test_does_not_use_the_pooled_reference(seed, share):
    "Whether anything is weighted depends on ranks within the class alone"
    s, r, y, z, bad = sample(600, share, seed)
    own, shared = (calibrated_weights(s, r, y, z, pooled_reference=b) for b in (False, True))
    assert own.p_value == shared.p_value and (own.values == 1).all() == (shared.values == 1).all()


def test_a_pooled_reference_helps_where_reference_samples_are_few():
    "Mean squared error of the probability, ten reference samples in each of 20 classes"

    def error(pooled_reference):
        total = []
        for seed in range(6):
            s, r, y, z = differing(150, 10, seed, C=20)
            bad = torch.rand(len(s), generator=torch.Generator().manual_seed(seed)) < 0.4
            spread = torch.stack([s[y == c].std() for c in range(20)])
            p = calibrated_weights(
                torch.where(bad, s - 2.5 * spread[y], s), r, y, z, pooled_reference=pooled_reference
            ).probability
            total.append(float((p - (~bad).float()).square().mean()))
        return sum(total) / len(total)

    assert error(True) < 0.95 * error(False)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=100))
def test_two_groups_are_a_share_and_a_convex_decreasing_density(points):
    F = torch.tensor([sum(p <= float(t) for p in points) / len(points) for t in GRID]).double()
    F[0] = 0.0
    share, shape = two_groups(F)
    assert 0 <= share <= 1 and (shape >= 0).all() and float((shape * GRID.diff()).sum()) == pytest.approx(1)
    assert (shape.diff() <= 1e-9).all() and (shape.diff().diff() >= -1e-9).all()


@quick
@given(st.floats(0.05, 0.95), st.floats(0.04, 0.6))
def test_two_groups_find_a_mixture_of_a_triangle_and_the_flat_density(share, top):
    F = share * GRID + (1 - share) * (1 - (1 - GRID / top).clamp_min(0) ** 2)
    assert abs(two_groups(F)[0] - share) < 0.06 and abs(two_groups(F, steps=5000)[0] - share) < 0.02


# Calibrated weights


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 0.9),
    seeds,
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0.05, 1.0]),
    densities,
    st.booleans(),
)
def test_calibrated_weights_are_balanced_and_monotone_within_a_class(
    share, seed, classes, by_class, significance, density, half
):
    s, r, y, z, bad = sample(
        300, [share * (c % 2 or not half) for c in range(classes)], seed, classes=classes
    )
    labels = (y, z) if by_class else ()
    w = calibrated_weights(s, r, *labels, significance=significance, density=density)
    assert (
        len(w.clean_fractions) == (int(y.max()) + 1 if by_class else 1)
        and ((w.clean_fractions >= 0) & (w.clean_fractions <= 1)).all()
        and (w.density > 0).all()
    )
    assert w.values.dtype == torch.float32 and torch.isfinite(w.values).all() and (w.values >= 0).all()
    assert (
        ((w.probability >= 0) & (w.probability <= 1)).all()
        and 0 <= w.clean_fraction <= 1
        and 0 < w.p_value <= 1
    )
    groups = y if by_class else torch.zeros_like(y)
    for c in groups.unique():
        rows = groups == c
        assert float(w.values[rows].mean()) == pytest.approx(1, abs=1e-4)
        order = s[rows].argsort()
        assert (w.probability[rows][order].diff() >= -1e-6).all() and (
            w.values[rows][order].diff() >= -1e-5
        ).all()
    if w.p_value > significance:
        assert torch.equal(w.values, torch.ones(300)) and torch.equal(w.probability, torch.ones(300))


@quick
@given(seeds, st.floats(0, 0.8), st.sampled_from(sorted(MONOTONE)), st.booleans())
def test_calibrated_weights_depend_on_ranks_alone(seed, share, name, by_class):
    g, f = torch.Generator().manual_seed(seed), MONOTONE[name]
    s, r = (torch.randint(-40, 41, (n,), generator=g).double() for n in (150, 80))
    s -= 15 * (torch.rand(150, generator=g) < share).double()
    labels = (torch.randint(3, (150,), generator=g), torch.randint(3, (80,), generator=g)) if by_class else ()
    a, b = (
        calibrated_weights(*scores, *labels, significance=1, pooled_reference=False)
        for scores in ((s, r), (f(s), f(r)))
    )
    assert torch.equal(a.values, b.values) and a.clean_fraction == b.clean_fraction and a.p_value == b.p_value


@quick
@given(seeds, st.integers(0, 2), st.floats(0.1, 10), st.floats(-100, 100))
def test_the_unit_of_one_class_does_not_matter(seed, c, scale, offset):
    s, r, y, z, _ = sample(200, 0.4, seed)
    s, r = s.double(), r.double()
    t, u = torch.where(y == c, scale * s + offset, s), torch.where(z == c, scale * r + offset, r)
    assert torch.allclose(
        *(calibrated_weights(*scores, y, z, pooled_reference=False).values for scores in ((s, r), (t, u))),
        atol=1e-5,
    )
    assert (
        calibrated_weights(s, r, y, z).probability - calibrated_weights(t, u, y, z).probability
    ).abs().mean() < 0.05  # shared: up to how far classes are taken to differ


@quick
@given(seeds, st.floats(0, 0.8), st.integers(1, 3), st.randoms(use_true_random=False))
def test_weights_follow_their_samples(seed, share, folds, random):
    s, r, y, z, _ = sample(120, share, seed)
    s, r, z = torch.stack([s + 0.1 * k for k in range(folds)]), list(r.chunk(folds)), list(z.chunk(folds))
    order, other = torch.tensor(random.sample(range(120), 120)), torch.randperm(len(r[0]))
    a = calibrated_weights(s, r, y, z, significance=1)
    b = calibrated_weights(
        s[:, order], [r[0][other], *r[1:]], y[order], [z[0][other], *z[1:]], significance=1
    )
    assert torch.allclose(b.values, a.values[order], atol=1e-5)


@quick
@given(whole)
def test_exactly_one_when_training_samples_are_the_reference(scores):
    w = calibrated_weights(scores, scores)
    assert torch.equal(w.values, torch.ones(len(scores))) and torch.equal(
        w.probability, torch.ones(len(scores))
    )
    assert w.p_value > 0.05 and w.effective_sample_size == 1


@pytest.mark.parametrize(
    'by_class, density', [(True, 'shrunk'), (True, 'pooled'), (True, 'class'), (False, 'shrunk')]
)
def test_exchangeable_data_are_left_exactly_alone(by_class, density):
    "At level 5 %: in at most a few of 60 mc_samples is anything weighted, and otherwise every weight is exactly one."
    touched = 0
    for seed in range(60):
        s, r, y, z, _ = sample(400, 0.0, seed)
        w = calibrated_weights(s, r, *((y, z) if by_class else ()), density=density)
        touched += w.p_value <= 0.05
        assert w.p_value <= 0.05 or torch.equal(w.values, torch.ones(400))
    assert touched <= 8


def test_the_share_of_good_samples_and_the_bad_ones_are_found():
    for share in (0.2, 0.5):
        errors = []
        for seed in range(5):
            s, r, y, z, bad = sample(2000, share, seed, m=600)
            w = calibrated_weights(s, r, y, z)
            errors.append(w.clean_fraction - float((~bad).double().mean()))
            assert w.p_value < 1e-6 and w.values[~bad].mean() > 3 * w.values[bad].mean()
        assert abs(sum(errors) / 5) < 0.05 and max(map(abs, errors)) < 0.12


def test_folds_are_averaged():
    s, r, y, z, _ = sample(400, 0.4, 0)
    one = calibrated_weights(s, r, y, z)
    two = calibrated_weights(torch.stack([s, s]), [r, r], y, [z, z])
    assert torch.allclose(two.probability, one.probability, atol=0.1) and two.values.shape == (400,)


def test_a_class_without_reference_is_left_alone():
    s, r, y, z, bad = sample(600, 0.4, 3, classes=1)
    y = torch.arange(600) % 2  # class 1 has no reference sample
    with pytest.warns(UserWarning, match='no reference sample of class 1;.*keep weight 1'):
        w = calibrated_weights(s, r, y, torch.zeros_like(z))
    assert (
        torch.equal(w.values[y == 1], torch.ones(300))
        and torch.equal(w.probability[y == 1], torch.ones(300))
        and w.clean_fractions.isnan().tolist() == [False, True]
    )
    assert abs(w.clean_fraction - 0.6) < 0.1 and float(w.values[y == 0].mean()) == pytest.approx(1, abs=1e-4)
    assert w.values[bad & (y == 0)].mean() < 0.5 < 1.2 < w.values[~bad & (y == 0)].mean()


def test_a_class_in_the_reference_alone_changes_nothing():
    s, r, y, z, _ = sample(300, 0.4, 4)
    more, label = torch.cat([r, torch.full((50,), -99.0)]), torch.cat([z, torch.full((50,), 7)])
    assert torch.allclose(
        calibrated_weights(s, more, y, label).probability,
        calibrated_weights(s, r, y, z).probability,
        atol=0.02,
    )


def test_a_reference_of_another_kind_is_not_comparable():
    bad, reference = torch.zeros(50) - 9, torch.randn(100, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match='another source'):
        w = calibrated_weights(bad, reference)
    assert (
        w.clean_fraction < 0.1
        and w.p_value < 0.001
        and not w.reference_is_comparable
        and torch.equal(w.values, torch.ones(50))
    )
    mixed = calibrated_weights(
        torch.cat([bad, torch.randn(50, generator=torch.Generator().manual_seed(1))]), reference
    )
    assert mixed.reference_is_comparable and mixed.values[:50].max() < 0.3 < mixed.values[50:].mean()


def test_training_scores_that_are_too_good_give_a_warning_and_nothing_else_does():
    s, r, y, z, _ = sample(1000, 0.0, 0, m=500)
    with pytest.warns(UserWarning, match='score better than the reference'):
        calibrated_weights(s + 3, r, y, z)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for share in (0.0, 0.4):
            calibrated_weights(*sample(1000, share, 0, m=500)[:4])


@pytest.mark.parametrize('significance', [-0.1, 1.5])
def test_significance_is_a_fraction(significance):
    with pytest.raises(ValueError, match='significance is'):
        calibrated_weights(torch.ones(3), torch.ones(3), significance=significance)


def test_one_reference_per_fold():
    with pytest.raises(ValueError, match='reference has 1 folds, scores have 2; give one reference per fold'):
        calibrated_weights(torch.ones(2, 3), [torch.ones(3)])


# Classes


def by_class(rates, seed=0, n=400, r=50, shift=3.0):
    "Scores, reference, labels, labels of the reference, bad: n training and r reference samples in each class"
    g, C = torch.Generator().manual_seed(seed), len(rates)
    y, z = torch.arange(C).repeat_interleave(n), torch.arange(C).repeat_interleave(r)
    bad = torch.rand(C * n, generator=g) < torch.tensor(rates)[y]
    return torch.randn(C * n, generator=g) - shift * bad, torch.randn(C * r, generator=g), y, z, bad


def distributions(rates, seed=0, **kwargs):
    s, r, y, z, _ = by_class(rates, seed, **kwargs)
    low, high = conformal_intervals(s, r, y, z)
    return (
        p_value_distribution(low, high, labels=y),
        y.bincount(),
        effective_count(y, [z], len(y)),
        *two_groups(p_value_distribution(low, high)),
    )


@quick
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60), st.lists(st.integers(0, 5), min_size=1, max_size=60)
)
def test_effective_counts(ours, theirs):
    y, z = torch.tensor(ours), torch.tensor(theirs)
    m = effective_count(y, [z[:1], z[1:]], len(y))
    assert len(m) == max(ours) + 1
    for c, e in enumerate(m.tolist()):
        assert e == pytest.approx(
            1 / (1 / ours.count(c) + 1 / theirs.count(c)) if ours.count(c) and theirs.count(c) else 0
        )
    assert effective_count(None, [z[:1], z[1:]], len(y)).tolist() == pytest.approx(
        [1 / (1 / len(y) + 1 / len(z))]
    )


@quick
@given(seeds, st.lists(st.floats(0, 0.8), min_size=2, max_size=6))
def test_shares_lie_between_the_common_one_and_the_class_s_own(seed, rates):
    F, n, m, share, shape = distributions(rates, seed, n=100, r=20)
    shares, errors = class_clean_fractions(F, n, m, share, shape)
    own, own_errors = class_clean_fractions(F, n, 1e12 * m, share, shape)  # without noise nothing is shrunk
    assert (
        ((shares - share) * (shares - own) <= 1e-6).all()
        and (errors > 0).all()
        and (errors <= 1e6 * own_errors + 1e-9).all()
    )
    if 0 < own.min() and own.max() < 1:
        assert float((own * n).sum() / n.sum()) == pytest.approx(share, abs=1e-6)


@quick
@given(st.integers(1, 8), st.floats(0, 0.8), seeds)
def test_classes_that_are_alike_get_the_common_share(classes, rate, seed):
    F, n, m, share, shape = distributions([rate], seed)
    shares, errors = class_clean_fractions(
        F.expand(classes, -1), n.expand(classes), m.expand(classes), share, shape
    )
    assert torch.allclose(shares, torch.full_like(shares, share)) and float(errors[0]) == pytest.approx(
        float(class_clean_fractions(F, n, m, share, shape)[1]) / classes**0.5
    )


def test_a_class_with_nothing_to_judge_has_no_share():
    F, n, m, share, shape = distributions([0.4, 0.1, 0.2])
    F[0], n[0], m[2] = math.nan, 0, 0.0
    shares, errors = class_clean_fractions(F, n, m, share, shape)
    assert (
        shares.isnan().tolist() == errors.isnan().tolist() == [True, False, True] and shares[1] == share
    )  # one class alone: the common share


@pytest.mark.parametrize('density', DENSITIES)
def test_the_shares_of_classes_with_different_noise(density):
    rates = [0.5, 0.3, 0.1, 0.0]
    errors = [
        calibrated_weights(*by_class(rates, seed, r=200)[:4], density=density).clean_fractions
        - 1
        + torch.tensor(rates)
        for seed in range(5)
    ]
    assert (
        float(torch.stack(errors).mean(0).abs().max())
        < dict(shrunk=0.08, pooled=1, **{'class': 0.12})[density]
    )
    assert (torch.stack(errors).abs().mean() < 0.1) == (density != 'pooled')


def test_clean_classes_are_left_alone_and_noisy_ones_are_not():
    touched = torch.zeros(6)
    for seed in range(10):
        s, r, y, z, bad = by_class([0.4, 0.0] * 3, seed)
        w = calibrated_weights(s, r, y, z)
        touched += torch.tensor([not torch.equal(w.values[y == c], torch.ones(400)) for c in range(6)])
        assert w.values[bad].mean() < 0.4
    assert (touched[::2] == 10).all() and touched[1::2].sum() <= 9


def test_the_shrunken_density_gains_where_classes_differ_and_loses_nothing_where_they_do_not():
    def mistake(rates, density):
        mc_samples = [by_class(rates, seed, shift=2.0) for seed in range(4)]
        return (
            sum(
                float(
                    ((calibrated_weights(*d[:4], density=density).probability - (~d[4]).float()) ** 2).mean()
                )
                for d in mc_samples
            )
            / 4
        )

    same, differ = [0.4] * 6, [0.4, 0.0] * 3
    assert (
        mistake(same, 'shrunk') < mistake(same, 'pooled') + 0.003
        and mistake(differ, 'shrunk') < mistake(differ, 'pooled') - 0.01
    )
    assert mistake(same, 'shrunk') < mistake(same, 'class')


def test_noise_in_a_single_class_is_found():
    s, r, y, z, bad = by_class([0.6] + [0.0] * 19, 1)
    w = calibrated_weights(s, r, y, z)
    assert w.p_value < 0.001 and w.values[bad].mean() < 0.5 and effective_sample_size(w.values[y > 0]) > 0.97


@quick
@given(seeds, densities, st.permutations(range(4)))
def test_names_of_classes_do_not_matter(seed, density, names):
    s, r, y, z, _ = by_class([0.5, 0.2, 0.0, 0.0], seed, n=80, r=20)
    names = torch.tensor(names)
    a, b = (
        calibrated_weights(s, r, y, z, density=density),
        calibrated_weights(s, r, names[y], names[z], density=density),
    )
    assert torch.allclose(a.values, b.values, atol=1e-5) and torch.allclose(
        a.clean_fractions, b.clean_fractions[names], atol=1e-6
    )
    assert a.clean_fraction == pytest.approx(b.clean_fraction) and a.p_value == pytest.approx(b.p_value)


@quick
@given(seeds, st.floats(0, 0.8))
def test_for_one_class_all_densities_agree(seed, share):
    s, r, y, z, _ = sample(150, share, seed, classes=1)
    first, *others = [
        calibrated_weights(s, r, *labels, density=d) for labels in ((), (y, z)) for d in DENSITIES
    ]
    for other in others:
        assert (
            torch.allclose(other.values, first.values, atol=1e-5)
            and other.clean_fraction == first.clean_fraction
        )


def test_a_fold_that_says_nothing_about_a_sample_is_left_out_of_its_average():
    s, r, y, z, _ = by_class([0.5, 0.5], 0)
    with pytest.warns(UserWarning, match='no reference sample of class 1'):
        w = calibrated_weights(
            torch.stack([s, s]),
            [r, r[z == 0]],
            y,
            [z, z[z == 0]],
            density='pooled',
            significance=1,
            pooled_reference=False,
        )
    again = calibrated_weights(s, r, y, z, density='pooled', significance=1, pooled_reference=False)
    rank = lambda v: v.argsort().argsort().double()
    assert (
        w.probability[y == 1].min() < 0.2
        and torch.corrcoef(torch.stack([rank(w.probability), rank(again.probability)]))[0, 1] > 0.99
    )


@pytest.mark.parametrize('level', [0.05, 1.0])
def test_ties_say_nothing_and_weigh_nothing(level):
    y = torch.arange(60) % 3
    w = calibrated_weights(
        torch.zeros(60), torch.zeros(3), y, torch.arange(3), significance=level
    )  # every interval is [0, 1]
    assert torch.equal(w.values, torch.ones(60)) and w.p_value == 1 and w.clean_fraction > 0.95


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(density='own'), "density is 'own'; use one of shrunk, pooled, class"),
        (dict(labels=torch.tensor([0, 1, 0, 2])), 'm has 2 entries for 3 classes'),
        (dict(m=torch.zeros(2)), 'none of its samples is of a class'),
        (dict(significance=2.0), 'significance is'),
    ],
)
def test_unfit_intervals_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        weights_from_intervals(
            **(
                dict(
                    low=torch.zeros(1, 4).double(),
                    high=torch.full((1, 4), 0.5).double(),
                    m=torch.ones(2),
                    labels=torch.tensor([0, 1, 0, 1]),
                )
                | kwargs
            )
        )


def test_a_plain_number_of_samples_does_without_labels():
    s, r, *_ = sample(200, 0.4, 0, classes=1)
    low, high = conformal_intervals(s, r)
    assert torch.equal(
        weights_from_intervals(low[None], high[None], 1 / (1 / 200 + 1 / 200)).values,
        calibrated_weights(s, r).values,
    )


def test_no_class_in_common_is_an_error():
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='reference samples of the same classes'):
        calibrated_weights(
            torch.randn(6), torch.randn(4), torch.zeros(6, dtype=torch.long), torch.ones(4, dtype=torch.long)
        )


# Weights that change


@quick
@given(whole, whole, st.floats(0, 1), st.floats(0.1, 2))
def test_updates(first, second, m, eta):
    n = min(len(first), len(second))
    a, b = first[:n], second[:n]
    wa, wb = weights_from_influence(a), weights_from_influence(b)

    def after(update):
        w = SampleWeights(n, beta=1.0, update=update)
        w.refresh(a)
        return w.refresh(b)

    assert torch.equal(after(Replace()), wb)
    assert torch.allclose(after(EMA(m)), m * (m + (1 - m) * wa) + (1 - m) * wb, atol=1e-5)
    assert torch.allclose(after(Multiplicative(eta)), mean_one_within_class(wa**eta * wb**eta), atol=1e-4)
    for update in (Replace(), EMA(m), Multiplicative(eta)):
        assert float(after(update).mean()) == pytest.approx(1, abs=1e-4)


@quick
@given(whole, st.floats(0.1, 5), seeds)
def test_exp_minmax_is_the_best_trade_of_gain_and_distance(scores, beta, seed):
    x = 2 * (scores - scores.min()) / (scores.max() - scores.min()).clamp_min(1e-12) - 1

    def objective(w):
        return float((w * x - torch.special.xlogy(w, w) / beta).mean())

    w, g = weights_from_influence(scores, 'exp_minmax', beta).double(), torch.Generator().manual_seed(seed)
    for _ in range(10):
        assert (
            objective(mean_one_within_class(w * (0.5 + torch.rand(len(w), generator=g).double())))
            <= objective(w) + 1e-6
        )


@quick
@given(whole, st.floats(0.01, 100))
def test_relu_is_a_projected_step_from_zero(scores, step):
    assert torch.allclose(
        weights_from_influence(scores, 'relu'),
        mean_one_within_class((step * scores).clamp_min(0)).float(),
        atol=1e-5,
    )


@quick
@given(whole, st.floats(0.2, 5))
def test_sigmoid_has_the_odds_of_a_logistic_model(scores, beta):
    w = weights_from_influence(scores, 'sigmoid', beta).double()
    z = (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-12)
    assert torch.allclose(w * torch.sigmoid(beta * z[0]), w[0] * torch.sigmoid(beta * z), atol=1e-4)


@quick
@given(whole, betas, st.sampled_from(sorted(MONOTONE)))
def test_rank_is_blind_to_the_scale(scores, beta, name):
    assert torch.equal(
        weights_from_influence(scores, 'rank', beta),
        weights_from_influence(MONOTONE[name](scores), 'rank', beta),
    )


@quick
@given(whole, st.integers(1, 8), st.floats(0.1, 2), st.floats(0.1, 2))
def test_multiplicative_steps_add_up_the_strength(scores, k, eta, beta):
    w = torch.ones(len(scores))
    for _ in range(k):
        w = Multiplicative(eta)(w, weights_from_influence(scores, 'exp_minmax', beta))
    assert torch.allclose(
        w, weights_from_influence(scores, 'exp_minmax', k * eta * beta), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    'new, expected',
    [
        ([0.0, 2.0], [0.0, 2.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([1e30, 1e30], [1.0, 1.0]),
        ([1e-30, 1e-30], [1.0, 1.0]),
    ],
)
def test_multiplicative_with_extreme_weights(new, expected):
    assert torch.allclose(Multiplicative(20.0)(torch.ones(2), torch.tensor(new)), torch.tensor(expected))


def test_a_weight_of_zero_stays_zero_under_multiplicative_alone():
    s, t = torch.tensor([-1.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 2.0])

    def after(update):
        w = SampleWeights(3, 'relu', 1.0, update)
        w.refresh(s)
        return w.refresh(t)

    assert after(Multiplicative(1.0))[0] == 0 and after(Replace())[0] > 1 and after(EMA(0.5))[0] > 0.5


@pytest.mark.parametrize('density', DENSITIES)
def test_density_is_handed_on(density):
    s, r, y, z, _ = by_class([0.5, 0.0, 0.2], 1)
    crossed = CrossScores(
        s[None], torch.arange(len(s)), y, (r,), (z,), ('posterior',), damping=0.1, residual=0.0, seconds={}
    )
    assert torch.allclose(
        SampleWeights(len(s), density=density).refresh(crossed),
        calibrated_weights(s, r, y, z, density=density).values,
        atol=1e-5,
    )


def test_calibration_is_kept_with_the_weights():
    s, r, y, z, _ = sample(300, 0.5, 0)
    crossed = CrossScores(
        s[None], torch.arange(300), y, (r,), (z,), ('posterior',), damping=0.1, residual=0.0, seconds={}
    )
    weights = SampleWeights(300)
    assert weights.calibration is None and torch.equal(weights.values, torch.ones(300))
    assert (
        torch.allclose(weights.refresh(crossed), calibrated_weights(s, r, y, z).values, atol=1e-5)
        and weights.calibration.clean_fraction < 0.8
    )


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(beta=-1.0), 'beta is -1'),
        (dict(beta=1.0, transform='softmax'), 'transform is'),
        (dict(density='own'), 'density is'),
    ],
)
def test_unfit_settings_are_named_before_any_score(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SampleWeights(3, **kwargs)


def test_number_of_scores_must_fit():
    with pytest.raises(ValueError, match='scores: 4 for 3 samples'):
        SampleWeights(3, beta=1.0).refresh(torch.ones(4))


def test_joint_weights_have_mean_one_within_each_class():
    "Validation samples weigh what a training sample weighs that is good for sure"
    g = torch.Generator().manual_seed(0)
    p, y, val_y = torch.rand(60, generator=g), torch.arange(60) % 3, torch.arange(12) % 3
    w = joint_weights(p, y, val_y)
    for c in range(3):
        ours, theirs = w[:60][y == c], w[60:][val_y == c]
        assert torch.cat([ours, theirs]).mean() == pytest.approx(1.0, abs=1e-5)
        assert torch.allclose(ours / theirs[0], p[y == c], atol=1e-5)
