"""Layers kept out of a decoder, whose cache counts them"""

import pytest
import torch

from kd_aif.models.features import default_forward
from kd_aif.models.text import keep_layers

transformers = pytest.importorskip('transformers')


@pytest.mark.parametrize('layers', [(0, 2), (1, 3), (3,)])
def test_kept_layers_of_a_decoder(layers):
    sizes = dict(n_embd=16, n_layer=4, n_head=2, vocab_size=50, num_labels=2, pad_token_id=0)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes)).eval()
    student = keep_layers(model, layers)
    logits = default_forward(student, dict(input_ids=torch.tensor([[5, 6], [7, 0]])))
    assert logits.shape == (2, 2) and bool(logits.isfinite().all())
    assert [block.attn.layer_idx for block in student.transformer.h] == list(range(len(layers)))
    assert [block.attn.layer_idx for block in model.transformer.h] == [0, 1, 2, 3]
