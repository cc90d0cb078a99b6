"The loop beside its bare passes, beside the limit of the machine, and side by side with itself."

import json

import pytest
import torch
from torch import nn

from kd_aif.benchmarks import loop, side_by_side
from kd_aif.benchmarks.cli import kd_aif_bench
from kd_aif.benchmarks.loop import EXPERIMENT, loop_bench, loop_line, loop_table
from kd_aif.benchmarks.machine_limits import machine_limits, MachineLimits, step_needs, StepNeeds
from kd_aif.benchmarks.side_by_side import loop_fit, steps_side_by_side
from kd_aif.experiments.task_data import task_data
from kd_aif.experiments.tasks import make_task
from kd_aif.reporting.record_files import load_records

SMALL = make_task('digits', n_train=300, n_val=60, teacher='cnn8', student='cnn4')


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    "Matrices and copies that take no time"
    small = lambda device, dtype: machine_limits(device, dtype, n=64, size=2**16)
    monkeypatch.setattr(loop, 'machine_limits', small)


def test_two_processes_train_the_same_loop_side_by_side(capsys, tmp_path):
    options = dict(dataset='digits', model='cnn4', teacher='cnn8', n_train=300, n_val=60, repeats=1)
    for processes in (1, 2):
        kd_aif_bench('loop', processes=processes, device='cpu', out=str(tmp_path), **options)
    shown = capsys.readouterr().out
    assert '2 loops side by side' in shown and 'of the limit' in shown.splitlines()[-5]
    one, two = sorted(load_records(tmp_path, EXPERIMENT), key=lambda r: r.config.get('processes', 1))
    assert 'processes' not in one.config and two.config['processes'] == 2
    assert one.metrics['total_steps_per_second'] == one.metrics['loop_steps_per_second']
    m = two.metrics
    assert m['run_epochs_per_second'] == pytest.approx(m['total_steps_per_second'] * 64 / 50_000)
    needs = StepNeeds(m['step_flops'], m['step_bytes'])
    limits = MachineLimits(m['machine_flops_per_second'], m['machine_bytes_per_second'])
    assert m['limit_share'] == pytest.approx(m['total_steps_per_second'] * needs.floor(limits))


def test_a_record_is_found_by_its_configuration(tmp_path, monkeypatch):
    first = loop_bench(SMALL, 1, out=tmp_path)
    monkeypatch.setattr(loop, 'loop_rates', None)  # nothing is timed again
    assert loop_bench(SMALL, 1, out=tmp_path) == first
    assert loop_bench(SMALL, 1, out=tmp_path, device='cpu') == first
    with pytest.raises(TypeError):
        loop_bench(SMALL, 2, out=tmp_path)


def test_committed_records_are_shown(root):
    records = load_records(root / 'reports' / 'results', EXPERIMENT)
    assert records and all('processes' not in r.config for r in records)
    for record in records:
        assert 'bare passes' in loop_line(record) and '| loop |' in loop_table(record)


def test_an_error_in_a_process_is_told(monkeypatch):
    broken = make_task('digits', n_train=300, n_val=60, student='cnn4', lr=1e30)
    with pytest.raises(ValueError, match='not finite'):
        steps_side_by_side(broken, 'cpu', 2, 1)


def test_the_timed_loop_starts_after_its_warm_up():
    fit = loop_fit(SMALL, *task_data(SMALL, progress=False)[:2], 1)
    assert fit.trainer.schedule.last_epoch == side_by_side.WARM_UP * fit.data.n_batches
    assert fit.training.epochs == side_by_side.WARM_UP + 1


def test_limits_and_needs():
    limits = machine_limits('cpu', torch.bfloat16, n=32, size=2**12)
    assert limits.flops > 0 and limits.bandwidth > 0
    batch = dict(x=torch.randn(8, 5), y=torch.arange(8) % 3)
    teacher, student = nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    forward = lambda model, batch: model(batch['x'])
    needs = step_needs(teacher, student, batch, forward)
    assert needs.flops == 2 * 8 * (5 * 3 + 2 * 5 * 7 + 3 * 7 * 3)  # no gradient of the images
    weights = 4 * (2 * (5 * 7 + 7 + 7 * 3 + 3) + 5 * 3 + 3)
    assert needs.traffic >= weights + 2 * 4 * 8 * (5 + 7)
    assert needs.traffic <= weights + 2 * 4 * 8 * (5 + 7 + 7 * 3) + 2 * 8 * 8
    assert needs.floor(MachineLimits(needs.flops, needs.traffic / 3)) == pytest.approx(3)


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(processes=0), 'processes is 0'),
        (dict(device='tpu'), "device is 'tpu'; use cpu or cuda"),
        (dict(rounds=0), 'rounds is 0'),
    ],
)
def test_settings_that_make_no_sense(options, says):
    with pytest.raises(ValueError, match=says):
        loop_bench(SMALL, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match='PyTorch finds no such device'):
        loop_bench(SMALL, device='cuda')
