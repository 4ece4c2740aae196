"""The notebooks: one first cell, no address that the project does not own, and a badge where there is one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL = (FOLDER / "first_cell.py").read_text(encoding="utf-8")

spec = importlib.util.spec_from_file_location("fill_in", FOLDER / "fill_in.py")
fill_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill_in)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_carries_exactly_the_first_cell(path):
    text = path.read_text(encoding="utf-8")
    assert text == fill_in.fill_in(text, path.name, CELL, fill_in.repo_url()), "python notebooks/fill_in.py"
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert "".join(code[0]["source"]) == CELL.rstrip("\n")
    assert not any("%pip" in "".join(cell["source"]) for cell in code[1:])


def test_links_into_a_repository_are_to_the_address_that_is_set_alone():
    for path in NOTEBOOKS:
        for owner in re.findall(r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)", path.read_text()):
            assert fill_in.repo_url() == f"https://github.com/{owner}"


def test_filling_in_an_address_gives_a_badge_and_taking_it_back_leaves_no_trace():
    text = NOTEBOOKS[0].read_text(encoding="utf-8")
    url = "https://github.com/someone/somewhere"
    filled = fill_in.fill_in(text, NOTEBOOKS[0].name, CELL, url)
    badge = (
        f"https://colab.research.google.com/github/someone/somewhere/blob/main/notebooks/{NOTEBOOKS[0].name}"
    )
    assert filled.count(badge) == 1
    assert fill_in.fill_in(filled, NOTEBOOKS[0].name, CELL, url) == filled
    if not fill_in.repo_url():
        assert fill_in.fill_in(filled, NOTEBOOKS[0].name, CELL, "") == text


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "jaxseek is not installed: pip install -e '.[notebooks]'"),
        ({"COLAB_RELEASE_TAG": "test"}, "REPO_URL is empty"),
    ],
)
def test_without_jaxseek_the_cell_says_what_to_do(tmp_path, variables, says):
    (tmp_path / "jaxseek").mkdir()  # a clone in the notebook's folder
    cell = re.sub(r'^REPO_URL = ".*"', 'REPO_URL = ""', CELL, flags=re.M)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    command = [sys.executable, "-S", "-c", cell]  # without installed packages
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]


def test_with_jaxseek_the_cell_does_nothing_outside_colab():
    env = {k: v for k, v in os.environ.items() if k != "COLAB_RELEASE_TAG"}
    env["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), str(FOLDER.parent / "convert")])
    done = subprocess.run([sys.executable, "-c", CELL], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
