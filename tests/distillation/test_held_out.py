"Validation samples that are training samples too are refused wherever they score, and only there"

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, random_split, Subset, SubsetRandomSampler, TensorDataset

from kd_aif import samples
from kd_aif.data.images import hold_out, ImageData
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.mixed_batches import SubsetBatches
from kd_aif.distillation.distill import distill
from kd_aif.distillation.out_of_fold import out_of_fold_weights
from kd_aif.distillation.refit import Refit, refit_last_layer
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Fixed
from kd_aif.few_labels.algorithms import FixMatch
from kd_aif.few_labels.batches import labelled_split
from kd_aif.few_labels.cross_fitting import distill_ssl
from kd_aif.few_labels.settings import SSLTraining
from kd_aif.few_labels.trainer import train_ssl
from kd_aif.foundation.held_out import check_apart
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.cross_scores import cross_scores
from kd_aif.rivals.fixed_weights import self_influence_cross
from kd_aif.trust.scored_samples import score_out_of_fold, score_samples

N = 24
X, Y = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 2
ROWS = TensorDataset(X, Y)
QUIET = Training(epochs=1, progress=False)


def net(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 2))


def by_hand(part=slice(N), size=4):
    parts = torch.arange(N)[part].split(size)
    return [dict(x=X[p], y=Y[p], index=p) for p in parts]


def images(seed=0, name='toy'):
    x = torch.randint(0, 255, (N, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ImageData(x, Y, torch.arange(N), Y, ('a', 'b'), name, 'train', 'f', torch.zeros(1), torch.ones(1))


def of_samples():
    whole = samples((X, Y), batch_size=4)
    return whole, whole.hold_out(8)[1]


def of_views():
    train, val = of_samples()
    return train, val.eval_view()


def of_loaders():
    return DataLoader(ROWS, 4, shuffle=True), DataLoader(ROWS, 8)


def of_subsets():
    return DataLoader(ROWS, 4), DataLoader(Subset(Subset(ROWS, range(4, 20)), [0, 3]), 4)


def of_samplers():
    train = DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(12)))
    return train, DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(10, 24)))


def of_lists():
    train = by_hand()
    return train, train[:2]


def of_some():
    train = by_hand()
    return SubsetBatches(train, torch.arange(10)), SubsetBatches(train, torch.arange(9, 20))


def of_images():
    data = images()
    return ImageBatches(data, 4), ImageBatches(hold_out(data, 8, 0)[1], 4)


overlapping = [
    of_samples,
    of_views,
    of_loaders,
    of_subsets,
    of_samplers,
    of_lists,
    of_some,
    of_images,
]


@pytest.mark.parametrize('sets', overlapping)
def test_shared_samples_are_found(sets):
    with pytest.raises(ValueError, match=r'val: \d+ of its samples are in train too.*hold_out\(0.2\)'):
        check_apart(*sets())


def of_two_sources():
    return samples((X, Y), batch_size=4), samples((X + 1, Y), batch_size=4)  # both are counted from 0


def of_random_split():
    return [DataLoader(part, 4) for part in random_split(ROWS, [16, 8])]


apart = [
    of_two_sources,
    of_random_split,
    lambda: samples((X, Y), batch_size=4).hold_out(8),
    lambda: (by_hand(), by_hand()),  # equal batches, but not the same
    lambda: [ImageBatches(part, 4) for part in hold_out(images(), 8, 0)],
    lambda: (ImageBatches(images(0), 4), ImageBatches(images(1), 4)),
    lambda: (ImageBatches(images(), 4), ImageBatches(replace(images(), split='test'), 4)),
    lambda: (SubsetBatches(b := by_hand(), torch.arange(9)), SubsetBatches(b, torch.arange(9, 20))),
]


@pytest.mark.parametrize('sets', apart)
def test_sets_of_their_own_pass(sets):
    check_apart(*sets())


scorers = {
    'distill': lambda a, b: distill(net(), net(), a, b, mechanism='student', training=QUIET),
    'both': lambda a, b: distill(net(), net(), a, b, mechanism='both', training=QUIET),
    'fixed': lambda a, b: distill(net(), None, a, b, weighting=Fixed(torch.ones(N)), training=QUIET),
    'cross_scores': lambda a, b: cross_scores(net(), batch_cross_entropy, a, b),
    'score_samples': lambda a, b: score_samples(net(), a, b),
    'out_of_fold_weights': lambda a, b: out_of_fold_weights(never, a, b),
    'score_out_of_fold': lambda a, b: score_out_of_fold(never, a, b),
    'self_influence_cross': lambda a, b: self_influence_cross(net(), batch_cross_entropy, a, b),
    'refit_last_layer': lambda a, b: refit_last_layer(net(), a, b),
}


def never(*args):
    raise AssertionError('the check comes before any training')


@pytest.mark.parametrize('name', scorers)
@pytest.mark.parametrize('sets', [of_samples, of_lists, of_loaders])
def test_everything_that_scores_refuses_them(name, sets):
    train, val = sets()
    for other in (train, val):
        with pytest.raises(ValueError, match='val(:| is train itself).*give held-out samples'):
            scorers[name](train, other)


def test_joined_streams_refuse_them():
    whole, part = of_samples()
    for other in (whole, part):
        with pytest.raises(ValueError, match='give held-out samples'):
            whole.with_validation(other)


def test_few_labels_refuse_them():
    labelled, unlabelled, _ = labelled_split(images(name='digits'), 16, 0)
    training = SSLTraining(steps=1, batch_size=2, mu=1, progress=False)
    for val in (labelled, ImageBatches(labelled.select([3, 1]), 2)):
        for call in (
            lambda: train_ssl(net(4), FixMatch(), labelled, unlabelled, val=val, training=training),
            lambda: distill_ssl(net(4), never, labelled, unlabelled, val, training=training),
        ):
            with pytest.raises(ValueError, match='val(:| is labelled itself)'):
                call()


def test_a_plain_training_may_evaluate_on_what_it_learns():
    train, val = of_lists()
    assert distill(net(), None, train, train, training=QUIET).metrics['val_loss'] > 0
    alone = Training(epochs=1, progress=False, include_validation=False)
    assert len(distill(net(), None, train, val, weighting=Fixed(torch.ones(N)), training=alone).weights) == N
    refit_last_layer(net(), train, val, refit=Refit(train=False))
