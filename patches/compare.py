"""Two checkouts side by side: each is looked at in a process of its own (probe.py), then compared."""

import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from guided_diffusion.errors import UserError

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4  # of the largest value of an array
PARTS = ("names", "keys", "numbers")
_POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")


@dataclass(frozen=True)
class Facts:
    """What probe.py found on one side."""

    facts: dict
    numbers: dict[str, np.ndarray]


@dataclass(frozen=True)
class Finding:
    """One line of the audit. verdict: same, extended, missing, changed, or equal / different for numbers
    and keys; accepted: the reason in differences.yaml, where it is no fault.
    """

    part: str
    name: str
    verdict: str
    detail: str = ""
    accepted: str | None = None

    @property
    def is_fault(self) -> bool:
        return self.verdict in ("missing", "changed", "different") and self.accepted is None


@dataclass
class Comparison:
    """All findings about one package, and what is only here."""

    package: str
    findings: list[Finding] = field(default_factory=list)
    only_here: list[str] = field(default_factory=list)
    not_loaded: dict[str, str] = field(default_factory=dict)  # upstream's modules that do not load, and why
    stand_ins: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_fault]


def probe(
    root: Path,
    package: str,
    parts=PARTS,
    cases=None,
    like: Facts | None = None,
    parity: Path = HERE.parent / "tests" / "parity",
) -> Facts:
    """Look at `package` of the checkout `root`. like: the other side, whose names are looked for beside
    the own ones.

    UserError if the checkout has no such package.
    """
    request = {
        "root": str(root),
        "package": package,
        "what": list(parts),
        "cases": cases,
        "parity": str(parity),
    }
    if like is not None:
        request["lookup"] = {m: list(found["names"]) for m, found in like.facts["modules"].items()}
        request["scripts"] = list(like.facts["scripts"])
    if not (root / package).is_dir():
        raise UserError(f"{root} has no folder {package}: give a checkout of upstream")
    with tempfile.TemporaryDirectory() as folder:
        question = Path(folder) / "request.json"
        question.write_text(json.dumps(request))
        job = subprocess.run(
            [sys.executable, str(HERE / "probe.py"), str(question), folder], capture_output=True, text=True
        )
        if job.returncode:
            last = (job.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{package} of {root} cannot be looked at: {last}")
        facts = json.loads((Path(folder) / "facts.json").read_text())
        numbers = {}
        if (Path(folder) / "numbers.npz").exists():
            with np.load(Path(folder) / "numbers.npz") as arrays:
                numbers = dict(arrays)
    return Facts(facts, numbers)


def read_differences(path: Path = HERE / "differences.yaml") -> dict[str, dict[str, str]]:
    """The differences on purpose: kind -> pattern -> reason."""
    content = yaml.safe_load(path.read_text())
    return {kind: content.get(kind) or {} for kind in ("missing", "changed", "numbers")}


def compare(
    upstream: Facts, ours: Facts, package: str, accepted: Mapping[str, Mapping[str, str]]
) -> Comparison:
    """All findings about one package."""
    result = Comparison(package, stand_ins=upstream.facts["stand_ins"])
    _compare_names(upstream.facts["modules"], ours.facts["modules"], result)
    _compare_flags(upstream.facts["scripts"], ours.facts["scripts"], result)
    _compare_keys(upstream.facts["keys"], ours.facts["keys"], result)
    _compare_numbers(upstream, ours, result)
    kinds = {"missing": "missing", "changed": "changed", "different": "numbers"}
    result.findings = [
        Finding(f.part, f.name, f.verdict, f.detail, _reason(accepted[kinds[f.verdict]], f.name))
        if f.verdict in kinds
        else f
        for f in result.findings
    ]
    return result


def _reason(patterns, name):
    return next((why for pattern, why in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


# Names and flags


def _compare_names(theirs, ours, result):
    for module, found in theirs.items():
        if found["error"]:
            result.not_loaded[module] = found["error"]
        here = ours.get(module, {"error": "there is no such module", "names": {}})
        for name, description in found["names"].items():
            full = f"{module}.{name}"
            if name not in here["names"]:
                result.findings.append(Finding("names", full, "missing", here["error"] or "no such name"))
            else:
                verdict, detail = _compare_descriptions(description, here["names"][name])
                result.findings.append(Finding("names", full, verdict, detail))
    for module, found in ours.items():
        known = theirs.get(module, {"names": {}})["names"]
        result.only_here += [f"{module}.{name}" for name in found["names"] if name not in known]


def _compare_descriptions(theirs, ours):
    if theirs["kind"] != ours["kind"]:
        return "changed", f"{theirs['kind']} there, {ours['kind']} here"
    if theirs["kind"] == "constant" and theirs["value"] != ours["value"]:
        return "changed", f"{theirs['value']!r} there, {ours['value']!r} here"
    if "params" not in theirs or "params" not in ours:
        return "same", ""
    return compare_signatures(theirs["params"], ours["params"])


def compare_signatures(theirs: list[dict], ours: list[dict]) -> tuple[str, str]:
    """(verdict, detail): can whoever calls theirs call ours, with the same meaning?"""
    by_name = {p["name"]: (place, p) for place, p in enumerate(ours)}
    for place, there in enumerate(theirs):
        name = there["name"]
        if name not in by_name:
            if there["kind"].startswith("VAR_") and any(p["kind"] == there["kind"] for p in ours):
                continue  # *args under another name
            return "changed", f"parameter {name} is missing"
        position, here = by_name[name]
        if there["kind"] in _POSITIONAL and (here["kind"] != there["kind"] or position != place):
            return "changed", f"parameter {name} is no longer number {place + 1}"
        if ("default" in there) != ("default" in here):
            return "changed", f"parameter {name} has a default on one side only"
        if "default" in there and there["default"] != here["default"]:
            return "changed", f"default of {name}: {there['default']!r} there, {here['default']!r} here"
    known = {p["name"] for p in theirs}
    more = [p for p in ours if p["name"] not in known and not p["kind"].startswith("VAR_")]
    if required := [p["name"] for p in more if "default" not in p]:
        return "changed", f"new parameter {required[0]} has no default"
    return ("extended", ", ".join(f"{p['name']}={p['default']!r}" for p in more)) if more else ("same", "")


def _compare_flags(theirs, ours, result):
    for script, found in theirs.items():
        if found["error"]:
            result.not_loaded[f"scripts.{script}"] = found["error"]
            continue
        here = ours.get(script, {"error": "there is no such script"})
        if here["error"]:
            result.findings.append(Finding("flags", f"scripts.{script}", "missing", here["error"]))
            continue
        for flag, default in found["flags"].items():
            name = f"scripts.{script}.{flag}"
            if flag not in here["flags"]:
                result.findings.append(Finding("flags", name, "missing", "no such flag"))
            elif here["flags"][flag] != default:
                detail = f"default {default!r} there, {here['flags'][flag]!r} here"
                result.findings.append(Finding("flags", name, "changed", detail))
            else:
                result.findings.append(Finding("flags", name, "same"))
        more = [flag for flag in here["flags"] if flag not in found["flags"]]
        if more:
            result.findings.append(
                Finding("flags", f"scripts.{script}", "extended", ", ".join(f"--{m}" for m in more))
            )


# State dicts and numbers


def _compare_keys(theirs, ours, result):
    for name, there in theirs.items():
        here = ours.get(name, {"error": "not looked at"})
        if "error" in there:
            result.not_loaded[f"keys of {name}"] = there["error"]
        elif "error" in here:
            result.findings.append(Finding("keys", name, "different", here["error"]))
        elif there["state"] != here["state"]:
            result.findings.append(
                Finding("keys", name, "different", _first_key(there["state"], here["state"]))
            )
        else:
            result.findings.append(Finding("keys", name, "equal", f"{len(there['state'])} tensors"))


def _first_key(theirs, ours):
    there, here = dict(map(_as_pair, theirs)), dict(map(_as_pair, ours))
    for key, shape in there.items():
        if here.get(key) != shape:
            return f"{key} {list(shape)}: {'missing' if key not in here else list(here[key])} here"
    more = [key for key in here if key not in there]
    return f"{more[0]} is only here" if more else "the order differs"


def _as_pair(entry):
    return entry[0], tuple(entry[1])


def _compare_numbers(upstream, ours, result):
    for case, error in upstream.facts.get("failed", {}).items():
        result.not_loaded[f"numbers of {case}"] = error
    for case, error in ours.facts.get("failed", {}).items():
        if case not in upstream.facts.get("failed", {}):
            result.findings.append(Finding("numbers", case, "different", f"fails here: {error}"))
    for name, there in upstream.numbers.items():
        here = ours.numbers.get(name)
        if here is None:
            if name.split("/")[0] not in ours.facts.get("failed", {}):
                result.findings.append(Finding("numbers", name, "different", "not computed here"))
        elif here.shape != there.shape:
            result.findings.append(
                Finding(
                    "numbers", name, "different", f"shape {list(there.shape)} there, {list(here.shape)} here"
                )
            )
        else:
            scale = max(float(np.abs(there).max(initial=0)), 1e-12)
            error = float(np.abs(here - there).max(initial=0)) / scale
            verdict = "equal" if error <= TOLERANCE else "different"
            result.findings.append(Finding("numbers", name, verdict, f"{error:.1e}"))
