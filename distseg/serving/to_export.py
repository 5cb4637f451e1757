"""What an export is told, and whether it can be done: found before torch is imported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.config import Config
from distseg.errors import DistsegError
from distseg.files import check_writable, is_free, is_no_content
from distseg.packages import require
from distseg.runs.folder import RunFolder, check_members, open_run
from distseg.scoring.postprocessing import RegionRule, read_rules
from distseg.serving.description import DESCRIPTION
from distseg.serving.formats import FORMATS, Format
from distseg.serving.repository import PYTHON_REPOSITORY, PYTORCH_REPOSITORY

MAX_DEPTH = 4  # of Unet++ on five encoder levels


@dataclass(frozen=True)
class ExportOptions:
    """What the file is to be."""

    format: str = "torchscript"
    """torchscript, pt2 or onnx"""
    precision: str = "auto"
    """of convolutions: float32, bfloat16, float16; auto: bfloat16 where Dice stays within `dice_tolerance`, else float32"""
    dice_tolerance: float = 0.002
    """largest change of a region's Dice that a reduced precision may bring"""
    frozen: bool = False
    """TorchScript with its weights made constants and its norms folded into convolutions"""
    size: tuple[int, int] = (512, 512)
    """height and width of the slices that a pt2 or onnx file takes"""
    pixel_mm: tuple[float, float] | None = None
    """down and across, of those slices, where the run has a data.spacing_mm"""
    depth: int | None = None
    """of a Unet++ trained with deep supervision: cut at this depth, 1 to 3; None: all of it"""
    ensemble: Sequence[Path] = ()
    """other runs, whose probabilities are averaged with this one's, in one file"""


DEFAULT = ExportOptions()


@dataclass(frozen=True)
class RunToExport:
    """A finished run whose model can be written to `out`."""

    out: Path
    options: ExportOptions
    members: Sequence[tuple[RunFolder, Config]]
    """the run, and those that its probabilities are averaged with"""
    rules: Mapping[str, RegionRule] | None
    """of post-processing; None: none were chosen"""

    @property
    def folder(self) -> RunFolder:
        return self.members[0][0]

    @property
    def config(self) -> Config:
        return self.members[0][1]

    @property
    def format(self) -> Format:
        return FORMATS[self.options.format]


def run_to_export(run: Path, out: Path, options: ExportOptions = DEFAULT, overrides: Sequence[str] = ()) -> RunToExport:
    """Looks at all that an export can be wrong in before it is begun.

    Args:
        run: folder of the run.
        out: folder to write.
        options: what the file is to be.
        overrides: `evaluate.key=value` over the run's config.

    Raises:
        DistsegError: no finished run, `out` holds something else, or options that do not fit.
        ModuleNotFoundError: the format needs a package that is not installed.
    """
    folder, config = open_run(run, overrides)
    _check(options, config, out)
    rules = read_rules(run)
    members = [(folder, config), *(open_run(other) for other in options.ensemble)]
    check_members(members)
    return RunToExport(out, options, members, rules)


def _check(options: ExportOptions, config: Config, out: Path) -> None:
    format = FORMATS[options.format]
    if out.resolve() == Path.cwd():
        raise DistsegError(f"output: got {out}, the folder you are in, which is replaced as a whole; give another")
    check_writable(out)
    try:
        str(out.resolve()).encode()
    except UnicodeEncodeError:
        raise DistsegError(
            f"output: got {out}, whose name is not UTF-8; torch writes to no such path; choose another"
        ) from None
    if not is_free(out) and not _is_export(out):
        raise DistsegError(
            f"output: got {out}, which holds something else; give a new folder, or an earlier export and nothing more"
        )
    if options.depth is not None and not (config.model.deep_supervision and 1 <= options.depth < MAX_DEPTH):
        raise DistsegError(
            f"--depth: got {options.depth}; only a Unet++ trained with model.deep_supervision has heads at depths 1 to "
            f"{MAX_DEPTH - 1}; leave it out, or train so"
        )
    if config.data.spacing_mm and not format.any_size and options.pixel_mm is None:
        raise DistsegError(
            f"--pixel-mm: got none for {options.format}; the run sees pixels of {config.data.spacing_mm:g} mm, and such a file is told no "
            "sizes; give those of your slices, such as --pixel-mm 0.7 0.7"
        )
    if options.pixel_mm is not None and (format.any_size or not config.data.spacing_mm):
        raise DistsegError(
            f"--pixel-mm: got {options.pixel_mm}; only pt2 and onnx files of a run with data.spacing_mm are told it before; leave it out"
        )
    if options.precision not in ("auto", *format.precisions):
        raise DistsegError(
            f"--precision: got {options.precision} for {options.format}, which takes {', '.join(format.precisions)}; choose another"
        )
    if options.frozen and options.format != "torchscript":
        raise DistsegError(f"--frozen: got it for {options.format}; only TorchScript is frozen; leave it out")
    for package in format.packages:
        require(package)


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an export and nothing that would be lost with it."""
    known = {DESCRIPTION, PYTORCH_REPOSITORY, PYTHON_REPOSITORY, *(format.file for format in FORMATS.values())}
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return False
    return (
        isinstance(described, dict)
        and "distseg" in described
        and {path.name for path in folder.iterdir() if not is_no_content(path)} <= known
    )
