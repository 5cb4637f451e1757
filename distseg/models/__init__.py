"""Segmentation networks: a timm encoder, a decoder and one logit a region."""

from distseg.models.network import SegmentationNetwork, build_model

__all__ = ["SegmentationNetwork", "build_model"]
