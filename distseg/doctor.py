"""Says what this machine has, and what distseg will use of it: `distseg doctor`.

A line a thing, then a line a job with what it lacks. The exit status is 1 where training lacks something.
"""

import argparse
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg import __version__
from distseg.errors import DistsegError, one_line_errors
from distseg.packages import DALI_BUILDS, installed_version

GIB = 2**30
SMALL_SHM = GIB  # what containers have without --shm-size is 64 MiB
INCLUDES = ("/usr/include", "/usr/include/nifti", "/usr/local/include", "/usr/local/include/nifti")
CPP_HEADERS = ("nifti2_io.h", "nlohmann/json.hpp")  # see export/cpp/CMakeLists.txt


@dataclass(frozen=True)
class Finding:
    """One line: what it is, what there is of it, and what to do where it is not as it should be."""

    name: str
    text: str
    remedy: str = ""


# Job -> the findings that it needs.
TRAINING = ("torch", "dali", "accelerate", "timm")
JOBS = {
    "train": TRAINING,
    "train, ZeRO": (*TRAINING, "deepspeed"),
    "export": ("torch",),
    "export, ONNX": ("torch", "onnxruntime"),
    "serve": ("tritonserver",),
    "client": ("tritonclient",),
    "cpp": ("torch", "compiler"),
}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="distseg doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args(argv)
    found = {finding.name: finding for finding in look()}
    for finding in found.values():
        print(f"{finding.name:<13}{finding.text}")
    print()
    remedies = {job: [found[name].remedy for name in names if found[name].remedy] for job, names in JOBS.items()}
    for job, steps in remedies.items():
        print(f"{job:<13}{'not ready: ' + '; '.join(dict.fromkeys(steps)) if steps else 'ready'}")
    return 1 if remedies["train"] else 0


def look() -> list[Finding]:
    """All lines, from the machine to what is built on it."""
    torch, problem = _imported("torch")
    return [
        Finding("python", f"{platform.python_version()} in {sys.prefix}; distseg {__version__}"),
        check_machine(torch),
        *check_gpus(torch),
        check_torch(torch, problem),
        check_dali(torch),
        check_loss_kernel(torch),
        check_package("accelerate"),
        check_package("timm"),
        check_deepspeed(),
        check_server(),
        check_package("tritonclient", "client"),
        check_package("onnxruntime", "onnx"),
        check_compiler(),
    ]


def check_machine(torch: Any) -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    parts = [f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"]
    parts += [f"{torch.get_num_threads()} torch threads"] if torch else []
    parts += [f"{memory / GIB:.1f} GiB memory", f"{shutil.disk_usage('.').free / GIB:.1f} GiB free in this folder"]
    parts += [f"/dev/shm {shm / GIB:.2f} GiB" + (" (small for many GPUs: --shm-size=8g)" if shm < SMALL_SHM else "")]
    return Finding("machine", ", ".join(parts))


def check_torch(torch: Any, problem: str) -> Finding:
    if torch is None:
        return Finding("torch", problem, "pip install -e .")
    if torch.version.cuda is None:
        return Finding("torch", f"{torch.__version__}, built without CUDA")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}")


def check_gpus(torch: Any) -> list[Finding]:
    driver = Path("/proc/driver/nvidia/version")
    version = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text()) if driver.is_file() else None
    installed = f"driver {version.group() if version else 'of an unknown version'}" if driver.is_file() else "no driver"
    if torch is None or not torch.cuda.is_available():
        why = (
            "; torch cannot use it: is it older than torch's CUDA, or of another container?" if driver.is_file() else ""
        )
        return [Finding("gpu", f"none ({installed}{why}): everything runs on the CPU, ranks are joined by gloo")]
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB, compute capability {gpu.major}.{gpu.minor}, {installed}"
        found.append(Finding(f"gpu {index}", text))
    return found


def check_dali(torch: Any) -> Finding:
    builds = {name: version for name in DALI_BUILDS if (version := installed_version(name))}
    if len(builds) > 1:
        return Finding(
            "dali", f"{' and '.join(builds)} in one folder", f"pip uninstall {' '.join(builds)}; pip install -e ."
        )
    module, problem = _imported("nvidia.dali")
    if module is None:
        return Finding("dali", problem, "pip install -e .")
    cuda = next(iter(builds), "").removeprefix("nvidia-dali-cuda")[:2]
    wanted = (torch.version.cuda or "").split(".")[0] if torch else ""
    if not (wanted and cuda) or wanted == cuda:
        return Finding("dali", f"{module.__version__} for CUDA {cuda or 'unknown'}")
    text = f"{module.__version__} for CUDA {cuda}; torch is for CUDA {wanted}"
    return Finding("dali", text, f"pip uninstall {' '.join(builds)}; DISTSEG_CUDA={wanted} pip install -e .")


def check_loss_kernel(torch: Any) -> Finding:
    language = f"Triton {installed_version('triton') or 'not installed'}"
    if torch is None:
        return Finding("loss kernel", language)
    from distseg.kernels.dispatch import kernel_for

    kernel = kernel_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Finding("loss kernel", f"{kernel} ({language}, which GPUs need)")


def check_deepspeed() -> Finding:
    found = check_package("deepspeed")
    builders = {name: shutil.which(name) for name in ("g++", "ninja")}
    if missing := [name for name, path in builders.items() if path is None]:
        return Finding(
            "deepspeed",
            f"{found.text}, without {' and '.join(missing)}",
            "; ".join(filter(None, ("apt-get install g++ ninja-build", found.remedy))),
        )
    return Finding("deepspeed", f"{found.text}, g++ and ninja to build with", found.remedy)


def check_server() -> Finding:
    from distseg.serving.server import find_installation

    try:
        return Finding("tritonserver", str(find_installation().binary))
    except DistsegError as error:
        return Finding("tritonserver", "none", str(error).rsplit("; ", 1)[1])


def check_compiler() -> Finding:
    tools = {name: _tool_version(name) for name in ("g++", "cmake")}
    headers = {name: any(Path(folder, name).is_file() for folder in INCLUDES) for name in CPP_HEADERS}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in tools.items())
    text += "".join(f", no {name}" for name, there in headers.items() if not there)
    is_whole = all(tools.values()) and all(headers.values())
    return Finding(
        "compiler", text, "" if is_whole else "apt-get install g++ cmake make libnifti-dev nlohmann-json3-dev"
    )


def check_package(name: str, extra: str = "") -> Finding:
    """By its metadata: importing each would take a minute on a cold disk."""
    version = installed_version(name)
    if version is None or importlib.util.find_spec(name) is None:
        return Finding(name, "not installed", f"pip install 'distseg[{extra}]'" if extra else "pip install -e .")
    return Finding(name, version)


def _imported(name: str) -> tuple[Any, str]:
    """The module, or None and why; a broken installation may raise anything."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError:
        return None, "not installed"
    except Exception as error:
        return None, f"broken ({' '.join(str(error).split())[:100]})"


def _tool_version(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    printed = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    number = re.search(r"\d+\.\d+(\.\d+)?", printed)
    return number.group() if number else "of an unknown version"


if __name__ == "__main__":
    raise SystemExit(main())
