"Teacher assistants: who learns from whom, sizes, faults."

import copy

import pytest, torch
from hypothesis import settings as hypothesis_settings, strategies as st
from teacher_cases import network

from kd_aif.data.images import hold_out, subset
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.models.build import build_model
from kd_aif.rivals.assistants import ASSISTANTS, assistant_name, distill_in_steps
from kd_aif.distillation.distill import distill
from kd_aif.distillation.trainer import Training

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


def test_the_assistant_learns_from_the_teacher_and_the_student_from_the_assistant():
    train, val = (
        ImageBatches(d, 32, seed=0) for d in hold_out(subset(load_images('digits'), 160, 0), 60, seed=0)
    )
    settings = dict(training=Training(epochs=1, lr=0.05, progress=False, seed=0))
    teacher, assistant, student = network(0, 'cnn12'), network(1, 'cnn10'), network(2)
    before = copy.deepcopy(teacher.state_dict())
    by_hand = copy.deepcopy(assistant), copy.deepcopy(student)
    runs = distill_in_steps([teacher, assistant, student], train, val, val, **settings)
    distill(by_hand[0], teacher, train, val, **settings)
    distill(by_hand[1], by_hand[0], train, val, **settings)
    for ours, theirs in zip((assistant, student), by_hand):
        for p, q in zip(ours.state_dict().values(), theirs.state_dict().values()):
            assert torch.equal(p, q)
    assert [run.teacher for run in runs] == [teacher, assistant] and runs[-1].student is student
    assert 'test_accuracy' in runs[-1].metrics and 'test_accuracy' not in runs[0].metrics
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())


def test_another_teacher_makes_another_assistant_and_so_another_student():
    train, val = (
        ImageBatches(d, 32, seed=0) for d in hold_out(subset(load_images('digits'), 120, 0), 60, seed=0)
    )
    found = [
        distill_in_steps(
            [network(seed, 'cnn12'), network(1, 'cnn10'), network(2)],
            train,
            val,
            training=Training(epochs=1, lr=0.05, progress=False),
        )[-1].student
        for seed in (0, 7)
    ]
    assert not torch.equal(*(s[-1].weight for s in found))


@pytest.mark.parametrize(
    'teacher, student, assistant',
    [
        ('cnn32', 'cnn16', 'cnn24'),
        ('cnn16', 'cnn8', 'cnn12'),
        ('mlp64', 'mlp16', 'mlp40'),
        *((*pair, a) for pair, a in ASSISTANTS.items()),
    ],
)
def test_an_assistant_is_between(teacher, student, assistant):
    assert assistant_name(teacher, student) == assistant
    sizes = [
        sum(p.numel() for p in build_model(name, 10, 3, seed=0).parameters())
        for name in (teacher, assistant, student)
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


# Mistakes


FAULTS = {
    'no assistant': (lambda: distill_in_steps([network(0), network(1)], [], []), 'models has 2 networks'),
    'unknown pair': (lambda: assistant_name('cnn32', 'resnet20'), 'ASSISTANTS'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_name_the_argument(fault):
    mistake, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        mistake()
