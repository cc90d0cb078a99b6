"Knowledge distillation in which every training sample carries a weight that says how much it helps on held-out data"
__version__ = "0.1.0"

from importlib import import_module

_HOME = {  # name -> module in which it is defined; imported when it is first asked for, so that this import stays quick
    'distill': 'distillation.distill',
    'Objective': 'distillation.objective',
    'AuxiliaryLoss': 'distillation.objective',
    'Training': 'distillation.trainer',
    'OneShot': 'distillation.schedules',
    'Every': 'distillation.schedules',
    'Online': 'distillation.schedules',
    'Influence': 'distillation.weighting',
    'Published': 'distillation.weighting',
    'Fixed': 'distillation.weighting',
    'Reweighting': 'distillation.weighting',
    'out_of_fold_weights': 'distillation.out_of_fold',
    'influence_scores': 'influence.scores',
    'cross_scores': 'influence.cross_scores',
    'Scoring': 'influence.cross_scores',
    'calibrated_weights': 'weights.calibration',
    'distill_ssl': 'few_labels.cross_fitting',
    'start_processes': 'foundation.processes',
    'stop_processes': 'foundation.processes',
    'shared_work': 'foundation.processes',
    'samples': 'data.samples',
    'sample_table': 'distillation.sample_table',
    'explain': 'trust.explain',
    'cleaning_list': 'trust.cleaning',
    'browse_page': 'trust.browse',
    'score_samples': 'trust.scored_samples',
    'score_out_of_fold': 'trust.scored_samples',
    'loss_weights': 'integrations.samplers',
    'DistillationTrainer': 'integrations.transformers_trainer',
    'load_images': 'data.sources',
    'build_model': 'models.build',
    'load_tokenizer': 'models.text',
    'text_classifier': 'models.text',
    'transformer_training': 'distillation.transformer_training',
    'evaluate': 'distillation.evaluation',
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f'module kd_aif has no attribute {name!r}; it hands on {", ".join(_HOME)}')
    value = globals()[name] = getattr(import_module(f'kd_aif.{_HOME[name]}'), name)
    return value


def __dir__():
    return sorted([*globals(), *_HOME])
