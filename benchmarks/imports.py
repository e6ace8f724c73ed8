"""What `import equivalence` costs beyond importing NumPy: at most 0.1 s, in fresh processes.

python benchmarks/imports.py [--repeats N]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from _setup import interleaved, line

BOUND = 0.1
STATEMENTS = {
    "nothing": "pass",
    "numpy": "import numpy",
    "equivalence": "import equivalence",
    "both": "import numpy, equivalence",
}


def _process(statement: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="fresh processes of each kind (25)")
    chosen = parser.parse_args()
    seconds = interleaved({name: _process(text) for name, text in STATEMENTS.items()}, chosen.repeats)
    for name, taken in seconds.items():
        print(f"{STATEMENTS[name]:28} {taken:.3f} s")
    print(line("equivalence beyond NumPy", seconds["equivalence"] - seconds["numpy"], BOUND, " s"))
    print(line("both beyond NumPy", seconds["both"] - seconds["numpy"], BOUND, " s"))


if __name__ == "__main__":
    main()
