"The study of weights without a student: same scores as `cross_scores`, odd inputs, records that are found again."

import math
import warnings
from pathlib import Path

import pytest
import torch

from kd_aif.benchmarks.quality_tables import quality_rows, select, setting_table, variant_table
from kd_aif.benchmarks.variant_scores import QualityScorer, variant_scores
from kd_aif.benchmarks.variant_weights import evaluate_variant, variant_weights, weight_quality
from kd_aif.benchmarks.variants import (
    ESTIMATORS,
    parse_variant,
    SCORE_NAMES,
    SCORE_PARTS,
    Variant,
    variant_name,
)
from kd_aif.benchmarks.weight_quality import (
    _OF_THE_TEACHER,
    EXPERIMENT,
    GROUPS,
    quality_runs,
    QualityOptions,
    run_quality,
    SETTINGS,
    variants_of,
)
from kd_aif.experiments.task_data import task_data
from kd_aif.experiments.tasks import make_task
from kd_aif.experiments.storage import Storage
from kd_aif.experiments.teachers import trained_teacher
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.cross_scores import cross_scores, CrossScores, Scoring
from kd_aif.reporting.record_files import load_records


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    return tmp_path_factory.mktemp('teachers')


@pytest.fixture(scope='module')
def scorer(teachers):
    task = make_task('digits', noise='symmetric', rate=0.4, epochs=3)
    train, val, _ = task_data(task, progress=False)
    return QualityScorer(
        trained_teacher(task, train, val, storage=Storage(teachers), progress=False)[0], train, val
    )


@pytest.mark.parametrize(
    'score, layers, folds, n_val',
    [
        ('local+loss', 'last', 2, 300),
        ('mean', 'last', 3, 300),
        ('loss', 'last', 2, 100),
        ('local+loss', 'all', 2, 300),
    ],
)
def test_scores_are_those_of_cross_scores(scorer, score, layers, folds, n_val):
    "Views and solves that are shared change nothing, also for a subset of the validation samples"
    ours = variant_scores(scorer, Variant(score, layers, folds, n_val))
    val = scorer.val.select(scorer.chosen(n_val).nonzero()[:, 0])
    theirs = cross_scores(
        scorer.model,
        batch_cross_entropy,
        scorer.batches(scorer.train),
        scorer.batches(val),
        SCORE_PARTS[score],
        folds,
        scorer.seed,
        Scoring(last_layer=layers == 'last', progress=False),
    )
    assert torch.allclose(
        ours.values.double(), theirs.values.double(), atol=1e-3 * float(theirs.values.std())
    )
    for a, b in zip(ours.reference, theirs.reference):
        assert torch.allclose(a.double(), b.double(), atol=1e-3 * float(theirs.values.std()))
    for a, b in zip(ours.reference_labels, theirs.reference_labels):
        assert torch.equal(a, b)


@pytest.mark.parametrize('layers', ['last', 'all'])
def test_curvature_of_both_treats_both_alike(layers, teachers):
    "Clean labels: with the curvature of both sets training samples score no worse than the reference, whichever of the two they are"
    task = make_task('digits', epochs=3)
    train, val, _ = task_data(task, progress=False)
    scorer = QualityScorer(
        trained_teacher(task, train, val, storage=Storage(teachers), progress=False)[0], train, val
    )
    share = {
        c: evaluate_variant(scorer, Variant('local', layers, n_val=300, curvature=c))['clean_fraction']
        for c in ('train', 'both')
    }
    assert share['both'] > 0.85 and (layers == 'last' or share['both'] > share['train'])


def test_sums_do_not_depend_on_the_unit_of_a_part(scorer):
    "A part that is given in another unit leaves the sum as it is, and a sum has the mean of nothing but its parts"
    both = variant_scores(scorer, Variant('loss+self', n_val=300))
    loss, own = (variant_scores(scorer, Variant(s, n_val=300)) for s in ('loss', 'self'))
    expected = loss.values / loss.values.std(1, keepdim=True) + 7 * own.values / (
        7 * own.values.std(1, keepdim=True)
    )
    assert (
        torch.allclose(both.values, expected, rtol=1e-4, atol=1e-5)
        and (own.values <= 0).all()
        and (loss.values <= 0).all()
    )


def test_seconds_count_a_shared_step_once(scorer):
    "The forward pass that local influence and loss share is paid once"
    seconds = variant_scores(scorer, Variant('local+loss', n_val=300)).seconds
    assert set(seconds) == {'views', 'solve'} and all(s > 0 for s in seconds.values())


@pytest.mark.parametrize('density', ESTIMATORS)
@pytest.mark.parametrize('balance', ['class', 'compared', 'none'])
def test_weights_have_mean_one(scorer, density, balance):
    w = variant_weights(
        variant_scores(scorer, Variant(n_val=300)), Variant(density=density, balance=balance, n_val=300)
    )
    assert (
        w.values.mean() == pytest.approx(1, abs=1e-4)
        and (w.values >= 0).all()
        and (w.probability <= 1 + 1e-6).all()
    )
    if balance == 'class':
        assert torch.allclose(
            scorer.train.y.cpu().bincount(w.values) / scorer.train.y.cpu().bincount(),
            torch.ones(10),
            atol=1e-3,
        )


@pytest.mark.parametrize('density', ESTIMATORS)
def test_a_class_without_reference_keeps_its_weight(density):
    "Labels that the validation set lacks are not judged, and classes without training samples do not spoil the mean error"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (1500,), generator=g)
    y[y == 1] = 3  # no training sample of class 1, no reference of class 3
    wrong = (torch.rand(1500, generator=g) < 0.4) & (y != 3)
    scores, z = torch.randn(1, 1500, generator=g) - 3 * wrong, torch.arange(300) % 3
    found = CrossScores(
        scores,
        torch.arange(1500),
        y,
        (torch.randn(300, generator=g),),
        (z,),
        ('posterior',),
        math.nan,
        math.nan,
        {},
    )
    with warnings.catch_warnings(record=True):
        warnings.simplefilter('always')
        w = variant_weights(found, Variant(density=density, n_val=300))
    result = weight_quality(w, wrong, y)
    assert torch.allclose(w.values[y == 3], torch.ones(int((y == 3).sum()))) and w.values[wrong].mean() < 0.5
    assert (
        math.isfinite(result['class_error'])
        and math.isnan(result['class_errors'][1])
        and math.isnan(result['class_errors'][3])
    )


def test_all_labels_wrong_or_right_have_no_auc(scorer):
    w = variant_weights(variant_scores(scorer, Variant(n_val=300)), Variant(n_val=300))
    y = scorer.train.y
    for wrong in (torch.zeros(len(y), dtype=torch.bool), torch.ones(len(y), dtype=torch.bool)):
        result = weight_quality(w, wrong, y)
        assert math.isnan(result['weight_auc']) and result['wrong_mass'] == pytest.approx(
            float(wrong.float().mean()), abs=1e-6
        )


def test_faults_are_named(scorer):
    with pytest.raises(ValueError, match='300 validation samples'):
        evaluate_variant(scorer, Variant(n_val=1000))
    with pytest.raises(ValueError, match="layers='last'"):
        Variant('class', 'all')
    with pytest.raises(ValueError, match='compared'):
        Variant(balance='classes')
    with pytest.raises(ValueError, match='densities'):
        variants_of('everything')
    with pytest.raises(ValueError, match='valwrong'):
        run_quality('digits', ['sym40', 'rain'])


def test_names_and_groups():
    "Every variant is named uniquely, is in its group once, and comes back from its name"
    for n in (100, 250, 300, 1000):
        for g in GROUPS:
            names = [variant_name(v) for v in variants_of(g, n)]
            assert (
                len(set(names)) == len(names)
                and [variant_name(parse_variant(name)) for name in names] == names
            )
            assert all(v.n_val <= n for v in variants_of(g, n))
    assert {v.score for v in variants_of('scores')} == set(SCORE_NAMES)


def test_records_are_found_again(tmp_path, teachers):
    "A second call reads, a new group is added without touching the others, tables say what was not run"
    options = QualityOptions(teachers=teachers, progress=False, log=lambda line: None)
    common = dict(out=tmp_path, options=options, epochs=2)
    first = run_quality('digits', ['sym40'], groups=['densities'], **common)
    lines = {line for p in tmp_path.rglob('*.jsonl') for line in p.read_text().splitlines()}
    both = run_quality('digits', ['sym40'], groups=['densities', 'folds'], **common)
    after = {line for p in tmp_path.rglob('*.jsonl') for line in p.read_text().splitlines()}
    assert both[0] == first[0] and len(both) == 2 and len(lines) == 1 and lines < after
    rows = quality_rows(load_records(tmp_path))
    assert not rows.duplicated(
        ['setting', 'seed', 'score', 'layers', 'folds', 'n_val', 'density', 'balance']
    ).any()
    table = setting_table(select(rows, density=list(ESTIMATORS)), 'brier', ('density',), ESTIMATORS)
    assert (
        list(table['density']) == list(ESTIMATORS)
        and set(table['clean labels']) == {'not run'}
        and 'not run' not in set(table['symmetric 40 %'])
    )
    assert list(variant_table(select(rows, folds=[2, 3, 5]), ('folds',))['folds']) == [2, 3, 5]
    with pytest.raises(ValueError, match='mixed'):
        quality_rows(
            both + run_quality('digits', ['sym40'], groups=['folds'], **common | dict(epochs=1, out=None))
        )


@pytest.mark.parametrize('setting', [s for s in SETTINGS if s not in ('sym40', 'clean')])
def test_every_setting_runs(setting, teachers):
    "Noise of all kinds, a long tail, a validation set that is wrong or shifted: numbers come out, and they fit into a record"
    task = make_task('digits', **SETTINGS[setting], epochs=1)
    (record,) = quality_runs(
        task, setting, ['densities'], options=QualityOptions(teachers=teachers, progress=False)
    )
    name = variant_name(Variant(n_val=300))
    assert (
        0 <= record.metrics[f'{name}/clean_fraction'] <= 1
        and 0 < record.metrics[f'{name}/effective_sample_size'] <= 1
    )
    assert (record.metrics[f'{name}/weight_auc'] is None) == (setting == 'lt32') and len(
        record.metrics[f'{name}/class_errors']
    ) == 10


def test_committed_records_are_found_by_their_configuration():
    "Groups have the variants of their records, and a task the fields"
    records = load_records(Path(__file__).parents[2] / 'reports' / 'results', EXPERIMENT)
    today = [r for r in records if r.config['variants'][0].count('|') == 7]  # early names lack the reference
    assert len(today) > len(records) / 2
    for r in today:
        names = [variant_name(v) for v in variants_of(r.config['group'], r.dataset['rows']['val'])]
        assert r.config['variants'] == names and SETTINGS[r.config['setting']].items() <= r.config.items()
        assert set(r.config) == {*_OF_THE_TEACHER, 'setting', 'group', 'variants'}
