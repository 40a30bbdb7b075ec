# photos of blood cells (BCCD, 640 × 480), at half their size; `detlearn train CONFIG --data DIR` sets the paths
dataset_type = 'CocoDataset'
data_root = 'data/bccd/'
img_norm_cfg = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', img_scale=(320, 240), ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion'),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size_divisor=32),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale=(320, 240), flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            dict(type='Normalize', **img_norm_cfg),
            dict(type='Pad', size_divisor=32),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ])
]
data = dict(
    samples_per_gpu=4,
    workers_per_gpu=0,  # reading takes a thirtieth of a step: no process is worth it on a CPU
    train_dataloader=dict(drop_last=True),  # batch norm has nothing to do with a last photo alone
    train=dict(type=dataset_type, ann_file=data_root + 'train.json', img_prefix=data_root + 'images/', pipeline=train_pipeline),
    val=dict(type=dataset_type, ann_file=data_root + 'val.json', img_prefix=data_root + 'images/', pipeline=test_pipeline),
    test=dict(type=dataset_type, ann_file=data_root + 'test.json', img_prefix=data_root + 'images/', pipeline=test_pipeline))
evaluation = dict(interval=4, metric='bbox')
