"""The wheel is whole: what a user of it types, and what distseg tells a user to type, works without a checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from distseg.errors import DistsegError
from distseg.shipped import FOLDERS, as_typed, find_preset, shipped, shipped_names

ROOT = Path(__file__).parent.parent
NAMED = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+")


def tracked(*folders: str) -> set[str]:
    """Files of the checkout, without what tools leave there."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    return set(subprocess.check_output(words, cwd=ROOT, text=True).split())


def test_every_file_of_the_folders_is_shipped() -> None:
    assert set(shipped_names()) >= tracked(*FOLDERS)
    assert shipped("launch/gpu.yaml") == ROOT / "launch/gpu.yaml"


def test_every_file_that_the_code_names_is_shipped() -> None:
    named = {name for path in (ROOT / "distseg").rglob("*.py") for name in NAMED.findall(path.read_text())}
    assert len(named) > 5
    assert named - {"yaml_configs/X.yaml"} <= set(shipped_names())


def test_a_shipped_file_is_named_so_that_it_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert as_typed("launch/cpu.yaml") == "launch/cpu.yaml"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/cpu.yaml").write_text("another's")
    monkeypatch.chdir(tmp_path)
    assert as_typed("launch/cpu.yaml") == str(ROOT / "launch/cpu.yaml")
    with pytest.raises(DistsegError, match="got launch/gpu.yml; it must be one of .*; did you mean launch/gpu.yaml?"):
        shipped("launch/gpu.yml")


def test_a_preset_goes_by_name_and_a_file_of_that_name_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = ROOT / "yaml_configs/covid_ct.yaml"
    assert find_preset(Path("covid_ct"), "config file") == find_preset(Path("covid_ct.yaml"), "config file") == preset
    (tmp_path / "covid_ct.yaml").write_text("seed: 1\n")
    assert find_preset(Path("covid_ct.yaml"), "config file") == Path("covid_ct.yaml")
    assert find_preset(Path("covid_ct"), "config file") == preset
    assert find_preset(Path("quickstart.yaml"), "config file", tmp_path / "x") == ROOT / "yaml_configs/quickstart.yaml"
    for wrong in ("covid_tc", "yaml_configs/covid_ct.yaml", "study"):
        with pytest.raises(DistsegError, match="no such file; shipped ones go by name, covid_ct, .*; did you mean "):
            find_preset(Path(wrong), "config file")


def source_copy(folder: Path) -> Path:
    """The checkout's files, since building leaves some beside them."""
    for name in tracked():
        if (ROOT / name).exists() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel or sdist, by the builder that the lock has."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def environment_with(wheel: Path, folder: Path) -> Path:
    """An environment that has the wheel alone, and sees the packages that this one has; its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin/python"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, stderr=subprocess.PIPE)
    (site,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file is a folder whose own .pth files, such as the editable distseg's, are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.slow(25)
def test_an_installed_wheel_does_without_a_checkout(tmp_path: Path) -> None:
    source = source_copy(tmp_path / "source")
    wheel = build("wheel", source, tmp_path / "dist")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"distseg/shipped/{name}" for name in tracked(*FOLDERS)} <= names
    sdist = build("sdist", source, tmp_path / "dist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    again = build("wheel", tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz"), tmp_path / "again")
    assert set(zipfile.ZipFile(again).namelist()) == names

    programs, place = environment_with(wheel, tmp_path / "environment"), tmp_path / "elsewhere"
    place.mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean["PATH"] = os.pathsep.join([str(programs), os.environ["PATH"]])

    def said(*words: str, status: int = 0) -> str:
        done = subprocess.run(words, cwd=place, env=clean, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    home = said("python", "-c", "import distseg; print(distseg.__file__)").strip()
    assert Path(home).is_relative_to(tmp_path / "environment")
    assert "epochs: 7" in said("distseg", "train", "--config", "quickstart", "--print-config")
    assert "predict      ready" in said("distseg", "doctor", "train")
    code = (
        "from distseg.studies.grid import load_study; from distseg.studies.task import task_of, _launch_words; from pathlib import Path; "
        "study = load_study(Path('study_cpu')); print(len(study.runs), *_launch_words(task_of(study, study.runs[0])))"
    )
    count, *launch = said("python", "-c", code).split()
    config = Path(launch[launch.index("--config_file") + 1])
    assert count == "6" and config.is_file() and config.is_relative_to(tmp_path / "environment")
    script = said("python", "-m", "distseg.shipped", "launch/torchrun.sh").strip()
    clean |= {"NPROC_PER_NODE": "1", "MAX_RESTARTS": "0"}
    assert "did you mean covid_ct?" in said("bash", script, "--config", "covid", status=1)
