"""Segments new volumes: `distseg predict RUN_OR_MODEL IN OUT`.

IN is a NIfTI volume or a folder of them; each mask has its volume's shape, axis order and affine. RUN_OR_MODEL is a run
folder, a folder that `distseg export` wrote, or its model.pt; post-processing that `distseg evaluate --tune` chose is applied.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distseg.errors import DistsegError, one_line_errors, positive_int


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    import numpy as np
    from tqdm import tqdm

    from distseg.data.nifti import read_nifti, write_mask
    from distseg.data.volume import hounsfield
    from distseg.training.artefact import load_rules, load_segmenter
    from distseg.training.inference import inference_device, segment_volume
    from distseg.training.postprocessing import label_map

    work = volumes_and_masks(args.input, args.output)
    device = inference_device()
    segmenter, post_processing = load_segmenter(args.model, device), load_rules(args.model)
    for source, target in tqdm(work, "predict", unit="volume"):
        volume = read_nifti(source)
        hu_ZYX, origin = hounsfield(volume, args.intensity)
        mask_ZYX, probability_RZYX = segment_volume(segmenter, hu_ZYX, device, args.batch_size)
        if post_processing is not None:
            rules, regions = post_processing
            mask_ZYX = label_map(rules, probability_RZYX, regions)
        write_mask(target, mask_ZYX, source)
        voxel_ml = np.prod(volume.spacing_mm or 0) / 1000
        found = [(label, np.count_nonzero(mask_ZYX == label) * voxel_ml) for label in np.unique(mask_ZYX) if label]
        volumes = ", ".join(f"label {label} {ml:.1f} ml" for label, ml in found)
        tqdm.write(f"{target}: {volumes or 'nothing found'} (intensity {origin})")
    return 0


def volumes_and_masks(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Which file each volume's mask goes to: OUT itself for one volume, OUT/<same name> for a folder.

    Raises:
        DistsegError: nothing to read, or OUT does not fit.
    """
    from distseg.data.nifti import SUFFIXES, is_nifti

    if source.is_dir():
        volumes = [path for path in sorted(source.iterdir()) if is_nifti(path)]
        if not volumes:
            raise DistsegError(f"input: got folder {source} without a .nii or .nii.gz file; at least one is needed")
        if target.is_file() or target.name.endswith(SUFFIXES):
            raise DistsegError(f"output: got file {target} for a folder of volumes; it must be a folder")
        return [(path, target / path.name) for path in volumes]
    if not source.is_file():
        raise DistsegError(f"input: got {source}; no such file or folder; check the path")
    if target.is_dir():
        return [(source, target / source.name)]
    if not target.name.endswith(SUFFIXES):
        raise DistsegError(f"output: got {target}; a mask's name must end in .nii.gz or .nii; rename it")
    return [(source, target)]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distseg predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="RUN_OR_MODEL")
    parser.add_argument("input", type=Path, metavar="IN", help="a NIfTI volume, or a folder of them")
    parser.add_argument("output", type=Path, metavar="OUT", help="the mask's file, or a folder for masks")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="slices in one forward pass (default 4)")
    parser.add_argument(
        "--intensity", choices=("auto", "hu", "grey"), default="auto", help="of the volumes (default auto)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
