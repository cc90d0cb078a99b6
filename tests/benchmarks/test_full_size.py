"Scores at full size: tasks, records that are found again, what is measured, and the tables that show it."

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from kd_aif.benchmarks import full_size
from kd_aif.benchmarks.cli import kd_aif_bench
from kd_aif.benchmarks.full_size import make_scoring_task, run_scoring_task, SCORING_TASKS, SCORING_WAYS
from kd_aif.data.loaders import ImageBatches
from kd_aif.experiments.expected_runs import EXPECTED, run_groups
from kd_aif.experiments.full_scoring import phase_seconds, scoring_table
from kd_aif.experiments.full_tier import full_tier_items
from kd_aif.experiments.storage import Storage
from kd_aif.experiments.task_data import task_data
from kd_aif.experiments.teachers import trained_teacher
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.forward_mode import measuring
from kd_aif.influence.iterative_solvers import CG
from kd_aif.influence.scores import all_layer_scores
from kd_aif.influence.solvers import Woodbury
from kd_aif.models.build import build_model
from kd_aif.reporting.methods import METHODS, method_label, runnable_methods
from kd_aif.reporting.record_files import load_records

SMOKE = make_scoring_task('smoke', epochs=2, score_batch_size=200)
SCORED = [e for e in EXPECTED if e.experiment == '25_full_size']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('full_size')


@pytest.fixture(scope='module')
def runs(folder):
    options = dict(out=folder / 'results', storage=Storage(folder / 'teachers'), progress=False)
    return {way: run_scoring_task(SMOKE, way, **options) for way in SCORING_WAYS}


def never(*args, **kwargs):
    raise AssertionError('trained or scored again')


@pytest.mark.parametrize('way', SCORING_WAYS)
def test_a_record_has_what_the_tables_need(runs, folder, way):
    record, found = runs[way]
    assert list(record.seconds) == ['gradient', 'solve', 'scoring'] and min(record.seconds.values()) >= 0
    m = record.metrics
    assert m['n_scored'] == len(found) == record.dataset['rows']['train'] and m['val_accuracy'] > 0.5
    assert m['seconds_total'] == pytest.approx(sum(phase_seconds(record)))
    assert m['images_per_second'] == pytest.approx(m['n_scored'] / m['seconds_total'])
    assert m['residual'] >= 0 and m['damping'] > 0
    assert (record.peak_memory is None) == (not torch.cuda.is_available())
    assert record in load_records(folder / 'results', '25_full_size', 'smoke')


def test_a_run_that_has_a_record_is_not_made_again(runs, folder, monkeypatch):
    monkeypatch.setattr(full_size, 'trained_teacher', never)
    options = dict(out=folder / 'results', progress=False)
    assert run_scoring_task(SMOKE, 'cg', **options) == (runs['cg'][0], None)
    for other in (dict(epochs=3), dict(seed=1), dict(score_batch_size=100)):
        with pytest.raises(AssertionError, match='again'):
            run_scoring_task(replace(SMOKE, **other), 'cg', **options)
    with pytest.raises(AssertionError, match='again'):
        run_scoring_task(SMOKE, 'cg', force=True, **options)


def test_the_network_is_trained_once_and_without_the_validation_images(runs, folder, monkeypatch):
    assert len([*(folder / 'teachers').glob('*.safetensors')]) == 1
    calls = []
    monkeypatch.setattr(full_size, 'trained_teacher', lambda *a, **k: calls.append(k) or never())
    with pytest.raises(AssertionError):
        run_scoring_task(SMOKE, 'cg', progress=False)
    assert calls[0]['with_val'] is False


def test_scores_are_those_of_the_package(runs, folder):
    train, val, _ = task_data(SMOKE.training_task, progress=False)
    model, _ = trained_teacher(
        SMOKE.training_task, train, val, with_val=False, storage=Storage(folder / 'teachers'), progress=False
    )
    batches = [ImageBatches(data, 200).eval_view() for data in (train, val)]
    for way, solver in (('woodbury', Woodbury()), ('cg', CG())):
        exact = all_layer_scores(model.eval(), batch_cross_entropy, *batches, solver, progress=False)
        found = runs[way][1]
        assert torch.equal(found.index, exact.index)
        assert spearmanr(found.values, exact.values)[0] > 0.999  # finite differences against forward mode
    assert spearmanr(runs['last_layer'][1].values, runs['cg'][1].values)[0] > 0.4


def test_the_warm_up_is_no_part_of_the_scores():
    calls = []

    def score(model, train, val):
        calls.append((len(train), len(val)))
        return 'scores'

    train, val = [list(range(n)) for n in (5, 3)]
    found = full_size.timed_scores(full_size.ScoringWay(score, ''), torch.nn.Linear(1, 1), train, val)
    assert found == ('scores', None) and calls == [(2, 1), (5, 3)]


def test_the_full_tasks_give_the_expected_records():
    described = dict(name='cifar100', noise=dict(kind='none'), imbalance=1.0, note='')
    full = [t for (tier, _), t in SCORING_TASKS.items() if tier == 'full']
    assert [t.network for t in full] == [e.student for e in SCORED]
    for task, expected in zip(full, SCORED):
        assert (task.dataset, task.n_train, task.n_val, task.label) == ('cifar100', None, 5000, None)
        assert tuple(SCORING_WAYS) == expected.methods
        for way in expected.methods:
            fields = full_size.scoring_identity(task, way, described, '25_full_size')
            record = full_size.make_record(**fields, metrics={})
            assert [e for e in EXPECTED if e.covers(record)] == [expected]


def as_full(record, network):
    "The record of the smoke tier as one of the full tier"
    data = record.dataset | dict(name='cifar100', note='')
    return replace(record, tier='full', dataset=data, student=network, peak_memory=2048.0)


def test_the_page_shows_such_records(runs):
    records = [as_full(r, SCORED[0].student) for r, _ in runs.values()]
    table = scoring_table(run_groups(records, '25_full_size')[0])
    for r in records:
        line = next(x for x in table.splitlines() if x.startswith(f'| {method_label(r.method)} |'))
        assert f'{r.metrics["images_per_second"]:,.0f}' in line and '2,048' in line and '| yes |' in line
    text = '\n'.join(x for x in full_tier_items(records, '25_full_size') if isinstance(x, str))
    assert '0 of 3 take longer than the goal' in text and 'not run (3 runs are queued)' in text
    text = '\n'.join(x for x in full_tier_items(records[:2], '25_full_size') if isinstance(x, str))
    assert f'Not run: {METHODS["cg"].label} (seed 0)' in text


def test_ways_to_score_are_no_methods_of_training():
    assert {METHODS[w].family for w in SCORING_WAYS} == {'score'}
    assert not {*SCORING_WAYS} & ({*runnable_methods()} | {*runnable_methods(few_labels=True)})


@pytest.mark.parametrize(
    'settings, says',
    [
        (dict(tier='huge'), 'tier is .huge.*smoke, lite, full'),
        (dict(n_val=0), 'n_val is 0'),
        (dict(n_train=300), 'n_train is 300; give more than n_val=300'),
        (dict(epochs=0), 'epochs is 0'),
        (dict(lr=0.0), 'lr is 0'),
        (dict(precision='half'), 'precision is .half'),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        make_scoring_task(**dict(tier='smoke') | settings)


def test_an_unknown_way_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(full_size, 'task_data', never)
    with pytest.raises(ValueError, match='method is .lissa.*last_layer, woodbury, cg'):
        run_scoring_task(SMOKE, 'lissa')


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    options = dict(tier='smoke', model='cnn4', epochs=1, out=str(tmp_path / 'results'))
    kd_aif_bench('full', **options)
    assert [x.split()[0] for x in capsys.readouterr().out.splitlines()] == ['cnn4'] * 3
    records = load_records(tmp_path / 'results')
    assert [r.method for r in records] == ['last_layer', 'woodbury', 'cg']
    assert {(r.student, r.config['epochs']) for r in records} == {('cnn4', 1)}
    for wrong, says in (
        (dict(dataset='svhn'), 'tier smoke scores digits'),
        (dict(rows='lissa'), 'rows: unknown lissa'),
        (dict(tier='huge'), "tier is 'huge'"),
    ):
        with pytest.raises(SystemExit):
            kd_aif_bench('full', **options | wrong)
        assert says in capsys.readouterr().err


@pytest.mark.parametrize('name', [t.network for (tier, _), t in SCORING_TASKS.items() if tier == 'full'])
def test_the_networks_of_the_full_tier_can_be_scored(name):
    "On a few images of random numbers, as large as those of CIFAR-100"
    model, draw = build_model(name, 100, 3), torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, 32, 32, generator=draw), torch.arange(12)
    with torch.no_grad():
        for _ in range(20):  # running statistics of BatchNorm
            model.train()(x)
    model.eval()
    batches = [dict(x=x, y=y, index=torch.arange(12))]
    for way in SCORING_WAYS.values():
        found = way.score(model, batches, [dict(x=x[:4].flip(3), y=y[:4], index=y[:4])])
        assert torch.isfinite(found.values).all() and found.values.std() > 0


def test_single_precision_is_full_while_derivatives_are_measured():
    "Convolutions in TF32 have three decimal digits, which finite differences cannot use"
    places, model = (torch.backends.cudnn, torch.backends.cuda.matmul), torch.nn.Linear(1, 1)
    before = [p.allow_tf32 for p in places]
    try:
        for allowed in (True, False):
            for p in places:
                p.allow_tf32 = allowed
            with pytest.raises(KeyError), measuring(model):
                assert not any(p.allow_tf32 for p in places)
                raise KeyError
            assert [p.allow_tf32 for p in places] == [allowed] * 2
    finally:
        for p, allowed in zip(places, before):
            p.allow_tf32 = allowed
