"Shared by the tests of rivals: digits, the outputs of an untrained teacher, training and validation batches; torchdistill."

import pytest, torch
from teacher_cases import network

from kd_aif.data.images import hold_out, subset
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.distillation.objective import default_outputs


@pytest.fixture(scope='module')
def digits():
    return next(iter(ImageBatches(load_images('digits'), 60, shuffle=False)))


@pytest.fixture(scope='module')
def teacher_outputs(digits):
    with torch.no_grad():
        return default_outputs(network(5, 'cnn16').eval(), digits)


@pytest.fixture(scope='module')
def sets():
    return [ImageBatches(d, 32, seed=0) for d in hold_out(subset(load_images('digits'), 220, 0), 60, seed=0)]


@pytest.fixture(scope='module')
def torchdistill():
    return pytest.importorskip(
        'torchdistill.losses.mid_level', reason='torchdistill is an extra: pip install "kd_aif[baselines]"'
    )
