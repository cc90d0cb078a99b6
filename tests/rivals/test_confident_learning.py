"Confident learning: against the published counts, folds that have not seen the sample, faults."

import sys

import pytest, torch
from torch import nn
from weight_cases import cut, linear, train

from kd_aif.rivals.confident_learning import confident_learning, out_of_fold_probabilities


def noisy(n=600, share=0.2, classes=4, seed=0):
    "Labels, a share of them replaced by the next class, and probabilities of a good model"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    is_noisy = torch.rand(n, generator=g) < share
    return (
        (4 * nn.functional.one_hot(y, classes) + 0.7 * torch.randn(n, classes, generator=g)).softmax(1),
        torch.where(is_noisy, (y + 1) % classes, y),
        is_noisy,
    )


def confident_joint(p, y):
    "Northcutt et al. (2021), eq. 1, scaled to the counts of the given labels (eq. 3): (C, C) by given and by confident class"
    classes = p.shape[1]
    threshold = torch.stack([p[y == c, c].mean() for c in range(classes)])
    above = torch.where(p >= threshold - 1e-6, p, -1.0)
    sure = above.max(1).values >= 0
    joint = torch.zeros(classes, classes).index_put_(
        (y[sure], above.argmax(1)[sure]), torch.ones(int(sure.sum())), accumulate=True
    )
    joint += torch.diag((joint.diagonal() == 0).float())
    return joint / joint.sum(1, keepdim=True) * torch.bincount(y, minlength=classes)[:, None]


def test_confident_learning_prunes_as_published():
    pytest.importorskip('cleanlab')
    p, y, is_noisy = noisy()
    w = confident_learning(p, y)
    pruned = w == 0
    assert is_noisy[pruned].double().mean() > 0.95 and pruned[is_noisy].double().mean() > 0.95
    for c in range(4):
        assert (
            float(w[y == c].mean()) == pytest.approx(1, abs=1e-5) and len(w[(y == c) & ~pruned].unique()) == 1
        )
    joint, ours = confident_joint(p, y), torch.zeros(600, dtype=torch.bool)
    for j in range(4):
        for k in set(range(4)) - {j}:
            own = (y == j).nonzero()[:, 0]
            ours[own[(p[own, k] - p[own, j]).topk(int(joint[j, k].round())).indices]] = True
    assert (ours == pruned).double().mean() > 0.99, 'but for the rounding of counts'


@pytest.mark.filterwarnings('error')
def test_confident_learning_follows_its_samples():
    pytest.importorskip('cleanlab')
    p, y, _ = noisy()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    assert torch.equal(confident_learning(p[order], y[order]), confident_learning(p, y)[order])
    assert torch.equal(confident_learning(p.double().requires_grad_(), y), confident_learning(p, y))


@pytest.mark.filterwarnings('ignore:May not flag all label issues')
def test_confident_learning_on_right_labels_and_absent_classes():
    pytest.importorskip('cleanlab')
    p, y, _ = noisy(share=0.0)
    assert (confident_learning(p, y) == 0).double().mean() < 0.02
    wide = torch.cat([p * 0.999, torch.full((600, 1), 0.001)], 1)  # a fifth class without any label
    w = confident_learning(wide, y)
    assert torch.isfinite(w).all() and (w == 0).double().mean() < 0.02
    for filter_by in ('prune_by_class', 'both', 'confident_learning', 'predicted_neq_given'):
        assert (confident_learning(p, y, filter_by) == 0).double().mean() < 0.02


def test_without_cleanlab_the_remedy_is_named(monkeypatch):
    for name in [m for m in sys.modules if m.split('.')[0] == 'cleanlab'] + ['cleanlab', 'cleanlab.filter']:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "kd_aif\[baselines\]"'):
        confident_learning(*noisy()[:2])


@pytest.mark.parametrize('folds', [2, 3])
def test_out_of_fold_probabilities_come_from_models_that_have_not_seen_the_sample(folds):
    seen = []

    class Marked(nn.Module):
        "Says 1 for class 0 exactly for samples that it was trained on"

        def __init__(self, known):
            super().__init__()
            self.register_buffer('known', known)
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, index):
            return 100 * nn.functional.one_hot((~torch.isin(index, self.known)).long(), 2).float() + self.p

    def fit(batches):
        seen.append(torch.cat([b['index'] for b in batches]))
        return Marked(seen[-1])

    data = dict(train, index=torch.arange(60) * 7 + 3)
    p = out_of_fold_probabilities(
        fit, cut(data, 16), folds, forward=lambda model, batch: model(batch['index'])
    )
    assert p.shape == (60, 2) and (p[:, 1] == 1).all() and len(seen) == folds
    assert torch.equal(torch.cat(seen).bincount()[data['index']], torch.full((60,), folds - 1))


def test_out_of_fold_probabilities_in_the_order_of_the_loader():
    model = linear().float()
    model.weight.requires_grad_(False)
    model.train()
    p = out_of_fold_probabilities(lambda batches: model, cut(train, 16), 3)
    assert torch.allclose(p, model(train['x']).softmax(1), atol=1e-6) and model.training


# Faults


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: confident_learning(torch.ones(60, 3), train['y']), r'give logits.softmax\(1\)'),
        (lambda: confident_learning(torch.full((60, 3), float('nan')), train['y']), 'must be finite'),
        (lambda: confident_learning(torch.full((60, 2), 0.5), train['y']), 'below n_classes = 2'),
        (lambda: confident_learning(torch.full((59, 3), 1 / 3), train['y']), 'one row per label'),
        (lambda: confident_learning(torch.full((60, 3), 1 / 3), train['y'], 'margin'), 'filter_by is'),
        (lambda: out_of_fold_probabilities(None, cut(train, 20), 1), 'folds is 1'),
        (lambda: out_of_fold_probabilities(None, cut(train, 20), 61), 'at least one sample in each'),
        (lambda: out_of_fold_probabilities(None, cut(train, 20), 2.0), 'folds is 2.0'),
    ],
)
def test_faults_name_argument_and_remedy(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
