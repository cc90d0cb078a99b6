"`distill` with all settings side by side, as tests vary them: they are sorted into its groups of settings"

from dataclasses import fields


from kd_aif.distillation import distill as module
from kd_aif.distillation.objective import Objective
from kd_aif.distillation.schedules import OneShot
from kd_aif.distillation.trainer import Training
from kd_aif.distillation.weighting import Fixed, Influence, Published, Reweighting

PLAIN = 'mechanism', 'schedule', 'test'
SCHEDULE = 'make_teacher', 'generations'
GROUPS = dict(objective=Objective, training=Training)


def names(kind):
    return {f.name for f in fields(kind)}


def taken(settings, kind):
    "Take the settings of a group out of all settings"
    return {k: settings.pop(k) for k in names(kind) & settings.keys()}


def weighting_of(settings):
    "Given weights, a callback, a strength, or calibrated influence; None where nothing is said"
    weights, beta = settings.pop('weights', None), settings.pop('beta', None)
    if weights is not None:
        options = taken(settings, Fixed)
        return Reweighting(weights, **options) if callable(weights) else Fixed(weights, **options)
    if beta is not None:
        return Published(beta, **taken(settings, Published))
    options = taken(settings, Influence)
    return Influence(**options) if options else None


def distill(student, teacher, train, val, **settings):
    "The run of these settings"
    options = {k: settings.pop(k) for k in PLAIN if k in settings}
    if once := {k: settings.pop(k) for k in SCHEDULE if settings.get(k) is not None}:
        options['schedule'] = OneShot(getattr(options.get('schedule'), 'after', 0), **once)
    options |= {name: kind(**taken(settings, kind)) for name, kind in GROUPS.items()}
    weighting = settings.pop('weighting', None) or weighting_of(settings)
    assert not settings, f'unknown settings {sorted(settings)}'
    return module.distill(student, teacher, train, val, weighting=weighting, **options)
