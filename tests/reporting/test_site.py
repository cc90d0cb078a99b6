"The site: links lead somewhere, code is never cut off, figures have a description."

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from kd_aif.experiments.cli import kd_aif_report
from kd_aif.reporting.outline import read_outline
from kd_aif.reporting.page_bodies import mathml, page_body, page_link
from kd_aif.reporting.quarto import linked_prose
from kd_aif.reporting.site import llms_text, style_sheet, write_site

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / 'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CODE = re.compile(r'```.*?```|`[^`\n]*`', re.DOTALL)
MARKDOWN_LINK = re.compile(r'\]\(([^)\s]+)\)')


class Reader(HTMLParser):
    "What a page links to, its anchors, and its images"

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.images, self.scripts = [], set(), [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        self.anchors |= {attrs['id']} if 'id' in attrs else set()
        self.images += [attrs] if tag == 'img' else []
        self.scripts += tag == 'script'


def relative(target):
    return not re.match(r'[a-z][a-z0-9+.-]*:|//', target, re.IGNORECASE)


def dead_notebook_links(path, text):
    "Links of a markdown text beside a notebook that lead to no file"
    targets = [t.partition('#')[0] for t in MARKDOWN_LINK.findall(CODE.sub('', text)) if relative(t)]
    return [t for t in targets if t and not (path.parent / t).exists()]


def dead_site_links(site, listed=frozenset()):
    "Links of the pages of a folder to files and anchors that are not there; `listed` need not be rendered"
    pages = {p.resolve(): Reader(p.read_text(encoding='utf-8')) for p in Path(site).rglob('*.html')}
    found = []
    for path, page in pages.items():
        for target in filter(relative, page.links):
            name, _, anchor = unquote(target).partition('#')
            file = (path.parent / name).resolve() if name else path
            gone = not file.exists() and file.relative_to(Path(site).resolve()).as_posix() not in listed
            if gone or (anchor and file in pages and anchor not in pages[file].anchors):
                found.append(f'{path.name}: {target}')
    return found


def clipping_rules(style):
    "Rules for code in a style sheet under which long lines are cut off"
    rules = re.findall(r'([^{}]+)\{([^{}]*)\}', re.sub(r'/\*.*?\*/', '', style, flags=re.DOTALL))
    code = [(s.strip(), body) for s, body in rules if re.search(r'\b(pre|code)\b|\.highlight', s)]
    return [s for s, body in code if re.search(r'overflow(-x)?:\s*(hidden|clip)|text-overflow', body)]


def declared(style, selector):
    "What a style sheet says of one selector"
    rules = re.findall(r'([^{}]+)\{([^{}]*)\}', re.sub(r'/\*.*?\*/', '', style, flags=re.DOTALL))
    return ' '.join(body for s, body in rules if selector in [part.strip() for part in s.split(',')])


# notebooks


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_links_of_notebooks_lead_to_files(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert dead_notebook_links(path, text) == []


def test_a_dead_link_of_a_notebook_is_found():
    text = 'See [a](none.ipynb#x), [b](index.ipynb), [c](https://example.org), [d](#e) and `x[0](z)`.'
    assert dead_notebook_links(NBS / 'index.ipynb', text) == ['none.ipynb']


def test_the_bar_leads_to_pages_of_the_outline():
    outline = read_outline(NBS)
    entries = [item for entry in outline.navbar for item in entry.get('menu', [entry])]
    targets = {e['href'].partition('#')[0] for e in entries if relative(e['href'])}
    assert targets <= {page.path for page in outline.pages} and len(targets) > 20
    assert [e['text'] for e in outline.navbar] == [
        'Get started', 'Tutorials', 'Explanations', 'API', 'Results', 'Repository',
    ]  # fmt: skip


# rendered pages


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Three pages, with the links of all"
    folder = tmp_path_factory.mktemp('site')
    only = 'index.ipynb', '01_foundation/03_losses.ipynb', '10_experiments/25_speed_and_fidelity.ipynb'
    write_site(folder, NBS, only=only)
    return folder


def test_rendered_links(site):
    listed = {page.html for page in read_outline(NBS).pages}
    assert dead_site_links(site, listed) == []
    assert len(dead_site_links(site)) > 100, 'pages that were not rendered are seen as missing'
    texts = [p.read_text(encoding='utf-8') for p in site.rglob('*.html')]
    assert not [t for text in texts for t in Reader(text).links if relative(t) and '.ipynb' in t]


def test_a_dead_anchor_is_found(tmp_path):
    (tmp_path / 'a.html').write_text('<a href="b.html#there">x</a><a href="b.html#gone">x</a>')
    (tmp_path / 'b.html').write_text('<h2 id="there">There</h2>')
    assert dead_site_links(tmp_path) == ['a.html: b.html#gone']


def test_images_are_described_and_nothing_is_fetched(site):
    pages = [Reader(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')]
    images = [image for page in pages for image in page.images]
    assert images and all(len(image.get('alt', '')) > 15 for image in images)
    assert not [image['src'] for image in images if not relative(image['src'])]
    assert not any(page.scripts for page in pages)


def test_code_of_results_is_folded_and_tables_have_boxes(site):
    results = (site / '10_experiments' / '25_speed_and_fidelity.html').read_text(encoding='utf-8')
    module = (site / '01_foundation' / '03_losses.html').read_text(encoding='utf-8')
    assert results.count('class="input_area"') == results.count('<details class="fold">') > 3
    assert '<details class="fold"><summary>Imports</summary>' in module and '<math' in module
    assert module.count('class="input_area"') > module.count('<details class="fold">') + 3
    assert results.count('<table') == len(re.findall(r'class="table" tabindex="0">\s*<table', results)) > 3
    assert 'kd_aif.foundation.losses' in module and '#|' not in module


def test_code_is_not_clipped():
    quarto = (NBS / 'styles.css').read_text(encoding='utf-8')
    assert clipping_rules(style_sheet()) == clipping_rules(quarto) == []
    assert 'pre-wrap' in declared(style_sheet(), '.highlight pre')
    assert 'overflow-x: auto' in declared(style_sheet(), '.output pre')
    assert 'pre-wrap' in declared(quarto, 'pre.sourceCode code')
    assert 'overflow-x: auto' in declared(quarto, '.cell-output pre')
    assert 'overflow-x: auto' in declared(style_sheet(), '.table') and 'auto' in declared(
        quarto, 'main table'
    )
    assert clipping_rules('pre { overflow: hidden }') == ['pre']


def test_tables_have_one_look():
    "Also those of pandas, whose border attribute draws a grid; words in code are not taken apart, headings wrap"
    style = style_sheet()
    assert 'border: 0' in declared(style, 'table') and 'border: 0' in declared(style, 'td')
    assert 'overflow-wrap: normal' in declared(style, 'td code')
    assert 'white-space: normal' in declared(style, '.output thead th')


CLIPPED = """<script>addEventListener('load', () => {
const cut = [...document.querySelectorAll('pre, .table')].filter(e => {
  for (let d = e.parentElement; d; d = d.parentElement) if (d.tagName == 'DETAILS') d.open = true
  return e.scrollWidth > e.clientWidth + 1 && !['auto', 'scroll'].includes(getComputedStyle(e).overflowX) })
const wide = document.documentElement.scrollWidth - innerWidth
document.body.innerHTML = `<p id="measured">${wide} ${cut.length}</p>` })</script>"""


def measured(page, width):
    "Pixels beyond the window, and how many boxes cut off their content, as a browser shows a page"
    probe = page.with_name('probe.html')
    probe.write_text(
        page.read_text(encoding='utf-8').replace('</body>', CLIPPED + '</body>'), encoding='utf-8'
    )
    command = [
        'chromium',
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        f'--window-size={width},900',
        '--dump-dom',
    ]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120)
    probe.unlink()
    found = re.search(r'id="measured">(-?\d+) (\d+)<', done.stdout)
    assert found, done.stderr[-500:]
    return int(found[1]), int(found[2])


browser = pytest.mark.skipif(not shutil.which('chromium'), reason='Chromium is not installed')


@browser
@pytest.mark.parametrize('width', [1280, 500])
@pytest.mark.parametrize('name', ['index', '10_experiments/25_speed_and_fidelity'])
def test_a_browser_clips_nothing(width, name, site):
    beyond, cut = measured(site / f'{name}.html', width)
    assert beyond <= 0 and cut == 0


@browser
def test_clipped_code_is_found(tmp_path):
    line = 'x' * 500
    page = tmp_path / 'a.html'
    page.write_text(f'<body><pre style="overflow: hidden">{line}</pre></body>')
    assert measured(page, 800)[1] == 1
    page.write_text(f'<body><pre>{line}</pre></body>')
    assert measured(page, 800)[0] > 100


def test_llms_text_lists_every_page():
    outline = read_outline(NBS)
    lines = re.findall(r'^- \[(.+)\]\((.+)\): (.+)$', llms_text(outline), re.MULTILINE)
    assert [line[1] for line in lines] == [page.html for page in outline.pages]
    assert all(title and len(sentence) > 10 for title, _, sentence in lines)


@pytest.mark.skipif('KD_AIF_SLOW' not in os.environ, reason='minutes long: KD_AIF_SLOW=1')
def test_the_whole_site(tmp_path):
    pages = write_site(tmp_path, NBS)
    assert len(pages) == len(NOTEBOOKS) and dead_site_links(tmp_path) == []


# small notebooks


@pytest.fixture
def small(tmp_path):
    "A folder of notebooks with one page, and a function that renders cells as that page"
    folder = tmp_path / 'nbs'
    folder.mkdir()
    for name in ('_quarto.yml', 'nbdev.yml'):
        shutil.copy(NBS / name, folder)
    (folder / 'sidebar.yml').write_text('website:\n  sidebar:\n    contents: [a.ipynb]\n')

    def render(*cells):
        first = nbformat.v4.new_markdown_cell('# A page\n\n> What it is for')
        nbformat.write(nbformat.v4.new_notebook(cells=[first, *cells]), folder / 'a.ipynb')
        return page_body(folder, read_outline(folder).pages[0], 'https://example.org/blob/main').html

    return render


def test_cells_that_are_not_for_readers(small):
    code, stream = nbformat.v4.new_code_cell, nbformat.v4.new_output
    shown = small(
        code('#| hide\nsecret = 1'),
        code('#| echo: false\nunseen', outputs=[stream('stream', name='stdout', text='printed')]),
        code('x', outputs=[stream('stream', name='stderr', text='a warning')]),
    )
    assert 'printed' in shown and not re.search('secret|unseen|warning', shown)


def test_markup_in_code_and_formulas_is_escaped(small):
    text = nbformat.v4.new_markdown_cell('For $a < b$ and `$x$` see [c](a.ipynb#d).\n\n$$x_i\n\\in A$$')
    shown = small(nbformat.v4.new_code_cell('"<b>&amp;</b>"'), text)
    assert '<b>' not in shown and '&lt;b&gt;' in shown
    assert shown.count('<math') == 2 and '<code>$x$</code>' in shown and 'a.html#d' in shown


def test_formulas_that_pandoc_cannot_read_stay_readable():
    (shown,) = mathml([r'$\nosuchcommand{x}$'])
    assert 'nosuchcommand' in shown


def test_links_beyond_the_notebooks_lead_to_the_repository():
    assert page_link('../../data/README.md', '02_data/01_images.ipynb', 'S') == 'S/data/README.md'
    assert page_link('mailto:a@b.org', 'a.ipynb', 'S') == 'mailto:a@b.org'


def test_links_stay_out_of_signatures():
    text = '```python\nf(run,  # a `Run`\n)\n```\nGives a `Run`.'
    assert linked_prose(text, lambda line: line.replace('`Run`', 'LINK')).count('LINK') == 1


# faults


def test_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        kd_aif_report(site='pages')
    message = capsys.readouterr().err
    assert left.value.code == 2 and 'source checkout' in message and not Path('pages').exists()


def test_without_nbconvert(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'nbconvert', None)
    with pytest.raises(ImportError, match=r'pip install "kd_aif\[dev\]"'):
        write_site(tmp_path, NBS, only=['index.ipynb'])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        kd_aif_report(site=str(tmp_path / 'pages'))
    assert 'pip install "kd_aif[dev]"' in capsys.readouterr().err


def test_a_page_that_is_listed_and_missing(small, tmp_path):
    with pytest.raises(ValueError, match='a.ipynb, which is not in'):
        read_outline(tmp_path / 'nbs')


def test_nbdev_leaves_the_readme_alone():
    from nbdev.config import get_config
    from nbdev.quarto import _doc_mtime_not_older

    config = get_config(path=ROOT)
    assert _doc_mtime_not_older(ROOT / 'README.md', config.nbs_path / config.readme_nb), (
        'nbdev would write it'
    )
    assert not (config.nbs_path / config.readme_nb).exists()
