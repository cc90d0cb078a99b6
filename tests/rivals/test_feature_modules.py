"Feature losses that learn along: their minima, hand computation, equality with torchdistill."

import math

import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn
from feature_cases import (
    B,
    PAIRS,
    example,
    random,
    replaced,
)

from kd_aif.rivals.feature_modules import OFD, VID, FactorTransfer, FitNet

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


def test_learnt_losses_at_their_minimum():
    m = random(B, 3, 4, 4)
    assert not replaced(FitNet(3, 3), regressor=nn.Identity())(m, m).any()
    assert not replaced(OFD(3, 3), connector=nn.Identity()).eval()(m.clamp_min(0), m.clamp_min(0)).any()
    ft = replaced(FactorTransfer(3, 3), translator=nn.Identity())
    ft.paraphraser['encoder'] = nn.Identity()
    assert torch.allclose(ft(2 * m, m), torch.zeros(B, dtype=m.dtype))
    assert torch.allclose(
        replaced(VID(3, 3, variance=2.0), mean=nn.Identity())(m, m), torch.tensor(math.log(2) / 2).double()
    )


def test_the_best_variance_is_the_mean_square_error():
    m, off = random(B, 2, 4, 4), 0.7
    found = [
        float(replaced(VID(2, 2, variance=v), mean=nn.Identity())(m + off, m).mean().detach())
        for v in (0.4, 0.49, 0.6)
    ]
    assert found[1] < min(found[0], found[2]) and found[1] == pytest.approx(
        (math.log(0.49) + 1) / 2, abs=1e-6
    )


@quick
@given(seeds)
def test_ofd_by_loop(seed):
    m, t = random(2, 3, 2, 2, seed=seed), random(2, 3, 2, 2, seed=seed + 1)
    ofd = replaced(OFD(3, 3), connector=nn.Identity())
    found = ofd(m, t)
    expected = torch.zeros(2, dtype=m.dtype)
    for i in range(2):
        for c in range(3):
            negative = t[:, c][t[:, c] < 0]
            margin = float(negative.mean()) if len(negative) else 0.0
            for a, b in zip(m[i, c].flatten(), t[i, c].flatten()):
                target = max(float(b), margin)
                if not float(a) <= target <= 0:
                    expected[i] += (float(a) - target) ** 2
    assert torch.allclose(found, expected)


def test_margin_is_the_mean_over_all_batches_seen():
    parts = [random(n, 2, 3, 3, seed=n) for n in (2, 5)]
    ofd = OFD(2, 2).double()
    for t in parts:
        ofd(t, t)
    together = torch.cat(parts)[:, 0]
    assert float(ofd.margin[0]) == pytest.approx(float(together[together < 0].mean()))
    before = ofd.margin.clone()
    ofd.eval()(parts[0], parts[0])
    assert torch.equal(ofd.margin, before)


def test_learnt_means_are_those_of_torchdistill(torchdistill):
    m, u = random(B, 3, 4, 4).float(), random(B, 6, 4, 4, seed=1).float()
    vid, ft = VID(3, 6), FactorTransfer(3, 6)
    reference = torchdistill.VIDLoss(PAIRS)(
        {'a': {'output': (vid.mean(m), vid.variance.expand(6, 4, 4))}}, {'a': {'output': u}}
    )
    assert vid(m, u).mean().item() == pytest.approx(reference.item(), rel=1e-5)
    reference = torchdistill.FTLoss(p=1)(
        {'translator': {'output': ft.translator(m)}},
        {'paraphraser': {'output': ft.paraphraser['encoder'](u)}},
    )
    assert ft(m, u).mean().item() == pytest.approx(reference.item(), rel=1e-5)


def test_the_paraphraser_rests_while_the_student_learns():
    loss, student, teacher, batch = example('ft')
    assert loss.needs_pretraining and not example('at')[0].needs_pretraining
    ft = loss.learnt[0]
    loss(student, teacher, batch).mean().backward()
    assert all(p.grad is None for p in ft.paraphraser.parameters()) and all(
        p.grad is not None for p in ft.translator.parameters()
    )
    loss.zero_grad()
    loss.pretrain_loss(teacher).mean().backward()
    assert all(p.grad is not None for p in ft.paraphraser.parameters()) and all(
        p.grad is None for p in ft.translator.parameters()
    )
