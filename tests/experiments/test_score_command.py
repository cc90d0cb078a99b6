"kd_aif_score: a folder, a file, decisions, and options that have no meaning"

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kd_aif.experiments.score_command import kd_aif_score

N = 24


def folder(root):
    rng = np.random.default_rng(0)
    for i in range(N):
        path = root / 'photos' / ('ant', 'bee')[i % 2] / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(100 * (i % 2), 100 + 100 * (i % 2), (8, 8, 3), dtype=np.uint8)).save(
            path
        )
    return str(root / 'photos')


def numbers(root, n=N, name='t.csv'):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(rng.normal(size=(n, 2)), columns=['a', 'b']).assign(kind=['x', 'y'] * (n // 2))
    frame.to_csv(root / name, index=False)
    return str(root / name)


def texts(root):
    frame = pd.DataFrame(dict(review=['good', 'bad', 'fine', 'poor'], label=['p', 'n', 'p', 'n']))
    frame.to_csv(root / 'r.csv', index=False)
    return str(root / 'r.csv')


def score(capsys, *argv):
    "Exit status, and what the command prints: (status, output, errors)"
    try:
        kd_aif_score(list(map(str, argv)))
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


QUICK = '--epochs', 1, '--model', 'mlp64'


def test_a_folder_of_images(tmp_path, capsys):
    out = tmp_path / 'out'
    status, printed, _ = score(capsys, folder(tmp_path), '--out', out, '--size', 8, *QUICK)
    table = pd.read_csv(out / 'samples.csv', index_col='index')
    assert status == 0 and 'no --val' in printed and set(table.given) == {'ant', 'bee'}
    assert all(path.endswith('.png') for path in table.path) and len(table) == N - round(N / 10)
    assert (out / 'browse.html').stat().st_size > 10_000
    assert json.loads((out / 'summary.json').read_text())['settings']['size'] == 8


def test_decisions_go_back_in(tmp_path, capsys):
    out, source = tmp_path / 'out', folder(tmp_path)
    val = str((tmp_path / 'photos').rename(tmp_path / 'good'))
    folder(tmp_path)
    decided = pd.DataFrame(dict(index=[3], decision='drop', given='ant', label='', path='ant/06.png'))
    decided.to_csv(tmp_path / 'd.csv', index=False)
    options = '--out', out, '--val', val, '--decisions', tmp_path / 'd.csv', '--size', 8, *QUICK
    assert score(capsys, source, *options)[0] == 0
    table = pd.read_csv(out / 'samples.csv', index_col='index')
    assert sorted(table.index) == [i for i in range(N) if i != 3]
    (tmp_path / 'photos' / 'ant' / '00.png').unlink()
    status, _, said = score(capsys, source, *options)
    assert status == 2 and "row 0 (index 3) is about path 'ant/06.png'" in said and said.count('\n') == 1


def test_a_file_of_numbers_with_good_samples(tmp_path, capsys):
    source, val = numbers(tmp_path), numbers(tmp_path, 8, 'v.csv')
    status, printed, _ = score(
        capsys, source, '--val', val, '--label', 'kind', '--out', tmp_path / 'o', *QUICK
    )
    assert status == 0 and 'no --val' not in printed
    assert sorted(pd.read_csv(tmp_path / 'o' / 'samples.csv')['index']) == list(range(N))


BAD = {
    'decisions without source': (lambda r: ('--decisions', numbers(r)), '--decisions is given without a source'),
    'val without source': (lambda r: ('--val', numbers(r)), '--val is given without a source'),
    'label without source': (lambda r: ('--label', 'x'), '--label is given without a source.*name your folder'),
    'text without source': (lambda r: ('--text', 'x'), '--text is given without a source'),
    'size without source': (lambda r: ('digits', '--size', '8'), '--size is given without a source'),
    'workers without source': (lambda r: ('--workers', '1'), '--workers is given without a source'),
    'label of a folder': (lambda r: (folder(r), '--label', 'x'), '--label names a column of a file, but .*is a folder'),
    'text of a folder': (lambda r: (folder(r), '--text', 'x'), '--text names a column of a file, but .*is a folder'),
    'text of a folder of good samples': (
        lambda r: (texts(r), '--val', folder(r), '--text', 'review'), "--text names .*photos' is a folder"),
    'size of texts': (lambda r: (texts(r), '--text', 'review', '--size', '8'), '--size is for pictures'),
    'workers of texts': (lambda r: (texts(r), '--text', 'review', '--workers', '1'), '--workers is for pictures'),
    'the source as good samples': (
        lambda r: (numbers(r), '--val', f'{r}/../{r.name}/t.csv'), '--val is .*, the source itself; give other'),
    'the source as good samples, a folder': (lambda r: (folder(r), '--val', folder(r) + '/'), 'the source itself'),
    'no source': (lambda r: (r / 'gone',), "source is '.*gone', which does not exist"),
    'no good samples': (lambda r: (numbers(r), '--val', r / 'gone'), "--val is '.*gone', which does not exist"),
    'no decisions': (lambda r: (numbers(r), '--decisions', r / 'gone'), '--decisions is .* does not exist'),
    'results in the source': (lambda r: (folder(r), '--out', r / 'photos' / 'new'), '--out is .*, within the source'),
    'texts without --text': (lambda r: (texts(r),), r"column 'review' holds text.*give --text review, or leave that"),
    'no label': (lambda r: (numbers(r),), 'name the column of labels by --label NAME'),
    'sizes': (lambda r: (numbers(r), '--label', 'kind', '--size', '8'), 'is for images, but a, b are numbers'),
    'folds': (lambda r: ('--folds', '1'), 'folds is 1'),
    'unknown option': (lambda r: ('--colour', 'red'), 'unrecognized arguments'),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_options_that_have_no_meaning(case, tmp_path, capsys):
    make, message = BAD[case]
    argv = make(tmp_path)
    out = () if '--out' in argv else ('--out', tmp_path / 'out')
    status, printed, said = score(capsys, *argv, *out)
    assert status == 2 and re.search(message, said) and not (tmp_path / 'out').exists() and not printed
    assert 'tokenizer=' not in said and "label='" not in said


def test_a_folder_named_as_the_sample_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits').mkdir()
    status, _, said = score(capsys)
    assert status == 2 and 'write ./digits for it' in said
