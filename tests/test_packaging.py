"The package as it is built, installed and described: version, requirements, wheel, console script, README."
import ast
import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import metanb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import readme  # noqa: E402


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built through a source archive; from a copy, because a build leaves files behind. Pip's isolated build is what installed this package."
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "metanb", copy / "metanb", ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def closure(requirements):
    "Names of the installed distributions that `requirements` bring, directly or not."
    seen, todo = set(), [Requirement(r) for r in requirements]
    while todo:
        r = todo.pop()
        name = re.sub(r"[-_.]+", "-", r.name).lower()
        if name in seen or (r.marker and not r.marker.evaluate({"extra": ""})): continue
        seen.add(name)
        try: todo += map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError: seen.discard(name)
    return seen


def run(code, *args, cwd):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_version_is_the_one_in_settings(settings):
    assert metanb.__version__ == settings["version"]


def test_the_wheel_holds_the_package_and_its_splits_and_nothing_else(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    wanted = {f"metanb/{p.relative_to(ROOT / 'metanb').as_posix()}" for pattern in ("*.py", "splits/*") for p in (ROOT / "metanb").glob(pattern)}
    assert inside == wanted


def test_the_wheel_names_its_script_licence_and_requirements(wheel, settings):
    with zipfile.ZipFile(wheel) as z:
        text = {Path(n).name: z.read(n).decode() for n in z.namelist() if ".dist-info/" in n}
    assert "metanb = metanb.cli:main" in text["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in text["METADATA"] and "LICENSE" in text
    assert f"Requires-Python: >={settings['min_python']}" in text["METADATA"]
    for requirement in settings["requirements"].split(): assert f"Requires-Dist: {requirement}\n" in text["METADATA"]


def test_the_wheel_imports_where_only_its_requirements_are(wheel, settings, tmp_path):
    "Modules that only the development set brings (nbdev, fastcore, IPython, pytest …) are refused, as in an environment without them."
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    allowed = closure(settings["requirements"].split())
    owners = importlib.metadata.packages_distributions()
    refused = [m for m, dists in owners.items() if m != "metanb" and not {re.sub(r"[-_.]+", "-", d).lower() for d in dists} & allowed]
    assert {"nbdev", "fastcore", "IPython", "pytest"} <= set(refused)
    modules = [f"metanb.{p.stem}" for p in (ROOT / "metanb").glob("*.py") if p.stem != "__main__"]
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {refused!r}: raise ModuleNotFoundError(f'{{name}} is not among the requirements', name=name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import metanb
assert metanb.__file__.startswith(sys.argv[1]), metanb.__file__
for name in {modules!r}: importlib.import_module(name)
for slow in ('torchvision', 'datasets'): assert slow not in sys.modules, f'importing metanb imports {{slow}}'
"""
    ran = run(code, tmp_path / "site", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_the_package_imports_only_what_it_requires(settings):
    "Also the imports inside functions, which the test above does not reach; an extra's packages may be there."
    listed = [r for key in settings if key.endswith("requirements") and key != "dev_requirements" for r in settings[key].split()]
    names = {re.sub(r"[-_.]+", "-", Requirement(r).name).lower() for r in listed} | {"pil", "metanb"}
    for path in (ROOT / "metanb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): found = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom): found = [] if node.level else [node.module]
            else: continue
            for name in {n.partition(".")[0] for n in found} - set(sys.stdlib_module_names):
                assert name.lower().replace("_", "-") in names, f"{path.name} imports {name}, which settings.ini does not require"


def test_console_script_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="metanb")
    assert [s.value for s in scripts] == ["metanb.cli:main"], "install the clone: pip install -e '.[dev]'"


def test_readme_is_the_index_notebook(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/index.ipynb").write_bytes((ROOT / "nbs/index.ipynb").read_bytes())
    readme.main(tmp_path)
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "nbs"}
    assert made == {Path("README.md"), *(p.relative_to(ROOT) for p in (ROOT / readme.PICTURES).glob("*"))}, "run python tools/readme.py"
    for path in made: assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), f"{path} is old: run python tools/readme.py"


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", text): assert (ROOT / target).exists(), target


def test_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && metanb compare" in lines
    assert "pip install -e '.[dev]' && pytest" in lines
