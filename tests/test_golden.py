"""The results of small runs of every procedure, kept to the last bit.

Another processor or another PyTorch takes sums in another order, and small runs then end elsewhere: there the metrics
must be alike, and accuracies near.
`python tests/test_golden.py` writes the file anew, after a change that is meant to change results."""

import json
import math
import platform
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from golden.cases import CASES
from kd_aif.experiments.storage import TRAINING_VERSION

FILE = Path(__file__).parent / 'golden' / 'golden.json'


def machine():
    "What decides the last bit: processor, its instructions, PyTorch"
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')),
        platform.processor(),
    )
    return dict(processor=model, capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__)


def computed(name):
    "A case at one thread, as JSON gives it back"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return json.loads(json.dumps(CASES[name]()))
    finally:
        torch.set_num_threads(threads)


def alike(found, kept):
    "The same keys and kinds of values everywhere"
    if isinstance(kept, dict):
        return (
            isinstance(found, dict)
            and found.keys() == kept.keys()
            and all(alike(found[k], v) for k, v in kept.items())
        )
    if isinstance(kept, list):
        return isinstance(found, list) and len(found) == len(kept)
    return type(found) is type(kept) and (
        not isinstance(kept, float) or math.isfinite(found) == math.isfinite(kept)
    )


def near(found, kept):
    "Alike, and accuracies of the small networks within 25 points: another rounding is another run"
    accuracies = [k for k in kept if k in ('test_accuracy', 'val_accuracy')]
    return alike(found, kept) and all(abs(found[k] - kept[k]) < 0.25 for k in accuracies)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CASES)
def test_golden(name):
    kept = json.loads(FILE.read_text())
    found = computed(name)
    if kept['machine'] == machine():
        assert found == kept['cases'][name]
    else:
        metrics = kept['cases'][name]['metrics']
        assert near(found['metrics'], metrics), f"{found['metrics']} is far from {metrics}"


def test_every_case_is_kept():
    assert set(json.loads(FILE.read_text())['cases']) == set(CASES)


def write_anew():
    "Compute every case; numbers that moved on the same machine need a new `TRAINING_VERSION`"
    kept, cases = json.loads(FILE.read_text()), {}
    for name in CASES:
        cases[name] = computed(name)
        print(name, cases[name]['metrics'].get('test_accuracy'), flush=True)
    moved = [name for name, case in kept['cases'].items() if name in cases and case != cases[name]]
    if moved and kept['machine'] == machine() and kept['training_version'] == TRAINING_VERSION:
        sys.exit(
            f"{', '.join(moved)} moved: raise TRAINING_VERSION in experiments.storage, so that nothing old goes on"
        )
    body = ',\n'.join(f'{json.dumps(name)}: {json.dumps(case)}' for name, case in cases.items())
    head = f'"machine": {json.dumps(machine())},\n"training_version": {json.dumps(TRAINING_VERSION)}'
    FILE.write_text('{' + head + ',\n"cases": {\n' + body + '\n}}\n')


if __name__ == '__main__':
    write_anew()
