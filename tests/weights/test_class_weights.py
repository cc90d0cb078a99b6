"Class weights: the gap closes at balance, noise does nothing, the measurement is the derivative it claims to be, odd data do not break it."

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from kd_aif.influence.cross_scores import last_layer_views
from kd_aif.influence.last_layer import last_layer_view
from kd_aif.influence.last_layer_curvature import LastLayerGaussNewton
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.data.training_set import TrainingSet
from kd_aif.foundation.splits import stratified_folds
from kd_aif.influence.solvers import Exact
from kd_aif.weights import class_weights as class_weights_module
from kd_aif.weights.class_weights import (
    ClassShares,
    ClassWeighting,
    ClassWeights,
    class_influence,
    split_half_reliability,
)

C, D = 5, 6


def generator(seed):
    return torch.Generator().manual_seed(seed)


def clouds(counts, seed, spread=1.5):
    "Overlapping classes, `counts[c]` samples of class c"
    g, y = generator(seed), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    centre = torch.randn(len(counts), D, generator=generator(99))
    return dict(x=centre[y] + spread * torch.randn(len(y), D, generator=g), y=y, index=torch.arange(len(y)))


def batches(data, size=64):
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, len(data['y']), size)]


def fitted(data, weights=None, ridge=1e-3):
    "A linear softmax classifier at the minimum of its weighted mean loss"
    model = nn.Linear(D, C, dtype=torch.float32)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    w = torch.ones(len(data['y'])) if weights is None else weights
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1, max_iter=300, tolerance_grad=1e-7, line_search_fn='strong_wolfe'
    )

    def closure():
        optimizer.zero_grad()
        loss = (
            w * nn.functional.cross_entropy(model(data['x']), data['y'], reduction='none')
        ).mean() + ridge * sum((p**2).sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def view(model, data, **kw):
    return last_layer_view(model, batch_cross_entropy, batches(data), progress=False, **kw)


def measured(model, train, val):
    share = torch.bincount(train['y'], minlength=C).double()
    t, v = view(model, train, max_hessians=4000), view(model, val)
    return class_influence(t, v, v, ClassShares(share / share.sum(), torch.zeros(C)))


def class_weights(train, val, include_validation=True, settings=ClassWeighting(), **kw):
    "`train` and `val` are columns, or batches"
    both = (batches(d) if isinstance(d, dict) else d for d in (train, val))
    return ClassWeights(settings, TrainingSet(*both, include_validation), C, **kw)


val = clouds([120] * C, 1)
tail = clouds([400, 200, 80, 40, 20], 2)
even = clouds([150] * C, 3)


def test_rare_classes_are_needed_and_both_halves_say_so():
    halves = measured(fitted(tail), tail, val)
    assert halves.shape == (2, C) and split_half_reliability(halves, 0.05) > 0.8
    assert halves.mean(0).argmax() >= 3 and halves.mean(0).argmin() == 0


def test_nothing_is_needed_where_both_sets_ask_for_the_same():
    "Balanced sets, and a model that is far from the minimum: influence itself would be large and agreed upon"
    model = fitted(even)
    with torch.no_grad():
        model.bias += torch.tensor([2.0, -2.0, 1.0, -1.0, 0.0])
    influence = []
    v, t = (
        last_layer_view(model, batch_cross_entropy, batches(d), None, 4000, progress=False)
        for d in (val, even)
    )
    G, gap = t.gradient_by_class(), v.gradient() - t.gradient()
    for g in (v.gradient(), gap):
        influence.append(
            G.T @ torch.linalg.solve(LastLayerGaussNewton(t).dense() + 0.01 * torch.eye(C * (D + 1)), g)
        )
    assert influence[1].std() < 0.2 * influence[0].std(), 'the gap takes out what training does by itself'
    acted = sum(
        split_half_reliability(measured(model, clouds([150] * C, 10 + i), clouds([120] * C, 50 + i)), 0.01)
        > 0
        for i in range(40)
    )
    assert acted <= 3


def test_it_is_the_slope_of_the_validation_loss():
    "Refitting with a little more weight on a class changes the validation loss as the mean of both halves says"
    model = fitted(tail)
    count = torch.bincount(tail['y'], minlength=C)

    def held_out(weights):
        return float(nn.functional.cross_entropy(fitted(tail, weights)(val['x']), val['y']).detach())

    base, slopes = held_out(torch.ones(len(tail['y']))), []
    for c in range(C):
        slopes.append(
            (base - held_out(1 + 0.05 * (tail['y'] == c).float())) / 0.05 / (count[c] / len(tail['y']))
        )
    need = measured(model, tail, val).mean(0)
    assert torch.corrcoef(torch.stack([need.double(), torch.tensor(slopes).double()]))[0, 1] > 0.95


def test_class_weights_come_to_rest():
    "Followed to the end on a convex model, the gap closes, and the validation loss falls"
    needs = class_weights(tail, val, False, ClassWeighting(eta=0.3, significance=0.2))
    ones, losses, found = torch.ones(len(tail['y'])), [], []
    for _ in range(12):
        model = fitted(tail, needs.values.float()[tail['y']])
        losses.append(float(nn.functional.cross_entropy(model(val['x']), val['y']).detach()))
        found.append(needs.measure(model, ones).double().mean(0).std())
        v = needs.step(model, ones)
        assert torch.isclose(v[tail["y"]].sum(), torch.tensor(len(tail["y"])).double())
    assert v[-1] > 1.5 * v[0] and found[-1] < 0.5 * found[0] and losses[-1] < losses[0] - 0.01


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_steps_have_no_scale_and_keep_the_order(seed, scale):
    halves = (
        torch.randn(1, 8, generator=generator(seed)).double()
        + 0.05 * torch.randn(2, 8, generator=generator(seed + 1)).double()
    )
    v = torch.rand(8, generator=generator(seed)).double() + 0.5
    new = ClassWeighting().update(v, halves)
    assert torch.allclose(new, ClassWeighting().update(v, scale * halves)) and torch.allclose(
        new, ClassWeighting().update(v, halves + 3.0)
    )
    if split_half_reliability(halves, 0.01):
        assert torch.equal((new / v).argsort(), halves.mean(0).argsort())
    else:
        assert torch.equal(new, v)


@pytest.mark.parametrize(
    'halves',
    [
        torch.zeros(2, 5),
        torch.ones(2, 5),
        torch.randn(2, 2, generator=generator(0)),
        torch.stack([torch.arange(6.0), -torch.arange(6.0)]),
    ],
    ids=['zero', 'equal', 'two classes', 'opposite'],
)
def test_nothing_to_go_by_means_rest(halves):
    assert split_half_reliability(halves) == 0 and torch.equal(
        ClassWeighting().update(torch.ones(halves.shape[1]), halves), torch.ones(halves.shape[1])
    )


def test_bad_labels_do_not_count():
    "With zero weight on wrong labels the measurement is that of the others"
    g, model = generator(5), fitted(tail)
    bad = clouds([30] * C, 6)
    bad['y'] = torch.randint(C, (150,), generator=g)
    both = {k: torch.cat([tail[k], bad[k]]) for k in tail} | dict(index=torch.arange(len(tail['y']) + 150))
    w = torch.cat([torch.ones(len(tail['y'])), torch.zeros(150)])
    needs = class_weights(both, val, False, ClassWeighting(per_class=1000))
    assert (
        split_half_reliability(needs.measure(model, w), 0.05) > 0.8
        and needs.measure(model, w).mean(0).argmin() == 0
    )


def test_what_is_asked_only_once_looks_closer():
    "With a few samples of each class the halves disagree more often than with all, and updates go on with the few"
    model, ones = fitted(tail), torch.ones(len(tail['y']))

    def wanted(first_look):
        return [
            class_weights(
                tail, val, False, ClassWeighting(per_class=2, pilot_per_class=first_look), seed=seed
            ).are_needed(model, ones)
            for seed in range(12)
        ]

    assert sum(wanted(1000)) >= 6 + sum(wanted(2))
    needs = class_weights(tail, val, False, ClassWeighting(per_class=2, pilot_per_class=1000))
    needs.are_needed(model, ones)
    assert sum(len(b['y']) for b in needs.batches[0]) == 2 * C and torch.equal(
        needs.values, torch.ones(C).double()
    )


def test_a_class_without_training_samples_changes_nothing_else():
    data = {k: v[tail['y'] != 4] for k, v in tail.items()}
    needs = class_weights(data, val, False)
    halves = needs.measure(fitted(tail), torch.ones(len(data['y'])))
    assert (
        torch.isfinite(halves).all()
        and (halves[:, 4] == 0).all()
        and torch.isfinite(needs.step(fitted(tail), torch.ones(len(data['y'])))).all()
    )


@pytest.mark.parametrize('train_on_val', [True, False])
@pytest.mark.parametrize('share', [0.1, 0.25, 0.6, 2.0])
def test_no_more_is_looked_at_than_is_allowed(share, train_on_val):
    "Updates become rare, not small: as many samples per epoch as allowed, and so many steps in one."
    settings = ClassWeighting(max_fraction=share, per_class=20)
    needs = class_weights(tail, val, train_on_val, settings)
    looked, trains = len(needs.rows) + len(val['y']), len(tail['y']) + train_on_val * len(val['y'])
    assert (
        looked / needs.epochs_between_updates
        <= share * trains
        < looked / (needs.epochs_between_updates - 1 or 0.5 * looked / (share * trains))
    )
    assert [epoch for epoch in range(30) if needs.due(epoch)] == list(
        range(2, 30, needs.epochs_between_updates)
    )
    each = class_weights(tail, val, train_on_val, ClassWeighting(max_fraction=100.0, per_class=20))
    model, ones = fitted(tail), torch.ones(len(tail['y']))
    halves = each.measure(model, ones)
    assert each.epochs_between_updates == 1 and torch.equal(halves, needs.measure(model, ones))
    assert torch.allclose(
        needs.step(model, ones).log().diff(),
        needs.epochs_between_updates * each.step(model, ones).log().diff(),
    )


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(eta=-1), 'eta'),
        (dict(significance=2.0), 'significance'),
        (dict(per_class=1), 'per_class is 1'),
        (dict(start=-1), 'start is -1'),
        (dict(max_fraction=0.0), 'max_fraction is 0'),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClassWeighting(**kwargs)


def test_validation_samples_that_train_are_counted():
    "Where they alone balance the classes, nothing is needed; left out of the count, the rare classes would be"
    many = clouds([380, 380, 580, 580, 580], 7)
    few = clouds([220, 220, 20, 20, 20], 8)
    model = fitted({k: torch.cat([few[k], many[k]]) for k in few})
    counted, not_counted = (
        class_weights(few, many, t, ClassWeighting(per_class=1000)).measure(model, torch.ones(len(few['y'])))
        for t in (True, False)
    )
    assert (
        not_counted.mean(0)[2:].min() > not_counted.mean(0)[:2].max()
        and not_counted.mean(0).std() > 2 * counted.mean(0).std()
    )


def test_the_teachers_pull_is_made_up_for():
    "A student that learns from a teacher blind to the last class is short of it, though both sets are balanced"
    blind = nn.Linear(D, C)
    blind.load_state_dict(fitted(even).state_dict())
    with torch.no_grad():
        blind.bias[4] -= 4.0

    def own(logits, batch):
        return 0.5 * nn.functional.cross_entropy(
            logits, batch['y'], reduction='none'
        ) + 0.5 * nn.functional.kl_div(
            logits.log_softmax(1), batch['teacher_logits'].softmax(1), reduction='none'
        ).sum(1)

    student = nn.Linear(D, C)
    student.load_state_dict(fitted(even).state_dict())
    with torch.no_grad():
        student.bias[4] -= 1.5
    needs = class_weights(even, val, False)
    needs.add_teacher_logits(blind)
    assert (
        needs.measure(student, torch.ones(len(even['y'])), own).mean(0).argmax() == 4
        and 'teacher_logits' not in batches(val)[0]
    )


def test_a_few_rows_of_many_batches_are_looked_at_in_few():
    "What a GPU waits for is the number of passes; the measurement does not depend on it"
    model, small, large = (
        fitted(tail),
        *(class_weights(batches(tail, size), val, True, ClassWeighting(per_class=10)) for size in (16, 740)),
    )
    assert len(small.batches[0]) == len(large.batches[0]) == 1 and len(small.val) == len(
        batches(val, 512)
    ) < len(batches(val))
    assert torch.equal(torch.cat([b['index'] for b in small.batches[0]]), small.rows)
    ones = torch.ones(len(tail['y']))
    assert torch.allclose(small.measure(model, ones), large.measure(model, ones), rtol=1e-4, atol=1e-6)


def test_what_scoring_saw_answers_as_the_model_would(monkeypatch):
    "Views of all samples, in any order, instead of passes of the model: for the first look, and for what the teacher thinks"
    model, ones, calls = fitted(tail), torch.ones(len(tail['y'])), []
    ask = lambda m, b: calls.append(1) or m(b['x'])
    turned = {k: v.flip(0) for k, v in tail.items()}
    views = last_layer_views(
        model, batch_cross_entropy, batches(turned), batches(val, 50), None, ask, progress=False
    )
    asked, told = (
        class_weights(tail, val, True, ClassWeighting(per_class=10, pilot_per_class=100), forward=ask)
        for _ in range(2)
    )
    before, look = len(calls), []

    influence = class_weights_module.class_influence

    def watched(*args, **kw):
        look.append(influence(*args, **kw))
        return look[-1]

    monkeypatch.setattr(class_weights_module, 'class_influence', watched)
    for needs, seen in ((told, views), (asked, None)):
        needs.are_needed(model, ones, seen)
        needs.add_teacher_logits(model, seen)
        if seen:
            assert len(calls) == before, 'the model is not asked'
    assert len(calls) > before and torch.allclose(*look, rtol=1e-4, atol=1e-6)
    for a, b in zip((*told.batches[0], *told.val), (*asked.batches[0], *asked.val), strict=True):
        assert torch.allclose(a['teacher_logits'], b['teacher_logits'], atol=1e-5)
    with pytest.raises(ValueError, match='sample 0 is not among'):
        told.are_needed(model, ones, (views[0].select(views[0].index > 9), views[1]))


def test_the_direction_of_one_half_is_read_at_the_gradients_of_the_other():
    "By hand, with the exact curvature: no sample is compared with itself"
    model, share = fitted(tail), torch.bincount(tail['y'], minlength=C).double()
    t, v = view(model, tail, max_hessians=4000), view(model, val)
    halves = class_influence(t, v, v, ClassShares(share / share.sum(), torch.zeros(C)), solver=Exact(0.05))
    t_half, v_half = (stratified_folds(x.y, 2, 0) for x in (t, v))
    inverse = torch.linalg.inv(LastLayerGaussNewton(t).dense() + 0.05 * torch.eye(C * (D + 1)))
    G = [t.select(t_half == k).gradient_by_class() for k in (0, 1)]
    p = (share / share.sum()).float()
    gaps = [v.select(v_half == k).gradient() - G[k] @ p for k in (0, 1)]
    expected = torch.stack([(inverse @ gaps[k]) @ G[1 - k] for k in (0, 1)])
    assert torch.allclose(halves, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(halves, torch.stack([(inverse @ gaps[k]) @ G[k] for k in (0, 1)]), rtol=0.05)
