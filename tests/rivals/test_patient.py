"Patient distillation: hand computation, layers in pairs, hidden states of a tiny BERT, the training loop, faults."

import pytest, torch
from torch import nn
from torch.nn import functional as F

from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import AuxiliaryLoss, Objective, autocast_forward
from kd_aif.distillation.trainer import Training
from kd_aif.foundation.losses import batch_cross_entropy, kd_loss
from kd_aif.rivals.patient import PatientLoss, hidden_outputs, layer_map, patient_loss


def vectors(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_of(layers, seed, width=4):
    return [*(vectors(3, width, seed=10 * seed + i) for i in range(layers)), vectors(3, 2, seed=seed)]


def bert(layers, seed, **changes):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_labels=2)
    torch.manual_seed(seed)
    config = transformers.BertConfig(**sizes | dict(num_hidden_layers=layers) | changes)
    return transformers.BertForSequenceClassification(config)


def texts(n=12, tokens=6):
    "The first word says the class"
    ids = torch.randint(1, 60, (n, tokens), generator=torch.Generator().manual_seed(n))
    y = torch.arange(n) % 2
    ids[:, 1] = 10 + 20 * y
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), y=y, index=torch.arange(n))


@pytest.mark.parametrize('strategy, layers', [('skip', (2, 4, 6, 8, 10)), ('last', (7, 8, 9, 10, 11))])
def test_the_layers_of_the_paper(strategy, layers):
    assert layer_map(6, 12, strategy) == layers


def test_both_strategies_agree_for_equal_depths_and_stay_below_the_last_layer():
    assert layer_map(4, 4, 'skip') == layer_map(4, 4, 'last') == (1, 2, 3)
    for n_student in range(2, 9):
        for n_teacher in range(n_student, 13):
            for strategy in ('skip', 'last'):
                found = layer_map(n_student, n_teacher, strategy)
                assert len(found) == n_student - 1 and 1 <= found[0] and found[-1] < n_teacher
                assert list(found) == sorted(set(found))


def test_the_loss_by_its_formula_with_gradients_into_the_student_alone():
    ours, theirs = outputs_of(4, 1), outputs_of(8, 2)
    for o in (*ours, *theirs):
        o.requires_grad_()
    found = PatientLoss('skip', 4, 8)(ours, theirs)
    by_hand = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for j, layer in ((0, 1), (1, 3), (2, 5)):
            s, t = ours[j][i], theirs[layer][i]
            by_hand[i] += ((s / s.norm() - t / t.norm()) ** 2).sum()
    assert torch.allclose(found, by_hand)
    found.sum().backward()
    assert all(o.grad.any() for o in ours[:3]) and all(o.grad is None for o in theirs)
    assert ours[3].grad is None and ours[4].grad is None, 'the last layer and the logits are left out'


def test_it_stays_finite_at_a_vector_of_zeros():
    ours, theirs = [torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 2)], outputs_of(1, 3)
    patient_loss(ours, [o.float() for o in theirs]).sum().backward()
    assert ours[0].grad.isfinite().all()


@pytest.mark.parametrize(
    'wrong, says',
    [
        (lambda: patient_loss(outputs_of(2, 1, 4), outputs_of(2, 2, 6)), 'one width'),
        (lambda: patient_loss(outputs_of(2, 1), outputs_of(3, 2)), 'as many layers'),
        (lambda: patient_loss(outputs_of(2, 1), None), 'teacher_outputs are NoneType'),
        (lambda: patient_loss([vectors(3, 2, seed=0)], outputs_of(1, 2)), 'student_outputs are list'),
        (lambda: PatientLoss('skip', 2, 4)(outputs_of(2, 1), outputs_of(3, 2)), 'teacher_outputs: 4 tensors'),
        (lambda: PatientLoss('skip', 3, 4)(outputs_of(2, 1), outputs_of(4, 2)), 'student_outputs: 3 tensors'),
        (lambda: PatientLoss('skip', 2, 4)(outputs_of(2, 1), None), 'teacher_outputs: None'),
        (lambda: PatientLoss('middle', 2, 4), "use 'skip' or 'last'"),
        (lambda: PatientLoss('skip', 4, 2), 'n_teacher is 2'),
        (lambda: hidden_outputs([0]), 'layers is 0'),
    ],
)
def test_faults_are_named(wrong, says):
    with pytest.raises(ValueError, match=says.replace('(', r'\(')):
        wrong()


def test_models_without_hidden_states_are_refused_with_the_remedy():
    batch = dict(x=torch.ones(2, 3), y=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match='give AuxiliaryLoss'):
        hidden_outputs()(nn.Linear(3, 2), batch)
    with pytest.raises(ValueError, match="a batch with x, y"):
        hidden_outputs()(bert(2, 0), batch)


def test_hidden_states_of_the_first_token_and_the_logits():
    model, batch = bert(3, 0).eval(), texts()
    asked = {k: batch[k] for k in ('input_ids', 'attention_mask')}
    with torch.no_grad():
        states = model.bert(**asked, output_hidden_states=True).hidden_states
        found = hidden_outputs()(model, batch)
        chosen = hidden_outputs([3, 1])(model, batch)
        logits = model(**asked).logits
    assert len(states) == 4 and len(found) == 4
    assert all(torch.equal(a, b[:, 0]) for a, b in zip(found, states[1:]))
    assert torch.equal(found[-1], logits)
    assert torch.equal(chosen[0], found[2]) and torch.equal(chosen[1], found[0]) and len(chosen) == 3
    with pytest.raises(ValueError, match='the model has 3 layers'):
        hidden_outputs([4])(model, batch)


def test_one_forward_pass_for_vectors_and_logits():
    model, calls = bert(2, 0), []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.bert.encoder.layer[0].register_forward_hook(lambda *_: calls.append(2))
    hidden_outputs()(model, texts())
    assert sorted(calls) == [1, 2]


def test_lower_precision_gives_a_list_in_float32():
    found = autocast_forward(hidden_outputs(), torch.bfloat16)(bert(2, 0).eval(), texts())
    exact = hidden_outputs()(bert(2, 0).eval(), texts())
    assert isinstance(found, list) and all(o.dtype == torch.float32 for o in found)
    assert all(0 < float((a - b).detach().abs().max()) < 0.1 for a, b in zip(found, exact))


def objective_of(weight):
    patient = AuxiliaryLoss(PatientLoss('last', 2, 4), weight, hidden_outputs())
    return Objective(T=2.0, alpha=0.5, auxiliary=patient)


def test_the_total_is_that_of_the_paper():
    student, teacher, batch = bert(2, 0).eval(), bert(4, 1).eval(), texts()
    ours, theirs = (hidden_outputs()(m, batch) for m in (student, teacher))
    found = objective_of(3.0).batch_loss(theirs)(ours, batch)
    distance = (F.normalize(ours[0], dim=1) - F.normalize(theirs[2], dim=1)).square().sum(1)
    labels, kd = batch_cross_entropy(ours[-1], batch), kd_loss(ours[-1], theirs[-1], 2.0, 'none')
    assert torch.allclose(found, 0.5 * labels + 0.5 * kd + 3.0 * distance, atol=1e-5)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_a_student_in_the_loop_comes_closer_to_the_layers_of_its_teacher(autocast):
    batches, teacher = [texts(), texts(10, 4) | dict(index=torch.arange(12, 22))], bert(4, 1).eval()

    def distance(weight):
        student = bert(2, 0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        training = Training(
            epochs=15, lr=0.01, make_optimizer=torch.optim.Adam, progress=False, autocast=autocast
        )
        distill(student, teacher, batches, [texts(8)], objective=objective_of(weight), training=training)
        with torch.no_grad():
            ours, theirs = (hidden_outputs()(m, batches[0]) for m in (student.eval(), teacher))
        return float(PatientLoss('last', 2, 4)(ours, theirs).mean())

    assert distance(10.0) < 0.5 * distance(1e-4)


def test_networks_of_different_width_are_refused_before_any_training():
    wide = bert(4, 1, hidden_size=24)
    student = bert(2, 0)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(ValueError, match='one width'):
        distill(
            student,
            wide,
            [texts()],
            [texts(8)],
            objective=objective_of(1.0),
            training=Training(progress=False),
        )
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
