"Names from outside are shown as they are: in Markdown, in pages and in figures."

from dataclasses import replace

import pytest
import torch
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt

from kd_aif.data.sources import load_images
from kd_aif.data.texts import TextData
from kd_aif.foundation.reprs import markdown_text
from kd_aif.reporting.figures import figure_text, new_figure, small_texts
from kd_aif.reporting.html import html_report
from kd_aif.reporting.image_plots import helpful_images
from kd_aif.reporting.records import make_record, markdown_table
from kd_aif.reporting.report import about_section, report_sections

NAMES = (
    'a|b',
    'from $5 to $x^$',
    '<script>alert(1)</script>',
    'back\\slash \\alpha \\|',
    'two\nlines',
    '`code` and *stars*',
    '[here](http://example.org)',
    '&lt; & <b',
)
ALL = ' '.join(NAMES)


def rendered(markdown):
    return BeautifulSoup(
        MarkdownIt('commonmark', {'html': True}).enable('table').render(markdown), 'html.parser'
    )


def one_line(name):
    return ' '.join(name.split())


@pytest.mark.parametrize('name', NAMES)
def test_markdown_shows_the_name(name):
    page = rendered(markdown_table([markdown_text(name), 'n'], [[markdown_text(name), '1']]))
    assert [cell.get_text() for cell in page(['th', 'td'])] == [one_line(name), 'n', one_line(name), '1']
    assert not page(['script', 'b', 'a', 'code', 'em'])


def test_a_cell_that_was_not_escaped_stays_one_cell():
    page = rendered(markdown_table(['a', 'b'], [['1|2', 'x\ny'], ['1\\|2', 'z']]))
    assert [cell.get_text() for cell in page('td')] == ['1|2', 'x y', '1|2', 'z']


def classes():
    return tuple(f'{k} {name}' for k, name in enumerate((*NAMES, 'i', 'j')))


def images():
    return replace(load_images('digits').select(torch.arange(12)), classes=classes(), name=ALL, note=ALL)


def texts():
    y = torch.arange(10)
    return TextData(NAMES + ('i', 'j'), y, y, y, classes(), ALL, 'train', '0')


@pytest.mark.parametrize('make', [images, texts])
def test_classes_are_columns(make):
    page = rendered(make()._repr_markdown_())
    assert [cell.get_text() for cell in page('th')] == [one_line(c) for c in classes()]
    assert page.p.get_text().startswith(one_line(ALL)) and not page(['script', 'b', 'a', 'code'])


def records():
    fields = dict(experiment='names', tier='smoke', teacher=ALL, student=ALL, seconds=dict(student=1.0))
    data, histogram = dict(name=ALL, note=ALL), dict(edges=[0, 1, 2], clean=[3, 1], wrong=[1, 2])
    metrics = dict(weight_histogram=histogram, roc=dict(fpr=[0, 1], tpr=[0, 1]), weight_auc=0.5)
    return [
        make_record(
            **fields,
            dataset=data,
            method=method,
            seed=seed,
            config=dict(augment=text),
            metrics=metrics | dict(test_accuracy=0.5 + seed / 10),
        )
        for method, texts in (('kd', ('',)), ('kd_aif_both', NAMES[:2] + (ALL,)))
        for text in texts
        for seed in range(2)
    ]


def test_a_report_shows_names_and_runs_nothing(tmp_path):
    found = records()
    sections = [about_section(len(found), ALL), *report_sections(found), ('Record', found[:1])]
    path = html_report(tmp_path / 'page.html', ALL, sections)
    page = BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')
    assert page.h1.get_text() == ALL and not page(['script', 'b', 'em'])
    assert len(page('img')) == 2 and not page.find_all('a', href='http://example.org')
    assert {len(row(['th', 'td'])) for row in page.find('table')('tr')} == {5}
    assert one_line(ALL) in one_line(page.get_text())


def test_figures_show_names():
    figure = helpful_images(images(), torch.arange(12.0), k=12)
    figure.draw_without_rendering()
    shown = [text.get_text() for text in figure.findobj() if hasattr(text, 'get_text')]
    assert any('from \\$5 to \\$x^\\$' in text for text in shown)
    drawn = new_figure(4, 3, 'Names')
    drawn.subplots().set_title(figure_text('from $5 to $x^$'), fontsize=9)
    assert small_texts(drawn) == {}  # no formula, so nothing of it is small
