"LiSSA, L-BFGS, K-FAC and EK-FAC against dense solves and against curvlinops; layers that have no Kronecker block; models left as they were."

import copy

import pytest, torch
from kd_aif.influence.solvers import resolve_damping
from sklearn.datasets import load_digits
from torch import nn
from torch.func import hessian, jacrev
from kd_aif.foundation.core import evaluating
from kd_aif.influence.curvature import FlatModel, GaussNewton
from kd_aif.influence.logit_hessians import logit_roots
from kd_aif.influence.last_layer import last_layer_view
from kd_aif.influence.last_layer_curvature import LastLayerGaussNewton
from kd_aif.influence.kronecker import (
    kronecker_inverse,
    kronecker_names,
    last_layer_diagonal,
    sampled_diagonal,
)
from kd_aif.foundation.losses import batch_cross_entropy, distill_loss
from kd_aif.models.build import build_model
from kd_aif.influence.iterative_solvers import CG, LBFGS, LiSSA, largest_eigenvalue
from kd_aif.influence.solvers import EKFAC, KFAC, Exact

LAM = 0.1
digits = load_digits()
X, Y = torch.tensor(digits.data / 16.0), torch.tensor(digits.target)
BOTH = pytest.mark.parametrize('solver', [KFAC, EKFAC])


def cut(data, size):
    return [{k: v[r] for k, v in data.items()} for r in torch.arange(len(data['index'])).split(size)]


def rows(n, **more):
    return dict(x=X[:n], y=Y[:n], index=torch.arange(n), **more)


def near(a, b, tol):
    assert float((a - b).norm()) <= tol * float(b.norm()), float((a - b).norm() / b.norm())


def random(size, k=None, seed=0):
    return torch.randn(
        *([size] if k is None else [size, k]),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )


def dense(G):
    "The Gauss-Newton matrix from the Jacobian and the logit Hessian of every sample, without products"
    total, n, theta = 0.0, 0, G.flat.theta
    with evaluating(G.flat.model):
        for batch in G.batches:
            J = jacrev(lambda t: G.flat.logits(t, batch))(theta)
            H = torch.func.vmap(
                hessian(lambda z, row: G.flat.loss(z[None], {k: v[None] for k, v in row.items()}).sum())
            )(G.flat.logits(theta, batch), batch)
            total, n = total + torch.einsum('ncp,ncd,ndq->pq', J, H, J), n + len(J)
    return total.detach() / n


def image(model, batch):
    return model(batch['x'].reshape(-1, 1, 8, 8))


def tokens(model, batch):
    return model((batch['x'] * 7).long().reshape(-1, 16, 4)[:, :, 0])


def with_seed(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Attention(nn.Module):
    "One head of attention from plain linear layers, with layer normalisation and an embedding"

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(8, 6), nn.LayerNorm(6)
        self.q, self.k, self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x):
        h = self.norm(self.embed(x))
        weights = (self.q(h) @ self.k(h).mT / 6**0.5).softmax(-1)
        return self.out((h + weights @ self.v(h)).mean(1))


def mlp():
    return with_seed(lambda: nn.Sequential(nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 10)).double())


def conv():
    return with_seed(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 10),
        ).double()
    )


def attention():
    return with_seed(lambda: Attention().double())


MODELS = dict(mlp=(mlp, None), conv=(conv, image), attention=(attention, tokens))
KINDS = pytest.mark.parametrize('kind', list(MODELS))


def task(kind, n=60, size=25, loss=batch_cross_entropy, **more):
    make, forward = MODELS[kind]
    model = make()
    if kind == 'conv':
        model[1].running_mean += 0.1
        model[1].running_var *= 2
    flat = FlatModel(model, loss, forward)
    return flat, GaussNewton(flat, cut(rows(n, **more), size))


def theirs(flat, G, names, corrected, approx, lam=LAM):
    "curvlinops' own inverse for the parameters in `names`, cross-entropy, type-2"
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

    known = dict(flat.model.named_parameters())
    wrapped = SimpleModule(flat)
    data = [(b, b['y']) for b in G.batches]
    factors = (EKFACLinearOperator if corrected else KFACLinearOperator)(
        wrapped,
        nn.CrossEntropyLoss(),
        [known[n] for n in names],
        data,
        fisher_type='type-2',
        kfac_approx=approx,
        separate_weight_and_bias=False,
        check_deterministic=False,
        batch_size_fn=lambda b: len(b['y']),
    )
    return KFACInverseLinearOperator(factors, damping=lam, use_exact_damping=True)


class SimpleModule(nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.inner = flat.module

    def forward(self, batch):
        return self.inner(batch)


def mask(flat, names):
    return torch.cat([torch.full((s.numel(),), n in names) for n, s in zip(flat.names, flat.shapes)])


# LiSSA and L-BFGS


@KINDS
@pytest.mark.parametrize(
    'solver',
    [
        LiSSA(LAM, depth=5000, tol=1e-6),
        LBFGS(LAM, max_iter=300, tol=1e-6),
        LBFGS(LAM, max_iter=300, tol=1e-6, memory=1),
    ],
)
def test_iterative_solvers_reach_their_tolerance(kind, solver):
    "The reported residual is the true one, it is below the tolerance, and the answer is the dense one."
    G = SimpleMatrix(dense(task(kind)[1]))
    b = random(G.size, 3)
    A = G.A + LAM * torch.eye(G.size, dtype=torch.float64)
    solution = solver.solve(G, b)
    assert solution.residual <= 1e-6
    assert abs(solution.residual - float(((A @ solution.x - b).norm(dim=0) / b.norm(dim=0)).max())) < 1e-9
    near(solution.x, torch.linalg.solve(A, b), 1e-4)  # the condition number is below 100
    for i in range(3):  # each column alone
        near(solver.solve(G, b[:, i]).x, solution.x[:, i], 1e-5)


@pytest.mark.parametrize('depth', [1, 2, 7, 50])
def test_lissa_is_the_truncated_neumann_series(depth):
    from curvlinops import NeumannInverseLinearOperator
    from curvlinops.examples import TensorLinearOperator

    flat, G = task('mlp')
    A, b = dense(G) + LAM * torch.eye(G.size, dtype=torch.float64), random(G.size)
    reference = (
        NeumannInverseLinearOperator(TensorLinearOperator(A), num_terms=depth - 1, scale=1 / 4.0) @ b
    )  # their scale is the inverse of ours
    solution = LiSSA(LAM, depth=depth, scale=4.0, tol=0.0).solve(G, b)
    near(solution.x, reference, 1e-12)
    assert solution.matvecs == depth


def test_power_iteration_and_scale():
    flat, G = task('mlp')
    top = float(torch.linalg.eigvalsh(dense(G))[-1])
    value, matvecs = largest_eigenvalue(G, random(G.size))
    assert 0.9 * top < value <= top * (1 + 1e-9) and matvecs <= 20
    b = random(G.size)
    assert LiSSA(LAM, depth=5, tol=0.0).solve(G, b).matvecs == matvecs + 5


@pytest.mark.parametrize(
    'make', [lambda tol: LiSSA(LAM, depth=5000, tol=tol), lambda tol: LBFGS(LAM, max_iter=200, tol=tol)]
)
def test_warm_start_zero_and_stopping(make):
    G = SimpleMatrix(dense(task('mlp')[1]))
    b, exact = random(G.size), Exact(LAM).solve(G, random(G.size)).x
    cold, warm = make(1e-5).solve(G, b), make(1e-5).solve(G, b, x0=exact * (1 + 1e-4))
    assert warm.matvecs < cold.matvecs / 2 and warm.residual <= 1e-5
    near(make(1e-5).solve(G, b, x0=cold.x).x, exact, 1e-3)
    assert make(1e-5).solve(G, 0 * b).x.abs().max() == 0
    assert make(1e-2).solve(G, b).matvecs < cold.matvecs


def test_lbfgs_is_conjugate_gradients_on_a_quadratic():
    G = SimpleMatrix(dense(task('conv')[1]))
    b = random(G.size)
    near(LBFGS(LAM, max_iter=6, tol=0.0).solve(G, b).x, CG(LAM, max_iter=6, tol=0.0).solve(G, b).x, 1e-10)


def test_iterative_solvers_say_what_to_do():
    flat, G = task('mlp')
    b = random(G.size)
    with pytest.raises(ValueError, match='increase scale'):
        LiSSA(LAM, scale=0.05).solve(G, b)
    with pytest.raises(ValueError, match='increase scale'):
        LiSSA(LAM, scale=1e-300, depth=3000).solve(G, b)
    with pytest.raises(ValueError, match="'auto'"):
        LiSSA(LAM, scale='large').solve(G, b)
    with pytest.raises(ValueError, match='memory'):
        LBFGS(LAM, memory=0).solve(G, b)
    negative = SimpleMatrix(-torch.eye(5, dtype=torch.float64))
    for solver in (LiSSA(0.5), LBFGS(0.5)):
        with pytest.raises(ValueError, match='increase damping'):
            solver.solve(negative, random(5))
        with pytest.raises(ValueError, match='NaN'):
            solver.solve(G, b * float('nan'))
        with pytest.raises(ValueError, match='NaN'):
            solver.solve(SimpleMatrix(torch.full((5, 5), float('nan'), dtype=torch.float64)), random(5))


class SimpleMatrix:
    def __init__(self, A):
        self.A, self.size = A, len(A)

    def __matmul__(self, v):
        return self.A @ v


# K-FAC and EK-FAC


@BOTH
@KINDS
@pytest.mark.parametrize('approx', ['expand', 'reduce'])
def test_equal_to_curvlinops_on_cross_entropy(solver, kind, approx):
    "Through R(z)·z and the squared error we get what curvlinops computes with its cross-entropy; batches of unequal size."
    flat, G = task(kind)
    names, b = kronecker_names(flat, G.batches[0]), random(G.size, 2)
    assert len(names) == dict(mlp=4, conv=5, attention=8)[kind]
    solution = solver(LAM, approx=approx, fisher='type-2').solve(G, b)
    flat.model.eval()
    part = mask(flat, names)
    # with 'reduce' a factor has null directions in which single samples do have a gradient: there the axes of EK-FAC are a matter of chance
    chance = solver is EKFAC and approx == 'reduce' and kind == 'attention'
    near(
        solution.x[part], theirs(flat, G, names, solver is EKFAC, approx) @ b[part], 1e-2 if chance else 1e-10
    )
    for i in range(2):
        torch.testing.assert_close(
            solver(LAM, approx=approx, fisher='type-2').solve(G, b[:, i]).x,
            solution.x[:, i],
            rtol=1e-10,
            atol=1e-12,
        )


def kd(logits, batch):
    return distill_loss(logits, batch['teacher'], batch['y'], T=3.0, alpha=0.6, reduction='none')


def linear_task(n=50):
    flat = FlatModel(with_seed(lambda: nn.Linear(64, 10).double()), kd)
    return flat, GaussNewton(flat, cut(rows(n, teacher=random(n, 10, seed=3) * 3), 20))


def logit_hessians(z, T=3.0, alpha=0.6):
    def softmax_hessian(p):
        return torch.diag_embed(p) - p[:, :, None] * p[:, None]

    return alpha * softmax_hessian((z / T).softmax(1)) + (1 - alpha) * softmax_hessian(z.softmax(1))


def test_logit_roots_of_the_distillation_loss():
    z, batch = 3 * random(9, 10), dict(teacher=random(9, 10, seed=2), y=Y[:9])
    R = logit_roots(kd, z, batch)
    torch.testing.assert_close(R.mT @ R, logit_hessians(z), rtol=0, atol=1e-13)
    saturated = logit_roots(
        batch_cross_entropy, torch.tensor([[100.0, 0, 0], [0, 0, 0]]).double(), dict(y=torch.tensor([0, 1]))
    )
    assert torch.isfinite(saturated).all()
    concave = logit_roots(
        lambda z, batch: -(z**2).sum(1), random(2, 3), {}
    )  # not convex: counts as no curvature
    assert concave.abs().max() == 0


@BOTH
def test_distillation_factors_by_hand(solver):
    "One linear layer: the Kronecker factors, and the eigenvalue correction, written out."
    flat, G = linear_task()
    n, v = 50, random(10, 65)
    a = torch.cat([X[:n], torch.ones(n, 1).double()], 1)
    with torch.no_grad():
        H = logit_hessians(flat.model(X[:n]))
    A, B = a.T @ a / n, H.mean(0)
    if solver is KFAC:
        F = torch.kron(B, A)
    else:
        Q = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
        full = torch.einsum('nij,nk,nl->ikjl', H, a, a).reshape(650, 650) / n
        F = Q @ torch.diag((Q.T @ full @ Q).diagonal()) @ Q.T
    by_hand = torch.linalg.solve(F + LAM * torch.eye(650).double(), v.flatten()).reshape(10, 65)
    solution = solver(LAM, fisher='type-2').solve(G, torch.cat([v[:, :64].flatten(), v[:, 64]])).x
    near(solution, torch.cat([by_hand[:, :64].flatten(), by_hand[:, 64]]), 1e-10)


@BOTH
def test_last_layer_agrees_with_the_generic_path(solver):
    flat, G = linear_task()
    view = last_layer_view(flat.model, kd, G.batches, max_hessians=100, progress=False)
    b = random(650, 2)
    solution = (
        solver(LAM, fisher='type-2')
        .solve(G, torch.cat([b.reshape(10, 65, 2)[:, :64].reshape(640, 2), b.reshape(10, 65, 2)[:, 64]]))
        .x
    )
    closed = solver(LAM, check=True).solve(LastLayerGaussNewton(view), b)
    x = closed.x.reshape(10, 65, 2)
    near(torch.cat([x[:, :64].reshape(640, 2), x[:, 64]]), solution, 1e-9)
    assert 0 < closed.residual < 1 and closed.matvecs == 2


@BOTH
def test_monte_carlo_tends_to_type_2(solver):
    flat, G = task('mlp', n=200, size=100)
    b = random(G.size)
    exact = solver(LAM, fisher='type-2').solve(G, b).x
    near(solver(LAM, mc_samples=64).solve(G, b).x, exact, 0.02)
    one = solver(LAM).solve(G, b)
    near(one.x, exact, 0.2)
    assert torch.equal(one.x, solver(LAM).solve(G, b).x) and not torch.equal(
        one.x, solver(LAM, seed=1).solve(G, b).x
    )


@BOTH
@pytest.mark.parametrize('kind', ['conv', 'attention'])
def test_other_parameters_get_the_diagonal(solver, kind):
    "Where there is no Kronecker block the answer is b/(g + λ), with g the diagonal of the Gauss-Newton matrix on average."
    flat, G = task(kind, n=64, size=25)
    rest = ~mask(flat, kronecker_names(flat, G.batches[0]))
    b = torch.ones(G.size, dtype=torch.float64)
    g = sum(b[rest] / solver(1e-3, seed=seed).solve(G, b).x[rest] - 1e-3 for seed in range(10)) / 10
    true = dense(G).diagonal()[rest]
    assert (g >= -1e-12).all() and abs(float(g.sum() / true.sum()) - 1) < 0.2
    assert float(torch.corrcoef(torch.stack([g, true]))[0, 1]) > 0.95


@BOTH
@pytest.mark.parametrize('kind', ['conv', 'attention'])
def test_residual_unless_unwanted_and_note(solver, kind):
    flat, G = task(kind)
    b = random(G.size, 2)
    quiet, told = solver(LAM, check=False).solve(G, b), solver(LAM).solve(G, b)
    assert quiet.residual != quiet.residual and quiet.matvecs == 0 and told.matvecs == 2
    r = (G @ told.x) + LAM * told.x - b
    assert abs(told.residual - float((r.norm(dim=0) / b.norm(dim=0)).max())) < 1e-12
    assert 'diagonal for' in told.note


def fingerprint(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )


def unchanged(before, after):
    assert before[:4] == after[:4]
    for k, v in before[4].items():
        assert torch.equal(v, after[4][k])


@BOTH
def test_model_is_left_as_it_was(solver):
    "Modes, flags, hooks and buffers are the same after a solve, and after one that fails half-way."
    flat, G = task('conv')
    flat.model.train()
    flat.model[1].eval()
    before = fingerprint(flat.model)
    solver(LAM).solve(G, random(G.size))
    unchanged(before, fingerprint(flat.model))
    calls = []

    def fails(logits, batch):
        calls.append(1)
        if len(calls) > 40:
            raise RuntimeError('lost')
        return batch_cross_entropy(logits, batch)

    with pytest.raises(RuntimeError, match='lost'):
        many = GaussNewton(FlatModel(flat.model, fails, image), cut(rows(200), 2))
        solver(LAM).solve(many, random(G.size))
    unchanged(before, fingerprint(flat.model))


@BOTH
def test_frozen_parameters(solver):
    "With part of the model frozen the rest gives what curvlinops gives for it; names may also choose frozen parameters."
    flat, G = task('mlp')
    for p in flat.model[0].parameters():
        p.requires_grad_(False)
    for names in (['2.weight', '2.bias'], ['0.weight'], ['0.bias', '2.bias']):
        part = FlatModel(flat.model, names=names)
        op = GaussNewton(part, G.batches)
        b = random(op.size)
        solution = solver(LAM, fisher='type-2').solve(op, b).x
        assert [p.requires_grad for p in flat.model.parameters()] == [False, False, True, True]
        free = FlatModel(copy.deepcopy(flat.model).requires_grad_(True), names=names)
        near(solution, theirs(free, op, names, solver is EKFAC, 'expand') @ b, 1e-10)


class Odd(nn.Module):
    "Everything that K-FAC has no block for: tied and repeated layers, layers on reshaped input, unused ones, packed attention"

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.twice, self.unused, self.side, self.flat_input = (
            nn.Linear(8, 8),
            nn.Linear(3, 3),
            nn.Linear(8, 4),
            nn.Linear(8, 8),
        )
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.circular = nn.Conv2d(1, 2, 3, padding=1, padding_mode='circular')
        self.even = nn.Conv2d(2, 4, 2, groups=2, padding='same')
        self.decode, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 10)
        self.decode.weight = self.embed.weight

    def forward(self, x):
        h = self.twice(self.twice(self.embed(x)))
        self.side(h)
        h = self.flat_input(h.reshape(-1, 8)).reshape(h.shape)
        h = h + self.mha(h, h, h)[0]
        h = h + self.even(self.circular(h[:, None])).mean(1)
        return self.head(self.decode(h).mean(1))


@BOTH
def test_layers_without_a_block_never_crash(solver):
    model = with_seed(lambda: Odd().double())
    flat = FlatModel(model, forward=tokens)
    G = GaussNewton(
        flat, cut(rows(30), 16)
    )  # 16 tokens in batches of 16: the first dimension alone does not tell them apart
    assert kronecker_names(flat, G.batches[0]) == ['head.weight', 'head.bias']
    b = random(G.size)
    solution = solver(LAM).solve(G, b)
    assert torch.isfinite(solution.x).all()
    unused = mask(flat, ['unused.weight', 'unused.bias', 'side.weight'])
    torch.testing.assert_close(solution.x[unused], b[unused] / LAM)


@BOTH
def test_no_supported_layer_at_all(solver):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(10).double())

        def forward(self, x):
            return x[:, :10] * self.scale

    flat = FlatModel(Scale())
    G = GaussNewton(flat, cut(rows(200), 50))
    x = solver(LAM).solve(G, torch.ones(10).double()).x
    near(x, 1 / (dense(G).diagonal() + LAM), 0.1)


@BOTH
@pytest.mark.parametrize('name', ['torchvision/mobilenet_v2', 'resnet20'])
def test_real_networks_in_single_precision(solver, name):
    model = build_model(name, 5, seed=0)
    data = dict(
        x=random(6, 3 * 32 * 32).float().reshape(6, 3, 32, 32), y=torch.arange(6) % 5, index=torch.arange(6)
    )
    flat = FlatModel(model)
    G = GaussNewton(flat, cut(data, 4))
    solution = solver(LAM).solve(G, torch.ones(flat.size))
    assert (
        torch.isfinite(solution.x).all() and float(solution.x.norm()) <= 1.001 * flat.size**0.5 / LAM
    )  # no eigenvalue below λ


@BOTH
def test_errors_name_the_remedy(solver):
    flat, G = task('mlp')
    b = random(G.size)
    for wrong, message in (
        (dict(approx='sum'), "'expand', 'reduce'"),
        (dict(fisher='empirical'), "'mc', 'type-2'"),
        (dict(mc_samples=0), 'whole number from 1'),
        (dict(damping=-1.0), 'above 0'),
    ):
        with pytest.raises(ValueError, match=message):
            solver(**{'damping': LAM, **wrong}).solve(G, b)
    with pytest.raises(ValueError, match='GaussNewton'):
        solver(LAM).solve(SimpleMatrix(torch.eye(5).double()), random(5))
    with pytest.raises(ValueError, match='not finite'):
        solver(LAM).solve(G, b * float('nan'))
    with pytest.raises(ValueError, match='no sample'):
        solver(LAM).solve(GaussNewton(flat, []), b)
    with torch.no_grad():
        flat.model[0].weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        solver(LAM).solve(G, b)


@BOTH
def test_preconditioner_leaves_the_answer(solver):
    flat, G = task('conv')
    b, A = random(G.size), SimpleMatrix(dense(G))
    apply, _ = kronecker_inverse(G, LAM, eigenvalue_corrected=solver is EKFAC)
    near(CG(LAM, max_iter=200, tol=1e-9, preconditioner=apply).solve(A, b).x, Exact(LAM).solve(A, b).x, 1e-7)


@KINDS
def test_sampled_diagonal(kind):
    "On average the diagonal, in groups of several samples, for any part of the parameters in any order."
    flat, G = task(kind, n=150, size=100)
    names, sizes = flat.names[::-2], [s.numel() for s in flat.shapes]
    runs = [sampled_diagonal(flat, G.batches, seed=seed) for seed in range(10)]
    near(sum(runs) / 10, dense(G).diagonal(), 0.15)
    named = dict(zip(flat.names, runs[3].split(sizes)))
    torch.testing.assert_close(
        sampled_diagonal(flat, G.batches, names, seed=3),
        torch.cat([named[name] for name in names]),
        rtol=1e-10,
        atol=1e-14,
    )


def test_sampled_diagonal_without_curvature():
    for loss in (
        lambda z, batch: -(z**2).sum(1),
        lambda z, batch: z.sum(1),
    ):  # concave: counts as none; linear: none
        flat, G = task('mlp', loss=loss)
        assert sampled_diagonal(flat, G.batches).max() < 1e-300


def test_last_layer_diagonal():
    flat, G = linear_task()
    closed = LastLayerGaussNewton(
        last_layer_view(flat.model, kd, G.batches, max_hessians=100, progress=False)
    )
    near(last_layer_diagonal(closed), closed.dense().diagonal(), 1e-12)


def test_automatic_damping():
    flat, G = task('mlp')
    assert EKFAC().solve(G, random(G.size)).damping == CG().solve(G, random(G.size)).damping


def test_automatic_damping_is_two_and_a_half_mean_eigenvalues():
    "Of a matrix that knows its trace, and of one that has to be probed"

    class Known:
        size = 4

        def trace(self):
            return 8.0

    damping, matvecs = resolve_damping('auto', Known(), torch.zeros(4))
    assert damping == pytest.approx(5.0) and matvecs == 0

    class Probed:
        size = 50

        def __matmul__(self, v):
            return 2.0 * v

    damping, matvecs = resolve_damping('auto', Probed(), torch.zeros(50))
    assert damping == pytest.approx(5.0, rel=1e-4) and matvecs > 0
