"""Notebooks as a reader meets them: opened and run in JupyterLab, in a browser without a window.

Skipped where JupyterLab, playwright or Chromium is missing. `KD_AIF_SCREENSHOTS=FOLDER` keeps pictures of the pages.
`KD_AIF_NOTEBOOKS=90_report.ipynb,02_data/06_loaders.ipynb` names further notebooks to be run.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip('jupyterlab')
nbformat = pytest.importorskip('nbformat')
playwright = pytest.importorskip('playwright.sync_api')

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
MINUTE = 60_000  # milliseconds
SETTINGS = {  # no question about news in front of the page; all cells are drawn, also those out of sight
    'apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}',
    'notebook-extension/tracker': '{"windowingMode": "none"}',
}


# JupyterLab, with nothing of the user's


def free_port():
    with closing(socket.socket()) as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def environment(folder, root):
    "Folders of Jupyter's own; progress bars and figures as in a reader's kernel"
    env = {k: v for k, v in os.environ.items() if k not in ('TQDM_DISABLE', 'MPLBACKEND', 'IN_TEST')}
    for name in ('config', 'data', 'runtime'):
        env[f'JUPYTER_{name.upper()}_DIR'] = str(folder / name)
    for name in ('settings', 'workspaces'):
        env[f'JUPYTERLAB_{name.upper()}_DIR'] = str(folder / name)
    paths = [str(root), *filter(None, [env.get('PYTHONPATH')])]
    return env | dict(IPYTHONDIR=str(folder / 'ipython'), PYTHONPATH=os.pathsep.join(paths))


def write_settings(folder):
    for name, text in SETTINGS.items():
        path = folder / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def wait_for(server, url, log, seconds=120):
    "Until the server answers; its log, if it does not"
    for _ in range(seconds * 2):
        if server.poll() is not None:
            break
        try:
            return urlopen(url, timeout=5).close()
        except (URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f'JupyterLab does not answer:\n{log.read_text()[-3000:]}')


def stop(server):
    "The server ends its kernels; a kernel whose server has gone ends by itself"
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            server.send_signal(number)
        try:
            return server.wait(20)
        except subprocess.TimeoutExpired:
            pass


@contextmanager
def jupyterlab(folder, content, root):
    "(address, token) of a server that shows the folder `content`"
    port, token, log = free_port(), secrets.token_hex(16), folder / 'log'
    write_settings(folder)
    options = dict(ip='127.0.0.1', port=port, port_retries=0, root_dir=content, open_browser=False)
    command = [sys.executable, '-m', 'jupyterlab', '--allow-root', f'--IdentityProvider.token={token}']
    command += [f'--ServerApp.{k}={v}' for k, v in options.items()]
    with log.open('w') as f:
        server = subprocess.Popen(
            [*command, '--LabApp.expose_app_in_browser=True'],
            env=environment(folder, root),
            stdout=f,
            stderr=f,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_for(server, f'http://127.0.0.1:{port}/api/status?token={token}', log)
        yield f'http://127.0.0.1:{port}', token
    finally:
        stop(server)


# the browser


def chromium(p):
    "Path of a browser: the system's, else playwright's own"
    found = next(filter(None, map(shutil.which, NAMES)), None) or p.chromium.executable_path
    if not Path(found).exists():
        pytest.skip(f'needs Chromium: none of {", ".join(NAMES)} is on the path')
    return found


@pytest.fixture(scope='module')
def lab(tmp_path_factory, root):
    "open(notebook) → a page; notebooks are copies, records and figures are read where they are"
    folder = tmp_path_factory.mktemp('jupyter')
    content = folder / 'content'
    shutil.copytree(
        root / 'nbs', content / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '*.py')
    )
    (content / 'reports').symlink_to(root / 'reports', target_is_directory=True)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(p), headless=True, args=['--no-sandbox'])
        with closing(browser), jupyterlab(folder, content, root) as (address, token):
            yield Lab(browser, content / 'nbs', address, token)


class Lab:
    def __init__(self, browser, folder, address, token):
        self.browser, self.folder, self.address, self.token = browser, folder, address, token

    def page(self, notebook):
        "The notebook in a browser tab, when it is drawn"
        page = self.browser.new_page(viewport=dict(width=1400, height=900))
        page.goto(f'{self.address}/lab/tree/nbs/{notebook}?token={self.token}&reset', timeout=2 * MINUTE)
        self.drawn(page)
        return page

    @staticmethod
    def drawn(page):
        page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=2 * MINUTE)
        page.wait_for_selector('.jp-RenderedMarkdown h1', timeout=MINUTE)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=2 * MINUTE)

    def run_all(self, page, minutes=15):
        "All cells, from the menu; then the notebook is saved"
        page.locator('.lm-MenuBar-itemLabel', has_text='Run').click()
        page.locator('.lm-Menu-itemLabel').get_by_text('Run All Cells', exact=True).click()
        page.wait_for_timeout(1000)
        page.wait_for_function(ALL_RUN, timeout=minutes * MINUTE)
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")

    def saved(self, notebook):
        return nbformat.read(self.folder / notebook, as_version=4)


ALL_RUN = '''() => {
    const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type == 'code');
    const failed = document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
    const waiting = cells.filter(c => c.model.sharedModel.source.trim() && !c.model.executionCount);
    const busy = cells.some(c => c.promptNode?.textContent?.includes('*'));
    return !busy && (failed || !waiting.length);
}'''
RED = (
    ':is([data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"])'
)


def outputs(page, selector=''):
    return page.locator(f'.jp-Notebook .jp-OutputArea-output{selector}')


def faults(page):
    "What a reader should not see, as sentences"
    found = [f'red: {text}' for text in outputs(page, RED).all_inner_texts()]
    for text in outputs(page).all_inner_texts():
        if 'Error displaying widget' in text or 'Loading widget' in text:
            found.append(f'widget: {text}')
        if re.search(r'<[\w.]+( object)? at 0x\w+>', text):
            found.append(f'address: {text}')
    return found


def not_run(notebook):
    return [c.source for c in notebook.cells if c.cell_type == 'code' and c.source and not c.execution_count]


def pictures(page):
    "Number of pictures that are drawn"
    return page.evaluate(
        "[...document.querySelectorAll('.jp-OutputArea-output img')].filter(o => o.naturalWidth > 50).length"
    )


def keep_screenshots(page, name):
    "Pictures of the whole notebook for people, where they are asked for"
    if not (folder := os.environ.get('KD_AIF_SCREENSHOTS')):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    for width in (1400, 390):
        page.set_viewport_size(dict(width=width, height=900))
        page.wait_for_timeout(1000)
        height = page.evaluate("document.querySelector('.jp-WindowedPanel-inner').scrollHeight")
        page.set_viewport_size(dict(width=width, height=min(int(height) + 200, 16_000)))
        page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
        page.wait_for_timeout(1000)
        page.screenshot(path=f'{folder}/{name}-{width}.png')


def write_notebook(lab, name, *sources):
    cells = [nbformat.v4.new_markdown_cell('# A title'), *map(nbformat.v4.new_code_cell, sources)]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab.folder / name)


# what is seen


FAULTS = (
    "import warnings\nwarnings.warn('red text', FutureWarning)",
    'object()',
    """from IPython.display import display
view = dict(model_id='gone', version_major=2, version_minor=0)
display({'application/vnd.jupyter.widget-view+json': view, 'text/plain': 'a bar'}, raw=True)""",
    '1 / 0',
)


def test_faults_are_found(lab):
    "A warning, an address, a widget whose model has gone, an error"
    pytest.importorskip('jupyterlab_widgets')
    write_notebook(lab, 'faulty.ipynb', *FAULTS)
    with closing(lab.page('faulty.ipynb')) as page:
        lab.run_all(page)
        page.get_by_text('Error displaying widget').wait_for(timeout=MINUTE)
        found = faults(page)
    assert [o.split(':')[0] for o in found] == ['red', 'red', 'address', 'widget'], found


BARS = '''
import torch
from torch import nn
import kd_aif
g = torch.Generator().manual_seed(0)
x = torch.randn(300, 4, generator=g)
batches = [dict(x=x[i], y=(x[i, 0] > 0).long(), index=i) for i in torch.arange(300).split(50)]
train, val = batches[:4], batches[4:]
training = kd_aif.Training(epochs=4, progress=True)
run = kd_aif.distill(nn.Linear(4, 2), nn.Linear(4, 2), train, val, mechanism='student',
                     schedule=kd_aif.Every(1), training=training)
'''


def test_bars_of_a_run_are_text(lab):
    "An outer bar that stays, and bars inside it that go; nothing is red, also when the notebook is opened again"
    write_notebook(lab, 'bars.ipynb', BARS)
    with closing(lab.page('bars.ipynb')) as page:
        lab.run_all(page)
        texts = [o.strip() for o in outputs(page).all_inner_texts()]
        assert not faults(page)
        page.reload()
        lab.drawn(page)
        assert not faults(page)
        assert [o.strip() for o in outputs(page).all_inner_texts()] == texts
    shown = [o for o in texts if o]
    assert len(shown) == 1 and re.match(r'student: 100%.*4/4', shown[0]), texts
    assert len(texts) <= 3, 'one line for all inner bars'


@pytest.mark.parametrize(
    'notebook', ['index.ipynb', *filter(None, os.environ.get('KD_AIF_NOTEBOOKS', '').split(','))]
)
def test_notebook_runs_as_a_reader_sees_it(lab, notebook):
    with closing(lab.page(notebook)) as page:
        assert not faults(page), 'as it is opened'
        lab.run_all(page)
        keep_screenshots(page, notebook.replace('/', '-').removesuffix('.ipynb'))
        assert not (found := faults(page)), '\n'.join(found)
        assert not (left := not_run(lab.saved(notebook))), left
        if notebook in ('index.ipynb', '90_report.ipynb'):
            assert outputs(page).locator('table tr').count() > 5
            assert pictures(page) >= 1
