"""What MT-Diffusion changes in the code that it builds on, and whether that still does what upstream does.

    python patches/audit.py                     lines changed per upstream file; is the series fresh?
    python patches/audit.py --upstream GUIDED_DIFFUSION [--ldm LATENT_DIFFUSION] [--json FILE]
        public names, signatures, defaults, flags, state-dict keys and numbers, beside a checkout of upstream
    python patches/audit.py --refresh           rewrite the series from the tree

The last line is the verdict. Exit code 0 if it is good, 1 if not, 2 if the command cannot be carried out.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import UserError, exit_on_user_error  # noqa: E402
from patches import patchset, refresh  # noqa: E402
from patches.compare import PARTS, Comparison, compare, probe, read_differences  # noqa: E402

GOAL = 300  # changed lines in files that exist upstream


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("--upstream", metavar="PATH", help="a checkout of openai/guided-diffusion to compare with")
    add("--ldm", metavar="PATH", help="a checkout of CompVis/latent-diffusion to compare with")
    add("--parts", default=",".join(PARTS), help="what to compare: names, keys, numbers")
    add("--cases", default="", help="numerical cases, such as unet.superres,diffusion.lin_kl (default: all)")
    add("--verbose", action="store_true", help="also list what is the same")
    add("--json", metavar="FILE", help="write everything there, too")
    add("--refresh", action="store_true", help="rewrite the series from the tree")
    add("--base", metavar="REF", help="with --refresh: a revision or folder with the single-task files")
    add(
        "--into-base",
        action="append",
        default=[],
        metavar="FILE",
        help="with --refresh: the edits of this file since then belong to the single-task code",
    )
    return flags


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Do what the flags say; the exit code."""
    args = parser().parse_args(argv)
    if (args.base or args.into_base) and not args.refresh:
        raise UserError("--base and --into-base go with --refresh")
    parts = [part for part in args.parts.split(",") if part]
    if not parts or set(parts) - set(PARTS):
        raise UserError(f"--parts {args.parts}: choose from {', '.join(PARTS)}")
    if args.refresh:
        written = refresh.refresh(patchset.ROOT, args.base, args.into_base)
        print(f"written: {', '.join(written)}\n")
    report, faults = {"series": {}, "packages": {}}, []
    faults += report_series(report["series"])
    for package, path in (("guided_diffusion", args.upstream), ("ldm", args.ldm)):
        if path:
            cases = [case for case in args.cases.split(",") if case] or None
            theirs = probe(Path(path).resolve(), package, parts, cases)
            ours = probe(patchset.ROOT, package, parts, cases, like=theirs)
            comparison = compare(theirs, ours, package, read_differences())
            print_comparison(comparison, args.verbose)
            faults += [f"{f.part} {f.name}" for f in comparison.faults]
            if not any(f.part in parts for f in comparison.findings):
                faults.append(f"nothing of {package} could be compared")
            report["packages"][package] = asdict(comparison)
    verdict = f"verdict: good{'' if args.upstream or args.ldm else ' (not compared with upstream)'}"
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        verdict = f"verdict: {len(faults)} faults: {'; '.join(faults[:3])}{more}"
    print(verdict)
    report |= {"verdict": verdict, "faults": faults}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


def report_series(report: dict) -> list[str]:
    """Print lines changed per upstream file; what is wrong with the series."""
    plan, root = patchset.read_plan(), patchset.ROOT
    changed: dict[str, list[int]] = {}
    for name in patchset.series(root):
        for part in (root / patchset.FOLDER / name).read_text().split("diff --git a/")[1:]:
            total = changed.setdefault(part.split(" ", 1)[0], [0, 0])
            for k, number in enumerate(patchset.count_lines(part)):
                total[k] += number
    print(f"{'file that exists upstream':55} {'lines':>6} {'added':>6} {'removed':>8}")
    untouched = [file for file in plan.upstream if (root / file).exists() and file not in changed]
    for file, (added, removed) in changed.items():
        print(f"{file:55} {_lines(root / file):6} {added:6} {removed:8}")
    print(f"{f'{len(untouched)} others':55} {sum(_lines(root / f) for f in untouched):6} {0:6} {0:8}")
    total = sum(map(sum, changed.values()))
    new = [
        file
        for some in patchset.new_files(plan, patchset.project_files(root)).values()
        for file in some
        if file.endswith(".py") and not file.startswith("tests/")
    ]
    print(
        f"{total} changed lines (goal: below {GOAL}); "
        f"{sum(_lines(root / f) for f in new)} lines in {len(new)} new files"
    )
    stale = refresh.problems(root)
    print("the series is fresh\n" if not stale else "".join(f"stale: {line}\n" for line in stale))
    report |= {"changed": changed, "total": total, "untouched": untouched, "new_files": new, "stale": stale}
    return stale + ([f"{total} changed lines in upstream's files"] if total >= GOAL else [])


def _lines(path):
    return len(path.read_text().splitlines())


def print_comparison(comparison: Comparison, verbose: bool) -> None:
    """Print what is extended, missing, changed or different, and counts of the rest."""
    print(f"{comparison.package}, beside upstream's")
    for part in ("names", "flags", "keys", "numbers"):
        findings = [f for f in comparison.findings if f.part == part]
        if not findings:
            continue
        counts = Counter(f.verdict for f in findings)
        print(f"  {part}: " + ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items())))
        for f in findings:
            if verbose or f.verdict not in ("same", "equal"):
                why = f"  [{f.accepted}]" if f.accepted else "  <-- FAULT" if f.is_fault else ""
                print(f"    {f.verdict:9} {f.name}{f': {f.detail}' if f.detail else ''}{why}")
        if part == "numbers":
            worst = max(
                (f for f in findings if f.verdict == "equal"), key=lambda f: float(f.detail), default=None
            )
            if worst:
                print(f"    largest relative difference of the equal ones: {worst.detail} ({worst.name})")
    for name, why in comparison.not_loaded.items():
        print(f"  upstream's {name} does not load here: {why}")
    if comparison.stand_ins:
        print(f"  stand-ins for what is not installed: {', '.join(comparison.stand_ins)}")
    print(f"  only here: {len(comparison.only_here)} names (in --json)\n")


if __name__ == "__main__":
    sys.exit(main())
