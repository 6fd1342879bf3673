"The tools around the notebooks: README from a notebook, and the tester that pytest runs on each."
import json
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import readme  # noqa: E402


def notebook(*cells):
    "A notebook of code cells, or Markdown cells where the text starts with a heading or a quote."
    kind = lambda c: "markdown" if c.startswith(("# ", "> ", "[", "`")) else "code"
    extra = lambda c: {} if kind(c) == "markdown" else {"outputs": [], "execution_count": None}
    made = [{"cell_type": kind(c), "id": str(i), "metadata": {}, "source": c, **extra(c)} for i, c in enumerate(cells)]
    return {"cells": made, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
            "nbformat": 4, "nbformat_minor": 5}


@pytest.mark.parametrize("cell, text", [
    ("# T\n\nprose", "# T\n\nprose\n"),
    ("[a](00_core.ipynb) [b](../LICENSE) [c](https://x.y/z) [d](#top)", "[a](nbs/00_core.ipynb) [b](LICENSE) [c](https://x.y/z) [d](#top)\n"),
    ("`f[0](x)`\n```python\ng[0](x)\n```", "`f[0](x)`\n```python\ng[0](x)\n```\n"),
    ("#| eval: false\nf(1)", "```python\nf(1)\n```\n"),
    ("#| hide\nimport x", "\n"),
    ("#| echo: false\nf(1)", "\n"),
])
def test_readme_of_a_cell(cell, text): assert readme.markdown(notebook(cell)) == (text, {})


def test_readme_shows_outputs_and_moves_pictures_into_files():
    nb = notebook("#| echo: false\ndraw()", "2+2")
    nb["cells"][0]["outputs"] = [{"output_type": "display_data", "data": {"image/png": b64encode(b"png").decode(), "text/plain": "<Figure>"}}]
    nb["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}, {"output_type": "execute_result", "data": {"text/plain": "4"}}]
    text, pictures = readme.markdown(nb)
    assert pictures == {"index_files/0.png": b"png"}
    assert text == "![](index_files/0.png)\n\n```python\n2+2\n```\n\n```\na\nb\n```\n\n```\n4\n```\n"


def run_notebook(folder, cells, seconds=60, *flags):
    "Exit status and output of the tester on a notebook of these cells, in a project whose settings skip `slow`."
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = x\nuser = x\nrepo = x\nlib_path = x\nnbs_path = .\ntst_flags = slow\n")
    (folder / "n.ipynb").write_text(json.dumps(notebook(*cells)))
    ran = subprocess.run([sys.executable, ROOT / "tools/run_notebook.py", folder / "n.ipynb", str(seconds), *flags],
                         cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ran.returncode, ran.stdout


def test_a_failing_cell_is_shown_with_its_traceback(tmp_path):
    status, output = run_notebook(tmp_path, ["x = 0", "def f(): return 1 / x\n\n# here\nf()"])
    assert status == 1
    assert "Cell #2" in output and "ZeroDivisionError: division by zero" in output and "   3 # here" in output


def test_the_time_limit_names_the_cell(tmp_path):
    status, output = run_notebook(tmp_path, ["import time\nwhile True: time.sleep(1)"], 3)
    assert status == 1 and "TimeoutError" in output and "   2 while True: time.sleep(1)" in output


def test_cells_and_notebooks_that_ask_to_be_skipped_are(tmp_path):
    assert run_notebook(tmp_path, ["#| eval: false\n1 / 0", "#| slow\n1 / 0"])[0] == 0
    assert run_notebook(tmp_path, ["#| slow\n1 / 0"], 60, "slow")[0] == 1
    assert run_notebook(tmp_path, ["# T\n> s\n- skip_exec: true", "1 / 0"])[0] == 5
