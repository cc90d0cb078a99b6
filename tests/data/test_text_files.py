"Texts from files, tables and lists: what is read, what a label is, what is refused."

import json

import numpy as np
import pandas as pd
import pytest
import torch

from kd_aif.data.text_files import read_texts

TEXTS = ['n/a', 'null', 'a "quoted", word', 'two\nlines', 'NaN', 'last\u2028one']
LABELS = ['b', 'a', 'b', 'c', 'a', 'b']
ROWS = [dict(text=t, label=v) for t, v in zip(TEXTS, LABELS)]


def lists(labels):
    return [f'text {k}' for k in range(len(labels))], labels


@pytest.mark.parametrize('kind', ['csv', 'json', 'jsonl', 'parquet', 'columns.json'])
def test_every_kind_of_file_gives_the_same_set(tmp_path, kind):
    path, frame = tmp_path / f'films.{kind}', pd.DataFrame(ROWS)
    writers = {
        'csv': lambda: frame.to_csv(path, index=False),
        'json': lambda: path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding='utf-8'),
        'jsonl': lambda: path.write_text(
            '\n'.join(json.dumps(r, ensure_ascii=False) for r in ROWS), encoding='utf-8'
        ),
        'parquet': lambda: frame.to_parquet(path),
        'columns.json': lambda: path.write_text(json.dumps(frame.to_dict('list')), encoding='utf-8'),
    }
    writers[kind]()
    data = read_texts(path)
    assert data.texts == tuple(TEXTS)
    assert (data.classes, data.y.tolist()) == (('a', 'b', 'c'), [1, 0, 1, 2, 0, 1])
    assert (data.name, data.split, data.columns) == (path.stem, 'train', ('text',))
    assert data.index.tolist() == list(range(6))
    assert data.fingerprint == read_texts(ROWS).fingerprint == read_texts(frame).fingerprint


def test_tab_separated(tmp_path):
    path = tmp_path / 'a.tsv'
    path.write_text('sentence1\tsentence2\tlabel\na b\tc, d\t0.5\ne\tf\t1\n', encoding='utf-8')
    data = read_texts(str(path))
    assert data.texts == (('a b', 'c, d'), ('e', 'f')) and data.y.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    'name, content, says',
    [
        ('a.csv', 'text,label\nx,1\ny,1,2\n', 'row 1 has 3 values, the header has 2'),
        ('a.csv', 'text,label\n"x" y,1\n', 'save it as UTF-8'),
        ('a.csv', 'text,text\nx,1\n', 'names a column twice'),
        ('a.csv', 'text,label\n', 'no rows'),
        ('a.csv', '', "there is no column 'label'"),
        ('a.csv', b'text,label\n\xff,1\n', 'save it as UTF-8'),
        ('a.tsv', 'text\tlabel\n"x\t1\ny"\t1\n', 'quoting=3'),
        ('a.json', '[{"text": "x"', 'list of objects'),
        ('a.json', '3', 'holds a int'),
        ('a.jsonl', '{"text": "x", "label": 1}\n{"text": "y"}\n', "row 1 has no 'label'"),
        ('a.jsonl', '{"text": "x", "label": 1}\n3\n', 'row 1 is a int'),
        ('a.parquet', 'nothing', 'cannot be read'),
        ('a.xlsx', 'nothing', "ends in '.xlsx'"),
    ],
)
def test_broken_files(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        read_texts(path)


@pytest.mark.parametrize(
    'labels, y, classes',
    [
        ([1, 0, 2], [1, 0, 2], ('0', '1', '2')),
        ([10, 9, 10], [1, 0, 1], ('9', '10')),
        ([0, 2, 2], [0, 1, 1], ('0', '2')),
        ([-1, 1, 1], [0, 1, 1], ('-1', '1')),
        ([1.0, 0.0, 1.0], [1, 0, 1], ('0', '1')),
        ([True, False, True], [1, 0, 1], ('False', 'True')),
        (['x', 'B', 'x'], [1, 0, 1], ('B', 'x')),
        (['10', '9', '10'], [1, 0, 1], ('9', '10')),
        (np.array([1, 0, 1]), [1, 0, 1], ('0', '1')),
        (torch.tensor([1, 0, 1]), [1, 0, 1], ('0', '1')),
        (pd.Series([1, 0, 1]), [1, 0, 1], ('0', '1')),
    ],
)
def test_labels_of_classes(labels, y, classes):
    data = read_texts(lists(labels))
    assert (data.y.tolist(), data.classes, data.y.dtype) == (y, classes, torch.int64)


def test_labels_of_a_regression():
    for labels in [0.5, 2, 3], ['0.5', '2', '3'], np.array([0.5, 2, 3]):
        data = read_texts(lists(labels))
        assert (data.y.dtype, data.y.tolist(), data.classes) == (torch.float32, [0.5, 2.0, 3.0], ())
    assert read_texts(lists([1, 2, 3]), classes=()).y.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match='the labels are names'):
        read_texts(lists(['a', 'b', 'a']), classes=())


@pytest.mark.parametrize(
    'labels, classes, y',
    [
        (['b', 'a', 'b'], ('b', 'a', 'c'), [0, 1, 0]),
        ([1, 0, 1], ('no', 'yes'), [1, 0, 1]),
        (['1', '0', '1'], ('no', 'yes'), [1, 0, 1]),
        ([1.0, 2.0, 1.0], ('1', '2', '3'), [0, 1, 0]),
        (['1.0', '2.0', '1.0'], ('1', '2', '3'), [0, 1, 0]),
        ([1, 2, 1], (3, 2, 1), [2, 1, 2]),
        (['01', '02', '01'], ('01', '02'), [0, 1, 0]),
        ([True, False, True], ('False', 'True'), [1, 0, 1]),
    ],
)
def test_given_classes_fix_names_and_order(labels, classes, y):
    data = read_texts(lists(labels), classes=classes)
    assert (data.y.tolist(), data.classes) == (y, tuple(map(str, classes)))


@pytest.mark.parametrize(
    'labels, classes, says',
    [
        (['a', 'x', 'a'], ('a', 'b'), "row 1: label 'x' is not one of"),
        ([0, 1, 2], ('no', 'yes'), 'row 2: label 2 is not'),
        ([0, 1, 2], ('1', '2', '3'), 'row 0: label 0 is not'),
        ([0, 0.5, 1], ('no', 'yes'), 'is not one of'),
        (['a', 'b', 'a'], ('a', 'a'), 'different names'),
        (['a', 'b', 'a'], 'ab', 'different names'),
    ],
)
def test_labels_outside_of_the_given_classes(labels, classes, says):
    with pytest.raises(ValueError, match=says):
        read_texts(lists(labels), classes=classes)


@pytest.mark.parametrize(
    'labels, says',
    [
        ([1, None, 0], '1 of 3 labels are missing .* row 1'),
        ([1.0, 0.5, float('nan')], '1 of 3 labels are missing .* row 2'),
        (['a', '', ' '], '2 of 3 labels are missing .* row 1'),
        ([pd.NA, 'a', 'b'], '1 of 3 labels are missing .* row 0'),
        ([-1, -1, -1], '3 of 3 labels are missing .* no labels'),
        ([-1.0, -1.0, -1.0], '3 of 3 labels are missing'),
        ([0.5, float('inf'), 1], 'row 1: label inf is not finite'),
        ([[0], [1], [0]], r'row 0: label \[0\] is a list'),
        ([0, 1], None),
    ],
)
def test_labels_that_are_none(labels, says):
    texts = ['a', 'b', 'c']
    with pytest.raises(ValueError, match=says or '3 texts and 2 labels'):
        read_texts((texts, labels))


@pytest.mark.parametrize(
    'columns, found',
    [
        (['text', 'label'], ('text',)),
        (['sentence', 'label', 'idx'], ('sentence',)),
        (['question', 'sentence', 'label'], ('question', 'sentence')),
        (['sentence1', 'sentence2', 'label'], ('sentence1', 'sentence2')),
        (['premise', 'hypothesis', 'label'], ('premise', 'hypothesis')),
        (['question1', 'question2', 'label'], ('question1', 'question2')),
        (['review', 'label'], None),
        (['text', 'sentence', 'label'], None),
        (['text', 'premise', 'hypothesis', 'label'], None),
        (['text'], None),
    ],
)
def test_usual_columns(columns, found):
    frame = pd.DataFrame({c: [f'{c} 0', f'{c} 1'] for c in columns})
    if found:
        data = read_texts(frame)
        assert data.columns == found and data.is_pair == (len(found) == 2)
    else:
        with pytest.raises(ValueError, match=f'the columns are {", ".join(columns)}'):
            read_texts(frame)


def test_named_columns():
    frame = pd.DataFrame(dict(a=['x', 'y'], b=['z', 'w'], label=[0, 1], mark=['p', 'q']))
    assert read_texts(frame, 'b', 'mark').texts == ('z', 'w')
    assert read_texts(frame, ('b', 'a')).texts == (('z', 'x'), ('w', 'y'))
    for text in ('a', 'b', 'mark'), (), 'c':
        with pytest.raises(ValueError, match='the columns are a, b, label, mark'):
            read_texts(frame, text)
    frame.columns = ['a', 'a', 'label', 'mark']
    with pytest.raises(ValueError, match='names a column twice'):
        read_texts(frame, 'a')


@pytest.mark.parametrize('value', [None, float('nan'), 3, pd.NA, ['x']])
def test_a_text_must_be_a_string(value):
    with pytest.raises(
        ValueError, match="row 1: the text in column 'text' is .*not a string; fill it or leave"
    ):
        read_texts((['a', value, 'c'], [0, 1, 0]))


def test_empty_texts_and_pairs_that_are_none():
    with pytest.raises(ValueError, match='1 of 2 are empty or white space, the first is number 1'):
        read_texts((['a', ''], [0, 1]))
    with pytest.raises(ValueError, match='text 1 is .* must be a pair'):
        read_texts(([('a', 'b'), ('c',)], [0, 1]))


def test_sources_that_are_none():
    for source in 3, None, ['a', 'b', 'c'], {'a': 1}, []:
        with pytest.raises(TypeError, match='source is a'):
            read_texts(source)
    with pytest.raises(FileNotFoundError, match='is not a file'):
        read_texts('nowhere.csv')
    with pytest.raises(ValueError, match='no rows'):
        read_texts(([], []))


def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(
        sentence=datasets.Value('string'), label=datasets.ClassLabel(names=['good', 'bad'])
    )
    table = datasets.Dataset.from_dict(dict(sentence=['x', 'y', 'z'], label=[1, 0, 1]), features)
    table.to_parquet(tmp_path / 'set.parquet')
    for source in table, tmp_path / 'set.parquet':
        data = read_texts(source)
        assert (data.classes, data.y.tolist()) == (('good', 'bad'), [1, 0, 1])
    assert read_texts(table, classes=('bad', 'good')).y.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="label 'bad' is not one of"):
        read_texts(table, classes=('good', 'poor'))
    unlabelled = datasets.Dataset.from_dict(dict(sentence=['x', 'y'], label=[1, -1]), features)
    with pytest.raises(ValueError, match='1 of 2 labels are missing .* row 1'):
        read_texts(unlabelled)
    with pytest.raises(TypeError, match='one split'):
        read_texts(datasets.DatasetDict(train=table))
