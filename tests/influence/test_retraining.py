"Retraining: the runner (cache, resume, processes, interrupts), the linear datamodelling score as a property, leave one out, messages of mistakes."

import math, os, pickle, re, signal, subprocess, sys, time
from functools import partial

import pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import spearmanr
from kd_aif.influence.scores import InfluenceScores
from kd_aif.influence.datamodelling import LDS, Ceiling, half_subsets, lds, lds_ceiling, predicted_losses
from kd_aif.influence.retraining import LeaveOneOut, RetrainedLosses, loo_scores, retrain

many = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)
KEY = dict(what='toy', size=3)

SOURCE = '''
import os, time, torch
def fit(rows, seed, log=None, nan=(), pause=0., die=False):
    "Five losses from the rows, the seed and the global stream; every call leaves a line in `log`"
    if log:
        with open(log, 'a') as f: f.write(f'{len(rows)} {rows.sum()} {seed} {torch.get_num_threads()}\\n')
    time.sleep(pause)
    if die: os._exit(3)
    losses = rows.double().sqrt().mean() + torch.rand(5, dtype=torch.float64) + torch.randn(200, 200).sum()*1e-3
    if (len(rows), seed) in nan: losses[2] = float('nan')
    return losses
'''


@pytest.fixture(scope='module')
def fit(tmp_path_factory):
    "The function above, from a module that other processes can import."
    folder = tmp_path_factory.mktemp('modules')
    (folder / 'retraining_toy.py').write_text(SOURCE)
    sys.path.insert(0, str(folder))
    import retraining_toy

    yield retraining_toy.fit
    sys.path.remove(str(folder))
    del sys.modules['retraining_toy']


def run(fit, subsets, *args, **kwargs):
    return retrain(fit, subsets, *args, progress=False, **kwargs)


def lines(file):
    return file.read_text().splitlines() if file.exists() else []


def sizes(*k):
    return [torch.arange(i) for i in k]


def files(folder):
    return sorted(folder.glob('*.safetensors'))


def additive(effect, subsets, noise=0.0, seeds=(0,)):
    "Every sample lowers the losses by its own amount."
    return run(
        lambda rows, seed: -effect[rows].sum(0) + noise * torch.randn(effect.shape[1], dtype=torch.float64),
        subsets,
        seeds,
    )


def effects(n, q, seed):
    return torch.randn(n, q, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The runner


def test_losses_stand_where_they_belong():
    found = run(
        lambda rows, seed: torch.stack([rows.sum(), torch.tensor(seed)]).float(), sizes(3, 5), [7, 2, 9]
    )
    assert found.losses.dtype == torch.float64 and found.losses.shape == (2, 3, 2) and len(found) == 2
    assert (
        found.losses[:, :, 0].tolist() == [[3] * 3, [10] * 3]
        and found.losses[:, :, 1].tolist() == [[7, 2, 9]] * 2
    )
    assert (
        found.mean.tolist() == [[3, 6], [10, 6]]
        and found.seeds == (7, 2, 9)
        and found.subsets[1].tolist() == [0, 1, 2, 3, 4]
    )


def test_one_and_two_processes_give_the_same(fit, tmp_path):
    rng, log, threads = torch.get_rng_state(), tmp_path / 'log', torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have: another number rounds in another way on some machines
    try:
        one = run(fit, sizes(3, 5, 6), range(2))
    finally:
        torch.set_num_threads(threads)
    two = run(partial(fit, log=str(log)), sizes(3, 5, 6), range(2), tmp_path / 'cache', processes=2, key=KEY)
    assert torch.equal(one.losses, two.losses) and torch.equal(rng, torch.get_rng_state())
    assert len(lines(log)) == 6 and {l.split()[-1] for l in lines(log)} == {'1'}, 'one thread each'
    assert not torch.equal(one.losses[:, 0], one.losses[:, 1])
    again = run(partial(fit, log=str(log)), sizes(3, 5, 6), range(2), tmp_path / 'cache', key=KEY)
    assert len(lines(log)) == 6 and torch.equal(again.losses, one.losses)


def test_an_interrupt_leaves_what_is_finished(fit, tmp_path):
    calls = []

    def interrupted(rows, seed):
        calls.append(len(rows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(rows, seed)

    args = sizes(3, 5, 6), range(2), tmp_path
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, *args, key=KEY)
    assert len(files(tmp_path)) == 3 and not list(tmp_path.glob('.*'))
    found = run(interrupted, *args, key=KEY)
    assert calls == [3, 5, 6, 3, 3, 5, 6] and torch.equal(found.losses, run(fit, *args[:2]).losses)


SCRIPT = '''
import multiprocessing, signal, sys, time
from functools import partial
import torch
sys.path.insert(0, sys.argv[1])
from retraining_toy import fit
if multiprocessing.current_process().name.endswith('-2'): time.sleep(float(sys.argv[4])) # the second process is late
from kd_aif.influence.retraining import retrain
if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler) # also where the shell that runs the tests ignores it
    retrain(partial(fit, log=sys.argv[3], pause=.2), [torch.arange(k) for k in range(2, 60)], folder=sys.argv[2], processes=2, key=dict(what='toy'))
'''


@pytest.mark.parametrize('late', ['0', '5'], ids=['both at work', 'one still starting'])
@pytest.mark.skipif(os.name != 'posix', reason='signals to a group of processes')
def test_ctrl_c_in_a_terminal_with_two_processes(fit, tmp_path, late):
    module, cache, log = (
        os.path.dirname(sys.modules['retraining_toy'].__file__),
        tmp_path / 'cache',
        tmp_path / 'log',
    )
    (tmp_path / 'script.py').write_text(SCRIPT)
    job = subprocess.Popen(
        [sys.executable, tmp_path / 'script.py', module, cache, log, late],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(600):
            if len(files(cache)) >= 2 or job.poll() is not None:
                break
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode != 0 and errors.rstrip().endswith('KeyboardInterrupt'), errors
    done = len(files(cache))
    assert 2 <= done == len(lines(log)) < 58 and not list(cache.glob('.*')), 'every run that began was kept'
    run(
        partial(fit, log=str(log)),
        [torch.arange(k) for k in range(2, 60)],
        folder=cache,
        key=dict(what='toy'),
    )
    assert len(lines(log)) == 58


def test_a_loss_that_is_not_finite_is_named(fit, tmp_path):
    with pytest.raises(ValueError, match='1 losses of 5.*subset 1, seed 3.*learning rate'):
        run(partial(fit, nan=[(5, 3)]), sizes(3, 5), [2, 3], tmp_path, key=KEY)
    assert len(files(tmp_path)) == 3
    with pytest.raises(ValueError, match='subset 0, seed 0'):
        run(lambda rows, seed: torch.tensor([math.inf]), sizes(2))
    with pytest.raises(ValueError, match='subset 1, seed 2'):
        run(partial(fit, nan=[(5, 2)]), sizes(3, 5), [2], tmp_path / 'two', processes=2, key=KEY)
    assert len(files(tmp_path / 'two')) == 1, 'what was running is kept'


def test_a_foreign_folder_is_refused(fit, tmp_path):
    first = run(fit, sizes(3, 5), [0], tmp_path, key=KEY)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    never = lambda rows, seed: pytest.fail('it was trained')
    for key in (dict(what='toy', size=4), dict(what='toy'), dict(KEY, more=1)):
        with pytest.raises(ValueError, match='holds retraining runs with key.*use another folder'):
            run(never, sizes(3, 5), [0], tmp_path, key=key)
    for other in (sizes(5, 3), sizes(3, 6), [torch.arange(3).flip(0), torch.arange(5)], sizes(4)):
        with pytest.raises(ValueError, match='2 other subsets'):
            run(never, other, [0], tmp_path, key=KEY)
    with pytest.raises(ValueError, match='say what fit is'):
        run(never, sizes(3, 5), [0], tmp_path)
    assert before == {f: f.read_bytes() for f in tmp_path.iterdir()}
    assert torch.equal(
        run(never, sizes(3, 5), [0], tmp_path, key=dict(size=3, what='toy')).losses, first.losses
    ), 'the order of the key does not matter'
    assert torch.equal(run(never, sizes(3), [0], tmp_path, key=KEY).losses, first.losses[:1])


def test_a_file_of_another_cache_is_refused(fit, tmp_path):
    run(fit, sizes(3), [0], tmp_path / 'a', key=KEY)
    run(fit, sizes(3), [0], tmp_path / 'b', key=dict(what='other'))
    [a], [b] = files(tmp_path / 'a'), files(tmp_path / 'b')
    a.write_bytes(b.read_bytes())
    with pytest.raises(ValueError, match='belongs to another set'):
        run(fit, sizes(3), [0], tmp_path / 'a', key=KEY)


@pytest.mark.parametrize(
    'damage', [lambda b: b'', lambda b: b[:20], lambda b: b[:-8], lambda b: b'\0' * len(b)]
)
def test_a_broken_file_is_done_again(fit, tmp_path, damage):
    log, cache = tmp_path / 'log', tmp_path / 'cache'
    work = partial(fit, log=str(log))
    first = run(work, sizes(3, 5), [0], cache, key=KEY)
    file = files(cache)[0]
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(run(work, sizes(3, 5), [0], cache, key=KEY).losses, first.losses)
    assert len(lines(log)) == 3
    run(work, sizes(3, 5), [0], cache, key=KEY)
    assert len(lines(log)) == 3, 'the file is whole again'


def test_a_broken_manifest_is_refused(fit, tmp_path):
    run(fit, sizes(3), [0], tmp_path, key=KEY)
    for text in ('{', '[]', '{"key": {}}'):
        (tmp_path / 'refits.json').write_text(text)
        with pytest.raises(ValueError, match='cannot be read'):
            run(fit, sizes(3), [0], tmp_path, key=KEY)


def test_more_seeds_and_subsets_go_on_in_the_same_folder(fit, tmp_path):
    log, cache = tmp_path / 'log', tmp_path / 'cache'
    work = partial(fit, log=str(log))
    for subsets, s, calls in (
        (sizes(3, 5), [0], 2),
        (sizes(3, 5), [0, 1], 4),
        (sizes(3, 5, 6), [1], 5),
        (sizes(3, 5, 6), [0, 1], 6),
    ):
        found = run(work, subsets, s, cache, key=KEY)
        assert len(lines(log)) == calls
    assert torch.equal(found.losses, run(fit, sizes(3, 5, 6), [0, 1]).losses)


def test_unfit_arguments_are_named(fit, tmp_path):
    for fits, what in (
        (lambda r, s: 1.0, 'a float'),
        (lambda r, s: torch.tensor(1.0), r'shape \(\)'),
        (lambda r, s: torch.zeros(2, 2), r'shape \(2, 2\)'),
        (lambda r, s: torch.zeros(0), r'shape \(0,\)'),
    ):
        with pytest.raises(ValueError, match=what):
            run(fits, sizes(2))
    with pytest.raises(ValueError, match='2 and 3 losses'):
        run(lambda rows, seed: torch.zeros(len(rows)), sizes(2, 3))
    for subsets in (
        [],
        [[]],
        torch.arange(4),
        [torch.tensor([0.5])],
        [torch.tensor([True])],
        [torch.tensor([-1])],
    ):
        with pytest.raises(ValueError, match='subsets'):
            run(fit, subsets)
    for s in (4, [], [0, 0], [0.5]):
        with pytest.raises(ValueError, match='seeds is'):
            run(fit, sizes(2), s)
    for p in (0, None, 1.5):
        with pytest.raises(ValueError, match='processes is'):
            run(fit, sizes(2), processes=p)
    with pytest.raises(ValueError, match='key: .*not JSON'):
        run(fit, sizes(2), folder=tmp_path / 'new', key=dict(model=fit))
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='is a file'):
        run(fit, sizes(2), folder=tmp_path / 'file', key=KEY)
    with pytest.raises(ValueError, match='top level.*processes=1'):
        run(lambda rows, seed: torch.zeros(1), sizes(2, 3), processes=2)


def test_faults_of_other_processes_are_explained(fit, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match='ended abruptly'):
        run(partial(fit, die=True), sizes(2), processes=2)
    import types

    here = types.ModuleType('only_here')
    exec('def fit(rows, seed): pass', here.__dict__)
    monkeypatch.setitem(sys.modules, 'only_here', here)
    with pytest.raises(ValueError, match='only_here.*importable'):
        run(here.fit, sizes(2), processes=2)


def test_file_and_display(tmp_path):
    found = additive(effects(9, 4, 0), sizes(3, 5), seeds=(3, 1))
    again = RetrainedLosses.load(found.save(tmp_path / 'new' / 'refits.safetensors'))
    assert (
        torch.equal(again.losses, found.losses)
        and again.seeds == (3, 1)
        and [s.tolist() for s in again.subsets] == [s.tolist() for s in found.subsets]
    )
    assert '2 subsets of 3 to 5 rows × 2 seeds, 4 queries' in found._repr_markdown_() and 'nan' not in repr(
        additive(effects(9, 4, 0), sizes(3))
    )
    assert len(pickle.loads(pickle.dumps(found))) == 2


# Subsets


@many
@given(st.integers(2, 40), st.integers(1, 6), st.floats(0.05, 0.95), seeds)
def test_half_subsets(n, count, fraction, seed):
    k = round(fraction * n)
    if not 0 < k < n:
        with pytest.raises(ValueError, match='fraction is'):
            half_subsets(n, count, fraction, seed)
        return
    rng, found = torch.get_rng_state(), half_subsets(n, count, fraction, seed)
    assert found.shape == (count, k) and found.dtype == torch.int64 and found.min() >= 0 and found.max() < n
    assert (found.diff(dim=1) > 0).all(), 'in rising order, none twice'
    assert torch.equal(found, half_subsets(n, count, fraction, seed)) and torch.equal(
        found, half_subsets(n, count + 3, fraction, seed)[:count]
    )
    assert torch.equal(rng, torch.get_rng_state())


def test_half_subsets_are_random_and_depend_on_the_seed():
    share = torch.bincount(half_subsets(50, 400).flatten(), minlength=50) / 400
    assert (share - 0.5).abs().max() < 0.12
    assert not torch.equal(half_subsets(50), half_subsets(50, seed=1)) and half_subsets(50).shape == (30, 25)
    for kwargs in (
        dict(fraction=0),
        dict(fraction=1),
        dict(fraction=1.5),
        dict(count=0),
        dict(count=2.5),
        dict(n=1),
        dict(n='many'),
    ):
        with pytest.raises(ValueError, match='|'.join(kwargs)):
            half_subsets(**{'n': 10, **kwargs})


# The linear datamodelling score


@many
@given(seeds, st.integers(4, 25), st.integers(1, 4), st.floats(0.1, 100))
def test_true_scores_score_one_and_their_negative_minus_one(seed, count, q, scale):
    effect, subsets = effects(30, q, seed), half_subsets(30, count, seed=seed)
    measured = additive(effect, subsets)
    for sign in (1, -1):
        each, mean = (lds(sign * scale * s, measured, bootstrap=20) for s in (effect, effect.mean(1)))
        assert each.per_query == pytest.approx(torch.full((q,), float(sign))) and mean.per_query is None
        for found in (each, mean):
            assert (
                found.value == pytest.approx(sign)
                and found.low == pytest.approx(sign)
                and found.high == pytest.approx(sign)
            )


@many
@given(seeds, st.floats(0.01, 100), st.floats(-5, 5), st.booleans())
def test_only_ranks_matter(seed, scale, shift, per_query):
    "Scores in another unit, or all shifted; losses under a rising function: the same. Negated scores: the negative."
    effect, scores = effects(30, 3, seed), effects(30, 3, seed + 1)
    measured = additive(effect, half_subsets(30, 12, seed=seed), 0.5, range(2))
    if not per_query:
        scores = scores[:, 0]
    found = lds(scores, measured, bootstrap=50)
    assert -1 <= found.low <= found.value <= found.high <= 1
    for other in (scale * scores, scores + shift):
        assert lds(other, measured, bootstrap=50).value == pytest.approx(found.value)
    assert lds(-scores, measured, bootstrap=50).value == pytest.approx(-found.value)
    if per_query:
        transformed = RetrainedLosses(measured.mean[:, None].exp(), measured.subsets, (0,))
        assert lds(scores, transformed, bootstrap=50).value == pytest.approx(found.value)


@many
@given(seeds, st.booleans())
def test_agrees_with_scipy_also_with_ties(seed, ties):
    effect, scores = effects(20, 3, seed), effects(20, 3, seed + 1)
    if ties:
        effect, scores = effect.round(), scores.round()
    measured = additive(effect, half_subsets(20, 15, seed=seed))
    group = torch.stack([scores[s].sum(0) for s in measured.subsets])
    expected = [spearmanr(-group[:, k], measured.mean[:, k]).statistic for k in range(3)]
    found = lds(scores, measured, bootstrap=20)
    assert found.per_query == pytest.approx(torch.tensor(expected)) and found.value == pytest.approx(
        sum(expected) / 3
    )
    assert lds(scores[:, 1], measured, bootstrap=20).value == pytest.approx(
        spearmanr(-group[:, 1], measured.mean.mean(1)).statistic
    )
    assert torch.allclose(predicted_losses(scores, measured.subsets), -group)


def test_sign_on_a_real_training():
    "A sample whose presence lowers the loss has a positive effect, in both judges."
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)

    def fit(rows, seed):
        return (x[rows].mean() - torch.tensor([0.5, -0.5], dtype=torch.float64)) ** 2  # the model is a mean

    loo = loo_scores(fit, 12, progress=False)
    assert (
        (loo.per_query[x > 0, 0] > 0).all()
        and (loo.per_query[x < 0, 0] < 0).all()
        and torch.allclose(loo.per_query.mean(1), loo.values)
    )
    found = lds(loo.per_query, run(fit, half_subsets(12, 20)))
    assert (found.per_query > 0.9).all()


def test_the_interval_covers():
    "Half-subsets drawn anew give a score within the interval about as often as it claims."
    effect = effects(60, 1, 0)
    scores = effect[:, 0] + effects(60, 1, 1)[:, 0]
    every = lds(scores, additive(effect, half_subsets(60, 500, seed=99)), bootstrap=1).value
    found = [lds(scores, additive(effect, half_subsets(60, 30, seed=s)), bootstrap=300) for s in range(40)]
    assert sum(f.low <= every <= f.high for f in found) >= 33
    narrow = lds(scores, additive(effect, half_subsets(60, 30)), bootstrap=300, confidence=0.5)
    assert (
        found[0].low < narrow.low < narrow.value < narrow.high < found[0].high
        and narrow.value == found[0].value
    )
    assert lds(scores, additive(effect, half_subsets(60, 30)), bootstrap=300) == found[0], (
        'a pure function of its seed'
    )


def test_queries_that_do_not_vary_are_left_out():
    effect = effects(20, 3, 0)
    effect[:, 1] = 0
    measured = additive(effect, half_subsets(20, 8))
    found = lds(effects(20, 3, 0), measured, bootstrap=30)
    assert found.per_query[1].isnan() and found.value == pytest.approx(1) and found.low == pytest.approx(1)
    zero = lds(torch.zeros(20, 3), measured, bootstrap=30)
    assert zero.value == zero.low == zero.high == 0
    with pytest.raises(ValueError, match='nothing to predict'):
        lds(torch.ones(20), additive(torch.zeros(20, 2).double(), half_subsets(20, 8)))


def test_influence_scores_are_put_in_order():
    effect = effects(20, 1, 0)[:, 0]
    measured, order = additive(effect[:, None], half_subsets(20, 10)), torch.randperm(20)
    made = lambda values, index: InfluenceScores(values, index, 'mean', 0.1, 0.0, 0, {})
    assert lds(made(effect[order], order), measured).value == pytest.approx(1)
    with pytest.raises(ValueError, match='index is not 0..19'):
        lds(made(effect, torch.arange(20) + 5), measured)


def test_unfit_scores_are_named():
    measured = additive(effects(20, 3, 0), half_subsets(20, 10))
    for scores, what in (
        (torch.ones(20, 2), r'\(n, 3\)'),
        (torch.ones(()), r'scores are \(\)'),
        (torch.ones(10), '10 of them.*row 19'),
        (torch.full((20,), math.nan), 'not finite'),
    ):
        with pytest.raises(ValueError, match=what):
            lds(scores, measured)
    with pytest.raises(ValueError, match='3 subsets are too few'):
        lds(torch.ones(20), additive(effects(20, 3, 0), half_subsets(20, 3)))
    for c in (0, 1):
        with pytest.raises(ValueError, match='confidence is'):
            lds(torch.ones(20), measured, confidence=c)
    with pytest.raises(ValueError, match='bootstrap is 0'):
        lds(torch.ones(20), measured, bootstrap=0)


# The ceiling


def test_without_noise_the_ceiling_is_one():
    found = lds_ceiling(additive(effects(20, 3, 0), half_subsets(20, 10), seeds=range(3)))
    assert isinstance(
        found, Ceiling
    ) and found.mean == found.per_query == found.reliability_mean == pytest.approx(1)


def test_noise_alone_has_a_low_ceiling():
    found = lds_ceiling(
        additive(torch.zeros(40, 30, dtype=torch.float64), half_subsets(40, 40), 1.0, range(4))
    )
    # all subsets share a seed's stream, and the noise with it: none is left, nothing varies
    assert math.isnan(found.mean)
    noise = torch.randn(40, 4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (
        lds_ceiling(
            RetrainedLosses(noise, tuple(half_subsets(40, 40)), tuple(range(4)))
        ).reliability_per_query
        < 0.25
    )


@pytest.mark.parametrize('count', [2, 3, 4, 5])
def test_ceiling_is_what_the_truth_reaches(count):
    "With noise of known size: the score of the true effects is near the ceiling, which also for an odd number of seeds extrapolates to all of them."
    effect, subsets = effects(100, 20, 1), half_subsets(100, 120)
    noise = torch.randn(120, count, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 8
    measured = RetrainedLosses(
        -torch.stack([effect[s].sum(0) for s in subsets])[:, None] + noise,
        tuple(subsets),
        tuple(range(count)),
    )
    found, true = lds_ceiling(measured), lds(effect, measured, bootstrap=10).value
    expected = (25 / (25 + 64 / count)) ** 0.5  # variance of the sum over a half: 100/4
    assert abs(found.per_query - true) < 0.06 and abs(found.per_query - expected) < 0.08
    assert found.reliability_per_query == pytest.approx(found.per_query**2, abs=0.05) and found.seeds == count


def test_ceiling_needs_two_seeds_and_some_subsets():
    with pytest.raises(ValueError, match='one seed.*two or more'):
        lds_ceiling(additive(effects(20, 3, 0), half_subsets(20, 10)))
    with pytest.raises(ValueError, match='too few'):
        lds_ceiling(additive(effects(20, 3, 0), half_subsets(20, 3), seeds=(0, 1)))


# Leave one out


def test_leave_one_out(fit, tmp_path):
    effect, log = effects(9, 4, 0), tmp_path / 'log'
    found = loo_scores(
        lambda rows, seed: seed * rows[0] * 0.01 - effect[rows].sum(0),
        9,
        torch.tensor([5, 2]),
        seeds=(0, 1, 2),
        progress=False,
    )
    assert torch.allclose(found.per_query, 9 * effect[[5, 2]]) and torch.allclose(
        found.values, 9 * effect[[5, 2]].mean(1)
    )
    assert found.left_out.tolist() == [5, 2] and len(found) == 2 and (found.standard_error < 1e-9).all()
    assert loo_scores(
        lambda rows, seed: seed * rows.double().sum()[None], 9, [8], seeds=(0, 1), progress=False
    ).standard_error == pytest.approx(9 * 8 / 2)
    every = loo_scores(partial(fit, log=str(log)), 5, folder=tmp_path / 'loo', key=KEY, progress=False)
    assert (
        every.left_out.tolist() == [0, 1, 2, 3, 4]
        and every.standard_error.isnan().all()
        and len(lines(log)) == 6
    )
    two = loo_scores(
        partial(fit, log=str(log)), 5, seeds=(0, 1), folder=tmp_path / 'loo', key=KEY, progress=False
    )
    assert len(lines(log)) == 12 and torch.isfinite(two.standard_error).all()


def test_leave_one_out_names_what_is_unfit(fit):
    for left, what in (
        ([5], 'row 5 of 5'),
        ([], 'left_out is'),
        ([-1], 'left_out is'),
        ([0.5], 'left_out is'),
    ):
        with pytest.raises(ValueError, match=what):
            loo_scores(fit, 5, torch.tensor(left), progress=False)
    for n in (1, None, 2.5):
        with pytest.raises(ValueError, match='n is'):
            loo_scores(fit, n, progress=False)


def test_results_display():
    measured = additive(effects(20, 3, 0), half_subsets(20, 10), seeds=(0, 1))
    for found, what in (
        (lds(effects(20, 3, 1), measured), '95% interval.*average over 3 queries, 10 subsets × 2 seeds'),
        (lds_ceiling(measured), 'Attainable LDS.*per query'),
        (loo_scores(lambda r, s: torch.ones(1) * len(r), 4, progress=False), '4 of 4 samples'),
    ):
        assert (
            re.search(what, found._repr_markdown_().replace('\n', ' '))
            and repr(found) == found._repr_markdown_()
        )
    assert isinstance(lds(torch.arange(20.0), measured), LDS) and isinstance(
        loo_scores(lambda r, s: torch.ones(1), 3, progress=False), LeaveOneOut
    )
    assert type(lds(torch.arange(20.0), measured).value) is float
