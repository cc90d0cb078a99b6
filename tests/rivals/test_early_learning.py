"Early-learning regularisation: its gradient, its memory, when that moves and when not, both networks of the method, faults."

import copy

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from weight_cases import C, cut, net, random, train, val
from flat_settings import distill

from kd_aif.distillation.schedules import Every
from kd_aif.distillation.weighting import Influence, Published, Reweighting
from kd_aif.experiments.storage import Storage
from kd_aif.experiments import rival_weights
from kd_aif.experiments.methods import run_task
from kd_aif.experiments.tasks import make_task
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.rivals.early_learning import EarlyLearning
from kd_aif.rivals.meta_weights import LearningToReweight

quick = hypothesis_settings(max_examples=30, deadline=None)
INDEX = torch.cat([train['index'], val['index']])
short = dict(epochs=3, lr=0.05, progress=False)


def batch_of(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(y=torch.randint(4, (n,), generator=g), index=torch.randperm(99, generator=g)[:n])


@quick
@given(st.integers(0, 1000), st.floats(0, 5), st.floats(0, 0.99))
def test_the_gradient_is_that_of_lemma_2(seed, weight, beta):
    z, batch = random(6, 4, seed=seed).double().requires_grad_(), batch_of(6, seed)
    loss = EarlyLearning(torch.arange(99), 4, weight, beta)
    loss.target.copy_(random(99, 4, seed=seed + 1).softmax(1))
    (gradient,) = torch.autograd.grad(loss(z, batch).sum(), z)
    p = z.detach().softmax(1)
    t = beta * loss.target[batch['index']] + (1 - beta) * p
    agreement = (p * t).sum(1, keepdim=True)
    wanted = p - F.one_hot(batch['y'], 4) + weight * p * (agreement - t) / (1 - agreement)
    assert torch.allclose(gradient, wanted, atol=1e-9)


def test_a_one_hot_memory_of_the_label_doubles_the_pull_and_one_of_another_class_turns_it():
    "With t = e_y: p − y times 1 + λ p_y/(1 − p_y) in class y; with t = e_k the class k gains"
    z = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    loss = EarlyLearning(torch.arange(2), 2, weight=3.0, beta=1.0)
    loss.target.copy_(torch.eye(2))
    (gradient,) = torch.autograd.grad(loss(z, dict(y=torch.tensor([0, 0]), index=torch.arange(2))).sum(), z)
    assert gradient.tolist() == [[-0.5 - 1.5, 0.5 + 1.5], [-0.5 + 1.5, 0.5 - 1.5]]


def test_weight_zero_is_cross_entropy_and_sure_networks_stay_finite():
    z, batch = random(8, 4).double(), batch_of(8)
    assert torch.equal(EarlyLearning(torch.arange(99), 4, 0.0)(z, batch), batch_cross_entropy(z, batch))
    sure = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss, batch = EarlyLearning(torch.arange(2), 2), dict(y=torch.tensor([0, 0]), index=torch.arange(2))
    for _ in range(50):
        loss.after_step(sure, batch)
    value = loss(sure, batch)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(sure.grad).all()


@quick
@given(st.integers(0, 1000), st.floats(0, 1))
def test_the_memory_follows_its_equation_in_any_order_of_samples(seed, beta):
    loss = EarlyLearning(torch.arange(98, -1, -1) * 3, 4, beta=beta)
    wanted = torch.zeros(99, 4)
    for k in range(4):
        batch = batch_of(20, seed + k)
        z = random(20, 4, seed=seed + k)
        loss.after_step(z, dict(batch, index=3 * batch['index']))
        wanted[batch['index']] = beta * wanted[batch['index']] + (1 - beta) * z.softmax(1)
    assert torch.allclose(loss.target, wanted, atol=1e-6)
    loss.check()


def test_calls_change_nothing_whatever_the_mode():
    loss, batch = EarlyLearning(torch.arange(99), 4), batch_of(8)
    loss.after_step(random(8, 4), batch)
    before = copy.deepcopy(loss.state_dict())
    z = random(8, 4, seed=1).requires_grad_()
    values = [loss(z, batch), loss.eval()(z, batch), loss.train()(z.detach(), batch)]
    values[0].sum().backward()
    with torch.no_grad():
        values.append(loss(z, batch))
    assert all(torch.equal(v, values[0]) for v in values)
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_state_dict_round_trip():
    a, b = EarlyLearning(torch.arange(99), 4), EarlyLearning(torch.arange(99), 4)
    a.after_step(random(8, 4), batch_of(8))
    assert sorted(a.state_dict()) == ['index', 'target']
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for loss in (a, b):
        loss.after_step(random(8, 4, seed=1), batch_of(8, 1))
    assert torch.equal(a.target, b.target) and a.target.abs().sum() > 0


def followed(loss):
    "Index and probabilities of every step, as training reports them"
    steps, after_step = [], loss.after_step

    def look(logits, batch):
        steps.append((batch['index'].clone(), logits.clone()))
        after_step(logits, batch)

    loss.after_step = look
    return steps


def expected(steps, beta=0.7):
    wanted = torch.zeros(len(INDEX), C)
    for index, logits in steps:
        place = torch.searchsorted(INDEX.sort().values, index)
        wanted[place] = beta * wanted[place] + (1 - beta) * logits.softmax(1)
    return wanted


def callback(step):
    "Looks at the loss again, and changes nothing"
    step.loss(step.logits, step.batch)
    return torch.ones(len(step.losses))


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(weighting=Reweighting(callback)),
        dict(weighting=Reweighting(LearningToReweight(cut(val, 20)))),
        dict(mechanism='student', weighting=Influence()),
        dict(mechanism='student', weighting=Published(1.0)),
        dict(mechanism='student', schedule=Every(1, 1), weighting=Published(1.0, last_layer=False)),
    ],
)
def test_training_moves_the_memory_once_a_step_and_scores_do_not(options):
    student, teacher = net('batch norm'), net('batch norm', 1)
    distill(teacher, None, cut(train, 16), cut(val, 20), **short)
    loss = EarlyLearning(INDEX, C)
    steps = followed(loss)
    distill(student, teacher, cut(train, 16), cut(val, 20), **short, label_loss=loss, **options)
    n = len(train['y']) + (len(val['y']) if options else 0)
    assert sum(len(index) for index, _ in steps) == 3 * n, 'every sample once an epoch'
    assert torch.allclose(loss.target, expected(steps), atol=1e-6)


def test_teacher_and_student_have_a_memory_each(monkeypatch, tmp_path):
    made = []

    def make(*args):
        made.append(EarlyLearning(*args))
        return made[-1]

    monkeypatch.setattr(rival_weights, 'EarlyLearning', make)
    task = make_task('digits', noise='symmetric', rate=0.3, epochs=2, student='mlp8', teacher='mlp16')
    record, _ = run_task(task, 'elr', storage=Storage(tmp_path), progress=False)
    teacher, student = made
    assert len(teacher.index) == 1297 and (student.target.sum(1) - (1 - 0.7**2)).abs().max() < 1e-5
    assert (teacher.target.sum(1) - (1 - 0.7**2)).abs().max() < 1e-5, 'two epochs, from zero'
    assert not torch.equal(teacher.target, student.target)
    assert record.config['alpha'] == 0.5 and record.teacher == 'mlp16'


def test_both_networks_under_one_memory_are_refused():
    with pytest.raises(ValueError, match='each with its own EarlyLearning'):
        distill(
            net('batch norm'), net('batch norm', 1), cut(train, 16), cut(val, 20),
            mechanism='both', label_loss=EarlyLearning(INDEX, C), **short,
        )  # fmt: skip


def test_a_sample_that_was_not_announced_is_found():
    with pytest.raises(ValueError, match='samples has 59 indices, but training met another one'):
        distill(
            net('batch norm'), None, cut(train, 16), cut(val, 20),
            label_loss=EarlyLearning(train['index'][1:], C), **short,
        )  # fmt: skip


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: EarlyLearning(60, 3), 'samples must be a tensor'),
        (lambda: EarlyLearning(torch.rand(3), 3), 'samples must be a tensor'),
        (lambda: EarlyLearning(torch.tensor([2, 2, 3]), 3), '3 indices, 2 different ones'),
        (lambda: EarlyLearning(torch.arange(3), 1), 'n_classes is 1'),
        (lambda: EarlyLearning(torch.arange(3), 3, weight=-1.0), 'weight is -1.0'),
        (lambda: EarlyLearning(torch.arange(3), 3, beta=1.5), 'beta is 1.5'),
    ],
)
def test_faults(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_logits_of_another_number_of_classes():
    with pytest.raises(ValueError, match='n_classes is 5, the logits have 3'):
        distill(
            net('batch norm'), None, cut(train, 16), cut(val, 20), label_loss=EarlyLearning(INDEX, 5), **short
        )
