"""One self-contained HTML page about a run: `distseg report RUN` writes RUN/report.html (opens offline)."""

import argparse
import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distseg.errors import one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distseg report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    run = parser.parse_args(argv).run
    splits = write_report(run)
    for split in splits:
        for region, scores in split["summary"]["regions"].items():
            dice = scores["dice"]["mean"]
            print(f"{split['name']} {region}: Dice {'undefined' if dice is None else f'{dice:.4f}'}")
    print(f"report: {run / 'report.html'}")
    return 0


def write_report(run: Path) -> list[dict[str, Any]]:
    """Gathers what a run has measured and writes RUN/report.html.

    Returns:
        The evaluated splits: name, summary, rows of per_case.csv, pictures.

    Raises:
        DistsegError: no run with a best model there.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from distseg.config import config_as_yaml
    from distseg.files import write_text
    from distseg.metrics import SCORES
    from distseg.training.run_folder import best_metadata, open_run

    folder, config = open_run(run)
    splits = [_read_split(path.parent) for path in sorted(run.glob("eval/*/summary.json"), reverse=True)]
    template = Environment(
        loader=PackageLoader("distseg", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("report.html.j2")
    page = template.render(
        name=run.resolve().name,
        config=config,
        config_yaml=config_as_yaml(config),
        environment=json.loads((run / "environment.json").read_text()),
        best=best_metadata(folder),
        splits=splits,
        scores=SCORES,
        pictures=_pictures(folder.figures),
    )
    write_text(run / "report.html", page)
    return splits


def _read_split(folder: Path) -> dict[str, Any]:
    with (folder / "per_case.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((folder / "summary.json").read_text())
    return {"name": folder.name, "summary": summary, "cases": rows, "pictures": _pictures(folder / "figures")}


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """(name, data URI) of the folder's PNG files."""
    return [
        (path.stem, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        for path in sorted(folder.glob("*.png"))
    ]


if __name__ == "__main__":
    raise SystemExit(main())
