"Faults of disks and files: one sentence with path and remedy, nothing half-written, and the last good state stays."

import errno
import json
import os
import pickle
import re
import resource
import stat
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from kd_aif.data.images import hold_out, subset
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.data.text_files import read_texts
from kd_aif.distillation.checkpoint import Checkpoint, Stopped, write_checkpoint
from kd_aif.distillation.distill import distill
from kd_aif.distillation.trainer import Training
from kd_aif.experiments.cli import kd_aif_report, kd_aif_run
from kd_aif.experiments.storage import Storage
from kd_aif.few_labels.algorithms import FixMatch
from kd_aif.few_labels.batches import labelled_split
from kd_aif.few_labels.settings import SSLTraining
from kd_aif.few_labels.trainer import train_ssl
from kd_aif.foundation.core import atomic_path, atomic_write, WriteError
from kd_aif.foundation.state_files import load_state, open_tensors, save_state
from kd_aif.influence.retraining import RetrainedLosses
from kd_aif.influence.scores import InfluenceScores
from kd_aif.models.build import build_model, load_model, save_model
from kd_aif.reporting.figures import new_figure, save_figure
from kd_aif.reporting.html import html_report
from kd_aif.reporting.record_files import load_records, read_records, save_record
from kd_aif.reporting.records import make_record


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "A cache, a folder of temporary files and a working directory of its own"
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('KD_AIF_DATA', raising=False)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'temporary'))
    for name in ('temporary', 'work'):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / 'work')


def record(seed=0, **changes):
    fields = dict(
        experiment='faults',
        tier='smoke',
        dataset=dict(name='digits'),
        method='ce',
        teacher='',
        student='cnn4',
        seed=seed,
        config=dict(text='x' * 9000),
        metrics=dict(test_accuracy=0.5),
    )
    return make_record(**fields | changes)


def figure(path):
    drawn = new_figure(4, 3, 'Nothing')
    drawn.subplots().plot([0, 1], [1, 0])
    return save_figure(drawn, path)


SCORES = InfluenceScores(torch.rand(2000), torch.arange(2000), 'mean', 0.1, 0.0, 0, {})
LOSSES = RetrainedLosses(torch.rand(3, 2, 900), tuple(torch.arange(9) for _ in range(3)), (0, 1))

WRITERS = {  # name of a file -> what writes it
    'model.safetensors': lambda path: save_model(nn.Linear(60, 60), path),
    'state.safetensors': lambda path: save_state(dict(a=torch.rand(3000)), path),
    'checkpoint.safetensors': lambda path: write_checkpoint(Checkpoint(path), {}, dict(a=torch.rand(3000))),
    'scores.safetensors': lambda path: SCORES.save(path),
    'losses.safetensors': lambda path: LOSSES.save(path),
    'report.html': lambda path: html_report(path, 'Report', [('One', ['words ' * 2000])]),
    'figure.png': figure,
    'text.json': lambda path: atomic_write(path, 'x' * 9000),
    'faults/smoke.jsonl': lambda path: save_record(record(), path.parent.parent),
}


@contextmanager
def disk_full(folder, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        yield


@contextmanager
def no_large_files(folder, monkeypatch):
    "The system lets no file grow beyond some bytes"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_rights(folder, monkeypatch):
    "Files cannot be made in the folder; the superuser becomes nobody for a while"
    folder.chmod(0o555)
    above = [
        p for p in folder.parents if p.owner() == folder.owner() and stat.S_IMODE(p.stat().st_mode) == 0o700
    ]
    root = os.geteuid() == 0
    for p in above:
        p.chmod(0o711)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        for p in above:
            p.chmod(0o700)


FAULTS = {
    'disk full': (disk_full, 'No space left on device.*free some space'),
    'file too large': (no_large_files, 'File too large.*raise the limit'),
    'no rights': (no_rights, 'Permission denied.*get the right to write'),
}


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('name', WRITERS)
def test_what_cannot_be_written_is_one_sentence_and_leaves_the_old_file(name, fault, tmp_path, monkeypatch):
    path = tmp_path / 'out' / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b'old\n')
    broken, words = FAULTS[fault]
    with (
        broken(path.parent, monkeypatch),
        pytest.raises(WriteError, match=f'(?s){name}.* cannot be written.*{words}') as e,
    ):
        WRITERS[name](path)
    assert content(tmp_path / 'out') == {name: b'old\n'} and '\n' not in str(e.value)
    again = pickle.loads(pickle.dumps(e.value))  # errors of other processes are sent
    assert (str(again), again.errno) == (str(e.value), e.value.errno)


@pytest.mark.parametrize('name', WRITERS)
def test_a_path_below_a_file(name, tmp_path):
    (tmp_path / 'file').write_text('a file')
    with pytest.raises(WriteError, match='cannot be written.*a part of the path is a file'):
        WRITERS[name](tmp_path / 'file' / name)
    assert (tmp_path / 'file').read_text() == 'a file'


@pytest.mark.parametrize('name', WRITERS)
@pytest.mark.parametrize('umask', [0o022, 0o027])
def test_new_files_have_the_rights_of_the_umask(name, umask, tmp_path):
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_an_error_about_another_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match='no_such_input') as e, atomic_path(tmp_path / 'a'):
        open(tmp_path / 'no_such_input')
    assert not isinstance(e.value, WriteError)


# Records


@pytest.mark.parametrize('fault', ['disk full', 'below a file'])
def test_a_record_that_cannot_be_written_is_kept_elsewhere(fault, tmp_path, monkeypatch):
    made, out = record(config={}), tmp_path / 'results'
    save_record(record(1), out)
    before = content(out)
    replaced, path = os.replace, made.path(out)

    def full(a, b):
        if Path(b).parent == path.parent:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(a))
        return replaced(a, b)

    if fault == 'below a file':
        (tmp_path / 'file').write_text('')
        out = tmp_path / 'file'
    with monkeypatch.context() as m, pytest.raises(WriteError, match='append its line to') as e:
        if fault == 'disk full':
            m.setattr(os, 'replace', full)
        save_record(made, out)
    assert content(tmp_path / 'results') == before
    (aside,) = (tmp_path / 'temporary').iterdir()
    assert str(aside) in str(e.value)
    target = made.path(tmp_path / 'results')
    target.write_bytes(target.read_bytes() + aside.read_bytes())  # what the message says
    assert [r.seed for r in load_records(tmp_path / 'results')] == [0, 1]


BAD_LINES = {
    'cut off': (lambda line: line[:-40], 'line 2, is not a readable record'),
    'deep': (lambda line: b'[' * 100_000, 'line 2, is not a readable record'),
    'no text': (lambda line: b'\xff\xfe', 'line 2, is not a readable record'),
    'changed': (lambda line: line.replace(b'"seed": 1', b'"seed": 7'), 'line 2, holds a run with key'),
    'list': (lambda line: b'[]', 'line 2, is not a readable record'),
}


@pytest.mark.parametrize('name', BAD_LINES)
def test_a_bad_record_among_good_ones_is_named_and_others_stay(name, tmp_path, capsys):
    damage, words = BAD_LINES[name]
    for seed in range(3):
        path = save_record(record(seed), tmp_path)
    lines = path.read_bytes().splitlines()
    lines[1] = damage(lines[1])
    path.write_bytes(b'\n'.join(lines) + b'\n')
    with pytest.raises(ValueError, match=f'smoke.jsonl, {words}.*delete this line'):
        load_records(tmp_path)
    with pytest.raises(SystemExit) as e:
        kd_aif_report(records=str(tmp_path), out=str(tmp_path / 'page.html'))
    assert e.value.code == 2 and capsys.readouterr().err.startswith('error: ')
    save_record(record(3), tmp_path)  # a run that has ended is not lost because of an earlier line
    assert path.read_bytes().splitlines()[:3] == lines
    path.write_bytes(b'\n'.join(line for line in path.read_bytes().splitlines() if line != lines[1]) + b'\n')
    assert [r.seed for r in load_records(tmp_path)] == [0, 2, 3]


def test_a_folder_in_place_of_a_file_of_records(tmp_path):
    (tmp_path / 'faults' / 'smoke.jsonl').mkdir(parents=True)
    with pytest.raises(ValueError, match='smoke.jsonl cannot be read'):
        load_records(tmp_path)


# Reading


def cut(path, part=0.5):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    return path


def table(folder, **columns):
    path = folder / 'svhn' / 'train-00000-of-00001.parquet'
    path.parent.mkdir()
    x = load_images('digits').x[: len(columns['label'])]
    pd.DataFrame(dict(image=[dict(bytes=encoded(i), path=None) for i in x], **columns)).to_parquet(path)
    return path


def encoded(image):
    Image.fromarray(image[0].numpy()).save(buffer := BytesIO(), format='PNG')
    return buffer.getvalue()


def lines_file(path, *lines):
    path.write_text('\n'.join(lines) + '\n')
    return path


GOOD = json.dumps(dict(text='a', label=0))
READERS = {
    'model cut off': (
        lambda d: load_model(nn.Linear(60, 60), cut(save_model(nn.Linear(60, 60), d / 'a'))),
        'not a readable, complete safetensors file.*save the model again',
    ),
    'model is a folder': (lambda d: load_model(nn.Linear(6, 6), d), 'not a readable, complete'),
    'state cut off': (
        lambda d: load_state(cut(save_state(dict(a=torch.rand(99)), d / 'a'))),
        'holds no complete state.*delete it',
    ),
    'state without its last byte': (
        lambda d: load_state(cut(save_state(dict(a=torch.rand(99)), d / 'a'), 0.9999)),
        'holds no complete state',
    ),
    'state of another kind': (
        lambda d: load_state(save_model(nn.Linear(6, 6), d / 'a')),
        'no complete state',
    ),
    'tensors cut off': (
        lambda d: open_tensors(cut(SCORES.save(d / 'a'))).__enter__(),
        'is broken, or no file of this kind',
    ),
    'parquet of images cut off': (
        lambda d: (cut(table(d, label=[0, 1, 2])), load_images('svhn', root=d, progress=False)),
        'parquet files cannot be read.*copy them again',
    ),
    'missing label': (
        lambda d: (table(d, label=[0, None, 2]), load_images('svhn', root=d, progress=False)),
        'label nan of row 1.*no whole number|label None of row 1.*no whole number',
    ),
    'half a class': (
        lambda d: (table(d, label=[0, 1.5, 2]), load_images('svhn', root=d, progress=False)),
        'label 1.5 of row 1',
    ),
    'parquet of texts cut off': (
        lambda d: (
            pd.DataFrame(dict(text=['a', 'b'], label=[0, 1])).to_parquet(d / 'a.parquet'),
            read_texts(cut(d / 'a.parquet')),
        ),
        'a.parquet cannot be read.*write it again',
    ),
    'bad line of texts': (
        lambda d: read_texts(lines_file(d / 'a.jsonl', GOOD, GOOD[:-3], GOOD)),
        'a.jsonl: .*one object per line',
    ),
    'line without a label': (
        lambda d: read_texts(lines_file(d / 'a.jsonl', GOOD, '{"text": "b"}')),
        "row 1 has no 'label'",
    ),
}


@pytest.mark.parametrize('name', READERS)
def test_what_cannot_be_read_is_named_with_a_remedy(name, tmp_path):
    read, words = READERS[name]
    (tmp_path / 'in').mkdir()
    with pytest.raises(ValueError, match=f'(?s){words}'):
        read(tmp_path / 'in')


# Checkpoints


class Hostile:
    "Whoever unpickles it makes a folder"

    def __reduce__(self):
        return os.mkdir, ('executed',)


def tiny_sets():
    return (ImageBatches(d, 40, seed=0) for d in hold_out(subset(load_images('digits'), 120, 0), 40, seed=0))


def tiny_run(path, **options):
    checkpoint = None if path is None else Checkpoint(path, 0, options.pop('stop', None))
    training = Training(3, progress=False, checkpoint=checkpoint, **options)
    return distill(build_model('mlp8', 10, seed=0), None, *tiny_sets(), training=training)


def tiny_ssl(path):
    labelled, unlabelled = labelled_split(subset(load_images('digits'), 120, 0), 20, seed=0)[:2]
    training = SSLTraining(4, batch_size=8, mu=2, every=2, checkpoint=path, progress=False)
    return train_ssl(build_model('cnn4', 10, 1, seed=0), FixMatch(), labelled, unlabelled, training=training)


@pytest.mark.parametrize('train', [tiny_run, tiny_ssl])
@pytest.mark.parametrize('write', [pickle.dumps, None], ids=['pickle', 'torch.save'])
def test_a_hostile_checkpoint_is_refused_and_not_executed(train, write, tmp_path):
    path = tmp_path / 'run.safetensors'
    if write:
        path.write_bytes(write(Hostile()))
    else:
        torch.save(Hostile(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match='holds no complete state.*delete it to begin anew'):
        train(path)
    assert not Path('executed').exists() and path.read_bytes() == before
    pickle.loads(pickle.dumps(Hostile()))
    assert Path('executed').exists(), 'it is hostile'


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.student.state_dict().values(), b.student.state_dict().values())
    )


@pytest.mark.parametrize('train', [tiny_run, tiny_ssl])
def test_a_full_disk_does_not_end_a_training(train, tmp_path, monkeypatch, one_thread):
    whole, path = train(None), tmp_path / 'run.safetensors'
    with (
        disk_full(tmp_path, monkeypatch),
        pytest.warns(UserWarning, match='there is no earlier state.*goes on'),
    ):
        run = train(path)
    assert same(run, whole) and list(tmp_path.glob('*run*')) == []


def test_the_last_good_state_is_kept_said_and_used(tmp_path, monkeypatch, one_thread):
    path, epochs = tmp_path / 'run.safetensors', []
    with pytest.raises(Stopped):
        tiny_run(path, stop=lambda seconds: True)
    good = path.read_bytes()
    with disk_full(tmp_path, monkeypatch), pytest.raises(WriteError, match='the state of .* is still there'):
        tiny_run(path, stop=lambda seconds: True)  # to be left, it needs its state
    assert path.read_bytes() == good
    end = tiny_run(path, watch=lambda line: epochs.append(line['epoch']))
    assert epochs == [1, 2] and same(end, tiny_run(None))


def test_another_number_of_threads_is_said(tmp_path, one_thread):
    with pytest.raises(Stopped):
        tiny_run(tmp_path / 'run.safetensors', stop=lambda seconds: True)
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match='with number of threads 1, now it is 2'):
        tiny_run(tmp_path / 'run.safetensors')


# Commands

SHORT = dict(dataset='digits', method='ce', epochs=1, seeds=1, out='results')


def command(capsys, **options):
    "Exit code, output and errors of `kd_aif_run`"
    code = 0
    try:
        kd_aif_run(**SHORT | options)
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def a_file(name):
    Path(name).write_text('a file')
    return name


def without_rights(name, monkeypatch):
    Path(name).mkdir()
    access = os.access
    refused = lambda path, mode: access(path, mode) and Path(path).absolute() != Path(name).absolute()
    monkeypatch.setattr(os, 'access', refused)
    return name


MISTAKES = {
    'records below a file': (
        lambda m: dict(out=a_file('file') + '/results'),
        'out is .*is a file; give a folder',
    ),
    'no right to write records': (
        lambda m: dict(out=without_rights('mine', m) + '/results'),
        'no right to write',
    ),
    'checkpoints in a file': (
        lambda m: dict(checkpoints=a_file('file')),
        'checkpoints is .*is a file; give a folder',
    ),
    'no right to write checkpoints': (
        lambda m: dict(checkpoints=without_rights('mine', m)),
        'no right to write',
    ),
    'data in a file': (lambda m: dict(dataset='cifar10', data=a_file('file')), 'is not a folder'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_commands_end_with_a_sentence_before_anything_is_trained(name, capsys, monkeypatch):
    make, words = MISTAKES[name]
    monkeypatch.setattr('kd_aif.distillation.trainer.Fit.train_epoch', lambda *_: pytest.fail('it trains'))
    options = make(monkeypatch)
    code, out, err = command(capsys, **options)
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1
    assert re.search(words, err), err


def test_a_damaged_checkpoint_ends_the_command_and_stays(capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(
            'kd_aif.experiments.methods.save_record', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            command(capsys, checkpoints='states')
    (state,) = Path('states').glob('*.safetensors')
    whole = state.read_bytes()
    cut(state)
    code, out, err = command(capsys, checkpoints='states')
    assert code == 2 and 'delete it to begin anew' in err and 'Traceback' not in err
    state.write_bytes(whole)
    assert command(capsys, checkpoints='states')[0] == 0 and not list(Path('states').iterdir())


def test_a_full_disk_at_the_record_keeps_it_elsewhere(tmp_path, capsys, monkeypatch):
    replaced = os.replace

    def full(a, b):
        if 'results' in str(b):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(a))
        return replaced(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        code, out, err = command(capsys)
    assert code == 2 and err.startswith('error: ') and 'append its line to' in err
    (aside,) = (tmp_path / 'temporary').glob('kd_aif-*.jsonl')
    target = Path('results/digits_noise/smoke.jsonl')
    assert str(aside) in err and str(target) in err and not target.exists()
    target.write_bytes(aside.read_bytes())
    code, out, err = command(capsys)
    assert code == 0 and 'already there' in out


@pytest.mark.filterwarnings('default')
def test_teachers_that_cannot_be_kept_or_read(tmp_path, capsys):
    options = dict(method='kd', teacher='mlp8', student='mlp8')
    (tmp_path / 'cache').write_text('a file')
    with pytest.warns(UserWarning, match='the trained teacher is used, but not kept.*KD_AIF_CACHE'):
        assert command(capsys, **options)[0] == 0
    (tmp_path / 'cache').unlink()
    assert command(capsys, **options, force=True)[0] == 0
    (teacher,) = (tmp_path / 'cache' / 'teachers').glob('*.safetensors')
    good = teacher.read_bytes()
    cut(teacher)
    with pytest.warns(UserWarning, match='cannot be used.*it is trained again'):
        assert command(capsys, **options, force=True)[0] == 0
    assert teacher.read_bytes() == good


def test_images_are_used_where_the_cache_cannot_be_written(tmp_path):
    (tmp_path / 'in').mkdir()
    table(tmp_path / 'in', label=[0, 1, 2])
    (tmp_path / 'cache').write_text('a file')
    with pytest.warns(UserWarning, match='cannot be written.*KD_AIF_CACHE'):
        data = load_images('svhn', root=tmp_path / 'in', progress=False)
    assert data.y.tolist() == [0, 1, 2] and (tmp_path / 'cache').read_text() == 'a file'


def test_unfinished_runs_are_not_kept_in_a_cache_that_cannot_be_written(tmp_path):
    folder = Path(a_file('file')) / 'ssl'
    with pytest.warns(UserWarning, match='cannot be written, so unfinished runs are not kept.*KD_AIF_CACHE'):
        assert Storage().checkpoint('run', folder) is None  # nobody chose it
    assert Storage().checkpoint('run', tmp_path / 'new').path == tmp_path / 'new' / 'run.safetensors'
    assert Storage(checkpoints=folder).checkpoint('run') is not None  # whoever chose it gets an error


def test_a_found_record_says_with_what_it_was_made(capsys):
    assert command(capsys)[0] == 0
    code, out, err = command(capsys)
    assert 'already there' in out and 'made with' not in out
    (made,) = load_records('results')
    save_record(
        replace(made, versions=made.versions | dict(torch='2.0.0'), device='cpu, x86_64, 96 threads'),
        'results',
    )
    code, out, err = command(capsys)
    assert 'made with PyTorch 2.0.0 on cpu, x86_64, 96 threads, here PyTorch' in out and code == 0
