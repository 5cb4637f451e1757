"""What the Triton kernels need of a GPU, without one: `python tests/kernels/resources.py [--quick]`.

Each variant is compiled for Ampere, Hopper and Blackwell; registers and stack come from the cubin's resource usage,
spills and the widths of loads from its machine code. Prints a table and, as the last line, its rows as JSON.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import triton
from report import print_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distseg.kernels import triton_bce_dice as kernels

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "bf16", "fp16")
BITS = (0b110, 0b100, 0b10, 1 << 40)
COLUMNS = ("arch", "logits", "regions", "layout", "kernel", "registers", "spilled bytes", "widest load, bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two regions, float32 and bfloat16 only")
    quick = parser.parse_args().quick
    variants = itertools.product(
        ARCHITECTURES, DTYPES[:2] if quick else DTYPES, (2,) if quick else (1, 2, 3, 4), (0, 1)
    )
    rows = [
        row
        for arch, dtype, n_regions, last in variants
        if n_regions > 1 or not last  # one region has one layout
        for row in (forward(arch, dtype, n_regions, bool(last)), backward(arch, dtype, n_regions, bool(last)))
    ]
    print_table(COLUMNS, rows)
    print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows]))


def forward(arch: int, dtype: str, n_regions: int, channels_last: bool) -> list[Any]:
    signature = {"logits": f"*{dtype}", "label": "*u8", "sums": "*fp32", "n_pixels": "i32"}
    constants = shape_constants(n_regions, channels_last) | {"SPAN": kernels.SPAN, "BLOCK": kernels.FORWARD_BLOCK}
    found = compile_for(arch, kernels._forward_kernel, signature, constants, num_warps=kernels.FORWARD_WARPS)
    return [arch, dtype, n_regions, layout(channels_last), "forward", *found]


def backward(arch: int, dtype: str, n_regions: int, channels_last: bool) -> list[Any]:
    pointer = f"*{dtype}"
    signature = {"logits": pointer, "label": "*u8", "grad_sums": "*fp32", "grad_logits": pointer, "n_pixels": "i32"}
    first = kernels.BACKWARD_CONFIGS[0]
    constants = shape_constants(n_regions, channels_last) | first.kwargs
    found = compile_for(
        arch, kernels._backward_kernel.fn, signature, constants, num_warps=first.num_warps, maxnreg=first.maxnreg
    )
    return [arch, dtype, n_regions, layout(channels_last), "backward", *found]


def layout(channels_last: bool) -> str:
    return "channels last" if channels_last else "contiguous"


def shape_constants(n_regions: int, channels_last: bool) -> dict[str, Any]:
    R2 = triton.next_power_of_2(n_regions)
    return {"BITS": BITS[:n_regions], "R": n_regions, "R2": R2, "CHANNELS_LAST": channels_last}


def compile_for(
    arch: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any
) -> list[int]:
    """Registers a thread, bytes spilled a thread, width of the widest load."""
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(signature))}  # as launches find them
    types = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    cubin = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = read(BINARIES / "cuobjdump", "--dump-resource-usage", file.name)
        code = read(BINARIES / "nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    spilled = max(stack + local, len(re.findall(r"\b(?:LDL|STL)", code)))
    widths = [int(width or 32) for width in re.findall(r"\bLDG\.E(?:\.(64|128))?\b", code)]
    return [registers, spilled, max(widths)]


def read(*words: object) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
