"Shifts of images: what changes, what stays, and what is refused"

from dataclasses import replace

import pytest
import torch

from kd_aif.data.shifts import class_colours, corner_classes, coloured_corner, other_domain
from kd_aif.data.sources import load_images
from kd_aif.data.texts import TextData
from kd_aif.experiments.methods import run_task
from kd_aif.experiments.task_data import describe_data, task_data
from kd_aif.experiments.tasks import make_task
from kd_aif.rivals.reweighting import GroupDRO


@pytest.fixture(scope='module')
def digits():
    return load_images('digits').select(torch.arange(300))


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('n_classes', [2, 10, 100, 256])
def test_each_class_has_a_colour_of_its_own(n_classes, channels):
    colours = class_colours(n_classes, channels)
    assert len(colours.unique(dim=0)) == n_classes and colours.shape == (n_classes, channels)
    with pytest.raises(ValueError, match='n_classes is 300.*256 classes at most'):
        class_colours(300, channels)


@pytest.mark.parametrize('agreement', [0.0, 0.3, 0.955, 1.0])
def test_corners_agree_as_often_as_asked(digits, agreement):
    found = coloured_corner(digits, agreement, seed=4)
    assert int((corner_classes(found) == digits.y).sum()) == round(300 * agreement)
    assert found.fingerprint != digits.fingerprint and found.note.startswith('digits')
    again, other = (coloured_corner(digits, agreement, seed=s) for s in (4, 5))
    assert torch.equal(again.x, found.x) and again.fingerprint == found.fingerprint
    assert not torch.equal(other.x, found.x) or agreement == 1.0


def test_corners_name_the_object_not_the_wrong_label(digits):
    wrong = replace(digits, y=(digits.y + 1) % 10)
    assert torch.equal(corner_classes(coloured_corner(wrong, 1.0, 0)), digits.clean_y)


BAD = {
    'agreement': (lambda d: coloured_corner(d, float('nan'), 0), ValueError, 'agreement is nan'),
    'size zero': (lambda d: coloured_corner(d, 0.9, 0, size=0), ValueError, 'size is 0'),
    'too large': (
        lambda d: coloured_corner(d, 0.9, 0, size=20),
        ValueError,
        'size is 20, but the images have 8',
    ),
    'one class': (
        lambda d: coloured_corner(replace(d, y=d.y * 0, clean_y=d.y * 0, classes=('a',)), 0.9, 0),
        ValueError,
        'data has 1 class',
    ),
    'a list': (lambda d: coloured_corner([d], 0.9, 0), TypeError, 'data is a list'),
    'domain of a list': (lambda d: other_domain([d], 0.9, 0), TypeError, 'data is a list'),
    'share': (lambda d: other_domain(d, -0.5, 0), ValueError, 'share is -0.5'),
    'kind': (
        lambda d: other_domain(d, 0.5, 0, 'blue'),
        ValueError,
        "kind is 'blue'; use one of grey, negative",
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments(digits, name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make(digits)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(shift='corner'), "shift is 'corner' with shift_rate 0.0; give both"),
        (dict(shift_rate=0.5), "shift is 'none' with shift_rate 0.5; give both"),
        (dict(shift='sepia', shift_rate=0.5), "shift is 'sepia'; use one of none, corner, grey, negative"),
        (dict(shift='grey', shift_rate=1.5), 'shift_rate is 1.5'),
        (dict(dataset='glue/mrpc', shift='grey', shift_rate=0.5), "shift is 'grey'; glue/mrpc has texts"),
    ],
)
def test_a_task_refuses_shifts_that_mean_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        make_task(**dict(dataset='digits') | changes)


def test_only_training_images_come_from_another_domain():
    plain, task = make_task('digits'), make_task('digits', shift='negative', shift_rate=0.5)
    before, after = (task_data(t, progress=False) for t in (plain, task))
    changed = [int((a.x != b.x).flatten(1).any(1).sum()) for a, b in zip(before, after)]
    assert changed == [round(len(before[0]) / 2), 0, 0]
    described = describe_data(task, *after)
    assert (described['shift'], described['shift_rate']) == ('negative', 0.5)
    assert 'shift' not in describe_data(plain, *before)


def test_a_record_has_the_worst_group_and_old_ones_stay_what_they_are(tmp_path):
    task = make_task('digits', epochs=1, shift='corner', shift_rate=0.95)
    record, run = run_task(task, 'kd_val', out=tmp_path, progress=False)
    m = record.metrics
    assert m['worst_group_accuracy'] <= min(m['agreeing_accuracy'], m['conflicting_accuracy'])
    assert m['test_accuracy'] == pytest.approx((m['agreeing_accuracy'] + m['conflicting_accuracy']) / 2)
    assert record.config['shift'] == 'corner'
    plain, _ = run_task(make_task('digits', epochs=1), 'ce', progress=False)
    assert not {'shift', 'shift_rate'} & {*plain.config, *plain.dataset}
    assert 'worst_group_accuracy' not in plain.metrics


GROUPS = {
    'no index': (dict(groups=torch.tensor([0, 1])), TypeError, 'index is NoneType'),
    'floats': (
        dict(groups=torch.tensor([0.0]), index=torch.tensor([0])),
        TypeError,
        'groups is torch.float32',
    ),
    'one short': (dict(groups=torch.tensor([0]), index=torch.tensor([0, 1])), ValueError, '1 entries for 2'),
    'negative': (dict(groups=torch.tensor([-1]), index=torch.tensor([0])), ValueError, 'one group, from 0'),
    'twice': (dict(groups=torch.tensor([0, 1]), index=torch.tensor([3, 3])), ValueError, 'a sample twice'),
}


@pytest.mark.parametrize('name', GROUPS)
def test_groups_that_do_not_fit(name):
    options, error, message = GROUPS[name]
    with pytest.raises(error, match=message):
        GroupDRO(2, **options)


def test_texts_have_no_corners():
    with pytest.raises(TypeError, match='data is a'):
        coloured_corner(TextData.__new__(TextData), 0.5, 0)
