"The container of labelled texts: checks, parts, noise."

from dataclasses import replace

import pytest
import torch

from kd_aif.data.images import hold_out, subset
from kd_aif.data.label_noise import (
    asymmetric_noise,
    corrupt,
    instance_noise,
    long_tail,
    shuffled_noise,
    symmetric_noise,
)
from kd_aif.data.texts import TextData

N = 60
TEXTS = tuple(f'text {i}' for i in range(N))


@pytest.fixture
def classes():
    y = torch.arange(N) % 3
    return TextData(TEXTS, y, torch.arange(N) + 100, y, ('a', 'b', 'c'), 'set', 'train', 'made up')


@pytest.fixture
def numbers():
    y = torch.linspace(0, 5, N)
    pairs = tuple(zip(TEXTS, TEXTS[::-1]))
    return TextData(pairs, y, torch.arange(N), y, (), 'similar', 'train', 'made up')


def test_kind_of_labels_and_of_texts(classes, numbers):
    assert (classes.n_classes, classes.is_regression, classes.is_pair) == (3, False, False)
    assert (numbers.n_classes, numbers.is_regression, numbers.is_pair) == (1, True, True)


def test_a_selection_keeps_what_belongs_together(classes):
    some = classes.select([4, 1])
    assert (some.texts, some.index.tolist(), some.y.tolist()) == (('text 4', 'text 1'), [104, 101], [1, 1])
    assert some.fingerprint == classes.select(torch.tensor([4, 1])).fingerprint
    assert some.fingerprint != classes.select([1, 4]).fingerprint
    with pytest.raises(IndexError):
        classes.select([N])
    assert len(classes.select([])) == 0


def test_splits_and_subsets_of_both_kinds(classes, numbers):
    rest, held = hold_out(classes, 12, seed=1)
    assert held.y.bincount().tolist() == [4, 4, 4]
    assert sorted([*rest.index.tolist(), *held.index.tolist()]) == classes.index.tolist()
    rest, held = hold_out(numbers, 12, seed=1)
    assert (len(rest), len(held), held.y.dtype) == (N - 12, 12, torch.float32)
    assert len(subset(numbers, 7, seed=0)) == 7
    assert all(held.texts[k] == numbers.texts[i] for k, i in enumerate(held.index.tolist()))


def test_noise_leaves_texts_and_clean_labels_alone(classes):
    for noisy in symmetric_noise(classes, 0.5, 0), asymmetric_noise(classes, 0.5, 0):
        assert noisy.texts == classes.texts and torch.equal(noisy.clean_y, classes.y)
        assert 0 < noisy.is_noisy.sum() <= N / 2 and noisy.fingerprint != classes.fingerprint
    kept = long_tail(classes, 4, 0)
    assert kept.y.bincount().tolist() == [20, 10, 5]


def test_shuffled_labels_are_permuted_among_the_chosen(numbers):
    noisy = shuffled_noise(numbers, 0.5, seed=3)
    assert torch.equal(noisy.y.sort().values, numbers.y)
    assert torch.equal(noisy.clean_y, numbers.y)
    assert N / 2 - 6 < noisy.is_noisy.sum() <= N / 2
    assert torch.equal(noisy.y, shuffled_noise(numbers, 0.5, seed=3).y)
    assert not torch.equal(noisy.y, shuffled_noise(numbers, 0.5, seed=4).y)
    assert not shuffled_noise(numbers, 0, seed=3).is_noisy.any()
    everyone = shuffled_noise(numbers, 1, seed=3)
    assert everyone.is_noisy.sum() > N - 6
    with pytest.raises(ValueError, match='rate'):
        shuffled_noise(numbers, 30, seed=3)


@pytest.mark.parametrize(
    'noise',
    [
        lambda d: symmetric_noise(d, 0.5, 0),
        lambda d: asymmetric_noise(d, 0.5, 0),
        lambda d: instance_noise(d, 0.5, torch.ones(N, 1), 0),
        lambda d: long_tail(d, 4, 0),
    ],
)
def test_noise_for_classes_is_refused_for_numbers(numbers, noise):
    with pytest.raises(ValueError, match='use shuffled_noise'):
        noise(numbers)


def test_pixels_of_texts_cannot_be_changed(classes):
    with pytest.raises(TypeError, match='data is a TextData'):
        corrupt(classes, 0.5, 0)


def test_display(classes, numbers):
    assert '| 20 | 20 | 20 |' in classes._repr_markdown_()
    assert '60 pairs of texts, labels are numbers' in repr(numbers)
    assert 'from 0 to 5, mean 2.5' in numbers._repr_markdown_()
    assert '% of the labels wrong' in repr(symmetric_noise(classes, 0.5, 0))
    assert repr(replace(classes, note='Set, partial')).startswith('Set, partial, train')
    assert repr(classes.select([])) == classes.select([])._repr_markdown_()


@pytest.mark.parametrize(
    'changes, error, says',
    [
        (dict(texts=('', *TEXTS[1:])), ValueError, '1 of 60 are empty or white space, the first is number 0'),
        (dict(texts=(*TEXTS[:2], ' ', '\n\t', *TEXTS[4:])), ValueError, '2 of 60 .* number 2; fill them'),
        (dict(texts=(*TEXTS[:-1], 3)), TypeError, 'number 59 is 3; .* must be a string'),
        (dict(texts=(*TEXTS[:-1], ('a', 'b'))), TypeError, r"number 59 is \('a', 'b'\)"),
        (dict(texts=(('a', 'b'), *TEXTS[1:])), TypeError, 'must be a pair'),
        (dict(texts=(('a', 'b', 'c'),) * N), TypeError, 'must be a pair'),
        (dict(texts=(('a', ' '),) * N), ValueError, '60 of 60 are empty'),
        (dict(texts=list(TEXTS)), TypeError, 'give a tuple'),
        (dict(texts=TEXTS[:3]), ValueError, r'give torch.int64 of shape \(3,\)'),
        (dict(y=torch.arange(N)), ValueError, 'with 3 classes they must lie in 0 to 2'),
        (dict(clean_y=torch.full((N,), -1)), ValueError, 'clean_y has labels from -1'),
        (dict(y=torch.zeros(N, dtype=torch.int32)), ValueError, 'y is torch.int32'),
        (dict(index=torch.zeros(N)), ValueError, 'index is torch.float32'),
        (dict(y=torch.zeros(N)), ValueError, 'clean_y is torch.int64'),
        (dict(y=torch.zeros(N), clean_y=torch.zeros(N)), ValueError, 'give classes='),
    ],
)
def test_what_is_refused(classes, changes, error, says):
    with pytest.raises(error, match=says):
        replace(classes, **changes)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_numbers_must_be_finite(numbers, value):
    y = numbers.y.clone()
    y[5:7] = value
    with pytest.raises(ValueError, match='y has 2 labels that are NaN or infinite, the first at position 5'):
        replace(numbers, y=y)
