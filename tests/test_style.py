"""How the code reads, measured over notebooks and modules; there is no list of exceptions."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NBS = ROOT / 'kd_aif', ROOT / 'nbs'
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if not p.name.startswith('_'))
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
LINE, FUNCTION, PARAMETERS, COMPLEXITY, CELL, MEDIAN_CELL = 120, 50, 10, 15, 25, 10
SHORTEST_MODULE, LONGEST_MODULE = 40, 400
ROOMS = (  # a room uses the rooms before it only
    'foundation', 'data', 'models', 'influence', 'weights', 'distillation', 'rivals', 'few_labels', 'trust',
    'integrations', 'reporting', 'experiments', 'benchmarks', 'gpu_queue',
)  # fmt: skip
TUTORIALS = 'tutorials'  # a folder of notebooks that export nothing
FLOORS = 9
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
EXPORT = re.compile(r'^#\|\s*exporti?\b', re.MULTILINE)

module = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())


def cells(path):
    "[(kind, source)] of a notebook"
    return [
        (c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
    ]


def code_cells(path):
    "The code cells, lines of magic commands blanked"
    return [
        re.sub(r'^\s*[%!].*$', 'pass', s, flags=re.MULTILINE) for kind, s in cells(path) if kind == 'code'
    ]


def export_cells(path):
    return [s for s in code_cells(path) if EXPORT.search(s)]


def long_lines(source):
    return [f'{len(line)} characters: {line}' for line in source.splitlines() if len(line) > LINE]


def shared_lines(source):
    "Statements that share a line with another statement, or with the header of their block"
    found = []
    for node in ast.walk(ast.parse(source)):
        for field in ('body', 'orelse', 'finalbody', 'handlers'):
            block = getattr(node, field, None)
            if not isinstance(block, list) or not block:
                continue
            starts = [n.lineno for n in block]
            header = getattr(node, 'lineno', 0) if field == 'body' and not isinstance(node, ast.Module) else 0
            if len(set(starts)) < len(starts) or starts[0] == header:
                found.append(f'line {starts[0]}: {ast.unparse(block[0])[:60]}')
    return found


def nested_comprehensions(source):
    "Comprehensions that stand inside another one"
    outer = [n for n in ast.walk(ast.parse(source)) if isinstance(n, COMPREHENSIONS)]
    inside = [i for n in outer for i in ast.walk(n) if i is not n and isinstance(i, COMPREHENSIONS)]
    return [f'line {n.lineno}: {ast.unparse(n)[:80]}' for n in inside]


def star_imports(source):
    imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    return [
        f'line {n.lineno}: from {n.module} import *' for n in imports if any(a.name == '*' for a in n.names)
    ]


def functions(source):
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def parameters(function):
    "How many parameters a caller sees"
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    bound = [n for n in named[:1] if n.arg in ('self', 'cls')]
    return len(named) - len(bound) + (a.vararg is not None) + (a.kwarg is not None)


def complexity(function):
    "McCabe's number: one, and one for each branch, loop, condition and boolean operand"
    count = 1
    for node in ast.walk(function):
        if isinstance(
            node, (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)
        ):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def cell_length(source):
    "Lines of an export cell, directives left out"
    return len(re.sub(r'^#\|.*\n?', '', source, flags=re.MULTILINE).strip('\n').splitlines())


def faults(sources):
    "What the rules for all code find in some sources"
    rules = long_lines, shared_lines, nested_comprehensions, star_imports
    return [found for source in sources for rule in rules for found in rule(source)]


@module
def test_lines_and_statements_of_modules(path):
    body = re.sub(r"\n__all__ = \[.*?\]\n", '\n', path.read_text(encoding='utf-8'), flags=re.DOTALL)
    assert not (found := faults([body])), '\n'.join(found)


@notebook
def test_lines_and_statements_of_notebooks(path):
    assert not (found := faults(code_cells(path))), '\n'.join(found)


@module
def test_functions_are_short_and_simple(path):
    found = []
    for f in functions(path.read_text(encoding='utf-8')):
        length = f.end_lineno - f.lineno + 1
        if length > FUNCTION or parameters(f) > PARAMETERS or complexity(f) > COMPLEXITY:
            found.append(f'{f.name}: {length} lines, {parameters(f)} parameters, complexity {complexity(f)}')
    assert not found, '\n'.join(found)


@module
def test_modules_are_one_idea_long(path):
    length = len(path.read_text(encoding='utf-8').splitlines())
    assert SHORTEST_MODULE <= length <= LONGEST_MODULE, f'{length} lines'


@notebook
def test_notebooks_open_without_a_question(path):
    "JupyterLab asks for a kernel where none is named, and draws broken widgets from the state of past runs"
    metadata = json.loads(path.read_text(encoding='utf-8'))['metadata']
    assert metadata.get('kernelspec', {}).get('name') == 'python3' and 'widgets' not in metadata


@notebook
def test_export_cells_are_short(path):
    long = [
        f'{cell_length(s)} lines: {s.splitlines()[1][:70]}'
        for s in export_cells(path)
        if cell_length(s) > CELL
    ]
    assert not long, '\n'.join(long)


@notebook
def test_prose_stands_before_export_cells(path):
    found, before = [], None
    for kind, source in cells(path):
        imports_only = (
            'import' in source
            and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)
            if kind == 'code' and EXPORT.search(source)
            else False
        )
        if kind == 'code' and EXPORT.search(source) and before != 'markdown' and not imports_only:
            found.append(source.splitlines()[1])
        before = kind
    assert not found, '\n'.join(found)


def test_the_median_export_cell():
    lengths = [cell_length(s) for path in NOTEBOOKS for s in export_cells(path)]
    assert statistics.median(lengths) <= MEDIAN_CELL


def dependencies(path):
    "Modules of this package that a module imports, such as 'influence.solvers'"
    here, found = path.relative_to(PACKAGE).with_suffix('').parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            found.add('.'.join([*here[: -node.level], *(node.module or '').split('.')]))
        elif (node.module or '').startswith('kd_aif.'):
            found.add(node.module.removeprefix('kd_aif.'))
    return found


def longest_path(graph):
    "Number of floors of a graph without circles; a circle raises `RecursionError` with its members"

    floors = {}  # of the nodes that are done: without it every way to a node is gone again

    def floor(node, below):
        if node in below:
            raise RecursionError(f'a circle of imports: {" -> ".join([*below, node])}')
        if node not in floors:
            floors[node] = 1 + max((floor(other, (*below, node)) for other in graph[node]), default=0)
        return floors[node]

    return max(floor(node, ()) for node in graph)


def test_every_folder_is_a_room_in_all_three_trees():
    folders = [p.name for p in NBS.iterdir() if p.is_dir() and re.match(r'\d\d[a-z]?_', p.name)]
    assert sorted(name.partition('_')[2] for name in folders) == sorted([*ROOMS, TUTORIALS])
    assert not any(export_cells(path) for path in (NBS / f'00_{TUTORIALS}').glob('*.ipynb'))
    assert sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and not p.name.startswith('_')) == sorted(
        ROOMS
    )
    assert set(ROOMS) <= {p.name for p in (ROOT / 'tests').iterdir()}


@module
def test_a_room_uses_the_rooms_before_it(path):
    own = ROOMS.index(path.relative_to(PACKAGE).parts[0])
    above = [name for name in dependencies(path) if ROOMS.index(name.split('.')[0]) > own]
    assert not above, above


def test_the_tower_has_few_floors_and_no_circle():
    modules = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts): dependencies(p) for p in MODULES}
    assert longest_path(modules) > 1
    rooms = {room: set() for room in ROOMS}
    for name, used in modules.items():
        rooms[name.split('.')[0]] |= {other.split('.')[0] for other in used} - {name.split('.')[0]}
    assert longest_path(rooms) <= FLOORS


def test_a_circle_is_found():
    with pytest.raises(RecursionError, match='a -> b -> a'):
        longest_path(dict(a={'b'}, b={'a'}))
    assert longest_path(dict(a={'b', 'c'}, b={'c'}, c=set())) == 3
