"""Broken files, full disks, two runs at once, deadlines: the queue goes on, and says what went wrong."""

import dataclasses
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

import kd_aif.gpu_queue.cli as cli_module
from kd_aif.experiments.options import check_folder
from kd_aif.gpu_queue.cli import kd_aif_queue, plan_table
from kd_aif.gpu_queue.estimates import BEFORE, measured_rate
from kd_aif.gpu_queue.packs import PackLimits, read_packs, write_packs
from kd_aif.gpu_queue.queues import smoke_queue
from kd_aif.gpu_queue.sittings import done_names, epochs_done, only_run, Progress
from kd_aif.gpu_queue.transfer import (
    kept_files,
    note_sitting,
    pack_home,
    pack_parts,
    PartSettings,
    unpack_home,
)
from kd_aif.gpu_queue.workers import log_path, Sitting, work, worker_outcome
from kd_aif.reporting.record_files import load_records

pytestmark = pytest.mark.usefixtures('one_thread')

ENTRY = next(e for e in smoke_queue() if e.name.endswith('-supervised-s0') or e.name.endswith('fixmatch-s0'))


def sitting_in(folder, **more):
    return Sitting('smoke', str(folder / 'queue'), str(folder / 'records'), **more)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# 1: what comes home


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Packs with a good record, and files that are no records and no sittings"
    there = sitting_in(tmp_path_factory.mktemp('there'))
    work(ENTRY, there)
    note_sitting(there, 'a card', True, 10.0, 5e13)
    bad = {'new/bad.json': '{"experiment": 1}', 'new/a.json': 'cut {', 'new/list.json': '[]'}
    bad |= {
        'sittings/1.json': '{"device": "x", "gpu": true, "seconds": 0, "flops": 1, "time": ""}',
        'sittings/2.json': '"x"',
    }
    for name, text in bad.items():
        put(Path(there.folder, name), text)
    out = Path(there.folder).parent / 'home'
    pack_home([ENTRY], there, out)
    names = [n for n in read_packs(out)[0] if n not in bad]
    write_packs([*bad, *names], there.folder, out)
    return out


def test_bad_files_do_not_keep_good_records_from_home(home, tmp_path):
    here = sitting_in(tmp_path)
    new, _, incomplete, rejected = unpack_home(home, here)
    assert (new, incomplete, len(load_records(here.records))) == (1, [], 1)
    assert sorted(p.name for p in rejected) == ['1.json', '2.json', 'a.json', 'bad.json', 'list.json']
    assert all(p.parent == Path(here.folder, 'rejected') and p.exists() for p in rejected)
    assert measured_rate(here.records).flops == 5e12
    assert unpack_home(home, here)[0] == 0


def test_the_command_names_bad_files_after_all_good_ones(home, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        kd_aif_queue(
            'unpack', queue='smoke', folder=f'{tmp_path}/q', records=f'{tmp_path}/r', packs=str(home)
        )
    out = capsys.readouterr().out
    assert e.value.code == 2 and '1 new records' in out and 'bad.json' in out.splitlines()[-1]
    assert len(load_records(tmp_path / 'r')) == 1


# 2 and 6: lines and markers that cannot be read

BAD_LINES = ['{"time": 1', 'x', '[1]', '3', '{"seconds": 1}', '{"time": "now"}', '']


def test_foreign_lines_of_a_log_are_no_epochs(tmp_path):
    sitting = sitting_in(tmp_path)
    good = json.dumps(dict(time=5.0, seconds=1.0))
    log_path(sitting, 'a').write_bytes('\n'.join([good, *BAD_LINES, good]).encode() + b'\n\xff\xfe')
    assert epochs_done(sitting, 'a') == 2 and epochs_done(sitting, 'a', since=6.0) == 0


@pytest.mark.parametrize('text', ['', '{"files": ["a"', '[]', '{}', '{"files": 3}', '{"files": ["../a"]}'])
def test_a_marker_that_cannot_be_read_is_none(text, tmp_path):
    sitting = sitting_in(tmp_path)
    run = next(e for e in smoke_queue() if e.needs)
    queue = [e for e in smoke_queue() if e.name in (run.name, run.needs)]
    marker = queue[0].marker(sitting.places().storage)
    put(marker, text)
    assert done_names(queue, sitting) == set() and kept_files(queue, sitting) == []
    put(marker, '{"files": ["a"]}')
    assert done_names(queue, sitting) == {run.needs}
    assert kept_files(queue, sitting) == [f'teachers/{marker.name}', 'teachers/a']


def test_lines_of_sittings_that_say_nothing_are_skipped(tmp_path):
    good = dict(device='a card', gpu=True, seconds=10.0, flops=5e13, time='2025-01-01')
    bad = [good | dict(seconds=0), good | dict(flops='x'), good | dict(seconds=float('nan'))]
    bad += [{k: v for k, v in good.items() if k != name} for name in ('device', 'seconds', 'flops', 'time')]
    lines = [*map(json.dumps, [good, *bad]), *BAD_LINES]
    (tmp_path / 'sittings.jsonl').write_text('\n'.join(lines))
    assert measured_rate(tmp_path).flops == measured_rate(tmp_path, 'a card').flops == 5e12
    (tmp_path / 'sittings.jsonl').write_text('\n'.join(lines[1:]))
    assert measured_rate(tmp_path) == BEFORE


# 3: packing fails


@pytest.mark.parametrize(
    'error, times, code, whole',
    [
        (OSError(28, 'No space left on device'), 1, None, False),
        (OSError(28, 'No space left on device'), 99, 2, True),
        (SafetensorError('io error'), 99, 2, False),
    ],
)
def test_a_packing_that_fails_is_tried_again_and_reported(
    error, times, code, whole, tmp_path, monkeypatch, capsys
):
    calls, real = [], cli_module.pack_home

    def fail(*args):
        calls.append(args)
        if len(calls) <= times:
            raise error
        return real(*args)

    monkeypatch.setattr(cli_module, 'pack_home', fail)
    if not whole:  # nothing is left to do but to pack
        work(ENTRY, Sitting('smoke', f'{tmp_path}/q', f'{tmp_path}/r'))
    places = dict(folder=f'{tmp_path}/q', records=f'{tmp_path}/r', packs=f'{tmp_path}/home')
    try:
        kd_aif_queue('run', queue='smoke', only=ENTRY.name, minutes=2.0, workers=1, seconds=0.5, **places)
        found = None
    except SystemExit as e:
        found = e.code
    out = capsys.readouterr().out
    assert found == code and len(calls) >= (4 if whole else 2)
    assert ('1 done, 0 stopped, 0 failed, 0 done before' if whole else '1 done before') in out
    assert out.splitlines()[-1].startswith('packing failed: ') == (code == 2)
    assert bool(list(tmp_path.glob('home/pack-*'))) == (code is None)


# 4: two runs


def test_a_second_run_on_a_folder_ends_at_once(tmp_path, capsys):
    pytest.importorskip('fcntl')
    stop = tmp_path / 'stop'
    with only_run(tmp_path):
        stop.touch()
        with pytest.raises(SystemExit) as e:
            kd_aif_queue('run', queue='smoke', folder=str(tmp_path), records=f'{tmp_path}/r')
        assert e.value.code == 2 and stop.exists()
        err = capsys.readouterr().err
        assert str(tmp_path) in err and 'another run' in err and '--folder' in err
    with only_run(tmp_path):
        pass


# 5: sizes of packs


@pytest.mark.parametrize('seed', range(6))
def test_packs_of_many_small_files_keep_their_limits(seed, tmp_path):
    draw = random.Random(seed)
    letters = 'abc_+-' if seed % 2 else 'aé"日'
    names = [f'{i}{"".join(draw.choices(letters, k=draw.choice([1, 20, 60])))}' for i in range(300)]
    (tmp_path / 'new').mkdir()
    for name in names:
        (tmp_path / 'new' / name).write_bytes(b'x' * draw.choice([0, 1, 100, 3000]))
    limits = PackLimits(draw.randint(1, 8), 90_000, draw.choice([100_000, 200_000, 10**6]))
    left_out = write_packs([f'new/{name}' for name in names], tmp_path, tmp_path / 'out', limits)
    sizes = [p.stat().st_size for p in (tmp_path / 'out').iterdir()]
    assert max(sizes) <= limits.file_bytes and sum(sizes) <= limits.total_bytes and len(sizes) <= limits.files
    files, incomplete = read_packs(tmp_path / 'out')
    assert not incomplete and len(files) > 50 and len(files) + len(left_out) == len(names)


# 7: the deadline


def test_a_worker_that_is_killed_at_the_deadline_is_stopped(tmp_path):
    sitting = sitting_in(tmp_path)
    Path(sitting.folder).mkdir()
    sleeps = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    progress = Progress((ENTRY,), sitting, time.time(), running={ENTRY.name: sleeps})
    progress.end_all()
    outcome = progress.outcomes[ENTRY.name]
    assert (outcome.state, outcome.message) == (
        'stopped',
        'ended at the deadline; goes on from its last state',
    )
    assert '1 stopped, 0 failed' in progress.table() and outcome.message in progress.table()


def test_a_worker_that_dies_by_itself_has_failed(tmp_path):
    sitting = sitting_in(tmp_path)
    Path(sitting.folder).mkdir()
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    progress = Progress((ENTRY,), sitting, time.time(), running={ENTRY.name: dead})
    progress.end_all()
    outcome = progress.outcomes[ENTRY.name]
    output = str(log_path(sitting, ENTRY.name, 'output.txt'))
    assert outcome.state == 'failed' and outcome.message.endswith(f'without writing an outcome; see {output}')
    assert output in progress.table(), 'the path is not cut'
    assert worker_outcome(ENTRY.name, sitting) == outcome


# 8 and 9: what is printed


def test_the_printed_run_has_the_same_entries(tmp_path, capsys):
    places = dict(folder=f'{tmp_path}/q', records=f'{tmp_path}/r', packs=f'{tmp_path}/parts')
    kd_aif_queue('pack', queue='smoke', only='fixmatch-s0, elr-s0', **places)
    assert "--only 'fixmatch-s0, elr-s0'" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize('part_bytes', [1, 10_000, 20_000])
def test_parts_that_are_too_small_are_refused_without_negative_sizes(part_bytes, tmp_path):
    old = tmp_path / 'parts' / 'part-1' / 'run.sh'
    put(old, 'old')
    with pytest.raises(ValueError, match='give more --megabytes') as e:
        pack_parts(
            smoke_queue(), sitting_in(tmp_path), PartSettings('smoke', 60.0, part_bytes), tmp_path / 'parts'
        )
    assert ' -' not in str(e.value).replace(' --', '') and old.read_text() == 'old'


@pytest.mark.parametrize('name', ['folder', 'records', 'packs'])
def test_a_file_in_place_of_a_folder_is_named_by_its_option(name, tmp_path, capsys):
    put(tmp_path / 'file', '')
    with pytest.raises(SystemExit):
        kd_aif_queue('run', queue='smoke', **{name: f'{tmp_path}/file/x'})
    assert f'error: {name} is ' in capsys.readouterr().err
    with pytest.raises(ValueError, match='^out is '):
        check_folder(tmp_path / 'file')


def test_the_plan_says_once_where_its_rate_is_from():
    rate = dataclasses.replace(BEFORE, source='some machine')
    table = plan_table(smoke_queue(), set(), rate)
    assert table.count('some machine') == 1 and 'some machine' in table.splitlines()[-1]
    assert table.count('FLOP counted') == len(smoke_queue())
