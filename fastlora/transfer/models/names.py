"""Names of models that are not torchvision's."""

TIMM_PREFIX = "timm:"
DINOV2 = "dinov2_vits14"
EFFICIENTNET_LITE0 = "efficientnet_lite0"
