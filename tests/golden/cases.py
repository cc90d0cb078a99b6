"Small settings of every training procedure, whose results are kept to the last bit in golden.json"

import hashlib

import torch

from kd_aif.rivals.meta_weights import MetaWeightNet
from kd_aif.few_labels.cross_fitting import distill_ssl
from kd_aif.data.augment import augmentation_for
from kd_aif.data.images import hold_out, subset
from kd_aif.data.label_noise import asymmetric_noise, long_tail, symmetric_noise
from kd_aif.data.loaders import ImageBatches
from kd_aif.data.sources import load_images
from kd_aif.data.mixed_batches import MixedBatches
from kd_aif.distillation.objective import AuxiliaryLoss, default_outputs
from kd_aif.distillation.out_of_fold import out_of_fold_weights
from kd_aif.distillation.schedules import Every, OneShot, Online
from kd_aif.rivals.published_losses import make_feature_loss
from kd_aif.influence.cross_scores import cross_scores, Scoring
from kd_aif.influence.scores import influence_scores
from kd_aif.foundation.losses import batch_cross_entropy
from kd_aif.models.build import build_model
from kd_aif.weights.class_weights import ClassWeighting
from kd_aif.rivals.logit_losses import spherical_kd_loss
from kd_aif.rivals.online_teachers import DeepMutualLearning, bdkd_loss
from kd_aif.few_labels.batches import labelled_split
from kd_aif.few_labels.meta_pseudo_labels import ALGORITHMS
from kd_aif.few_labels.settings import SSLTraining
from kd_aif.few_labels.trainer import train_ssl
from kd_aif.influence.iterative_solvers import CG
from kd_aif.influence.solvers import EKFAC, Diagonal, Woodbury
from kd_aif.weights.transforms import EMA, Multiplicative

from flat_settings import distill


def digits(n=500):
    return subset(load_images('digits'), n, 0)


def noisy():
    train, val = hold_out(digits(), 150, 0)
    return symmetric_noise(train, 0.4, 0), val


def asymmetric():
    train, val = hold_out(subset(load_images('digits'), 900, 0), 200, 0)
    return asymmetric_noise(train, 0.4, 0), val


def tailed():
    train, val = hold_out(load_images('digits'), 200, 0)
    return long_tail(train, 30, 0), val


def loader(data, augment=True):
    return ImageBatches(data, 64, augmentation_for('digits') if augment else None, seed=0)


def network(name, seed):
    return build_model(name, 10, 1, seed=seed)


_teachers = {}


def teacher(make_data):
    "A teacher that was trained on training and validation samples; a new copy each time"
    if make_data not in _teachers:
        train, val = map(loader, make_data())
        model = network('cnn16', 7)
        distill(model, None, MixedBatches(train, val, 0), val, epochs=5, lr=0.1, seed=0, progress=False)
        _teachers[make_data] = {k: v.clone() for k, v in model.state_dict().items()}
    model = network('cnn16', 0)
    model.load_state_dict(_teachers[make_data])
    return model


def sha(*tensors):
    "The first 16 digits of a hash of the bytes of all tensors"
    h = hashlib.sha256()
    for t in tensors:
        t = t.detach().cpu().contiguous()
        h.update(str((t.dtype, tuple(t.shape))).encode())
        h.update(
            t.view(torch.uint8).numpy().tobytes()
            if t.ndim
            else t.reshape(1).view(torch.uint8).numpy().tobytes()
        )
    return h.hexdigest()[:16]


def state_sha(model):
    return None if model is None else sha(*model.parameters(), *model.buffers())


def of_run(run):
    "What is kept of a `distill` run"
    scores = None if run.scores is None else sha(run.scores.values.float())
    return dict(
        student=state_sha(run.student),
        teacher=state_sha(run.teacher),
        weights=sha(run.weights),
        val_weights=sha(run.val_weights),
        class_weights=None if run.class_weights is None else sha(run.class_weights.double()),
        scores=scores,
        metrics=run.metrics,
        history=run.history,
    )


def run(
    data=noisy, with_teacher=True, join=False, augment=True, make_loss=None, make_weights=None, **options
):
    "One `distill` run on digits"
    train_set, val_set = data()
    train, val = loader(train_set, augment), loader(val_set, augment)
    test = ImageBatches(subset(load_images('digits', 'test'), 150, 0), 150, shuffle=False)
    t = teacher(data) if with_teacher else None
    student = network('cnn8', 1)
    if make_weights:
        options['weights'] = make_weights(train, val, train_set, val_set)
    if make_loss:
        options['auxiliary'] = make_loss(student, t, train)
    options = dict(epochs=4, lr=0.1, alpha=0.5, seed=0, progress=False) | options
    return of_run(
        distill(student, t, MixedBatches(train, val, 0) if join else train, val, test=test, **options)
    )


def fixed(train, val, train_set, val_set):
    return torch.linspace(0.5, 1.5, len(train_set))


def fixed_all(train, val, train_set, val_set):
    return torch.linspace(0.5, 1.5, len(train_set) + len(val_set))


def ones(train, val, train_set, val_set):
    return torch.ones(len(train_set))


def meta(train, val, train_set, val_set):
    return MetaWeightNet(val, seed=0)


def attention(student, t, train):
    first = next(iter(train.eval_view()))
    with torch.no_grad():
        examples = [default_outputs(m.eval(), first) for m in (student, t)]
    return AuxiliaryLoss(make_feature_loss('at', *examples, seed=0), 10.0)


def balanced(student, t, train):
    return AuxiliaryLoss(lambda ours, theirs, batch: bdkd_loss(ours[-1], theirs[-1]))


def spherical(student, t, train):
    return AuxiliaryLoss(lambda ours, theirs, batch: spherical_kd_loss(ours[-1], theirs[-1]), 2.0)


def mutual(student, t, train):
    return AuxiliaryLoss(DeepMutualLearning([network('cnn8', 2)]))


def fresh():
    return network('cnn16', 3)


def out_of_fold():
    train_set, val_set = noisy()
    train, val = loader(train_set), loader(val_set)

    def fit(batches):
        return distill(network('cnn8', 4), None, batches, val, epochs=3, lr=0.1, progress=False).student

    found, _ = out_of_fold_weights(fit, train, val, progress=False)
    return dict(
        weights=sha(found.values), metrics=dict(clean_fraction=found.clean_fraction, p_value=found.p_value)
    )


def scores(solver, **options):
    train_set, val_set = noisy()
    train, val = loader(train_set).eval_view(), loader(val_set).eval_view()
    options = dict(last_layer=False, progress=False) | options
    found = influence_scores(teacher(noisy), batch_cross_entropy, train, val, solver, **options)
    return dict(
        scores=sha(found.values), metrics=dict(mean=float(found.values.mean()), std=float(found.values.std()))
    )


def crossed(**options):
    train_set, val_set = noisy()
    train, val = loader(train_set).eval_view(), loader(val_set).eval_view()
    found = cross_scores(teacher(noisy), batch_cross_entropy, train, val, **options)
    return dict(scores=sha(found.values, *found.reference), metrics=dict(mean=float(found.values.mean())))


def of_ssl(run):
    "What is kept of a semi-supervised run"
    return dict(
        student=state_sha(run.student),
        average=state_sha(run.ema_model),
        state=state_sha(run.state),
        metrics=run.metrics,
        history=run.history,
    )


def few(name='', cross_fitting=None, weights=None, **options):
    "One semi-supervised run on digits with 40 labels, or with 80 and two teachers"
    labelled, unlabelled, truth = labelled_split(digits(600), 40 if cross_fitting is None else 80, 0)
    test = subset(load_images('digits', 'test'), 150, 0)
    settings = dict(steps=24, batch_size=20, mu=2, lr=0.1, ema=0.95, every=8, seed=0, progress=False)
    training, student = SSLTraining(**(settings | options)), network('cnn8', 1)
    if cross_fitting is not None:
        options = dict(test=test, training=training, **cross_fitting)
        return of_ssl(distill_ssl(student, None, labelled, unlabelled, **options))
    algorithm = ALGORITHMS[name](truth) if name == 'supervised_all' else ALGORITHMS[name]()
    options = dict(test=test, training=training, weights=weights)
    return of_ssl(train_ssl(student, algorithm, labelled, unlabelled, **options))


def half(step, output):
    return torch.linspace(0.0, 1.0, len(output.unsupervised))


CASES = dict(
    ce=lambda: run(with_teacher=False),
    kd=lambda: run(),
    kd_val=lambda: run(join=True),
    kd_cached=lambda: run(augment=False),
    student=lambda: run(mechanism='student'),
    student_after=lambda: run(mechanism='student', schedule=OneShot(2)),
    student_every=lambda: run(mechanism='student', schedule=Every(1, 1)),
    student_all_layers=lambda: run(mechanism='student', schedule=Every(2, 1), last_layer=False),
    student_online=lambda: run(mechanism='student', schedule=Online(1), beta=1.0),
    both=lambda: run(mechanism='both', make_teacher=fresh),
    both_goes_on=lambda: run(mechanism='both'),
    both_twice=lambda: run(mechanism='both', make_teacher=fresh, generations=2),
    joint=lambda: run(mechanism='both', schedule=Every(1, 1)),
    teacher_first=lambda: run(mechanism='both', schedule=Every(2, 1, teacher_first=True)),
    published=lambda: run(mechanism='both', schedule=Every(1, 2), beta=1.0),
    online=lambda: run(mechanism='both', schedule=Online(1), beta=1.0),
    sigmoid=lambda: run(mechanism='student', beta=1.0),
    sigmoid_all_layers=lambda: run(mechanism='student', schedule=Every(1, 1), beta=2.0, last_layer=False),
    ema=lambda: run(mechanism='student', schedule=Every(1, 1), update=EMA(0.5)),
    multiplicative=lambda: run(mechanism='student', schedule=Every(1, 1), update=Multiplicative(0.5)),
    tail_student=lambda: run(tailed, mechanism='student', epochs=6),
    tail_both=lambda: run(tailed, mechanism='both', make_teacher=fresh, epochs=5),
    tail_joint=lambda: run(tailed, mechanism='both', schedule=Every(1, 1), epochs=5),
    asymmetric=lambda: run(asymmetric, mechanism='both', make_teacher=fresh),
    bfloat16=lambda: run(mechanism='student', autocast=torch.bfloat16),
    held_out=lambda: run(mechanism='student', include_validation=False),
    own_reference=lambda: run(
        mechanism='student', pooled_reference=False, folds=3, score=('posterior', 'loss')
    ),
    fixed_weights=lambda: run(make_weights=fixed),
    fixed_all=lambda: run(make_weights=fixed_all),
    fixed_alone=lambda: run(make_weights=fixed, include_validation=False),
    meta_weight_net=lambda: run(make_weights=meta),
    class_weights_alone=lambda: run(tailed, make_weights=ones, class_weighting=ClassWeighting()),
    attention=lambda: run(make_loss=attention, mechanism='student'),
    balanced_divergence=lambda: run(make_loss=balanced, join=True),
    spherical_weighted=lambda: run(make_loss=spherical, mechanism='student'),
    mutual=lambda: run(with_teacher=False, make_loss=mutual, join=True),
    out_of_fold=out_of_fold,
    scores_cg=lambda: scores(CG()),
    scores_woodbury=lambda: scores(Woodbury()),
    scores_ekfac=lambda: scores(EKFAC()),
    scores_diagonal=lambda: scores(Diagonal()),
    scores_local=lambda: scores(None, target='posterior', last_layer=True),
    crossed_all_layers=lambda: crossed(
        scoring=Scoring(last_layer=False, progress=False), score=('mean', 'loss')
    ),
    supervised=lambda: few('supervised'),
    supervised_all=lambda: few('supervised_all'),
    pseudo_label=lambda: few('pseudo_label', weights=half),
    fixmatch=lambda: few('fixmatch'),
    fixmatch_bfloat16=lambda: few('fixmatch', autocast=torch.bfloat16, finetune=5),
    mean_teacher=lambda: few('mean_teacher'),
    vat=lambda: few('vat'),
    meta_pseudo_labels=lambda: few('mpl'),
    kd_aif_ssl=lambda: few(cross_fitting=dict(refresh=5), steps=30),
)
