"""Try every family that transformers knows out, and write what came of it.

    python bench/families.py             src/locft/resources/families.json and docs/families.md
    python bench/families.py --verify    nothing is written

With --verify, it fails if the files say something else, as it does whenever a family fails.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from locft.families.page import describe_families
from locft.families.records import Families, read_families
from locft.families.suite import check_families
from locft.report.markdown import draw_markdown

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "src/locft/resources/families.json"
PAGE = ROOT / "docs/families.md"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--verify", action="store_true", help="write nothing, and compare")
    verify = parser.parse_args().verify
    began = time.monotonic()
    found = check_families()
    print(f"{len(found.families)} families in {time.monotonic() - began:.0f} s")
    failed = [one for one in found.families if one.status == "failed"]
    for one in failed:
        print(f"{one.name}: {one.reason}")
    if verify:
        told = _differences(found, read_families())
        print("\n".join(told))
        return 1 if failed or told else 0
    TABLE.write_text(json.dumps(asdict(found), indent=1) + "\n")
    PAGE.write_text(draw_markdown(describe_families(found)))
    return 1 if failed else 0


def _differences(found: Families, kept: Families) -> list[str]:
    old = {one.name: one for one in kept.families}
    new = {one.name: one for one in found.families}
    return [
        f"{name}: {new.get(name)}, and {TABLE.name} says {old.get(name)}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


if __name__ == "__main__":
    sys.exit(main())
