"Bad input of scores: each an error that names argument, value and remedy, before any solve."

import math
import re

import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.cross_scores import Scoring, cross_scores, last_layer_views
from kd_aif.influence.curvature import FlatModel, GaussNewton
from kd_aif.influence.iterative_solvers import CG, LBFGS, LiSSA, PolishedWoodbury
from kd_aif.influence.last_layer import last_layer_view
from kd_aif.influence.scores import AllLayerOptions, all_layer_scores, influence_scores
from kd_aif.influence.self_influence import self_influence
from kd_aif.influence.solvers import EKFAC, KFAC, Diagonal, Exact, Identity, Woodbury
from kd_aif.influence.used_solves import used_solution

C, N, M = 3, 12, 9
INF, NAN = math.inf, math.nan


class NoSolve:
    "A solver that must not be reached"

    n_samples = None

    def inverse(self, operator, lam):
        raise AssertionError('a solve')

    def solve(self, operator, b, x0=None):
        raise AssertionError('a solve')


def rows(n, seed, start=0):
    g = torch.Generator().manual_seed(seed)
    return dict(x=torch.randn(n, 3, generator=g), y=torch.arange(n) % C, index=torch.arange(start, start + n))


def cut(data, size=5):
    n = len(data['index']) if 'index' in data else len(data['x'])
    return [{k: v[at] for k, v in data.items()} for at in torch.arange(n).split(size)]


def net(outputs=C, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


MODEL, ONE, TRAIN, VAL = net(), net(1), cut(rows(N, 1)), cut(rows(M, 2, 100))


def changed(batches, **changes):
    "Batches with other columns: functions of a column, None to leave it out; from the second batch on with `later`"
    later = changes.pop('later', False)
    first = batches[:1] if later else []
    new = []
    for batch in batches[len(first) :]:
        batch = dict(batch)
        for key, change in changes.items():
            batch[key] = None if change is None else change(batch[key])
        new.append({k: v for k, v in batch.items() if v is not None})
    return first + new


def scores(
    kind, model=MODEL, loss=batch_cross_entropy, train=TRAIN, val=VAL, solver=None, forward=None, **more
):
    "One public entry; by default with a solver that must not be reached"
    solver, last_layer = solver or NoSolve(), not kind.endswith('all')
    common = dict(forward=forward, progress=False)
    if kind.startswith('cross'):
        scoring = Scoring(solver, last_layer, **common)
        return cross_scores(model, loss, train, val, scoring=scoring, **more)
    if kind.startswith('self'):
        return self_influence(model, loss, train, solver, last_layer, **common, **more)
    if kind == 'view':
        return last_layer_view(model, loss, train, **common, **more)
    return influence_scores(model, loss, train, val, solver, last_layer=last_layer, **common, **more)


ENTRIES = 'scores', 'scores_all', 'cross', 'cross_all', 'self', 'self_all', 'view'
every = pytest.mark.parametrize('kind', ENTRIES)


def spread(z, batch):
    "Each loss is a mean over all targets, by broadcasting (b, 1) with (b,)"
    return ((z - batch['y']) ** 2).mean(1)


def numbers(batches):
    return changed(batches, y=lambda y: y.float() + torch.rand(len(y)))


def broken_label(value):
    return lambda y: torch.where(torch.arange(len(y)) == 1, value, y)


SCALAR = r"loss returns values of shape \(\) for \d samples; .*one value per sample.*reduction='none'"
LOSSES = {
    'mean': (lambda z, b: F.cross_entropy(z, b['y']), ValueError, SCALAR),
    'sum': (lambda z, b: F.cross_entropy(z, b['y'], reduction='sum'), ValueError, SCALAR),
    '(b, 1)': (
        lambda z, b: batch_cross_entropy(z, b)[:, None],
        ValueError,
        r'shape \(\d, 1\) .*one value per sample',
    ),
    '(b, C)': (lambda z, b: z.log_softmax(1), ValueError, r'shape \(\d, 3\) for .*one value per sample'),
    'mean in each place': (
        lambda z, b: batch_cross_entropy(z, b).mean().expand(len(z)),
        ValueError,
        'loss: the loss of a sample changes with the other samples.*compare outputs and labels',
    ),
    'a list': (
        lambda z, b: [0.0] * len(z),
        TypeError,
        'loss returns a list; give a tensor of one value per sample',
    ),
    'nothing': (lambda z, b: None, TypeError, 'loss returns a NoneType; give a tensor'),
    'NaN': (
        lambda z, b: batch_cross_entropy(z, b) * NAN,
        ValueError,
        r'loss is nan for the sample with index \d.*check',
    ),
    'infinite': (
        lambda z, b: batch_cross_entropy(z, b) / 0,
        ValueError,
        r'loss is inf for the sample with index \d.*check',
    ),
    'another key': (
        lambda z, b: F.cross_entropy(z, b['label']),
        ValueError,
        "loss fails .*KeyError: 'label'; give loss",
    ),
    'swapped': (
        lambda b, z: F.cross_entropy(z['logits'], b['y']),
        ValueError,
        r'loss fails with logits .*give loss\(logits, batch\)',
    ),
    'no function': ('cross_entropy', TypeError, "loss is 'cross_entropy', a str; give a function"),
    'missing': (None, TypeError, r'loss is None.*give a function loss\(logits, batch\)'),
    'a module of PyTorch': (
        nn.CrossEntropyLoss(),
        TypeError,
        r'loss is CrossEntropyLoss\(\).*\(input, target\); give',
    ),
}


@every
@pytest.mark.parametrize('name', LOSSES)
def test_losses(kind, name):
    loss, error, message = LOSSES[name]
    if kind == 'view' and not callable(loss):
        pytest.skip('a view is made by functions that have checked the loss')
    if kind == 'view' and isinstance(loss, nn.Module):
        error, message = ValueError, 'loss fails with logits.*give loss'
    with pytest.raises(error, match=message):
        scores(kind, loss=loss)


@every
def test_a_target_against_an_output_of_another_shape(kind):
    with pytest.raises(
        ValueError, match=r"changes with the other samples.*\(\d, 1\), batch\['y'\] \(\d,\).*logits\[:, 0\]"
    ):
        scores(kind, ONE, spread, numbers(TRAIN), numbers(VAL))


OUTPUTS = {
    'squeezed': (
        lambda m, b: m(b['x']).sum(1),
        ValueError,
        r'model returns \(\d,\) for .*keep the last axis',
    ),
    'of every token': (
        lambda m, b: torch.stack([m(b['x'])] * 4, 1),
        ValueError,
        r'model returns \(\d, 4, 3\) .*logits of every token: choose',
    ),
    'a tuple': (lambda m, b: (m(b['x']), None), TypeError, r'model returns a tuple, logits .*\[0\]'),
    'a dictionary': (lambda m, b: dict(logits=m(b['x'])), TypeError, r"model returns a dict.*\['logits'\]"),
    'nothing': (lambda m, b: None, TypeError, 'model returns a NoneType, logits .*give forward'),
    'an image': (
        lambda m, b: m(b['x'])[..., None, None],
        ValueError,
        r'model returns \(\d, 3, 1, 1\).*flatten\(1\)',
    ),
    'one row': (lambda m, b: m(b['x'])[:1], ValueError, 'returns 1 rows of logits for .*one row for each'),
    'NaN': (lambda m, b: m(b['x']) * NAN, ValueError, 'returns logits that are NaN or infinite; check'),
    'infinite': (lambda m, b: m(b['x']) / 0, ValueError, 'returns logits that are NaN or infinite; check'),
    'no function': ('logits', TypeError, "forward is 'logits', a str; give a function forward"),
}


@every
@pytest.mark.parametrize('name', OUTPUTS)
def test_outputs(kind, name):
    forward, error, message = OUTPUTS[name]
    if kind == 'view' and not callable(forward):
        pytest.skip('a view is made by functions that have checked it')
    with pytest.raises(error, match=message):
        scores(kind, forward=forward)


BATCHES = {
    'without index': (
        dict(index=None),
        ValueError,
        "train: a batch has no tensor 'index'.*only .*give every sample",
    ),
    'a tuple': ('tuple', TypeError, 'train: a batch is a tuple; yield dictionaries'),
    'a tensor': ('tensor', TypeError, 'train: a batch is a Tensor; yield dictionaries'),
    'of real indices': (
        dict(index=lambda i: i.float()),
        TypeError,
        r"train: batch\['index'\] is torch.float32.*int64",
    ),
    'of text indices': (
        dict(index=lambda i: [str(k) for k in i]),
        (TypeError, ValueError),
        "train: .*'index'.*give",
    ),
    'of two indices': (
        dict(index=lambda i: torch.stack([i, i], 1)),
        TypeError,
        r'torch.int64 \(\d, 2\); give one integer',
    ),
    'of short labels': (
        dict(y=lambda y: y[:-1]),
        ValueError,
        r"train: batch\['y'\] has \d rows for \d indices; give one",
    ),
    'of short inputs': (
        dict(x=lambda x: x[:-1]),
        ValueError,
        r"train: batch\['x'\] has \d rows for \d indices; give one",
    ),
    'of a label -100': (
        dict(y=broken_label(-100)),
        ValueError,
        r'train: the sample with index 1 has the label -100.*\[0, 3\)',
    ),
    'of a label C': (
        dict(y=broken_label(C)),
        ValueError,
        r'train: the sample with index 1 has the label 3.*3 classes.*\[0, 3\)',
    ),
    'of a late label -100': (
        dict(y=broken_label(-100), later=True),
        ValueError,
        r'train: the sample with index 6 has the label -100.*\[0, 3\)',
    ),
    'of bytes': (dict(y=lambda y: y.byte()), (TypeError, ValueError), r"y'\].*uint8|loss fails"),
    'of real labels': (
        dict(y=lambda y: y.float()),
        ValueError,
        r"loss fails with logits .*batch\['y'\].*fits the labels",
    ),
    'of repeated indices': (
        dict(index=lambda i: i // 2),
        ValueError,
        r'train: .*different indices, \d comes more.*its own index',
    ),
    'of wide inputs': (
        dict(x=lambda x: torch.cat([x, x], 1)),
        ValueError,
        r'model: Sequential fails on the batch \(x .*give inputs',
    ),
    'of double inputs': (
        dict(x=lambda x: x.double()),
        ValueError,
        'x .* float64.*fails|fails on the batch .*float64.*give inputs',
    ),
    'of NaN inputs': (
        dict(x=lambda x: x * NAN),
        ValueError,
        'NaN or infinite; check its weights and the inputs',
    ),
    'of late NaN inputs': (dict(x=lambda x: x * NAN, later=True), ValueError, 'NaN|not finite'),
    'of infinite inputs': (
        dict(x=lambda x: x / 0 * 0),
        ValueError,
        'NaN or infinite; check its weights and the inputs',
    ),
}


def batches_of(name):
    change = BATCHES[name][0]
    if change == 'tuple':
        return [tuple(b.values()) for b in TRAIN]
    return [b['x'] for b in TRAIN] if change == 'tensor' else changed(TRAIN, **change)


@every
@pytest.mark.parametrize('name', BATCHES)
def test_batches(kind, name):
    _, error, message = BATCHES[name]
    message = message.replace('train: ', '') if kind == 'view' else message
    late = ('late' in name or 'repeated' in name) and kind.endswith('all')
    with pytest.raises(error, match=message):
        scores(
            kind,
            train=batches_of(name),
            solver=(Woodbury if kind == 'self_all' else Exact)(0.1) if late else None,
        )


SETS = {
    'an iterator': (lambda: iter(TRAIN), ValueError, 'an iterator can be read only once; give a list'),
    'a generator': (lambda: (b for b in TRAIN), ValueError, 'an iterator can be read only once; give a list'),
    'empty': (lambda: [], ValueError, 'no sample; give at least one batch'),
    'missing': (lambda: None, TypeError, 'is a NoneType; give batches'),
    'a text': (lambda: 'train.csv', TypeError, 'is a str; give batches'),
    'one batch': (lambda: TRAIN[0], TypeError, 'a batch is a str; yield dictionaries'),
}


@every
@pytest.mark.parametrize('name', SETS)
def test_sets(kind, name):
    make, error, message = SETS[name]
    with pytest.raises(error, match=message):
        scores(kind, train=make())


@pytest.mark.parametrize('name', SETS)
@pytest.mark.parametrize('kind', ['scores', 'scores_all', 'cross', 'cross_all'])
def test_validation_sets(kind, name):
    make, error, message = SETS[name]
    with pytest.raises(error, match=message):
        scores(kind, val=make())


@pytest.mark.parametrize('kind', ['scores', 'scores_all', 'cross', 'cross_all'])
@pytest.mark.parametrize('label', [-100, C])
def test_validation_labels(kind, label):
    with pytest.raises(ValueError, match=rf'val: the sample with index 101 has the label {label}.*\[0, 3\)'):
        scores(
            kind,
            val=changed(VAL, y=broken_label(label)),
            **({} if 'cross' in kind else dict(target='posterior')),
        )


class Everywhere(IterableDataset):
    "Gives all samples in each worker"

    def __iter__(self):
        data = rows(N, 1)
        return ({k: v[i] for k, v in data.items()} for i in range(N))


def test_an_iterable_data_set_with_two_workers():
    with pytest.raises(
        ValueError, match='train: 24 samples have 12 different indices, 0 comes.*num_workers=0'
    ):
        scores('scores', train=DataLoader(Everywhere(), 4, num_workers=2))
    assert len(scores('scores', train=DataLoader(Everywhere(), 4), solver=Exact(0.1))) == N


MODELS = {
    'a text': ('resnet20', TypeError, "model is 'resnet20', a str; give a network"),
    'a class': (nn.Linear, TypeError, 'model is the class Linear; give a network'),
    'missing': (None, TypeError, 'model is None.*give a network'),
    'a function': (lambda x: x, TypeError, 'model is a function; give a network'),
    'without parameters': (
        nn.Sequential(nn.Tanh()),
        ValueError,
        'model is a Sequential without parameters; give',
    ),
}


def not_finite(value):
    model = net()
    model[0].weight.data[0, 0] = value
    return model


MODELS |= {
    f'with weights of {v}': (
        not_finite(v),
        ValueError,
        "model: its parameter '0.weight' has NaN or infinite.*load it again",
    )
    for v in (NAN, INF)
}


@pytest.mark.parametrize('kind', ENTRIES[:-1])
@pytest.mark.parametrize('name', MODELS)
def test_models(kind, name):
    model, error, message = MODELS[name]
    with pytest.raises(error, match=message):
        scores(kind, model)


SOLVERS = {
    'a text': ('cg', TypeError, "solver is 'cg', a str; give a solver such as"),
    'a class': (CG, TypeError, r'solver is the class CG; give a solver .*CG\(\)'),
    'a number': (0.1, TypeError, 'solver is 0.1, a float; give a solver'),
    'a truth value': (True, TypeError, 'solver is True, a bool; give a solver'),
    'an instance of another kind': (MODEL, TypeError, r'solver is .*Sequential; give a solver'),
}


@pytest.mark.parametrize('kind', ENTRIES[:-1])
@pytest.mark.parametrize('name', SOLVERS)
def test_solvers(kind, name):
    solver, error, message = SOLVERS[name]
    with pytest.raises(error, match='(?s)' + message):
        scores(kind, solver=solver)


DAMPINGS = 0, 0.0, -1.0, INF, -INF, NAN, 1e-30, 1e30, True, '1', 'much', None
EVERY_SOLVER = CG, Exact, Woodbury, Diagonal, KFAC, EKFAC, LiSSA, LBFGS, PolishedWoodbury


@pytest.mark.parametrize('damping', DAMPINGS, ids=repr)
def test_damping(damping):
    for solver in EVERY_SOLVER:
        with pytest.raises(
            ValueError, match=rf"damping is {re.escape(repr(damping))}; give a number above 0 .*or 'auto'"
        ):
            solver(damping=damping)


WHOLE = 0, -1, 2.5, True, '5', NAN, INF
SETTINGS = [(CG, 'max_iter', v) for v in WHOLE] + [(LiSSA, 'depth', v) for v in WHOLE]
SETTINGS += [
    (LBFGS, 'max_iter', 0),
    (PolishedWoodbury, 'max_iter', 0),
    (LBFGS, 'memory', 0),
    (LBFGS, 'memory', 2.5),
]
SETTINGS += [(s, 'n_samples', v) for s in (CG, Woodbury, KFAC, LiSSA) for v in (0, -5, 2.5, True, '10')]
SETTINGS += [(s, 'mc_samples', v) for s in (Woodbury, KFAC) for v in (0, 1.5, True)]
SETTINGS += [(Exact, 'max_size', v) for v in (0, 'big')]


@pytest.mark.parametrize('solver,name,value', SETTINGS)
def test_whole_numbers_of_solvers(solver, name, value):
    with pytest.raises(ValueError, match=rf'{name} is {value!r}; give a whole number from 1'):
        solver(**{name: value})


OTHERS = [
    (s, dict(tol=v), ValueError, rf'tol is {v!r}: give a relative residual from 0 to 0.5')
    for s in (CG, LiSSA, LBFGS, PolishedWoodbury)
    for v in (INF, NAN, 1.0, -0.1)
]
OTHERS += [
    (s, dict(tol=v), TypeError, rf'tol is {v!r}, a .*plain number')
    for s in (CG, LiSSA)
    for v in ('0.1', True, None)
]
OTHERS += [
    (s, dict(seed=v), TypeError, rf'seed is {v!r}, a .*give an integer')
    for s in (Woodbury, KFAC, Diagonal)
    for v in (2.5, True, '0')
]
OTHERS += [
    (s, dict(check=v), TypeError, rf'check is {v!r}, a .*use True or False')
    for s in (Woodbury, KFAC)
    for v in (1, 'yes')
]
OTHERS += [
    (KFAC, dict(approx=v), ValueError, rf"approx is {v!r}; use one of 'expand', 'reduce'") for v in ('sum', 1)
]
OTHERS += [
    (KFAC, dict(fisher=v), ValueError, rf"fisher is {v!r}; use one of 'mc', 'type-2'")
    for v in ('empirical', None)
]
OTHERS += [
    (CG, dict(curvature=v), ValueError, rf"curvature is {v!r}; use one of 'ggn', 'hessian'")
    for v in ('fisher', None)
]
OTHERS += [
    (CG, dict(preconditioner=v), TypeError, m)
    for v, m in (
        (Woodbury, r'preconditioner is the class Woodbury; give .*Woodbury\(\)'),
        ('woodbury', 'preconditioner is a str; give a solver with a written inverse'),
        (CG(), 'preconditioner is a CG; give a solver with a written inverse'),
    )
]
OTHERS += [
    (LiSSA, dict(scale=v), (ValueError, TypeError), rf"scale is {v!r}")
    for v in ('large', 0, -1.0, NAN, INF, True)
]


@pytest.mark.parametrize('solver,settings,error,message', OTHERS)
def test_other_settings_of_solvers(solver, settings, error, message):
    with pytest.raises(error, match=message):
        solver(**settings)


CHOICES = [
    ('scores', dict(target='median'), ValueError, "target is 'median'; use one of"),
    ('scores_all', dict(target=None), ValueError, 'target is None; use one of'),
    ('cross', dict(score='mean'), ValueError, "score is 'mean'; use one of"),
    ('cross', dict(folds=2.5), ValueError, 'folds is 2.5; give a whole number from 2'),
    ('cross', dict(folds=1), ValueError, 'folds is 1; give a whole number from 2'),
    ('cross', dict(folds=True), ValueError, 'folds is True; give a whole number from 2'),
    ('cross', dict(folds=M + 1), ValueError, 'folds is 10 for 9 validation samples; use 2 or more'),
    ('cross', dict(seed=2.5), TypeError, 'seed is 2.5, a float: give an integer'),
    ('cross', dict(seed='0'), TypeError, "seed is '0', a str: give an integer"),
    ('cross_all', dict(views=(1, 2)), ValueError, 'views are of the last layer; leave them out'),
    ('scores', dict(val_loss='mse'), TypeError, "val_loss is 'mse', a str; give a function"),
    ('scores', dict(val_loss=lambda z, b: z.sum()), ValueError, r'loss returns values of shape \(\)'),
    ('scores_all', dict(val_loss=lambda z, b: z.sum()), ValueError, r'loss returns values of shape \(\)'),
    ('self', dict(embeddings='no'), TypeError, "embeddings is 'no', a str: use True or False"),
]


@pytest.mark.parametrize('kind,arguments,error,message', CHOICES)
def test_choices(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        scores(kind, **arguments)


GROUPS = [
    (lambda: Scoring('cg'), "solver is 'cg', a str; give a solver"),
    (lambda: Scoring(last_layer='no'), "last_layer is 'no', a str: use True or False"),
    (lambda: Scoring(progress=1), 'progress is 1, a int: use True or False'),
    (lambda: Scoring(forward=3), 'forward is 3, a int; give a function'),
    (lambda: Scoring(val_loss='mse'), "val_loss is 'mse', a str; give a function"),
    (lambda: AllLayerOptions(embeddings='yes'), "embeddings is 'yes', a str: use True or False"),
    (
        lambda: influence_scores(MODEL, batch_cross_entropy, TRAIN, VAL, last_layer='no'),
        "last_layer is 'no', a str",
    ),
    (
        lambda: cross_scores(MODEL, batch_cross_entropy, TRAIN, VAL, scoring=CG()),
        r'scoring is a CG; give Scoring',
    ),
    (
        lambda: cross_scores(MODEL, batch_cross_entropy, TRAIN, VAL, scoring=Scoring),
        r'class Scoring; give Scoring\(solver',
    ),
]


@pytest.mark.parametrize('make,message', GROUPS)
def test_groups_of_settings(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# Solves that do not arrive


class Steep:
    "A diagonal operator with eigenvalues from 1 to 10⁶"

    size, values = 100, torch.logspace(0, 6, 100, dtype=torch.float64)

    def __matmul__(self, v):
        return self.values.reshape(-1, *[1] * (v.ndim - 1)) * v


@pytest.mark.parametrize(
    'solver', [CG(0.1, 3, preconditioner=None), LiSSA(0.1, 3), LBFGS(0.1, max_iter=3)], ids=repr
)
def test_a_chosen_solver_that_does_not_arrive_is_refused_and_a_default_goes_on(solver):
    b = torch.ones(Steep.size, dtype=torch.float64)
    assert solver.solve(Steep(), b).residual > 0.5
    with pytest.raises(
        ValueError, match=r'solver: .* ended at a relative residual of .*increase damping or (max_iter|depth)'
    ):
        used_solution(solver, Steep(), b)
    found = used_solution(solver, Steep(), b, chosen=False)
    r = (Steep() @ found.x) + 0.1 * found.x - b
    assert float(r.norm() / b.norm()) <= 0.26 and found.residual <= 0.25 and 'went on for' in found.note


def test_what_cannot_arrive_is_refused_also_as_a_default():
    class Hopeless(Steep):
        values = torch.logspace(-12, 12, 100, dtype=torch.float64)

    b = torch.ones(100, dtype=torch.float64)
    with pytest.raises(
        ValueError, match='ended at a relative residual.*no answer: increase damping, or give a solver'
    ):
        used_solution(CG(1e-14, 2, preconditioner=None), Hopeless(), b, chosen=False)


@pytest.mark.parametrize('kind', ['scores_all', 'cross_all'])
def test_scores_refuse_a_chosen_solve_that_does_not_arrive(kind):
    wild = net(seed=3)
    with torch.no_grad():
        for p in wild.parameters():
            p.mul_(3)
    weak = CG(1e-6, max_iter=1, preconditioner=None)
    with pytest.raises(ValueError, match='solver: CG.*ended at a relative residual of'):
        scores(kind, wild, solver=weak)


def test_every_solver_but_identity_reports_a_residual():
    G = GaussNewton(FlatModel(MODEL), TRAIN)
    b = torch.randn(G.size, generator=torch.Generator().manual_seed(0))
    for solver in (
        Exact(0.1),
        Woodbury(0.1),
        Diagonal(0.1),
        KFAC(0.1),
        EKFAC(0.1),
        CG(0.1),
        LBFGS(0.1),
        LiSSA(0.1),
    ):
        found = solver.solve(G, b)
        assert math.isfinite(found.residual), solver
    assert math.isnan(Identity().solve(G, b).residual)
    weak = scores('scores_all', solver=Diagonal(0.1))
    assert math.isfinite(weak.residual)


@pytest.mark.parametrize('last_layer', [True, False])
def test_self_influence_says_how_far_the_inverse_is(last_layer):
    exact = Exact(0.1) if last_layer else Woodbury(0.1, n_samples=None, mc_samples=None)
    found = self_influence(MODEL, batch_cross_entropy, TRAIN, exact, last_layer, progress=False)
    assert found.residual < 1e-3


# What is right stays right


@every
def test_right_input_passes(kind):
    found = scores(kind, solver=Exact(0.1) if not kind.startswith('self_all') else Woodbury(0.1))
    assert len(found) == N


@pytest.mark.parametrize('kind', ['scores', 'scores_all', 'self', 'self_all'])
def test_regressions_and_losses_without_labels_pass(kind):
    right = lambda z, batch: (z[:, 0] - batch['y']) ** 2
    solver = Woodbury(0.1) if kind == 'self_all' else Exact(0.1)
    assert len(scores(kind, ONE, right, numbers(TRAIN), numbers(VAL), solver=solver)) == N
    if kind.endswith('all'):
        bare = [{'x': b['x'], 'index': b['index']} for b in TRAIN]
        square = lambda z, batch: (z**2).sum(1)
        assert len(scores(kind, MODEL, square, bare, bare, solver=solver)) == N


def test_views_of_the_right_samples_pass():
    views = last_layer_views(MODEL, batch_cross_entropy, TRAIN, VAL, progress=False)
    options = dict(scoring=Scoring(Exact(0.1), progress=False), views=views)
    assert len(cross_scores(MODEL, batch_cross_entropy, TRAIN, VAL, **options)) == N
    known = all_layer_scores(MODEL, batch_cross_entropy, TRAIN, VAL, Exact(0.1), progress=False)
    assert torch.isfinite(known.values).all()
