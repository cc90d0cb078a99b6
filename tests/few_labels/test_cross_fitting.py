"Cross-fitted teachers: influence of every label by gradients, calibration, what a teacher may and may not know, checkpoints, arguments that make no sense."

import copy
import dataclasses
from dataclasses import replace
from unittest import mock

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn
from kd_aif.few_labels import cross_fitted_teachers
from kd_aif.few_labels.cross_fitted_teachers import Teachers, calibration_folds
from kd_aif.few_labels.cross_fitting import CrossFit, distill_ssl
from kd_aif.few_labels.label_calibration import (
    fit_scales,
    label_influence,
    pool_exponent,
    student_adjusted_weights,
    student_exponents,
)
from kd_aif.few_labels.pseudo_labels import PseudoLabelMeter, calibration_error, reliability_diagram
from kd_aif.few_labels.settings import SSLTraining, ssl_trainer
from kd_aif.foundation.splits import stratified_folds
from kd_aif.data.images import subset
from kd_aif.data.sources import load_images
from kd_aif.models.build import build_model
from kd_aif.few_labels.algorithms import Supervised
from kd_aif.few_labels.batches import labelled_split
from kd_aif.few_labels.trainer import train_ssl

quick = hypothesis_settings(max_examples=25, deadline=None)
SHORT = dict(steps=6, batch_size=20, mu=2, lr=0.05, ema=0.9, every=2, progress=False)


@pytest.fixture(scope='module')
def split():
    return labelled_split(subset(load_images('digits'), 300, 0), 40, 0)


def network(seed=0, name='cnn8'):
    return build_model(name, 10, 1, seed=seed)


def distil(split, student=None, teacher=network, **more):
    "A short run; `more` has options of `distill_ssl`, settings of `CrossFit`, and fields of `SSLTraining`"
    fields = {f.name for f in dataclasses.fields(SSLTraining)}
    training = SSLTraining(**(SHORT | {k: v for k, v in more.items() if k in fields}))
    options = dict(refresh=2) | {k: v for k, v in more.items() if k not in fields}
    return distill_ssl(student or network(), teacher, *split[:2], training=training, **options)


def make_trainer(model, ema=0.99):
    return ssl_trainer(model, SSLTraining(steps=6, lr=0.1), ema)


def teachers(split, seed=0, weak=None):
    return Teachers([network(1), network(2)], *split[:2], make_trainer, weak, seed=seed)


def tensors(module):
    return {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(tensors(a).values(), tensors(b).values(), strict=True))


# Scores


@pytest.mark.parametrize('bias', (True, False))
def test_the_influence_of_every_label_is_the_gradients_product(bias):
    torch.manual_seed(0)
    layer, h = nn.Linear(7, 4, bias=bias).double(), torch.randn(5, 7).double()
    S = torch.randn(4, 7 + bias).double()
    found = label_influence(h, layer(h).softmax(1).detach(), S)
    for i in range(5):
        for c in range(4):
            g = torch.autograd.grad(F.cross_entropy(layer(h[i]), torch.tensor(c)), list(layer.parameters()))
            wanted = (g[0] * S[:, :7]).sum() + (g[1] * S[:, 7]).sum() if bias else (g[0] * S).sum()
            assert found[i, c] == pytest.approx(float(wanted), abs=1e-9)


@quick
@given(st.integers(0, 10**6), st.floats(0.2, 4.0), st.integers(30, 300))
def test_scales_are_where_the_posterior_is_flat(seed, sure, m):
    g = torch.Generator().manual_seed(seed)
    log_p, s = (
        (sure * torch.randn(m, 5, generator=g)).double().log_softmax(1),
        torch.randn(m, 5, generator=g).double(),
    )
    y = (log_p + 0.5 * s).softmax(1).multinomial(1, generator=g)[:, 0]
    found = fit_scales(log_p, s, y)
    unit = s.std()

    def objective(a, k):
        return float(F.cross_entropy(a * log_p + k * s, y) + (a**2 + (k * unit) ** 2) / (2 * m))

    best = objective(*found)
    assert (found >= 0).all() and all(
        objective(max(0.0, float(found[0]) + d), max(0.0, float(found[1]) + e)) >= best - 1e-9
        for d in (-0.02, 0, 0.02)
        for e in (-0.02, 0, 0.02)
    )


def test_few_or_perfect_images_make_nothing_certain():
    log_p = (20 * torch.eye(10)).log_softmax(1)
    a, k = fit_scales(log_p, torch.zeros(10, 10), torch.arange(10))
    assert 0 < a < 1 and torch.isfinite(k) and (a * log_p).softmax(1).max() < 0.999


@pytest.mark.parametrize(
    'log_p, influence, labels, message',
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), torch.zeros(3), r'influence \(3, 3\)'),
        (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2), r'labels \(2,\)'),
        (torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2), torch.zeros(1), 'NaN or infinite'),
    ],
)
def test_scales_of_what_does_not_fit(log_p, influence, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_scales(log_p, influence, labels.long())


def test_the_exponent_stays_between_one_opinion_and_two():
    q = torch.randn(50, 4).log_softmax(1)
    assert pool_exponent(q, q, (q.argmax(1),) * 2, 0.0) == pytest.approx(0.5, abs=1e-5) and pool_exponent(
        q, q, (q.argmax(1),) * 2, 1.0
    ) == pytest.approx(1.0, abs=1e-5)


@quick
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_reliability_diagram_counts_every_sample_once(seed, bins):
    g = torch.Generator().manual_seed(seed)
    predicted, right = torch.rand(100, generator=g), torch.rand(100, generator=g) < 0.5
    mean, fraction, n = reliability_diagram(predicted, right, bins)
    assert (
        int(n.sum()) == 100
        and float((mean * n).sum() / 100) == pytest.approx(float(predicted.mean()), abs=1e-6)
        and float((fraction * n).sum()) == pytest.approx(int(right.sum()))
    )
    assert (
        reliability_diagram(torch.tensor([0.0, 1.0]), torch.tensor([False, True]), bins)[2].sum() == 2
        and calibration_error(right.float(), right, bins) == 0
    )


# What a teacher may know


@pytest.mark.parametrize('n, folds', [(40, 2), (80, 4), (120, 3)])
def test_parts_are_balanced_and_each_teacher_leaves_one_out(n, folds):
    labelled, unlabelled, _ = labelled_split(subset(load_images('digits'), 300, 0), n, 0)
    both = Teachers([network(1), network(2)], labelled, unlabelled, make_trainer, None, folds)
    for c in range(10):
        assert both.fold[labelled.y == c].bincount().tolist() == [n // 10 // folds] * folds
    order = torch.randperm(n)
    for k in (0, 1):
        assert (
            torch.equal(both.in_training_fold(k, labelled.index[order]), both.fold[order] != k)
            and int((~both.in_training_fold(k, labelled.index)).sum()) == n // folds
        )


@pytest.mark.parametrize('smallest, folds', [(2, 2), (19, 2), (29, 2), (30, 3), (79, 7), (400, 8)])
def test_parts_by_the_smallest_class(smallest, folds):
    assert calibration_folds(torch.arange(3).repeat_interleave(torch.tensor([smallest, 500, 900]))) == folds


@pytest.mark.parametrize('folds, n', [(2, 40), (4, 80)])
def test_a_teacher_does_not_learn_the_labels_that_calibrate_it(folds, n):
    labelled, unlabelled, _ = labelled_split(subset(load_images('digits'), 300, 0), n, 0)
    fold = stratified_folds(labelled.y, folds, 0)
    wrong = replace(labelled, y=torch.where(fold == 1, (labelled.y + 1) % 10, labelled.y))
    with mock.patch.object(
        cross_fitted_teachers, 'stratified_folds', lambda *args: fold
    ):  # the same parts for both
        a, b = (
            distil((data, unlabelled), folds=folds, refresh=10) for data in (labelled, wrong)
        )  # no calibration in six steps
    assert (
        same(a.state.networks[1], b.state.networks[1])
        and not same(a.state.networks[0], b.state.networks[0])
        and not same(a.student, b.student)
    )


def test_the_student_reaches_no_teacher(split):
    a, b = (distil(split, network(s)) for s in (0, 5))
    assert not same(a.student, b.student) and not torch.equal(a.state.exponents, b.state.exponents)
    assert {k for k, v in tensors(a.state).items() if not torch.equal(v, tensors(b.state)[k])} == {
        'exponents'
    }, 'it changes the weights alone'


def test_without_a_student_the_weight_is_the_teachers_probability(split):
    both = teachers(split)
    both.refresh(0, n_others=100)
    x = both.images(split[1].x[:30])
    weights, labels = both.pseudo_labels(x)
    assert (
        torch.equal(weights, both(x).exp().amax(1))
        and torch.equal(labels, both(x).argmax(1))
        and both.exponents.tolist() == [1.0, 0.0]
    )


@quick
@given(st.integers(0, 10**6), st.floats(0.5, 3.0))
def test_the_student_moves_weights_and_leaves_their_mean(seed, sure):
    g = torch.Generator().manual_seed(seed)
    q, p = (
        torch.randn(400, 6, generator=g).log_softmax(1),
        (sure * torch.randn(400, 6, generator=g)).log_softmax(1),
    )
    found = student_exponents(q, p)
    weights, labels = student_adjusted_weights(q, p, found)
    assert torch.equal(labels, q.argmax(1)) and float(weights.mean()) == pytest.approx(
        float(q.exp().amax(1).mean()), abs=1e-3
    )
    agree = p.argmax(1) == labels
    assert weights[agree].mean() > weights[~agree].mean()


def test_a_student_that_says_nothing_or_contradicts_everywhere():
    q = (3 * torch.randn(200, 5)).log_softmax(1)
    weights, _ = student_adjusted_weights(
        q, nothing := torch.full_like(q, 0.2).log(), student_exponents(q, nothing)
    )
    assert torch.allclose(weights, q.exp().amax(1), atol=1e-3)
    against = torch.where(torch.nn.functional.one_hot(q.argmax(1), 5).bool(), -20.0, q).log_softmax(1)
    found = student_exponents(q, against)
    assert (
        torch.isfinite(torch.tensor(found)).all()
        and (student_adjusted_weights(q, against, found)[0] < 0.5).all()
    )


def test_nothing_is_learned_before_the_first_calibration(split):
    a, b = (
        distil(split, refresh=10, steps=5),
        train_ssl(network(), Supervised(), *split[:2], training=SSLTraining(**(SHORT | dict(steps=5)))),
    )
    assert all(h['mask'] == 0 and h['loss_unlabelled'] == 0 for h in a.history)
    weights = [p for n, p in a.student.named_parameters() if p.ndim > 1]
    assert len(weights) and all(torch.isfinite(p).all() for p in weights) and not torch.isnan(a.state.gamma)
    assert distil(split, refresh=2).history[-1]['mask'] > 0 and 'mask' not in b.history[-1]


@pytest.mark.parametrize(
    'teacher_fraction, student_fraction', [(1.0, 0.4), (0.25, 1.0), (0.0, 0.5), (0.5, 0.0), (1.0, 1.0)]
)
@pytest.mark.parametrize('u', [40, 41])
def test_each_predicts_what_is_learned_and_no_more(split, teacher_fraction, student_fraction, u):
    algorithm = CrossFit(split[0], teacher_fraction, student_fraction)
    own, middle, predicted = algorithm.parts(u)
    everything = list(range(u))
    first, second = (set(everything[s]) for s in own)
    assert (
        len(first) == len(second) == int(teacher_fraction * u) // 2
        and not first & second
        and len(everything[middle]) == int(student_fraction * u)
    )
    for mine, rows in zip((first, second), predicted):
        seen, wanted = set(everything[rows]), mine | set(everything[middle])
        assert wanted <= seen and len(seen) <= max(len(mine), u - middle.start)
    run = distil(split, teacher_fraction=teacher_fraction, student_fraction=student_fraction, steps=4)
    assert all(torch.isfinite(torch.tensor(h['loss_unlabelled'])) for h in run.history) and (
        student_fraction == 0
    ) == (run.history[-1]['mask'] == 0)


def test_a_refresh_is_a_function_of_its_number(split):
    a, b, c = (
        teachers(split, weak=lambda x, g: x.roll(int(torch.randint(3, (), generator=g)), 3)) for _ in range(3)
    )
    state = torch.get_rng_state()
    for t, number in ((a, 7), (b, 7), (c, 8)):
        t.refresh(number, n_others=100)
    assert same(a, b) and not same(a, c) and torch.equal(torch.get_rng_state(), state)
    assert (
        0.5 <= a.gamma <= 1
        and (a.scales >= 0).all()
        and not a.ema_models[0].training
        and a.networks[0].training
    )


def test_probabilities(split):
    both = teachers(split)
    x = both.images(split[1].x[:30])
    assert torch.allclose(both(x), torch.full((30, 10), 0.1).log())
    both.refresh(0, n_others=100)
    assert torch.allclose(both(x).exp().sum(1), torch.ones(30), atol=1e-5) and not both(x).requires_grad
    assert ((both.confidence(x) > 0) & (both.confidence(x) <= 1)).all()


def test_a_network_without_bias_or_with_other_layers(split):
    class Plain(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10, bias=False)

        def forward(self, x):
            return self.last(self.first(x.flatten(1)).relu())

    run = distil(split, Plain(0), Plain)
    assert (
        run.state.direction.shape == (2, 10, 16)
        and torch.isfinite(run.state.direction).all()
        and run.state.direction.any()
    )


# Where teachers come from, checkpoints


def test_teachers_come_from_a_function_a_network_or_the_student(split):
    made, given = [], network(9)
    distil(split, teacher=lambda k: made.append(k) or network(k))
    assert made == [1, 2]
    before = copy.deepcopy(given.state_dict())
    run = distil(split, teacher=given, steps=1, every=1)
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items()), (
        'the given one is not trained'
    )
    fresh = CrossFit(split[0]).start(student := network(), split[1], 10, make_trainer)
    assert (
        not same(fresh.networks[0], fresh.networks[1])
        and not same(fresh.networks[0], student)
        and len(list(run.state.networks)) == 2
    )


def test_a_run_is_a_function_of_its_seed_and_goes_on_from_a_checkpoint(split, tmp_path):
    whole, again, other = distil(split), distil(split), distil(split, seed=1)
    assert (
        same(whole.student, again.student)
        and same(whole.state, again.state)
        and not same(whole.student, other.student)
    )
    calls = []

    def broken(model, forward):
        calls.append(model)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        distil(split, measure=broken, checkpoint=tmp_path / 'a.safetensors')
    resumed = distil(split, checkpoint=tmp_path / 'a.safetensors')
    assert (
        same(whole.student, resumed.student)
        and same(whole.ema_model, resumed.ema_model)
        and same(whole.state, resumed.state)
    )
    for p, q in zip(whole.state.trainers, resumed.state.trainers):
        assert str(p.optimizer.state_dict()) == str(q.optimizer.state_dict())
        assert str(p.schedule.state_dict()) == str(q.schedule.state_dict())
        assert torch.equal(p.average.n_averaged, q.average.n_averaged)
    with pytest.raises(ValueError, match='checkpoint'):
        distil(split, teacher_fraction=0.5, checkpoint=tmp_path / 'a.safetensors')


def test_a_finished_run_still_knows_its_student(split, tmp_path):
    first, again = (
        distil(split, checkpoint=tmp_path / 'a.safetensors') for _ in range(2)
    )  # the second has nothing left to do
    x = first.state.images(split[1].x[:30])
    assert again.state.student[0] is again.ema_model and first.state.exponents[1] > 0
    for a, b in zip(first.state.pseudo_labels(x), again.state.pseudo_labels(x)):
        assert torch.equal(a, b)


def test_rate_and_average_of_a_teacher_follow_the_number_of_the_step(split):
    "Also where a batch has none of its labels, so that it does not learn"
    run = distil(split, batch_size=1, mu=30, steps=9)
    rates = {t.lr for t in run.state.trainers}
    assert len(rates) == 1 and [int(t.average.n_averaged) for t in run.state.trainers] == [9, 9]
    learned = [t.optimizer.state_dict()['state'] for t in run.state.trainers]
    assert all(learned)


def test_a_meter_measures_the_teachers(split):
    meter = PseudoLabelMeter(*split, 0.0)
    run = distil(split, measure=meter)
    assert run.pseudo_labeller is run.state and run.state.network is run.state
    weights, labels = run.state.pseudo_labels(run.state.images(split[1].x[meter.chosen]))
    right = labels == split[2].of(split[1].index[meter.chosen])
    assert run.history[-1]['pseudo_accuracy'] == pytest.approx(float(right.float().mean()))
    assert run.history[-1]['confidence'] == pytest.approx(float(weights.mean()), abs=1e-5)


def test_one_labelled_image_in_a_batch(split):
    run = distil(split, batch_size=1, mu=30)
    assert all(
        torch.isfinite(v).all() for v in tensors(run.state).values() if v.is_floating_point() and v.ndim > 1
    )


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(teacher='resnet20'), TypeError, 'teacher is a str'),
        (dict(teacher_fraction=-1.0), ValueError, 'teacher_fraction'),
        (dict(teacher_fraction=1.5), ValueError, 'teacher_fraction'),
        (dict(student_fraction=2.0), ValueError, 'student_fraction'),
        (dict(folds=1), ValueError, 'folds'),
        (dict(folds=3), ValueError, 'give at least 6'),
        (dict(refresh=0), ValueError, 'refresh'),
        (dict(refresh=2.5), ValueError, 'refresh'),
        (dict(ema=2.0), ValueError, 'ema'),
        (dict(steps=0), ValueError, 'steps'),
        (dict(weights=3), TypeError, 'weights'),
    ],
)
def test_settings_that_make_no_sense(split, change, error, message):
    with pytest.raises(error, match=message):
        distil(split, **change)


def test_labels_that_cannot_be_cut_twice(split):
    with pytest.raises(ValueError, match='3 images of one class; give at least 4'):
        CrossFit(split[0].select((torch.arange(40) != (split[0].y == 0).nonzero()[0, 0]).nonzero()[:, 0]))
    with pytest.raises(TypeError, match='labelled is a UnlabelledImages'):
        CrossFit(split[1])
