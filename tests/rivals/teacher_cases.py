"Networks, divergences and auxiliary losses for the tests of teachers that learn along."

import torch
import torch.nn.functional as F

from kd_aif.distillation.objective import default_outputs
from kd_aif.models.build import build_model
from kd_aif.rivals.branches import DiversePeers, NativeEnsemble
from kd_aif.rivals.online_teachers import DeepMutualLearning, TeacherAdapter, bdkd_loss

B, C = 6, 4  # batch, classes
EXTRAS = 'dml', 'one', 'okddip', 'pesf', 'bdkd'
MODULES = EXTRAS[:-1]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed, name='cnn8'):
    return build_model(name, 10, 1, seed=seed)


def kl(p, q, T):
    return F.kl_div((q / T).log_softmax(1), (p / T).softmax(1), reduction='none').sum(1) * T * T


def clones(outputs):
    return [o.detach().clone().requires_grad_() for o in outputs]


def outputs_of(digits, name='cnn8', seed=0):
    return default_outputs(network(seed, name), digits)


def extra(name, student, teacher):
    "The term of a method, of untrained networks"
    return dict(
        dml=lambda: DeepMutualLearning([network(1, 'cnn16')]),
        one=lambda: NativeEnsemble([network(1), network(2)], student),
        okddip=lambda: DiversePeers([network(1), network(2), network(3)], student),
        pesf=lambda: TeacherAdapter(teacher),
        bdkd=lambda: lambda s, t, batch: bdkd_loss(s[-1], t[-1]),
    )[name]()
