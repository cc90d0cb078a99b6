"Teachers that learn along: hand computation, who learns from whom, weights, each trained alone, faults, the training loop."

import copy, math

import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn
from teacher_cases import B, C, EXTRAS, MODULES, clones, extra, kl, network, outputs_of, random

from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.distillation.objective import AuxiliaryLoss, autocast_forward, default_outputs
from kd_aif.foundation.core import generator
from kd_aif.foundation.losses import batch_cross_entropy, kd_loss, weighted_mean
from kd_aif.models.build import build_model
from kd_aif.models.features import default_forward
from kd_aif.rivals.branches import DiversePeers, NativeEnsemble
from kd_aif.rivals.online_teachers import DeepMutualLearning, TeacherAdapter, bdkd_loss
from kd_aif.rivals.published_losses import make_feature_loss
from flat_settings import distill

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


# Deep mutual learning


def test_identical_peers_have_their_cross_entropy_left(digits):
    peer = network(1)
    found = DeepMutualLearning([peer, peer], T=2.0)([peer(digits['x'])], None, digits)
    assert torch.allclose(found, 2 * batch_cross_entropy(peer(digits['x']), digits), atol=1e-5)


@pytest.mark.parametrize('T', [1.0, 3.0])
def test_each_network_has_the_gradient_of_its_own_loss(digits, T):
    "Its cross-entropy and the mean divergence from the others, which are constants"
    peers, student = [network(1), network(2, 'cnn12')], network(0)
    ours = student(digits['x'])
    term = DeepMutualLearning(peers, T)([ours], None, digits)
    z = [p(digits['x']) for p in peers]
    fixed = [o.detach() for o in (ours, *z)]
    own = [
        (kl(fixed[1], ours, T) + kl(fixed[2], ours, T)) / 2,
        batch_cross_entropy(z[0], digits) + (kl(fixed[0], z[0], T) + kl(fixed[2], z[0], T)) / 2,
        batch_cross_entropy(z[1], digits) + (kl(fixed[0], z[1], T) + kl(fixed[1], z[1], T)) / 2,
    ]
    assert torch.allclose(term, sum(own), atol=1e-4)
    for model, loss in zip((student, *peers), own):
        parameters = list(model.parameters())
        for a, b in zip(
            torch.autograd.grad(term.mean(), parameters, retain_graph=True),
            torch.autograd.grad(loss.mean(), parameters, retain_graph=True),
        ):
            assert torch.allclose(a, b, atol=1e-5)


def test_two_students_that_learn_from_each_other_come_closer(digits):
    "With the labels alone they stay further apart"

    def apart(with_student):
        student, peer = network(0), network(1)
        mutual = DeepMutualLearning([peer])
        optimiser = torch.optim.SGD([*student.parameters(), *peer.parameters()], 0.1)
        for _ in range(15):
            ours = [student(digits['x'])]
            loss = batch_cross_entropy(ours[-1], digits) + (
                mutual(ours, None, digits) if with_student else batch_cross_entropy(peer(digits['x']), digits)
            )
            optimiser.zero_grad()
            loss.mean().backward()
            optimiser.step()
        with torch.no_grad():
            return float(kl(student(digits['x']), peer(digits['x']), 1.0).mean())

    assert apart(True) < 0.8 * apart(False)


# Balanced divergence


def test_bdkd_by_hand():
    "A student less sure than the teacher: the reverse divergence counts double, at the temperature"
    teacher, student = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.zeros(1, 3)
    forward, reverse = math.log(9 / 8) / 2, math.log(32 / 27) / 3
    assert float(bdkd_loss(student, teacher, T=1.0)) == pytest.approx(forward + 2 * reverse, rel=1e-5)
    assert float(bdkd_loss(student, teacher, 3.0, T=1.0)) == pytest.approx(forward + 3 * reverse, rel=1e-5)
    assert float(bdkd_loss(student, 2 * teacher, T=2.0)) == pytest.approx(
        4 * (forward + 2 * reverse), rel=1e-5
    )
    sure = torch.tensor([[0.8, 0.1, 0.1]]).log()
    forward, reverse = (
        sum(p * math.log(p / q) for p, q in zip(*pq))
        for pq in (((0.5, 0.25, 0.25), (0.8, 0.1, 0.1)), ((0.8, 0.1, 0.1), (0.5, 0.25, 0.25)))
    )
    assert float(bdkd_loss(sure, teacher, T=1.0)) == pytest.approx(2 * forward + reverse, rel=1e-5), (
        'a student too sure: the forward one does'
    )


@quick
@given(seeds, st.floats(0.5, 8), st.floats(0.5, 4))
def test_bdkd_lies_between_its_parts(seed, T, emphasis):
    s, t = random(B, C, seed=seed), random(B, C, seed=seed + 1)
    found, forward, reverse = bdkd_loss(s, t, emphasis, T), kd_loss(s, t, T, 'none'), kd_loss(t, s, T, 'none')
    assert torch.allclose(found, bdkd_loss(t, s, emphasis, T)), (
        'from the less sure to the surer, whoever that is'
    )
    assert torch.allclose(bdkd_loss(s, t, 1.0, T), forward + reverse)
    options = torch.stack([emphasis * forward + reverse, forward + emphasis * reverse])
    assert (
        torch.isclose(options, found).any(0).all()
        and (found >= 0).all()
        and torch.allclose(bdkd_loss(s, s + 2, emphasis, T), torch.zeros(B).double(), atol=1e-12)
    )


def test_bdkd_mixes_both_cases_in_a_batch_and_leaves_the_teacher_alone():
    t = random(B, C).requires_grad_()
    s = (torch.tensor([0.2, 5.0, 0.2, 5.0, 0.2, 5.0]).double()[:, None] * t.detach()).requires_grad_()
    found = bdkd_loss(s, t)
    for rows in ([0, 2, 4], [1, 3, 5]):
        assert torch.allclose(found[rows], bdkd_loss(s[rows], t[rows]))
    found.sum().backward()
    assert t.grad is None and s.grad.any()


# An adapter for the teacher


def test_an_adapter_that_says_nothing_is_plain_distillation(digits, teacher_outputs):
    ours, adapter = outputs_of(digits), TeacherAdapter(teacher_outputs, T=3.0, alpha=2.0)
    found = adapter(ours, teacher_outputs, digits)
    plain = 2 * kd_loss(ours[-1], teacher_outputs[-1], 3.0, 'none')
    assert torch.equal(adapter.adapted(teacher_outputs), teacher_outputs[-1]) and torch.allclose(
        found, plain + batch_cross_entropy(teacher_outputs[-1], digits), atol=1e-4
    )
    assert torch.allclose(
        *(torch.autograd.grad(o.mean(), ours[-1], retain_graph=True)[0] for o in (found, plain)), atol=1e-6
    )


def test_the_adapter_meets_the_student_and_keeps_to_the_labels(digits, teacher_outputs):
    "Trained alone against a student that stands still, it comes closer to it; without the divergence it learns the labels alone"
    ours = [o.detach() for o in outputs_of(digits)]

    def trained(alpha):
        adapter = TeacherAdapter(teacher_outputs, alpha=alpha)
        optimiser = torch.optim.Adam(adapter.parameters(), 1e-2)
        for _ in range(40):
            optimiser.zero_grad()
            adapter(ours, teacher_outputs, digits).mean().backward()
            optimiser.step()
        with torch.no_grad():
            z = adapter.adapted(teacher_outputs)
            return float(kl(z, ours[-1], 4.0).mean()), float(batch_cross_entropy(z, digits).mean())

    (near, near_ce), (far, far_ce) = trained(1.0), trained(1e-6)
    assert near < 0.5 * far and far_ce < near_ce < float(
        batch_cross_entropy(teacher_outputs[-1], digits).mean()
    )


def test_the_teacher_itself_rests(digits, teacher_outputs):
    theirs = clones(teacher_outputs)
    adapter = TeacherAdapter(theirs)
    adapter(outputs_of(digits), theirs, digits).mean().backward()
    assert all(o.grad is None for o in theirs) and adapter.adapter[-1].weight.grad.any()


# One value per sample, for all


@pytest.mark.parametrize('name', EXTRAS)
def test_a_sample_of_weight_zero_has_no_gradient(name, digits, teacher_outputs):
    "In eval mode, where batch normalisation does not mix samples; its neighbours have one"
    student = network(0).eval()
    x = digits['x'].clone().requires_grad_()
    batch = digits | dict(x=x)
    ours = default_outputs(student, batch)
    term = extra(name, ours, teacher_outputs)
    losses = (term.eval() if isinstance(term, nn.Module) else term)(ours, teacher_outputs, batch)
    weighted_mean(losses, torch.ones(60).index_fill(0, torch.tensor([7]), 0.0)).backward()
    assert losses.shape == (60,) and losses.isfinite().all() and not x.grad[7].any() and x.grad[8].any()


@pytest.mark.parametrize('name', EXTRAS)
def test_values_follow_their_samples(name, digits, teacher_outputs):
    p = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    ours = [o.detach() for o in outputs_of(digits)]
    term = extra(name, ours, teacher_outputs)
    if isinstance(term, nn.Module):
        term.eval()
    with torch.no_grad():
        found, other = (
            term(ours, teacher_outputs, digits),
            term([o[p] for o in ours], [o[p] for o in teacher_outputs], {k: v[p] for k, v in digits.items()}),
        )
    assert torch.allclose(other, found[p], atol=1e-4)


@pytest.mark.parametrize('name', MODULES)
def test_everything_that_learns_has_a_gradient(name, digits, teacher_outputs):
    ours = outputs_of(digits)
    term = extra(name, ours, teacher_outputs)
    if name == 'pesf':
        nn.init.normal_(term.adapter[-1].weight)
    term(ours, teacher_outputs, digits).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in term.parameters()) and sum(
        bool(p.grad.any()) for p in term.parameters()
    ) == len(list(term.parameters()))


@pytest.mark.parametrize('name', ['one', 'okddip', 'pesf'])
def test_first_weights_are_a_function_of_the_seed(name, digits, teacher_outputs):
    ours = outputs_of(digits)

    def made(seed):
        return dict(
            one=lambda: NativeEnsemble([network(1)], ours, seed=seed),
            okddip=lambda: DiversePeers([network(1), network(2)], ours, seed=seed),
            pesf=lambda: TeacherAdapter(teacher_outputs, seed=seed),
        )[name]().state_dict()

    before = torch.get_rng_state()
    a, b, c = made(0), made(0), made(1)
    assert torch.equal(torch.get_rng_state(), before), 'the global generator is left alone'
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize('name', EXTRAS)
def test_falls_when_trained_alone(name, digits, teacher_outputs):
    student = network(0)
    term = extra(name, default_outputs(student, digits), teacher_outputs)
    optimiser, found = (
        torch.optim.Adam(
            [*student.parameters(), *(term.parameters() if isinstance(term, nn.Module) else [])], 1e-2
        ),
        [],
    )
    for _ in range(40):
        value = term(default_outputs(student, digits), teacher_outputs, digits).mean()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        found.append(float(value.detach()))
    assert found[-1] < {'pesf': 0.85}.get(name, 0.5) * found[0] and all(
        map(math.isfinite, found)
    )  # an adapter begins at zero, on features that nobody trained


# In the training loop


@pytest.mark.parametrize(
    'name, size', [*((name, 'cnn8') for name in EXTRAS), ('one', 'resnet8x4'), ('okddip', 'resnet8x4')]
)
def test_every_method_trains_in_the_loop_under_weights(name, size, sets):
    "With its parameters along, and without a trained teacher where it needs none"
    train, val = sets
    student, teacher, first = (
        build_model(size, 10, 1, seed=1),
        network(0, 'cnn16'),
        next(iter(train.eval_view())),
    )
    ours, theirs = (default_outputs(m, first) for m in (student, teacher))
    term = dict(
        one=lambda: NativeEnsemble([build_model(size, 10, 1, seed=2)], ours),
        okddip=lambda: DiversePeers([build_model(size, 10, 1, seed=s) for s in (2, 3)], ours),
    ).get(name, lambda: extra(name, ours, theirs))()
    before = copy.deepcopy(term.state_dict()) if isinstance(term, nn.Module) else {}
    w = torch.rand(160, generator=generator(0)) + 0.5
    run = distill(
        student,
        teacher if name in ('bdkd', 'pesf') else None,
        train,
        val,
        weights=w,
        auxiliary=AuxiliaryLoss(term),
        epochs=1 if size != 'cnn8' else 2,
        lr=0.02,
        alpha=0.0,
        progress=False,
    )
    assert all(p.isfinite().all() for p in student.parameters()) and 0 < run.metrics['val_accuracy'] <= 1
    moved = {k.split('.')[0] for k, v in before.items() if not torch.equal(v, term.state_dict()[k])}
    assert (
        moved
        >= dict(
            dml={'peers'},
            one={'branches', 'gate'},
            okddip={'branches', 'query', 'key'},
            pesf={'adapter'},
            bdkd=set(),
        )[name]
    )


@pytest.mark.parametrize('name', ['dml', 'one', 'okddip'])
def test_what_has_no_weight_teaches_no_network(name, sets):
    "Other labels of samples without weight change nothing, in the student or beside it"
    train, val = sets

    def trained(shift):
        class Relabelled:
            def __iter__(self):
                return (
                    {**b, 'y': torch.where(b['index'] % 3 == 0, (b['y'] + shift) % 10, b['y'])}
                    for b in train.eval_view()
                )

        student = network(1)
        term = extra(name, default_outputs(student, next(iter(train.eval_view()))), None)
        w = torch.cat([(b['index'] % 3 != 0).float() for b in train.eval_view()])
        distill(
            student,
            None,
            Relabelled(),
            val,
            weights=w,
            auxiliary=AuxiliaryLoss(term),
            epochs=1,
            lr=0.02,
            progress=False,
        )
        return [*student.parameters(), *term.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(trained(0), trained(1)))


@pytest.mark.parametrize('name', ['dml', 'one', 'okddip'])
def test_lower_precision_reaches_the_networks_beside_the_student(name, sets):
    train, val = sets
    kinds, lower = [], autocast_forward(default_forward, torch.bfloat16)

    def seen(model, batch):
        hook = model[-1].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
        try:
            return lower(model, batch)
        finally:
            hook.remove()

    student = network(1)
    ours = default_outputs(student, next(iter(train.eval_view())))
    term = dict(
        dml=lambda: DeepMutualLearning([network(2)], forward=seen),
        one=lambda: NativeEnsemble([network(2)], ours, forward=seen),
        okddip=lambda: DiversePeers([network(2), network(3)], ours, forward=seen),
    )[name]()
    run = distill(
        student,
        None,
        train,
        val,
        auxiliary=AuxiliaryLoss(term),
        epochs=1,
        lr=0.02,
        autocast=torch.bfloat16,
        progress=False,
    )
    assert set(kinds) == {torch.bfloat16} and math.isfinite(run.history[-1]['loss'])


def test_a_peer_helps_more_than_labels_alone_would_say(sets):
    "The divergence is part of the gradient of the student: it ends elsewhere than without the peer"
    train, val = sets

    def trained(extra):
        return (
            distill(network(1), None, train, val, auxiliary=extra, epochs=1, lr=0.02, progress=False)
            .student[-1]
            .weight
        )

    assert not torch.allclose(trained(AuxiliaryLoss(DeepMutualLearning([network(2)]))), trained(None))


# Mistakes


def maps():
    return outputs_of(next(iter(ImageBatches(load_images('digits'), 8, shuffle=False))))


FAULTS = {
    'no peers': (lambda: DeepMutualLearning([]), 'peers is empty'),
    'temperature': (lambda: DeepMutualLearning([network(0)], T=0.0), 'T is 0'),
    'emphasis': (lambda: bdkd_loss(random(B, C), random(B, C), emphasis=0.0), 'emphasis is 0'),
    'classes': (lambda: bdkd_loss(random(B, C), random(B, 3)), 'same number of classes'),
    'hidden': (lambda: TeacherAdapter(maps(), hidden=0), 'hidden is 0'),
    'alpha': (lambda: TeacherAdapter(maps(), alpha=-1.0), 'alpha is'),
    'no teacher': (lambda: TeacherAdapter(maps())(maps(), None, {}), 'needs a trained teacher'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_name_the_argument(fault):
    mistake, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        mistake()


@pytest.mark.parametrize('name', ['pesf', 'bdkd', 'a feature loss'])
def test_what_needs_a_teacher_says_so_before_training(name, sets, teacher_outputs, digits):
    student = network(0)
    before = copy.deepcopy(student.state_dict())
    loss = (
        make_feature_loss('sp', outputs_of(digits), teacher_outputs)
        if name == 'a feature loss'
        else extra(name, None, teacher_outputs)
    )
    with pytest.raises(ValueError, match='teacher'):
        distill(student, None, *sets, auxiliary=AuxiliaryLoss(loss), epochs=1, progress=False)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())
