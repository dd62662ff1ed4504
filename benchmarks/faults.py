"""The full kill matrix: kill -9 at random moments of every stage and of a merge in place, then the same command again.

    python benchmarks/faults.py --kills 20

Runs tests/test_kills.py with that many kills each and prints how many were survived: the run goes on and ends with the
weights of one left alone, bit for bit; the folder of a merge gives the same logits at every moment.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, machine

CASES = ("pt", "sft", "rm", "rl", "merge in place")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage, and of the merge")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        environment = os.environ | {"KILLS": str(kills), "KILLS_REPORT": str(report)}
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_kills.py"]
        failed = subprocess.run(command, cwd=ROOT, env=environment).returncode
        survived = dict(line.rsplit(",", 1) for line in report.read_text().splitlines())
    print(f"{machine()}\n\n| | survived | tried |\n|---|---|---|")
    for case in CASES:
        print(f"| {case} | {survived.get(case, 'none told')} | {kills} |")
    sys.exit(failed)


if __name__ == "__main__":
    main()
