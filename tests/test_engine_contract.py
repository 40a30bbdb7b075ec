"""Hooks, runners and optimizer constructors by the zoo's names, with its keywords and defaults."""
import inspect
import pytest
from detlearn.core.registry import HOOKS, OPTIMIZERS, RUNNERS, settings_of
from detlearn.engine.distributed import DistEvalHook
from detlearn.engine.evaluation_hooks import EvalHook
from detlearn.engine.momentum import MOMENTA
from detlearn.engine.schedules import POLICIES

NEEDED = object()
ZOO = {
    'CheckInvalidLossHook': dict(interval=50),
    'ExpMomentumEMAHook': dict(total_iter=2000),
    'LinearMomentumEMAHook': dict(warm_up=100),
    'MMDetWandbHook': dict(init_kwargs=None, interval=50, log_checkpoint=False,
                           log_checkpoint_metadata=False, num_eval_images=100, bbox_score_thr=0.3),
    'MemoryProfilerHook': dict(interval=50),
    'NumClassCheckHook': dict(),
    'SetEpochInfoHook': dict(),
    'SyncNormHook': dict(num_last_epochs=15, interval=1),
    'SyncRandomSizeHook': dict(ratio_range=(14, 26), img_scale=(640, 640), interval=1, device='cuda'),
    'YOLOXLrUpdaterHook': dict(num_last_epochs=NEEDED),
    'YOLOXModeSwitchHook': dict(num_last_epochs=15, skip_type_keys=('Mosaic', 'RandomAffine', 'MixUp')),
    'CosineAnnealingLrUpdaterHook': dict(min_lr=None, min_lr_ratio=None),
    'CosineRestartLrUpdaterHook': dict(periods=NEEDED, restart_weights=[1], min_lr=None,
                                       min_lr_ratio=None),
    'CyclicLrUpdaterHook': dict(by_epoch=False, target_ratio=(10, 0.0001), cyclic_times=1,
                                step_ratio_up=0.4, anneal_strategy='cos', gamma=1),
    'ExpLrUpdaterHook': dict(gamma=NEEDED),
    'FixedLrUpdaterHook': dict(),
    'FlatCosineAnnealingLrUpdaterHook': dict(start_percent=0.75, min_lr=None, min_lr_ratio=None),
    'InvLrUpdaterHook': dict(gamma=NEEDED, power=1.0),
    'LinearAnnealingLrUpdaterHook': dict(min_lr=None, min_lr_ratio=None),
    'OneCycleLrUpdaterHook': dict(max_lr=NEEDED, total_steps=None, pct_start=0.3, anneal_strategy='cos',
                                  div_factor=25, final_div_factor=10000.0, three_phase=False),
    'PolyLrUpdaterHook': dict(power=1.0, min_lr=0.0),
    'StepLrUpdaterHook': dict(step=NEEDED, gamma=0.1, min_lr=None),
    'CosineAnnealingMomentumUpdaterHook': dict(min_momentum=None, min_momentum_ratio=None),
    'CyclicMomentumUpdaterHook': dict(by_epoch=False, target_ratio=(0.8947368421052632, 1.0),
                                      cyclic_times=1, step_ratio_up=0.4, anneal_strategy='cos',
                                      gamma=1.0),
    'LinearAnnealingMomentumUpdaterHook': dict(min_momentum=None, min_momentum_ratio=None),
    'OneCycleMomentumUpdaterHook': dict(base_momentum=0.85, max_momentum=0.95, pct_start=0.3,
                                        anneal_strategy='cos', three_phase=False),
    'StepMomentumUpdaterHook': dict(step=NEEDED, gamma=0.5, min_momentum=None),
    'Fp16OptimizerHook': dict(grad_clip=None, coalesce=True, bucket_size_mb=-1, loss_scale=512.0,
                              distributed=True),
    'GradientCumulativeFp16OptimizerHook': dict(),
    'GradientCumulativeOptimizerHook': dict(cumulative_iters=1),
    'OptimizerHook': dict(grad_clip=None, detect_anomalous_params=False),
    'ClearMLLoggerHook': dict(init_kwargs=None, interval=10, ignore_last=True, reset_flag=False,
                              by_epoch=True),
    'DvcliveLoggerHook': dict(model_file=None, interval=10, ignore_last=True, reset_flag=False,
                              by_epoch=True, dvclive=None),
    'MlflowLoggerHook': dict(exp_name=None, tags=None, params=None, log_model=True, interval=10,
                             ignore_last=True, reset_flag=False, by_epoch=True),
    'NeptuneLoggerHook': dict(init_kwargs=None, interval=10, ignore_last=True, reset_flag=True,
                              with_step=True, by_epoch=True),
    'PaviLoggerHook': dict(init_kwargs=None, add_graph=None, img_key=None, add_last_ckpt=False,
                           interval=10, ignore_last=True, reset_flag=False, by_epoch=True,
                           add_graph_kwargs=None, add_ckpt_kwargs=None),
    'SegmindLoggerHook': dict(interval=10, ignore_last=True, reset_flag=False, by_epoch=True),
    'TensorboardLoggerHook': dict(log_dir=None, interval=10, ignore_last=True, reset_flag=False,
                                  by_epoch=True),
    'TextLoggerHook': dict(by_epoch=True, interval=10, ignore_last=True, reset_flag=False,
                           interval_exp_name=1000, out_dir=None, out_suffix=('.log.json', '.log', '.py'),
                           keep_local=True, file_client_args=None),
    'WandbLoggerHook': dict(init_kwargs=None, interval=10, ignore_last=True, reset_flag=False,
                            commit=True, by_epoch=True, with_step=True, log_artifact=True,
                            out_suffix=('.log.json', '.log', '.py'), define_metric_cfg=None),
    'CheckpointHook': dict(interval=-1, by_epoch=True, save_optimizer=True, out_dir=None,
                           max_keep_ckpts=-1, save_last=True, sync_buffer=False, file_client_args=None),
    'ClosureHook': dict(fn_name=NEEDED, fn=NEEDED),
    'DistSamplerSeedHook': dict(),
    'EMAHook': dict(momentum=0.0002, interval=1, warm_up=100, resume_from=None),
    'EmptyCacheHook': dict(before_epoch=False, after_epoch=True, after_iter=False),
    'IterTimerHook': dict(),
    'ProfilerHook': dict(by_epoch=True, profile_iters=1, activities=['cpu', 'cuda'], schedule=None,
                         on_trace_ready=None, record_shapes=False, profile_memory=False,
                         with_stack=False, with_flops=False, json_trace_path=None),
    'RFSearchHook': dict(mode='search', config={}, rfstructure_file=None, by_epoch=True, verbose=True),
    'SyncBuffersHook': dict(distributed=True),
    'EvalHook': dict(dynamic_intervals=None),
    'DistEvalHook': dict(dynamic_intervals=None),
    'EpochBasedRunner': dict(model=NEEDED, batch_processor=None, optimizer=None, work_dir=None,
                             logger=None, meta=None, max_iters=None, max_epochs=None),
    'IterBasedRunner': dict(model=NEEDED, batch_processor=None, optimizer=None, work_dir=None,
                            logger=None, meta=None, max_iters=None, max_epochs=None),
    'Runner': dict(),
    'DefaultOptimizerConstructor': dict(optimizer_cfg=NEEDED, paramwise_cfg=None),
    'LearningRateDecayOptimizerConstructor': dict(optimizer_cfg=NEEDED, paramwise_cfg=None),
}


def find(name):
    own = dict(EvalHook=EvalHook, DistEvalHook=DistEvalHook)
    return (own.get(name) or (RUNNERS if 'Runner' in name else OPTIMIZERS if 'Constructor' in name
                              else HOOKS).find(name))


def defaults_of(part):
    "Keywords and defaults of a class, along the line of inheritance; of a policy's class those of its function, too."
    out = {}
    for c in [c for c in part.__mro__ if '__init__' in vars(c)]:
        params = inspect.signature(c.__init__).parameters.values()
        for p in params: out.setdefault(p.name, NEEDED if p.default is p.empty else p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in params): break
    f = {**POLICIES, **{f'm{k}': v for k, v in MOMENTA.items()}}.get(
        f"{'m' if 'Momentum' in part.__name__ else ''}{getattr(part, 'policy', None)}")
    for g in (f, POLICIES['cyclic'] if getattr(part, 'policy', '') == 'Cyclic' else None):
        for p in inspect.signature(g).parameters.values() if g else ():
            out.setdefault(p.name, NEEDED if p.default is p.empty else p.default)
    return out


@pytest.mark.parametrize('name', ZOO)
def test_keywords_and_defaults(name):
    part = find(name); have = defaults_of(part)
    plain = lambda v: list(v) if isinstance(v, (list, tuple)) else v
    for k, v in ZOO[name].items():
        # read_lr_config and momentum_at know it by the policy; tested on their pages
        if k == 'by_epoch' and 'Updater' in name: continue
        assert k in have, f'{name} has no {k}'
        assert ((v is NEEDED) == (have[k] is NEEDED)
                and (v is NEEDED or plain(have[k]) == plain(v)
                     or not (have[k] or v))), f'{name}: {k}={have[k]}, the zoo has {v}'


def test_every_name_is_found_without_an_import():
    "Each in a process that has imported nothing but the registry."
    import subprocess, sys
    names = [n for n in ZOO if n not in ('EvalHook', 'DistEvalHook')]
    code = (f"from detlearn.core.registry import *\nfor n in {names!r}:\n    r = RUNNERS if 'Runner' in "
            "n else OPTIMIZERS if 'Constructor' in n else HOOKS\n    assert r.find(n).__name__ == n, n")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
