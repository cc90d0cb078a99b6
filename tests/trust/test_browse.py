"The browse page: what it refuses, what it escapes, and a person at the keyboard"

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kd_aif.benchmarks.page_opening import browser_page, page_opening, pattern_batches
from kd_aif.data.decisions import apply_decisions
from kd_aif.data.sample_marks import text_mark
from kd_aif.data.sample_views import view_texts
from kd_aif.data.text_files import read_texts
from kd_aif.foundation.core import WriteError
from kd_aif.reporting.printing import find_browser
from kd_aif.trust.browse import browse_page, script_json

HOSTILE = '</script><script>window.harm=1</script><img src=x onerror="window.harm=2">\n\'"$x|y$\u2028,{{7*7}}'
NAMES = ('cat', 'with "quotes", and\nlines', HOSTILE)


def table(n=12, names=NAMES, **columns):
    given = [names[i % 3] for i in range(n)]
    predicted = [names[(i + (i % 4 == 0)) % 3] for i in range(n)]
    numbers = dict(score=np.arange(n) - 3.0, loss=np.linspace(3, 0, n), confidence=np.linspace(0.5, 1, n))
    reason = [f'because {HOSTILE}'] * n
    return pd.DataFrame(
        dict(given=given, predicted=predicted, reason=reason) | numbers | columns, range(50, 50 + n)
    )


class Pictures:
    "Batches with views of every mode, one without a picture, and paths"

    def __init__(self, classes=NAMES):
        self.classes = classes

    def view(self, index):
        mode = lambda i: ('RGB', 'L', 'RGBA', 'P', 'CMYK', 'I;16')[i % 6]
        picture = lambda i: None if i == 51 else Image.new(mode(i), (40 + i, 30))
        kind = lambda i: 'none' if i == 51 else 'image'
        return [
            SimpleNamespace(index=i, kind=kind(i), image=picture(i), text='', path=f'{i} {HOSTILE}')
            for i in index
        ]

    def __iter__(self):
        return iter(())


def data_of(page):
    "What the script reads, and the packed pictures"
    found = re.search(
        r'id="data">(.*?)</script>\s*<script type="text/plain" id="images">(.*?)</script>', page, re.S
    )
    return json.loads(found[1]), found[2]


@pytest.mark.parametrize('text', [HOSTILE, '\ud800', '<!--<script', '&lt;', '\0\x7f\u2029', 'ü漢🙂'])
def test_json_in_a_script_element(text):
    found = script_json([text])
    assert json.loads(found) == [text] and found.isascii() and not set('<>&') & set(found)


def test_a_page_holds_everything_and_nothing_acts(tmp_path):
    frame = table(score=[np.nan, np.inf, *range(10)])
    path = browse_page(frame, Pictures(), tmp_path / 'new' / 'page.html', title=HOSTILE)
    page = path.read_text(encoding='utf-8')
    data, packed = data_of(page)
    assert page.count('<script') == 3 and page.count('</script>') == 3 and '<img' not in page
    assert 'http:' not in page and 'https:' not in page and '<link' not in page
    assert data['classes'] == list(NAMES) and data['index'] == [str(i) for i in frame.index]
    assert [data['classes'][i] for i in data['given']] == frame.given.tolist()
    assert data['columns']['score'][:3] == [None, None, 0] and data['columns']['weight'] == [None] * 12
    assert data['sizes'][1] == 0 and sum(data['sizes']) == len(packed) and data['kind'] == 'image'
    assert data['path'][2] == f'52 {HOSTILE}' and data['reason'] == frame.reason.tolist()
    assert '{{7*7}}' in data['path'][0] and '49' not in data['path'][0]


def test_decisions_belong_to_samples_and_labels(tmp_path):
    def key(frame, **options):
        return data_of(browse_page(frame, None, tmp_path / 'p.html', **options).read_text(encoding='utf-8'))[
            0
        ]['key']

    first = key(table())
    assert key(table(score=0.0), title='other') == first
    assert key(table(given=[NAMES[0]] * 12)) != first and key(table(13)) != first
    assert key(table().set_axis(range(12))) != first
    assert key(table(path='a.png')) != first and key(table(text='one')) != first


def test_a_table_from_a_file_keeps_its_stable_indices(tmp_path):
    table().sort_values('score', ascending=False).to_csv(tmp_path / 's.csv', index_label='index')
    read = pd.read_csv(tmp_path / 's.csv')
    for frame in (read, read[read.score < 5]):
        page = browse_page(frame, Pictures(), tmp_path / 'p.html').read_text(encoding='utf-8')
        found = data_of(page)[0]
        assert found['index'] == [str(i) for i in frame['index']] and found['index'][-1] == '50'
        assert found['path'][0].startswith(found['index'][0])


def test_pages_of_different_pictures_have_different_keys(tmp_path):
    def key(shade):
        batches = Pictures()
        picture = Image.new('RGB', (40, 30), (shade, 0, 0))
        batches.view = lambda index: [
            SimpleNamespace(index=i, kind='image', image=picture, text='', path='') for i in index
        ]
        return data_of(browse_page(table(), batches, tmp_path / 'p.html').read_text(encoding='utf-8'))[0][
            'key'
        ]

    assert key(9) == key(9) != key(200)


def test_the_page_knows_which_samples_the_decisions_are_about(tmp_path):
    made = lambda *args: data_of(browse_page(*args, tmp_path / 'p.html').read_text(encoding='utf-8'))[0]
    texts = read_texts((['one', 'two'], ['a', 'b']))
    frame = pd.DataFrame(dict(given=['a', 'b'], predicted=['a', 'a']), [0, 1])
    marks = [text_mark('one'), text_mark('two')]
    assert (made(frame, texts)['mark'], made(frame, texts)['marks']) == ('sample', marks)
    assert made(frame.assign(text=['one', 'two']), None)['marks'] == marks
    assert made(frame.assign(path=['a\\1.png', 'b/2.png']), None)['marks'] == ['a/1.png', 'b/2.png']
    for nothing in (frame, frame.assign(path=['', 'b']), frame.assign(text=[3, 'x'])):
        assert made(nothing, None)['mark'] is None


def test_a_character_that_utf_8_cannot_write(tmp_path):
    texts = read_texts((['\ud800', 'x'], ['a', 'b']))
    frame = pd.DataFrame(dict(given=['a', 'b'], predicted=['a', 'a']), [0, 1])
    page = browse_page(frame, texts, tmp_path / 'p.html', title='\udcff!').read_text(encoding='utf-8')
    assert data_of(page)[0]['text'] == ['\ud800', 'x'] and '<h1>?!</h1>' in page
    shown = pd.DataFrame(view_texts(texts, [0, 1]))
    assert shown.to_csv(index=False).encode() and shown.text[0] == '\ufffd'
    assert data_of(page)[0]['marks'][0] == text_mark(shown.text[0])


def test_numbers_for_classes_and_regressions(tmp_path):
    made = lambda frame: data_of(browse_page(frame, None, tmp_path / 'p.html').read_text(encoding='utf-8'))[0]
    frame = table(given=np.arange(12) % 3, predicted=2)
    assert made(frame)['classes'] == ['0', '1', '2'] and made(frame)['given'][:4] == [0, 1, 2, 0]
    frame = table(given=np.linspace(0, 1, 12), predicted=0.5)
    assert made(frame)['classes'] is None and made(frame)['given'][-1] == 1.0
    texts = read_texts((['one', 'two <b>'], ['a', 'b']))
    frame = pd.DataFrame(dict(given=['a', 'b'], predicted=['a', 'a']), [0, 1])
    data, packed = data_of(browse_page(frame, texts, tmp_path / 'p.html').read_text(encoding='utf-8'))
    assert data['kind'] == 'text' and data['text'] == ['one', 'two <b>'] and packed == ''


BAD = {
    'source': (lambda: ('table',), {}, TypeError, "source is 'table'"),
    'a column': (lambda: (table().drop(columns='given'),), {}, ValueError, "no column 'given'"),
    'another column': (lambda: (table().drop(columns='predicted'),), {}, ValueError, "no column 'predicted'"),
    'no rows': (lambda: (table()[:0],), {}, ValueError, 'no rows'),
    'names for rows': (lambda: (table().set_axis(list('abcdefghijkl')),), {}, TypeError, 'stable indices'),
    'real rows': (lambda: (table().set_axis(np.arange(12) / 2),), {}, TypeError, 'stable indices'),
    'an index in words': (lambda: (table(index='seven'),), {}, ValueError, "column 'index' is"),
    'rows twice in a file': (lambda: (table(index=7),), {}, ValueError, 'index 7 comes more than once'),
    'rows twice': (lambda: (table().set_axis([7] * 12),), {}, ValueError, 'index 7 comes more than once'),
    'missing label': (lambda: (table(given=None),), {}, ValueError, 'lacks a label'),
    'missing number': (lambda: (table(given=np.nan, predicted=1.0),), {}, ValueError, 'lacks a label'),
    'score of words': (lambda: (table(score='high'),), {}, TypeError, "column 'score'"),
    'loss of switches': (lambda: (table(loss=True),), {}, TypeError, "column 'loss'"),
    'unknown label': (
        lambda: (table(),),
        dict(classes=('cat', 'dog')),
        ValueError,
        'not one of the 2 classes',
    ),
    'unknown class of batches': (
        lambda: (table(), Pictures(('cat',))),
        {},
        ValueError,
        'not one of the 1 classes',
    ),
    'negative class': (lambda: (table(given=-1, predicted=0),), {}, ValueError, "label '-1' in 'given'"),
    'huge class': (lambda: (table(given=10**9, predicted=0),), {}, ValueError, "label '1000000000'"),
    'names twice': (lambda: (table(),), dict(classes=(*NAMES, 'cat')), ValueError, "two have the name 'cat'"),
    'a text for names': (lambda: (table(),), dict(classes='cat'), TypeError, 'tuple of strings'),
    'numbers for names': (lambda: (table(),), dict(classes=(1, 2)), TypeError, 'tuple of strings'),
    'other samples': (lambda: (table(), pattern_batches(3)), dict(classes=NAMES), ValueError, 'first 50'),
    'batches': (lambda: (table(), 7), {}, TypeError, 'batches is a int'),
    'path': (lambda: (table(), None, 7), {}, TypeError, 'path is 7'),
    'kind of file': (lambda: (table(), None, 'page.csv'), {}, ValueError, 'ends in .html'),
    'folder': (lambda: (table(), None, '.'), {}, ValueError, 'ends in .html'),
    'title': (lambda: (table(),), dict(title=None), TypeError, 'title is None'),
    'empty title': (lambda: (table(),), dict(title=' '), ValueError, 'title is empty'),
    'size': (lambda: (table(),), dict(size=4), ValueError, 'size is 4'),
    'real size': (lambda: (table(),), dict(size=96.0), ValueError, 'size is 96.0'),
    'quality': (lambda: (table(),), dict(quality=101), ValueError, 'quality is 101'),
    'limit': (lambda: (table(),), dict(limit=0), ValueError, 'limit is 0'),
    'too large': (lambda: (table(),), dict(limit=1000), ValueError, 'give fewer rows'),
}


@pytest.mark.parametrize('args, options, kind, words', BAD.values(), ids=BAD)
def test_pages_that_cannot_be(args, options, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        browse_page(*args(), **options)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / 'file').write_text('old')
    with pytest.raises(WriteError, match='name a folder'):
        browse_page(table(), None, tmp_path / 'file' / 'page.html')
    assert (tmp_path / 'file').read_text() == 'old'


# a person at the keyboard


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
    "A page of pictures in a browser, and what went wrong in it"
    pytest.importorskip('playwright.sync_api')
    if find_browser() is None:
        pytest.skip('no browser of the Chromium family')
    path = browse_page(table(300), Pictures(), tmp_path_factory.mktemp('page') / 'page.html', title=HOSTILE)
    with browser_page(1200, 800) as page:
        faults = []
        page.on('pageerror', lambda error: faults.append(str(error)))
        page.on('console', lambda message: faults.append(message.text))
        page.on(
            'request', lambda request: faults.append(request.url) if request.url.startswith('http') else None
        )
        yield page, path.as_uri(), faults


@pytest.fixture
def page(opened):
    "The page, opened anew, without decisions of an earlier visit"
    page, address, faults = opened
    page.goto(address)
    page.evaluate('localStorage.clear()')
    page.reload()
    page.wait_for_selector('html[data-ready]', state='attached')
    yield page
    assert not faults and page.evaluate('window.harm') is None


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def chosen(page):
    "Stable index of the chosen sample"
    return int(page.locator('#facts dd').first.inner_text())


def exported(page):
    with page.expect_download() as download:
        page.keyboard.press('e')
    assert download.value.suggested_filename == 'decisions.csv'
    return pd.read_csv(download.value.path(), index_col='index', keep_default_na=False)


def test_deciding_by_keyboard(page):
    assert chosen(page) == 50 and page.title().split() == HOSTILE.split()
    press(page, 'a', 'd', 'd', 'u')
    assert chosen(page) == 52
    press(page, 'r')
    page.keyboard.type('QUOTES')
    press(page, 'Enter')
    assert chosen(page) == 53
    press(page, 'r', 'Escape', 'r', 'ArrowDown', 'Enter', 'Home', 'ArrowRight')
    found = exported(page)
    given = table(300).given
    assert found.index.tolist() == [50, 51, 52, 53] and found.given.tolist() == given[:4].tolist()
    assert found.decision.tolist() == ['accept', 'drop', 'relabel', 'relabel']
    assert found.label.tolist() == [NAMES[0], '', NAMES[1], NAMES[2]]
    press(page, 'Delete', 'u', 'u', 'u')
    assert exported(page).decision.tolist() == ['accept', 'drop']


def test_decisions_stay_when_the_page_is_opened_again(page):
    press(page, 'd', 'a')
    page.reload()
    assert exported(page).decision.tolist() == ['drop', 'accept']
    assert page.locator('#decided').inner_text() == '2'


def test_moving_and_only_some_cells(page):
    press(page, 'End')
    assert chosen(page) == 349 and page.locator('.cell').count() < 150
    press(page, 'ArrowRight', 'ArrowDown', 'ArrowLeft')
    assert chosen(page) == 348
    press(page, 'Home', 'ArrowDown')
    across = chosen(page) - 50
    assert 3 < across < 20
    press(page, 'PageDown', 'PageUp', 'ArrowUp', 'ArrowUp', 'ArrowLeft')
    assert chosen(page) == 50


def test_sorting_and_filters(page):
    assert [o.inner_text() for o in page.locator('#sort option').all()] == [
        'score', 'disagreement of model and label', 'loss', 'order of the data',
    ]  # fmt: skip
    page.select_option('#sort', 'loss')
    assert chosen(page) == 50
    page.click('#direction')
    assert chosen(page) == 349
    page.select_option('#given', label=f'{NAMES[1]} (100)'.replace('\n', ' '))
    assert page.locator('#count').inner_text() == '100 of 300' and chosen(page) == 348
    page.select_option('#show', 'differs')
    assert page.locator('#count').inner_text() == '25 of 300'
    page.locator('#grid').focus()
    press(page, '/')
    page.keyboard.type('nothing like this')
    page.wait_for_selector('#none')
    press(page, 'Enter', 'a', 'r', 'd')
    assert page.locator('#decided').inner_text() == '0'
    press(page, '/', 'Escape')
    assert page.locator('#count').inner_text() == '25 of 300'


def test_letters_typed_in_a_field_decide_nothing(page):
    page.focus('#find')
    page.keyboard.type('drum')
    page.focus('#sort')
    press(page, 'd', 'a')
    assert page.locator('#decided').inner_text() == '0'


@pytest.mark.parametrize('width', [390, 1400])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size(dict(width=width, height=800))
    page.wait_for_timeout(50)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    cells = page.evaluate(
        "[...document.querySelectorAll('.cell:not([hidden])')].map(c => c.getBoundingClientRect().right)"
    )
    assert cells and max(cells) <= width
    page.click('[data-do=drop]')
    assert page.locator('#decided').inner_text() == '1'


def test_a_regression_is_relabelled_with_a_number(opened, tmp_path):
    page, _, faults = opened
    frame = table(given=np.linspace(0, 1, 12), predicted=0.5)
    page.goto(browse_page(frame, None, tmp_path / 'page.html').as_uri())
    press(page, 'r')
    page.keyboard.type('0.25')
    press(page, 'Enter')
    found = exported(page)
    assert (found.label.tolist(), found.given.tolist()) == ([0.25], [0.0]) and not faults


def test_exported_decisions_go_back_to_their_samples(opened, tmp_path):
    page, _, faults = opened
    texts = read_texts((['one', 'two, "three"', 'four'], ['a', 'b', 'a']))
    frame = pd.DataFrame(dict(given=['a', 'b', 'a'], predicted='a'), range(3))
    page.goto(browse_page(frame, texts, tmp_path / 'page.html').as_uri())
    press(page, 'ArrowRight', 'd')
    found = exported(page).reset_index()
    assert found.columns.tolist() == ['index', 'decision', 'given', 'label', 'sample'] and not faults
    assert apply_decisions(texts, found).texts == ('one', 'four')
    with pytest.raises(ValueError, match='is about sample'):
        apply_decisions(read_texts((['one', 'other', 'four'], ['a', 'b', 'a'])), found)


def test_the_opening_is_measured(tmp_path):
    pytest.importorskip('playwright.sync_api')
    if find_browser() is None:
        pytest.skip('no browser of the Chromium family')
    batches = pattern_batches(60)
    given = [batches.data.classes[i] for i in batches.data.y.tolist()]
    frame = pd.DataFrame(dict(given=given, predicted=given), range(60))
    found = page_opening(browse_page(frame, batches, tmp_path / 'page.html'), 390, 600, frames=3)
    assert 0 < found.cells < 60 and found.ready > 0 and found.frame > 0


@pytest.mark.parametrize('call, kind', [
    (lambda: page_opening('nowhere.html'), FileNotFoundError),
    (lambda: page_opening('nowhere.html', frames=0), ValueError),
    (lambda: pattern_batches(0), ValueError),
])  # fmt: skip
def test_openings_that_cannot_be(call, kind):
    with pytest.raises(kind):
        call()
