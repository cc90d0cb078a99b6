"Few labels: splits, the stream of batches, the loop and its checkpoints, algorithms by hand, arguments that make no sense."

import copy, math
from dataclasses import replace

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn
from kd_aif.distillation.evaluation import evaluate
from kd_aif.few_labels.algorithms import (
    FixMatch,
    PseudoLabel,
    Algorithm,
    SSLStep,
    Supervised,
    TSA,
    UDA,
    sharpened_divergence,
)
from kd_aif.few_labels.batches import GroundTruth, SSLBatches, VIEWS, endless_order, labelled_split
from kd_aif.few_labels.consistency import (
    ICT,
    MeanTeacher,
    OutputMemory,
    TemporalEnsembling,
    VAT,
    adversarial_direction,
    frozen_batchnorm_statistics,
)
from kd_aif.few_labels.learned_labels import ImputedLabels, LGA, gradient_distance
from kd_aif.few_labels.meta_pseudo_labels import (
    ALGORITHMS,
    MetaPseudoLabels,
    feedback_scores,
    labelled_losses,
)
from kd_aif.few_labels.pseudo_labels import PseudoLabelMeter
from kd_aif.few_labels.self_adaptive import FreeMatch, SelfAdaptiveThresholds, fairness_loss
from kd_aif.few_labels.soft_weights import ConfidenceAverages, SoftMatch
from kd_aif.few_labels.settings import SSLTraining, moving_average, ssl_trainer
from kd_aif.few_labels.trainer import train_ssl
from kd_aif.data.images import hold_out, subset
from kd_aif.data.label_noise import long_tail
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.foundation.state_files import load_state
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.models.build import build_model
from kd_aif.models.features import default_forward

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
SHORT = dict(steps=6, batch_size=10, mu=2, lr=0.05, every=2, progress=False)


@pytest.fixture(scope='module')
def digits():
    return subset(load_images('digits'), 300, 0)


@pytest.fixture(scope='module')
def split(digits):
    return labelled_split(digits, 20, 0)


def network(seed=0, name='cnn8'):
    return build_model(name, 10, 1, seed=seed)


def train(algorithm, split, student=None, **more):
    "A short run; `more` has options of `train_ssl` and fields of `SSLTraining`"
    options = {k: more.pop(k) for k in ('val', 'test', 'weights', 'measure') if k in more}
    training = SSLTraining(**(SHORT | more))
    return train_ssl(student or network(), algorithm, *split[:2], training=training, **options)


def make_trainer(model, ema=None):
    return ssl_trainer(model, SSLTraining(steps=6, lr=0.05), ema)


def same(a, b):
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# The trainer


@quick
@given(seeds, st.floats(0, 1), st.integers(1, 6))
def test_a_moving_average_follows_its_equation(seed, decay, times):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = moving_average(model, decay)
    wanted = copy.deepcopy(average.module.state_dict())
    for k in range(times):
        for p in model.parameters():
            nn.init.normal_(p)
        model(torch.randn(4, 3))
        average.update_parameters(model)
        d = min(decay, 1 - 1 / (k + 1))
        for name, v in model.state_dict().items():
            wanted[name] = d * wanted[name] + (1 - d) * v if v.is_floating_point() else v.clone()
    for name, v in average.module.state_dict().items():
        assert torch.allclose(v, wanted[name], atol=1e-5)
    assert not average.training and not any(p.requires_grad for p in average.parameters())


# Splits and batches


@quick
@given(seeds, st.sampled_from([10, 20, 40]))
def test_the_labelled_images_are_balanced_and_stay_among_the_unlabelled(seed, n):
    data = subset(load_images('digits'), 300, 0)
    labelled, unlabelled, truth = labelled_split(data, n, seed)
    assert torch.bincount(labelled.y).tolist() == [n // 10] * 10 and len(labelled.index.unique()) == n
    assert torch.equal(unlabelled.index, data.index) and torch.equal(truth.of(data.index), data.y)
    assert torch.equal(labelled.index, labelled_split(data, n, seed)[0].index)
    assert not torch.equal(labelled.index, labelled_split(data, n, seed + 1)[0].index)


def test_unlabelled_images_have_no_labels(split):
    labelled, unlabelled, truth = split
    assert (
        set(vars(unlabelled)) == {'x', 'index', 'fingerprint'}
        and 'y' not in SSLBatches(labelled, unlabelled, 4).at(0, VIEWS)[1]
    )
    assert len(unlabelled.to('cpu')) == 300


@pytest.mark.parametrize('n', (0, 5, 25, -10, 20.5, None, '20'))
def test_a_number_that_cannot_be_balanced(digits, n):
    with pytest.raises(ValueError, match='n_labelled is .*multiple of the 10 classes'):
        labelled_split(digits, n, 0)


def test_a_class_with_too_few_images(digits):
    with pytest.raises(ValueError, match="needs 10 images of each class, but class '9' has"):
        labelled_split(long_tail(digits, 30, 0), 100, 0)


def test_labels_of_another_split(split):
    with pytest.raises(ValueError, match='index 99999 has no hidden label'):
        split[2].of(torch.tensor([99999]))
    assert split[2].of(torch.tensor([], dtype=torch.int64)).tolist() == []


@quick
@given(st.integers(1, 12), st.integers(0, 60), st.integers(1, 40), seeds)
def test_the_sequence_can_be_entered_anywhere(n, first, count, seed):
    whole = endless_order(seed, 'a', n, 0, first + count)
    assert torch.equal(endless_order(seed, 'a', n, first, count), whole[first:])
    for k in range(len(whole) // n):
        assert whole[k * n : (k + 1) * n].sort().values.tolist() == list(range(n))


def test_batches_are_a_pure_function_of_seed_and_step(split):
    labelled, unlabelled, _ = split

    def make(**more):
        return SSLBatches(labelled, unlabelled, 8, 3, **more)

    a, b = make(), make()
    b.at(7, VIEWS)
    state = torch.get_rng_state()
    for views in (('x',), VIEWS):
        for one, other in zip(a.at(2, views), b.at(2, views)):
            assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.at(2, ('x',))[1]['x'], a.at(2, ('strong', 'x'))[1]['x'])
    found = a.at(2, VIEWS)[1]
    assert not torch.equal(found['x'], found['x2']) and not torch.equal(found['x'], found['strong'])
    assert not torch.equal(make(seed=1).at(2)[0]['index'], a.at(2)[0]['index']) and not torch.equal(
        a.at(3)[0]['x'], a.at(2)[0]['x']
    )
    assert a.at(2, ())[1] is None and len(found['x']) == 24


def test_batches_are_normalised_like_others(split):
    labelled, unlabelled, _ = split
    batch = SSLBatches(labelled, unlabelled, 20, 1, weak=None).at(0)[0]
    wanted = next(iter(ImageBatches(labelled, 20, shuffle=False)))
    order = torch.searchsorted(wanted['index'].sort().values, batch['index'])
    assert torch.allclose(batch['x'], wanted['x'][wanted['index'].argsort()][order])


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(batch_size=0), ValueError, 'batch_size is 0'),
        (dict(mu=0), ValueError, 'mu is 0'),
        (dict(batch_size=2.5), ValueError, 'batch_size is 2.5'),
        (dict(weak='auto', strong='auto', labelled='other'), ValueError, "'other' is not a data set"),
        (
            dict(unlabelled='data'),
            TypeError,
            'unlabelled a ImageData; give the first two parts of labelled_split',
        ),
        (dict(labelled='empty'), ValueError, '0 labelled and 300'),
    ],
)
def test_batches_of_what_makes_none(split, digits, change, error, message):
    labelled, unlabelled, _ = split
    given = dict(labelled=labelled, unlabelled=unlabelled) | change
    given['labelled'] = {'other': replace(labelled, name='other'), 'empty': labelled.select([])}.get(
        change.get('labelled'), labelled
    )
    if change.get('unlabelled') == 'data':
        given['unlabelled'] = digits
    with pytest.raises(error, match=message):
        SSLBatches(**given)


# The loop


def test_a_run_is_a_pure_function_of_its_seed(split):
    a, b, c = (train(FixMatch(0.3), split, seed=s) for s in (0, 0, 1))
    assert (
        same(a.student, b.student)
        and same(a.ema_model, b.ema_model)
        and a.history == b.history
        and not same(a.student, c.student)
    )


def test_the_global_generator_is_left_alone_and_the_student_trained_in_place(split):
    student, state = network(), torch.get_rng_state()
    run = train(FixMatch(0.3), split, student)
    assert torch.equal(torch.get_rng_state(), state) and run.student is student and not student.training
    assert run.ema_model is not student and all(p.requires_grad for p in run.ema_model.parameters())


def test_the_ema_model_follows_its_equation(split):
    seen = []

    def look(step, output):
        seen.append((copy.deepcopy(step.student.state_dict()), copy.deepcopy(step.ema_model.state_dict())))

    run = train(FixMatch(0.3), split, ema=0.6, weights=look)
    seen.append((run.student.state_dict(), run.ema_model.state_dict()))
    for k in range(6):
        d = min(0.6, 1 - 1 / (k + 1))
        for name, before in seen[k][1].items():
            if 'running' in name or 'tracked' in name:
                continue  # the student's have seen the next batch already when it is looked at
            assert torch.allclose(
                seen[k + 1][1][name], d * before + (1 - d) * seen[k + 1][0][name], atol=1e-6
            )


def test_the_learning_rate_follows_the_cosine(split):
    rates = []
    train(FixMatch(), split, weights=lambda step, output: rates.append(step.lr))
    assert rates == pytest.approx([0.05 * math.cos(7 * math.pi * k / (16 * 6)) for k in range(6)])


def test_one_step_by_hand(split):
    student = network(name='mlp16')
    before = copy.deepcopy(student)
    plain_sgd = lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr)
    train(
        FixMatch(0.0),
        split,
        student,
        steps=1,
        every=1,
        make_optimizer=plain_sgd,
        weights=lambda step, output: torch.arange(20.0),
    )
    batch, others = SSLBatches(*split[:2], 10, 2).at(0, VIEWS)
    z, weak, strong = (before(x) for x in (batch['x'], others['x'], others['strong']))
    loss = (
        F.cross_entropy(z, batch['y'])
        + (torch.arange(20.0) * F.cross_entropy(strong, weak.argmax(1), reduction='none')).mean()
    )
    for p, q, g in zip(
        before.parameters(), student.parameters(), torch.autograd.grad(loss, list(before.parameters()))
    ):
        assert torch.allclose(q, p - 0.05 * g, atol=1e-6)


def test_evaluations(split, digits):
    val, test = hold_out(load_images('digits', 'test'), 60, 0)[::-1]
    calls = []
    run = train(
        FixMatch(0.3),
        split,
        val=val,
        test=ImageBatches(test, 100),
        steps=7,
        every=3,
        measure=lambda model, forward: calls.append(model) or dict(found=1.0),
    )
    assert [row['step'] for row in run.history] == [3, 6, 7] and all(m is run.student for m in calls)
    assert set(run.history[0]) == {
        'step',
        'lr',
        'loss_labelled',
        'loss_unlabelled',
        'mask',
        'val_accuracy',
        'found',
    }
    assert (
        run.metrics['val_accuracy'] == run.history[-1]['val_accuracy']
        and 0 <= run.metrics['test_accuracy'] <= 1
    )
    assert run.metrics['val_accuracy'] == evaluate(run.ema_model, ImageBatches(val, 60))['accuracy']
    assert '**fixmatch**, 20 labelled and 300 unlabelled images, 7 steps' in repr(run) and set(
        run.seconds
    ) == {'training', 'evaluation'}


def test_fine_tuning_changes_the_ema_model_alone(split):
    a, b = train(FixMatch(0.3), split), train(FixMatch(0.3), split, finetune=3, finetune_lr=0.01)
    assert same(a.student, b.student) and not same(a.ema_model, b.ema_model) and 'fine-tuning' in b.seconds
    assert b.config['finetune'] == 3 and not b.ema_model.training


@pytest.mark.parametrize('name', ('cnn8', 'resnet20'))
def test_autocast_trains_and_stays_finite(split, name):
    run = train(FixMatch(0.1), split, network(name=name), autocast=torch.bfloat16, steps=2)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in run.student.parameters())


# Modes


def test_a_student_that_arrives_in_eval_mode_is_trained_in_train_mode(split):
    "Also where a single layer does: it is the whole network that is set to train mode in every step"
    modes = lambda m: m.train(), lambda m: m.eval(), lambda m: m[2].eval()
    students = [network() for _ in modes]
    for student, mode in zip(students, modes):
        mode(student)
        train(FixMatch(0.3), split, student)
    assert same(students[0], students[1]) and same(students[0], students[2])
    assert int(students[2][2].num_batches_tracked) == 6 and students[2][2].running_mean.any()


class Frozen(nn.BatchNorm2d):
    "Stays in eval mode, as its own rule"

    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize('name', ('fixmatch', 'mean_teacher', 'vat', 'mpl'))
def test_a_layer_that_overrides_train_stays_in_eval_mode(split, name):
    student = network()
    student[2] = Frozen(student[2].num_features)
    run = train(make(name, split), split, student)
    for model in (run.student, run.ema_model, getattr(run.state, 'network', run.student)):
        assert int(model[2].num_batches_tracked) == 0 and not model[2].running_mean.any()
    assert any(m.running_mean.any() for m in run.student if type(m) is nn.BatchNorm2d)


@pytest.mark.parametrize('mode', (True, False))
def test_teachers_are_trained_in_train_mode(split, mode):
    run = train(MetaPseudoLabels(make_teacher=lambda: network(3).train(mode)), split)
    assert int(run.state.network[2].num_batches_tracked) == 6


# Checkpoints


class Stop(Exception):
    pass


def interrupted(algorithm, split, path, at, **more):
    "A run that breaks off in step `at`"

    def weights(step, output):
        if step.number == at:
            raise Stop

    with pytest.raises(Stop):
        train(algorithm, split, checkpoint=path, weights=weights, **more)


def resumes(make, split, path):
    "Does a run that is interrupted twice end like one that is not? Without weights for algorithms that have none"
    whole = train(make(), split, weights=lambda step, output: None)
    for at in (3, 5):
        interrupted(make(), split, path, at)
    found = train(make(), split, checkpoint=path, weights=lambda step, output: None)
    assert (
        same(whole.student, found.student)
        and same(whole.ema_model, found.ema_model)
        and whole.history == found.history
    )
    if whole.state is not None:
        assert all(
            torch.equal(v, found.state.state_dict()[k])
            for k, v in whole.state.state_dict().items()
            if torch.is_tensor(v)
        )


def test_an_interrupted_run_ends_bit_by_bit_like_another(split, tmp_path):
    resumes(lambda: FixMatch(0.3), split, tmp_path / 'deep' / 'run.safetensors')


def test_a_finished_run_is_only_measured_again(split, tmp_path):
    a = train(FixMatch(0.3), split, checkpoint=tmp_path / 'a.safetensors')
    b = train(FixMatch(0.3), split, checkpoint=tmp_path / 'a.safetensors', weights=None)
    assert (
        same(a.ema_model, b.ema_model)
        and a.history == b.history
        and sorted(p.name for p in tmp_path.iterdir()) == ['a.safetensors']
    )


def test_weights_with_a_memory_are_part_of_the_checkpoint(split, tmp_path):
    class Counting(nn.Module):
        def __init__(self, stop=None):
            super().__init__()
            self.register_buffer('n', torch.tensor(0))
            self.stop = stop

        def forward(self, step, output):
            if step.number == self.stop:
                raise Stop
            self.n += 1
            return self.n * torch.ones_like(output.unsupervised)

    a, c = Counting(), Counting()
    whole = train(FixMatch(0.3), split, weights=a)
    with pytest.raises(Stop):
        train(FixMatch(0.3), split, weights=Counting(5), checkpoint=tmp_path / 'a.safetensors')
    assert (
        same(
            whole.student,
            train(FixMatch(0.3), split, weights=c, checkpoint=tmp_path / 'a.safetensors').student,
        )
        and int(c.n) == 6
    )


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(seed=1), 'seed=0, not 1'),
        (dict(lr=0.1), 'lr=0.05, not 0.1'),
        (dict(steps=8), 'steps=6, not 8'),
        (dict(algorithm=FixMatch(0.4)), r'algorithm=.*threshold=0.3'),
        (dict(weak=None), 'weak='),
        (dict(weights=lambda step, output: None), 'weighted=False, not True'),
        (dict(student=network(5)), 'student='),
        (dict(ema=0.5), 'ema=0.999, not 0.5'),
    ],
)
def test_a_checkpoint_of_another_run(split, tmp_path, change, message):
    train(FixMatch(0.3), split, checkpoint=tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match=message):
        train(change.pop('algorithm', FixMatch(0.3)), split, checkpoint=tmp_path / 'a.safetensors', **change)


def test_a_damaged_checkpoint(split, tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(b'not a checkpoint')
    with pytest.raises(ValueError, match='holds no complete state .*delete it to begin anew'):
        train(FixMatch(), split, checkpoint=tmp_path / 'a.safetensors')


# Settings


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(algorithm='fixmatch'), TypeError, "algorithm is 'fixmatch'; give an object such as FixMatch"),
        (dict(algorithm=FixMatch), TypeError, 'give an object'),
        (dict(steps=0), ValueError, 'steps is 0'),
        (dict(steps=1.5), ValueError, 'steps is 1.5'),
        (dict(lr=0.0), ValueError, 'lr is 0.0'),
        (dict(lr='a'), TypeError, "lr is 'a'"),
        (dict(ema=1.5), ValueError, 'ema is 1.5'),
        (dict(finetune=-1), ValueError, 'finetune is -1'),
        (dict(every=0), ValueError, 'every is 0'),
        (dict(weights=torch.ones(3)), TypeError, 'weights is a Tensor; give a function'),
        (dict(weights=lambda s, t: torch.ones(3)), ValueError, 'one finite weight of 0 or more per sample'),
        (
            dict(algorithm=Supervised(), weights=lambda s, t: None),
            ValueError,
            "algorithm 'supervised' has no unlabelled images to weigh",
        ),
        (dict(student=build_model('cnn8', 7, 1)), ValueError, 'student has 7 classes, the data 10'),
    ],
)
def test_settings_that_make_no_sense(split, change, error, message):
    with pytest.raises(error, match=message):
        train(change.pop('algorithm', FixMatch()), split, **change)


def test_a_loss_that_is_not_finite(split):
    with pytest.raises(
        ValueError, match='fixmatch: the loss is not finite before step 2; use a smaller lr than'
    ):
        train(FixMatch(0.0), split, lr=1e20)


def test_a_algorithm_that_wants_a_view_that_is_not_there(split):
    class Odd(Algorithm):
        name, views = 'odd', ('x3',)

    with pytest.raises(ValueError, match=r"wants the views \['x3'\]; there are x, x2, strong"):
        train(Odd(), split)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: FixMatch(1.5), 'threshold is 1.5'),
        (lambda: FixMatch(weight=-1), 'weight is -1'),
        (lambda: PseudoLabel(ramp=2.0), 'ramp is 2.0'),
        (lambda: PseudoLabel(weight=math.inf), 'weight is inf'),
    ],
)
def test_settings_of_algorithms(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Measuring pseudo-labels


def test_the_meter_counts_what_it_should(split):
    labelled, unlabelled, truth = split
    meter = PseudoLabelMeter(labelled, unlabelled, truth, threshold=0.4, limit=100)
    assert len(meter.chosen) == 100 and not set(unlabelled.index[meter.chosen].tolist()) & set(
        labelled.index.tolist()
    )
    x, y = (
        ImageBatches(labelled, 1)._normalise(unlabelled.x[meter.chosen]),
        truth.of(unlabelled.index[meter.chosen]),
    )
    with torch.no_grad():
        p = network().eval()(x).softmax(1)
    sure, right = p.amax(1) >= 0.4, p.argmax(1) == y
    found = meter(network())
    assert found['coverage'] == pytest.approx(float(sure.float().mean())) and found[
        'pseudo_accuracy'
    ] == pytest.approx(float(right.float().mean()))
    assert PseudoLabelMeter(labelled, unlabelled, truth, threshold=1.0)(network())['precision'] is None
    with pytest.raises(ValueError, match='every image has a label'):
        PseudoLabelMeter(*labelled_split(labelled, 20, 0)).chosen


def test_the_meter_asks_who_names_labels_itself(split):
    class Sure(nn.Module):
        def pseudo_labels(self, x, forward):
            return torch.full((len(x),), 0.3), torch.full((len(x),), 7)

    labelled, unlabelled, truth = split
    meter = PseudoLabelMeter(labelled, unlabelled, truth, threshold=0.2, limit=100)
    confidence, right = meter.measured(Sure())
    assert (confidence == torch.tensor(0.3)).all() and torch.equal(
        right, truth.of(unlabelled.index[meter.chosen]) == 7
    )


# Algorithms

CHECKED = [n for n in ALGORITHMS if n != 'supervised_all']


def make(name, split):
    return ALGORITHMS[name](split[2]) if name == 'supervised_all' else ALGORITHMS[name]()


def step_of(split, algorithm, student=None, ema_model=None, number=3, k=0, double=False):
    "A step of the loop without the loop"
    student = student or network(name='mlp16')
    student = student.double() if double else student
    labelled, others = SSLBatches(*split[:2], 10, 2).at(k, algorithm.views)
    if double:
        labelled, others = (
            {n: v.double() if v.is_floating_point() else v for n, v in b.items()} if b else b
            for b in (labelled, others)
        )
    state = algorithm.start(student, split[1], 10, make_trainer)
    return SSLStep(
        student,
        (ema_model or copy.deepcopy(student)).eval(),
        labelled,
        others,
        number,
        6,
        0.05,
        default_forward,
        state,
    )


def test_names_of_records():
    assert list(ALGORITHMS) == [
        'supervised',
        'supervised_all',
        'pseudo_label',
        'temporal_ensembling',
        'mean_teacher',
        'vat',
        'ict',
        'uda',
        'fixmatch',
        'freematch',
        'softmatch',
        'lga',
        'mpl',
    ]
    assert all(name == maker.name for name, maker in ALGORITHMS.items())


@pytest.mark.parametrize('name', ALGORITHMS)
def test_one_loss_for_each_image(split, name):
    algorithm = make(name, split)
    step = step_of(split, algorithm, network())
    output = algorithm(step)
    assert output.supervised.shape == (10,) and torch.isfinite(output.total())
    if name == 'supervised':
        return
    assert output.unsupervised.shape == (20,)
    least = -algorithm.fairness * 20 if name == 'freematch' else -1e-6  # minus a cross-entropy
    assert (output.unsupervised >= least).all()
    for o in (output.mask, output.labels):
        assert o is None or o.shape == (20,)
    twice = output.total(torch.full((20,), 2.0)) - output.total(torch.ones(20))
    assert torch.allclose(twice, output.weight * output.unsupervised.mean(), atol=1e-6)


@pytest.mark.parametrize('name', [n for n in ALGORITHMS if n != 'supervised'])
def test_a_run_with_any_algorithm_resumes_bit_by_bit(split, name, tmp_path):
    resumes(lambda: make(name, split), split, tmp_path / 'run.safetensors')


def test_only_the_ceiling_has_hidden_labels(split):
    with pytest.raises(TypeError, match='truth'):
        ALGORITHMS['supervised_all']()
    assert [
        n for n in ALGORITHMS if any(isinstance(v, GroundTruth) for v in vars(make(n, split)).values())
    ] == ['supervised_all']
    step = step_of(split, make('supervised_all', split))
    assert torch.equal(make('supervised_all', split)(step).labels, split[2].of(step.unlabelled['index']))


@pytest.mark.parametrize('name', [n for n in ALGORITHMS if n != 'supervised'])
def test_with_weight_zero_an_image_is_not_learned(split, name):
    algorithm = make(name, split)
    step = step_of(split, algorithm)
    algorithm(step)
    output = algorithm(step)  # a second time: memories have a target
    output.total(torch.zeros(20)).backward(retain_graph=True)
    zero = [None if p.grad is None else p.grad.clone() for p in step.student.parameters()]
    step.student.zero_grad()
    if output.supervised.requires_grad:
        output.supervised.mean().backward()
    for p, g in zip(step.student.parameters(), zero):
        assert torch.allclose(
            torch.zeros_like(p) if g is None else g,
            torch.zeros_like(p) if p.grad is None else p.grad,
            atol=1e-7,
        )


@pytest.mark.parametrize('name', CHECKED)
def test_bf16_and_other_networks(split, name):
    run = train(
        make(name, split), split, network(name='wrn_16_2'), autocast=torch.bfloat16, steps=1, batch_size=4
    )
    assert all(torch.isfinite(p).all() for p in run.student.parameters())


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: TemporalEnsembling(1.0), 'alpha is 1: '),
        (lambda: ICT(alpha=0.0), 'alpha is 0.0'),
        (lambda: VAT(radius=0.0), 'radius is 0.0'),
        (lambda: VAT(iterations=-1), 'iterations is -1'),
        (lambda: UDA(T=0.0), 'T is 0.0'),
        (lambda: UDA(tsa='log10'), "tsa is 'log10'; use None or one of linear, exp, log"),
        (lambda: LGA(rate=-1.0), 'rate is -1.0'),
        (lambda: FreeMatch(decay=1.5), 'decay is 1.5'),
        (lambda: FreeMatch(fairness=-1.0), 'fairness is -1.0'),
        (lambda: FreeMatch(weight=-1.0), 'weight is -1.0'),
        (lambda: SoftMatch(decay=1.5), 'decay is 1.5'),
        (lambda: SoftMatch(width=0.0), 'width is 0'),
        (lambda: SoftMatch(weight=-1.0), 'weight is -1.0'),
        (lambda: SelfAdaptiveThresholds(1), 'n_classes is 1'),
        (lambda: MeanTeacher(weight=-1.0), 'weight is -1.0'),
        (lambda: MetaPseudoLabels('soft'), "labels is 'soft'; use 'argmax' or 'sample'"),
        (lambda: MetaPseudoLabels(uda=-1), 'uda is -1'),
        (lambda: MetaPseudoLabels(smoothing=2.0), 'smoothing is 2.0'),
    ],
)
def test_settings_of_the_other_algorithms(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@quick
@given(seeds, st.floats(0, 0.95), st.integers(1, 6))
def test_the_memory_is_a_weighted_mean(seed, alpha, times):
    p = torch.rand(times, 2, 3, generator=torch.Generator().manual_seed(seed)).softmax(2)
    memory = OutputMemory(2, 3, alpha)
    for o in p:
        memory.add(torch.arange(2), o)
    shares = torch.tensor([alpha**k for k in range(times)][::-1])
    assert torch.allclose(
        memory.target(torch.arange(2))[0], (shares[:, None, None] * p).sum(0) / shares.sum(), atol=1e-5
    )


def test_the_teacher_is_the_ema_model(split):
    algorithm = MeanTeacher()
    student, teacher = network(name='mlp16'), network(5, 'mlp16')
    step = step_of(split, algorithm, student, teacher)
    wanted = (
        (student(step.unlabelled['x2']).softmax(1) - teacher(step.unlabelled['x']).softmax(1))
        .square()
        .mean(1)
    )
    assert torch.allclose(algorithm(step).unsupervised, wanted, atol=1e-6)
    seen = []
    run = train(algorithm, split, measure=lambda model, forward: seen.append(model) or {})
    assert all(model is run.ema_model for model in seen)


def test_passes_of_the_ema_model_leave_its_statistics_alone(split):
    for algorithm in (MeanTeacher(), ICT()):
        step = step_of(split, algorithm, network())
        before = copy.deepcopy(step.ema_model)
        algorithm(step)
        assert same(before, step.ema_model) and not step.ema_model.training


def test_statistics_stay_when_an_error_occurs():
    model = network().eval()
    with pytest.raises(Stop):
        with frozen_batchnorm_statistics(model):
            raise Stop
    assert not model.training and all(
        m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    )


def test_vat_moves_the_statistics_once(split):
    algorithm, student = VAT(), network().train()
    step = step_of(split, algorithm, student)
    algorithm(step)
    assert int(student[2].num_batches_tracked) == 1


@quick
@given(seeds, st.floats(0.01, 2.0))
def test_the_disturbance_has_its_length_also_where_gradients_are_tiny(seed, radius):
    torch.manual_seed(seed)
    x, scale = torch.randn(4, 1, 5, 5), 1e-15
    r = adversarial_direction(lambda moved: scale * (moved - x).square().flatten(1).sum(1), x, radius)
    assert torch.allclose(r.square().mean((1, 2, 3)).sqrt(), torch.full((4,), radius), rtol=1e-4)


def test_signal_annealing():
    losses = -torch.tensor([0.95, 0.6, 0.3]).log()
    for name, growth in TSA.items():
        assert growth(1.0) == pytest.approx(1.0, abs=0.01) and growth(0.0) <= 0.01
    assert torch.equal(UDA(tsa='log').signal(losses, 10, 0.0), torch.zeros(3))  # nothing below one tenth
    assert torch.allclose(
        UDA(tsa='linear').signal(losses, 2, 0.5),
        torch.stack([0 * losses[0], 1.5 * losses[1], 1.5 * losses[2]]),
    )


@quick
@given(seeds, st.floats(0.2, 3.0))
def test_sharpening_is_never_negative_and_zero_at_the_target(seed, T):
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    assert (sharpened_divergence(z, z.flip(0), T) >= -1e-6).all() and torch.allclose(
        sharpened_divergence(z, z / T, T), torch.zeros(4), atol=1e-5
    )


def test_the_distance_falls_when_labels_follow_its_slope(split):
    student = network(name='mlp16')
    batch, others = SSLBatches(*split[:2], 10, 2).at(0)
    parameters = list(student.parameters())

    def distance(a):
        return gradient_distance(
            parameters,
            F.cross_entropy(student(batch['x']), batch['y']),
            -(a.softmax(1) * student(others['x']).log_softmax(1)).sum(1).mean(),
        )[0]

    a = torch.zeros(20, 10, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(a), a)
    assert distance(a - 0.1 * slope / slope.norm()) < distance(a) < distance(a + 0.1 * slope / slope.norm())
    assert slope.sum(1).abs().max() < 1e-5  # a softmax does not mind a constant


def test_learned_labels_begin_with_the_network_and_are_remembered():
    labels = ImputedLabels(3, 2)
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(labels.read(torch.tensor([2, 0]), first), first)
    labels.write(torch.tensor([2, 2]), first)
    assert labels.read(torch.tensor([2, 1]), 9 * first).tolist() == [[2.0, 3.0], [27.0, 36.0]]


@pytest.mark.parametrize('labels', ('argmax', 'sample'))
def test_the_feedback_is_the_inner_product(split, labels):
    "Change of the labelled loss ≈ η·∇L(θ')·g; positive where the pseudo-labels are the labels themselves"
    algorithm, lr = (
        MetaPseudoLabels(labels, smoothing=0.0, make_teacher=lambda: network(4, 'mlp16').double()),
        1e-4,
    )
    step = step_of(split, algorithm, double=True)
    torch.manual_seed(0)
    output = algorithm(step)
    student, batch = step.student, step.labelled
    g = torch.autograd.grad(output.total(), list(student.parameters()))
    before = output.supervised.mean()
    with torch.no_grad():
        for p, d in zip(student.parameters(), g):
            p.sub_(lr * d)
    new = torch.autograd.grad(F.cross_entropy(student(batch['x']), batch['y']), list(student.parameters()))
    product = lr * sum((a * b).sum() for a, b in zip(new, g))
    assert float(before - labelled_losses(step).mean()) == pytest.approx(float(product), rel=1e-2)


def test_the_mean_score_is_the_feedback_to_first_order(split):
    student = network(name='mlp16').double()
    labelled, others = SSLBatches(*split[:2], 10, 2).at(1)
    labelled, pseudo = (
        dict(labelled, x=labelled['x'].double()),
        dict(x=others['x'].double(), y=torch.arange(20) % 10, index=others['index']),
    )
    scores = feedback_scores(student, labelled, pseudo)
    g = torch.autograd.grad(
        batch_cross_entropy(student(pseudo['x']), pseudo).mean(), list(student.parameters())
    )

    def loss(model):
        return float(F.cross_entropy(model(labelled['x']), labelled['y']).detach())

    before, ratio = loss(student), []
    for lr in (1e-3, 1e-4):
        moved = copy.deepcopy(student)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), g):
                p.sub_(lr * d)
        h = before - loss(moved)
        ratio.append(abs(h / (lr * float(scores.mean())) - 1))
    assert ratio[1] < 1e-3 and ratio[1] < ratio[0] / 5
    own = feedback_scores(student, labelled, labelled)
    assert own.mean() > 0  # learning the labelled images themselves lowers their loss


def test_the_students_labels_are_only_measured(split):
    algorithm = MetaPseudoLabels()
    step = step_of(split, algorithm, network())
    output = algorithm(step)
    assert not output.supervised.requires_grad and output.mask is None
    before = copy.deepcopy(step.state.network.state_dict()), copy.deepcopy(step.student.state_dict())
    algorithm.after(step, output)
    assert any(not torch.equal(v, before[0][k]) for k, v in step.state.network.state_dict().items())
    assert all(
        torch.equal(v, before[1][k]) for k, v in step.student.state_dict().items()
    )  # neither weights nor statistics


def test_without_feedback_the_teacher_is_alone(split):
    "Its loss is then cross-entropy and UDA, whatever the student does"
    algorithm = MetaPseudoLabels(feedback=0.0)
    a, b = (train(algorithm, split, network(s), seed=0) for s in (0, 0))
    assert same(a.state.network, b.state.network)
    step = step_of(split, algorithm)
    output = algorithm(step)
    assert torch.equal(
        algorithm.teacher_loss(step, output, torch.tensor(5.0)),
        algorithm.teacher_loss(step, output, torch.tensor(0.0)),
    )


def test_the_usual_feedback_is_a_moving_mean(split):
    algorithm = MetaPseudoLabels()
    step = step_of(split, algorithm)
    output = algorithm(step)
    with torch.no_grad():
        for p in step.student.parameters():
            p.mul_(0.5)
    h = float(output.supervised.mean() - labelled_losses(step).mean())
    algorithm.after(step, output)
    assert float(step.state.feedback_baseline) == pytest.approx(0.01 * h, rel=1e-4) and h != 0


def test_a_teacher_of_another_kind(split):
    run = train(
        MetaPseudoLabels(make_teacher=lambda: network(3, 'cnn16')),
        split,
        measure=lambda model, forward: dict(width=float(model[0].out_channels)),
    )
    assert run.history[-1]['width'] == 16.0 and run.student[0].out_channels == 8


# Thresholds that adapt themselves


def test_thresholds_after_two_batches_by_hand():
    "λ = 0.9 and three classes, all averages from 1/3"
    state = SelfAdaptiveThresholds(3)
    assert state.thresholds().tolist() == pytest.approx([1 / 3] * 3)
    state.update(torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]]), 0.9)
    tau = 0.9 / 3 + 0.1 * 0.55
    p = [0.3 + 0.055, 0.3 + 0.02, 0.3 + 0.025]
    assert float(state.confidence) == pytest.approx(tau)
    assert state.thresholds().tolist() == pytest.approx([v / p[0] * tau for v in p])
    assert state.histogram.tolist() == pytest.approx([0.4, 0.3, 0.3])
    state.update(torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.1, 0.7], [0.0, 0.1, 0.9]]), 0.9)
    tau = 0.9 * tau + 0.1 * 0.8
    p = [0.9 * v + 0.1 * m for v, m in zip(p, (0.1, 1 / 3, 1.7 / 3))]
    assert float(state.confidence) == pytest.approx(tau)
    assert state.thresholds().tolist() == pytest.approx([v / max(p) * tau for v in p])
    assert state.histogram.tolist() == pytest.approx([0.36, 0.27 + 0.1 / 3, 0.27 + 0.2 / 3])


def freematch_step(weak, strong, state):
    "A step in which images are logits"
    images = [torch.as_tensor(v, dtype=torch.float32).log()[:, :, None, None] for v in (weak, strong)]
    rows = torch.arange(len(weak))
    unlabelled = dict(x=images[0], strong=images[1].requires_grad_(), index=rows, position=rows)
    labelled = dict(x=images[0][:1], y=torch.tensor([0]), index=rows[:1])
    net = nn.Flatten()
    return SSLStep(net, net, labelled, unlabelled, 0, 10, 0.1, default_forward, state)


def test_a_step_of_freematch_by_hand():
    "Thresholds move before they are used: (0.675, 0.6107) after the second batch, λ = ½"
    state = SelfAdaptiveThresholds(2)
    algorithm = FreeMatch(decay=0.5, weight=2.0, fairness=0.1)
    algorithm(freematch_step([[0.9, 0.1], [0.6, 0.4]], [[0.5, 0.5]] * 2, state))
    step = freematch_step([[0.2, 0.8], [0.65, 0.35]], [[0.3, 0.7], [0.9, 0.1]], state)
    output = algorithm(step)
    assert output.mask.tolist() == [True, False] and output.labels.tolist() == [1, 0]
    fair = 0.0  # one class is found: b = 1 there, and log 1 = 0
    wanted = [-2 * math.log(0.7) + 0.1 * fair, 0.1 * fair]
    assert output.unsupervised.tolist() == pytest.approx(wanted, abs=1e-6) and output.weight == 1.0


def test_a_step_of_softmatch_by_hand():
    "Alignment moves first, then mean and variance, λ = ½; pseudo-labels are those without alignment"
    state, algorithm = ConfidenceAverages(2), SoftMatch(decay=0.5, width=2.0, weight=3.0)
    output = algorithm(freematch_step([[0.9, 0.1], [0.55, 0.45]], [[0.3, 0.7], [0.8, 0.2]], state))
    average = [0.5 * 0.5 + 0.5 * 0.725, 0.5 * 0.5 + 0.5 * 0.275]
    ratios = [[0.9 / average[0], 0.1 / average[1]], [0.55 / average[0], 0.45 / average[1]]]
    confidence = [max(r) / sum(r) for r in ratios]
    assert ratios[1][1] > ratios[1][0]  # aligned, the second image is of the other class
    mean = 0.5 * 0.5 + 0.5 * sum(confidence) / 2
    variance = 0.5 + 0.5 * (confidence[0] - confidence[1]) ** 2 / 2
    weights = [math.exp(-(min(c - mean, 0) ** 2) * 4 / (2 * variance)) for c in confidence]
    assert weights[1] < weights[0] == 1
    assert output.labels.tolist() == [0, 0] and output.mask.tolist() == pytest.approx(weights)
    wanted = [3 * weights[0] * -math.log(0.3), 3 * weights[1] * -math.log(0.8)]
    assert output.unsupervised.tolist() == pytest.approx(wanted, rel=1e-5)


@quick
@given(seeds, st.integers(1, 12), st.floats(0, 1), st.floats(0.1, 10))
def test_weights_of_softmatch_are_finite_and_rise_with_confidence(seed, n, decay, width):
    confidence = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    w = ConfidenceAverages(4).weights(confidence, decay, width)
    assert torch.isfinite(w).all() and (w >= 0).all() and (w <= 1).all()
    assert (w[confidence.argsort()].diff() >= -1e-6).all()


def test_fairness_by_hand():
    state = SelfAdaptiveThresholds(3)
    state.probability.copy_(torch.tensor([0.5, 0.3, 0.2]))
    state.histogram.copy_(torch.tensor([0.6, 0.4, 0.0]))
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1], [0.0, 0.1, 0.9]])
    mask = torch.tensor([True, True, True, False])
    found = fairness_loss((p + 1e-12).log(), mask, state)
    a = torch.tensor([0.5 / 0.6, 0.3 / 0.4])  # the third class is never found
    b = torch.tensor([1.5 / 2, 1.2 / 1])  # the first class is found twice, the second once
    assert torch.allclose(found, (a / a.sum() * (b / b.sum()).log()).sum(), atol=1e-6)


@quick
@given(seeds, st.integers(0, 12))
def test_fairness_is_finite_and_learns_from_images_that_count_alone(seed, n):
    g = torch.Generator().manual_seed(seed)
    z, mask = (10 * torch.randn(12, 5, generator=g)).requires_grad_(), torch.arange(12) < n
    state = SelfAdaptiveThresholds(5)
    state.update(torch.randn(12, 5, generator=g).softmax(1), 0.5)
    loss = fairness_loss(z, mask, state)
    loss.backward()
    assert torch.isfinite(loss) and loss <= 1e-6 and torch.isfinite(z.grad).all()
    assert not z.grad[n:].any() and (n > 0 or float(loss.detach()) == 0)


def test_with_decay_one_freematch_counts_all_and_fixmatch_at_1_c_does_too(split):
    "Thresholds that never move stay at 1/C"
    a = FreeMatch(decay=1.0, fairness=0.0)
    step = step_of(split, a, network())
    output, other = a(step), FixMatch(0.1)(step)
    assert output.mask.all() and torch.equal(output.unsupervised, other.unsupervised)
    assert torch.equal(output.labels, other.labels)


def test_state_of_freematch_is_in_the_checkpoint(split, tmp_path):
    run = train(FreeMatch(0.9), split, checkpoint=tmp_path / 'a.safetensors')
    saved = load_state(tmp_path / 'a.safetensors')['state']['parts']['state']
    assert sorted(saved) == ['confidence', 'histogram', 'probability']
    assert all(torch.equal(saved[k], v) for k, v in run.state.state_dict().items())
    assert float(run.state.confidence) != pytest.approx(0.1)
    assert float(run.state.histogram.sum()) == pytest.approx(1) == float(run.state.probability.sum())
