"""Add up pytest's JUnit reports: `python tests/summary.py unit.xml nb.xml`."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def main(reports: list[str]) -> int:
    """Print 'N passed, N failed'; return 1 if a test failed or none ran.

    A report that is missing (its pytest run died) adds nothing; make saw that run's exit status.
    """
    passed = failed = 0
    for report in filter(Path.exists, map(Path, reports)):
        for suite in ET.parse(report).iter("testsuite"):
            bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            failed += bad
            passed += int(suite.get("tests", 0)) - bad - int(suite.get("skipped", 0))
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
