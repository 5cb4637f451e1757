"""What every benchmark prints: tables of ours and the peers, and as its very last line one object of JSON.

    {"benchmark": NAME, "ratios": {name: number}, "targets": {name: "OPERATOR NUMBER"}, "met": true|false}

A target without a ratio of its name (a peer that is not installed) was not measured, so it is not met.
"""

import json
import operator
import os
import platform
from collections.abc import Iterable, Mapping, Sequence

from distseg.packages import installed_version

OPERATORS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints columns as wide as their widest cell: text to the left, floats with three digits to the right."""
    cells = [list(header), *([_as_text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (c.rjust(w) if _is_number(c) else c.ljust(w) for c, w in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def print_versions(packages: Iterable[str]) -> None:
    """Prints where the numbers come from: processor, cores, and the version of each package."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{package} {installed_version(package) or 'not installed'}" for package in packages))


def print_result(benchmark: str, ratios: Mapping[str, float], targets: Mapping[str, str]) -> None:
    """Prints the line of JSON.

    Args:
        benchmark: the file's name without its ending.
        ratios: what was measured.
        targets: for some of them an operator and a number, such as ">= 1.5".
    """
    met = all(name in ratios and is_met(ratios[name], target) for name, target in targets.items())
    rounded = {name: round(value, 4) for name, value in ratios.items()}
    result = {"benchmark": benchmark, "ratios": rounded, "targets": dict(targets), "met": met}
    print(json.dumps(result, allow_nan=False), flush=True)


def is_met(value: float, target: str) -> bool:
    """Whether a value keeps to a target such as ">= 1.5"."""
    sign, limit = target.split()
    return bool(OPERATORS[sign](value, float(limit)))


def _as_text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("-", "").isdigit()
