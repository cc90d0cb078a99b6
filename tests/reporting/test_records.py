"Records: faults of files, properties of identities and of paired differences."

import dataclasses, json, math, os, subprocess, sys
import numpy as np, pytest, torch
from concurrent.futures import ThreadPoolExecutor
from hypothesis import assume, given, settings, strategies as st
from scipy import stats
from kd_aif.reporting.methods import METHODS, method_order
from kd_aif.reporting.records import (
    Setting,
    find_record,
    group_records,
    load_records,
    make_record,
    read_record,
    save_record,
    setting_of,
)
from kd_aif.reporting.tables import (
    metric_by_seed,
    metrics_table,
    paired_difference,
    seconds_table,
    summary_table,
    variants,
)


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
    assert read_record(path) == r and read_record(path).key == r.key and find_record(folder, r) == r


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
        with pytest.raises(ValueError, match='delete this file') as e:
            read()
        assert str(path) in str(e.value)


def test_binary_rubbish_is_named(tmp_path):
    path = save_record(record(), tmp_path)
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='delete this file'):
        load_records(tmp_path)


def test_a_file_in_the_wrong_folder_is_refused(tmp_path):
    path = save_record(record(), tmp_path)
    other = tmp_path / 'test' / 'lite'
    other.mkdir()
    path.rename(other / path.name)
    with pytest.raises(ValueError, match='does not fit its name'):
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
    assert json.loads((save_record(record(), tmp_path)).read_text())['method'] == 'kd'


# ---- tables


@given(st.lists(st.sampled_from([*METHODS, 'mine', 'another'])))
def test_method_order(methods):
    out = method_order(methods)
    known = [m for m in out if m in METHODS]
    assert set(out) == set(methods) and len(out) == len(set(out))
    assert known == [m for m in METHODS if m in methods] and out[: len(known)] == known


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


def test_forms_of_one_method_are_never_pooled():
    rs = [
        record('kd', s, 0.5, config=dict(epochs=e, solver=dict(name='cg'))) for s in range(2) for e in (1, 5)
    ] + [record('ce', s, 0.4, config=dict(epochs=5)) for s in range(2)]
    t = summary_table(rs)
    assert list(t.text.method) == ['Cross-entropy', 'KD (epochs=1)', 'KD (epochs=5)']
    assert list(variants(rs[:4])) == ['epochs=1', 'epochs=5'] and t.text.iloc[0, 3].startswith(
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
