"""SAFE reports of images, texts and numbers"""

import numpy as np
import pytest
import torch
from torch import nn

from kd_aif.data.images import subset
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.models.build import build_model
from kd_aif.trust.network_costs import measure_energy, network_cost
from kd_aif.trust.principles import measure_network, SafeOptions, without_color
from kd_aif.trust.safe import plain_measures, radar_values, safe_report, table_rows

QUIET = SafeOptions(n_resamples=20, progress=False)


@pytest.fixture(scope='module')
def batches():
    return ImageBatches(subset(load_images('digits', 'test', progress=False), 120, 0), 60)


@pytest.fixture
def network():
    return build_model('cnn8', 10, 1, in_features=64)


class Texts:
    "Batches of token ids whose first word decides"

    def __init__(self, regression=False):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 50, (40, 12), generator=g)
        self.y = self.ids[:, 1].float() / 50 if regression else (self.ids[:, 1] > 25).long()

    def __iter__(self):
        for i in range(0, 40, 20):
            ids = self.ids[i : i + 20]
            yield dict(
                index=torch.arange(i, i + 20),
                y=self.y[i : i + 20],
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
            )


class FirstWord(nn.Module):
    "Looks at the word behind the first token, where it may"

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.scale = outputs, nn.Parameter(torch.ones(1))

    def forward(self, input_ids, attention_mask):
        word = (input_ids[:, 1] * attention_mask[:, 1]).float()[:, None] / 50 * self.scale
        return word if self.outputs == 1 else torch.cat([torch.full_like(word, 0.5), word], 1)


def test_the_part_that_a_text_network_reads_is_found():
    measures = measure_network(FirstWord(2), Texts(), QUIET)
    assert measures['explainable']['concentration'] == pytest.approx(1)
    assert measures['explainable']['rge part 1 of 3'] > 0.2
    assert measures['explainable']['rge part 3 of 3'] == pytest.approx(0)
    assert 0.5 < measures['robust']['rgr words'] < 1


def test_numbers_have_an_rga_and_no_classes():
    measures = measure_network(FirstWord(1), Texts(regression=True), QUIET)
    assert measures['accurate']['rga'].value == pytest.approx(1)
    assert set(measures['accurate']) == {'rga'}
    assert measures['fair'] == {}


def test_networks_are_left_as_they_were(batches, network):
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    safe_report(dict(only=network), batches, QUIET)
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_report_twice_is_the_same(batches, network):
    def numbers(report):
        found = plain_measures(report.measures['a'])
        return {k: v for k, v in found.items() if 'milliseconds' not in k and 'joule' not in k}

    first, second = (safe_report(dict(a=network), batches, QUIET) for _ in range(2))
    assert numbers(first) == numbers(second)


def test_a_measure_that_is_missing_has_a_dash(batches, network):
    report = safe_report(dict(a=network), batches, QUIET)
    report.measures['b'] = {k: {} for k in report.measures['a']}
    rows = {row[1]: row[2:] for row in table_rows(report)}
    assert rows['accuracy'][1] == '–'


def test_rgf_asks_for_what_is_protected(batches, network):
    options = SafeOptions(protected=without_color, n_resamples=20, progress=False)
    measures = measure_network(network, batches, options)
    assert measures['fair']['rgf'].value == pytest.approx(1)  # digits are grey as they are
    report = safe_report(dict(a=network), batches, options)
    assert radar_values(report)['a']['fair'] == pytest.approx(1)


@pytest.mark.parametrize('networks', [3, {}, dict(a='cnn8'), None])
def test_what_is_no_network(networks, batches):
    with pytest.raises(TypeError, match='networks is'):
        safe_report(networks, batches, QUIET)


def test_groups_that_do_not_fit(batches, network):
    with pytest.raises(ValueError, match='3 values for 120'):
        safe_report(dict(a=network), batches, SafeOptions(groups=[1, 2, 3], progress=False))


def test_counters_of_energy(tmp_path):
    for i, values in enumerate([(1000, 4000), (900, 100)]):
        folder = tmp_path / f'intel-rapl:{i}'
        folder.mkdir()
        (folder / 'max_energy_range_uj').write_text('1000')
        (folder / 'energy_uj').write_text(str(values[0]))
    with measure_energy(root=tmp_path) as energy:
        (tmp_path / 'intel-rapl:0/energy_uj').write_text('4000')
        (tmp_path / 'intel-rapl:1/energy_uj').write_text('100')
    assert energy.joules == pytest.approx((3000 + 200) / 1e6)


def test_a_counter_that_cannot_be_read_is_not_counted(tmp_path):
    folder = tmp_path / 'intel-rapl:0'
    folder.mkdir()
    (folder / 'energy_uj').write_text('')
    with measure_energy(root=tmp_path) as energy:
        pass
    assert energy.joules is None
    assert 'not measurable' in str(energy)


def test_a_smaller_network_costs_less(batches):
    small, large = (network_cost(build_model(n, 10, 1, in_features=64), batches) for n in ('cnn8', 'cnn16'))
    assert small.multiply_adds < large.multiply_adds
    assert small.parameters < large.parameters
    assert np.isfinite(small.seconds)
