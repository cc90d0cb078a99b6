"Reports: real records of quick runs through notebook 29 and into one HTML file, and faults of what is drawn."

import base64
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt, nbformat, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from nbclient import NotebookClient
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
import kd_aif.experiments.methods  # noqa: F401  registers the methods
from kd_aif.reporting.accuracy_plots import accuracy_bars, accuracy_figure, difference_bars
from kd_aif.reporting.conclusions import conclude
from kd_aif.reporting.html import html_report, LIMIT
from kd_aif.reporting.image_plots import image_grid
from kd_aif.reporting.printing import draw_sections
from kd_aif.reporting.record_files import load_records, save_record
from kd_aif.reporting.records import headline_score, Setting, make_record
from kd_aif.reporting.report import report_sections, setting_items
from kd_aif.reporting.summary import summary_table
from kd_aif.reporting.weight_plots import detector_roc, weight_diagnostics, weight_histogram, weights_figure


NOTEBOOK = Path(__file__).parents[2] / 'nbs' / '10_experiments' / '29_all_runs.ipynb'
X, Y = load_digits(return_X_y=True)
X = X / 16


def quick_run(method, seed, rate):
    """A logistic regression on noisy digits, filed under a setting that notebook 29 expects.

    'kd_aif_student' weighs samples by what a first fit thinks of their labels."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(X))
    train, test = order[:600], order[600:1200]
    y = Y[train].copy()
    hit = rng.permutation(600)[: round(rate * 600)]
    y[hit] = rng.integers(0, 10, len(hit))
    wrong = y != Y[train]
    model = LogisticRegression(C=0.05, max_iter=300).fit(X[train], y)
    extra = {}
    if method == 'kd_aif_student':
        w = model.predict_proba(X[train])[np.arange(600), y]
        w = w / w.mean()
        model = LogisticRegression(C=0.05, max_iter=300).fit(X[train], y, sample_weight=w)
        extra = weight_diagnostics(w, wrong)
    noise = dict(kind='symmetric', rate=rate, seed=seed) if rate else dict(kind='none')
    return make_record(
        experiment='cifar10_noise',
        tier='lite',
        dataset=dict(name='cifar10', rows=dict(train=600), noise=noise),
        method=method,
        teacher='',
        student='logistic',
        seed=seed,
        config=dict(C=0.05),
        metrics=dict(
            test_accuracy=model.score(X[test], Y[test]), true_clean_fraction=1 - wrong.mean(), **extra
        ),
        seconds=dict(student=0.1),
        device='cpu',
    )


@pytest.fixture(scope='module')
def records():
    return [quick_run(m, s, rate) for m in ('kd', 'kd_aif_student') for rate in (0.4, 0.0) for s in range(2)]


@pytest.fixture(autouse=True)
def inline_figures(monkeypatch):
    monkeypatch.delenv('MPLBACKEND', raising=False)  # the kernel shows figures, as in JupyterLab


def execute_report(folder):
    "Execute notebook 29 in `folder`/nbs and return all its displayed text and its number of figures."
    place = folder / 'nbs' / '10_experiments'
    place.mkdir(parents=True)
    nb = nbformat.read(NOTEBOOK, 4)
    NotebookClient(
        nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(place)}}
    ).execute()
    data = [o['data'] for c in nb.cells if c.cell_type == 'code' for o in c.outputs if 'data' in o]
    return '\n'.join(
        d.get('text/markdown') or d.get('text/html') or d.get('text/plain', '') for d in data
    ), sum('image/png' in d for d in data)


def test_notebook_without_any_record(tmp_path):
    text, figures = execute_report(tmp_path)
    assert figures == 0 and 'No record was found' in text
    assert 'KD on train + validation | not run | 0 | not run | not run' in text
    assert (
        'cifar10_noise · CIFAR-10, symmetric label noise, 40 % · tier lite' in text
        and 'quickstart · digits, symmetric label noise, 30 % · tier smoke' in text
    )


def test_notebook_with_real_records(tmp_path, records):
    for r in records:
        save_record(r, tmp_path / 'reports' / 'results')
    text, figures = execute_report(tmp_path)
    assert figures == 4  # accuracies and weights of two settings
    for rate in (0.4, 0.0):
        values = [
            100 * r.metrics['test_accuracy']
            for r in records
            if r.method == 'kd' and (r.dataset['noise'].get('rate') or 0.0) == rate
        ]
        assert (
            f'| KD | {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} | 2 | (control) | not run |' in text
        )
    assert (
        '| cifar10_noise · CIFAR-10, labels as given · tier lite | 4 '
        '| KD on train + validation; KD-AIF, teacher and student |' in text
    )


def test_notebook_stops_at_a_broken_record(tmp_path, records):
    save_record(records[0], tmp_path / 'reports' / 'results').write_text('{')
    with pytest.raises(Exception, match='is not a readable record'):
        execute_report(tmp_path)


class Page(HTMLParser):
    "Collects headings, addresses, and whether every element is closed."

    void = {'meta', 'img', 'br', 'link', 'input', 'hr'}

    def __init__(self, text):
        super().__init__()
        self.open, self.urls, self.headings, self.alts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)
        self.urls += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action')]
        if tag == 'img':
            self.alts.append(dict(attrs).get('alt'))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == 'h2':
            self.headings.append(data)


def test_html_report_is_one_valid_file_that_loads_nothing(tmp_path, records):
    expected = {Setting('quickstart', 'smoke', 'digits', 'symmetric', 0.3): ['kd']}
    sections = report_sections(records, expected)
    path = html_report(tmp_path / 'sub' / 'report.html', 'A & <B>', sections)
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    assert [p.name for p in path.parent.iterdir()] == ['report.html'] and page.open == []
    assert (
        all(u.startswith(('data:image/png;base64,', '#')) for u in page.urls)
        and 'url(' not in text
        and '@import' not in text
    )
    assert page.headings == [h for h, _ in sections] and len(page.alts) == 4 and all(page.alts)
    assert '<title>A &amp; &lt;B&gt;</title>' in text and 'not run' in text and "default-src 'none'" in text
    assert text == html_report(path, 'A & <B>', report_sections(records, expected)).read_text(
        encoding='utf-8'
    )  # same records, same file


def test_html_report_takes_what_a_user_has(tmp_path):
    ax = plt.figure().add_subplot()
    ax.plot([0, 1])

    class Shown:
        def _repr_markdown_(self):
            return '| a |\n|---|\n| x\\|y |'

    text = html_report(
        tmp_path / 'r.html',
        'T',
        [
            (
                'S',
                [
                    ax,
                    ax.figure,
                    pd.DataFrame({'col': ['<i>']}),
                    Shown(),
                    '<p id="raw">html</p>',
                    'a *b* c_d_e 2 * 3 * 4',
                ],
            )
        ],
    ).read_text()
    assert (
        text.count('<figure ') == 2
        and '&lt;i&gt;' in text
        and '<td>x|y</td>' in text
        and '<p id="raw">' in text
        and '<em>b</em> c_d_e 2 * 3 * 4' in text
    )
    plt.close('all')


def test_html_report_escapes_what_comes_from_outside(tmp_path):
    bad = '<script>x</script>'
    figure = plt.figure(label=f'"{bad}')
    plt.close(figure)
    shown = pd.DataFrame({bad: [bad]})
    text = html_report(
        tmp_path / 'r.html', bad, [(bad, [shown, figure, f'some {bad} ![x](http://x/y.png)'])]
    ).read_text()
    page = Page(text)
    assert (
        '<script' not in text and text.count('&lt;script&gt;') == 7
    )  # title, headings, table, text of the image, paragraph
    assert page.headings == [bad] and page.alts == [f'"{bad}'] and page.open == []


def test_long_pages_list_their_sections(tmp_path):
    sections = [(f'S{i} & more', 'text') for i in range(4)]
    text = html_report(tmp_path / 'r.html', 'T', sections).read_text()
    assert '<li><a href="#s3">S3 &amp; more</a></li>' in text
    assert '<nav>' not in html_report(tmp_path / 'r.html', 'T', sections[:3]).read_text()


def test_a_page_has_a_bound_and_says_which_figures_it_leaves_out(tmp_path, records):
    sections, pictures = draw_sections(report_sections(records), tmp_path / 'r.html')
    whole = html_report(tmp_path / 'r.html', 'T', sections).stat().st_size
    by_size = sorted(pictures, key=lambda p: len(p.png))
    limit = whole - len(by_size[-1].png)  # the picture is longer in the page, so one has to go
    text = html_report(tmp_path / 'r.html', 'T', sections, limit).read_text(encoding='utf-8')
    assert len(text.encode()) <= limit and text.count('<img') == len(pictures) - 1 > 2
    assert by_size[-1].file in text and not any(p.file in text for p in by_size[:-1])
    shown = [
        base64.b64decode(url.partition('base64,')[2]) for url in Page(text).urls if url.startswith('data:')
    ]
    assert set(shown) == {p.png for p in by_size[:-1]}
    for p in pictures:
        assert Image.open(io.BytesIO(p.png)).mode == 'P', 'a palette'


def test_text_beyond_the_bound_is_refused_and_the_old_page_stays(tmp_path, records):
    old = html_report(tmp_path / 'r.html', 'T', [('S', 'old')]).read_text()
    with pytest.raises(ValueError, match='text and tables alone.*fewer runs'):
        html_report(tmp_path / 'r.html', 'T', report_sections(records), limit=5000)
    assert (tmp_path / 'r.html').read_text() == old and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif('KD_AIF_SLOW' not in os.environ, reason='minutes long: KD_AIF_SLOW=1')
def test_all_committed_records_fit_into_a_page(tmp_path):
    results = load_records(NOTEBOOK.parents[2] / 'reports' / 'results')
    scored = [r for r in results if headline_score(r) is not None]
    sections, pictures = draw_sections(report_sections(scored), tmp_path / 'r.html')
    text = html_report(tmp_path / 'r.html', 'T', sections).read_text(encoding='utf-8')
    assert len(text.encode()) < LIMIT == 6_000_000 and text.count('<img') == len(pictures) > 50


def test_a_setting_is_summarised_once(records, monkeypatch):
    "Conclusion, table and figure share one table of accuracies"
    made = []

    def counted(*args, **kwargs):
        made.append(args)
        return summary_table(*args, **kwargs)

    for module in ('report', 'conclusions', 'accuracy_plots'):
        monkeypatch.setattr(f'kd_aif.reporting.{module}.summary_table', counted)
    noisy = [r for r in records if r.dataset['noise'].get('rate')]
    items = setting_items(noisy)
    assert len(made) == 1 and items[0].findings == conclude(noisy).findings


def test_html_report_failure_leaves_the_old_file(tmp_path):
    path = html_report(tmp_path / 'r.html', 'T', [('S', 'old')])
    before = path.read_text()
    with pytest.raises(TypeError, match="section 'S' holds a object"):
        html_report(path, 'T', [('S', [object()])])
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10, width=32), st.booleans()), min_size=1, max_size=200))
def test_diagnostics(samples):
    w, wrong = np.array([x for x, _ in samples]), np.array([b for _, b in samples])
    if not w.any():
        return pytest.raises(ValueError, weight_diagnostics, w, wrong) and None
    d = weight_diagnostics(torch.tensor(w), torch.tensor(wrong))
    assert d == json.loads(json.dumps(d, allow_nan=False))
    h = d['weight_histogram']
    assert sum(h['clean']) == (~wrong).sum() and sum(h['wrong']) == wrong.sum() and len(h['edges']) == 31
    assert 0 < d['effective_sample_size'] <= 1 + 1e-9
    if wrong.all() or not wrong.any():
        assert d['weight_auc'] is None and d['roc'] is None
        return
    assert d['weight_auc'] == pytest.approx(roc_auc_score(~wrong, w))
    fpr, tpr = d['roc']['fpr'], d['roc']['tpr']
    assert (
        len(fpr) == len(tpr) <= 60
        and (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        and fpr == sorted(fpr)
        and tpr == sorted(tpr)
    )


@pytest.mark.parametrize(
    'weights,wrong,message',
    [
        ([1.0, -1.0], None, 'at least 0'),
        ([0.0, 0.0], None, 'not all 0'),
        ([], None, 'weights has shape'),
        ([[1.0]], None, 'weights has shape'),
        ([1.0, float('inf')], None, 'not finite'),
        ([1.0, 1.0], [True], 'is_noisy has 1 values and weights 2'),
    ],
)
def test_unfit_weights_are_named(weights, wrong, message):
    for f in (weight_diagnostics, weight_histogram):
        with pytest.raises(ValueError, match=message):
            f(weights, wrong)


@pytest.mark.parametrize(
    'images',
    [np.zeros((2, 4, 8, 8), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((2, 1, 8, 8), np.float32)],
)
def test_unfit_images_are_named(images):
    with pytest.raises(ValueError, match='pass uint8 of shape'):
        image_grid(images)


def test_images_are_drawn_unchanged():
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    figure = image_grid(x, ncols=3)
    drawn = [a.images[0].get_array() for a in figure.axes if a.images]
    assert len(drawn) == 5 and np.array_equal(drawn[4], x[4].permute(1, 2, 0))


def test_figures_refuse_mixed_settings(records):
    for f in (accuracy_bars, difference_bars, accuracy_figure):
        with pytest.raises(ValueError, match='records mix'):
            f(records)
    with pytest.raises(ValueError, match='curves is empty'):
        detector_roc({})


def test_axes_that_are_passed_are_used(records):
    figure, axes = plt.subplots(3)
    noisy = [r for r in records if r.dataset['noise'].get('rate')]
    before = plt.get_fignums()
    assert (
        accuracy_bars(noisy, ax=axes[0]) is axes[0]
        and difference_bars(noisy, 'kd', ax=axes[1]) is axes[1]
        and weight_histogram([1.0, 2.0], ax=axes[2]) is axes[2]
    )
    accuracy_figure(noisy)
    weights_figure(noisy)
    assert plt.get_fignums() == before
    plt.close('all')
