"""`distseg.load`: a model that segments volumes in memory or on disk, by the same code as `distseg predict`."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distseg.bars import Bar
from distseg.data.file_kinds import NIFTI, PICTURES
from distseg.data.volume import Volume
from distseg.data.volume_files import write_volume
from distseg.errors import DistsegError
from distseg.library.volumes import take_volume
from distseg.serving.source import check_source, parse_address

if TYPE_CHECKING:
    import nibabel as nib
    import SimpleITK
    import torch

    from distseg.serving.model import Model

SAVED = (*NIFTI, ".mha", ".mhd", ".nrrd", ".png", ".tif", ".tiff")
INTENSITIES = ("auto", "hu", "grey")


def load(source: str | os.PathLike[str], *, device: str = "auto", batch_size: int = 4) -> "SegmentationModel":
    """Opens a model that segments volumes: what `distseg predict` takes, or a Triton server.

    Args:
        source: folder of a run, folder that `distseg export` wrote, its model file (model.pt, model.pt2, model.onnx), or
            the address of a server, grpc://host:port or http://host:port.
        device: "auto" (the first GPU where there is one, else the CPU), "cpu", "cuda" or "cuda:N". A server has its own.
        batch_size: slices in one forward pass, at least 1; fewer need less memory.

    Raises:
        DistsegError: none of these, damaged, or a device that is not there.
        ModuleNotFoundError: a run needs the extra `train`, an ONNX file the extra `onnx`.

    Example:
        >>> import distseg
        >>> model = distseg.load("model")
        >>> model.regions
        {'lung': (1, 2), 'infection': (2,)}
        >>> model.segment("volume.nii.gz").save("mask.nii.gz")
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DistsegError(f"batch_size: got {batch_size!r}; it must be an integer of at least 1; give e.g. 4")
    address = os.fspath(source)
    if "://" in address:
        parse_address(address)
        if device != "auto":
            raise DistsegError(f"device: got {device!r} for {address}; a server has its own; leave it out")
        from distseg.serving.model import open_server

        return SegmentationModel(open_server(address, probabilities=False), lambda: open_server(address), batch_size)
    path = Path(source)
    check_source(path)
    from distseg.serving.model import open_model  # torch is imported once nothing is wrong

    model = open_model(path, _device(device))
    return SegmentationModel(model, lambda: model, batch_size)


class SegmentationModel:
    """A model that was opened by `distseg.load`.

    Attributes:
        labels: name -> number in the masks; 0 is background.
        regions: name -> the labels that it is the union of.
    """

    def __init__(self, model: "Model", with_probabilities: "Callable[[], Model]", batch_size: int) -> None:
        """
        Args:
            model: that segments.
            with_probabilities: gives it so that it tells those too: a server is asked for them only where they are wanted.
            batch_size: slices in one forward pass.
        """
        self.labels: dict[str, int] = dict(model.described.labels)
        self.regions: dict[str, tuple[int, ...]] = {
            name: tuple(labels) for name, labels in model.described.regions.items()
        }
        self._model, self._with_probabilities, self._batch_size = model, with_probabilities, batch_size

    def __repr__(self) -> str:
        return f"<distseg model: {', '.join(self.regions)}; on {self._model.device}>"

    def segment(
        self,
        volume: "str | os.PathLike[str] | nib.spatialimages.SpatialImage | SimpleITK.Image | np.ndarray",
        *,
        spacing_mm: Sequence[float] | None = None,
        probabilities: bool = False,
        intensity: str = "auto",
        hu_offset: int | None = None,
    ) -> "Segmentation":
        """Segments one volume, by the code of `distseg predict`, post-processing included.

        Args:
            volume: a path (file of a volume or slice, DICOM file, or folder of one series), an image of nibabel or SimpleITK, or an array
                [Z, Y, X] of HU: axial slices from the feet to the head, in each the rows from front to back and the columns
                from the patient's right to left (LPS), as a radiologist sees them. Files and images may lie any way.
            spacing_mm: of an array: sizes of a voxel, z, y, x; without it there are no millilitres.
            probabilities: keep those of each region too: float32, four bytes a voxel and region.
            intensity: of the volume: "hu", "grey" (0..255 of [-1250, 250] HU) or "auto" (by its values).
            hu_offset: what was added to its HU, such as 1024 or 32768 in pictures of 16 bits; None: nothing.

        Raises:
            DistsegError: the volume cannot be read or is no CT, an argument is wrong, or the batch does not fit the GPU.

        Example:
            >>> import distseg
            >>> import numpy as np
            >>> hu = np.random.default_rng(0).integers(-1000, 400, (3, 64, 64))
            >>> result = distseg.load("model").segment(hu, spacing_mm=(2.5, 0.7, 0.7))
            >>> result.mask.shape, result.mask.dtype
            ((3, 64, 64), dtype('uint8'))
        """
        if intensity not in INTENSITIES:
            raise DistsegError(f"intensity: got {intensity!r}; it must be one of {', '.join(INTENSITIES)}; choose one")
        given = take_volume(volume, spacing_mm)
        from distseg.serving.prediction import in_hu, measure

        hu, _ = in_hu(given.volume, intensity, hu_offset)
        model = self._with_probabilities() if probabilities else self._model
        with Bar(given.volume.path.name, len(hu.values_ZYX), "slice", brief=True) as bar:
            mask_ZYX, probability_RZYX = model.segment(
                hu.values_ZYX, self._batch_size, bar.update, hu.spacing_mm[1:] if hu.spacing_mm else None
            )
        found = measure(mask_ZYX, self.regions, hu.spacing_mm)
        sizes = {name: ml for name in self.regions if (ml := found[f"{name}_ml"]) is not None}
        return Segmentation(
            mask=mask_ZYX,
            labels=self.labels,
            regions=self.regions,
            spacing_mm=hu.spacing_mm,
            millilitres=None if hu.spacing_mm is None else sizes,
            probabilities=dict(zip(self.regions, probability_RZYX, strict=True)) if probabilities else None,
            _grid=replace(hu, values_ZYX=mask_ZYX),
            _as_given=given.as_given,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The mask of one volume, and what it measures."""

    mask: np.ndarray
    """uint8 labels [Z, Y, X], in the order of `SegmentationModel.segment` (LPS) whatever the volume's own was"""
    labels: Mapping[str, int]
    """name -> number in the mask; 0 is background"""
    regions: Mapping[str, tuple[int, ...]]
    """name -> the labels that it is the union of"""
    spacing_mm: tuple[float, float, float] | None
    """sizes of a voxel, z, y, x; None: an array without them"""
    millilitres: Mapping[str, float] | None
    """of each region; None: no spacing"""
    probabilities: Mapping[str, np.ndarray] | None
    """of each region, float32 [Z, Y, X] in [0, 1]; None: not asked for"""
    _grid: Volume = field(repr=False)
    _as_given: Callable[[Volume], Any] = field(repr=False)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.mask.shape))
        found = ", ".join(self.regions)
        if self.millilitres is not None:
            found = ", ".join(f"{name} {ml:.1f} ml" for name, ml in self.millilitres.items())
        return f"<distseg segmentation: {size}; {found}>"

    @property
    def image(self) -> Any:
        """The mask as what the volume was given as, on its grid and in its axis order.

        A nibabel image for a path or a nibabel image, a SimpleITK image for one, for an array or pictures `mask` itself.
        """
        return self._as_given(self._grid)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask as `distseg predict` does: on the volume's grid, whole or not at all.

        Args:
            path: ends in .nii.gz, .nii, .mha, .mhd or .nrrd; or, without a place in the patient, in .tif, or .png for one slice.
                What is there is replaced.

        Raises:
            DistsegError: another ending, a file that cannot be written, or the mask of an array without `spacing_mm`.
        """
        file = Path(path)
        if not file.name.endswith(SAVED):
            raise DistsegError(f"save: got {file}; a mask's name must end in {' or '.join(SAVED)}; rename it")
        if file.suffix == ".png" and len(self.mask) > 1:
            raise DistsegError(f"save: got {file} for {len(self.mask)} slices; a PNG file holds one; save it as .tif")
        if self._grid.affine is None and file.suffix not in PICTURES:
            raise DistsegError(
                f"save: got {file} for the mask of an array without spacing; a volume's file has voxel sizes; give spacing_mm to "
                "segment"
            )
        try:
            write_volume([file], self.mask, self._grid, labels=self.labels)
        except OSError as error:
            raise DistsegError(
                f"save: got {file}, which cannot be written ({error.strerror or error}); make room, or choose another"
            ) from None


def _device(name: str) -> "torch.device":
    import torch

    from distseg.scoring.segmenting import inference_device

    if name == "auto":
        return inference_device()
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DistsegError(f"device: got {name!r}; it must be auto, cpu, cuda or cuda:N; choose one")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DistsegError(
            f"device: got {name!r}; this machine has {torch.cuda.device_count()} GPUs that torch can use; choose auto or cpu"
        )
    return device
