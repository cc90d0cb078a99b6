"""Two processes against one, for `torch.distributed.run --nproc-per-node 2 program.py OUTPUT.json CHECKPOINT`.

With a third argument, a rank, that process kills itself in the second half of the run that the checkpoint is of."""

import copy
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kd_aif.distillation.checkpoint import Checkpoint
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import AuxiliaryLoss, Objective
from kd_aif.distillation.schedules import Every, OneShot, Online
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Influence, Published, Reweighting
from kd_aif.foundation import processes
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.foundation.processes import current_processes, gather_values, Processes, start_processes
from kd_aif.influence.cross_scores import cross_scores, Scoring
from kd_aif.influence.scores import influence_scores
from kd_aif.influence.self_influence import self_influence

torch.set_num_threads(1)
DOUBLE = torch.float64


@contextmanager
def alone():
    "This process works for itself inside the block"
    kept = current_processes()
    processes._state['processes'] = Processes()
    try:
        yield
    finally:
        processes._state['processes'] = kept


def batches(n, size, seed, first=0, noise=0.4):
    "Three classes in six dimensions, many labels wrong; the last batch is shorter"
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=draw)
    x = torch.randn(n, 6, generator=draw, dtype=DOUBLE) + 2 * nn.functional.one_hot(y, 6)
    y = torch.where(torch.rand(n, generator=draw) < noise, torch.randint(3, (n,), generator=draw), y)
    parts = zip(x.split(size), y.split(size), (torch.arange(n) + first).split(size))
    return [dict(x=x, y=y, index=i) for x, y, i in parts]


def network(seed=0, norm=False, dropout=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8)] if norm else [nn.Linear(6, 8)]
    layers += [nn.Dropout(0.5)] if dropout else []
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3)).double()


TRAIN, VAL = batches(161, 32, 0), batches(120, 32, 1, first=1000, noise=0)  # a last batch of one row
MORE = batches(163, 32, 0)  # one of three rows: two and one


KNOWN = batch_cross_entropy, TRAIN, VAL


def trained_teacher():
    teacher = network(9)
    distill(teacher, None, TRAIN, VAL, training=Training(5, lr=0.05, progress=False))
    return teacher


def run(student, teacher=None, make=None, **settings):
    training = Training(3, lr=0.05, progress=False, **settings.pop('training', {}))
    has_norm = any(isinstance(m, nn.BatchNorm1d) for m in student.modules())
    return distill(
        student, teacher, MORE if has_norm else TRAIN, VAL, training=training, test=VAL, **settings
    )


def state(model):
    "All numbers of a network, in one piece each"
    return torch.cat(
        [
            getattr(t, 'full_tensor', lambda: t)().detach().flatten().double()
            for t in model.state_dict().values()
        ]
    )


def sharded(model):
    return fully_shard(copy.deepcopy(model), mesh=init_device_mesh('cpu', (2,)))


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def training_cases(teacher):
    "name -> (make a student, settings)"
    both = dict(mechanism='both', schedule=OneShot(make_teacher=lambda: network(4)))
    return dict(
        plain=(network, {}),
        labels=(network, dict(teacher=None)),
        batch_norm=(lambda: network(norm=True), {}),
        student=(network, dict(mechanism='student', weighting=Influence(class_weighting=None))),
        both=(network, both),
        both_batch_norm=(
            lambda: network(norm=True),
            both | dict(schedule=OneShot(make_teacher=lambda: network(4, norm=True))),
        ),
        refreshed=(network, dict(mechanism='both', schedule=Every(1, 1))),
        published_all_layers=(network, dict(mechanism='student', weighting=Published(last_layer=False))),
        auxiliary=(
            network,
            dict(objective=Objective(auxiliary=AuxiliaryLoss(squares, outputs=lambda m, b: [m(b['x'])]))),
        ),
    )


def squares(ours, theirs, batch):
    return (ours[-1] - theirs[-1]).square().sum(1)


def compare_training(teacher):
    found = {}
    for name, (make, settings) in training_cases(teacher).items():
        settings = dict(teacher=teacher) | settings
        ours, theirs = make(), make()
        a = run(ours, **(settings | dict(teacher=copy.deepcopy(settings['teacher']))))
        with alone():
            b = run(theirs, **(settings | dict(teacher=copy.deepcopy(settings['teacher']))))
        lines = [
            difference(*(torch.tensor([l[k] for l in r.history]) for r in (a, b)))
            for k in ('loss', 'accuracy')
        ]
        found[name] = dict(
            weights=difference(state(ours), state(theirs)),
            sample_weights=difference(a.weights, b.weights),
            history=max(lines),
            accuracy=abs(a.metrics['test_accuracy'] - b.metrics['test_accuracy']),
            uniform=bool((a.weights == 1).all()),
        )
    return found


def wrapped_cases(teacher):
    "A student in `DistributedDataParallel`, and under `fully_shard`"
    with alone():
        run(expected := network(norm=True), teacher)
    run(nn.parallel.DistributedDataParallel(inside := network(norm=True)), teacher)
    run(spread := sharded(network(norm=True)), teacher)
    return dict(
        ddp=difference(state(inside), state(expected)), fsdp2=difference(state(spread), state(expected))
    )


def compare_scores(teacher):
    loss, known = batch_cross_entropy, (teacher, batch_cross_entropy, TRAIN, VAL)
    single = (
        copy.deepcopy(teacher).float(),
        loss,
        *[[{**b, 'x': b['x'].float()} for b in s] for s in (TRAIN, VAL)],
    )
    all_layers = Scoring(last_layer=False, progress=False)
    calls = dict(
        last_layer=lambda: influence_scores(*known, progress=False),
        last_layer_single=lambda: influence_scores(*single, progress=False),
        classes=lambda: influence_scores(*known, target='class', progress=False),
        all_layers=lambda: influence_scores(*known, last_layer=False, progress=False),
        all_layers_single=lambda: influence_scores(*single, last_layer=False, progress=False),
        posterior_all_layers=lambda: influence_scores(
            *known, last_layer=False, target='posterior', progress=False
        ),
        cross=lambda: cross_scores(*known, scoring=Scoring(progress=False)),
        cross_all_layers=lambda: cross_scores(*known, scoring=all_layers),
        ddp=lambda: influence_scores(
            nn.parallel.DistributedDataParallel(teacher), *known[1:], progress=False
        ),
        self_influence=lambda: self_influence(*known[:3], progress=False),
        fsdp2=lambda: influence_scores(sharded(teacher), *known[1:], progress=False),
    )
    found = {}
    for name, call in calls.items():
        ours = call()
        with alone():
            theirs = calls['last_layer' if name in ('ddp', 'fsdp2') else name]()
        found[name] = dict(
            relative=difference(ours.values, theirs.values),
            same=torch.equal(ours.values, theirs.values),
            index=torch.equal(ours.index, theirs.index),
        )
    return found


def message(call):
    try:
        call()
    except (TypeError, ValueError, NotImplementedError) as e:
        return f'{type(e).__name__}: {e}'
    return 'nothing'


def refused(teacher):
    rank, relative = current_processes().rank, lambda o, t, b: (o[-1] - o[-1].mean(0)).square().sum(1)
    similar = AuxiliaryLoss(relative, outputs=lambda m, b: [m(b['x'])])
    train, turned = TRAIN[rank:] + TRAIN[:rank], VAL[rank:] + VAL[:rank]
    quiet = Training(1, progress=False)
    return dict(
        callback=message(
            lambda: run(network(), weighting=Reweighting(lambda step: torch.ones(len(step.losses))))
        ),
        online=message(
            lambda: run(
                network(), teacher, mechanism='student', schedule=Online(1), weighting=Published(score='mean')
            )
        ),
        auxiliary=message(lambda: run(network(), teacher, objective=Objective(auxiliary=similar))),
        compile=message(lambda: run(network(), training=dict(compile=lambda f: f))),
        settings=message(lambda: run(network(), training=dict(seed=rank))),
        data=message(lambda: distill(network(), None, train, VAL, training=quiet)),
        scores=message(lambda: influence_scores(teacher, batch_cross_entropy, TRAIN, turned, progress=False)),
        all_layer_scores=message(
            lambda: influence_scores(
                teacher, batch_cross_entropy, TRAIN, turned, last_layer=False, progress=False
            )
        ),
        sharded_scores=message(
            lambda: influence_scores(sharded(teacher), *KNOWN, last_layer=False, progress=False)
        ),
        sharded_checkpoint=message(
            lambda: run(sharded(teacher), training=dict(checkpoint='none.safetensors'))
        ),
        sync=message(lambda: run(nn.Sequential(nn.Linear(6, 3), nn.SyncBatchNorm(3)).double())),
    )


class Alternating(list):
    "Batches whose order differs between processes from the third pass on"

    passes = 0

    def __iter__(self):
        self.passes += 1
        turned = self.passes > 3 and current_processes().rank
        return iter(self[::-1] if turned else self[:])


def dropout_cases():
    "Masks differ between processes, networks do not, and the same seed gives the same network"
    run(first := network(dropout=True))
    run(second := network(dropout=True))
    return dict(same=torch.equal(state(first), state(second)), state=state(first).tolist())


class Killing(list):
    "Batches in whose fifth epoch a process kills itself"

    epochs, killed = 0, None

    def set_epoch(self, epoch):
        self.epochs += 1
        if self.epochs == 5 and current_processes().rank == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)


def interrupted(checkpoint, killed=None):
    "Three epochs of a teacher, and three of a student with dropout"
    torch.manual_seed(0)
    train, student = Killing(TRAIN), network(dropout=True)
    train.killed = killed
    schedule = OneShot(make_teacher=lambda: network(4, dropout=True))
    training = Training(3, lr=0.05, progress=False, checkpoint=checkpoint)
    both = dict(mechanism='both', schedule=schedule, training=training)
    return distill(student, trained_teacher(), train, VAL, **both), train.epochs


def resumed(checkpoint):
    "The run that goes on from a checkpoint, and the same run in one piece"
    (ours, late), (theirs, _) = interrupted(Checkpoint(checkpoint, 0)), interrupted(None)
    same = [
        torch.equal(state(a), state(b))
        for a, b in ((ours.student, theirs.student), (ours.teacher, theirs.teacher))
    ]
    return dict(same=same, weights=torch.equal(ours.weights, theirs.weights), epochs=late)


def main(path, checkpoint):
    start_processes()
    teacher = trained_teacher()
    unseeded = network(current_processes().rank)
    run(unseeded)
    found = dict(
        training=compare_training(teacher),
        resumed=resumed(checkpoint),
        wrapped=wrapped_cases(teacher),
        scores=compare_scores(teacher),
        refused=refused(teacher),
        unseeded=state(unseeded).tolist(),
        dropout=dropout_cases(),
        order=message(
            lambda: distill(network(), None, Alternating(TRAIN), VAL, training=Training(4, progress=False))
        ),
    )
    everyone = gather_values(found)
    if current_processes().first:
        Path(path).write_text(json.dumps(everyone))


if __name__ == '__main__':
    if len(sys.argv) > 3:
        start_processes()
        interrupted(Checkpoint(sys.argv[2], 0), int(sys.argv[3]))
    else:
        main(*sys.argv[1:])
