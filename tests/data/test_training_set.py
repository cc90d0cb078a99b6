"The labels that a run accepts: classes, or real numbers for one output."

import pytest
import torch

from kd_aif.data.training_set import check_batch, check_batches, check_labels, read_samples, TrainingSet


def batches(y, start=0):
    return [dict(index=torch.arange(start, start + len(y)), y=y, x=torch.zeros(len(y), 2))]


CLASSES, NUMBERS = torch.tensor([0, 1, 2, 1]), torch.tensor([0.5, 2.0, -1.0, 3.0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_real_numbers_are_labels_of_one_output(dtype):
    index, y = check_batches('train', batches(NUMBERS.to(dtype)), 1)
    assert index.tolist() == [0, 1, 2, 3] and torch.equal(y, NUMBERS.to(dtype))
    found = TrainingSet(batches(NUMBERS), batches(NUMBERS + 1, 10), include_validation=True)
    assert torch.equal(found.val_y, NUMBERS + 1) and len(found) == 8


def test_labels_and_outputs_must_agree():
    check_labels('train', CLASSES, 3)
    with pytest.raises(ValueError, match='student has 3 outputs; .*num_labels=1'):
        check_labels('train', NUMBERS, 3)
    with pytest.raises(
        ValueError, match='one output; give float labels for a regression, or a network with as many'
    ):
        check_labels('train', CLASSES, 1)
    with pytest.raises(ValueError, match=r'labels must be in \[0, 2\)'):
        check_labels('train', CLASSES, 2)


@pytest.mark.parametrize(
    'y', [NUMBERS.half(), NUMBERS[:, None], CLASSES.int(), CLASSES.bool(), CLASSES.tolist()], ids=str
)
def test_labels_of_other_types(y):
    with pytest.raises(TypeError, match='int64 with one number per sample, or of float32 for a regression'):
        check_batch('train', dict(index=torch.arange(4), y=y))


def test_the_index_is_whole():
    with pytest.raises(TypeError, match=r"batch\['index'\] is torch.float32 \(4,\); .*per sample$"):
        check_batch('train', dict(index=NUMBERS, y=CLASSES))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_numbers_must_be_finite(value):
    y = NUMBERS.clone()
    y[2] = value
    with pytest.raises(ValueError, match=r"batch\['y'\] has NaN or infinite values, first .* index 2"):
        read_samples('train', batches(y))


def test_one_kind_of_labels_in_all_batches():
    with pytest.raises(
        ValueError, match='labels are torch.float32 and torch.int64; give all batches one type'
    ):
        read_samples('train', batches(CLASSES) + batches(NUMBERS, 10))
