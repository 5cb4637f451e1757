"""The lock (requirements.txt, requirements-dev.txt) holds what pyproject.toml asks for, and nothing but files with hashes."""

import functools
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {"requirements.txt": ("train", "dicom"), "requirements-dev.txt": ("dev",)}  # file -> extras, see tests/lock.sh
ENVIRONMENTS = [
    {
        "python_version": version,
        "python_full_version": f"{version}.1",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    for version in ("3.11", "3.12", "3.13")
]


@functools.cache
def pins(lock: str) -> list[tuple[Requirement, int]]:
    """Each with the number of its hashes."""
    entries = re.findall(r"^\w[^\\\n]*(?:\\\n[^\\\n]*)*", (ROOT / lock).read_text(), re.MULTILINE)
    return [(Requirement(entry.partition("\\")[0].strip()), entry.count("--hash=sha256:")) for entry in entries]


def asked_for(extras: Sequence[str]) -> Iterator[str]:
    """Requirements of the core, of extras and of the extras that those name, and what builds the package."""
    project = PYPROJECT["project"]
    yield from (*project["dependencies"], *PYPROJECT["dependency-groups"]["build"])
    for extra in extras:
        for text in project["optional-dependencies"][extra]:
            if (requirement := Requirement(text)).name == "distseg":
                yield from asked_for(sorted(requirement.extras))
            else:
                yield text


def unmet(requirement: Requirement, lock: str, environment: dict[str, str]) -> bool:
    """Whether an installation of the lock would leave a requirement out, or break its range."""
    if requirement.marker is not None and not requirement.marker.evaluate(environment):
        return False
    versions = [
        next(iter(pin.specifier)).version
        for pin, _ in pins(lock)
        if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]
    return len(versions) != 1 or not requirement.specifier.contains(versions[0])


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda environment: environment["python_version"])
def test_the_lock_has_one_version_in_the_range_of_every_requirement(lock: str, environment: dict[str, str]) -> None:
    wrong = [text for text in asked_for(LOCKS[lock]) if unmet(Requirement(text), lock, environment)]
    assert wrong == [], "bash tests/lock.sh"


@pytest.mark.parametrize("text", ["torch<2.11", "numpy>=99", "a-package-that-nobody-locked"])
def test_a_range_without_its_pin_and_a_requirement_that_is_not_locked_are_seen(text: str) -> None:
    assert all(unmet(Requirement(text), lock, ENVIRONMENTS[0]) for lock in LOCKS)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_a_hash_and_none_says_where_it_is_fetched_from(lock: str) -> None:
    found = pins(lock)
    assert len(found) > 50
    assert [str(pin) for pin, hashes in found if hashes == 0 or len(pin.specifier) != 1 or pin.url] == []
    assert "://" not in (ROOT / lock).read_text()


def test_training_and_tests_have_the_same_versions() -> None:
    train, dev = ({(pin.name, str(pin.specifier)) for pin, _ in pins(lock)} for lock in LOCKS)
    assert train < dev
