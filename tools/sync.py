"""Brings everything that comes from the notebooks up to date: their metadata cleaned, metanb/ exported, README.md written.

python tools/sync.py            before a commit
python tools/sync.py --check    also fails, with the difference, where that changed or added a file that git knows otherwise
"""
import subprocess
import sys

import readme

MADE = ["nbs", "metanb", "README.md", readme.PICTURES]


def main(check=False):
    for command in ("nbdev_clean", "nbdev_export"): subprocess.run([command], cwd=readme.ROOT, check=True)
    readme.main()
    if not check: return 0
    changed = subprocess.run(["git", "status", "--porcelain", "--", *MADE], cwd=readme.ROOT, check=True, capture_output=True, text=True).stdout
    if changed:
        print(f"not in sync with the notebooks (run python tools/sync.py and commit):\n{changed}", flush=True)
        subprocess.run(["git", "--no-pager", "diff", "--stat", "-p", "--", "metanb", "README.md"], cwd=readme.ROOT)
    return int(bool(changed))


if __name__ == "__main__": sys.exit(main(check="--check" in sys.argv[1:]))
