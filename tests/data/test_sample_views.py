"What a person sees of a sample, and what a notebook shows"

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kd_aif.data.images import ImageData
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sample_galleries import (
    can_be_shown,
    gallery_html,
    labelled_samples,
    plain_image,
    png_uri,
    thumbnail,
    with_gallery,
)
from kd_aif.data.sample_views import (
    class_names,
    given_labels,
    label_text,
    sample_views,
    SampleView,
    tensor_image,
    view_texts,
)
from kd_aif.data.text_files import read_texts

HOSTILE = '<script>alert("1")</script>\n\'"$x|y$\u2028&amp;<img src=x onerror=alert(2)>'


def images(n=4, channels=3, classes=('cat', 'dog')):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, channels, 6, 5), dtype=torch.uint8, generator=g)
    y, index = torch.arange(n) % 2, torch.arange(n) * 10 + 5
    return ImageData(
        x, y, index, y, classes, 'toy', 'train', 'f', torch.full((channels,), 0.5), torch.ones(channels)
    )


class Own:
    "Batches with a view of their own"

    def __init__(self, views):
        self.views, self.asked = views, []

    def view(self, index):
        self.asked.append(list(index))
        return [self.views[i] for i in index]

    def __iter__(self):
        return iter(())


def test_images_are_shown_as_they_are_in_any_order_and_never_augmented():
    data = images()
    for batches in (data, ImageBatches(data, 2, augment=lambda x, g: x * 0, seed=3)):
        views = sample_views(batches, torch.tensor([35, 5, 35]))
        assert [v.index for v in views] == [35, 5, 35] and {v.kind for v in views} == {'image'}
        for view, place in zip(views, (3, 0, 3)):
            assert np.array_equal(np.asarray(view.image), data.x[place].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    'x, mode, corner',
    [
        (torch.tensor([[0.0, 1.0], [2.0, 4.0]]), 'L', 255),
        (torch.arange(12.0).reshape(3, 2, 2) - 50, 'RGB', (70, 162, 255)),
        (torch.arange(36.0).reshape(6, 2, 3).permute(0, 1, 2), 'RGB', None),
        (torch.full((1, 2, 2), 7.0), 'L', 128),
        (torch.full((2, 2), float('nan')), 'L', 128),
        (torch.tensor([[0, 3], [9, 250]], dtype=torch.uint8), 'L', 250),
        (np.arange(8).reshape(2, 2, 2), 'L', None),
        (torch.ones(1, 2, 2, dtype=torch.bfloat16), 'L', 128),
    ],
)
def test_tensors_as_pictures(x, mode, corner):
    picture = tensor_image(x)
    assert picture.mode == mode
    assert corner is None or picture.getpixel((picture.width - 1, picture.height - 1)) == corner


def test_batches_of_tensors():
    index = torch.tensor([4, 2])
    row = [dict(x=torch.eye(2), index=index)]
    assert sample_views(row, [2])[0].text == '0, 1'
    assert sample_views([dict(input_ids=torch.ones(2, 3), index=index)], [2])[0].kind == 'none'
    assert sample_views([dict(x=torch.rand(2, 1, 4, 4), index=index)], [2])[0].image.size == (4, 4)
    assert sample_views(row, []) == []


def test_texts_pairs_and_paths():
    pairs = read_texts(([('a', 'b'), ('c', 'd')], ['x', 'y']))
    assert sample_views(pairs, [1])[0].text == 'c\nd'
    assert view_texts(pairs, [1, 0]) == dict(text=['c\nd', 'a\nb'])
    own = Own({i: SampleView(i, 'none', path=f'{i}.png') for i in range(600)})
    assert view_texts(own, range(600)) == dict(path=[f'{i}.png' for i in range(600)])
    assert max(map(len, own.asked)) <= 256
    assert view_texts([dict(x=torch.eye(2), index=torch.arange(2))], [0]) == {}


class Lies(Own):
    def view(self, index):
        return [self.views[0]]


BAD_VIEWS = {
    'unknown index': (images(), [6], ValueError, 'first 6'),
    'a bool': (images(), [True], TypeError, 'flat list of integers'),
    'a float': (images(), [1.0], TypeError, 'flat list of integers'),
    'nested': (images(), [[5]], TypeError, 'flat list of integers'),
    'a text': (images(), '5', TypeError, 'stable indices'),
    'a number': (images(), 5, TypeError, 'stable indices'),
    'a tensor of reals': (images(), torch.ones(1), TypeError, 'flat list of integers'),
    'no batches': (None, [1], TypeError, 'NoneType'),
    'a tensor for batches': (torch.ones(2), [1], TypeError, 'Tensor'),
    'one batch': (dict(index=torch.ones(1)), [1], TypeError, 'dict'),
    'an iterator': (iter([]), [1], ValueError, 'read only once'),
    'no index': ([dict(x=torch.ones(1, 2))], [0], ValueError, "no 'index'"),
    'empty': ([], [0], ValueError, '1 of 1 samples are not in the batches'),
    'own view that lies': (Lies({0: SampleView(0, 'none')}), [1, 2], ValueError, 'one SampleView for each'),
}


@pytest.mark.parametrize('batches, index, kind, words', BAD_VIEWS.values(), ids=BAD_VIEWS)
def test_views_that_cannot_be(batches, index, kind, words):
    with pytest.raises(kind, match=words):
        sample_views(batches, index)


BAD_PICTURES = {
    'kind': (lambda: SampleView(0, 'sound'), ValueError, "'image'"),
    'shape': (lambda: tensor_image(torch.ones(2, 2, 2, 2)), ValueError, 'one picture'),
    'empty': (lambda: tensor_image(torch.ones(3, 0, 2)), ValueError, 'one picture'),
    'no picture': (lambda: thumbnail(torch.ones(2, 2)), TypeError, 'Pillow'),
    'size': (lambda: thumbnail(Image.new('L', (9, 9)), 4), ValueError, 'size is 4'),
    'quality': (lambda: thumbnail(Image.new('L', (9, 9)), 96, 0), ValueError, 'quality is 0'),
    'no view': (lambda: gallery_html({'a': [('view', 'caption')]}), TypeError, 'SampleView'),
}


@pytest.mark.parametrize('call, kind, words', BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_pictures_that_cannot_be(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize(
    'mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I', 'F', 'I;16']
)
def test_every_mode_becomes_a_file(mode):
    picture = Image.new(mode, (200, 100))
    assert plain_image(picture).mode in ('L', 'RGB')
    assert Image.open(io.BytesIO(thumbnail(picture, 50))).size == (50, 25)
    assert png_uri(picture).startswith('data:image/png;base64,')


def test_what_is_transparent_lies_on_white():
    assert plain_image(Image.new('RGBA', (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_names_labels_and_words():
    data = images(classes=('cat', HOSTILE))
    assert class_names(ImageBatches(data)) == ('cat', HOSTILE) and class_names([]) is None
    index, y = given_labels(ImageBatches(data, 2))
    assert index.tolist() == [5, 15, 25, 35] and y.tolist() == [0, 1, 0, 1]
    words = [
        label_text(1, ('a', 'b')),
        label_text(2, ('a', 'b')),
        label_text(0.5, None),
        label_text(-1, ('a', 'b')),
    ]
    assert words == ['b', '2', '0.5', '-1']


def test_a_gallery_escapes_names_texts_and_headings():
    data = images(classes=('cat', HOSTILE))
    html = gallery_html({HOSTILE: labelled_samples(data, [15, 5], {15: 0.5, 5: -1})})
    html += gallery_html({'a': [(SampleView(1, 'text', HOSTILE), HOSTILE)]})
    assert '<script' not in html and '<img src=x' not in html and html.count('data:image/png') == 2
    assert html.count('mathjax_ignore') >= 4
    bundle = with_gallery('**1 < 2** <script>', {})
    assert bundle['text/html'] == '<p><strong>1 &lt; 2</strong> &lt;script&gt;</p>\n'


def test_what_can_be_shown():
    index = torch.arange(2)
    assert can_be_shown(images()) and can_be_shown([dict(x=torch.rand(2, 1, 3, 3), index=index)])
    assert can_be_shown(Own({}))
    assert not any(map(can_be_shown, (None, [], [dict(x=torch.eye(2), index=index)], ['text'], iter([]))))
