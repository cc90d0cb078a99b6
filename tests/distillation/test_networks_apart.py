"Networks that share what is trained, makers that give one twice, and losses without a gradient are refused"

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_aif.data.images import ImageData
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import Objective
from kd_aif.distillation.out_of_fold import out_of_fold_weights
from kd_aif.distillation.schedules import OneShot
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Published
from kd_aif.few_labels.batches import labelled_split
from kd_aif.few_labels.cross_fitting import distill_ssl
from kd_aif.few_labels.settings import SSLTraining
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.cross_scores import cross_scores
from kd_aif.influence.scores import influence_scores
from kd_aif.influence.self_influence import self_influence
from kd_aif.trust.explain import explain, explain_all

N = 24
X, Y = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 2
TRAIN, VAL = ([dict(x=x, y=Y[:12], index=torch.arange(12))] for x in (X[:12], X[12:]))
QUIET = Training(epochs=1, progress=False)


def net(outputs=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, outputs))


STUDENT = net()


def on_the_body(frozen=False):
    "A teacher with the student's first layer"
    student = net()
    student[1].requires_grad_(not frozen)
    return student, nn.Sequential(nn.Flatten(), student[1], nn.ReLU(), nn.Linear(5, 2))


def on_statistics():
    norm = nn.BatchNorm1d(4, affine=False)
    return nn.Sequential(norm, nn.Linear(4, 2)), nn.Sequential(norm, nn.Linear(4, 2))


def in_its_memory():
    student, teacher = net(), net(seed=1)
    teacher[1].weight = nn.Parameter(student[1].weight.data)
    return student, teacher


@pytest.mark.parametrize('mechanism', [None, 'student', 'both'])
@pytest.mark.parametrize('pair', [on_the_body, on_statistics, in_its_memory])
def test_a_teacher_with_parts_of_the_student(pair, mechanism):
    student, teacher = pair()
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(ValueError, match='teacher shares .* with the student.*copy.deepcopy'):
        distill(student, teacher, TRAIN, VAL, mechanism=mechanism, training=QUIET)
    assert all(map(torch.equal, before, student.parameters()))


def test_a_body_that_nobody_trains_may_be_shared():
    student, teacher = on_the_body(frozen=True)
    before = [p.clone() for p in teacher.parameters()]
    distill(student, teacher, TRAIN, VAL, training=QUIET)
    assert all(map(torch.equal, before, teacher.parameters()))


@pytest.mark.parametrize('which', ['student', 'teacher', 'body'])
def test_make_teacher_gives_a_network_of_its_own(which):
    student, teacher = net(), net(seed=1)
    body = nn.Sequential(nn.Flatten(), student[1], nn.ReLU(), nn.Linear(5, 2))
    schedule = OneShot(make_teacher=lambda: dict(student=student, teacher=teacher, body=body)[which])
    how = dict(mechanism='both', schedule=schedule, weighting=Published(), training=QUIET)
    with pytest.raises(ValueError, match='make_teacher: the new network (is|shares)'):
        distill(student, teacher, TRAIN, VAL, **how)


def labelled_images():
    x = torch.randint(0, 255, (N, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    known = Y, torch.arange(N), Y, ('a', 'b'), 'digits', 'train', 'f', torch.zeros(1), torch.ones(1)
    return labelled_split(ImageData(x, *known), 16, 0)[:2]


ssl_faults = {
    'the same twice': (
        lambda s: lambda k, one=net(): one,
        ValueError,
        r'teacher\(2\) is the network of teacher',
    ),
    'the student': (lambda s: lambda k: s, ValueError, r'teacher\(1\) is the student itself'),
    'a shared layer': (
        lambda s: lambda k: nn.Sequential(nn.Flatten(), s[1], nn.ReLU(), nn.Linear(5, 2)),
        ValueError,
        r"teacher\(1\) shares '1.weight' with the student",
    ),
    'a network with a shared layer': (
        lambda s: nn.Sequential(nn.Flatten(), s[1], nn.ReLU(), nn.Linear(5, 2)),
        ValueError,
        "teacher shares '1.weight'",
    ),
    'other classes': (
        lambda s: lambda k: net(9, k),
        ValueError,
        'teacher: a network has 9 classes, the images 2',
    ),
    'no network': (lambda s: lambda k: 'net', TypeError, r"teacher\(1\) is 'net'"),
    'a frozen student': (lambda s: s.requires_grad_(False) and None, ValueError, 'student is frozen'),
}


@pytest.mark.parametrize('name', ssl_faults)
def test_few_labels_need_three_networks(name):
    make, kind, message = ssl_faults[name]
    student = net()
    training = SSLTraining(steps=1, batch_size=2, mu=1, weak=None, strong=None, progress=False)
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(kind, match=message):
        distill_ssl(student, make(student), *labelled_images(), training=training)
    assert all(map(torch.equal, before, student.parameters()))


def test_few_labels_have_a_training_of_their_own():
    with pytest.raises(TypeError, match='training is a Training; give SSLTraining'):
        distill_ssl(net(), None, *labelled_images(), training=Training())


def test_a_model_that_trains_on_through_the_folds():
    model = net()

    def fit(batches):
        distill(model, None, list(batches), VAL, training=QUIET)
        return model

    with pytest.raises(ValueError, match='fit: it trained the model of an earlier fold on'):
        out_of_fold_weights(fit, TRAIN, VAL, progress=False)


def never(batches):
    raise AssertionError('the check comes before any training')


def relabelled(batches, kind):
    return [b | dict(y=b['y'].to(kind)) for b in batches]


fold_faults = [
    (TRAIN, relabelled(VAL, torch.float32), 'those of train are classes, those of val real numbers'),
    (relabelled(TRAIN, torch.float32), VAL, 'those of train are real numbers, those of val classes'),
    (relabelled(TRAIN, torch.float32), relabelled(VAL, torch.float32), 'give loss=squared_error'),
    (TRAIN, [{k: v[:1] for k, v in VAL[0].items()}], 'folds is 2 for 1 validation samples'),
]


@pytest.mark.parametrize('train, val, message', fold_faults)
def test_both_sets_are_looked_at_before_the_first_fit(train, val, message):
    with pytest.raises(ValueError, match=message):
        out_of_fold_weights(never, train, val, progress=False)


losses = {
    'detached': lambda z, batch: batch_cross_entropy(z.detach(), batch),
    'errors': lambda z, batch: (z.argmax(1) != batch['y']).float(),
}
users = {
    'influence_scores': lambda loss: influence_scores(net(), loss, TRAIN, VAL, progress=False),
    'all layers': lambda loss: influence_scores(net(), loss, TRAIN, VAL, last_layer=False, progress=False),
    'cross_scores': lambda loss: cross_scores(net(), loss, TRAIN, VAL),
    'self_influence': lambda loss: self_influence(net(), loss, TRAIN, progress=False),
    'distill': lambda loss: distill(
        net(), None, TRAIN, VAL, objective=Objective(label_loss=loss), training=QUIET
    ),
}


@pytest.mark.parametrize('user', users)
@pytest.mark.parametrize('loss', losses)
def test_a_loss_without_gradient(user, loss):
    with pytest.raises(ValueError, match='loss has no gradient.*leave out detach'):
        users[user](losses[loss])


@pytest.mark.parametrize('function', [explain, explain_all])
def test_explanations_read_plain_loaders(function):
    rows = DataLoader(TensorDataset(X, Y), 6, shuffle=True)
    by_hand = [dict(x=X, y=Y, index=torch.arange(N))]
    found = [function(net(), X[:1], train) for train in (rows, by_hand)]
    ours, known = (f if function is explain else f[0] for f in found)
    order = ours.index.argsort()
    torch.testing.assert_close(ours.values[order], known.values, rtol=1e-4, atol=1e-6)
    assert len(ours.supporters()) and ours.supporters().index.tolist() == known.supporters().index.tolist()
