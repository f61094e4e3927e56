"""The demo's MIMDet with Cascade Mask R-CNN's three box heads."""

from .common.cascade_mask_rcnn import model as _cascade
from .demo import dataloader, lr_multiplier, mae_checkpoint, model, optimizer, train

for _key in ("box_head", "box_predictor", "proposal_matcher"):
    model.roi_heads.pop(_key)
model.roi_heads.update(
    {k: _cascade.roi_heads[k] for k in ("_target_", "box_heads", "box_predictors", "proposal_matchers")}
)
for _head in model.roi_heads.box_heads:
    _head.update(conv_dims=[64, 64], fc_dims=[256])
train["output_dir"] = "output/demo_cascade_mask_rcnn"

__all__ = ["dataloader", "lr_multiplier", "mae_checkpoint", "model", "optimizer", "train"]
