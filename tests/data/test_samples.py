"Data as users have it: each kind trains, and its scores are those of hand-made batches."

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from kd_aif import cross_scores, distill, influence_scores, out_of_fold_weights, Training
from kd_aif.data.given_datasets import array_source, dataset_source
from kd_aif.data.given_loaders import as_batches, check_same_classes, scored_batches
from kd_aif.data.sample_batches import SampleBatches
from kd_aif.data.sample_sources import drawn, Loader, SampleSource, TensorRows
from kd_aif.distillation.evaluation import evaluate, predict
from kd_aif.distillation.weighting import Fixed
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.self_influence import self_influence
from kd_aif.rivals.confident_learning import out_of_fold_probabilities
from kd_aif.rivals.fixed_weights import self_influence_cross

N, SIZE = 30, 8
G = torch.Generator().manual_seed(0)
Y = torch.arange(N) % 3
X = torch.randn(N, 4, generator=G) + Y[:, None]


class Rows(Dataset):
    "Any form of sample, by a function of position"

    def __init__(self, make, n=N, **attributes):
        self.make, self.n = make, n
        vars(self).update(attributes)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


def pair(i):
    return X[i], int(Y[i])


def jittered(i):
    return X[i] + 0.1 * torch.rand(4) + random.random() + float(np.random.rand()), int(Y[i])


def small(seed=0, inputs=4, classes=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, classes))


def by_hand(x, y, index=None, size=SIZE):
    "Batches as a list of dictionaries"
    index = torch.arange(len(y)) if index is None else index
    parts = torch.arange(len(y)).split(size)
    return [dict(x=x[p], y=y[p], index=index[p]) for p in parts]


def from_dataset(dataset, classes=None, **options):
    options = dict(batch_size=SIZE) | options
    loader = Loader(**options)
    return SampleBatches(dataset_source('train', dataset, loader, classes), loader)


def halved(items):
    "A collate function with names of its own"
    return dict(pixel_values=torch.stack([x for x, _ in items]), labels=torch.tensor([y for _, y in items]))


KINDS = {
    'TensorDataset': lambda: from_dataset(TensorDataset(X, Y)),
    'data set of pairs': lambda: from_dataset(Rows(pair)),
    'data set of pairs, targets known': lambda: from_dataset(Rows(pair, targets=Y.tolist())),
    'data set of dicts': lambda: from_dataset(Rows(lambda i: dict(image=X[i], label=int(Y[i]), name='a'))),
    'pixel_values and labels': lambda: from_dataset(Rows(lambda i: dict(pixel_values=X[i], labels=Y[i]))),
    'labels are names': lambda: from_dataset(Rows(lambda i: (X[i], 'abc'[int(Y[i])]))),
    'labels of numpy': lambda: from_dataset(Rows(lambda i: (X[i].numpy(), np.int32(Y[i])))),
    'own collate': lambda: from_dataset(Rows(pair), collate=halved),
    'two workers': lambda: from_dataset(Rows(pair), workers=2),
    'numpy arrays': lambda: SampleBatches(array_source('a', X.numpy(), Y.numpy()), Loader(SIZE)),
    'tensors': lambda: SampleBatches(array_source('a', X, Y), Loader(SIZE)),
    'DataLoader': lambda: DataLoader(TensorDataset(X, Y), SIZE),
    'shuffling DataLoader': lambda: DataLoader(Rows(pair), SIZE, shuffle=True),
    'DataLoader of dicts': lambda: DataLoader(Rows(lambda i: dict(x=X[i], label=Y[i])), SIZE),
    'DataLoader with collate_fn': lambda: DataLoader(Rows(pair), SIZE, shuffle=True, collate_fn=halved),
}


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_scores_and_trains_as_batches_made_by_hand(kind):
    model, batches, known = small(1), KINDS[kind](), by_hand(X, Y)
    options = dict(last_layer=False, progress=False)
    found, expected = (
        influence_scores(model, batch_cross_entropy, b, known, **options) for b in (batches, known)
    )
    assert torch.equal(found.index, expected.index) and torch.equal(found.values, expected.values)
    run = distill(small(2), model, batches, known, training=Training(epochs=1, progress=False))
    assert len(run.history) == 1 and run.metrics['val_accuracy'] >= 0


def ordered(batches):
    "index, x and y of one pass, by index"
    passed = list(batches)
    whole = {k: torch.cat([b[k] for b in passed]) for k in ('index', 'x', 'y')}
    order = whole['index'].argsort()
    return {k: v[order] for k, v in whole.items()}


# every public function that takes batches takes a plain loader


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_plain_loaders_everywhere():
    model, known = small(1), by_hand(X, Y)
    loader = DataLoader(Rows(pair), SIZE, shuffle=True)
    pairs = {
        'self': lambda b: self_influence(model, batch_cross_entropy, b, progress=False).values,
        'cross': lambda b: cross_scores(model, batch_cross_entropy, b, b).values,
        'evaluate': lambda b: torch.tensor(evaluate(model, b)['loss']),
        'predict': lambda b: predict(model, b)[0],
        'probabilities': lambda b: out_of_fold_probabilities(lambda _: model, b),
        'out of fold': lambda b: out_of_fold_weights(lambda _: model, b, b, progress=False)[0].values,
        'self cross': lambda b: self_influence_cross(model, batch_cross_entropy, b, b, progress=False).values,
    }
    for name, call in pairs.items():
        torch.testing.assert_close(call(loader), call(known), msg=name)


def test_weights_of_a_shuffling_loader_belong_to_their_samples():
    "A student under weights of zero for one class learns the same from the loader and from batches by hand"
    weights = (Y != 2).float()
    loader = DataLoader(TensorDataset(X, Y), SIZE, shuffle=True)
    options = dict(weighting=Fixed(weights), training=Training(epochs=1, progress=False))
    run = distill(student := small(3), None, loader, by_hand(X, Y), **options)
    assert torch.equal(run.index, torch.arange(N)) and torch.equal(run.weights, weights)
    order = [b['index'] for b in as_batches('train', loader)]
    same = [dict(x=X[p], y=Y[p], index=p) for p in order]
    other = small(3)
    given = dict(options, weighting=Fixed(weights[torch.cat(order)], index=torch.cat(order)))
    distill(other, None, same, by_hand(X, Y), **given)
    for a, b in zip(student.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)


# what passes untouched


def test_batches_with_an_index_pass_untouched():
    known = by_hand(X, Y)
    dicts = Rows(lambda i: dict(x=X[i], y=Y[i], index=i))
    collated = DataLoader(
        Rows(pair), SIZE, collate_fn=lambda items: dict(halved(items), index=torch.arange(len(items)))
    )
    for batches in (known, DataLoader(dicts, SIZE, shuffle=True), collated, from_dataset(Rows(pair))):
        assert as_batches('train', batches) is batches
    only_y = DataLoader(Rows(lambda i: dict(x=X[i], y=Y[i])), SIZE)
    assert as_batches('train', only_y, key='y') is only_y and as_batches('train', only_y) is not only_y


def test_looking_at_a_loader_changes_no_random_numbers():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    batches = as_batches('train', DataLoader(Rows(jittered), SIZE, shuffle=True))
    list(batches)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


# order, epochs, parts


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_is_a_pure_function_of_seed_and_number(workers):
    first, again = (from_dataset(Rows(jittered), workers=workers, seed=4) for _ in range(2))
    one, two = list(first), list(first)
    again.set_epoch(1)
    for a, b in zip(again, two, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a['index'], b['index']) for a, b in zip(one, two))
    assert not torch.equal(ordered(one)['x'], ordered(two)['x'])
    alone = ordered(from_dataset(Rows(jittered), batch_size=7, seed=4))
    assert torch.equal(
        alone['x'], ordered(one)['x']
    )  # neither workers nor the size of batches change a sample


def test_another_seed_is_another_order():
    orders = [torch.cat([b['index'] for b in from_dataset(Rows(pair), seed=s)]) for s in (0, 1, 0)]
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_a_last_single_sample_joins_the_batch_before():
    sizes = [len(b['y']) for b in from_dataset(Rows(pair, 17))]
    assert sizes == [8, 9] and len(from_dataset(Rows(pair, 17))) == 2


def test_the_eval_view_is_in_order_and_repeats():
    batches = from_dataset(Rows(pair)).eval_view()
    first, second = (torch.cat([b['index'] for b in batches]) for _ in range(2))
    assert torch.equal(first, torch.arange(N)) and torch.equal(first, second)
    assert batches.eval_view().ordered and scored_batches('train', batches).ordered


def test_hold_out_is_stratified_and_keeps_indices():
    batches = from_dataset(Rows(pair))
    for n, count in ((6, 6), (0.2, 6)):
        train, val = batches.hold_out(n, seed=1)
        assert val.y.bincount().tolist() == [2, 2, 2] and len(val.y) == count
        assert sorted([*train.index.tolist(), *val.index.tolist()]) == list(range(N))
        assert torch.equal(ordered(val)['x'], X[val.index.sort().values])
    assert torch.equal(batches.hold_out(6, seed=1)[1].index, val.index)
    assert not torch.equal(batches.hold_out(6, seed=2)[1].index, val.index)


def test_hold_out_tells_of_missing_classes():
    with pytest.warns(UserWarning, match='no validation sample of 1 classes: '):
        from_dataset(Rows(pair)).hold_out(2)


def test_parts_of_parts_and_subsets():
    part = from_dataset(Rows(pair)).select([5, 3, 9]).select(torch.tensor([True, False, True]))
    assert part.index.tolist() == [5, 9] and part.y.tolist() == Y[[5, 9]].tolist()
    subset = from_dataset(Subset(TensorDataset(X, Y), [4, 6, 8]))
    assert subset.index.tolist() == [0, 1, 2] and subset.y.tolist() == Y[[4, 6, 8]].tolist()


def test_own_indices_stay():
    batches = from_dataset(Rows(lambda i: dict(x=X[i], y=Y[i], index=100 - i)))
    assert batches.index.tolist() == list(range(100, 100 - N, -1))
    assert torch.equal(ordered(batches)['x'], X.flip(0))


def test_labels_of_a_loader_are_read_when_they_are_needed():
    batches = as_batches('train', DataLoader(Rows(pair), SIZE, shuffle=True))
    assert 'labels as they are read' in repr(batches)
    train, val = batches.hold_out(6)
    assert torch.equal(batches.y, Y) and val.y.bincount().tolist() == [2, 2, 2]


def test_a_loader_keeps_its_settings():
    batches = as_batches('val', DataLoader(Rows(pair), 7, num_workers=2, prefetch_factor=3, pin_memory=True))
    assert (batches.batch_size, batches.loader.workers, batches.loader.shuffle) == (7, 2, False)
    assert batches.loader.worker_options == dict(prefetch_factor=3) and batches.loader.pin_memory
    assert torch.equal(ordered(batches)['x'], X)


# augmentation


def test_an_augmenting_data_set_is_told_once():
    batches = from_dataset(Rows(jittered))
    with pytest.warns(UserWarning, match='differs from one read to the next.*eval_source'):
        batches.eval_view()
    batches.select([0, 1]).eval_view()  # warns would be an error here
    assert batches.augment is not None


def test_an_eval_source_is_used_and_not_told_of():
    batches = from_dataset(Rows(jittered), eval_source=Rows(pair))
    assert torch.equal(ordered(batches.eval_view())['x'], X) and not torch.equal(ordered(batches)['x'], X)


def test_a_pair_of_transforms():
    double, same = (lambda x: 2 * x), (lambda x: x + 0)
    batches = SampleBatches(array_source('a', X, Y, transform=(double, same)), Loader(SIZE))
    assert torch.equal(ordered(batches)['x'], 2 * X) and torch.equal(ordered(batches.eval_view())['x'], X)
    one = SampleBatches(array_source('a', X, Y, transform=double), Loader(SIZE))
    assert torch.equal(ordered(one.eval_view())['x'], 2 * X)
    noisy = SampleBatches(array_source('a', X, Y, transform=lambda x: x + torch.rand(4)), Loader(SIZE))
    with pytest.warns(UserWarning, match='transform=\\(training, evaluation\\)'):
        noisy.eval_view()


def test_tensors_in_memory_look_the_same_in_each_epoch():
    for batches in (from_dataset(TensorDataset(X, Y)), SampleBatches(array_source('a', X, Y), Loader(SIZE))):
        assert batches.augment is None
    assert from_dataset(Rows(pair)).augment is not None  # it cannot be known


# labels, classes, views


def test_kinds_of_labels():
    names = from_dataset(Rows(lambda i: (X[i], ['dog', 'cat', 'cow'][int(Y[i])])))
    assert names.classes == ('cat', 'cow', 'dog') and next(iter(names.eval_view()))['y'].tolist()[:3] == [
        2,
        0,
        1,
    ]
    given = from_dataset(Rows(pair), classes=['dog', 'cat', 'cow', 'emu'])
    assert given.classes[3] == 'emu' and torch.equal(given.y, Y)
    number = from_dataset(Rows(lambda i: (X[i], 0.5 + i)))
    assert (
        number.classes == ()
        and number.y.dtype == torch.float32
        and next(iter(number))['y'].dtype == torch.float32
    )
    whole = from_dataset(Rows(pair), classes=())
    assert whole.y.dtype == torch.float32 and next(iter(whole))['y'].dtype == torch.float32
    truth = from_dataset(Rows(lambda i: (X[i], bool(i % 2))))
    assert truth.classes == ('False', 'True')
    known = from_dataset(Rows(pair, targets=Y.tolist(), classes=['a', 'b', 'c']))
    assert known.classes == ('a', 'b', 'c')


def test_a_wrong_list_of_targets_is_not_believed():
    assert torch.equal(from_dataset(Rows(pair, targets=[0] * N)).y, Y)


def test_a_regression_trains():
    batches = from_dataset(TensorDataset(X, X.sum(1)))
    from kd_aif.distillation.objective import regression_objective

    run = distill(
        small(0, classes=1),
        None,
        *batches.hold_out(6),
        objective=regression_objective(),
        training=Training(epochs=1, progress=False),
    )
    assert 'val_pearson' in run.metrics


def test_other_tensors_of_a_sample_stay():
    batch = next(iter(from_dataset(Rows(lambda i: dict(x=X[i], y=Y[i], length=torch.tensor(i), name='a')))))
    assert torch.equal(batch['length'], batch['index']) and 'name' not in batch


def test_different_classes_are_refused_before_training():
    kinds = (['a', 'b', 'c'], ['a', 'c', 'b'])
    train, val = (from_dataset(Rows(pair), classes=k) for k in kinds)
    with pytest.raises(
        ValueError, match='val has the classes a, c, b, train has a, b, c.*classes=train.classes'
    ):
        distill(small(), None, train, val, training=Training(epochs=1, progress=False))
    check_same_classes(train=train, val=None, test=by_hand(X, Y))


def test_views_are_rows_of_numbers():
    batches = from_dataset(Rows(pair))
    view = batches.view([3])[0]
    assert (view.index, view.kind) == (3, 'row') and f'{float(X[3, 0]):.3g}' in view.text


def test_reprs():
    batches = from_dataset(Rows(pair), classes=['a|b', 'c', '<d>'])
    assert '4 batches of up to 8 samples, a new order in each epoch' in repr(batches)
    shown = batches._repr_markdown_()
    assert 'a\\|b' in shown and '&lt;d>' in shown and '| 10 | 10 | 10 |' in shown
    assert 'mean' in from_dataset(TensorDataset(X, X.sum(1)))._repr_markdown_()
    many = SampleSource(TensorRows(x=X), torch.arange(N), torch.arange(N), tuple(map(str, range(N))))
    assert '1 to 1 samples per class' in SampleBatches(many)._repr_markdown_()


def test_drawn_gives_the_numbers_of_its_name():
    draws = [
        drawn(lambda: (torch.rand(1).item(), random.random(), np.random.rand()), 0, 'a', k) for k in (0, 1, 0)
    ]
    assert draws[0] == draws[2] and draws[0] != draws[1]
