"`Trainer` of transformers with a teacher and weights: the loss, the index, and what is refused."

import copy
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip('transformers')
pytest.importorskip('accelerate')

from datasets import Dataset

from kd_aif.distillation.objective import Objective, regression_objective
from kd_aif.foundation.losses import softened_divergence
from kd_aif.integrations.samplers import loss_weights
from kd_aif.integrations.teacher_logits import CachedLogits
from kd_aif.integrations.transformers_trainer import DistillationTrainer, IndexCollator

N, VOCABULARY = 16, 30
WEIGHTS = loss_weights(torch.arange(N) + 5, torch.linspace(0, 2, N))
ROWS = [
    dict(
        input_ids=[(i * k) % VOCABULARY for k in range(1, 6)],
        attention_mask=[1] * 5,
        token_type_ids=[0] * 5,
        label=i % 2,
        index=i + 5,
        note=f'row {i}',
    )
    for i in range(N)
]


def network(kind='Bert', seed=0, labels=2, **sizes):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8) | sizes
    if kind == 'DistilBert':
        sizes = dict(
            dim=8,
            n_layers=1,
            n_heads=2,
            hidden_dim=8,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    else:
        sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = getattr(transformers, f'{kind}Config')(vocab_size=VOCABULARY, num_labels=labels, **sizes)
    return getattr(transformers, f'{kind}ForSequenceClassification')(config)


def trainer(tmp_path, student=None, dataset=None, arguments=None, **options):
    settings = dict(
        output_dir=str(tmp_path), report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False, per_device_train_batch_size=N, max_steps=1, max_grad_norm=0.0,
        learning_rate=0.5, optim='sgd', lr_scheduler_type='constant', weight_decay=0.0,
    )  # fmt: skip
    args = transformers.TrainingArguments(**(settings | (arguments or {})))
    dataset = Dataset.from_list(ROWS) if dataset is None else dataset
    made = DistillationTrainer(student or network(), args, train_dataset=dataset, **options)
    made.remove_callback(transformers.PrinterCallback)
    return made


def whole_batch():
    names = 'input_ids', 'attention_mask', 'token_type_ids', 'label', 'index'
    return {name: torch.tensor([row[name] for row in ROWS]) for name in names}


def by_hand(student, teacher, w, T=4.0, alpha=0.9, lr=0.5):
    "One step down the gradient of the weighted loss"
    batch, names = whole_batch(), ('input_ids', 'attention_mask')
    inputs = {k: batch[k] for k in names}
    logits = student(**inputs).logits
    losses = nn.functional.cross_entropy(logits, batch['label'], reduction='none')
    if teacher is not None:
        with torch.no_grad():
            theirs = teacher.eval()(**inputs).logits
        losses = (1 - alpha) * losses + alpha * softened_divergence(logits, theirs, T)
    gradients = torch.autograd.grad((w * losses).mean(), list(student.parameters()), allow_unused=True)
    return [p - lr * (0 if g is None else g) for p, g in zip(student.parameters(), gradients)]


def close(trained, expected):
    for a, b in zip(trained.parameters(), expected):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


class Rows(torch.utils.data.Dataset):
    "A data set of PyTorch whose index is called as in GLUE"

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {('idx' if k == 'index' else k): v for k, v in ROWS[i].items()}


@pytest.mark.parametrize('dataset', [None, Rows()], ids=['datasets', 'torch'])
@pytest.mark.parametrize('asked', ['Bert', 'DistilBert', None])
def test_one_step_is_that_by_hand(tmp_path, dataset, asked):
    teacher = asked and network(asked, 7).train()
    made = trainer(tmp_path, dataset=dataset, teacher=teacher, weights=WEIGHTS)
    made.train()
    close(made.model, by_hand(network(), copy.deepcopy(teacher), WEIGHTS.values))
    assert teacher is None or (teacher.training and all(p.requires_grad for p in teacher.parameters()))


def test_accumulated_batches_make_the_same_step(tmp_path):
    parts = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    made = trainer(tmp_path, arguments=parts, teacher=network(seed=7), weights=WEIGHTS)
    made.train()
    close(made.model, by_hand(network(), network(seed=7), WEIGHTS.values))


def test_cached_logits_stand_for_the_teacher(tmp_path):
    teacher, batch = network(seed=7).eval(), whole_batch()
    with torch.no_grad():
        logits = teacher(batch['input_ids'], batch['attention_mask']).logits
    cached = CachedLogits(batch['index'], logits, torch.zeros(N, 16, dtype=torch.uint8), '')
    made = trainer(tmp_path, teacher=cached, weights=WEIGHTS)
    made.train()
    close(made.model, by_hand(network(), teacher, WEIGHTS.values))


def test_evaluation_needs_no_index_and_no_weights(tmp_path):
    others = Dataset.from_list([{k: v for k, v in row.items() if k != 'index'} for row in ROWS])
    made = trainer(tmp_path, eval_dataset=others, teacher=network(seed=7), weights=WEIGHTS)
    batch = whole_batch()
    with torch.no_grad():
        logits = made.model.eval()(batch['input_ids'], batch['attention_mask']).logits
    expected = nn.functional.cross_entropy(logits, batch['label'])
    assert abs(made.evaluate()['eval_loss'] - float(expected)) < 1e-5
    predicted = made.predict(Dataset.from_list(ROWS)).predictions
    torch.testing.assert_close(torch.tensor(predicted), logits, atol=1e-5, rtol=1e-4)


def test_regression(tmp_path):
    rows = Dataset.from_list([row | dict(label=float(row['label'])) for row in ROWS])
    made = trainer(
        tmp_path, network(labels=1), rows, teacher=network(seed=7, labels=1), objective=regression_objective()
    )
    before = [p.clone() for p in made.model.parameters()]
    assert made.train().training_loss >= 0
    assert any(not torch.equal(a, b) for a, b in zip(before, made.model.parameters()))


def test_the_arguments_stay_as_they_are(tmp_path):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to='none', use_cpu=True)
    DistillationTrainer(network(), args, train_dataset=Dataset.from_list(ROWS), weights=WEIGHTS)
    assert args.remove_unused_columns


def test_the_collator_sees_neither_index_nor_unused_columns():
    seen = []
    batch = IndexCollator(lambda rows: seen.extend(rows) or {}, frozenset({'label'}))(ROWS[:3])
    assert batch['index'].tolist() == [5, 6, 7] and seen == [dict(label=0), dict(label=1), dict(label=0)]
    with pytest.raises(TypeError, match='give dictionaries'):
        IndexCollator(list)([(1, 2)])


unlabelled = Dataset.from_list([{k: v for k, v in row.items() if k != 'label'} for row in ROWS])
unindexed = Dataset.from_list([{k: v for k, v in row.items() if k != 'index'} for row in ROWS])
shared = network()
faults = [
    (dict(weights=WEIGHTS, dataset=unindexed), ValueError, "has no 'index' or 'idx'"),
    (dict(weights=loss_weights([5], [1.0])), ValueError, 'weights: sample 6 of train_dataset'),
    (dict(weights=[1.0, 2.0]), TypeError, 'source is a list'),
    (dict(teacher='bert'), TypeError, 'give a network'),
    (dict(student=shared, teacher=shared), ValueError, 'teacher is the model'),
    (dict(objective=0.9), TypeError, 'objective is a float'),
    (dict(objective=Objective(forward=print)), ValueError, 'objective has forward'),
    (dict(compute_loss_func=print), ValueError, 'compute_loss_func'),
    (dict(arguments=dict(label_smoothing_factor=0.1)), ValueError, 'label_smoothing_factor is 0.1'),
]
later = [
    (dict(teacher=network(labels=3)), 'classes of the student'),
    (dict(dataset=unlabelled), "no 'labels'"),
]


@pytest.mark.parametrize('options, kind, says', faults, ids=[f[2] for f in faults])
def test_faults_before_training(tmp_path, options, kind, says):
    with pytest.raises(kind, match=says):
        trainer(tmp_path, **options)


@pytest.mark.parametrize('options, says', later, ids=[f[1] for f in later])
def test_faults_of_the_first_batch(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, **options).train()


def test_without_accelerate_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match='pip install'):
        DistillationTrainer(network())


def test_a_student_with_adapters(tmp_path):
    peft = pytest.importorskip('peft')
    settings = peft.LoraConfig(task_type='SEQ_CLS', r=2, lora_dropout=0.0, target_modules=['query'])
    student = peft.get_peft_model(network(), settings)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    made = trainer(tmp_path, student, teacher=network(seed=7), weights=WEIGHTS)
    made.train()
    changed = {n for n, p in made.model.named_parameters() if not torch.equal(p.cpu(), before[n])}
    assert changed and all('lora_' in n or 'modules_to_save' in n for n in changed)
