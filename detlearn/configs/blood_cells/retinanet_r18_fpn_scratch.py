# ResNet-18 from random weights: 1,020 steps of 4 photos
_base_ = ['../_base_/datasets/blood_cells.py', '../_base_/schedules/adamw_cosine.py', '../_base_/default_runtime.py']
# cells are round, and 20 to 130 pixels wide at this size: one ratio, two boxes a cell, from 20 pixels at stride 8 on
model = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=18, num_stages=4, out_indices=(1, 2, 3), norm_eval=False, zero_init_residual=False),
    neck=dict(type='FPN', in_channels=[128, 256, 512], out_channels=64, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=64, feat_channels=64, stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=2.5, scales_per_octave=2, ratios=[1.0], strides=[8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='SmoothL1Loss', beta=0.1, loss_weight=1.0)),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.1, ignore_iof_thr=-1),
        allowed_border=-1, pos_weight=-1, debug=False),
    # cells overlap: a neighbour's score is lowered, not struck out
    test_cfg=dict(nms_pre=300, min_bbox_size=0, score_thr=0.05, nms=dict(type='soft_nms', iou_threshold=0.3), max_per_img=100))
checkpoint_config = dict(interval=10, max_keep_ckpts=1)
log_config = dict(interval=17, hooks=[dict(type='TextLoggerHook')])
custom_hooks = [dict(type='NumClassCheckHook'), dict(type='EMAHook', momentum=0.01, warm_up=10)]
seed = 0
