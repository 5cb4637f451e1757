"""Says what this machine has, and what distseg will use of it: `distseg doctor [JOB ...]`.

A line a thing, then a line a job: ready, not installed, or what is wrong. The exit status is 1 where something that is
installed cannot work, and where a job that is named behind the command is not ready.
"""

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
from distseg.commands.arguments import command_parser
from distseg.errors import DistsegError, one_line_errors
from distseg.packages import DALI_BUILDS, EXTRA_OF, installed_version

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
    extra: str = ""
    """of distseg, that brings it: the remedy then is to install it"""
    is_broken: bool = False
    """there, but it cannot work"""


# Job -> the findings that it needs.
TRAINING = ("torch", "dali", "accelerate", "psutil", "tensorboard", "timm")
JOBS = {
    "predict": ("torch", "tritonclient"),  # by a file or by a server; report, prepare and phantom need no more
    "train": TRAINING,  # evaluate and export too
    "zero": (*TRAINING, "deepspeed"),
    "dicom": ("highdicom",),
    "onnx": ("torch", "onnx", "onnxruntime", "onnxscript"),
    "cluster": ("distributed",),
    "serve": ("torch", "tritonserver"),
    "cpp": ("torch", "compiler"),
}
LINUX_ALONE = ("dali", "deepspeed")
NAME_WIDTH = 13


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    jobs = parse_arguments(argv)
    findings = look()
    for finding in findings:
        if finding.text:
            print(f"{finding.name:<{NAME_WIDTH}}{finding.text}")
    print()
    found = {finding.name: finding for finding in findings}
    for job in JOBS:
        print(f"{job:<{NAME_WIDTH}}{told_of_job(job, found)}")
    is_wrong = any(finding.is_broken for finding in findings) or any(wanting(job, found) for job in ("predict", *jobs))
    return 1 if is_wrong else 0


def parse_arguments(argv: Sequence[str] | None) -> list[str]:
    parser = command_parser(
        "doctor",
        __doc__,
        "distseg doctor",
        "distseg doctor train serve",
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"that must be ready: {', '.join(JOBS)}")
    jobs: list[str] = parser.parse_args(argv).jobs
    if wrong := [job for job in jobs if job not in JOBS]:
        parser.error(f"JOB: got {wrong[0]!r}; it must be one of {', '.join(JOBS)}")
    return jobs


def wanting(job: str, found: dict[str, Finding]) -> list[Finding]:
    return [found[name] for name in JOBS[job] if found[name].remedy or found[name].extra]


def told_of_job(job: str, found: dict[str, Finding]) -> str:
    """ready, or what is to be done, each step once."""
    lacking = wanting(job, found)
    if not lacking:
        return "ready"
    extras = dict.fromkeys(one.extra for one in lacking if one.extra)
    steps = [f"pip install 'distseg[{','.join(extras)}]'"] if extras else []
    steps += dict.fromkeys(one.remedy for one in lacking if one.remedy)
    is_broken = any(one.is_broken for one in lacking)
    return f"not {'ready' if is_broken else 'installed'}: {'; '.join(steps)}"


def look() -> list[Finding]:
    """All lines, from the machine to what is built on it; one without a text is for the jobs alone."""
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
        check_package("psutil", shown=False),
        check_package("tensorboard", shown=False),
        check_deepspeed(),
        check_server(),
        check_package("tritonclient"),
        check_package("highdicom"),
        check_package("onnxruntime"),
        check_package("onnx", shown=False),
        check_package("onnxscript", shown=False),
        check_package("distributed"),
        check_compiler(),
        *check_ranges(),
    ]


def check_machine(torch: Any) -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    parts = [f"{usable} of {os.cpu_count()} cores"]
    parts += [f"{torch.get_num_threads()} torch threads"] if torch else []
    parts += [f"{memory / GIB:.1f} GiB memory", f"{shutil.disk_usage('.').free / GIB:.1f} GiB free in this folder"]
    parts += [f"/dev/shm {shm / GIB:.2f} GiB" + (" (small for many GPUs: --shm-size=8g)" if shm < SMALL_SHM else "")]
    return Finding("machine", ", ".join(parts))


def check_torch(torch: Any, problem: str) -> Finding:
    if torch is None:
        return _lacking("torch", problem)
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
    if len(builds) > 1:  # what is left of them after both were written into one folder
        remedy = f"pip uninstall {' '.join(builds)}; pip install 'distseg[train]'"
        return Finding("dali", f"{' and '.join(builds)} in one folder", remedy, is_broken=True)
    module, problem = _imported("nvidia.dali")
    if module is None:
        return _lacking("dali", problem, next(iter(builds), DALI_BUILDS[0]))
    cuda = next(iter(builds), "").removeprefix("nvidia-dali-cuda")[:2]
    wanted = (torch.version.cuda or "").split(".")[0] if torch else ""
    text = f"{module.__version__} for CUDA {cuda or 'unknown'}"
    if wanted and cuda and wanted != cuda:  # each brings its own CUDA: only the driver must be new enough for both
        text += f", torch for CUDA {wanted}: they work together where the driver takes both, as on a CPU"
    return Finding("dali", text)


def check_loss_kernel(torch: Any) -> Finding:
    language = f"Triton {installed_version('triton') or 'not installed'}"
    if torch is None:
        return Finding("loss kernel", language)
    from distseg.kernels.dispatch import kernel_for

    kernel = kernel_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Finding("loss kernel", f"{kernel} ({language}, which GPUs need)")


def check_deepspeed() -> Finding:
    found = check_package("deepspeed")
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if found.extra or found.remedy:
        return found
    if not missing:
        return Finding("deepspeed", f"{found.text}, g++ and ninja to build with")
    return Finding("deepspeed", f"{found.text}, without {' and '.join(missing)}", "apt-get install g++ ninja-build")


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


def check_package(name: str, shown: bool = True) -> Finding:
    """By its metadata: importing each would take a minute on a cold disk."""
    version = installed_version(name)
    if version is None or importlib.util.find_spec(name) is None:
        return _lacking(name, "not installed" if shown else "")
    return Finding(name, version if shown else "")


def check_ranges() -> list[Finding]:
    """A line where an installed package has a version that this distseg was not tried with: a note, it may work."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        from packaging.requirements import Requirement

        asked = [Requirement(text) for text in requires("distseg") or []]
    except (ImportError, PackageNotFoundError):  # a checkout on the path, not installed
        return []
    outside = {
        f"{one.name} {version} (tried with {one.specifier})"
        for one in asked
        if (version := installed_version(one.name)) and not one.specifier.contains(version, prereleases=True)
    }
    return [Finding("versions", ", ".join(sorted(outside)))] if outside else []


def _lacking(name: str, problem: str, package: str = "") -> Finding:
    """What is not there, or is there and broken."""
    if problem.startswith("broken"):
        return Finding(name, problem, f"pip install --force-reinstall {package or name}", is_broken=True)
    if name in LINUX_ALONE and sys.platform != "linux":
        return Finding(name, problem, f"use Linux: {name} exists for it alone")
    extra = EXTRA_OF.get("nvidia" if name == "dali" else name, "")
    return Finding(name, problem, "" if extra else "pip install distseg", extra)


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
