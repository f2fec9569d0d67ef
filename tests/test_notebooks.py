"""All six notebooks, executed in order as a reader or CI does, and what they promise to write."""

import inspect
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import restoration_utils as ru

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROMISED = [  # every file name of the description
    "pretrained_generator_best.pth",
    "pretrain_sample_epoch_*.png",
    "pretrain_loss_curves.png",
    "face_restoration_gan_checkpoint_epoch_*.pth",
    "face_restoration_generator_final.pth",
    "face_restoration_discriminator_final.pth",
    "gan_sample_epoch_*.png",
    "comparison_batch_*.png",
    "metrics.json",
]


def copy_module(folder):
    """The module, its weights, a figure and the measuring harness that notebook 06 uses, as in the repository."""
    shutil.copy(ROOT / "restoration_utils.py", folder)
    (folder / "outputs").mkdir(exist_ok=True)
    for name in ("restoration_weights.pth", "example_colouring.jpg"):
        shutil.copy(ROOT / "outputs" / name, folder / "outputs")
    shutil.copytree(ROOT / "tests" / "benchmarks", folder / "tests" / "benchmarks")


def execute(notebooks, folder, timeout=600, **variables):
    """Runs copies of the notebooks in `folder` with nbconvert; raises with the error's text if one fails."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RESTORATION_")}
    environ = {k: v for k, v in environ.items() if k not in ("FACES_DIR", "OUTPUT_DIR")} | variables
    for notebook in notebooks:
        shutil.copy(notebook, folder)
        command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
        command += [f"--ExecutePreprocessor.timeout={timeout}", str(folder / notebook.name)]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


def cells_of(notebook, kind):
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def outputs_of(notebook):
    return [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])]


def assert_every_figure_says_what_it_shows(notebook):
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    images = re.findall("<img[^>]*", "".join("".join(part.get("text/html", "")) for part in data))
    assert images and not [part for part in data if {"image/png", "image/jpeg"} & part.keys()]
    assert all(re.search('alt="[^"]+"', image) for image in images)


def assert_promises(outputs, degraded, folder):
    for pattern in PROMISED:
        assert list(outputs.glob(pattern)), f"{pattern} is missing"
    for kind in ru.KINDS:
        assert list(degraded.glob(f"*_{kind}.jpg"))
    for notebook in sorted(folder.glob("0*.ipynb")):
        assert_every_figure_says_what_it_shows(notebook)
        assert not [o for o in outputs_of(notebook) if o.get("name") == "stderr" or o["output_type"] == "error"]


def test_there_are_six_with_one_setup_cell_and_outputs_of_one_clean_run():
    names = "create_degraded_images prepare_data build_models pretrain_generator train_gan evaluate_and_visualize"
    assert [path.stem for path in NOTEBOOKS] == [f"0{i}_{name}" for i, name in enumerate(names.split(), 1)]
    setups = set()
    for path in NOTEBOOKS:
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        setups.add("".join(code[0]["source"]))
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert not [o for o in outputs_of(path) if o.get("name") == "stderr" or o["output_type"] == "error"]
        assert path.stat().st_size < 1_500_000
        assert_every_figure_says_what_it_shows(path)
    assert len(setups) == 1
    lines = [line for line in setups.pop().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 6


def test_listings_fit_a_page_of_100_columns():
    listed = 0
    for path in NOTEBOOKS:
        for call in re.findall(r"ru\.listing\(([^)]*)\)", "\n".join(cells_of(path, "code"))):
            for name in re.findall(r"ru\.([\w.]+)", call):
                source = inspect.getsource(operator.attrgetter(name)(ru))
                wide = [line for line in textwrap.dedent(source).splitlines() if len(line) > 100]
                assert not wide, f"{path.name}: {name}: {wide}"
                listed += 1
    assert listed > 15


def anchors_of(path, text):
    """The anchors of a text's headings, as GitHub makes them for the README and Jupyter for notebooks."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    if path.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [ROOT / "README.md", *NOTEBOOKS], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text() if path.suffix == ".md" else "\n\n".join(cells_of(path, "markdown"))
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert len(links) > 5
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors_of(path, text), link
        elif not link.startswith("https://"):
            assert (path.parent / link.partition("#")[0]).is_file(), link
    repositories = re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?:/blob|[\s)`;]|$)", text)
    assert set(repositories) <= {repository_of_readme()}  # set in one place
    if path.suffix == ".ipynb":
        others = {other.name for other in NOTEBOOKS} - {path.name}
        assert all(links.count(other) >= 2 for other in others)  # at the top and at the bottom
        assert sum(f"main/notebooks/{path.name}" in link for link in links) == 2  # Colab and Kaggle


def repository_of_readme():
    return re.search(r"git clone https://github\.com/([\w.-]+/[\w.-]+)", (ROOT / "README.md").read_text())[1]


def test_the_readme_is_short_for_those_who_only_want_to_use_it():
    text, _, _ = (ROOT / "README.md").read_text().partition("## For maintainers")
    english, _, _ = text.partition("## Tóm tắt")
    prose = re.sub(r"```.*?```|\]\([^)]*\)|[|·]|:?-{3,}:?", " ", english, flags=re.DOTALL)
    assert 500 < len(prose.split()) <= 1200


def test_html_is_made_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, *map(str, NOTEBOOKS)], capture_output=True, text=True)
    assert done.returncode == 0 and len(list(tmp_path.glob("*.html"))) == 6
    assert "warning" not in done.stderr.lower()
    for notebook in NOTEBOOKS:  # what is listed stands there with a fixed width, and coloured
        listings = "\n".join(cells_of(notebook, "code")).count("ru.listing(")
        page = (tmp_path / f"{notebook.stem}.html").read_text()
        block = r'<pre style="font-family:monospace[^>]*><span[^>]*></span><span style="color'
        assert len(re.findall(block, page)) == listings


def test_smoke_profile_runs_all_six_in_order(tmp_path):
    output = tmp_path / "outputs"
    variables = {"RESTORATION_PROFILE": "smoke", "OUTPUT_DIR": str(output)}
    work = tmp_path / "notebooks"
    work.mkdir()
    copy_module(tmp_path)  # found in the parent folder
    execute(NOTEBOOKS, work, **variables)
    assert_promises(output, output / "fakefaces_degraded", work)
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["mean_over_faces"]) == {*ru.KINDS, "clean"}
    best = output / "pretrained_generator_best.pth"
    before = best.stat().st_mtime_ns
    execute(NOTEBOOKS[3:4], work, **variables)  # a finished stage that is run again only reloads
    assert best.stat().st_mtime_ns == before
    plain = {"RESTORATION_PLAIN": "1", "OUTPUT_DIR": str(output / "plain")}
    execute(NOTEBOOKS[3:5], work, **variables | plain)
    execute(NOTEBOOKS[5:], work, **variables)  # and shows both
    metrics = json.loads((output / "metrics.json").read_text())
    assert all({"restored", "plain"} <= metrics["mean_over_faces"][kind].keys() for kind in ru.KINDS)


def test_a_made_up_kaggle_runs_with_two_processes_in_place_of_its_gpus(tmp_path):
    kaggle = tmp_path / "kaggle"
    working = kaggle / "working"
    working.mkdir(parents=True)
    for number in range(12):
        picture = ru.draw_portrait(np.random.default_rng(number), 128)
        ru.write_image(kaggle / "input" / "fakefaces" / "images" / f"{number}.jpg", picture)
    (kaggle / "input" / "fakefaces" / "images" / "-broken.jpg").write_text("not a picture")  # the first of all
    repository = kaggle / "input" / "restoration-notebooks"
    repository.mkdir()
    copy_module(repository)
    # two processes in place of Kaggle's two GPUs
    execute(NOTEBOOKS, working, RESTORATION_PROFILE="smoke", RESTORATION_PROCESSES="2")
    for notebook in NOTEBOOKS[3:5]:
        assert "training in 2 processes" in json.dumps(outputs_of(working / notebook.name))
    assert_promises(working / "outputs", working / "fakefaces_degraded", working)
    assert "fakefaces" in json.loads((working / "outputs" / "metrics.json").read_text())["made_by"]["faces"]
    assert not list((working / "outputs").glob("synthetic_portraits*"))


def test_06_without_05_names_the_notebook_that_is_missing(tmp_path):
    variables = {"RESTORATION_PROFILE": "smoke", "OUTPUT_DIR": str(tmp_path / "o")}
    copy_module(tmp_path)
    with pytest.raises(AssertionError, match="05_train_gan"):
        execute(NOTEBOOKS[5:], tmp_path, **variables)


@pytest.mark.slow
@pytest.mark.training
def test_quick_profile_keeps_what_the_notebooks_promise(tmp_path):
    copy_module(tmp_path)
    variables = {"RESTORATION_PROFILE": "quick", "RESTORATION_STRICT": "1", "OUTPUT_DIR": str(tmp_path / "o")}
    execute(NOTEBOOKS, tmp_path, timeout=3000, **variables)
    assert_promises(tmp_path / "o", tmp_path / "o" / "fakefaces_degraded", tmp_path)
