"With few labels a training step never waits for the GPU; found on the CPU by where each tensor would lie."

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from device_waits import DeviceWaits

from kd_aif.data.images import subset
from kd_aif.data.randaugment import _luminance, OPERATIONS
from kd_aif.data.sources import load_images
from kd_aif.few_labels import batches
from kd_aif.few_labels.batches import _permutation, labelled_split
from kd_aif.few_labels.cross_fitting import CrossFit
from kd_aif.few_labels.meta_pseudo_labels import ALGORITHMS
from kd_aif.few_labels.settings import ssl_sgd, SSLTraining
from kd_aif.few_labels.trainer import _batches, SSLLoop
from kd_aif.foundation.batches import upload
from kd_aif.models.build import build_model

cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA device: what waits is seen there'
)
NAMES = 'supervised', 'fixmatch', 'freematch', 'softmatch', 'mpl', 'kd_aif_ssl'
PRECISIONS = pytest.mark.parametrize('autocast', [None, torch.bfloat16], ids=['float32', 'bfloat16'])


def coloured():
    "Digits in three channels, so that operations on colours have something to do"
    d = subset(load_images('digits'), 400, 0)
    return replace(d, x=d.x.repeat(1, 3, 1, 1), mean=d.mean.repeat(3), std=d.std.repeat(3))


def loop_of(name, autocast=None, device='cpu'):
    "A run with calibrations in steps 5 and 10"
    labelled, unlabelled, _ = labelled_split(coloured().to(device), 40, 0)
    algorithm = CrossFit(labelled, refresh=5) if name == 'kd_aif_ssl' else ALGORITHMS[name]()
    training = SSLTraining(steps=12, batch_size=10, mu=4, autocast=autocast, progress=False)
    student = build_model('cnn8', 10, 3, seed=0).to(device)
    return SSLLoop(student, algorithm, _batches(labelled, unlabelled, training), training)


def on_cpu(loop):
    "What lies on the CPU also where the networks are on a GPU, in memory of its own"
    loop.batches._cpu_index = loop.batches._cpu_index.clone()
    found, state = [loop.batches._cpu_index, loop.trainer.average.n_averaged], loop.state
    if hasattr(state, 'trainers'):
        state._cpu_fold = state._cpu_fold.clone()
        state._cpu_order = [t.clone() for t in state._cpu_order]
        found += [state._cpu_fold, *state._cpu_order, *(t.average.n_averaged for t in state.trainers)]
    return found


@PRECISIONS
@pytest.mark.parametrize('name', NAMES)
def test_waits_in_each_step(name, autocast):
    loop, counts = loop_of(name, autocast), []
    _permutation.cache_clear()
    _luminance(torch.device('cpu'))
    with DeviceWaits(on_cpu(loop)) as waits:
        for number in range(12):
            before = Counter(waits.found)
            loop.step(number)
            counts.append(dict(waits.found - before))
    calibrations = {5, 10} if name == 'kd_aif_ssl' else set()
    assert [c for i, c in enumerate(counts) if i not in calibrations] == [{}] * (12 - len(calibrations))
    assert all(0 < sum(counts[i].values()) < 120 for i in calibrations)


def test_all_operations_of_the_strong_view_are_met():
    "The steps above draw each of them"
    met, original = Counter(), {}
    for name, o in OPERATIONS.items():
        original[name] = o
        OPERATIONS[name] = replace(o, apply=lambda x, m, name=name, o=o: met.update([name]) or o.apply(x, m))
    try:
        loop = loop_of('fixmatch')
        for number in range(12):
            loop.step(number)
    finally:
        OPERATIONS.update(original)
    assert set(met) == set(OPERATIONS)


@pytest.mark.parametrize(
    'ask, kind',
    [
        (lambda x: float(x.sum()), '_local_scalar_dense'),
        (lambda x: bool((x > 0).any()), '_local_scalar_dense'),
        (lambda x: x[x > 0], 'mask'),
        (lambda x: (x > 0).nonzero(), 'nonzero'),
        (lambda x: x.tolist(), 'tolist'),
        (lambda x: x.cpu(), 'cpu'),
        (lambda x: x[torch.randperm(4, generator=torch.Generator())], 'CPU tensor in index'),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]), 'CPU tensor in mul'),
        (lambda x: torch.equal(x, x), 'equal'),
    ],
)
def test_a_wait_is_found(ask, kind):
    x = torch.arange(4.0)
    with DeviceWaits() as waits:
        ask(x)
    assert waits.found == {kind: 1}


def test_what_is_no_wait():
    x, order = torch.arange(4.0), torch.arange(3)
    with DeviceWaits([order]) as waits:
        drawn = torch.rand(4, generator=torch.Generator())
        assert drawn.tolist() and float(drawn.sum()) and len(drawn[drawn > 0])
        y = x * batches.upload(drawn, 'cpu') + x[batches.upload(order[:2], 'cpu')].sum() + torch.zeros(4)
        y[torch.where(y > 0, 1, 0)] = 3.0
    assert not waits.found and batches.upload is upload  # put back


def test_the_optimiser_is_fused_on_a_gpu_alone(monkeypatch):
    model, made = build_model('cnn4', 10, 1), []
    assert not ssl_sgd(model, 0.1).defaults['fused']
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda self: True))
    monkeypatch.setattr(torch.optim, 'SGD', lambda groups, **options: made.append(options))
    ssl_sgd(model, 0.1)
    assert made[0]['fused'] is True and made[0]['weight_decay'] == 5e-4 and made[0]['nesterov']


@cuda
@PRECISIONS
@pytest.mark.parametrize('name', NAMES)
def test_no_step_waits_on_a_gpu(name, autocast):
    loop = loop_of(name, autocast, 'cuda')
    for number in range(7):
        loop.step(number)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for number in (7, 8, 9):
            loop.step(number)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert loop.trainer.optimizer.defaults['fused']
