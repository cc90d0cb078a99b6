"Small data, models and training steps for the tests of rivals that weigh samples."

import torch
from torch import nn

from kd_aif.distillation.trainer import Step
from kd_aif.foundation.core import generator
from kd_aif.foundation.losses import batch_cross_entropy

C = 3  # classes
settings = dict(epochs=2, lr=0.1, progress=False)  # of short runs


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n, seed, first=0, d=6):
    "Three clouds"
    y = torch.arange(n) % C
    return dict(x=random(C, d, seed=99)[y] * 2 + random(n, d, seed=seed), y=y, index=first + torch.arange(n))


def cut(data, size):
    return [{k: v[at] for k, v in data.items()} for at in torch.arange(len(data['y'])).split(size)]


def double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def forward(model, batch):
    return model(batch['x'])


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def step_of(model, batch, loss=batch_cross_entropy, forward=forward, lr=0.1, epoch=0):
    logits = forward(model, batch)
    return Step(model, batch, logits, loss(logits, batch), loss, forward, lr, epoch, 1)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items()) and a.keys() == b.keys()


train, val = rows(60, 1), rows(40, 2, first=1000)
held_out = torch.arange(60) % 4 == 0


def linear():
    return seeded(lambda: nn.Linear(6, C)).double()


class Attention(nn.Module):
    "Self-attention over the six inputs, with an embedding of the place, layer norm, dropout and tied weights"

    def __init__(self):
        super().__init__()
        self.place, self.up = nn.Embedding(6, 8), nn.Linear(1, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head, self.tied = nn.Linear(8, C), nn.Linear(1, 8)
        self.tied.weight = self.up.weight

    def forward(self, x):
        z = self.up(x[..., None]) + self.place.weight
        return self.head((self.block(z) + self.tied(x[..., None])).mean(1))


def net(kind, seed=0):
    make = {
        'linear': lambda: nn.Linear(6, C),
        'batch norm': lambda: nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, C)
        ),
        'dropout': lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, C)),
        'convolution': lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, C),
        ),
        'attention': Attention,
    }[kind]
    return seeded(make, seed).train()


KINDS = ['linear', 'batch norm', 'dropout', 'convolution', 'attention']


def lower(model, batch):
    with torch.autocast('cpu', torch.bfloat16):
        return model(batch['x']).float()


class Shuffling:
    "Another order in each pass, no `eval_view`"

    def __init__(self, data, size=16):
        self.data, self.size, self.passes = data, size, 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(len(self.data['y']), generator=generator(self.passes, 'order'))
        yield from cut({k: v[order] for k, v in self.data.items()}, self.size)
