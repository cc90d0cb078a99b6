"Splits and batches as properties: exact numbers, partitions, order, positions."

import pytest
import torch
from hypothesis import given, settings, strategies as st
from kd_aif.foundation.batches import batch_rows, find_positions, merged, row_slices, sample_batches
from kd_aif.foundation.core import generator
from kd_aif.foundation.splits import apportion, stratified_choice, stratified_folds

quick = settings(max_examples=40, deadline=None)
labels = st.lists(st.integers(0, 4), min_size=2, max_size=80)


@quick
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.floats(0, 1))
def test_apportion_is_exact_and_off_by_less_than_one(counts, part):
    counts = torch.tensor(counts)
    n = round(part * int(counts.sum()))
    found = apportion(counts, n)
    assert found.sum() == n and (found <= counts).all() and (found >= 0).all()
    assert ((found - n * counts.double() / counts.sum()).abs() < 1).all()


@quick
@given(labels, st.data(), st.integers(0, 3))
def test_a_stratified_choice_is_a_partition(y, draw, seed):
    y, n = torch.tensor(y), draw.draw(st.integers(0, len(y)))
    chosen, others = stratified_choice(y, n, generator(seed))
    assert len(chosen) == n and sorted(chosen.tolist() + others.tolist()) == list(range(len(y)))
    assert chosen.tolist() == sorted(chosen.tolist()) and others.tolist() == sorted(others.tolist())
    assert torch.equal(torch.bincount(y[chosen], minlength=5), apportion(torch.bincount(y, minlength=5), n))


@quick
@given(labels, st.integers(2, 5), st.integers(0, 3))
def test_folds_are_balanced_within_classes(y, folds, seed):
    y = torch.tensor(y)
    if len(y) < folds:
        with pytest.raises(ValueError, match='at least one sample'):
            stratified_folds(y, folds, seed)
        return
    fold = stratified_folds(y, folds, seed)
    counts = torch.stack([torch.bincount(y[fold == k], minlength=5) for k in range(folds)])
    assert (counts.max(0).values - counts.min(0).values).max() <= 1
    assert fold.min() >= 0 and fold.max() < folds and (counts.sum(1) > 0).all()


@quick
@given(st.sets(st.integers(-20, 20)), st.lists(st.integers(-25, 25)))
def test_positions_of_known_and_unknown_indices(keys, index):
    keys = sorted(keys)
    position, known = find_positions(
        torch.tensor(keys, dtype=torch.long), torch.tensor(index, dtype=torch.long)
    )
    assert known.tolist() == [i in keys for i in index]
    assert [keys[p] for p in position[known].tolist()] == [i for i in index if i in keys]


def batches(sizes):
    start, found = 0, []
    for k in sizes:
        i = torch.arange(start, start + k)
        found.append(dict(x=i[:, None].float(), index=i))
        start += k
    return found


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_merged_batches_hold_the_same_samples_in_the_same_order(sizes, size):
    found = merged(batches(sizes), size)
    assert torch.cat([b['index'] for b in found]).tolist() == list(range(sum(sizes)))
    assert all(len(b['index']) <= max(size, max(sizes)) for b in found)
    assert all(torch.equal(b['x'][:, 0], b['index'].float()) for b in found)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 60), st.integers(0, 3))
def test_a_sample_of_batches(sizes, n, seed):
    index = [i for b in sample_batches(batches(sizes), n, seed) for i in b['index'].tolist()]
    assert len(index) == min(n, sum(sizes)) and index == sorted(set(index))
    again = [i for b in sample_batches(batches(sizes), n, seed) for i in b['index'].tolist()]
    assert index == again


def test_settings_stay_when_rows_are_chosen():
    batch = dict(
        index=torch.arange(3), x=torch.rand(3, 2), table=torch.rand(5, 2), rate=0.5, names=['a', 'b', 'c']
    )
    found = batch_rows(batch, torch.tensor([2, 0]))
    assert torch.equal(found['x'], batch['x'][[2, 0]]) and found['table'] is batch['table']
    assert (found['rate'], found['names']) == (0.5, ['a', 'b', 'c'])
    assert torch.equal(batch_rows(batch, slice(1))['index'], torch.tensor([0]))


@pytest.mark.parametrize('n, size', [(0, 3), (3, 3), (7, 3), (2, 5)])
def test_slices_cover_every_row_once(n, size):
    rows = [list(range(n))[s] for s in row_slices(n, size)]
    assert [i for r in rows for i in r] == list(range(n)) and all(0 < len(r) <= size for r in rows)
