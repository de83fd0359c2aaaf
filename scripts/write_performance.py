"""Write the tables of docs/performance.md from benchmarks/*.json. --check: say if it is current."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
# A table stands between these, and is of the file that the first names.
PLACE = re.compile(r"(<!-- (benchmarks/[\w.-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """Return the page with every table made anew."""

    def made(match: re.Match[str]) -> str:
        run = json.loads((ROOT / match[2]).read_text(encoding="utf-8"))
        return f"{match[1]}\n{table(run)}\n{match[3]}"

    return PLACE.sub(made, text)


def table(run: dict[str, Any]) -> str:
    """Return one run as a table: its machine, its ceilings, a row a case."""
    machine = run["machine"]
    features = " ".join(machine["features"])
    ceilings = ", ".join(
        f"{c['name']} {c['giga_per_second']:.0f} {c['unit']}" for c in run["ceilings"]
    )
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {features}; {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}. Ceilings of this run: {ceilings}.",
        "",
        "| case | polyhead | of the ceiling | best peer | over it | over SDPA | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(case) for case in run["cases"]]
    return "\n".join(lines) + "\n"


def row(case: dict[str, Any]) -> str:
    """Return one case as a row."""
    timed = [v for v in case["variants"] if v["milliseconds"]]
    ours = next((v for v in timed if v["ours"]), None)
    peers = [v for v in timed if not v["ours"]]
    best = min(peers, key=lambda v: v["milliseconds"], default=None)
    sdpa = next((v for v in peers if v["name"] == "sdpa"), None)
    cells = [
        f"**{case['id']}** {case['what']}",
        "not measured" if ours is None else milliseconds(ours["milliseconds"]),
        "" if ours is None or ours["share"] is None else f"{ours['share']:.0%}",
        "" if best is None else best["name"],
        over(best, ours),
        over(sdpa, ours),
        "; ".join(verdict(target) for target in case["targets"]),
    ]
    return "| " + " | ".join(cells) + " |"


def milliseconds(time: float) -> str:
    """Return a time with three digits, or whole milliseconds."""
    return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"


def over(peer: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """Return how many times as long the peer takes."""
    if peer is None or ours is None:
        return ""
    return f"{peer['milliseconds'] / ours['milliseconds']:.2f}x"


def verdict(target: dict[str, Any]) -> str:
    """Return what was wanted of a case, and whether it was met."""
    wanted = target["wanted"]
    number = f"{wanted:.0%}" if target["what"].startswith("of ") else f"{wanted:.3g}"
    said = {None: "not judged", True: "met", False: "missed"}[target["met"]]
    return f"{number} {target['what']}: {said}"


if __name__ == "__main__":
    current = PAGE.read_text(encoding="utf-8")
    made = page(current)
    if "--check" in sys.argv:
        print(
            "docs/performance.md is current"
            if made == current
            else "run scripts/write_performance.py"
        )
        sys.exit(made != current)
    PAGE.write_text(made, encoding="utf-8")
