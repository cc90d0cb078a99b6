"""A training that goes on from a file ends as the one that was never left."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import kd_aif.distillation.distill as distill_module
from golden.cases import CASES
from kd_aif.data.images import hold_out, subset
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.distillation.checkpoint import Checkpoint, Stopped
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import Objective
from kd_aif.distillation.schedules import Every, OneShot
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Published, Reweighting
from kd_aif.foundation.state_files import load_state
from kd_aif.models.build import build_model
from kd_aif.rivals.robust_losses import GeneralizedCrossEntropy

pytestmark = pytest.mark.usefixtures('one_thread')

REFUSED = {'meta_weight_net', 'sigmoid_all_layers'}  # see `test_what_cannot_be_kept_is_refused`
FEW_LABELS = {'supervised', 'supervised_all', 'pseudo_label', 'fixmatch', 'fixmatch_bfloat16', 'mean_teacher'}
NO_TRAINING = {
    'scores_cg',
    'scores_woodbury',
    'scores_ekfac',
    'scores_diagonal',
    'scores_local',
    'crossed_all_layers',
}
OTHERS = REFUSED | FEW_LABELS | NO_TRAINING | {'vat', 'meta_pseudo_labels', 'kd_aif_ssl'}
GOLDEN = json.loads((Path(__file__).parents[1] / 'golden' / 'golden.json').read_text())


class Interrupting:
    "Gives every call of `distill` a checkpoint that asks to stop behind each epoch"

    def __init__(self, folder, monkeypatch):
        self.folder, self.number, self.opened = folder, 0, 0
        monkeypatch.setattr(distill_module, 'open_session', self.open)

    original = staticmethod(distill_module.open_session)

    def open(self, student, teacher, train, val, test, config):
        self.number += 1
        checkpoint = Checkpoint(self.folder / f'{self.number}.safetensors', 0, lambda seconds: True)
        training = dataclasses.replace(config['training'], checkpoint=checkpoint)
        return self.original(student, teacher, train, val, test, config | dict(training=training))

    def result(self, case):
        "Start anew until the end is reached"
        for self.opened in range(200):
            self.number = 0
            try:
                return json.loads(json.dumps(case()))
            except Stopped:
                continue
        raise AssertionError('no end in sight')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted(set(CASES) - OTHERS))
def test_left_behind_every_epoch_ends_as_in_one_piece(name, tmp_path, monkeypatch):
    whole = json.loads(json.dumps(CASES[name]()))
    interrupting = Interrupting(tmp_path, monkeypatch)
    assert interrupting.result(CASES[name]) == whole
    assert interrupting.opened >= 2


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted(REFUSED))
def test_what_cannot_be_kept_is_refused(name, tmp_path, monkeypatch):
    with pytest.raises((TypeError, ValueError), match='checkpoint'):
        Interrupting(tmp_path, monkeypatch).result(CASES[name])


def sets():
    return (ImageBatches(d, 64, seed=0) for d in hold_out(subset(load_images('digits'), 400, 0), 100, seed=0))


def run(path, lr=0.1, seed=0, epochs=3, **options):
    "A small distillation with a checkpoint"
    train, val = options.pop('sets', None) or sets()
    student, teacher = build_model('cnn4', 10, 1, seed=seed), build_model('cnn8', 10, 1, seed=7)
    checkpoint = Checkpoint(path, **{'seconds': 0, **options.pop('checkpoint', {})})
    training = Training(epochs=epochs, lr=lr, progress=False, checkpoint=checkpoint)
    return distill(student, teacher, train, val, training=training, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_finished_run_gives_its_result_without_training(tmp_path, monkeypatch):
    first = run(tmp_path / 'a.safetensors')
    monkeypatch.setattr('kd_aif.distillation.trainer.Fit.train_epoch', lambda *_: pytest.fail('it trains'))
    again = run(tmp_path / 'a.safetensors')
    assert again.history == first.history and again.metrics == first.metrics
    assert same(again.student, first.student) and not again.student.training
    assert again.seconds == first.seconds


@pytest.mark.parametrize(
    'change, place',
    [
        (dict(lr=0.2), 'training.lr'),
        (dict(epochs=4), 'training.epochs'),
        (dict(seed=1), 'networks.student'),
        (dict(objective=Objective(T=2.0)), 'objective.T'),
        (dict(objective=Objective(label_loss=GeneralizedCrossEntropy())), 'objective.label_loss'),
        (dict(mechanism='student'), 'mechanism'),
    ],
)
def test_the_file_of_another_run_is_refused_by_name(tmp_path, change, place):
    stop = dict(checkpoint=dict(stop=lambda seconds: True))
    with pytest.raises(Stopped):
        run(tmp_path / 'a.safetensors', **stop)
    written = (tmp_path / 'a.safetensors').read_bytes()
    with pytest.raises(ValueError, match=f'a training with {place}'):
        run(tmp_path / 'a.safetensors', **change)
    assert (tmp_path / 'a.safetensors').read_bytes() == written


def test_other_samples_are_refused(tmp_path):
    run(tmp_path / 'a.safetensors')
    train, val = sets()
    flipped = dataclasses.replace(train.data, y=9 - train.data.y)
    with pytest.raises(ValueError, match='a training with samples.train'):
        run(tmp_path / 'a.safetensors', sets=(ImageBatches(flipped, 64), val))


def test_a_broken_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='delete it to begin anew'):
        run(path)
    assert path.read_bytes() == b'no checkpoint'


def test_states_are_written_when_the_last_one_is_old_enough(tmp_path, monkeypatch):
    written = []
    write = 'kd_aif.distillation.progress.keep_checkpoint'
    monkeypatch.setattr(write, lambda checkpoint, description, state, needed: written.append(state['stage']))
    run(tmp_path / 'a.safetensors', checkpoint=dict(seconds=1e6))
    assert written == [1]  # the result alone
    run(tmp_path / 'b.safetensors', checkpoint=dict(seconds=0))
    assert written == [1, 0, 0, 0, 1]


def test_stop_learns_the_seconds_of_an_epoch(tmp_path):
    asked = []
    run(tmp_path / 'a.safetensors', checkpoint=dict(stop=lambda seconds: asked.append(seconds)))
    assert len(asked) == 3 and all(0 < seconds < 60 for seconds in asked)


def test_a_state_holds_tensors_and_plain_values_only(tmp_path):
    run(
        tmp_path / 'a.safetensors',
        mechanism='both',
        schedule=OneShot(make_teacher=lambda: build_model('cnn8', 10, 1, seed=9)),
    )
    state = load_state(tmp_path / 'a.safetensors')['state']
    assert set(state['networks']) >= {'student'} and len(state['history']) in (3, 6)


@pytest.mark.parametrize('checkpoint', [3, '', True, ['a']])
def test_a_checkpoint_is_a_path(checkpoint):
    with pytest.raises(TypeError, match='checkpoint is'):
        Training(checkpoint=checkpoint)


class Remembers:
    n = 0

    def __call__(self, step):
        self.n += 1
        return torch.ones_like(step.losses)


def test_a_callback_whose_state_cannot_be_seen_is_refused_before_training(tmp_path):
    callback = Remembers()
    with pytest.raises(TypeError, match='callback is a Remembers'):
        run(tmp_path / 'a.safetensors', weighting=Reweighting(callback))
    assert callback.n == 0


def test_all_layer_scores_refreshed_in_training_are_refused(tmp_path):
    options = dict(mechanism='student', schedule=Every(1, 1), weighting=Published(last_layer=False))
    with pytest.raises(ValueError, match='give Published'):
        run(tmp_path / 'a.safetensors', **options)


# What decides a run, and what remembers


def small_net(p=0.1, bend=nn.ReLU):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), bend(), nn.Dropout(p), nn.Linear(32, 10))


def batches_of(data, size=64, change=lambda x: x):
    images = ImageBatches(data, size, seed=0, shuffle=False)
    return [batch | dict(x=change(batch['x'])) for batch in images]


def scaled(factor):
    return lambda logits, batch: factor * nn.functional.cross_entropy(logits, batch['y'], reduction='none')


def adamw(weight_decay):
    return lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits, batch):
        return self.factor * nn.functional.cross_entropy(logits, batch['y'], reduction='none')


def call(path, stop=True, net=small_net, size=64, change=lambda x: x, loss=scaled(1.0), decay=0.1):
    "One call of `distill` on lists of batches"
    train, val = hold_out(subset(load_images('digits'), 300, 0), 100, seed=0)
    checkpoint = Checkpoint(path, 0, lambda seconds: stop)
    training = Training(3, 0.01, make_optimizer=adamw(decay), progress=False, checkpoint=checkpoint)
    objective = Objective(label_loss=loss)
    data = batches_of(train, size, change), batches_of(val)
    return distill(net(), None, *data, objective=objective, training=training)


CHANGES = {
    'pixels': (dict(change=lambda x: 1 - x), 'samples.train'),
    'batch size': (dict(size=32), 'samples.train'),
    'dropout': (dict(net=lambda: small_net(0.5)), 'networks.student'),
    'activation': (dict(net=lambda: small_net(bend=nn.Tanh)), 'networks.student'),
    'closure of the loss': (dict(loss=scaled(2.0)), 'objective.label_loss'),
    'text of the loss': (
        dict(loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch['y'], reduction='none')),
        'objective.label_loss',
    ),
    'attribute of the loss': (dict(loss=Scaled(2.0)), 'objective.label_loss'),
    'closure of the optimiser': (dict(decay=0.2), 'training.make_optimizer'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_whatever_decides_the_numbers_is_compared(name, tmp_path):
    change, place = CHANGES[name]
    first = dict(loss=Scaled(1.0)) if name == 'attribute of the loss' else {}
    with pytest.raises(Stopped):
        call(tmp_path / 'a.safetensors', **first)
    with pytest.raises(Stopped):
        call(tmp_path / 'a.safetensors', **first)  # the same again goes on
    with pytest.raises(ValueError, match=f'a training with {place}'):
        call(tmp_path / 'a.safetensors', **change)


def remembering():
    seen = []
    return lambda step: seen.append(step) or torch.ones_like(step.losses)


def counting():
    n = 0

    def callback(step):
        nonlocal n
        n += 1
        return torch.ones_like(step.losses) * n

    return callback


@pytest.mark.parametrize('make', [remembering, counting, lambda: Remembers().__call__])
def test_callbacks_that_may_remember_are_refused(make, tmp_path):
    with pytest.raises(TypeError, match='callback is a .*whose state a checkpoint would lose'):
        run(tmp_path / 'a.safetensors', weighting=Reweighting(make()))


def test_a_callback_that_holds_constants_is_not(tmp_path):
    w, power = torch.linspace(0.5, 1.5, 10), 2
    run(tmp_path / 'a.safetensors', weighting=Reweighting(lambda step: w[step.batch['y']] ** power))


class Noisy(torch.utils.data.Dataset):
    "Digits with noise of NumPy and Python, drawn when a sample is read"

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x = self.data.x[i].float() / 255 + 0.1 * float(np.random.randn()) + 0.1 * random.random()
        return dict(x=x, y=self.data.y[i], index=self.data.index[i])


@pytest.mark.filterwarnings('ignore')
def test_random_numbers_of_other_libraries_and_of_loaders_go_on(tmp_path):
    def once(path, stop):
        np.random.seed(0)
        random.seed(0)
        train, val = hold_out(subset(load_images('digits'), 300, 0), 100, seed=0)
        generator = torch.Generator().manual_seed(5)
        loader = torch.utils.data.DataLoader(Noisy(train), 64, shuffle=True, generator=generator)
        checkpoint = None if path is None else Checkpoint(path, 0, lambda seconds: stop)
        training = Training(4, 0.01, progress=False, checkpoint=checkpoint)
        return distill(small_net(), None, loader, batches_of(val), training=training)

    whole = once(None, False)
    for _ in range(3):
        with pytest.raises(Stopped):
            once(tmp_path / 'a.safetensors', True)
    end = once(tmp_path / 'a.safetensors', False)
    assert end.history == whole.history and same(end.student, whole.student)


def test_a_network_that_was_trained_meanwhile_is_refused_with_a_hint(tmp_path):
    with pytest.raises(Stopped):
        call(tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='untrained networks as at first'):
        call(tmp_path / 'a.safetensors', net=lambda: small_net().half().float())


@pytest.mark.parametrize(
    'path', ['/proc/none/run.safetensors', f'{"x" * 300}.safetensors', '/dev/null/a.safetensors']
)
def test_a_path_that_cannot_be_written_is_named_before_any_work(path, monkeypatch):
    monkeypatch.setattr('kd_aif.distillation.trainer.Fit.train_epoch', lambda *_: pytest.fail('it trains'))
    with pytest.raises(ValueError, match='cannot be written'):
        run(path)
