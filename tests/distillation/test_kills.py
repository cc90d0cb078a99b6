"""A training that is killed at a random moment ends as in one piece, to the last bit.

The moment is counted in processor time, which a busy machine does not stretch.
Two kills; with KD_AIF_SLOW=1 twenty. KD_AIF_SEED chooses other moments."""

import os
import random
import signal
import subprocess
import sys

import pytest

KILLS = 20 if 'KD_AIF_SLOW' in os.environ else 2

PROGRAM = """
import os, signal, sys, torch
torch.set_num_threads(1)
from kd_aif.data.images import hold_out, subset
from kd_aif.data.label_noise import symmetric_noise
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.distillation.checkpoint import Checkpoint
from kd_aif.distillation.distill import distill
from kd_aif.distillation.schedules import OneShot
from kd_aif.distillation.trainer import Training
from kd_aif.models.build import build_model, save_model

train, val = hold_out(subset(load_images('digits'), 500, 0), 100, seed=0)
train, val = (ImageBatches(d, 50, seed=0) for d in (symmetric_noise(train, 0.4, 0), val))

def end_after(seconds):
    "the kernel ends this process after so many seconds of processor time; Python has no part in it"
    signal.setitimer(signal.ITIMER_PROF, seconds)

def run(folder):
    make = lambda seed: build_model('mlp32', 10, seed=seed)
    training = Training(12, progress=False, checkpoint=Checkpoint(f'{folder}/run.safetensors', 0))
    schedule = OneShot(make_teacher=lambda: make(2))
    end = distill(make(0), make(1), train, val, mechanism='both', schedule=schedule, training=training)
    save_model(end.student, f'{folder}/student.safetensors')
    save_model(end.teacher, f'{folder}/teacher.safetensors')

print('ready', flush=True)
for line in sys.stdin:
    folder, seconds = line.rsplit(maxsplit=1)
    child = os.fork()
    if child == 0:
        if float(seconds):
            end_after(float(seconds))
        run(folder)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    print(status, used.ru_utime + used.ru_stime, flush=True)
"""


@pytest.fixture
def start():
    "start(folder, seconds) -> status and processor seconds of a training, which is killed after some of them"
    command = [sys.executable, '-W', 'ignore', '-c', PROGRAM]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == 'ready\n'

    def run(folder, seconds=0):
        folder.mkdir(exist_ok=True)
        server.stdin.write(f'{folder} {seconds}\n')
        server.stdin.flush()
        status, used = server.stdout.readline().split()
        return int(status), float(used)

    yield run
    server.stdin.close()
    server.wait()


def ends(folder):
    return [(folder / f'{name}.safetensors').read_bytes() for name in ('student', 'teacher')]


def test_killed_at_random_moments_it_ends_as_in_one_piece(start, tmp_path):
    status, length = start(tmp_path / 'whole')
    assert status == 0
    whole, moments = ends(tmp_path / 'whole'), random.Random(os.environ.get('KD_AIF_SEED', '0'))
    killed, states = 0, 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        status, used = start(folder, moments.uniform(0.05, 0.95) * length)
        killed += status == signal.SIGPROF
        states += (folder / 'run.safetensors').exists()
        length = min(length, used) if status == 0 else length
        assert start(folder)[0] == 0
        assert ends(folder) == whole, f'kill {number}'
        left = {p.name for p in folder.iterdir() if not p.name.startswith('.')}
        assert left == {'run.safetensors', 'student.safetensors', 'teacher.safetensors'}
    print(f'{KILLS} runs, {killed} killed before their end, {states} with a state, {KILLS} equal ends')
    assert killed >= KILLS / 2 and states
