"Labels that look like numbers keep their names, are numbers, or are refused; never two of them become one class"

import made_rows
import numpy as np
import pandas as pd
import pytest
import torch

from kd_aif import samples
from kd_aif.data.text_files import read_texts
from kd_aif.data.written_labels import label_numbers

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))


def from_file(labels, root, words, **options):
    rows = ''.join(f'{i}.5,{i % 2},"{label}"\n' for i, label in enumerate(labels))
    (root / 't.csv').write_text('a,b,label\n' + rows)
    return samples(root / 't.csv', inputs=('a', 'b'), **options)


def from_texts(labels, root, words, **options):
    return samples((list(map(str, range(len(labels)))), labels), tokenizer=words(), **options)


def from_arrays(labels, root, words, **options):
    return samples((X[: len(labels)], np.array(labels)), **options)


def from_dataset(labels, root, words, **options):
    return samples(made_rows.Rows(lambda i: (X[i], labels[i]), n=len(labels)), **options)


WAYS = from_file, from_texts, from_arrays, from_dataset


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    'labels, classes',
    [
        (['1_0', '10', '01', '1'], ('01', '1', '10', '1_0')),
        (['007', '7', '008'], ('007', '008', '7')),
        (['+1', '1', '2'], ('+1', '1', '2')),
        (['1e3', '1000', '5'], ('1000', '1e3', '5')),
        (['10', '9', '-1'], ('-1', '9', '10')),
        (['1.0', '2.0', '1.0'], ('1', '2')),
        (['9007199254740993', '9007199254740992', '1'], ('1', '9007199254740992', '9007199254740993')),
        (['1' + '0' * 400, '2', '2'], ('2', '1' + '0' * 400)),
        (['nano', 'a', 'inf'], ('a', 'inf', 'nano')),
    ],
)
def test_no_two_names_become_one_class(way, labels, classes, tmp_path, words):
    batches = way(labels, tmp_path, words)
    named = [batches.classes[y] for y in batches.y.tolist()]
    assert batches.classes == classes and named == [name.removesuffix('.0') for name in labels]


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    'labels, message',
    [
        (
            ['2.10', '2.1', '3.1'],
            r"'2.10' \(row 0\) and '2.1' \(row 1\) are two ways to write one number; give classes=\(\)",
        ),
        (['1.0', '2', '1'], r"'1.0' \(row 0\) and '1' \(row 2\) are two ways"),
        (['0,5', '1,25', '2'], 'labels have a decimal comma; write them with a point'),
        (['0.5', 'nan', '1'], "row 1: label 'nan' is not finite"),
        (['1', '-inf', '2'], "row 1: label '-inf' is not finite"),
        (['Good', 'good ', 'bad'], "'Good' and 'good ' differ in case or spaces alone; rename one"),
        ([' 1', '1', '2'], "' 1' and '1' differ in case or spaces alone"),
    ],
)  # fmt: skip
def test_labels_that_are_not_clear(way, labels, message, tmp_path, words):
    with pytest.raises(ValueError, match=message):
        way(labels, tmp_path, words)


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_what_the_user_says_is_kept(way, tmp_path, words):
    named = way(['2.10', '2.1', '3.1'], tmp_path, words, classes=('2.1', '2.10', '3.1'))
    assert named.y.tolist() == [1, 0, 2]
    both = way(['Good', 'good ', 'bad'], tmp_path, words, classes=('Good', 'good ', 'bad'))
    assert both.y.tolist() == [0, 1, 2]
    number = way(['2.10', '2.1', '3.1'], tmp_path, words, classes=())
    assert number.y.tolist() == pytest.approx([2.1, 2.1, 3.1])
    real = way(['0.5', '2', '1e-3'], tmp_path, words)
    assert real.classes == () and real.y.tolist() == pytest.approx([0.5, 2, 0.001])
    with pytest.raises(ValueError, match="label '01' is not one of"):
        way(['1', '01', '2'], tmp_path, words, classes=('1', '2'))
    with pytest.raises(ValueError, match="label '1' is not one of"):
        way(['1', '1', '0'], tmp_path, words, classes=('01', '02'))


@pytest.mark.parametrize('labels', [['Cat', 'cat'], ['a ', 'a']])
def test_names_of_frames_data_sets_and_hub(labels, tmp_path, words):
    message = 'differ in case or spaces alone'
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(text=datasets.Value('string'), label=datasets.ClassLabel(names=labels))
    hub = datasets.Dataset.from_dict(dict(text=['x', 'y'], label=[0, 1]), features)
    listed = made_rows.Rows(lambda i: (X[i], i), n=2, classes=labels)
    for read in (
        lambda: samples(pd.DataFrame(dict(p=[0.5, 2], label=labels))),
        lambda: samples(pd.DataFrame(dict(text=['x', 'y'], label=labels)), tokenizer=words()),
        lambda: samples(hub, tokenizer=words()),
        lambda: samples(listed),
        lambda: read_texts((['x', 'y'], labels)),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_numbers_and_texts_in_one_column():
    assert label_numbers([1, '2', 3.0]) == [1, 2, 3] and label_numbers([1.5, '2']) == [1.5, 2.0]
    assert label_numbers([True, '1']) is None and label_numbers([1, '01']) is None
