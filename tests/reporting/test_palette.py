"Colours of methods: told apart by colour-blind readers, ours in a grey print too, none recycled."

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import kd_aif.experiments.methods  # noqa: F401  registers the methods
from kd_aif.reporting.figures import GREY, RIGHT, WRONG
from kd_aif.reporting.methods import METHODS, ROLES
from kd_aif.reporting.palette import STYLES, UNKNOWN, method_colours, method_style

OURS = 'ours', 'ours_student'
VISION = {  # Machado, Oliveira and Fernandes (2009), severity 1: what is seen of linear RGB
    'all cones': [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    'protanopia': [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    'deuteranopia': [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    'tritanopia': [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = TO_XYZ.sum(1)


def linear(colour):
    "Linear RGB of a colour"
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    "CIELAB of linear RGB, white D65"
    t = TO_XYZ @ rgb / WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def seen(colour, vision):
    "CIELAB of a colour as a reader sees it"
    return lab(np.clip(VISION[vision] @ linear(colour), 0, 1))


def distance(a, b, vision):
    "CIE 1976 colour difference"
    return np.linalg.norm(seen(a, vision) - seen(b, vision))


def lightness(colour):
    "L* from 0 to 100: what is left in a grey print"
    return lab(linear(colour))[0]


def contrast(colour):
    "Contrast against white, as in the guidelines for web content"
    return 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05)


def close_pairs(colours, vision, least=15.0):
    "Pairs of names whose colours are too near to each other"
    return [pair for pair in combinations(colours, 2) if distance(*map(colours.get, pair), vision) < least]


def faint_ours(colours, least=10.0):
    "Pairs with one of ours that a grey print does not tell apart"
    pairs = [p for p in combinations(colours, 2) if set(p) & set(OURS)]
    return [(a, b) for a, b in pairs if abs(lightness(colours[a]) - lightness(colours[b])) < least]


COLOURS = {role: style.colour for role, style in STYLES.items()}


def test_the_simulation_knows_what_is_confused():
    assert lightness('white') == pytest.approx(100, abs=0.01) and contrast('black') == pytest.approx(21)
    assert distance('#c0392b', '#6b7a1e', 'deuteranopia') < 30 < distance('#c0392b', '#6b7a1e', 'all cones')
    assert distance('#0072b2', '#d55e00', 'deuteranopia') > 60
    assert distance('#00a0a0', '#5f9ea0', 'tritanopia') < distance('#00a0a0', '#5f9ea0', 'all cones')


@pytest.mark.parametrize('vision', VISION)
def test_roles_differ(vision):
    assert not close_pairs(COLOURS, vision)


def test_colours_that_are_confused_are_found():
    default = dict(zip('abcdefghij', ['#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b']))
    assert close_pairs(default, 'deuteranopia') and faint_ours(COLOURS | dict(control=COLOURS['ours']))


def test_ours_are_the_darkest_and_stand_out_in_grey():
    assert not faint_ours(COLOURS)
    others = [lightness(c) for role, c in COLOURS.items() if role not in OURS]
    assert max(lightness(COLOURS[role]) for role in OURS) < min(others)


def test_ours_are_saturated():
    chroma = {role: np.hypot(*lab(linear(c))[1:]) for role, c in COLOURS.items()}
    assert min(chroma[role] for role in OURS) > 50 > chroma['control'] + 40


@pytest.mark.parametrize('colour', [*COLOURS.values(), UNKNOWN.colour, RIGHT, GREY])
def test_contrast_with_white(colour):
    assert contrast(colour) >= 3


def test_no_colour_or_marker_is_used_twice():
    for kind in ('colour', 'marker', 'dashes'):
        values = [getattr(style, kind) for style in STYLES.values()]
        assert len(set(values)) == len(values) == len(ROLES), kind


def test_every_method_has_the_colour_of_its_role():
    colours = method_colours(METHODS)
    assert set(colours.values()) == set(COLOURS.values())
    for names in (['kd_aif_both', 'oracle'], ['oracle', 'dkd', 'kd_aif_both']):
        assert method_colours(names) == {n: colours[n] for n in names}, 'the same in every figure'
    assert method_style('not registered') is UNKNOWN


@pytest.mark.parametrize(
    'role, names',
    {
        'ours': ('kd_aif_both', 'kd_aif_twice', 'kd_aif_together', 'kd_aif_ssl', 'need_both'),
        'ours_student': ('kd_aif_student', 'dkd_aif', 'crd_aif', 'quality_student'),
        'published': ('published', 'sigmoid_student', 'sigmoid_both', 'online'),
        'control': ('ce', 'kd', 'kd_val', 'supervised'),
        'check': ('random', 'random_student', 'val_alone'),
        'weights': ('small_loss_calibrated_both', 'confident_learning', 'mwn'),
        'losses': ('dkd', 'crd_train', 'takd', 'dml', 'gce', 'metadistil'),
        'few_labels': ('fixmatch', 'mpl'),
        'oracle': ('oracle', 'oracle_student'),
    }.items(),
)
def test_roles_of_methods(role, names):
    assert {METHODS[n].role for n in names} == {role}


def test_marks_of_right_and_wrong_labels_differ():
    assert not close_pairs(dict(right=RIGHT, wrong=WRONG), 'deuteranopia', 40)
