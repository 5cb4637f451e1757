"""Segmentation networks: a timm encoder, a decoder and one logit a region."""
