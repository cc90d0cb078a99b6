"Decisions find the sample that they are about, also after the data have changed, or are refused"

import made_rows
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from kd_aif import samples
from kd_aif.data.decisions import apply_decisions
from kd_aif.data.sample_marks import path_mark, same_mark, sample_marks, text_mark
from kd_aif.data.sources import load_images
from kd_aif.data.text_files import read_texts

N = 6
X, Y = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 2


def pictures(root):
    for i in range(N):
        (root / 'ab'[i // 3]).mkdir(exist_ok=True)
        Image.new('RGB', (6, 6), (9 * i, 0, 0)).save(root / 'ab'[i // 3] / f'{i}.png')
    return root


def listed(root):
    pictures(root)
    files = [f'{"ab"[i // 3]}/{i}.png' for i in range(N)]
    pd.DataFrame(dict(file=files, label=list('aaabbb'))).to_csv(root / 'list.csv', index=False)
    return root / 'list.csv'


def numbers(root):
    frame = pd.DataFrame(dict(p=X[:, 0].numpy(), q=X[:, 1].numpy(), label=list('aaabbb')))
    frame.to_csv(root / 'numbers.csv', index=False)
    return root / 'numbers.csv'


def hub(root):
    datasets = pytest.importorskip('datasets')
    images = [Image.new('RGB', (6, 6), (9 * i, 0, 0)) for i in range(N)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    return datasets.Dataset.from_dict(dict(image=images, label=[0, 0, 0, 1, 1, 1]), features)


LABELS = [0, 0, 0, 1, 1, 1]
Rows = made_rows.Rows


def pair(i):
    return X[i], LABELS[i]


# each: (all samples, those without the first one, column)
KINDS = {
    'folder': (lambda root: samples(pictures(root)),
        lambda root: (root / 'a' / '0.png').unlink() or samples(root), 'path'),
    'CSV of paths': (lambda root: samples(listed(root)),
        lambda root: pd.read_csv(root / 'list.csv')[1:].to_csv(root / 'list.csv', index=False)
            or samples(root / 'list.csv'), 'path'),
    'CSV of numbers': (lambda root: samples(numbers(root)),
        lambda root: pd.read_csv(root / 'numbers.csv')[1:].to_csv(root / 'numbers.csv', index=False)
            or samples(root / 'numbers.csv'), 'sample'),
    'texts': (lambda root: read_texts(([str(i) for i in range(N)], LABELS)),
        lambda root: read_texts(([str(i) for i in range(1, N)], LABELS[1:])), 'sample'),
    'arrays': (lambda root: samples((X.numpy(), LABELS)),
        lambda root: samples((X[1:].numpy(), LABELS[1:])), 'sample'),
    'arrays with transforms': (lambda root: samples((X, LABELS), transform=(lambda x: x + torch.rand(3), None)),
        lambda root: samples((X[1:], LABELS[1:]), transform=torch.nn.functional.relu), 'sample'),
    'data set': (lambda root: samples(Rows(pair, n=N)),
        lambda root: samples(TensorDataset(X[1:], torch.tensor(LABELS[1:]))), 'sample'),
    'pictures of a data set': (
        lambda root: samples(Rows(lambda i: (Image.new('RGB', (6, 6), (9 * i, 0, 0)), LABELS[i]), n=N), size=4),
        lambda root: samples(Rows(lambda i: (Image.new('RGB', (6, 6), (9 + 9 * i, 0, 0)), LABELS[i + 1]),
            n=N - 1), size=8), 'sample'),
    'pictures of the hub': (lambda root: samples(hub(root)),
        lambda root: samples(hub(root).select(range(1, N))), 'sample'),
}  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_a_decision_about_one_sample_never_meets_another(kind, tmp_path):
    whole, without_first, column = KINDS[kind]
    batches = whole(tmp_path)
    name, marks = sample_marks(batches, [1])
    classes = batches.classes
    table = pd.DataFrame(dict(index=[1], decision=['drop'], given=[classes[0]], label=[''], **{name: marks}))
    assert name == column and apply_decisions(batches, table).index.tolist() == [0, 2, 3, 4, 5]
    table.to_csv(tmp_path.parent / f'{tmp_path.name}.csv', index=False)
    other = without_first(tmp_path)
    assert len(other.y) == N - 1 and other.y[1] == 0
    for decisions in (table, tmp_path.parent / f'{tmp_path.name}.csv'):
        with pytest.raises(
            ValueError, match=rf'row 0 \(index 1\) is about {column} .*but the sample .* now is'
        ):
            apply_decisions(other, decisions)
    assert apply_decisions(other, table.assign(index=0)).index.tolist() == [1, 2, 3, 4]
    assert apply_decisions(other, table.drop(columns=name)).index.tolist() == [0, 2, 3, 4]  # old files


def test_images_in_memory():
    data = load_images(progress=False)
    column, marks = sample_marks(data, data.index[:2].tolist())
    given = [data.classes[y] for y in data.y[:2].tolist()]
    table = pd.DataFrame(
        dict(index=data.index[:2].tolist(), decision='drop', given=given, label='', sample=marks)
    )
    assert column == 'sample' and len(apply_decisions(data, table)) == len(data) - 2
    with pytest.raises(ValueError, match='row 1 .* is about sample'):
        apply_decisions(data, table.assign(sample=[marks[0], marks[0]]))


ROW = dict(index=[1], decision=['drop'], given=['a'], label=[''])
WRONG = {
    'another path': (
        dict(path=['b/1.png']),
        "row 0 .* is about path 'b/1.png', but .* now is 'a/1.png'.*put the files",
    ),
    'no path': (dict(path=[None], sample=['x']), "names samples by the column 'sample', which this data does not"),
    'a hash': (dict(sample=['h12']), "column 'sample', which this data does not have .*it has 'path'.*remove the col"),
    'one path missing': (
        dict(index=[1, 2], decision='drop', given='a', label='', path=['a/1.png', '']), r'row 1 \(index 2\) is about no'
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_rows_about_other_files_are_refused(case, tmp_path):
    columns, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        samples(pictures(tmp_path), decisions=pd.DataFrame(ROW | columns))


@pytest.mark.parametrize('path', ['a/1.png', r'a\1.png', '/old/place/a/1.png', r'C:\photos\a\1.png'])
def test_the_folder_may_have_moved(path, tmp_path):
    assert (
        1 not in samples(pictures(tmp_path), decisions=pd.DataFrame(ROW | dict(path=[path]))).index.tolist()
    )


def test_a_data_set_that_augments_has_no_marks():
    made = samples(Rows(lambda i: (X[i] + torch.rand(3), LABELS[i]), n=N))
    assert sample_marks(made, [0]) is None
    table = pd.DataFrame(ROW | dict(given=['0'], sample=['h1']))
    with pytest.raises(ValueError, match='its samples change, or cannot be compared'):
        apply_decisions(made, table)


def test_marks_tell_contents_apart():
    texts = read_texts(([('a', 'b'), ('a', 'c')], [0, 1]))
    one, two = sample_marks(texts, [0, 1])[1]
    assert one != two and one == text_mark(('a', 'b')) == text_mark('a\nb') and one[0] == 'h'
    assert text_mark('\ud800') == text_mark('\ufffd')
    assert path_mark('a\\b\udcff.png') == 'a/b\ufffd.png'
    assert not same_mark('path', 'xa/1.png', 'a/1.png')
    flat = samples((np.arange(12.0).reshape(2, 6), [0, 1]))
    square = samples((np.arange(12.0).reshape(2, 2, 3), [0, 1]))
    assert sample_marks(flat, [0]) != sample_marks(square, [0])
