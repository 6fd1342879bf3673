"`python -m metanb`: the same commands as the console script. Written by hand: no notebook exports it."
from metanb.cli import main

if __name__ == "__main__": raise SystemExit(main())
