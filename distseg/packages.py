"""Which packages are installed, without importing any, and which extra of distseg has those that are not."""

from importlib.metadata import PackageNotFoundError, version

DALI_BUILDS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # one for each CUDA, both fill one folder

# By the name that they are imported with; what is not here comes with distseg itself.
EXTRA_OF = {
    **dict.fromkeys(("accelerate", "nvidia", "psutil", "tensorboard", "timm", "torchvision"), "train"),
    "deepspeed": "zero",
    "highdicom": "dicom",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    "distributed": "cluster",
}


def installed_version(package: str) -> str | None:
    """Version of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
