"Strong augmentation: every operation on every image by itself, ranges, determinism, arguments that make no sense."

import pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.transforms.v2 import functional as vision
from kd_aif.data.randaugment import (
    OPERATIONS,
    Chain,
    Cutout,
    Operation,
    RandAugment,
    affine,
    cut_out,
    posterize,
    strong_augmentation_for,
    translate_x,
)
from kd_aif.foundation.core import generator
from kd_aif.data.augment import CropFlip

quick = settings(max_examples=25, deadline=None)
seeds, sizes = st.integers(0, 10**6), st.integers(3, 12)


def images(n=6, c=3, h=9, w=7, seed=0):
    return torch.randint(256, (n, c, h, w), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize('name', OPERATIONS)
@pytest.mark.parametrize('channels', (1, 3))
def test_an_operation_treats_every_image_by_itself(name, channels):
    x, o = images(c=channels), OPERATIONS[name]
    before, m = x.clone(), torch.linspace(o.low, o.high, 6)
    found = o.apply(x, m)
    assert found.dtype == torch.uint8 and found.shape == x.shape and torch.equal(x, before)
    assert torch.equal(found, torch.cat([o.apply(x[i : i + 1], m[i : i + 1]) for i in range(6)]))


@pytest.mark.parametrize('name', [n for n in OPERATIONS if n not in ('autocontrast', 'equalize')])
def test_magnitude_zero_is_the_identity(name):
    for shape in ((3, 9, 7), (1, 3, 3), (3, 1, 1), (3, 2, 5)):
        x = images(4, *shape)
        assert torch.equal(OPERATIONS[name].apply(x, torch.zeros(4)), x)


@pytest.mark.parametrize('name', OPERATIONS)
def test_the_largest_magnitude_changes_something_but_the_identity(name):
    x, o = (
        images(h=20, w=20) // 2,
        OPERATIONS[name],
    )  # values up to 127, so that contrast can grow; equalize leaves images of a few pixels alone
    assert torch.equal(o.apply(x, torch.full((6,), o.high)), x) == (name == 'identity')


def test_the_list_is_that_of_fixmatch():
    assert len(OPERATIONS) == 14
    assert {k: (o.low, o.high) for k, o in OPERATIONS.items() if o.high} == dict.fromkeys(
        ('brightness', 'color', 'contrast', 'sharpness'), (0.05, 0.95)
    ) | dict(posterize=(0, 4), solarize=(0, 256), rotate=(0, 30)) | dict.fromkeys(
        ('shear_x', 'shear_y', 'translate_x', 'translate_y'), (0, 0.3)
    )
    assert {k for k, o in OPERATIONS.items() if o.signed} == {
        'rotate',
        'shear_x',
        'shear_y',
        'translate_x',
        'translate_y',
    }


@quick
@given(st.sampled_from(['rotate']), st.floats(-180, 180), sizes, sizes, seeds)
def test_rotation_agrees_with_torchvision(name, angle, h, w, seed):
    x = images(2, 3, h, w, seed)
    ours = OPERATIONS[name].apply(x, torch.full((2,), angle))
    allowed = (
        0.02 if abs(angle % 45) > 0.01 and abs(angle % 45 - 45) > 0.01 else 1.0
    )  # pixels half way between two others
    assert (ours != vision.rotate(x, angle, fill=[127.0])).float().mean() <= allowed


def test_affine_maps_by_hand():
    x = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    half_turn = torch.tensor([[[-1.0, 0, 0], [0, -1, 0]]])
    assert torch.equal(affine(x, half_turn), x.flip(2, 3))
    assert affine(x, torch.tensor([[[1.0, 0, 1], [0, 1, 0]]]), fill=9)[0, 0].tolist() == [
        [1, 2, 9],
        [4, 5, 9],
        [7, 8, 9],
    ]
    assert translate_x(x, torch.tensor([0.5]))[0, 0].tolist() == [[127, 0, 1], [127, 3, 4], [127, 6, 7]]


def test_posterize_by_hand():
    x = torch.tensor([255, 200, 17, 3], dtype=torch.uint8).view(1, 1, 1, 4)
    assert posterize(x, torch.tensor([4.0])).flatten().tolist() == [240, 192, 16, 0]
    assert posterize(x, torch.tensor([8.0])).flatten().tolist() == [0, 0, 0, 0]


@quick
@given(seeds, st.integers(0, 3), st.floats(0, 1))
def test_views_are_a_pure_function_of_the_generator(seed, n, probability):
    x, strong = images(20), RandAugment(n, probability)
    before, state = x.clone(), torch.get_rng_state()
    a, b = strong(x, generator(seed)), strong(x, generator(seed))
    assert torch.equal(a, b) and a.shape == x.shape and a.dtype == torch.uint8 and torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_global_one_is_used():
    torch.manual_seed(3)
    a = Chain((RandAugment(), Cutout(4)))(images())
    torch.manual_seed(3)
    assert torch.equal(Chain((RandAugment(), Cutout(4)))(images()), a)


def test_every_magnitude_in_the_range_can_be_drawn_and_none_outside():
    x = torch.full((3000, 1, 3, 3), 200, dtype=torch.uint8)
    level = RandAugment(1, 1.0, ('brightness',))(x, generator(0))[:, 0, 0, 0].float() / 200
    assert 0.045 <= level.min() < 0.06 and 0.94 < level.max() <= 0.95
    kept = RandAugment(1, 1.0, ('posterize',))(x + 55, generator(0))[:, 0, 0, 0]
    assert set(kept.tolist()) == {255, 254, 252, 248, 240}


def test_directions_are_drawn_equally_often():
    x = torch.zeros(3000, 1, 8, 8, dtype=torch.uint8)
    grey = RandAugment(1, 1.0, ('translate_x',))(x, generator(0))[:, 0, 0] == 127
    left, right = grey[:, 0], grey[:, -1]
    assert not (left & right).any() and abs(int(left.sum()) - int(right.sum())) < 200


def test_few_images_and_none():
    for n in (0, 1):
        assert Chain((RandAugment(), Cutout(4)))(images(n), generator(0)).shape == (n, 3, 9, 7)


def test_channels_last_images_give_the_same_views():
    x = images(20)
    assert torch.equal(
        Chain((RandAugment(), Cutout(4)))(x.contiguous(memory_format=torch.channels_last), generator(0)),
        Chain((RandAugment(), Cutout(4)))(x, generator(0)),
    )


@quick
@given(sizes, sizes, st.integers(0, 6), seeds)
def test_the_square_is_never_larger_than_its_size(h, w, half, seed):
    x = torch.full((30, 3, h, w), 255, dtype=torch.uint8)
    gone = Cutout(2 * half, fill=0)(x, generator(seed)) == 0
    assert torch.equal(gone[:, 0], gone[:, 2])
    rows, columns = gone[:, 0].any(2).sum(1), gone[:, 0].any(1).sum(1)
    assert (
        rows.max() <= 2 * half
        and columns.max() <= 2 * half
        and torch.equal(gone[:, 0].sum((1, 2)), rows * columns)
    )
    assert not half or rows.min() >= min(half, h)


def test_a_square_in_each_image_at_its_own_place():
    found = cut_out(
        torch.ones(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 3]), torch.tensor([0, 2]), 2, fill=0
    )
    assert (found == 0).nonzero().tolist() == [
        [0, 0, 0, 0],
        [1, 0, 2, 1],
        [1, 0, 2, 2],
        [1, 0, 3, 1],
        [1, 0, 3, 2],
    ]


def test_the_strong_view_of_a_data_set():
    cifar, digits = strong_augmentation_for('cifar10'), strong_augmentation_for('digits')
    assert cifar == Chain((CropFlip(4, True), RandAugment(2), Cutout(16))) and digits == Chain(
        (CropFlip(1, False), RandAugment(2), Cutout(4))
    )
    assert strong_augmentation_for('svhn', 0).parts[2] == Cutout(0)
    assert isinstance(hash(cifar), int)


@pytest.mark.parametrize(
    'make, error, message',
    [
        (lambda: RandAugment(-1), ValueError, 'n is -1; give a whole number'),
        (lambda: RandAugment(1.5), ValueError, 'n is 1.5'),
        (lambda: RandAugment(probability=2.0), ValueError, 'probability is 2.0'),
        (lambda: RandAugment(operations=()), ValueError, 'none given; choose from identity'),
        (lambda: RandAugment(operations=('rotate', 'blur')), ValueError, r"\['blur'\]; choose from"),
        (lambda: Cutout(5), ValueError, 'size is 5; give an even number'),
        (lambda: Cutout(-2), ValueError, 'size is -2'),
        (lambda: strong_augmentation_for('mnist'), ValueError, "'mnist' is not a data set"),
    ],
)
def test_settings_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize('augment', (RandAugment(), Cutout(4)))
@pytest.mark.parametrize(
    'x, error, message',
    [
        (images().float(), TypeError, 'x is torch.float32; give images as uint8'),
        (images()[0], ValueError, r'shape \(3, 9, 7\)'),
        (images(c=2), ValueError, 'with 1 or 3 channels'),
        ([1], TypeError, 'x is list'),
    ],
)
def test_images_that_are_none(augment, x, error, message):
    with pytest.raises(error, match=message):
        augment(x, generator(0))


def test_an_operation_of_ones_own():
    OPERATIONS['upside_down'] = Operation(lambda x, m: x.flip(2))
    try:
        assert torch.equal(RandAugment(1, 1.0, ('upside_down',))(images(), generator(0)), images().flip(2))
    finally:
        del OPERATIONS['upside_down']
