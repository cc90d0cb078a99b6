"The loader's faults and properties: parquet files of several kinds, damaged caches and files, the hub out of reach, splits and batches."

import os, subprocess, sys
from dataclasses import replace
from fractions import Fraction
from io import BytesIO
from itertools import product
from pathlib import Path

import pandas as pd
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from kd_aif.data import sources
from kd_aif.data.augment import crop_flip
from kd_aif.data.images import ImageData, hold_out, subset
from kd_aif.data.label_noise import asymmetric_noise, corrupt, instance_noise, long_tail, symmetric_noise
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import DATASETS, _decode_all, _read_cache, load_images
from kd_aif.foundation.core import cache_dir
from kd_aif.foundation.core import generator


@pytest.fixture(scope='module')
def digits():
    return load_images('digits').select(range(60))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty data folder, named by the environment, and a cache of its own."
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('KD_AIF_DATA', str(tmp_path / 'data'))
    (tmp_path / 'data').mkdir()
    return tmp_path / 'data'


def encoded(image, format='PNG'):
    file = BytesIO()
    Image.fromarray(image[0].numpy()).save(file, format, **(dict(lossless=True) if format == 'WEBP' else {}))
    return dict(bytes=file.getvalue(), path=None)


def write(path, images, image='image', format='PNG', **labels):
    "A parquet file as other programs write it: bytes and numbers, without the metadata of `datasets`."
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(
        {image: [encoded(x, format) for x in images], **{k: v.tolist() for k, v in labels.items()}}
    ).to_parquet(path)
    return path


@pytest.fixture
def svhn(folder, digits):
    "Two files with 60 digits in the layout of SVHN."
    for i in range(2):
        half = digits.select(range(30 * i, 30 * i + 30))
        write(
            folder / 'svhn' / f'train-0000{i}-of-00002.parquet',
            half.x,
            'image',
            'WEBP' if i else 'PNG',
            label=half.y,
        )
    return folder


def load(name='svhn', **kwargs):
    return load_images(name, progress=False, **kwargs)


def test_files_in_order_of_their_names(svhn, digits):
    data = load()
    assert torch.equal(data.x, digits.x.expand(-1, 3, -1, -1)) and torch.equal(data.y, digits.y)
    assert data.index.tolist() == list(range(60))
    assert data.note == 'SVHN, partial' and data.classes == tuple('0123456789')
    assert 'SVHN, partial' in data._repr_markdown_() and 'SVHN, partial' in repr(data)


def test_cache_spares_decoding_and_changed_files_do_not_use_it(svhn, monkeypatch):
    first = load()
    decode, calls = _decode_all, []
    monkeypatch.setattr(
        sources, '_decode_all', lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs)
    )
    assert load().fingerprint == first.fingerprint and not calls
    half = first.select(range(30))
    write(svhn / 'svhn' / 'train-00000-of-00002.parquet', half.x, label=(half.y + 1) % 10)
    again = load()
    assert calls and again.fingerprint != first.fingerprint and torch.equal(again.y[:30], (half.y + 1) % 10)


@pytest.mark.parametrize('damage', ['truncated', 'one byte', 'empty', 'text'])
def test_damaged_cache_is_made_again(svhn, damage):
    first = load()
    (file,) = cache_dir().glob('svhn-train-*.safetensors')
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(
        {'truncated': content[: len(content) // 2], 'one byte': content, 'empty': b'', 'text': b'hello'}[
            damage
        ]
    )
    again = load()
    assert torch.equal(again.x, first.x) and again.fingerprint == first.fingerprint
    assert _read_cache(file) is not None, 'the cache was not mended'
    assert [f.name for f in cache_dir().iterdir()] == [file.name], 'temporary files were left behind'


def test_same_content_same_fingerprint_wherever_it_lies(svhn, tmp_path, digits):
    first = load()
    write(tmp_path / 'other' / 'svhn' / 'train-00000-of-00001.parquet', digits.x, label=digits.y)
    assert load(root=tmp_path / 'other').fingerprint == first.fingerprint


def test_two_kinds_of_labels_are_decoded_once(folder, digits, monkeypatch):
    write(
        folder / 'cifar100' / 'test-00000-of-00001.parquet',
        digits.x,
        'img',
        fine_label=digits.y * 11,
        coarse_label=digits.y,
    )
    fine = load('cifar100', split='test')
    monkeypatch.setattr(sources, '_decode_all', lambda *args: pytest.fail('decoded twice'))
    coarse = load('cifar100', split='test', label='coarse_label')
    assert torch.equal(fine.y, digits.y * 11) and torch.equal(coarse.y, digits.y)
    assert fine.fingerprint != coarse.fingerprint and torch.equal(fine.x, coarse.x)


def test_missing_label_column(folder, digits):
    write(folder / 'cifar100' / 'train-00000-of-00001.parquet', digits.x, 'img', fine_label=digits.y)
    with pytest.raises(ValueError, match="label='coarse_label'.*only fine_label"):
        load('cifar100', label='coarse_label')


def test_wrong_columns(folder, digits):
    write(folder / 'cifar10' / 'train-00000-of-00001.parquet', digits.x, 'picture', label=digits.y)
    with pytest.raises(ValueError, match='column img is missing among picture, label'):
        load('cifar10')


def test_labels_out_of_range(folder, digits):
    write(folder / 'svhn' / 'train-00000-of-00001.parquet', digits.x, label=digits.y + 1)
    with pytest.raises(ValueError, match='labels from 1 to 10.*number the classes from 0'):
        load()


def test_broken_parquet(folder):
    (folder / 'svhn').mkdir()
    (folder / 'svhn' / 'train-00000-of-00001.parquet').write_bytes(b'PAR1, but not really')
    with pytest.raises(ValueError, match='svhn: its parquet files cannot be read.*copy them again'):
        load()


@pytest.mark.parametrize(
    'row, message',
    [
        (dict(bytes=b'no image', path=None), 'row 7 cannot be decoded'),
        (encoded(torch.zeros(1, 9, 8, dtype=torch.uint8)), 'row 7 is .9, 8, 3.*images of one size'),
    ],
)
def test_broken_image_names_its_row(folder, digits, row, message):
    images = [encoded(x) for x in digits.x[:10]]
    images[7] = row
    (folder / 'svhn').mkdir()
    pd.DataFrame(dict(image=images, label=range(10))).to_parquet(
        folder / 'svhn' / 'train-00000-of-00001.parquet'
    )
    with pytest.raises(ValueError, match=message):
        load()
    assert not list(cache_dir().glob('*')), 'a failed load must leave no cache'


def test_argument_goes_before_the_environment(svhn, tmp_path):
    with pytest.raises(FileNotFoundError, match='root=.*nowhere.*is not a folder'):
        load(root=tmp_path / 'nowhere')


def test_environment_names_a_folder_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv('KD_AIF_DATA', str(folder / 'nowhere'))
    with pytest.raises(FileNotFoundError, match='KD_AIF_DATA=.*nowhere'):
        load('cifar10')


def test_folder_named_data_is_the_default(svhn, monkeypatch):
    monkeypatch.delenv('KD_AIF_DATA')
    monkeypatch.chdir(svhn.parent)
    assert len(load()) == 60


def test_hub_is_asked_by_its_own_names_and_once(folder, digits, monkeypatch):
    import datasets

    asked, features = (
        [],
        datasets.Features(
            img=datasets.Image(), label=datasets.ClassLabel(names=list(DATASETS['cifar10'].classes))
        ),
    )
    table = datasets.Dataset.from_dict(
        dict(img=[encoded(x) for x in digits.x], label=digits.y.tolist()), features
    )
    monkeypatch.setattr(
        datasets, 'load_dataset', lambda *args, **kwargs: asked.append((args, kwargs)) or table
    )
    data = load('cifar10', split='test')
    assert asked == [(('uoft-cs/cifar10', None), dict(split='test'))]
    assert data.classes[9] == 'truck' and torch.equal(data.y, digits.y) and data.note == 'CIFAR-10, partial'
    assert load('cifar10', split='test').fingerprint == data.fingerprint and len(asked) == 1


def test_progress_off_leaves_the_bars_of_datasets_as_they_were(svhn):
    import datasets

    before = datasets.is_progress_bar_enabled()
    load()
    assert datasets.is_progress_bar_enabled() == before


def test_missing_set_names_both_ways(folder):
    "A real attempt, in a process that may not use the network."
    code = "import kd_aif.data.sources as d; d.load_images('cifar100', progress=False)"
    run = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(folder.parent / 'hub')),
        capture_output=True,
        text=True,
        cwd=Path(sources.__file__).parents[2],  # not the package: its room `queue` would hide Python's own
    )
    last = [line for line in run.stderr.splitlines() if line.startswith('FileNotFoundError')]
    assert run.returncode and last, run.stderr
    for part in ('CIFAR-100', 'cifar100/train-*.parquet', str(folder), 'KD_AIF_DATA', 'uoft-cs/cifar100'):
        assert part in last[0]


# Properties of splits, noise and batches

labels = st.lists(st.integers(0, 4), min_size=2, max_size=80)
quick = settings(max_examples=40, deadline=None)


def made(y):
    y = torch.tensor(y)
    x = torch.randint(256, (len(y), 1, 3, 3), dtype=torch.uint8, generator=generator(0))
    return ImageData(
        x, y, torch.arange(len(y)) * 7, y, tuple('abcde'), 'made', 'train', '', torch.zeros(1), torch.ones(1)
    )


@quick
@given(labels, st.data())
def test_hold_out_is_a_partition_with_the_shares_of_the_classes(y, draw):
    data = made(y)
    n, seed = draw.draw(st.integers(1, len(y) - 1)), draw.draw(st.integers(0, 3))
    rest, held = hold_out(data, n, seed)
    assert len(held) == n and sorted(rest.index.tolist() + held.index.tolist()) == data.index.tolist()
    expected = n * torch.bincount(data.y, minlength=5) / len(y)
    assert ((torch.bincount(held.y, minlength=5) - expected).abs() < 1 + 1e-6).all()
    assert len(subset(data, n, seed)) == n
    assert torch.equal(data.x[held.index // 7], held.x)


@quick
@given(labels, st.floats(0, 1), st.integers(0, 3))
def test_noise_touches_only_labels_and_an_exact_share(y, rate, seed):
    data = made(y)
    symmetric, next_class = symmetric_noise(data, rate, seed), asymmetric_noise(data, rate, seed)
    for noisy in (symmetric, next_class):
        assert (
            torch.equal(noisy.x, data.x)
            and torch.equal(noisy.index, data.index)
            and torch.equal(noisy.clean_y, data.y)
        )
    assert symmetric.is_noisy.sum() <= round(rate * len(y))
    assert next_class.is_noisy.sum() == sum(round(rate * int(k)) for k in torch.bincount(data.y))
    assert torch.equal(next_class.y[next_class.is_noisy], (data.y[next_class.is_noisy] + 1) % 5)


def test_symmetric_noise_draws_from_all_classes():
    data = made([0] * 5000)
    counts = torch.bincount(symmetric_noise(data, 0.5, 0).y, minlength=5)
    assert counts[0] > 2500 and ((counts[1:] - 500).abs() < 100).all() and abs(int(counts[0]) - 3000) < 100


def random_probabilities(n, seed, zeros=0.0, C=5):
    "Class probabilities of a made-up network, a share of them exactly 0."
    g = generator(seed, 'opinions')
    p = torch.rand(n, C, generator=g) ** 4 * (torch.rand(n, C, generator=g) >= zeros)
    p[p.sum(1) == 0, 0] = 1
    return p / p.sum(1, keepdim=True)


@quick
@given(labels, st.floats(0, 1), st.integers(0, 3), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_instance_noise_is_exact_and_takes_the_second_choice(y, rate, seed, zeros):
    data = made(y)
    p = random_probabilities(len(y), seed, zeros)
    noisy = instance_noise(data, rate, p, seed)
    assert noisy.is_noisy.sum() == round(rate * len(y))
    for name in ('x', 'index', 'clean_y'):
        assert torch.equal(getattr(noisy, name), getattr(data, name))
    for i in noisy.is_noisy.nonzero().flatten().tolist():
        others = [c for c in range(5) if c != y[i]]
        assert noisy.y[i] in others and p[i, noisy.y[i]] == p[i, others].max()
    again = instance_noise(data, rate, p.numpy(), seed)
    assert torch.equal(again.y, noisy.y) and again.fingerprint == noisy.fingerprint


def test_instance_noise_draws_in_proportion_to_the_second_choice():
    data, draws = made([0] * 4), 4000
    p = torch.tensor([[0.9, 0.1, 0, 0, 0], [0.7, 0.1, 0.2, 0, 0], [0.4, 0, 0, 0.3, 0.3], [1, 0, 0, 0, 0]])
    hits = sum(instance_noise(data, 0.25, p, seed).is_noisy.double() for seed in range(draws)) / draws
    assert torch.allclose(hits, torch.tensor([1 / 6, 1 / 3, 1 / 2, 0], dtype=torch.double), atol=0.04)
    assert instance_noise(data, 0.75, p, 0).is_noisy.tolist() == [True, True, True, False], (
        'probability 0 comes last'
    )
    assert instance_noise(data, 1, p, 0).y.tolist() == [1, 2, 3, 1], 'a tie goes to the first class'


def test_instance_noise_on_noisy_labels_leaves_the_given_label():
    data = symmetric_noise(made([0, 1, 2, 3, 4] * 20), 0.5, 0)
    again = instance_noise(data, 0.3, random_probabilities(100, 0), 0)
    assert (again.y != data.y).sum() == 30 and torch.equal(again.clean_y, data.clean_y)


def rows(change):
    p = torch.full((3, 5), 0.2)
    p[1] = torch.tensor(change)
    return p


@pytest.mark.parametrize(
    'p, message',
    [
        (torch.full((4, 5), 0.2), r'shape \(4, 5\); give \(3, 5\)'),
        (torch.full((3, 4), 0.25), r'give \(3, 5\)'),
        (torch.full((15,), 0.2), r'give \(3, 5\)'),
        (rows([float('nan'), 0.25, 0.25, 0.25, 0.25]), '1 of 3; row 1'),
        (rows([float('inf'), 0, 0, 0, 0]), 'row 1'),
        (rows([2.0, 3, -1, -4, 1]), 'least -4.*softmax'),
        (rows([0.0] * 5), 'row 1 adds up to 0'),
        (rows([1.0] * 5), 'row 1 adds up to 5'),
    ],
)
def test_instance_noise_refuses_what_are_no_probabilities(p, message):
    with pytest.raises(ValueError, match=f'probabilities .*{message}'):
        instance_noise(made([0, 1, 2]), 0.5, p, 0)


@pytest.mark.parametrize('rate', [-0.1, 1.1, 40, float('nan')])
def test_instance_noise_refuses_rates(rate):
    with pytest.raises(ValueError, match='rate'):
        instance_noise(made([0, 1, 2]), rate, torch.full((3, 5), 0.2), 0)


def test_instance_noise_needs_two_classes():
    one = replace(made([0, 0]), classes=('a',))
    with pytest.raises(ValueError, match='at least 2'):
        instance_noise(one, 0.5, torch.ones(2, 1), 0)


def by_hand(image, brightness, contrast, blur):
    "One pixel after the other, in exact fractions."
    (c, h, w), new = image.shape, image.clone()
    b, k = Fraction(brightness), Fraction(contrast)
    inside = lambda i, n: min(max(i, 0), n - 1)
    for s, i, j in product(range(c), range(h), range(w)):
        around = [int(image[s, inside(i + u, h), inside(j + v, w)]) for u in (-1, 0, 1) for v in (-1, 0, 1)]
        level = Fraction(sum(around), 9) if blur else int(image[s, i, j])
        new[s, i, j] = round(b * (Fraction(255, 2) + k * (level - Fraction(255, 2))))
    return new


@quick
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 3]),
    st.sampled_from([0, 0.25, 0.5, 1]),
    st.sampled_from([0, 0.5, 0.75, 1]),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 3),
)
def test_corrupt_is_the_formula_on_an_exact_share(n, h, w, c, brightness, contrast, blur, share, seed):
    x = torch.randint(256, (n, h, w, c), dtype=torch.uint8, generator=generator(seed)).permute(0, 3, 1, 2)
    y = torch.arange(n) % 5
    data = ImageData(
        x,
        y,
        torch.arange(n) * 7,
        (y + 1) % 5,
        tuple('abcde'),
        'made',
        'train',
        'f',
        torch.zeros(c),
        torch.ones(c),
    )
    before, new = x.clone(), corrupt(data, share, seed, brightness, contrast, blur)
    assert torch.equal(data.x, before), 'the original was changed'
    assert new.x.dtype == torch.uint8 and new.x.shape == x.shape and new.note == 'made, shifted pixels'
    for name in ('y', 'clean_y', 'index', 'mean', 'std'):
        assert torch.equal(getattr(new, name), getattr(data, name))
    expected = torch.stack([by_hand(image, brightness, contrast, blur) for image in x])
    same, shifted = (new.x == x).flatten(1).all(1), (new.x == expected).flatten(1).all(1)
    k = round(share * n)
    assert (same | shifted).all() and shifted.sum() >= k and same.sum() >= n - k
    if not (same & shifted).any():
        assert shifted.sum() == k
    again = corrupt(data, share, seed, brightness, contrast, blur)
    assert torch.equal(again.x, new.x) and again.fingerprint == new.fingerprint != data.fingerprint


def test_corrupt_all_is_corrupt_each(digits):
    "More images than a piece holds, in one go and one after the other."
    many = digits.select(torch.arange(1300) % 60)
    whole = corrupt(many, 1, 0)
    one = torch.cat([corrupt(digits.select([i]), 1, 9).x for i in range(60)])
    assert torch.equal(whole.x, one[torch.arange(1300) % 60])
    assert (
        torch.equal(corrupt(many, 0.5, 3).index, many.index)
        and corrupt(many, 0.5, 3).fingerprint != corrupt(many, 0.5, 4).fingerprint
    )
    assert (
        len(
            {
                corrupt(digits, 1, 0, **k).fingerprint
                for k in ({}, dict(brightness=0.5), dict(contrast=0.4), dict(blur=False))
            }
        )
        == 4
    )
    assert len(corrupt(digits.select([]), 0.5, 0)) == 0


@pytest.mark.parametrize(
    'wrong',
    [
        dict(share=1.1),
        dict(share=float('nan')),
        dict(brightness=-0.1),
        dict(brightness=1.5),
        dict(contrast=float('inf')),
    ],
)
def test_corrupt_names_the_wrong_argument(digits, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        corrupt(digits, **dict(share=0.5, seed=0) | wrong)


@quick
@given(labels, st.floats(1, 200), st.integers(0, 3))
def test_long_tail_shifts_the_class_shares_of_any_set(y, imbalance, seed):
    data = made(y)
    tail, before = long_tail(data, imbalance, seed), torch.bincount(data.y, minlength=5)
    expected = [
        min(int(k), max(1, round(int(before.max()) * imbalance ** (-c / 4)))) for c, k in enumerate(before)
    ]
    assert torch.bincount(tail.y, minlength=5).tolist() == expected
    assert tail.index.tolist() == sorted(tail.index.tolist()) and torch.equal(tail.x, data.x[tail.index // 7])


@quick
@given(labels, st.integers(1, 90), st.booleans())
def test_an_epoch_is_every_image_once(y, batch_size, shuffle):
    data = made(y)
    batches = ImageBatches(data, batch_size, augment=crop_flip(2), shuffle=shuffle)
    found = list(batches)
    assert len(found) == len(batches)
    index = torch.cat([b['index'] for b in found])
    assert index.sort().values.tolist() == data.index.tolist() and (shuffle or torch.equal(index, data.index))
    assert torch.equal(torch.cat([b['y'] for b in found]), data.y[index // 7])


def test_cifar10_default_mapping():
    classes = DATASETS['cifar10'].classes
    data = made([0])
    y = torch.arange(10).repeat(50)
    data = ImageData(
        data.x.expand(500, -1, -1, -1),
        y,
        torch.arange(500),
        y,
        classes,
        'cifar10',
        'train',
        '',
        data.mean,
        data.std,
    )
    noisy = asymmetric_noise(data, 0.4, 0)
    pairs = {
        (classes[a], classes[b])
        for a, b in zip(noisy.clean_y[noisy.is_noisy].tolist(), noisy.y[noisy.is_noisy].tolist())
    }
    assert pairs == {
        ('truck', 'automobile'),
        ('bird', 'airplane'),
        ('deer', 'horse'),
        ('cat', 'dog'),
        ('dog', 'cat'),
    }
    assert noisy.is_noisy.float().mean() == 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_gpu_and_cpu_see_the_same_batches(digits):
    gpu, augment = digits.to('cuda'), crop_flip(2)
    for here, there in zip(ImageBatches(digits, 16, augment), ImageBatches(gpu, 16, augment), strict=True):
        assert there['x'].is_cuda and torch.equal(here['index'], there['index'].cpu())
        assert torch.allclose(here['x'], there['x'].cpu(), atol=1e-6)
    assert symmetric_noise(gpu, 0.4, 0).fingerprint == symmetric_noise(digits, 0.4, 0).fingerprint
    p = torch.rand(60, 10, generator=generator(0)).softmax(1)
    assert instance_noise(gpu, 0.4, p.cuda(), 0).fingerprint == instance_noise(digits, 0.4, p, 0).fingerprint
    assert (
        corrupt(gpu, 0.5, 0).fingerprint == corrupt(digits, 0.5, 0).fingerprint
        and corrupt(gpu, 0.5, 0).x.is_cuda
    )
