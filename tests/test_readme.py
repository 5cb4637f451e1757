"""What the README and the commands' help promise is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from distseg.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines() + re.findall(r"^\| `(.+?)` ", README, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


def test_every_command_of_the_readme_names_what_exists() -> None:
    assert len(commands()) >= 10
    for words in commands():
        if words[0] == "distseg":
            assert words[1] in COMMANDS
        for word in words:
            if word.startswith(("distseg/", "launch/", "yaml_configs/", "tests/")):
                assert (ROOT / word).exists(), word


def test_every_path_of_the_map_exists() -> None:
    (tree,) = (block for block in blocks("") if "distseg/training/" in block)
    folder = ROOT
    for line in tree.splitlines():
        if match := re.match(r"(distseg/\S*)\s", line):
            folder = ROOT / match.group(1)
        for name in re.findall(r"\b[a-z]+\.py\b", line):
            assert (folder / name).is_file(), f"{folder / name}"


def test_the_python_of_the_readme_runs_on_an_exported_model(model: Path) -> None:
    (code,) = blocks("python")
    check = "assert mask.shape == (1, 1, 512, 512) and probability.shape == (1, 2, 512, 512); probability.numpy()"
    words = [sys.executable, "-W", "ignore", "-c", code + check]
    subprocess.run(words, cwd=model.parent, check=True, timeout=120)


def test_importing_distseg_imports_no_heavy_package() -> None:
    code = "import distseg, sys; print([m for m in ('torch', 'nvidia.dali', 'triton', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
