"Texts as numbers: ragged storage, padding, truncation, cache, errors."

import warnings

import pytest
import torch

from kd_aif.data.text_files import read_texts
from kd_aif.data.tokens import joined_tokens, tokenize


def single(texts):
    return read_texts((texts, [0] * len(texts)))


def test_tokens_of_sentences(words):
    tokens = tokenize(single(['10 11', '12', '13 14 15']), words())
    assert len(tokens) == 3 and tokens.lengths.tolist() == [4, 3, 5] and tokens.pad_id == 0
    batch = tokens.batch(torch.tensor([1, 0]))
    assert batch['input_ids'].tolist() == [[1, 12, 2, 0], [1, 10, 11, 2]]
    assert batch['attention_mask'].tolist() == [[1, 1, 1, 0], [1] * 4]
    assert batch['token_type_ids'].tolist() == [[0] * 4] * 2
    assert {v.dtype for v in batch.values()} == {torch.int64}
    assert {v.dtype for v in tokens.values.values()} == {torch.int32}
    assert list(tokens.batch(torch.tensor([1]), 'teacher.'))[0] == 'teacher.input_ids'


def test_padding_on_the_left_with_a_token_of_its_own(words):
    tokens = tokenize(single(['10 11', '12']), words(pad=9, side='left', types=False))
    batch = tokens.batch(torch.tensor([1, 0]))
    assert batch['input_ids'].tolist() == [[9, 1, 12, 2], [1, 10, 11, 2]]
    assert batch['attention_mask'].tolist() == [[0, 1, 1, 1], [1] * 4]
    assert set(batch) == {'input_ids', 'attention_mask'}


def test_pairs_and_the_longer_part_is_cut_first(words):
    data = single([('10 11 12 13', '20'), ('10', '20')])
    with pytest.warns(UserWarning, match='tokenizer: 1 of 2 texts .* are cut at 6 tokens') as caught:
        tokens = tokenize(data, words(), max_length=6)
    assert len(caught) == 1
    batch = tokens.batch(torch.arange(2))
    assert batch['input_ids'].tolist() == [[1, 10, 11, 2, 20, 2], [1, 10, 2, 20, 2, 0]]
    assert batch['token_type_ids'].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_cut_texts_are_counted_over_many_calls(words):
    data = single(['10 11 12', '10 11'] * 1100)
    with pytest.warns(UserWarning, match='1100 of 2200'):
        tokens = tokenize(data, words(), max_length=4)
    assert tokens.truncated == 1100 and tokens.lengths.max() == 4
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert tokenize(data, words(), max_length=5).truncated == 0


def test_the_limit_without_max_length(words):
    assert tokenize(single(['10']), words(longest=7)).max_length == 7
    assert tokenize(single(['10']), words(longest=int(1e30))).max_length == 512
    assert tokenize(single(['10']), words(longest=int(1e30)), 4000).max_length == 4000


def test_encoded_once_then_read(words):
    data, first, second = single(['10 11', '12']), words(), words()
    a, b = tokenize(data, first), tokenize(data, second)
    assert (first.calls, second.calls) == (1, 0)
    assert torch.equal(a.values['input_ids'], b.values['input_ids']) and a.tokenizer == b.tokenizer
    for other in words(shift=1), words(pad=5), words(types=False):
        tokenize(data, other)
        assert other.calls == 1
    again = words()
    tokenize(single(['10 11', '13']), again)
    tokenize(data, again, max_length=8)
    assert again.calls == 2
    unknown = words(named=False)
    tokenize(data, unknown)
    tokenize(data, unknown)
    assert unknown.calls == 2


def test_a_damaged_file_is_made_again(words, tmp_path):
    data = single(['10 11', '12'])
    before = tokenize(data, words())
    (file,) = (tmp_path / 'cache').glob('tokens-*.safetensors')
    whole = file.read_bytes()
    for damaged in b'', whole[:-3], whole[:-3] + b'abc':
        file.write_bytes(damaged)
        for calls in 1, 0:
            again = words()
            assert torch.equal(tokenize(data, again).values['input_ids'], before.values['input_ids'])
            assert again.calls == calls


def test_two_sets_as_one(words):
    a, b = (tokenize(single(t), words()) for t in (['10 11', '12'], ['13 14 15']))
    both = joined_tokens(a, b)
    assert both.lengths.tolist() == [4, 3, 5]
    assert both.batch(torch.tensor([2]))['input_ids'].tolist() == [[1, 13, 14, 15, 2]]
    for other in (
        tokenize(single(['10']), words(shift=1)),
        tokenize(single(['10']), words(), max_length=9),
        tokenize(single(['10']), words(named=False)),
    ):
        with pytest.raises(ValueError, match='use one tokenizer and one max_length for both'):
            joined_tokens(a, other)


@pytest.mark.parametrize(
    'tokenizer', ['bert-base-uncased', None, torch.nn.Linear(2, 2), lambda texts: texts],
    ids=['name', 'none', 'network', 'function'],
)
def test_what_is_no_tokenizer(tokenizer):
    with pytest.raises(TypeError, match='tokenizer is a .*AutoTokenizer.from_pretrained'):
        tokenize(single(['10']), tokenizer)


def test_what_is_refused(words):
    data = single(['10'])
    with pytest.raises(ValueError, match='set tokenizer.pad_token = tokenizer.eos_token'):
        tokenize(data, words(pad=None))
    for most in 3, 33, 8.0, True, '8':
        with pytest.raises(ValueError, match='give a whole number from 4 to 32'):
            tokenize(data, words(), most)
    with pytest.raises(TypeError, match='data is a list'):
        tokenize(['10'], words())
    with pytest.raises(ValueError, match='data is empty'):
        tokenize(data.select([]), words())


def test_a_text_without_tokens_and_a_tokenizer_that_gives_more(words):
    class Silent(words):
        def encode(self, texts, most):
            return ([], []) if texts == ('11',) else super().encode(texts, most)

    with pytest.raises(ValueError, match="no token in 1 texts, the first is number 1: '11'"):
        tokenize(single(['10', '11']), Silent())

    class More(words):
        def __call__(self, *texts, **options):
            return dict(super().__call__(*texts, **options), bbox=[[0]])

    with pytest.raises(ValueError, match='also gives bbox'):
        tokenize(single(['10']), More())


def fast(**options):
    "A fast tokenizer of the transformers library over a few words"
    transformers = pytest.importorskip('transformers')
    tokenizers = pytest.importorskip('tokenizers')
    vocabulary = {
        w: k for k, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'good', 'bad', 'film'])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='[UNK]'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]',
        pair='[CLS] $A [SEP] $B:1 [SEP]:1',
        special_tokens=[('[CLS]', 2), ('[SEP]', 3)],
    )
    names = ['input_ids', 'token_type_ids', 'attention_mask']
    marks = dict(unk_token='[UNK]', pad_token='[PAD]')
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=names, **(marks | options)
    )


@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('most', [16, 7])
def test_batches_are_those_of_the_library(side, most):
    tokenizer = fast(padding_side=side, model_max_length=16)
    firsts = ['a good film', 'bad', 'a good good good film', 'a film'] * 3
    seconds = ['a bad film', 'a a a a', 'bad', 'good'] * 3
    for data in single(firsts), single(list(zip(firsts, seconds))):
        texts = [firsts, seconds] if data.is_pair else [firsts]
        chosen = torch.tensor([5, 2, 3])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            tokens = tokenize(data, tokenizer, most)
        again = tokenizer(
            *([t[i] for i in chosen] for t in texts),
            padding=True,
            truncation='longest_first',
            max_length=most,
            return_tensors='pt',
        )
        batch = tokens.batch(chosen)
        assert set(batch) == set(again)
        assert all(torch.equal(batch[k], again[k]) for k in batch)
        whole = tokenizer(*texts)['input_ids']
        assert tokens.truncated == sum(len(ids) > most for ids in whole)


def test_settings_of_the_last_call_do_not_matter(tmp_path):
    tokenizer, data = fast(), single(['a good film', 'bad'])
    tokenize(data, tokenizer)
    tokenizer(['a good film'], truncation=True, max_length=2, padding='max_length')
    tokenize(data, tokenizer)
    assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_tokenizers_without_their_wrapper_or_without_padding():
    tokenizer = fast()
    with pytest.raises(TypeError, match='tokenizer_object='):
        tokenize(single(['a']), tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match='no padding token'):
        tokenize(single(['a']), fast(pad_token=None))
