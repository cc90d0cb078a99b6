"Logits of a teacher in a file that belongs to this teacher and these samples alone."

import copy

import pytest
import torch
from torch import nn

from kd_aif.distillation.distill import distill
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Fixed
from kd_aif.integrations.teacher_logits import cache_teacher_logits, CachedLogits


class Texts(nn.Module):
    "Mean embedding of the tokens that are not masked, and a batch norm"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.out = nn.Embedding(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        return self.out(self.norm((self.table(input_ids) * mask).sum(1) / mask.sum(1)))


LENGTHS = [3, 5, 2, 4, 6, 1]


def batch_of(rows, fill=0, width=0):
    "Texts of different length, filled up"
    width = max(width, *(LENGTHS[r] for r in rows))
    ids = torch.full((len(rows), width), fill)
    for place, r in enumerate(rows):
        ids[place, : LENGTHS[r]] = torch.arange(1, LENGTHS[r] + 1) + r
    mask = torch.tensor([[i < LENGTHS[r] for i in range(width)] for r in rows]).long()
    index, y = torch.tensor([10 * r for r in rows]), torch.tensor([r % 3 for r in rows])
    return dict(input_ids=ids, attention_mask=mask, index=index, y=y)


BATCHES = [batch_of([0, 1, 2]), batch_of([3, 4, 5])]


@pytest.fixture
def cached(tmp_path):
    return cache_teacher_logits(Texts(), BATCHES, tmp_path / 'a' / 'logits.safetensors', progress=False)


def test_logits_are_those_of_the_teacher(cached, tmp_path):
    teacher = Texts().eval()
    for batch in BATCHES:
        expected = teacher(batch['input_ids'], batch['attention_mask'])
        torch.testing.assert_close(cached(batch['index']), expected)
        torch.testing.assert_close(cached(batch['index'].flip(0)), expected.flip(0))
    assert [p.name for p in (tmp_path / 'a').iterdir()] == ['logits.safetensors']


def test_other_batches_order_and_padding_are_the_same_samples(cached, tmp_path):
    path = tmp_path / 'a' / 'logits.safetensors'
    others = [batch_of([5, 1], fill=7, width=9), batch_of([4, 0, 2, 3], fill=2)]
    again = CachedLogits.load(path, Texts().train(), others, progress=False)
    assert torch.equal(again.logits, cached.logits) and torch.equal(again.index, cached.index)


def changed(**columns):
    first = {k: v.clone() for k, v in BATCHES[0].items()}
    for name, (row, value) in columns.items():
        first[name][row] = value
    return [first, BATCHES[1]]


def with_statistics(value):
    teacher = Texts()
    teacher.norm.running_mean[0] += value
    return teacher


refused = [
    (with_statistics(1e-3), BATCHES, 'another teacher'),
    (nn.Sequential(Texts()), BATCHES, 'another teacher'),
    (Texts(), changed(y=(1, 2)), 'for 1 of 6 samples, first for index 10'),
    (Texts(), changed(input_ids=(2, 9)), 'for 1 of 6 samples, first for index 20'),
    (Texts(), changed(index=(0, 7)), 'has 6 samples and batches 6; index 0 is in one'),
    (Texts(), BATCHES[:1], 'has 6 samples and batches 3; index 30 is in one'),
    (Texts(), [b | dict(more=b['y']) for b in BATCHES], 'for 6 of 6 samples'),
]


@pytest.mark.parametrize('teacher, batches, says', refused, ids=[r[2] for r in refused])
def test_another_key_is_refused_and_overwritten_on_request(cached, tmp_path, teacher, batches, says):
    path = tmp_path / 'a' / 'logits.safetensors'
    before = path.read_bytes()
    for again in (CachedLogits.load, None):
        with pytest.raises(ValueError, match=says):
            if again:
                again(path, teacher, batches, progress=False)
            else:
                cache_teacher_logits(teacher, batches, path, progress=False)
    assert path.read_bytes() == before


def test_overwrite_and_another_way_of_asking(cached, tmp_path):
    path = tmp_path / 'a' / 'logits.safetensors'

    def doubled(model, batch):
        return 2 * model(batch['input_ids'], batch['attention_mask'])

    with pytest.raises(ValueError, match='asked in another way'):
        cache_teacher_logits(Texts(), BATCHES, path, doubled, progress=False)
    twice = cache_teacher_logits(Texts(), BATCHES, path, doubled, overwrite=True, progress=False)
    torch.testing.assert_close(twice.logits, 2 * cached.logits)


def broken(teacher):
    teacher = copy.deepcopy(teacher)
    teacher.out.bias.data[0] = float('nan')
    return teacher


faults = [
    (broken(Texts()), BATCHES, ValueError, 'NaN'),
    (Texts(), [], ValueError, 'batches is empty'),
    (Texts(), [BATCHES[0], BATCHES[0]], ValueError, 'comes more than once'),
    (Texts(), iter(BATCHES), ValueError, 'read only once'),
    (Texts(), [{k: v for k, v in BATCHES[0].items() if k != 'index'}], ValueError, "'index'"),
    ('bert', BATCHES, TypeError, 'teacher'),
]


@pytest.mark.parametrize('teacher, batches, kind, says', faults, ids=[f[3] for f in faults])
def test_nothing_is_written_where_the_teacher_cannot_be_asked(tmp_path, teacher, batches, kind, says):
    with pytest.raises(kind, match=says):
        cache_teacher_logits(teacher, batches, tmp_path / 'x.safetensors', progress=False)
    assert not list(tmp_path.iterdir())


def test_a_sample_without_logits_and_a_file_of_another_kind(cached, tmp_path):
    with pytest.raises(ValueError, match='sample 11 has no logits'):
        cached(torch.tensor([10, 11]))
    (tmp_path / 'b').write_bytes(b'no file of tensors')
    with pytest.raises(ValueError, match='holds no complete state'):
        CachedLogits.load(tmp_path / 'b', Texts(), BATCHES, progress=False)


def digits_like(n, first, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 4, generator=g), torch.arange(n) % 3
    return [dict(x=x[r], y=y[r], index=first + r) for r in torch.arange(n).split(5)]


class Counted(nn.Linear):
    "Counts the samples that it is shown"

    _shown = 0

    def forward(self, x):
        self._shown += len(x)
        return super().forward(x)


def linear(kind, seed):
    torch.manual_seed(seed)
    return kind(4, 3)


TRAIN, VAL = digits_like(20, 0, 0), digits_like(9, 100, 1)


@pytest.mark.parametrize('joined', [True, False], ids=['joined', 'apart'])
def test_distillation_with_kept_logits_is_that_with_the_teacher(tmp_path, joined):
    teacher, students, shown = linear(Counted, 5), [], []
    kept = cache_teacher_logits(teacher, TRAIN + VAL if joined else TRAIN, tmp_path / 'l', progress=False)
    weighting = Fixed(torch.linspace(0, 2, 20), torch.arange(20))
    for cache in (True, kept):
        training = Training(epochs=3, lr=0.1, cache_teacher=cache, include_validation=joined, progress=False)
        before = teacher._shown
        students.append(
            distill(linear(nn.Linear, 2), teacher, TRAIN, VAL, weighting=weighting, training=training).student
        )
        shown.append(teacher._shown - before)
    torch.testing.assert_close(*(s.weight for s in students))
    assert shown[0] - shown[1] == 29 - 9 * (not joined)


kept_faults = [
    (dict(teacher=linear(Counted, 6)), 'logits of another teacher'),
    (dict(teacher=None), 'teacher is None'),
    (dict(train=digits_like(20, 0, 3)), 'no logits of this sample with index 0'),
    (dict(train=TRAIN + digits_like(5, 50, 3)), 'sample 50 has no logits'),
    (dict(val=digits_like(9, 0, 1)), 'share an index'),
]


@pytest.mark.parametrize('change, says', kept_faults, ids=[f[1] for f in kept_faults])
def test_kept_logits_of_others_are_refused_before_training(tmp_path, change, says):
    kept = cache_teacher_logits(linear(Counted, 5), TRAIN + VAL, tmp_path / 'l', progress=False)
    student = linear(nn.Linear, 2)
    options = dict(teacher=linear(Counted, 5), train=TRAIN, val=VAL) | change
    weighting = Fixed(torch.ones(25 if len(options['train']) > 4 else 20))
    training = Training(epochs=1, cache_teacher=kept, progress=False)
    with pytest.raises(ValueError, match=says):
        distill(
            student,
            options['teacher'],
            options['train'],
            options['val'],
            weighting=weighting,
            training=training,
        )
    assert torch.equal(student.weight, linear(nn.Linear, 2).weight)
