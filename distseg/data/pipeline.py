"""The input pipeline on NVIDIA DALI, one definition for CPU and GPU: read, resample, change, window.

Python says which slice and with which numbers (plan.py, augment.py); DALI moves every byte. Nothing here is random.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

from distseg.config import AIR_HU, IGNORED_LABEL, PRESETS, AugmentConfig, DataConfig
from distseg.data.augment import Draw, deform, draw_augmentation, draw_displacement, sampling_matrix, windowing
from distseg.data.plan import MicroBatch, Plan, Position
from distseg.data.store import SliceFiles, Slices, read_slice
from distseg.errors import DistsegError, RankError

PREFETCH = 2  # batches read ahead: one in work while one is used; more only holds memory
# Numbers of a sample in the order that the graph indexes them; gain and offset of each window follow.
BLUR, NOISE, NOISE_Y, NOISE_X, GAMMA, CUT_Y, CUT_X, CUT_HEIGHT, CUT_WIDTH, WINDOWS = range(10)

DrawOf = Callable[[int, int], Draw | None]  # (epoch, sample) -> random changes


@dataclass(frozen=True)
class Batch:
    image_BCHW: torch.Tensor  # float32 in [0, 1]; C: for each window the slices from below to above
    label_BHW: torch.Tensor  # uint8; 255 where the sample only fills up
    plan: MicroBatch


# enable_conditionals: `if` sends each sample one way or the other. The other way to leave samples as they are, neutral
# arguments, costs as much as changing them, and arithmetic on shapes that differ in a batch reads foreign memory (2.4).
@pipeline_def(enable_conditionals=True)
def slice_pipeline(source: Any, data: DataConfig, augment: AugmentConfig, on_gpu: bool) -> tuple[Any, Any]:
    """DALI graph: files and numbers in, images (C, S, S) float32 in [0, 1] and labels (S, S) uint8 out.

    Args:
        source: yields the inputs of a batch, see `SliceLoader`.
        data: its image_size, windows_hu and neighbours.
        augment: a change whose probability is 0 is not in the graph.
        on_gpu: all but reading and decoding runs there.
    """
    size, n_images = data.image_size, 2 * data.neighbours + 1
    *image_paths, label_path, matrix, coarse_matrix, coarse_size, numbers = fn.external_source(
        source=source,
        num_outputs=n_images + 5,
        batch=True,
        dtype=[types.UINT8] * (n_images + 1) + [types.FLOAT] * 4,
        ndim=[1] * (n_images + 1) + [2, 2, 1, 1],
    )
    images = [_warp(_read_npy(path, on_gpu), coarse_matrix, coarse_size, types.INTERP_LINEAR) for path in image_paths]
    label = _warp(_read_npy(label_path, on_gpu), matrix, (size, size), types.INTERP_NN)
    # After resampling, on fewer pixels; the exported model has the same order (models/segmenter.py).
    image = fn.stack(*images, axis=0, axis_name="C") if data.neighbours else _one_channel(images[0])
    # Each `and` asks Python first: a change that never happens is not in the graph.
    if augment.low_resolution_probability > 0 and coarse_size[0] < size:
        # Sampled at fewer points by the warp above: no second pass, and the cheaper the coarser.
        image = fn.resize(image, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=False)
    if augment.blur_probability > 0 and numbers[BLUR] > 0:
        image = fn.gaussian_blur(image, sigma=numbers[BLUR])
    if augment.noise_probability > 0 and numbers[NOISE] > 0:
        tile = types.Constant(noise_tile(size, n_images), device="gpu" if on_gpu else "cpu", layout="CHW")
        noise = fn.crop(tile, crop=(size, size), crop_pos_y=numbers[NOISE_Y], crop_pos_x=numbers[NOISE_X])
        image = image + noise * _beside(numbers[NOISE], on_gpu)
    image = _windows(image, numbers, len(data.windows_hu), on_gpu)
    if augment.gamma_probability > 0 and numbers[GAMMA] != 1:
        image = math.pow(image, _beside(numbers[GAMMA], on_gpu))
    if augment.cutout_probability > 0 and numbers[CUT_HEIGHT] > 0:
        image = fn.erase(
            image,
            anchor=numbers[CUT_Y : CUT_X + 1],
            shape=numbers[CUT_HEIGHT : CUT_WIDTH + 1],
            axis_names="HW",
            normalized=True,
            fill_value=0,
        )
    return image, label


def noise_tile(size: int, channels: int) -> np.ndarray:
    """Standard normal noise that every image's noise is a window of: one and a half images a side, (C, H, W) float32."""
    side = size + size // 2
    return np.random.default_rng(0).standard_normal((channels, side, side), dtype=np.float32)


def _read_npy(path: Any, on_gpu: bool) -> Any:
    array = fn.reinterpret(fn.decoders.numpy(fn.io.file.read(path)), layout="HW")
    return array.gpu() if on_gpu else array


def _warp(array: Any, matrix: Any, size: Any, interp_type: Any) -> Any:
    """Images in float (air outside), labels as they are (background outside).

    warp_affine does the same three times slower on the CPU, and warp_perspective on int16 rounds coordinates to 1/32 of a
    pixel (2.4).
    """
    linear = interp_type == types.INTERP_LINEAR
    return fn.experimental.warp_perspective(
        fn.cast(array, dtype=types.FLOAT) if linear else array,
        matrix=matrix,
        size=size,
        interp_type=interp_type,
        fill_value=AIR_HU if linear else 0,
    )


def _one_channel(image: Any) -> Any:
    return fn.expand_dims(image, axes=0, new_axis_names="C")  # no copy


def _windows(image: Any, numbers: Any, count: int, on_gpu: bool) -> Any:
    channels = []
    for place in range(WINDOWS, WINDOWS + 2 * count, 2):
        gain, offset = _beside(numbers[place], on_gpu), _beside(numbers[place + 1], on_gpu)
        channels.append(math.min(math.max(image * gain + offset, 0.0), 1.0))  # half the time of clamp (CPU, 2.4)
    return fn.cat(*channels, axis=0) if count > 1 else channels[0]


def _beside(number: Any, on_gpu: bool) -> Any:
    """A sample's number where the pixels are: arithmetic does not mix devices."""
    return number.gpu() if on_gpu else number


class SliceLoader:
    """Endless batches of one rank, in the order of its plan.

    Args:
        slices: the data set; the plan's indices point into it.
        plan: which samples, in which order.
        data: sizes, windows, neighbours and threads; not its augmentation.
        augment: which changes are possible.
        draw_of: the changes of a sample in an epoch.
        seed: of elastic deformations.
        focus_labels: what focused crops lie around.
        device: where batches are wanted; on CUDA all but reading runs there.
        start: position of the first batch.
    """

    def __init__(
        self,
        slices: Slices,
        plan: Plan,
        data: DataConfig,
        augment: AugmentConfig,
        draw_of: DrawOf,
        *,
        seed: int,
        focus_labels: Sequence[int],
        device: torch.device,
        start: Position = Position(),  # noqa: B008 (frozen)
    ):
        self._slices = slices
        self._micro_batches = plan.micro_batches(start)
        self._data, self._augment, self._draw_of = data, augment, draw_of
        self._seed, self._focus_labels = seed, focus_labels
        self._device = device
        self._read_ahead: deque[tuple[MicroBatch, list[Draw | None]]] = deque()  # asked of DALI, and not given yet
        self._pipeline = slice_pipeline(
            self._inputs_of_batches(),
            data,
            augment,
            device.type == "cuda",
            batch_size=plan.batch_size_per_rank,
            num_threads=data.num_threads,
            device_id=_gpu_number(device),
            prefetch_queue_depth=PREFETCH,
        )

    def __iter__(self) -> Iterator[Batch]:
        # A thread asks for the next batch: planning it and elastic deformation take no time from the training step. It
        # alone runs torch on one core; more would wait, spinning, for cores that DALI's threads are on.
        with ThreadPoolExecutor(1, "distseg-data", torch.set_num_threads, (1,)) as ahead:
            coming = ahead.submit(self._next)
            while True:
                batch = coming.result()
                coming = ahead.submit(self._next)
                yield batch

    def _next(self) -> Batch:
        try:
            # On CUDA the copy is ordered on torch's stream, without waiting for it on the host.
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            images, labels = self._pipeline.run(stream)
        except DistsegError as error:  # of a file that Python read for it
            raise RankError(str(error)) from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise self._explained(error) from error
        planned, draws = self._read_ahead.popleft()
        image_BCHW, label_BHW = torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor())
        if elastic := [place for place, draw in enumerate(draws) if draw and draw.elastic]:
            self._deform(image_BCHW, label_BHW, planned, elastic)
        if planned.n_real < len(planned.samples):
            label_BHW[planned.n_real :] = IGNORED_LABEL
        return Batch(image_BCHW, label_BHW, planned)

    def _deform(
        self, image_BCHW: torch.Tensor, label_BHW: torch.Tensor, planned: MicroBatch, places: list[int]
    ) -> None:
        """In place: DALI leaves buffers alone that are still held."""
        knots = [draw_displacement(self._augment, self._seed, planned.epoch, planned.samples[i]) for i in places]
        deformed = deform(image_BCHW[places], label_BHW[places], torch.from_numpy(np.stack(knots)).to(self._device))
        image_BCHW[places], label_BHW[places] = deformed

    def _inputs_of_batches(self) -> Iterator[tuple[list[np.ndarray], ...]]:
        """What the graph's external_source gets for each batch: one list for each of its outputs."""
        for planned in self._micro_batches:
            draws = [self._draw_of(planned.epoch, sample) for sample in planned.samples]
            self._read_ahead.append((planned, draws))
            inputs = [self._inputs_of(self._slices[i], d) for i, d in zip(planned.indices, draws, strict=True)]
            yield tuple(list(column) for column in zip(*inputs, strict=True))

    def _inputs_of(self, files: SliceFiles, draw: Draw | None) -> tuple[np.ndarray, ...]:
        size = self._data.image_size
        focus = None if draw is None or draw.focus is None else files.focus(self._focus_labels, draw.focus)
        spacing_mm = self._data.spacing_mm or 0.0
        matrix = sampling_matrix(
            files.shape, size, self._data.fit, draw, focus, files.pixel_mm or (0.0, 0.0), spacing_mm
        )
        side = size if draw is None else max(1, round(size * draw.resolution))
        coarse_matrix = matrix * np.array([size / side, size / side, 1], np.float32)
        numbers = np.zeros(WINDOWS, np.float32)
        if draw is not None:
            numbers[:] = (draw.blur_sigma, draw.noise_hu, *draw.noise_at, draw.gamma, *draw.cutout)
        windows = windowing(self._data.windows_hu, draw).ravel()
        paths = [_as_bytes(path) for path in (*files.images(self._data.neighbours), files.label)]
        size_yx = np.full(2, side, np.float32)
        return *paths, _three_rows(matrix), _three_rows(coarse_matrix), size_yx, np.concatenate([numbers, windows])

    def _explained(self, error: Exception) -> Exception:
        """DALI does not name the file it failed on: look for it among those it was asked for."""
        for planned, _ in self._read_ahead:
            for index in planned.indices:
                files = self._slices[index]
                for path in (*files.images(self._data.neighbours), files.label):
                    try:
                        shape = read_slice(path).shape
                    except DistsegError as found:
                        return RankError(str(found))
                    if shape != files.shape:
                        return RankError(
                            f"store: slice {path}: got shape {shape}; store.json says {files.shape}; "
                            "run `distseg prepare` again"
                        )
        return error


def build_train_loader(
    data: DataConfig,
    slices: Slices,
    plan: Plan,
    seed: int,
    device: torch.device,
    start: Position = Position(),  # noqa: B008 (frozen)
    focus_labels: Sequence[int] = (),
) -> SliceLoader:
    """Augmented, shuffled batches from `start` on."""

    def draw_of(epoch: int, sample: int) -> Draw:
        return draw_augmentation(data.augment, seed, epoch, sample)

    augment = data.augment
    return SliceLoader(
        slices, plan, data, augment, draw_of, seed=seed, focus_labels=focus_labels, device=device, start=start
    )


def build_val_loader(data: DataConfig, slices: Slices, plan: Plan, device: torch.device) -> SliceLoader:
    """The same without augmentation, from the first slice on."""
    unchanged = AugmentConfig("none", **PRESETS["none"])
    return SliceLoader(slices, plan, data, unchanged, lambda *_: None, seed=0, focus_labels=(), device=device)


def _gpu_number(device: torch.device) -> int | None:
    """What DALI calls a device by; one without a number (a single process has it so) is torch's current one."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _three_rows(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix, np.array([[0, 0, 1]], np.float32)])


def _as_bytes(path: Any) -> np.ndarray:
    return np.frombuffer(os.fsencode(path), np.uint8)
