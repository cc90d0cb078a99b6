"Influence scores as a property: linear, additive, blind to batches and order; models are left as they were; text and dictionaries through `forward`."

import copy

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from kd_aif.foundation.core import evaluating
from kd_aif.influence.curvature import FlatModel
from kd_aif.foundation.splits import stratified_folds
from kd_aif.influence.cross_scores import SCORES, cross_scores
from kd_aif.influence.last_layer import TARGETS, last_layer_view
from kd_aif.influence.scores import InfluenceScores, directional_scores, influence_scores
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.models.features import last_linear
from kd_aif.influence.iterative_solvers import CG
from kd_aif.influence.solvers import Exact, Identity

C = 3
LAM = Exact(damping=0.1)
quick = settings(max_examples=8, deadline=None)
many = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 20)


def rows(n, seed, start=0, features=3):
    "n samples as one dictionary; every class appears when n ≥ C"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % C
    return dict(
        x=torch.randn(n, features, generator=g, dtype=torch.float64),
        y=y[torch.randperm(n, generator=g)],
        index=torch.arange(start, start + n),
    )


def pick(data, at):
    return {k: v[at] for k, v in data.items()}


def cut(data, size=100):
    return [pick(data, r) for r in torch.arange(len(data['index'])).split(size)]


def joined(a, b):
    return {k: torch.cat([a[k], b[k]]) for k in a}


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, C)).double()


def made(seed, n=12, m=9):
    return net(seed), rows(n, seed + 1), rows(m, seed + 2, 500)


def score(model, train, val, solver=LAM, loss=batch_cross_entropy, size=100, **kwargs):
    return influence_scores(
        model, loss, cut(train, size), cut(val, size), solver=solver, progress=False, **kwargs
    )


def same(a, b, tol=1e-8):
    assert torch.allclose(
        torch.as_tensor(a),
        torch.as_tensor(b),
        rtol=tol,
        atol=tol * (1 + float(torch.as_tensor(b).abs().max())),
    ), (a, b)


# What a score is


@quick
@given(seeds, st.integers(0, 11))
def test_sign_and_scale_by_a_small_step(seed, i):
    "Without curvature the score is the rate at which the validation loss falls when a step down the sample's gradient is made."
    model, train, val = made(seed)
    found = score(model, train, val, Identity()).values[i]
    params = list(model.parameters())
    step = torch.autograd.grad(cross_entropy(model(train['x'][i : i + 1]), train['y'][i : i + 1]), params)

    def after(eps):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), step):
                p -= eps * g
            return cross_entropy(moved(val['x']), val['y'])

    same((after(-1e-4) - after(1e-4)) / 2e-4, found, 1e-5)


@quick
@given(seeds, st.booleans(), st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_the_validation_gradient(seed, last_layer, a, b):
    model, train, val = made(seed)
    square = lambda logits, batch: (logits**2).mean(1)
    mixed = lambda logits, batch: a * batch_cross_entropy(logits, batch) + b * square(logits, batch)
    one, two, both = (
        score(model, train, val, val_loss=l, last_layer=last_layer).values
        for l in (batch_cross_entropy, square, mixed)
    )
    assert (one - two).abs().max() > 1e-6
    same(both, a * one + b * two)


@quick
@given(seeds, st.booleans(), sizes, st.integers(1, 8))
def test_validation_sets_add_up(seed, last_layer, m, k):
    "Scores of two validation sets together are their mean, weighted by size."
    model, train, first, second = net(seed), rows(12, seed), rows(m, seed + 1), rows(k, seed + 2)
    a, b, both = (
        score(model, train, v, last_layer=last_layer).values for v in (first, second, joined(first, second))
    )
    same(both, (m * a + k * b) / (m + k))


@quick
@given(seeds, st.booleans(), st.sampled_from(TARGETS), sizes, st.randoms(use_true_random=False))
def test_blind_to_batch_size_and_order(seed, last_layer, target, size, random):
    model, train, val = made(seed)
    order, order_val = (torch.tensor(random.sample(range(n), n)) for n in (12, 9))
    whole = score(model, train, val, target=target, last_layer=last_layer)
    shuffled = score(
        model, pick(train, order), pick(val, order_val), target=target, last_layer=last_layer, size=size
    )
    assert shuffled.index.tolist() == train['index'][order].tolist() and shuffled.target == target
    found = shuffled.values[order.argsort()]
    same(found[:, order_val.argsort()] if target == 'sample' else found, whole.values)


@many
@given(seeds, st.booleans(), st.lists(st.floats(-4, 4), min_size=12, max_size=12))
def test_scaling_a_loss_scales_its_score(seed, last_layer, factors):
    model, train, val = made(seed)
    train['factor'], c = torch.ones(12, dtype=torch.float64), torch.tensor(factors, dtype=torch.float64)
    scaled = lambda logits, batch: batch['factor'] * batch_cross_entropy(logits, batch)
    kwargs = dict(loss=scaled, solver=Identity(), val_loss=batch_cross_entropy, last_layer=last_layer)
    same(
        score(model, {**train, 'factor': c}, val, **kwargs).values,
        c * score(model, train, val, **kwargs).values,
    )
    s = torch.randn(
        FlatModel(model).size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    read = lambda t: directional_scores(FlatModel(model, scaled), cut(t, 5), s, progress=False)[0]
    same(read({**train, 'factor': c}), c[:, None] * read(train))


@quick
@given(seeds, st.booleans(), st.floats(0.1, 10))
def test_the_unit_of_the_loss_does_not_matter(seed, last_layer, c):
    "Every loss and the damping in another unit: the same up-weighting moves the model as far as before."
    model, train, val = made(seed)
    other = score(
        model,
        train,
        val,
        Exact(damping=0.1 * c),
        lambda z, b: c * batch_cross_entropy(z, b),
        val_loss=batch_cross_entropy,
        last_layer=last_layer,
    )
    same(other.values, score(model, train, val, last_layer=last_layer).values)
    auto = score(
        model,
        train,
        val,
        Exact(),
        lambda z, b: c * batch_cross_entropy(z, b),
        val_loss=batch_cross_entropy,
        last_layer=last_layer,
    )
    assert auto.damping == pytest.approx(c * score(model, train, val, Exact(), last_layer=last_layer).damping)


@quick
@given(
    seeds,
    st.booleans(),
    st.sampled_from(TARGETS),
    st.lists(st.integers(0, 11), min_size=1, max_size=5),
    sizes,
)
def test_duplicates_get_equal_scores(seed, last_layer, target, copies, size):
    model, train, val = made(seed)
    again = pick(train, torch.tensor(copies))
    again['index'] = torch.arange(900, 900 + len(copies))
    found = score(model, joined(train, again), val, target=target, last_layer=last_layer, size=size).values
    same(found[12:], found[torch.tensor(copies)])


@quick
@given(
    seeds,
    st.booleans(),
    st.lists(st.integers(0, C - 1), min_size=4, max_size=12),
    st.sets(st.integers(0, C - 1), min_size=1),
)
def test_additive_over_groups_of_classes(seed, last_layer, labels, group):
    "Class scores, weighted by the classes' shares, give the mean score: of all validation samples and of any group of classes."
    model, train, val = net(seed), rows(12, seed), rows(len(labels), seed + 1)
    val['y'] = torch.tensor(labels)
    by_class = score(model, train, val, target='class', last_layer=last_layer).values
    count = torch.bincount(val['y'], minlength=C).double()
    assert by_class.shape == (12, C) and (by_class[:, count == 0] == 0).all()
    same(by_class @ count / count.sum(), score(model, train, val, last_layer=last_layer).values)
    inside = torch.tensor([c in group for c in labels])
    if inside.any():
        part = count * torch.tensor([float(c in group) for c in range(C)])
        same(
            by_class @ part / part.sum(), score(model, train, pick(val, inside), last_layer=last_layer).values
        )
    p = model(train['x']).softmax(1).detach()
    same((p * by_class).sum(1), score(model, train, val, target='local', last_layer=last_layer).values)


@pytest.mark.parametrize('last_layer', [False, True])
def test_conjugate_gradients_agree_with_the_dense_solve(last_layer):
    model, train, val = made(3)
    found = score(
        model, train, val, CG(damping=0.1, max_iter=100, tol=1e-12, n_samples=None), last_layer=last_layer
    )
    assert found.residual < 1e-11 and found.products > 0
    same(found.values, score(model, train, val, last_layer=last_layer).values)


def test_the_curvature_sample_does_not_depend_on_batches():
    model, train, val = made(4, n=60)
    for last_layer in (False, True):
        few = [
            score(model, train, val, Exact(damping=0.1, n_samples=20), size=s, last_layer=last_layer).values
            for s in (100, 7)
        ]
        same(few[1], few[0])
        assert not torch.allclose(few[0], score(model, train, val, last_layer=last_layer).values, rtol=1e-6)


def test_extremes_and_file(tmp_path):
    model, train, val = made(5)
    train['index'] = train['index'] * 7 + 1000
    found = score(model, train, val)
    order = found.values.argsort(descending=True)
    assert (
        found.top(3).tolist() == train['index'][order[:3]].tolist()
        and found.bottom(2).tolist() == train['index'][order.flip(0)[:2]].tolist()
    )
    assert len(found.top(99)) == len(found) == 12
    again = InfluenceScores.load(found.save(tmp_path / 'new' / 'scores.safetensors'))
    assert (
        torch.equal(again.values, found.values)
        and torch.equal(again.index, found.index)
        and again.seconds == found.seconds
        and again.damping == 0.1
    )
    by_class = score(model, train, val, target='class')
    with pytest.raises(ValueError, match='several scores per sample'):
        by_class.top(1)


# The last layer


class Words(nn.Module):
    "Mean embedding of token numbers, with a mask: takes no 'x'"

    def __init__(self, words=11, width=4):
        super().__init__()
        self.table, self.head = nn.Embedding(words, width), nn.Linear(width, C)

    def forward(self, tokens, mask):
        e = self.table(tokens) * mask[..., None]
        return self.head(e.sum(1) / mask.sum(1, keepdim=True).clamp_min(1))


def words_forward(model, batch):
    return model(batch['tokens'], batch['mask'])


def sentences(n, seed, start=0):
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 6, (n,), generator=g)
    return dict(
        tokens=torch.randint(11, (n, 5), generator=g),
        mask=(torch.arange(5) < length[:, None]).double(),
        y=torch.arange(n) % C,
        index=torch.arange(start, start + n),
    )


class Mixed(nn.Module):
    "Every layer whose behaviour depends on the mode, and one with a state of its own"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.LayerNorm(4)
        )
        self.frozen = nn.BatchNorm1d(4).eval()
        self.head = nn.Linear(4, C, bias=False)

    def forward(self, x):
        return self.head(self.frozen(self.body(x)))


def build(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = {'mixed': Mixed, 'words': Words, 'net': net}[kind]().double()
        if kind == 'mixed':
            model(torch.randn(50, 3, dtype=torch.float64))  # statistics other than the initial ones
    return model


def inputs(kind, n, seed, start=0):
    return sentences(n, seed, start) if kind == 'words' else rows(n, seed, start)


def how(kind):
    return words_forward if kind == 'words' else None


@pytest.mark.parametrize('kind', ['mixed', 'words', 'net'])
def test_last_layer_view_is_what_autograd_says(kind):
    model, data = build(kind), inputs(kind, 8, 1)
    view = last_layer_view(model, batch_cross_entropy, cut(data, 3), how(kind), max_bend=5, progress=False)
    layer = last_linear(model)[1]
    with evaluating(model):
        logits = (how(kind) or (lambda m, b: m(b['x'])))(model, data)
        losses = batch_cross_entropy(logits, data)
        gradients = [
            torch.cat(
                [
                    g.reshape(C, -1)
                    for g in torch.autograd.grad(l, list(layer.parameters()), retain_graph=True)
                ],
                1,
            ).flatten()
            for l in losses
        ]
    gradients, p = torch.stack(gradients), logits.softmax(1).detach()
    s = torch.randn(gradients.shape[1], 2, dtype=torch.float64)
    same(view.logits, logits.detach())
    same(view.losses, losses.detach())
    same(view.scores(s), gradients @ s)
    same(view.scores(s[:, 0]), gradients @ s[:, 0])
    same(view.gradient(), gradients.mean(0))
    same(view.gradient_by_class()[:, 1], gradients[data['y'] == 1].mean(0))
    assert len(view.bend) == len(view.bend_rows.unique()) == 5
    same(view.bend, (torch.diag_embed(p) - p[:, :, None] * p[:, None])[view.bend_rows])
    part = view.take(data['y'] != 0)
    assert part.index.tolist() == data['index'][data['y'] != 0].tolist() and len(part.bend) == 0
    same(part.gradient(), gradients[data['y'] != 0].mean(0))


def test_a_view_under_another_loss_asks_the_model_nothing():
    model, data, calls = build('mixed'), inputs('mixed', 9, 1), []
    other = lambda logits, batch: (logits**2).sum(1) * batch['x'].flatten(1).mean(1)
    ask = lambda m, b: calls.append(len(b['index'])) or m(b['x'])
    view, wanted = (
        last_layer_view(model, loss, cut(data, 4), ask, max_bend=5, progress=False)
        for loss in (batch_cross_entropy, other)
    )
    before = len(calls)
    assert sum(calls) == 2 * (9 + 2), 'two of the samples show which layer is the last'
    found = view.under(other, cut(data, 2))
    assert (
        len(calls) == before and len(found.bend) == len(found.bend_rows) == 0 and torch.equal(found.y, view.y)
    )
    for part in ('losses', 'slope', 'features', 'logits', 'index'):
        same(getattr(found, part), getattr(wanted, part))
    for part in ('bend', 'bend_rows'):
        same(getattr(view.under(other, cut(data, 2), 5), part), getattr(wanted, part))
    with pytest.raises(ValueError, match='order'):
        view.under(other, cut({k: v.flip(0) for k, v in data.items()}, 3))


def test_samples_of_a_view_are_found_by_their_index():
    data = inputs('mixed', 9, 1)
    view = last_layer_view(
        build('mixed'),
        batch_cross_entropy,
        cut({k: v.flip(0) for k, v in data.items()}, 4),
        max_bend=5,
        progress=False,
    )
    found = view.at(data['index'][[6, 2, 3]])
    assert (
        torch.equal(found.index, data['index'][[6, 2, 3]])
        and torch.equal(found.y, data['y'][[6, 2, 3]])
        and len(found.bend) == 0
    )
    same(found.features, view.features.flip(0)[[6, 2, 3]])
    for missing in (torch.tensor([10**6]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=f'sample {int(missing)} is not among'):
            view.at(missing)


@many
@given(seeds, sizes, st.integers(0, 15))
def test_view_keeps_the_same_logit_hessians_whatever_the_batches(seed, size, most):
    model, data = net(seed), rows(12, seed)
    read = lambda b: last_layer_view(model, batch_cross_entropy, b, max_bend=most, progress=False)
    whole, parts = read(cut(data)), read(cut(data, size))
    assert len(parts.bend) == min(most, 12)
    assert (
        torch.equal(parts.bend_rows, whole.bend_rows)
        and torch.allclose(parts.bend, whole.bend)
        and torch.allclose(parts.features, whole.features)
    )


@pytest.mark.parametrize('kind', ['words', 'mixed'])
def test_all_layers_restricted_to_the_last_give_its_scores(kind):
    "When only the head can be trained, both routes must agree."
    model, train, val = build(kind), inputs(kind, 10, 1), inputs(kind, 8, 2, 100)
    head = last_linear(model)[0]
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(head))
    for target in TARGETS:
        a, b = (
            score(model, train, val, target=target, last_layer=l, forward=how(kind)) for l in (False, True)
        )
        same(a.values, b.values)


# What is left behind


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('last_layer', [True, False])
@pytest.mark.parametrize('kind', ['mixed', 'words'])
def test_model_and_global_state_are_left_as_they_were(kind, last_layer, training):
    model, train, val = build(kind).train(training), inputs(kind, 10, 1), inputs(kind, 8, 2, 100)
    if kind == 'mixed':
        model.frozen.eval()
    before, rng = state(model), torch.get_rng_state()
    args = model, batch_cross_entropy, cut(train, 4), cut(val, 4)
    one = influence_scores(
        *args, solver=CG(max_iter=3), last_layer=last_layer, target='local', forward=how(kind), progress=False
    )
    crossed = cross_scores(*args, last_layer=last_layer, forward=how(kind), progress=False)
    after = state(model)
    assert before[1:] == after[1:] and all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert (
        torch.isfinite(one.values).all() and not one.values.requires_grad and not crossed.values.requires_grad
    )
    again = influence_scores(
        *args, solver=CG(max_iter=3), last_layer=last_layer, target='local', forward=how(kind), progress=False
    )
    assert torch.equal(again.values, one.values), 'dropout was active'


@pytest.mark.parametrize('last_layer', [True, False])
def test_model_is_restored_after_an_error(last_layer):
    model = build('mixed').train()
    before = [m.training for m in model.modules()]

    def fails(logits, batch):
        raise RuntimeError('a loss of its own')

    with pytest.raises(RuntimeError, match='of its own'):
        score(model, rows(6, 0), rows(6, 1), loss=fails, last_layer=last_layer)
    assert before == [m.training for m in model.modules()]


# Cross scores


@quick
@given(seeds, st.sampled_from(SCORES), st.integers(2, 4), st.booleans())
def test_a_training_copy_of_a_reference_sample_gets_its_score(seed, what, folds, last_layer):
    "Held-out samples are scored exactly as if they were training samples; every one of them in one fold."
    model, train, val = net(seed), rows(10, seed), rows(9, seed + 1, 500)
    both = joined(train, {**val, 'index': val['index'] + 1000})
    solver = Exact(damping=0.1)
    found = cross_scores(
        model,
        batch_cross_entropy,
        cut(both, 7),
        cut(val, 4),
        folds,
        what,
        solver,
        last_layer,
        seed=seed,
        progress=False,
    )
    fold = stratified_folds(val['y'], folds, seed)
    assert (
        found.values.shape == (folds, 19)
        and found.index.tolist() == both['index'].tolist()
        and torch.equal(found.labels, both['y'])
    )
    for k in range(folds):
        same(found.values[k, 10:][fold == k], found.reference[k])
        assert torch.equal(found.reference_labels[k], val['y'][fold == k])


@quick
@given(seeds, st.integers(2, 5), sizes)
def test_the_target_of_a_fold_has_not_seen_its_reference(seed, folds, size):
    model, train, val = made(seed)
    found = cross_scores(
        model,
        batch_cross_entropy,
        cut(train, size),
        cut(val, size),
        folds,
        'mean',
        LAM,
        progress=False,
        seed=seed,
    )
    fold = stratified_folds(val['y'], folds, seed)
    for k in range(folds):
        same(
            found.values[k],
            score(model, joined(train, val), pick(val, fold != k), last_layer=True).values[: len(train['y'])],
        )  # curvature of both


@many
@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(2, 5), st.integers(0, 5))
def test_folds_are_balanced_within_each_class(labels, folds, seed):
    y = torch.tensor(labels)
    fold = stratified_folds(y, folds, seed)
    assert torch.equal(fold, stratified_folds(y, folds, seed))
    assert torch.bincount(fold, minlength=folds).max() - torch.bincount(fold, minlength=folds).min() <= 1
    for c in y.unique():
        count = torch.bincount(fold[y == c], minlength=folds)
        assert count.max() - count.min() <= 1


def test_loss_as_score_is_the_negative_loss():
    model, train, val = made(1)
    found = cross_scores(model, batch_cross_entropy, cut(train, 5), cut(val), score='loss', progress=False)
    expected = -cross_entropy(model(train['x']), train['y'], reduction='none').detach()
    same(found.values, expected.expand(2, -1))


@pytest.mark.parametrize('last_layer', [True, False])
def test_every_solver_serves_cross_scores(last_layer):
    model, train, val = made(2)
    for solver in (Identity(), Exact(damping=0.1), CG(damping=0.1)):
        found = cross_scores(
            model,
            batch_cross_entropy,
            cut(train, 5),
            cut(val),
            score='mean',
            solver=solver,
            last_layer=last_layer,
            progress=False,
        )
        assert torch.isfinite(found.values).all(), solver


# Faults


@pytest.mark.parametrize('last_layer', [True, False])
def test_unfit_input_is_named(last_layer):
    model, train, val = made(0)
    with pytest.raises(ValueError, match="target is 'median'.*'local'"):
        score(model, train, val, target='median', last_layer=last_layer)
    for empty in (dict(train=[]), dict(val=[])):
        kwargs = dict(train=cut(train), val=cut(val)) | empty
        with pytest.raises(ValueError, match='at least one'):
            influence_scores(
                model, batch_cross_entropy, solver=Identity(), last_layer=last_layer, progress=False, **kwargs
            )
    with pytest.raises(ValueError, match="score is 'self'.*local"):
        cross_scores(model, batch_cross_entropy, cut(train), cut(val), score='self', last_layer=last_layer)
    with pytest.raises(ValueError, match='folds is 10'):
        cross_scores(
            model, batch_cross_entropy, cut(train), cut(val), folds=10, last_layer=last_layer, progress=False
        )


def test_model_without_a_last_linear_layer_is_told_what_to_do():
    model, train, val = nn.Sequential(net(), nn.LogSoftmax(1)), rows(6, 0), rows(6, 1)
    with pytest.raises(ValueError, match='last_layer=False'):
        score(model, train, val, last_layer=True)
    assert len(score(model, train, val)) == 6


def test_text_without_forward_is_told_what_to_do():
    with pytest.raises(KeyError, match='forward=lambda model, batch'):
        score(build('words'), sentences(6, 0), sentences(6, 1), last_layer=True)
