"The benchmark: tasks, unit, memory, rows, records, comparison with retraining, the command."

import json, sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from kd_aif.benchmarks import cost, fidelity, influence_tasks
from kd_aif.benchmarks.bench import Bench, live_peak, LiveMemory
from kd_aif.benchmarks.cli import BenchSettings, kd_aif_bench
from kd_aif.benchmarks.cost import bench_record, cost_table, EXPERIMENT, influence_bench, measure
from kd_aif.benchmarks.fidelity import lds_bench, lds_difference, lds_table, refit_folder
from kd_aif.benchmarks.influence_tasks import InfluenceTask, RefitTask
from kd_aif.benchmarks.query_scores import HeldGaussNewton, lds_config, LDS_ROWS, query_scores
from kd_aif.benchmarks.reference_libraries import LIBRARY_LABELS, REFERENCE_LIBRARIES
from kd_aif.benchmarks.rows import row_label, ROWS, SCORING, SOLVERS
from kd_aif.distillation.trainer import Training
from kd_aif.influence.curvature import GaussNewton
from kd_aif.influence.datamodelling import half_subsets
from kd_aif.influence.iterative_solvers import CG
from kd_aif.influence.retraining import RetrainedLosses
from kd_aif.influence.scores import all_layer_scores
from kd_aif.influence.solvers import Woodbury
from kd_aif.reporting.record_files import load_records

TASK = InfluenceTask('digits', 'cnn8', n_train=200, n_val=100, epochs=4)
TINY = RefitTask('digits', 'cnn8', n_train=80, n_val=30, rate=0.4, epochs=2)
LIBRARIES = 'kronfluence', 'dattri', 'torch_influence', 'pydvl'
quiet = dict(log=lambda line: None)


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    "A cache of its own, and one thread."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('KD_AIF_CACHE', str(tmp_path_factory.mktemp('cache')))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def bench(cache):
    return Bench(TASK, 0.1)


@pytest.fixture
def without_libraries(monkeypatch):
    for name in LIBRARIES:
        monkeypatch.setitem(
            sys.modules, name, None
        )  # Python treats such a module as one that is not installed


def never(*args, **kwargs):
    pytest.fail('it was run again')


# tasks


def test_the_task_of_the_refits_stays_what_it_was():
    assert asdict(RefitTask(rate=0.4)) == dict(
        dataset='cifar10',
        model='cnn16',
        n_train=1000,
        n_val=500,
        rate=0.4,
        epochs=15,
        batch_size=64,
        lr=0.1,
        seed=0,
    )
    assert refit_folder(RefitTask(rate=0.4)).name == 'cifar10-cnn16-noise0.4'
    assert refit_folder(RefitTask(rate=0.4, epochs=3)).name.startswith('cifar10-cnn16-noise0.4-')


def test_a_refit_is_a_function_of_rows_and_seed():
    rows = torch.arange(40)
    first = TINY(rows, 0)
    torch.rand(7)
    assert first.shape == (30,) and torch.equal(first, TINY(rows, 0))
    assert not torch.equal(first, TINY(rows, 1)) and not torch.equal(first, TINY(rows + 1, 0))


def test_the_network_is_trained_once(bench, monkeypatch):
    monkeypatch.setattr(influence_tasks, 'distill', never)
    for a, b in zip(TASK.networks(), (bench.model, bench.previous)):
        assert not a.training and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert replace(TASK, lr=0.2).name != TASK.name


def test_the_earlier_weights_are_one_epoch_from_the_end(monkeypatch, tmp_path):
    steps = []

    class Watched(torch.optim.SGD):
        def step(self, *args):
            steps.append([p.detach().clone() for group in self.param_groups for p in group['params']])
            return super().step(*args)

    monkeypatch.setattr(
        influence_tasks,
        'Training',
        partial(Training, make_optimizer=lambda p, lr: Watched(p, lr, momentum=0.9, nesterov=True)),
    )
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path))
    _, before = TASK.networks()
    assert len(steps) == 4 * 4 and all(torch.equal(a, b) for a, b in zip(steps[3 * 4], before.parameters()))


# memory


def test_memory_counts_what_is_alive():
    outside = torch.ones(500)
    with LiveMemory() as m:
        outside.add_(1)
        outside.view(5, 100)
        assert m.now == m.peak == 0
        x = torch.ones(1000, requires_grad=True)
        y = x.sin().exp().sum()
        assert m.now == 4 * (1000 + 1000 + 1), 'x, exp(sin x), which the backward pass needs, and y'
        y.backward()
        assert m.now == 4 * (1000 + 1000 + 1), 'x, its gradient and y'
    del x, y
    assert m.now == 0 and m.peak >= 4 * 3000


def test_scoring_takes_no_more_than_twice_the_memory_of_a_forward_pass(bench):
    plain = live_peak(bench.unit)
    for name in ('forward', 'finite', 'finite-known'):
        bench.losses, bench.reference
        assert live_peak(lambda: ROWS[name].run(bench)) <= 2 * plain, name
    assert live_peak(lambda: ROWS['vmap-gradients'].run(bench)) > 2 * plain


# rows


def test_the_reference_solves_the_system(bench):
    assert bench.reference.residual < 2e-6 and len(bench.reference.values) == 200
    dense = all_layer_scores(
        bench.model, bench.loss, bench.train, bench.val, Woodbury(0.1, None, None), progress=False
    )
    assert spearmanr(dense.values, bench.reference.values)[0] > 0.99999


@pytest.mark.parametrize('name', SCORING)
def test_every_way_of_scoring_agrees(bench, name):
    found = ROWS[name].run(bench)
    assert set(found.seconds) == {'scoring'} and spearmanr(found.values, bench.reference.values)[0] >= 0.999


def test_every_solver_gives_scores(bench):
    for name, row in SOLVERS.items():
        found = row.run(bench)
        assert found.values.shape == (200,) and set(found.seconds) == {'gradient', 'solve', 'scoring'}, name
    assert spearmanr(ROWS['CG-accurate'].run(bench).values, bench.reference.values)[0] > 0.99


def test_settings_tell_rows_apart():
    assert len({(r.settings, r.name == 'last-layer') for r in SOLVERS.values()}) == len(SOLVERS)
    assert "damping='λ'" in ROWS['CG'].settings and 'after CG' in ROWS['CG-warm'].settings


# records

ASKED = ['finite', 'CG', 'Identity', 'kronfluence_ekfac', 'torch_influence_cg']


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp('results')
    with pytest.MonkeyPatch.context() as patch:
        for name in LIBRARIES:
            patch.setitem(sys.modules, name, None)
        lines = []
        return out, *influence_bench(TASK, rows=ASKED, repeats=1, out=out, log=lines.append), lines


def test_rows_are_recorded(results):
    out, records, missing, lines = results
    assert [r.method for r in records] == ASKED[:3] and {
        r.method for r in load_records(out, EXPERIMENT, 'smoke')
    } == set(ASKED[:3])
    for r in records:
        m = r.metrics
        assert (
            m['cost_total'] > 0
            and m['ratio_to_default'] > 0
            and m['peak_memory_ratio'] > 0
            and m['forward_ms'] > 0
            and -1 <= m['spearman'] <= 1
        )
        assert (
            r.student == 'cnn8'
            and r.config['damping'] == m['damping'] == 0.1
            and r.dataset['rows'] == dict(train=200, val=100)
        )
    by = {r.method: r.metrics for r in records}
    assert (
        by['CG']['ratio_to_default'] == by['finite']['ratio_to_default'] == 1
        and by['CG']['residual'] < 1
        and by['Identity']['residual'] is None
    )
    assert by['CG']['repeats'] == 1 and by['finite']['repeats'] == 5 and by['finite']['cost_gradient'] is None


def test_missing_libraries_are_named(results):
    _, _, missing, lines = results
    assert missing == dict(kronfluence_ekfac='not installed', torch_influence_cg='not installed')
    assert (
        len(lines) == 5
        and 'kronfluence EK-FAC' in lines[3]
        and 'pip install "kd_aif[bench]"' in lines[3]
        and 'github.com/alstonlo/torch-influence' in lines[4]
    )


def test_a_second_call_runs_nothing(results, without_libraries, monkeypatch):
    out, records, _, _ = results
    monkeypatch.setattr(cost, 'Bench', never)
    again, _ = influence_bench(TASK, rows=ASKED[:3], repeats=3, out=out, **quiet)
    assert [r.time for r in again] == [r.time for r in records]


def test_another_damping_is_another_record(results, tmp_path):
    out, records, _, _ = results
    auto, _ = influence_bench(TASK, 'auto', ['Identity'], 1, tmp_path, **quiet)
    assert (
        auto[0].config['damping'] == 'auto'
        and 0 < auto[0].metrics['damping'] != 0.1
        and auto[0].key != records[2].key
    )


def test_an_interrupt_leaves_what_is_finished(tmp_path, monkeypatch):
    measured, calls = measure, []

    def interrupted(bench, row, repeats):
        calls.append(row.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(bench, row, repeats)

    monkeypatch.setattr(cost, 'measure', interrupted)
    with pytest.raises(KeyboardInterrupt):
        influence_bench(TASK, rows=['finite', 'Identity'], repeats=1, out=tmp_path, **quiet)
    influence_bench(TASK, rows=['finite', 'Identity'], repeats=1, out=tmp_path, **quiet)
    assert calls == ['finite', 'Identity', 'Identity'] and len(load_records(tmp_path)) == 2


def test_tables_show_what_was_not_run(results):
    _, records, missing, _ = results
    table = cost_table(records, expected=['CG-accurate'], missing=missing)
    text = table._repr_markdown_()
    assert (
        {len(r) for r in table.rows} == {len(table.header)}
        and '| CG, accurate | not run |' in text
        and '| kronfluence EK-FAC | not installed |' in text
    )
    assert 'ms here' in table.caption and cost_table([], expected=['CG']).rows[0][1] == 'not run'


def test_unknown_rows_are_refused():
    with pytest.raises(ValueError, match='rows: unknown GMRES; use forward'):
        influence_bench(TASK, rows=['CG', 'GMRES'])
    with pytest.raises(ValueError, match='repeats is 0'):
        influence_bench(TASK, repeats=0)
    with pytest.raises(ValueError, match='rows: unknown GMRES; use kronfluence'):
        lds_bench(TINY, rows=['GMRES'])


# comparison with retraining


def test_held_rows_are_the_same_matrix(bench):
    v = torch.randn(bench.flat.size, 3, generator=torch.Generator().manual_seed(0))
    held, streamed = HeldGaussNewton(bench.flat, bench.train), GaussNewton(bench.flat, bench.train)
    assert torch.allclose(held @ v, streamed @ v, rtol=1e-3, atol=1e-5) and torch.allclose(
        held @ v[:, 0], (held @ v)[:, 0], atol=1e-6
    )
    assert held.matvecs == 7


def test_query_scores_are_influence_scores(bench):
    direct = all_layer_scores(
        bench.model, bench.loss, bench.train, bench.val, CG(0.1), target='sample', progress=False
    )
    assert (
        spearmanr(
            direct.values.flatten(), query_scores(bench.model, bench.train, bench.val, CG(0.1)).flatten()
        )[0]
        > 0.9999
    )


def test_differences_are_paired():
    g = torch.Generator().manual_seed(0)
    truth, subsets = torch.randn(50, 5, generator=g, dtype=torch.float64), half_subsets(50, 20)
    retrained = RetrainedLosses(
        torch.stack([-truth[rows].sum(0) for rows in subsets])[:, None], tuple(subsets), (0,)
    )
    noisy = truth + 2 * torch.randn(50, 5, generator=g, dtype=torch.float64)
    for a, b in ((truth, noisy), (truth.mean(1), noisy.mean(1))):
        d, e, zero = (
            lds_difference(a, b, retrained, 60),
            lds_difference(b, a, retrained, 60),
            lds_difference(a, a, retrained, 10),
        )
        assert (
            d['low'] <= d['value'] <= d['high']
            and d['value'] > 0
            and abs(d['value'] + e['value']) < 1e-12
            and abs(d['low'] + e['high']) < 1e-9
        )
        assert zero == dict(value=0.0, low=0.0, high=0.0)


def test_the_comparison_goes_on_where_it_stopped(tmp_path, without_libraries, monkeypatch):
    lines, rows = [], ['kronfluence_ekfac', 'CG', 'Woodbury-512', 'last-layer', 'loss']
    options = dict(rows=rows, subsets=6, seeds=2, out=tmp_path, progress=False)
    records, missing = lds_bench(TINY, log=lines.append, **options)
    assert (
        [r.method for r in records] == rows[1:]
        and missing == dict(kronfluence_ekfac='not installed')
        and 'not installed' in lines[0]
    )
    for r in records:
        m = r.metrics
        assert (
            m['lds_mean_low'] <= m['lds_mean'] <= m['lds_mean_high']
            and m['lds_query_low'] <= m['lds_query'] <= m['lds_query_high']
            and m['queries'] == 30
        )
    table = lds_table(records, [('kronfluence_ekfac', 0.1)], missing)
    assert 'not installed' in table._repr_markdown_() and {len(r) for r in table.rows} == {len(table.header)}
    for name in ('retrain', 'averaged_scores'):
        monkeypatch.setattr(fidelity, name, never)
    again, _ = lds_bench(TINY, **{**options, 'rows': rows[1:]}, **quiet)
    assert [r.time for r in again] == [r.time for r in records]


def test_differences_are_recorded(tmp_path):
    records, _ = lds_bench(
        TINY,
        rows=['Identity', 'loss'],
        subsets=6,
        seeds=2,
        out=tmp_path,
        other='Identity',
        progress=False,
        **quiet,
    )
    assert [(r.method, r.config['kind']) for r in records] == [
        ('Identity', 'lds'),
        ('loss', 'lds'),
        ('loss', 'lds_difference'),
    ]
    value = records[1].metrics['lds_query'] - records[0].metrics['lds_query']
    assert (
        records[2].metrics['difference_query'] == pytest.approx(value)
        and records[2].config['other'] == 'Identity'
    )


# committed records


def committed(experiment):
    return load_records(Path(__file__).parents[2] / 'reports' / 'results', experiment)


@pytest.mark.parametrize('kind', ['scoring', 'solver', 'peer', 'lds', 'lds_difference'])
def test_committed_records_are_found_by_their_configuration(kind):
    "The settings that the code gives a row today are those that its records hold"
    found = [r for r in committed(EXPERIMENT) if r.config['kind'].partition(',')[0] == kind]
    assert found
    for r in found:
        if kind.startswith('lds'):
            config = lds_config(r.method, r.config['damping'], r.config['subsets'], r.config['seeds'], kind)
            config |= dict(other=r.config['other']) if kind == 'lds_difference' else {}
        else:
            config = dict(
                kind=r.config['kind'], damping=r.config['damping'], settings=ROWS[r.method].settings
            )
        assert config | dict(epochs=15, batch_size=64, lr=0.1) == r.config, r.method


def test_a_record_has_the_fields_of_its_task(monkeypatch):
    monkeypatch.setattr(cost, '_describe', lambda task: dict(name=task.dataset))
    record = bench_record(InfluenceTask(), 'CG', dict(kind='solver'))
    assert record.config == dict(kind='solver', epochs=15, batch_size=64, lr=0.1)
    assert (record.student, record.seed, record.tier) == ('cnn16', 0, 'lite')


# the command

SMALL = dict(model='cnn8', dataset='digits', n_val=100, out='results')


def test_command(tmp_path, monkeypatch, capsys, without_libraries):
    monkeypatch.chdir(tmp_path)
    kd_aif_bench('influence', n_train=200, epochs=4, rows='finite,CG,dattri_cg', repeats=1, **SMALL)
    shown = capsys.readouterr().out
    assert (
        '| finite differences |' in shown
        and '| CG (default) |' in shown
        and '| dattri CG (Hessian) | not installed |' in shown
    )
    kd_aif_bench('lds', n_train=80, epochs=2, rows='Identity,loss', subsets=6, seeds=2, **SMALL)
    assert '| minus the loss |' in capsys.readouterr().out
    files = (tmp_path / 'results').rglob('*.jsonl')
    found = [json.loads(line) for p in files for line in p.read_text().splitlines()]
    assert len(found) == 4 and {r['experiment'] for r in found} == {'25_speed_and_fidelity'}


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(what='speed'), "what is 'speed'"),
        (dict(what='lds', damping='-1'), "damping is '-1'"),
        (dict(what='influence', damping='often'), 'or auto'),
        (dict(what='influence', rows='GMRES'), 'unknown GMRES'),
        (dict(what='influence', dataset='mnist'), 'mnist'),
    ],
)
def test_errors_have_a_remedy(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        kd_aif_bench(**{**SMALL, 'out': str(tmp_path), **arguments})
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_has_the_fields_of_the_settings(monkeypatch, tmp_path):
    from kd_aif.benchmarks import cli

    seen = []
    monkeypatch.setitem(cli._RUNS, 'lds', seen.append)
    line = f'kd_aif_bench lds --model cnn8 --dataset digits --damping auto --peers --n_val 7 --out {tmp_path}'
    monkeypatch.setattr(sys, 'argv', line.split())
    kd_aif_bench()
    changes = dict(model='cnn8', dataset='digits', damping='auto', peers=True, n_val=7, out=str(tmp_path))
    assert seen == [BenchSettings('lds', **changes)] and seen[0].threads == 1 and not seen[0].channels_first


def test_every_library_has_a_label():
    assert set(LIBRARY_LABELS) == set(REFERENCE_LIBRARIES) and all(
        row_label(n) != n for n in (*ROWS, *LDS_ROWS) if n != 'LiSSA'
    )


def test_the_command_line_measures_steps_with_few_labels(monkeypatch, capsys, tmp_path):
    from kd_aif.benchmarks import cli as bench
    from kd_aif.reporting.records import make_record

    seen = {}

    def measure(task, rounds, out):
        seen.update(task=task, rounds=rounds, out=out)
        data = dict(name='digits', fingerprint='0', rows=dict(labelled=40), noise=dict(kind='none'), note='')
        return make_record(
            experiment='ssl_cost',
            tier='smoke',
            dataset=data,
            method='ssl_cost',
            teacher='',
            student='cnn4',
            seed=0,
            config=dict(methods=['fixmatch', 'kd_aif_ssl'], batch_size=20, mu=3, device='cpu'),
            metrics=dict(
                first_seconds_per_step=0.01,
                second_seconds_per_step=0.012,
                ratio=1.2,
                ratio_low=1.1,
                ratio_high=1.3,
            ),
        )

    monkeypatch.setattr(bench, 'ssl_cost_bench', measure)
    bench.kd_aif_bench('ssl', dataset='digits', model='cnn4', repeats=2, out=str(tmp_path))
    assert (seen['task'].dataset, seen['task'].student, seen['rounds']) == ('digits', 'cnn4', 2)
    assert (
        'FixMatch 10.0 ms a step, KD-AIF, semi-supervised 12.0 ms, 1.20 times as much (1.10 to 1.30)'
        in capsys.readouterr().out
    )
