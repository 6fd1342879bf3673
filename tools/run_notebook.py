"Runs one notebook by nbdev's own tester and shows the cell that fails: python tools/run_notebook.py NOTEBOOK [SECONDS] [FLAG ...]"
import faulthandler
import signal
import sys
from pathlib import Path

import nbdev.test
from nbdev.config import get_config

SKIPPED = 5  # the exit status when the notebook's own front matter says skip_exec


class Shell(nbdev.test.CaptureShell):
    "nbdev's shell, which also keeps the cell it runs, to print it above the traceback."
    def cell(self, cell, *args, **kwargs):
        self.source = cell.source
        return super().cell(cell, *args, **kwargs)

    def prettytb(self, fname=None):
        numbered = "\n".join(f"{i:4} {line}" for i, line in enumerate(getattr(self, "source", "").splitlines(), 1))
        return f"{super().prettytb(fname)}\nThe cell:\n{numbered}"


def limit(seconds):
    "After `seconds` the running cell gets a TimeoutError; where it is deaf to that (in C code), the process prints its stack and ends."
    def stop(*_): raise TimeoutError(f"the notebook's {seconds:g} s are over; give more by pytest --nb-timeout SECONDS")
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 10, exit=True)


def main(notebook, seconds="300", *flags):
    "Exit status: 0 passed, 1 failed, 5 skipped."
    config = get_config(path=Path(notebook).resolve().parent)
    nbdev.test.CaptureShell = Shell
    limit(float(seconds))
    passed, took = nbdev.test.test_nb(Path(notebook).resolve(), skip_flags=config.tst_flags.split(), force_flags=flags,
                                      basepath=config.config_path)
    if hasattr(signal, "setitimer"): signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    return (0 if took else SKIPPED) if passed else 1


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
