"""How large a slice is to the network: one function for the input pipeline, the segmenter and the files that hold it."""

from collections.abc import Sequence

MM_BEYOND = 0.15  # of the training's range: how far a pixel or a field of view may lie outside before a note is due


def field_mm(shape: Sequence[int], pixel_mm: Sequence[float]) -> float:
    """Field of view: the longer side of a slice of so many rows and columns, whose pixels have these sizes."""
    return max(mm * n for mm, n in zip(pixel_mm, shape, strict=True))


# Types of Python alone, and names for both sides: TorchScript compiles it into model.pt.
def working_size(
    height: int, width: int, pixel_y_mm: float, pixel_x_mm: float, image_size: int, spacing_mm: float
) -> tuple[int, int]:
    """Rows and columns that a slice is resampled to.

    Args:
        height, width: of the slice.
        pixel_y_mm, pixel_x_mm: of its pixels, down and across; any where `spacing_mm` is 0.
        image_size: of the longer side, pixels; 0: the slice's own. Not used with `spacing_mm`.
        spacing_mm: of a pixel of the network's image; 0: sizes in mm do not count.
    """
    if spacing_mm > 0:
        half = 0.5001  # rounds half up, also what float32, in which servers are sent sizes, leaves a little below it
        return max(1, int(height * pixel_y_mm / spacing_mm + half)), max(1, int(width * pixel_x_mm / spacing_mm + half))
    if image_size > 0:
        longer = max(height, width)
        return (
            max(1, (height * image_size + longer // 2) // longer),
            max(1, (width * image_size + longer // 2) // longer),
        )
    return height, width
