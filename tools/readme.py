"README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `python tools/readme.py --check` fails when it is stale."
import argparse, posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT/'nbs'/'index.ipynb'
README = ROOT/'README.md'
IMAGES = 'README_files'
WARNING = '<!-- made from nbs/index.ipynb by tools/readme.py: edit there, not here -->\n'

directive = re.compile(r'^\s*#\s*\|\s*(\S+)[^\S\n]*(.*)\n?', re.MULTILINE)
fence = re.compile(r'(^```.*?^```|`[^`\n]+`)', re.MULTILINE | re.DOTALL)
link = re.compile(r'(?<=\]\()([^)\s]+)|(?<=src=")([^"]+)|(?<=href=")([^"]+)')

def from_root(match):
    "A link as seen from the notebook's folder becomes one as seen from the root of the repository."
    target = match.group()
    if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', target, re.IGNORECASE): return target
    return posixpath.normpath(posixpath.join(NOTEBOOK.parent.name, target))

def fix_links(text):
    "Mend the links of a markdown text, code left alone."
    parts = fence.split(text)
    return ''.join(part if i % 2 else link.sub(from_root, part) for i, part in enumerate(parts))

def clean(cell):
    "The cell without nbdev's directives, or None when it is not meant for readers."
    if cell.cell_type == 'raw': return None
    if cell.cell_type == 'markdown': cell.source = fix_links(cell.source)
    if cell.cell_type == 'code':
        found = dict(directive.findall(cell.source))
        if found.keys() & {'hide', 'export', 'exporti', 'default_exp'} or found.get('include:') == 'false': return None
        cell.source = '' if found.get('echo:') == 'false' else directive.sub('', cell.source).strip()
        if found.get('output:') == 'false': cell.outputs = []
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        if not cell.source and not cell.outputs: return None
    return cell

def make():
    "The text of README.md, and its images as {path: bytes}."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    nb.cells = [cell for cell in map(clean, nb.cells) if cell is not None]
    nb.metadata['language_info'] = {'name': 'python'} # for the fences around code
    config = Config({'NbConvertBase': {'display_data_priority': ['text/markdown', 'image/svg+xml', 'image/png', 'text/html', 'text/plain']}})
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb, {'output_files_dir': IMAGES})
    text = re.sub(r'[^\S\n]+$', '', text, flags=re.MULTILINE).replace('```python\n\n```\n', '')
    text = WARNING + '\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return text, {ROOT/name: data for name, data in resources['outputs'].items()}

def main():
    "Write or check; the exit status is 1 when a check fails."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing, exit with 1 when README.md is stale')
    check = parser.parse_args().check
    text, images = make()
    files = {README: text.encode(), **images}
    stale = [path for path, data in files.items() if not path.exists() or path.read_bytes() != data]
    unused = [path for path in (ROOT/IMAGES).glob('*') if path not in files]
    names = ', '.join(str(path.relative_to(ROOT)) for path in stale + unused)
    if check and names: sys.exit(f'stale: {names}. Run `python tools/readme.py` and commit what it writes.')
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(files[path])
    for path in unused: path.unlink()
    print(f'updated {names}' if names else 'README.md is current')

if __name__ == '__main__': main()
