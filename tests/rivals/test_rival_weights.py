"Rivals: their weights against hand computation, rules on models of every kind, runs that do not disturb each other, faults."

import sys, warnings

import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn
from torch.func import functional_call
from kd_aif.rivals.confident_learning import confident_learning, out_of_fold_probabilities
from kd_aif.rivals.fixed_weights import (
    effective_number_weights,
    inverse_frequency,
    oracle_weights,
    random_weights_like,
    self_influence_cross,
    self_influence_weights,
    small_loss_weights,
)
from kd_aif.rivals.meta_weights import (
    GroupDRO,
    LearningToReweight,
    MetaWeightNet,
    WatchedRule,
    virtual_gradient,
)
from kd_aif.rivals.robust_losses import GeneralizedCrossEntropy, LogitAdjusted
from kd_aif.foundation.core import generator
from kd_aif.data.mixed_batches import MixedBatches
from kd_aif.distillation.distill import distill
from kd_aif.distillation.trainer import Step
from kd_aif.influence.scores import self_influence
from kd_aif.foundation.losses import batch_cross_entropy, kd_loss
from kd_aif.influence.solvers import Exact
from kd_aif.weights.calibration import calibrated_weights
from kd_aif.weights.sample_weights import SampleWeights

quick = hypothesis_settings(max_examples=40, deadline=None)
labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)
C = 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n, seed, first=0, d=6):
    "Three clouds"
    y = torch.arange(n) % C
    return dict(x=random(C, d, seed=99)[y] * 2 + random(n, d, seed=seed), y=y, index=first + torch.arange(n))


def cut(data, size):
    return [{k: v[at] for k, v in data.items()} for at in torch.arange(len(data['y'])).split(size)]


def double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def forward(model, batch):
    return model(batch['x'])


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def step_of(model, batch, loss=batch_cross_entropy, forward=forward, lr=0.1, epoch=0):
    logits = forward(model, batch)
    return Step(model, batch, logits, loss(logits, batch), loss, forward, lr, epoch, 1)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items()) and a.keys() == b.keys()


train, val = rows(60, 1), rows(40, 2, first=1000)
held_out = torch.arange(60) % 4 == 0


# Fixed weights


@quick
@given(labels, st.integers(0, 5))
def test_random_weights_keep_the_histogram_of_each_class(y, seed):
    w = random(len(y)).abs()
    found = random_weights_like(w, y, seed)
    assert all(torch.equal(found[y == c].sort().values, w[y == c].sort().values) for c in range(5))
    assert torch.equal(random_weights_like(w, None, seed).sort().values, w.sort().values) and torch.equal(
        found, random_weights_like(w, y, seed)
    )


def test_random_weights_are_random_within_the_class():
    y, w = torch.arange(3000) % 3, torch.arange(3000.0)
    assert abs(float(torch.corrcoef(torch.stack([random_weights_like(w, y), w]))[0, 1])) < 0.06


@quick
@given(labels, st.integers(0, 2**60))
def test_oracle_has_mean_one_in_every_class(y, bits):
    wrong = torch.tensor([bits >> i & 1 for i in range(len(y))]).bool()
    w = oracle_weights(wrong, y)
    for c in y.unique():
        own = y == c
        assert float(w[own].mean()) == pytest.approx(1, abs=1e-5)
        if wrong[own].all():
            assert (w[own] == 1).all()
        else:
            assert (w[own & wrong] == 0).all() and len(w[own & ~wrong].unique()) == 1
    assert float(oracle_weights(wrong).mean()) == pytest.approx(1, abs=1e-5)


@quick
@given(labels, st.floats(0, 0.99999))
def test_class_weights_have_mean_one_and_favour_the_rare(y, beta):
    counts, inverse, effective = (
        torch.bincount(y, minlength=6),
        inverse_frequency(y, 6),
        effective_number_weights(y, 6, beta),
    )
    present = y.unique()
    for w in (inverse, effective):
        assert float(w.mean()) == pytest.approx(1, abs=1e-4) and (w > 0).all()
    for c in present:
        assert float(inverse[y == c].sum()) == pytest.approx(len(y) / len(present), rel=1e-4)
    order = counts[y].argsort()
    for w in (inverse, effective):
        assert (w[order].diff() <= 1e-5).all()
    assert effective.max() / effective.min() <= inverse.max() / inverse.min() * 1.0001, (
        'the effective number lies between ones and inverse frequency'
    )


def test_effective_number_by_hand():
    y = torch.tensor([0, 0, 0, 1])
    e = torch.tensor([(1 - 0.5**3) / (1 - 0.5), 1.0])
    raw = 1 / e[y]
    assert torch.allclose(effective_number_weights(y, 2, 0.5), raw / raw.mean())


@pytest.mark.parametrize('weigh', [small_loss_weights, self_influence_weights])
def test_what_is_suspicious_weighs_less(weigh):
    values, y = random(200).exp(), torch.arange(200) % 3
    w = weigh(values, y, 2.0)
    for c in range(3):
        assert (
            float(w[y == c].mean()) == pytest.approx(1, abs=1e-4)
            and (w[y == c][values[y == c].argsort()].diff() <= 1e-6).all()
        )
    assert (
        torch.equal(weigh(values, beta=0.0), torch.ones(200))
        and torch.equal(weigh(torch.ones(4)), torch.ones(4))
        and w.dtype == torch.float32
    )


def linear():
    return seeded(lambda: nn.Linear(6, C)).double()


def test_self_influence_as_cross_scores():
    "The same samples on both sides are treated alike, though their indices coincide; calibration then changes nothing."
    a = [double(b) for b in cut(train, 16)]
    model = linear()
    found = self_influence_cross(model, batch_cross_entropy, a, a, solver=Exact(damping=0.1), progress=False)
    assert (
        torch.allclose(found.values[0], found.reference[0])
        and (found.values <= 0).all()
        and found.index.tolist() == list(range(60))
        and torch.equal(found.labels, found.reference_labels[0])
    )
    alone = self_influence(model, batch_cross_entropy, a, Exact(damping=0.1), progress=False)
    assert torch.allclose(-found.values[0], alone.values), (
        'twice the same samples have the same mean curvature'
    )
    assert torch.equal(
        calibrated_weights(found.values, found.reference, found.labels, found.reference_labels).values,
        torch.ones(60),
    )
    assert torch.equal(SampleWeights(60).refresh(found), torch.ones(60))


def test_self_influence_cross_reads_each_set():
    found = self_influence_cross(
        linear(),
        batch_cross_entropy,
        [double(b) for b in cut(train, 16)],
        [double(b) for b in cut(val, 7)],
        progress=False,
    )
    assert (
        found.values.shape == (1, 60)
        and found.reference[0].shape == (40,)
        and torch.equal(found.reference_labels[0], val['y'])
    )


# Confident learning


def noisy(n=600, share=0.2, classes=4, seed=0):
    "Labels, a share of them replaced by the next class, and probabilities of a good model"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    wrong = torch.rand(n, generator=g) < share
    return (
        (4 * nn.functional.one_hot(y, classes) + 0.7 * torch.randn(n, classes, generator=g)).softmax(1),
        torch.where(wrong, (y + 1) % classes, y),
        wrong,
    )


def confident_joint(p, y):
    "Northcutt et al. (2021), eq. 1, scaled to the counts of the given labels (eq. 3): (C, C) by given and by confident class"
    classes = p.shape[1]
    threshold = torch.stack([p[y == c, c].mean() for c in range(classes)])
    above = torch.where(p >= threshold - 1e-6, p, -1.0)
    sure = above.max(1).values >= 0
    joint = torch.zeros(classes, classes).index_put_(
        (y[sure], above.argmax(1)[sure]), torch.ones(int(sure.sum())), accumulate=True
    )
    joint += torch.diag((joint.diagonal() == 0).float())
    return joint / joint.sum(1, keepdim=True) * torch.bincount(y, minlength=classes)[:, None]


def test_confident_learning_prunes_as_published():
    pytest.importorskip('cleanlab')
    p, y, wrong = noisy()
    w = confident_learning(p, y)
    pruned = w == 0
    assert wrong[pruned].double().mean() > 0.95 and pruned[wrong].double().mean() > 0.95
    for c in range(4):
        assert (
            float(w[y == c].mean()) == pytest.approx(1, abs=1e-5) and len(w[(y == c) & ~pruned].unique()) == 1
        )
    joint, ours = confident_joint(p, y), torch.zeros(600, dtype=torch.bool)
    for j in range(4):
        for k in set(range(4)) - {j}:
            own = (y == j).nonzero()[:, 0]
            ours[own[(p[own, k] - p[own, j]).topk(int(joint[j, k].round())).indices]] = True
    assert (ours == pruned).double().mean() > 0.99, 'but for the rounding of counts'


@pytest.mark.filterwarnings('error')
def test_confident_learning_follows_its_samples():
    pytest.importorskip('cleanlab')
    p, y, _ = noisy()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    assert torch.equal(confident_learning(p[order], y[order]), confident_learning(p, y)[order])
    assert torch.equal(confident_learning(p.double().requires_grad_(), y), confident_learning(p, y))


@pytest.mark.filterwarnings('ignore:May not flag all label issues')
def test_confident_learning_on_right_labels_and_absent_classes():
    pytest.importorskip('cleanlab')
    p, y, _ = noisy(share=0.0)
    assert (confident_learning(p, y) == 0).double().mean() < 0.02
    wide = torch.cat([p * 0.999, torch.full((600, 1), 0.001)], 1)  # a fifth class without any label
    w = confident_learning(wide, y)
    assert torch.isfinite(w).all() and (w == 0).double().mean() < 0.02
    for rule in ('prune_by_class', 'both', 'confident_learning', 'predicted_neq_given'):
        assert (confident_learning(p, y, rule) == 0).double().mean() < 0.02


def test_without_cleanlab_the_remedy_is_named(monkeypatch):
    for name in [m for m in sys.modules if m.split('.')[0] == 'cleanlab'] + ['cleanlab', 'cleanlab.filter']:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "kd_aif\[baselines\]"'):
        confident_learning(*noisy()[:2])


class Shuffling:
    "Another order in each pass, no `plain`"

    def __init__(self, data, size=16):
        self.data, self.size, self.passes = data, size, 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(len(self.data['y']), generator=generator(self.passes, 'order'))
        yield from cut({k: v[order] for k, v in self.data.items()}, self.size)


@pytest.mark.parametrize('folds', [2, 3])
def test_out_of_fold_probabilities_come_from_models_that_have_not_seen_the_sample(folds):
    seen = []

    class Marked(nn.Module):
        "Says 1 for class 0 exactly for samples that it was trained on"

        def __init__(self, known):
            super().__init__()
            self.register_buffer('known', known)
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, index):
            return 100 * nn.functional.one_hot((~torch.isin(index, self.known)).long(), 2).float() + self.p

    def fit(batches):
        seen.append(torch.cat([b['index'] for b in batches]))
        return Marked(seen[-1])

    data = dict(train, index=torch.arange(60) * 7 + 3)
    p = out_of_fold_probabilities(
        fit, cut(data, 16), folds, forward=lambda model, batch: model(batch['index'])
    )
    assert p.shape == (60, 2) and (p[:, 1] == 1).all() and len(seen) == folds
    assert torch.equal(torch.cat(seen).bincount()[data['index']], torch.full((60,), folds - 1))


def test_out_of_fold_probabilities_in_the_order_of_the_loader():
    model = linear().float()
    model.weight.requires_grad_(False)
    model.train()
    p = out_of_fold_probabilities(lambda batches: model, cut(train, 16), 3)
    assert torch.allclose(p, model(train['x']).softmax(1), atol=1e-6) and model.training


# Losses


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
            loss=loss,
            alpha=0.2,
            epochs=10,
            test=cut(rows(60, 5), 30),
            progress=False,
        )
        assert run.metrics['test_accuracy'] > 0.6


# The virtual step


class Attention(nn.Module):
    "Self-attention over the six inputs, with an embedding of the place, layer norm, dropout and tied weights"

    def __init__(self):
        super().__init__()
        self.place, self.up = nn.Embedding(6, 8), nn.Linear(1, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head, self.tied = nn.Linear(8, C), nn.Linear(1, 8)
        self.tied.weight = self.up.weight

    def forward(self, x):
        z = self.up(x[..., None]) + self.place.weight
        return self.head((self.block(z) + self.tied(x[..., None])).mean(1))


def net(kind, seed=0):
    make = {
        'linear': lambda: nn.Linear(6, C),
        'batch norm': lambda: nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, C)
        ),
        'dropout': lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, C)),
        'convolution': lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, C),
        ),
        'attention': Attention,
    }[kind]
    return seeded(make, seed).train()


KINDS = ['linear', 'batch norm', 'dropout', 'convolution', 'attention']


def lower(model, batch):
    with torch.autocast('cpu', torch.bfloat16):
        return model(batch['x']).float()


def make_rules(**more):
    return [GroupDRO(C), LearningToReweight(cut(val, 10), **more), MetaWeightNet(cut(val, 10), **more)]


RULES = pytest.mark.parametrize('rule', make_rules(), ids=lambda r: type(r).__name__)


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
    model, batch, advice = linear(), double(train), random(60, C, seed=7).double()
    loss = lambda z, b: 0.4 * batch_cross_entropy(z, b) + 0.6 * kd_loss(z, advice, 4.0, 'none')
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
@RULES
def test_a_rule_only_looks(rule, kind, how):
    "Parameters, buffers, gradients, modes and the random stream are as they were, the step's graph still serves, and the weights are fit for use."
    model = net(kind)
    step = step_of(model, {**train, 'held_out': held_out}, forward=how)
    before, modes, stream = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        w = rule(step)
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


@RULES
def test_frozen_and_unused_parameters(rule):
    model = net('batch norm')
    model[0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    step = step_of(model, train, forward=lambda m, b: m[3](m[2](m[1](m[0](b['x'])))))
    w = rule(step)
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
    wrong = torch.arange(60) < 15
    batch = dict(train, y=torch.where(wrong, (train['y'] + 1) % C, train['y']))
    w = LearningToReweight([val])(step_of(model, batch))
    assert w[~wrong].mean() > 5 * w[wrong].mean()


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
    model, held, advice = net('batch norm').double(), double(val), random(60, C, seed=3).double()
    batch = double(train) | (dict(held_out=held_out) if mixed else {})
    step = step_of(
        model,
        batch,
        lambda z, b: 0.5 * batch_cross_entropy(z, b) + 0.5 * kd_loss(z, advice, 2.0, 'none'),
        lr=0.5,
    )
    rule = MetaWeightNet([held], hidden=5, normalise=normalise, signal=signal)
    rule._follow(step)
    ours = ~held_out if mixed else torch.ones(60, dtype=torch.bool)

    def after():
        v = rule.net(
            (step.losses if signal is None else batch_cross_entropy(step.logits, batch)).detach()[:, None]
        )[:, 0].detach()
        w = torch.where(ours, v / v[ours].mean() if normalise else v, 1.0)
        known = dict(model.named_parameters())
        slopes = torch.autograd.grad((w * step.losses).mean(), list(known.values()), retain_graph=True)
        moved = {k: p.detach() - 0.5 * g for (k, p), g in zip(known.items(), slopes)} | {
            k: b.clone() for k, b in model.named_buffers()
        }
        return batch_cross_entropy(functional_call(model, moved, (held['x'],)), held).mean().item()

    found = rule.meta_gradient(step, held)
    scale = max(float(g.abs().max()) for g in found)
    assert scale > 1e-6
    for p, g in zip(rule.net.parameters(), found):
        for i in range(p.numel()):
            values = []
            for e in (1e-4, -1e-4):
                with torch.no_grad():
                    p.view(-1)[i] += e
                values.append(after())
                with torch.no_grad():
                    p.view(-1)[i] -= e
            assert float(g.view(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-4, abs=1e-4 * scale)


def test_published_form_is_not_scaled():
    step = step_of(net('linear'), {**train, 'held_out': held_out})
    w = MetaWeightNet([val], normalise=False)(step)
    assert (w[~held_out] < 1).all() and (w[~held_out] > 0).all() and (w[held_out] == 1).all()


def test_it_learns_that_large_losses_are_wrong_labels():
    wrong = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.3
    noisy_train = dict(train, y=torch.where(wrong, (train['y'] + 1) % C, train['y']))
    rule = WatchedRule(MetaWeightNet(cut(val, 40), lr=1e-2))
    run = distill(
        net('batch norm'), None, cut(noisy_train, 20), cut(val, 40), weights=rule, epochs=30, progress=False
    )
    w = rule.weights(run.index)
    assert w[~wrong].mean() > 1.3 * w[wrong].mean()


# Group DRO


def test_the_worst_class_gets_the_weight():
    rule, model = GroupDRO(C, eta=0.5), net('linear')
    for _ in range(30):
        w = rule(step_of(model, train))
    losses = batch_cross_entropy(model(train['x']), train).detach()
    worst = max(range(C), key=lambda c: float(losses[train['y'] == c].mean()))
    assert (
        rule.q.argmax() == worst
        and float(rule.q.sum()) == pytest.approx(1)
        and w[train['y'] == worst].min() > w[train['y'] != worst].max()
    )


@quick
@given(labels, st.floats(0.001, 5.0))
def test_group_objective_and_algorithm(y, eta):
    "q by the formula; the weighted mean is Σ q_g ℓ_g over the groups that are there."
    rule, q, model = GroupDRO(5, eta), torch.full((5,), 0.2), nn.Linear(2, 5)
    for seed in range(3):
        batch = dict(x=random(len(y), 2, seed=seed), y=y)
        step = step_of(model, batch)
        w, losses = rule(step), step.losses.detach()
        means = torch.stack(
            [losses[y == c].mean() if (y == c).any() else torch.tensor(0.0) for c in range(5)]
        )
        q = q * (eta * means).exp()
        q = q / q.sum()
        assert torch.allclose(rule.q, q, atol=1e-5) and torch.allclose(
            (w * losses).mean(), (q * means).sum(), atol=1e-4
        )
        assert float(w.mean()) == pytest.approx(float(q[y.unique()].sum()), abs=1e-4)


def test_groups_of_training_samples_only():
    step = step_of(net('linear'), {**train, 'held_out': train['y'] == 1})
    w = (rule := GroupDRO(C))(step)
    assert (w[train['y'] == 1] == 1).all() and rule.q[1] < 1 / 3 and torch.isfinite(w).all()
    huge = GroupDRO(C, eta=1e3)
    for _ in range(5):
        w = huge(step_of(net('linear'), train))
    assert torch.isfinite(w).all() and torch.isfinite(huge.q).all()


# Rules in the loop

short = dict(epochs=2, lr=0.1, progress=False)


@pytest.mark.parametrize(
    'kwargs', [dict(), dict(train_on_val=False), dict(autocast=torch.bfloat16), dict(teacher=True)], ids=str
)
@pytest.mark.parametrize('which', range(3))
def test_a_run_is_a_pure_function_of_its_seeds(which, kwargs):
    kwargs = dict(kwargs)
    teacher = net('batch norm', 5) if kwargs.pop('teacher', None) else None

    def run(rule):
        return state(
            distill(
                net('dropout'), teacher, cut(train, 20), cut(val, 20), weights=rule, **short, **kwargs
            ).student
        )

    rule = make_rules()[which]
    first = run(rule)
    assert equal(first, run(rule)), 'a rule that was used before starts anew'
    assert equal(first, run(make_rules()[which]))
    if which:
        assert not equal(first, run(make_rules(seed=1)[which]))


class Epochs:
    "A loader with an order of its own in each epoch"

    def __init__(self, data):
        self.data, self.epoch = data, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def plain(self):
        return cut(self.data, 10)

    def __iter__(self):
        order = torch.randperm(len(self.data['y']), generator=generator(self.epoch, 'order'))
        self.epoch += 1
        yield from cut({k: v[order] for k, v in self.data.items()}, 10)


@pytest.mark.parametrize('which', [1, 2])
def test_looking_at_the_validation_set_changes_nothing_else(which):
    "A rule that draws validation samples and differentiates, but answers with ones: order, dropout and running statistics are those of the control, bit for bit."
    inner = [None, LearningToReweight, MetaWeightNet][which]

    def run(weights, held):
        return state(distill(net('dropout'), None, Epochs(train), held, weights=weights, **short).student)

    held = Epochs(val)
    rule = inner(held)
    assert held.epoch == 0, 'the loader itself is left alone: only its plain twin is read'
    assert equal(
        run(lambda step: (rule(step), torch.ones(len(step.losses)))[1], held),
        run(torch.ones(60), Epochs(val)),
    )


def test_validation_draws_go_through_the_whole_set():
    rule = LearningToReweight(
        cut(val, 13), batch_size=13
    )  # 40 = 3·13 + 1: the single one is left for another pass
    step, seen = step_of(net('batch norm'), train), []
    rule._draws.start('cpu')
    for _ in range(30):
        seen.append(rule._draws.draw()['index'])
    assert (
        all(len(s) == 13 for s in seen)
        and all(len(torch.cat(seen[i : i + 3]).unique()) == 39 for i in range(0, 30, 3))
        and len(torch.cat(seen).unique()) == 40
    )
    rule._draws.start('cpu')
    assert torch.equal(rule._draws.draw()['index'], seen[0]) and torch.isfinite(rule(step)).all()


def test_validation_batches_that_do_not_fit_together():
    "Sentences padded to different lengths stay in the batches they came in."
    held = [
        dict(x=random(6, n, seed=n), y=torch.arange(6) % C, index=torch.arange(6) + 10 * n, name=['a'] * 6)
        for n in (3, 4, 5)
    ]
    rule = LearningToReweight(held)
    rule._draws.start('cpu')
    assert sorted(rule._draws.draw()['x'].shape[1] for _ in range(3)) == [3, 4, 5]


def test_another_model_starts_anew():
    rule, a, b = GroupDRO(C, eta=1.0), net('linear'), net('linear', 1)
    for _ in range(5):
        rule(step_of(a, train))
    moved = rule.q.clone()
    rule(step_of(b, train))
    assert (rule.q - 1 / C).abs().max() < (moved - 1 / C).abs().max()
    fresh = GroupDRO(C, eta=1.0)
    fresh(step_of(b, train))
    assert torch.equal(rule.q, fresh.q)
    rule(step_of(b, train, epoch=3))
    rule(step_of(b, train, epoch=0))
    assert torch.equal(rule.q, fresh.q), 'epochs that begin again are another run'


def test_watched_weights_belong_to_their_samples():
    "Mean over the last epochs, in any order that is asked for; validation samples with the same index are not mixed up with them."
    data = dict(train, index=5 * torch.arange(60) + 2)
    target = torch.rand(60, generator=torch.Generator().manual_seed(1))

    def rule(step):
        return torch.where(
            step.batch['held_out'],
            1.0,
            target[(step.batch['index'] - 2).div(5, rounding_mode='floor').clamp(0, 59)] + step.epoch,
        )

    watched = WatchedRule(rule)
    run = distill(
        net('linear'),
        None,
        Shuffling(data),
        cut(dict(val, index=data['index'][:40]), 20),
        weights=watched,
        **short | dict(epochs=4),
    )
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert (
        torch.allclose(watched.weights(data['index'][order], 1), (target + 3)[order])
        and torch.allclose(watched.weights(data['index'], 2), target + 2.5)
        and len(run.index) == 60
    )
    assert torch.allclose(watched.weights(data['index'][:3], 99), (target + 1.5)[:3])
    with pytest.raises(ValueError, match='no weight was given'):
        watched.weights(torch.tensor([1]))


# Faults

y60 = train['y']


@pytest.mark.parametrize(
    'make, says',
    [
        (
            lambda: random_weights_like(torch.ones(3), y60),
            'labels has 60 entries for 3 weights; give one label per sample',
        ),
        (
            lambda: random_weights_like(torch.tensor([1.0, float('nan')])),
            'weights has NaN or infinite values',
        ),
        (lambda: random_weights_like([1.0, 2.0]), 'weights is a list'),
        (lambda: random_weights_like(torch.ones(0)), 'one number per sample'),
        (lambda: oracle_weights(torch.zeros(3, dtype=torch.bool), y60), 'labels has 60 entries for 3 wrong'),
        (lambda: oracle_weights(torch.zeros(60), y60), r'give a tensor \(n,\) of bool'),
        (lambda: inverse_frequency(y60, 2), 'below n_classes = 2'),
        (lambda: inverse_frequency(y60 - 1, 3), 'labels are from -1'),
        (lambda: inverse_frequency(y60.float(), 3), r'give a tensor \(n,\) of int64'),
        (lambda: inverse_frequency(y60[:0], 3), 'labels is empty'),
        (lambda: effective_number_weights(y60, 3, 1.5), 'beta is 1.5'),
        (lambda: effective_number_weights(y60, 3, 1.0), 'use inverse_frequency'),
        (lambda: small_loss_weights(torch.tensor([1.0, float('inf')])), 'losses has NaN or infinite'),
        (lambda: small_loss_weights(torch.ones(3), beta=-1.0), 'beta is -1'),
        (lambda: self_influence_weights(torch.ones(2, 2)), r'values is of shape \(2, 2\)'),
        (lambda: confident_learning(torch.ones(60, 3), y60), r'give logits.softmax\(1\)'),
        (lambda: confident_learning(torch.full((60, 3), float('nan')), y60), 'must be finite'),
        (lambda: confident_learning(torch.full((60, 2), 0.5), y60), 'below n_classes = 2'),
        (lambda: confident_learning(torch.full((59, 3), 1 / 3), y60), 'one row per label'),
        (lambda: confident_learning(torch.full((60, 3), 1 / 3), y60, 'margin'), 'filter_by is'),
        (lambda: out_of_fold_probabilities(None, cut(train, 20), 1), 'folds is 1'),
        (lambda: out_of_fold_probabilities(None, cut(train, 20), 61), 'at least one sample in each'),
        (lambda: out_of_fold_probabilities(None, cut(train, 20), 2.0), 'folds is 2.0'),
        (lambda: GeneralizedCrossEntropy(0.0), 'use batch_cross_entropy'),
        (lambda: GeneralizedCrossEntropy(1.1), 'q is 1.1'),
        (lambda: LogitAdjusted(torch.tensor([3, 0, 1])), 'give a positive number for each class'),
        (lambda: LogitAdjusted(torch.tensor([3.0, float('nan')])), 'counts is'),
        (lambda: LogitAdjusted(torch.ones(3), tau=-1.0), 'tau is -1'),
        (
            lambda: LogitAdjusted(torch.ones(4))(torch.zeros(2, 3), dict(y=torch.zeros(2).long())),
            'counts has 4 classes, the logits 3',
        ),
        (lambda: GroupDRO(1), 'n_classes is 1'),
        (lambda: GroupDRO(3, eta=-1.0), 'eta is -1'),
        (lambda: GroupDRO(7)(step_of(net('linear'), train)), 'n_classes is 7, but the model has 3 classes'),
        (lambda: LearningToReweight([]), 'val is empty'),
        (lambda: LearningToReweight(b for b in [val]), 'val is a generator'),
        (lambda: MetaWeightNet([val], batch_size=2.5), 'batch_size is 2.5'),
        (lambda: MetaWeightNet([val], hidden=0), 'hidden is 0'),
        (lambda: MetaWeightNet([val], lr=0.0), 'lr is 0'),
    ],
)
def test_faults_name_argument_and_remedy(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()
