"""The report: every sentence follows its records"""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from kd_aif.experiments.paper import claim_row, gains_figure, settings_rows
from kd_aif.experiments.tasks import TASKS
from kd_aif.reporting.claims import gain, gain_cell, gain_words
from kd_aif.reporting.labels import dataset_label
from kd_aif.reporting.record_files import load_records
from kd_aif.reporting.records import group_records

ROOT = Path(__file__).parents[2]
REPORT = ROOT / 'nbs' / '90_report.ipynb'


def texts(nb):
    "Markdown that the cells show, by cell"
    found = {}
    for cell in nb.cells:
        shown = [o.get('data', {}).get('text/markdown', '') for o in cell.get('outputs', [])]
        if any(shown):
            found[cell.id] = '\n'.join(shown)
    return found


def symmetric_noise():
    "The committed records of CIFAR-10 with symmetric noise, 40 %"
    records = load_records(ROOT / 'reports' / 'results', '24_noise_and_shift', 'lite')
    groups = {(s.dataset, s.noise, s.rate, s.imbalance): rs for s, rs in group_records(records).items()}
    return groups['cifar10', 'symmetric', 0.4, 1.0]


@pytest.fixture
def mutated(tmp_path, monkeypatch):
    "The report on records of which one has another accuracy"
    monkeypatch.delenv('MPLBACKEND', raising=False)
    for name in ('results', 'development'):
        shutil.copytree(ROOT / 'reports' / name, tmp_path / 'reports' / name)
    file = tmp_path / 'reports' / 'results' / '24_noise_and_shift' / 'lite.jsonl'
    records = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
    noise = dict(kind='symmetric', rate=0.4, seed=0)
    wanted = dict(method='kd_aif_both', seed=0)
    (record,) = [
        r
        for r in records
        if r['dataset']['noise'] == noise
        and r['dataset']['name'] == 'cifar10'
        and r['dataset']['imbalance'] == 1
        and {k: r[k] for k in wanted} == wanted
    ]
    record['metrics']['test_accuracy'] -= 0.1
    file.write_text('\n'.join(map(json.dumps, records)) + '\n', encoding='utf-8')
    nb = nbformat.read(REPORT, 4)
    (tmp_path / 'nbs').mkdir()
    place = {'metadata': {'path': str(tmp_path / 'nbs')}}
    NotebookClient(nb, timeout=300, kernel_name='python3', resources=place).execute()
    return texts(nb)


def test_one_accuracy_changes_every_sentence_that_quotes_it_and_no_other(mutated):
    committed = texts(nbformat.read(REPORT, 4))
    assert committed.keys() == mutated.keys()
    records = symmetric_noise()
    pairs = (
        ('kd_aif_both', 'kd_val'),
        ('kd_aif_both', 'small_loss_calibrated_both'),
        ('kd_aif_twice', 'kd_aif_both'),
    )
    quoted = [words(gain(records, *pair)) for pair in pairs for words in (gain_words, gain_cell)]
    quoting = {cell for cell, text in committed.items() if any(q in text for q in quoted)}
    assert len(quoting) == 3  # the abstract, the table beside the strongest rival, what did not work
    changed = {cell for cell, text in committed.items() if text != mutated[cell]}
    assert changed == quoting
    assert not any(q in text for text in mutated.values() for q in quoted)


def test_no_measured_number_is_typed():
    "Prose has no number with a decimal point and no signed one: those come from code, which reads records"
    nb = nbformat.read(REPORT, 4)
    prose = '\n'.join(c.source.partition('## References')[0] for c in nb.cells if c.cell_type == 'markdown')
    prose = re.sub(r'\$\$?.*?\$\$?|\]\([^)]*\)', '', prose, flags=re.DOTALL)
    assert re.findall(r'(?<![\w.])[+−-]?\d+\.\d+|(?<![\w.])[+−]\d+', prose) in ([], ['0.5'])  # α = 0.5


def test_the_report_shows_no_error_and_no_raw_name():
    nb = nbformat.read(REPORT, 4)
    kinds = {o.output_type for cell in nb.cells for o in cell.get('outputs', [])}
    assert 'error' not in kinds
    for text in texts(nb).values():
        assert 'kd_aif_' not in text


def test_settings_are_those_of_the_tasks():
    header, rows = settings_rows()
    assert {row[0] for row in rows} == {dataset_label(dataset) for dataset, tier in TASKS if tier == 'lite'}
    assert all(len(row) == len(header) for row in rows)


def test_a_setting_without_records_says_not_run():
    row = claim_row('nothing', [])
    assert row[1:3] == ['–', 'not run']
    assert row[-1] == '0'
    figure = gains_figure(dict(nothing=[]), ('kd_aif_both',))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ['nothing']
