"""What a value of a configuration may be: pydantic checks it, and errors and the reference say it in the same words.

A field's type says it, `Annotated[float, Field(gt=0)]` with a range, `Annotated[..., Rule(...)]` where pydantic has no word.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic_core import ArgsKwargs, SchemaValidator, core_schema

from distseg.errors import DistsegError

Section = TypeVar("Section")

MANY = {"a number": "numbers", "an integer": "integers", "a pair": "pairs", "a list": "lists", "a label": "labels"}
LIMITS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
PLAIN = {float: "a number", int: "an integer", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Rule:
    """Stands in `Annotated[type, Rule(...)]`.

    Args:
        holds: whether a value of the type is right.
        words: all that it may be, as they stand behind "must be".
    """

    holds: Callable[[Any], bool]
    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(self.words)
        return value


def sections(schema: type) -> dict[str, type]:
    """Fields of a dataclass that are dataclasses themselves, with these."""
    kinds = {f.name: f.type for f in dataclasses.fields(schema)}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def checked(what: str, prefix: str, remedy: Callable[[str], str]) -> Callable[[type[Section]], type[Section]]:
    """Makes a frozen dataclass refuse wrong values whether it is made in Python or from a file's mapping.

    Args:
        what: the dataclass configures, for errors.
        prefix: of its keys, such as "model."; "" for none.
        remedy: end of an error about a key.

    Returns:
        The decorator. The class raises DistsegError on the first wrong value; sections inside it may be given as mappings.
    """

    def decorate(section: Any) -> Any:
        @functools.wraps(section.__init__)
        def init(self: Any, /, *args: Any, **values: Any) -> None:
            try:
                _validator(section).validate_python(ArgsKwargs(args, values), self_instance=self)
            except pydantic.ValidationError as error:
                raise _mistake(error, section, what, prefix, remedy) from None

        section.__init__ = init
        section.__pydantic_config__ = {"allow_inf_nan": False, "extra": "forbid"}
        return section

    return decorate


@functools.cache
def _validator(section: type) -> SchemaValidator:
    """Made when the first object is, not when the class is: --help needs none, and all of them take 0.05 s."""
    return pydantic.TypeAdapter(section).validator  # type: ignore[return-value]


def _mistake(
    error: pydantic.ValidationError, section: type, what: str, prefix: str, remedy: Callable[[str], str]
) -> DistsegError | TypeError:
    first = error.errors(include_url=False)[0]
    if first["type"].startswith("unexpected"):  # from Python; unknown keys of a file are refused before
        return TypeError(f"{section.__name__}: {first['loc'][0]}: {first['msg']}")
    name, kind = _place(section, first["loc"])
    key = prefix + name
    value = "nothing" if first["type"].startswith("missing") else repr(first["input"])[:80]
    rule = "must be finite" if first["type"] == "finite_number" else f"must be {allowed(kind)}"
    near = difflib.get_close_matches(str(first["input"]), _choices(kind), n=1)
    return DistsegError(f"{what} {key}: got {value}; {rule}; {f'did you mean {near[0]}?' if near else remedy(key)}")


def _place(section: type, path: Sequence[str | int]) -> tuple[str, Any]:
    """Dotted key and type of what a path of pydantic's leads to; it ends where a value may be of several types."""
    names, kind = [], section
    for part in path:
        inner = _inside(kind, part)
        if inner is None:
            break
        kind = inner
        if isinstance(part, str):
            names.append(part)
    return ".".join(names), str if path[-1] == "[key]" else kind  # a key of a mapping: ours are all names


def _inside(kind: Any, part: str | int) -> Any:
    """Type of an element of a value; None for what has none."""
    one, *others = _kinds(kind)
    if others:
        return None
    if dataclasses.is_dataclass(one):
        return {f.name: f.type for f in dataclasses.fields(one)}.get(str(part))
    if get_origin(one) is Annotated:
        return _inside(get_args(one)[0], part)
    if get_origin(one) is tuple and isinstance(part, int):
        return get_args(one)[0]  # all elements of our tuples are of one type
    return get_args(one)[1] if get_origin(one) is Mapping else None


def _kinds(kind: Any) -> list[Any]:
    """The types that a value may be of, None left out."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [one for one in kinds if one is not NoneType]


def _choices(kind: Any) -> list[str]:
    """The words that a value may be."""
    return [word for one in _kinds(kind) if get_origin(one) is Literal for word in get_args(one)]


def allowed(kind: Any) -> str:
    """All that a value of a type may be, as it stands behind "must be"."""
    others = [_of_one_type(one) for one in _kinds(kind) if get_origin(one) is not Literal]
    return _listed([*_choices(kind), *others]) + (", or null" if NoneType in get_args(kind) else "")


def _of_one_type(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _limited(allowed(parts[0]), parts[1:])
    if origin is tuple:
        many = _many(allowed(parts[0]))
        return f"a list of {many}" if Ellipsis in parts else f"{len(parts)} {many}"
    if origin is Mapping:
        return f"a mapping of names to {_many(allowed(parts[1]))}"
    return PLAIN.get(kind, "a section")


def _limited(words: str, extras: Sequence[Any]) -> str:
    """Words for a type with the limits, or the rule, that stand beside it."""
    for extra in extras:
        if isinstance(extra, Rule):
            return extra.words
    limits = {name: value for extra in extras for m in extra.metadata for name, value in dataclasses.asdict(m).items()}
    if "min_length" in limits:
        return words.replace("a list of", "a list of one or more")
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is not None and high is not None:
        return f"{words} in {'[' if 'ge' in limits else '('}{low}, {high}{']' if 'le' in limits else ')'}"
    return " ".join([words, *(f"{LIMITS[name]} {limit}" for name, limit in limits.items())])


def _many(words: str) -> str:
    for one, more in MANY.items():
        if words.startswith(one):
            return more + words.removeprefix(one)
    return words


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
