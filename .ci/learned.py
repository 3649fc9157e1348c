"""Whether the demonstration of the README visibly learned: python .ci/learned.py FOLDER."""

import sys
from pathlib import Path

from trlx.report.records import read_metrics

folder = Path(sys.argv[1])
(_, first), *_, (_, last) = read_metrics(folder)["metrics/optimality"]
print(f"optimality {first:.2f}, then {last:.2f}")
if not (first < 0.5 and last > 0.9 and (folder / "report.html").is_file()):
    sys.exit("It should begin below 0.5, end above 0.9, and leave a report.html")
