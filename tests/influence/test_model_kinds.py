"Models as they are: each kind's scores against a dense computation by autograd, or an error that names the remedy."

import copy

import pytest
import torch
import torchvision
from torch import nn

from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import Objective
from kd_aif.distillation.trainer import Training
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.cross_scores import cross_scores, Scoring
from kd_aif.influence.iterative_solvers import CG
from kd_aif.influence.scores import influence_scores
from kd_aif.influence.self_influence import self_influence
from kd_aif.influence.solvers import Exact
from kd_aif.models.features import features_and_logits, find_classifier

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
C, LAM = 3, 0.1


def images(n, seed, size=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, size, size, generator=g, dtype=dtype), torch.randint(C, (n,), generator=g)
    rows = torch.arange(n).split(5)
    return [dict(index=r, x=(x[r] + 0.3 * y[r, None, None, None]).to(dtype), y=y[r]) for r in rows]


def dense_scores(model, parameters, train, val, forward=None):
    "bᵀ(G + λI)⁻¹gᵢ from derivatives of single samples"
    ask = forward or (lambda model, batch: model(batch['x']))
    flat = lambda out: torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(out, parameters)]
    )
    along = lambda value: flat(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))
    gradients, G, n = {}, 0, 0
    for name, batches in (('train', train), ('val', val)):
        rows = []
        for batch in batches:
            z = ask(model, batch)
            rows += [along(v) for v in batch_cross_entropy(z, batch)]
            for one in z if name == 'train' else ():
                p = one.detach().softmax(0)
                J = torch.stack([along(c) for c in one])
                G, n = G + J.T @ (p.diag() - p[:, None] * p) @ J, n + 1
        gradients[name] = torch.stack(rows)
    s = torch.linalg.solve(G / n + LAM * torch.eye(len(G), dtype=G.dtype), gradients['val'].mean(0))
    return gradients['train'] @ s


def assert_scores(model, parameters, last_layer=True, size=16, forward=None, dense=None):
    "Scores are those of the dense computation; returns them"
    train, val = images(12, 0, size), images(6, 1, size)
    solver = Exact(LAM) if last_layer else CG(LAM, 200, 1e-12, n_samples=None, preconditioner=None)
    scores = influence_scores(
        model, batch_cross_entropy, train, val, solver, last_layer=last_layer, forward=forward, progress=False
    )
    right = dense_scores((dense or model).eval(), parameters, train, val, forward)
    torch.testing.assert_close(scores.values, right, atol=1e-6 * float(right.abs().max()), rtol=1e-5)
    return scores


# networks of other libraries


def seeded(make):
    torch.manual_seed(0)
    return make().double().eval()


TV = torchvision.models
TORCHVISION = {
    'resnet': lambda: TV.ResNet(TV.resnet.BasicBlock, [1, 1, 1, 1], num_classes=C),
    'densenet': lambda: TV.DenseNet(4, (1, 1), 8, num_classes=C),
    'vit': lambda: TV.VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=C),
    'swin': lambda: TV.SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=C),
    'convnext': lambda: TV.ConvNeXt([TV.convnext.CNBlockConfig(8, None, 2)], num_classes=C),
    'shufflenet': lambda: TV.ShuffleNetV2([1, 1, 1], [4, 8, 8, 8, 8], num_classes=C),
}


@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision(name):
    model = seeded(TORCHVISION[name])
    found = find_classifier(model, images(4, 0)[0])
    assert not found.pooled and assert_scores(model, list(found.layer.parameters())).note == ''


def test_squeezenet_has_a_rectifier_behind_its_last_convolution():
    model = seeded(lambda: TV.squeezenet1_1(num_classes=C))
    with pytest.raises(ValueError, match='SqueezeNet does not end in an nn.Linear.*last_layer=False'):
        influence_scores(model, batch_cross_entropy, images(4, 0, 32), images(4, 1, 32), progress=False)


TIMM = {
    'resnet': lambda timm: timm.create_model('resnet10t', num_classes=C, stem_width=4, channels=(4, 4, 8, 8)),
    'vit': lambda timm: timm.models.VisionTransformer(
        16, 8, num_classes=C, embed_dim=8, depth=1, num_heads=2
    ),
    'mixer': lambda timm: timm.models.MlpMixer(C, img_size=16, patch_size=8, num_blocks=1, embed_dim=8),
    'convnext': lambda timm: timm.models.ConvNeXt(num_classes=C, depths=(1, 1, 1, 1), dims=(4, 4, 4, 8)),
}


@pytest.mark.parametrize('name', TIMM)
def test_timm(name):
    timm, size = pytest.importorskip('timm'), 32 if name == 'convnext' else 16
    model = seeded(lambda: TIMM[name](timm))
    layer = model.get_classifier()
    assert find_classifier(model, images(4, 0, size)[0]).layer is layer
    assert_scores(model, list(layer.parameters()), size=size)


def test_a_timm_model_with_two_averaged_heads_is_refused():
    timm = pytest.importorskip('timm')
    model = seeded(
        lambda: timm.create_model(
            'deit_tiny_distilled_patch16_224',
            num_classes=C,
            img_size=16,
            patch_size=8,
            embed_dim=8,
            depth=1,
            num_heads=2,
        )
    )
    with pytest.raises(ValueError, match='last_layer=False'):
        influence_scores(model, batch_cross_entropy, images(4, 0), images(4, 1), progress=False)


# where the classifier is, and what follows it


class Body(nn.Module):
    "Images to (b, 6, 4, 4)"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.GELU())


class OnePlace(Body):
    "nn.Linear on (b, 1, d), without a flatten"

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, C)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3))[:, None]).squeeze(1)


class LastAxis(OnePlace):
    "nn.Linear on (b, 1, 1, d): channels last, as after a pooling that keeps its axes"

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3), keepdim=True).permute(0, 2, 3, 1)).flatten(1)


class Pixels(OnePlace):
    "nn.Linear at every pixel, the logits are averaged"

    def forward(self, x):
        return self.head(self.body(x).flatten(2).transpose(1, 2)).mean(1)


class Picked(OnePlace):
    "The logits of one pixel for each sample are picked, as GPT-2 does with tokens"

    def forward(self, x):
        z = self.head(self.body(x).flatten(2).transpose(1, 2))
        return z[torch.arange(len(x)), (x[:, 0, 0, 0] > 0).long() * 7]


class Masked(OnePlace):
    "A mean over some of the pixels"

    def forward(self, x):
        z = self.head(self.body(x).flatten(2).transpose(1, 2))
        mask = (torch.arange(z.shape[1])[None] < 3 + (x[:, :1, 0, 0] > 0)).to(z)
        return torch.einsum('bl,blc->bc', mask, z) / mask.sum(1, keepdim=True)


class Pointwise(Body):
    "A 1 × 1 convolution as the classifier, before the average"

    def __init__(self, kernel=1, bias=True, **settings):
        super().__init__()
        self.head = nn.Conv2d(6, C, kernel, bias=bias, **settings)

    def forward(self, x):
        return self.head(self.body(x)).mean((2, 3))


class AfterPool(Pointwise):
    "A 1 × 1 convolution behind the average, as in EfficientNet-like heads"

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3), keepdim=True)).flatten(1)


class InOne(Body):
    "A convolution over sequences of one place"

    def __init__(self):
        super().__init__()
        self.head = nn.Conv1d(6, C, 1)

    def forward(self, x):
        return self.head(self.body(x).flatten(2)).mean(2)


PLACES = {
    'one place': OnePlace,
    'last axis': LastAxis,
    'averaged pixels': Pixels,
    'picked': Picked,
    'masked mean': Masked,
    '1x1 convolution': Pointwise,
    '1x1 without bias': lambda: Pointwise(bias=False),
    '3x3 convolution': lambda: Pointwise(3, padding=1, stride=2),
    'convolution of the whole map': lambda: Pointwise(4),
    'convolution after pooling': AfterPool,
    'sequence convolution': InOne,
}


@pytest.mark.parametrize('name', PLACES)
def test_pooled_classifiers(name):
    model = seeded(PLACES[name])
    scores = assert_scores(model, list(model.head.parameters()))
    assert "picked or averaged from the outputs of 'head'" in scores.note and scores.note in repr(scores)


@pytest.mark.parametrize('name', ['picked', '1x1 convolution'])
def test_pooled_classifiers_elsewhere(name):
    model, train, val = seeded(PLACES[name]), images(12, 0), images(8, 1)
    scoring = Scoring(solver=Exact(LAM), progress=False)
    scores = cross_scores(model, batch_cross_entropy, train, val, ('mean',), scoring=scoring)
    assert 'picked or averaged' in scores.note and torch.isfinite(scores.values).all()
    own = self_influence(model, batch_cross_entropy, train, Exact(LAM), progress=False)
    assert 'picked or averaged' in own.note and (own.values > 0).all()
    half, batch = copy.deepcopy(model).bfloat16(), images(4, 0)[0]
    h, logits = features_and_logits(half, batch | dict(x=batch['x'].bfloat16()))
    assert h.dtype == logits.dtype == torch.bfloat16 and h.shape == (4, 6) and logits.requires_grad
    full, _ = features_and_logits(model, batch)
    torch.testing.assert_close(h.double(), full, atol=0.05, rtol=0.05)
    gradient = torch.autograd.grad(full.sum(), model.body[0].weight)[0]
    assert gradient.abs().sum() > 0


def behind(tail):
    return type('Changed', (Pointwise,), dict(forward=lambda self, x: tail(self.head(self.body(x)))))


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1))


REFUSED = {
    'temperature': behind(lambda z: z.mean((2, 3)) / 2),
    'rectifier in place': behind(lambda z: z.relu_().mean((2, 3))),
    'maximum': behind(lambda z: z.amax((2, 3))),
    'softmax': behind(lambda z: z.mean((2, 3)).log_softmax(1)),
    'sum': behind(lambda z: z.sum((2, 3))),
    'groups': lambda: Pointwise(groups=3),
    'rectified vector': lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, C), nn.ReLU(inplace=True)),
    'cosine classifier': lambda: nn.Sequential(nn.Flatten(), Cosine(768, C, bias=False)),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_linear_in_the_layer_is_refused(name):
    model = seeded(REFUSED[name])
    with pytest.raises(ValueError, match='does not end in an nn.Linear.*last_layer=False'):
        influence_scores(model, batch_cross_entropy, images(6, 0), images(6, 1), progress=False)
    with pytest.raises(ValueError, match='does not end in'):
        distill(copy.deepcopy(model), model, images(6, 0), images(6, 1), mechanism='student')


# wrappers, and parameters that do not train


def small():
    return nn.Sequential(nn.Conv2d(3, 2, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(18, C))


def in_place():
    model = seeded(small)
    model.compile(backend='eager')
    return model


def compiled_part():
    model = seeded(small)
    return nn.Sequential(torch.compile(model[:3], backend='eager'), model[3]).eval()


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPED = {
    'DataParallel': lambda: nn.DataParallel(seeded(small)),
    'DDP': lambda: nn.parallel.DistributedDataParallel(seeded(small)),
    'compiled': lambda: torch.compile(seeded(small), backend='eager'),
    'compiled DataParallel': lambda: torch.compile(nn.DataParallel(seeded(small)), backend='eager'),
    'compiled in place': in_place,
    'compiled part': compiled_part,
}


@pytest.mark.parametrize('last_layer', [True, False], ids=['last layer', 'all layers'])
@pytest.mark.parametrize('name', WRAPPED)
def test_wrappers(name, last_layer, one_process):
    model, plain = WRAPPED[name](), seeded(small)
    model(images(4, 5)[0]['x'])  # compiled code is there before the scores are asked for
    parameters = list((plain[3] if last_layer else plain).parameters())
    assert assert_scores(model, parameters, last_layer, dense=plain).note == ''
    assert model(images(4, 5)[0]['x']).shape == (4, C)


@pytest.mark.parametrize('last_layer', [True, False], ids=['last layer', 'all layers'])
def test_frozen_backbone(last_layer):
    model = seeded(small)
    model[0].requires_grad_(False)
    assert assert_scores(model, list(model[3].parameters()), last_layer).note == ''


def test_frozen_classifier_is_said():
    model = seeded(small)
    model[3].requires_grad_(False)
    free = seeded(small)
    scores = assert_scores(model, list(free[3].parameters()), dense=free)
    assert 'the last layer is frozen' in scores.note
    assert_scores(model, list(model[0].parameters()), last_layer=False)


class Tied(nn.Module):
    "A square layer that is used twice: inside, and as the classifier"

    def __init__(self):
        super().__init__()
        self.body, self.inner, self.head = nn.Linear(768, C), nn.Linear(C, C), nn.Linear(C, C)
        self.head.weight = self.inner.weight

    def forward(self, x):
        return self.head(self.inner(self.body(x.flatten(1)).tanh()).tanh())


def test_tied_weights():
    model = seeded(Tied)
    apart = copy.deepcopy(model)
    apart.head.weight = nn.Parameter(model.head.weight.detach().clone())
    scores = assert_scores(model, list(apart.head.parameters()), dense=apart)
    assert 'tied to inner.weight: scores are about its use as the classifier' in scores.note
    assert assert_scores(model, list(model.parameters()), last_layer=False).note == ''


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(C))


def test_lazy_modules():
    torch.manual_seed(0)
    model, batch = lazy(), images(4, 0, dtype=torch.float32)[0]
    score = lambda: influence_scores(model, batch_cross_entropy, [batch], [batch], progress=False)
    with pytest.raises(ValueError, match='no shape yet .a lazy module.; run one batch'):
        score()
    with pytest.raises(ValueError, match='student: .*no shape yet'):
        distill(model, None, [batch], [batch])
    model(batch['x'])
    assert len(score()) == 4
    model.double()
    assert_scores(model, list(model[3].parameters()))


# adapters


class Transformer(nn.Module):
    "Something with names that adapters look for"

    def __init__(self):
        super().__init__()
        self.query, self.classifier = nn.Linear(768, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.classifier(self.query(x.flatten(1)).tanh())


def adapted(**settings):
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    model = peft.get_peft_model(Transformer(), peft.LoraConfig(r=2, lora_dropout=0.0, **settings)).double()
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize('last_layer', [True, False], ids=['last layer', 'all layers'])
def test_lora(last_layer):
    model = adapted(target_modules=['query'], modules_to_save=['classifier'])
    trained = [p for p in model.parameters() if p.requires_grad]
    head = [p for n, p in model.named_parameters() if p.requires_grad and 'classifier' in n]
    assert 0 < len(head) < len(trained)
    assert assert_scores(model, head if last_layer else trained, last_layer).note == ''


def test_lora_without_its_own_classifier():
    model = adapted(target_modules=['query'])
    frozen = list(model.base_model.model.classifier.parameters())
    for p in frozen:
        p.requires_grad_(True)
    parameters, right = frozen, copy.deepcopy(model)
    for p in frozen:
        p.requires_grad_(False)
    parameters = list(right.base_model.model.classifier.parameters())
    assert 'frozen' in assert_scores(model, parameters, dense=right).note


def test_lora_on_the_classifier_is_refused_with_a_remedy():
    model = adapted(target_modules=['query', 'classifier'])
    with pytest.raises(ValueError, match='modules_to_save=.*last_layer=False'):
        influence_scores(model, batch_cross_entropy, images(4, 0), images(4, 1), progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert_scores(model, trained, last_layer=False)


# distillation with wrapped networks


@pytest.mark.parametrize(
    'wrap, says',
    [
        (nn.DataParallel, 'student is DataParallel'),
        (lambda m: torch.compile(m, backend='eager'), 'student is compiled'),
    ],
)
def test_distillation_takes_the_network_inside_and_says_so(wrap, says):
    data = images(12, 0, dtype=torch.float32), images(9, 1, dtype=torch.float32)
    settings = dict(objective=Objective(alpha=0.5), training=Training(epochs=1, lr=0.01, progress=False))
    torch.manual_seed(0)
    plain, teacher = small(), small()
    student = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=says):
        run = distill(wrap(student), teacher, *data, **settings)
    assert run.student is student
    expected = distill(plain, teacher, *data, **settings).student
    for a, b in zip(student.parameters(), expected.parameters()):
        assert torch.equal(a, b)


def test_distillation_trains_what_requires_a_gradient():
    data = images(12, 0, dtype=torch.float32), images(9, 1, dtype=torch.float32)
    settings = dict(objective=Objective(alpha=0.5), training=Training(epochs=1, lr=0.05, progress=False))
    student = adapted(target_modules=['query'], modules_to_save=['classifier']).float()
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    run = distill(student, copy.deepcopy(student), *data, mechanism='student', **settings)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in student.named_parameters() if p.requires_grad}
    assert 0 < len(changed) < len(before) and run.scores.note == ''
