"""Which trainings of the methods of the full tier are recorded as one launch, and that this changes nothing.

On the CPU a trace stands in for the CUDA graph: it refuses what a graph refuses, and replays the operations."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from kd_aif.distillation.captured_step import record_trace, RECORDERS
from kd_aif.distillation.trainer import Fit
from kd_aif.experiments.expected_runs import EXPECTED
from kd_aif.experiments.methods import run_task
from kd_aif.experiments.storage import Storage
from kd_aif.experiments.tasks import make_task
from kd_aif.rivals import confident_learning

METHODS = {
    'kd': 2,  # the shared teacher, the student
    'kd_val': 2,
    'sigmoid_student': 2,
    'kd_aif_student': 2,
    'kd_aif_both': 3,  # and the teacher under the weights
    'kd_aif_twice': 4,  # and a second one, with the first one's predictions in its loss
    'oracle': 2,  # the teacher under the weights, the student
    'dkd': 2,
    'dkd_aif': 2,
    'lskd': 2,
    'lskd_aif': 2,
    'small_loss_calibrated_both': 3,
    'confident_learning': 4,  # two networks that find the wrong labels
    'elr': 2,
}  # method -> how many trainings it makes, all of which are recorded
NOT_RECORDED = {}  # method -> {number of the training: reason}
SETTING = dict(noise='symmetric', rate=0.4, batch_size=128, epochs=4, teacher='cnn8', student='cnn4', lr=0.2)


def test_every_method_of_the_full_tier_on_images_is_looked_at():
    trained = {m for e in EXPECTED if e.epochs is not None and e.experiment != '23_glue' for m in e.methods}
    assert set(METHODS) == trained


@pytest.fixture
def fits(monkeypatch):
    "The trainings as they are made"
    made, run = [], Fit.run

    def remembered(self, *args, **kwargs):
        made.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Fit, 'run', remembered)
    return made


def wrong_labels(labels, probabilities, **options):
    "What cleanlab's function says, in a simple form: labels that are not the most probable class"
    return probabilities.argmax(1) != labels


def outcome(fit):
    "'recorded', or why a training ran as it is"
    if fit.captured is None:
        return 'never tried'
    return fit.captured.failure or ('recorded' if fit.captured.recordings else 'no shape came twice')


def run(method, folder, **changes):
    task = make_task('digits', **SETTING | changes)
    record, found = run_task(task, method, 'test', storage=Storage(folder), progress=False)
    return record.metrics, found.history, [p.clone() for p in found.student.state_dict().values()]


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('method', METHODS)
def test_the_trainings_of_a_method_are_recorded(method, precision, fits, monkeypatch, tmp_path):
    monkeypatch.setattr(
        confident_learning, '_cleanlab', lambda: SimpleNamespace(find_label_issues=wrong_labels)
    )
    plain = run(method, tmp_path / 'plain', precision=precision)
    assert {outcome(f) for f in fits} == {'never tried'}
    fits.clear()
    monkeypatch.setitem(RECORDERS, 'cpu', record_trace)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='a training step cannot be recorded')
        metrics, history, weights = run(method, tmp_path / 'recorded', precision=precision)
    reasons = NOT_RECORDED.get(method, {})
    assert [outcome(f) for f in fits] == [reasons.get(i, 'recorded') for i in range(METHODS[method])]
    assert (metrics, history) == plain[:2] and all(map(torch.equal, weights, plain[2]))
