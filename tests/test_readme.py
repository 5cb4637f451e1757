"""What README, CONTRIBUTING, docs/ and the READMEs of launch/ and export/ promise is there: commands, paths, links, Python."""

import argparse
import contextlib
import functools
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from distseg import cli
from distseg.cli import COMMANDS, OUTSIDE
from distseg.config_files import load_config
from tests import warm

ROOT = Path(__file__).parent.parent
README, DESIGN, SERVING = ROOT / "README.md", ROOT / "docs/design.md", ROOT / "docs/serving.md"
FOLDERS_OF_DOCUMENTS = ("docs", "launch", "export")
DOCUMENTS = sorted(
    {README, ROOT / "CONTRIBUTING.md", *(path for name in FOLDERS_OF_DOCUMENTS for path in (ROOT / name).rglob("*.md"))}
)
LONGEST_LINE, MOST_WORDS = 120, 30
OWN_PROSE = ("README", "CONTRIBUTING", "data", "design", "installing", "launching", "scoring", "serving", "training")
MENTIONS = ("accelerate launch", "python -m")  # of a way to start something, with nothing behind it

# In a sentence, `...` that begins so is a command; any other is a key, a file or a value.
BEGINNINGS = ("distseg", "accelerate", "torchrun", "bash", "python", "sbatch", "kubectl", "pytest", "pip", "uv")
# Of others' commands our files and extras are looked for, and no more.
OF_OTHERS = ("pip", "uv", "pytest", "kubectl", "apt-get", "cmake", "docker", "sysctl")
BUILT = ("build/cpp/distseg_predict", "build/cpp/triton_client")
OUR_FOLDERS = ("distseg/", "docs/", "launch/", "yaml_configs/", "tests/", "export/")
COMMAND_OF_SCRIPT = {"distseg/train.py": "train", "distseg/evaluate.py": "evaluate"}
STAND_INS = {"N": "2", "X.yaml": "covid_ct"}  # what a document leaves to the reader, as a parser can take it


class Parsed(BaseException):
    """Ends a main whose parser has taken its words."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """The words of each command: a line of a bash block, or what begins like one between backquotes."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    spans = [span.replace("\\|", "|") for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(path))]
    typed = [span for span in spans if span.startswith(BEGINNINGS) or re.match(r"[A-Z_0-9]+=", span)]
    split = [words_of(line) for line in lines]
    split += [words for span in typed if is_command(words := words_of(span)) and span not in MENTIONS]
    return [words for words in split if words]


def words_of(line: str) -> list[str]:
    """Without a comment, and without what stands before the command: its environment, and the core it runs on."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words.pop(0)
    return words[3:] if words[:2] == ["taskset", "-c"] else words


def is_command(words: Sequence[str]) -> bool:
    return len(words) > 1 and words[0] in BEGINNINGS


ALL = [(relative(path), words) for path in DOCUMENTS for words in commands(path)]


def of_benchmark(words: Sequence[str]) -> bool:
    return words[0] == "python" and words[1].startswith("tests/")


@contextlib.contextmanager
def ends_when_parsed() -> Iterator[None]:
    """In it a main goes as far as its parser."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)

            def parse_and_end(*args: object, _parse: object = parse, **named: object) -> None:
                _parse(*args, **named)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, name, parse_and_end)
        with pytest.raises(Parsed):
            yield


def check(words: Sequence[str]) -> None:
    """Parses a command with the parser of what it starts; what it names of the repository must be there."""
    words = [STAND_INS.get(word, word) for word in words if word != "..."]
    for word in words:
        if word.startswith(OUR_FOLDERS):
            assert (ROOT / word).exists(), word
        if named := re.fullmatch(r"(?:distseg|\.)\[(.+)\]", word):
            assert {*named[1].split(",")} <= extras(), word
    first, *rest = words
    if first == "distseg":
        check_distseg(rest[0], rest[1:])
    elif first == "accelerate":
        check_launch(rest)
    elif first == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(rest)
        check_script(args.training_script, args.training_script_args, args.module)
    elif first == "bash":
        assert subprocess.run(["bash", "-n", ROOT / rest[0]]).returncode == 0
        if rest[0] == "launch/torchrun.sh":
            check_distseg("train", rest[1:])
    elif first == "python":
        is_module = rest[0] == "-m"
        check_script(rest[is_module], rest[is_module + 1 :], is_module)
    elif first == "sbatch":
        (at,) = (i for i, word in enumerate(rest) if word.startswith("launch/"))
        check_distseg({"launch/slurm.sbatch": "train", "launch/study.sbatch": "study"}[rest[at]], rest[at + 1 :])
    else:
        assert first in OF_OTHERS + BUILT, first


def check_distseg(name: str, words: Sequence[str]) -> None:
    """What follows `distseg`: parsed by the command, and its configuration read; a name alone is one of the commands."""
    if name in ("NAME", "COMMAND", "--help"):
        return
    assert name in COMMANDS, name
    module = importlib.import_module(OUTSIDE.get(name, f"distseg.commands.{name}"))
    if not words and name != "train":
        return
    if not hasattr(module, "parse_arguments"):
        with ends_when_parsed():
            module.main(words)
        return
    args = module.parse_arguments(words)
    if name == "train":
        load_config(args.config, args.overrides)
    elif name == "study":
        from distseg.studies.grid import load_study

        load_study(args.study, args.overrides)


def check_launch(words: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    parser = launch_command_parser()
    args = parser.parse_args(words[1:])
    check_script(args.training_script, args.training_script_args, args.module)


def check_script(script: str, words: Sequence[str], is_module: bool) -> None:
    """What follows `python` or a launcher."""
    if is_module and script == "distseg.shipped":
        with ends_when_parsed():
            importlib.import_module("distseg.shipped.__main__").main(words)
        return
    path = f"{script.replace('.', '/')}.py" if is_module else script
    if path in COMMAND_OF_SCRIPT:
        check_distseg(COMMAND_OF_SCRIPT[path], words)
    else:
        assert (ROOT / path).is_file(), path


@functools.cache
def extras() -> frozenset[str]:
    return frozenset(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_every_command_of_the_readme_names_what_exists() -> None:
    assert len(commands(README)) >= 10
    for words in commands(README):
        if words[0] == "distseg":
            assert words[1] in COMMANDS
        for word in words:
            if word.startswith(("distseg/", "launch/", "yaml_configs/", "tests/")):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_command_of_a_document_is_taken_by_its_parser(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        try:
            check(words)
        except SystemExit as end:  # --help, or a parser's refusal
            assert end.code == 0, shlex.join(words)
        except Exception as error:
            raise AssertionError(shlex.join(words)) from error


@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_every_help_ends_with_two_examples_that_its_parser_takes(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with contextlib.suppress(SystemExit):
        cli.main([*([name] if name else []), "--help"])
    *_, head, one, other = capsys.readouterr().out.splitlines()
    assert head == "examples:"
    for example in (one, other):
        assert example.startswith("  ") and f"distseg {name}".strip() in example.replace("/train.py", " train")
        check(shlex.split(example))


@pytest.mark.slow(15)
def test_every_benchmark_of_a_document_takes_its_words() -> None:
    """Forked: they import each other by names of their own."""
    of_documents = {tuple(words[1:]) for _, words in ALL if of_benchmark(words)}
    assert len(of_documents) >= 10
    warm.run_function(1, parse_scripts, sorted(of_documents))


def parse_scripts(rank: int, commands: Sequence[Sequence[str]]) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]
    for script, *words in commands:
        sys.argv = [script, *words]
        with ends_when_parsed():
            runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_readmes_own_data_are_prepared_with_its_words(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its CSV, its command, and what it says that the command prints."""
    import nibabel
    import numpy as np

    (table,) = (block for block in blocks(README, "") if block.startswith("image,mask,patient"))
    (tmp_path / "MY_DATA").mkdir()
    (tmp_path / "MY_DATA/cases.csv").write_text(table)
    volumes = sorted((phantom / "COVID-19-CT-Seg_20cases").iterdir())
    for row, volume in zip(table.splitlines()[1:], volumes, strict=False):
        image, mask, _ = row.split(",")
        shutil.copy(volume, tmp_path / "MY_DATA" / image)
        infection = nibabel.load(phantom / "Infection_Mask" / volume.name)
        lung = np.asarray(nibabel.load(phantom / "Lung_Mask" / volume.name).dataobj) > 0
        labels = np.where(np.asarray(infection.dataobj) > 0, 2, lung).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(labels, infection.affine), tmp_path / "MY_DATA" / mask)
    (words,) = (words for words in commands(README) if words[:3] == ["distseg", "prepare", "MY_DATA"])
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words[1:], "--workers", "1"]) == 0
    said = re.search(r"`prepare` prints what it found: `(.+?)`", README.read_text())
    assert said and re.search(re.escape(said[1]).replace(re.escape("..."), ".*"), capsys.readouterr().out)


def headings(path: Path) -> set[str]:
    """As GitHub names them behind #."""
    found = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    text = prose(path)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_pictures_are_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "docs/pictures").iterdir()) < 300_000


def test_no_line_of_the_readme_is_long() -> None:
    assert [line for line in README.read_text().splitlines() if len(line) > LONGEST_LINE] == []


def sentences(path: Path) -> list[str]:
    """Of paragraphs and list items; tables and headings have none."""
    lines = [line for line in prose(path).splitlines() if not re.match(r"\s*(\||#|<)", line)]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*- )", "\n".join(lines))
    return [sentence for text in paragraphs for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(text.split()))]


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path.stem in OWN_PROSE and path.parts[-2] != "export"], ids=relative
)
def test_sentences_are_short(path: Path) -> None:
    assert [sentence for sentence in sentences(path) if len(sentence.split()) > MOST_WORDS] == []


def test_every_path_of_the_map_exists() -> None:
    (tree,) = (block for block in blocks(DESIGN, "") if "distseg/training/" in block)
    folder = ROOT
    for line in tree.splitlines():
        if match := re.match(r"(distseg/\S*)\s", line):
            folder = ROOT / match.group(1)
            assert folder.is_dir(), folder
        for name in re.findall(r"\b[a-z0-9_]+\.py\b", line):
            assert (folder / name).is_file(), f"{folder / name}"


def test_the_python_of_the_documents_runs_on_an_exported_model(model: Path) -> None:
    (code,) = blocks(SERVING, "python")
    check = "assert mask.shape == (1, 1, 512, 512) and probability.shape == (1, 2, 512, 512); probability.numpy()"
    words = [sys.executable, "-W", "ignore", "-c", code + check]
    subprocess.run(words, cwd=model.parent, check=True, timeout=120)


def test_importing_distseg_imports_no_heavy_package() -> None:
    code = "import distseg, sys; print([m for m in ('torch', 'nvidia.dali', 'triton', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
