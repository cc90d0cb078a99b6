"Bad input of distillation: each an error that names argument, value and remedy, before any step."

import copy
import math

import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import AuxiliaryLoss, Objective, regression_objective
from kd_aif.distillation.out_of_fold import out_of_fold_weights
from kd_aif.distillation.schedules import Every, OneShot, Online
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Fixed, Influence, Published, Reweighting
from kd_aif.few_labels.algorithms import UDA, FixMatch, PseudoLabel
from kd_aif.few_labels.settings import SSLTraining
from kd_aif.few_labels.trainer import train_ssl
from kd_aif.foundation.core import generator
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.iterative_solvers import CG
from kd_aif.weights.calibration import calibrated_weights
from kd_aif.weights.class_weights import ClassWeighting
from kd_aif.weights.sample_weights import SampleWeights
from kd_aif.weights.transforms import EMA, Multiplicative, mean_one_within_class, weights_from_influence

C, N, M = 3, 24, 12
INF, NAN = math.inf, math.nan
QUICK = Training(epochs=2, lr=0.05, progress=False)


def rows(n, seed, start=0):
    g = torch.Generator().manual_seed(seed)
    return dict(x=torch.randn(n, 3, generator=g), y=torch.arange(n) % C, index=torch.arange(start, start + n))


def cut(data, size=8):
    return [{k: v[at] for k, v in data.items()} for at in torch.arange(len(data['x'])).split(size)]


TRAIN, VAL = cut(rows(N, 1)), cut(rows(M, 2, 100))


class Net(nn.Sequential):
    "Counts forward passes in training mode: a training step has one"

    steps = 0

    def forward(self, x):
        self.steps += self.training
        return super().forward(x)


def net(outputs=C, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def changed(batches, **changes):
    "Batches with other columns: functions of a column, None to leave it out"
    new = [
        {k: changes.get(k, lambda v: v) and changes.get(k, lambda v: v)(v) for k, v in b.items()}
        for b in batches
    ]
    return [{k: v for k, v in b.items() if v is not None} for b in new]


def run(**arguments):
    "A run in which no step may be made"
    student, teacher = net(seed=1), net(seed=2)
    given = dict(student=student, teacher=teacher, train=TRAIN, val=VAL, training=QUICK) | arguments
    networks = [m for m in (student, teacher, given['student'], given['teacher']) if isinstance(m, Net)]
    before = [copy.deepcopy(m.state_dict()) for m in networks]
    try:
        return distill(**given)
    except Exception:
        looked_at = isinstance(
            given.get('weighting'), Reweighting
        )  # its weights come from a first forward pass
        assert looked_at or not any(m.steps for m in networks), 'a training step was made'
        for m, state in zip(networks, before):
            assert all(torch.equal(v.nan_to_num(), m.state_dict()[k].nan_to_num()) for k, v in state.items())
        raise


def label(value):
    return lambda y: torch.where(torch.arange(len(y)) == 1, value, y)


class Everywhere(IterableDataset):
    "Gives all samples in each worker"

    def __iter__(self):
        data = rows(N, 1)
        return ({k: v[i] for k, v in data.items()} for i in range(N))


def broken(value):
    model = net()
    model[0].weight.data[0, 0] = value
    return model


SAME = net()
OWN = 'the loss of a sample changes with the other samples.*compare outputs and labels'

RUNS = {
    # networks
    'student in words': (dict(student='resnet20'), TypeError, "student is 'resnet20', a str; give a network"),
    'student class': (dict(student=nn.Linear), TypeError, 'student is the class Linear; give a network'),
    'no student': (dict(student=None), TypeError, 'student is None.*give a network'),
    'student that is a function': (
        dict(student=lambda x: x),
        TypeError,
        'student is a function; give a network',
    ),
    'student without parameters': (
        dict(student=nn.Sequential()),
        ValueError,
        'student is a Sequential without parameters',
    ),
    'student of NaN': (dict(student=broken(NAN)), ValueError, "student: its parameter '0.weight' has NaN"),
    'teacher in words': (dict(teacher='resnet20'), TypeError, "teacher is 'resnet20', a str; give a network"),
    'teacher class': (dict(teacher=nn.Linear), TypeError, 'teacher is the class Linear; give a network'),
    'teacher of NaN': (dict(teacher=broken(NAN)), ValueError, "teacher: its parameter '0.weight' has NaN"),
    'teacher of inf': (
        dict(teacher=broken(INF)),
        ValueError,
        "teacher: its parameter '0.weight' has NaN or infinite",
    ),
    'one network twice': (
        dict(student=SAME, teacher=SAME),
        ValueError,
        'teacher is the student itself; give another network',
    ),
    'teacher of other classes': (
        dict(teacher=net(5)),
        ValueError,
        'teacher has 5 classes, the student 3; build both',
    ),
    'inputs too wide': (
        dict(student=nn.Linear(7, C)),
        ValueError,
        r'student: Linear fails on the batch \(x .*give inputs',
    ),
    # groups of settings
    'objective class': (
        dict(objective=Objective),
        TypeError,
        r'objective is the class Objective; give Objective\(',
    ),
    'objective in words': (dict(objective='kd'), TypeError, r"objective is 'kd', a str; give Objective\("),
    'training class': (
        dict(training=Training),
        TypeError,
        r'training is the class Training; give Training\(',
    ),
    'training as a dictionary': (dict(training={}), TypeError, r'training is a dict; give Training\('),
    'schedule class': (
        dict(schedule=OneShot, mechanism='student'),
        TypeError,
        r'schedule is the class OneShot; use OneShot\(\)',
    ),
    'schedule in words': (
        dict(schedule='once', mechanism='student'),
        TypeError,
        r"schedule is 'once', a str; use OneShot",
    ),
    'weighting class': (
        dict(weighting=Influence, mechanism='student'),
        TypeError,
        r'weighting is the class Influence; give',
    ),
    'weighting as a list': (
        dict(weighting=[1.0] * N),
        TypeError,
        r'weighting is a list; give .*Fixed\(weights\)',
    ),
    'weighting as a tensor': (
        dict(weighting=torch.ones(N)),
        TypeError,
        r'weighting is a Tensor; give .*Fixed\(weights\)',
    ),
    'weighting as a number': (dict(weighting=1.0), TypeError, r'weighting is 1.0, a float; give'),
    'mechanism of truth': (
        dict(mechanism=True),
        ValueError,
        "mechanism is True; use None, 'student' or 'both'",
    ),
    'mechanism in a list': (dict(mechanism=['student']), ValueError, r"mechanism is \['student'\]; use None"),
    # makers
    'maker that gives nothing': (
        dict(mechanism='both', weighting=Published(), schedule=OneShot(make_teacher=lambda: None)),
        TypeError,
        'make_teacher gives a NoneType; give a function',
    ),
    'maker of other classes': (
        dict(mechanism='both', weighting=Published(), schedule=OneShot(make_teacher=lambda: net(4))),
        ValueError,
        'teacher has 4 classes, the student 3; build both',
    ),
    'maker that gives a class': (
        dict(mechanism='both', weighting=Published(), schedule=OneShot(make_teacher=lambda: Net)),
        TypeError,
        'make_teacher gives a type; give a function',
    ),
    # losses
    'mean loss': (
        dict(objective=Objective(label_loss=lambda z, b: F.cross_entropy(z, b['y']))),
        ValueError,
        r'label_loss returns values of shape \(\).*one value per sample',
    ),
    'column of losses': (
        dict(objective=Objective(label_loss=lambda z, b: batch_cross_entropy(z, b)[:, None])),
        ValueError,
        r'label_loss returns .*\(8, 1\).*one value per sample',
    ),
    'losses of classes': (
        dict(objective=Objective(label_loss=lambda z, b: z)),
        ValueError,
        r'label_loss returns .*\(8, 3\).*one value per sample',
    ),
    'mean in each place': (
        dict(objective=Objective(label_loss=lambda z, b: batch_cross_entropy(z, b).mean().expand(len(z)))),
        ValueError,
        'label_loss: ' + OWN,
    ),
    'NaN loss': (
        dict(objective=Objective(label_loss=lambda z, b: batch_cross_entropy(z, b) * NAN)),
        ValueError,
        'label_loss is nan for the sample with index 0; check',
    ),
    'infinite loss': (
        dict(objective=Objective(label_loss=lambda z, b: batch_cross_entropy(z, b) / 0)),
        ValueError,
        'label_loss is inf for the sample with index 0; check',
    ),
    'loss of another key': (
        dict(objective=Objective(label_loss=lambda z, b: F.cross_entropy(z, b['label'], reduction='none'))),
        ValueError,
        "label_loss fails .*KeyError: 'label'; give loss",
    ),
    'loss that gives nothing': (
        dict(objective=Objective(label_loss=lambda z, b: None)),
        TypeError,
        'label_loss returns a NoneType; give a tensor',
    ),
    'mean teacher loss': (
        dict(objective=Objective(teacher_loss=lambda s, t, T: F.mse_loss(s, t))),
        ValueError,
        r'teacher_loss returns values of shape \(\).*one value per sample',
    ),
    'teacher loss of classes': (
        dict(objective=Objective(teacher_loss=lambda s, t, T: (s - t) ** 2)),
        ValueError,
        r'teacher_loss returns .*\(8, 3\).*one value per sample',
    ),
    'NaN teacher loss': (
        dict(objective=Objective(teacher_loss=lambda s, t, T: (s - t).sum(1) * NAN)),
        ValueError,
        'teacher_loss is nan for the sample',
    ),
    'targets by broadcasting': (
        dict(
            student=net(1),
            teacher=net(1),
            train=changed(TRAIN, y=lambda y: y + torch.rand(len(y))),
            val=changed(VAL, y=lambda y: y + 0.5),
            objective=regression_objective().__class__(
                label_loss=lambda z, b: ((z - b['y']) ** 2).mean(1),
                teacher_loss=regression_objective().teacher_loss,
            ),
        ),
        ValueError,
        'label_loss: ' + OWN,
    ),
    # outputs
    'squeezed output': (
        dict(objective=Objective(forward=lambda m, b: m(b['x']).sum(1))),
        ValueError,
        r'student returns \(8,\) .*keep the last axis',
    ),
    'output of tokens': (
        dict(objective=Objective(forward=lambda m, b: torch.stack([m(b['x'])] * 4, 1))),
        ValueError,
        r'student returns \(8, 4, 3\).*every token',
    ),
    'tuple of outputs': (
        dict(objective=Objective(forward=lambda m, b: (m(b['x']), 0))),
        TypeError,
        r'student returns a tuple, logits .*\[0\]',
    ),
    'dictionary of outputs': (
        dict(objective=Objective(forward=lambda m, b: dict(logits=m(b['x'])))),
        TypeError,
        r"student returns a dict.*\['logits'\]",
    ),
    'no output': (
        dict(objective=Objective(forward=lambda m, b: None)),
        TypeError,
        'student returns a NoneType',
    ),
    'NaN output': (
        dict(objective=Objective(forward=lambda m, b: m(b['x']) * NAN)),
        ValueError,
        'student returns logits that are NaN or infinite; check',
    ),
    'one row of output': (
        dict(objective=Objective(forward=lambda m, b: m(b['x'])[:1])),
        ValueError,
        'student returns 1 rows of logits for 8 samples; give',
    ),
    # weights by rules
    'negative weights': (
        dict(weighting=Reweighting(lambda s: -torch.ones(len(s.losses)))),
        ValueError,
        'callback gives a weight of -1; give one finite',
    ),
    'NaN weights': (
        dict(weighting=Reweighting(lambda s: s.losses.detach() * NAN)),
        ValueError,
        'callback gives a weight of nan; give one finite',
    ),
    'infinite weights': (
        dict(weighting=Reweighting(lambda s: s.losses.detach() / 0)),
        ValueError,
        'callback gives a weight of inf; give one finite',
    ),
    'one weight': (
        dict(weighting=Reweighting(lambda s: torch.ones(1))),
        ValueError,
        r'callback gives weights of shape \(1,\) for 8 samples; give',
    ),
    'weights in a list': (
        dict(weighting=Reweighting(lambda s: [1.0] * len(s.losses))),
        TypeError,
        'callback gives a list; give one finite',
    ),
    'no weights': (
        dict(weighting=Reweighting(lambda s: None)),
        TypeError,
        'callback gives a NoneType; give one finite',
    ),
    'negative updates': (
        dict(mechanism='student', weighting=Influence(update=lambda old, new: -new)),
        ValueError,
        'update gives a weight of -.*give one finite',
    ),
    'NaN updates': (
        dict(mechanism='student', weighting=Published(update=lambda old, new: new * NAN)),
        ValueError,
        'update gives a weight of nan; give one finite',
    ),
    'short updates': (
        dict(mechanism='student', weighting=Published(update=lambda old, new: new[:3])),
        ValueError,
        r'update gives weights of shape \(3,\) for 24 samples',
    ),
    # batches
    'label -100': (
        dict(train=changed(TRAIN, y=label(-100))),
        ValueError,
        r'train: labels from -100 .*must be in \[0, 3\)',
    ),
    'label C': (
        dict(train=changed(TRAIN, y=label(C))),
        ValueError,
        r'train: labels from 0 to 3.*must be in \[0, 3\)',
    ),
    'label 10**9': (
        dict(train=changed(TRAIN, y=label(10**9)), mechanism='student'),
        ValueError,
        r'train: labels from 0 to 1000000000.*must be in \[0, 3\)',
    ),
    'validation label -100': (
        dict(val=changed(VAL, y=label(-100))),
        ValueError,
        r'val: labels from -100 .*must be in \[0, 3\)',
    ),
    'test label': (
        dict(test=changed(VAL, y=label(C))),
        ValueError,
        r'test: labels from 0 to 3.*must be in \[0, 3\)',
    ),
    'labels of bytes': (
        dict(train=changed(TRAIN, y=lambda y: y.byte())),
        TypeError,
        r"train: batch\['y'\] is torch.uint8.*int64",
    ),
    'labels in a column': (
        dict(train=changed(TRAIN, y=lambda y: y[:, None])),
        TypeError,
        r"train: batch\['y'\] is torch.int64 \(8, 1\); give",
    ),
    'real labels': (
        dict(train=changed(TRAIN, y=lambda y: y.float())),
        ValueError,
        'labels: those of train are real numbers, those of val classes',
    ),
    'no index': (
        dict(train=changed(TRAIN, index=None)),
        ValueError,
        "train: batches have no 'index'.*give every sample",
    ),
    'no labels': (
        dict(train=changed(TRAIN, y=None)),
        ValueError,
        "train: batches have no 'y'.*give every sample",
    ),
    'no inputs': (dict(train=changed(TRAIN, x=None)), KeyError, "batch has no 'x'.*give forward"),
    'real indices': (
        dict(train=changed(TRAIN, index=lambda i: i.float())),
        TypeError,
        r"train: batch\['index'\] is torch.float32",
    ),
    'indices twice': (
        dict(train=changed(TRAIN, index=lambda i: i // 2)),
        ValueError,
        'train: 24 samples have 12 different indices.*its own index',
    ),
    'two workers that give all': (
        dict(train=DataLoader(Everywhere(), 8, num_workers=2)),
        ValueError,
        'train: 48 samples have 24 different.*its own index',
    ),
    'short inputs': (
        dict(train=changed(TRAIN, x=lambda x: x[:-1])),
        ValueError,
        r"train: batch\['x'\] has 7 rows for 8 indices; give one",
    ),
    'NaN inputs': (
        dict(train=changed(TRAIN, x=lambda x: x * NAN)),
        ValueError,
        r"train: batch\['x'\] has NaN or infinite.*clean",
    ),
    'infinite inputs': (
        dict(val=changed(VAL, x=lambda x: x / 0)),
        ValueError,
        r"val: batch\['x'\] has NaN or infinite.*clean",
    ),
    'tuples': (
        dict(train=[tuple(b.values()) for b in TRAIN]),
        TypeError,
        'train: batches are tuple; yield a dict',
    ),
    'tensors': (dict(val=[b['x'] for b in VAL]), TypeError, 'val: batches are Tensor; yield a dict'),
    'train in words': (dict(train='train.csv'), TypeError, 'train is a str; give batches'),
    'no train': (dict(train=None), TypeError, 'train is a NoneType; give batches'),
    'no val': (dict(val=None), TypeError, 'val is a NoneType; give batches'),
    'one batch': (dict(train=TRAIN[0]), TypeError, 'train: batches are str; yield a dict'),
    'iterator': (
        dict(train=iter(TRAIN)),
        TypeError,
        'train is a generator, which can be read only once; give a list',
    ),
    'nothing to train on': (dict(train=[]), ValueError, 'train is empty; give at least one sample'),
    # solvers that do not arrive
    'a solve of one step': (
        dict(
            mechanism='student',
            weighting=Influence(last_layer=False, solver=CG(1e-9, max_iter=1, preconditioner=None)),
        ),
        ValueError,
        'solver: CG.*ended at a relative residual of.*increase damping or max_iter',
    ),
}


@pytest.mark.parametrize('name', RUNS)
def test_runs(name):
    arguments, error, message = RUNS[name]
    with pytest.raises(error, match='(?s)' + message):
        run(**arguments)


def numbers(make, name, positive=True, bad=(INF, NAN, -1.0), kinds=(True, '0.1', None)):
    "A row for each wrong number of a setting"
    values = bad + ((0.0,) if positive else ())
    wrong = [(make, name, v, ValueError, rf'{name} is {v!r}.*give') for v in values]
    return wrong + [(make, name, v, (TypeError, ValueError), rf'{name} is {v!r}.*give') for v in kinds]


def whole(make, name, least=1, values=(2.5, True, '3', NAN)):
    return [(make, name, v, ValueError, rf'{name} is {v!r}; .*give') for v in (least - 1, *values)]


def switches(make, *names):
    return [
        (make, n, v, TypeError, rf'{n} is {v!r}, a .*use True or False') for n in names for v in ('no', 1)
    ]


def functions(make, *names):
    return [(make, n, v, TypeError, rf'{n} is {v!r}, a .*give') for n in names for v in ('text', 3)]


SETTINGS = [
    *numbers(Training, 'lr'),
    *whole(Training, 'epochs'),
    *switches(Training, 'include_validation', 'progress', 'cache_teacher', 'capture'),
    *functions(Training, 'make_optimizer', 'make_schedule', 'compile'),
    *[
        (Training, 'seed', v, TypeError, rf'seed is {v!r}, a .*give an integer')
        for v in (2.5, True, '0', None)
    ],
    *[(Training, 'autocast', v, TypeError, rf'autocast is {v!r}: give') for v in ('bf16', True, torch.int8)],
    *numbers(Objective, 'T'),
    *numbers(Objective, 'alpha', positive=False, bad=(INF, NAN, -1.0, 1.5)),
    *functions(Objective, 'label_loss', 'forward', 'teacher_loss'),
    (
        Objective,
        'label_loss',
        nn.CrossEntropyLoss(),
        TypeError,
        r'label_loss is Cross.*\(input, target\); give',
    ),
    (Objective, 'teacher_loss', nn.KLDivLoss(), TypeError, r'teacher_loss is KLDiv.*\(input, target\); give'),
    (Objective, 'auxiliary', max, TypeError, 'auxiliary is a .*; give AuxiliaryLoss'),
    *whole(Influence, 'folds', 2),
    *switches(Influence, 'pooled_reference', 'last_layer'),
    *switches(Published, 'last_layer'),
    *[
        (k, 'solver', v, TypeError, 'solver is .*give a solver such as')
        for k in (Influence, Published)
        for v in ('cg', CG, 0.1, True)
    ],
    *[
        (k, 'update', v, TypeError, 'update is .*give')
        for k in (Influence, Published)
        for v in ('ema', EMA, 0.9, None)
    ],
    *[
        (k, 'class_weighting', v, TypeError, 'class_weighting is .*give ClassWeighting')
        for k in (Influence, Published)
        for v in ('on', ClassWeighting, True)
    ],
    *[(Influence, 'score', v, ValueError, 'score is .*use one of') for v in ('mean', 'x', ['mean'], None)],
    *[(Published, 'score', v, ValueError, "score is .*use 'mean'") for v in ('loss', ('mean',), None)],
    *[
        (Published, 'beta', v, ValueError, rf'beta is {v!r}; give a strength')
        for v in (INF, NAN, -1.0, True, '1', None)
    ],
    *[(Published, 'transform', v, ValueError, rf'transform is {v!r}; use one of') for v in ('x', None, 1)],
    *[
        (lambda callback: Reweighting(callback), 'callback', v, TypeError, 'callback is .*give a function')
        for v in ('x', None, Net, 1.0)
    ],
    *whole(Every, 'k'),
    *whole(Every, 'start', 0),
    *switches(Every, 'teacher_first'),
    *whole(Online, 'start', 0),
    *whole(OneShot, 'after', 0),
    *whole(OneShot, 'generations'),
    (OneShot, 'make_teacher', net(), TypeError, 'make_teacher is a Net, a network; give a function'),
    *functions(OneShot, 'make_teacher'),
    *numbers(EMA, 'm', positive=False, bad=(INF, NAN, -1.0, 1.5)),
    *numbers(Multiplicative, 'eta'),
    *numbers(ClassWeighting, 'eta'),
    *numbers(ClassWeighting, 'max_fraction'),
    *numbers(ClassWeighting, 'significance', positive=False, bad=(INF, NAN, -1.0, 1.5)),
    *whole(ClassWeighting, 'per_class', 2),
    *whole(ClassWeighting, 'pilot_per_class', 2),
    *whole(ClassWeighting, 'start', 0),
    *whole(SSLTraining, 'steps'),
    *whole(SSLTraining, 'batch_size'),
    *whole(SSLTraining, 'mu'),
    *numbers(SSLTraining, 'lr'),
    *numbers(SSLTraining, 'finetune_lr'),
    *numbers(SSLTraining, 'ema', positive=False, bad=(INF, NAN, -1.0, 1.5)),
    *functions(SSLTraining, 'make_optimizer', 'forward', 'weak', 'strong'),
    *switches(SSLTraining, 'progress'),
    *[(SSLTraining, 'seed', v, TypeError, rf'seed is {v!r}, a .*give an integer') for v in (2.5, True, '0')],
    *numbers(FixMatch, 'weight', positive=False),
    *numbers(FixMatch, 'threshold', positive=False, bad=(INF, NAN, -1.0, 1.5)),
    *numbers(PseudoLabel, 'ramp', positive=False, bad=(INF, NAN, -1.0, 1.5)),
    *numbers(UDA, 'T'),
]


@pytest.mark.parametrize('make,name,value,error,message', SETTINGS)
def test_settings(make, name, value, error, message):
    with pytest.raises(error, match='(?s)' + message):
        make(**{name: value})


def not_called(batches):
    raise AssertionError('a model was trained')


OUT_OF_FOLD = [
    (dict(fit='net'), TypeError, "fit is 'net', a str; give a function"),
    (dict(fit=net()), TypeError, 'fit is a Net, a network; give a function'),
    (dict(fit=lambda batches: None), TypeError, 'fit is None.*give a network'),
    (dict(folds=2.5), ValueError, 'folds is 2.5; give a whole number from 2'),
    (dict(folds=1), ValueError, 'folds is 1; give a whole number from 2'),
    (dict(folds=True), ValueError, 'folds is True; give a whole number from 2'),
    (dict(seed=2.5), TypeError, 'seed is 2.5, a float: give an integer'),
    (dict(score='mean'), ValueError, "score is 'mean'; use one of"),
    (dict(loss='ce'), TypeError, "loss is 'ce', a str; give a function"),
    (dict(loss=nn.CrossEntropyLoss()), TypeError, r'loss is Cross.*\(input, target\); give'),
    (dict(forward=3), TypeError, 'forward is 3, a int; give a function'),
    (dict(progress='no'), TypeError, "progress is 'no', a str: use True or False"),
    (dict(train=None), TypeError, 'train is a NoneType; give batches'),
    (dict(val=[]), ValueError, 'val is empty; give at least one'),
    (dict(train=changed(TRAIN, index=None)), ValueError, "train: batches have no 'index'"),
]


@pytest.mark.parametrize('arguments,error,message', OUT_OF_FOLD)
def test_out_of_fold_weights(arguments, error, message):
    with pytest.raises(error, match=message):
        out_of_fold_weights(**(dict(fit=not_called, train=TRAIN, val=VAL, progress=False) | arguments))


RULES = [
    (lambda: weights_from_influence(torch.ones(3), beta=INF), ValueError, 'beta is inf; give a strength'),
    (lambda: weights_from_influence(torch.ones(3), 'x'), ValueError, "transform is 'x'; use one of"),
    (lambda: SampleWeights(3, transform='x'), ValueError, "transform is 'x'; use one of"),
    (lambda: SampleWeights(3, update='ema'), TypeError, "update is 'ema', a str; give a function"),
    (lambda: SampleWeights(3, density='x'), ValueError, "density is 'x'; use one of"),
    (lambda: AuxiliaryLoss('hint'), TypeError, "loss is 'hint', a str; give a function"),
    (lambda: AuxiliaryLoss(max, outputs='maps'), TypeError, "outputs is 'maps', a str; give a function"),
    (lambda: AuxiliaryLoss(max, weight=NAN), ValueError, 'weight is nan: give a finite number above 0'),
    (
        lambda: AuxiliaryLoss(max, base_weight=INF),
        ValueError,
        'base_weight is inf: give a finite number of 0 or more',
    ),
    (
        lambda: AuxiliaryLoss(max, base_weight=True),
        TypeError,
        'base_weight is True, a bool: give a plain number',
    ),
    (lambda: generator(True), TypeError, 'seed is True: give an integer'),
    (lambda: generator(2.5), TypeError, 'seed is 2.5: give an integer'),
    (lambda: Fixed([1.0, NAN]), ValueError, 'weights must be finite, not negative'),
    (lambda: Fixed([1.0, INF]), ValueError, 'weights must be finite, not negative'),
    (lambda: Fixed('heavy'), TypeError, 'weights is str; give one number per sample'),
    (lambda: Fixed(torch.ones(2) > 0), TypeError, 'weights is torch.bool.*give one number per sample'),
    (
        lambda: Fixed([1.0], class_weighting='auto'),
        TypeError,
        "class_weighting is 'auto', a str; give ClassWeighting",
    ),
    (lambda: train_ssl('net', FixMatch(), None, None), TypeError, "student is 'net', a str; give a network"),
    (
        lambda: train_ssl(net(), FixMatch(), None, None),
        TypeError,
        'labelled is a NoneType.*give the first two',
    ),
    (
        lambda: train_ssl(net(), FixMatch(), None, None, training=Training()),
        TypeError,
        'training is a Training; give SSL',
    ),
    (
        lambda: train_ssl(net(), FixMatch(), None, None, measure='x'),
        TypeError,
        "measure is 'x', a str; give a function",
    ),
]


@pytest.mark.parametrize('make,error,message', RULES)
def test_rules_and_other_entries(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_late_negative_weight_ends_the_epoch():
    calls = []

    def late(step):
        calls.append(step)
        return torch.ones(len(step.losses)) * (-1.0 if len(calls) == 3 else 1.0)

    with pytest.raises(ValueError, match='callback: it gave a weight below 0.*give finite weights'):
        distill(net(seed=1), net(seed=2), TRAIN, VAL, weighting=Reweighting(late), training=QUICK)
    assert len(calls) == len(TRAIN + VAL)


def test_right_settings_pass_and_a_callback_keeps_what_is_its_own():
    class Rule:
        checked = 0

        def __call__(self, step):
            return torch.ones(len(step.losses))

        def check(self):
            self.checked += 1

    rule, settings = Rule(), Training(epochs=2, lr=0.05, capture=False, cache_teacher=False, progress=False)
    found = distill(net(seed=1), net(seed=2), TRAIN, VAL, weighting=Reweighting(rule), training=settings)
    plain = distill(net(seed=1), net(seed=2), TRAIN + VAL, VAL, training=settings)
    assert (
        rule.checked == 2
        and math.isfinite(found.metrics['val_loss'])
        and math.isfinite(plain.metrics['val_loss'])
    )


@pytest.mark.parametrize('labels', [[0, 1, 10**9], [0, 1, -100]])
def test_labels_that_are_no_classes_take_no_memory(labels):
    wrong, right = torch.tensor(labels), torch.tensor([0, 1, 2])
    for first, second in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match='labels are from .*give classes from 0, below 1,000,000'):
            calibrated_weights(torch.rand(3), torch.rand(3), first, second)
    with pytest.raises(ValueError, match='labels are from .*give classes from 0, below 1,000,000'):
        mean_one_within_class(torch.ones(3), wrong)
