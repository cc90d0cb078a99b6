"What the earlier form of distill did silently wrong, and what the procedures promise: weights by index, train mode, passes, precision."

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kd_aif.data.mixed_batches import MixedBatches
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import AuxiliaryLoss, Objective, bootstrapping_loss
from kd_aif.distillation.out_of_fold import out_of_fold_weights
from kd_aif.distillation.schedules import Every, OneShot
from kd_aif.distillation.moving_average import moving_average
from kd_aif.distillation.trainer import Training
from kd_aif.foundation.losses import weighted_mean
from kd_aif.distillation.weighting import Fixed
from kd_aif.weights.class_weights import ClassWeighting

C, D, N, M = 4, 6, 240, 120


class Rows(Dataset):
    "Clouds of points; a share of the labels is wrong"

    def __init__(self, n, seed, share=0.0, first=0, counts=None):
        g = torch.Generator().manual_seed(seed)
        self.clean = (
            torch.arange(n) % C if counts is None else torch.arange(C).repeat_interleave(torch.tensor(counts))
        )
        n = len(self.clean)
        centre = 2.0 * torch.randn(C, D, generator=torch.Generator().manual_seed(99))
        self.x = centre[self.clean] + torch.randn(n, D, generator=g)
        self.is_noisy = torch.rand(n, generator=g) < share
        self.y = torch.where(self.is_noisy, (self.clean + 1) % C, self.clean)
        self.index = first + torch.arange(n)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return dict(x=self.x[i], y=self.y[i], index=self.index[i])


class Watched:
    "Counts the passes over some batches"

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def network(seed=0, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(D, width), nn.ReLU(), nn.Linear(width, C))


train_rows, val_rows = Rows(N, 0, 0.35), Rows(M, 1)
val = DataLoader(val_rows, 32)
settings = dict(objective=Objective(alpha=0.5), training=Training(epochs=4, lr=0.1, progress=False))


def in_order(rows):
    return DataLoader(rows, 32)


def shuffling(rows, seed=0):
    return DataLoader(rows, 32, shuffle=True, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def trained():
    both = MixedBatches(in_order(train_rows), val)
    return distill(
        network(7, 32), None, both, val, **settings | dict(training=Training(12, 0.1, progress=False))
    ).student


@pytest.fixture
def teacher(trained):
    return copy.deepcopy(trained)


def by_index(run):
    return torch.empty(N).index_put_((run.index,), run.weights)


# Weights belong to samples


def test_a_loader_that_shuffles_gets_the_weights_of_its_samples(teacher):
    run = distill(network(1), teacher, shuffling(train_rows), val, mechanism='student', **settings)
    w = by_index(run)
    assert w[~train_rows.is_noisy].mean() > 2 * w[train_rows.is_noisy].mean()


@pytest.mark.parametrize(
    'kind', [list, torch.Tensor.numpy, torch.Tensor.double], ids=['list', 'array', 'float64']
)
def test_weights_may_be_a_list_or_an_array(teacher, kind):
    w = (~train_rows.is_noisy).float() * 1.5
    runs = [
        distill(network(1), teacher, in_order(train_rows), val, weighting=Fixed(v), **settings)
        for v in (w, kind(w))
    ]
    assert torch.equal(runs[0].weights, runs[1].weights) and torch.equal(runs[0].weights, w)
    for a, b in zip(runs[0].student.parameters(), runs[1].student.parameters()):
        assert torch.equal(a, b)


def test_given_weights_and_a_loader_that_shuffles_need_the_index(teacher):
    "Zero weight on wrong labels: with the index the student learns the right ones, without it nothing is trained"
    w = (~train_rows.is_noisy).float()
    with pytest.raises(ValueError, match='give Fixed\\(weights, index=...\\)'):
        distill(network(1), teacher, shuffling(train_rows), val, weighting=Fixed(w), **settings)
    given = Fixed(w, train_rows.index)
    labels_alone = settings | dict(training=Training(25, 0.1, progress=False))
    test = DataLoader(Rows(400, 2), 100)
    right = distill(network(1), None, shuffling(train_rows), val, weighting=given, test=test, **labels_alone)
    turned = Fixed(w.flip(0), train_rows.index)
    wrong = distill(network(1), None, shuffling(train_rows), val, weighting=turned, test=test, **labels_alone)
    assert torch.equal(by_index(right), w)
    assert right.metrics['test_accuracy'] > wrong.metrics['test_accuracy'] + 0.03


def test_weights_of_one_run_serve_the_next(teacher):
    first = distill(network(1), teacher, shuffling(train_rows), val, mechanism='student', **settings)
    again = Fixed(first.weights, first.index)
    run = distill(network(1), teacher, shuffling(train_rows, 5), val, weighting=again, **settings)
    assert not torch.equal(run.index, first.index) and torch.equal(by_index(run), by_index(first))


def test_weights_of_other_data_are_refused(teacher):
    with pytest.raises(ValueError, match='240 of which have none'):
        other = Fixed(torch.ones(N), train_rows.index + 10_000)
        distill(network(1), teacher, in_order(train_rows), val, weighting=other, **settings)


def test_out_of_fold_weights_belong_to_their_index():
    def fit(batches):
        training = Training(12, 0.1, include_validation=False, progress=False)
        return distill(network(3), None, batches, val, training=training).student

    weights, index = out_of_fold_weights(fit, shuffling(train_rows), val, progress=False)
    w = torch.empty(N).index_put_((index,), weights.values)
    assert w[~train_rows.is_noisy].mean() > 1.5 * w[train_rows.is_noisy].mean()


def test_the_pilot_sample_of_class_weights_has_as_many_of_each_class(teacher, monkeypatch):
    "130/69/31 instead of 50 of each class were looked at where a loader shuffled"
    from kd_aif.weights import class_weights as module

    seen, real = [], module.class_influence
    monkeypatch.setattr(
        module,
        'class_influence',
        lambda t, *a, **k: seen.append(t.y.bincount(minlength=C)) or real(t, *a, **k),
    )
    tail = Rows(0, 3, counts=[300, 120, 80, 60])
    weighting = Fixed(torch.ones(len(tail)), tail.index, ClassWeighting(start=0, per_class=50))
    distill(network(1), teacher, shuffling(tail), val, weighting=weighting, **settings)
    assert len(seen) == 4 and all(counts.tolist() == [50] * C for counts in seen)


# Every part of a network in training trains


def with_body(part_in_eval):
    "A body with dropout and batch normalisation, as `from_pretrained` gives it: in eval mode, inside a wrapper in train mode"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        body = nn.Sequential(nn.Linear(D, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        model = nn.Sequential(body, nn.Linear(16, C))
    model.train()
    if part_in_eval:
        body.eval()
    return model


@pytest.mark.parametrize('mechanism', [None, 'student', 'both'])
def test_parts_that_arrive_in_eval_mode_are_trained_in_train_mode(teacher, mechanism):
    options = settings | (dict(schedule=Every(1, 1)) if mechanism else {})
    runs = []
    for part_in_eval in (False, True):
        own = copy.deepcopy(teacher)
        runs.append(
            distill(
                with_body(part_in_eval), own, in_order(train_rows), val, mechanism=mechanism, **options
            ).student
        )
    assert int(runs[1][0][1].num_batches_tracked) > 0
    for a, b in zip(runs[0].state_dict().values(), runs[1].state_dict().values()):
        assert torch.equal(a, b)


def test_a_layer_that_overrides_train_stays_as_it_is(teacher):
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(nn.Linear(D, 16), Frozen(16), nn.ReLU(), nn.Linear(16, C))
    for _ in range(2):
        distill(model, teacher, in_order(train_rows), val, **settings)
        assert int(model[1].num_batches_tracked) == 0


# Passes, precision


@pytest.mark.parametrize('mechanism, factor', [(None, 1), ('student', 1), ('both', 2)])
def test_training_batches_are_read_once_an_epoch_and_twice_besides(teacher, mechanism, factor):
    watched = Watched(in_order(train_rows))
    schedule = OneShot(make_teacher=lambda: network(7, 32)) if mechanism == 'both' else OneShot()
    run = distill(network(1), teacher, watched, val, mechanism=mechanism, schedule=schedule, **settings)
    assert len(run.history) == 4 * factor
    assert watched.passes <= 4 * factor + (2 if mechanism else 1)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_networks_in_other_precisions_run_to_the_end(trained, dtype):
    def cast(rows):
        return [dict(b, x=b['x'].to(dtype)) for b in in_order(rows)]

    teacher = copy.deepcopy(trained).to(dtype)
    run = distill(
        network(1).to(dtype), teacher, cast(train_rows), cast(val_rows), mechanism='student', **settings
    )
    reference = distill(
        network(1), copy.deepcopy(trained), in_order(train_rows), val, mechanism='student', **settings
    )
    assert next(run.student.parameters()).dtype == dtype
    assert torch.corrcoef(torch.stack([run.weights, reference.weights]))[0, 1] > (
        0.99 if dtype == torch.float64 else 0.9
    )


def test_the_label_loss_comes_before_the_auxiliary_loss(teacher):
    "Gradients are summed in the order of the losses, which decides the last bit"
    order = []

    def label_loss(logits, batch):
        order.append('label')
        return nn.functional.cross_entropy(logits, batch['y'], reduction='none')

    def auxiliary(ours, theirs, batch):
        order.append('auxiliary')
        return ours[-1].square().mean(1)

    outputs = AuxiliaryLoss(auxiliary, outputs=lambda model, batch: [model(batch['x'])])
    batch = next(iter(in_order(train_rows)))
    objective = Objective(label_loss=label_loss, auxiliary=outputs)
    with torch.no_grad():
        objective.batch_loss([teacher(batch['x'])])([network(1)(batch['x'])], batch)
    assert order == ['label', 'auxiliary']


def test_the_bootstrapping_loss_by_hand(teacher):
    "p of the label's loss, 1 − p of the cross-entropy with the previous teacher's predictions"
    batch = next(iter(in_order(train_rows)))
    p, logits = torch.linspace(0, 1, len(batch['y'])), network(1)(batch['x']).detach()
    label = nn.functional.cross_entropy(logits, batch['y'], reduction='none')
    soft = nn.functional.cross_entropy(logits, teacher(batch['x']).detach().softmax(1), reduction='none')
    loss = bootstrapping_loss(lambda z, b: label, lambda b: p, teacher, lambda model, b: model(b['x']))
    assert torch.allclose(loss(logits, batch), p * label + (1 - p) * soft, atol=1e-5)


def test_the_distillation_loss_by_hand(teacher):
    "Label and teacher weigh 1 − α and α, the divergence at temperature T is multiplied with T²"
    batch, T, alpha = next(iter(in_order(train_rows))), 3.0, 0.2
    ours, theirs = network(1)(batch['x']).detach(), teacher(batch['x']).detach()
    q, log_p = (theirs / T).softmax(1), (ours / T).log_softmax(1)
    divergence = T**2 * (q * (q.log() - log_p)).sum(1)
    label = nn.functional.cross_entropy(ours, batch['y'], reduction='none')
    found = Objective(T=T, alpha=alpha).batch_loss(theirs)(ours, batch)
    assert torch.allclose(found, (1 - alpha) * label + alpha * divergence, atol=1e-5)


def test_a_batch_of_small_weights_makes_a_small_step():
    losses, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.0])
    assert torch.isclose(weighted_mean(losses, weights), torch.tensor(0.5 / 3))


def test_the_moving_average_starts_as_a_plain_mean():
    model = nn.Linear(1, 1, bias=False)
    average, seen = moving_average(model, 0.9), []
    for value in (1.0, 4.0, 10.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
        seen.append(float(average.module.weight))
    assert seen == pytest.approx([1.0, 2.5, 5.0])
