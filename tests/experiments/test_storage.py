"""Runs of experiments that are left behind every epoch, and their files."""

import dataclasses
import json
from pathlib import Path

import pytest

from kd_aif.distillation.checkpoint import Stopped
from kd_aif.experiments.methods import run_task
from kd_aif.experiments.ssl_runs import run_ssl_task
from kd_aif.experiments.ssl_tasks import make_ssl_task
from kd_aif.experiments.storage import Storage, TRAINING_VERSION
from kd_aif.experiments.tasks import make_task

pytestmark = pytest.mark.usefixtures('one_thread')

TASK = dict(noise='symmetric', rate=0.3, epochs=3, student='cnn4', teacher='cnn8')
METHODS = (
    'ce kd kd_val sigmoid_student kd_aif_student kd_aif_both kd_aif_twice oracle dkd dkd_aif lskd lskd_aif '
    'small_loss_calibrated_both confident_learning elr'
).split()


def leaving(folder):
    return Storage(
        folder / 'teachers', folder / 'states', stop=lambda seconds: True, version=TRAINING_VERSION
    )


def until_done(run):
    "Start anew until it ends; how often that was, and what it gave"
    for times in range(100):
        try:
            return times, run()
        except Stopped:
            continue
    raise AssertionError('no end in sight')


def outcome(record):
    "All of a record but times"
    return record.identity, record.metrics, record.history, sorted(record.seconds)


@pytest.mark.parametrize('method', METHODS)
def test_a_run_left_behind_every_epoch_has_the_same_record(method, tmp_path):
    if method == 'confident_learning':
        pytest.importorskip('cleanlab')
    task = make_task('digits', **TASK)
    whole, _ = run_task(task, method, storage=Storage(tmp_path / 'whole'), progress=False)
    storage = leaving(tmp_path)
    times, (record, _) = until_done(lambda: run_task(task, method, storage=storage, progress=False))
    assert times >= 3 and outcome(record) == outcome(whole)
    assert list(storage.checkpoints.iterdir()) == [], 'no state of a finished run is left'


def test_a_run_with_few_labels_goes_on_too(tmp_path):
    task = make_ssl_task('digits', steps=40, every=10)
    whole, _ = run_ssl_task(
        task, 'freematch', storage=Storage(checkpoints=tmp_path / 'whole'), progress=False
    )
    storage = leaving(tmp_path)
    times, (record, _) = until_done(lambda: run_ssl_task(task, 'freematch', storage=storage, progress=False))
    assert times == 3 and record.history == whole.history
    assert {k: v for k, v in record.metrics.items() if 'seconds' not in k} == {
        k: v for k, v in whole.metrics.items() if 'seconds' not in k
    }


def test_seconds_of_earlier_calls_are_counted(tmp_path):
    "Each call of the interrupted run trains one epoch; the record has them all"
    task = make_task('digits', **TASK | dict(epochs=6))
    storage = leaving(tmp_path)
    _, (record, _) = until_done(lambda: run_task(task, 'quality_twice', storage=storage, progress=False))
    whole, _ = run_task(task, 'quality_twice', storage=Storage(tmp_path / 'whole'), progress=False)
    for phase in ('teacher', 'student', 'preparation'):
        assert record.seconds[phase] > 0.4 * whole.seconds[phase]


def test_other_code_does_not_go_on(tmp_path):
    "Under a hash of the code, a state of other code is not found; it is removed with the run"
    task, storage = make_task('digits', **TASK), leaving(tmp_path)
    with pytest.raises(Stopped):
        run_task(task, 'ce', storage=storage, progress=False)
    (state,) = storage.checkpoints.iterdir()
    assert TRAINING_VERSION in state.name
    other = dataclasses.replace(storage, stop=None, version='v0')
    run_task(task, 'ce', storage=other, progress=False)
    assert not state.exists()


def test_new_golden_numbers_need_a_new_version():
    kept = json.loads((Path(__file__).parents[1] / 'golden' / 'golden.json').read_text())
    assert kept['training_version'] == TRAINING_VERSION, (
        'write the golden file anew: python tests/test_golden.py'
    )
