"The benchmark's networks as a property: every parameter learns, batches do not mix, any number of channels and classes; names, seeds, files, scores."

import copy

import pytest, torch
from torch import nn
import torch.nn.functional as F
from kd_aif.models.architectures import (
    ARCHITECTURES,
    BENCHMARK,
    InvertedBottleneck,
    PadShortcut,
    ShuffleUnit,
    StagedNet,
    cifar_resnet,
    cifar_vgg,
    wide_resnet,
)
from kd_aif.foundation.core import evaluating
from kd_aif.influence.curvature import FlatModel
from kd_aif.models.build import MODELS, build_model, load_model, n_parameters, save_model
from kd_aif.models.features import feature_maps, features_and_logits, last_linear
from kd_aif.influence.directional import directional_scores

# a network of each family, small where there is a choice
FAMILIES = (
    'resnet20',
    'resnet20_pad',
    'resnet8x4',
    'resnet50',
    'wrn_16_2',
    'wrn_40_1',
    'vgg8',
    'mobilenetv2_half',
    'shufflenetv1',
    'shufflenetv2',
)
CHEAP = 'resnet20', 'resnet20_pad', 'wrn_16_2', 'vgg8', 'mobilenetv2_half', 'shufflenetv1', 'shufflenetv2'
family, cheap = (pytest.mark.parametrize('name', names) for names in (FAMILIES, CHEAP))


def images(n=2, channels=3, size=32, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def used(model, n=6, seed=0):
    "`model` in evaluation mode, with running statistics that are not the initial ones"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.1)
                m.momentum = 1.0
        model.train()(images(n))
    return model.eval()


@family
def test_gradients_reach_all_parameters(name):
    model = build_model(name, 100, seed=0).train()
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    assert not [
        k
        for k, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]


@family
def test_evaluation_is_deterministic_and_sees_one_sample_at_a_time(name):
    model, x = used(build_model(name, 10, seed=0)), images(3, seed=1)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first, again, alone = model(x), model(x), torch.cat([model(o[None]) for o in x])
    assert torch.equal(first, again) and torch.isfinite(first).all()
    assert not torch.allclose(first[0], first[1], atol=1e-4)  # it looks at the image
    torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@cheap
@pytest.mark.parametrize('in_channels, n_classes', [(1, 7), (4, 2)])
def test_grey_images_and_other_numbers_of_classes(name, in_channels, n_classes):
    model = build_model(name, n_classes, in_channels=in_channels, seed=0).eval()
    with torch.no_grad():
        assert model(images(2, in_channels)).shape == (2, n_classes)
    colour = build_model(name, n_classes, seed=0)
    weight = next(model.stages[0].parameters())
    biases = (n_classes - 2) * (1 + model.classifier.in_features)
    assert n_parameters(colour) - n_parameters(model) == (3 - in_channels) * weight[:, 0].numel()
    assert n_parameters(build_model(name, 2, in_channels)) == n_parameters(model) - biases


@cheap
def test_other_sizes_of_images(name):
    model = build_model(name, 10, seed=0).eval()
    with torch.no_grad():
        assert model(images(2, size=64)).shape == (2, 10)


@family
def test_maps_are_what_the_forward_pass_goes_through(name):
    model, x = used(build_model(name, 10, seed=0)), images(seed=2)
    with torch.no_grad():
        (maps, logits), (h, expected) = feature_maps(model, x), features_and_logits(model, dict(x=x))
        kept = [m.clone() for m in maps]
        model.features(images(seed=3))
        model.classifier(maps[-1])
        for k, m in enumerate(
            maps[:-2]
        ):  # a map leads to the next: nothing goes around it, and no later layer has overwritten it
            torch.testing.assert_close(model.stages[k + 1](m), kept[k + 1])
        assert all(map(torch.equal, maps, kept))
    assert torch.equal(logits, expected) and torch.equal(maps[-1], h)
    assert all(m.ndim == 4 for m in maps[:-1]) and [m.shape[-1] for m in maps[:-1]] == sorted(
        (m.shape[-1] for m in maps[:-1]), reverse=True
    )
    assert last_linear(model) == last_linear(model, dict(x=x)) == ('classifier', model.classifier)


@family
def test_gradients_flow_through_every_map(name):
    model = build_model(name, 10, seed=0).train()
    maps, _ = feature_maps(model, images(4))
    stem = next(model.stages[0].parameters())
    for m in maps:
        (g,) = torch.autograd.grad(m.square().mean(), stem, retain_graph=True)
        assert torch.isfinite(g).all() and g.any()


def test_maps_of_sequences():
    model, x = build_model('cnn4', 10, seed=0).eval(), images(5)
    maps, logits = feature_maps(model, x)
    assert [tuple(m.shape) for m in maps] == [(5, 4, 16, 16), (5, 8, 8, 8), (5, 16, 8, 8), (5, 16)]
    torch.testing.assert_close(maps[-1], maps[-2].mean((2, 3)))
    assert torch.equal(logits, model(x)) and all(bool((m >= 0).all()) for m in maps)


@pytest.mark.parametrize(
    'model',
    [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 2), nn.ReLU())],
    ids=['layer', 'no rectifier', 'no linear end'],
)
def test_maps_of_a_model_without_known_stages(model):
    with pytest.raises(ValueError, match='StagedNet'):
        feature_maps(model, torch.randn(3, 4))


@cheap
def test_weights_are_a_function_of_name_and_seed(name, tmp_path):
    torch.manual_seed(1)
    one, state = build_model(name, 10, seed=3), torch.get_rng_state()
    torch.manual_seed(2)
    two, other = build_model(name, 10, seed=3), build_model(name, 10, seed=4)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    assert not torch.equal(one.classifier.weight, other.classifier.weight) and not torch.equal(
        next(one.parameters()), next(other.parameters())
    )
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in one.parameters() if p.ndim == 4)
    loaded = load_model(other, save_model(used(one), tmp_path / 'weights.safetensors')).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), one(images()))


@cheap
def test_scores_agree_with_gradients(name):
    "Influence scores go through every kind of layer of the benchmark: directional derivatives against autograd, in double precision."
    model = used(build_model(name, 5, seed=0)).double()
    batch = dict(
        x=images(2, size=32 if name == 'mobilenetv2_half' else 16).double(),
        y=torch.tensor([1, 3]),
        index=torch.arange(2),
    )
    flat = FlatModel(model)
    s = torch.randn(flat.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = directional_scores(flat, [batch], s, progress=False)[0]
    with evaluating(model):
        losses = F.cross_entropy(model(batch['x']), batch['y'], reduction='none')
        expected = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)]
            )
            @ s
            for o in losses
        ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-8)


def test_half_precision_stays_finite():
    for name in CHEAP:
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            maps, logits = feature_maps(build_model(name, 10, seed=0).eval(), images())
        assert torch.isfinite(logits.float()).all() and all(torch.isfinite(m.float()).all() for m in maps)


def test_names():
    assert set(BENCHMARK) < set(ARCHITECTURES) and set(BENCHMARK) < set(MODELS)
    for name in ('resnet20', 'resnet20_pad'):
        assert type(build_model(name, 10)) is StagedNet
    for name in ('resnet50_pad', 'vgg16', 'wrn_16_3', 'resnet', 'ResNet20', 'shufflenet', None):
        with pytest.raises(ValueError, match='is not a model; use one of .*resnet8x4'):
            build_model(name, 10)
    with pytest.raises(ValueError, match="'torchvision/vgg16'"):
        build_model('vgg16', 10)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: cifar_resnet(2, 10), 'depth=2: .*6n'),
        (lambda: cifar_resnet(18, 10), 'depth=18: .*6n'),
        (lambda: cifar_resnet(20, 10, shortcut='A'), "shortcut='A': use 'conv'"),
        (lambda: wide_resnet(4, 2, 10), 'depth=4: .*6n'),
        (lambda: wide_resnet(20, 2, 10), 'depth=20: .*6n'),
        (lambda: cifar_vgg(16, 10), 'depth=16: .*vgg13'),
    ],
)
def test_wrong_arguments_name_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# blocks


def test_shortcuts_of_blocks():
    "Blocks whose last convolution is silent give back what the shortcut carries."
    x = torch.rand(2, 6, 8, 8)
    block = InvertedBottleneck(6, 6).eval()
    nn.init.zeros_(block[-1][1].weight)
    assert torch.equal(block(x).detach(), x)
    assert not InvertedBottleneck(6, 6, stride=2).shortcut and not InvertedBottleneck(6, 8).shortcut
    x = torch.rand(2, 12, 8, 8)
    for unit, expected in (
        (ShuffleUnit(12, 12), x),
        (ShuffleUnit(12, 24, stride=2), F.avg_pool2d(x, 3, 2, 1)),
    ):
        nn.init.zeros_(unit.expand[-1][1].weight)
        assert torch.equal(unit.eval()(x).detach()[:, -12:], expected)


def test_groups_are_shuffled():
    "Without the shuffle a group of output channels would depend on its own group of input channels alone."
    unit, x = ShuffleUnit(36, 36).eval(), torch.randn(1, 36, 8, 8, requires_grad=True)

    def seen():
        return torch.autograd.grad(unit(x)[:, :12].sum(), x)[0].abs().sum((0, 2, 3)) > 0

    assert seen().all()
    unit.groups = 1
    assert seen()[:12].all() and not seen()[12:].any()


def test_padding_may_be_uneven():
    x = torch.rand(1, 2, 5, 5)
    y = PadShortcut(3, stride=2)(x)
    assert y.shape == (1, 5, 3, 3) and torch.equal(y[:, 1:3], x[:, :, ::2, ::2]) and not y[:, [0, 3, 4]].any()
