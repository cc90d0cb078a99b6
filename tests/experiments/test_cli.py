"The console scripts: records that are written once and whole, reports that need no network, and mistakes that end with one line and no file."

import json, multiprocessing, os, re, runpy, shutil, signal, subprocess, sys, time
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest, torch
from PIL import Image
from kd_aif.data.human_labels import HUMAN_LABELS
from kd_aif.experiments import cli
from kd_aif.experiments.cli import QUICKSTART
from kd_aif.experiments.options import command_parser, field_comments, read_options
from kd_aif.experiments.ssl_tasks import SSLTask
from kd_aif.experiments.tasks import Task
from kd_aif.foundation.state_files import load_state
from kd_aif.reporting.conclusions import conclude
from kd_aif.reporting.record_files import load_records


def script(name):
    "The installed console script"
    found = shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    )
    assert found, f'{name} is not installed; pip install -e .'
    return found


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "A cache and a working directory of its own, no data folder, one thread; PyTorch's number of threads is put back."
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.delenv('KD_AIF_DATA', raising=False)
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as in the child processes that are killed: another number rounds in another way on some machines
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def console(monkeypatch, capsys):
    "Runs a console script within this process, as if from a shell: exit code, standard output, standard error."

    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        code = 0
        try:
            runpy.run_path(script(name), run_name='__main__')
        except SystemExit as e:
            code = e.code or 0
        return code, *capsys.readouterr()

    return run


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in Path(folder).rglob('*') if f.is_file())


def lines(folder):
    "How many records the files of a folder hold"
    return sum(len(f.read_text().splitlines()) for f in Path(folder).rglob('*.jsonl'))


short = '--dataset', 'digits', '--epochs', 1, '--seeds', 1, '--out', 'results'


def test_script_writes_a_record_and_the_next_call_finds_it(tmp_path, console):
    "Once in a process of its own, then twice more."
    args = *short, '--method', 'kd_val,kd_aif_student', '--noise', 'symmetric', '--rate', 0.3
    done = subprocess.run([script('kd_aif_run'), *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = Path('results')
    assert (
        files(results) == ['digits_noise/smoke.jsonl']
        and lines(results) == 2
        and 'Traceback' not in done.stderr
    )
    records = load_records(results)
    assert (
        [r.method for r in records] == ['kd_val', 'kd_aif_student']
        and {r.experiment for r in records} == {'digits_noise'}
        and {r.tier for r in records} == {'smoke'}
    )
    for r in records:
        assert r.dataset['noise'] == dict(kind='symmetric', rate=0.3, seed=0) and r.dataset['rows'] == dict(
            train=997, val=300, test=500
        )
        assert (
            0 < r.metrics['test_accuracy'] < 1
            and r.metrics['true_clean_fraction'] == pytest.approx(0.73, abs=0.03)
            and r.config['epochs'] == 1
        )
        assert f"{r.metrics['test_accuracy']:.2%}" in done.stdout and str(r.path(results)) in done.stdout
    assert done.stdout.count('written') == 2 and 'already there' not in done.stdout
    assert (
        records[1].metrics['weight_auc'] is not None
        and 'clean_fraction' in records[1].metrics
        and 'clean_fraction' not in records[0].metrics
    )

    before = {f: (results / f).stat().st_mtime_ns for f in files(results)}
    code, out, err = console('kd_aif_run', *args)
    assert code == 0 and out.count('already there') == 2 and 'written' not in out
    assert before == {f: (results / f).stat().st_mtime_ns for f in files(results)}
    code, out, err = console('kd_aif_run', *args, '--force')
    assert (
        code == 0
        and out.count('written') == 2
        and 'already there' not in out
        and files(results) == sorted(before)
        and lines(results) == 2
    )
    again = load_records(results)
    assert [r.metrics['test_accuracy'] for r in again] == [r.metrics['test_accuracy'] for r in records], (
        'the same run again gives the same result'
    )
    assert all(a.time > b.time for a, b in zip(again, records))


def images_with_human_labels(folder):
    "200 grey images in the layout of CIFAR-10, each fourth of which people took for the next class"
    folder.mkdir(parents=True)
    for split in ('train', 'test'):
        images, y = [], [i % 10 for i in range(200)]
        for c in y:
            file = BytesIO()
            Image.new('RGB', (8, 8), (25 * c,) * 3).save(file, 'PNG')
            images.append(dict(bytes=file.getvalue(), path=None))
        pd.DataFrame(dict(img=images, label=y)).to_parquet(folder / f'{split}-00000-of-00001.parquet')
    by_people = [(c + 1) % 10 if i % 4 == 0 else c for i, c in enumerate(y)]
    columns = dict.fromkeys(HUMAN_LABELS, by_people) | dict(clean_label=y)
    pd.DataFrame(columns).to_parquet(folder / 'human-labels.parquet')


def test_human_labels_from_the_command_line(tmp_path, console):
    images_with_human_labels(tmp_path / 'data' / 'cifar10')
    small = '--n_train', 150, '--n_val', 50, '--epochs', 1, '--teacher', 'mlp8', '--student', 'mlp8'
    common = '--dataset', 'cifar10', '--method', 'ce', '--seeds', 1, '--data', tmp_path / 'data'
    noise = '--noise', 'human', '--rate', 'worst'
    code, out, err = console('kd_aif_run', *common, *small, *noise, '--out', 'results')
    assert code == 0, err
    assert 'human labels (worst)' in out
    (r,) = load_records('results')
    assert r.dataset['noise'] == dict(kind='human', rate='worst') and r.config['rate'] == 'worst'
    assert r.metrics['true_clean_fraction'] == pytest.approx(0.75, abs=0.08)
    code, out, err = console('kd_aif_run', *common, *small, *noise, '--out', 'results')
    assert code == 0 and 'already there' in out
    (tmp_path / 'data' / 'cifar10' / 'human-labels.parquet').unlink()
    code, out, err = console('kd_aif_run', *common, *small, *noise, '--out', 'more')
    assert code == 2 and 'cifar-10-100n' in err and not Path('more').exists()


def test_each_setting_has_its_record(console):
    for change in ((), ('--epochs', 2), ('--student', 'mlp8'), ('--first_seed', 3), ('--imbalance', 2)):
        code, out, err = console('kd_aif_run', *short, '--method', 'ce', *change)
        assert code == 0 and out.count('written') == 1, (change, err)
    assert len(load_records('results')) == 5 and sorted(r.seed for r in load_records('results')) == [
        0,
        0,
        0,
        0,
        3,
    ]


def test_settings_that_a_method_does_not_use_do_not_make_a_new_run(console):
    assert 'written' in console('kd_aif_run', *short, '--method', 'ce')[1]
    assert (
        'already there'
        in console('kd_aif_run', *short, '--method', 'ce', '--teacher', 'mlp4', '--score', 'posterior')[1]
    )


def test_one_method_twice_is_run_once(console):
    code, out, err = console('kd_aif_run', *short, '--method', 'ce,ce')
    assert code == 0 and out.count('written') == 1 and lines('results') == 1, err


def _many_runs(log):
    sys.stdout = open(log, 'w', buffering=1)
    torch.set_num_threads(1)
    cli.kd_aif_run(dataset='digits', method='ce', seeds=200, epochs=1, out='results')


def test_interrupted_run_leaves_whole_records_and_goes_on_from_there(tmp_path, console):
    log = tmp_path / 'log'
    child = multiprocessing.get_context('fork').Process(target=_many_runs, args=(log,))
    child.start()
    try:
        for _ in range(1200):
            if log.exists() and 'written' in log.read_text():
                break
            assert child.is_alive(), 'ended by itself'
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.join()
    records = load_records('results')  # raises for a file that is broken
    assert 0 < len(records) < 200 and lines('results') == len(records), files('results')
    code, out, err = console('kd_aif_run', *short, '--method', 'ce')
    assert code == 0 and out.count('already there') == 1
    settings = (
        'kd_aif_run',
        '--dataset',
        'digits',
        '--method',
        'ce',
        '--epochs',
        1,
        '--seeds',
        len(records) + 1,
    )
    assert console(*settings, '--out', 'results')[0] == 0 and console(*settings, '--out', 'whole')[0] == 0
    accuracies = [
        {r.seed: r.metrics['test_accuracy'] for r in load_records(folder)} for folder in ('results', 'whole')
    ]
    assert len(accuracies[1]) == len(records) + 1 and accuracies[0] == accuracies[1], (
        'it ends with the same numbers'
    )


def test_failure_while_writing_leaves_nothing(console, monkeypatch):
    def full(*args):
        raise OSError('no space left on device')

    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        code, out, err = console('kd_aif_run', *short, '--method', 'ce')
    assert code == 2 and 'no space left on device' in err
    assert not Path('results').exists() or files('results') == []


# Mistakes

MISTAKES = {
    'dataset': (('--dataset', 'mnist'), "dataset is 'mnist'; use one of digits"),
    'method': (('--method', 'ce,kd_plus'), 'method is kd_plus; use ce, kd'),
    'tier': (('--tier', 'full'), "tier is 'full'; digits has smoke"),
    'noise': (('--noise', 'gaussian', '--rate', 0.2), "noise is 'gaussian'"),
    'noise alone': (('--noise', 'symmetric'), 'give both'),
    'rate alone': (('--rate', 0.2), 'give both'),
    'rate': (('--noise', 'symmetric', '--rate', 2), 'rate is 2'),
    'rate by name': (('--noise', 'symmetric', '--rate', 'worst'), 'give a number from 0 to 1'),
    'human labels of digits': (('--noise', 'human', '--rate', 'worst'), 'people labelled cifar10 alone'),
    'imbalance': (('--imbalance', 0.5), 'imbalance is 0.5'),
    'seeds': (('--seeds', 0), 'seeds is 0'),
    'epochs': (('--epochs', 0), 'epochs is 0'),
    'teacher': (('--teacher', 'vgg'), "'vgg' is not a model"),
    'student': (('--student', 'vgg'), "'vgg' is not a model"),
    'beta': (('--beta', -1), 'beta is -1'),
    'score': (('--score', 'x'), "score is 'x'"),
    'experiment': (('--experiment', 'a/b'), 'experiment'),
    'threads': (('--threads', -1), 'threads is -1'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_end_with_one_line_and_no_file(mistake, console, tmp_path):
    args, message = MISTAKES[mistake]
    code, out, err = console('kd_aif_run', '--epochs', 1, '--seeds', 1, '--out', 'results', *args)
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 2 and len(lines) == 1 and message in lines[0] and 'Traceback' not in err, err
    assert 'written' not in out and (not Path('results').exists() or files('results') == []), (
        'something was run before the mistake was found'
    )
    assert not (tmp_path / 'cache' / 'teachers').exists(), (
        'a teacher was trained before the mistake was found'
    )


def test_out_that_is_a_file(console):
    Path('results').write_text('mine')
    code, out, err = console('kd_aif_run', *short, '--method', 'ce')
    assert (
        code == 2
        and 'results' in err
        and len([line for line in err.splitlines() if line.startswith('error: ')]) == 1
    )
    assert Path('results').read_text() == 'mine'


@pytest.mark.parametrize('args', [('--seeds', 'many'), ('--unknown', 1), ('--epochs',)])
def test_what_the_parser_refuses(args, console):
    code, out, err = console('kd_aif_run', *args)
    assert code == 2 and 'error' in err and files('.') == []


def test_script_gives_code_2_to_the_shell():
    done = subprocess.run([script('kd_aif_run'), '--method', 'kd_plus'], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith('error: method is kd_plus')
        and len(done.stderr.splitlines()) == 1
        and files('.') == []
    )


@pytest.mark.parametrize(
    'name', ['kd_aif_run', 'kd_aif_run_ssl', 'kd_aif_quickstart', 'kd_aif_report', 'kd_aif_data']
)
def test_help(name, console):
    code, out, err = console(name, '--help')
    assert code == 0 and f'usage: {name}' in out and '--help' in out


@pytest.mark.parametrize('name, settings', [('kd_aif_run', Task), ('kd_aif_run_ssl', SSLTask)])
def test_help_lists_every_setting_with_its_comment(name, settings, console):
    text = ' '.join(console(name, '--help')[1].split())
    for field, comment in field_comments(settings).items():
        if field not in ('dataset', 'tier', 'seed'):
            assert f'--{field}' in text and ' '.join(comment.split()) in text, field
    assert 'kd_aif_' in text.split('Methods:')[1]


def read(*args):
    "What the command line makes of these options"
    runs, changes = read_options(command_parser(cli.kd_aif_run, cli.Runs, Task), cli.Runs, list(args), {})
    return runs, {k: v for k, v in changes.items() if v is not None}


def test_options_are_read_by_the_type_of_their_field():
    runs, changes = read(
        '--score', 'mean,loss', '--beta', '2', '--compile', '--no-pooled_reference', '--force'
    )
    assert changes == dict(score=('mean', 'loss'), beta=2.0, compile=True, pooled_reference=False)
    assert runs.force and runs.seeds == 3 and read()[1] == {}
    assert read('--beta', 'calibrated', '--n_train', '7')[1] == dict(beta='calibrated', n_train=7)


def test_options_by_name_are_those_of_the_command_line(console, capsys):
    cli.kd_aif_run(method='ce', epochs=1, seeds=1, out='results')
    with pytest.raises(SystemExit) as e:
        cli.kd_aif_run(methods='ce', out='results')
    assert e.value.code == 2 and 'unknown options methods' in capsys.readouterr().err
    assert 'already there' in console('kd_aif_run', *short, '--method', 'ce')[1]


# Few labels

few = (
    '--dataset',
    'digits',
    '--steps',
    6,
    '--n_unlabelled',
    200,
    '--batch_size',
    10,
    '--mu',
    2,
    '--out',
    'results',
)


def test_runs_with_few_labels_are_recorded_once(console, tmp_path):
    code, out, err = console(
        'kd_aif_run_ssl',
        *few,
        '--method',
        'supervised,fixmatch',
        '--seeds',
        2,
        '--threshold',
        0.5,
        '--experiment',
        'mine',
    )
    records = load_records('results', 'mine', 'smoke')
    assert code == 0 and out.count('written') == 4 == len(records) == lines('results'), err
    assert [(r.method, r.seed) for r in records] == [
        ('supervised', 0),
        ('supervised', 1),
        ('fixmatch', 0),
        ('fixmatch', 1),
    ] and records[-1].config['rule']['threshold'] == 0.5
    for r in records:
        assert (
            f"{r.metrics['test_accuracy']:.2%}" in out
            and f"right pseudo-labels {r.metrics['pseudo_accuracy']:.3f}" in out
            and str(r.path('results')) in out
        )
    assert 'minus supervised' in out and not list((tmp_path / 'cache').rglob('*.safetensors'))
    code, out, err = console(
        'kd_aif_run_ssl',
        *few,
        '--method',
        'supervised,fixmatch',
        '--seeds',
        1,
        '--first_seed',
        1,
        '--threshold',
        0.5,
        '--experiment',
        'mine',
    )
    assert code == 0 and out.count('already there') == 2 and 'written' not in out
    assert (
        'written'
        in console(
            'kd_aif_run_ssl',
            *few,
            '--method',
            'fixmatch',
            '--seeds',
            1,
            '--threshold',
            0.5,
            '--experiment',
            'mine',
            '--force',
        )[1]
    )
    assert (
        'already there'
        in console(
            'kd_aif_run_ssl',
            *few,
            '--method',
            'supervised',
            '--seeds',
            1,
            '--threshold',
            0.7,
            '--weight',
            2,
            '--mu',
            3,
            '--experiment',
            'mine',
        )[1]
    ), 'it uses none of these'


def _a_long_run(log):
    sys.stdout = open(log, 'w', buffering=1)
    torch.set_num_threads(1)
    cli.kd_aif_run_ssl(
        dataset='digits', method='fixmatch', seeds=1, steps=600, every=10, out='results', checkpoints='states'
    )


def test_a_killed_run_with_few_labels_goes_on_from_its_checkpoint(tmp_path, console):
    child = multiprocessing.get_context('fork').Process(target=_a_long_run, args=(tmp_path / 'log',))
    child.start()
    try:
        for _ in range(1200):
            if any(Path('states').glob('fixmatch*.safetensors')):
                break  # whole: what is still being written has another name
            assert child.is_alive(), 'ended by itself'
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.join()
    step = load_state(next(Path('states').glob('fixmatch*.safetensors')))['state']['step']
    assert 0 < step < 600 and not Path('results').exists(), 'no record before the end'
    args = 'kd_aif_run_ssl', '--method', 'fixmatch', '--seeds', 1, '--steps', 600, '--every', 10
    assert (
        console(*args, '--out', 'results', '--checkpoints', 'states')[0] == 0
        and console(*args, '--out', 'whole')[0] == 0
    )
    (a,), (b,) = load_records('results'), load_records('whole')
    assert (
        a.history == b.history
        and a.metrics['test_accuracy'] == b.metrics['test_accuracy']
        and not [f for f in files('states') if not f.startswith('.')]
    ), 'it ends with the same numbers'


@pytest.mark.parametrize('where', [3, 8])
def test_an_interrupted_run_goes_on_from_its_checkpoint(where, tmp_path, console, monkeypatch):
    "In the teacher's training, or in the student's"
    from kd_aif.distillation.trainer import Fit

    train, epochs = Fit.train_epoch, []

    def broken(self, *args):
        epochs.append(args)
        if len(epochs) == where:
            raise OSError('no space left')
        return train(self, *args)

    args = (
        'kd_aif_run',
        '--method',
        'kd_aif_student',
        '--seeds',
        1,
        '--epochs',
        5,
        '--noise',
        'symmetric',
        '--rate',
        0.3,
    )
    monkeypatch.setattr(Fit, 'train_epoch', broken)
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    code, _, err = console(*args, '--out', 'results', '--checkpoints', 'states')
    assert code == 2 and 'no space left' in err and len(files('states')) == 1 and not Path('results').exists()
    assert console(*args, '--out', 'results', '--checkpoints', 'states')[0] == 0
    assert len(epochs) == 11 and files('states') == []
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'other'))
    assert console(*args, '--out', 'whole')[0] == 0
    (a,), (b,) = load_records('results'), load_records('whole')
    assert a.history == b.history and a.metrics == b.metrics


FEW_MISTAKES = {
    'dataset': (('--dataset', 'cifar100'), "dataset is 'cifar100'; use one of digits"),
    'method': (('--method', 'fixmatch,mixmatch'), 'method is mixmatch; use supervised'),
    'tier': (('--tier', 'full'), "tier is 'full'; digits has smoke"),
    'n_labelled': (('--n_labelled', 45), 'n_labelled is 45'),
    'n_unlabelled': (('--n_unlabelled', 9999), 'n_unlabelled is 9999'),
    'steps': (('--steps', 0), 'steps is 0'),
    'mu': (('--mu', 0), 'mu is 0'),
    'batch_size': (('--batch_size', -1), 'batch_size is -1'),
    'lr': (('--lr', -1), 'lr is -1'),
    'threshold': (('--threshold', 95), 'threshold is 95'),
    'weight': (('--weight', -1), 'weight is -1'),
    'every': (('--every', 0), 'every is 0'),
    'finetune': (('--finetune', -1), 'finetune is -1'),
    'seeds': (('--seeds', 0), 'seeds is 0'),
    'student': (('--student', 'vgg'), "'vgg' is not a model"),
    'precision': (('--precision', 'int4'), "precision is 'int4'"),
    'experiment': (('--experiment', 'a/b'), 'experiment'),
    'threads': (('--threads', -1), 'threads is -1'),
}


@pytest.mark.parametrize('mistake', FEW_MISTAKES)
def test_mistakes_with_few_labels_end_with_one_line_and_no_file(mistake, console, tmp_path):
    args, message = FEW_MISTAKES[mistake]
    code, out, err = console('kd_aif_run_ssl', *few, *args)
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 2 and len(lines) == 1 and message in lines[0] and 'Traceback' not in err, err
    assert (
        'written' not in out
        and (not Path('results').exists() or files('results') == [])
        and not list((tmp_path / 'cache').rglob('*.safetensors'))
    )


# Quickstart and report

EXTERNAL = re.compile(
    r'''(?:src|href|srcset|data|poster|action)\s*=\s*["']?\s*(?!data:|#)[^"'\s>]|@import|url\((?!\s*["']?(?:data:|#))|<(?:script|link|iframe|object|embed)\b|http-equiv=["']?refresh''',
    re.I,
)


@pytest.mark.parametrize(
    'bad',
    [
        '<img src="x.png">',
        "<img src='http://a/b'>",
        '<link rel=stylesheet href=x.css>',
        '<script>fetch(1)</script>',
        'body {background: url(x.png)}',
        '@import "x.css"',
    ],
)
def test_the_search_for_external_resources_finds_them(bad):
    assert EXTERNAL.search(bad)


@pytest.mark.parametrize(
    'good',
    [
        '<img src="data:image/png;base64,AAAA">',
        '<a href="#top">',
        'url(#clip)',
        'url("data:font/woff2;base64,AA")',
    ],
)
def test_the_search_for_external_resources_leaves_the_rest(good):
    assert not EXTERNAL.search(good)


def test_quickstart(console):
    code, out, err = console('kd_aif_quickstart', '--out', 'first', '--seeds', 1, '--epochs', 2)
    assert code == 0, err
    first = Path('first')
    rows, records = json.loads((first / 'summary.json').read_text()), load_records(first / 'results')
    assert [r['method'] for r in rows] == [*QUICKSTART, 'kd_aif_student'] and [r['beta'] for r in rows] == [
        None
    ] * 3 + ['calibrated'] * 2 + [1.0]
    assert all(r['seed'] == 0 and 0 < r['test_accuracy'] < 1 and r['seconds'] > 0 for r in rows)
    assert sorted(r.metrics['test_accuracy'] for r in records) == sorted(r['test_accuracy'] for r in rows)
    assert {r.experiment for r in records} == {'quickstart'} and all(
        r.config['epochs'] == 2 and r.dataset['noise']['rate'] == 0.3 for r in records
    )
    assert files(first) == sorted(
        ['summary.json', 'report.html', *{str(r.path('results')) for r in records}]
    ), 'nothing else is left'
    assert str((first / 'report.html').resolve()) in out
    page = (first / 'report.html').read_text()
    assert page.count('<img') >= 3 and not (found := EXTERNAL.search(page)), found
    for r in rows:
        assert f"{100 * r['test_accuracy']:.2f}" in page, 'the table holds the numbers of the summary'

    code, out, err = console('kd_aif_report', first / 'results', '--out', 'all.html')
    assert (
        code == 0
        and out.startswith(f'{len(rows)} records: ')
        and not EXTERNAL.search(Path('all.html').read_text())
    )
    (first / 'results').rename('moved')
    broken = next(Path('moved').rglob('*.jsonl'))
    broken.write_text(broken.read_text()[:50])
    Path('all.html').unlink()
    code, out, err = console('kd_aif_report', 'moved', '--out', 'all.html')
    assert code == 2 and broken.name in err and not Path('all.html').exists()


def test_report_of_a_folder_that_was_renamed(console):
    "The records say which name the folder had"
    folder = Path(__file__).parents[2] / 'reports' / 'results' / 'quickstart'
    shutil.copytree(folder, 'other')
    code, out, err = console('kd_aif_report', 'other', '--out', 'page.html')
    right, here = Path('quickstart', 'smoke.jsonl'), Path('other', 'smoke.jsonl')
    assert code == 2 and f'holds a run of {right}, not of {here}' in err and f'name it {right} again' in err
    assert 'delete' not in err and not Path('page.html').exists()
    shutil.move('other', 'quickstart')
    assert console('kd_aif_report', 'quickstart', '--out', 'page.html', '--no-pdf')[0] == 0


def test_report_of_a_file(console):
    Path('runs.jsonl').write_text('{}')
    code, out, err = console('kd_aif_report', 'runs.jsonl', '--out', 'page.html')
    assert code == 2 and 'is a file; give a folder' in err


@pytest.mark.parametrize('args', [('--seeds', 0), ('--epochs', 0)])
def test_quickstart_refuses(args, console):
    code, out, err = console('kd_aif_quickstart', '--out', 'first', *args)
    assert code == 2 and f'{args[0][2:]} is 0' in err and (not Path('first').exists() or files('first') == [])


@pytest.mark.parametrize('made', [True, False])
def test_report_without_records(made, console):
    if made:
        Path('none').mkdir()
    code, out, err = console('kd_aif_report', 'none', '--out', 'page.html')
    assert ('does not exist' in err) != made and ('holds no EXPERIMENT/TIER.jsonl' in err) == made
    assert (
        code == 2
        and 'kd_aif_run' in err
        and str(Path('none').resolve()) in err
        and not Path('page.html').exists()
    )


def test_report_of_one_experiment(console, monkeypatch):
    "The folder of one experiment will do; the page begins with a conclusion, and its figures are files too"
    monkeypatch.setattr('kd_aif.reporting.printing.find_browser', lambda: None)
    folder = Path(__file__).parents[2] / 'reports' / 'results' / 'quickstart'
    code, out, err = console('kd_aif_report', folder, '--out', 'mine/page.html')
    assert code == 0 and out.startswith('18 records: ') and 'no PDF: no browser' in out, (out, err)
    page = Path('mine/page.html').read_text()
    conclusion = str(conclude(load_records(folder.parent, folder.name)))
    first = conclusion.partition(':')[0]
    assert first in page and page.index(first) < page.index('<table'), 'what may be concluded comes first'
    figures = [f for f in files('mine') if f.startswith('page_figures')]
    assert len(figures) == 2 * page.count('<img') > 0
    assert files('mine') == sorted(['page.html', *figures])


def test_a_console_that_knows_ascii_only(monkeypatch):
    "The summary has a middle dot and ±; the runs are made, so the command must not fail at its last line"
    env = os.environ | dict(PYTHONIOENCODING='ascii', OMP_NUM_THREADS='1')
    command = [sys.executable, script('kd_aif_run'), '--dataset', 'digits', '--epochs', '1', '--seeds', '1']
    done = subprocess.run([*command, '--method', 'ce', '--out', 'r'], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and 'Test accuracy: mean ?' in done.stdout, done.stderr


def test_report_with_a_broken_browser(console, monkeypatch):
    monkeypatch.setattr('kd_aif.reporting.printing.find_browser', lambda: shutil.which('true'))
    folder = Path(__file__).parents[2] / 'reports' / 'results' / 'quickstart'
    code, out, err = console('kd_aif_report', folder, '--out', 'page.html')
    assert code == 2 and 'printed nothing' in err and not Path('page.pdf').exists()


def test_data(console):
    code, out, err = console('kd_aif_data', '--dataset', 'digits')
    assert code == 0 and re.search(
        r'digits +1,297 train and 500 test images, 10 classes +fingerprint \w{12}$', out.strip()
    )
    code, out, err = console('kd_aif_data', '--dataset', 'mnist')
    assert code == 2 and 'mnist' in err and 'digits' in err


def test_data_that_is_not_at_hand_is_said_and_the_rest_goes_on(console):
    code, out, err = console('kd_aif_data', '--dataset', 'cifar10,digits', '--data', 'nowhere')
    assert code == 0 and 'not at hand' in out.splitlines()[0] and out.splitlines()[-1].startswith('digits')


@pytest.mark.parametrize('command', ('kd_aif_run', 'kd_aif_run_ssl'))
def test_a_launcher_of_several_processes_is_refused(command, console, monkeypatch, tmp_path):
    monkeypatch.setenv('WORLD_SIZE', '2')
    code, out, err = console(command, '--out', tmp_path / 'results')
    assert code == 2 and 'WORLD_SIZE is 2' in err and 'kd_aif_sweep --workers 2' in err
    assert not out and not (tmp_path / 'results').exists()
