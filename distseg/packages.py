"""Which packages are installed, without importing any."""

from importlib.metadata import PackageNotFoundError, version

DALI_BUILDS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # one for each CUDA, both fill one folder


def installed_version(package: str) -> str | None:
    """Version of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
