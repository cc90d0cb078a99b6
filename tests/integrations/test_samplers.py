"Weights of a run in other loops: by index in the loss, or as a sampler."

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_aif.distillation.weighting import Reweighting
from kd_aif.integrations.samplers import loss_weights, weighted_sampler

INDEX = torch.tensor([30, 10, 20, 40])
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5])
Y = torch.tensor([0, 1, 1, 0])


def run_like(**changes):
    "What a run holds of its weights"
    fields = dict(index=INDEX, weights=WEIGHTS, class_weights=None, config=dict(weighting=None))
    return SimpleNamespace(**(fields | changes))


def test_weights_are_found_by_index_in_any_order():
    for w in (
        loss_weights(INDEX, WEIGHTS),
        loss_weights(run_like()),
        loss_weights(INDEX.tolist(), WEIGHTS.numpy()),
    ):
        assert torch.equal(w(torch.tensor([10, 40, 10])), torch.tensor([2.0, 1.5, 2.0]))
        assert w(torch.zeros(0, dtype=torch.long)).shape == (0,)
        assert not w.state_dict() and not list(w.parameters())


def test_class_weights_multiply_those_of_the_samples():
    v = torch.tensor([1.0, 3.0])
    w = loss_weights(run_like(class_weights=v))
    assert torch.equal(w(INDEX, Y), WEIGHTS * v[Y])
    sampler = weighted_sampler(run_like(class_weights=v), order=INDEX, y=Y)
    assert torch.equal(sampler.weights, (WEIGHTS * v[Y]).double())
    with pytest.raises(ValueError, match='give the labels too'):
        w(INDEX)
    with pytest.raises(ValueError, match='give the labels at all 4 positions'):
        weighted_sampler(run_like(class_weights=v), order=INDEX)


def test_sampler_and_weighted_loss_have_the_same_expected_gradient():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    losses = nn.functional.cross_entropy(model(x), Y, reduction='none')
    order = torch.tensor([40, 20, 10, 30])
    back = torch.tensor([3, 2, 1, 0])  # place in INDEX of each position
    sampler = weighted_sampler(INDEX, WEIGHTS, order=order)
    p = (sampler.weights / sampler.weights.sum()).float()
    by_sampler = torch.autograd.grad((p * losses[back]).sum(), model.weight, retain_graph=True)[0]
    w = loss_weights(INDEX, WEIGHTS)(INDEX)
    by_loss = torch.autograd.grad((w * losses).mean(), model.weight)[0]
    torch.testing.assert_close(by_sampler, by_loss * len(w) / w.sum())


def test_draws_are_reproducible_and_new_in_each_epoch():
    first, second = (weighted_sampler(torch.arange(50), torch.rand(50), seed=3) for _ in range(2))
    second.weights = first.weights
    epoch = list(first)
    assert epoch == list(second) and epoch != list(first)
    alone = weighted_sampler(INDEX, WEIGHTS, order=INDEX, replacement=False, num_samples=3)
    assert sorted(alone) == [0, 1, 3]


faults = [
    (lambda: loss_weights(run_like(), WEIGHTS), TypeError, 'has weights of its own'),
    (lambda: loss_weights(run_like(config=dict(weighting=Reweighting(print)))), ValueError, 'callback'),
    (lambda: loss_weights(SimpleNamespace(index=INDEX, values=WEIGHTS)), TypeError, 'scores are no weights'),
    (lambda: loss_weights(INDEX), TypeError, 'give a run of distill'),
    (lambda: loss_weights(INDEX, WEIGHTS[:3]), ValueError, '4 entries for 3 weights'),
    (lambda: loss_weights(INDEX, -WEIGHTS), ValueError, 'not negative'),
    (lambda: loss_weights(INDEX, WEIGHTS * float('nan')), ValueError, 'finite'),
    (lambda: loss_weights(INDEX % 20, WEIGHTS), ValueError, 'comes more than once'),
    (
        lambda: loss_weights(INDEX, WEIGHTS)(torch.tensor([10, 11])),
        ValueError,
        'sample 11 is not among the 4',
    ),
    (lambda: weighted_sampler(INDEX, WEIGHTS), ValueError, 'give order'),
    (lambda: weighted_sampler(INDEX, WEIGHTS, order=[10, 50]), ValueError, 'order: sample 50'),
    (lambda: weighted_sampler(INDEX, WEIGHTS, order=INDEX, replacement=False), ValueError, 'only 3 samples'),
    (lambda: weighted_sampler(INDEX, WEIGHTS, order=INDEX, num_samples=0), ValueError, 'num_samples is 0'),
    (lambda: weighted_sampler(INDEX, WEIGHTS, order=INDEX, seed='a'), TypeError, 'seed'),
]


@pytest.mark.parametrize('fault, kind, says', faults, ids=[f[2] for f in faults])
def test_faults(fault, kind, says):
    with pytest.raises(kind, match=says):
        fault()
