"The package as a whole: documentation, exported modules, README, what an import needs, console scripts."

import ast, configparser, dataclasses, importlib, inspect, json, os, pkgutil, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from fastcore.docments import docments

import kd_aif

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    o.name.removeprefix('kd_aif.')
    for o in pkgutil.walk_packages(kd_aif.__path__, 'kd_aif.')
    if not o.ispkg and not o.name.split('.')[-1].startswith('_')
)
NOTEBOOKS = sorted(
    o
    for o in (ROOT / 'nbs').rglob('*.ipynb')
    if not any(p.startswith(('.', '_')) for p in o.relative_to(ROOT).parts)
)
names = [o.relative_to(ROOT / 'nbs').with_suffix('').as_posix() for o in NOTEBOOKS]

config = configparser.ConfigParser(delimiters=['='])
config.read(ROOT / 'settings.ini', encoding='utf-8')
SETTINGS = config['DEFAULT']


def cells(notebook, kind):
    return [
        ''.join(o['source'])
        for o in json.loads(notebook.read_text(encoding='utf-8'))['cells']
        if o['cell_type'] == kind
    ]


def run(*args, **kwargs):
    return subprocess.run([str(o) for o in args], capture_output=True, text=True, timeout=600, **kwargs)


# documentation


def undocumented(function, name):
    "What the documentation of a function lacks, as sentences."
    if not inspect.getdoc(function):
        yield f'{name} has no docstring'
    comments = docments(function, full=True, args_kwargs=True)
    for parameter in inspect.signature(function).parameters:
        if parameter not in ('self', 'cls') and not (comments.get(parameter) or {}).get('docment'):
            yield f'parameter {parameter} of {name} has no comment'
    if inspect.signature(function).return_annotation not in (inspect.Signature.empty, None, 'None') and not (
        comments.get('return') or {}
    ).get('docment'):
        yield f'what {name} returns has no comment'


def undocumented_class(cls, name):
    "What the documentation of a class, of its fields and of its own public methods lacks."
    doc = cls.__dict__.get('__doc__') or ''
    if not doc or doc.startswith(f'{cls.__name__}('):
        yield f'{name} has no docstring'  # dataclasses make one up
    fields = (
        [o.name for o in dataclasses.fields(cls) if o.name in vars(cls).get('__annotations__', {})]
        if dataclasses.is_dataclass(cls)
        else []
    )  # its own: inherited ones have their comment in the parent
    comments = docments(cls, full=True) if fields else {}
    for field in fields:
        if not (comments.get(field) or {}).get('docment'):
            yield f'field {field} of {name} has no comment'
    for key, method in vars(cls).items():
        if isinstance(method, (staticmethod, classmethod)):
            method = method.__func__
        if isinstance(method, property):
            if not inspect.getdoc(method.fget):
                yield f'{name}.{key} has no docstring'
        elif not key.startswith('_') and inspect.isfunction(method):
            yield from undocumented(method, f'{name}.{key}')


def lacking(module):
    for key in module.__all__:
        value = getattr(module, key)
        if inspect.isclass(value):
            yield from undocumented_class(value, f'{module.__name__}.{key}')
        elif inspect.isfunction(value):
            yield from undocumented(value, f'{module.__name__}.{key}')


@pytest.mark.parametrize('name', MODULES)
def test_every_export_is_documented(name):
    module = importlib.import_module(f'kd_aif.{name}')
    assert module.__doc__ and module.__all__
    assert not (found := list(lacking(module))), '\n'.join(found)


def test_missing_documentation_is_found():
    def silent(x, y: int = 0) -> int:
        return x

    def spoken(
        x,  # a number
    ) -> int:  # the same number
        "Give `x` back."
        return x

    assert list(undocumented(silent, 'silent')) == [
        'silent has no docstring',
        'parameter x of silent has no comment',
        'parameter y of silent has no comment',
        'what silent returns has no comment',
    ]
    assert list(undocumented(spoken, 'spoken')) == []


# notebooks and modules


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=names)
def test_notebook_begins_with_title_and_description(notebook):
    lines = cells(notebook, 'markdown')[0].splitlines()
    assert lines[0].startswith('# ')
    assert any(o.startswith('> ') for o in lines[1:4])


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=names)
def test_notebook_outputs_are_small_and_name_no_folder_of_this_machine(notebook):
    outputs = [
        o for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])
    ]
    assert not [o['evalue'] for o in outputs if o['output_type'] == 'error']
    assert not [o for o in outputs if o.get('name') == 'stderr'], 'run it again with TQDM_DISABLE=1'
    widget = 'application/vnd.jupyter.widget-view+json'
    assert not [o for o in outputs if widget in o.get('data', {})], 'a widget is an error without its kernel'
    for output in map(json.dumps, outputs):
        assert len(output) < 200_000, 'make the figure smaller, such as dpi=80'
        assert not [o for o in (Path.home(), ROOT, Path(sys.prefix)) if f'{o}/' in output]


def imports_among_other_code(source):
    "Whether nbdev would run this cell, for its import, when it renders the pages, although what it uses is not there then."
    if re.search(r'^#\|\s*(export|exports|exporti|eval:\s*false)\b', source, re.MULTILINE):
        return False
    nodes = list(ast.walk(ast.parse(re.sub(r'^\s*[%!].*', '', source, flags=re.MULTILINE))))
    return any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in nodes) and any(
        isinstance(o, (ast.Expr, ast.Assign)) for o in nodes
    )


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=names)
def test_notebook_imports_stand_in_cells_of_their_own(notebook):
    assert not (found := [o for o in cells(notebook, 'code') if imports_among_other_code(o)]), '\n\n'.join(
        found
    )


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=names)
def test_links_between_notebooks_lead_somewhere(notebook):
    targets = [t for text in cells(notebook, 'markdown') for t in re.findall(r'\]\(([^)\s#]+\.ipynb)', text)]
    assert [t for t in targets if '://' not in t and not (notebook.parent / t).exists()] == []


def test_every_module_comes_from_a_notebook():
    exported = [
        m
        for o in NOTEBOOKS
        for c in cells(o, 'code')
        for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', c, re.MULTILINE)
    ]
    assert sorted(exported) == MODULES


def test_sidebar_lists_every_notebook(root):
    listed = re.findall(r'- ([\w/]+\.ipynb)', (root / 'nbs' / 'sidebar.yml').read_text(encoding='utf-8'))
    assert sorted(listed) == sorted(o.relative_to(root / 'nbs').as_posix() for o in NOTEBOOKS)


def test_export_leaves_no_difference(root, tmp_path):
    for o in ('settings.ini', 'pyproject.toml'):
        shutil.copy(root / o, tmp_path)
    for o in ('nbs', 'kd_aif'):
        shutil.copytree(root / o, tmp_path / o, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    # nbdev does nothing when IN_TEST is set
    done = run(
        sys.executable,
        '-c',
        'from nbdev.doclinks import nbdev_export; nbdev_export()',
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != 'IN_TEST'},
    )
    assert done.returncode == 0, done.stderr
    files = sorted(
        o.relative_to(tmp_path) for o in [tmp_path / 'pyproject.toml', *(tmp_path / 'kd_aif').rglob('*.py')]
    )
    assert [
        str(o)
        for o in files
        if not (root / o).exists() or (root / o).read_text() != (tmp_path / o).read_text()
    ] == [], 'run nbdev_export'


@pytest.mark.parametrize('name', MODULES)
def test_no_star_imports(name):
    tree = ast.parse((ROOT / 'kd_aif' / f"{name.replace('.', '/')}.py").read_text(encoding='utf-8'))
    assert not [
        o.module
        for o in ast.walk(tree)
        if isinstance(o, ast.ImportFrom) and any(a.name == '*' for a in o.names)
    ]


# README


def test_readme_is_current(root):
    done = run(sys.executable, root / 'tools' / 'readme.py', '--check')
    assert done.returncode == 0, done.stderr


def test_readme_links_lead_somewhere(root):
    text = (root / 'README.md').read_text(encoding='utf-8')
    targets = [o for o in re.findall(r'\]\(([^)\s#]+)', text) if '://' not in o]
    assert targets and [o for o in targets if not (root / o).exists()] == []


# packaging


def distribution_names(requirements):
    return {re.split(r'[=<>~!\[]', o)[0] for o in requirements.split()}


def test_version_is_that_of_the_settings():
    assert kd_aif.__version__ == SETTINGS['version']


def test_extras():
    assert set(SETTINGS['extras'].split()) >= {'dev', 'baselines', 'glue', 'bench'} and all(
        SETTINGS[f'{o}_requirements'].split() for o in SETTINGS['extras'].split()
    )


@pytest.mark.parametrize('script', SETTINGS['console_scripts'].split())
def test_console_script_exists(script):
    name, module, function = re.fullmatch(r'(\w+)=([\w.]+):(\w+)', script).groups()
    assert name == function and callable(getattr(importlib.import_module(module), function))


def test_import_hands_on_the_names_that_most_users_need():
    code = '''
import sys, kd_aif
assert 'torch' not in sys.modules, 'import kd_aif is to stay quick'
for name in kd_aif.__all__: assert getattr(kd_aif, name).__module__.startswith('kd_aif.'), name
assert set(kd_aif.__all__) <= set(dir(kd_aif))
from kd_aif import distill, Training
try: kd_aif.distil
except AttributeError as e: assert 'distill' in str(e)
else: raise AssertionError('a name that is not there')
'''
    done = run(sys.executable, '-c', code)
    assert done.returncode == 0, done.stderr


WITHOUT_EXTRAS = '''
import importlib, pkgutil, sys
for name in blocked: sys.modules[name] = None  # Python treats such a module as one that is not installed
import kd_aif
for module in pkgutil.walk_packages(kd_aif.__path__, 'kd_aif.'): importlib.import_module(module.name)
'''


def test_import_without_extras():
    modules = {'pypandoc_binary': 'pypandoc'}
    core = distribution_names(SETTINGS['requirements'])
    extras = {
        o for e in SETTINGS['extras'].split() for o in distribution_names(SETTINGS[f'{e}_requirements'])
    } - core
    blocked = {modules.get(o, o) for o in extras} | {'IPython', 'ipywidgets'}
    assert {'nbdev', 'transformers', 'torchdistill', 'kronfluence'} <= blocked
    done = run(sys.executable, '-c', f'blocked = {blocked!r}\n{WITHOUT_EXTRAS}')
    assert done.returncode == 0, done.stderr
