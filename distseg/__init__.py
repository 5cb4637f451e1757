"""distseg: CT volumes, annotations and GPUs in; one verified TorchScript segmentation model out."""

__version__ = "0.1.0"
