"Contrastive representation distillation: equality with torchdistill, memories, negatives."

import copy

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from feature_cases import (
    B,
    N,
    random,
)

from kd_aif.rivals.contrastive import CRD

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


def test_three_steps_of_crd_are_those_of_torchdistill(torchdistill):
    ours = CRD(3, 5, 20, dim=4, negatives=6, T=0.5)
    reference = torchdistill.CRDLoss(
        's',
        'given',
        't',
        input_size=4,
        output_size=20,
        num_negative_samples=6,
        num_samples=20,
        temperature=0.5,
    )
    reference.memory_v1.copy_(ours.memory[0])
    reference.memory_v2.copy_(ours.memory[1])
    for step in range(3):
        v, t, index = (
            random(B, 3, seed=step).float(),
            random(B, 5, seed=step + 10).float(),
            torch.randperm(20, generator=torch.Generator().manual_seed(step))[:B],
        )
        given = dict(pos_idx=index, contrast_idx=torch.cat([index[:, None], ours._draw(index)], 1))
        batch_loss = reference(
            {'s': {'output': F.normalize(ours.student(v))}, 'given': {'input': given}},
            {'t': {'output': F.normalize(ours.teacher(t))}},
        )
        assert ours(v, t, index).mean().item() == pytest.approx(batch_loss.item(), rel=1e-4)
    assert torch.allclose(ours.memory, torch.stack([reference.memory_v1, reference.memory_v2]), atol=1e-5)


def crd_steps(crd, steps):
    optimiser = torch.optim.SGD(crd.parameters(), 0.1)
    for step in steps:
        loss = crd(
            random(B, 3, seed=step).float(),
            random(B, 5, seed=step + 10).float(),
            (torch.arange(B) * 3 + step) % N,
        ).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return crd


def seeded_crd(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CRD(3, 5, N, dim=4, negatives=8, seed=seed)


def test_crd_goes_on_from_its_state():
    whole, half = crd_steps(seeded_crd(), range(6)), crd_steps(seeded_crd(), range(3))
    again = seeded_crd()
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    crd_steps(again, range(3, 6))
    for k, v in whole.state_dict().items():
        assert torch.equal(v, again.state_dict()[k]), k
    assert {'memory', 'Z', 'steps'} <= set(dict(whole.named_buffers())) and int(whole.steps) == 6


def test_crd_remembers_only_what_it_saw_and_only_in_training():
    crd = seeded_crd()
    before = crd.memory.clone()
    crd_steps(crd.eval(), range(1))
    assert torch.equal(crd.memory, before) and int(crd.steps) == 0 and not crd.Z.any()
    crd_steps(crd.train(), range(1))
    moved = (crd.memory != before).any(2).any(0)
    assert (
        moved.nonzero()[:, 0].tolist() == (torch.arange(B) * 3).tolist()
        and torch.allclose(crd.memory.norm(dim=2), torch.ones(2, N))
        and (crd.Z > 0).all()
    )


@quick
@given(seeds)
def test_negatives_are_other_samples_and_all_of_them(seed):
    crd = CRD(3, 5, 5, dim=2, negatives=100, seed=seed)
    assert crd.negatives == 4
    crd.negatives = 200
    index = torch.arange(5)
    drawn = crd._draw(index)
    for i in range(5):
        assert set(drawn[i].tolist()) == set(range(5)) - {i}
    crd.steps += 1
    assert not torch.equal(crd._draw(index), drawn), 'others at every step'


def test_memories_of_a_part_of_a_larger_set_are_those_of_the_part():
    "Indices of a subset, in any order, against the same samples counted from 0; no memory is kept for anything else"
    found = []
    for samples, index in ((torch.tensor([40, 5, 9, 17]), torch.tensor([9, 40])), (4, torch.tensor([1, 3]))):
        crd = CRD(3, 3, samples, negatives=2, seed=1)
        with torch.no_grad():
            for i, p in enumerate(crd.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) * (i + 1))
        found.append(
            [crd(random(2, 3, seed=k).float(), random(2, 3, seed=9 + k).float(), index) for k in range(3)]
        )
        assert crd.memory.shape == (2, 4, 128)
    for a, b in zip(*found):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match='among the 4 of samples'):
        CRD(3, 3, torch.tensor([40, 5, 9, 17]))(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([6]))
