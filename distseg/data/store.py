"""The store: every case as one .npy a slice (int16 HU, uint8 labels) beside a store.json that says what it is.

store/store.json
store/slices/<shard>/<case>-<digest>/  0000.image.npy  0000.label.npy  ...  foreground.npy  case.json

The digest is that of the source files and of how they were read, so a changed case is a new folder and store.json, which
is replaced last and at once, always names whole cases. Its first two digits are the shard: 256 folders that may lie on
several file systems. Nothing is ever listed to read a store: a slice's path follows from store.json.
"""

import dataclasses
import functools
import json
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import pydantic

from distseg.bars import counted
from distseg.config import MAX_LABEL, Config
from distseg.data.splits import Folds, check_patients_apart
from distseg.errors import DistsegError
from distseg.files import sha256_of, write_json
from distseg.geometry import field_mm
from distseg.regions import one_sided, own_regions

STORE_VERSION = 2
FOREGROUND = "foreground.npy"
CASE_JSON = "case.json"


@dataclass(frozen=True)
class Case:
    id: str
    patient: str
    source: str
    """image file or folder, relative to the source folder"""
    sha256: Mapping[str, str]
    """of the image and mask files, by their name relative to the source folder"""
    folder: str
    """of the slices, relative to the store"""
    shape: tuple[int, int, int]
    """slices, rows, columns"""
    spacing_mm: tuple[float, float, float] | None
    """z, y, x; None: the source does not say"""
    intensity: str
    """"hu", or the window that the source's grey values were mapped back from"""
    hu_range: tuple[int, int]
    label_voxels: Mapping[str, int]
    """voxels of each label"""
    slices_with: Mapping[str, tuple[tuple[int, int], ...]]
    """for each label the runs [first, end) of slices that hold it"""
    pixel_mm: tuple[float, float] | None = None
    """down, across, as the user says; None: spacing_mm has it, or nobody knows"""

    @property
    def pixel_size_mm(self) -> tuple[float, float] | None:
        """Down and across; None: not known."""
        return self.spacing_mm[1:] if self.spacing_mm else self.pixel_mm


@dataclass(frozen=True)
class SliceFiles:
    """One slice of the store: what a sample is before it is read."""

    id: str
    folder: Path
    z: int
    n_slices: int
    """of the case"""
    shape: tuple[int, int]
    """rows, columns"""
    pixel_mm: tuple[float, float] | None = None
    """down, across; None: not known"""

    def images(self, neighbours: int = 0) -> list[Path]:
        """The slice's HU file among those of its neighbours below and above; a case's end slices repeat."""
        around = range(self.z - neighbours, self.z + neighbours + 1)
        return [self.folder / f"{min(max(z, 0), self.n_slices - 1):04d}.image.npy" for z in around]

    @property
    def image(self) -> Path:
        return self.images()[0]

    @property
    def label(self) -> Path:
        return self.folder / f"{self.z:04d}.label.npy"

    def focus(self, labels: Sequence[int], which: float) -> tuple[int, int] | None:
        """One of the kept pixels (y, x) of these labels in this slice, `which` in [0, 1); None where it has none."""
        kept = _foreground(self.folder)
        kept = kept[(kept[:, 0] == self.z) & np.isin(kept[:, 1], labels)]
        if not len(kept):
            return None
        _, _, y, x = kept[int(which * len(kept))].tolist()
        return y, x


@functools.lru_cache(maxsize=256)
def _foreground(folder: Path) -> np.ndarray:
    return read_slice(folder / FOREGROUND)


class Slices(Sequence[SliceFiles]):
    """All slices of some cases, in order. Each is made when asked for: ten million of them take no memory."""

    def __init__(self, root: Path, cases: Sequence[Case], chosen: np.ndarray | None = None):
        """`chosen`: only these places of the full sequence, in this order."""
        self._root = root
        self.cases = cases
        self._ends = np.cumsum([case.shape[0] for case in cases], dtype=np.int64)
        self._chosen = chosen

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> SliceFiles: ...
    @overload
    def __getitem__(self, index: slice) -> list[SliceFiles]: ...
    def __getitem__(self, index: int | slice) -> SliceFiles | list[SliceFiles]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        place = index % len(self) if self._chosen is None else int(self._chosen[index])
        number = bisect_right(self._ends, place)
        case = self.cases[number]
        z = place - int(self._ends[number]) + case.shape[0]
        return SliceFiles(
            f"{case.id}/{z:04d}", self._root / case.folder, z, case.shape[0], case.shape[1:], case.pixel_size_mm
        )

    def sizes_mm(self) -> dict[str, list[float]]:
        """Least and most of their pixels (pixel_mm) and of their longer sides (field_mm); none where no case says it."""
        known = [(case.pixel_size_mm, case.shape[1:]) for case in self.cases if case.pixel_size_mm]
        pixels = [max(sizes) for sizes, _ in known]
        fields = [field_mm(shape, sizes) for sizes, shape in known]
        found = {"pixel_mm": pixels, "field_mm": fields} if known else {}
        return {name: [round(min(mm), 4), round(max(mm), 4)] for name, mm in found.items()}

    def by_case(self) -> Iterator[tuple[Case, np.ndarray]]:
        """Each case with the numbers of its slices that are here, ascending."""
        places = np.arange(len(self)) if self._chosen is None else np.sort(self._chosen)
        for case, end in zip(self.cases, self._ends.tolist(), strict=True):
            first = end - case.shape[0]
            yield case, places[np.searchsorted(places, first) : np.searchsorted(places, end)] - first

    def of_cases(self, numbers: Sequence[int]) -> "Slices":
        """Only those of some cases, by their numbers in `cases`, ascending; a case without a slice here is left out."""
        wanted = set(numbers)
        parts = [part for number, part in enumerate(self.by_case()) if number in wanted and len(part[1])]
        first = np.cumsum([0, *(case.shape[0] for case, _ in parts)])
        places = [z + start for (_, z), start in zip(parts, first, strict=False)]
        return Slices(self._root, [case for case, _ in parts], np.concatenate([np.empty(0, np.int64), *places]))

    def holding(self, label_names: Sequence[str]) -> np.ndarray:
        """Indices of the slices that hold any of the labels, ascending."""
        held = np.zeros(int(self._ends[-1]) if len(self._ends) else 0, bool)
        for case, end in zip(self.cases, self._ends.tolist(), strict=True):
            for name in label_names:
                for first, last in case.slices_with.get(name, ()):
                    held[end - case.shape[0] + first : end - case.shape[0] + last] = True
        return np.flatnonzero(held if self._chosen is None else held[self._chosen])


@dataclass(frozen=True)
class Store:
    root: Path
    layout: str
    """of the source"""
    labels: Mapping[str, int]
    cases: tuple[Case, ...]
    folds: Folds
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """unions of labels that the source names; none: a region a label"""

    def cases_of(self, split: str, fold: int) -> tuple[Case, ...]:
        """Cases of `train`, `val` or `test` in a fold, in the store's order.

        Raises:
            DistsegError: no such fold, or no case in the split.
        """
        self._check_fold(fold)
        val, test = set(self.folds.folds[fold]), set(self.folds.test)
        is_in = {
            "train": lambda member: member not in val | test,
            "val": lambda member: member in val,
            "test": lambda member: member in test,
        }[split]
        cases = tuple(case for case in self.cases if is_in(self._member(case)))
        if not cases:
            raise DistsegError(
                f"split {split}: got no patient in {self.root}; it needs at least one; run `distseg prepare` again with "
                f"{'--test-patients N' if split == 'test' else 'other --folds'}"
            )
        return cases

    def _member(self, case: Case) -> str:
        """What the folds know a case by; never both: a patient may be named like another one's case."""
        return case.id if self.folds.method == "ma2021" else case.patient

    def _check_fold(self, fold: int) -> None:
        count = len(self.folds.folds)
        if fold >= count:
            raise DistsegError(f"data.fold: got {fold}; {self.root} has folds 0 to {count - 1}; choose one of them")

    def slices_of(self, cases: Sequence[Case]) -> Slices:
        """All slices of the cases, in order."""
        return Slices(self.root, cases)

    def slices_of_split(self, split: str, fold: int, leaky_seed: int | None = None) -> Slices:
        """All slices of a split's patients.

        Args:
            split, fold: see `cases_of`.
            leaky_seed: deals slices instead of patients to `train` and `val`, so that neighbours of one patient lie on both
                sides: only to show how much a score gains by that. The test patients stay apart.
        """
        if leaky_seed is None or split == "test":
            return self.slices_of(self.cases_of(split, fold))
        return self._leaky_slices(split, fold, leaky_seed)

    def _leaky_slices(self, split: str, fold: int, seed: int) -> Slices:
        self._check_fold(fold)
        test = set(self.folds.test)
        cases = tuple(case for case in self.cases if self._member(case) not in test)
        every = Slices(self.root, cases)
        n_folds = max(2, len(self.folds.folds))
        fold_of_slice = np.random.default_rng(seed).permutation(len(every)) % n_folds
        return Slices(self.root, cases, np.flatnonzero((fold_of_slice == fold) == (split == "val")))

    def read_case(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """HU (int16) and labels (uint8) of a case, both [Z, Y, X]."""
        files = self.slices_of([case])
        return np.stack([read_slice(f.image) for f in files]), np.stack([read_slice(f.label) for f in files])


def open_store(root: Path) -> Store:
    """Reads and checks store.json.

    Raises:
        DistsegError: no store there, one of another version, a damaged store.json, or a patient in two folds.
    """
    values = _read_json(root / "store.json")
    if values.get("version") != STORE_VERSION:
        raise DistsegError(
            f"store {root}: got version {values.get('version')}; this distseg reads {STORE_VERSION}; "
            "run `distseg prepare` again"
        )
    try:
        store = pydantic.TypeAdapter(Store).validate_python(values | {"root": root})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DistsegError(
            f"store {root}: damaged store.json ({where}: {first['msg']}); run `distseg prepare` again"
        ) from None
    check_patients_apart(store.folds, str(root / "store.json"))
    return store


def settled(config: Config, store: Store) -> Config:
    """The configuration with what it leaves to a store: regions by the names of its labels, what is rare, what may be flipped.

    Raises:
        DistsegError: a region of a label that the store has not, or a flip that would change the side of one.
    """
    held = {n: v for n, v in store.labels.items() if any(case.label_voxels.get(n) for case in store.cases)}
    if not config.regions and held:  # a label that no case holds cannot be learned
        config = dataclasses.replace(config, regions=_of_held(store.regions, held) or own_regions(held))
    config = with_labels(config, store.labels, str(store.root))
    if config.data.spacing_mm and (unknown := [case.id for case in store.cases if case.pixel_size_mm is None]):
        raise DistsegError(
            f"data.spacing_mm: got {config.data.spacing_mm}; case {unknown[0]} of {store.root} does not say how large its pixels are "
            f"({len(unknown)} so); prepare it with --pixel-mm Y X, or leave data.spacing_mm out"
        )
    data, augment = config.data, config.data.augment
    focus = data.focus_region or rarest_region(config, store) if data.focuses else None
    sided = one_sided({region: tuple(map(str, names)) for region, names in config.regions.items()})
    if sided and augment.flip_probability:
        raise DistsegError(
            f"data.augment.flip_probability: got {augment.flip_probability}; region {sided[0]} has a side, which a flip would "
            "change; add data.augment.flip_probability=0"
        )
    if augment.flip_probability is None:
        augment = dataclasses.replace(augment, flip_probability=0.0 if sided else augment.flips)
    return dataclasses.replace(config, data=dataclasses.replace(data, focus_region=focus, augment=augment))


def _of_held(regions: Mapping[str, Sequence[str]], held: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The regions of labels that some case holds, of those alone."""
    of_held = {region: tuple(name for name in names if name in held) for region, names in regions.items()}
    return {region: names for region, names in of_held.items() if names}


def store_of_run(config: Config) -> Store:
    """The store that a run was trained on.

    Raises:
        DistsegError: no store there, or one that has been made with other labels since.
    """
    store = open_store(Path(config.data.store))
    if dict(store.labels) != dict(config.labels):
        raise DistsegError(
            f"data.store: got {store.root} with labels {dict(store.labels)}; the run has {dict(config.labels)}; prepare it as it was"
        )
    return store


def rarest_region(config: Config, store: Store) -> str:
    """The region of a configuration, whose labels have names, that has the fewest voxels in a store."""
    voxels = {
        region: sum(case.label_voxels.get(str(name), 0) for case in store.cases for name in names)
        for region, names in config.regions.items()
    }
    return min(voxels, key=voxels.__getitem__)


def with_labels(config: Config, labels: Mapping[str, int], where: str) -> Config:
    """The configuration with regions by the names of these labels: its own ones, or where it has none, those of the labels.

    Args:
        config: whose regions may name labels, or number them.
        labels: name -> number.
        where: they are from, for errors.

    Raises:
        DistsegError: a region of a label that is not among them.
    """
    name_of = {number: name for name, number in labels.items()}
    regions: dict[str, tuple[str, ...]] = own_regions(labels)
    if config.regions:
        regions = {}
        for region, own in config.regions.items():
            names = [name_of.get(label, label) if isinstance(label, int) else label for label in own]
            if unknown := [name for name in names if not labels.get(str(name))]:
                raise DistsegError(
                    f"regions.{region}: got label {unknown[0]}; {where} has {dict(labels)}; choose from them"
                )
            regions[region] = tuple(map(str, names))
    if not regions:
        raise DistsegError(f"regions: got no label in {where}; a region needs one; prepare it with masks")
    if too_high := [name for names in regions.values() for name in names if labels[name] > MAX_LABEL]:
        raise DistsegError(
            f"regions: got label {too_high[0]} with number {labels[too_high[0]]}; regions take numbers up to {MAX_LABEL}; prepare "
            f"the store again with --labels {too_high[0]}=N"
        )
    return dataclasses.replace(config, regions=regions, labels=dict(labels))


def split_slices(config: Config, store: Store, split: str) -> Slices:
    """The slices that a run is trained or scored on."""
    leaky_seed = config.seed if config.data.leaky_slice_split else None
    return store.slices_of_split(split, config.data.fold, leaky_seed)


def write_store_json(store: Store) -> None:
    written = {name: value for name, value in dataclasses.asdict(store).items() if name != "root"}
    write_json(store.root / "store.json", {"version": STORE_VERSION} | written)


def damaged_files(store: Store) -> Iterator[str]:
    """One line for each file of the store that is missing, changed or does not say what store.json says."""
    with ThreadPoolExecutor() as pool:
        problems = pool.map(functools.partial(problems_of_case, store.root), store.cases)
        for found in counted(problems, "check", len(store.cases), "volume"):
            yield from found


def problems_of_case(root: Path, case: Case) -> list[str]:
    """One line for each file of a case that is missing, changed or does not say what the case does."""
    folder = root / case.folder
    try:
        values = _read_json(folder / CASE_JSON)
        described, digests = values["case"], values["files"]
    except (DistsegError, KeyError) as error:
        return [f"store: damaged case {folder / CASE_JSON} ({error}); run `distseg prepare` again"]
    problems = []
    if described != json.loads(json.dumps(dataclasses.asdict(case))):
        problems.append(f"store: case {folder / CASE_JSON} is not what store.json says; run `distseg prepare` again")
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"store: missing file {path}; run `distseg prepare` again")
        elif sha256_of(path) != digest:
            problems.append(f"store: changed file {path} (its sha256 is another); run `distseg prepare` again")
    return problems


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DistsegError(f"store: got {path.parent} without {path.name}; it must be what `distseg prepare` wrote")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise DistsegError(f"store: damaged {path} ({error}); run `distseg prepare` again") from None
    if not isinstance(values, dict):
        raise DistsegError(f"store: damaged {path} (not an object); run `distseg prepare` again")
    return values


def read_slice(path: Path) -> np.ndarray:
    """One slice's array.

    Raises:
        DistsegError: missing or damaged.
    """
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises whatever a damaged header leads it to
        raise DistsegError(f"store: damaged slice {path} ({error}); run `distseg prepare` again") from None
