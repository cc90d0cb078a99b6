"""Scores do not depend on the size of the batches, hardly on the precision, and need no more memory the hundredth time.

KD_AIF_SOAK_MINUTES=30 repeats scorings for that long instead of twenty times."""

import copy
import gc
import os
import time
from pathlib import Path

import pytest
import torch

from kd_aif.data.images import hold_out, subset
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.distillation.distill import distill
from kd_aif.distillation.trainer import Training
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.cross_scores import cross_scores, Scoring
from kd_aif.influence.iterative_solvers import CG
from kd_aif.influence.retraining import RetrainedLosses
from kd_aif.influence.scores import influence_scores, InfluenceScores
from kd_aif.influence.self_influence import self_influence
from kd_aif.influence.solvers import Exact, Woodbury
from kd_aif.models.build import build_model


@pytest.fixture(scope='module')
def sets():
    return hold_out(subset(load_images('digits'), 180, 0), 60, seed=0)


@pytest.fixture(scope='module')
def model(sets):
    batches = [ImageBatches(d, 30, seed=0) for d in sets]
    network = build_model('mlp8', 10, seed=0)
    return distill(network, None, *batches, training=Training(4, progress=False)).student.eval()


def batches(sets, size, dtype=torch.float32):
    "Training and validation batches of a size"
    found = [ImageBatches(d, size, shuffle=False) for d in sets]
    return [[b | dict(x=b['x'].to(dtype)) for b in bs] for bs in found]


OPTIONS = dict(progress=False)
SCORINGS = {
    'last layer': lambda m, t, v: influence_scores(m, batch_cross_entropy, t, v, Exact(0.01), **OPTIONS),
    'by class': lambda m, t, v: influence_scores(
        m, batch_cross_entropy, t, v, Exact(0.01), target='class', **OPTIONS
    ),
    'all layers': lambda m, t, v: influence_scores(
        m, batch_cross_entropy, t, v, CG(damping=0.01, tol=1e-6), last_layer=False, **OPTIONS
    ),
    'self-influence': lambda m, t, v: self_influence(m, batch_cross_entropy, t, Exact(0.01), **OPTIONS),
    'self-influence of all layers': lambda m, t, v: self_influence(
        m, batch_cross_entropy, t, Woodbury(damping=0.01, n_samples=500), last_layer=False, **OPTIONS
    ),
    'cross-fitted': lambda m, t, v: cross_scores(
        m, batch_cross_entropy, t, v, scoring=Scoring(Exact(0.01), progress=False)
    ),
}


def difference(a, b):
    "Largest difference as a fraction of the largest score"
    assert torch.equal(a.index, b.index)
    return float((a.values.double() - b.values.double()).abs().max() / a.values.double().abs().max())


@pytest.mark.parametrize('name', SCORINGS)
def test_scores_by_batch_size(name, sets, model):
    whole = SCORINGS[name](model, *batches(sets, 1000))
    bound = 1e-4 if name == 'self-influence of all layers' else 1e-5  # 1.7e-5 was seen with AVX2
    for size in (7, 64):
        assert difference(whole, SCORINGS[name](model, *batches(sets, size))) < bound


@pytest.mark.parametrize('name', SCORINGS)
def test_scores_in_single_precision(name, sets, model):
    exact = SCORINGS[name](copy.deepcopy(model).double(), *batches(sets, 50, torch.float64))
    assert difference(exact, SCORINGS[name](model, *batches(sets, 50))) < 1e-3


def resident():
    "MiB of this process"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='the system does not say what is resident')
def test_memory_does_not_grow_over_repeated_scorings(sets, model):
    minutes, given = (
        float(os.environ.get('KD_AIF_SOAK_MINUTES', 0)),
        batches([d.select(range(40)) for d in sets], 20),
    )

    few_rows = Woodbury(damping=0.01, n_samples=40)

    def score():
        SCORINGS['last layer'](model, *given)
        self_influence(model, batch_cross_entropy, given[0], few_rows, last_layer=False, **OPTIONS)
        gc.collect()
        return resident()

    for _ in range(4):
        before = score()
    end, n = time.monotonic() + 60 * minutes, 0
    while n < 20 or time.monotonic() < end:
        after, n = score(), n + 1
    print(f'{n} repeats: {before:.1f} to {after:.1f} MiB')
    assert after - before < 8


BROKEN = dict(
    missing=(None, FileNotFoundError, 'does not exist'),
    empty=(b'', ValueError, 'is broken, or no file of this kind'),
    text=(b'{"values": [1, 2]}', ValueError, 'is broken, or no file of this kind'),
    cut=('cut', ValueError, 'is broken, or no file of this kind'),
    other=('other', ValueError, 'is broken, or no file of this kind'),
)


@pytest.mark.parametrize('kind', [InfluenceScores, RetrainedLosses])
@pytest.mark.parametrize('fault', BROKEN)
def test_a_broken_file_is_refused_by_name(kind, fault, tmp_path):
    content, error, message = BROKEN[fault]
    path, n = tmp_path / 'saved.safetensors', torch.arange(3)
    if content in ('cut', 'other'):
        scores = InfluenceScores(torch.rand(3), n, 'mean', 0.1, 0.0, 1, {})
        losses = RetrainedLosses(torch.rand(2, 1, 3), (n[:2], n[1:]), (0,))
        first, second = (scores, losses) if kind is InfluenceScores else (losses, scores)
        (first if content == 'cut' else second).save(path)
        content = path.read_bytes()[:-4] if content == 'cut' else path.read_bytes()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as found:
        kind.load(path)
    assert str(path) in str(found.value)
