"What a cell shows of an object: no address, no numbers of a tensor, one or two lines."

import dataclasses
import importlib
import pkgutil
import re

import pytest
import torch
from torch import nn

import kd_aif
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.data.training_set import TrainingSet
from kd_aif.foundation.reprs import short_value, ShortRepr
from kd_aif.weights.sample_weights import SampleWeights

LONGEST = 300
RAW = re.compile(r'\b0x[0-9a-f]+|\btensor\(|<function')


def an_example(*_):
    return None


EXAMPLES = {  # a word of the annotation -> a value that would fill a page
    'Tensor': torch.rand(300),
    'Module': nn.Linear(9, 9),
    'Callable': an_example,
    'dict': {f'k{i}': torch.rand(9) for i in range(30)},
    'list': [torch.rand(3)] * 50,
    'tuple': (0.5, 'name', 3),
    'str': 'a short name',
    'int': 3,
    'float': 1 / 3,
}


def public_dataclasses():
    modules = [m.name for m in pkgutil.walk_packages(kd_aif.__path__, 'kd_aif.') if '._' not in m.name]
    found = {}
    for name in modules:
        here = vars(importlib.import_module(name)).values()
        own = [c for c in here if isinstance(c, type) and c.__module__ == name and dataclasses.is_dataclass(c)]
        found |= {f'{name}.{c.__name__}': c for c in own if not c.__name__.startswith('_')}
    return found


def describes_itself(cls):
    "Whether the class writes its own description, of values that must make sense together"
    return not issubclass(cls, ShortRepr) and not hasattr(cls.__repr__, '__wrapped__')


def example(annotation):
    found = [v for k, v in EXAMPLES.items() if k in str(annotation)]
    return found[0] if found else 'an object'


def filled(cls, optional):
    "An instance with an example in every field that has no default, and in those that may be a tensor or a function"
    instance = object.__new__(cls)
    for f in dataclasses.fields(cls):
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        raw = optional and value is None and re.search('Tensor|Callable|Module|dict', str(f.type))
        object.__setattr__(instance, f.name, example(f.type) if raw or value is dataclasses.MISSING else value)
    return instance


CLASSES = public_dataclasses()


def test_there_are_many_of_them():
    assert len(CLASSES) > 100 and 'kd_aif.distillation.trainer.Training' in CLASSES


@pytest.mark.parametrize('optional', [False, True], ids=['required', 'all'])
@pytest.mark.parametrize('name', [n for n, c in CLASSES.items() if not describes_itself(c)])
def test_dataclasses_are_short(name, optional):
    text = repr(filled(CLASSES[name], optional))
    assert not RAW.search(text) and len(text) <= LONGEST, text
    assert text.startswith(CLASSES[name].__name__)


@pytest.fixture
def data():
    return load_images('digits').select(torch.arange(40))


def test_what_holds_data_gives_sizes(data):
    batches = ImageBatches(data, 8)
    samples = TrainingSet(batches, batches, include_validation=True)
    shown = data, batches, samples, samples.samples, SampleWeights(40)
    for value in shown:
        assert not RAW.search(repr(value)) and len(repr(value)) <= LONGEST, repr(value)
    assert '40 training samples; 40 validation samples, which train too; 10 batches' in repr(samples)
    assert 'index=Tensor[40]' in repr(samples.samples)


def test_only_what_differs_is_shown():
    assert repr(kd_aif.Training()) == 'Training()'
    assert repr(kd_aif.Training(epochs=3, compile=torch.compile)) == 'Training(epochs=3, compile=compile)'
    assert repr(kd_aif.OneShot(make_teacher=lambda: None)) == 'OneShot(make_teacher=lambda)'
    assert repr(kd_aif.Fixed(torch.ones(1000))) == 'Fixed(values=Tensor[1000])'
    assert repr(kd_aif.Objective(T=2.0)) == 'Objective(T=2.0)'


def test_an_object_with_an_address_is_named_by_its_class():
    assert short_value(object()) == 'object' and short_value([object()]) == '[object]'
    assert short_value(nn.Sequential(nn.Linear(2, 2))) == 'Sequential'
