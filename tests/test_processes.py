"""Two processes do what one does; what they cannot share is refused; a killed process costs nothing but time."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name('processes_program.py')


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    return kept | dict(OMP_NUM_THREADS='1') | more


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "(checkpoint, exit statuses, what the other process says) of a run whose second process is killed"
    checkpoint = tmp_path_factory.mktemp('killed') / 'run.safetensors'
    where = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE='2')
    both = [
        subprocess.Popen(
            [sys.executable, PROGRAM, 'unused', checkpoint, '1'],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **where),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    return checkpoint, [process.returncode for process in both], said[0]


@pytest.fixture(scope='module')
def found(killed, tmp_path_factory):
    "What each of two processes found"
    path = tmp_path_factory.mktemp('found') / 'found.json'
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run(
        [*launch, PROGRAM, path, killed[0]], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def test_a_killed_process_is_named_and_leaves_a_checkpoint(killed):
    checkpoint, (first, second), said = killed
    assert second == -9 and first == 1
    assert 'ProcessLost: process 0 of 2: another process of this run has ended' in said
    assert 'start it again' in said
    assert checkpoint.exists() and [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_the_run_goes_on_behind_its_last_epoch(found):
    for process in found:
        assert process['resumed'] == dict(same=[True, True], weights=True, epochs=2)


def test_both_processes_find_the_same(found):
    first, second = found
    assert first == second


CASES = (
    'plain labels batch_norm student both both_batch_norm refreshed published_all_layers auxiliary'.split()
)


@pytest.mark.parametrize('name', CASES)
def test_training_is_that_of_one_process(found, name):
    case = found[0]['training'][name]
    assert max(case['weights'], case['sample_weights'], case['history'], case['accuracy']) < 1e-9
    assert case['uniform'] == (name in ('plain', 'labels', 'batch_norm', 'auxiliary'))


@pytest.mark.parametrize('name', ['ddp', 'fsdp2'])
def test_wrapped_students_train_as_the_network_inside(found, name):
    assert found[0]['wrapped'][name] < 1e-9


@pytest.mark.parametrize(
    'name', ['last_layer', 'last_layer_single', 'classes', 'cross', 'ddp', 'fsdp2', 'self_influence']
)
def test_scores_of_the_last_layer_are_the_same_bits(found, name):
    assert found[0]['scores'][name] == dict(relative=0.0, same=True, index=True)


@pytest.mark.parametrize(
    'name', ['all_layers', 'all_layers_single', 'posterior_all_layers', 'cross_all_layers']
)
def test_scores_of_all_layers_are_those_of_one_process(found, name):
    case = found[0]['scores'][name]
    assert case['index'] and case['relative'] < (1e-5 if name.endswith('single') else 1e-9)


@pytest.mark.parametrize(
    'name, kind, words',
    [
        ('callback', 'NotImplementedError', 'weighting is Reweighting()'),
        ('online', 'NotImplementedError', 'schedule is Online()'),
        ('auxiliary', 'NotImplementedError', 'auxiliary: the loss of a sample depends on the others'),
        ('compile', 'NotImplementedError', 'compile is set'),
        ('settings', 'ValueError', 'training: not the same in process 1'),
        ('data', 'ValueError', 'train: samples and batches: not the same'),
        ('sync', 'NotImplementedError', 'student has SyncBatchNorm'),
        ('scores', 'ValueError', 'batches: not the same in process 1'),
        ('all_layer_scores', 'ValueError', 'batches: not the same in process 1'),
        ('sharded_scores', 'TypeError', 'use last_layer=True'),
        ('sharded_checkpoint', 'NotImplementedError', 'checkpoint: a sharded network cannot be kept'),
    ],
)
def test_what_cannot_be_shared_is_refused(found, name, kind, words):
    assert found[0]['refused'][name].startswith(f'{kind}: ') and words in found[0]['refused'][name]


def test_other_batches_are_noticed(found):
    assert 'the batches of epoch' in found[0]['order'] and found[0]['order'].startswith('ValueError')


def test_networks_and_dropout(found):
    first, second = found
    assert first['unseeded'] == second['unseeded']  # built from other seeds
    assert first['dropout']['same'] and first['dropout']['state'] == second['dropout']['state']
