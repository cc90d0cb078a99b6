"Texts from files, tables and lists: what is read, what a label is, what is refused."

import json

import numpy as np
import pandas as pd
import pytest
import torch

from kd_aif.data.sample_labels import column_labels
from kd_aif.data.samples import samples
from kd_aif.data.text_batches import text_batches
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
        ('a.csv', '', 'the file .*a.csv is empty; give a header'),
        ('a.tsv', '\n\n', 'the file .*a.tsv is empty; give a header'),
        (
            'a.json',
            '{"text": ["x", "y"], "label": [0]}',
            "a.json: column 'label' has 1 values, column 'text' has 2",
        ),
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


UNCLEAR_CLASSES = {
    'set': {'x', 'y', 'z'},
    'dictionary': {0: 'neg', 1: 'pos'},
    'number': 2,
    'string': 'ab',
    'nested': [['a'], ['b']],
    'rows of an array': np.array([['a', 'b']]),
    'None among them': ['a', None],
}


@pytest.mark.parametrize('kind', UNCLEAR_CLASSES)
def test_classes_without_an_order_are_refused_alike(kind, words):
    classes, source = UNCLEAR_CLASSES[kind], (['1', '2', '3'], ['a', 'b', 'a'])
    read = [
        lambda: read_texts(source, classes=classes),
        lambda: text_batches(source, words(), classes=classes),
        lambda: samples(source, tokenizer=words(), classes=classes),
        lambda: samples((torch.randn(2, 3), [0, 1]), classes=classes),
    ]
    said = set()
    for call in read:
        with pytest.raises(TypeError, match='classes .*give a list of names in the order of the labels') as e:
            call()
        said.add(str(e.value))
    assert len(said) == 1


def test_lists_of_every_kind_are_classes():
    labels = lists(['b', 'a', 'b'])
    for classes in (
        ['b', 'a'],
        ('b', 'a'),
        np.array(['b', 'a']),
        pd.Series(['b', 'a']),
        {1: 'b', 2: 'a'}.values(),
    ):
        assert read_texts(labels, classes=classes).y.tolist() == [0, 1, 0]


def test_a_data_set_with_a_format_gives_the_same_texts():
    datasets = pytest.importorskip('datasets')
    table = datasets.Dataset.from_dict(dict(text=['x', 'y', 'z'], label=[1, 0, 1]))
    plain = read_texts(table)
    for name in 'torch', 'numpy', 'arrow', 'pandas':
        assert read_texts(table.with_format(name)).fingerprint == plain.fingerprint
    assert read_texts(table.with_format('torch', columns=['label'])).fingerprint == plain.fingerprint
    own = table.with_transform(lambda batch: {k: [2 * v for v in values] for k, values in batch.items()})
    assert read_texts(own).texts == ('xx', 'yy', 'zz')


@pytest.mark.parametrize(
    'options, kind, says',
    [
        (dict(text='label'), ValueError, "text='label' and label='label' name the same column"),
        (dict(text=('text', 'label')), ValueError, 'name the same column'),
        (dict(text=('text', 'text')), ValueError, r"text=\('text', 'text'\) names a column twice"),
        (dict(text=3), ValueError, 'there is no column 3; the columns are text, label'),
        (dict(text={'text', 'label'}), TypeError, 'text is {.*, a set; give the name of a column'),
        (dict(text=('text', None)), TypeError, 'text is None, a NoneType; give the name of a column'),
        (dict(label=None), TypeError, 'label is None, a NoneType; give the name of a column'),
        (dict(label=['label']), TypeError, r"label is \['label'\], a list; give the name of a column"),
    ],
)
def test_names_that_are_no_columns(options, kind, says):
    frame = pd.DataFrame(dict(text=['x', 'y'], label=['p', 'q']))
    for source in frame, frame.to_dict('records'), (['x', 'y'], ['p', 'q']):
        with pytest.raises(kind, match=says):
            read_texts(source, **options)


def test_columns_with_numbers_for_names(words):
    frame = pd.DataFrame({0: ['1', '2', '3'], 1: ['p', 'q', 'p']})
    assert read_texts(frame, 0, 1).texts == ('1', '2', '3')
    assert samples(frame, tokenizer=words(), text=0, label=1).y.tolist() == [0, 1, 0]
    assert samples(frame[[1, 0]].set_axis([0, 1], axis=1), tokenizer=words(), text=1, label=0).classes == (
        'p',
        'q',
    )
    with pytest.raises(ValueError, match="there is no column 'label'; the columns are 0, 1"):
        read_texts(frame, 0)
    with pytest.raises(ValueError, match="there is no column 'text'"):
        samples(frame, tokenizer=words(), text='text', label=1)
    numbers = pd.DataFrame({0: [0.5, 1.5, 0.1], 1: [2.5, 0.5, 1.0], 2: ['p', 'q', 'p']})
    assert len(samples(numbers, label=2, inputs=0)) == len(samples(numbers, label=2)) == 1
    with pytest.raises(TypeError, match=r"label is \[2\], a list; give the name of a column"):
        samples(numbers, label=[2])


@pytest.mark.parametrize('word', ['NaN', 'nan', 'N/A', '#N/A', ' n/a ', '<NA>'])
def test_words_for_a_missing_label(word, words):
    texts, labels = ['1', '2', '3'], ['pos', word, 'neg']
    for read in read_texts, lambda source: samples(source, tokenizer=words()):
        with pytest.raises(
            ValueError, match='row 1: the label .* leave such rows out, .*or list .* in classes='
        ):
            read((texts, labels))
    with pytest.raises(ValueError, match='labels: row 1: the label'):
        column_labels('labels', labels)
    assert read_texts((texts, labels), classes=('neg', word, 'pos')).y.tolist() == [2, 1, 0]
    assert read_texts((texts, ['NA', 'none', 'null'])).classes == ('NA', 'none', 'null')
    with pytest.raises(ValueError, match='1 of 3 labels are missing .* row 1'):
        read_texts((texts, ['pos', None, 'neg']))


def test_two_pairs_of_strings_have_two_meanings():
    rows = [('good film', 'pos'), ('bad film', 'neg')]
    with pytest.raises(
        ValueError, match=r'may be two rows \(text, label\), or two texts and their two labels'
    ):
        read_texts(rows)
    assert read_texts(tuple(map(list, zip(*rows)))).texts == ('good film', 'bad film')
    assert read_texts([['good film', 'bad film'], ['pos', 'neg']]).classes == ('neg', 'pos')
