"Figures: text that can be read at the size shown, methods in order, captions from records."

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest

import kd_aif.experiments.methods  # noqa: F401  registers the methods
from kd_aif.reporting.captions import figure_caption, seeds_text
from kd_aif.reporting.dot_plots import beside_dots, DotRow, draw_dots, method_row, sorted_rows, stacked_dots
from kd_aif.reporting.figures import new_figure, PAGE, save_figure, small_texts
from kd_aif.reporting.paired import paired_difference
from kd_aif.reporting.palette import method_style
from kd_aif.reporting.records import make_record
from kd_aif.reporting.summary import summary_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / 'nbs' / '10_experiments').glob('2[0-9]*.ipynb'))


def figure(width=4, **sizes):
    "A figure with a title, ticks and a legend; `sizes` are those of its texts"
    f = new_figure(width, 2.5)
    ax = f.subplots()
    ax.plot([0, 1], label='a line')
    ax.set_title('title', fontsize=sizes.get('title', 10))
    ax.tick_params(labelsize=sizes.get('ticks', 10))
    ax.legend(fontsize=sizes.get('legend', 10))
    ax.text(0.5, 0.5, 'words', fontsize=sizes.get('text', 10))
    return f


@pytest.mark.parametrize('place, text', dict(title='title', legend='a line', text='words', ticks='0.0').items())
def test_small_text_is_found_wherever_it_stands(place, text, tmp_path):
    assert small_texts(figure()) == {} and text in small_texts(figure(**{place: 7}))
    with pytest.raises(ValueError, match='a.png shows .* at 7.0 points'):
        save_figure(figure(**{place: 7}), tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())
    save_figure(figure(**{place: 8}), tmp_path / 'a.png')


def test_text_that_shrinks_with_its_figure_is_found():
    assert small_texts(figure(9)) == {} and small_texts(figure(9, title=8)) == {}
    assert small_texts(figure(12, title=9)).keys() == {'title', *small_texts(figure(12))}
    assert small_texts(figure(), dpi=72)['title'] == 7.5


def test_exponents_count_and_hidden_text_does_not():
    f = figure(title=10)
    f.axes[0].set_title('$10^{-3}$', fontsize=10)
    assert small_texts(f) == {'$10^{-3}$': 7.0}
    f = figure(ticks=5)
    f.axes[0].axis('off')
    assert small_texts(f) == {}
    f = figure(title=5)
    f.axes[0].title.set_visible(False)
    assert small_texts(f) == {}


def test_kept_figures_fit_a_page():
    for path in sorted((ROOT / 'reports' / 'figures').glob('*.png')):
        height, width = plt.imread(path).shape[:2]
        assert width <= PAGE and path.stat().st_size <= 150_000, path.name
        assert height <= 1.6 * PAGE, f'{path.name} is {height} pixels high'


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_pages_take_colours_from_the_palette(path):
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source']) if cell['cell_type'] == 'code' else ''
        assert not re.search(r"color_palette|\btab(10|20)\b|'C\d'", source), source
        assert not re.search(r'\.savefig\(|fontsize=[1-7]\b|labelsize=[1-7]\b', source), source


def cut_cells(text):
    "Cells of tables that pandas has cut off"
    return re.findall(r'<td>[^<]*\.\.\.</td>|<t[dh]>\.\.\.</t[dh]>', text)


@pytest.mark.parametrize('path', [p for p in PAGES if p.stem != '23b_own_sentences'], ids=lambda p: p.stem)
def test_no_number_or_name_of_a_table_is_cut_off(path):
    "Sentences of the page that is left out are shortened on purpose"
    assert not cut_cells(path.read_text(encoding='utf-8'))


def test_long_cells_of_summaries_are_whole():
    long = 'KD-AIF, student, a label that is longer than fifty characters of pandas'
    table = summary_table([record('kd', s) for s in range(2)])
    table.rows[0]['label'] = long
    assert f'<td>{long}</td>' in table._repr_html_() and cut_cells('<td>0.758 and 0...</td>')


def test_rows_are_sorted_and_intervals_do_not_hide_dots():
    wide = DotRow('b', 2.0, -100.0, 104.0, (1.9, 2.1))
    rows = sorted_rows([DotRow('a', 1.0), wide, DotRow('c', 3.0)])
    assert [r.label for r in rows] == ['c', 'b', 'a']
    ax = draw_dots(new_figure(4, 2).subplots(), rows)
    low, high = ax.get_xlim()
    assert low < 0 and 3 < high < 6, 'dots, the zero line, and some of the interval'
    assert [t.get_text() for t in ax.get_yticklabels()] == ['c', 'b', 'a']
    assert ax.get_ylim() == (2.5, -0.5), 'the first row is at the top'


def test_every_method_of_a_figure_is_named_and_has_its_style():
    gains = {m: method_row(m, float(i), (i - 0.5, i + 0.5)) for i, m in enumerate(('mwn', 'oracle', 'kd_aif_both'))}
    f = beside_dots({'first': {'mwn': gains['mwn']}, 'second': gains}, ['x', 'y'], 'Gains', legend=True)
    names = [t.get_text() for t in f.axes[0].get_yticklabels()]
    assert names == ['KD-AIF, teacher and student', 'oracle', 'Meta-Weight-Net']
    assert [t.get_text() for t in f.axes[0].texts] == ['not run'] * 2 and not small_texts(f)
    drawn = {line.get_color() for line in f.axes[1].lines}
    assert {method_style(m).colour for m in gains} <= drawn and len(f.legends[0].get_texts()) == 3


def test_stacked_panels_have_rows_of_their_own():
    panels = {'a': [DotRow('x', 1.0)], 'b': [DotRow('y', 1.0), DotRow('z', 2.0)]}
    f = stacked_dots(panels, 'points', 'Two panels')
    assert [len(ax.get_yticks()) for ax in f.axes] == [1, 2] and f.get_label() == 'Two panels'
    with pytest.raises(ValueError, match='panels is empty'):
        stacked_dots({}, 'points', '')


def test_a_row_has_the_ends_of_its_interval():
    d = paired_difference(dict(enumerate([1.0, 2.0, 4.0])), dict.fromkeys(range(3), 0.0))
    row = method_row('kd', d)
    assert (row.value, row.low, row.high) == (d.mean, d.low, d.high)
    assert np.isnan(method_row('kd', 1.0).low)


def record(method, seed, test=8372, tier='lite', **noise):
    noise = dict(kind='symmetric', seed=seed, **noise) if noise else dict(kind='none')
    data = dict(name='svhn', rows=dict(train=900, test=test), noise=noise)
    fields = dict(experiment='22_demo', tier=tier, teacher='', student='cnn32', config={})
    return make_record(
        dataset=data,
        method=method,
        seed=seed,
        metrics=dict(test_accuracy=0.5),
        seconds=dict(a=1.0),
        device='cpu',
        **fields,
    )


def test_captions_follow_the_records():
    runs = [record('kd', s) for s in (0, 1, 2)]
    assert figure_caption(runs, 'Accuracy') == '*Accuracy. n = 8,372 test samples; seeds 0 to 2; tier lite.*'
    noisy = [record('kd', s, rate=rate) for rate, n in ((0.2, 1), (0.4, 3)) for s in range(n)]
    assert 'seeds 0 to 2, 1 to 3 of them for each method;' in figure_caption(noisy, 'Accuracy')
    more = [*runs, record('mwn', 4), record('mwn', 5, test=26_032, tier='full')]
    text = figure_caption(more, 'Accuracy', ['oracle'])
    assert 'n = 8,372 to 26,032 test samples' in text and '2 to 3 of them for each method' in text
    assert 'tier full and lite' in text and text.endswith('Not run: oracle.*')
    assert seeds_text([3]) == 'seed 3' and seeds_text([5, 3]) == 'seeds 3, 5'


def test_every_figure_is_listed():
    "reports/figures/README.md has a row for every figure, and none for one that is not there"
    folder = ROOT / 'reports' / 'figures'
    lines = (folder / 'README.md').read_text(encoding='utf-8').splitlines()
    rows = [line for line in lines if line.startswith('| `')]
    patterns = [name for row in rows for name in re.findall(r'`([\w*]+)`', row.split('|')[1])]
    names = [p.stem for p in folder.glob('*.png')]
    assert names and not [n for n in names if not any(fnmatch(n, p) for p in patterns)]
    assert not [p for p in patterns if not any(fnmatch(n, p) for n in names)]
