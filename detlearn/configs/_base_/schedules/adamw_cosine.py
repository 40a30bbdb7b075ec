# AdamW, a short rise and half a cosine down, by iteration; validated and saved as a moving average
optimizer = dict(type='AdamW', lr=0.001, weight_decay=0.05)
optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))
lr_config = dict(policy='CosineAnnealing', by_epoch=False, min_lr_ratio=0.01, warmup='linear', warmup_iters=50, warmup_ratio=0.05)
runner = dict(type='EpochBasedRunner', max_epochs=20)
