"""Brings everything that comes from the notebooks up to date: their metadata cleaned, metanb/ exported, README.md written.

python tools/sync.py            before a commit
python tools/sync.py --check    also exits with 1 and names the files where that changed something
"""
import subprocess
import sys

import readme

MADE = ["nbs/*.ipynb", "metanb/**/*.py", "README.md", f"{readme.PICTURES}/*"]


def snapshot(): return {path.relative_to(readme.ROOT).as_posix(): path.read_bytes() for pattern in MADE for path in readme.ROOT.glob(pattern)}


def main(check=False):
    before = snapshot()
    for command in ("nbdev_clean", "nbdev_export"): subprocess.run([command], cwd=readme.ROOT, check=True)
    readme.main()
    after = snapshot()
    changed = sorted(path for path in before | after if before.get(path) != after.get(path))
    if check and changed: print("Not in sync with the notebooks; run python tools/sync.py and commit what it changes:", *changed, sep="\n  ")
    return int(check and bool(changed))


if __name__ == "__main__": sys.exit(main(check="--check" in sys.argv[1:]))
