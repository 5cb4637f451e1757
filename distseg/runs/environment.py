"""What a run is made with: versions, machine, source state."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from distseg.packages import DALI_BUILDS, installed_version

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", *DALI_BUILDS, "numpy")


def describe_environment(world_size: int, precision: str, strategy: str) -> dict[str, Any]:
    """Versions, machine and source state that a run was made with."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_count": os.cpu_count(),
        "world_size": world_size,
        "precision": precision,
        "strategy": strategy,
        "git": _git_state(),
        "command": sys.argv,
    }


def _git_state() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
