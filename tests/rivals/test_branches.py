"Branches: last parts, the native ensemble and diverse peers by hand, faults."

import math

import pytest, torch
from hypothesis import settings as hypothesis_settings, strategies as st
from torch import nn
from teacher_cases import kl, network, outputs_of

from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.distillation.objective import default_outputs
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.models.build import build_model
from kd_aif.rivals.branches import DiversePeers, NativeEnsemble, last_part

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


@pytest.mark.parametrize(
    'name',
    ['cnn8', 'mlp16', 'resnet8x4', 'wrn_16_2', 'vgg8', 'mobilenetv2_half', 'shufflenetv1', 'shufflenetv2'],
)
def test_the_last_part_is_what_comes_after_its_place(name):
    model = build_model(name, 7, 1, seed=0, in_features=1024).eval()
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = default_outputs(model, dict(x=x))
        position, part = last_part(model)
        shared = outputs[position].clone()
        assert torch.allclose(part(outputs[position]), outputs[-1], atol=1e-5) and torch.equal(
            outputs[position], shared
        ), 'a branch leaves the shared map as it is'
    mine = {id(p) for p in model.parameters()}
    assert {id(p) for p in part.parameters()} < mine


def test_branches_begin_differently_and_share_the_rest(digits):
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1), network(2)], ours)
    a, b = (z for _, z in one.outputs(ours))
    assert not torch.allclose(a, b) and not torch.allclose(a, ours[-1])
    (gradient,) = torch.autograd.grad(one(ours, None, digits).mean(), ours[one.position])
    assert gradient.any(), 'the early layers learn from the branches too'


def test_a_uniform_gate_makes_the_mean_of_logits_and_one_by_hand(digits):
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1), network(2)], ours, T=2.0)
    for p in one.gate.parameters():
        nn.init.zeros_(p)
    ensemble, members = one.ensemble(ours)
    assert (
        torch.allclose(one.importance(ours), torch.full((60, 3), 1 / 3))
        and torch.allclose(ensemble, members.mean(1), atol=1e-5)
        and torch.equal(members[:, 0], ours[-1])
    )
    expected = (
        batch_cross_entropy(ensemble, digits)
        + sum(batch_cross_entropy(members[:, i], digits) for i in (1, 2))
        + sum(kl(ensemble, members[:, i], 2.0) for i in range(3))
    )
    assert torch.allclose(one(ours, None, digits), expected, atol=1e-4)


def test_the_gate_weighs(digits):
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1)], ours)
    assert (
        torch.allclose(one.importance(ours).sum(1), torch.ones(60)) and one.importance(ours).std(0).min() > 0
    )
    one.gate = nn.Sequential(nn.Linear(ours[one.position].shape[1], 2))
    with torch.no_grad():
        one.gate[0].weight.zero_()
        one.gate[0].bias.copy_(torch.tensor([0.0, 30.0]))
    assert torch.allclose(one.ensemble(ours)[0], one.outputs(ours)[0][1], atol=1e-4)


def test_the_ensemble_teaches_and_is_not_taught_by_the_divergence(digits):
    "Without the ensemble's cross-entropy the gate has no gradient"
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1), network(2)], ours)
    gate = one.gate[0].weight
    (found,) = torch.autograd.grad(one(ours, None, digits).mean(), gate)
    (alone,) = torch.autograd.grad(batch_cross_entropy(one.ensemble(ours)[0], digits).mean(), gate)
    assert found.any() and torch.allclose(found, alone, atol=1e-6)


def test_attention_rows_sum_to_one_and_follow_the_features(digits):
    ours = outputs_of(digits)
    peers = DiversePeers([network(s) for s in (1, 2, 3)], ours)
    features = torch.stack([f for f, _ in peers.outputs(ours)], 1)
    a = peers.attention(features)
    assert (
        a.shape == (60, 3, 3)
        and torch.allclose(a.sum(-1), torch.ones(60, 3), atol=1e-6)
        and (a > 0).all()
        and not torch.allclose(a, a.mT)
    ), 'not symmetric: each peer has targets of its own'
    q, k = (features[5] @ w.T for w in (peers.query.weight, peers.key.weight))
    for row in range(3):
        assert torch.allclose(a[5, row], torch.stack([q[row] @ k[b] for b in range(3)]).softmax(0), atol=1e-6)


def test_okddip_by_hand(digits):
    ours = outputs_of(digits)
    peers = DiversePeers([network(s) for s in (1, 2)], ours, T=2.0)
    (f0, z0), (f1, z1) = peers.outputs(ours)
    a = peers.attention(torch.stack([f0, f1], 1))
    targets = [a[:, i, :1] * z0 + a[:, i, 1:] * z1 for i in (0, 1)]
    expected = (
        batch_cross_entropy(z0, digits)
        + batch_cross_entropy(z1, digits)
        + kl(targets[0], z0, 2.0)
        + kl(targets[1], z1, 2.0)
        + kl((z0 + z1) / 2, ours[-1], 2.0)
    )
    assert torch.allclose(peers(ours, None, digits), expected, atol=1e-4)


def test_the_attention_learns_through_the_targets(digits):
    ours = outputs_of(digits)
    peers = DiversePeers([network(s) for s in (1, 2)], ours)
    peers(ours, None, digits).mean().backward()
    assert peers.query.weight.grad.any() and peers.key.weight.grad.any()


@pytest.mark.parametrize('kind', [NativeEnsemble, DiversePeers])
def test_distillation_losses_begin_slowly_and_only_training_counts(kind, digits):
    ours = outputs_of(digits)

    def made(**more):
        return kind([network(1), network(2)], ours, **more)

    slow, full = made(ramp_up=10), made()
    first, late = slow(ours, None, digits), full(ours, None, digits)
    without = [(late - first).mean().item()]
    assert int(slow.steps) == 1 and int(full.steps) == 0 and without[0] > 0
    factors = torch.stack([torch.as_tensor(slow.ramp()) for _ in range(12)])
    assert (
        factors[8].item() == pytest.approx(math.exp(-5 * 0.01), rel=1e-4)
        and (factors.diff() >= 0).all()
        and torch.equal(factors[9:], torch.ones(3))
    )
    steps = int(slow.steps)
    slow.eval().ramp()
    assert int(slow.steps) == steps
    assert torch.allclose(slow.train()(ours, None, digits), late, atol=1e-5)


# Mistakes


def maps():
    return outputs_of(next(iter(ImageBatches(load_images('digits'), 8, shuffle=False))))


FAULTS = {
    'no branches': (lambda: NativeEnsemble([], maps()), 'models is empty'),
    'one peer': (lambda: DiversePeers([network(0)], maps()), 'models has 1'),
    'ramp_up': (lambda: NativeEnsemble([network(0)], maps(), ramp_up=-1), 'ramp_up is -1'),
    'other width': (lambda: NativeEnsemble([network(0, 'cnn12')], maps()), 'does not fit'),
    'other classes': (
        lambda: NativeEnsemble([build_model('cnn8', 7, 1, seed=0)], maps()),
        'new networks of its architecture',
    ),
    'unknown network': (lambda: last_part(nn.Linear(3, 3)), 'model Linear has no stages'),
    'one rectifier': (
        lambda: last_part(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))),
        'two rectifiers',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_name_the_argument(fault):
    mistake, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        mistake()
