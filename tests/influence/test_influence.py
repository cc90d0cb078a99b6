"Influence scores as a property: linear, additive, blind to batches and order; models are left as they were; text and dictionaries through `forward`."

import copy
import inspect

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from kd_aif.foundation.core import evaluating
from kd_aif.influence.adapted_head import adapt_head, head_samples
from kd_aif.influence.curvature import FlatModel
from kd_aif.foundation.splits import stratified_folds
from kd_aif.influence.cross_scores import HEADS, SCORES, Scoring, combine_scores, cross_scores, last_layer_views
from kd_aif.influence.directional import directional_scores
from kd_aif.influence.last_layer import LAST_LAYER, TARGETS, last_layer_view
from kd_aif.influence.scores import AllLayerOptions, InfluenceScores, all_layer_scores, influence_scores
from kd_aif.influence.self_influence import self_influence
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


def score(model, train, val, solver=LAM, loss=batch_cross_entropy, size=100, last_layer=False, **kwargs):
    batches = cut(train, size), cut(val, size)
    return influence_scores(
        model, loss, *batches, solver=solver, last_layer=last_layer, progress=False, **kwargs
    )


def crossing(
    model, train, val, score=('mean', 'loss'), loss=batch_cross_entropy, folds=2, seed=0, **settings
):
    "`cross_scores` of batches, without bars"
    scoring = Scoring(**{'progress': False, **settings})
    return cross_scores(model, loss, train, val, score, folds, seed, scoring)


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
    model, train, first, second = net(seed), rows(12, seed), rows(m, seed + 1), rows(k, seed + 2, m)
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
    same((p * by_class).sum(1), score(model, train, val, target='posterior', last_layer=last_layer).values)


@pytest.mark.parametrize('last_layer', [False, True])
def test_conjugate_gradients_agree_with_the_dense_solve(last_layer):
    model, train, val = made(3)
    found = score(
        model, train, val, CG(damping=0.1, max_iter=100, tol=1e-12, n_samples=None), last_layer=last_layer
    )
    assert found.residual < 1e-11 and found.matvecs > 0
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
    view = last_layer_view(
        model, batch_cross_entropy, cut(data, 3), how(kind), max_hessians=5, progress=False
    )
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
    assert len(view.logit_hessians) == len(view.hessian_rows.unique()) == 5
    same(view.logit_hessians, (torch.diag_embed(p) - p[:, :, None] * p[:, None])[view.hessian_rows])
    part = view.select(data['y'] != 0)
    assert part.index.tolist() == data['index'][data['y'] != 0].tolist() and len(part.logit_hessians) == 0
    same(part.gradient(), gradients[data['y'] != 0].mean(0))


def test_a_view_under_another_loss_asks_the_model_nothing():
    model, data, calls = build('mixed'), inputs('mixed', 9, 1), []
    other = lambda logits, batch: (logits**2).sum(1) * batch['x'].flatten(1).mean(1)
    ask = lambda m, b: calls.append(len(b['index'])) or m(b['x'])
    view, wanted = (
        last_layer_view(model, loss, cut(data, 4), ask, max_hessians=5, progress=False)
        for loss in (batch_cross_entropy, other)
    )
    before = len(calls)
    assert sum(calls) == 2 * (9 + 2), 'two of the samples show which layer is the last'
    found = view.under(other, cut(data, 2))
    assert (
        len(calls) == before
        and len(found.logit_hessians) == len(found.hessian_rows) == 0
        and torch.equal(found.y, view.y)
    )
    for part in ('losses', 'logit_gradient', 'features', 'logits', 'index'):
        same(getattr(found, part), getattr(wanted, part))
    for part in ('logit_hessians', 'hessian_rows'):
        same(getattr(view.under(other, cut(data, 2), 5), part), getattr(wanted, part))
    with pytest.raises(ValueError, match='order'):
        view.under(other, cut({k: v.flip(0) for k, v in data.items()}, 3))


def test_samples_of_a_view_are_found_by_their_index():
    data = inputs('mixed', 9, 1)
    view = last_layer_view(
        build('mixed'),
        batch_cross_entropy,
        cut({k: v.flip(0) for k, v in data.items()}, 4),
        max_hessians=5,
        progress=False,
    )
    found = view.at(data['index'][[6, 2, 3]])
    assert (
        torch.equal(found.index, data['index'][[6, 2, 3]])
        and torch.equal(found.y, data['y'][[6, 2, 3]])
        and len(found.logit_hessians) == 0
    )
    same(found.features, view.features.flip(0)[[6, 2, 3]])
    for missing in (torch.tensor([10**6]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=f'sample {int(missing)} is not among'):
            view.at(missing)


@many
@given(seeds, sizes, st.integers(0, 15))
def test_view_keeps_the_same_logit_hessians_whatever_the_batches(seed, size, most):
    model, data = net(seed), rows(12, seed)
    read = lambda b: last_layer_view(model, batch_cross_entropy, b, max_hessians=most, progress=False)
    whole, parts = read(cut(data)), read(cut(data, size))
    assert len(parts.logit_hessians) == min(most, 12)
    assert (
        torch.equal(parts.hessian_rows, whole.hessian_rows)
        and torch.allclose(parts.logit_hessians, whole.logit_hessians)
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
        *args,
        solver=CG(max_iter=3),
        last_layer=last_layer,
        target='posterior',
        forward=how(kind),
        progress=False,
    )
    crossed = crossing(model, *args[2:], last_layer=last_layer, forward=how(kind))
    after = state(model)
    assert before[1:] == after[1:] and all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert (
        torch.isfinite(one.values).all() and not one.values.requires_grad and not crossed.values.requires_grad
    )
    again = influence_scores(
        *args,
        solver=CG(max_iter=3),
        last_layer=last_layer,
        target='posterior',
        forward=how(kind),
        progress=False,
    )
    assert torch.equal(again.values, one.values), 'dropout was active'


@pytest.mark.parametrize('last_layer', [True, False])
def test_model_is_restored_after_an_error(last_layer):
    model = build('mixed').train()
    before = [m.training for m in model.modules()]

    def fails(logits, batch):
        raise RuntimeError('a loss of its own')

    with pytest.raises(ValueError, match='of its own'):
        score(model, rows(6, 0), rows(6, 1), loss=fails, last_layer=last_layer)
    assert before == [m.training for m in model.modules()]


# Cross scores


@quick
@given(seeds, st.sampled_from(SCORES), st.integers(2, 4), st.booleans())
def test_a_training_copy_of_a_reference_sample_gets_its_score(seed, what, folds, last_layer):
    "Held-out samples are scored exactly as if they were training samples; every one of them in one fold."
    model, train, val = net(seed), rows(10, seed), rows(9, seed + 1, 500)
    both = joined(train, {**val, 'index': val['index'] + 1000})
    batches = cut(both, 7), cut(val, 4)
    options = {} if what in HEADS else dict(solver=Exact(damping=0.1), last_layer=last_layer)
    found = crossing(model, *batches, what, folds=folds, seed=seed, **options)
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
    batches = cut(train, size), cut(val, size)
    found = crossing(model, *batches, ('mean',), folds=folds, seed=seed, solver=LAM)
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


@pytest.mark.parametrize('what', HEADS)
@pytest.mark.parametrize(
    'setting', [dict(solver=LAM), dict(last_layer=False), dict(val_loss=batch_cross_entropy)], ids=' '.join
)
def test_an_adapted_head_refuses_what_it_would_ignore(what, setting):
    model, train, val = made(1)
    with pytest.raises(ValueError, match='leave'):
        crossing(model, cut(train, 5), cut(val), what, **setting)


@quick
@given(seeds, st.floats(0.1, 10.0))
def test_an_adapted_head_fits_the_validation_samples_better(seed, l2):
    model, train, val = made(seed)
    views = last_layer_views(model, batch_cross_entropy, cut(train, 5), cut(val), progress=False)
    theirs = head_samples(*views)[1]
    before = -cross_entropy(theirs.logits, theirs.y, reduction='none')
    head = adapt_head(theirs, l2)
    assert head.residual < 1e-3
    assert head.scores(theirs).sum() - l2 / 2 * head.change[:-1].square().sum() >= before.sum()


def test_an_adapted_head_is_for_classes():
    numbers = [{**samples, 'y': samples['x'].sum(1)} for samples in (rows(10, 0), rows(9, 1, 500))]
    squared = lambda logits, batch: (logits[:, 0] - batch['y']).square()
    with pytest.raises(ValueError, match='regression'):
        crossing(nn.Linear(3, 1).double(), *([s] for s in numbers), ('adapted',), loss=squared)


def test_loss_as_score_is_the_negative_loss():
    model, train, val = made(1)
    found = crossing(model, cut(train, 5), cut(val), ('loss',))
    expected = -cross_entropy(model(train['x']), train['y'], reduction='none').detach()
    same(found.values, expected.expand(2, -1))


@pytest.mark.parametrize('last_layer', [True, False])
def test_every_solver_serves_cross_scores(last_layer):
    model, train, val = made(2)
    for solver in (Identity(), Exact(damping=0.1), CG(damping=0.1)):
        found = crossing(model, cut(train, 5), cut(val), ('mean',), solver=solver, last_layer=last_layer)
        assert torch.isfinite(found.values).all(), solver


# Faults


@pytest.mark.parametrize('last_layer', [True, False])
def test_unfit_input_is_named(last_layer):
    model, train, val = made(0)
    with pytest.raises(ValueError, match="target is 'median'.*'posterior'"):
        score(model, train, val, target='median', last_layer=last_layer)
    for empty in (dict(train=[]), dict(val=[])):
        kwargs = dict(train=cut(train), val=cut(val)) | empty
        with pytest.raises(ValueError, match='at least one'):
            influence_scores(
                model, batch_cross_entropy, solver=Identity(), last_layer=last_layer, progress=False, **kwargs
            )
    for unknown in ('self', 'mean', ['mean'], ('loss', 'mean')):
        with pytest.raises(ValueError, match="score is .*'posterior', 'loss'"):
            crossing(model, cut(train), cut(val), unknown, last_layer=last_layer)
    with pytest.raises(ValueError, match='folds is 10'):
        crossing(model, cut(train), cut(val), folds=10, last_layer=last_layer)


def test_model_without_a_last_linear_layer_is_told_what_to_do():
    model, train, val = nn.Sequential(net(), nn.LogSoftmax(1)), rows(6, 0), rows(6, 1)
    with pytest.raises(ValueError, match='last_layer=False'):
        score(model, train, val, last_layer=True)
    assert len(score(model, train, val)) == 6


def test_text_without_forward_is_told_what_to_do():
    with pytest.raises(KeyError, match='forward=lambda model, batch'):
        score(build('words'), sentences(6, 0), sentences(6, 1), last_layer=True)


BY_SAMPLE = {
    '(b, 1)': lambda logits, batch: batch_cross_entropy(logits, batch)[:, None],
    '(b, C)': lambda logits, batch: logits.log_softmax(1),
    '()': lambda logits, batch: batch_cross_entropy(logits, batch).mean(),
}


class NoSolve:
    "A solver that must not be reached"

    n_samples = None

    def inverse(self, operator, lam):
        raise AssertionError('a solve')

    def solve(self, operator, b, x0=None):
        raise AssertionError('a solve')


@pytest.mark.parametrize('last_layer', [True, False])
@pytest.mark.parametrize('shape', BY_SAMPLE)
def test_losses_that_are_not_one_per_sample_are_refused_before_a_solve(shape, last_layer):
    model, train, val = made(0)
    wrong, batches = BY_SAMPLE[shape], (cut(train, 5), cut(val, 5))
    calls = [
        lambda loss, val_loss: influence_scores(
            model, loss, *batches, NoSolve(), last_layer=last_layer, val_loss=val_loss, progress=False
        ),
        lambda loss, val_loss: crossing(
            model, *batches, loss=loss, val_loss=val_loss, solver=NoSolve(), last_layer=last_layer
        ),
    ]
    if not last_layer:
        calls.append(
            lambda loss, val_loss: all_layer_scores(
                model, loss, *batches, NoSolve(), val_loss=val_loss, progress=False
            )
        )
    for call in calls:
        for losses in ((wrong, batch_cross_entropy), (batch_cross_entropy, wrong)):
            with pytest.raises(ValueError, match=r'shape \(.*give one value per sample, \(b,\)'):
                call(*losses)
    with pytest.raises(ValueError, match=r'shape \(.*give one value per sample, \(b,\)'):
        self_influence(model, wrong, batches[0], NoSolve(), last_layer, progress=False)


# Precision


def in_dtype(model, batches, dtype):
    "A copy of the model and of its batches in another precision"
    cast = lambda v: v.to(dtype) if v.is_floating_point() else v
    return copy.deepcopy(model).to(dtype), [
        [{k: cast(v) for k, v in b.items()} for b in part] for part in batches
    ]


@pytest.mark.parametrize('last_layer', [True, False])
@pytest.mark.parametrize('target', TARGETS)
def test_double_precision_agrees_with_single(target, last_layer):
    model, train, val = made(6, n=40, m=20)
    found = []
    for dtype in (torch.float32, torch.float64):
        moved, (ours, theirs) = in_dtype(model, (cut(train, 7), cut(val, 7)), dtype)
        args = moved, batch_cross_entropy, ours, theirs, LAM, target, last_layer
        found.append(influence_scores(*args, progress=False).values)
        assert found[-1].dtype == dtype
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


@pytest.mark.parametrize('last_layer', [True, False])
def test_a_wide_layer_in_double_precision_and_other_scores_agree_with_single(last_layer):
    "More than 3,000 parameters in the last layer: conjugate gradients on sampled rows"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(3, 1200), nn.Tanh(), nn.Linear(1200, C)) if last_layer else net()
    batches, found = (cut(rows(60, 1), 9), cut(rows(30, 2, 500), 9)), {}
    for dtype in (torch.float32, torch.float64):
        model, (train, val) = in_dtype(wide, batches, dtype)
        args = model, batch_cross_entropy, train
        cg = CG(damping=0.1, max_iter=100, tol=1e-6, n_samples=None)
        found[dtype] = (
            influence_scores(*args, val, cg, last_layer=last_layer, progress=False).values,
            self_influence(*args, last_layer=last_layer, progress=False).values,
            crossing(model, train, val, solver=cg, last_layer=last_layer).values,
        )
    for one, two in zip(*found.values()):
        assert (one - two).norm() < 2e-3 * two.norm()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_from_the_features(dtype):
    "Equal to the scores of the head alone, in float32, on the features of the model in half precision"
    half, batches = in_dtype(net(7), (cut(rows(40, 8), 9), cut(rows(20, 9, 500), 9)), dtype)
    head = copy.deepcopy(half[2]).float()
    with torch.no_grad():
        features = [[{**b, 'x': half[:2](b['x']).float()} for b in part] for part in batches]
    for target in TARGETS:
        found, expected = (
            influence_scores(m, batch_cross_entropy, *parts, target=target, progress=False).values
            for m, parts in ((half, batches), (head, features))
        )
        assert found.dtype == torch.float32
        same(found, expected, 1e-5)
    same(
        *(
            self_influence(m, batch_cross_entropy, p[0], progress=False).values
            for m, p in ((half, batches), (head, features))
        ),
        1e-5,
    )
    same(*(crossing(m, *p).values for m, p in ((half, batches), (head, features))), 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_all_layers_in_half_precision_are_refused_before_any_work(dtype):
    half, (train, val) = in_dtype(net(), (cut(rows(12, 1), 5), cut(rows(9, 2, 500), 5)), dtype)
    fails = lambda logits, batch: pytest.fail('work was done')
    for call in (
        lambda: influence_scores(half, fails, train, val, last_layer=False, progress=False),
        lambda: all_layer_scores(half, fails, train, val, progress=False),
        lambda: self_influence(half, fails, train, last_layer=False, progress=False),
        lambda: crossing(half, train, val, loss=fails, last_layer=False),
    ):
        with pytest.raises(TypeError, match='float32 or float64: use model.float'):
            call()


# Another order in each pass, and passes that are saved


class Shuffled:
    "A loader that gives its samples in another order in each pass"

    def __init__(self, data, size=5):
        self.data, self.size, self.passes = data, size, 0

    def __iter__(self):
        self.passes += 1
        g = torch.Generator().manual_seed(self.passes)
        return iter(cut(pick(self.data, torch.randperm(len(self.data['index']), generator=g)), self.size))


@pytest.mark.parametrize('last_layer', [True, False])
@pytest.mark.parametrize('target', TARGETS)
def test_a_loader_that_shuffles_gets_scores_bound_to_the_index_or_is_refused(target, last_layer):
    model, train, val = made(3)
    exact = influence_scores(
        model, batch_cross_entropy, cut(train), cut(val), LAM, target, last_layer, progress=False
    )
    try:
        found = influence_scores(
            model, batch_cross_entropy, Shuffled(train), cut(val), LAM, target, last_layer, progress=False
        )
    except ValueError as error:
        assert 'fixed order' in str(error) and target == 'posterior' and not last_layer
    else:
        same(found.values[found.index.argsort()], exact.values)
    shuffled = lambda: influence_scores(
        model, batch_cross_entropy, cut(train), Shuffled(val), LAM, target, last_layer, progress=False
    )
    if target == 'sample':  # a column for each validation sample, without an index
        with pytest.raises(ValueError, match='fixed order'):
            shuffled()
    else:
        same(shuffled().values, exact.values)


@pytest.mark.parametrize('last_layer', [True, False])
def test_other_scores_of_a_loader_that_shuffles(last_layer):
    model, train, val = made(4)
    own = [
        self_influence(model, batch_cross_entropy, b, LAM, last_layer, progress=False)
        for b in (cut(train), Shuffled(train))
    ]
    same(own[1].values[own[1].index.argsort()], own[0].values)
    exact = crossing(model, cut(train), cut(val), solver=LAM, last_layer=last_layer)
    crossed = lambda: crossing(model, Shuffled(train), cut(val), solver=LAM, last_layer=last_layer)
    if last_layer:
        found = crossed()
        same(found.values[:, found.index.argsort()], exact.values)
    else:
        with pytest.raises(ValueError, match='fixed order'):
            crossed()


def test_known_losses_ask_for_a_fixed_order():
    "Also where the first batch comes in the same order in each pass, and the others do not"
    model, train, val = made(5)
    losses = cross_entropy(model(train['x']), train['y'], reduction='none').detach()

    class Later(Shuffled):
        def __iter__(self):
            return iter([pick(train, slice(6)), *super().__iter__()])

    batches = Later(pick(train, slice(6, None)))
    options = AllLayerOptions(mode='finite', losses=losses)
    with pytest.raises(ValueError, match='fixed order'):
        all_layer_scores(model, batch_cross_entropy, batches, cut(val), LAM, options=options, progress=False)
    known = all_layer_scores(
        model, batch_cross_entropy, cut(train), cut(val), LAM, options=options, progress=False
    )
    same(known.values, score(model, train, val).values, 1e-3)


class Counted:
    "Batches that count how often they are read"

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        yield from self.batches


@quick
@given(seeds, sizes, st.integers(1, 15))
def test_a_known_number_of_samples_saves_a_pass_and_changes_nothing(seed, size, most):
    model, train, val = made(seed)
    views, passes = [], []
    for n in (None, 12):
        batches = Counted(cut(train, size))
        views.append(
            last_layer_view(
                model, batch_cross_entropy, batches, max_hessians=most, progress=False, n_samples=n
            )
        )
        passes.append(batches.passes)
    assert passes == [2, 1]
    for name in ('features', 'logits', 'losses', 'logit_gradient', 'logit_hessians', 'hessian_rows', 'index'):
        assert torch.equal(getattr(views[0], name), getattr(views[1], name)), name


def test_known_numbers_of_samples_for_cross_scores():
    model, train, val = made(1)
    both = [Counted(cut(train, 5)), Counted(cut(val, 4))]
    views = last_layer_views(model, batch_cross_entropy, *both, progress=False, n_samples=12, n_val=9)
    assert [b.passes for b in both] == [1, 1]
    found = cross_scores(model, batch_cross_entropy, *both, scoring=Scoring(progress=False), views=views)
    assert [b.passes for b in both] == [1, 1], 'views save every pass'
    assert torch.equal(found.values, crossing(model, *(b.batches for b in both)).values)
    for wrong in (11, 13):
        with pytest.raises(ValueError, match=f'n_samples is {wrong}, but the batches hold 12'):
            last_layer_view(model, batch_cross_entropy, cut(train, 5), None, 5, False, wrong)


# What the scores are made of


def test_the_posterior_target_reads_the_class_scores_at_the_models_own_probabilities():
    "Not at uniform probabilities: those would give a mean over the classes"
    model, train, val = made(8)
    for last_layer in (True, False):
        by_class, posterior = (
            score(model, train, val, target=t, last_layer=last_layer).values for t in ('class', 'posterior')
        )
        p = model(train['x']).softmax(1).detach()
        same(posterior, (p * by_class).sum(1))
        assert (posterior - by_class.mean(1)).norm() > 0.05 * posterior.norm()
        crossed = crossing(model, cut(train), cut(val), ('posterior',), solver=LAM, last_layer=last_layer)
        fold = stratified_folds(val['y'], 2, 0)
        both = joined(train, val)
        for k in (0, 1):
            rest = score(model, both, pick(val, fold != k), target='class', last_layer=last_layer).values
            same(crossed.values[k], (p * rest[:12]).sum(1))


@quick
@given(seeds, st.floats(0.01, 100), st.floats(0.01, 100))
def test_parts_of_a_score_count_alike_whatever_their_units(seed, a, b):
    "Each part is divided by its standard deviation over the training set; so both have the same weight"
    g = torch.Generator().manual_seed(seed)
    influence, losses = torch.randn(20, generator=g).double(), torch.rand(20, generator=g).double()
    combined = lambda i, l: combine_scores(i, l, ('mean', 'loss'), i, l)
    expected = influence / influence.std() - losses / losses.std()
    same(combined(influence, losses), expected)
    same(combined(a * influence, b * losses), expected, 1e-7)
    reference = combine_scores(a * influence[:3], b * losses[:3], ('mean', 'loss'), a * influence, b * losses)
    same(reference, expected[:3], 1e-7)
    assert torch.equal(combine_scores(influence, losses, ('mean',), influence, losses), influence)
    assert torch.equal(combine_scores(influence, losses, ('loss',), influence, losses), -losses)


def test_the_last_layer_is_the_default_everywhere():
    "One constant, and three functions that follow it"
    default = lambda f: inspect.signature(f).parameters['last_layer'].default
    assert LAST_LAYER is True and Scoring().last_layer is LAST_LAYER
    assert default(influence_scores) is default(self_influence) is LAST_LAYER
    assert len(inspect.signature(influence_scores).parameters) == 10
    model, train, val = made(2)
    args = model, batch_cross_entropy, cut(train), cut(val)
    assert torch.equal(
        influence_scores(*args, LAM, progress=False).values, score(model, train, val, last_layer=True).values
    )
