"The table of the index notebook, 'what I have, what I write': the very lines of each row, run on tiny data."

import ast
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import kd_aif
from kd_aif.distillation.result import Run

INDEX = Path(__file__).resolve().parents[1] / 'nbs' / 'index.ipynb'
N, CLASSES, SPECIES = 60, 3, np.array(['iris', 'lily', 'rose'])
WORDS = ['[PAD]', '[UNK]', 'fine', 'great', 'lovely', 'dull', 'awful', 'boring']
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')


def table_rows():
    "{what: lines} of the table in the index notebook"
    cells = (''.join(c['source']) for c in json.loads(INDEX.read_text(encoding='utf-8'))['cells'])
    table = next(c for c in cells if '| what I have |' in c).split('| --- |')[-1]
    rows = [line.strip('| ').split(' | ') for line in table.splitlines() if line.startswith('| ')]
    return {what: re.findall(r'`([^`]+)`', train + look) for what, train, look in rows}


ROWS = table_rows()
g = torch.Generator().manual_seed(0)
Y = torch.arange(N) % CLASSES
GIVEN = torch.where(torch.rand(N, generator=g) < 0.2, (Y + 1) % CLASSES, Y)
PICTURES = (torch.rand(N, 3, 16, 16, generator=g) * 180 + 20 * Y[:, None, None, None]).byte()


def picture(i):
    return Image.fromarray(PICTURES[i].permute(1, 2, 0).numpy())


class Rows(Dataset):
    "A data set of whatever `make` gives for a position"

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return N

    def __getitem__(self, i):
        if not 0 <= i < N:
            raise IndexError(i)
        return self.make(i)


def pairs():
    return Rows(lambda i: (PICTURES[i] / 255, int(GIVEN[i])))


def halves():
    split = torch.arange(N).split([45, 15])
    return [Subset(pairs(), rows.tolist()) for rows in split]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh(), nn.Linear(8, CLASSES))


# what each row finds: files in the folder, and names


def photos():
    rows = []
    for i in range(N):
        path = Path('photos') / SPECIES[GIVEN[i]] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
        rows.append((str(path), SPECIES[GIVEN[i]]))
    pd.DataFrame(rows, columns=['path', 'label']).to_csv('photos.csv', index=False)
    return {}


def numbers():
    columns = torch.randn(N, 4, generator=torch.Generator().manual_seed(1)) + Y[:, None]
    frame = pd.DataFrame(columns.numpy(), columns=['height', 'width', 'mass', 'age'])
    frame = frame.assign(species=SPECIES[GIVEN])
    frame.to_csv('flowers.csv', index=False)
    return dict(frame=frame)


def reviews():
    draw = np.random.default_rng(0)
    texts = [' '.join(draw.choice(WORDS[2:5] if i % 2 else WORDS[5:], 1 + i % 4)) for i in range(N)]
    labels = np.where(draw.random(N) < 0.2, 1 - np.arange(N) % 2, np.arange(N) % 2)
    return pd.DataFrame(dict(text=texts, label=np.array(['bad', 'good'])[labels]))


def save_network(transformers, folder, kind, **sizes):
    "A tiny network and its tokenizer, saved under the name by which the row asks for it"
    tokenizers = pytest.importorskip('tokenizers')
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, '[UNK]'))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = dict(pad_token='[PAD]', unk_token='[UNK]', model_max_length=16)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    config = getattr(transformers, f'{kind}Config')(
        vocab_size=len(WORDS), pad_token_id=0, num_labels=2, **sizes
    )
    torch.manual_seed(0)
    getattr(transformers, f'{kind}ForSequenceClassification')(config).save_pretrained(folder)


def texts(monkeypatch, folder='minilm'):
    transformers = pytest.importorskip('transformers')
    from kd_aif.models import text

    encoder = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    kinds = {
        'minilm': ('Bert', encoder),
        'gpt2': ('GPT2', dict(n_embd=8, n_layer=1, n_head=2, n_positions=16)),
        'distilbert-base-uncased': ('DistilBert', dict(dim=8, n_layers=1, n_heads=2, hidden_dim=8)),
    }
    kind, sizes = kinds[folder]
    save_network(transformers, folder, kind, **sizes)
    monkeypatch.setattr(text, 'PACKAGED', {})
    reviews().to_csv('reviews.csv', index=False)
    return dict(AutoModelForSequenceClassification=transformers.AutoModelForSequenceClassification)


def text_sets(monkeypatch, folder='minilm'):
    names = texts(monkeypatch, folder)
    batches = kd_aif.samples('reviews.csv', tokenizer=kd_aif.load_tokenizer(folder))
    return names | dict(zip(('train', 'val'), batches.hold_out(0.2)))


def image_sets(*libraries):
    names = {name: pytest.importorskip(name) for name in libraries}
    return names | dict(zip(('train', 'val'), kd_aif.samples(pairs()).hold_out(0.2)), network=network())


def hub_set(kind):
    datasets = pytest.importorskip('datasets')
    if kind == 'texts':
        return datasets.Dataset.from_pandas(reviews())
    photos()
    found = datasets.Dataset.from_pandas(pd.read_csv('photos.csv'))
    return found.rename_column('path', 'image').cast_column('image', datasets.Image())


def jittered():
    return Rows(lambda i: (PICTURES[i] / 255 + 0.1 * torch.rand(3, 16, 16), int(GIVEN[i])))


def loaders():
    train, val = halves()
    names = dict(train_loader=DataLoader(train, 16, shuffle=True), val_loader=DataLoader(val, 16))
    return names | dict(student=network(), teacher=network(), model=network())


quick_compile = partial(torch.compile, backend='eager')  # the default backend calls a compiler of C++


def adapters(monkeypatch):
    peft = pytest.importorskip('peft')
    return text_sets(monkeypatch) | dict(get_peft_model=peft.get_peft_model, LoraConfig=peft.LoraConfig)


FOUND = {
    'folder of class folders of images': lambda m: photos(),
    'CSV of paths of images': lambda m: photos(),
    'CSV of texts': texts,
    'CSV of numbers': lambda m: numbers(),
    '`DataFrame`': lambda m: numbers(),
    'torch `Dataset` of `(x, y)`': lambda m: dict(dataset=pairs()),
    'torch `Dataset` of dictionaries': lambda m: dict(
        dataset=Rows(lambda i: dict(x=PICTURES[i] / 255, species=int(GIVEN[i])))
    ),
    'torchvision data set of pictures, without a transform': lambda m: dict(
        dataset=Rows(lambda i: (picture(i), int(GIVEN[i])))
    ),
    '`Dataset` that augments, and the same without': lambda m: dict(augmented=jittered(), plain=pairs()),
    '`TensorDataset`': lambda m: dict(x=PICTURES / 255, y=GIVEN),
    'arrays of NumPy, or tensors': lambda m: dict(x=(PICTURES / 255).numpy(), y=GIVEN.numpy()),
    '`datasets.Dataset` of images': lambda m: dict(dataset=hub_set('images')),
    '`datasets.Dataset` of texts': lambda m: texts(m) | dict(dataset=hub_set('texts')),
    'plain `DataLoader`s, a teacher and a student': lambda m: loaders(),
    'plain `DataLoader`s and a trained model': lambda m: loaders(),
    'network of torchvision': lambda m: image_sets('torchvision'),
    'network of timm': lambda m: image_sets('timm'),
    'frozen backbone': lambda m: image_sets('torchvision'),
    'text classifier of transformers': lambda m: text_sets(m, 'distilbert-base-uncased'),
    'GPT-2 and its like': lambda m: text_sets(m, 'gpt2'),
    'LoRA adapters (peft)': adapters,
    '`DataParallel`': lambda m: image_sets(),
    '`DistributedDataParallel`': lambda m: image_sets(),
    '`torch.compile`': lambda m: image_sets() | dict(torch=SimpleNamespace(compile=quick_compile)),
    'network without a linear classifier at its end': lambda m: image_sets(),
}


def test_the_table_has_the_rows_that_are_tested():
    assert list(ROWS) == list(FOUND) and len(ROWS) >= 14


def lines_to_score(lines):
    return next(k for k, line in enumerate(lines, 1) if 'score_samples(' in line or 'mechanism=' in line)


@pytest.mark.parametrize('what', ROWS)
def test_scores_take_five_lines_at_most(what):
    lines = ROWS[what]
    assert lines_to_score(lines) <= 5 and len(lines) <= 5
    assert all(len(ast.parse(line).body) == 1 for line in lines)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_process(request, tmp_path):
    "A group of one process, where the row asks for it"
    needed = 'Distributed' in request.node.name
    if needed:
        torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    if needed:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('what', ROWS)
def test_lines_of_the_row(what, folder, one_process, monkeypatch):
    names = dict(torch=torch, nn=nn, TensorDataset=TensorDataset)
    names |= {name: getattr(kd_aif, name) for name in kd_aif.__all__}
    names |= FOUND[what](monkeypatch)
    torch.manual_seed(0)
    exec('\n'.join(ROWS[what]), names)
    found = names['scored'] if 'scored' in names else names['run']
    table, train = found.samples, names.get('train')
    n = 45 if train is None else len(train.y)
    assert len(table) == n and table.index.is_unique and np.isfinite(table['score']).all()
    told = table['probability'].dropna()  # none where calibration tells no label from another
    assert table['score'].std() > 0 and told.between(0, 1).all() and len(told) in (0, n)
    if train is not None:
        assert sorted(table.index) == sorted(train.index.tolist())
        assert set(table['given'].astype(str)) <= set(map(str, train.classes))
    assert isinstance(found, Run) or len(found.suspicious(5)) == 5
    page = (folder / 'samples.html').read_text(encoding='utf-8')
    assert len(re.findall('"index":\\[', page)) == 1 and f'"{table.index[0]}"' in page
