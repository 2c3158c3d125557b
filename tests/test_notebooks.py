"""The notebooks run from top to bottom, in a kernel of their own, with small settings."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import pytest
from covers import some
from nbclient import NotebookClient
from test_experiments import place  # noqa: F401

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "notebooks"


@pytest.fixture
def folder(tmp_path):
    """The notebooks' folder in a repository that Python would not find by itself; what they write stays there."""
    made = tmp_path / "repository" / "experiments" / "notebooks"
    made.mkdir(parents=True)
    for path in (ROOT / "experiments").iterdir():
        if path.name not in ("notebooks", "__pycache__"):
            (made.parent / path.name).symlink_to(path)
    (tmp_path / "repository" / "peftjax").symlink_to(ROOT / "peftjax")
    return made


def clean(**more):
    """The environment of a process that is not told where the repository is."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu", **more}


def executed(name, folder, **settings):
    """The notebook of that name after all its cells have run in `folder`, with other values of its first settings."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (first,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = set(re.findall(r"\w+", first.source.replace("=", " ")))
    assert set(settings) <= names, f"{name} has no settings {set(settings) - names}"
    first.source += "".join(f"\n{key} = {value!r}" for key, value in settings.items())
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=cache | clean())
    return notebook


def printed(notebook):
    """All that the cells printed, tables too."""
    outs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "\n".join(out.text if out.output_type == "stream" else out.data.get("text/plain", "") for out in outs)


def pictures(notebook):
    """How many pictures the cells drew."""
    outs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    drawn = [base64.b64decode(out.data["image/png"]) for out in outs if "image/png" in out.get("data", ())]
    assert all(picture.startswith(b"\x89PNG\r\n\x1a\n") for picture in drawn)
    return len(drawn)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_results(path):
    """They open in Colab from their own place, hold no results, and bring no other jax."""
    page = json.loads(path.read_text())
    code = [cell for cell in page["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    text = "".join(line for cell in page["cells"] for line in cell["source"])
    assert re.search(rf"colab\.research\.google\.com/github/\S+/experiments/notebooks/{path.name}\)", text)
    assert "--constraint" in text and "-U" not in text and "--upgrade" not in text
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1


def settled(name, cwd, repository):
    """Where the packages are from after the first cells of a notebook, in a process in `cwd`."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    said = "\nimport peftjax, experiments\nprint(peftjax.__file__, experiments.__file__)"
    script = f"{cells[0]}\nrepository = {repository!r}\n{cells[1]}{said}"
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, env=clean(), capture_output=True, text=True)


@pytest.mark.ci
@pytest.mark.parametrize("name", some(["quickstart", "sharded"], 2))
def test_where_the_repository_is_not_it_is_cloned_once(name, tmp_path):
    """As in Colab, and after a restart of its kernel, beside a folder called as the package."""
    source, here = tmp_path / "source", tmp_path / "content"
    for part in ("peftjax", "experiments"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (here / "peftjax").mkdir(parents=True)
    done = settled(name, here, "")
    assert done.returncode and "set `repository` above to the address of its repository" in done.stderr
    for address in (f"file://{source}", "file:///nowhere"):  # the second time nothing is fetched
        done = settled(name, here, address)
        clone = here / "peftjax-repository"
        assert done.stdout.splitlines()[-1] == f"{clone}/peftjax/__init__.py {clone}/experiments/__init__.py", done.stderr


@pytest.mark.ci
def test_sharded(place, folder):  # noqa: F811
    small = {"model": str(place / "model"), "rows": str(place / "mine.csv"), "length": 8, "batch": 16}
    notebook = executed("sharded", folder, **small, steps=8, every=2, plan_length=16)
    found = printed(notebook)
    assert pictures(notebook) == 1 and "8 x cpu" in found and "{'data': 2, 'fsdp': 2, 'model': 2}" in found
    assert re.search(r"all-reduce +\d+ times", found)
    assert "step 4: loss" in found and "ended with -9" in found
    after = int(re.search(r"goes on after step (\d+) with \{'batch': \1\}", found)[1])
    assert after in (2, 4)
    for method in ("lora", "full"):
        assert re.search(rf"{method} +[\d.]+ +0.0\d +0.\d\d ", found), method


@pytest.mark.ci
@pytest.mark.parametrize("method", ["adapter", pytest.param("lora", marks=pytest.mark.full)])
def test_quickstart(method, place, folder):  # noqa: F811
    small = {"model": str(place / "model"), "rows": str(place / "mine.csv"), "length": 8, "batch": 16, "most": 128}
    notebook = executed("quickstart", folder, **small, method=method, rate=3e-2, rates=(1e-3,), epochs=2)
    found = printed(notebook)
    assert pictures(notebook) == 1 and re.search(r"on \d+ x cpu \(cpu\)", found)
    assert "bert/encoder/layer/0/attention/self/query/kernel" in found
    assert "the largest change of a logit: 0.0" in found and "merged: 0" in found
    assert "the pretrained arrays are the same ones: True" in found and "the same logits: True" in found
    assert re.search(r"rate 0\.03, epoch 2: loss [\d.]+, validation [\d.]+", found)
    assert re.search(r"rate [\d.]+: test accuracy [\d.]+; always the same answer: [\d.]+", found)
    merged = {"adapter": "no weight can say what these overlays do", "lora": "merged, the largest difference: "}
    assert merged[method] in found and len(re.findall(r"scale [\d.]+: validation", found)) == 3
