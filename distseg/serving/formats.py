"""The kinds of file that a segmenter is exported to. writers.py writes them, standalone.py reads them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    file: str
    """its name"""
    any_size: bool
    """takes slices of any height and width; else those of one"""
    exact: bool
    """runs the kernels of the eager model; a compiler puts others in their place"""
    precisions: tuple[str, ...] = ("float32", "bfloat16", "float16")
    packages: tuple[str, ...] = ()
    """that write and check it, besides torch"""


FORMATS = {
    "torchscript": Format("model.pt", any_size=True, exact=True),
    "pt2": Format("model.pt2", any_size=False, exact=False),
    "onnx": Format(
        "model.onnx",
        any_size=False,
        exact=False,
        precisions=("float32",),
        packages=("onnx", "onnxruntime", "onnxscript"),
    ),
}
