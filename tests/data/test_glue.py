"Tasks of GLUE: constants, splits, sources, errors."

import os

import pandas as pd
import pytest
import torch

from kd_aif.data.glue import GLUE, glue_task, load_glue

FOLDER = os.environ.get('KD_AIF_DATA')


@pytest.fixture
def root(tmp_path):
    "Three rows of every task and split, with the names of the hub"
    for name, task in GLUE.items():
        splits = ['train', 'validation']
        if name == 'mnli':
            splits = ['train', 'validation_matched', 'validation_mismatched']
        (tmp_path / 'glue' / name).mkdir(parents=True)
        for split in splits:
            rows = {c: [f'{split} {c} {k}' for k in range(3)] for c in task.columns}
            labels = [0.0, 2.5, 5.0] if task.is_regression else [0, 1, 1]
            frame = pd.DataFrame(dict(rows, label=labels, idx=range(3)))
            frame.to_parquet(tmp_path / 'glue' / name / f'{split}-00000-of-00001.parquet')
    return tmp_path


def test_the_nine_tasks():
    assert list(GLUE) == ['cola', 'sst2', 'mrpc', 'qqp', 'stsb', 'mnli', 'qnli', 'rte', 'wnli']
    assert [t.title for t in GLUE.values() if t.is_regression] == ['STS-B']
    assert {len(t.columns) for t in GLUE.values()} == {1, 2}
    assert glue_task('cola').metrics == ('matthews',)
    assert glue_task('stsb').metrics == ('pearson', 'spearman')
    assert glue_task('mnli').rows['test_mismatched'] == 9832
    with pytest.raises(ValueError, match="task='boolq' is not a task of GLUE"):
        glue_task('boolq')


@pytest.mark.parametrize('task', GLUE)
def test_a_task_from_files(root, task):
    found = GLUE[task]
    for split in found.rows:
        data = load_glue(task, split, root, progress=False)
        assert (data.name, data.split, data.classes) == (f'glue/{task}', split, found.classes)
        assert data.columns == found.columns and data.is_pair == (len(found.columns) == 2)
        assert data.note == f'{found.title}, partial'
        assert data.y.dtype == (torch.float32 if found.is_regression else torch.int64)
        official = {'train': 'train ', 'test': 'validation', 'test_mismatched': 'validation_mismatched'}[
            split
        ]
        first = data.texts[0][0] if data.is_pair else data.texts[0]
        assert first.startswith(official)


def test_splits_that_are_none(root):
    for split in 'validation', 'test_mismatched':
        with pytest.raises(ValueError, match="'test' is the official validation set"):
            load_glue('rte', split, root)
    with pytest.raises(ValueError, match="'test_mismatched'"):
        load_glue('mnli', 'validation', root)


def test_files_that_do_not_fit(root):
    path = root / 'glue' / 'rte' / 'train-00000-of-00001.parquet'
    good = pd.read_parquet(path)
    good.drop(columns='sentence2').to_parquet(path)
    with pytest.raises(ValueError, match='column sentence2 is missing'):
        load_glue('rte', root=root, progress=False)
    good.assign(label=[0, 2, 1]).to_parquet(path)
    with pytest.raises(ValueError, match='row 1: label 2 is not one of'):
        load_glue('rte', root=root, progress=False)
    good.assign(label=-1).to_parquet(path)
    with pytest.raises(ValueError, match='labels are missing'):
        load_glue('rte', root=root, progress=False)
    path.write_text('broken')
    with pytest.raises(ValueError, match='cannot be read'):
        load_glue('rte', root=root, progress=False)


def test_classes_in_another_order_are_refused(root):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(
        sentence1=datasets.Value('string'),
        sentence2=datasets.Value('string'),
        label=datasets.ClassLabel(names=['not_entailment', 'entailment']),
    )
    rows = dict(sentence1=['a'], sentence2=['b'], label=[0])
    path = root / 'glue' / 'rte' / 'train-00000-of-00001.parquet'
    datasets.Dataset.from_dict(rows, features).to_parquet(path)
    with pytest.raises(ValueError, match='the classes are not_entailment, entailment'):
        load_glue('rte', root=root, progress=False)


def test_without_files_and_without_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        raise ConnectionError('no network')

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    with pytest.raises(FileNotFoundError, match='Two ways to get it: put glue/mnli/validation_matched-'):
        load_glue('mnli', 'test', tmp_path, progress=False)
    assert asked == [(('nyu-mll/glue', 'mnli'), dict(split='validation_matched'))]
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        load_glue('mnli', 'test', tmp_path / 'nowhere', progress=False)


@pytest.mark.skipif(not FOLDER, reason='needs KD_AIF_DATA')
@pytest.mark.parametrize('task', GLUE)
def test_real_tasks(task):
    found = GLUE[task]
    if not os.path.isdir(os.path.join(FOLDER, 'glue', task)):
        pytest.skip(f'no {task} there')
    for split in 'train', 'test':
        data = load_glue(task, split, progress=False)
        assert (len(data) == found.rows[split]) == (not data.note)
        if found.is_regression:
            assert 0 <= data.y.min() and data.y.max() <= 5
        else:
            assert (data.y.bincount(minlength=data.n_classes) > 0).all()
