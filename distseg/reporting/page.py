"""What both pages are made with: templates, numbers as text, pictures as data."""

import base64
import hashlib
import math
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distseg.pictures import LABEL_COLOURS
from distseg.reporting.charts import colour_class
from distseg.tables import read_csv

UNDEFINED = "–"
TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "nsd_1mm": "NSD at 1 mm",
    "nsd_2mm": "NSD at 2 mm",
    "hd95_mm": "HD95, mm",
    "truth_ml": "Truth, ml",
    "predicted_ml": "Predicted, ml",
    "volume_error_ml": "Volume error, ml",
}
DECIMALS = {"hd95_mm": 2, "truth_ml": 2, "predicted_ml": 2, "volume_error_ml": 2}
DECIMALS |= {"parameters_m": 1, "gmacs": 1, "slices_per_s": 1, "training_s": 0}


def render(template: str, **values: Any) -> str:
    """A page of the templates beside this file; whatever is not markup is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distseg.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "label": label, "colour_class": colour_class}
    script = resources.files("distseg.reporting").joinpath("sort.js").read_text()
    # The page may load nothing and run this script alone, whatever a name in a table says.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"script": Markup(script), "script_sha256": digest, "palette": LABEL_COLOURS}
    return environment.get_template(template).render(**own, **values)


def shown(value: float | str | None, name: str = "") -> str:
    """A figure as text; undefined (None, NaN, "") is a dash.

    Args:
        value: the figure.
        name: of the score, by which it has other than three decimals.
    """
    number = as_number(value)
    if math.isnan(number):
        return UNDEFINED
    text = f"{number:,.{DECIMALS.get(name, 3)}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text


def as_number(value: float | str | None) -> float:
    """NaN for what is undefined."""
    return math.nan if value is None or value == "" else float(value)


def label(name: str) -> str:
    """A score's name for readers."""
    return TITLES.get(name, name.replace("_", " ").capitalize())


def picture(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none for a missing file."""
    return read_csv(path) if path.is_file() else []
