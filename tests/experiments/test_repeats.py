"The same seed gives the same record in another process, whatever the order of sets and whatever the console can print."

import os
import subprocess
import sys

from kd_aif.experiments.cli import kd_aif_run
from kd_aif.reporting.record_files import load_records

PROGRAM = """
import sys
from kd_aif.experiments.cli import kd_aif_run
kd_aif_run(sys.argv[1:])
"""
ARGS = [
    *'--method kd_aif_student --epochs 2 --seeds 1 --noise symmetric --rate 0.3 --threads 1'.split(),
    *'--teacher mlp8 --student mlp8 --out results'.split(),
]


def start(folder, **variables):
    folder.mkdir()
    environment = os.environ | dict(KD_AIF_CACHE=str(folder / 'cache'), OMP_NUM_THREADS='1') | variables
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, '-c', PROGRAM, *ARGS], cwd=folder, env=environment, **pipes)


def test_a_seed_gives_one_record(tmp_path, monkeypatch, one_thread):
    other = '1' if os.environ.get('PYTHONHASHSEED') == '2' else '2'
    process = start(tmp_path / 'other', PYTHONHASHSEED=other, PYTHONIOENCODING='ascii', TQDM_DISABLE='0')
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'here' / 'cache'))
    kd_aif_run(ARGS)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and b'Traceback' not in err, err
    assert 'kd_aif_student' in out.decode('ascii')  # what it cannot print is replaced
    (a,), (b,) = (load_records(tmp_path / name / 'results') for name in ('here', 'other'))
    assert a.identity == b.identity and a.metrics == b.metrics and a.versions == b.versions
    assert a.history == b.history and a.metrics['weight_auc'] is not None
