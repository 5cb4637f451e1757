"""The input pipeline on NVIDIA DALI, one definition for CPU and GPU: read, resample, window.

Python says which slice and which geometry (plan.py); DALI moves every byte. Nothing here is random.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

from distseg.config import AIR_HU, IGNORED_LABEL, DataConfig
from distseg.data.plan import MicroBatch, Plan, Position, draw_affine, sampling_matrix
from distseg.data.store import SliceFiles
from distseg.errors import DistsegError

PREFETCH = 2  # batches read ahead: one in work while one is used; more only holds memory

MatrixOf = Callable[[int, int], np.ndarray]  # (epoch, sample index) -> sampling matrix


@dataclass(frozen=True)
class Batch:
    image_B1HW: torch.Tensor  # float32 in [0, 1]: windowed
    label_BHW: torch.Tensor  # uint8; 255 where the sample only fills up
    plan: MicroBatch


@pipeline_def
def slice_pipeline(source: Any, image_size: int, window_hu: tuple[float, float], on_gpu: bool) -> tuple[Any, Any]:
    """DALI graph: files and matrices in, windowed images (1, S, S) float32 and labels (S, S) uint8 out."""
    image_path, label_path, matrix = fn.external_source(
        source=source, num_outputs=3, batch=True, dtype=[types.UINT8, types.UINT8, types.FLOAT], ndim=[1, 1, 2]
    )
    image = _read_npy(image_path, on_gpu)
    label = _read_npy(label_path, on_gpu)
    size = (image_size, image_size)
    image = fn.warp_affine(
        image,
        matrix=matrix,
        size=size,
        inverse_map=True,
        interp_type=types.INTERP_LINEAR,
        fill_value=AIR_HU,
        dtype=types.FLOAT,
    )
    label = fn.warp_affine(label, matrix=matrix, size=size, inverse_map=True, interp_type=types.INTERP_NN, fill_value=0)
    # After resampling, on fewer pixels; the exported model has the same order (models/serving.py).
    low, high = window_hu
    image = math.clamp((image - low) * (1.0 / (high - low)), 0.0, 1.0)
    return fn.reshape(image, src_dims=[2, 0, 1], layout="CHW"), fn.squeeze(label, axes=[2])


def _read_npy(path: Any, on_gpu: bool) -> Any:
    array = fn.decoders.numpy(fn.io.file.read(path))
    array = fn.reshape(array, src_dims=[0, 1, -1], layout="HWC")  # warp_affine takes HWC only
    return array.gpu() if on_gpu else array


class SliceLoader:
    """Endless batches of one rank, in the order of its plan.

    Args:
        slices: the data set; the plan's indices point into it.
        plan: which samples, in which order.
        matrix_of: geometry of a sample in an epoch.
        image_size: side of the images, pixels.
        window_hu: HU mapped to 0 and 1.
        device: where batches are wanted; on CUDA all but reading runs there.
        num_threads: DALI's.
        start: position of the first batch.
    """

    def __init__(
        self,
        slices: Sequence[SliceFiles],
        plan: Plan,
        matrix_of: MatrixOf,
        *,
        image_size: int,
        window_hu: tuple[float, float],
        device: torch.device,
        num_threads: int,
        start: Position = Position(),  # noqa: B008 (frozen)
    ):
        self._slices = slices
        self._micro_batches = plan.micro_batches(start)
        self._matrix_of = matrix_of
        self._device = device
        self._read_ahead: deque[MicroBatch] = deque()  # what DALI was asked for and has not given yet
        self._pipeline = slice_pipeline(
            self._files_of_batches(),
            image_size,
            window_hu,
            device.type == "cuda",
            batch_size=plan.batch_size_per_rank,
            num_threads=num_threads,
            device_id=device.index if device.type == "cuda" else None,
            prefetch_queue_depth=PREFETCH,
        )

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._next()

    def _next(self) -> Batch:
        try:
            # On CUDA the copy is ordered on torch's stream, without waiting for it on the host.
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            images, labels = self._pipeline.run(stream)
        except (RuntimeError, ValueError, TypeError) as error:
            raise self._explained(error) from error
        planned = self._read_ahead.popleft()
        image_B1HW, label_BHW = torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor())
        if planned.n_real < len(planned.indices):
            label_BHW = label_BHW.clone()
            label_BHW[planned.n_real :] = IGNORED_LABEL
        return Batch(image_B1HW, label_BHW, planned)

    def _files_of_batches(self) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]]:
        for planned in self._micro_batches:
            self._read_ahead.append(planned)
            files = [self._slices[index] for index in planned.indices]
            yield (
                [_as_bytes(file.image) for file in files],
                [_as_bytes(file.label) for file in files],
                [self._matrix_of(planned.epoch, index) for index in planned.indices],
            )

    def _explained(self, error: Exception) -> Exception:
        """DALI does not name the file it failed on: look for it among those it was asked for."""
        for planned in self._read_ahead:
            for index in planned.indices:
                for path in (self._slices[index].image, self._slices[index].label):
                    try:
                        array = np.load(path, allow_pickle=False)
                    except (OSError, ValueError, EOFError) as cause:
                        return DistsegError(f"store: damaged slice {path} ({cause}); run `distseg prepare` again")
                    if array.shape != self._slices[index].shape:
                        return DistsegError(
                            f"store: slice {path}: got shape {array.shape}; store.json says {self._slices[index].shape}; "
                            "run `distseg prepare` again"
                        )
        return error


def build_train_loader(
    data: DataConfig, slices: Sequence[SliceFiles], plan: Plan, seed: int, device: torch.device, start: Position
) -> SliceLoader:
    """Augmented, shuffled batches from `start` on."""

    def matrix_of(epoch: int, index: int) -> np.ndarray:
        draw = draw_affine(data.augment, seed, epoch, index)
        return sampling_matrix(slices[index].shape, data.image_size, data.fit, draw)

    return _build_loader(data, slices, plan, matrix_of, device, start)


def build_val_loader(data: DataConfig, slices: Sequence[SliceFiles], plan: Plan, device: torch.device) -> SliceLoader:
    """The same without augmentation, from the first slice on."""

    def matrix_of(epoch: int, index: int) -> np.ndarray:
        return sampling_matrix(slices[index].shape, data.image_size, data.fit)

    return _build_loader(data, slices, plan, matrix_of, device, Position())


def _build_loader(
    data: DataConfig,
    slices: Sequence[SliceFiles],
    plan: Plan,
    matrix_of: MatrixOf,
    device: torch.device,
    start: Position,
) -> SliceLoader:
    return SliceLoader(
        slices,
        plan,
        matrix_of,
        image_size=data.image_size,
        window_hu=data.window_hu,
        device=device,
        num_threads=data.num_threads,
        start=start,
    )


def _as_bytes(path: Any) -> np.ndarray:
    return np.frombuffer(str(path).encode(), np.uint8)
