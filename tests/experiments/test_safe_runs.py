"""Runs with SAFE measures: in the record, on the command line, and what is refused"""

import pytest

from kd_aif.experiments.cli import kd_aif_run
from kd_aif.experiments.methods import run_task
from kd_aif.experiments.safe_runs import (
    measure_difference,
    mean_report,
    safe_metrics,
    safe_rows,
    safe_verdict,
)
from kd_aif.experiments.storage import Storage
from kd_aif.experiments.tasks import make_task
from kd_aif.reporting.record_files import load_records

SMALL = dict(dataset='digits', n_train=400, n_val=60, epochs=1, method='ce', seeds=1, experiment='safe')


def test_the_command_line_measures_and_says_when_a_record_has_no_measures(tmp_path, capsys):
    kd_aif_run(argv=[], **SMALL, out=str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        kd_aif_run(argv=[], **SMALL, out=str(tmp_path), safe=True)
    assert stop.value.code == 2
    assert 'without SAFE measures' in capsys.readouterr().err
    kd_aif_run(argv=[], **SMALL, out=str(tmp_path), safe=True, force=True)
    (record,) = load_records(tmp_path)
    assert record.metrics['safe']['student']['accurate accuracy'] == pytest.approx(
        record.metrics['test_accuracy']
    )


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    storage = Storage(tmp_path_factory.mktemp('teachers'))
    options = dict(storage=storage, progress=False, more_metrics=safe_metrics)
    tasks = [make_task('digits', n_train=500, n_val=100, epochs=e, seed=s) for s in range(2) for e in (1,)]
    return [run_task(task, m, **options)[0] for task in tasks for m in ('ce', 'kd_val')]


def test_a_missing_measure_of_one_record_is_no_difference(records):
    key = 'accurate rga'
    left = records[0].metrics['safe']['student'].pop(key)
    assert measure_difference(records, 'rga', 'kd_val', 'ce').n == 1
    records[0].metrics['safe']['student'][key] = left
    assert measure_difference(records, 'rga', 'kd_val', 'ce').n == 2


def test_the_sentence_follows_the_records(records):
    accuracy = 'accurate accuracy'
    kept = [r.metrics['safe']['student'][accuracy] for r in records]
    for r, gain in zip(records, (0, 0.2, 0, 0.21)):
        r.metrics['safe']['student'][accuracy] = 0.5 + gain
    assert 'better in accuracy' in safe_verdict(records, 'kd_val', 'ce')
    assert 'worse in accuracy' in safe_verdict(records, 'ce', 'kd_val')
    for r, value in zip(records, kept):
        r.metrics['safe']['student'][accuracy] = value


def test_a_measure_that_only_some_networks_have_gets_a_dash(records):
    records[1].metrics['safe']['student']['fair rgf'] = 0.9
    header, rows = safe_rows(mean_report(records), ('rgf', 'rga'))
    column = header.index('RGF without the protected variable')
    assert {row[0]: row[column] for row in rows}['Cross-entropy'] == '–'
    records[1].metrics['safe']['student'].pop('fair rgf')
