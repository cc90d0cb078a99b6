"Losses of logits, maps and relations: identities, hand computation, invariances, equality with torchdistill."

import math

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from feature_cases import (
    B,
    C,
    OUTPUTS,
    PAIRS,
    PATHS,
    labels,
    random,
    rotation,
    theirs,
)

from kd_aif.foundation.losses import kd_loss
from kd_aif.rivals.feature_losses import at_loss, cc_loss, nst_loss, pkt_loss, rkd_loss, sp_loss
from kd_aif.rivals.inputs import same_size
from kd_aif.rivals.logit_losses import dist_loss, dkd_loss, spherical_kd_loss, standardised_kd_loss

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


LOGIT_LOSSES = dict(
    dkd=lambda s, t, **k: dkd_loss(s, t, labels(), **k),
    dist=dist_loss,
    skd=spherical_kd_loss,
    lskd=standardised_kd_loss,
)
VECTOR_LOSSES = dict(sp=sp_loss, cc=cc_loss, pkt=pkt_loss, rkd=rkd_loss)
MAP_LOSSES = dict(at=at_loss, nst=nst_loss, sp=sp_loss)


def of(losses):
    return pytest.mark.parametrize('name, loss', losses.items(), ids=list(losses))


@of(LOGIT_LOSSES | VECTOR_LOSSES)
def test_no_loss_for_a_student_like_the_teacher(name, loss):
    z = random(B, C)
    assert (
        torch.allclose(loss(z, z), torch.zeros(B, dtype=z.dtype), atol=1e-12)
        and (loss(random(B, C, seed=1), z) > 1e-5).all()
    )


@of(MAP_LOSSES)
def test_no_loss_for_maps_like_the_teacher(name, loss):
    m = random(B, 3, 4, 4)
    assert (
        torch.allclose(loss(m, m), torch.zeros(B, dtype=m.dtype), atol=1e-12)
        and (loss(random(B, 3, 4, 4, seed=1), m) > 1e-5).all()
    )


@quick
@given(seeds)
def test_losses_are_never_negative(seed):
    a, b = random(B, C, seed=seed), random(B, C, seed=seed + 1)
    for loss in (*LOGIT_LOSSES.values(), sp_loss, cc_loss, rkd_loss):
        assert (loss(a, b) >= -1e-9).all()
    m, t = random(B, 3, 4, 4, seed=seed), random(B, 5, 8, 8, seed=seed + 1)
    assert (nst_loss(m, t) >= -1e-9).all() and (at_loss(m, t) >= 0).all()


# By hand


def test_dkd_is_hintons_loss_taken_apart():
    s, t = random(B, C), random(B, C, seed=1)
    target, others = dkd_loss(s, t, labels(), 1.0, 0.0, T=2.0), dkd_loss(s, t, labels(), 0.0, 1.0, T=2.0)
    p = (t / 2).softmax(1)[torch.arange(B), labels()]
    assert torch.allclose(
        target + (1 - p) * others, kd_loss(s, t, T=2.0, reduction='none')
    ) and torch.allclose(dkd_loss(s, t, labels(), 3.0, 5.0, T=2.0), 3 * target + 5 * others)


def test_both_parts_of_dkd_have_the_squared_temperature():
    "By loops, from probabilities at temperature 3"
    s, t = random(B, C), random(B, C, seed=1)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    for i, y in enumerate(labels()):
        others = [k for k in range(C) if k != y]
        a, b = p[i, others] / (1 - p[i, y]), q[i, others] / (1 - q[i, y])
        binary = p[i, y] * (p[i, y] / q[i, y]).log() + (1 - p[i, y]) * ((1 - p[i, y]) / (1 - q[i, y])).log()
        target, rest = (dkd_loss(s, t, labels(), *weights, T=3.0)[i] for weights in ((1.0, 0.0), (0.0, 1.0)))
        assert float(rest) == pytest.approx(9 * float((a * (a / b).log()).sum()))
        assert float(target) == pytest.approx(9 * float(binary))


def test_dkd_ignores_how_sure_the_teacher_is_in_the_second_part():
    s, t = random(1, C), random(1, C, seed=1)
    sure = t.clone()
    sure[0, 0] += 6
    assert torch.allclose(
        dkd_loss(s, t, labels(1), 0.0), dkd_loss(s, sure, labels(1), 0.0)
    ) and not torch.allclose(dkd_loss(s, t, labels(1), 1.0, 0.0), dkd_loss(s, sure, labels(1), 1.0, 0.0))


def test_dist_is_one_minus_correlation():
    s, t = random(B, C), random(B, C, seed=1)
    p, q = s.softmax(1), t.softmax(1)
    inter = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p, q)])
    intra = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p.T, q.T)])
    assert torch.allclose(dist_loss(s, t, 1.0, 0.0, 1.0), inter) and torch.allclose(
        dist_loss(s, t, 0.0, 1.0, 1.0).mean(), intra.mean()
    )


def test_kernels_of_pkt_and_nst_by_loops():
    s, t = random(B, 3), random(B, 5, seed=1)

    def conditional(x):
        k = torch.stack([torch.stack([(F.cosine_similarity(a, b, dim=0) + 1) / 2 for b in x]) for a in x])
        return k / k.sum(1, keepdim=True)

    p, q = conditional(t), conditional(s)
    assert torch.allclose(pkt_loss(s, t), (p * (p / q).log()).mean(1), atol=1e-6)
    s, t = random(1, 2, 3, 3), random(1, 4, 3, 3, seed=1)
    unit = [[c.flatten() / c.norm() for c in m[0]] for m in (s, t)]
    mean = lambda x, y: sum((a @ b) ** 2 for a in x for b in y) / len(x) / len(y)
    assert float(nst_loss(s, t)) == pytest.approx(
        float(mean(unit[0], unit[0]) + mean(unit[1], unit[1]) - 2 * mean(unit[0], unit[1]))
    )


def test_rkd_by_loops():
    s, t = random(4, 3), random(4, 5, seed=1)

    def relations(x):
        d = torch.stack([torch.stack([(a - b).norm() for b in x]) for a in x])
        cosine = torch.zeros(4, 4, 4, dtype=x.dtype)
        for i in range(4):
            for j in range(4):
                for k in range(4):
                    if i != j and i != k:
                        cosine[i, j, k] = F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)
        return d / d.sum() * 12, cosine

    (ds, cs), (dt, ct) = relations(s), relations(t)
    huber = lambda a, b: torch.where((a - b).abs() < 1, (a - b) ** 2 / 2, (a - b).abs() - 0.5)
    assert torch.allclose(
        rkd_loss(s, t, 2.0, 3.0), 2 * huber(ds, dt).mean(1) + 3 * huber(cs, ct).mean((1, 2)), atol=1e-6
    )


def test_maps_of_other_size_are_averaged():
    m, t = random(B, 2, 4, 6), random(B, 3, 8, 3, seed=1)
    s, v = same_size(m, t)
    assert s.shape == (B, 2, 4, 3) and v.shape == (B, 3, 4, 3)
    assert torch.allclose(s[..., 0], m[..., :2].mean(-1)) and torch.allclose(v[:, :, 0], t[:, :, :2].mean(2))


# Invariances that the papers state


@quick
@given(seeds, st.floats(0.1, 10))
def test_invariances(seed, scale):
    v, t = random(B, 5, seed=seed), random(B, 5, seed=seed + 1)
    same = lambda a, b: torch.allclose(a, b, atol=1e-6)
    turned, lengths = v @ rotation(5), random(B, 1, seed=seed + 2).exp()
    for loss in VECTOR_LOSSES.values():
        assert same(loss(scale * turned, t), loss(v, t)) and same(
            loss(v, scale * t @ rotation(5)), loss(v, t)
        ), 'scale and rotation'
    assert same(rkd_loss(v + 3, t), rkd_loss(v, t)) and not same(pkt_loss(v + 3, t), pkt_loss(v, t)), (
        'RKD: shift'
    )
    for loss in (pkt_loss, cc_loss):
        assert same(loss(lengths * v, t), loss(v, t)), 'the length of each vector'
    m, u = random(B, 3, 4, 4, seed=seed), random(B, 5, 4, 4, seed=seed + 1)
    per_sample = lengths[..., None, None]
    for loss in (at_loss, nst_loss):
        assert same(loss(per_sample * m.flip(1), u), loss(m, u)), (
            'the length of each map, the order of channels'
        )
    assert same(nst_loss(m * lengths[:3].view(1, 3, 1, 1), u), nst_loss(m, u)), 'the length of each channel'
    z = random(B, C, seed=seed)
    assert same(spherical_kd_loss(lengths * z + 2, z[:, :C]), spherical_kd_loss(z, z)), 'the length of logits'
    p = z.softmax(1)
    mixed = ((1 - 0.1 * scale) * p + 0.1 * scale / C).clamp_min(1e-12).log()
    if scale < 9:
        assert same(dist_loss(mixed, z, T=1.0), torch.zeros(B).double()), 'DIST: an affine change'


# torchdistill


@pytest.mark.parametrize('seed', range(3))
def test_means_are_those_of_torchdistill(torchdistill, seed):
    v, t, m, u, z, y = (
        random(B, 3, seed=seed),
        random(B, 5, seed=seed + 10),
        random(B, 3, 4, 4, seed=seed),
        random(B, 5, 4, 4, seed=seed + 10),
        random(B, C, seed=seed),
        random(B, C, seed=seed + 10),
    )
    cases = [
        (at_loss(m, u), theirs(torchdistill.ATLoss(PAIRS), m, u)),
        (at_loss(m, u, squared=False), theirs(torchdistill.ATLoss(PAIRS, mode='paper'), m, u)),
        (pkt_loss(v, t), theirs(torchdistill.PKTLoss(**PATHS), v, t)),
        (
            rkd_loss(v, t, 2.0, 3.0),
            theirs(
                torchdistill.RKDLoss(**OUTPUTS, dist_factor=2.0, angle_factor=3.0, reduction='mean'), v, t
            ),
        ),
        (
            dist_loss(z, y, 2.0, 3.0, 4.0),
            theirs(torchdistill.DISTLoss(**PATHS, beta=2.0, gamma=3.0, tau=4.0), z, y),
        ),
    ]
    for ours, reference in cases:
        assert ours.shape == (B,) and float(ours.mean()) == pytest.approx(
            float(reference), rel=1e-4, abs=1e-7
        )
    kernel = dict(type='gaussian', gamma=0.3, max_p=3)
    distance = theirs(torchdistill.CCKDLoss('a', 'a', kernel, 'sum'), F.normalize(v), F.normalize(t))
    assert float(cc_loss(v, t, 0.3, 3).mean()) == pytest.approx(float(distance) ** 2 / B**2), (
        'it leaves out the square'
    )


def test_sp_differs_from_torchdistill_in_the_norm_alone(torchdistill):
    v, t = random(B, 3), random(B, 5, seed=1)
    rows = [F.normalize(x @ x.T, p=1, dim=1) for x in (v, t)]
    assert float(theirs(torchdistill.SPKDLoss(**OUTPUTS, reduction='batchmean'), v, t)) == pytest.approx(
        float((rows[0] - rows[1]).square().mean())
    )


# Pairs of samples


def test_a_pair_weighs_the_mean_of_its_samples():
    "For relations that are the same in both directions"
    s, t, w = random(B, 3), random(B, 5, seed=1), random(B, seed=2).exp()

    def kernel(x):
        return math.exp(-0.8) * sum(
            (0.8 * (F.normalize(x) @ F.normalize(x).T)) ** p / math.factorial(p) for p in range(3)
        )

    def distances(x):
        return torch.cdist(x, x) / torch.cdist(x, x).sum() * B * (B - 1)

    pairs = (w[:, None] + w) / 2
    assert float((w * cc_loss(s, t)).mean()) == pytest.approx(
        float((pairs * (kernel(s) - kernel(t)) ** 2).mean())
    )
    assert float((w * rkd_loss(s, t, 1.0, 0.0)).mean()) == pytest.approx(
        float((pairs * F.smooth_l1_loss(distances(s), distances(t), reduction='none')).mean()), rel=1e-5
    )


@quick
@given(seeds, st.floats(0.5, 8))
def test_standardised_logits_have_neither_shift_nor_scale(seed, T):
    s, t = random(B, C, seed=seed), random(B, C, seed=seed + 1)
    shift, scale = 10 * random(B, 1, seed=seed + 2), random(B, 1, seed=seed + 3).exp()
    expected = standardised_kd_loss(s, t, T)
    assert torch.allclose(standardised_kd_loss(scale * s + shift, t, T), expected, atol=1e-9)
    assert torch.allclose(standardised_kd_loss(s, scale * t + shift, T), expected, atol=1e-9)
    assert (standardised_kd_loss(-s, t, T) - expected).abs().max() > 1e-4, 'the order counts'
    z = [(v - v.mean(1, keepdim=True)) / v.std(1, correction=0, keepdim=True) for v in (s, t)]
    assert torch.allclose(expected, kd_loss(*z, T, 'none'), atol=1e-9)


def test_standardised_logits_of_two_classes_by_hand():
    "z-scores ±1; at τ = 2: p₁ − p₂ = tanh ½, log p₁/p₂ = 1, times τ² = 4"
    found = standardised_kd_loss(
        torch.tensor([[3.0, 1.0], [7.0, 0.0]]), torch.tensor([[-5.0, 5.0], [1.0, 0.0]])
    )
    assert found.tolist() == pytest.approx([4 * math.tanh(0.5), 0.0], abs=1e-6)


def test_equal_logits_have_no_z_score_and_a_finite_gradient():
    z = torch.zeros(2, 4, requires_grad=True)
    loss = standardised_kd_loss(z, torch.eye(2, 4))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(z.grad).all()
