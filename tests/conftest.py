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
