"The full tier as its records arrive: invented records in temporary folders, and pages executed beside them."

import dataclasses, re, shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from kd_aif.experiments.cli import kd_aif_report
from kd_aif.experiments.expected_runs import EXPECTED, run_groups
from kd_aif.experiments.full_tables import comparisons, full_table, missing_line, outcome_sentence
from kd_aif.experiments.full_tier import TITLES, full_quality_items, full_tier_items, full_tier_sections
from kd_aif.experiments.methods import run_identity
from kd_aif.experiments.tasks import make_task
from kd_aif.reporting.methods import METHODS
from kd_aif.reporting.record_files import load_records, save_record
from kd_aif.reporting.records import make_record, setting_of
from kd_aif.reporting.summary import SummaryTable

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / 'reports' / 'published'
NOT_RUN = re.compile(r'Full tier: not run \((\d+) runs? (?:is|are) queued\)\.')
CLEAN, NOISY, DEEP = (e for e in EXPECTED if e.experiment == '20_cifar100')
HUMAN = next(e for e in EXPECTED if e.noise == 'human')
FEW = [e for e in EXPECTED if 'supervised' in e.methods]
SCORED = [e for e in EXPECTED if e.experiment == '25_full_size']


def invented(expected, method, seed, accuracy=0.5, **changes):
    "A record as the full tier has them, with invented numbers"
    noise = dict(kind='none')
    if expected.noise not in ('none', ''):
        noise = dict(kind=expected.noise, rate=expected.rate, seed=seed)
    few = expected in FEW
    labels = dict(cifar10=4000, svhn=1000).get(expected.dataset)
    config = dict(n_labelled=labels, steps=2**15) if few else dict(epochs=expected.epochs, n_val=5000)
    metrics = dict(test_accuracy=accuracy, teacher_test_accuracy=accuracy + 0.02)
    if expected.noise not in ('none', '') and method.startswith(('kd_aif', 'sigmoid', 'small', 'oracle')):
        metrics |= dict(weight_auc=0.9 + 0.01 * seed, true_clean_fraction=0.6)
        metrics |= dict(clean_fraction=0.62 + 0.01 * seed) if method.startswith('kd_aif') else {}
    fields = dict(
        experiment=expected.experiment,
        tier='full',
        dataset=dict(name=expected.dataset, noise=noise, note=expected.note, rows=dict(train=45_000)),
        method=method,
        teacher=expected.teacher,
        student=expected.student,
        seed=seed,
        config=config,
        metrics=metrics,
        seconds=dict(teacher=100.0, student=50.0),
        device='NVIDIA example',
        versions=dict(torch='9.9.9'),
        peak_memory=2048.0,
    )
    return make_record(**fields | changes)


def accuracy(i, seed):
    "Invented accuracies that rise with the place of the method, with differences that vary a little"
    return 0.6 + 0.01 * i + 0.005 * seed + 0.0003 * i * seed


def all_runs(expected):
    methods = expected.methods
    runs = []
    for i, m in enumerate(methods):
        for s in expected.seeds:
            changes = {}
            if expected in SCORED:
                changes = dict(seconds=dict(curvature=1.0 + 5 * i, scoring=1.5), metrics={})
            runs.append(invented(expected, m, s, accuracy(i, s), **changes))
    return runs


def saved(folder, runs):
    for r in runs:
        save_record(r, folder)
    return load_records(folder)


def reads_human_labels():
    "Whether the tables take the name of a set of human labels for a rate"
    try:
        setting_of(invented(HUMAN, 'kd_val', 0))
    except ValueError:
        return False
    return True


human_labels = pytest.mark.skipif(
    not reads_human_labels(), reason='reporting takes numbers only for the rate of label noise'
)


def text_of(item):
    "One item as text; '' for a figure"
    if isinstance(item, pd.DataFrame):
        return item.to_string(max_colwidth=None)
    return str(item) if isinstance(item, (str, SummaryTable)) else ''


def texts(items):
    "The items as text"
    return '\n'.join(map(text_of, items))


def tables(items):
    return [x for x in items if isinstance(x, SummaryTable)]


# What is expected


def test_expected_runs_are_distinct_and_have_the_control():
    keys = [(e.experiment, e.dataset, e.noise, e.rate, e.teacher, e.student, e.epochs) for e in EXPECTED]
    assert len(set(keys)) == len(EXPECTED) == len({e.label for e in EXPECTED})
    for e in EXPECTED:
        assert len(set(e.methods)) == len(e.methods) and len(set(e.seeds)) == len(e.seeds) > 0
        if e not in SCORED:
            assert {'kd_val', 'sigmoid_student'} <= set(e.methods) or e in FEW and 'supervised' in e.methods
    assert set(TITLES) == {e.experiment for e in EXPECTED}


@pytest.mark.parametrize('expected', EXPECTED, ids=lambda e: e.label)
def test_every_expected_run_finds_its_table(expected, tmp_path):
    runs = all_runs(expected)
    groups = run_groups(saved(tmp_path, runs), expected.experiment)
    own = next(g for g in groups if g.expected == expected)
    assert len(own.records) == len(runs) and not own.missing
    assert all(not g.records for g in groups if g is not own)
    assert len(runs) == expected.n_runs


@pytest.mark.parametrize('expected', [CLEAN, NOISY, DEEP], ids=lambda e: e.label)
def test_runs_of_the_command_line_are_covered(expected):
    "A task made as `kd_aif_run` makes it gives records of that table"
    noise = dict(noise=expected.noise, rate=expected.rate) if expected.rate else {}
    networks = dict(teacher=expected.teacher, student=expected.student, epochs=expected.epochs)
    task = make_task(expected.dataset, 'full', **networks, **noise)
    described = dict(
        name=expected.dataset, noise=dict(kind=expected.noise, rate=expected.rate), imbalance=1.0
    )
    for name in (m for m in expected.methods if m in METHODS):
        identity = run_identity(task, name, described | dict(note=''), expected.experiment)
        assert [e for e in EXPECTED if e.covers(make_record(**identity, metrics={}))] == [expected]
    assert task.n_val == 5000 and task.n_train is None and task.label is None


def test_a_run_that_is_missing_is_named(tmp_path):
    runs = [r for r in all_runs(NOISY) if (r.method, r.seed) != ('kd_aif_both', 1)]
    group = run_groups(saved(tmp_path, runs), '20_cifar100')[1]
    assert group.missing == [('kd_aif_both', 1)]
    assert missing_line(group) == 'Not run: KD-AIF, teacher and student (seed 1).'


# Nothing is mixed


@pytest.mark.parametrize(
    'changes',
    [
        dict(config=dict(epochs=200)),
        dict(teacher='resnet110'),
        dict(student='wrn_40_1'),
        dict(dataset=dict(name='cifar100', noise=dict(kind='symmetric', rate=0.2))),
        dict(dataset=dict(name='cifar100', noise=dict(kind='symmetric', rate=0.4), imbalance=10.0)),
        dict(dataset=dict(name='cifar100', noise=dict(kind='human', rate='worst'))),
    ],
    ids=['epochs', 'teacher', 'student', 'rate', 'imbalance', 'human'],
)
def test_other_settings_are_tables_of_their_own(changes, tmp_path):
    other = invented(NOISY, 'kd_val', 0, 0.99, **changes)
    groups = run_groups(saved(tmp_path, [*all_runs(NOISY), other]), '20_cifar100')
    assert [len(g.records) for g in groups] == [0, 21, 0, 1]
    assert groups[3].records[0].metrics['test_accuracy'] == 0.99 and not groups[3].missing


@pytest.mark.parametrize('tier', ['lite', 'smoke'])
def test_other_tiers_are_left_out(tier, tmp_path):
    records = saved(tmp_path, [invented(NOISY, 'kd_val', 0, tier=tier)])
    assert NOT_RUN.fullmatch(*full_tier_items(records, '20_cifar100'))


def test_numbers_of_steps_are_not_mixed(tmp_path):
    few, config = FEW[0], dict(n_labelled=4000, steps=2**17)
    more = [dataclasses.replace(r, config=config) for r in all_runs(few)[:2]]
    items = full_tier_items(saved(tmp_path, [*all_runs(few), *more]), few.experiment)
    assert [len([r for r in t.rows if r['runs']]) for t in tables(items)] == [5, 2]
    assert '32,768 steps' in items[0] and any('131,072 steps' in x for x in items if isinstance(x, str))


def test_a_method_without_a_teacher_stands_beside_its_students(tmp_path):
    records = saved(tmp_path, [*all_runs(CLEAN), invented(CLEAN, 'ce', 0, teacher='')])
    assert 'ce' in {r['method'] for r in full_table(run_groups(records, '20_cifar100')[0]).rows}


# What is shown follows the records


def row(group, method):
    return next(r for r in full_table(group).rows if r['method'] == method)


def test_one_accuracy_moves_mean_difference_and_sentence(tmp_path):
    runs = all_runs(NOISY)
    group = run_groups(saved(tmp_path, runs), '20_cifar100')[1]
    before, sentence = row(group, 'kd_aif_student'), outcome_sentence(comparisons(group))
    values = [100 * accuracy(NOISY.methods.index('kd_aif_student'), s) for s in range(3)]
    base = [100 * accuracy(NOISY.methods.index('kd_val'), s) for s in range(3)]
    assert before['mean'] == pytest.approx(np.mean(values)) and before['std'] == pytest.approx(
        np.std(values, ddof=1)
    )
    d = before['differences']['kd_val']['paired']
    assert d.n == 3 and d.mean == pytest.approx(np.mean(values) - np.mean(base)) and d.low > 0
    i = next(i for i, r in enumerate(runs) if (r.method, r.seed) == ('kd_aif_student', 2))
    worse = dataclasses.replace(runs[i], metrics=runs[i].metrics | dict(test_accuracy=0.10))
    after_group = run_groups(saved(tmp_path, [worse]), '20_cifar100')[1]
    after = row(after_group, 'kd_aif_student')
    assert after['mean'] == pytest.approx(np.mean([*values[:2], 10.0]))
    assert after['differences']['kd_val']['paired'].mean < 0 < after['differences']['kd_val']['paired'].high
    changed = outcome_sentence(comparisons(after_group))
    assert sentence != changed and 'undecided' not in sentence and 'undecided' in changed


def test_the_negative_is_said_first(tmp_path):
    runs = all_runs(NOISY)
    good = outcome_sentence(comparisons(run_groups(saved(tmp_path / 'good', runs), '20_cifar100')[1]))
    assert '): 6 of 6 above zero with the whole interval' in good
    lower = []
    for r in runs:
        shift = 0.2 if r.method in ('kd_aif_student', 'kd_aif_twice') else 0.0
        lower.append(
            dataclasses.replace(r, metrics=r.metrics | dict(test_accuracy=r.metrics['test_accuracy'] - shift))
        )
    bad = outcome_sentence(comparisons(run_groups(saved(tmp_path / 'bad', lower), '20_cifar100')[1]))
    assert '): 4 of 6 below zero with the whole interval: ' in bad
    assert bad.index('below zero') < bad.index('above zero')


def test_the_published_form_and_the_strongest_rival_are_faced():
    runs = [r for r in all_runs(NOISY) if r.method != 'kd_aif_twice']
    runs += [invented(NOISY, 'confident_learning', s, 0.9) for s in range(3)]
    runs += [invented(NOISY, 'small_loss_calibrated_both', s, 0.8) for s in range(3)]
    others = {c.other for c in comparisons(run_groups(runs, '20_cifar100')[1])}
    wanted = ('kd_val', 'sigmoid_student', 'confident_learning')
    assert others == {METHODS[m].label for m in wanted}


def test_a_loss_under_our_weights_is_compared_with_the_loss():
    found = comparisons(run_groups(all_runs(DEEP), '20_cifar100')[2])
    labels = {(c.method, c.other) for c in found}
    assert (METHODS['dkd_aif'].label, METHODS['dkd'].label) in labels
    assert all(c.difference.n == 3 for c in found)


def test_items_of_a_page(tmp_path):
    runs = [r for r in all_runs(NOISY) if r.method != 'kd_aif_twice']
    items = full_tier_items(saved(tmp_path, runs), '20_cifar100', PUBLISHED)
    text, shown = texts(items), tables(items)
    assert len(shown) == 1 and 'KD-AIF, two generations  not run' in re.sub(' {2,}', '  ', str(shown[0]))
    assert [int(n) for n in NOT_RUN.findall(text)] == [21, 18]
    assert 'NVIDIA example, PyTorch 9.9.9' in text and 'The published form is' in text
    assert sum(isinstance(x, plt.Figure) for x in items) == 1
    assert 'Published figures' not in text  # none are of noisy labels
    assert 'Published figures' in texts(full_tier_items(all_runs(CLEAN), '20_cifar100', PUBLISHED))
    assert 'Published figures' not in texts(full_tier_items(all_runs(CLEAN), '20_cifar100'))


def test_one_line_where_nothing_was_run():
    for name in TITLES:
        items = full_tier_items([], name, PUBLISHED)
        n = sum(e.n_runs for e in EXPECTED if e.experiment == name)
        assert len(items) == 1 and NOT_RUN.fullmatch(items[0])[1] == str(n)
    assert len(full_quality_items([])) == 1
    assert [h for h, _ in full_tier_sections([])] == ['Full tier']


def test_published_figures_say_what_differs():
    items = full_tier_items(all_runs(DEEP), '20_cifar100', PUBLISHED)
    differs, table = items[-3:-1]
    assert 'best epoch on the test set' in differs and '240 epochs' in differs
    values = [100 * accuracy(DEEP.methods.index('dkd'), s) for s in range(3)]
    assert f'| DKD | 76.32 | {np.mean(values):.2f} ± ' in table and '(a) RepDistiller README' in table
    assert '| MLKD + LSKD | 78.28 | – |' in table  # the highest is not left out


def test_few_labels(tmp_path):
    few = FEW[0]
    items = full_tier_items(saved(tmp_path, all_runs(few)), few.experiment, PUBLISHED)
    text = texts(items)
    assert tables(items)[0].controls[0] == 'supervised'
    assert 'undecided' in text and 'none of' in text  # one seed
    assert '32,768 steps each' in text and 'FixMatch' in text
    svhn = full_tier_items(all_runs(FEW[1]), FEW[1].experiment, PUBLISHED)
    assert 'Published figures' not in texts(svhn)  # of the part of the data that was at hand there are none


def test_the_goal_of_five_seconds(tmp_path):
    runs = [r for e in SCORED for r in all_runs(e)]
    items = full_tier_items(saved(tmp_path, runs), '25_full_size', PUBLISHED)
    text = texts(items)
    label = METHODS['woodbury'].label
    assert f'4 of 6 take longer than the goal of 5 s (*{label}, resnet56* 7.5 s' in text
    assert '2,048' in text and 'kronfluence' in text
    quicker = [dataclasses.replace(r, seconds=dict(curvature=1.0, scoring=1.0)) for r in runs]
    assert '0 of 6 take longer' in texts(full_tier_items(quicker, '25_full_size'))
    with pytest.raises(ValueError, match="needs 'scoring'"):
        full_tier_items([dataclasses.replace(runs[0], seconds=dict(solve=1.0))], '25_full_size')


def test_weights_and_wrong_labels():
    items = full_quality_items(all_runs(NOISY))
    text = texts(items)
    assert '0 of 3 methods miss the fraction of right labels by more than 5 points' in text
    runs = []
    for r in all_runs(NOISY):
        off = dict(clean_fraction=0.9) if r.method == 'kd_aif_both' else {}
        runs.append(dataclasses.replace(r, metrics=r.metrics | off))
    assert '1 of 3 methods miss' in texts(full_quality_items(runs))


@human_labels
def test_human_labels():
    items = full_tier_items(all_runs(HUMAN), '24_human', PUBLISHED)
    text = texts(items)
    assert len(tables(items)) == 1 and '96.34' in text and 'ProMix' in text
    assert 'Full tier: not run' not in text and re.search(r'minus \*elr\b|minus \*ELR\b|minus \*early', text)
    assert 'human labels (worst)' in texts(full_quality_items(all_runs(HUMAN)))


# The report and the pages


def test_kd_aif_report(tmp_path):
    saved(tmp_path / 'results', all_runs(NOISY)[:9])
    other = invented(NOISY, 'kd', 0, experiment='my_own', tier='lite')
    save_record(other, tmp_path / 'results')
    kd_aif_report(records=tmp_path / 'results', out=tmp_path / 'a.html')
    page = (tmp_path / 'a.html').read_text()
    assert page.count('<h2>Full tier: ') == len(TITLES) + 1
    assert page.count('wrn_40_2 → wrn_16_2, 60 epochs, tier full') == 2  # accuracies, and weights
    assert '20_cifar100 · ' not in page and 'my_own · ' in page
    kd_aif_report(records=save_record(other, tmp_path / 'b').parents[1], out=tmp_path / 'b.html')
    assert 'Full tier' not in (tmp_path / 'b.html').read_text()


def execute(page, folder):
    "Text that the page displays when it is executed beside the reports of `folder`, and its number of figures"
    target = folder / 'nbs' / page
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / 'nbs' / page, target)
    nb = nbformat.read(target, 4)
    resources = {'metadata': {'path': str(target.parent)}}
    NotebookClient(nb, timeout=600, kernel_name='python3', resources=resources).execute()
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    data = [o['data'] for o in outputs if 'data' in o]
    text = '\n'.join(d.get('text/markdown') or d.get('text/html') or d.get('text/plain', '') for d in data)
    return text, sum('image/png' in d for d in data)


@pytest.fixture
def reports(tmp_path, monkeypatch):
    "A copy of the reports of the repository, without records of the full tier"
    monkeypatch.delenv('MPLBACKEND', raising=False)
    shutil.copytree(ROOT / 'reports', tmp_path / 'reports')
    for name in TITLES:
        (tmp_path / 'reports' / 'results' / name / 'full.jsonl').unlink(missing_ok=True)
    return tmp_path


def test_page_20_with_records(reports):
    saved(reports / 'reports' / 'results', [*all_runs(CLEAN), *all_runs(NOISY), *all_runs(DEEP)[:7]])
    text, _ = execute('10_experiments/20_cifar100.ipynb', reports)
    values = [100 * accuracy(NOISY.methods.index('kd_aif_both'), s) for s in range(3)]
    assert f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}' in text
    assert text.count('**What came out') == 3 and f'Not run: {METHODS["dkd"].label} (seeds 1, 2)' in text
    assert not NOT_RUN.search(text) and 'NVIDIA example, PyTorch 9.9.9' in text


@human_labels
def test_page_24_with_records(reports):
    saved(reports / 'reports' / 'results', all_runs(HUMAN))
    text, _ = execute('10_experiments/24_noise_and_shift.ipynb', reports)
    values = [100 * accuracy(HUMAN.methods.index('kd_aif_both'), s) for s in range(3)]
    assert not NOT_RUN.search(text) and f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}' in text


def test_report_with_records(reports):
    saved(reports / 'reports' / 'results', all_runs(NOISY))
    text, _ = execute('10_experiments/29_all_runs.ipynb', reports)
    assert 'Full tier: CIFAR-100' in text and NOT_RUN.findall(text)[:2] == ['21', '18']
    assert '20_cifar100 · CIFAR-100, symmetric label noise, 40 % · tier full' not in text


PAGES = {
    '20_cifar100': '10_experiments/20_cifar100',
    '21_cifar10_4k': '10_experiments/21_cifar10_4k',
    '22_svhn_1k': '10_experiments/22_svhn_1k',
    '24_human': '10_experiments/24_noise_and_shift',
    '25_full_size': '10_experiments/25_speed_and_fidelity',
}  # experiment of the full tier -> page


def test_the_committed_pages_say_once_that_nothing_was_run():
    run = {r.experiment for r in load_records(ROOT / 'reports' / 'results', tier='full')} & set(TITLES)
    pages = {page for experiment, page in PAGES.items() if experiment not in run}
    if not run:
        pages |= {'10_experiments/24b_quality', '10_experiments/29_all_runs'}
    for page in pages:
        text = (ROOT / 'nbs' / f'{page}.ipynb').read_text(encoding='utf-8')
        assert len(NOT_RUN.findall(text)) == 1, page
