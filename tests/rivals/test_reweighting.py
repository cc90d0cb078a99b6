"Reweighting callbacks: group DRO against its algorithm, runs that start anew, recorded weights, faults."

import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn
from weight_cases import C, Shuffling, cut, net, random, settings, step_of, train, val

from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.rivals.reweighting import GroupDRO, WeightRecorder
from flat_settings import distill

quick = hypothesis_settings(max_examples=40, deadline=None)
labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)


def test_the_worst_class_gets_the_weight():
    callback, model = GroupDRO(C, eta=0.5), net('linear')
    for _ in range(30):
        w = callback(step_of(model, train))
    losses = batch_cross_entropy(model(train['x']), train).detach()
    worst = max(range(C), key=lambda c: float(losses[train['y'] == c].mean()))
    assert (
        callback.q.argmax() == worst
        and float(callback.q.sum()) == pytest.approx(1)
        and w[train['y'] == worst].min() > w[train['y'] != worst].max()
    )


@quick
@given(labels, st.floats(0.001, 5.0))
def test_group_objective_and_algorithm(y, eta):
    "q by the formula; the weighted mean is Σ q_g ℓ_g over the groups that are there."
    callback, q, model = GroupDRO(5, eta), torch.full((5,), 0.2), nn.Linear(2, 5)
    for seed in range(3):
        batch = dict(x=random(len(y), 2, seed=seed), y=y)
        step = step_of(model, batch)
        w, losses = callback(step), step.losses.detach()
        means = torch.stack(
            [losses[y == c].mean() if (y == c).any() else torch.tensor(0.0) for c in range(5)]
        )
        q = q * (eta * means).exp()
        q = q / q.sum()
        assert torch.allclose(callback.q, q, atol=1e-5) and torch.allclose(
            (w * losses).mean(), (q * means).sum(), atol=1e-4
        )
        assert float(w.mean()) == pytest.approx(float(q[y.unique()].sum()), abs=1e-4)


def test_groups_of_training_samples_only():
    step = step_of(net('linear'), {**train, 'held_out': train['y'] == 1})
    w = (callback := GroupDRO(C))(step)
    assert (w[train['y'] == 1] == 1).all() and callback.q[1] < 1 / 3 and torch.isfinite(w).all()
    huge = GroupDRO(C, eta=1e3)
    for _ in range(5):
        w = huge(step_of(net('linear'), train))
    assert torch.isfinite(w).all() and torch.isfinite(huge.q).all()


# In the loop


def test_another_model_starts_anew():
    callback, a, b = GroupDRO(C, eta=1.0), net('linear'), net('linear', 1)
    for _ in range(5):
        callback(step_of(a, train))
    moved = callback.q.clone()
    callback(step_of(b, train))
    assert (callback.q - 1 / C).abs().max() < (moved - 1 / C).abs().max()
    fresh = GroupDRO(C, eta=1.0)
    fresh(step_of(b, train))
    assert torch.equal(callback.q, fresh.q)
    callback(step_of(b, train, epoch=3))
    callback(step_of(b, train, epoch=0))
    assert torch.equal(callback.q, fresh.q), 'epochs that begin again are another run'


def test_recorded_weights_belong_to_their_samples():
    "Mean over the last epochs, in any order that is asked for; validation samples with the same index are not mixed up with them."
    data = dict(train, index=5 * torch.arange(60) + 2)
    target = torch.rand(60, generator=torch.Generator().manual_seed(1))

    def callback(step):
        return torch.where(
            step.batch['held_out'],
            1.0,
            target[(step.batch['index'] - 2).div(5, rounding_mode='floor').clamp(0, 59)] + step.epoch,
        )

    recorder = WeightRecorder(callback)
    run = distill(
        net('linear'),
        None,
        Shuffling(data),
        cut(dict(val, index=data['index'][:40]), 20),
        weights=recorder,
        **settings | dict(epochs=4),
    )
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert (
        torch.allclose(recorder.weights(data['index'][order], 1), (target + 3)[order])
        and torch.allclose(recorder.weights(data['index'], 2), target + 2.5)
        and len(run.index) == 60
    )
    assert torch.allclose(recorder.weights(data['index'][:3], 99), (target + 1.5)[:3])
    with pytest.raises(ValueError, match='no weight was given'):
        recorder.weights(torch.tensor([1]))


# Faults


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: GroupDRO(1), 'n_classes is 1'),
        (lambda: GroupDRO(3, eta=-1.0), 'eta is -1'),
        (lambda: GroupDRO(7)(step_of(net('linear'), train)), 'n_classes is 7, but the model has 3 classes'),
    ],
)
def test_faults_name_argument_and_remedy(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
