"Texts and a tokenizer of words for the tests of text data: no download, no optional package."

import pytest


class WordTokenizer:
    "A word is a number, its token is that number; 1 stands before the text and 2 after each part"

    pad_token_type_id = 0

    def __init__(self, pad=0, side='right', longest=32, types=True, shift=0, named=True):
        self.pad_token_id, self.padding_side, self.model_max_length = pad, side, longest
        self.types, self.shift, self.calls = types, shift, 0
        self.model_input_names = ['input_ids', *['token_type_ids'] * types, 'attention_mask']
        if named:
            self.get_vocab = lambda: {str(k): k + shift for k in range(100)}

    def __call__(self, first, second=None, truncation=False, max_length=None, **options):
        self.calls += 1
        pairs = zip(first) if second is None else zip(first, second)
        rows = [self.encode(texts, max_length if truncation else None) for texts in pairs]
        found = dict(input_ids=[row[0] for row in rows])
        return dict(found, token_type_ids=[row[1] for row in rows]) if self.types else found

    def encode(self, texts, most):
        parts = [[int(word) + self.shift for word in text.split()] for text in texts]
        while most and 1 + sum(len(p) + 1 for p in parts) > most:
            max(parts, key=len).pop()
        ids, types = [1], [0]
        for kind, part in enumerate(parts):
            ids += [*part, 2]
            types += [kind] * (len(part) + 1)
        return ids, types


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    "No test reads what another one has written"
    monkeypatch.setenv('KD_AIF_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def words():
    "The class of the tokenizer"
    return WordTokenizer


@pytest.fixture
def numbered():
    "numbered(n): texts of 1 to 20 words, each word the number of its text"

    def texts(n, start=10):
        return [' '.join([str(start + k)] * (1 + (7 * k) % 20)) for k in range(n)]

    return texts
