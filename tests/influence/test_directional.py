"Directional derivatives of every sample's loss in all modes against a loop of gradients: many layers, losses, batches; all-layer targets; C = 100."

import copy, warnings

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from kd_aif.influence import sampled_rows as sampled_rows_module
from kd_aif.foundation.core import evaluating
from kd_aif.influence.curvature import FlatModel, GaussNewton, mean_gradient
from kd_aif.influence.sampled_rows import StreamedRows, sampled_rows, sample_gradients
from kd_aif.influence.last_layer import TARGETS
from kd_aif.influence import scores as scores_module, self_influence as self_influence_module
from kd_aif.influence import cross_scores as cross_scores_module
from kd_aif.influence.cross_scores import Scoring
from kd_aif.influence.scores import AllLayerOptions, all_layer_scores
from kd_aif.foundation.losses import batch_cross_entropy, distill_loss
from kd_aif.models.build import build_model
from kd_aif.influence.directional import directional_scores, finite_step
from kd_aif.influence.iterative_solvers import CG, LBFGS, LiSSA
from kd_aif.influence.solvers import EKFAC, KFAC, Diagonal, Exact, Identity, Woodbury
from kd_aif.influence.forward_mode import measuring


def influence_scores(model, loss, train, val, solver=None, target='mean', last_layer=False, **settings):
    "Scores of all layers unless the last one is asked for; mode, losses and start are options of all layers"
    options = {k: settings.pop(k) for k in ('mode', 'losses', 'start') if k in settings}
    if last_layer:
        return scores_module.influence_scores(
            model, loss, train, val, solver, target, True, **settings, **options
        )
    options = AllLayerOptions(**options)
    return all_layer_scores(model, loss, train, val, solver, target, options=options, **settings)


def self_influence(model, loss, train, solver=None, last_layer=False, **settings):
    "Self-influence of all layers unless the last one is asked for"
    return self_influence_module.self_influence(model, loss, train, solver, last_layer, **settings)


def cross_scores(model, loss, train, val, folds=2, score=('mean', 'loss'), seed=0, **settings):
    "`cross_scores` with the settings of the scoring side by side"
    scoring = Scoring(**settings)
    return cross_scores_module.cross_scores(model, loss, train, val, score, folds, seed, scoring)


C, LAM = 3, 0.1
DEVICES = pytest.mark.parametrize(
    'device',
    [pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))],
)
quick = settings(max_examples=6, deadline=None)
seeds = st.integers(0, 10_000)


def seeded(make, seed=0):
    "A model in double precision whose BatchNorm statistics are not the initial ones"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                if m.affine:
                    m.weight.data.uniform_(0.5, 2)
                    m.bias.data.normal_()
    return model


def data(x, seed=0, start=0, classes=C):
    n, g = len(x), torch.Generator().manual_seed(seed)
    return dict(
        x=x,
        y=torch.randint(classes, (n,), generator=g),
        index=torch.arange(start, start + n),
        teacher=torch.randn(n, classes, generator=g, dtype=torch.float64) * 2,
    )


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(n=7, seed=0):
    return torch.randint(9, (n, 6), generator=torch.Generator().manual_seed(seed))


def images(n=7, size=8, seed=0):
    return normal(n, 3, size, size, seed=seed)


def pick(batch, at):
    return {k: v[at] if torch.is_tensor(v) else v for k, v in batch.items()}


def cut(batch, *sizes):
    return [
        pick(batch, r)
        for r in (torch.arange(len(batch['index'])).split(list(sizes) if len(sizes) > 1 else sizes[0]))
    ]


def ragged(batch):
    return cut(batch, *([1, 4, len(batch['index']) - 5]))


def near(a, b, tol):
    assert a.shape == b.shape and torch.isfinite(a).all(), (a.shape, b.shape)
    assert float((a - b).norm()) <= tol * max(float(b.norm()), 1e-12), float((a - b).norm() / b.norm())


def gradients(flat, batch):
    "(n, P): one sample after the other, by plain autograd"
    known = dict(flat.model.named_parameters())
    with evaluating(flat.model):
        rows = []
        for i in range(len(batch['index'])):
            one = pick(batch, slice(i, i + 1))
            loss = flat.loss(flat.module(one), one)[0]
            slopes = torch.autograd.grad(loss, [known[n] for n in flat.names], allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros_like(known[n]).flatten() if g is None else g.to_dense().flatten()
                        for n, g in zip(flat.names, slopes)
                    ]
                )
            )
    return torch.stack(rows).detach()


def read(flat, batches, s, mode='auto', losses=None):
    return directional_scores(flat, batches, s, mode, losses, progress=False)[0]


def losses_of(flat, batch):
    with measuring(flat.model), torch.no_grad():
        return flat.losses(flat.parameters(), batch)


# Layers


class Net(nn.Module):
    "A model from a function and its modules"

    def __init__(self, call, **modules):
        super().__init__()
        self.call = call
        for name, m in modules.items():
            setattr(self, name, m)

    def forward(self, x):
        return self.call(self, x)


class Cube(torch.autograd.Function):
    "x³ as a function of the older kind: without jvp, vmap and setup_context"

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class NewCube(torch.autograd.Function):
    "The same, of the kind that torch.func knows, without jvp and vmap"

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def attend(m, x):
    q, k, v = m.qkv(m.embed(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return m.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).mean(1))


def mobile():
    "Inverted residuals as in MobileNetV2"

    def block(a, b, stride):
        return nn.Sequential(
            nn.Conv2d(a, 6 * a, 1, bias=False),
            nn.BatchNorm2d(6 * a),
            nn.ReLU6(inplace=True),
            nn.Conv2d(6 * a, 6 * a, 3, stride, 1, groups=6 * a, bias=False),
            nn.BatchNorm2d(6 * a),
            nn.ReLU6(inplace=True),
            nn.Conv2d(6 * a, b, 1, bias=False),
            nn.BatchNorm2d(b),
        )

    return Net(
        lambda m, x: m.head(F.dropout(m.b(m.a(x) + x).mean((2, 3)), 0.2, m.training)),
        a=block(3, 3, 1),
        b=block(3, 4, 2),
        head=nn.Linear(4, C),
    )


def tied():
    m = nn.Sequential(
        nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(54, C)
    )
    m[2].weight = m[0].weight
    return m


def frozen(which):
    m = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, C)
    )
    for name, p in m.named_parameters():
        p.requires_grad_(which(name))
    return m


def keyword_convolution(m, x):
    return m.head(
        torch.max_pool2d(
            input=F.conv2d(input=x, weight=m.conv.weight, bias=m.conv.bias), kernel_size=2
        ).flatten(1)
    )


def pool_head(channels=4):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, C)


def sequential(*layers):
    return lambda: nn.Sequential(
        *[layer() if callable(layer) and not isinstance(layer, nn.Module) else layer for layer in layers]
    )


LAYERS = dict(
    conv=(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding='same', bias=False),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            *pool_head(),
        ),
        images,
    ),
    resnet=(lambda: build_model('resnet20', C, seed=0), lambda: images(6)),
    grouped=(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, dilation=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, groups=2, stride=2, padding_mode='reflect', padding=1),
            *pool_head(),
        ),
        images,
    ),
    conv1d=(
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(36, C)
        ),
        lambda: normal(7, 3, 20),
    ),
    conv3d=(
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(2, C)
        ),
        lambda: normal(7, 1, 3, 3, 3),
    ),
    transposed=(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.ReLU(), *pool_head()
        ),
        lambda: images(size=4),
    ),
    transposed1d=(
        lambda: nn.Sequential(
            nn.ConvTranspose1d(3, 4, 3, groups=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(4, C),
        ),
        lambda: normal(7, 3, 5),
    ),
    norms=(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.Flatten(),
            nn.LayerNorm(144),
            nn.Linear(144, C),
        ),
        images,
    ),
    plain_batch_norm=(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, affine=False),
            nn.InstanceNorm2d(4, affine=True),
            nn.ReLU(),
            *pool_head(),
        ),
        images,
    ),
    multihead=(
        lambda: Net(
            lambda m, x: m.head(m.attention(*[m.embed(x)] * 3)[0].mean(1)),
            embed=nn.Embedding(9, 8),
            attention=nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.3),
            head=nn.Linear(8, C),
        ),
        tokens,
    ),
    encoder=(
        lambda: Net(
            lambda m, x: m.head(m.layer(m.embed(x)).mean(1)),
            embed=nn.Embedding(9, 8),
            layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            head=nn.Linear(8, C),
        ),
        tokens,
    ),
    dot_product=(
        lambda: Net(attend, embed=nn.Embedding(9, 8), qkv=nn.Linear(8, 24), head=nn.Linear(8, C)),
        tokens,
    ),
    embedding=(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, C)), tokens),
    bag=(lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Tanh(), nn.Linear(4, C)), tokens),
    bag_sum=(
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4, mode='sum', padding_idx=2), nn.Tanh(), nn.Linear(4, C)),
        tokens,
    ),
    sparse=(lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(24, C)), tokens),
    old_function=(
        lambda: Net(lambda m, x: m.b(Cube.apply(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, C)),
        lambda: normal(7, 4),
    ),
    new_function=(
        lambda: Net(lambda m, x: m.b(NewCube.apply(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, C)),
        lambda: normal(7, 4),
    ),
    tied=(tied, tokens),
    lstm=(
        lambda: Net(
            lambda m, x: m.head(m.cell(m.embed(x))[0][:, -1]),
            embed=nn.Embedding(9, 4),
            cell=nn.LSTM(4, 5, batch_first=True),
            head=nn.Linear(5, C),
        ),
        tokens,
    ),
    weight_norm=(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, C)
        ),
        lambda: normal(7, 4),
    ),
    old_weight_norm=(
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, C)),
        lambda: normal(7, 4),
    ),
    mobile=(mobile, images),
    only_biases=(lambda: frozen(lambda name: name.endswith('bias')), images),
    only_weights=(lambda: frozen(lambda name: name.endswith('weight')), images),
    frozen_body=(lambda: frozen(lambda name: name[0] == '4'), images),
    keywords=(lambda: Net(keyword_convolution, conv=nn.Conv2d(3, 4, 3), head=nn.Linear(36, C)), images),
)
MODES = dict(auto=1e-9, forward=1e-9, reverse=1e-9, gradients=1e-9, finite=1e-4)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', LAYERS)
def test_every_layer_in_every_mode(kind, mode):
    "Batches of one, four and two samples; modes, flags, hooks, buffers and random numbers are as before."
    make, inputs = LAYERS[kind]
    model, batch = seeded(make).train(), data(inputs())
    flat = FlatModel(model)
    s = normal(flat.size, seed=1)
    if mode == 'reverse' and kind.startswith('bag'):  # it can be differentiated only once
        with pytest.raises(NotImplementedError, match='embedding_bag'):
            read(flat, ragged(batch), s, mode)
        return
    before, flags, rng = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    found = read(flat, ragged(batch), s, mode)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and flags == [
        m.training for m in model.modules()
    ]
    assert (
        torch.equal(rng, torch.get_rng_state())
        and torch.backends.mha.get_fastpath_enabled()
        and not found.requires_grad
    )
    assert all(p.grad is None for p in model.parameters())
    near(found, gradients(flat, batch) @ s, MODES[mode])
    if mode == 'finite':
        near(read(flat, ragged(batch), s, mode, losses_of(flat, batch)), gradients(flat, batch) @ s, 1e-3)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', LAYERS)
def test_every_layer_through_the_default_solver(kind):
    "Validation gradient, curvature sample, conjugate gradients and scores; at a high damping the dense matrix is not needed to check them."
    make, inputs = LAYERS[kind]
    model, batch = seeded(make), data(inputs())
    flat, big = FlatModel(model), 1e4
    b = gradients(flat, batch).mean(0)
    found = influence_scores(
        model, batch_cross_entropy, ragged(batch), ragged(batch), CG(damping=big, tol=1e-6), progress=False
    )
    near(found.values, gradients(flat, batch) @ b / big, 2e-2)
    assert found.residual <= 1e-6


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', LAYERS)
def test_gauss_newton_products_through_every_layer(kind):
    "JᵀJv·2/C for squared error, with J by plain autograd: the value keeps its way back while the tangent runs along."
    model, batch = seeded(LAYERS[kind][0]), data(LAYERS[kind][1]())
    flat = FlatModel(model, square)
    v, known = normal(flat.size, seed=6), dict(model.named_parameters())
    parameters, total = [known[n] for n in flat.names], 0
    with evaluating(model):
        for i in range(len(batch['index'])):
            z = flat.module(pick(batch, slice(i, i + 1)))[0]
            rows = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in z]
            J = torch.stack([flat.flatten(r) for r in rows])
            total = total + J.T @ (J @ v) * 2 / C
    near(GaussNewton(flat, ragged(batch)) @ v, total / len(batch['index']), 1e-9)


@pytest.mark.filterwarnings('ignore')
def test_padding_row_of_an_embedding_never_moves():
    "PyTorch's gradient of that row is zero, so it is no direction: neither the matrix nor the scores know it."
    model = seeded(lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Flatten(), nn.Linear(24, C)))
    model[0].weight.data[2] = 1.0
    flat, batch = FlatModel(model), data(tokens(20))
    s, reference = normal(flat.size, seed=1), gradients(FlatModel(model), batch)
    assert (reference[:, 8:12] == 0).all()
    for mode in ('forward', 'reverse', 'gradients'):
        near(read(flat, cut(batch, 6), s, mode), reference @ s, 1e-9)
    G = GaussNewton(flat, cut(batch, 6))
    dense = G @ torch.eye(G.size, dtype=torch.float64)
    near(dense, dense.T, 1e-9)
    args = model, batch_cross_entropy, cut(batch, 6), [data(tokens(9, seed=1))]
    exact, iterated = (
        influence_scores(*args, solver, progress=False).values
        for solver in (Exact(0.01), CG(0.01, max_iter=500, tol=1e-12))
    )
    near(exact, iterated, 1e-6)


@pytest.mark.parametrize('kind', ['old_function', 'new_function', 'old_weight_norm'])
def test_missing_forward_mode_is_said(kind):
    model, batch = seeded(LAYERS[kind][0]), data(LAYERS[kind][1]())
    flat = FlatModel(model)
    with pytest.warns(UserWarning, match='two backward passes'):
        read(flat, [batch], normal(flat.size))


@pytest.mark.filterwarnings('ignore')
def test_an_operation_that_can_be_differentiated_only_once():
    "The maximum of an embedding bag: neither forward mode nor two backward passes know it, gradients of single samples do."
    model, batch = (
        seeded(lambda: nn.Sequential(nn.EmbeddingBag(9, 4, mode='max'), nn.Tanh(), nn.Linear(4, C))),
        data(tokens()),
    )
    flat = FlatModel(model)
    near(
        read(flat, ragged(batch), normal(flat.size), 'gradients'),
        gradients(flat, batch) @ normal(flat.size),
        1e-9,
    )


@pytest.mark.filterwarnings('ignore')
def test_step_along_single_parameters():
    "A tangent for some parameters only: weights without biases and the reverse, of every layer with a rule of its own."
    model = seeded(LAYERS['conv'][0])
    batch, names = data(images()), [n for n, _ in model.named_parameters()]
    for name in names:
        flat = FlatModel(model, names=[name])
        s = normal(flat.size, seed=2)
        near(read(flat, [batch], s, 'forward'), gradients(flat, batch) @ s, 1e-9)


# Losses


def square(z, batch):
    return ((z - F.one_hot(batch['y'], z.shape[1]).to(z)) ** 2).mean(1)


def generalised(z, batch):
    return (1 - z.softmax(1).gather(1, batch['y'][:, None])[:, 0] ** 0.7) / 0.7


def distillation(z, batch):
    return distill_loss(z, batch['teacher'], batch['y'], T=4.0, alpha=0.9, reduction='none')


def linear(z, batch):
    return -z.gather(1, batch['y'][:, None])[:, 0]


def hinge(z, batch):
    return (1 + z - z.gather(1, batch['y'][:, None])).clamp_min(0).sum(1)


LOSSES = dict(distillation=distillation, square=square, generalised=generalised, linear=linear, hinge=hinge)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('loss', LOSSES)
def test_any_loss_of_a_sample(loss, mode):
    model, batch = seeded(LAYERS['conv'][0]), data(images())
    flat = FlatModel(model, LOSSES[loss])
    s = normal(flat.size, seed=1)
    near(read(flat, ragged(batch), s, mode), gradients(flat, batch) @ s, MODES[mode])


@pytest.mark.parametrize('loss', ['distillation', 'square', 'generalised'])
def test_solvers_know_the_curvature_of_any_loss(loss):
    model, train, val = small(1)
    args = model, LOSSES[loss], cut(train, 5), cut(val, 5)
    exact = influence_scores(*args, Exact(LAM), progress=False)
    near(influence_scores(*args, CG(LAM, 200, 1e-12, None), progress=False).values, exact.values, 1e-8)
    if loss != 'generalised':
        near(
            influence_scores(*args, Woodbury(LAM, None, None), progress=False).values, exact.values, 1e-6
        )  # that one is not convex


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('val_loss', [linear, batch_cross_entropy])
@pytest.mark.parametrize(
    'solver',
    [Exact(), CG(), CG(preconditioner=None), Woodbury(), Diagonal(), EKFAC(), LiSSA(), LBFGS()],
    ids=str,
)
def test_a_loss_without_curvature_is_told_to_give_a_damping(solver, val_loss, dtype):
    model, train, val = small(0)
    batches = [
        [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in cut(d, 5)]
        for d in (train, val)
    ]
    with pytest.raises(ValueError, match="damping='auto'|increase damping"):
        influence_scores(model.to(dtype), linear, *batches, solver, val_loss=val_loss, progress=False)


# Directions, batches, layouts, precision


def small(seed, n=12, m=9, classes=C, features=3, hidden=2):
    model = seeded(
        lambda: nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes)), seed
    )
    balanced = lambda d: {**d, 'y': torch.arange(len(d['y'])) % classes}
    return (
        model,
        balanced(data(normal(n, features, seed=seed + 1), classes=classes)),
        balanced(data(normal(m, features, seed=seed + 2), start=500, classes=classes)),
    )


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('k', [1, 2, 4])
def test_several_directions(k, mode):
    model, batch = seeded(LAYERS['conv'][0]), data(images())
    flat = FlatModel(model)
    S = normal(flat.size, k, seed=3)
    found = read(flat, ragged(batch), S, mode)
    near(found, gradients(flat, batch) @ S, MODES[mode])
    if mode == 'finite':
        near(read(flat, ragged(batch), S, mode, losses_of(flat, batch)), found, 1e-3)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', ['conv', 'resnet', 'mobile'])
def test_channels_last_and_contiguous(kind, mode):
    make, inputs = LAYERS[kind]
    batch, found = data(inputs()), []
    for layout in (torch.channels_last, torch.contiguous_format):
        for images_layout in (torch.channels_last, torch.contiguous_format):
            flat = FlatModel(seeded(make).to(memory_format=layout))
            found.append(
                read(
                    flat,
                    cut({**batch, 'x': batch['x'].contiguous(memory_format=images_layout)}, 4),
                    normal(flat.size, seed=4),
                    mode,
                )
            )
    for other in found[1:]:
        near(other, found[0], 1e-9 if mode != 'finite' else 1e-4)


@pytest.mark.parametrize('kind', ['conv', 'resnet', 'encoder'])
def test_single_precision(kind):
    make, inputs = LAYERS[kind]
    exact, batch = seeded(make), data(inputs())
    single = copy.deepcopy(exact).float()
    batch32 = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    s = normal(FlatModel(exact).size, seed=5)
    reference = gradients(FlatModel(exact), batch) @ s
    for mode, tol in (('forward', 1e-4), ('reverse', 1e-4), ('gradients', 1e-4), ('finite', 0.05)):
        near(read(FlatModel(single), cut(batch32, 4), s.float(), mode).double(), reference, tol)


@pytest.mark.parametrize('mode', MODES)
def test_scores_do_not_see_an_enclosing_autocast(mode):
    model, batch = seeded(LAYERS['conv'][0]).float(), data(images().float())
    flat = FlatModel(model)
    s = normal(flat.size).float()
    outside = read(flat, [batch], s, mode)
    with torch.autocast('cpu', torch.bfloat16):
        inside = read(flat, [batch], s, mode)
    assert torch.equal(inside, outside)


def in_precision(model, dtype):
    "A copy of a model in another precision"
    return copy.deepcopy(model).to(dtype)


PRECISE = [
    CG(LAM, 100, 1e-8),
    Woodbury(LAM),
    Diagonal(LAM),
    KFAC(LAM, fisher='type-2'),
    EKFAC(LAM, fisher='type-2'),
    LBFGS(LAM, max_iter=100, tol=1e-8),
]


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('solver', PRECISE, ids=lambda s: type(s).__name__)
def test_a_model_in_double_precision_takes_batches_in_single(solver, mode):
    "As loaders yield them: gradient, curvature, solve and scores agree with those in single precision."
    model, batch = seeded(LAYERS['conv'][0]), data(images().float())
    batch['teacher'] = batch['teacher'].float()
    found = {}
    for dtype in (torch.float32, torch.float64):
        flat = FlatModel(in_precision(model, dtype), distillation)
        b = mean_gradient(flat, ragged(batch))
        s = solver.solve(GaussNewton(flat, ragged(batch)), b).x
        assert b.dtype == s.dtype == flat.theta.dtype == dtype
        found[dtype] = read(flat, ragged(batch), s, mode).double()
    near(found[torch.float64], found[torch.float32], 0.05 if mode == 'finite' else 1e-3)


@pytest.mark.parametrize('inputs', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('solver', PRECISE, ids=lambda s: type(s).__name__)
def test_a_model_in_half_precision_is_measured_in_single(solver, dtype, inputs):
    "The scores are those of the same weights in single precision; the model keeps its own."
    half, batch = in_precision(seeded(LAYERS['conv'][0]), dtype), data(images().to(inputs))
    before, found = {k: v.clone() for k, v in half.state_dict().items()}, []
    for model in (half, in_precision(half, torch.float32)):
        flat, ready = FlatModel(model), batch if model is half else batch | dict(x=batch['x'].float())
        s = solver.solve(GaussNewton(flat, ragged(ready)), mean_gradient(flat, ragged(ready))).x
        found.append(read(flat, ragged(ready), s))
    assert found[0].dtype == torch.float32
    near(found[0], found[1], 1e-6)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in half.state_dict().items())


@pytest.mark.parametrize('solver', [Exact(LAM), *PRECISE, LiSSA(LAM)], ids=lambda s: type(s).__name__)
def test_a_vector_of_another_precision_or_length_is_refused(solver):
    model, train, _ = small(0)
    flat, calls = FlatModel(model, lambda z, batch: calls.append(1) or batch_cross_entropy(z, batch)), []
    G, b = GaussNewton(flat, cut(train, 5)), normal(flat.size)
    with pytest.raises(TypeError, match=r'vector.to\(flat.dtype\)'):
        solver.solve(G, b.float())
    with pytest.raises(ValueError, match='the model .* parameters'):
        solver.solve(G, b[:-1])
    for mode in MODES:
        with pytest.raises(TypeError, match=r'vector.to\(flat.dtype\)'):
            read(flat, cut(train, 5), b.float()[:, None], mode)
    assert not calls, 'it was refused before any work'


def test_precisions_that_cannot_be_measured():
    mixed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, C).double())
    with pytest.raises(TypeError, match='one precision'):
        FlatModel(mixed)
    assert FlatModel(mixed, names=['1.weight']).dtype == torch.float64
    model = nn.Sequential(nn.Linear(3, C)).bfloat16()
    model.kept = model[0].weight * 2  # not a leaf: PyTorch does not copy it
    with pytest.raises(TypeError, match=r'cannot be copied.*model.float\(\)'):
        FlatModel(model)


SOLVERS = [
    Identity(),
    Exact(LAM),
    CG(LAM),
    Woodbury(LAM),
    Diagonal(LAM),
    KFAC(LAM),
    EKFAC(LAM),
    LiSSA(LAM),
    LBFGS(LAM),
]


@pytest.mark.parametrize('last_layer', [False, True])
@pytest.mark.parametrize('solver', SOLVERS, ids=lambda s: type(s).__name__)
def test_solvers_do_not_see_an_enclosing_autocast(solver, last_layer):
    model, train, val = small(0)
    train, val = (
        [{k: v.float() if v.is_floating_point() else v for k, v in b.items()} for b in cut(d, 5)]
        for d in (train, val)
    )
    score = lambda: (
        influence_scores(
            model.float(), batch_cross_entropy, train, val, solver, 'posterior', last_layer, progress=False
        ).values
    )
    outside = score()
    with torch.autocast('cpu', torch.bfloat16):
        inside = score()
    near(inside, outside, 1e-5)


@pytest.mark.parametrize('last_layer', [False, True])
@pytest.mark.parametrize('around', [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_an_enclosing_no_grad_changes_nothing(around, last_layer):
    model, train, val = small(0)
    args = model, batch_cross_entropy, cut(train, 5), cut(val, 5)
    with around():
        found = [
            influence_scores(*args, progress=False, last_layer=last_layer).values,
            self_influence(*args[:3], Woodbury(LAM), last_layer, progress=False).values,
            cross_scores(*args, last_layer=last_layer, progress=False).values,
        ]
    for v in found:
        assert torch.isfinite(v).all() and not v.requires_grad
    near(found[0], influence_scores(*args, progress=False, last_layer=last_layer).values, 1e-12)


def test_known_losses_of_other_samples_are_refused():
    "One-sided differences divide by a tiny step: losses that are not those at θ would give noise in place of scores."
    model, train, _ = small(0)
    flat = FlatModel(model)
    s, known = normal(flat.size), losses_of(flat, train)
    exact = read(flat, cut(train, 5), s)
    near(read(flat, cut(train, 5), s, 'finite', known), exact, 1e-4)
    for wrong in (known.flip(0), known.bfloat16().double(), known[:5], known + 0.5):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                found = read(flat, cut(train, 5), s, 'finite', wrong)
            except ValueError as error:
                assert 'losses' in str(error)
                continue
        near(found, exact, 0.05)  # another way out is exact scoring, with a warning


def test_a_direction_of_zero():
    model, train, _ = small(0)
    flat = FlatModel(model)
    for mode in MODES:
        assert (read(flat, cut(train, 5), torch.zeros(flat.size, dtype=torch.float64), mode) == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read(flat, cut(train, 5), torch.zeros(flat.size, dtype=torch.float64), 'finite')


def test_finite_step_leaves_a_training_model_alone():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, C))).train()
    before, flat = model[1].running_mean.clone(), FlatModel(model)
    step, error = finite_step(flat, data(normal(6, 3)), normal(flat.size))
    assert step > 0 and error < 0.01 and torch.equal(model[1].running_mean, before)


# Properties, for all layers, with the solvers in use

ALL = [
    CG(LAM, max_iter=200, tol=1e-12, n_samples=None),
    CG(LAM, max_iter=200, tol=1e-12, n_samples=None, preconditioner=None),
    Woodbury(LAM, n_samples=None, mc_samples=None),
]
solvers, modes = st.sampled_from(ALL), st.sampled_from(['auto', 'reverse', 'gradients', 'finite'])


def score(model, train, val, solver, size=100, loss=batch_cross_entropy, **kwargs):
    return influence_scores(model, loss, cut(train, size), cut(val, size), solver, progress=False, **kwargs)


def joined(a, b):
    return {k: torch.cat([a[k], b[k]]) for k in a}


@quick
@given(seeds, solvers, modes, st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_the_validation_gradient(seed, solver, mode, a, b):
    model, train, val = small(seed)
    mixed = lambda z, batch: a * batch_cross_entropy(z, batch) + b * square(z, batch)
    one, two, both = (
        score(model, train, val, solver, val_loss=l, mode=mode).values
        for l in (batch_cross_entropy, square, mixed)
    )
    scale = abs(a) * one.norm() + abs(b) * two.norm() + 1e-9
    assert (both - a * one - b * two).norm() <= (1e-3 if mode == 'finite' else 1e-6) * scale


@quick
@given(seeds, solvers, st.sampled_from(TARGETS), modes, st.integers(1, 12), st.randoms(use_true_random=False))
def test_blind_to_batch_size_and_order(seed, solver, target, mode, size, random):
    model, train, val = small(seed)
    order, order_val = (torch.tensor(random.sample(range(n), n)) for n in (12, 9))
    whole = score(model, train, val, solver, target=target)
    found = score(model, pick(train, order), pick(val, order_val), solver, size, target=target, mode=mode)
    values = found.values[order.argsort()]
    near(
        values[:, order_val.argsort()] if target == 'sample' else values,
        whole.values,
        1e-3 if mode == 'finite' else 1e-6,
    )


@pytest.mark.parametrize('mc_samples', [1, 2, None])
def test_random_signs_do_not_depend_on_batches(mc_samples):
    model, train, val = small(0)
    whole, *parts = (
        score(model, train, val, Woodbury(LAM, n_samples=8, mc_samples=mc_samples), size).values
        for size in (100, 5, 1)
    )
    for part in parts:
        near(part, whole, 1e-6)


@quick
@given(seeds, solvers, modes, st.lists(st.floats(0.1, 4), min_size=12, max_size=12))
def test_scaling_a_loss_scales_its_score(seed, solver, mode, factors):
    "At the same direction s: the curvature of the scaled samples is another one."
    model, train, val = small(seed)
    c = torch.tensor(factors, dtype=torch.float64)
    s = score(model, train, val, solver).direction
    flat = FlatModel(model, lambda z, batch: batch['factor'] * batch_cross_entropy(z, batch))
    near(
        read(flat, cut({**train, 'factor': c}, 5), s, mode),
        c * read(FlatModel(model), cut(train, 5), s),
        1e-3 if mode == 'finite' else 1e-9,
    )


@quick
@given(seeds, solvers, modes, st.sampled_from(TARGETS), st.lists(st.integers(0, 11), min_size=1, max_size=5))
def test_duplicates_get_equal_scores(seed, solver, mode, target, copies):
    model, train, val = small(seed)
    again = pick(train, torch.tensor(copies))
    again['index'] = torch.arange(900, 900 + len(copies))
    found = score(model, joined(train, again), val, solver, 5, target=target, mode=mode).values
    near(found[12:], found[torch.tensor(copies)], 1e-3 if mode == 'finite' else 1e-9)


@quick
@given(seeds, solvers, st.sampled_from(TARGETS), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_additive_over_groups(seed, solver, target, groups):
    "The influence of a group is the sum over its samples: the score of the group's summed loss."
    model, train, val = small(seed)
    found, groups = score(model, train, val, solver, target=target), torch.tensor(groups)
    sums = found.by_group(groups, 4)
    assert sums.shape == (4, *found.values.shape[1:])
    for k in range(4):
        near(sums[k], found.values[groups == k].sum(0), 1e-12)
    if target != 'posterior':
        near(sums[1], (gradients(FlatModel(model), train)[groups == 1].sum(0) @ found.direction), 1e-7)


@quick
@given(seeds, st.sampled_from(['class', 'sample']), solvers)
def test_targets_add_up_with_all_layers(seed, target, solver):
    model, train, val = small(seed)
    several, mean = (
        score(model, train, val, solver, target=target).values,
        score(model, train, val, solver).values,
    )
    count = (
        torch.bincount(val['y'], minlength=C).double()
        if target == 'class'
        else torch.ones(9, dtype=torch.float64)
    )
    near(several @ count / count.sum(), mean, 1e-6)


# A hundred classes


@pytest.fixture
def held(monkeypatch):
    "The largest number of samples whose gradients were held by one call"
    seen = []

    def counting(flat, batch, *more):
        found = sample_gradients(flat, batch, *more)
        seen.append(len(found))
        return found

    monkeypatch.setattr(
        sampled_rows_module, 'sample_gradients', counting
    )  # every module gets its gradients from there
    return seen


@pytest.mark.parametrize('target', ['class', 'posterior', 'sample'])
def test_a_hundred_classes_with_all_layers(target, held):
    model, train, val = small(0, n=300, m=150, classes=100, features=5, hidden=4)
    found = influence_scores(
        model, batch_cross_entropy, cut(train, 150), cut(val, 150), target=target, progress=False
    )
    assert (
        found.values.shape == dict(posterior=(300,), sample=(300, 150)).get(target, (300, 100))
        and torch.isfinite(found.values).all()
    )
    assert 0 < max(held) <= 64 and found.matvecs == 0
    exact = influence_scores(
        model,
        batch_cross_entropy,
        cut(train, 150),
        cut(val, 150),
        Exact(found.damping),
        target,
        progress=False,
    ).values
    assert float(torch.corrcoef(torch.stack([found.values.flatten(), exact.flatten()]))[0, 1]) > 0.9


def test_a_class_without_validation_samples():
    model, train, val = small(0)
    val['y'] = torch.zeros(9, dtype=torch.long)
    for solver in (CG(LAM), Woodbury(LAM), EKFAC(LAM), LBFGS(LAM), LiSSA(LAM)):
        found = score(model, train, val, solver, target='class').values
        assert (found[:, 1:] == 0).all() and (found[:, 0] != 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert (
            score(model, train, val, Woodbury(LAM), target='class', mode='finite').values[:, 1:] == 0
        ).all()


def test_one_sample_and_more_samples_asked_for_than_there_are():
    model, train, val = small(0)
    one = pick(train, slice(0, 1))
    for solver in (
        CG(LAM, n_samples=10**6),
        Woodbury(LAM, n_samples=10**6),
        KFAC(LAM, n_samples=10**6),
        Exact(LAM, n_samples=10**6),
    ):
        for last_layer in (False, True):
            alone = score(model, one, pick(val, slice(0, 1)), solver, last_layer=last_layer)
            assert alone.values.shape == (1,) and torch.isfinite(alone.values).all()
            assert torch.isfinite(score(model, train, val, solver, last_layer=last_layer).values).all()


# Rows that are computed again


@pytest.mark.parametrize('mc_samples', [1, 3, None])
@pytest.mark.parametrize('kind', ['conv', 'encoder', 'new_function'])
@pytest.mark.filterwarnings('ignore')
def test_streamed_rows_over_batches_of_different_size(kind, mc_samples):
    flat, batch = FlatModel(seeded(LAYERS[kind][0]), distillation), data(LAYERS[kind][1]())
    held, streamed = (
        sampled_rows(flat, ragged(batch), mc_samples, max_numbers=m) for m in (2**28, 20 * flat.size)
    )
    if mc_samples == 1:
        streamed = StreamedRows(flat, sampled_rows(flat, ragged(batch), mc_samples, max_numbers=0).parts, 3)
    assert isinstance(streamed, StreamedRows) or mc_samples == 3 and len(streamed) == 21
    x = normal(flat.size, 2)
    near(streamed.gram(), held.gram(), 1e-9)
    near(streamed.forward(x), held.forward(x), 1e-9)
    near(streamed.backward(held.forward(x)), held.backward(held.forward(x)), 1e-9)
    if mc_samples is None:  # all rows are the matrix
        G = GaussNewton(flat, ragged(batch))
        near(held.backward(held.forward(x)), G @ x, 1e-6)


def test_self_influence_of_streamed_rows(monkeypatch):
    model, train, _ = small(0, n=40)
    score = lambda: (
        self_influence(
            model, batch_cross_entropy, cut(train, 15), Woodbury(LAM, n_samples=20), progress=False
        ).values
    )
    reference = score()
    monkeypatch.setattr(
        sampled_rows_module.sampled_rows,
        '__defaults__',
        (*sampled_rows_module.sampled_rows.__defaults__[:-1], 0),
    )
    near(score(), reference, 1e-8)


# Self-influence

DIRECT = [
    Woodbury(LAM, None, None),
    Exact(LAM),
    KFAC(LAM, fisher='type-2'),
    EKFAC(LAM, fisher='type-2'),
    Diagonal(LAM),
    Identity(),
]


@pytest.mark.parametrize('last_layer', [False, True])
@pytest.mark.parametrize('solver', DIRECT, ids=lambda s: type(s).__name__)
def test_self_influence_is_the_quadratic_form(solver, last_layer):
    model, train, _ = small(0)
    found = self_influence(model, batch_cross_entropy, cut(train, 5), solver, last_layer, progress=False)
    assert (
        found.target == 'self'
        and (found.values >= 0).all()
        and found.index.tolist() == train['index'].tolist()
    )
    each = score(model, train, train, solver, target='sample', last_layer=last_layer)
    near(found.values, each.values.diagonal(), 1e-7)
    assert found.damping == each.damping


@pytest.mark.parametrize('last_layer', [False, True])
@pytest.mark.parametrize('solver', [Exact(), Woodbury(n_samples=8), EKFAC()], ids=lambda s: type(s).__name__)
def test_self_influence_takes_the_damping_of_influence_scores(solver, last_layer):
    model, train, val = small(0, n=30)
    own, other = (
        self_influence(model, batch_cross_entropy, cut(train, 7), solver, last_layer, progress=False),
        score(model, train, val, solver, 7, last_layer=last_layer),
    )
    assert own.damping == pytest.approx(other.damping, rel=1e-9)


def test_self_influence_uses_the_solvers_samples():
    model, train, _ = small(0)
    for last_layer in (False, True):
        few, whole = (
            self_influence(
                model, batch_cross_entropy, cut(train, 5), Exact(LAM, n_samples=n), last_layer, progress=False
            ).values
            for n in (4, None)
        )
        assert not torch.allclose(few, whole, rtol=1e-3)


def test_self_influence_of_a_large_last_layer():
    "A hundred classes and 64 features: more than Exact takes, so the default is another solver."
    model, train, _ = small(0, n=20, classes=100, features=3, hidden=64)
    assert (
        self_influence(model, batch_cross_entropy, cut(train, 10), last_layer=True, progress=False).values > 0
    ).all()


@pytest.mark.parametrize('last_layer', [False, True])
def test_self_influence_leaves_the_model_as_it_was(last_layer):
    model, batch = seeded(LAYERS['conv'][0]).train(), data(images())
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    self_influence(model, batch_cross_entropy, ragged(batch), Woodbury(LAM), last_layer, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(
        rng, torch.get_rng_state()
    )
    assert all(m.training for m in model.modules())


# Warm start


@pytest.mark.parametrize('target', ['mean', 'class'])
@pytest.mark.parametrize(
    'solver',
    [
        CG(LAM, 100, 1e-6, None),
        LBFGS(LAM, max_iter=100, tol=1e-6, n_samples=None),
        LiSSA(LAM, depth=3000, tol=1e-6, n_samples=None),
    ],
    ids=lambda s: type(s).__name__,
)
def test_warm_start(solver, target):
    model, train, val = small(0)
    cold = score(model, train, val, solver, target=target)
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-4
    again, warm = (
        score(model, train, val, solver, target=target),
        score(model, train, val, solver, target=target, start=cold),
    )
    assert warm.matvecs < again.matvecs and warm.residual <= 1e-6
    near(warm.values, again.values, 1e-4)
    with pytest.raises(ValueError, match='InfluenceScores'):
        score(model, train, val, solver, target=target, start=cold.direction)
    with pytest.raises(ValueError, match='same model and target'):
        score(model, train, val, solver, target='sample', start=cold)


# Faults


@pytest.mark.parametrize('last_layer', [False, True])
@pytest.mark.parametrize('solver', [None, *SOLVERS], ids=lambda s: type(s).__name__)
def test_weights_that_are_not_numbers(solver, last_layer):
    model, train, val = small(0)
    with torch.no_grad():
        model[0].weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='NaN|not finite'):
        score(model, train, val, solver, last_layer=last_layer)
    if solver is None or hasattr(solver, 'inverse'):
        with pytest.raises(ValueError, match='NaN|not finite'):
            self_influence(model, batch_cross_entropy, cut(train, 5), solver, last_layer, progress=False)
    with pytest.raises(ValueError, match='NaN|not finite'):
        cross_scores(
            model,
            batch_cross_entropy,
            cut(train, 5),
            cut(val, 5),
            solver=solver,
            last_layer=last_layer,
            progress=False,
        )


@pytest.mark.parametrize('mode', MODES)
def test_one_sample_that_is_not_a_number(mode):
    model, train, _ = small(0)
    train['x'][7, 0] = float('nan')
    flat = FlatModel(model)
    with pytest.raises(ValueError, match='not finite'):
        read(flat, cut(train, 5), normal(flat.size), mode)


def test_a_generator_is_refused_or_read_whole():
    model, train, val = small(0)
    whole = score(model, train, val, Identity(), 3).values
    try:
        found = influence_scores(
            model, batch_cross_entropy, cut(train, 3), (b for b in cut(val, 3)), Identity(), progress=False
        ).values
    except ValueError as error:
        assert 're-iterable' in str(error)
    else:
        near(found, whole, 1e-9)


def test_an_unknown_mode_is_told_before_the_work():
    model, train, val = small(0)
    with pytest.raises(ValueError, match="mode is 'fast'"):
        score(model, train, val, Identity(), mode='fast')


def test_cross_scores_with_all_layers_need_no_last_linear_layer():
    model, train, val = small(0)
    model = nn.Sequential(model, nn.LogSoftmax(1))
    assert torch.isfinite(
        cross_scores(
            model, batch_cross_entropy, cut(train, 5), cut(val, 5), last_layer=False, progress=False
        ).values
    ).all()


# Devices


@DEVICES
@pytest.mark.parametrize('last_layer', [False, True])
def test_devices(device, last_layer):
    "Batches stay on the CPU, the model is on the device; every solver and target gives the same as on the CPU."
    model, batch = seeded(LAYERS['conv'][0]), data(images(12))
    args = batch_cross_entropy, cut(batch, 5), cut(batch, 7)
    moved = copy.deepcopy(model).to(device)
    for solver in SOLVERS:
        if isinstance(solver, Exact) and not last_layer:
            continue
        for target in TARGETS:
            found, expected = (
                influence_scores(m, *args, solver, target, last_layer, progress=False) for m in (moved, model)
            )
            assert found.values.device.type == found.index.device.type == 'cpu'
            if not isinstance(solver, (KFAC, EKFAC)):
                near(found.values, expected.values, 1e-6)

    def both(score, tol):
        near(score(moved).values, score(model).values, tol)

    for mode in MODES:
        both(lambda m: influence_scores(m, *args, Woodbury(LAM), mode=mode, progress=False), 1e-4)
    both(lambda m: self_influence(m, *args[:2], Woodbury(LAM), last_layer, progress=False), 1e-6)
    both(lambda m: cross_scores(m, *args, last_layer=last_layer, progress=False), 1e-6)
