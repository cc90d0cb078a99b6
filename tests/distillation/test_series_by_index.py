"A pandas Series is read by its index, wherever values of samples are taken"

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from kd_aif.data.training_set import TrainingSet
from kd_aif.distillation.distill import distill
from kd_aif.distillation.sample_table import sample_table
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Fixed
from kd_aif.foundation.checks import as_positions
from kd_aif.influence.datamodelling import _in_order
from kd_aif.integrations.samplers import loss_weights, weighted_sampler

INDEX, WEIGHTS = torch.tensor([7, 3, 5, 9]), torch.tensor([0.5, 2.0, 0.25, 1.25])
COLUMN = pd.Series(WEIGHTS.numpy(), index=INDEX.numpy()).sort_values()
ROWS = pd.DataFrame(dict(sample=[0, 3, 1, 2], weight=WEIGHTS.numpy())).sort_values('weight')
X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])
BATCHES = [dict(x=X, y=Y, index=INDEX)]
VAL = [dict(x=X + 1, y=Y, index=INDEX + 100)]


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def in_table(weights, index=None):
    return sample_table(None, net(), BATCHES, weights=weights, index=index)['weight'].loc[INDEX.tolist()]


def in_run(weights):
    training = Training(epochs=1, progress=False)
    return distill(net(), None, BATCHES, VAL, weighting=weights, training=training).weights


by_index = {
    'Fixed': lambda: Fixed(COLUMN).by_position(TrainingSet(BATCHES, VAL)),
    'Fixed with index': lambda: Fixed(COLUMN, INDEX).values,
    'Fixed with table.index': lambda: Fixed(COLUMN, pd.Index(INDEX.numpy())).values,
    'loss_weights': lambda: loss_weights(INDEX, COLUMN)(INDEX),
    'loss_weights, list': lambda: loss_weights(INDEX.tolist(), COLUMN)(INDEX),
    'weighted_sampler': lambda: weighted_sampler(INDEX, COLUMN, order=INDEX).weights.float(),
    'sample_table': lambda: torch.tensor(in_table(COLUMN).to_numpy()),
    'sample_table with index': lambda: torch.tensor(in_table(COLUMN, INDEX).to_numpy()),
    'distill': lambda: in_run(Fixed(COLUMN)),
    'array': lambda: Fixed(WEIGHTS.numpy()).values,
}


@pytest.mark.parametrize('name', by_index)
def test_a_sorted_column_lands_on_its_own_samples(name):
    assert torch.equal(by_index[name]().float(), WEIGHTS)


def test_two_columns_of_one_table_go_together_row_by_row():
    expected = dict(zip([0, 3, 1, 2], WEIGHTS.tolist()))
    w = loss_weights(ROWS['sample'], ROWS['weight'])
    assert w(torch.arange(4)).tolist() == [expected[i] for i in range(4)]
    given = Fixed(ROWS['weight'], ROWS['sample'])
    assert dict(zip(given.index.tolist(), given.values.tolist())) == expected


def test_labels_of_a_sampler_are_read_by_index_too():
    y = pd.Series(Y.numpy(), index=INDEX.numpy())
    run = SimpleNamespace(index=INDEX, weights=WEIGHTS, class_weights=torch.tensor([1.0, 3.0]), config={})
    expected = weighted_sampler(run, order=INDEX, y=Y).weights
    assert torch.equal(weighted_sampler(run, order=INDEX, y=y.sort_values()).weights, expected)


def test_a_mask_and_scores_are_read_by_position_names():
    mask = pd.Series([False, True, True], index=[2, 0, 1])
    assert as_positions(mask, 3).tolist() == [0, 1]
    assert _in_order(pd.Series([3.0, 1.0, 2.0], index=[2, 0, 1])).tolist() == [1, 2, 3]


other = COLUMN.rename({7: 8})
faults = [
    (lambda: Fixed(COLUMN, torch.arange(4)), 'weights is a Series of 4 samples.*not that of index'),
    (lambda: Fixed(other, INDEX), 'weights is a Series.*weights.to_numpy'),
    (lambda: Fixed(COLUMN[:3], INDEX), 'weights is a Series of 3 samples.*4 samples'),
    (lambda: Fixed(COLUMN.rename(str)), 'weights is a Series whose index is of type'),
    (lambda: Fixed(COLUMN.rename({7: 3})), 'comes more than once'),
    (lambda: Fixed(COLUMN, pd.Series(INDEX.numpy())), 'two columns of one table'),
    (lambda: loss_weights(INDEX, other), 'weights is a Series'),
    (lambda: weighted_sampler(INDEX, other), 'weights is a Series'),
    (lambda: in_table(other), 'not that of the scored samples'),
    (lambda: in_table(other, INDEX), 'not that of the scored samples'),
    (lambda: as_positions(other > 1, 4), 'positions is a Series'),
    (lambda: _in_order(COLUMN), 'scores is a Series'),
]


@pytest.mark.parametrize('call, message', faults)
def test_another_index_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_column_alone_names_no_source():
    with pytest.raises(TypeError, match='source is a Series; give a run of distill, or the index'):
        loss_weights(COLUMN)
