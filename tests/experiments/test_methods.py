"Every method on one small task: it runs, records what it should, knows its own record, and rivals use what they claim to use."

import importlib.util
import pytest, torch
from kd_aif.data.label_noise import symmetric_noise
from kd_aif.reporting.methods import METHODS, Method, method, runnable_methods
from kd_aif.reporting.record_files import load_records
from kd_aif.experiments.cli import TrainingRuns, _run_all
from kd_aif.experiments.context import Context
from kd_aif.experiments.storage import Storage
from kd_aif.experiments.given_weights import sample_weights
from kd_aif.experiments.methods import run_task
from kd_aif.experiments.oracles import half_known_weights
from kd_aif.experiments.rival_weights import counted_class_weights
from kd_aif.experiments.task_data import describe_data, instance_noise_probabilities, task_data
from kd_aif.experiments.tasks import make_task
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.rivals.fixed_weights import inverse_frequency
from kd_aif.rivals.logit_losses import standardised_kd_loss

SHORT = dict(noise='symmetric', rate=0.3, epochs=5)
cleanlab = pytest.mark.skipif(importlib.util.find_spec('cleanlab') is None, reason='cleanlab is an extra')


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    return tmp_path_factory.mktemp('teachers')


def run(method, teachers, out=None, **changes):
    return run_task(
        make_task('digits', **SHORT | changes), method, 'test', out, storage=Storage(teachers), progress=False
    )


FORMS = (  # of published losses
    *('sp_train', 'crd_aif', 'dkd_aif', 'dist_aif', 'lskd_train', 'lskd_aif', 'bdkd_aif', 'pesf_aif'),
)
OF_TEXTS = 'pkd_skip', 'pkd_last'  # look into the layers of transformers
CORNERS = dict(noise='none', rate=0.0, shift='corner', shift_rate=0.9)
SHOWN = [
    m.name
    for m in runnable_methods().values()
    if ('extra_weight' not in m.settings or not m.base or m.name in FORMS) and m.name not in OF_TEXTS
]


@pytest.mark.parametrize(
    'method', [pytest.param(m, marks=cleanlab) if m == 'confident_learning' else m for m in SHOWN]
)
def test_every_method_runs_and_is_recorded(method, teachers, tmp_path):
    changes = CORNERS if METHODS[method].part == 'groups' else {}  # only corners have known groups
    record, found = run(method, teachers, tmp_path, **changes)
    chance = (
        0.15 if method in ('at', 'nst') else 0.5
    )  # whose weights let the labels speak only after longer training
    assert (
        record.metrics['test_accuracy'] > chance
        and found.metrics['test_accuracy'] == record.metrics['test_accuracy']
    )
    assert (
        record.seconds['student'] > 0
        and METHODS[method].label
        and (method in ('ce', 'one', 'okddip')) == (record.teacher == '')
    )
    assert run(method, teachers, tmp_path, **changes) == (record, None) and load_records(tmp_path) == [
        record
    ], 'it knows its own record'
    if method in ('kd_aif_student', 'kd_aif_both'):
        m = record.metrics
        assert (
            sum(map(sum, m['probability_histogram'].values())) == 997
            and abs(m['true_clean_fraction'] - 0.73) < 0.02
            and len(m['clean_fractions']) == 10
        )


def test_a_teacher_from_the_file_teaches_what_it_did_when_it_was_new(cpu, tmp_path):
    "Looking at its shapes does not touch its running statistics"
    first, again = (run('sp', tmp_path, epochs=2)[0] for _ in range(2))
    assert (
        first.metrics['test_accuracy'] == again.metrics['test_accuracy']
        and first.metrics['teacher_test_accuracy'] == again.metrics['teacher_test_accuracy']
    )


def test_the_assistant_has_an_accuracy_of_its_own(teachers):
    record, found = run('takd', teachers)
    plain, _ = run('kd_val', teachers)
    m = record.metrics
    assert m['teacher_test_accuracy'] == plain.metrics['teacher_test_accuracy'] and m[
        'assistant_test_accuracy'
    ] not in (m['teacher_test_accuracy'], m['test_accuracy'])
    assert {'teacher', 'assistant', 'student'} <= set(record.seconds) and found.teacher[
        -1
    ].in_features == 48, 'cnn12'


def test_a_pair_without_an_assistant_is_named_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match='ASSISTANTS'):
        run('takd', tmp_path, teacher='mlp16')
    assert not list(tmp_path.iterdir())


def test_the_oracle_gives_wrong_labels_nothing_and_random_weights_the_same_histogram(teachers):
    _, oracle = run('oracle_student', teachers)
    c = Context(
        make_task('digits', **SHORT),
        *task_data(make_task('digits', **SHORT), progress=False),
        Storage(teachers),
        False,
    )
    wrong, every = c.train.is_noisy.cpu(), torch.cat([oracle.weights, oracle.val_weights])
    assert (oracle.weights[wrong] == 0).all() and torch.isclose(every.mean(), torch.tensor(1.0))
    for k in range(10):
        assert torch.allclose(
            oracle.val_weights[c.val.y.cpu() == k], oracle.weights[(c.y == k) & ~wrong].max()
        ), 'good is good, wherever it comes from'
    _, random = run('random_student', teachers)
    every = torch.cat([random.weights, random.val_weights])
    assert torch.equal(every.sort().values, c.once(sample_weights).sort().values) and not torch.equal(
        every, c.once(sample_weights)
    )
    found = {known: half_known_weights(c, known) for known in (True, False)}
    assert (found[True][: len(wrong)][wrong] == 0).all() and (found[False][: len(wrong)][wrong] > 0).any()
    for k in range(10):
        rows, right = c.all_y == k, (c.all_y == k) & ~c.all_noisy
        assert (
            found[False][right].std() < 1e-6
            and torch.allclose(
                found[True][right] / c.once(sample_weights)[right],
                (found[True][right] / c.once(sample_weights)[right])[:1],
            )
            and all(torch.isclose(w[rows].mean(), torch.tensor(1.0)) for w in found.values())
        )
    _, alone = run('val_alone_student', teachers)
    assert (
        torch.equal(alone.val_weights, c.once(sample_weights)[len(c.y) :])
        and all(alone.weights[c.y == k].std() < 1e-6 for k in range(10))
        and alone.val_weights.min() > alone.weights.max()
    )


def test_class_weights_of_rivals_have_mean_one_over_everything_that_trains(teachers):
    task = make_task('digits', imbalance=10.0, epochs=5)
    c = Context(task, *task_data(task, progress=False), Storage(teachers), False)
    v = counted_class_weights(c, inverse_frequency)
    assert torch.isclose((v * c.counts).sum() / c.counts.sum(), torch.tensor(1.0)) and torch.allclose(
        v * c.counts, (v * c.counts)[0]
    )


def test_instance_noise_follows_a_small_network():
    "The same every time; wrong labels are its second choices"
    task = make_task('digits', noise='instance', rate=0.3)
    train, again, clean = (
        task_data(t, progress=False)[0].to('cpu') for t in (task, task, make_task('digits'))
    )
    p = instance_noise_probabilities(task, clean)
    assert torch.equal(train.y, again.y) and train.is_noisy.sum() == round(0.3 * len(train))
    p[torch.arange(len(p)), clean.y] = -1
    assert torch.equal(train.y[train.is_noisy], p.argmax(1)[train.is_noisy])


def test_disturbed_validation_sets_touch_nothing_else():
    plain, wrong, shifted = (
        task_data(make_task('digits', **kw), progress=False)
        for kw in (dict(), dict(val_rate=0.2), dict(val_shift=1.0))
    )
    assert (
        plain[0].fingerprint == wrong[0].fingerprint == shifted[0].fingerprint and not wrong[0].is_noisy.any()
    )
    assert (
        wrong[1].is_noisy.any()
        and not torch.equal(plain[1].x, shifted[1].x)
        and torch.equal(plain[1].y, shifted[1].y)
    )
    described = describe_data(make_task('digits', val_shift=1.0), *shifted)
    assert described['val_shift'] == 1.0 and 'val_rate' not in described


def test_standardised_distillation_has_its_published_weights(teachers, monkeypatch):
    "0.1 CE + 9 τ² KL at τ = 2, unless the task says otherwise for the second"
    seen = []
    monkeypatch.setattr(Context, 'distil', lambda self, *args, **options: seen.append(options) or 1 / 0)
    ours, theirs = (torch.randn(4, 10, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    maps, batch = [*[torch.zeros(4, 1, 2, 2)] * 2, torch.zeros(4, 3)], dict(y=torch.arange(4))
    for changes, weight in (dict(), 9.0), (dict(extra_weight=3.0), 3.0):
        for name in ('lskd', 'lskd_train', 'lskd_aif'):
            with pytest.raises(ZeroDivisionError):
                run(name, teachers, epochs=1, **changes)
            auxiliary = seen[-1]['objective'].auxiliary
            auxiliary.loss.positions = [3]
            found = seen[-1]['objective'].batch_loss([*maps, theirs])([*maps, ours], batch)
            wanted = 0.1 * batch_cross_entropy(ours, batch) + weight * standardised_kd_loss(ours, theirs, 2.0)
            assert torch.allclose(found, wanted, atol=1e-6)
        assert seen[-1].get('mechanism') == 'student' and seen[-2].get('mechanism') is None


def test_precision_is_part_of_the_identity(teachers, tmp_path):
    a, _ = run('kd_val', teachers, tmp_path)
    b, other = run('kd_val', teachers, tmp_path, precision='bfloat16')
    assert other is not None and a.key != b.key


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(precision='int4'), 'precision'),
        (dict(val_rate=2.0), 'val_rate'),
        (dict(val_shift=-1.0), 'val_shift'),
        (dict(noise='adversarial', rate=0.1), 'noise'),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_task('digits', **kwargs)


@pytest.mark.parametrize('method', OF_TEXTS)
def test_methods_of_texts_refuse_images_before_training(method, tmp_path):
    with pytest.raises(ValueError, match='digits has images; use a data set of texts'):
        run_task(make_task('digits'), method, out=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'dataset, name, words',
    [
        ('glue/sst2', 'fitnet', 'has texts'),
        ('glue/stsb', 'train_twice', 'real numbers'),
        ('glue/stsb', 'confident_learning', 'real numbers'),
        ('digits', 'pkd_last', 'has images'),
        ('digits', 'group_dro_known', "shift='corner'"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_before_data_are_read(dataset, name, words, monkeypatch):
    monkeypatch.setattr('kd_aif.experiments.methods.task_data', None)
    with pytest.raises(ValueError, match=words):
        run_task(make_task(dataset), name, progress=False)


def test_a_list_of_methods_is_refused_as_a_whole(tmp_path):
    with pytest.raises(ValueError, match="'group_dro_known' needs corners"):
        _run_all(TrainingRuns(dataset='digits', method='kd,group_dro_known', out=str(tmp_path)), {}, False)
    assert not any(tmp_path.iterdir())


def test_needs_are_checked():
    with pytest.raises(ValueError, match='needs'):
        Method('mine', 'Mine', 'kd_aif', needs=('colours',))
    with pytest.raises(ValueError, match='needs'):
        Method('mine', 'Mine', 'kd_aif', needs='images')
