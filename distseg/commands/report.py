"""One self-contained HTML page about a run or a study: `distseg report RUN|STUDY` writes report.html there (opens offline)."""

from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import DistsegError, one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "report",
        __doc__,
        "distseg report runs/a",
        "distseg report studies/a",
    )
    parser.add_argument("folder", type=Path, metavar="RUN|STUDY", help="folder of a trained run, or of a study")
    folder = parser.parse_args(argv).folder
    for line in write_report(folder):
        print(line)
    print(f"report: {folder / 'report.html'}")
    return 0


def write_report(folder: Path) -> list[str]:
    """Gathers what a run or a study has measured and writes FOLDER/report.html.

    Returns:
        A line a score, for the terminal.

    Raises:
        DistsegError: neither a run with a best model nor a study there.
    """
    from distseg.files import write_text

    if (folder / "config.yaml").is_file():
        from distseg.reporting.run_page import run_page

        page, lines = run_page(folder)
    elif (folder / "study.yaml").is_file():
        from distseg.reporting.study_page import study_page

        page, lines = study_page(folder)
    else:
        raise DistsegError(
            f"report: got {folder} without config.yaml or study.yaml; it must be the folder of a run or a study; see "
            "output_dir of its configuration"
        )
    write_text(folder / "report.html", page)
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
