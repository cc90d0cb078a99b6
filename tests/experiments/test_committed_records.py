"Every committed run is found again by the settings it was made with, before anything is trained."

import dataclasses, os
from pathlib import Path
from unittest import mock

import pytest
from kd_aif.data.sources import load_images
from kd_aif.experiments import methods, ssl_runs
from kd_aif.experiments.methods import run_identity, run_task
from kd_aif.experiments.ssl_methods import SSLContext
from kd_aif.experiments.ssl_runs import run_ssl_task, ssl_identity
from kd_aif.experiments.ssl_tasks import SSLTask, make_ssl_task, ssl_task_data
from kd_aif.experiments.tasks import Task, make_task
from kd_aif.reporting.methods import method, runnable_methods
from kd_aif.reporting.record_files import load_records
from kd_aif.reporting.records import make_record

RESULTS = Path(__file__).parents[2] / 'reports' / 'results'
EXPERIMENTS = (
    '20_cifar100',
    '24_noise_and_shift',
    '24_full',
    '24_memorising',
    '24_shifted_validation',
    '24_wrong_validation',
)
FEW_LABELS = '21_1000_labels', '21_cifar10_4k', '22_svhn_1k'


def changes(record, task):
    "The settings of a record that are fields of a task; JSON has lists for tuples"
    names = {f.name for f in dataclasses.fields(task)} & record.config.keys()
    settings = {k: record.config[k] for k in names}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def task_of(record):
    "The task of a run, by `make_task` as the command line calls it"
    networks = dict(student=record.student) | (dict(teacher=record.teacher) if record.teacher else {})
    settings = changes(record, Task) | networks
    return make_task(record.dataset['name'], record.tier, seed=record.seed, **settings)


def ssl_task_of(record):
    "The same with few labels; threshold and weight are settings of the algorithm"
    rule = {k: record.config['rule'][k] for k in ('threshold', 'weight') if k in record.config['rule']}
    settings = changes(record, SSLTask) | dict(student=record.student) | rule
    return make_ssl_task(record.dataset['name'], record.tier, seed=record.seed, **settings)


def first_of_each_method(experiments):
    "One record of every method in every experiment"
    found = {}
    for experiment in experiments:
        for r in load_records(RESULTS, experiment):
            found.setdefault((experiment, r.method), r)
    return list(found.values())


@pytest.fixture(scope='module')
def digits():
    "Labelled images, unlabelled images and their labels, in the place of any data set"
    return ssl_task_data(make_ssl_task('digits', n_labelled=200), progress=False)[:3]


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_the_settings_of_a_record_give_its_identity(experiment):
    records = load_records(RESULTS, experiment)
    assert records
    for r in records:
        planned = make_record(**run_identity(task_of(r), r.method, r.dataset, experiment), metrics={})
        assert planned.identity == r.identity and planned.key == r.key, r.method
        assert r.method in runnable_methods()


@pytest.mark.parametrize('experiment', FEW_LABELS)
def test_the_settings_of_a_record_with_few_labels_give_its_identity(experiment, digits):
    records = load_records(RESULTS, experiment)
    assert records
    for r in records:
        task = ssl_task_of(r)
        recipe = method(r.method).run(SSLContext(task, *digits))
        planned = make_record(**ssl_identity(task, r.method, recipe, r.dataset, experiment), metrics={})
        assert planned.identity == r.identity and planned.key == r.key, r.method
        assert r.method in runnable_methods(few_labels=True)


def refuse(*args, **kwargs):
    raise AssertionError('work has begun')


def test_a_run_that_is_recorded_is_found_and_not_made_again():
    "With the record's own description of the data in the place of the data"
    records = first_of_each_method(['24_noise_and_shift'])
    assert len(records) > 20
    for r in records:
        with (
            mock.patch.object(methods, 'task_data', lambda *args: (None,) * 3),
            mock.patch.object(methods, 'describe_data', lambda *args: r.dataset),
            mock.patch.object(methods, 'Context', refuse),
        ):
            assert run_task(task_of(r), r.method, r.experiment, RESULTS) == (r, None)


def test_a_recorded_run_with_few_labels_is_found_and_not_made_again(digits):
    for r in first_of_each_method(['22_svhn_1k']):
        with (
            mock.patch.object(ssl_runs, 'ssl_task_data', lambda *args: (*digits, None)),
            mock.patch.object(ssl_runs, 'describe_ssl_data', lambda *args: r.dataset),
            mock.patch.object(ssl_runs, 'train_ssl', refuse),
        ):
            assert run_ssl_task(ssl_task_of(r), r.method, r.experiment, RESULTS) == (r, None)


def at_hand(name):
    "Whether the images of a data set can be loaded here without a download"
    if not os.environ.get('KD_AIF_DATA'):
        return False
    try:
        load_images(name, 'test', progress=False)
    except OSError:
        return False
    return True


def test_fingerprints_of_data_that_are_at_hand(monkeypatch):
    "The first run of each data set, from its images"
    records = {r.dataset['name']: r for r in load_records(RESULTS, '24_noise_and_shift', 'lite')}
    records = [r for name, r in records.items() if at_hand(name)]
    if not records:
        pytest.skip('no images here')
    monkeypatch.setattr(methods, 'Context', refuse)
    for r in records:
        assert run_task(task_of(r), r.method, r.experiment, RESULTS, progress=False) == (r, None)
