"Every semi-supervised method on one small task: it runs, records what it should, knows its own record, goes on where it stopped."

import dataclasses
from unittest import mock

import pytest, torch
from kd_aif.experiments import ssl_runs, ssl_tasks
from kd_aif.data.sources import load_images
from kd_aif.reporting.methods import METHODS, Method, runnable_methods
from kd_aif.reporting.record_files import load_records
from kd_aif.few_labels.algorithms import FixMatch
from kd_aif.few_labels.meta_pseudo_labels import ALGORITHMS
from kd_aif.few_labels.pseudo_labels import PseudoLabelMeter, label_quality
from kd_aif.experiments.ssl_figures import (
    accuracy_cost_figure,
    confidence_figure,
    line_style,
    pseudo_label_curves,
    ssl_figures,
    ssl_title,
)
from kd_aif.experiments.ssl_methods import Recipe
from kd_aif.experiments.ssl_runs import confidence_diagnostics, run_ssl_task
from kd_aif.experiments.ssl_tasks import SSL_TASKS, make_ssl_task, ssl_task_data

SHORT = dict(n_unlabelled=200, steps=6, batch_size=10, mu=2, every=2)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "A cache of its own, no data folder"
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('KD_AIF_DATA', raising=False)


def run(method, out=None, experiment='test', **changes):
    return run_ssl_task(make_ssl_task('digits', **SHORT | changes), method, experiment, out, progress=False)


def timeless(record):
    return {k: v for k, v in record.metrics.items() if k != 'seconds_per_step'}


def kept(folder):
    return (
        sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file())
        if folder.exists()
        else []
    )


# Every method


@pytest.mark.parametrize('method', runnable_methods(few_labels=True))
def test_every_method_runs_and_is_recorded(method, tmp_path):
    record, found = run(method, tmp_path / 'out')
    m = record.metrics
    assert (
        method in METHODS
        and record.experiment == 'test'
        and record.tier == 'smoke'
        and record.dataset['rows'] == dict(labelled=40, unlabelled=200, test=500)
    )
    assert (
        m['test_accuracy'] == found.metrics['test_accuracy']
        and len(m['per_class_accuracy']) == 10
        and 0 <= m['student_test_accuracy'] <= 1
    )
    assert ('teacher_test_accuracy' in m) == (method in ('mpl', 'kd_aif_ssl')) == (
        record.teacher == 'cnn8'
    ) and ('uncalibrated_auc' in m) == (method == 'kd_aif_ssl')
    assert (
        m['measured']
        == 160
        == sum(m['confidence_histogram']['right']) + sum(m['confidence_histogram']['wrong'])
        and len(m['confidence_histogram']['edges']) == 21
    )
    assert abs(sum(m['confidence_histogram']['right']) / 160 - m['pseudo_accuracy']) < 1e-9
    assert [h['step'] for h in record.history] == [2, 4, 6] and all(
        {'precision', 'coverage', 'pseudo_accuracy', 'confidence'} <= set(h) for h in record.history
    )
    assert record.seconds['training'] > 0 and m['seconds_per_step'] == pytest.approx(
        record.seconds['training'] / 6
    )
    assert not any('val' in k for k in (*m, *record.history[-1])), 'there is no validation set'
    assert run(method, tmp_path / 'out') == (record, None) and load_records(tmp_path / 'out') == [record], (
        'it knows its own record'
    )
    assert kept(tmp_path / 'cache') == [], 'no checkpoint is left'


def test_ours_stands_out_among_curves():
    families = {name: m.family for name, m in METHODS.items() if m.few_labels}
    rivals = [str(line_style(m)) for m, family in families.items() if family == 'few_labels']
    bold = [str(line_style(m)) for m, family in families.items() if family != 'few_labels']
    assert len(set(rivals)) == 2 and sorted(map(rivals.count, set(rivals))) == [1, len(rivals) - 1]
    assert len(set(bold)) == len(bold) == 3 and not set(bold) & set(rivals)


def test_all_algorithms_are_methods():
    assert set(ALGORITHMS) <= set(runnable_methods(few_labels=True))


def test_the_last_measurement_is_that_of_the_network_that_writes_the_labels():
    for method in ('fixmatch', 'mean_teacher', 'mpl', 'kd_aif_ssl'):
        record, _ = run(method)
        last = record.history[-1]
        for name, key in dict(
            pseudo_accuracy='pseudo_accuracy',
            precision='pseudo_precision',
            coverage='pseudo_coverage',
            confidence='mean_confidence',
        ).items():
            assert last[name] == record.metrics[key]


def test_meta_pseudo_labels_ends_with_fine_tuning(tmp_path):
    record, found = run('mpl', tmp_path)
    assert (record.config['finetune'], record.config['finetune_lr']) == (2, 0.01) == (
        found.config['finetune'],
        found.config['finetune_lr'],
    ) and run('mpl', finetune=3)[0].config['finetune'] == 3
    assert 'finetune_lr' not in run('fixmatch')[0].config


def test_the_weight_and_the_confidence_before_it_are_of_the_same_labels():
    record, found = run('kd_aif_ssl', steps=30, every=10)
    m = record.metrics
    assert (
        sum(m['uncalibrated_histogram']['right']) == sum(m['confidence_histogram']['right'])
        and m['uncalibrated_confidence'] != m['mean_confidence']
    )
    curves = [line.get_label() for line in confidence_figure([record]).axes[0].lines if 'AUC' in line.get_label()]
    assert ['weight' in c for c in curves] == [True, False] and 'before' in curves[1]


def test_fine_tuning_is_of_the_average_alone():
    (plain, _), (tuned, found) = run('supervised'), run('supervised', finetune=20)
    assert (
        plain.metrics['student_test_accuracy'] == tuned.metrics['student_test_accuracy']
        and plain.metrics['test_loss'] != tuned.metrics['test_loss']
        and 'fine-tuning' in tuned.seconds
    )


# Which run it is


@pytest.mark.parametrize(
    'method, change, same',
    [
        ('supervised', dict(mu=3), True),
        ('supervised', dict(threshold=0.5), True),
        ('supervised', dict(weight=2.0), True),
        ('supervised', dict(lr=0.2), False),
        ('supervised', dict(n_unlabelled=300), False),
        ('supervised_all', dict(weight=2.0), True),
        ('mean_teacher', dict(threshold=0.5), True),
        ('mean_teacher', dict(weight=2.0), False),
        ('fixmatch', dict(threshold=0.5), False),
        ('fixmatch', dict(threshold=0.95), True),
        ('fixmatch', dict(weight=1.0), True),
        ('fixmatch', dict(mu=3), False),
        ('fixmatch', dict(precision='bfloat16'), False),
        ('fixmatch', dict(steps=8), False),
        ('fixmatch', dict(student='mlp8'), False),
        ('fixmatch', dict(seed=1), False),
        ('fixmatch', dict(n_labelled=20), False),
    ],
)
def test_what_a_method_does_not_use_makes_no_new_run(method, change, same, tmp_path):
    record, _ = run(method, tmp_path)
    other, found = run(method, tmp_path, **change)
    assert (other.key == record.key) == (found is None) == same


def test_a_threshold_is_recorded_and_measured_with():
    record, _ = run('fixmatch', threshold=0.3)
    assert record.config['rule'] == dict(threshold=0.3, weight=1.0) and record.metrics['threshold'] == 0.3
    assert (
        run('uda')[0].metrics['threshold'] == 0.8
        and run('mpl', threshold=0.3)[0].metrics['threshold']
        == run('mean_teacher')[0].metrics['threshold']
        == 0.95
    ), 'all its labels count'


def test_force_runs_again_with_the_same_result(cpu, tmp_path):
    first, _ = run('fixmatch', tmp_path)
    again, found = run_ssl_task(
        make_ssl_task('digits', **SHORT), 'fixmatch', 'test', tmp_path, force=True, progress=False
    )
    assert (
        found is not None
        and timeless(again) == timeless(first)
        and again.history == first.history
        and len(load_records(tmp_path)) == 1
    )


def test_weights_of_a_method_are_recorded(tmp_path):
    @dataclasses.dataclass
    class Half:
        share: float = 0.5

        def __call__(self, step, output):
            return torch.full_like(output.unsupervised, self.share)

    def add(share):
        def recipe(c):
            return Recipe(c.adapted(FixMatch()), Half(share))

        halved = Method('halved', 'halved', 'few_labels', run=recipe, needs_teacher=False, few_labels=True)
        return mock.patch.dict(METHODS, halved=halved)

    with add(0.5):
        record, found = run('halved', tmp_path)
    assert record.config['weights'] == dict(kind='Half', share=0.5) and found is not None
    with add(0.25):
        assert run('halved', tmp_path)[0].key != record.key


# Data


def test_labelled_images_do_not_depend_on_the_pool():
    sets = {
        n: ssl_task_data(make_ssl_task('digits', n_unlabelled=n), progress=False) for n in (None, 300, 41)
    }
    for labelled, unlabelled, truth, test in sets.values():
        assert (
            torch.equal(labelled.index, sets[None][0].index)
            and labelled.fingerprint == sets[None][0].fingerprint
            and len(test) == 500
        )
        assert torch.isin(labelled.index, unlabelled.index).all() and len(unlabelled.index.unique()) == len(
            unlabelled
        ) == len(truth.y)
    assert len(sets[None][1]) == 1297 and len({s[1].fingerprint for s in sets.values()}) == 3
    y = sets[300][2].y
    assert torch.bincount(y, minlength=10).min() >= 25, 'the shares of the classes are kept'
    assert not torch.equal(
        ssl_task_data(make_ssl_task('digits', seed=1), progress=False)[0].index, sets[None][0].index
    )


def test_partial_svhn_is_called_so(tmp_path, monkeypatch):
    "With digits in the place of SVHN's images"

    def partial(name, split, *args):
        return dataclasses.replace(load_images('digits', split), name='svhn', note='SVHN, partial')

    monkeypatch.setattr(ssl_tasks, 'load_images', partial)
    task = dataclasses.replace(
        make_ssl_task('svhn', 'lite', n_labelled=40, steps=4, every=2, batch_size=10, mu=1), student='cnn8'
    )
    record, _ = run_ssl_task(task, 'fixmatch', out=tmp_path, progress=False)
    assert (
        record.experiment == 'svhn_ssl'
        and record.tier == 'lite'
        and record.dataset['note'] == 'SVHN, partial'
    )
    assert all(
        f is None or f._suptitle.get_text().startswith('SVHN, partial · 40 labels')
        for f in ssl_figures([record]).values()
    )


# Checkpoints


class Stop(Exception):
    pass


@pytest.mark.parametrize('method', ['fixmatch', 'temporal_ensembling', 'mpl'])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(cpu, method, tmp_path):
    whole, _ = run(method)
    measure, calls = PseudoLabelMeter.__call__, []

    def stop(meter, *args):
        calls.append(meter)
        if len(calls) == 3:
            raise Stop
        return measure(meter, *args)

    with mock.patch.object(PseudoLabelMeter, '__call__', stop), pytest.raises(Stop):
        run(method, tmp_path / 'out')
    assert len(kept(tmp_path / 'cache')) == 1 and kept(tmp_path / 'out') == [] and calls
    with mock.patch.object(PseudoLabelMeter, '__call__', lambda *args: calls.append(args) or measure(*args)):
        resumed, _ = run(method, tmp_path / 'out')
    assert len(calls) == 4, 'only the last part was run again'
    assert (
        timeless(resumed) == timeless(whole)
        and resumed.history == whole.history
        and resumed.key == whole.key
        and kept(tmp_path / 'cache') == []
    )


def test_what_older_code_has_begun_is_not_continued_but_removed(cpu, tmp_path):
    whole, _ = run('fixmatch')
    old = tmp_path / 'cache' / 'ssl' / f'fixmatch-s0-{whole.key}-0123456789abcdef.safetensors'
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_bytes(b'of another version')
    record, _ = run('fixmatch')
    assert timeless(record) == timeless(whole) and kept(tmp_path / 'cache') == []


# What is measured


def test_quality_of_labels_by_hand():
    p, right = torch.tensor([0.9, 0.9, 0.5, 0.2]), torch.tensor([True, False, True, False])
    assert label_quality(p, right, 0.9) == pytest.approx(
        dict(precision=0.5, coverage=0.5, pseudo_accuracy=0.5, confidence=0.625)
    )
    found = confidence_diagnostics(p, right, 2)
    assert found['confidence_histogram'] == dict(edges=[0, 0.5, 1], right=[0, 2], wrong=[1, 1]) and found[
        'confidence_auc'
    ] == pytest.approx(0.625)  # of four pairs two are in order, one is a tie
    assert (
        confidence_diagnostics(p, torch.ones(4, dtype=torch.bool))['confidence_auc'] is None
        and sum(
            confidence_diagnostics(torch.ones(3), torch.zeros(3, dtype=torch.bool))['confidence_histogram'][
                'wrong'
            ]
        )
        == 3
    )


def test_figures_of_records_that_lack_something():
    (a, _), (b, _) = run('fixmatch'), run('supervised')
    bare = dataclasses.replace(a, metrics=dict(test_accuracy=0.5), history=[])
    assert (
        pseudo_label_curves([bare]) is None
        and confidence_figure([bare]) is None
        and accuracy_cost_figure([bare]) is not None
        and accuracy_cost_figure([]) is None
    )
    lines = pseudo_label_curves([a, b, bare]).axes[0].lines
    assert [line.get_label() for line in lines] == ['supervised', 'FixMatch'] and ssl_title(
        [a, b]
    ) == 'digits · 40 labels, 200 images · tier smoke'


# Mistakes

MISTAKES = dict(
    dataset=dict(dataset='cifar100'),
    tier=dict(tier='full'),
    n_labelled=dict(n_labelled=0),
    n_unlabelled=dict(n_unlabelled=-1),
    steps=dict(steps=0),
    batch_size=dict(batch_size=2.5),
    mu=dict(mu=0),
    lr=dict(lr=0.0),
    ema=dict(ema=2.0),
    finetune=dict(finetune=-1),
    every=dict(every=0),
    precision=dict(precision='int4'),
    threshold=dict(threshold=1.5),
    weight=dict(weight=-1.0),
)


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_named(name):
    with pytest.raises(ValueError, match=f'^{name} is'):
        make_ssl_task(**dict(dataset='digits') | MISTAKES[name])


@pytest.mark.parametrize(
    'changes, method, message',
    [
        (dict(), 'mixmatch', "method is 'mixmatch'; use one of supervised"),
        (dict(n_labelled=45), 'fixmatch', 'n_labelled is 45'),
        (dict(n_labelled=2000), 'fixmatch', 'take fewer'),
        (dict(n_unlabelled=40), 'fixmatch', 'n_unlabelled is 40'),
        (dict(n_unlabelled=5000), 'fixmatch', 'n_unlabelled is 5000'),
        (dict(student='vgg'), 'fixmatch', "'vgg' is not a model"),
    ],
)
def test_mistakes_that_the_data_show(changes, method, message, tmp_path):
    with (
        mock.patch.object(ssl_runs, 'train_ssl', side_effect=AssertionError('work has begun')),
        pytest.raises(ValueError, match=message),
    ):
        run(method, tmp_path / 'out', **changes)
    assert kept(tmp_path) == []


def test_a_name_that_is_no_file_is_found_before_training():
    with (
        mock.patch.object(ssl_runs, 'train_ssl', side_effect=AssertionError('work has begun')),
        pytest.raises(ValueError, match='experiment'),
    ):
        run('fixmatch', experiment='a/b')


def test_the_tiers():
    assert {t for _, t in SSL_TASKS} == {'smoke', 'lite', 'full'} and all(
        task == SSL_TASKS[task.dataset, task.tier] for task in SSL_TASKS.values()
    )
    assert all(
        (t.student, t.batch_size, t.mu) == ('wrn_28_2', 64, 7) and t.steps >= 2**17
        for (_, tier), t in SSL_TASKS.items()
        if tier == 'full'
    )
