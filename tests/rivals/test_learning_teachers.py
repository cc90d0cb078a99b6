"Teachers that learn from their student: the exact gradient, what is left alone, the training loop, checkpoints, faults."

import copy, math

import pytest, torch
from torch import nn
from torch.func import functional_call

from kd_aif.data.training_set import TrainingSet
from kd_aif.distillation.checkpoint import Checkpoint, Stopped
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import AuxiliaryLoss, Objective, regression_objective
from kd_aif.distillation.schedules import Every, Online
from kd_aif.distillation.trainer import Fit, Training
from kd_aif.distillation.weighting import Fixed, Published, Reweighting
from kd_aif.foundation.losses import batch_cross_entropy, softened_divergence
from kd_aif.rivals.learning_teachers import (
    EndlessBatches, LGTM, Lesson, MetaDistil, take_lesson, validation_gradient_of_teacher,
)  # fmt: skip
from kd_aif.rivals.logit_losses import dist_loss

KINDS = MetaDistil, LGTM


def layers(seed, *sizes, dtype=torch.float64):
    torch.manual_seed(seed)
    parts = []
    for a, b in zip(sizes, sizes[1:]):
        parts += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*parts[:-1]).to(dtype)


def points(n, seed, c=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g, dtype=dtype)
    y = torch.randint(c, (n,), generator=g) if c > 1 else x.sum(1)
    return dict(x=x, y=y, index=torch.arange(n))


def by_autograd(lesson, teacher, kd):
    "d/dt L_val(θ − η∇L_S(θ, t)), with the distillation term kd(student logits, teacher logits)"
    theta, o = dict(lesson.student.named_parameters()), lesson.objective
    w = torch.ones(len(lesson.batch['y'])) if lesson.weights is None else lesson.weights
    z = functional_call(lesson.student, theta, (lesson.batch['x'],))
    loss = (1 - o.alpha) * o.label_loss(z, lesson.batch) + o.alpha * kd(z, teacher(lesson.batch['x']))
    gradient = torch.autograd.grad((w * loss).mean(), list(theta.values()), create_graph=True)
    moved = {k: p - lesson.lr * g for (k, p), g in zip(theta.items(), gradient)}
    after = functional_call(lesson.student, moved, (lesson.val_batch['x'],))
    val_loss = lesson.val_loss or o.label_loss
    return torch.autograd.grad(val_loss(after, lesson.val_batch).mean(), list(teacher.parameters()))


def kl(T):
    def loss(s, t):
        p = (t / T).softmax(1)
        return T * T * (p * (p.log() - (s / T).log_softmax(1))).sum(1)

    return loss


def close(found, exact, relative=1e-4):
    found, exact = (nn.utils.parameters_to_vector(list(g)) for g in (found, exact))
    return float((found - exact).norm()) < relative * float(exact.norm())


# The gradient


@pytest.mark.parametrize('sizes', [(2, 3), (2, 6, 3)], ids=['linear', 'deep'])
@pytest.mark.parametrize('lr', [0.01, 1.0])
def test_the_gradient_is_that_of_autograd_through_the_virtual_step(sizes, lr):
    student, teacher = layers(0, *sizes), layers(1, 2, 4, 3)
    objective = Objective(T=2.0, alpha=0.7)
    lesson = Lesson(student, points(12, 0), points(9, 1), objective, lr)
    assert close(validation_gradient_of_teacher(lesson, teacher), by_autograd(lesson, teacher, kl(2.0)))


def test_weights_count_and_another_validation_loss_is_followed():
    student, teacher, objective = layers(0, 2, 5, 3), layers(1, 2, 3), Objective(T=1.0, alpha=0.5)
    w = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = Lesson(student, points(12, 0), points(9, 1), objective, 0.3)
    lesson = Lesson(
        student, points(12, 0), points(9, 1), objective, 0.3, w, lambda z, batch: z[:, 0] * z[:, 1]
    )
    found, exact = validation_gradient_of_teacher(lesson, teacher), by_autograd(lesson, teacher, kl(1.0))
    assert close(found, exact) and not close(validation_gradient_of_teacher(plain, teacher), exact, 0.1)


def test_the_gradient_of_a_regression():
    student, teacher = layers(0, 2, 5, 1), layers(1, 2, 4, 1)
    lesson = Lesson(student, points(12, 0, 1), points(9, 1, 1), regression_objective(0.6), 0.2)
    exact = by_autograd(lesson, teacher, lambda s, t: 0.5 * (s - t)[:, 0] ** 2)
    assert close(validation_gradient_of_teacher(lesson, teacher), exact)


def test_the_auxiliary_gradient_is_added():
    student, teacher, objective = layers(0, 2, 5, 3), layers(1, 2, 4, 3), Objective(T=2.0, alpha=0.7)
    lesson = Lesson(student, points(12, 0), points(9, 1), objective, 0.3)
    auxiliary = LGTM(lr=0.1, alpha_teacher=0.3, T=3.0).auxiliary_of(lesson)
    z = teacher(lesson.batch['x'])
    s = student(lesson.batch['x']).detach()
    p = (s / 3).softmax(1)
    distance = 9 * (p * (p.log() - (z / 3).log_softmax(1))).sum(1)
    own = torch.autograd.grad(
        (0.7 * batch_cross_entropy(z, lesson.batch) + 0.3 * distance).mean(), list(teacher.parameters())
    )
    influence = by_autograd(lesson, teacher, kl(2.0))
    found = validation_gradient_of_teacher(lesson, teacher, auxiliary=auxiliary)
    assert close(found, [a + b for a, b in zip(own, influence)])


def test_a_validation_loss_without_gradient_asks_nothing_of_the_teacher():
    student, teacher = layers(0, 2, 5, 3), layers(1, 2, 3)
    lesson = Lesson(
        student, points(8, 0), points(8, 1), Objective(), 0.1, val_loss=lambda z, batch: 0 * z.sum(1)
    )
    found = validation_gradient_of_teacher(lesson, teacher)
    assert all(g.isfinite().all() and not g.any() for g in found)


def test_a_frozen_part_of_the_student_and_one_without_part_in_the_loss():
    student, teacher = layers(0, 2, 5, 3), layers(1, 2, 3)
    student.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    student[0].requires_grad_(False)
    half = Objective(T=2.0, alpha=0.5, forward=lambda model, batch: model[2](model[1](model[0](batch['x']))))
    lesson = Lesson(student, points(12, 0), points(9, 1), half, 0.4)
    inner = copy.deepcopy(student)
    features = nn.Sequential(*inner[:2])
    at = {
        k: getattr(lesson, k) | dict(x=features(getattr(lesson, k)['x']).detach())
        for k in ('batch', 'val_batch')
    }
    head = Lesson(inner[2], **at, objective=Objective(T=2.0, alpha=0.5), lr=0.4)
    with torch.no_grad():
        answer = teacher(lesson.batch['x'])
    told = nn.ParameterList([nn.Parameter(answer.clone())])  # a teacher whose logits are parameters
    talking = Objective(
        T=2.0, alpha=0.5, forward=lambda m, b: m[0] if isinstance(m, nn.ParameterList) else half.forward(m, b)
    )
    found = validation_gradient_of_teacher(
        Lesson(student, lesson.batch, lesson.val_batch, talking, 0.4), told
    )
    theta = dict(head.student.named_parameters())
    z = functional_call(head.student, theta, (head.batch['x'],))
    loss = 0.5 * batch_cross_entropy(z, head.batch) + 0.5 * kl(2.0)(z, told[0])
    gradient = torch.autograd.grad(loss.mean(), list(theta.values()), create_graph=True)
    moved = {k: p - 0.4 * g for (k, p), g in zip(theta.items(), gradient)}
    after = functional_call(head.student, moved, (head.val_batch['x'],))
    exact = torch.autograd.grad(batch_cross_entropy(after, head.val_batch).mean(), [told[0]])
    assert close(found, exact)


# What is left alone


class Noisy(nn.Module):
    "Dropout, batch normalisation, a buffer"

    def __init__(self, seed):
        super().__init__()
        self.net = layers(seed, 2, 6, 3, dtype=torch.float32)
        self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.5)

    def forward(self, x):
        return self.net(self.drop(self.norm(x)))


def floats(n, seed, c=3):
    return points(n, seed, c, torch.float32)


@pytest.mark.parametrize('fails', [False, True])
def test_networks_modes_gradients_and_random_numbers_stay_as_they_were(fails):
    student, teacher = Noisy(0), Noisy(1)
    student.train(), teacher.train()
    student.drop.eval()
    calls = []

    def forward(model, batch):
        calls.append(model)
        if fails and len(calls) == 5:
            raise RuntimeError('the fifth pass fails')
        return model(batch['x'])

    lesson = Lesson(student, floats(12, 0), floats(9, 1), Objective(forward=forward), 0.3)
    before = [copy.deepcopy(m.state_dict()) for m in (student, teacher)]
    identities = [id(p) for p in student.parameters()]
    numbers = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match='the fifth pass fails'):
            validation_gradient_of_teacher(lesson, teacher)
    else:
        validation_gradient_of_teacher(lesson, teacher)
    for m, state in zip((student, teacher), before):
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in m.parameters())
    assert [id(p) for p in student.parameters()] == identities
    assert student.training and student.norm.training and not student.drop.training and teacher.drop.training
    assert torch.equal(torch.get_rng_state(), numbers)
    assert len(calls) == 5 and sum(m is teacher for m in calls) == 1, 'four passes of the student'


def test_the_two_passes_along_v_are_in_full_precision():
    student, teacher, seen = layers(0, 2, 6, 3, dtype=torch.float32), layers(1, 2, 3, dtype=torch.float32), []

    def forward(model, batch):
        seen.append(torch.is_autocast_enabled('cpu'))
        return model(batch['x'])

    batches = floats(12, 0), floats(9, 1)
    found = [
        validation_gradient_of_teacher(
            Lesson(student, *batches, Objective(forward=forward), 0.3, autocast=autocast), teacher
        )
        for autocast in (torch.bfloat16, None)
    ]
    assert seen[:5] == [True, True, True, False, False] and not any(seen[5:])
    assert close(*found, 0.05)


# In the training loop


def plane(n, seed, size=16):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    y = (x.sum(1) > 0).long()
    return [dict(x=x[i], y=y[i], index=i) for i in torch.arange(n).split(size)]


def small(seed, *sizes):
    return layers(seed, 2, *sizes, 2, dtype=torch.float32)


def trained(update, student=None, teacher=None, val=None, **options):
    "A run with this update of its teacher; both networks"
    student, teacher = student or small(0, 8), teacher or small(1, 8)
    training = Training(**dict(epochs=3, lr=0.1, progress=False, cache_teacher=False) | options)
    objective = Objective(T=1.0, alpha=0.9, teacher_update=update)
    if update is not None:
        training = Training(**vars(training) | dict(cache_teacher=None))
    run = distill(student, teacher, plane(96, 0), val or plane(48, 1), objective=objective, training=training)
    return run, student, teacher


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('options', [{}, dict(autocast=torch.bfloat16)], ids=['float32', 'bfloat16'])
def test_a_teacher_that_rests_is_plain_distillation_bit_for_bit(kind, options):
    "Also with dropout and a validation loader that draws random numbers"

    class Drop(nn.Sequential):
        def __init__(self, seed):
            super().__init__(*small(seed, 8), nn.Dropout(0.3))

    samples = [{k: v[0] for k, v in b.items()} for b in plane(48, 1, 1)]
    val = torch.utils.data.DataLoader(samples, 16)
    found = [trained(u, Drop(0), Drop(1), val, **options) for u in (None, kind(lr=0))]
    assert same(found[0][1], found[1][1]) and same(found[0][2], found[1][2])
    assert found[0][0].history == found[1][0].history


@pytest.mark.parametrize('kind', KINDS)
def test_a_wrong_teacher_is_put_right(kind):
    teacher, test = small(1, 8), plane(200, 2, 200)
    flipped = [b | dict(y=1 - b['y']) for b in plane(96, 0)]
    distill(teacher, None, flipped, plane(48, 1), training=Training(epochs=20, lr=0.1, progress=False))
    losses = {}
    for name, update in dict(fixed=None, learns=kind(lr=0.05)).items():
        run, _, own = trained(update, teacher=copy.deepcopy(teacher), epochs=20)
        losses[name] = run.metrics['val_loss']
        assert same(own, teacher) == (update is None) and not own.training
    assert losses['learns'] < 0.2 * losses['fixed']


def test_lgtm_without_influence_is_the_training_of_a_teacher_by_its_own_loss():
    "With the student's learning rate near zero in the virtual step, AdamW sees the auxiliary gradient alone"
    _, student, teacher = trained(LGTM(lr=0.01, alpha_teacher=0.0, student_lr=1e-12), epochs=2)
    own = small(1, 8)
    optimizer = torch.optim.AdamW(own.parameters(), 0.01)
    schedule = Training().make_schedule(optimizer, 0.01, 12)
    for i in range(12):
        optimizer.zero_grad()
        batch = plane(96, 0)[i % 6]
        batch_cross_entropy(own(batch['x']), batch).mean().backward()
        optimizer.step()
        if i < 11:
            schedule.step()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own.parameters(), teacher.parameters()))


def constant(optimizer, lr, updates):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_the_student_takes_its_step_under_the_teacher_that_has_learnt():
    train, val = plane(16, 0), plane(16, 1)
    student, teacher, by_hand, first = small(0, 8), small(1, 8), small(0, 8), small(1, 8)
    training = Training(lr=0.1, progress=False, make_optimizer=torch.optim.SGD, make_schedule=constant)
    objective = Objective(T=2.0, alpha=0.8, teacher_update=MetaDistil(lr=50.0, make_optimizer=None))
    Fit(student, teacher, TrainingSet(train, val), lambda step: None, objective, training).train_batch(
        train[0], 0
    )
    lesson = Lesson(by_hand, train[0], val[0], objective, 0.1)
    for p, g in zip(first.parameters(), validation_gradient_of_teacher(lesson, first)):
        p.data -= 50.0 * g
    loss = objective.batch_loss(first(train[0]['x']).detach())(by_hand(train[0]['x']), train[0])
    for p, g in zip(by_hand.parameters(), torch.autograd.grad(loss.mean(), list(by_hand.parameters()))):
        p.data -= 0.1 * g
    for found, expected, start in ((teacher, first, small(1, 8)), (student, by_hand, small(0, 8))):
        for a, b, c in zip(found.parameters(), expected.parameters(), start.parameters()):
            assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, c, atol=1e-4)


def test_a_new_run_begins_anew():
    update = LGTM(lr=0.05)
    first, again = trained(update), trained(update)
    assert same(first[1], again[1]) and same(first[2], again[2])


@pytest.mark.parametrize('kind', KINDS)
def test_forward_passes_per_step(kind):
    pair, calls, steps = [small(0, 8), small(1, 8)], [0, 0], 6

    def forward(model, batch):
        calls[model is pair[1]] += 1
        return model(batch['x'])

    objective = Objective(forward=forward, teacher_update=kind(lr=0.01))
    training, data = Training(epochs=1, progress=False), TrainingSet(plane(96, 0), plane(48, 1))
    Fit(*pair, data, lambda step: None, objective, training).run()
    assert calls == [5 * steps, 2 * steps]


def test_given_weights_count_in_the_virtual_step():
    "A sample of weight zero teaches nobody: the run is that of a set in which it has another label"
    w = torch.ones(96)
    w[::3] = 0.0

    def run(train):
        student, teacher = small(0, 8), small(1, 8)
        objective = Objective(T=1.0, alpha=0.5, teacher_update=MetaDistil(lr=0.05))
        training = Training(epochs=2, progress=False, include_validation=False)
        distill(
            student, teacher, train, plane(48, 1), weighting=Fixed(w), objective=objective, training=training
        )
        return student, teacher

    found = run(plane(96, 0))
    flipped = run([b | dict(y=torch.where(w[b['index']] == 0, 1 - b['y'], b['y'])) for b in plane(96, 0)])
    assert all(same(a, b) for a, b in zip(found, flipped))


def test_texts_of_any_length_come_as_they_are():
    transformers = pytest.importorskip('transformers')

    def bert(seed):
        torch.manual_seed(seed)
        sizes = dict(vocab_size=30, hidden_size=8, num_attention_heads=2, intermediate_size=16)
        config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_labels=2)
        return transformers.BertForSequenceClassification(config)

    def texts(n, tokens, start):
        ids = torch.randint(1, 30, (n, tokens), generator=torch.Generator().manual_seed(start))
        return dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            y=torch.arange(n) % 2,
            index=torch.arange(start, start + n),
        )

    train, val = [texts(6, 4, 0), texts(6, 9, 6)], [texts(4, 5, 0), texts(6, 7, 4)]
    student, teacher = bert(0), bert(1)
    first = copy.deepcopy(teacher)
    objective = Objective(teacher_update=LGTM(lr=1e-3))
    training = Training(epochs=2, lr=1e-3, make_optimizer=torch.optim.AdamW, progress=False)
    run = distill(student, teacher, train, val, objective=objective, training=training)
    assert math.isfinite(run.metrics['val_loss']) and not same(first, teacher)


# Validation batches


def test_every_validation_batch_comes_once_in_a_round():
    batches = [dict(index=torch.tensor([i])) for i in range(4)]
    a, b, other = EndlessBatches(batches, 0), EndlessBatches(batches, 0), EndlessBatches(batches, 1)
    drawn = [[int(e.draw()['index']) for _ in range(20)] for e in (a, b, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(sorted(drawn[0][i : i + 4]) == [0, 1, 2, 3] for i in range(0, 20, 4))
    assert len({tuple(drawn[0][i : i + 4]) for i in range(0, 20, 4)}) > 1
    b.drawn = 7
    assert int(b.draw()['index']) == drawn[0][7]


# Checkpoints


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(kind, tmp_path):
    whole, left = trained(kind(lr=0.05), epochs=3), []
    path = tmp_path / 'run.safetensors'

    def stop(seconds):
        left.append(seconds)
        return len(left) == 1

    with pytest.raises(Stopped):
        trained(kind(lr=0.05), epochs=3, checkpoint=Checkpoint(path, seconds=0, stop=stop))
    update = kind(lr=0.05)
    rest = trained(update, epochs=3, checkpoint=Checkpoint(path))
    assert rest[0].history == whole[0].history
    assert same(whole[1], rest[1]) and same(whole[2], rest[2])
    finished = trained(update, epochs=3, checkpoint=Checkpoint(path))
    assert same(whole[1], finished[1]) and same(whole[2], finished[2]), 'the result is read, teacher included'
    anew = trained(update, epochs=3)
    assert same(whole[1], anew[1]) and same(whole[2], anew[2]), (
        'a state that was read does not enter another run'
    )
    with pytest.raises(ValueError, match='teacher_update'):
        trained(kind(lr=0.06), epochs=3, checkpoint=Checkpoint(path))


# Faults


class Memory:
    def __call__(self, logits, batch):
        return batch_cross_entropy(logits, batch)

    def after_step(self, logits, batch):
        pass


@pytest.mark.parametrize(
    'change, error, says',
    [
        (dict(teacher=None), ValueError, 'teacher is None'),
        (dict(objective=Objective(teacher_update=3)), TypeError, 'teacher_update is a int'),
        (dict(frozen=True), ValueError, 'teacher is frozen'),
        (dict(mechanism='student'), ValueError, "mechanism is 'student'"),
        (dict(mechanism='both', schedule=Every(1, 0)), ValueError, "mechanism is 'both'"),
        (
            dict(mechanism='student', schedule=Online(0), weighting=Published(1.0, last_layer=True)),
            ValueError,
            "mechanism is 'student'",
        ),
        (dict(weighting=Reweighting(lambda step: torch.ones(16))), ValueError, 'made in the step'),
        (dict(training=Training(cache_teacher=True)), ValueError, 'cache_teacher is True'),
        (dict(objective=Objective(alpha=0.0, teacher_update=MetaDistil(lr=0.1))), ValueError, 'alpha is 0'),
        (
            dict(
                objective=Objective(
                    auxiliary=AuxiliaryLoss(lambda s, t, b: s[-1].sum(1)), teacher_update=LGTM(lr=0.1)
                )
            ),
            ValueError,
            'auxiliary: LGTM',
        ),
        (
            dict(objective=Objective(label_loss=Memory(), teacher_update=LGTM(lr=0.1))),
            ValueError,
            'label_loss is Memory',
        ),
        (
            dict(
                objective=Objective(
                    teacher_loss=lambda s, t, T: dist_loss(s, t), teacher_update=MetaDistil(lr=0.1)
                )
            ),
            ValueError,
            'gives no gradient',
        ),
    ],
)
def test_faults_are_named_and_leave_the_student_alone(change, error, says):
    settings = dict(objective=Objective(teacher_update=MetaDistil(lr=0.1)), training=Training(progress=False))
    settings |= change
    student, teacher = small(0, 8), settings.pop('teacher', small(1, 8))
    if settings.pop('frozen', False):
        teacher.requires_grad_(False)
    with pytest.raises(error, match=says):
        distill(student, teacher, plane(96, 0), plane(48, 1), **settings)
    assert same(student, small(0, 8))


@pytest.mark.parametrize(
    'wrong, says',
    [
        (lambda: MetaDistil(lr=-0.1), 'lr is'),
        (lambda: MetaDistil(lr=math.nan), 'lr is'),
        (lambda: MetaDistil(lr=0.1, student_lr=-1.0), 'student_lr is'),
        (lambda: LGTM(lr=0.1, alpha_teacher=1.5), 'alpha_teacher is'),
        (lambda: LGTM(lr=0.1, T=0.0), 'T is'),
    ],
)
def test_numbers_out_of_range(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_feedback_is_without_graph_and_symmetric():
    student, batch = layers(0, 2, 3), points(12, 0)
    lesson = Lesson(student, batch, points(9, 1), Objective(), 0.3)
    found = take_lesson(lesson, torch.randn(12, 3, dtype=torch.float64))
    assert torch.equal(found.logits, student(batch['x'])) and not found.logits.requires_grad
    assert torch.allclose((found.ahead + found.behind) / 2, found.logits), 'a linear student'
    assert not torch.allclose(found.ahead, found.behind)
    assert softened_divergence(found.ahead, found.behind).max() > 0


@pytest.mark.parametrize('every, expected', [(1, 8), (2, 4), (3, 3)])
def test_a_teacher_learns_before_every_kth_step_of_its_student(monkeypatch, every, expected):
    import kd_aif.rivals.learning_teachers as module

    calls, original = [], module.validation_gradient_of_teacher

    def counted(*args, **options):
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(module, 'validation_gradient_of_teacher', counted)
    batches = [points(6, seed) | dict(index=torch.arange(6) + 6 * seed) for seed in range(4)]
    objective = Objective(T=2.0, alpha=0.5, teacher_update=MetaDistil(lr=1e-3, every=every))
    training = Training(epochs=2, lr=0.05, progress=False)
    distill(layers(0, 2, 3), layers(1, 2, 4, 3), batches, batches, objective=objective, training=training)
    assert len(calls) == expected


def test_every_must_be_a_whole_number():
    with pytest.raises(ValueError, match='every is 0'):
        MetaDistil(lr=1e-3, every=0)


def test_a_step_with_an_update_is_never_recorded_also_where_the_update_is_declared_static():
    from kd_aif.distillation.captured_step import loss_obstacle
    from kd_aif.foundation.core import static

    assert loss_obstacle(Objective()) is None
    for update in (static(lambda fit, batch, epoch: None), MetaDistil(lr=1e-3)):
        assert 'teacher_update' in loss_obstacle(Objective(teacher_update=update))
