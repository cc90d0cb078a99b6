"Distillation with models and loaders that the package does not know: mechanisms, schedules, reproducibility, and faults that leave the models untouched."

import copy
from dataclasses import FrozenInstanceError

import pytest, torch
from torch import nn
from kd_aif.foundation.core import generator
from kd_aif.data.mixed_batches import MixedBatches
from kd_aif.data.training_set import check_batches
from kd_aif.distillation.checks import check_auxiliary, count_classes
from kd_aif.distillation.result import Run
from kd_aif.distillation.evaluation import evaluate
from kd_aif.distillation.objective import AuxiliaryLoss, Objective
from kd_aif.distillation.schedules import Every, Online, OneShot
from kd_aif.distillation.trainer import Step
from kd_aif.distillation.weighting import Fixed, Influence
from kd_aif.influence.cross_scores import CrossScores
from kd_aif.influence.scores import InfluenceScores
from kd_aif.foundation.losses import batch_cross_entropy, distill_loss
from kd_aif.weights.class_weights import ClassWeighting, ClassWeights
from kd_aif.weights.sample_weights import joint_weights
from kd_aif.weights.transforms import EMA

from flat_settings import distill

C, N, M, FIRST = 3, 150, 90, 1000


class Pairs(nn.Module):
    "Two named inputs, normalisation, dropout; takes and gives a dictionary"

    def __init__(self, width=8, classes=C):
        super().__init__()
        self.left, self.right = nn.Linear(4, width), nn.Linear(2, width)
        self.norm, self.drop, self.head = nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, classes)

    def forward(self, inputs):
        return dict(
            logits=self.head(
                self.drop(self.norm(torch.relu(self.left(inputs['wide']) + self.right(inputs['narrow']))))
            )
        )


def forward(model, batch):
    return model(batch)['logits']


class Loader:
    "Re-iterable and nothing more: no length, no `eval_view`, no `set_epoch`; `shuffle` gives a new order in each pass"

    def __init__(self, data, size=32, shuffle=False):
        self.data, self.size, self.shuffle, self.passes = data, size, shuffle, 0

    def __iter__(self):
        self.passes += 1
        n = len(self.data['narrow'])
        order = (
            torch.randperm(n, generator=generator(self.passes, 'order')) if self.shuffle else torch.arange(n)
        )
        for at in order.split(self.size):
            yield {k: v[at] for k, v in self.data.items()}


def rows(n, seed, first, share_wrong=0.0):
    "Three clouds; indices far from 0 and with gaps, in no order; the first samples of a random order get another label"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % C
    centre = torch.tensor([[3.0, 0, 0, 0, 0, 0], [0, 3.0, 0, 0, 3.0, 0], [0, 0, 0, 3.0, 0, 3.0]])
    x = centre[y] + torch.randn(n, 6, generator=g)
    wrong = torch.rand(n, generator=g) < share_wrong
    return dict(
        wide=x[:, :4],
        narrow=x[:, 4:],
        y=torch.where(wrong, (y + 1) % C, y),
        index=first + 3 * torch.randperm(n, generator=g),
    ), wrong


train_data, wrong = rows(N, 0, FIRST, 0.35)
clean_data, _ = rows(N, 0, FIRST)
val_data, _ = rows(M, 1, 5000)
test_data, _ = rows(60, 2, 9000)
train, clean, val, test = Loader(train_data), Loader(clean_data), Loader(val_data), Loader(test_data)


def model(seed=0, width=8, classes=C):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Pairs(width, classes)


settings = dict(forward=forward, epochs=3, lr=0.05, alpha=0.5, progress=False)


@pytest.fixture(scope='module')
def trained():
    "A teacher that has seen training and validation samples"
    return distill(model(9, 16), None, MixedBatches(train, val), val, **settings | dict(epochs=12)).student


@pytest.fixture
def teacher(trained):
    return copy.deepcopy(trained)


def state(m):
    return {k: v.clone() for k, v in m.state_dict().items()}


def equal(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items()) and a.keys() == b.keys()


def without(batch, *keys):
    return {k: v for k, v in batch.items() if k not in keys}


# Mechanisms and schedules


@pytest.mark.filterwarnings('ignore:include_validation=False')
@pytest.mark.parametrize('include_validation', [True, False])
@pytest.mark.parametrize(
    'schedule', [OneShot(), OneShot(after=2), Every(1, start=1), Every(2, start=0)], ids=str
)
@pytest.mark.parametrize('mechanism', ['student', 'both'])
def test_mechanisms_and_schedules(teacher, mechanism, schedule, include_validation):
    student, before = model(1), (state(teacher), state(model(1)))
    run = distill(
        student,
        teacher,
        train,
        val,
        mechanism=mechanism,
        schedule=schedule,
        include_validation=include_validation,
        test=test,
        **settings,
    )
    assert isinstance(run, Run) and run.student is student and run.mechanism == mechanism
    assert run.index.tolist() == train_data['index'].tolist() and run.weights.shape == (N,)
    assert (
        isinstance(run.scores, CrossScores)
        and torch.equal(run.scores.index, run.index)
        and run.calibration is not None
    )
    assert torch.isfinite(run.weights).all() and (run.weights >= 0).all()
    assert run.val_weights.shape == (M * include_validation,)
    for c in range(C):
        assert float(
            torch.cat(
                [
                    run.weights[train_data['y'] == c],
                    run.val_weights[val_data['y'][: len(run.val_weights)] == c],
                ]
            ).mean()
        ) == pytest.approx(1, abs=1e-4)
    assert not equal(before[1], state(student))
    assert equal(before[0], state(teacher)) == (mechanism == 'student'), (
        'mechanism 1 leaves the teacher alone, mechanism 2 trains it on in place'
    )
    assert run.teacher is teacher
    assert [h['phase'] for h in run.history] == (
        ['teacher'] * 3 if mechanism == 'both' and isinstance(schedule, OneShot) else []
    ) + ['student'] * 3
    assert all(s >= 0 for s in run.seconds.values()) and 'scoring' in run.seconds and 'student' in run.seconds
    for key in (
        'test_accuracy',
        'test_loss',
        'val_accuracy',
        'teacher_test_accuracy',
        'clean_fraction',
        'effective_sample_size',
    ):
        assert isinstance(run.metrics[key], float), key
    assert len(run.metrics['per_class_accuracy']) == C and 'final epoch' in run._repr_markdown_()


def test_wrong_labels_lose_weight_and_the_student_gains(teacher):
    run = distill(model(1), teacher, train, val, mechanism='student', test=test, **settings)
    assert run.weights[~wrong].mean() > 2 * run.weights[wrong].mean()
    assert abs(run.metrics['clean_fraction'] - float((~wrong).double().mean())) < 0.15


def test_unequal_treatment_of_both_sets_is_said(teacher):
    with pytest.warns(UserWarning, match='include_validation=False with calibrated weights'):
        distill(
            model(1),
            teacher,
            train,
            val,
            mechanism='student',
            schedule=Every(1, start=1),
            include_validation=False,
            **settings,
        )


def test_plain_distillation(teacher):
    before, student = state(teacher), model(1)
    run = distill(student, teacher, train, val, test=test, **settings)
    assert (
        torch.equal(run.weights, torch.ones(N))
        and run.scores is None
        and run.calibration is None
        and 'clean_fraction' not in run.metrics
    )
    assert equal(before, state(teacher)) and run.metrics['effective_sample_size'] == 1
    assert run.metrics['test_accuracy'] == evaluate(student, test, forward)['accuracy'] > 0.5


def test_without_teacher():
    run = distill(model(1), None, train, val, test=test, **settings)
    assert (
        run.teacher is None
        and 'teacher_test_accuracy' not in run.metrics
        and [h['phase'] for h in run.history] == ['student'] * 3
    )


def test_without_a_test_set_none_is_reported(teacher):
    assert not [k for k in distill(model(1), teacher, train, val, **settings).metrics if 'test' in k]


def test_made_teacher_leaves_the_given_one_alone(teacher):
    before, made = state(teacher), []

    def make():
        made.append(model(9, 16))
        return made[-1]

    run = distill(model(1), teacher, train, val, mechanism='both', make_teacher=make, test=test, **settings)
    assert (
        len(made) == 1
        and run.teacher is made[0]
        and equal(before, state(teacher))
        and not equal(state(model(9, 16)), state(made[0]))
    )
    with pytest.raises(ValueError, match='trains no teacher'):
        distill(model(1), teacher, train, val, mechanism='student', make_teacher=make, **settings)
    assert len(made) == 1


def test_second_round(teacher):
    "The first teacher that is made is that of one round; it judges again and speaks for the labels that it doubts, and another one is made."
    made = {}

    def trained_again(rounds, train=train, **kwargs):
        made[rounds] = []

        def make():
            made[rounds].append(model(9, 16))
            return made[rounds][-1]

        return distill(
            model(1),
            teacher,
            train,
            val,
            mechanism='both',
            make_teacher=make,
            generations=rounds,
            test=test,
            **settings | kwargs,
        )

    before, runs = state(teacher), {k: trained_again(k) for k in (1, 2, 3)}
    assert (
        [len(m) for m in made.values()] == [1, 2, 3]
        and all(run.teacher is made[k][-1] for k, run in runs.items())
        and equal(before, state(teacher))
    )
    assert [h['phase'] for h in runs[3].history] == ['teacher'] * 9 + ['student'] * 3
    assert (
        equal(state(made[1][0]), state(made[3][0]))
        and equal(state(made[2][1]), state(made[3][1]))
        and not equal(state(made[2][0]), state(made[2][1]))
    )
    assert runs[2].weights[~wrong].mean() > 2 * runs[2].weights[wrong].mean() and not torch.equal(
        runs[1].weights, runs[2].weights
    )
    shuffled = trained_again(2, Loader(train_data, shuffle=True))
    found = torch.zeros(10_000).index_put_((shuffled.index,), shuffled.weights)[train_data['index']]
    assert found[~wrong].mean() > 2 * found[wrong].mean()
    alone = trained_again(2, include_validation=False)
    assert alone.val_weights.shape == (0,) and alone.weights[~wrong].mean() > 2 * alone.weights[wrong].mean()


def test_no_second_round_without_doubts(monkeypatch):
    "Clean labels, and classes that are short: class weights train the teacher again, and once is enough."
    import kd_aif.distillation.session as module

    monkeypatch.setattr(ClassWeights, 'are_needed', lambda self, *args: True)
    made = []

    def make():
        made.append(model(9, 16))
        return made[-1]

    teacher = distill(model(9, 16), None, MixedBatches(clean, val), val, **settings).student
    run = distill(
        model(1), teacher, clean, val, mechanism='both', make_teacher=make, generations=3, **settings
    )
    assert (
        torch.equal(run.weights, torch.ones(len(run.weights))) and run.teacher is made[0] and len(made) == 1
    )


def test_second_round_wants_another_teacher(teacher):
    one = model(9, 16)
    with pytest.raises(ValueError, match='the previous teacher itself'):
        distill(
            model(1),
            teacher,
            train,
            val,
            mechanism='both',
            make_teacher=lambda: one,
            generations=2,
            **settings,
        )


def test_scores_come_when_they_are_due(teacher, monkeypatch):
    import kd_aif.distillation.session as module

    calls, real = [], module.RunWeights.refresh
    monkeypatch.setattr(
        module.RunWeights, 'refresh', lambda self, m, *args: calls.append(m) or real(self, m, *args)
    )
    student = model(1)

    def scored(mechanism, schedule, **kwargs):
        calls.clear()
        distill(
            student,
            teacher,
            train,
            val,
            mechanism=mechanism,
            schedule=schedule,
            **settings | dict(epochs=5) | kwargs,
        )
        return list(calls)

    assert scored('student', OneShot(after=2)) == [teacher] and scored('both', OneShot(after=2)) == [teacher]
    assert (
        scored('student', Every(2, start=1)) == [student] * 2
        and scored('both', Every(2, start=1)) == [teacher] * 2
    )
    assert scored(None, OneShot()) == []


def test_weights_wait_for_their_epoch(teacher):
    "Before `after` a student trains as the control does, from then on it does not."
    runs = [
        distill(
            model(1), teacher, train, val, mechanism='student', schedule=OneShot(after=a), **settings
        ).history
        for a in (0, 2)
    ]
    control = distill(model(1), teacher, MixedBatches(train, val), val, **settings).history
    assert runs[1][:2] == control[:2] and runs[1][2] != control[2] and runs[0][1] != control[1]


def test_published_form(teacher):
    run = distill(
        model(1),
        teacher,
        train,
        val,
        mechanism='both',
        schedule=Every(1, start=1),
        beta=2.0,
        update=EMA(0.5),
        **settings,
    )
    assert (
        isinstance(run.scores, InfluenceScores)
        and run.calibration is None
        and 'clean_fraction' not in run.metrics
    )
    assert (
        float(run.weights.mean()) == pytest.approx(1, abs=1e-4)
        and run.weights.std() > 0.01
        and run.config['weighting'].score == 'mean'
    )


def test_all_layers_can_be_scored(teacher):
    run = distill(
        model(1),
        teacher,
        train,
        val,
        mechanism='student',
        last_layer=False,
        score=('mean',),
        **settings | dict(epochs=1),
    )
    assert run.weights.shape == (N,) and run.scores.score == ('mean',)


@pytest.mark.parametrize('mechanism', ['student', 'both'])
def test_loader_in_a_new_order_in_each_pass(teacher, mechanism):
    "Weights belong to indices, not to places in a pass."
    run = distill(
        model(1),
        teacher,
        Loader(train_data, shuffle=True),
        Loader(val_data, shuffle=True),
        mechanism=mechanism,
        **settings,
    )
    found = torch.zeros(10_000).index_put_((run.index,), run.weights)[train_data['index']]
    assert run.index.sort().values.tolist() == train_data['index'].sort().values.tolist()
    assert found[~wrong].mean() > 2 * found[wrong].mean()


def test_overlapping_indices_of_training_and_validation_set(teacher):
    "Two data sets that both count from the same number: the same run as with indices of their own."
    shared = Loader({**val_data, 'index': train_data['index'][:M]})
    for kwargs in (
        dict(mechanism='student'),
        dict(mechanism='both'),
        dict(mechanism='student', schedule=Every(1, start=1)),
        dict(weights=(~wrong).float()),
    ):
        a, b = (
            distill(s := model(1), copy.deepcopy(teacher), train, v, **settings, **kwargs)
            for v in (shared, val)
        )
        assert (
            torch.equal(a.weights, b.weights)
            and equal(state(a.student), state(b.student))
            and equal(state(a.teacher), state(b.teacher))
        )


def test_control_with_overlapping_indices(teacher):
    "KD on training and validation set, when both count from the same number."
    runs = [
        distill(model(1), teacher, MixedBatches(train, v), v, **settings)
        for v in (Loader({**val_data, 'index': train_data['index'][:M]}), val)
    ]
    assert equal(state(runs[0].student), state(runs[1].student))


# The mixture


@pytest.mark.parametrize('sizes', [(32, 32), (7, 50), (200, 1)])
def test_mixture_holds_every_sample_once_with_its_own_row(sizes):
    mixed = MixedBatches(Loader(train_data, sizes[0]), Loader(val_data, sizes[1]), seed=4)
    whole = {k: torch.cat([train_data[k], val_data[k]]) for k in train_data}
    place = {int(i): k for k, i in enumerate(whole['index'])}
    seen = []
    for epoch in range(2):
        found = list(mixed)
        assert len(found) == len(mixed) and all(len(b['index']) == mixed.batch_size for b in found[:-1])
        epoch = {k: torch.cat([b[k] for b in found]) for k in found[0]}
        at = torch.tensor([place[int(i)] for i in epoch['index']])
        assert at.sort().values.tolist() == list(range(N + M)) and torch.equal(epoch['held_out'], at >= N)
        for k in whole:
            assert torch.equal(epoch[k], whole[k][at])
        seen.append(at)
    assert not torch.equal(*seen)
    mixed.set_epoch(1)
    assert torch.equal(torch.cat([b['index'] for b in mixed]), whole['index'][seen[1]])


def test_sets_that_do_not_fit_are_told_so():
    with pytest.raises(ValueError, match='same keys and shapes, or include_validation=False'):
        list(MixedBatches(train, Loader(without(val_data, 'wide'))))


def test_lists_follow_their_samples_or_are_refused():
    "A column that is a list, such as sentences: its rows stay with the others, or the mixture says that it cannot."

    class Named(Loader):
        def __iter__(self):
            for b in super().__iter__():
                yield {**b, 'name': [f'sample {i}' for i in b['index'].tolist()]}

    try:
        found = list(MixedBatches(Named(train_data), Named(val_data)))
    except (ValueError, TypeError) as e:
        assert 'name' in str(e)
    else:
        for b in found:
            assert b['name'] == [f'sample {i}' for i in b['index'].tolist()]


# Weights, and weights of one


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(mechanism='student'),
        dict(mechanism='both', make_teacher=lambda: model(9, 16)),
        dict(mechanism='both', make_teacher=lambda: model(9, 16), generations=3),
        dict(mechanism='student', schedule=OneShot(after=1)),
        dict(weights=torch.ones(N)),
    ],
    ids=['student', 'both', 'rounds', 'late', 'given'],
)
@pytest.mark.parametrize('include_validation', [True, False])
def test_weights_of_one_are_the_plain_run_bit_for_bit(kwargs, include_validation):
    "On clean labels nothing is weighted: the run is the control, dropout included, and the teacher is kept."
    both = MixedBatches(clean, val) if include_validation else clean
    teacher = distill(
        model(9, 16), None, both if include_validation else MixedBatches(clean, val), val, **settings
    ).student
    control = distill(model(1), teacher, both, val, test=test, **settings)
    run = distill(
        model(1), teacher, clean, val, include_validation=include_validation, test=test, **settings, **kwargs
    )
    assert torch.equal(run.weights, torch.ones(N)), 'the example is not clean enough'
    assert equal(state(control.student), state(run.student)) and run.teacher is teacher, (
        'a teacher that would learn the same again is kept'
    )
    assert (
        control.metrics == without(run.metrics, 'clean_fraction', 'all_clean_p_value')
        and run.metrics.get('all_clean_p_value', 1) > 0.05
    )


def test_weight_of_zero_is_as_good_as_absent(teacher):
    "What has no weight may be anything, as long as it is not looked at: labels of weightless samples do not matter without distillation."
    other = {**train_data, 'y': torch.where(wrong, (train_data['y'] + 1) % C, train_data['y'])}
    runs = [
        distill(model(1), teacher, Loader(d), val, weights=(~wrong).float(), **settings)
        for d in (train_data, other)
    ]
    assert equal(state(runs[0].student), state(runs[1].student))
    assert torch.equal(runs[0].weights, (~wrong).float())


def test_a_validation_sample_weighs_what_a_surely_good_sample_weighs(teacher):
    run = distill(model(1), teacher, train, val, mechanism='student', **settings)
    for c in range(C):
        ours, p, theirs = (
            run.weights[train_data['y'] == c],
            run.calibration.probability[train_data['y'] == c],
            run.val_weights[val_data['y'] == c],
        )
        assert theirs.min() == theirs.max() > 1.1 and torch.allclose(ours, p * theirs[0], atol=1e-5)


def test_validation_samples_are_told_from_training_samples_of_the_same_index(teacher):
    "What the loop weighs them with, sample by sample: both sets count from zero"
    a, b = ({**d, 'index': torch.arange(len(d['y']))} for d in (train_data, val_data))
    w = torch.arange(N + M) / (N + M) + 0.5
    student, by_hand = plain_net(), plain_net()
    distill(
        student,
        None,
        Loader(a),
        Loader(b),
        weights=w,
        make_optimizer=lambda p, lr: Descent(p, lr=lr),
        **settings | dict(epochs=1),
    )
    by_hand.train()
    for batch in MixedBatches(Loader(a), Loader(b), 0):
        by_hand.zero_grad()
        (
            w[batch['index'] + N * batch['held_out']] * batch_cross_entropy(forward(by_hand, batch), batch)
        ).mean().backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad
    for p, q in zip(student.parameters(), by_hand.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_weights_of_the_validation_samples_may_be_left_out(teacher):
    w = torch.rand(N, generator=generator(0)) + 0.5
    runs = [
        distill(model(1), teacher, train, val, weights=weights, **settings)
        for weights in (w, torch.cat([w, torch.ones(M)]), torch.cat([w, torch.full((M,), 2.0)]))
    ]
    assert equal(state(runs[0].student), state(runs[1].student)) and not equal(
        state(runs[0].student), state(runs[2].student)
    )
    assert torch.equal(runs[2].weights, w) and runs[2].val_weights.eq(2).all()
    with pytest.raises(ValueError, match=f'weights has {N + M} entries for {N} training samples'):
        distill(
            model(1), teacher, train, val, weights=torch.ones(N + M), include_validation=False, **settings
        )
    with pytest.raises(ValueError, match='give train and val apart'):
        distill(model(1), teacher, MixedBatches(train, val), val, weights=torch.ones(N + M), **settings)


def test_weights_are_in_the_order_of_the_loader(teacher):
    "Another order of samples with the weights in that order: the same objective."
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    w = (~wrong).float()
    whole = dict(include_validation=False, **settings | dict(epochs=2))
    a = distill(plain_net(), None, Loader(train_data, N), val, weights=w, **whole)
    b = distill(
        plain_net(),
        None,
        Loader({k: v[order] for k, v in train_data.items()}, N),
        val,
        weights=w[order],
        **whole,
    )
    c = distill(plain_net(), None, Loader(train_data, N), val, weights=w[order], **whole)
    close = lambda p, q: all(
        torch.allclose(u, v, atol=1e-5) for u, v in zip(p.student.parameters(), q.student.parameters())
    )
    assert close(a, b) and not close(a, c)


def plain_net():
    net = model(1)
    net.drop.p = 0.0
    return net


# One step by hand


class Descent(torch.optim.SGD):
    "An optimiser of the caller's own: whatever the schedule says, a step of 0.1"

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]['params']:
            p -= 0.1 * p.grad


def test_one_step_is_the_documented_loss(teacher):
    "(1/b) Σ wᵢ ((1 − α) CE + α T² KL), one step of the optimiser that the caller makes."
    w = torch.rand(N, generator=torch.Generator().manual_seed(0)) * 2
    batch = next(iter(Loader(train_data, N)))
    student, by_hand = plain_net(), plain_net()
    distill(
        student,
        teacher,
        Loader(train_data, N),
        val,
        weights=w,
        include_validation=False,
        T=2.0,
        make_optimizer=lambda p, lr: Descent(p, lr=lr),
        **settings | dict(epochs=1, alpha=0.3),
    )
    by_hand.train()
    teacher.eval()
    (
        w
        * distill_loss(
            forward(by_hand, batch), forward(teacher, batch).detach(), batch['y'], 2.0, 0.3, 'none'
        )
    ).mean().backward()
    for p, q in zip(student.parameters(), by_hand.parameters()):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-6)


@pytest.mark.parametrize('steps', range(1, 12))
def test_any_number_of_steps(steps):
    "Also runs of very few steps have a learning-rate schedule."
    assert (
        len(distill(model(1), None, Loader(train_data, N), val, **settings | dict(epochs=steps)).history)
        == steps
    )


@pytest.mark.parametrize('name', ['AdamW', 'RMSprop', 'Adagrad'])
def test_optimisers_of_the_caller(teacher, name):
    student = model(1)
    distill(
        student,
        teacher,
        train,
        val,
        make_optimizer=lambda p, lr: getattr(torch.optim, name)(p, lr=lr),
        **settings,
    )
    assert not equal(state(student), state(model(1)))


# Reproducibility


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(mechanism='student'),
        dict(mechanism='both'),
        dict(mechanism='both', schedule=Every(1, start=1)),
    ],
    ids=['plain', 'student', 'both', 'every'],
)
def test_same_seed_same_bits_and_the_global_generators_are_left_alone(trained, kwargs):
    import random, numpy as np

    runs = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)
        random.seed(disturbance)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        runs.append(
            distill(
                model(1),
                copy.deepcopy(trained),
                Loader(train_data),
                Loader(val_data),
                seed=5,
                test=test,
                **settings,
                **kwargs,
            )
        )
        assert (
            torch.equal(before[0], torch.get_rng_state())
            and (before[1] == np.random.get_state()[1]).all()
            and before[2] == random.getstate()
        )
    a, b = runs
    assert (
        equal(state(a.student), state(b.student))
        and equal(state(a.teacher), state(b.teacher))
        and torch.equal(a.weights, b.weights)
    )
    assert a.metrics == b.metrics and a.history == b.history
    other = distill(
        model(1), copy.deepcopy(trained), Loader(train_data), Loader(val_data), seed=6, **settings, **kwargs
    )
    assert not equal(state(a.student), state(other.student))


def test_frozen_parameters_stay(teacher):
    student = model(1)
    student.left.requires_grad_(False)
    before = state(student.left)
    distill(student, teacher, train, val, mechanism='student', **settings)
    assert equal(before, state(student.left))


def test_run_and_schedules_are_frozen(teacher):
    with pytest.raises(FrozenInstanceError):
        OneShot().after = 3
    with pytest.raises(FrozenInstanceError):
        distill(model(1), None, train, val, **settings | dict(epochs=2)).metrics = {}


# Faults


def changed(data, key, at, value):
    v = data[key].clone()
    v[at] = value
    return Loader({**data, key: v})


class Empty:
    def __iter__(self):
        return iter(())


FAULTS = {
    'alpha above 1': (dict(alpha=1.2), 'alpha is 1.2'),
    'alpha below 0': (dict(alpha=-0.1), 'alpha is -0.1'),
    'alpha NaN': (dict(alpha=float('nan')), 'alpha is nan'),
    'T zero': (dict(T=0.0), 'T is 0'),
    'T negative': (dict(T=-1.0), 'T is -1'),
    'lr': (dict(lr=0.0), 'lr is 0'),
    'epochs': (dict(epochs=0), 'epochs is 0'),
    'mechanism': (dict(mechanism='teacher'), "mechanism is 'teacher'; use None, 'student' or 'both'"),
    'no teacher': (dict(teacher=None), 'teacher is None'),
    'teacher classes': (dict(teacher=model(0, 8, 4)), 'teacher has 4 classes, the student 3'),
    'made teacher classes': (
        dict(mechanism='both', make_teacher=lambda: model(0, 8, 4)),
        'same number of classes',
    ),
    'train empty': (dict(train=Empty()), 'train is empty'),
    'val empty': (dict(val=Empty()), 'val is empty'),
    'val list empty': (dict(val=[]), 'val is empty'),
    'test empty': (dict(test=[]), 'test is empty'),
    'test labels': (dict(test=changed(test_data, 'y', 3, C)), r'test: labels from 0 to 3.*in \[0, 3\)'),
    'train NaN': (
        dict(train=changed(train_data, 'narrow', (7, 1), float('nan'))),
        rf"train: batch\['narrow'\] has NaN.*index {int(train_data['index'][7])}",
    ),
    'val infinite': (
        dict(val=changed(val_data, 'wide', 40, float('inf'))),
        rf"val: batch\['wide'\] has NaN or infinite.*index {int(val_data['index'][40])}",
    ),
    'train labels': (dict(train=changed(train_data, 'y', 149, C)), r'train: labels from 0 to 3.*in \[0, 3\)'),
    'val labels': (dict(val=changed(val_data, 'y', 0, -1)), 'val: labels from -1'),
    'label type': (
        dict(train=Loader({**train_data, 'y': train_data['y'].float()})),
        'those of train are real numbers, those of val classes; give both one kind',
    ),
    'train index': (dict(train=Loader(without(train_data, 'index'))), "no 'index'"),
    'val index': (dict(val=[without(val_data, 'index')]), "val: batches have no 'index'"),
    'train y': (dict(train=[without(train_data, 'y')]), "train: batches have no 'y'"),
    'index twice': (
        dict(train=changed(train_data, 'index', 3, int(train_data['index'][4]))),
        '150 samples have 149 different indices',
    ),
    'index below 0': (dict(train=changed(train_data, 'index', 3, -3)), 'index of 0 or more'),
    'tuples': (dict(train=[(train_data['wide'], train_data['y'])]), 'batches are tuple; yield a dict'),
    'val tuples': (dict(val=[(val_data['wide'], val_data['y'])]), 'batches are tuple; yield a dict'),
    'weights length': (
        dict(mechanism=None, weights=torch.ones(N - 1)),
        '149 entries for 150 training samples',
    ),
    'weights NaN': (dict(mechanism=None, weights=torch.full((N,), float('nan'))), 'weights must be finite'),
    'weights negative': (dict(mechanism=None, weights=-torch.ones(N)), 'not negative'),
    'weights zero': (dict(mechanism=None, weights=torch.zeros(N)), 'not all zero'),
    'weights and mechanism': (dict(weights=torch.ones(N)), 'exclude each other'),
    'folds': (dict(folds=1), 'folds is 1'),
    'too many folds': (dict(folds=M + 1), 'folds is 91 for 90'),
    'score': (dict(score='x'), "score is 'x'"),
    'score with beta': (dict(beta=1.0, score='loss'), "score is 'loss'.*'mean'"),
    'beta': (dict(beta=-1.0), 'beta is -1'),
    'transform': (dict(beta=1.0, transform='x'), "transform is 'x'"),
    'late schedule': (dict(schedule=OneShot(after=3)), 'never due in 3 epochs'),
    'schedule type': (dict(schedule='oneshot'), "schedule is 'oneshot'"),
    'part of an epoch': (dict(epochs=1.5), 'epochs is 1.5'),
    'generator': (dict(train=(b for b in [train_data])), 'train is a generator'),
    'mixture scored': (dict(train=MixedBatches(train, val)), 'train holds validation samples'),
    'made teacher unused': (dict(make_teacher=lambda: model(9, 16)), 'make_teacher'),
    'teacher first of a student': (dict(schedule=Every(1, 1, teacher_first=True)), 'teacher_first'),
    'frozen teacher that trains along': (
        dict(mechanism='both', schedule=Every(1, 1), teacher=model(9, 16).requires_grad_(False)),
        'teacher is frozen',
    ),
    'frozen student': (dict(student=model(1).requires_grad_(False)), 'student is frozen'),
    'weighting without mechanism': (dict(mechanism=None, weighting=Influence()), 'nothing is scored'),
    'schedule without mechanism': (dict(mechanism=None, schedule=Every(1, 1)), 'nothing is scored'),
    'weights in words': (dict(mechanism=None, weighting='heavy'), "weighting is 'heavy', a str; give Influence"),
    'losses in a column': (
        dict(label_loss=lambda logits, b: batch_cross_entropy(logits, b)[:, None]),
        r'label_loss returns values of shape \(32, 1\) for 32 samples; give one value per sample',
    ),
    'no round': (dict(mechanism='both', generations=0), 'generations is 0'),
    'rounds of a student': (
        dict(generations=2, make_teacher=lambda: model(9, 16)),
        'make_teacher, generations',
    ),
    'rounds without new teachers': (dict(mechanism='both', generations=2), 'generations is 2.*make_teacher'),
    'rounds of sigmoid weights': (
        dict(mechanism='both', generations=2, beta=1.0, make_teacher=lambda: model(9, 16)),
        'generations is 2.*use weighting=Influence',
    ),
    'no logits': (
        dict(forward=lambda m, b: m(b)),
        r'student returns a dict, logits \(samples, classes\) are needed; give forward',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_named_before_anything_is_trained(teacher, fault):
    change, message = FAULTS[fault]
    student = model(1)
    before, modes = (
        (state(student), state(teacher)),
        [m.training for m in [*student.modules(), *teacher.modules()]],
    )
    rng = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=message):
        distill(
            **(
                dict(student=student, teacher=teacher, train=train, val=val, mechanism='student')
                | settings
                | change
            )
        )
    assert equal(before[0], state(student)) and equal(before[1], state(teacher)), (
        'trained in spite of the fault'
    )
    assert modes == [m.training for m in [*student.modules(), *teacher.modules()]] and all(
        p.grad is None for p in student.parameters()
    )
    assert torch.equal(rng, torch.get_rng_state())


def test_model_without_forward_is_told_what_to_do():
    with pytest.raises(KeyError, match='forward=lambda model, batch'):
        distill(model(), None, train, val, progress=False)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: Every(0), 'k is 0'),
        (lambda: Every(1, -1), 'start is -1'),
        (lambda: OneShot(-1), 'after is -1'),
        (lambda: Every(1.5), 'k is 1.5'),
        (lambda: EMA(2.0), 'm is 2'),
    ],
)
def test_schedules_and_updates_are_checked_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_huge_indices_cost_nothing(teacher):
    "An index may be a hash."
    far = Loader({**train_data, 'index': train_data['index'] + 10**15})
    a, b = (distill(model(1), teacher, t, val, mechanism='student', **settings) for t in (far, train))
    assert torch.equal(a.weights, b.weights) and equal(state(a.student), state(b.student))


def test_too_large_steps_are_told_so():
    with pytest.raises(ValueError, match='the loss is not finite in epoch.*smaller lr'):
        distill(model(), None, train, val, **settings | dict(lr=1e30))


def test_checks_alone():
    index, y = check_batches('data', train, C)
    assert torch.equal(index, train_data['index']) and torch.equal(y, train_data['y'])
    net = model(2, classes=7).train()
    before = state(net)
    assert count_classes(net, next(iter(train)), forward) == 7 and net.training and equal(before, state(net))


def test_evaluation_by_hand():
    net = model(2).train()
    before = state(net)
    found = evaluate(net, Loader(test_data, 7), forward)
    assert net.training and equal(before, state(net))
    net.eval()
    with torch.no_grad():
        logits = forward(net, test_data)
    right = logits.argmax(1) == test_data['y']
    assert found['accuracy'] == pytest.approx(float(right.float().mean())) and found['loss'] == pytest.approx(
        float(batch_cross_entropy(logits, test_data).mean()), rel=1e-5
    )
    assert found['per_class_accuracy'] == pytest.approx(
        [float(right[test_data['y'] == c].float().mean()) for c in range(C)]
    )
    assert (
        evaluate(net, [{k: v[test_data['y'] != 1] for k, v in test_data.items()}], forward)[
            'per_class_accuracy'
        ][1]
        is None
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(mechanism='student'),
        dict(mechanism='both'),
        dict(mechanism='student', schedule=Every(1, start=1)),
        dict(weights=(~wrong).float()),
    ],
    ids=['student', 'both', 'every', 'given'],
)
def test_gpu_does_what_the_cpu_does(trained, kwargs):
    "Batches stay where they are made; models, weights and scores meet on the model's device."

    def run(device):
        student = plain_net().to(device)
        return distill(
            student, copy.deepcopy(trained).to(device), train, val, test=test, **settings, **kwargs
        )

    try:
        here, there = run('cpu'), run('cuda')
    finally:
        torch.cuda.empty_cache()
    assert (
        next(there.student.parameters()).is_cuda
        and not there.weights.is_cuda
        and torch.equal(here.index, there.index)
    )
    assert here.metrics['test_accuracy'] == pytest.approx(there.metrics['test_accuracy'], abs=0.1)
    assert torch.allclose(here.weights, there.weights, atol=0.2)


# Rules, precision, losses, need


def test_a_rule_sees_every_step_and_its_weights_are_used(trained):
    steps = []

    def rule(step):
        steps.append(step)
        assert (
            isinstance(step, Step)
            and step.model.training
            and step.losses.shape == step.logits.shape[:1]
            and step.losses.requires_grad
        )
        assert torch.allclose(step.loss(step.logits, step.batch), step.losses)
        return torch.ones(len(step.losses))

    ruled = distill(model(1), trained, train, val, weights=rule, **settings)
    tabled = distill(model(1), trained, train, val, weights=torch.ones(N), **settings)
    for a, b in zip(ruled.student.state_dict().values(), tabled.student.state_dict().values()):
        assert torch.equal(a, b)
    assert (
        sum(len(s.losses) for s in steps) == 3 * (N + M)
        and sum(int(s.batch['held_out'].sum()) for s in steps) == 3 * M
    )
    assert {s.epoch for s in steps} == {0, 1, 2} and all(s.epochs == 3 and 0 < s.lr <= 0.05 for s in steps)
    without = distill(
        model(1),
        trained,
        train,
        val,
        weights=lambda step: torch.zeros(len(step.losses)),
        **settings | dict(epochs=1, make_optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr)),
    )
    assert all(torch.equal(a, b) for a, b in zip(without.student.parameters(), model(1).parameters())), (
        'zero weights move nothing'
    )


def test_another_loss_of_the_labels(trained):
    "Also in the student's own part: twice the cross-entropy is a teacher weight of alpha/(2 - alpha) at another scale"
    double = lambda logits, batch: 2 * batch_cross_entropy(logits, batch)
    seen = []
    distill(
        model(1),
        trained,
        train,
        val,
        label_loss=double,
        weights=lambda step: (
            seen.append(
                (
                    step.losses.detach(),
                    distill_loss(step.logits, step.logits, step.batch['y'], 4.0, 0.0, 'none').detach(),
                )
            )
            or torch.ones(len(step.losses))
        ),
        **settings | dict(alpha=0.0),
    )
    for loss, ce in seen:
        assert torch.allclose(loss, 2 * ce)


@pytest.mark.parametrize(
    'kwargs',
    [dict(), dict(mechanism='student'), dict(mechanism='both', schedule=Every(1, 1))],
    ids=['plain', 'student', 'together'],
)
def test_lower_precision_changes_little_and_only_the_forward_pass(trained, kwargs):
    teacher = lambda: copy.deepcopy(trained)
    low, full = (
        distill(model(1), teacher(), train, val, autocast=dtype, **kwargs, **settings)
        for dtype in (torch.bfloat16, None)
    )
    assert all(p.dtype == torch.float32 for p in low.student.parameters())
    differences = [
        float((a - b).abs().max()) for a, b in zip(low.student.parameters(), full.student.parameters())
    ]
    assert 0 < max(differences) < 0.5


def test_a_teacher_may_go_ahead(trained):
    "It trains once, scored as it goes; the student starts with what the finished teacher says"
    ahead = distill(
        model(1),
        model(9, 16),
        train,
        val,
        mechanism='both',
        schedule=Every(1, start=1, teacher_first=True),
        **settings,
    )
    phases = [h['phase'] for h in ahead.history]
    assert phases == ['teacher'] * 3 + ['student'] * 3 and ahead.seconds['teacher'] > 0
    assert torch.allclose(
        torch.cat([ahead.weights, ahead.val_weights]),
        joint_weights(ahead.calibration.probability, train_data['y'], val_data['y']),
    ) and not torch.equal(ahead.weights, torch.ones(N))


def test_online_weights_come_from_the_batch(trained):
    run = distill(
        model(1),
        copy.deepcopy(trained),
        train,
        val,
        mechanism='student',
        schedule=Online(1),
        beta=2.0,
        **settings,
    )
    assert run.weights.std() > 0.1 and run.weights[wrong].mean() < run.weights[~wrong].mean()
    first = distill(
        model(1),
        copy.deepcopy(trained),
        train,
        val,
        mechanism='student',
        schedule=Online(2),
        beta=2.0,
        **settings,
    )
    assert not torch.equal(run.weights, first.weights)


@pytest.mark.parametrize(
    'kwargs',
    [dict(), dict(beta=1.0, last_layer=False), dict(beta=1.0, score='posterior')],
    ids=['calibrated', 'all layers', 'posterior'],
)
def test_online_says_what_it_cannot_do(trained, kwargs):
    with pytest.raises(ValueError, match=r'Every\(1\)'):
        distill(model(1), trained, train, val, mechanism='student', schedule=Online(1), **kwargs, **settings)


def test_class_weights_multiply_and_validation_samples_have_them_too(trained):
    "Need is asked for in every epoch from its start; with weights of its own it works without a mechanism"
    seen = []

    class Watched(ClassWeighting):
        def update(self, v, halves, times):
            seen.append(halves.shape)
            return torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64) * v

    run = distill(
        model(1), trained, train, val, weights=torch.ones(N), class_weighting=Watched(start=1), **settings
    )
    assert (
        seen == [(2, C)] * 2
        and run.class_weights[0] > 3.9 * run.class_weights[1]
        and run.class_weights.shape == (C,)
    )
    counts = torch.bincount(torch.cat([train_data['y'], val_data['y']]), minlength=C)
    assert torch.isclose((run.class_weights * counts).sum() / counts.sum(), torch.tensor(1.0))
    assert (
        distill(model(1), trained, train, val, mechanism='student', beta=1.0, **settings).class_weights
        is None
    ), 'the published form has none'


# One more term


def outputs(model, batch):
    "What `Pairs` has to show: its hidden layer and the logits"
    hidden = model.norm(torch.relu(model.left(batch['wide']) + model.right(batch['narrow'])))
    return [hidden, model.head(model.drop(hidden))]


class Hint(nn.Module):
    "Squared distance of the hidden layers, after a learnt map"

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 16)

    def forward(self, student, teacher, batch):
        return (self.map(student[0]) - teacher[0]).square().mean(1)


def test_the_distillation_term_as_an_extra_is_plain_distillation(teacher):
    def half(logits, batch):
        return 0.5 * batch_cross_entropy(logits, batch)

    term = AuxiliaryLoss(lambda s, t, b: distill_loss(s[-1], t[-1], b['y'], 4.0, 1.0, 'none'), 0.5, outputs)
    plainly = distill(model(1), teacher, train, val, **settings)
    other = distill(
        model(1), teacher, train, val, label_loss=half, auxiliary=term, **settings | dict(alpha=0.0)
    )
    for p, q in zip(plainly.student.parameters(), other.student.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_parameters_of_an_extra_train_along_and_it_falls(teacher):
    hint = Hint()
    before, student = state(hint), model(1)

    def distance():
        return float(
            torch.cat([hint(outputs(student, b), outputs(teacher, b), b) for b in train]).mean().detach()
        )

    student.eval()
    first = distance()
    distill(
        student,
        teacher,
        train,
        val,
        auxiliary=AuxiliaryLoss(hint, 10.0, outputs),
        **settings | dict(epochs=10),
    )
    assert not equal(before, state(hint)) and distance() < 0.7 * first


def test_an_extra_is_weighed_like_every_other_loss(teacher):
    "What has no weight has no pull, through the extra either"

    def pull(sign):
        return AuxiliaryLoss(
            lambda s, t, b: torch.where(wrong_index(b), sign, 1.0) * (s[0] - t[0][:, :8]).square().mean(1),
            5.0,
            outputs,
        )

    def wrong_index(b):
        return torch.isin(b['index'], train_data['index'][wrong]) & ~b['held_out']

    runs = [
        distill(model(1), teacher, train, val, weights=(~wrong).float(), auxiliary=pull(sign), **settings)
        for sign in (1.0, -1.0)
    ]
    assert equal(state(runs[0].student), state(runs[1].student))
    assert not equal(
        state(runs[0].student),
        state(distill(model(1), teacher, train, val, weights=(~wrong).float(), **settings).student),
    )


@pytest.mark.parametrize('mechanism', ['student', 'both'])
def test_mechanisms_take_an_extra(teacher, mechanism):
    run = distill(
        model(1),
        teacher,
        train,
        val,
        mechanism=mechanism,
        auxiliary=AuxiliaryLoss(Hint(), 1.0, outputs),
        test=test,
        **settings,
    )
    assert run.weights[~wrong].mean() > 2 * run.weights[wrong].mean()


@pytest.mark.parametrize(
    'kwargs, error, message',
    [
        (dict(auxiliary=Hint()), TypeError, 'auxiliary is a Hint; give AuxiliaryLoss'),
        (
            dict(auxiliary=AuxiliaryLoss(Hint(), outputs=forward)),
            ValueError,
            'outputs of the student are a Tensor',
        ),
        (dict(auxiliary=AuxiliaryLoss(Hint())), KeyError, 'x'),
        (
            dict(auxiliary=AuxiliaryLoss(lambda s, t, b: Hint()(s, t, b).mean(), outputs=outputs)),
            ValueError,
            'not their mean',
        ),
        (dict(auxiliary=AuxiliaryLoss(lambda s, t, b: b['nothing'], outputs=outputs)), KeyError, 'nothing'),
    ],
    ids=['no Extra', 'no list', 'unknown model', 'one value', 'what the batch lacks'],
)
def test_unfit_extras_are_named_before_training(teacher, kwargs, error, message):
    student = model(1)
    before = state(student)
    with pytest.raises(error, match=message):
        distill(student, teacher, train, val, **settings, **kwargs)
    assert equal(before, state(student))


def test_an_extra_that_compares_needs_a_teacher_and_a_weight():
    student = model(1)
    before = state(student)
    with pytest.raises(ValueError, match='teacher is None'):
        distill(student, None, train, val, auxiliary=AuxiliaryLoss(Hint(), 1.0, outputs), **settings)
    with pytest.raises(ValueError, match='weight'):
        AuxiliaryLoss(Hint(), 0.0)
    assert equal(before, state(student))


def test_an_extra_that_compares_says_a_teacher_is_missing_in_its_own_words():
    "A `ValueError` of the loss itself passes unchanged"

    def own_words(s, t, b):
        if t is None:
            raise ValueError('teacher_maps are None')

    with pytest.raises(ValueError, match='^teacher_maps are None'):
        distill(model(1), None, train, val, auxiliary=AuxiliaryLoss(own_words, 1.0, outputs), **settings)


def test_without_a_teacher_an_extra_gets_none_and_adds_to_cross_entropy():
    "Three times the cross-entropy of the labels, as a loss or as an extra on top of one third of it"
    seen = []

    def twice(s, t, b):
        seen.append(t)
        return 2 * batch_cross_entropy(s[-1], b)

    term = distill(model(1), None, train, val, auxiliary=AuxiliaryLoss(twice, 1.0, outputs), **settings)
    thrice = distill(
        model(1),
        None,
        train,
        val,
        label_loss=lambda logits, b: 3 * batch_cross_entropy(logits, b),
        **settings,
    )
    assert set(seen) == {None}
    for p, q in zip(term.student.parameters(), thrice.student.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_without_a_teacher_an_extra_trains_along_and_is_weighed():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, C)

        def forward(self, s, t, b):
            return batch_cross_entropy(self.head(s[0]), b)

    own = Own()
    before = state(own)
    distill(
        model(1),
        None,
        train,
        val,
        weights=torch.ones(len(train_data['index'])),
        auxiliary=AuxiliaryLoss(own, 1.0, outputs),
        **settings,
    )
    assert not equal(before, state(own))

    def pull(sign):
        return AuxiliaryLoss(
            lambda s, t, b: (
                torch.where(torch.isin(b['index'], train_data['index'][wrong]) & ~b['held_out'], sign, 1.0)
                * s[0].square().mean(1)
            ),
            5.0,
            outputs,
        )

    runs = [
        distill(model(1), None, train, val, weights=(~wrong).float(), auxiliary=pull(sign), **settings)
        for sign in (1.0, -1.0)
    ]
    assert equal(state(runs[0].student), state(runs[1].student))


def test_the_check_of_an_extra_leaves_no_trace(teacher):
    "It is looked at in eval mode, with the global generator put back"

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.modes = nn.BatchNorm1d(8), []

        def forward(self, s, t, b):
            self.modes.append(self.training)
            return self.norm(s[0]).mean(1) + torch.rand(len(s[0]))

    noisy = Noisy()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    objective = Objective(auxiliary=AuxiliaryLoss(noisy, 1.0, outputs), forward=forward)
    check_auxiliary(objective, model(1), teacher, next(iter(train)))
    assert (
        torch.equal(torch.rand(1), expected)
        and noisy.modes == [False]
        and noisy.training
        and int(noisy.norm.num_batches_tracked) == 0
    )


# Validation samples of another kind


@pytest.mark.parametrize('mechanism', ['student', 'both'])
def test_a_validation_set_of_another_kind_is_not_followed(teacher, mechanism):
    "Its labels mean something else than all of those in training: no training sample looks good, and the run is the control"
    other = Loader({**clean_data, 'y': (clean_data['y'] + 1) % C})
    knowing = distill(model(9, 16), None, val, val, **settings | dict(epochs=30)).student
    with pytest.warns(UserWarning, match='another source'):
        run = distill(model(1), knowing, other, val, mechanism=mechanism, score=('loss',), **settings)
    control = distill(model(1), knowing, MixedBatches(other, val), val, **settings)
    assert (
        torch.equal(run.weights, torch.ones(N))
        and torch.equal(run.val_weights, torch.ones(M))
        and run.class_weights is None
        and not run.calibration.reference_is_comparable
    )
    assert equal(state(run.student), state(control.student)) and run.teacher is knowing
