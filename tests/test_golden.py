"""The results of small runs of every procedure, kept to the last bit.

Another processor or another PyTorch takes sums in another order: there the numbers are compared within tolerances.
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


def near(found, kept):
    "Equal structure; numbers of the first epoch and shares within a coarse tolerance"
    if isinstance(kept, dict):
        return found.keys() == kept.keys() and all(near(found[k], v) for k, v in kept.items())
    if isinstance(kept, list):
        return len(found) == len(kept) and all(map(near, found, kept))
    if isinstance(kept, float):
        return isinstance(found, float) and math.isclose(found, kept, rel_tol=0.25, abs_tol=0.12)
    return type(found) is type(kept)


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


if __name__ == '__main__':
    cases = {}
    for name in CASES:
        cases[name] = computed(name)
        print(name, cases[name]['metrics'].get('test_accuracy'), flush=True)
    body = ',\n'.join(f'{json.dumps(name)}: {json.dumps(case)}' for name, case in cases.items())
    FILE.write_text('{"machine": ' + json.dumps(machine()) + ',\n"cases": {\n' + body + '\n}}\n')
