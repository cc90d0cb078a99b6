"""Sweeps: real workers of submitit, one of which dies; options that no worker could use; records of all runs."""

import os
import signal
import sys

import pytest

from kd_aif.experiments import sweeps
from kd_aif.experiments.sweeps import kd_aif_sweep, make_executor, run_tasks, Sweep
from kd_aif.reporting.record_files import load_records

submitit = pytest.importorskip('submitit')
cloudpickle = pytest.importorskip('cloudpickle')


def fragile(task):
    "Kills its own process the first time"
    folder, number = task
    seen = folder / str(number)
    if number == 1 and not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2, None


def test_a_task_whose_worker_dies_is_run_again(tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    executor = make_executor(Sweep(logs=str(tmp_path / 'logs')))
    ended = run_tasks(executor, fragile, [(tmp_path, 0), (tmp_path, 1)], attempts=2, poll=0.1)
    assert sorted((outcome.result, outcome.attempts) for outcome in ended) == [(0, 1), (1, 2)]


class Dying:
    "An executor whose workers die, and whose jobs are counted"

    most = running = submitted = 0

    def submit(self, function, task):
        self.running, self.submitted = self.running + 1, self.submitted + 1
        self.most = max(self.most, self.running)
        return self

    done = lambda self: True
    __hash__ = object.__hash__

    def result(self):
        self.running -= 1
        raise MemoryError('killed')


@pytest.mark.parametrize('workers, attempts', [(1, 1), (1, 3), (1, 2)])
def test_attempts_have_a_limit(workers, attempts):
    executor = Dying()
    ended = run_tasks(executor, fragile, [1, 2, 3], workers, attempts, poll=0)
    assert executor.submitted == 3 * attempts and executor.most == workers
    assert [outcome.error for outcome in ended] == ['MemoryError: killed'] * 3


@pytest.mark.parametrize(
    'options, words',
    [
        (['--workers', '0'], 'workers is 0'),
        (['--attempts', '0'], 'attempts is 0'),
        (['--cluster', 'moon'], "cluster is 'moon'"),
        (['--method', 'unknown'], 'method is unknown'),
        (['--seeds', '0'], 'seeds is 0'),
        (['--slurm', 'gpu'], 'has no value'),
        (['--epochs', '0'], 'epochs'),
    ],
)
def test_bad_options_are_found_before_a_worker_starts(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, 'run_tasks', lambda *args: pytest.fail('a worker was started'))
    with pytest.raises(SystemExit) as error:
        kd_aif_sweep(['--out', str(tmp_path), *options])
    assert error.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    "Jobs run where they are submitted"
    monkeypatch.setattr(
        sweeps, 'make_executor', lambda sweep: submitit.AutoExecutor(tmp_path / 'logs', 'debug')
    )


def test_every_run_gets_its_record(in_this_process, tmp_path, capsys):
    out = str(tmp_path / 'results')
    kd_aif_sweep(method='ce,kd', seeds=1, epochs=1, out=out, threads=1)
    assert sorted(r.method for r in load_records(out)) == ['ce', 'kd']
    shown = capsys.readouterr().out
    assert 'ce ' in shown and 'seed 0' in shown


def test_a_missing_record_is_an_error(in_this_process, tmp_path, capsys, monkeypatch):
    options = dict(method='ce', seeds=1, out=str(tmp_path / 'results'))
    for dataset, executor, words in (
        ('cifar10', None, 'is not there'),
        ('digits', Dying(), '(attempt 3); MemoryError'),
    ):
        if executor:
            monkeypatch.setattr(sweeps, 'make_executor', lambda sweep: executor)
        with pytest.raises(SystemExit) as error:
            kd_aif_sweep(**options, dataset=dataset, data=str(tmp_path))
        shown = capsys.readouterr().out
        assert error.value.code == 1 and '1 of 1 runs have no record' in shown and words in shown


def test_without_slurm_there_is_a_plain_message(tmp_path):
    if submitit.SlurmExecutor.affinity() >= 0:
        pytest.skip('this machine has SLURM')
    with pytest.raises(ValueError, match='cluster is slurm: '):
        make_executor(Sweep(cluster='slurm', logs=str(tmp_path)))
