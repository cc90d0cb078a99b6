"Data as users have it: each kind trains, and its scores are those of hand-made batches."

import random
import shutil
from functools import partial

import made_rows
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from kd_aif import (
    cross_scores,
    distill,
    influence_scores,
    load_images,
    out_of_fold_weights,
    samples,
    Training,
)
from kd_aif.data.decisions import apply_decisions
from kd_aif.data.given_datasets import array_source, dataset_source
from kd_aif.data.given_loaders import as_batches, check_same_classes, scored_batches
from kd_aif.data.image_files import image_size, open_image
from kd_aif.data.images import hold_out
from kd_aif.data.label_noise import symmetric_noise
from kd_aif.data.sample_batches import SampleBatches
from kd_aif.data.sample_sources import drawn, Loader, SampleSource, TensorRows
from kd_aif.data.text_batches import text_batches, TextBatches
from kd_aif.distillation.checkpoint import Checkpoint, Stopped
from kd_aif.distillation.evaluation import evaluate, predict
from kd_aif.distillation.weighting import Fixed, Reweighting
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.self_influence import self_influence
from kd_aif.rivals.confident_learning import out_of_fold_probabilities
from kd_aif.rivals.fixed_weights import self_influence_cross
from kd_aif.rivals.meta_weights import LearningToReweight

N, SIZE = 30, 8
G = torch.Generator().manual_seed(0)
Y = torch.arange(N) % 3
X = torch.randn(N, 4, generator=G) + Y[:, None]


Rows = partial(made_rows.Rows, n=N)


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
    'list of pairs': lambda: samples([pair(i) for i in range(N)], batch_size=SIZE),
    'list of dicts with tensors': lambda: samples([dict(x=X[i], y=Y[i]) for i in range(N)], batch_size=SIZE),
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
    model, known, val = small(1), by_hand(X, Y), by_hand(X, Y)
    loader = DataLoader(Rows(pair), SIZE, shuffle=True)
    pairs = {
        'self': lambda b: self_influence(model, batch_cross_entropy, b, progress=False).values,
        'cross': lambda b: cross_scores(model, batch_cross_entropy, b, val).values,
        'evaluate': lambda b: torch.tensor(evaluate(model, b)['loss']),
        'predict': lambda b: predict(model, b)[0],
        'probabilities': lambda b: out_of_fold_probabilities(lambda _: model, b),
        'out of fold': lambda b: out_of_fold_weights(lambda _: model, b, val, progress=False)[0].values,
        'self cross': lambda b: (
            self_influence_cross(model, batch_cross_entropy, b, val, progress=False).values
        ),
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
    sizes = [len(b['y']) for b in from_dataset(Rows(pair, n=17))]
    assert sizes == [8, 9] and len(from_dataset(Rows(pair, n=17))) == 2


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


def test_a_loader_of_numbers_is_a_regression_also_where_a_batch_has_whole_ones():
    y = torch.tensor([1.0, 2.0, 0.5, 1.0])
    batches = as_batches('train', DataLoader(TensorDataset(X[:4], y), 2))
    assert torch.equal(batches.y, y)


def test_the_whole_method_on_a_users_data():
    "Scores, weights and joint training of validation samples, by workers"
    train, val = samples(Rows(pair), batch_size=SIZE, workers=2).hold_out(9)
    run = distill(
        small(2), small(1), train, val, mechanism='student', training=Training(epochs=1, progress=False)
    )
    assert torch.equal(run.index[: len(train.y)], train.index) and run.weights.isfinite().all()


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
    assert (view.index, view.kind) == (3, 'row') and f'{float(X[3, 0]):.4g}' in view.text


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


# folders of images


def pixels(i, h=6, w=6):
    "A picture whose mean tells its class"
    g = np.random.default_rng(i)
    return (g.integers(0, 60, (h, w, 3)) + 60 * (i % 3)).astype(np.uint8)


def folder(root, size=lambda i: (6, 6), names=('ant', 'bee', 'cat')):
    for i in range(12):
        (root / names[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, *size(i))).save(root / names[i % 3] / f'{i:02}.png')
    return root


def pictures():
    "The same pictures as tensors, in the order of class and name"
    order = [i for c in range(3) for i in range(12) if i % 3 == c]
    x = torch.stack([torch.from_numpy(pixels(i)).permute(2, 0, 1).float() / 255 for i in order])
    return x, torch.tensor([i % 3 for i in order])


def frame(root, relative=False):
    files = sorted(folder(root / 'p').rglob('*.png'))
    paths = [str(f.relative_to(root) if relative else f) for f in files]
    return pd.DataFrame(dict(path=paths, label=[f.parent.name for f in files]))


def csv_of_paths(root):
    frame(root, relative=True).to_csv(root / 'list.csv', index=False)
    return root / 'list.csv'


def hub_images(root):
    import datasets

    x, y = pictures()
    images = [Image.fromarray(p) for p in (x * 255).round().byte().permute(0, 2, 3, 1).numpy()]
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=['ant', 'bee', 'cat']))
    return datasets.Dataset.from_dict(dict(img=images, label=y.tolist()), features=features)


def parquet_of_images(root):
    hub_images(root).to_parquet(root / 'images.parquet')
    return root / 'images.parquet'


class PictureSet(Dataset):
    "Pictures of Pillow, as torchvision gives them without a transform"

    classes = ['ant', 'bee', 'cat']

    def __init__(self, root):
        self.x, self.y = pictures()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return Image.fromarray((self.x[i] * 255).round().byte().permute(1, 2, 0).numpy()), int(self.y[i])


def reader(root, workers=0):
    return samples(folder(root), batch_size=4, workers=workers)


IMAGE_KINDS = {
    'folder': reader,
    'folder, two workers': lambda root: reader(root, 2),
    'folder with transforms': lambda root: samples(
        folder(root), batch_size=4, transform=(lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM), None)
    ),
    'CSV of paths': lambda root: samples(csv_of_paths(root), batch_size=4),
    'DataFrame of paths': lambda root: samples(frame(root), batch_size=4),
    'datasets.Dataset of images': lambda root: samples(hub_images(root), batch_size=4),
    'Parquet of images': lambda root: samples(parquet_of_images(root), batch_size=4),
    'datasets.Dataset with a transform': lambda root: samples(
        hub_images(root).with_transform(
            lambda rows: dict(x=[tensor(p) for p in rows['img']], y=rows['label'])
        ),
        batch_size=4,
    ),
    'data set of PIL pictures': lambda root: samples(PictureSet(root), batch_size=4),
    'torchvision ImageFolder': lambda root: samples(
        torchvision.datasets.ImageFolder(str(folder(root)), transform=tensor), batch_size=4
    ),
}


def tensor(picture):
    return torch.from_numpy(np.array(picture.convert('RGB'))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize('kind', IMAGE_KINDS)
def test_each_kind_of_image_scores_and_trains_as_batches_made_by_hand(kind, tmp_path):
    model, batches, (x, y) = small(1, 108), IMAGE_KINDS[kind](tmp_path), pictures()
    known = by_hand(x, y, size=4)
    options = dict(last_layer=False, progress=False)
    found, expected = (
        influence_scores(model, batch_cross_entropy, b, known, **options) for b in (batches, known)
    )
    assert torch.equal(found.values, expected.values)
    train, val = batches.hold_out(3)
    run = distill(small(2, 108), model, train, val, training=Training(epochs=1, progress=False))
    assert len(run.history) == 1
    if 'with a transform' not in kind:
        assert batches.classes == ('ant', 'bee', 'cat')
    view = batches.view([5])[0]
    assert view.kind == 'image' and view.image.size == (6, 6)


MODES = {
    'grey': lambda: Image.new('L', (5, 4), 128),
    'one bit': lambda: Image.new('1', (5, 4), 1),
    'palette': lambda: Image.new('RGB', (5, 4), (255, 0, 0)).quantize(4),
    'CMYK': lambda: Image.new('CMYK', (5, 4), (0, 255, 255, 0)),
    'RGBA': lambda: Image.new('RGBA', (5, 4), (0, 0, 255, 0)),
    'LA': lambda: Image.new('LA', (5, 4), (0, 255)),
    '16 bits': lambda: Image.fromarray(np.full((4, 5), 32896, np.uint16)),
}
COLOURS = {
    'grey': (128, 128, 128), 'one bit': (255, 255, 255), 'palette': (255, 0, 0), 'CMYK': (255, 0, 0),
    'RGBA': (255, 255, 255), 'LA': (0, 0, 0), '16 bits': (128, 128, 128),
}  # fmt: skip


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_becomes_red_green_and_blue(mode, tmp_path):
    suffix = 'tif' if mode == 'CMYK' else 'png'
    MODES[mode]().save(tmp_path / f'a.{suffix}')
    picture = open_image(str(tmp_path / f'a.{suffix}'))
    assert picture.mode == 'RGB' and picture.getpixel((2, 2)) == COLOURS[mode]


def test_pictures_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left column is the upper row
    picture = Image.new('RGB', (6, 4))
    picture.paste((255, 255, 255), (0, 0, 1, 4))
    picture.save(path := tmp_path / 'a.png', exif=exif)
    assert image_size(str(path)) == (6, 4) and open_image(str(path)).size == (4, 6)
    assert open_image(str(path)).getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize('size, shape', [(6, (6, 6)), ((4, 5), (4, 5)), ([3, 9], (3, 9))], ids=str)
def test_mixed_sizes_get_one_size(size, shape, tmp_path):
    root = folder(tmp_path, size=lambda i: (6 + i, 9))
    batch = next(iter(samples(root, size=size, batch_size=4)))
    assert batch['x'].shape == (4, 3, *shape) and 0 <= batch['x'].min() <= batch['x'].max() <= 1


def test_a_transform_may_make_one_size(tmp_path):
    root = folder(tmp_path, size=lambda i: (6 + i, 9))
    small_one = lambda p: p.resize((5, 5))
    assert next(iter(samples(root, transform=small_one)))['x'].shape == (12, 3, 5, 5)


def test_hidden_files_are_listed(tmp_path):
    root = folder(tmp_path)
    (root / '.DS_Store').write_text('')
    (root / 'ant' / 'Thumbs.db').write_text('')
    with pytest.warns(UserWarning, match=r'2 hidden files are left out: \.DS_Store, ant/Thumbs\.db'):
        assert len(samples(root).y) == 12


def test_a_split_that_lacks_a_class_keeps_the_numbers_of_the_others(tmp_path):
    train, val = folder(tmp_path / 'train'), folder(tmp_path / 'val')
    shutil.rmtree(val / 'bee')
    alone, given = samples(val), samples(val, classes=('ant', 'bee', 'cat'))
    assert given.y.tolist() == [0] * 4 + [2] * 4 and given.classes == samples(train).classes
    with pytest.raises(ValueError, match='val has the classes ant, cat, train has ant, bee, cat'):
        distill(small(1, 108), None, samples(train), alone, training=Training(epochs=1, progress=False))


# tables of numbers and texts


def numbers():
    return pd.DataFrame(X.numpy().astype(np.float64), columns=list('abcd')).assign(
        label=[f'k{y}' for y in Y.tolist()]
    )


def number_csv(root):
    numbers().to_csv(root / 'n.csv', index=False)
    return root / 'n.csv'


def number_parquet(root):
    numbers().to_parquet(root / 'n.parquet')
    return root / 'n.parquet'


def hub_numbers(root):
    import datasets

    return datasets.Dataset.from_dict(dict(features=X.tolist(), label=Y.tolist()))


TABLE_KINDS = {
    'DataFrame of numbers': lambda root: numbers(),
    'CSV of numbers': number_csv,
    'Parquet of numbers': number_parquet,
    'datasets.Dataset of vectors': hub_numbers,
    'list of dictionaries': lambda root: numbers().to_dict('records'),
    'tuple of arrays': lambda root: (X.numpy(), Y.numpy()),
    'DataLoader': lambda root: DataLoader(TensorDataset(X, Y), SIZE, shuffle=True),
}


@pytest.mark.parametrize('kind', TABLE_KINDS)
def test_each_kind_of_table_scores_and_trains_as_batches_made_by_hand(kind, tmp_path):
    model, known = small(1), by_hand(X, Y)
    batches = samples(TABLE_KINDS[kind](tmp_path), batch_size=SIZE)
    options = dict(last_layer=False, progress=False)
    found, expected = (
        influence_scores(model, batch_cross_entropy, b, known, **options) for b in (batches, known)
    )
    assert torch.equal(found.index, expected.index) and torch.equal(found.values, expected.values)
    run = distill(small(2), model, *batches.hold_out(0.2), training=Training(epochs=1, progress=False))
    assert len(run.history) == 1 and batches.view([2])[0].kind == 'row'


def test_columns_that_are_not_used_are_named():
    table = numbers().assign(source='web')
    found = samples(table, inputs=('a', 'b'))
    assert 'not used: c, d, source' in repr(found) and next(iter(found))['x'].shape == (N, 2)


def test_labels_of_a_table():
    assert samples(numbers().assign(label=range(1, N + 1)), inputs='a').classes[:2] == ('1', '2')
    assert samples(numbers().assign(label=np.linspace(0, 1, N))).y.dtype == torch.float32
    assert samples(numbers(), classes=['k2', 'k1', 'k0']).y.tolist() == (2 - Y).tolist()
    assert samples(numbers().rename(columns=dict(label='kind')), label='kind').classes == ('k0', 'k1', 'k2')


TEXTS = dict(text=[' '.join([str(3 + k % 3)] * (1 + k % 5)) for k in range(12)], label=['a', 'b', 'c'] * 4)


class TokenSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.EmbeddingBag(40, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        return self.head(self.embedding(input_ids))


def test_texts_score_train_and_split(words, tmp_path):
    pd.DataFrame(TEXTS).to_csv(tmp_path / 't.csv', index=False)
    import datasets

    table = pd.DataFrame(TEXTS).rename(columns=dict(text='said', label='kind'))
    for source, names in (
        (tmp_path / 't.csv', {}),
        (pd.DataFrame(TEXTS), {}),
        (datasets.Dataset.from_dict(TEXTS), {}),
        (table, dict(text='said', label='kind')),
        ((TEXTS['text'], TEXTS['label']), {}),
    ):
        batches = samples(source, tokenizer=words(), batch_size=4, **names)
        assert isinstance(batches, TextBatches) and batches.classes == ('a', 'b', 'c')
        expected = list(text_batches((TEXTS['text'], TEXTS['label']), words(), batch_size=4, shuffle=False))
        for a, b in zip(batches.eval_view(), expected, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in b)
    train, val = batches.hold_out(3)
    assert val.y.bincount().tolist() == [1, 1, 1] and val.view(val.index)[0].text in TEXTS['text']
    model = TokenSum()
    run = distill(TokenSum(), model, train, val, training=Training(epochs=1, progress=False))
    assert len(run.history) == 1
    assert len(cross_scores(model, batch_cross_entropy, train, val).index) == 9


# decisions


def decided(
    index=(1, 4, 5), decision=('relabel', 'drop', 'accept'), given=('1', '1', '2'), label=('2', '', '')
):
    return pd.DataFrame(dict(index=index, decision=decision, given=given, label=label, note='seen'))


def test_decisions_change_and_drop_samples(tmp_path):
    decided().to_csv(tmp_path / 'd.csv', index=False)
    for decisions in (decided(), tmp_path / 'd.csv', str(tmp_path / 'd.csv')):
        batches = samples((X, Y), decisions=decisions, batch_size=SIZE)
        assert 4 not in batches.index.tolist() and len(batches.y) == N - 1
        assert batches.y[1] == 2 and batches.y[4] == Y[5] and batches.index[4] == 5
        batch = ordered(batches)
        assert batch['y'][1] == 2 and torch.equal(batch['x'][4], X[5])
    assert torch.equal(ordered(samples(TensorDataset(X, Y), decisions=decided()))['y'], batch['y'])


def test_decisions_about_names_and_numbers(words):
    named = decided(given=['b', 'b', 'c'], label=['c', None, None])
    texts = samples((TEXTS['text'], TEXTS['label']), tokenizer=words(), decisions=named)
    assert texts.index.tolist() == [0, 1, 2, 3, *range(5, 12)] and texts.y[1] == 2
    assert not texts.data.is_noisy.any()  # nothing is known to be wrong
    value = X.sum(1)
    real = decided(given=[float(value[i]) for i in (1, 4, 5)], label=[0.25, None, None])
    found = samples((X, value), decisions=real)
    assert found.y[1] == 0.25 and len(found.y) == N - 1


def test_decisions_about_images_in_memory():
    data = hold_out(load_images(progress=False), 20, 0)[1]
    i = data.index.tolist()
    given = [data.classes[y] for y in data.y[:2].tolist()]
    table = pd.DataFrame(dict(index=i[:2], decision=['drop', 'relabel'], given=given, label=[None, '7']))
    after = apply_decisions(data, table)
    assert after.index.tolist() == i[1:] and after.y[0] == 7 and after.fingerprint != data.fingerprint
    assert torch.equal(after.x, data.x[1:])
    noisy = symmetric_noise(data, 0.5, 0)
    given = [data.classes[y] for y in noisy.y[:2].tolist()]
    assert torch.equal(apply_decisions(noisy, table.assign(given=given)).clean_y, data.y[1:])


# with the rest of the package


@pytest.mark.filterwarnings('ignore:Rows. a sample differs')
def test_a_stopped_training_goes_on_with_the_same_augmented_samples(tmp_path):
    def trained(checkpoint=None):
        train, val = samples(Rows(jittered), batch_size=SIZE).hold_out(6)
        student, training = small(2), Training(epochs=3, progress=False, checkpoint=checkpoint)
        distill(student, None, train, val, training=training)
        return student

    calls = []
    stop = lambda seconds: calls.append(seconds) or len(calls) == 2
    with pytest.raises(Stopped):
        trained(Checkpoint(tmp_path / 'state.safetensors', seconds=0, stop=stop))
    resumed, whole = trained(Checkpoint(tmp_path / 'state.safetensors')), trained()
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))


def test_a_reweighting_callback_takes_a_plain_loader():
    callback = LearningToReweight(DataLoader(TensorDataset(X[:9], Y[:9]), 4))
    options = dict(weighting=Reweighting(callback), training=Training(epochs=1, progress=False))
    run = distill(small(2), None, samples((X, Y), batch_size=SIZE), by_hand(X, Y), **options)
    assert run.weights.isfinite().all()
