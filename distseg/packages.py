"""Which packages are installed, without importing any, and which extra of distseg has those that are not."""

from importlib.util import find_spec

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
    from importlib.metadata import PackageNotFoundError, version  # here: every command's --help would wait for it

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require(package: str) -> None:
    """Finds out before long work that a package is missing.

    Raises:
        ModuleNotFoundError: it is, as importing it would say.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What a user is told of a module that an extra would have brought; None for any other."""
    module = error.name or ""
    extra = EXTRA_OF.get(module.partition(".")[0])
    if extra is None:
        return None
    return f"distseg: got an installation without {module}; it belongs to the extra {extra}; pip install 'distseg[{extra}]'"
