"Teachers that train along: hand computation, identities, who learns from whom, weights, that each falls when trained alone, and the training loop."

import copy, math

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn
from kd_aif.foundation.core import generator
from kd_aif.data.images import hold_out, subset
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.data.mixed_batches import MixedBatches
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import Extra, autocast_forward, default_outputs
from kd_aif.rivals.published_losses import make_feature_loss
from kd_aif.foundation.losses import batch_cross_entropy, kd_loss, weighted_mean
from kd_aif.models.build import build_model
from kd_aif.models.features import default_forward
from kd_aif.rivals.assistants import ASSISTANTS, assistant_name, distill_in_steps
from kd_aif.rivals.online_teachers import (
    DeepMutualLearning,
    DiversePeers,
    NativeEnsemble,
    TeacherAdapter,
    bdkd_loss,
    last_part,
)

quick = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
B, C = 6, 4
EXTRAS = 'dml', 'one', 'okddip', 'pesf', 'bdkd'
MODULES = EXTRAS[:-1]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed, name='cnn8'):
    return build_model(name, 10, 1, seed=seed)


def kl(p, q, T):
    return F.kl_div((q / T).log_softmax(1), (p / T).softmax(1), reduction='none').sum(1) * T * T


def clones(outputs):
    return [o.detach().clone().requires_grad_() for o in outputs]


@pytest.fixture(scope='module')
def digits():
    return next(iter(ImageBatches(load_images('digits'), 60, shuffle=False)))


@pytest.fixture(scope='module')
def teacher_outputs(digits):
    with torch.no_grad():
        return default_outputs(network(5, 'cnn16').eval(), digits)


def outputs_of(digits, name='cnn8', seed=0):
    return default_outputs(network(seed, name), digits)


def extra(name, student, teacher):
    "The term of a method, of untrained networks"
    return dict(
        dml=lambda: DeepMutualLearning([network(1, 'cnn16')]),
        one=lambda: NativeEnsemble([network(1), network(2)], student),
        okddip=lambda: DiversePeers([network(1), network(2), network(3)], student),
        pesf=lambda: TeacherAdapter(teacher),
        bdkd=lambda: lambda s, t, batch: bdkd_loss(s[-1], t[-1]),
    )[name]()


# Teacher assistant


def test_the_assistant_learns_from_the_teacher_and_the_student_from_the_assistant():
    train, val = (
        ImageBatches(d, 32, seed=0) for d in hold_out(subset(load_images('digits'), 160, 0), 60, seed=0)
    )
    settings = dict(epochs=1, lr=0.05, progress=False, seed=0)
    teacher, assistant, student = network(0, 'cnn12'), network(1, 'cnn10'), network(2)
    before = copy.deepcopy(teacher.state_dict())
    by_hand = copy.deepcopy(assistant), copy.deepcopy(student)
    runs = distill_in_steps([teacher, assistant, student], train, val, val, **settings)
    distill(by_hand[0], teacher, train, val, **settings)
    distill(by_hand[1], by_hand[0], train, val, **settings)
    for ours, theirs in zip((assistant, student), by_hand):
        for p, q in zip(ours.state_dict().values(), theirs.state_dict().values()):
            assert torch.equal(p, q)
    assert [run.teacher for run in runs] == [teacher, assistant] and runs[-1].student is student
    assert 'test_accuracy' in runs[-1].metrics and 'test_accuracy' not in runs[0].metrics
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())


def test_another_teacher_makes_another_assistant_and_so_another_student():
    train, val = (
        ImageBatches(d, 32, seed=0) for d in hold_out(subset(load_images('digits'), 120, 0), 60, seed=0)
    )
    found = [
        distill_in_steps(
            [network(seed, 'cnn12'), network(1, 'cnn10'), network(2)],
            train,
            val,
            epochs=1,
            lr=0.05,
            progress=False,
        )[-1].student
        for seed in (0, 7)
    ]
    assert not torch.equal(*(s[-1].weight for s in found))


@pytest.mark.parametrize(
    'teacher, student, assistant',
    [
        ('cnn32', 'cnn16', 'cnn24'),
        ('cnn16', 'cnn8', 'cnn12'),
        ('mlp64', 'mlp16', 'mlp40'),
        *((*pair, a) for pair, a in ASSISTANTS.items()),
    ],
)
def test_an_assistant_is_between(teacher, student, assistant):
    assert assistant_name(teacher, student) == assistant
    sizes = [
        sum(p.numel() for p in build_model(name, 10, 3, seed=0).parameters())
        for name in (teacher, assistant, student)
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


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


# Branches


@pytest.mark.parametrize(
    'name',
    ['cnn8', 'mlp16', 'resnet8x4', 'wrn_16_2', 'vgg8', 'mobilenetv2_half', 'shufflenetv1', 'shufflenetv2'],
)
def test_the_last_part_is_what_comes_after_its_place(name):
    model = build_model(name, 7, 1, seed=0, in_features=1024).eval()
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = default_outputs(model, dict(x=x))
        place, part = last_part(model)
        shared = outputs[place].clone()
        assert torch.allclose(part(outputs[place]), outputs[-1], atol=1e-5) and torch.equal(
            outputs[place], shared
        ), 'a branch leaves the shared map as it is'
    mine = {id(p) for p in model.parameters()}
    assert {id(p) for p in part.parameters()} < mine


def test_branches_begin_differently_and_share_the_rest(digits):
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1), network(2)], ours)
    a, b = (z for _, z in one.outputs(ours))
    assert not torch.allclose(a, b) and not torch.allclose(a, ours[-1])
    (gradient,) = torch.autograd.grad(one(ours, None, digits).mean(), ours[one.place])
    assert gradient.any(), 'the early layers learn from the branches too'


def test_a_uniform_gate_makes_the_mean_of_logits_and_one_by_hand(digits):
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1), network(2)], ours, T=2.0)
    for p in one.gate.parameters():
        nn.init.zeros_(p)
    ensemble, members = one.ensemble(ours)
    assert (
        torch.allclose(one.importance(ours), torch.full((60, 3), 1 / 3))
        and torch.allclose(ensemble, members.mean(1), atol=1e-5)
        and torch.equal(members[:, 0], ours[-1])
    )
    expected = (
        batch_cross_entropy(ensemble, digits)
        + sum(batch_cross_entropy(members[:, i], digits) for i in (1, 2))
        + sum(kl(ensemble, members[:, i], 2.0) for i in range(3))
    )
    assert torch.allclose(one(ours, None, digits), expected, atol=1e-4)


def test_the_gate_weighs(digits):
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1)], ours)
    assert (
        torch.allclose(one.importance(ours).sum(1), torch.ones(60)) and one.importance(ours).std(0).min() > 0
    )
    one.gate = nn.Sequential(nn.Linear(ours[one.place].shape[1], 2))
    with torch.no_grad():
        one.gate[0].weight.zero_()
        one.gate[0].bias.copy_(torch.tensor([0.0, 30.0]))
    assert torch.allclose(one.ensemble(ours)[0], one.outputs(ours)[0][1], atol=1e-4)


def test_the_ensemble_teaches_and_is_not_taught_by_the_divergence(digits):
    "Without the ensemble's cross-entropy the gate has no gradient"
    ours = outputs_of(digits)
    one = NativeEnsemble([network(1), network(2)], ours)
    gate = one.gate[0].weight
    (found,) = torch.autograd.grad(one(ours, None, digits).mean(), gate)
    (alone,) = torch.autograd.grad(batch_cross_entropy(one.ensemble(ours)[0], digits).mean(), gate)
    assert found.any() and torch.allclose(found, alone, atol=1e-6)


def test_attention_rows_sum_to_one_and_follow_the_features(digits):
    ours = outputs_of(digits)
    peers = DiversePeers([network(s) for s in (1, 2, 3)], ours)
    features = torch.stack([f for f, _ in peers.outputs(ours)], 1)
    a = peers.attention(features)
    assert (
        a.shape == (60, 3, 3)
        and torch.allclose(a.sum(-1), torch.ones(60, 3), atol=1e-6)
        and (a > 0).all()
        and not torch.allclose(a, a.mT)
    ), 'not symmetric: each peer has targets of its own'
    q, k = (features[5] @ w.T for w in (peers.query.weight, peers.key.weight))
    for row in range(3):
        assert torch.allclose(a[5, row], torch.stack([q[row] @ k[b] for b in range(3)]).softmax(0), atol=1e-6)


def test_okddip_by_hand(digits):
    ours = outputs_of(digits)
    peers = DiversePeers([network(s) for s in (1, 2)], ours, T=2.0)
    (f0, z0), (f1, z1) = peers.outputs(ours)
    a = peers.attention(torch.stack([f0, f1], 1))
    targets = [a[:, i, :1] * z0 + a[:, i, 1:] * z1 for i in (0, 1)]
    expected = (
        batch_cross_entropy(z0, digits)
        + batch_cross_entropy(z1, digits)
        + kl(targets[0], z0, 2.0)
        + kl(targets[1], z1, 2.0)
        + kl((z0 + z1) / 2, ours[-1], 2.0)
    )
    assert torch.allclose(peers(ours, None, digits), expected, atol=1e-4)


def test_the_attention_learns_through_the_targets(digits):
    ours = outputs_of(digits)
    peers = DiversePeers([network(s) for s in (1, 2)], ours)
    peers(ours, None, digits).mean().backward()
    assert peers.query.weight.grad.any() and peers.key.weight.grad.any()


@pytest.mark.parametrize('kind', [NativeEnsemble, DiversePeers])
def test_lessons_begin_slowly_and_only_training_counts(kind, digits):
    ours = outputs_of(digits)

    def made(**more):
        return kind([network(1), network(2)], ours, **more)

    slow, full = made(ramp_up=10), made()
    first, late = slow(ours, None, digits), full(ours, None, digits)
    without = [(late - first).mean().item()]
    assert int(slow.steps) == 1 and int(full.steps) == 0 and without[0] > 0
    shares = torch.stack([torch.as_tensor(slow.share()) for _ in range(12)])
    assert (
        shares[8].item() == pytest.approx(math.exp(-5 * 0.01), rel=1e-4)
        and (shares.diff() >= 0).all()
        and torch.equal(shares[9:], torch.ones(3))
    )
    steps = int(slow.steps)
    slow.eval().share()
    assert int(slow.steps) == steps
    assert torch.allclose(slow.train()(ours, None, digits), late, atol=1e-5)


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


@pytest.fixture(scope='module')
def sets():
    return [ImageBatches(d, 32, seed=0) for d in hold_out(subset(load_images('digits'), 220, 0), 60, seed=0)]


@pytest.mark.parametrize(
    'name, size', [*((name, 'cnn8') for name in EXTRAS), ('one', 'resnet8x4'), ('okddip', 'resnet8x4')]
)
def test_every_method_trains_in_the_loop_under_weights(name, size, sets):
    "With its parameters along, and without a trained teacher where it needs none"
    train, val = sets
    student, teacher, first = build_model(size, 10, 1, seed=1), network(0, 'cnn16'), next(iter(train.plain()))
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
        extra=Extra(term),
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

    def trained(wrong):
        class Relabelled:
            def __iter__(self):
                return (
                    {**b, 'y': torch.where(b['index'] % 3 == 0, (b['y'] + wrong) % 10, b['y'])}
                    for b in train.plain()
                )

        student = network(1)
        term = extra(name, default_outputs(student, next(iter(train.plain()))), None)
        w = torch.cat([(b['index'] % 3 != 0).float() for b in train.plain()])
        distill(
            student, None, Relabelled(), val, weights=w, extra=Extra(term), epochs=1, lr=0.02, progress=False
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
    ours = default_outputs(student, next(iter(train.plain())))
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
        extra=Extra(term),
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
            distill(network(1), None, train, val, extra=extra, epochs=1, lr=0.02, progress=False)
            .student[-1]
            .weight
        )

    assert not torch.allclose(trained(Extra(DeepMutualLearning([network(2)]))), trained(None))


# Mistakes


def maps():
    return outputs_of(next(iter(ImageBatches(load_images('digits'), 8, shuffle=False))))


FAULTS = {
    'no assistant': (lambda: distill_in_steps([network(0), network(1)], [], []), 'models has 2 networks'),
    'unknown pair': (lambda: assistant_name('cnn32', 'resnet20'), 'ASSISTANTS'),
    'no peers': (lambda: DeepMutualLearning([]), 'peers is empty'),
    'temperature': (lambda: DeepMutualLearning([network(0)], T=0.0), 'T is 0'),
    'emphasis': (lambda: bdkd_loss(random(B, C), random(B, C), emphasis=0.0), 'emphasis is 0'),
    'classes': (lambda: bdkd_loss(random(B, C), random(B, 3)), 'same number of classes'),
    'hidden': (lambda: TeacherAdapter(maps(), hidden=0), 'hidden is 0'),
    'alpha': (lambda: TeacherAdapter(maps(), alpha=-1.0), 'alpha is'),
    'no teacher': (lambda: TeacherAdapter(maps())(maps(), None, {}), 'needs a trained teacher'),
    'no branches': (lambda: NativeEnsemble([], maps()), 'models is empty'),
    'one peer': (lambda: DiversePeers([network(0)], maps()), 'models has 1'),
    'ramp_up': (lambda: NativeEnsemble([network(0)], maps(), ramp_up=-1), 'ramp_up is -1'),
    'other width': (lambda: NativeEnsemble([network(0, 'cnn12')], maps()), 'does not fit'),
    'other classes': (
        lambda: NativeEnsemble([build_model('cnn8', 7, 1, seed=0)], maps()),
        'new networks of its architecture',
    ),
    'unknown network': (lambda: last_part(nn.Linear(3, 3)), 'model Linear has no stages'),
    'one rectifier': (
        lambda: last_part(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))),
        'two rectifiers',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_name_the_argument(fault):
    mistake, says = FAULTS[fault]
    with pytest.raises(ValueError, match=says):
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
        distill(student, None, *sets, extra=Extra(loss), epochs=1, progress=False)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())
