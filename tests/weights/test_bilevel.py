"Bilevel weights: what they find, what they leave alone, and what they refuse"

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from kd_aif.distillation.distill import distill
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Fixed
from kd_aif.weights.bilevel import aim_weights, bilevel_weights, BilevelSettings


def batches(n, agreement, seed, n_classes=2, size=100):
    "A weak feature that decides the class, and a strong one that agrees with it"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    agrees = torch.rand(n, generator=g) < agreement
    shown = torch.where(agrees, y, (y + 1 + torch.randint(n_classes - 1, (n,), generator=g)) % n_classes)
    onehot = nn.functional.one_hot
    x = torch.cat([2 * onehot(y, n_classes), 4 * onehot(shown, n_classes)], 1) + torch.randn(
        n, 2 * n_classes, generator=g
    )
    rows = torch.arange(n).split(size)
    return [dict(x=x[i].float(), y=y[i], index=i + 1_000_000 * seed) for i in rows], agrees


def found(train, val, n_classes=2, **settings):
    model = nn.Sequential(nn.Linear(2 * n_classes, n_classes))
    return bilevel_weights(model, train, val, settings=BilevelSettings(**settings), progress=False)


@pytest.mark.parametrize('n_classes', [2, 3, 33])
def test_samples_that_are_like_the_validation_samples_weigh_more(n_classes):
    n = 2000 if n_classes < 32 else 4000
    train, agrees = batches(n, 0.9, 1, n_classes)
    val, _ = batches(n // 5, 0.0, 2, n_classes)
    result = found(train, val, n_classes)
    w = result.values[:n]
    assert w[~agrees].mean() > 1.5 * w[agrees].mean() and result.values.mean() == pytest.approx(1, abs=1e-5)
    assert result.effective_fraction >= 0.499 and 0 < result.step < len(result.losses)
    assert result.losses[result.step] < result.losses[0]
    index = torch.cat([b['index'] for b in (*train, *val)])
    assert torch.equal(result.index, index) and (result.values > 0).all()


def test_samples_of_the_same_kind_keep_their_weight():
    "At level 1 % with ten draws: one false alarm would be much"
    steps = []
    for seed in range(10):
        (train, _), (val, _) = batches(600, 0.9, 2 * seed + 1), batches(200, 0.9, 2 * seed + 2)
        steps.append(found(train, val).step)
    assert sum(step > 0 for step in steps) <= 1


def test_the_order_and_the_size_of_batches_do_not_matter():
    (train, _), (val, _) = batches(600, 0.9, 1), batches(200, 0.0, 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2))
    one, other = (
        bilevel_weights(model, t, val, progress=False) for t in (train, batches(600, 0.9, 1, size=37)[0])
    )
    assert torch.allclose(one.values, other.values, atol=1e-4)
    shuffled = bilevel_weights(model, train[::-1], val, progress=False)
    place = {int(i): k for k, i in enumerate(shuffled.index)}
    same = shuffled.values[[place[int(i)] for i in one.index]]
    assert torch.allclose(one.values, same, atol=1e-3)


@pytest.mark.parametrize('fraction', [0.3, 0.8, 1.0])
def test_the_effective_number_does_not_fall_below_its_bound(fraction):
    (train, _), (val, _) = batches(1000, 0.95, 1), batches(300, 0.0, 2)
    assert found(train, val, effective_fraction=fraction).effective_fraction >= fraction - 1e-3


def test_the_worst_class_gets_the_weight():
    (train, _), (val, _) = batches(1500, 0.95, 1, 3), batches(450, 0.0, 2, 3)
    for b in train:
        rare = (b['y'] == 2).nonzero()[:, 0][3:]
        keep = torch.ones(len(b['y']), dtype=torch.bool).index_fill(0, rare, False)
        b.update({k: v[keep] for k, v in b.items()})
    y = torch.cat([b['y'] for b in train])
    mean, worst = (found(train, val, 3, worst_class=t).values[: len(y)] for t in (None, 0.1))
    assert worst[y == 2].mean() > mean[y == 2].mean()


def test_aim_weights_sum_to_one_without_a_class():
    w = aim_weights(torch.rand(5), torch.tensor([0, 0, 3, 3, 3]), 0.5)
    assert float(w.sum()) == pytest.approx(1)


def test_distill_takes_them():
    (train, _), (val, _) = batches(600, 0.9, 1), batches(200, 0.0, 2)
    w = found(train, val)
    run = distill(
        nn.Linear(4, 2),
        nn.Linear(4, 2),
        train,
        val,
        weighting=Fixed(w.values, w.index),
        training=Training(epochs=1, progress=False),
    )
    assert torch.allclose(run.weights, w.values[:600])


def test_it_is_quiet_and_leaves_the_model_alone():
    (train, _), (val, _) = batches(300, 0.9, 1), batches(100, 0.0, 2)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bilevel_weights(model, train, val, progress=False)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def without_class(batches, c):
    return [{k: v[b['y'] != c] for k, v in b.items()} for b in batches]


TRAIN, VAL = batches(300, 0.9, 1)[0], batches(100, 0.0, 2)[0]
BAD = {
    'val is train': (lambda m: bilevel_weights(m, TRAIN, TRAIN), ValueError, 'val is train itself'),
    'few': (
        lambda m: bilevel_weights(m, TRAIN, VAL, settings=BilevelSettings(folds=20)),
        ValueError,
        'val has 100 samples for folds=20',
    ),
    'missing class': (
        lambda m: bilevel_weights(m, without_class(TRAIN, 1), VAL),
        ValueError,
        'train: class 1 has no sample',
    ),
    'one output': (
        lambda m: bilevel_weights(nn.Linear(4, 1), without_class(TRAIN, 1), without_class(VAL, 1)),
        ValueError,
        'the model has one output',
    ),
    'settings': (
        lambda m: bilevel_weights(m, TRAIN, VAL, settings=dict(step=1)),
        TypeError,
        'BilevelSettings',
    ),
    'nan': (
        lambda m: bilevel_weights(m, [dict(TRAIN[0], x=TRAIN[0]['x'] * float('nan'))], VAL),
        ValueError,
        'NaN',
    ),
    'step': (lambda m: BilevelSettings(step=0), ValueError, 'step is 0'),
    'folds': (lambda m: BilevelSettings(folds=2), ValueError, 'folds is 2.*give 3 or more'),
    'fraction': (lambda m: BilevelSettings(effective_fraction=1.5), ValueError, 'effective_fraction is 1.5'),
    'temperature': (lambda m: BilevelSettings(worst_class=0.0), ValueError, 'worst_class is 0'),
    'l2': (lambda m: BilevelSettings(l2=float('inf')), ValueError, 'l2 is inf'),
    'significance': (lambda m: BilevelSettings(significance=-1), ValueError, 'significance is -1'),
    'steps': (lambda m: BilevelSettings(max_steps=0), ValueError, 'max_steps is 0'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(nn.Linear(4, 2))


def test_settings_are_shown_in_a_line():
    assert 'step' in repr(replace(BilevelSettings(), step=0.3))
