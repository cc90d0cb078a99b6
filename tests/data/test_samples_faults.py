"What is not clear in a user's data is refused before any work, with the argument, what was found, and the remedy."

import random
import shutil
import warnings
from functools import partial

import made_rows
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils import data as td
from torch.utils.data import DataLoader, TensorDataset

from kd_aif import cross_scores, distill, influence_scores, out_of_fold_weights, samples, Training
from kd_aif.data.decisions import apply_decisions
from kd_aif.data.given_loaders import as_batches
from kd_aif.data.sample_sources import Loader
from kd_aif.data.sample_views import SampleView
from kd_aif.data.text_files import read_texts
from kd_aif.distillation.evaluation import evaluate
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.self_influence import self_influence

N = 12
X, Y = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
ROWS = TensorDataset(X, Y)


Rows = partial(made_rows.Rows, n=N)


class Stream(td.IterableDataset):
    def __iter__(self):
        return iter([(x, int(y)) for x, y in ROWS])


class Shared(td.Sampler):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(range(len(self.source)))

    def __len__(self):
        return len(self.source)


def bad(make, kind, message, **attributes):
    return lambda root: samples(Rows(make, **attributes)), kind, message


def pair(i):
    return X[i], int(Y[i])


def call(*args, **kwargs):
    return lambda root: samples(*args, **kwargs)


# sources that are none, settings, and samples of data sets

SOURCES = {
    'number': (call(3), TypeError, 'source is a int without positions'),
    'None': (call(None), TypeError, 'source is a NoneType'),
    'path that is not there': (call('/no/such/place'), FileNotFoundError, "'/no/such/place' does not exist; give a"),
    'stream': (call(Stream()), TypeError, 'a stream: a weight needs a sample that can be found again'),
    'loader of a stream': (call(DataLoader(Stream(), 4)), TypeError, 'source.dataset is a Stream without positions'),
    'dictionary of splits': (call(dict(train=ROWS, test=ROWS)), TypeError, r"source\['train'\]"),
    'batches already': (call(samples(ROWS)), TypeError, 'which are batches already; use it as it is'),
    'three arrays': (call((X, Y, Y)), TypeError, 'a tuple of 3; give a pair'),
    'unknown argument': (call(ROWS, batchsize=3), TypeError, "no argument 'batchsize'; there are batch_size"),
    'loader twice': (call(ROWS, loader=Loader(), seed=1), TypeError, 'loader and seed say the same'),
    'loader of another type': (call(ROWS, loader=3), TypeError, r'give Loader\(batch_size'),
    'batch size 0': (call(ROWS, batch_size=0), ValueError, 'batch_size is 0; give a whole number from 1'),
    'workers -1': (call(ROWS, workers=-1), ValueError, 'workers is -1; give a whole number from 0'),
    'shuffle in words': (call(ROWS, shuffle='yes'), TypeError, "shuffle is 'yes'.*use True or False"),
    'seed in words': (call(ROWS, seed='a'), TypeError, "seed is 'a'.*give an integer"),
    'collate that is none': (call(ROWS, collate=3), TypeError, 'collate is 3.*give a function'),
    'transform that is none': (call(ROWS, transform=3), TypeError,
        'transform is 3; give a function of one input, or a pair'),
    'three transforms': (call(ROWS, transform=(None, None, None)), TypeError, 'or a pair'),
    'size for rows': (call(ROWS, size=8), ValueError,
        'size is given, but source is a data set whose inputs are no pict'),
    'inputs for rows': (call(ROWS, inputs='a'), ValueError, 'inputs is given, but source is a data set'),
    'label for arrays': (call((X, Y), label='y'), ValueError, 'label is given, but source is a pair'),
    'text without tokenizer': (call(ROWS, text='t'), ValueError, "text='t' names texts; give tokenizer= too"),
    'no labels': (call((X, None)), TypeError, 'source: labels are None, a NoneType; give one label per sample'),
    'a word for labels': (call((X, 'a' * N)), TypeError, "source: labels are 'aaa.*a str; give one label"),
    'a set of labels': (call((X, {0, 1})), TypeError, 'a set; give one label per sample'),
    'a number for labels': (call((X, 3)), TypeError, 'labels are 3, a int; give one label'),
    'a sample that fails': bad(lambda i: pair(i) if i != 7 else open('/no/file'), ValueError,
        r'the sample at position 7 cannot be read \(FileNotFoundError: .*/no/file.*correct it in the data set'),
    'a first sample that fails': bad(lambda i: {}[i], ValueError, r'at position 0 cannot be read \(KeyError: 0\)'),
    'one class': (call((X, [0] * N)), ValueError, "label '0' alone; give samples of two classes or more, or all"),
    'one class, counted from 1': (call((X, [1] * N)), ValueError, "source has the label '1' alone"),
    'one name': (call((X, ['a'] * N)), ValueError, "source has the label 'a' alone"),
    'most classes empty': (call((X, Y * 50 + 1)), ValueError,
        r'source: labels are 1 to 101, so that 99 of 102 classes have no sample; number them without gaps, or give cl'),
    'most classes of a data set empty': bad(lambda i: (X[i], 7 + i % 3), ValueError,
        r'7 of 10 classes have no sample; use y - 7, or give classes=\(...\), the names'),
    'texts without tokenizer': (call((['a', 'b'], [0, 1])), ValueError, 'X holds texts; give tokenizer='),
    'classes in one string': (call(ROWS, classes='abc'), TypeError, "classes is 'abc'.*give a list of names"),
    'a class twice': (call(ROWS, classes=['a', 'a', 'b']), ValueError, 'give a list of different names'),
    'too few classes': (call(ROWS, classes=['a', 'b']), ValueError, 'position 2 is 2, but there are 2 classes'),
    'empty data set': bad(pair, ValueError, 'source is empty; give at least one sample', n=0),
    'empty arrays': (call((X[:0], Y[:0])), ValueError, 'source is empty'),
    'no label': (call(TensorDataset(X)), ValueError, 'tuples of 1: they have no label'),
    'three values': (call(TensorDataset(X, Y, Y)), ValueError, 'tuples of 3: which of them are inputs and label'),
    'inputs alone': bad(lambda i: X[i], TypeError, r'samples are a Tensor; give \(x, y\)'),
    'dicts without label': bad(lambda i: dict(x=X[i]), ValueError, r"no label among their keys \(x\)"),
    'dicts without inputs': bad(lambda i: dict(y=1, z=X[i]), ValueError, "no inputs among their keys.*name them 'x'"),
    'two labels': bad(lambda i: dict(x=X[i], label=0, target=1), ValueError, "'label' and 'target', two labels"),
    'two inputs': bad(lambda i: dict(x=X[i], image=X[i], y=1), ValueError, "'x' and 'image', two inputs"),
    'label of another name': (
        call(Rows(lambda i: dict(x=X[i], y=1)), label='kind'), ValueError, "no label 'kind' among their keys"
    ),
    'label -1': bad(lambda i: (X[i], i % 3 - 1), ValueError, 'label at position 0 is -1.*leave unlabelled samples out'),
    'label None': bad(lambda i: (X[i], None), ValueError, 'do not fit into one batch.*NoneType'),
    'label NaN': bad(lambda i: (X[i], float('nan')), ValueError,
        '12 of 12 labels are NaN or infinite, the first at pos'),
    'floats that are whole': bad(
        lambda i: (X[i], float(Y[i])), ValueError, r'all of them are whole numbers; use y.long\(\).*classes=\(\)'
    ),
    'one-hot labels': bad(lambda i: (X[i], torch.eye(3)[Y[i]]), ValueError, r'shape \(12, 3\); use y.argmax\(1\)'),
    'labels in a column': bad(lambda i: (X[i], Y[i : i + 1]), ValueError, r'shape \(12, 1\); use y\[:, 0\]'),
    'names in two cases': bad(lambda i: (X[i], 'aA'[i % 2]), ValueError, "'A' and 'a' differ in case or spaces alone"),
    'names with a space': bad(lambda i: (X[i], ['a', 'a '][i % 2]), ValueError, "'a' and 'a ' differ in case or space"),
    'a label that is missing': bad(lambda i: (X[i], ['a', ''][i % 2]), ValueError, 'labels are missing.*row 1'),
    'own index twice': bad(lambda i: dict(x=X[i], y=0, index=i // 2), ValueError, "'index' has 6 different values"),
    'shapes that differ': bad(
        lambda i: (X[i, : 1 + i % 2], 0), ValueError, r'samples 0 to 11 do not fit into one batch.*by transform='
    ),
    'eval source of another length': (
        call(Rows(pair), eval_source=Rows(pair, n=5)), ValueError, 'eval_source has 5 samples, the source 12'
    ),
    'eval source in another order': (
        call(Rows(pair), eval_source=Rows(lambda i: pair(N - 1 - i))), ValueError, 'eval_source has other labels'
    ),
    'bytes in an array': (call((np.zeros((2, 3), np.uint8), [0, 1])), TypeError, 'inputs are uint8; scale them'),
    'objects in an array': (call((np.array([['a'], ['b']]), [0, 1])), TypeError, 'inputs are an array of <U1'),
    'rows of two lengths': (call(([[1, 2], [3]], [0, 1])), ValueError, 'inputs are rows of different lengths'),
    'NaN in an array': (call((X.masked_fill(X == X[5, 1], np.nan), Y)), ValueError, 'first in row 5; fill them'),
    'more labels than rows': (call((X, Y[:5])), ValueError, '12 inputs and 5 labels; give one label per input'),
}  # fmt: skip


@pytest.mark.parametrize('case', SOURCES)
def test_sources_that_are_not_clear_are_refused(case, tmp_path):
    make, kind, message = SOURCES[case]
    with pytest.raises(kind, match=message):
        make(tmp_path)


# loaders, in every function that takes batches

LOADERS = {
    'weighted sampler': (
        lambda: DataLoader(ROWS, 4, sampler=td.WeightedRandomSampler([1.0] * N, N)), ValueError, r'weighting=Fixed\('
    ),
    'subset sampler': (
        lambda: DataLoader(ROWS, 4, sampler=td.SubsetRandomSampler(range(5))), ValueError, r'Subset\(dataset, indices\)'
    ),
    'own sampler': (lambda: DataLoader(ROWS, 4, sampler=Shared(ROWS)), ValueError, 'has a Shared, so that not every'),
    'distributed sampler': (
        lambda: DataLoader(ROWS, 4, sampler=td.DistributedSampler(ROWS, 2, 0)), ValueError, 'they share each batch'
    ),
    'own batch sampler': (
        lambda: DataLoader(ROWS, batch_sampler=[[0, 1], [2]]), ValueError,
            'has its own batch_sampler, .*batch_size= and'
    ),
    'replacement': (
        lambda: DataLoader(ROWS, 4, sampler=td.RandomSampler(ROWS, replacement=True)), ValueError, 'with replacement'
    ),
    'fewer samples': (
        lambda: DataLoader(ROWS, 4, sampler=td.RandomSampler(ROWS, num_samples=5)), ValueError, 'not all samples'
    ),
    'drop_last': (lambda: DataLoader(ROWS, 5, drop_last=True), ValueError, r'leaves out 2 samples.*drop_last=False'),
    'no batch size': (lambda: DataLoader(ROWS, batch_size=None), ValueError, 'batch_size=None.*give a batch_size'),
    'stream': (lambda: DataLoader(Stream(), 4), TypeError, 'a Stream without positions.*map-style'),
    'empty data set': (lambda: DataLoader(Rows(pair, n=0), 4, sampler=[]), ValueError, 'is empty; give at least one'),
    'data set': (lambda: ROWS, TypeError, r'is a data set \(TensorDataset\).*kd_aif.samples\(dataset\)'),
}  # fmt: skip


def network():
    return nn.Linear(4, 3)


@pytest.mark.parametrize('case', LOADERS)
def test_loaders_that_cannot_be_kept_are_refused(case):
    make, kind, message = LOADERS[case]
    with pytest.raises(kind, match=f'train.*{message}'):
        as_batches('train', make())


ENTRIES = {
    'distill': lambda b: distill(
        network(), None, b, samples(ROWS), training=Training(epochs=1, progress=False)
    ),
    'distill, val': lambda b: distill(
        network(), None, samples(ROWS), b, training=Training(epochs=1, progress=False)
    ),
    'distill, test': lambda b: distill(network(), None, samples(ROWS), samples(ROWS), test=b),
    'influence_scores': lambda b: influence_scores(network(), batch_cross_entropy, b, samples(ROWS)),
    'influence_scores, val': lambda b: influence_scores(network(), batch_cross_entropy, samples(ROWS), b),
    'all layers': lambda b: influence_scores(
        network(), batch_cross_entropy, b, samples(ROWS), last_layer=False
    ),
    'cross_scores': lambda b: cross_scores(network(), batch_cross_entropy, b, samples(ROWS)),
    'self_influence': lambda b: self_influence(network(), batch_cross_entropy, b),
    'out_of_fold': lambda b: out_of_fold_weights(lambda batches: network(), b, samples(ROWS)),
    'evaluate': lambda b: evaluate(network(), b),
}


@pytest.mark.parametrize('entry', ENTRIES)
def test_every_function_refuses_a_weighted_loader(entry):
    loader = LOADERS['weighted sampler'][0]()
    with pytest.raises(ValueError, match='WeightedRandomSampler, so that not every sample comes once'):
        ENTRIES[entry](loader)


def test_a_loader_of_names_is_refused():
    "One batch does not know the order of all names"
    loader = DataLoader(Rows(lambda i: (X[i], 'abc'[i % 3])), 4)
    with pytest.raises(ValueError, match=r"train: labels are names, such as 'a'; give samples\(dataset\)"):
        distill(network(), None, loader, samples(ROWS), training=Training(epochs=1, progress=False))


def test_numbers_as_names_of_two_tables_are_compared():
    one, two = (samples(numbers(label=y)) for y in ([0, 1, 2], [0, 2, 2]))
    assert two.y.tolist() == [0, 1, 1]  # class 1 of this table is called 2
    with pytest.raises(ValueError, match='val has the classes 0, 2, train has 0, 1, 2'):
        distill(nn.Linear(2, 3), None, one, two, training=Training(epochs=1, progress=False))


# what only a pass can find

PASSES = {
    'labels that change': (
        Rows(lambda i: (X[i], random.randrange(3))), {}, 'had the label . and now has .; give a data set whose labels'
    ),
    'mixed labels': (
        Rows(pair, targets=Y.tolist()),
        dict(collate=lambda items: (torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items]).flip(0))),
        'do not change.*in collate',
    ),
    'lost samples': (
        ROWS, dict(collate=lambda items: tuple(torch.stack(t) for t in zip(*items[:3]))), '4 samples give 3 labels'
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', PASSES)
def test_samples_that_change_are_refused_when_they_are_read(case):
    dataset, options, message = PASSES[case]
    with pytest.raises(ValueError, match=message):
        batches = samples(dataset, batch_size=4, **options)
        for epoch in range(2):
            list(batches)


# folders of images


def folder(root, names=('ant', 'bee'), size=lambda i: (6, 6)):
    for i in range(2 * len(names)):
        (root / names[i // 2]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size(i), (9 * i, 0, 0)).save(root / names[i // 2] / f'{i}.png')
    return root


def with_file(name, content=b'x'):
    def make(root):
        path = folder(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return root

    return make


def truncated(root):
    folder(root)
    path = root / 'ant' / '0.png'
    path.write_bytes(path.read_bytes()[:20])
    return root


def animated(root):
    frames = [Image.new('RGB', (6, 6), (k, 9 * k, 90 * k)) for k in range(3)]
    frames[0].save(folder(root) / 'bee' / 'z.gif', save_all=True, append_images=frames[1:])
    return root


def levels_unknown(root):
    Image.fromarray(np.ones((6, 6), np.float32)).save(folder(root) / 'bee' / 'z.tif')
    return root


def emptied(root):
    folder(root)
    for path in (root / 'bee').iterdir():
        path.unlink()
    return root


FOLDERS = {
    'no folder in it': (lambda root: root, {}, 'has no folders; give a folder with one subfolder for each class'),
    'one class': (lambda root: folder(root, ('ant',)), {},
        "one class folder, 'ant'; give two or more, or all names by"),
    'loose file': (with_file('labels.csv'), {}, '1 files lie beside the class folders: labels.csv; move them'),
    'a text among images': (with_file('ant/notes.txt'), {}, "files of class 'ant' are no images.*ant/notes.txt; move"),
    'a video among images': (with_file('bee/a.mp4'), {}, 'bee/a.mp4'),
    'folders in a class': (with_file('ant/more/1.png'), {}, "'ant' has folders in it: ant/more; move their images up"),
    'splits, not classes': (lambda root: folder(root, ('train', 'val')), {},
        'train, val, which are splits.*give one of'),
    'empty class': (emptied, {}, "class folder 'bee' has no images; fill it or remove it"),
    'names in two cases': (lambda root: folder(root, ('Cat', 'cat')), {}, "'Cat' and 'cat' differ in case"),
    'sizes that differ': (
        lambda root: folder(root, size=lambda i: (6 + i, 6)), {},
            r'4 images have 4 sizes, from 6×6 to 6×9.*give size='
    ),
    'no image inside': (with_file('ant/x.png', b'no image'), {}, r'x.png: the image cannot be read'),
    'cut in the middle': (truncated, {}, r'0.png: the image cannot be read'),
    'animation': (animated, dict(size=6), 'holds 3 pictures; save one of them'),
    'level of white unknown': (levels_unknown, dict(size=6), "mode is 'F', whose level of white is not known"),
    'class without name': (folder, dict(classes=('ant',)), "folder 'bee' is not one of classes"),
    'regression': (folder, dict(classes=()), 'folders are classes; leave it out'),
    'size of zero': (folder, dict(size=0), 'size is 0; give pixels: size=64'),
    'size of three': (folder, dict(size=(3, 4, 5)), r'size is \(3, 4, 5\); give pixels'),
    'size in words': (folder, dict(size='small'), "size is 'small'; give pixels"),
    'label for a folder': (folder, dict(label='x'), 'label is given, but source is a folder of images'),
    'eval source for a folder': (folder, dict(eval_source=ROWS), 'eval_source is given, but source is a folder'),
    'a transform that fails': (folder, dict(transform=lambda p: 1 / 0),
        r'ant/0.png: transform fails \(ZeroDivisionError: division by zero\); correct it'),
    'transform to a number': (folder, dict(transform=lambda p: 3), 'transform gives a int; give a tensor'),
    'transform to sizes': (
        lambda root: folder(root, size=lambda i: (6 + i, 6)), dict(transform=lambda p: p), 'do not fit into one batch'
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', FOLDERS)
def test_folders_with_anything_else_are_refused(case, tmp_path):
    make, options, message = FOLDERS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        for batch in samples(make(tmp_path), **options):
            pass


KINDS_OF_FILES = 'jpg', 'png', 'bmp', 'tif', 'webp', 'ppm'


@pytest.mark.parametrize('kind', KINDS_OF_FILES)
def test_a_file_that_is_cut_off_is_found_before_any_work(kind, tmp_path):
    folder(tmp_path)
    path = tmp_path / 'bee' / f'z.{kind}'
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    assert len(samples(tmp_path, size=6).y) == 5
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=f'z.{kind}: the image cannot be read'):
        samples(tmp_path, size=6)


def test_a_film_behind_a_photograph_is_no_fault(tmp_path):
    folder(tmp_path)
    path = tmp_path / 'bee' / 'z.jpg'
    Image.new('RGB', (6, 6)).save(path)
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert len(samples(tmp_path).y) == 5


@pytest.mark.parametrize('make', [animated, levels_unknown])
def test_pictures_that_have_no_form_are_found_before_any_work(make, tmp_path):
    with pytest.raises(ValueError, match='bee/z.*: the image cannot be read'):
        samples(make(tmp_path), size=6)


def test_the_cause_of_a_failed_sample_is_kept():
    batches = samples(Rows(lambda i: pair(i) if i != 8 else {}['x'], targets=Y.tolist()), batch_size=5)
    with pytest.raises(ValueError, match='position 8 cannot be read') as found:
        list(batches)
    assert isinstance(found.value.__cause__, KeyError)


def test_the_check_of_a_case_can_fail(tmp_path):
    "The folder that the cases above spoil is good"
    assert samples(folder(tmp_path)).y.tolist() == [0, 0, 1, 1]


# tables


def numbers(**columns):
    return pd.DataFrame(dict(a=[0.5, 2, 1], b=[1.0, 0, 4], label=['x', 'y', 'x']) | columns)


def paths(root, **columns):
    files = sorted(map(str, folder(root / 'p').rglob('*.png')))[:3]
    return pd.DataFrame(dict(path=files, label=['x', 'y', 'x']) | columns)


def written(text, name='t.csv'):
    def make(root):
        (root / name).write_text(text)
        return root / name

    return make


TABLES = {
    'no label': (lambda root: numbers().drop(columns='label'), {}, r"no column with a usual name among a, b.*label='"),
    'two labels': (lambda root: numbers(target=[1, 0, 1]), {},
        'two columns of labels, label and target among.*name the column'),
    'label of another name': (lambda root: numbers(), dict(label='kind'),
        "label='kind'.*has no such column, only a, b"),
    'no rows': (lambda root: numbers()[:0], {}, 'has no rows; give at least one sample'),
    'nothing but labels': (lambda root: numbers()[['label']], {}, 'no column beside the label; add the inputs'),
    'row numbers': (lambda root: numbers(id=[0, 1, 2]), {},
        r"column 'id' counts or names the rows; name the columns of inputs"),
    'index of pandas': (
        lambda root: numbers(**{'Unnamed: 0': [7, 3, 9]}), {}, "column 'Unnamed: 0' counts or names the rows"
    ),
    'texts among numbers': (lambda root: numbers(c=['u', 'v', 'w']), {},
        "column 'c' holds text, such as 'u'; give text="),
    'a number that is missing': (lambda root: numbers(a=[1, None, 2]), {}, "row 1 has nan in column 'a'.*fill it or"),
    'an infinite number': (lambda root: numbers(a=[1, 3, np.inf]), {}, "row 2 has inf in column 'a'"),
    'infinite in the first row': (lambda root: numbers(a=[np.inf, 3, 1]), {}, "row 0 has inf in column 'a'"),
    'infinite in a file': (written('a,b,label\ninf,1,x\n2,2,y\n3,1,x\n'), {}, "row 0 has 'inf' in column 'a'"),
    'vectors of two lengths': (lambda root: numbers(a=[[1, 2], [3], [4, 5]]), {}, 'row 1 has 1 numbers.*row 0 has 2'),
    'inputs that are none': (lambda root: numbers(), dict(inputs='z'), "'z' is no column; the columns of"),
    'the label as input': (lambda root: numbers(), dict(inputs=('a', 'label')), "'label' is the label"),
    'an input twice': (lambda root: numbers(), dict(inputs=('a', 'a')), 'each once'),
    'size for numbers': (lambda root: numbers(), dict(size=4), 'size=4 is for images, but a, b are numbers'),
    'names in two cases': (lambda root: numbers(label=['Dog', 'dog', 'x']), {},
        "column 'label': the classes 'Dog' and"),
    'a label that is missing': (lambda root: numbers(label=['x', None, 'y']), {}, '1 of 3 labels are missing.*row 1'),
    'a label that is unknown': (lambda root: numbers(), dict(classes=['x', 'z']), "row 1: label 'y' is not one of"),
    'missing file': (lambda root: paths(root, path=['a.png', 'b.png', 'c.png']), {},
        "row 0 names 'a.png', which is no"),
    'no path': (lambda root: paths(root, path=[None, 'b.png', 'c.png']), {}, "row 0 has no image in column 'path'"),
    'two columns of images': (lambda root: paths(root).assign(mask=lambda t: t.path), {},
        'several columns of images, path'),
    'images and numbers': (
        lambda root: paths(root, a=[1, 2, 3]), dict(inputs=('path', 'a')), 'path, a are images and others; name one'
    ),
    'ragged CSV': (written('a,label\n1,x\n2\n'), {}, 'row 1 has 1 values, the header has 2'),
    'no table': (written('hello', 't.docx'), {}, "ends in '.docx'; give a .csv"),
    'one class': (lambda root: numbers(label='x'), {}, "source has the label 'x' alone"),
    'header in capitals': (written('A,Label\n0.5,x\n2,y\n'), {}, r"among A, Label \('Label' differs in case or space"),
    'header with spaces': (written('a, label\n0.5,x\n2,y\n'), {}, r"\(' label' differs in case or spaces\); name"),
    'a named column with capitals': (lambda root: numbers(Kind=1), dict(label='kind'), r"\('Kind' differs in case"),
    'decimal comma': (written('a;b;label\n0,5;1;x\n2;3;y\n'), {}, "column 'a' holds numbers with a decimal comma"),
    'labels with a decimal comma': (written('a;label\n0.5;0,5\n2;1,5\n'), {}, "'label': labels have a decimal comma"),
    'broken Parquet': (written('PAR1', 't.parquet'), {}, 't.parquet cannot be read.*write it again'),
    'eval source for a table': (lambda root: numbers(), dict(eval_source=ROWS),
        'eval_source is given, but source is a t'),
}  # fmt: skip


@pytest.mark.parametrize('case', TABLES)
def test_tables_that_are_not_clear_are_refused(case, tmp_path):
    make, options, message = TABLES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        samples(make(tmp_path), **options)


def test_a_file_that_goes_away_is_named(tmp_path):
    batches = samples(folder(tmp_path))
    shutil.rmtree(tmp_path / 'bee')
    with pytest.raises(ValueError, match=r'bee/2.png: the image cannot be read.*No such file'):
        list(batches.eval_view())


# texts

TEXTS = (['1 2', '3', '4 5 6', '7'], ['a', 'b', 'a', 'b'])

TEXT_FAULTS = {
    'size': (dict(size=3), 'size is given, but source is a set of texts'),
    'transform': (dict(transform=str), 'transform is given'),
    'inputs': (dict(inputs='a'), 'inputs is given'),
    'workers': (dict(workers=2), 'workers is given, but source is a set of texts, which are kept in memory'),
    'one class': (dict(label='one'), "source has the label 'x' alone; give samples of two classes"),
    'a column that is none': (dict(text='said'), "there is no column 'said'"),
    'no tokenizer': (
        dict(tokenizer='bert'),
        'tokenizer is a str; give a tokenizer of the transformers library',
    ),
}


@pytest.mark.parametrize('case', TEXT_FAULTS)
def test_texts_refuse_what_has_no_use(case, words):
    options, message = TEXT_FAULTS[case]
    source = pd.DataFrame(dict(text=TEXTS[0], label=TEXTS[1], one='x'))
    with pytest.raises((ValueError, TypeError), match=message):
        samples(source, **(dict(tokenizer=words()) | options))


# decisions


def decided(**columns):
    table = dict(index=[1, 4], decision=['relabel', 'drop'], given=['b', 'b'], label=['c', None])
    return pd.DataFrame(table | columns)


DECISIONS = {
    'no table': (lambda: 3, TypeError, 'decisions is a int; give a CSV file'),
    'missing file': (lambda: 'gone.csv', FileNotFoundError, "decisions='gone.csv' is not a file"),
    'missing column': (
        lambda: decided().drop(columns='given'),
        ValueError,
        "no column 'given', only index, decision",
    ),
    'another label now': (
        lambda: decided(given=['b', 'a']),
        ValueError,
        r"row 1 \(index 4\): given is 'a', but the label",
    ),
    'unknown index': (
        lambda: decided(index=[1, 99]),
        ValueError,
        r'row 1 \(index 99\): no sample has this index',
    ),
    'infinite index': (lambda: decided(index=[np.inf, 4.0]), ValueError, 'row 0: index is inf; give the whole'),
    'a class that pandas takes for a missing one': (
        lambda: decided(given=[np.nan, 'b']),
        ValueError,
        r'row 0 \(index 1\): given is missing \(nan\).*keep_default_na=False',
    ),
    'header in capitals': (
        lambda: decided().rename(columns=str.title),
        ValueError,
        "no column 'index', only Index.*'Index', 'Decision', 'Given', 'Label' differ in case",
    ),
    'no rows': (lambda: decided()[:0], ValueError, 'decisions has no rows; leave it out'),
    'no index': (lambda: decided(index=[None, 4]), ValueError, 'row 0: index is nan; give the whole number'),
    'index twice': (lambda: decided(index=[1, 1]), ValueError, 'the index stands in row 0 too'),
    'unknown decision': (
        lambda: decided(decision=['keep', 'drop']),
        ValueError,
        "decision is 'keep'; use one of accept",
    ),
    'unknown class now': (
        lambda: decided(given=['z', 'b']),
        ValueError,
        "given: 'z' is no class of this data",
    ),
    'unknown new class': (
        lambda: decided(label=['z', None]),
        ValueError,
        r"label: 'z' is no class of this data \(a, b, c\)",
    ),
    'no new class': (
        lambda: decided(label=[None, None]),
        ValueError,
        "'relabel' without a new label; fill the column",
    ),
    'dropped with a label': (
        lambda: decided(label=['c', 'a']),
        ValueError,
        "'drop' has another label, 'a'; use 'relabel'",
    ),
    'all dropped': (
        lambda: pd.DataFrame(dict(index=range(N), decision='drop', given=list('abc') * 4, label='')),
        ValueError,
        'decisions drop every sample; keep at least one',
    ),
}


@pytest.mark.parametrize('case', DECISIONS)
def test_decisions_that_do_not_fit_change_nothing(case):
    make, kind, message = DECISIONS[case]
    batches = samples((X, ['abc'[y] for y in Y.tolist()]))
    texts = read_texts((list(map(str, range(N))), ['abc'[y] for y in Y.tolist()]))
    for data in (batches, texts):
        with pytest.raises(kind, match=message):
            apply_decisions(data, make())
    assert torch.equal(batches.y, Y) and torch.equal(texts.y, Y)


@pytest.mark.parametrize('separator', [',', ';', '\t'])
@pytest.mark.parametrize('quoting', [0, 1])
def test_other_separators(separator, quoting, tmp_path, words):
    write = lambda frame, name: frame.to_csv(tmp_path / name, sep=separator, index=False, quoting=quoting)
    write(numbers(), 't.csv')
    write(numbers(), 't.tsv')
    for name in ('t.csv', 't.tsv'):
        found = samples(tmp_path / name)
        assert found.classes == ('x', 'y') and next(iter(found.eval_view()))['x'].tolist()[1] == [2, 0]
    write(pd.DataFrame(dict(text=['1 2', '3'], label=['a', 'b'])), 'r.csv')
    assert samples(tmp_path / 'r.csv', tokenizer=words()).data.texts == ('1 2', '3')
    write(pd.DataFrame(dict(index=[1], decision='drop', given='y', label='')), 'd.csv')
    assert samples(numbers(), decisions=tmp_path / 'd.csv').index.tolist() == [0, 2]


def test_header_of_texts_in_capitals(tmp_path, words):
    for header, found in ('Text,label', "'Text' differs"), ('text, label', "' label' differs"):
        (tmp_path / 'r.csv').write_text(f'{header}\n1,a\n2,b\n')
        with pytest.raises(ValueError, match=found):
            samples(tmp_path / 'r.csv', tokenizer=words())


def test_an_empty_file_of_decisions(tmp_path):
    (tmp_path / 'd.csv').write_text('')
    with pytest.raises(ValueError, match='decisions is empty; leave it out'):
        samples((X, Y), decisions=tmp_path / 'd.csv')


def test_decisions_need_data_of_this_package():
    with pytest.raises(TypeError, match='data is a list; give ImageData, TextData, or what samples'):
        apply_decisions([dict(x=X, y=Y)], decided())


def test_decisions_about_a_regression_are_numbers():
    real = samples((X, X.sum(1)))
    table = decided(given=['a', 'b'])
    with pytest.raises(ValueError, match="given: 'a' is no finite number; labels of this data are numbers"):
        apply_decisions(real, table)


# labels that are counted from 1


@pytest.mark.parametrize(
    'source, options, told',
    [
        ((X, Y + 1), {}, r'labels are 1 to 3, so that 1 of 4 classes have no sample; use y - 1, or give classes='),
        (TensorDataset(X, Y + 1), {}, 'use y - 1'),
        ((X, Y * 2), {}, 'labels are 0 to 4, so that 2 of 5 classes have no sample; number them without gaps'),
        ((X, Y + 1), dict(classes=list('abcd')), None),
        ((X, Y), {}, None),
        (Rows(lambda i: (X[i], 3 + i % 3), classes=list('abcdef')), {}, None),
    ],
    ids=lambda v: None,
)
def test_empty_classes_are_told_once(source, options, told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        batches = samples(source, **options)
        list(batches.eval_view()), batches.y
    if told is None:
        assert not found
    else:
        with pytest.raises(ValueError, match=told):
            raise ValueError(str(found[0].message))
        assert len(found) == 1 and found[0].category is UserWarning


# parts and views

PARTS = {
    'too many': (lambda b: b.hold_out(N), ValueError, 'n is 12; give 1 to 11 of the 12 samples'),
    'none': (lambda b: b.hold_out(0), ValueError, 'n is 0; give 1 to 11'),
    'no number': (
        lambda b: b.hold_out('20%'),
        TypeError,
        "n is '20%'; give a number of samples, or a fraction",
    ),
    'more than all': (lambda b: b.hold_out(1.5), ValueError, 'n is 1.5; a fraction lies between 0 and 1'),
    'all': (lambda b: b.hold_out(1.0), ValueError, 'n is 1.0; a fraction lies between 0 and 1, such as 0.2: give'),
    'NaN': (lambda b: b.hold_out(float('nan')), ValueError, 'n is nan; a fraction'),
    'a fraction that is none': (lambda b: b.hold_out(0.01), ValueError, 'n is 0.01, which is 0 of 12 samples; give 1'),
    'a fraction that is all': (lambda b: b.hold_out(0.99), ValueError, 'n is 0.99, which is 12 of 12 samples; give 1'),
    'one sample': (lambda b: b.select([0]).hold_out(1), ValueError, 'n is 1, but there is one sample'),
    'seed': (lambda b: b.hold_out(3, seed=None), TypeError, 'seed is None'),
    'position too large': (
        lambda b: b.select([0, N]),
        IndexError,
        'positions are 0 to 12, but there are 12 samples',
    ),
    'negative position': (lambda b: b.select([-1]), IndexError, 'positions are -1'),
    'position twice': (lambda b: b.select([1, 1]), ValueError, '2 of them, 1 different; give each once'),
    'no position': (lambda b: b.select([]), ValueError, 'give whole numbers'),
    'mask of another length': (
        lambda b: b.select(torch.ones(3, dtype=torch.bool)),
        ValueError,
        r'or bool \(12,\)',
    ),
    'unknown index': (lambda b: b.view([3, 50]), ValueError, 'index 50 is not among these 12 samples'),
}


@pytest.mark.parametrize('case', PARTS)
def test_parts_that_are_none_are_refused(case):
    act, kind, message = PARTS[case]
    with pytest.raises(kind, match=message):
        act(samples(ROWS))


@pytest.mark.parametrize(
    'fields, kind', [(dict(kind='sound'), ValueError), (dict(kind='image'), ValueError)], ids=str
)
def test_views_of_unknown_kinds_are_refused(fields, kind):
    with pytest.raises(kind, match='kind is'):
        SampleView(0, **fields)


def test_good_data_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        train, val = samples(folder(tmp_path)).hold_out(2)
        distill(
            nn.Sequential(nn.Flatten(), nn.Linear(108, 2)),
            None,
            train,
            val,
            training=Training(epochs=1, progress=False),
        )


@pytest.mark.parametrize('kind', ['pair', 'table'])
def test_workers_without_anything_to_read_are_refused(kind):
    x, y = torch.randn(8, 2), torch.arange(8) % 2
    source = (x, y) if kind == 'pair' else [dict(a=float(r[0]), b=float(r[1]), label=int(c)) for r, c in zip(x, y)]
    assert len(samples(source).y) == 8
    with pytest.raises(ValueError, match='workers is given, but source is a set of numbers'):
        samples(source, workers=2)
