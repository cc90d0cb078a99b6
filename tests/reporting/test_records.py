"Records: faults of files, properties of identities and of paired differences."

import dataclasses, json, math, os, subprocess, sys
import numpy as np, pytest, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from hypothesis import assume, given, settings, strategies as st
from scipy import stats
import kd_aif.experiments.methods  # noqa: F401  registers the methods
from kd_aif.reporting.forms import method_forms, metric_by_seed, variants
from kd_aif.reporting.labels import p_value_text
from kd_aif.reporting.methods import FAMILIES, METHODS, Method, method, method_label, method_order, register
from kd_aif.reporting.paired import paired_difference
from kd_aif.reporting.record_files import file_lock, find_record, load_records, read_records, save_record
from kd_aif.reporting.records import Setting, group_records, make_record, setting_of
from kd_aif.reporting.summary import summary_table
from kd_aif.reporting.tables import metrics_table, seconds_table

RESULTS = Path(__file__).parents[2] / 'reports' / 'results'


def record(method='kd', seed=0, accuracy=0.5, config=None, noise=None, **fields):
    metrics = {} if accuracy is None else dict(test_accuracy=accuracy)
    return make_record(
        **{
            **dict(
                experiment='test',
                tier='smoke',
                dataset=dict(name='digits', noise=noise or dict(kind='none')),
                method=method,
                teacher='t',
                student='s',
                seed=seed,
                config=config or dict(epochs=1),
                metrics=metrics,
                seconds=dict(student=1.0),
                device='cpu',
            ),
            **fields,
        }
    )


# ---- paired differences

value = st.floats(0, 1, allow_nan=False)
runs = st.dictionaries(st.integers(0, 30), value, max_size=8)


@given(runs, runs, st.sampled_from([0.5, 0.8, 0.95, 0.99]))
def test_interval_is_that_of_scipy(a, b, level):
    common = sorted(set(a) & set(b))
    d = paired_difference(a, b, level)
    assert d.n == len(common)
    if not common:
        assert math.isnan(d.mean)
        return
    x, y = [a[s] for s in common], [b[s] for s in common]
    assert d.mean == pytest.approx(np.mean(np.subtract(x, y)), abs=1e-12)
    if d.n == 1:
        assert math.isnan(d.low) and math.isnan(d.high)
        return
    assume(np.std(np.subtract(x, y)) > 1e-6)  # scipy has no interval for constant differences
    reference = stats.ttest_rel(x, y).confidence_interval(level)
    assert (d.low, d.high) == pytest.approx((reference.low, reference.high), rel=1e-6, abs=1e-12)


@given(runs, runs)
def test_difference_is_antisymmetric(a, b):
    d, e = paired_difference(a, b), paired_difference(b, a)
    assert d.n == e.n
    if d.n > 1:
        assert (d.mean, d.low, d.high) == pytest.approx((-e.mean, -e.high, -e.low), abs=1e-12)


@given(st.lists(value, min_size=2, max_size=8), st.floats(-0.5, 0.5))
def test_what_is_common_to_a_seed_cancels(values, shift):
    a = dict(enumerate(values))
    d = paired_difference({s: v + shift for s, v in a.items()}, a)
    assert (d.low, d.high) == pytest.approx((shift, shift), abs=1e-9)


@pytest.mark.parametrize('level', [0, 1, -0.5, 95])
def test_level_must_be_a_probability(level):
    with pytest.raises(ValueError, match='level is'):
        paired_difference({0: 1.0}, {0: 1.0}, level)


def test_values_must_be_finite():
    with pytest.raises(ValueError, match='finite value'):
        paired_difference({0: 1.0, 1: math.inf}, {0: 1.0, 1: 1.0})


# ---- identity

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
jsonable = st.recursive(
    scalars,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(config=st.dictionaries(st.text(max_size=5), jsonable, max_size=4), seed=st.integers(0, 2**31))
def test_a_record_reads_back_as_it_was(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp('results')
    r = record(config=config, seed=seed)
    path = save_record(r, folder)
    (read,) = read_records(path)
    assert read == r and read.key == r.key and find_record(folder, r) == r


def test_tensors_arrays_tuples_and_what_json_lacks():
    r = record(
        config=dict(a=torch.tensor(2), b=(1, 2)),
        accuracy=np.float32(0.5),
        history=[dict(loss=torch.tensor(float('nan')))],
    )
    assert (
        r.config == dict(a=2, b=[1, 2])
        and r.metrics == dict(test_accuracy=0.5)
        and r.history == [dict(loss=None)]
    )
    assert r.key == record(config=dict(b=[1, 2], a=2)).key  # neither order nor container type matters


def test_key_is_the_same_in_another_process():
    code = (
        "from kd_aif.reporting.records import make_record; print(make_record(experiment='test', tier='smoke', dataset=dict(name='digits', noise=dict(kind='none')), method='kd', "
        "teacher='t', student='s', seed=0, config=dict(epochs=1), metrics={}).key)"
    )
    out = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONHASHSEED': '7'},
        check=True,
    ).stdout
    assert out.strip() == record().key


@pytest.mark.parametrize(
    'field,other',
    [
        ('experiment', 'b'),
        ('tier', 'lite'),
        ('dataset', dict(name='svhn')),
        ('method', 'ce'),
        ('teacher', 'x'),
        ('student', 'x'),
        ('seed', 1),
        ('config', dict(epochs=2)),
    ],
)
def test_each_decision_changes_the_key(field, other):
    assert dataclasses.replace(record(), **{field: other}).key != record().key


@pytest.mark.parametrize(
    'field,other,message',
    [
        ('experiment', 'a/b', 'names a file'),
        ('experiment', '', 'names a file'),
        ('method', '..', 'names a file'),
        ('tier', 'big', 'choose one of smoke, lite, full'),
        ('dataset', {}, "must say its 'name'"),
    ],
)
def test_unfit_values_are_named(field, other, message):
    with pytest.raises(ValueError, match=message):
        record(**{field: other})


@pytest.mark.parametrize(
    'field,other',
    [
        ('seed', '0'),
        ('seed', True),
        ('seed', 1.5),
        ('config', [1]),
        ('metrics', None),
        ('teacher', None),
        ('history', {}),
        ('config', dict(f=len)),
    ],
)
def test_wrong_types_are_named(field, other):
    with pytest.raises(TypeError, match=field):
        record(**{field: other})


def test_missing_and_unknown_fields():
    with pytest.raises(TypeError, match="missing fields \\['experiment'"):
        make_record(tier='smoke')
    with pytest.raises(TypeError, match="unknown fields \\['epochs'\\]"):
        record(epochs=3)


# ---- files


@pytest.mark.parametrize(
    'damage',
    [
        lambda t: '',
        lambda t: t[: len(t) // 2],
        lambda t: '[]',
        lambda t: 'null',
        lambda t: '{}',
        lambda t: t.replace('"seed"', '"sed"'),
        lambda t: t.replace('"seed": 0', '"seed": "0"'),
        lambda t: t.replace('"seed": 0', '"seed": 1'),
        lambda t: t.replace('"epochs": 1', '"epochs": 2'),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, damage):
    path = save_record(record(), tmp_path)
    path.write_text(damage(path.read_text()))
    for read in (lambda: load_records(tmp_path), lambda: find_record(tmp_path, record())):
        with pytest.raises(ValueError, match='delete this line') as e:
            read()
        assert str(path) in str(e.value)


def test_binary_rubbish_is_named(tmp_path):
    path = save_record(record(), tmp_path)
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='delete this line'):
        load_records(tmp_path)


def test_a_file_in_the_wrong_folder_is_refused(tmp_path):
    path = save_record(record(), tmp_path)
    for other in (tmp_path / 'test' / 'lite.jsonl', tmp_path / 'another' / 'smoke.jsonl'):
        other.parent.mkdir(exist_ok=True)
        path = path.rename(other)
        with pytest.raises(ValueError, match='does not fit its file'):
            load_records(tmp_path)


def test_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = save_record(record(), tmp_path)
    before = path.read_text()

    def full(*args, **kwargs):
        raise OSError('no space left on device')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError):
        save_record(record(accuracy=0.9), tmp_path)
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_many_writers_of_one_record(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda a: save_record(record(accuracy=a / 100), tmp_path), range(40)))
    assert len(load_records(tmp_path)) == 1


def test_writers_of_many_records_lose_none(tmp_path):
    code = (
        'import sys; sys.path.insert(0, sys.argv[1]); import test_records as t\n'
        'for s in range(12): t.save_record(t.record("kd", s, seconds=dict(x=int(sys.argv[3]))), sys.argv[2])\n'
        'for s in range(12): t.save_record(t.record("m" + sys.argv[3], s), sys.argv[2])'
    )
    writers = [
        subprocess.Popen([sys.executable, '-c', code, str(Path(__file__).parent), str(tmp_path), str(i)])
        for i in range(3)
    ]
    assert [w.wait() for w in writers] == [0, 0, 0]
    found = load_records(tmp_path)
    assert sorted((r.method, r.seed) for r in found) == sorted(
        (m, s) for m in ('kd', 'm0', 'm1', 'm2') for s in range(12)
    )
    assert [p.name for p in (tmp_path / 'test').iterdir()] == ['smoke.jsonl']


def test_a_reader_sees_whole_files_only(tmp_path):
    save_record(record(), tmp_path)
    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(save_record, record('kd', s), tmp_path) for s in range(1, 30)]
        sizes = [len(load_records(tmp_path)) for _ in range(30)]
        assert all(w.result() for w in writing)
    assert sizes == sorted(sizes) and len(load_records(tmp_path)) == 30


def test_a_line_is_a_run_and_a_run_that_is_made_again_keeps_its_line(tmp_path):
    path = [save_record(record('kd', s), tmp_path) for s in range(3)][0]
    assert path == record().path(tmp_path) == tmp_path / 'test' / 'smoke.jsonl'
    save_record(record('kd', 1, 0.9), tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x['seed'] for x in lines] == [0, 1, 2] and lines[1]['metrics'] == dict(test_accuracy=0.9)
    assert [x['key'] for x in lines] == [record('kd', s).key for s in range(3)]


@pytest.mark.parametrize('bad', ['{"half": ', '', '[]', '\x00'])
def test_bad_lines_among_good_ones_are_named(tmp_path, bad):
    for s in range(4):
        path = save_record(record('kd', s), tmp_path)
    lines = path.read_text().splitlines()
    path.write_text('\n'.join([lines[0], bad, lines[2], lines[3].replace('"seed": 3', '"seed": 4')]) + '\n')
    for read in (lambda: load_records(tmp_path), lambda: find_record(tmp_path, record())):
        with pytest.raises(ValueError, match='line 2, is not a readable record .* lines 4: delete') as e:
            read()
        assert str(path) in str(e.value)


def test_a_run_that_has_ended_is_written_although_another_line_is_broken(tmp_path):
    path = save_record(record(), tmp_path)
    path.write_text('{"broken\n' + path.read_text())
    save_record(record('kd', 1), tmp_path)
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and lines[0] == '{"broken' and json.loads(lines[2])['seed'] == 1


def test_a_run_that_stands_twice_is_refused(tmp_path):
    path = save_record(record(), tmp_path)
    path.write_text(2 * path.read_text())
    with pytest.raises(ValueError, match='line 2, repeats the run'):
        load_records(tmp_path)


def test_locks(tmp_path):
    path = save_record(record(), tmp_path)
    with file_lock(path), pytest.raises(TimeoutError, match='if there is none, delete') as e:
        with file_lock(path, timeout=0.02):
            pass
    assert str(path.with_name('.smoke.jsonl.lock')) in str(e.value)
    for left_behind in ('.smoke.jsonl.lock', '.smoke.jsonl.lock-guard'):  # by processes that died
        path.with_name(left_behind).touch()
        os.utime(path.with_name(left_behind), (0, 0))
    save_record(record('kd', 1), tmp_path)
    assert len(load_records(tmp_path)) == 2 and list(path.parent.iterdir()) == [path]


def test_a_lock_is_released_after_an_error(tmp_path):
    path = save_record(record(), tmp_path)
    with pytest.raises(RuntimeError):
        with file_lock(path):
            raise RuntimeError
    assert list(path.parent.iterdir()) == [path]


def test_committed_records():
    found = load_records(RESULTS)
    assert len(found) >= 817 and len({r.key for r in found}) == len(found)
    old = {'need', 'need_ratio', 'borrow'}
    assert not [r for r in found if old & {*r.config, *r.metrics, *r.seconds}]
    assert not [r for r in found if isinstance(r.config.get('score'), str)]
    benchmarks = {'loop', 'quality', 'ssl_cost', 'last_layers', 'all_layers', 'cleaning', 'explain'}
    benchmarks |= {r.method for r in found if r.experiment == '25_speed_and_fidelity'}
    assert {r.method for r in found if r.method not in METHODS} <= benchmarks


# ---- methods and labels


def test_methods_are_registered_and_replaced_in_place():
    before, new = dict(METHODS), Method('zz_new', 'New', 'weights', settings=('T',))
    try:
        register(new, dataclasses.replace(method('kd'), run=len))
        assert method('kd').run is len and list(METHODS) == [*before, 'zz_new']
        assert method_label('zz_new') == 'New' and method_order(['oracle', 'zz_new', 'ce', 'a']) == [
            'ce',
            'zz_new',
            'oracle',
            'a',
        ]
        assert method('zz_new').uses() == {'T'}
    finally:
        METHODS.clear()
        METHODS.update(before)
    with pytest.raises(ValueError, match="method is 'zz_new'; use one of ce, kd, kd_val"):
        method('zz_new')


@pytest.mark.parametrize('fields', [dict(name='a/b'), dict(name=''), dict(family='magic')])
def test_unfit_methods_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Method(**{**dict(name='a', label='A', family='loss'), **fields})


def test_the_configuration_of_committed_records_has_the_settings_of_the_method():
    varying = 'T', 'alpha', 'beta', 'score', 'pooled_reference', 'extra_weight'
    records = [
        r
        for e in ('20_cifar100', '24_full', '24_memorising', '24_noise_and_shift')
        for r in load_records(RESULTS, e)
    ]
    assert len(records) > 400
    for r in records:
        expected = {k for k in method(r.method).uses() if k != 'extra_weight' or 'extra_weight' in r.config}
        assert {k for k in varying if k in r.config} == expected, r.method
        assert (r.teacher != '') == method(r.method).needs_teacher, r.method
    few = [r for e in ('21_1000_labels', '22_svhn_1k') for r in load_records(RESULTS, e)]
    assert few and all(('mu' in r.config) == ('mu' in method(r.method).uses()) for r in few)


@given(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=3))
def test_no_p_value_is_zero(p, others):
    text = p_value_text(p, *others)
    assert '0.000' not in text and (text == 'p < 0.001' or text.startswith('p = '))


def test_no_label_looks_like_code():
    for group in group_records(load_records(RESULTS)).values():
        if group[0].experiment in ('20_loop_efficiency', '24b_quality', '25_scale', '25_speed_and_fidelity', 'ssl_cost'):
            continue  # their rows are no methods
        labels = [label for label, _, _ in method_forms(group)]
        assert len(labels) == len(set(labels)) and not [x for x in labels if '=' in x or '_' in x]
        assert '=' not in setting_of(group[0]).title


def test_forms_with_the_same_words_are_kept_apart():
    rs = [record('kd', 0, config=dict(lr=lr)) for lr in (0.1, 0.1 + 1e-9)]
    assert list(variants(rs)) == ['learning rate 0.1', 'learning rate 0.1, form 2']


# ---- files, once more


def test_load_filters_and_order(tmp_path):
    for m in ('zeta', 'kd_val', 'ce'):
        for s in (10, 2):
            save_record(record(m, s), tmp_path)
    save_record(record(tier='lite'), tmp_path)
    assert [(r.method, r.seed) for r in load_records(tmp_path, tier='smoke')] == [
        ('ce', 2),
        ('ce', 10),
        ('kd_val', 2),
        ('kd_val', 10),
        ('zeta', 2),
        ('zeta', 10),
    ]
    assert (
        len(load_records(tmp_path)) == 7
        and load_records(tmp_path, experiment='x') == []
        and load_records(tmp_path / 'absent') == []
    )
    last = save_record(record(), tmp_path).read_text().splitlines()[-1]
    assert json.loads(last)['method'] == 'kd'


# ---- tables


@given(st.lists(st.sampled_from([*METHODS, 'mine', 'another'])))
def test_method_order(methods):
    out = method_order(methods)
    known = [m for m in out if m in METHODS]
    by_family = [m.name for f in FAMILIES for m in METHODS.values() if m.family == f]
    assert set(out) == set(methods) and len(out) == len(set(out))
    assert known == [m for m in by_family if m in methods] and out[: len(known)] == known


def test_table_numbers():
    a, b = [0.5, 0.6, 0.7], [0.52, 0.63, 0.71]
    records = [record('kd', s, v) for s, v in enumerate(a)] + [
        record('kd_aif_student', s, v) for s, v in enumerate(b)
    ]
    t = summary_table(records)
    f = t.frame.set_index('method')
    assert f.loc['kd', 'mean'] == pytest.approx(60) and f.loc['kd', 'std'] == pytest.approx(10)
    assert (
        f.loc['kd_aif_student', 'kd_difference'] == pytest.approx(2)
        and f.loc['kd_aif_student', 'kd_pairs'] == 3
    )
    reference = stats.ttest_rel(b, a).confidence_interval()
    assert f.loc['kd_aif_student', 'kd_low'] == pytest.approx(100 * reference.low) and f.loc[
        'kd_aif_student', 'kd_high'
    ] == pytest.approx(100 * reference.high)
    assert t.text.iloc[1].tolist()[4] == 'not run'  # kd_val was not
    assert (
        '| KD-AIF, student | 62.00 ± 9.54 | 3 | +2.00 [' in t._repr_markdown_()
        and '<table' in t._repr_html_()
    )


def test_only_common_seeds_are_compared():
    records = [record('kd', s, 0.5) for s in (0, 1)] + [record('ce', s, 0.4) for s in (1, 2, 3)]
    t = summary_table(records)
    assert t.frame.kd_pairs[0] == 1 and t.text.iloc[0, 3] == '-10.00 [–]' and t.text.iloc[0, 2] == '3'
    assert summary_table([record('kd', 0), record('ce', 5)]).text.iloc[0, 3] == 'no common seed'


@pytest.mark.parametrize(
    'other',
    [
        dict(experiment='b'),
        dict(tier='lite'),
        dict(dataset=dict(name='svhn')),
        dict(noise=dict(kind='symmetric', rate=0.4, seed=0)),
    ],
)
def test_what_must_not_share_a_table(other):
    mixed = [record(), record(seed=1, **other)]
    for table in (summary_table, metrics_table, seconds_table):
        with pytest.raises(ValueError, match='records mix'):
            table(mixed)
    assert len(group_records(mixed)) == 2


def test_the_seed_of_the_noise_does_not_split_a_setting():
    rs = [record(seed=s, noise=dict(kind='symmetric', rate=0.4, seed=s)) for s in range(3)]
    assert list(group_records(rs)) == [Setting('test', 'smoke', 'digits', 'symmetric', 0.4)]
    assert setting_of(record(noise=dict(kind='symmetric', rate=0.0, seed=1))) == setting_of(record())


def test_human_labels_are_named_where_others_have_a_rate():
    rs = [record(noise=dict(kind='human', rate=n)) for n in ('worst', 'aggregate')] + [record()]
    settings = list(group_records(rs))
    assert [(s.noise, s.rate) for s in settings] == [
        ('human', 'aggregate'),
        ('human', 'worst'),
        ('none', 0.0),
    ]
    assert 'digits, human labels (worst)' in settings[1].title
    assert 'human labels (worst)' in summary_table(rs[:1])._repr_markdown_()
    with pytest.raises(ValueError, match='records mix'):
        summary_table(rs[:2])


def test_forms_of_one_method_are_never_pooled():
    rs = [
        record('kd', s, 0.5, config=dict(epochs=e, solver=dict(name='cg'))) for s in range(2) for e in (1, 5)
    ] + [record('ce', s, 0.4, config=dict(epochs=5)) for s in range(2)]
    t = summary_table(rs)
    assert list(t.text.method) == ['Cross-entropy', 'KD (1 epoch)', 'KD (5 epochs)']
    assert list(variants(rs[:4])) == ['1 epoch', '5 epochs'] and t.text.iloc[0, 3].startswith(
        '-10.00'
    )  # compared with five epochs of KD
    with pytest.raises(ValueError, match='two runs of'):
        metric_by_seed(rs[:4])


def test_a_control_that_cannot_be_chosen_is_not_guessed():
    rs = [record('kd', 0, config=dict(T=t)) for t in (1, 4)] + [record('ce', 0, config=dict(epochs=1))]
    assert summary_table(rs).text.iloc[0, 3] == 'several forms'


def test_missing_metric_is_a_dash_and_missing_run_says_so():
    t = summary_table([record(accuracy=None)], expected=['kd_aif_both'])
    assert t.text.iloc[0, 1] == '–' and t.text.iloc[1, 1] == 'not run'
    assert list(metrics_table([record()], ['weight_auc'], expected=['ce']).iloc[:, 1]) == ['not run', '–']
    with pytest.raises(ValueError, match='records is empty'):
        summary_table([])


def test_record_shows_in_a_notebook():
    text = record(
        metrics=dict(test_accuracy=0.5, weight_auc=None, per_class_accuracy=[1.0, 0.0])
    )._repr_markdown_()
    assert '| test_accuracy | 0.5 |' in text and '| weight_auc | – |' in text and 'per_class' not in text
