"""`pytest` runs tests/ and every notebook of nbs/, each notebook as one test in a process of its own, at smoke scale.

pytest -n 2            in parallel                    pytest -k 10_maml          one notebook
METANB_SCALE=quick     notebooks at another scale     --nb-flags "slow cuda"     also the cells that carry these flags
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
TESTER = ROOT / "tools" / "run_notebook.py"
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if not IN_WORKER:  # workers inherit these: caches go to a folder of this run, never into the user's home
    SCRATCH = tempfile.mkdtemp(prefix="metanb-tests-")
    os.environ |= {"METANB_CACHE": f"{SCRATCH}/metanb", "XDG_CACHE_HOME": f"{SCRATCH}/cache", "MPLCONFIGDIR": f"{SCRATCH}/matplotlib",
                   "IPYTHONDIR": f"{SCRATCH}/ipython", "MPLBACKEND": "agg"}
os.environ.setdefault("METANB_SCALE", "smoke")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it so
# Read by torch when it is first imported, which is after this file: workers that share cores must not each start a thread for every core.
# Only in the workers: what their parent sets they would inherit.
if IN_WORKER: os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))


def pytest_unconfigure():
    if not IN_WORKER: shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--nb-timeout", type=float, default=300, metavar="SECONDS", help="time limit of one notebook (300)")
    parser.addoption("--nb-flags", default="", metavar="FLAGS", help="run cells with these nbdev test flags too (settings.ini: tst_flags)")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.name[0] not in "_.": return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self): yield Notebook.from_parent(self, name=self.path.stem)


class NotebookFailed(Exception): "Holds what the notebook's process printed."


class Notebook(pytest.Item):
    "One notebook, run by nbdev's tester, so that `eval: false`, `skip_exec` and `tst_flags` mean what they mean to nbdev_test."
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_marker(pytest.mark.timeout(0))  # --nb-timeout says how long, not pytest-timeout

    def runtest(self):
        seconds = self.config.getoption("--nb-timeout")
        command = [sys.executable, str(TESTER), str(self.path), str(seconds), *self.config.getoption("--nb-flags").split()]
        hidden = {"METANB_DATA"} if os.environ["METANB_SCALE"] == "smoke" else set()  # smoke runs are the same on every machine, and quick
        status, output = run(command, seconds + 30, {n: v for n, v in os.environ.items() if n not in hidden})
        if status == 5: pytest.skip("skip_exec in its front matter")
        if status: raise NotebookFailed(output)
        self.add_report_section("call", "notebook", output)

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, NotebookFailed): return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self): return self.path, None, f"notebook {self.name}"


def run(command, seconds, env=None):
    "Exit status and output of `command`; whatever it started is ended with it."
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try: status, note = process.wait(seconds), ""
        except subprocess.TimeoutExpired: status, note = 1, f"\nno end after {seconds:g} s: killed"
        finally:
            try: os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError: pass
        process.wait()
        out.seek(0)
        return status, out.read() + note
