"""How fast programs are graded in the sandbox, at both levels.

    python tests/measure/sandbox.py       assets/sandbox.csv: 1,000 programs of five tests each

All different, graded by as many threads as there are cores; one in a hundred never ends.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import sandbox  # noqa: E402
import tables  # noqa: E402

PLACE = Path(__file__).resolve().parents[2] / "assets" / "sandbox.csv"
PROGRAMS, HANGS = 1000, 100  # every HANGS-th never ends


def main():
    rows = []
    for level, start in (("bubblewrap", sandbox.bubblewrapped), ("limits", sandbox.limited)):
        words = start()
        sandbox.command = lambda: words
        testers = sandbox.Testers()

        def graded(i):
            """Seconds and verdicts of a program."""
            program = f"def f(x):\n    while {i % HANGS == 0}: pass\n    return {i} * x"
            tests = tuple(f"assert f({x}) == {i * x}" for x in range(1, 6))
            clock = time.perf_counter()
            found = testers.passed(program, tests)
            return time.perf_counter() - clock, found == (i % HANGS != 0,) * 5

        clock = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(graded, range(PROGRAMS)))
        seconds = time.perf_counter() - clock
        assert all(right for _, right in done)
        slowest = max(s for s, _ in done)
        quick = sorted(s for i, (s, _) in enumerate(done) if i % HANGS)
        rows.append({
            "level": level, "programs": PROGRAMS, "seconds": seconds,
            "a_second": PROGRAMS / seconds, "median_s": quick[len(quick) // 2],
            "slowest_that_ends_s": quick[-1], "slowest_s": slowest,
        })
        print(rows[-1], flush=True)
    tables.write(PLACE, list(rows[0]), rows)


if __name__ == "__main__":
    main()
