"""What one checkout is like: its public names, flags, state-dict keys and numbers. A process of its own.

python patches/probe.py REQUEST.json FOLDER writes facts.json and numbers.npz into the folder. The audit
starts it once per package and side, since both sides' packages have the same names. It imports nothing of
this project but cases.py.
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import sys
import traceback
import types
from pathlib import Path

# Upstream asks for these at import; where they are not installed a stand-in serves, which accepts everything.
REPLACEABLE = (
    "albumentations",
    "blobfile",
    "clip",
    "cv2",
    "imageio",
    "kornia",
    "mpi4py",
    "pytorch_lightning.utilities.distributed",
    "requests",
    "scann",
    "taming",
    "tensorflow",
    "torch._six",
    "transformers",
)


class _Anything(types.ModuleType):
    """A module that has every attribute."""

    __all__ = ()
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__new__": _pass_through, "__getattr__": lambda self, _: _pass_through})


def _pass_through(*args, **kwargs):
    """As a decorator it returns what it decorates; otherwise nothing in particular."""
    return args[-1] if args and inspect.isfunction(args[-1]) else None


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder to be asked: stand-ins for what is replaceable, not installed, and imported below `root`.

    Libraries that import something optional go on without it.
    """

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


def main():
    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    root, package = Path(request["root"]).resolve(), request["package"]
    sys.path.insert(0, str(root))
    # An editable installation of this project would fill in modules that the checkout lacks.
    sys.meta_path[:] = [
        f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
    ]
    stand_ins = StandIns(root)
    sys.meta_path.append(stand_ins)
    found = Path(importlib.import_module(package).__path__[0]).resolve()
    if found.parent != root:
        raise SystemExit(f"{root} has no package {package} (Python finds {found})")
    facts = {"modules": {}, "scripts": {}, "keys": {}}
    if "names" in request["what"]:
        lookup = request.get("lookup")
        for module in module_names(root, package, lookup):
            facts["modules"][module] = describe_module(module, package, (lookup or {}).get(module))
        if package == "guided_diffusion":
            facts["scripts"] = describe_scripts(root, request.get("scripts"))
    if {"keys", "numbers"} & set(request["what"]):
        facts |= numbers_and_keys(request, package, folder)
    facts["stand_ins"] = sorted(stand_ins.used)
    (folder / "facts.json").write_text(json.dumps(facts))


# Names


def module_names(root, package, lookup):
    """The package's modules, and those that are looked for."""
    files = sorted((root / package).rglob("*.py"))
    own = [".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for f in files]
    return sorted(set(own) | set(lookup or ()))


def describe_module(name, package, wanted):
    """{"error"} or {"names": {dotted name: description}}; wanted: names that upstream's module has."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = "there is no such module" if error.name == name else f"{type(error).__name__}: {error}"
        return {"error": missing, "names": {}}
    except Exception as error:  # whatever a foreign module raises at import
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0], "names": {}}
    public = {k for k, v in vars(module).items() if _is_own(k, v, module)}
    top = {full.split(".")[0] for full in wanted or ()}
    names = {}
    for key in sorted(public | {k for k in top if hasattr(module, k)}):
        names |= describe(key, getattr(module, key), package)
    return {"error": None, "names": names}


def _is_own(key, value, module):
    if key.startswith("_") or inspect.ismodule(value):
        return False
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__module__ == module.__name__
    return isinstance(value, (bool, int, float, str, tuple, list))


def describe(name, value, package):
    """A function, a constant, or a class with its public methods, by dotted name."""
    if isinstance(value, enum.EnumMeta):
        return {name: {"kind": "enum"}} | {
            f"{name}.{member}": {"kind": "member"} for member in value.__members__
        }
    if inspect.isclass(value):
        found = {name: {"kind": "class"}}
        for key in dir(value):
            holder = next((c for c in value.__mro__ if key in vars(c)), object)
            if not holder.__module__.startswith(package.split(".")[0]) and not _in_project(holder):
                continue
            member = inspect.getattr_static(value, key)
            if key == "__init__" or not key.startswith("_"):
                found[f"{name}.{key}"] = _describe_member(getattr(value, key, member))
        return found
    if inspect.isfunction(value):
        return {name: _describe_member(value)}
    if isinstance(value, (bool, int, float, str, tuple, list)):
        return {name: {"kind": "constant", "value": _plain(value)}}
    return {name: {"kind": type(value).__name__}}


def _in_project(cls):
    return cls.__module__.split(".")[0] in ("guided_diffusion", "ldm")


def _describe_member(value):
    if not callable(value):
        return {"kind": "attribute"}
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return {"kind": "callable"}
    return {
        "kind": "callable",
        "params": [
            {"name": p.name, "kind": p.kind.name}
            | ({} if p.default is p.empty else {"default": _plain(p.default)})
            for p in parameters
        ],
    }


def _plain(value):
    """A default or constant as JSON, comparable between the sides."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return getattr(value, "__name__", type(value).__name__)


# Scripts


def describe_scripts(root, wanted):
    """Name -> {"flags": {flag: default}} or {"error"} of the scripts that have a create_argparser."""
    folder = root / "scripts"
    if not folder.is_dir():
        return {}
    sys.path.insert(0, str(folder))
    names = wanted or [p.stem for p in sorted(folder.glob("*.py")) if "create_argparser" in p.read_text()]
    return {name: _flags(folder / f"{name}.py") for name in names}


def _flags(path):
    if not path.exists():
        return {"error": "there is no such script"}
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "create_argparser"):
            return {"error": "it has no create_argparser"}
        actions = module.create_argparser()._actions
    except Exception as error:  # whatever a foreign script raises at import
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"error": None, "flags": {a.dest: _plain(a.default) for a in actions if a.dest != "help"}}


# Numbers


def numbers_and_keys(request, package, folder):
    """State-dict keys of the released models, and numbers.npz of the cases: "case/name" -> array."""
    import numpy as np

    spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases.py"))
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    runner = cases.Cases(Path(request["parity"]), package)
    facts, arrays = {"keys": {}, "failed": {}}, {}
    if "keys" in request["what"]:
        facts["keys"] = {name: _try(lambda name=name: runner.keys(name)) for name in runner.models()}
    if "numbers" in request["what"]:
        for name in runner.names():
            if request["cases"] and name not in request["cases"]:
                continue
            result = _try(lambda name=name: runner.run(name))
            if "error" in result:
                facts["failed"][name] = result["error"]
            arrays |= {f"{name}/{key}": value for key, value in result.items() if key != "error"}
    np.savez(folder / "numbers.npz", **arrays)
    return facts


def _try(compute):
    try:
        return compute()
    except Exception as error:  # whatever foreign code raises: the audit reports it and goes on
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"}


if __name__ == "__main__":
    main()
