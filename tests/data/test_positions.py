"Sets select by positions or by a mask; a mask is never read as the positions 0 and 1"

import numpy as np
import pytest
import torch

from kd_aif.data.images import ImageData
from kd_aif.data.samples import samples
from kd_aif.data.texts import TextData

N = 6
Y = torch.tensor([0, 1, 0, 1, 0, 1])


def images():
    x = torch.arange(N * 12, dtype=torch.uint8).view(N, 3, 2, 2)
    half = torch.full((3,), 0.5)
    return ImageData(x, Y, torch.arange(10, 10 + N), Y, ('a', 'b'), 'own', 'train', 'f', half, half)


def texts():
    words = tuple('abcdef')
    return TextData(words, Y, torch.arange(10, 10 + N), Y, ('a', 'b'), 'own', 'train', 'f')


def batches():
    return samples((torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), Y))


SETS = dict(images=images, texts=texts, batches=batches)


@pytest.mark.parametrize('kind', SETS)
@pytest.mark.parametrize('make', [torch.tensor, np.array, list])
def test_a_mask_selects_where_it_is_true(kind, make):
    mask = make([False, False, True, False, True, True])
    chosen = SETS[kind]().select(mask)
    assert chosen.index.tolist() == SETS[kind]().index[[2, 4, 5]].tolist()
    assert chosen.y.tolist() == Y[[2, 4, 5]].tolist()


@pytest.mark.parametrize('kind', SETS)
@pytest.mark.parametrize(
    'positions, error',
    [
        (torch.tensor([True, False]), ValueError),
        (torch.tensor([0.5, 1.9]), ValueError),
        (torch.tensor([[0, 1]]), ValueError),
        ([-1], IndexError),
        ([N], IndexError),
    ],
)
def test_other_positions_are_refused(kind, positions, error):
    with pytest.raises(error, match='positions'):
        SETS[kind]().select(positions)
