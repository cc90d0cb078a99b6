"The table of samples: what it says, in which order, and what it refuses"

import io
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from kd_aif.data.images import ImageData
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.text_files import read_texts
from kd_aif.distillation.distill import distill
from kd_aif.distillation.sample_table import reason_text, sample_table
from kd_aif.distillation.trainer import Training
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.cross_scores import cross_scores, Scoring
from kd_aif.influence.scores import influence_scores, InfluenceScores
from kd_aif.influence.self_influence import self_influence
from kd_aif.weights.calibration import calibrated_weights

HOSTILE = '<script>alert("1")</script>\n\'"$x|y$\u2028,;=1+1'
CLASSES = ('cat', HOSTILE, 'with "quotes", commas')
COLUMNS = ['given', 'predicted', 'confidence', 'score', 'weight', 'probability', 'loss', 'reason']


class Net(nn.Module):
    "Logits are read off the mean brightness of the channels"

    def __init__(self, outputs=3):
        super().__init__()
        self.head = nn.Linear(3, outputs)
        with torch.no_grad():
            self.head.weight.copy_(4 * torch.eye(3)[:outputs])
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(x.flatten(2).mean(2))


def images(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randint(0, 80, (n, 3, 4, 4), dtype=torch.uint8, generator=g)
    x[torch.arange(n), y] += 120
    noisy = y.clone()
    noisy[4] = (y[4] + 1) % 3
    index = 100 + 3 * torch.arange(n).flip(0)
    return ImageData(x, noisy, index, y, CLASSES, 'toy', 'train', 'f', torch.full((3,), 0.5), torch.ones(3))


@pytest.fixture
def batches():
    return ImageBatches(images(), 5, seed=1)


@pytest.fixture
def scores(batches):
    return influence_scores(
        Net(), batch_cross_entropy, batches.eval_view(), ImageBatches(images(9, 1)).eval_view()
    )


def test_every_number_is_that_of_its_sample(batches, scores):
    "The loader shuffles; the scores come in another order than the samples"
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(3))
    shuffled = replace(scores, values=scores.values[order], index=scores.index[order])
    weights = torch.arange(24.0)
    table = sample_table(shuffled, Net(), batches, weights=weights)
    assert list(table) == COLUMNS and table.index.tolist() == shuffled.index.tolist()
    data, place = batches.data, {i: p for p, i in enumerate(batches.data.index.tolist())}
    logits = Net()((data.x.float() / 255 - 0.5)).double().detach()
    for k, (i, row) in enumerate(table.iterrows()):
        p = place[i]
        assert row.given == CLASSES[int(data.y[p])] and row.predicted == CLASSES[int(logits[p].argmax())]
        assert row.loss == pytest.approx(float(-logits[p].log_softmax(0)[data.y[p]]), abs=1e-5)
        assert row.confidence == pytest.approx(float(logits[p].softmax(0).max()), abs=1e-5)
        assert row.score == pytest.approx(float(scores.values[p])) and row.weight == weights[k]
    assert table.probability.isna().all()
    wrong = int(data.index[4])
    assert table.loss.idxmax() == wrong
    assert 'but the model says' in table.reason[wrong]
    assert 'among the lowest 0.1%' in table.reason[table.score.idxmin()]
    assert not table.reason.str.contains('\n').any()


def test_cross_scores_with_calibration(batches):
    val = ImageBatches(images(18, 2)).eval_view()
    scores = cross_scores(
        Net(), batch_cross_entropy, batches.eval_view(), val, scoring=Scoring(progress=False)
    )
    found = calibrated_weights(scores.values, scores.reference, significance=1)
    table = sample_table(scores, Net(), batches, calibration=found)
    assert table.score.tolist() == pytest.approx(scores.values.mean(0).tolist())
    assert table.weight.tolist() == pytest.approx(found.values.tolist())
    assert table.probability.tolist() == pytest.approx(found.probability.tolist())
    assert table.reason.str.contains('the label is right with a probability of').all()


def test_files_keep_hostile_names(batches, scores, tmp_path):
    table = sample_table(scores, Net(), batches)
    back = pd.read_csv(io.StringIO(table.to_csv()), index_col='index')
    assert back.given.tolist() == table.given.tolist() and back.reason.tolist() == table.reason.tolist()
    table.to_parquet(tmp_path / 't.parquet')
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / 't.parquet'), table)


def test_numbers_where_names_are_unknown_and_regressions():
    x = torch.rand(4, 3, 2, 2)
    table = sample_table(None, Net(), [dict(x=x, y=torch.tensor([0, 1, 2, 0]), index=torch.arange(4))])
    assert (
        table.given.tolist() == [0, 1, 2, 0] and table.score.isna().all() and 'score' not in table.reason[0]
    )
    reals = [dict(x=x, y=torch.tensor([0.5, 1, 2, 0]), index=torch.arange(4))]
    table = sample_table(None, Net(1), reals, classes=('one',))
    assert table.given.tolist() == [0.5, 1, 2, 0] and table.confidence.isna().all()
    expected = 0.5 * (table.predicted - table.given) ** 2
    assert table.loss.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert table.reason[0].startswith('Labelled 0.5; the model says')


def test_the_reason_in_words():
    assert reason_text('a', 'b', 0.5, 0.75, 0.1) == (
        'Labelled a, but the model says b (50% sure); its score is higher than 75% of the others; '
        'the label is right with a probability of 10%.'
    )
    assert (
        reason_text('a', 'a', share=0.2)
        == 'Labelled a, and the model agrees; its score is among the lowest 20%.'
    )


def lists(**changes):
    batch = dict(x=torch.rand(3, 3, 2, 2), y=torch.tensor([0, 1, 2]), index=torch.arange(3)) | changes
    return [{k: v for k, v in batch.items() if v is not None}]


SCORED = InfluenceScores(torch.rand(3), torch.arange(3), 'mean', 0.1, 0.0, 1, {})
BAD = {
    'scores': ((torch.rand(3), Net(), lists()), {}, TypeError, 'scores is a Tensor'),
    'columns': ((replace(SCORED, values=torch.rand(3, 2)), Net(), lists()), {}, ValueError, '2 columns'),
    'model': ((SCORED, 'resnet', lists()), {}, TypeError, "model is 'resnet'"),
    'model of NaN': (
        (SCORED, nn.Linear(1, 1).requires_grad_(False), None),
        {},
        TypeError,
        'batches is a NoneType',
    ),
    'data': ((SCORED, Net(), images()), {}, TypeError, 'ImageBatches'),
    'iterator': ((SCORED, Net(), iter(lists())), {}, ValueError, 'read only once'),
    'empty': ((SCORED, Net(), []), {}, ValueError, 'no sample'),
    'other samples': ((SCORED, Net(), lists(index=torch.arange(1, 4))), {}, ValueError, 'first index 0'),
    'no y': ((SCORED, Net(), lists(y=None)), {}, ValueError, "no tensor 'y'"),
    'no index': ((SCORED, Net(), lists(index=None)), {}, ValueError, "no tensor 'index'"),
    'a label too high': (
        (SCORED, Net(), lists(y=torch.tensor([0, 1, 3]))),
        {},
        ValueError,
        '1 labels are not in',
    ),
    'a label below 0': (
        (SCORED, Net(), lists(y=torch.tensor([0, -100, 2]))),
        {},
        ValueError,
        '1 labels are not',
    ),
    'real labels': ((SCORED, Net(), lists(y=torch.rand(3))), {}, ValueError, 'real numbers need one output'),
    'one output': ((SCORED, Net(1), lists()), {}, ValueError, 'the model has 1 outputs'),
    'inputs': ((SCORED, Net(), lists(x=torch.rand(3, 5))), {}, ValueError, 'fails on the batch'),
    'weights': ((SCORED, Net(), lists()), dict(weights=[1.0]), ValueError, 'weights has the shape'),
    'calibration': (
        (SCORED, Net(), lists()),
        dict(calibration=torch.rand(3)),
        TypeError,
        'calibrated_weights',
    ),
    'index': ((SCORED, Net(), lists()), dict(index=[2, 1, 0]), ValueError, 'order of the scores'),
    'index of reals': ((None, Net(), lists()), dict(index=[0.5]), ValueError, 'integer index'),
    'index elsewhere': ((None, Net(), lists()), dict(index=[7]), ValueError, 'first index 7'),
    'forward': ((SCORED, Net(), lists()), dict(forward='x'), TypeError, 'forward is'),
    'classes': ((SCORED, Net(), lists()), dict(classes='abc'), TypeError, 'tuple of strings'),
    'few classes': ((SCORED, Net(), lists()), dict(classes=('a', 'b')), ValueError, 'there is a label 2'),
}


@pytest.mark.parametrize('args, options, kind, words', BAD.values(), ids=BAD)
def test_tables_that_cannot_be(args, options, kind, words):
    with pytest.raises(kind, match=words):
        sample_table(*args, **options)


def test_a_run_has_its_samples(batches):
    val = ImageBatches(images(12, 1))
    run = distill(
        Net(), Net(), batches, val, mechanism='student', training=Training(epochs=1, progress=False)
    )
    assert run.train is batches and run.samples is run.samples
    assert run.samples.index.tolist() == run.index.tolist()
    assert run.samples.weight.tolist() == pytest.approx(run.weights.tolist())
    assert run.samples.score.tolist() == pytest.approx(run.scores.values.mean(0).tolist())
    shown = run._repr_mimebundle_()
    assert shown['text/html'].count('data:image/png') == 16 and '<script' not in shown['text/html']
    assert shown['text/markdown'] == run._repr_markdown_()
    with pytest.raises(ValueError, match='does not have its training batches'):
        replace(run, train=None).samples


def test_a_run_without_teacher_and_scores(batches):
    student = Net()
    run = distill(
        student, None, batches, ImageBatches(images(12, 1)), training=Training(epochs=1, progress=False)
    )
    assert run.samples.score.isna().all() and (run.samples.weight == 1).all()
    assert 'text/html' not in run._repr_mimebundle_()


def test_scores_show_their_samples(batches, scores, tmp_path):
    html = scores._repr_mimebundle_()['text/html']
    assert html.count('data:image/png') == 16 and '<script' not in html and 'Least helpful' in html
    again = InfluenceScores.load(scores.save(tmp_path / 's.safetensors'))
    assert again.batches is None and 'text/html' not in again._repr_mimebundle_()
    assert (
        'text/html' not in self_influence(Net(), batch_cross_entropy, batches.eval_view())._repr_mimebundle_()
    )


class Texts:
    "Batches of a `TextData` in an order of their own; the label is read off the length of the text"

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        order = torch.arange(len(self.data)).flip(0)
        lengths = torch.tensor([float(len(text)) for text in self.data.texts])
        yield dict(x=lengths[order, None] - 12, y=self.data.y[order], index=self.data.index[order])


def test_texts_stand_beside_their_numbers(tmp_path):
    data = read_texts(([HOSTILE, 'short', 'a much longer text', 'tiny'], ['long', 'short', 'short', 'short']))
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.bias.zero_()
    table = sample_table(None, model, Texts(data), weights=torch.arange(4.0), index=data.index)
    assert table.text.tolist() == list(data.texts) and table.weight.tolist() == [0, 1, 2, 3]
    assert table.given.tolist() == ['long', 'short', 'short', 'short'] and table.loss.idxmax() == 2
    table.to_csv(tmp_path / 't.csv')
    assert pd.read_csv(tmp_path / 't.csv', index_col='index').text.tolist() == list(data.texts)
