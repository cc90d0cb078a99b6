"""Lines of kd_aif that the notebooks and the tests run: `python tools/line_coverage.py install|report FOLDER`

`install` writes a .pth file into the virtual environment. From then on, with KD_AIF_COVERAGE=FOLDER set, nbdev_test
and the processes of pytest-xdist note which lines of the package have run, and write that into FOLDER when they end.
`report` merges these files, prints the modules with the most lines that no process has run, and fails below 90 %.
Cells of a notebook that define the module of that notebook do not count; the module counts where others import it."""
import json, os, sys, sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = 90.0
# how these processes were started: the console script, and what pytest-xdist gives to Python
MEASURED = 'nbdev_test', 'exec(eval(sys.stdin.readline()))'

def install():
    "Measure in every process of this environment that is asked to"
    here = str(Path(__file__).resolve().parent)
    start = f"(sys.path.append({here!r}), __import__('line_coverage').start())"
    line = f"import os, sys; 'KD_AIF_COVERAGE' in os.environ and {start}"
    Path(sysconfig.get_path('purelib'), 'line_coverage.pth').write_text(line + '\n')

def start():
    "Note the lines that this process and its forks run, if it is one of those that are measured"
    if not any(name in word for word in sys.orig_argv for name in MEASURED): return
    import atexit, uuid
    from multiprocessing import util
    from slipcover import FileMatcher, ImportManager, Slipcover
    source = [str(ROOT/'kd_aif')]
    lines = Slipcover(source=source)
    ImportManager(lines, FileMatcher(sources=source)).__enter__()

    def save():
        path = Path(os.environ['KD_AIF_COVERAGE'], f'{uuid.uuid4().hex}.json')
        path.with_suffix('.part').write_text(json.dumps(lines.get_coverage()))
        path.with_suffix('.part').rename(path)

    atexit.register(save)
    util.register_after_fork(lines, lambda _: util.Finalize(None, save, exitpriority=100))

def report(folder):
    "Print the share of the lines that have run; exit status 1 when it is too small"
    from slipcover import merge_coverage
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob('*.json'))]
    if not found: sys.exit(f'{folder}: no process has written which lines it ran; is the .pth file installed?')
    for other in found[1:]: merge_coverage(found[0], other)
    files = {name: f for name, f in found[0]['files'].items() if not name.endswith('_modidx.py')}
    ran, missing = (sum(len(f[key]) for f in files.values()) for key in ('executed_lines', 'missing_lines'))
    for name in sorted(files, key=lambda name: -len(files[name]['missing_lines']))[:12]:
        f = files[name]['summary']
        print(f"{f['percent_covered']:5.1f} %  {f['missing_lines']:4} lines never run  {name}")
    share = 100*ran/(ran + missing)
    print(f'{share:.1f} % of {ran + missing:,} lines of kd_aif have run, in {len(found)} processes')
    if share < LEAST: sys.exit(f'coverage is below {LEAST} %')

if __name__ == '__main__':
    if sys.argv[1:2] == ['install']: install()
    elif sys.argv[1:2] == ['report'] and len(sys.argv) == 3: report(sys.argv[2])
    else: sys.exit(__doc__)
