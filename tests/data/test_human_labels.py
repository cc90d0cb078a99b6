"Labels that people gave CIFAR-10: joined by row, refused where the rows are others; on real files where they are."

import os
from pathlib import Path

import pandas as pd
import pytest, torch
from kd_aif.data.human_labels import HUMAN_LABELS, human_noise
from kd_aif.data.images import ImageData, hold_out, subset
from kd_aif.data.sources import DATASETS, load_images
from kd_aif.experiments.task_data import describe_data, task_data
from kd_aif.experiments.tasks import make_task

CLASSES = DATASETS['cifar10'].classes
REAL = Path(os.environ.get('KD_AIF_DATA') or 'nowhere') / 'cifar10' / 'human-labels.parquet'
at_hand = pytest.mark.skipif(not REAL.exists(), reason='no human labels here')


def images(n=100, name='cifar10', split='train'):
    y, third = torch.arange(n) * 7 % 10, torch.full((3,), 0.5)
    x = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
    return ImageData(x, y, torch.arange(n), y, CLASSES, name, split, '', third, third)


def write(folder, y, **columns):
    "A file in which people take each class c for c + 1 in every fourth row, or with other columns"
    labels = torch.where(torch.arange(len(y)) % 4 == 0, (y + 1) % 10, y)
    known = dict.fromkeys(HUMAN_LABELS, labels.tolist()) | dict(clean_label=y.tolist()) | columns
    path = folder / 'cifar10' / 'human-labels.parquet'
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame({k: v for k, v in known.items() if v is not None}).astype('int8').to_parquet(path)
    return labels


def test_labels_follow_the_images_through_subset_and_hold_out(tmp_path):
    data = images()
    labels = write(tmp_path, data.y, worst=[(v + 3) % 10 for v in data.y.tolist()])
    train, val = hold_out(subset(data, 60, 3), 20, 3)
    noisy = human_noise(train, 'random2', tmp_path)
    assert torch.equal(noisy.y, labels[train.index]) and torch.equal(noisy.clean_y, train.y)
    assert torch.equal(noisy.index, train.index) and noisy.fingerprint != train.fingerprint
    assert noisy.fingerprint == human_noise(train, 'random2', tmp_path).fingerprint
    assert torch.equal(human_noise(train, 'worst', tmp_path).y, (train.y + 3) % 10), (
        'the column that is named'
    )
    assert not val.is_noisy.any()


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(clean_label=[0] * 100),
            'clean_label differs from the label of 90 of 100 images, first in row 1',
        ),
        (dict(worst=None), 'column worst is missing'),
        (dict(clean_label=None), 'column clean_label is missing'),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    write(tmp_path, images().y, **change)
    with pytest.raises(ValueError, match=message):
        human_noise(images(), 'worst', tmp_path)


def test_missing_and_broken_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='cifar-10-100n'):
        human_noise(images(), 'worst', tmp_path)
    write(tmp_path, images(50).y)
    with pytest.raises(ValueError, match='has 50 rows, but there is an image of row 99'):
        human_noise(images(), 'worst', tmp_path)
    (tmp_path / 'cifar10' / 'human-labels.parquet').write_bytes(b'PAR1')
    with pytest.raises(ValueError, match='cannot be read'):
        human_noise(images(), 'worst', tmp_path)
    monkeypatch.setenv('KD_AIF_DATA', str(tmp_path / 'other'))
    with pytest.raises(FileNotFoundError, match='KD_AIF_DATA'):
        human_noise(images(), 'worst')


@pytest.mark.parametrize(
    'data, name, message',
    [
        (images(name='digits'), 'worst', 'data is digits, train'),
        (images(split='test'), 'worst', 'data is cifar10, test'),
        (images(), 'best', "name is 'best'; use one of aggregate"),
        (images(), 0.4, 'name is 0.4'),
    ],
)
def test_other_images_and_names(tmp_path, data, name, message):
    with pytest.raises(ValueError, match=message):
        human_noise(data, name, tmp_path)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(noise='human'), 'rate is 0.0; with noise=.human. use one of aggregate, random1'),
        (dict(noise='human', rate=0.4), 'rate is 0.4'),
        (dict(noise='human', rate='best'), "rate is 'best'"),
        (dict(noise='symmetric', rate='worst'), 'give a number from 0 to 1'),
        (dict(rate='worst'), 'give a number from 0 to 1'),
        (dict(rate=0.4), 'give both'),
        (dict(noise='symmetric', rate=1.4), 'rate is 1.4'),
    ],
)
def test_kind_and_rate_of_a_task_belong_together(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task('cifar10', **settings)


def test_people_labelled_cifar10_alone():
    with pytest.raises(ValueError, match='people labelled cifar10 alone'):
        make_task('cifar100', noise='human', rate='worst')


@at_hand
def test_the_published_fractions_of_wrong_labels():
    data = load_images('cifar10', progress=False)
    wrong = {n: float(human_noise(data, n).is_noisy.float().mean()) for n in HUMAN_LABELS}
    expected = dict(aggregate=9.0, random1=17.2, random2=18.1, random3=17.6, worst=40.2)
    assert {n: round(100 * w, 1) for n, w in wrong.items()} == expected


@at_hand
def test_the_data_of_a_task_with_human_labels():
    task = make_task('cifar10', noise='human', rate='worst', n_train=2000, n_val=500)
    train, val, test = task_data(task, progress=False)
    assert 0.36 < float(train.is_noisy.float().mean()) < 0.45, 'a sample of 1,500 from 40.2 %'
    assert not val.is_noisy.any() and not test.is_noisy.any()
    assert describe_data(task, train, val, test)['noise'] == dict(kind='human', rate='worst')
