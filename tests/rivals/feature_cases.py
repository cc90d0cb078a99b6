"Random features, maps of small networks and examples of every loss, for the tests of feature losses."

import torch

from kd_aif.rivals.published_losses import make_feature_loss

B, C, N = 6, 4, 30  # batch, classes, samples
RELATIONAL = {'sp', 'cc', 'rkd', 'pkt', 'dist'}
LEARNT = {'fitnet', 'vid', 'ft', 'ofd', 'crd'}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(b=B):
    return torch.arange(b) % C


def rotation(d, seed=5):
    return torch.linalg.qr(random(d, d, seed=seed)).Q


def network_maps(seed, channels, size, b=B):
    "[stem, stage 1, 2, 3, pooled, logits], of float32"
    shapes = [(channels, size), (channels, size), (2 * channels, size // 2), (4 * channels, size // 4)]
    return [random(b, c, s, s, seed=seed + i).float() for i, (c, s) in enumerate(shapes)] + [
        random(b, 4 * channels, seed=seed + 8).float(),
        random(b, C, seed=seed + 9).float(),
    ]


def example(name, b=B, **more):
    student, teacher = network_maps(0, 2, 8, b), network_maps(50, 3, 16, b)
    return (
        make_feature_loss(name, student, teacher, samples=N, **more),
        student,
        teacher,
        dict(y=labels(b), index=2 * torch.arange(b)),
    )


def replaced(loss, **parts):
    for k, v in parts.items():
        setattr(loss, k, v)
    return loss.double()


# torchdistill


LAYER = dict(path='a', io='output')
PAIRS = dict(one=dict(student=LAYER, teacher=LAYER))
PATHS = dict(
    student_module_path='a', student_module_io='output', teacher_module_path='a', teacher_module_io='output'
)
OUTPUTS = dict(student_output_path='a', teacher_output_path='a')


def theirs(loss, student, teacher):
    return loss({'a': {'output': student.clone()}}, {'a': {'output': teacher.clone()}})
