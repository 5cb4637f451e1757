"""Segments new volumes: `distseg predict RUN_OR_MODEL IN OUT`.

IN is a volume (NIfTI, .mha, .mhd, .nrrd), a DICOM series, slices (PNG, JPEG, TIFF), or a folder of one of them, nested or not;
several IN may be given. Each mask has its volume's shape, axis order and place, in NIfTI unless OUT or --format says otherwise.
RUN_OR_MODEL is a run folder, a folder that `distseg export` wrote, or its model.pt; post-processing that `distseg evaluate --tune`
chose is applied. Of several volumes, OUT/volumes.csv has the millilitres, and the same command goes on after any end.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distseg.commands.arguments import command_parser
from distseg.errors import one_line_errors, positive_float, positive_int


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from distseg.packages import require
    from distseg.serving.source import check_source, parse_address
    from distseg.serving.work import find_work

    work = find_work(args.input, args.output, args.format, args.probabilities)
    for note in work.notes:
        print(f"note: {note}")
    if args.server:
        parse_address(args.server)
    else:
        check_source(args.model)
    if any(task.mask.suffix == ".dcm" for task in work.tasks):
        require("highdicom")
    from distseg.scoring.segmenting import inference_device
    from distseg.serving.model import open_model, open_server  # torch is imported once nothing is wrong
    from distseg.serving.prediction import Options, Predictor

    if args.server:
        model = open_server(args.server, probabilities=args.probabilities is not None)
    else:
        model = open_model(args.model, inference_device())
    options = Options(
        args.intensity,
        args.format or "nifti",
        args.probabilities,
        args.overlay,
        args.hu_offset,
        args.pixel_mm and tuple(args.pixel_mm),
    )
    Predictor(model, options, args.batch_size).predict(work)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "predict",
        __doc__,
        "distseg predict model volume.nii.gz mask.nii.gz",
        "distseg predict model a.mha volumes masks --format source",
        usage="%(prog)s RUN_OR_MODEL IN [IN ...] OUT [options] | %(prog)s --server URL IN [IN ...] OUT [options]",
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="RUN_OR_MODEL IN OUT",
        help="the model; volumes, series, slices or folders of them; the mask's file, or a folder for masks",
    )
    parser.add_argument("--server", metavar="URL", help="grpc://HOST:PORT or http://HOST:PORT of a Triton server")
    parser.add_argument(
        "--format",
        choices=("nifti", "source", "dicom-seg"),
        help="of the masks (default: as OUT is called, else nifti, of slices PNG or TIFF); source: that of each volume",
    )
    parser.add_argument(
        "--probabilities",
        choices=("float32", "uint8"),
        help="write a file of each region's too; uint8: in steps of 1/255",
    )
    parser.add_argument("--overlay", action="store_true", help="draw the most affected slices as a PNG too")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="slices in one forward pass (default 4)")
    parser.add_argument(
        "--intensity", choices=("auto", "hu", "grey"), default="auto", help="of the volumes (default auto)"
    )
    parser.add_argument(
        "--hu-offset", type=int, metavar="N", help="values are HU + N, such as 1024 or 32768 in 16-bit PNG and TIFF"
    )
    parser.add_argument(
        "--pixel-mm",
        nargs=2,
        type=positive_float,
        metavar=("Y", "X"),
        help="of volumes that do not say it: down and across",
    )
    args = parser.parse_intermixed_args(argv)
    if len(args.paths) < (2 if args.server else 3):
        parser.error("give RUN_OR_MODEL IN OUT, or --server URL IN OUT")
    args.model = None if args.server else args.paths.pop(0)
    *args.input, args.output = args.paths
    return args


if __name__ == "__main__":
    raise SystemExit(main())
