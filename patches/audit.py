"""Is this project what upstream is? Public names, signatures, flags, state-dict keys and numbers, beside checkouts.

    python patches/audit.py --upstream GUIDED_DIFFUSION --ldm LATENT_DIFFUSION

Each side runs in a process that sees nothing of the other. What is missing, other, or could not be compared is a
fault, unless differences.yaml gives the reason. The last line is the verdict; exit code 0 if it is good, 1 if not,
2 if the command cannot be carried out.
"""

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion.errors import UserError, exit_on_user_error  # noqa: E402
from guided_diffusion.flags import Parser  # noqa: E402

TOLERANCE = 1e-4  # of the largest value of an array
PARTS = ("names", "flags", "keys", "numbers")
GOOD = ("same", "extended", "equal")


@dataclass
class Finding:
    """One line of the audit; `reason` where differences.yaml accepts it."""

    part: str  # of PARTS, or "not compared"
    name: str
    verdict: str  # one of GOOD, missing, changed, different, not compared
    detail: str = ""
    reason: str | None = None

    @property
    def is_fault(self) -> bool:
        return self.verdict not in GOOD and self.reason is None


def probe(root: Path, package: str, parts=PARTS, cases=(), like: dict | None = None) -> tuple[dict, dict]:
    """(facts, numbers) of probe.py; like: the other side's facts, whose names are looked for.

    UserError if the checkout has no such package, or Python cannot look at it.
    """
    if not (root / package).is_dir():
        raise UserError(f"{root} has no folder {package}: give a checkout of upstream")
    names, flags = (list(like[kind]) if like else [] for kind in ("names", "flags"))
    request = {
        **{"root": str(root.resolve()), "package": package, "parts": list(parts), "cases": list(cases)},
        **{"parity": str(ROOT / "tests" / "parity"), "names": names},
        "modules": sorted({name.split(":")[0] for name in names}),
        "scripts": sorted({flag.split(" ")[0] for flag in flags}),
    }
    with tempfile.TemporaryDirectory() as folder:
        question = Path(folder) / "request.json"
        question.write_text(json.dumps(request))
        command = [sys.executable, str(ROOT / "patches" / "probe.py"), str(question), folder]
        # With this project on the path its ldm would hide upstream's, which is a namespace package.
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        job = subprocess.run(command, env=env, capture_output=True, text=True)
        if job.returncode:
            last = (job.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{package} of {root} cannot be looked at: {last}")
        with np.load(Path(folder) / "numbers.npz") as arrays:
            return json.loads((Path(folder) / "facts.json").read_text()), dict(arrays)


def compare(theirs: tuple[dict, dict], ours: tuple[dict, dict]) -> list[Finding]:
    """All findings about one package: everything that upstream has, and what stopped upstream."""
    (there, numbers), (here, computed) = theirs, ours
    found = [Finding("not compared", name, "not compared", why) for name, why in there["failed"].items()]
    rows = [
        ("names", name, value, here["names"].get(name), describe) for name, value in there["names"].items()
    ]
    rows += [
        ("flags", name, value, here["flags"].get(name), defaults) for name, value in there["flags"].items()
    ]
    rows += [("keys", name, value, here["keys"].get(name), states) for name, value in there["keys"].items()]
    rows += [("numbers", name, value, computed.get(name), arrays) for name, value in numbers.items()]
    for part, name, value, own, judge in rows:
        places = (name.split(":")[0], name.split(" ")[0], f"keys of {name}", name.split("/")[0])
        why = next((here["failed"][place] for place in places if place in here["failed"]), "")
        verdict = ("missing", why) if own is None else judge(value, own)
        found.append(Finding(part, name.replace(":", "."), *verdict))
    accepted = reasons()
    for finding in found:
        if finding.verdict not in GOOD:
            finding.reason = next(
                (why for p, why in accepted.items() if fnmatch.fnmatchcase(finding.name, p)), None
            )
    return found


def reasons() -> dict[str, str]:
    """Pattern -> why, of differences.yaml."""
    kinds = yaml.safe_load((ROOT / "patches/differences.yaml").read_text())
    return {pattern: why for some in kinds.values() for pattern, why in some.items()}


def describe(theirs: dict, ours: dict) -> tuple[str, str]:
    """(verdict, detail) of two descriptions of a name."""
    if theirs["kind"] != ours["kind"]:
        return "changed", f"{theirs['kind']} there, {ours['kind']} here"
    if theirs.get("value") != ours.get("value"):
        return "changed", f"{theirs['value']!r} there, {ours['value']!r} here"
    return (
        signatures(theirs["params"], ours["params"])
        if "params" in theirs and "params" in ours
        else ("same", "")
    )


def signatures(theirs: list, ours: list) -> tuple[str, str]:
    """(verdict, detail): can whoever calls theirs call ours, with the same meaning? [name, kind, [default]] each."""
    by_name = {name: (place, kind, default) for place, (name, kind, default) in enumerate(ours)}
    for place, (name, kind, default) in enumerate(theirs):
        if name not in by_name:
            if kind.startswith("VAR_") and any(k == kind for _, k, _ in ours):
                continue  # *args under another name
            return "changed", f"parameter {name} is missing"
        position, own_kind, own_default = by_name[name]
        if kind.startswith("POSITIONAL") and (own_kind != kind or position != place):
            return "changed", f"parameter {name} is no longer number {place + 1}"
        if default and default != own_default:
            return "changed", f"default of {name}: {default} there, {own_default} here"
    known = {name for name, _, _ in theirs}
    more = [
        (name, default) for name, kind, default in ours if name not in known and not kind.startswith("VAR_")
    ]
    if required := [name for name, default in more if not default]:
        return "changed", f"new parameter {required[0]} has no default"
    return (
        ("extended", ", ".join(f"{name}={default[0]!r}" for name, default in more)) if more else ("same", "")
    )


def defaults(theirs: list, ours: list) -> tuple[str, str]:
    """(verdict, detail) of a flag's two defaults."""
    return ("same", "") if theirs == ours else ("changed", f"default {theirs[0]!r} there, {ours[0]!r} here")


def states(theirs: list, ours: list) -> tuple[str, str]:
    """(verdict, detail) of two state dicts, [name, shape] each."""
    if theirs == ours:
        return "equal", f"{len(theirs)} tensors"
    only = [entry for entry in [*theirs, *ours] if (entry in theirs) != (entry in ours)]
    return "different", f"{only[0]} is only on one side" if only else "the order differs"


def arrays(theirs: np.ndarray, ours: np.ndarray) -> tuple[str, str]:
    """(verdict, largest difference relative to the largest value)."""
    if theirs.shape != ours.shape:
        return "different", f"shape {list(theirs.shape)} there, {list(ours.shape)} here"
    error = np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-12)
    return "equal" if error <= TOLERANCE else "different", f"{error:.1e}"


def report(package: str, found: list[Finding], stand_ins: list[str], verbose: bool) -> None:
    """Print counts, and whatever is not simply the same."""
    print(f"{package}, beside upstream's")
    for part in (*PARTS, "not compared"):
        some = [f for f in found if f.part == part]
        counts = Counter(f.verdict if f.reason is None else f"{f.verdict} with reason" for f in some)
        print(f"  {part}: " + (", ".join(f"{n} {v}" for v, n in sorted(counts.items())) or "none"))
        for f in some:
            if f.is_fault or verbose or (f.reason and part == "not compared"):
                print(
                    f"    {f.verdict:9} {f.name}: {f.detail}  {'<-- FAULT' if f.is_fault else f.reason or ''}"
                )
        if worst := max(
            (float(f.detail) for f in some if part == "numbers" and f.verdict == "equal"), default=0
        ):
            print(f"    largest relative difference: {worst}")
    print(f"  stand-ins for what is not installed: {', '.join(stand_ins) or 'none'}\n")


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    data, shown = dict(group="data"), dict(group="results")
    own.add("--upstream", path="source", metavar="PATH", help="a checkout of openai/guided-diffusion", **data)
    own.add("--ldm", path="source", metavar="PATH", help="a checkout of CompVis/latent-diffusion", **data)
    own.add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compare", **shown)
    own.add("--cases", nargs="+", default=[], unset="all", help="numerical cases, as unet.superres", **shown)
    own.add(
        "--verbose", action="store_true", help="also list what is the same, extended or accepted", **shown
    )
    own.add("--json", metavar="FILE", help="write all findings there")
    return own


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Do what the flags say; the exit code."""
    args = parser().parse_args(argv)
    if not (args.upstream or args.ldm):
        raise UserError("give --upstream, --ldm, or both: checkouts to compare with")
    findings = []
    for package, path in (("guided_diffusion", args.upstream), ("ldm", args.ldm)):
        if path:
            theirs = probe(Path(path), package, args.parts, args.cases)
            found = compare(theirs, probe(ROOT, package, args.parts, args.cases, like=theirs[0]))
            missed = set(args.parts) - {f.part for f in found}
            found += [
                Finding("not compared", f"{part} of {package}", "not compared", "nothing found")
                for part in missed
            ]
            report(package, found, theirs[0]["stand_ins"], args.verbose)
            findings += found
    if args.upstream and args.ldm and set(args.parts) == set(PARTS) and not args.cases:
        excused = [f.name for f in findings if f.verdict not in GOOD]
        unused = [pattern for pattern in reasons() if not fnmatch.filter(excused, pattern)]
        findings += [Finding("reasons", name, "not needed", "it excuses nothing") for name in unused]
    faults = [f"{f.part} {f.name}" for f in findings if f.is_fault]
    print(f"verdict: {len(faults)} faults: {'; '.join(faults[:3])}" if faults else "verdict: good")
    if args.json:
        Path(args.json).write_text(json.dumps([vars(f) for f in findings], indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
