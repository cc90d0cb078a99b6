"Batches as Hugging Face makes them: `DataCollatorWithPadding`, images under 'pixel_values', its names of the columns."

import pytest
import torch
from torch.utils.data import DataLoader

transformers = pytest.importorskip('transformers')

from kd_aif.data.mixed_batches import MixedBatches
from kd_aif.distillation.distill import distill
from kd_aif.distillation.objective import Objective
from kd_aif.distillation.schedules import Online
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Published
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.influence.scores import influence_scores

WORDS = ['[PAD]', '[UNK]', *'abcdefgh']


def tokenizer(side):
    tokenizers = pytest.importorskip('tokenizers')
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token='[UNK]')
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = dict(pad_token='[PAD]', unk_token='[UNK]', padding_side=side)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def rows(n, first, seed, tokens):
    g, found = torch.Generator().manual_seed(seed), []
    for i in range(n):
        k = int(torch.randint(1, 8, (1,), generator=g))
        text = ' '.join(WORDS[2 + int(j)] for j in torch.randint(8, (k,), generator=g))
        found.append(dict(tokens(text, return_token_type_ids=False), y=i % 2, index=first + i))
    return found


def loaders(side='right'):
    tokens = tokenizer(side)
    collate = transformers.DataCollatorWithPadding(tokens)
    data = [rows(22, 0, 0, tokens), rows(14, 100, 1, tokens)]
    g = torch.Generator().manual_seed(0)  # batches of several widths
    return data, [DataLoader(d, 4, shuffle=k == 0, generator=g, collate_fn=collate) for k, d in enumerate(data)]


def text_network(kind, seed):
    torch.manual_seed(seed)
    settings = dict(vocab_size=len(WORDS), num_labels=2, pad_token_id=0)
    if kind == 'GPT2':
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **settings)
        return transformers.GPT2ForSequenceClassification(config).eval()
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **settings)).eval()


@pytest.mark.parametrize('side', ['right', 'left'])
def test_joined_batches_hold_the_texts_as_they_were(side):
    (train_rows, val_rows), (train, val) = loaders(side)
    known, seen = {r['index']: r for r in train_rows + val_rows}, []
    widths = set()
    for batch in MixedBatches(train, val):
        widths.add(batch['input_ids'].shape[1])
        for i, ids, mask, y, held_out in zip(
            *(batch[k] for k in ('index', 'input_ids', 'attention_mask', 'y', 'held_out'))
        ):
            seen.append(int(i))
            assert ids[mask == 1].tolist() == known[int(i)]['input_ids'] and (ids[mask == 0] == 0).all()
            assert int(y) == known[int(i)]['y'] and bool(held_out) == (int(i) >= 100)
    assert sorted(seen) == sorted(known) and len(widths) > 1


@pytest.mark.parametrize('kind', ['Bert', 'GPT2'])
@pytest.mark.parametrize('mechanism', ['student', 'both'])
def test_distillation_with_dynamic_padding(kind, mechanism):
    _, (train, val) = loaders()
    student, teacher = text_network(kind, 0), text_network('Bert', 1)
    before = [p.clone() for p in student.parameters()]
    settings = dict(objective=Objective(alpha=0.5), training=Training(epochs=1, lr=0.01, progress=False))
    run = distill(student, teacher, train, val, mechanism=mechanism, **settings)
    assert len(run.weights) == 22 and len(run.val_weights) == 14 and run.history[-1]['loss'] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters()))


def test_weights_of_mini_batches_need_a_classifier_of_vectors():
    _, (train, val) = loaders()
    settings = dict(schedule=Online(0), weighting=Published(), training=Training(epochs=1, progress=False))
    with pytest.raises(
        ValueError, match=r"GPT2ForSequenceClassification come from 'score' in another way: use Every"
    ):
        distill(text_network('GPT2', 0), text_network('Bert', 1), train, val, mechanism='student', **settings)


def test_images_under_their_name_in_transformers():
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=2, **sizes)
    model = transformers.ViTForImageClassification(config).eval()
    x, y, index = torch.randn(8, 3, 8, 8), torch.arange(8) % 2, torch.arange(8)
    score = lambda name: influence_scores(
        model,
        batch_cross_entropy,
        [{name: x, 'y': y, 'index': index}],
        [{name: x, 'y': y, 'index': index}],
        progress=False,
    )
    assert torch.equal(score('pixel_values').values, score('x').values)


@pytest.mark.parametrize('call', ['distill', 'scores'])
@pytest.mark.parametrize('ours, theirs', [('y', 'labels'), ('y', 'label'), ('index', 'idx')])
def test_other_names_of_label_and_index_are_named(call, ours, theirs):
    _, (train, val) = loaders()
    renamed = [{(theirs if k == ours else k): v for k, v in b.items()} for b in train]
    with pytest.raises(ValueError, match=f"rename '{theirs}' to '{ours}'"):
        if call == 'distill':
            distill(text_network('Bert', 0), None, renamed, val)
        else:
            influence_scores(text_network('Bert', 0), batch_cross_entropy, renamed, val, progress=False)
