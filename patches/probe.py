"""What one checkout is like: names, flags, state-dict keys and numbers of a package, in a process of its own.

python patches/probe.py REQUEST.json FOLDER writes facts.json and numbers.npz into the folder. The audit starts it
once per package and side, since both sides have the same names; of this project it imports cases.py alone.
"""

import argparse
import enum
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import operator
import os
import runpy
import sys
import traceback
import types
from pathlib import Path

import numpy as np
import pytorch_lightning  # before the stand-ins, which it must not see

# What upstream imports and may be missing here; what of it is not installed gets a stand-in that accepts everything.
REPLACEABLE = (
    *("albumentations", "blobfile", "clip", "cv2", "imageio", "imwatermark", "kornia", "mpi4py", "natsort"),
    *("pytorch_lightning.utilities.distributed", "requests", "scann", "skimage", "taming", "tensorflow"),
    *("torch._six", "torchvision", "transformers"),
)


class _Anything(types.ModuleType):
    """A module that has every attribute: a class whose instances have every method."""

    __all__ = ()
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__new__": _pass_through, "__getattr__": lambda self, _: _pass_through})


def _pass_through(*args, **kwargs):
    """As a decorator it returns what it decorates."""
    return args[-1] if args and inspect.isfunction(args[-1]) else None


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder to be asked; for imports by files below `root` only, since libraries do without."""

    def __init__(self, root: Path):
        self.root, self.used = root, set()

    def find_spec(self, name, path=None, target=None):
        known = any(name == top or name.startswith(f"{top}.") for top in REPLACEABLE)
        if not known or not _importer().is_relative_to(self.root):
            return None
        self.used.add(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


def _importer() -> Path:
    """The file whose import statement is being carried out."""
    frame = sys._getframe(1)
    while frame.f_back and ("importlib" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return Path(frame.f_code.co_filename)


def main() -> None:
    request, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    root, package = Path(request["root"]), request["package"]
    # An editable installation of this project would stand in for what the checkout lacks, or before its package.
    sys.meta_path[:] = [
        f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
    ]
    sys.path[0] = str(root)
    os.chdir(folder)
    stand_ins = StandIns(root)
    sys.meta_path.append(stand_ins)
    facts = {"names": {}, "flags": {}, "keys": {}, "failed": {}}
    numbers = {}

    def attempt(what, compute, *args):
        try:
            return compute(*args)
        except Exception as error:  # whatever foreign code raises: the audit reports it
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(at.filename).name}:{at.lineno}"
            facts["failed"][what] = f"{type(error).__name__}: {error}".splitlines()[0] + f" ({place})"
            return {}

    if "names" in request["parts"]:
        for module in request["modules"] or module_names(root, package):
            wanted = [n.removeprefix(f"{module}:") for n in request["names"] if n.startswith(f"{module}:")]
            facts["names"] |= attempt(module, describe_module, module, wanted)
    if "flags" in request["parts"]:
        for script in request["scripts"] or script_names(root):
            facts["flags"] |= attempt(script, flags_of, root, script)
    if {"keys", "numbers"} & set(request["parts"]):
        sys.path.append(str(Path(__file__).parent))
        cases = importlib.import_module("cases").Cases(Path(request["parity"]), package)
        for name in cases.models() if "keys" in request["parts"] else ():
            facts["keys"] |= attempt(f"keys of {name}", lambda name=name: {name: cases.keys(name)})
        for name in cases.names() if "numbers" in request["parts"] else ():
            if name in (request["cases"] or (name,)):
                numbers |= {f"{name}/{key}": value for key, value in attempt(name, cases.run, name).items()}
    np.savez(folder / "numbers.npz", **numbers)
    facts["stand_ins"] = sorted(stand_ins.used)
    (folder / "facts.json").write_text(json.dumps(facts))


# Names


def module_names(root: Path, package: str) -> list[str]:
    files = (f.relative_to(root).with_suffix("") for f in sorted((root / package).rglob("*.py")))
    return [".".join(f.parts).removesuffix(".__init__") for f in files]


def describe_module(module: str, wanted: list[str]) -> dict:
    """{"module:name": description}: of the names `wanted`, or of all public ones that the module defines."""
    imported, found = importlib.import_module(module), {}
    own = [key for key, value in vars(imported).items() if _is_own(key, value, imported)]
    own += [f"{key}.{name}" for key in own for name in _members(getattr(imported, key))]
    for name in wanted or own:
        try:
            found[f"{module}:{name}"] = _describe(operator.attrgetter(name)(imported))
        except AttributeError:
            pass  # not in found: missing
    return found


def _is_own(key, value, module):
    if key.startswith("_") or inspect.ismodule(value):
        return False
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__module__ == module.__name__
    return isinstance(value, (bool, int, float, str, tuple, list))


def _members(value):
    """Public members of a class, and its constructor, that come from the checkout itself."""
    if isinstance(value, enum.EnumMeta):
        return list(value.__members__)
    if not inspect.isclass(value):
        return []
    own = [c for c in value.__mro__ if c.__module__.split(".")[0] in ("guided_diffusion", "ldm")]
    return sorted({k for c in own for k in vars(c) if k == "__init__" or not k.startswith("_")})


def _describe(value):
    if inspect.isclass(value):
        return {"kind": "class"}
    if callable(value):
        try:
            found = inspect.signature(value).parameters.values()
        except (TypeError, ValueError):
            return {"kind": "callable"}
        params = [[p.name, p.kind.name, [] if p.default is p.empty else [_plain(p.default)]] for p in found]
        return {"kind": "callable", "params": params}
    if isinstance(value, (bool, int, float, str, tuple, list)):
        return {"kind": "constant", "value": _plain(value)}
    return {"kind": "attribute"}


def _plain(value):
    """A default or constant as JSON, comparable between the sides."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return getattr(value, "__name__", type(value).__name__)


# Flags


def script_names(root: Path) -> list[str]:
    files = [*root.glob("scripts/*.py"), *root.glob("evaluations/*.py"), *root.glob("main.py")]
    programs = (f for f in files if "parse" in f.read_text() and "__main__" in f.read_text())
    return sorted(str(f.relative_to(root)) for f in programs)


class _Parsed(BaseException):
    """Raised in place of parsing: (the parser,)."""


def _stop(parser, *args, **kwargs):
    raise _Parsed(parser)


def flags_of(root: Path, script: str) -> dict:
    """{"script --flag": [default]} of the parser that a script, run as a program, parses first."""
    argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = _stop
    pytorch_lightning.Trainer.add_argparse_args = staticmethod(lambda parser: parser)  # of Lightning 1
    sys.argv = [script]
    path = list(sys.path)
    sys.path.insert(0, str((root / script).parent))
    try:
        runpy.run_path(str(root / script), run_name="__main__")
    except _Parsed as stopped:
        actions = stopped.args[0]._actions
        return {
            f"{script} {max(a.option_strings, key=len, default=a.dest)}": [_plain(a.default)]
            for a in actions
            if a.dest != "help"
        }
    finally:
        sys.path[:] = path
    raise RuntimeError("it parses no flags")


if __name__ == "__main__":
    main()
