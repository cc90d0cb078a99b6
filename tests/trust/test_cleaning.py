"Cleaning lists: order, reasons, precision"

import numpy as np
import pandas as pd
import pytest
import torch

from kd_aif.data.text_files import read_texts
from kd_aif.influence.cross_scores import CrossScores
from kd_aif.influence.scores import InfluenceScores
from kd_aif.trust.cleaning import cleaning_list, CRITERIA, precision_at, precision_table

INDEX = [40, 10, 30, 20, 50]


def table(**columns):
    known = dict(score=[0.5, -1, -2, 0.5, 3], probability=[0.9, 0.2, 0.9, 0.1, 1], loss=[1, 2.0, 0, 4, 3])
    return pd.DataFrame(known | dict(reason='a sentence.') | columns, pd.Index(INDEX, name='index'))


def scores(values=(0.5, -1, -2, 0.5, 3)):
    return InfluenceScores(torch.tensor(values), torch.tensor(INDEX), 'mean', 0.1, 0.0, 1, {})


@pytest.mark.parametrize(
    'by, expected',
    [
        ('probability', [20, 10, 30, 40, 50]),
        ('score', [30, 10, 40, 20, 50]),
        ('self_confidence', [20, 50, 10, 40, 30]),
    ],
)
def test_the_order_of_each_criterion(by, expected):
    found = cleaning_list(table(), by=by)
    assert found.index.tolist() == expected and list(found) == list(table())
    assert cleaning_list(table(), 2, by).index.tolist() == expected[:2]


def test_without_calibration_there_is_no_order_by_probability():
    assert cleaning_list(table(probability=np.nan)).index.tolist() == [30, 10, 40, 20, 50]
    with pytest.raises(ValueError, match="no probabilities for by='probability'"):
        cleaning_list(table(probability=np.nan), by='probability')


def test_scores_alone():
    found = cleaning_list(scores(), 3)
    assert (
        found.index.tolist() == [30, 10, 40] and found.reason.iloc[0] == 'Its score is among the lowest 0.1%.'
    )
    folds = torch.stack([scores().values - 1, scores().values + 1])
    crossed = CrossScores(folds, scores().index, torch.zeros(5), (), (), ('mean',), 0.1, 0.0, {})
    assert cleaning_list(crossed).score.tolist() == sorted([0.5, -1, -2, 0.5, 3])


NOISY = {10: True, 20: True, 30: False, 40: False, 50: True}
VECTOR = torch.zeros(51, dtype=torch.bool).index_fill(0, torch.tensor([10, 20, 50]), True)


@pytest.mark.parametrize(
    'noisy', [NOISY, pd.Series(NOISY), VECTOR, VECTOR.numpy()], ids=lambda v: type(v).__name__
)
def test_precision_goes_by_the_index(noisy):
    found = cleaning_list(table(), by='probability')
    assert [precision_at(found, noisy, k) for k in (1, 2, 3, 4, 5)] == [1, 1, 2 / 3, 1 / 2, 3 / 5]
    assert precision_at(found.index, noisy, 2) == precision_at(torch.tensor([20, 10]), noisy, 2) == 1


def test_a_table_from_a_file_keeps_its_index(tmp_path):
    table().to_csv(tmp_path / 's.csv')
    read = pd.read_csv(tmp_path / 's.csv')
    found = cleaning_list(read, by='probability')
    assert found.index.tolist() == [20, 10, 30, 40, 50]
    assert precision_at(found, NOISY, 3) == precision_at(found.reset_index(), NOISY, 3) == 2 / 3
    with pytest.raises(ValueError, match="source: the column 'index' is float64; give the stable indices"):
        cleaning_list(read.assign(index=0.5))


def test_precision_of_known_data_and_several_lists():
    texts = read_texts((['a', 'b', 'c', 'd'], ['x', 'y', 'x', 'y']))
    texts = texts._derive(y=torch.tensor([0, 0, 0, 1]))
    assert precision_at([1, 0], texts, 1) == 1 and precision_at([1, 0], texts, 2) == 0.5
    lists = {by: cleaning_list(table(), by=by) for by in CRITERIA}
    found = precision_table(lists, NOISY, (1, 2))
    assert found.loc['score'].tolist() == [0, 0.5] and found.loc['self_confidence'].tolist() == [1, 1]
    assert found.loc['random'].tolist() == [0.6, 0.6] and list(found) == ['at 1', 'at 2']


BAD = {
    'source': (lambda: cleaning_list([1, 2]), TypeError, 'source is a list'),
    'k': (lambda: cleaning_list(table(), 0), ValueError, 'k is 0'),
    'real k': (lambda: cleaning_list(table(), 2.0), ValueError, 'k is 2.0'),
    'criterion': (lambda: cleaning_list(table(), by='luck'), ValueError, "'self_confidence'"),
    'no scores': (lambda: cleaning_list(table(score=np.nan)), ValueError, 'has no scores'),
    'no losses': (lambda: cleaning_list(scores(), by='self_confidence'), ValueError, 'has no losses'),
    'no table of samples': (lambda: cleaning_list(pd.DataFrame()), ValueError, 'has no scores'),
    'columns': (lambda: cleaning_list(scores([[1.0, 2]] * 5)), ValueError, '2 columns'),
    'too long': (lambda: precision_at(table(), NOISY, 6), ValueError, 'the list has 5 samples'),
    'unknown': (lambda: precision_at([7], NOISY, 1), ValueError, 'index 7'),
    'negative': (lambda: precision_at([-1], VECTOR, 1), ValueError, 'index -1'),
    'numbers': (lambda: precision_at([10], {10: 0.3}, 1), TypeError, 'holds 0.3'),
    'labels': (lambda: precision_at([0], torch.tensor([3]), 1), TypeError, 'holds 3'),
    'matrix': (lambda: precision_at([0], torch.ones(2, 2), 1), TypeError, 'is_noisy is a Tensor'),
    'no noise': (lambda: precision_at([0], None, 1), TypeError, 'is_noisy is a NoneType'),
    'no lists': (lambda: precision_table({}, NOISY), TypeError, 'dictionary of cleaning lists'),
    'a list': (lambda: precision_table([table()], NOISY), TypeError, 'dictionary of cleaning lists'),
}


@pytest.mark.parametrize('call, kind, words', BAD.values(), ids=BAD)
def test_lists_that_cannot_be(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
