"""Chest CT segmentation: from annotated volumes to a verified model, and from a volume to its mask.

Three lines from a volume to a mask:

    import distseg
    model = distseg.load("model")  # what `distseg export` wrote, the folder of a run, or grpc://host:port
    model.segment("volume.nii.gz").save("mask.nii.gz")

A volume is a path (NIfTI, DICOM), a nibabel or SimpleITK image, or an array of HU. The masks are those of `distseg predict`.

    load        a model that segments volumes
    open_store  the cases of a store: HU, labels and splits as arrays
    prepare     annotated volumes into a store
    evaluate    scores of a run
    export      a run's model as a verified file
    DistsegError, the one exception for what you can mend: one line with what, got, rule and remedy

>>> try:
...     distseg.load("nowhere")
... except distseg.DistsegError as error:
...     print(str(error).partition(";")[0])
model: got nowhere

The same from a shell: `distseg --help`. Importing distseg takes no other package along; each name is imported when it is used.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["DistsegError", "__version__", "evaluate", "export", "load", "open_store", "prepare"]

TYPE_CHECKING = False  # typing's own costs 5 ms to import
if TYPE_CHECKING:
    from distseg.commands.evaluate import evaluate
    from distseg.commands.export import export
    from distseg.commands.prepare import prepare
    from distseg.errors import DistsegError
    from distseg.library.segmentation import load
    from distseg.library.stores import open_store

_HOME = {
    "DistsegError": "distseg.errors",
    "evaluate": "distseg.commands.evaluate",
    "export": "distseg.commands.export",
    "load": "distseg.library.segmentation",
    "open_store": "distseg.library.stores",
    "prepare": "distseg.commands.prepare",
}


class _Face(ModuleType):
    """Imports a name's home when the name is first asked for.

    A name stays what it is here: `import distseg.evaluate`, the script of launchers, would put a module in its place.
    """

    def __getattr__(self, name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME[name]), name)

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Face
