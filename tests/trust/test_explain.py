"Explanations are right by retraining, for the last layer and for all layers"

import pytest
import torch
from torch import nn

from kd_aif.data.images import ImageData
from kd_aif.data.loaders import ImageBatches
from kd_aif.influence.solvers import Exact
from kd_aif.trust.explain import explain, explain_all

HOSTILE = '<script>alert("1")</script>\n\'"$x|y$\u2028'
LAM, N = 0.05, 60


def fit(x, y, weights=None):
    "The linear model with the smallest weighted loss, weight decay LAM"
    model = nn.Linear(x.shape[1], 3).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    weights = torch.ones(len(y)) if weights is None else weights
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn='strong_wolfe'
    )

    def closure():
        optimizer.zero_grad()
        loss = (weights * nn.functional.cross_entropy(model(x), y, reduction='none')).sum() / N
        loss = loss + LAM / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@pytest.fixture(scope='module')
def task():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % 3
    x = torch.randn(N, 4, generator=g, dtype=torch.float64) + 2 * torch.eye(3, 4, dtype=torch.float64)[y]
    y[5] = 2
    asked = torch.tensor([[1.0, 0.4, 0.2, 0.0], [0.3, 0.2, 1.5, 0.5]], dtype=torch.float64)
    order = torch.randperm(N, generator=g)
    train = [dict(x=x[o], y=y[o], index=o + 100) for o in order.split(25)]
    return x, y, asked, train, fit(x, y)


@pytest.mark.parametrize('last_layer, label', [(True, None), (False, 1)])
def test_nats_are_those_of_leaving_one_out(task, last_layer, label):
    x, y, asked, train, model = task
    options = dict(solver=Exact(LAM), last_layer=last_layer, label=label)
    for k, found in enumerate(explain_all(model, asked, train, **options)):
        log_p = lambda model: model(asked).log_softmax(1)[k, found.label].item()
        assert found.label == (label if label is not None else int(model(asked)[k].argmax()))
        assert found.log_probability == pytest.approx(log_p(model))
        one = lambda i, weight: torch.ones(N).index_fill(0, torch.tensor([i - 100]), weight)
        at = lambda i, weight: log_p(fit(x, y, one(i, weight)))
        rows = found.values.abs().argsort(descending=True)[:10]
        values, index = found.values[rows], found.index[rows].tolist()
        slope = torch.tensor([(at(i, 1.1) - at(i, 0.9)) / 0.2 for i in index])
        assert torch.allclose(values, slope.double(), atol=0.01 * float(slope.abs().max()))
        fall = torch.tensor([found.log_probability - at(i, 0.0) for i in index])
        assert torch.corrcoef(torch.stack([values, fall.double()]))[0, 1] > 0.98


def test_removing_supporters_counts_more_than_removing_their_class(task):
    x, y, asked, train, model = task
    found = explain(model, asked[:1], train, solver=Exact(LAM))
    best = torch.tensor(found.supporters(6).index.to_numpy()) - 100
    log_p = lambda without: fit(x, y, torch.ones(N).index_fill(0, without, 0))(asked).log_softmax(1)[
        0, found.label
    ]
    g, same = torch.Generator().manual_seed(1), (y == found.label).nonzero()[:, 0]
    others = [log_p(same[torch.randperm(len(same), generator=g)[:6]]) for _ in range(3)]
    assert log_p(best) < min(others) < found.log_probability + 0.1


def test_tables_have_signs_labels_and_order(task):
    x, y, asked, train, model = task
    found = explain(model, dict(x=asked[:1], y=torch.zeros(1), index=torch.ones(1)), train, solver=Exact(LAM))
    ours, theirs = found.supporters(5), found.opponents(100)
    assert ours.nats.is_monotonic_decreasing and (ours.nats > 0).all() and len(ours) == 5
    assert theirs.nats.is_monotonic_increasing and (theirs.nats < 0).all()
    assert len(theirs) == int((found.values < 0).sum())
    assert ours.given.tolist() == [str(int(y[i - 100])) for i in ours.index]
    assert torch.equal(found.scores.values[:, 0].double() / N, found.values)
    assert 'text/html' not in found._repr_mimebundle_() and repr(found).startswith('**0** with probability')


def test_pictures_with_hostile_names_in_a_notebook():
    names = (HOSTILE, 'b', 'c')
    y = torch.arange(12) % 3
    x = torch.full((12, 3, 4, 4), 90, dtype=torch.uint8)
    x[torch.arange(12), y] = 200
    data = ImageData(
        x, y, torch.arange(12), y, names, 'toy', 'train', 'f', torch.full((3,), 0.5), torch.ones(3)
    )
    train = ImageBatches(data, 5, seed=1)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    batch = next(iter(train.eval_view()))
    found = explain(model, batch['x'][:1], train, label=HOSTILE)
    html = found._repr_mimebundle_()['text/html']
    assert found.label == 0 and '<script' not in html and html.count('data:image/png') > 8
    assert '<script' not in repr(found) and '\n- for' in repr(found)


NET = nn.Linear(4, 3).double()
X = torch.ones(1, 4, dtype=torch.float64)
TRAIN = [dict(x=X.repeat(3, 1), y=torch.arange(3), index=torch.arange(3))]
BAD = {
    'model': (('net', X, TRAIN), {}, TypeError, "model is 'net'"),
    'one output': ((nn.Linear(4, 1).double(), X, TRAIN), {}, ValueError, 'one output'),
    'x is text': ((NET, 'x', TRAIN), {}, TypeError, 'x is a str'),
    'x is empty': ((NET, X[:0], TRAIN), {}, ValueError, 'x has no sample'),
    'x without tensors': ((NET, dict(y=torch.ones(1)), TRAIN), {}, ValueError, 'x has no sample'),
    'two samples': ((NET, X.repeat(2, 1), TRAIN), {}, ValueError, 'use explain_all'),
    'inputs that do not fit': ((NET, torch.ones(1, 7).double(), TRAIN), {}, ValueError, 'fails on the batch'),
    'inputs of NaN': ((NET, X * float('nan'), TRAIN), {}, ValueError, 'NaN or infinite'),
    'train is data': ((NET, X, None), {}, TypeError, 'batches is a NoneType'),
    'train is empty': ((NET, X, []), {}, ValueError, 'at least one batch'),
    'train is an iterator': ((NET, X, iter(TRAIN)), {}, ValueError, 'read only once'),
    'train without index': (
        (NET, X, [dict(x=X, y=torch.ones(1).long())]),
        {},
        ValueError,
        "no tensor 'index'",
    ),
    'label too high': ((NET, X, TRAIN), dict(label=3), ValueError, 'label is 3'),
    'label is real': ((NET, X, TRAIN), dict(label=1.0), ValueError, 'label is 1.0'),
    'label is a switch': ((NET, X, TRAIN), dict(label=True), ValueError, 'label is True'),
    'name unknown': (
        (NET, X, TRAIN),
        dict(label='cat', classes=('a', 'b', 'c')),
        ValueError,
        'use one of a, b, c',
    ),
    'no names': ((NET, X, TRAIN), dict(label='cat'), ValueError, 'names are not known'),
    'classes': ((NET, X, TRAIN), dict(classes='abc'), TypeError, 'tuple of strings'),
    'loss': ((NET, X, TRAIN), dict(loss=nn.CrossEntropyLoss()), TypeError, 'loss is'),
    'solver': ((NET, X, TRAIN), dict(solver='cg'), TypeError, 'solver is'),
    'forward': ((NET, X, TRAIN), dict(forward=1), TypeError, 'forward is'),
    'last_layer': ((NET, X, TRAIN), dict(last_layer=1), TypeError, 'last_layer is'),
}


@pytest.mark.parametrize('args, options, kind, words', BAD.values(), ids=BAD)
def test_explanations_that_cannot_be(args, options, kind, words):
    with pytest.raises(kind, match=words):
        explain(*args, **options)


def test_how_many():
    found = explain(NET, X, TRAIN, solver=Exact(LAM))
    with pytest.raises(ValueError, match='k is 0'):
        found.supporters(0)
