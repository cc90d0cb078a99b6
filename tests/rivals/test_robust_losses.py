"Robust losses: limits, Bayes' rule, hopeless logits, training in the loop, faults."

import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from weight_cases import cut, net, random, rows, train, val

from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.rivals.robust_losses import GeneralizedCrossEntropy, LogitAdjusted
from flat_settings import distill

quick = hypothesis_settings(max_examples=40, deadline=None)


@quick
@given(st.floats(0.01, 1.0), st.integers(0, 100))
def test_generalised_cross_entropy_lies_between_its_limits(q, seed):
    z, batch = random(8, 5, seed=seed).double() * 3, dict(y=torch.arange(8) % 5)
    loss, ce = GeneralizedCrossEntropy(q)(z, batch), batch_cross_entropy(z, batch)
    p = (-ce).exp()
    assert torch.allclose(loss, (1 - p**q) / q) and (loss <= ce + 1e-9).all() and (loss >= 1 - p - 1e-9).all()
    assert torch.allclose(GeneralizedCrossEntropy(1.0)(z, batch), 1 - p) and torch.allclose(
        GeneralizedCrossEntropy(1e-10)(z, batch), ce, atol=1e-6
    )


def test_generalised_cross_entropy_of_hopeless_logits():
    z = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = GeneralizedCrossEntropy(0.7)(z, dict(y=torch.tensor([1, 1])))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1 / 0.7, 0]) and torch.isfinite(z.grad).all()


@quick
@given(st.floats(0, 3), st.integers(0, 100))
def test_logit_adjustment_is_bayes_rule(tau, seed):
    z, batch = random(8, 5, seed=seed).double(), dict(y=torch.arange(8) % 5)
    counts = random(5, seed=seed + 1).double().exp()
    prior = (counts / counts.sum()) ** tau
    p = z.softmax(1) * prior
    assert torch.allclose(
        LogitAdjusted(counts, tau)(z, batch),
        -(p / p.sum(1, keepdim=True)).gather(1, batch['y'][:, None])[:, 0].log(),
    )
    assert torch.allclose(LogitAdjusted(counts * 1000, tau)(z, batch), LogitAdjusted(counts, tau)(z, batch))
    assert torch.allclose(LogitAdjusted(torch.full((5,), 7), tau)(z, batch), batch_cross_entropy(z, batch))


@pytest.mark.parametrize('loss', [GeneralizedCrossEntropy(), LogitAdjusted(torch.tensor([5, 3, 2]))])
def test_losses_train_in_the_loop(loss):
    for teacher in (None, net('batch norm', 3)):
        run = distill(
            net('batch norm'),
            teacher,
            cut(train, 20),
            cut(val, 20),
            label_loss=loss,
            alpha=0.2,
            epochs=10,
            test=cut(rows(60, 5), 30),
            progress=False,
        )
        assert run.metrics['test_accuracy'] > 0.6


# Faults


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: GeneralizedCrossEntropy(0.0), 'use batch_cross_entropy'),
        (lambda: GeneralizedCrossEntropy(1.1), 'q is 1.1'),
        (lambda: LogitAdjusted(torch.tensor([3, 0, 1])), 'give a positive number for each class'),
        (lambda: LogitAdjusted(torch.tensor([3.0, float('nan')])), 'counts is'),
        (lambda: LogitAdjusted(torch.ones(3), tau=-1.0), 'tau is -1'),
        (
            lambda: LogitAdjusted(torch.ones(4))(torch.zeros(2, 3), dict(y=torch.zeros(2).long())),
            'counts has 4 classes, the logits 3',
        ),
    ],
)
def test_faults_name_argument_and_remedy(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
