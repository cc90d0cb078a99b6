"""The recorded step: the same training replayed from a trace, what is refused, what is put back; and on CUDA the graph itself."""

import sys, warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / 'golden'))
from cases import CASES, loader, network, noisy, state_sha, tailed, teacher

from kd_aif.data.epoch_plans import BatchPlan, ImagePlan
from kd_aif.data.mixed_batches import MixedBatches
from kd_aif.data.training_set import TrainingSet
from kd_aif.distillation import captured_step
from kd_aif.distillation.captured_step import CapturedStep, record_nothing, record_trace, RECORDERS, unchanged
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import AuxiliaryLoss, Objective
from kd_aif.distillation.schedules import Online
from kd_aif.distillation.trainer import Fit, Training
from kd_aif.distillation.weighting import Fixed, Published, Reweighting
from kd_aif.foundation.core import static
from kd_aif.rivals.logit_losses import dist_loss, dkd_loss, spherical_kd_loss
from kd_aif.rivals.published_losses import make_feature_loss
from kd_aif.rivals.robust_losses import GeneralizedCrossEntropy
from kd_aif.weights.sample_weights import WeightTable

cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA device: graphs cannot be recorded here'
)
quiet = dict(progress=False)


@pytest.fixture
def recorded(monkeypatch):
    "Steps on the CPU are recorded by a stand-in; counts recordings and replays"

    def start(record):
        count = Counter()

        def counted(function, inputs, state):
            count['recordings'] += 1
            replay = record(function, inputs, state)

            def again():
                count['replays'] += 1
                return replay()

            return again

        monkeypatch.setitem(RECORDERS, 'cpu', counted)
        return count

    return start


# The same training, replayed

TRACED = (
    'ce', 'kd', 'kd_val', 'kd_cached', 'student_after', 'student_every', 'both_twice', 'both_goes_on', 'joint',
    'teacher_first', 'ema', 'tail_student', 'tail_joint', 'bfloat16', 'held_out', 'fixed_all', 'class_weights_alone',
)  # fmt: skip


@pytest.mark.parametrize('name', TRACED)
def test_a_replayed_training_is_the_same_to_the_last_bit(name, recorded):
    expected, count = CASES[name](), recorded(record_trace)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert CASES[name]() == expected
    assert count['replays'] > 10


@pytest.mark.parametrize('name', ['student_online', 'meta_weight_net', 'attention', 'mutual'])
def test_what_cannot_be_recorded_runs_as_it_is(name, recorded):
    expected, count = CASES[name](), recorded(record_trace)
    assert CASES[name]() == expected
    if name != 'attention':  # its teacher is trained before
        assert not count['replays']


def fit(sets=noisy, weights=None, joint=False, augment=True, student=None, with_teacher=True, **options):
    "A training of digits, in which nothing is random but the seeds"
    train, val = (loader(o, augment) for o in sets())
    data = TrainingSet(train, val, include_validation=True)
    objective = Objective(
        alpha=0.5, **{k: options.pop(k) for k in ('auxiliary', 'label_loss') if k in options}
    )
    training = Training(**dict(epochs=3, lr=0.1, progress=False) | options)
    student = network('cnn8', 1) if student is None else student
    table = WeightTable(data) if weights is None else weights
    return Fit(student, teacher(noisy) if with_teacher else None, data, table, objective, training, joint)


def trained(**options):
    "History and final networks"
    f = fit(**options)
    history = f.run()
    return history, state_sha(f.model), state_sha(f.teacher)


def compare(recorded, record=record_trace, **options):
    "A training as it is, and with recorded steps; the counts of the second"
    make = options.pop('make', dict)
    expected, count = trained(**make(), **options), recorded(record)
    assert trained(**make(), **options, capture=True) == expected
    return count


@pytest.mark.parametrize('record', [record_nothing, record_trace])
@pytest.mark.parametrize('joint', [False, True])
def test_both_stand_ins_agree_with_the_loop(recorded, record, joint):
    count = compare(recorded, record, joint=joint)
    # 500 images in batches of 64: the first whole batch and the first rest run as they are
    assert count == dict(recordings=2 * (1 + joint), replays=(3 * 8 - 2) * (1 + joint))


def test_dropout_draws_new_numbers_in_every_replay(recorded):
    make = lambda: dict(student=nn.Sequential(network('cnn8', 1), nn.Dropout(0.5)))
    assert compare(recorded, make=make)['replays'] == 22


def logit_loss(loss, *keys):
    return lambda ours, theirs, batch: loss(ours[-1], theirs[-1], *(batch[k] for k in keys))


@pytest.mark.parametrize(
    'loss', [logit_loss(dkd_loss, 'y'), logit_loss(dist_loss), logit_loss(spherical_kd_loss)]
)
def test_published_losses_of_logits_are_recorded(recorded, loss):
    assert compare(recorded, auxiliary=AuxiliaryLoss(loss, static=True))['replays'] == 22


def test_published_losses_say_what_they_are():
    maps = [torch.randn(2, 3, 4, 4)] * 3 + [torch.randn(2, 5)] * 2
    made = {name: make_feature_loss(name, maps, maps) for name in ('dkd', 'dist', 'skd', 'vid', 'fitnet')}
    assert {k for k, v in made.items() if AuxiliaryLoss(v).static} == {'dkd', 'dist', 'skd'}


def test_a_robust_loss_is_recorded(recorded):
    assert compare(recorded, label_loss=GeneralizedCrossEntropy(), with_teacher=False)['replays'] == 22


def test_finished_batches_are_recorded_too(recorded):
    batches = list(loader(noisy()[0]).eval_view())
    data = TrainingSet(batches, batches)
    make = lambda: Fit(network('cnn8', 1), None, data, WeightTable(data), Objective(), Training(3, **quiet))
    one, count = make(), recorded(record_trace)
    assert type(one.plan) is BatchPlan and type(fit().plan) is ImagePlan
    two = make()
    assert one.run() == two.run() and state_sha(one.model) == state_sha(two.model)
    assert count['recordings'] == 2 and count['replays'] == 3 * len(batches) - 2


def with_weights(table, changes):
    "before_epoch that puts new weights into a table"

    def before_epoch(epoch):
        for name, values in changes.get(epoch, {}).items():
            getattr(table, name)(values)

    return before_epoch


def test_a_recording_sees_new_weights_and_is_made_anew_for_class_weights(recorded):
    n = len(fit().data)
    w = torch.linspace(0.5, 1.5, n)
    c = torch.linspace(0.1, 1.9, 10)
    changes = {
        1: dict(set=w),
        2: dict(set_class_weights=c),
        3: dict(set_class_weights=c.flip(0), set=w.flip(0)),
        4: dict(set_class_weights=None),
    }

    def run():
        f = fit(epochs=5)
        history = f.run(before_epoch=with_weights(f.weights, changes))
        return history, state_sha(f.model)

    expected, count = run(), recorded(record_trace)
    assert run() == expected
    assert (
        count['recordings'] == 2 * 3
    )  # at first, for class weights, and without them again; not for new values
    assert trained(epochs=5)[0] != expected[0]


def test_a_replaced_parameter_is_recorded_anew(recorded):
    def run():
        f = fit()

        def before_epoch(epoch):
            if epoch == 2:
                f.model.load_state_dict({k: 0.9 * v for k, v in f.model.state_dict().items()}, assign=False)
                f.model[0].weight.data = f.model[0].weight.data.clone()

        return f.run(before_epoch=before_epoch), state_sha(f.model)

    expected, count = run(), recorded(record_trace)
    assert run() == expected and count['recordings'] == 4


def test_the_teacher_phase_of_distill_and_its_student_are_recorded(recorded):
    def run():
        train, val = map(loader, tailed())
        training = Training(epochs=3, capture=capture, **quiet)
        given = Fixed(torch.linspace(0.5, 1.5, len(train.data)))
        return distill(network('cnn8', 1), teacher(tailed), train, val, weighting=given, training=training)

    capture = False
    expected, count = run(), recorded(record_trace)
    assert run().history == expected.history and not count
    capture = True
    found = run()
    assert found.history == expected.history and state_sha(found.student) == state_sha(expected.student)
    assert count['replays'] > 10


# What is put back


def test_recording_changes_nothing(recorded):
    recorded(record_trace)
    f = fit(student=nn.Sequential(network('cnn8', 1), nn.Dropout(0.5)))
    f.train_recipe(next(f.plan.epoch()), 0)
    random, tensors = torch.get_rng_state(), [*f.model.state_dict().values(), *f.sums, f.weights.unknown]
    before = [t.clone() for t in tensors]
    assert f.captured.recording(next(f.plan.epoch())) is not None
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))
    assert torch.equal(random, torch.get_rng_state())


def test_tensors_are_put_back_after_an_error():
    t = torch.zeros(3)
    with pytest.raises(KeyError), unchanged([t]):
        t.add_(1)
        raise KeyError
    assert torch.equal(t, torch.zeros(3))


def test_a_training_can_be_forgotten(recorded):
    import gc, weakref

    recorded(record_trace)
    f = fit()
    f.run()
    seen = weakref.ref(f.captured)
    gc.disable()
    try:
        del f
        assert seen() is None  # no circle: recordings and their memory go with the training
    finally:
        gc.enable()


# What is refused


class Asking(nn.Module):
    "A network that looks at its input"

    def __init__(self):
        super().__init__()
        self.inner = network('cnn8', 1)

    def forward(self, x):
        return self.inner(x) * (1.0 if x.sum().item() > -1e9 else 2.0)


class Masking(Asking):
    def forward(self, x):
        z = self.inner(x)
        return z * (1 + 0 * z[z > 0].sum())


@pytest.mark.parametrize('kind', [Asking, Masking])
def test_a_network_that_asks_trains_as_it_is_with_a_warning(recorded, kind):
    expected, count = trained(student=kind()), recorded(record_trace)
    with pytest.warns(UserWarning, match='cannot be recorded.*asks the device'):
        assert trained(student=kind()) == expected
    assert count['recordings'] == 1 and not count['replays']
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='capture is True.*asks the device'):
        trained(student=kind(), capture=True)


def hooked():
    net = network('cnn8', 1)
    net[0].register_forward_hook(lambda *args: None)
    return net


own = lambda logits, batch: logits[:, 0]


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(weights=lambda step: torch.ones(len(step.losses))), 'weights come from function'),
        (dict(label_loss=own), 'label_loss.*static'),
        (dict(auxiliary=AuxiliaryLoss(logit_loss(dist_loss))), 'auxiliary.*static=True'),
        (dict(student=hooked()), 'hooks'),
    ],
)
def test_what_cannot_be_recorded_is_named(recorded, options, says):
    recorded(record_trace)
    assert fit(**options).captured is None  # None: as it is
    with pytest.raises(ValueError, match=says):
        fit(**options, capture=True)


def test_settings_are_refused_before_any_work(recorded):
    train, val = map(loader, noisy())

    def run(**options):
        training = Training(capture=True, **quiet)
        return distill(network('cnn8', 1), teacher(noisy), train, val, **dict(training=training) | options)

    with pytest.raises(ValueError, match='on cpu, and steps are recorded on cuda'):
        run(mechanism='both')
    recorded(record_trace)
    with pytest.raises(ValueError, match='Reweighting callback'):
        run(weighting=Reweighting(own))
    with pytest.raises(ValueError, match='Online'):
        run(mechanism='student', schedule=Online(1), weighting=Published())
    with pytest.raises(ValueError, match='forward.*static'):
        run(objective=Objective(forward=lambda model, batch: model(batch['x'])))
    run(
        objective=Objective(forward=static(lambda model, batch: model(batch['x']))),
        training=Training(1, **quiet),
    )
    with pytest.raises(TypeError, match="capture is 'yes'"):
        Training(capture='yes')


def test_without_a_recorder_nothing_is_recorded():
    assert fit().captured is None and 'cpu' not in RECORDERS


def test_shapes_that_never_come_again_are_not_recorded():
    step = CapturedStep([lambda r: r['x'] + 1], list, int, record_nothing)
    step.forget_replaced()
    assert all(step.recording(dict(x=torch.ones(n))) is None for n in range(1, 20))
    assert step.recording(dict(x=torch.ones(3))) and step.recording(dict(x=torch.ones(4)))
    assert step.recording(dict(x=torch.ones(5))) is None  # two are enough
    assert step.recording(dict(x='text')) is None


def test_batches_with_something_else_than_tensors_run_as_they_are(recorded):
    batches = [b | dict(note='text') for b in loader(noisy()[0]).eval_view()]
    data = TrainingSet(batches, batches)

    def run(**options):
        training = Training(3, **options, **quiet)
        return Fit(network('cnn8', 1), None, data, WeightTable(data), Objective(), training).run()

    expected, count = run(), recorded(record_trace)
    assert run() == expected and not count
    with pytest.raises(ValueError, match='something else than tensors'):
        run(capture=True)


# On CUDA


def on_cuda(**options):
    "The same training on the device"
    from kd_aif.models.build import build_model

    device = torch.device('cuda')
    train_set, val_set = noisy()
    train, val = (loader(o.to(device)) for o in (train_set, val_set))
    data = TrainingSet(train, val, include_validation=True, device=device)
    networks = [build_model(name, 10, 1, seed=k).to(device) for k, name in enumerate(('cnn8', 'cnn16'))]
    settings = dict(epochs=4, lr=0.05, autocast=options.pop('autocast', None), progress=False)
    joint = options.pop('joint', False)
    table = WeightTable(data, device)
    return Fit(*networks, data, table, Objective(alpha=0.5), Training(**settings, **options), joint)


@cuda
@pytest.mark.parametrize('joint', [False, True])
def test_a_graph_trains_what_the_loop_trains(joint):
    plain, graph = on_cuda(capture=False, joint=joint), on_cuda(capture=True, joint=joint)
    one, two = plain.run(), graph.run()
    assert graph.captured.recordings and graph.captured.failure is None
    for a, b in zip(one, two):
        assert abs(a['loss'] - b['loss']) < 0.05 * a['loss'] and abs(a['accuracy'] - b['accuracy']) < 0.05
    assert plain.model[2].num_batches_tracked == graph.model[2].num_batches_tracked


@cuda
def test_the_first_gradients_of_a_graph_are_those_of_the_loop():
    f = on_cuda(capture=True)
    recipe = next(f.plan.epoch())
    f.train_recipe(recipe, 0)
    recording = f.captured.recording(recipe)
    with unchanged(captured_step._changed_in_place(f)):
        ours = [g.clone() for g in recording.load(recipe)[0]()]
    batch = f.plan.make(recipe)
    loss = f.trainer.weighted_loss(batch, f._student_loss(batch), 0)[2]
    for a, b in zip(ours, torch.autograd.grad(loss, f.trainer.parameters)):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)


@cuda
@pytest.mark.parametrize('capture', [False, True])
def test_the_steps_of_an_epoch_never_wait(capture):
    f = on_cuda(capture=capture, autocast=torch.bfloat16)
    f.train_epoch(0, 'student')
    f.train_epoch(1, 'student')  # the last batch is recorded here
    f.captured and f.captured.forget_replaced()
    recipes = list(f.plan.epoch())
    torch.cuda.set_sync_debug_mode('error')
    try:
        for recipe in recipes:
            f.train_recipe(recipe, 2)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@cuda
def test_a_graph_sees_new_weights():
    f = on_cuda(capture=True)
    f.train_epoch(0, 'student')
    recipe = next(f.plan.epoch())
    (replay,) = f.captured.recording(recipe).load(recipe)
    before = [g.clone() for g in replay()]
    f.weights.set(torch.zeros(len(f.data)))
    assert all(g.abs().sum() == 0 for g in replay()) and any(g.abs().sum() > 0 for g in before)


@cuda
def test_a_fused_optimiser_is_used():
    f = on_cuda()
    assert f.trainer.optimizer.defaults['fused'] and f.captured is not None


@cuda
def test_compiled_forward_passes_are_recorded():
    f = on_cuda(capture=True, compile=torch.compile)
    history = f.run()
    assert f.captured.recordings and history[-1]['loss'] < history[0]['loss']
