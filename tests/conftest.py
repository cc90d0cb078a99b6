"Shared by all tests: where the repository is; figures without a window, bars off."

import os
from pathlib import Path

import pytest

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('TQDM_DISABLE', '1')


@pytest.fixture(scope='session')
def root():
    "The root of the repository."
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def cpu(monkeypatch):
    "Tasks on the CPU, where a repeat gives the same last bit; on a GPU sums may be taken in another order."
    import torch

    for module in ('task_data', 'ssl_tasks'):
        monkeypatch.setattr(f'kd_aif.experiments.{module}.default_device', lambda: torch.device('cpu'))


@pytest.fixture
def one_thread():
    "One thread of PyTorch, so that sums are taken in one order."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
