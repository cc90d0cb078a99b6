"Last layers that are fitted anew: right, under weights, in `distill`, resumed, and refused where they cannot be"

import copy

import pytest
import torch
from torch import nn

from kd_aif.distillation.checkpoint import Checkpoint, Stopped
from kd_aif.distillation.distill import distill
from kd_aif.distillation.refit import refit_last_layer, shared_weights
from kd_aif.distillation.schedules import OneShot, Refit
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Fixed

C, D = 3, 5


def batches(n, seed, first=0, noise=0.0, classes=C):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, D, generator=g) + 1.5 * torch.eye(D)[y]
    given = torch.where(torch.rand(n, generator=g) < noise, (y + 1) % classes, y)
    index = torch.arange(first, first + n)
    parts = zip(x.split(16), given.split(16), index.split(16))
    return [dict(x=a, y=b, index=i) for a, b, i in parts], given != y


def network(seed=0, outputs=C, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, outputs, bias=bias))


def joined(sets, key):
    return torch.cat([b[key] for part in sets for b in part])


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('classes', [2, C])
def test_the_gradient_of_the_objective_is_zero(classes, bias):
    train, val = batches(90, 0, classes=classes)[0], batches(30, 1, 200, classes=classes)[0]
    w = torch.rand(120, generator=torch.Generator().manual_seed(2)) + 0.1
    index = joined((train, val), 'index')
    model = network(outputs=classes, bias=bias).double()
    train, val = ([b | dict(x=b['x'].double()) for b in part] for part in (train, val))
    refit = Refit(shares='given')
    refit_last_layer(model, train, val, Fixed(w, index), refit)
    h, y = model[:2](joined((train, val), 'x')), joined((train, val), 'y')
    spread = h.std(0, correction=0)
    center = h.mean(0) if bias else torch.zeros(8)
    W = (model[2].weight.detach() * spread).requires_grad_()
    b = (model[2].bias + model[2].weight @ center).detach().requires_grad_() if bias else torch.zeros(classes)
    losses = nn.functional.cross_entropy((h - center) / spread @ W.T + b, y, reduction='none')
    objective = losses @ w.double() / w.sum() + refit.l2 / 2 * W.square().sum()
    gradients = torch.autograd.grad(objective, (W, b) if bias else (W,))
    assert max(float(g.abs().max()) for g in gradients) < 1e-4


def test_weights_belong_to_an_index():
    train, wrong = batches(120, 0, noise=0.4)
    val, _ = batches(30, 1, 200)
    index, w = joined((train,), 'index'), (~wrong).float()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    straight, shuffled = (
        refit_last_layer(network(), train, val, f) for f in (Fixed(w, index), Fixed(w[order], index[order]))
    )
    assert torch.equal(straight[2].weight, shuffled[2].weight)
    assert not torch.equal(straight[2].weight, refit_last_layer(network(), train, val)[2].weight)


def test_a_sample_without_weight_might_as_well_be_absent():
    train, _ = batches(96, 0)
    val, _ = batches(30, 1, 200)
    w = torch.ones(96)
    w[48:] = 0
    index = joined((train,), 'index')
    with_all = refit_last_layer(network(), train, val, Fixed(w, index), Refit(shares='given'))
    alone = refit_last_layer(network(), train[:3], val, None, Refit(shares='given'))
    x = joined((val,), 'x')
    assert torch.allclose(with_all(x).log_softmax(1), alone(x).log_softmax(1), atol=2e-3)


def test_classes_get_their_shares():
    w, y = torch.rand(60), torch.arange(60) % C
    made = shared_weights(w, y, torch.tensor([1, 2, 5]))
    sums = torch.stack([made[y == c].sum() for c in range(C)])
    assert torch.allclose(sums / sums.sum(), torch.tensor([0.125, 0.25, 0.625]).double())
    assert torch.isclose(made.sum(), w.double().sum())


def settings(**changes):
    return dict(
        schedule=OneShot(refit=Refit()), training=Training(epochs=3, lr=0.05, progress=False, **changes)
    )


@pytest.mark.parametrize('mechanism', ['student', 'both'])
def test_distill_fits_both_last_layers(mechanism):
    train, val = batches(150, 0, noise=0.3)[0], batches(60, 1, 200)[0]
    teacher = network(1)
    distill(teacher, None, train, val, training=Training(epochs=5, lr=0.05, progress=False))
    before = copy.deepcopy(teacher.state_dict())
    run = distill(network(2), teacher, train, val, mechanism=mechanism, **settings())
    assert run.seconds['refitting'] > 0
    if (
        mechanism == 'student'
    ):  # the given teacher is left alone, its copy has a new last layer and old features
        assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())
        assert torch.equal(run.teacher[0].weight, teacher[0].weight)
        assert not torch.equal(run.teacher[2].weight, teacher[2].weight)
    w = torch.cat([run.weights, run.val_weights])
    index = joined((train, val), 'index')
    for model in (run.student, run.teacher):
        again = refit_last_layer(copy.deepcopy(model), train, val, Fixed(w, index))
        assert torch.allclose(again[2].weight, model[2].weight, atol=1e-5)


@pytest.mark.parametrize('mechanism', ['student', 'both'])
@pytest.mark.parametrize('epochs', [1, 3, 4, 6])
def test_a_stopped_run_ends_as_if_it_had_not_stopped(mechanism, epochs, tmp_path):
    train, val = batches(150, 0, noise=0.3)[0], batches(60, 1, 200)[0]

    def run(checkpoint=None):
        make = settings(checkpoint=checkpoint)
        return distill(network(2), network(1), train, val, mechanism=mechanism, **make)

    seen = []

    def stop(seconds):
        seen.append(seconds)
        return len(seen) == epochs

    whole = run()
    try:
        run(Checkpoint(tmp_path / 'run.safetensors', stop=stop))
    except Stopped:
        pass
    resumed = run(Checkpoint(tmp_path / 'run.safetensors'))
    for name in ('student', 'teacher'):
        ours, theirs = (getattr(r, name).state_dict() for r in (whole, resumed))
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items()), name


def tied():
    model = network(outputs=D)
    model.insert(0, nn.Linear(D, 8))
    model[0].weight = model[3].weight = nn.Parameter(torch.randn(D, D))
    return model


REFUSED = {
    'no mechanism': (dict(mechanism=None), 'refit belongs to a mechanism'),
    'no such shares': (lambda: Refit(shares='balanced'), "shares is 'balanced'"),
    'l2 of zero': (lambda: Refit(l2=0.0), 'l2'),
    'l2 is nan': (lambda: Refit(l2=float('nan')), 'l2'),
    'steps': (lambda: Refit(max_iter=0), 'max_iter'),
    'train is text': (lambda: Refit(train='no'), 'train'),
    'refit is a class': (lambda: OneShot(refit=Refit), 'refit is the class Refit'),
    'refit is True': (lambda: OneShot(refit=True), 'refit is True'),
    'class without validation sample': (dict(val=2), 'val: class 2 has no sample'),
    'class without sample': (dict(train=2, val=2), 'class 2 has no sample'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_fitted_is_refused_before_training(case):
    change, message = REFUSED[case]
    if callable(change):
        with pytest.raises((ValueError, TypeError), match=message):
            change()
        return
    options = dict(train=C, val=C, mechanism='student') | change
    train, val = batches(90, 0, classes=options['train'])[0], batches(30, 1, 200, classes=options['val'])[0]
    student = network(2)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=message):
        distill(student, network(1), train, val, mechanism=options['mechanism'], **settings())
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())


def test_a_class_whose_weights_are_all_zero_is_named():
    train, val = batches(90, 0)[0], batches(30, 1, 200)[0]
    w, y = torch.ones(120), joined((train, val), 'y')
    w[y == 1] = 0
    index = joined((train, val), 'index')
    for refit in (Refit(), Refit(shares='given')):
        with pytest.raises(ValueError, match='class 1 has no sample with a weight above 0'):
            refit_last_layer(network(), train, val, Fixed(w, index), refit)
