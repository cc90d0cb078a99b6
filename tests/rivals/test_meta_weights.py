"Meta-learned weights: the virtual step against differences, models of every kind, runs that disturb nothing, faults."

import warnings

import pytest, torch
from torch import nn
from torch.func import functional_call
from weight_cases import (
    C,
    KINDS,
    cut,
    double,
    equal,
    forward,
    held_out,
    linear,
    lower,
    net,
    random,
    rows,
    settings,
    state,
    step_of,
    train,
    val,
)

from kd_aif.foundation.core import generator
from kd_aif.foundation.losses import batch_cross_entropy, kd_loss
from kd_aif.rivals.meta_weights import LearningToReweight, MetaWeightNet, virtual_gradient
from kd_aif.rivals.reweighting import GroupDRO, WeightRecorder
from kd_aif.rivals.robust_losses import GeneralizedCrossEntropy
from flat_settings import distill


def make_callbacks(**more):
    return [GroupDRO(C), LearningToReweight(cut(val, 10), **more), MetaWeightNet(cut(val, 10), **more)]


CALLBACKS = pytest.mark.parametrize('callback', make_callbacks(), ids=lambda r: type(r).__name__)


# The virtual step


@pytest.mark.parametrize(
    'weights',
    [None, torch.rand(60, generator=torch.Generator().manual_seed(0)).double()],
    ids=['at θ', 'after a step'],
)
@pytest.mark.parametrize('kind', ['linear', 'batch norm', 'convolution'])
def test_virtual_gradient_against_differences(kind, weights):
    model, batch, held = net(kind).double(), double(train), double(val)
    step = step_of(model, batch, lr=0.5)
    found = virtual_gradient(step, held, weights)
    w0 = torch.zeros(60).double() if weights is None else weights

    def after(w):
        known = dict(model.named_parameters())
        slopes = torch.autograd.grad((w * step.losses).mean(), list(known.values()), retain_graph=True)
        moved = {k: p - 0.5 * g for (k, p), g in zip(known.items(), slopes)} | {
            k: b.clone() for k, b in model.named_buffers()
        }
        return batch_cross_entropy(functional_call(model, moved, (held['x'],)), held).mean().item()

    unit = 1e-5 * torch.eye(60).double()
    differences = torch.tensor([(after(w0 + unit[j]) - after(w0 - unit[j])) / 2e-5 for j in range(60)])
    assert torch.allclose(found, differences.double(), atol=1e-6 * float(found.abs().max()) + 1e-9)


def test_zero_weights_stay_in_place():
    step = step_of(net('batch norm').double(), double(train))
    assert torch.allclose(
        virtual_gradient(step, double(val)), virtual_gradient(step, double(val), torch.zeros(60)), atol=1e-12
    )


def test_own_validation_loss_and_loss_of_the_step():
    "The distillation term is part of the sample's loss, and the validation loss may be any."
    model, batch, teacher_logits = linear(), double(train), random(60, C, seed=7).double()
    loss = lambda z, b: 0.4 * batch_cross_entropy(z, b) + 0.6 * kd_loss(z, teacher_logits, 4.0, 'none')
    step = step_of(model, batch, loss)
    u = virtual_gradient(step, double(val), val_loss=GeneralizedCrossEntropy())
    parameters = list(model.parameters())
    aim = torch.autograd.grad(GeneralizedCrossEntropy()(model(val['x'].double()), val).mean(), parameters)
    for j in (0, 30, 59):
        g = torch.autograd.grad(step.losses[j], parameters, retain_graph=True)
        assert float(u[j]) == pytest.approx(
            -0.1 / 60 * sum(float((a * b).sum()) for a, b in zip(g, aim)), rel=1e-6
        )


@pytest.mark.parametrize('how', [forward, lower], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', KINDS)
@CALLBACKS
def test_a_callback_only_looks(callback, kind, how):
    "Parameters, buffers, gradients, modes and the random stream are as they were, the step's graph still serves, and the weights are fit for use."
    model = net(kind)
    step = step_of(model, {**train, 'held_out': held_out}, forward=how)
    before, modes, stream = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        w = callback(step)
    assert (
        equal(before, state(model))
        and modes == [m.training for m in model.modules()]
        and torch.equal(stream, torch.get_rng_state())
        and all(p.grad is None for p in model.parameters())
    )
    assert (
        w.shape == (60,)
        and not w.requires_grad
        and torch.isfinite(w).all()
        and (w >= 0).all()
        and (w[held_out] == 1).all()
    )
    assert float(w[~held_out].mean()) == pytest.approx(1, abs=1e-4)
    (w * step.losses).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@CALLBACKS
def test_frozen_and_unused_parameters(callback):
    model = net('batch norm')
    model[0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    step = step_of(model, train, forward=lambda m, b: m[3](m[2](m[1](m[0](b['x'])))))
    w = callback(step)
    assert torch.isfinite(w).all() and not model[0].weight.requires_grad and model.unused.weight.grad is None


def test_lower_precision_gives_nearly_the_same():
    for kind in ('batch norm', 'convolution', 'attention'):
        model = net(kind)
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            if isinstance(m, nn.MultiheadAttention):
                m.dropout = 0.0
        a, b = (
            virtual_gradient(step_of(model, train, forward=f), val, torch.ones(60)) for f in (forward, lower)
        )
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.98, kind


# Learning to reweight


def test_weight_exactly_where_the_gradient_points_the_way_of_the_validation_gradient():
    "Softmax regression by hand: the gradient of a sample is (p − onehot) ⊗ (x, 1)."
    model, batch, held = linear(), double(train), double(val)

    def gradients(b):
        slope = model(b['x']).detach().softmax(1) - nn.functional.one_hot(b['y'], C)
        return torch.einsum('nc,nd->ncd', slope, torch.cat([b['x'], torch.ones(len(b['x']), 1)], 1)).flatten(
            1
        )

    alignment = gradients(batch) @ gradients(held).mean(0)
    w = LearningToReweight([held])(step_of(model, batch))
    assert torch.equal(w > 0, alignment > 0) and 0 < int((w > 0).sum()) < 60
    expected = alignment.clamp_min(0)
    assert torch.allclose(w, expected / expected.mean())


def test_a_wrong_label_has_no_weight():
    model = linear().float()
    opt = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(30):
        opt.zero_grad()
        batch_cross_entropy(model(val['x']), val).mean().backward()
        opt.step()
    is_noisy = torch.arange(60) < 15
    batch = dict(train, y=torch.where(is_noisy, (train['y'] + 1) % C, train['y']))
    w = LearningToReweight([val])(step_of(model, batch))
    assert w[~is_noisy].mean() > 5 * w[is_noisy].mean()


def test_when_no_sample_helps_all_weights_are_zero():
    model, one = linear(), double(rows(1, 3))
    against = {
        **one,
        'y': (one['y'] + 1) % C,
    }  # at equal logits the gradients of two different labels of one input have the inner product −|(x, 1)|²/3
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    step = step_of(model, {k: v.repeat(4, *[1] * (v.ndim - 1)) for k, v in against.items()})
    w = LearningToReweight([one])(step)
    assert torch.equal(w, torch.zeros(4).double())


def test_held_out_rows_do_not_take_part_in_the_scale():
    model = linear().float()
    plain_w, mixed_w = (
        LearningToReweight([val])(step_of(model, b)) for b in (train, {**train, 'held_out': held_out})
    )
    assert (
        torch.allclose(mixed_w[~held_out], plain_w[~held_out] / plain_w[~held_out].mean(), atol=1e-5)
        and (mixed_w[held_out] == 1).all()
    )
    everything = LearningToReweight([val])(
        step_of(model, {**train, 'held_out': torch.ones(60, dtype=torch.bool)})
    )
    assert torch.equal(everything, torch.ones(60))


# Meta-Weight-Net


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('signal', [None, batch_cross_entropy])
@pytest.mark.parametrize('normalise', [True, False])
def test_meta_gradient_against_differences(normalise, signal, mixed):
    model, held, teacher_logits = net('batch norm').double(), double(val), random(60, C, seed=3).double()
    batch = double(train) | (dict(held_out=held_out) if mixed else {})
    step = step_of(
        model,
        batch,
        lambda z, b: 0.5 * batch_cross_entropy(z, b) + 0.5 * kd_loss(z, teacher_logits, 2.0, 'none'),
        lr=0.5,
    )
    callback = MetaWeightNet([held], hidden=5, normalise=normalise, signal=signal)
    callback.follow(step)
    ours = ~held_out if mixed else torch.ones(60, dtype=torch.bool)

    def after():
        v = callback.net(
            (step.losses if signal is None else batch_cross_entropy(step.logits, batch)).detach()[:, None]
        )[:, 0].detach()
        w = torch.where(ours, v / v[ours].mean() if normalise else v, 1.0)
        known = dict(model.named_parameters())
        slopes = torch.autograd.grad((w * step.losses).mean(), list(known.values()), retain_graph=True)
        moved = {k: p.detach() - 0.5 * g for (k, p), g in zip(known.items(), slopes)} | {
            k: b.clone() for k, b in model.named_buffers()
        }
        return batch_cross_entropy(functional_call(model, moved, (held['x'],)), held).mean().item()

    found = callback.meta_gradient(step, held)
    scale = max(float(g.abs().max()) for g in found)
    assert scale > 1e-6
    for p, g in zip(callback.net.parameters(), found):
        for i in range(p.numel()):
            values = []
            for e in (1e-4, -1e-4):
                with torch.no_grad():
                    p.view(-1)[i] += e
                values.append(after())
                with torch.no_grad():
                    p.view(-1)[i] -= e
            assert float(g.view(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-4, abs=1e-4 * scale)


@pytest.mark.parametrize('seed', range(3))
def test_the_network_moves_against_the_meta_gradient(seed):
    "Its first Adam step has the sign of minus the gradient, and lowers the validation loss after the virtual step"
    model, batch, held = net('batch norm').double(), double(train), double(val)
    step = step_of(model, batch, lr=0.5)
    callback = MetaWeightNet([held], hidden=5, lr=1e-4, weight_decay=0.0, seed=seed)
    callback.follow(step)

    def validation_loss():
        w, known = callback._weights(step).detach(), dict(model.named_parameters())
        slopes = torch.autograd.grad((w * step.losses).mean(), list(known.values()), retain_graph=True)
        moved = {k: p.detach() - 0.5 * g for (k, p), g in zip(known.items(), slopes)}
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        return float(batch_cross_entropy(functional_call(model, moved | buffers, (held['x'],)), held).mean())

    gradient, loss = callback.meta_gradient(step, held), validation_loss()
    before = [p.detach().clone() for p in callback.net.parameters()]
    callback(step)
    moved = [p.detach() - b for p, b in zip(callback.net.parameters(), before)]
    for m, g in zip(moved, gradient):
        large = g.abs() > 1e-6
        assert torch.equal(m[large].sign(), -g[large].sign())
    assert validation_loss() < loss


def test_published_form_is_not_scaled():
    step = step_of(net('linear'), {**train, 'held_out': held_out})
    w = MetaWeightNet([val], normalise=False)(step)
    assert (w[~held_out] < 1).all() and (w[~held_out] > 0).all() and (w[held_out] == 1).all()


def test_it_learns_that_large_losses_are_wrong_labels():
    is_noisy = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.3
    noisy_train = dict(train, y=torch.where(is_noisy, (train['y'] + 1) % C, train['y']))
    callback = WeightRecorder(MetaWeightNet(cut(val, 40), lr=1e-2))
    run = distill(
        net('batch norm'),
        None,
        cut(noisy_train, 20),
        cut(val, 40),
        weights=callback,
        epochs=30,
        progress=False,
    )
    w = callback.weights(run.index)
    assert w[~is_noisy].mean() > 1.3 * w[is_noisy].mean()


# In the loop


@pytest.mark.parametrize(
    'kwargs',
    [dict(), dict(include_validation=False), dict(autocast=torch.bfloat16), dict(teacher=True)],
    ids=str,
)
@pytest.mark.parametrize('which', range(3))
def test_a_run_is_a_pure_function_of_its_seeds(which, kwargs):
    kwargs = dict(kwargs)
    teacher = net('batch norm', 5) if kwargs.pop('teacher', None) else None

    def run(callback):
        return state(
            distill(
                net('dropout'), teacher, cut(train, 20), cut(val, 20), weights=callback, **settings, **kwargs
            ).student
        )

    callback = make_callbacks()[which]
    first = run(callback)
    assert equal(first, run(callback)), 'a callback that was used before starts anew'
    assert equal(first, run(make_callbacks()[which]))
    if which:
        assert not equal(first, run(make_callbacks(seed=1)[which]))


class Epochs:
    "A loader with an order of its own in each epoch"

    def __init__(self, data):
        self.data, self.epoch = data, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def eval_view(self):
        return cut(self.data, 10)

    def __iter__(self):
        order = torch.randperm(len(self.data['y']), generator=generator(self.epoch, 'order'))
        self.epoch += 1
        yield from cut({k: v[order] for k, v in self.data.items()}, 10)


@pytest.mark.parametrize('which', [1, 2])
def test_looking_at_the_validation_set_changes_nothing_else(which):
    "A callback that mc_samples validation samples and differentiates, but returns ones: order, dropout and running statistics are those of the control, bit for bit."
    inner = [None, LearningToReweight, MetaWeightNet][which]

    def run(weights, held):
        return state(distill(net('dropout'), None, Epochs(train), held, weights=weights, **settings).student)

    held = Epochs(val)
    callback = inner(held)
    assert held.epoch == 0, 'the loader itself is left alone: only its plain twin is read'
    assert equal(
        run(lambda step: (callback(step), torch.ones(len(step.losses)))[1], held),
        run(torch.ones(60), Epochs(val)),
    )


def test_validation_draws_go_through_the_whole_set():
    callback = LearningToReweight(
        cut(val, 13), batch_size=13
    )  # 40 = 3·13 + 1: the single one is left for another pass
    step, seen = step_of(net('batch norm'), train), []
    callback._sampler.start('cpu')
    for _ in range(30):
        seen.append(callback._sampler.draw()['index'])
    assert (
        all(len(s) == 13 for s in seen)
        and all(len(torch.cat(seen[i : i + 3]).unique()) == 39 for i in range(0, 30, 3))
        and len(torch.cat(seen).unique()) == 40
    )
    callback._sampler.start('cpu')
    assert torch.equal(callback._sampler.draw()['index'], seen[0]) and torch.isfinite(callback(step)).all()


def test_validation_batches_that_do_not_fit_together():
    "Sentences padded to different lengths stay in the batches they came in."
    held = [
        dict(x=random(6, n, seed=n), y=torch.arange(6) % C, index=torch.arange(6) + 10 * n, name=['a'] * 6)
        for n in (3, 4, 5)
    ]
    callback = LearningToReweight(held)
    callback._sampler.start('cpu')
    assert sorted(callback._sampler.draw()['x'].shape[1] for _ in range(3)) == [3, 4, 5]


# Faults


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: LearningToReweight([]), 'val is empty'),
        (lambda: LearningToReweight(b for b in [val]), 'val is a generator'),
        (lambda: MetaWeightNet([val], batch_size=2.5), 'batch_size is 2.5'),
        (lambda: MetaWeightNet([val], hidden=0), 'hidden is 0'),
        (lambda: MetaWeightNet([val], lr=0.0), 'lr is 0'),
    ],
)
def test_faults_name_argument_and_remedy(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
