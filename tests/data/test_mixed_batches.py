"Training and validation samples in one stream, for loaders that give another order in each pass."

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_aif.data.images import ImageData
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.mixed_batches import MixedBatches, SubsetBatches, is_deterministic, mix_batches
from kd_aif.data.samples import samples


class Reshuffled:
    "Batches that have no evaluation view, and another order and other lengths in each pass"

    def __init__(self, index, sizes):
        self.index, self.sizes, self.passes = index, sizes, 0

    def __iter__(self):
        g = torch.Generator().manual_seed(self.passes)
        sizes = self.sizes[self.passes % 2 :] + self.sizes[: self.passes % 2]
        self.passes += 1
        for i in self.index[torch.randperm(len(self.index), generator=g)].split(sizes):
            yield dict(x=i[:, None].float() / 7, y=i % 3, index=i)


@pytest.fixture
def loaders():
    return Reshuffled(torch.arange(20), [8, 8, 4]), Reshuffled(torch.arange(100, 107), [4, 3])


def images(n):
    x = torch.randint(256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 3
    return ImageData(
        x, y, torch.arange(n), y, tuple('abc'), 'made', 'train', '', torch.zeros(1), torch.ones(1)
    )


def check_epoch(batches, train, val):
    "Every sample once, and every row belongs to its index"
    whole = {k: torch.cat([b[k] for b in batches]) for k in ('x', 'y', 'index', 'held_out')}
    assert sorted(whole['index'].tolist()) == train.index.tolist() + val.index.tolist()
    assert torch.equal(whole['held_out'], whole['index'] >= 100)
    assert torch.equal(whole['x'][:, 0], whole['index'].float() / 7) and torch.equal(
        whole['y'], whole['index'] % 3
    )


def test_every_sample_once_whatever_the_order_of_a_pass(loaders):
    mixed = MixedBatches(*loaders)
    for _ in range(4):
        batches = list(mixed)
        assert [len(b['y']) for b in batches] == [8, 8, 8, 3] and len(mixed) == 4
        check_epoch(batches, *loaders)
    check_epoch(list(mixed.eval_view()), *loaders)


def test_known_sizes_spare_the_passes_and_change_nothing():
    train, val = (ImageBatches(images(n), 8, seed=n) for n in (20, 7))
    given = MixedBatches(*(Reshuffled(torch.arange(n), [n]) for n in (20, 7)), sizes=([8, 8, 4], [7]))
    assert given.train.passes == given.val.passes == 0
    read, known = MixedBatches(train, val, 3), MixedBatches(train, val, 3, sizes=([8, 8, 4], [7]))
    assert (read.n_train, read.n_val, read.batch_size) == (known.n_train, known.n_val, known.batch_size)
    for epoch in (0, 1):
        batches = []
        for mixed in (read, known):
            mixed.set_epoch(epoch)
            batches.append(list(mixed))
        for a, b in zip(*batches, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_single_sample_left_over_joins_the_last_batch():
    mixed = MixedBatches(Reshuffled(torch.arange(12), [4, 4, 4]), Reshuffled(torch.arange(100, 105), [5]))
    assert [len(b['y']) for b in mixed] == [4, 4, 4, 5] and len(mixed) == 4


def test_a_subset_does_not_depend_on_the_order_of_a_pass(loaders):
    subset = SubsetBatches(loaders[0], torch.tensor([3, 11, 19]))
    orders = set()
    for _ in range(4):
        batches = list(subset)
        index = torch.cat([b['index'] for b in batches])
        assert sorted(index.tolist()) == [3, 11, 19]
        assert torch.equal(torch.cat([b['x'] for b in batches])[:, 0], index.float() / 7)
        orders.add(tuple(index.tolist()))
    assert len(orders) > 1, 'the loader was to give another order in each pass'


def test_what_is_deterministic(loaders):
    train = ImageBatches(images(20), 8, augment=lambda x, g: x)
    assert not is_deterministic(train) and is_deterministic(train.eval_view())
    assert not is_deterministic(loaders[0]) and is_deterministic([dict()])
    assert not is_deterministic(MixedBatches(train.eval_view(), train))
    assert is_deterministic(MixedBatches(train.eval_view(), train.eval_view()))


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda b: dict(b, names=['a'] * len(b['y'])), "batch.'names'. is a list"),
        (lambda b: {k: b[k] for k in ('x', 'index')}, 'do not fit together'),
        (lambda b: dict(b, x=b['x'].expand(-1, 2)), 'do not fit together'),
    ],
)
def test_batches_that_do_not_fit_together(loaders, wrong, message):
    with pytest.raises(ValueError, match=message):
        list(MixedBatches([dict(b) for b in loaders[0]], [wrong(b) for b in loaders[1]]))


class Padded:
    "Texts of 1 to 6 tokens, padded to the longest of each batch, as a collator of the transformers library does"

    def __init__(self, n, side='right', pad=9, size=4, start=0, lengths=None):
        self.lengths = lengths or [1 + (5 * k) % 6 for k in range(n)]
        self.side, self.pad, self.size, self.start = side, pad, size, start

    def __iter__(self):
        for rows in torch.arange(len(self.lengths)).split(self.size):
            lengths = [self.lengths[k] for k in rows]
            ids = torch.full((len(rows), max(lengths)), self.pad)
            mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
            for row, (k, length) in enumerate(zip(rows.tolist(), lengths)):
                place = slice(length) if self.side == 'right' else slice(max(lengths) - length, None)
                ids[row, place] = 100 + self.start + k
                mask[row, place] = types[row, place] = 1
            inputs = dict(input_ids=ids, attention_mask=mask, token_type_ids=types)
            yield dict(index=rows + self.start, y=rows % 2, **inputs)


@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('prefix', ['', 'teacher.'])
def test_texts_of_different_width_are_filled_up(side, prefix):
    loaders = [Padded(23, side), Padded(11, side, start=50)]
    if prefix:
        loaders = [
            [{k if k in ('index', 'y') else prefix + k: v for k, v in b.items()} for b in o] for o in loaders
        ]
    lengths = {int(i): k for o in (Padded(23), Padded(11, start=50)) for i, k in zip(_index(o), o.lengths)}
    epoch = list(MixedBatches(*loaders))
    assert sorted(_index(epoch)) == sorted(lengths)
    for batch in epoch:
        ids, mask = batch[f'{prefix}input_ids'], batch[f'{prefix}attention_mask']
        assert torch.equal(mask, batch[f'{prefix}token_type_ids'])
        for i, row, here in zip(batch['index'].tolist(), ids, mask.bool()):
            assert here.sum() == lengths[i]
            assert (row[here] == 100 + i).all() and (row[~here] == 9).all()
            edge = here[: lengths[i]] if side == 'right' else here[len(here) - lengths[i] :]
            assert edge.all()


def _index(batches):
    return torch.cat([b['index'] for b in batches]).tolist()


def test_the_token_of_the_padding_is_looked_for_in_all_batches():
    narrow, wide = Padded(0, size=2, lengths=[2, 2, 3, 3]), Padded(0, size=2, lengths=[5, 5, 6, 6])
    with pytest.raises(ValueError, match="'input_ids' of different widths.*use text_batches"):
        list(MixedBatches(narrow, wide))
    epoch = list(MixedBatches(narrow, Padded(0, size=2, lengths=[5, 5, 1, 5])))
    assert all((b['input_ids'][b['attention_mask'] == 0] == 9).all() for b in epoch)
    loaders = [[{k: v for k, v in b.items() if k != 'attention_mask'} for b in o] for o in (narrow, wide)]
    with pytest.raises(ValueError, match="no 'attention_mask' shows which token"):
        list(MixedBatches(*loaders))


def test_other_columns_of_different_width_do_not_fit_together():
    odd = [dict(b, marks=b['input_ids']) for b in Padded(23)]
    with pytest.raises(ValueError, match='do not fit together'):
        list(MixedBatches(odd, odd))


def test_mix_batches_needs_two_loaders_of_one_kind():
    class Knowing(list):
        def with_validation(self, val, seed):
            return 'by the loader', val, seed

    train, val = Knowing(Padded(8)), Knowing(Padded(4, start=50))
    assert mix_batches(train, val, 7) == ('by the loader', val, 7)
    assert isinstance(mix_batches(train, list(val)), MixedBatches)
    plain = mix_batches(list(train), list(val), 7, ([4, 4], [4]))
    assert isinstance(plain, MixedBatches) and (plain.seed, plain.n_train, plain.n_val) == (7, 8, 4)


def test_samples_join_their_validation_samples_without_a_pass():
    passes = []

    class Counted(TensorDataset):
        def __getitem__(self, i):
            passes.append(i)
            return super().__getitem__(i)

    train, val = samples(Counted(torch.randn(33, 2), torch.arange(33) % 3), batch_size=4).hold_out(8)
    passes.clear()
    joined = train.with_validation(val, seed=2)
    assert not passes
    other = MixedBatches(train, val, 2)
    assert joined.batch_size == other.batch_size == 5 and len(joined) == len(other)
    train.set_epoch(0), val.set_epoch(0)
    first = [b['index'].tolist() for b in joined]
    train.set_epoch(0), val.set_epoch(0)
    assert first == [b['index'].tolist() for b in other] and sorted(sum(first, [])) == list(range(33))


@pytest.mark.parametrize(
    'make, error, says',
    [
        (lambda: samples((torch.randn(4, 2), ['a', 'c', 'a', 'c'])), ValueError, 'classes=train.classes'),
        (lambda: [dict(x=torch.randn(4, 2))], TypeError, 'mix_batches'),
    ],
)
def test_samples_refuse_other_validation_samples(make, error, says):
    train = samples((torch.randn(4, 2), ['a', 'b', 'a', 'b']))
    with pytest.raises(error, match=says):
        train.with_validation(make())
