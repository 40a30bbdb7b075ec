# what `detlearn demo` trains: a RetinaNet of 0.3 million parameters on toy photos of 128 × 128
_base_ = ['../_base_/schedules/adamw_cosine.py', '../_base_/default_runtime.py']
norm = dict(type='Normalize', mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', flip_ratio=0.5),
    norm,
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels']),
]
test_pipeline = [dict(type='LoadImageFromFile'), norm, dict(type='ImageToTensor', keys=['img']), dict(type='Collect', keys=['img'])]
data = dict(
    samples_per_gpu=8,
    workers_per_gpu=0,
    train=dict(type='CocoDataset', ann_file='runs/demo/data/train.json', img_prefix='runs/demo/data/images', pipeline=train_pipeline),
    val=dict(type='CocoDataset', ann_file='runs/demo/data/val.json', img_prefix='runs/demo/data/images', pipeline=test_pipeline),
    test=dict(type='CocoDataset', ann_file='runs/demo/data/test.json', img_prefix='runs/demo/data/images', pipeline=test_pipeline))
model = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=18, base_channels=16, num_stages=4, out_indices=(1, 2, 3), norm_eval=False, zero_init_residual=False),
    neck=dict(type='FPN', in_channels=[32, 64, 128], out_channels=32, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1, norm_cfg=dict(type='GN', num_groups=4),
        anchor_generator=dict(type='AnchorGenerator', strides=[8, 16, 32], ratios=[1.0], octave_base_scale=1.5, scales_per_octave=2),
        loss_cls=dict(type='FocalLoss'), loss_bbox=dict(type='SmoothL1Loss', beta=0.1)),
    train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.1)),
    test_cfg=dict(nms_pre=200, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50))
optimizer = dict(lr=0.004)
optimizer_config = dict(grad_clip=dict(max_norm=10))
runner = dict(max_epochs=6)
evaluation = dict(interval=2, metric='bbox')
checkpoint_config = dict(interval=-1)
log_config = dict(interval=25, hooks=[dict(type='TextLoggerHook')])
seed = 0
