"Packaging: everything is read from settings.ini, edit there and not here."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
expected = 'lib_name version description keywords author user license status min_python audience language git_url'.split()
missing = [key for key in expected if not cfg.get(key)]
if missing: raise SystemExit(f'settings.ini lacks {", ".join(missing)}: add `key = value` lines under [DEFAULT]')

licenses = {'apache2': 'Apache-2.0', 'mit': 'MIT', 'bsd3': 'BSD-3-Clause'}
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
pythons = ['3.10', '3.11', '3.12', '3.13', '3.14']

def requirements(key): return cfg.get(key, '').split()

readme = here/'README.md'
setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    license=licenses.get(cfg['license'], cfg['license']),
    classifiers=['Development Status :: ' + statuses[int(cfg['status']) - 1],
                 'Intended Audience :: ' + cfg['audience'].title(),
                 'Natural Language :: ' + cfg['language'].title(),
                 *('Programming Language :: Python :: ' + o for o in pythons[pythons.index(cfg['min_python']):])],
    url=cfg['git_url'],
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    include_package_data=True,
    python_requires='>=' + cfg['min_python'],
    install_requires=requirements('requirements'),
    extras_require={extra: requirements(f'{extra}_requirements') for extra in requirements('extras')},
    entry_points={'console_scripts': requirements('console_scripts'),
                  'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    zip_safe=False,
)
