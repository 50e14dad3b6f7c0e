"""What criterion has measured, as JSON: time of each token, and the ratio to that of decoding it.

    cargo bench --workspace --features tls,criterion --bench records && python3 benches/python/criterion_ratios.py
"""

import json
from pathlib import Path

MEASURED = Path(__file__).resolve().parents[2] / "target/criterion"
UNIT = "decode and check a document"


def main() -> None:
    nanoseconds = {}
    for file in sorted(MEASURED.glob("*/*/new/estimates.json")):
        benchmark = json.loads((file.parent / "benchmark.json").read_text())
        median = json.loads(file.read_text())["median"]["point_estimate"]
        nanoseconds[benchmark["function_id"]] = median / benchmark["throughput"]["Elements"]
    result = {
        "command": "cargo bench --workspace --features tls,criterion --bench records && python3 benches/python/criterion_ratios.py",
        "unit": UNIT,
        "nanoseconds_a_token": nanoseconds,
        "ratio": {name: value / nanoseconds[UNIT] for name, value in nanoseconds.items()},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
