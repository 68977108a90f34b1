"""The modalities that a flag or a configuration file asks for, of the kinds of kinds.py."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace

from ..errors import UserValueError, closest
from .heads import ClassifierOptions
from .kinds import KINDS, ImageModality, LabelModality, MapModality, VectorModality
from .masks import RandomPatches
from .modality import RESERVED, Modality, channel_mean, gaussian_length, of_unit_rms, one_hot

__all__ = [
    "DERIVED",
    "KINDS",
    "PRESETS",
    "RESERVED",
    "ImageModality",
    "LabelModality",
    "MapModality",
    "Modality",
    "VectorModality",
    "as_mapping",
    "channel_mean",
    "gaussian_length",
    "kind_of",
    "label_in",
    "of_unit_rms",
    "one_hot",
    "parse_modalities",
    "preset",
    "resolve_target",
    "wants_labels",
]

PRESETS = {"masked": "image", "label": "label", "image": "image", "representation": "vector", "map": "map"}
DERIVED = ("masked",)  # presets whose values are made from the image


def preset(name: str, kind: str, image_shape: tuple[int, int, int], num_classes: int | None) -> Modality:
    """A modality of the paper: `masked` (image), `label`, a second `image`, the `representation` of a CLIP
    ViT-H, 1024 numbers, or a `map` of classes, for images of `image_shape`.

    UserValueError if `kind` is none of PRESETS, or a label is asked of data without labels.
    """
    if kind == "masked":
        # 16 pixels at 64, in proportion elsewhere.
        return ImageModality(name, image_shape, derive=RandomPatches(size=max(1, round(image_shape[1] / 4))))
    if kind == "image":
        return ImageModality(name, image_shape)
    if kind == "representation":
        return VectorModality(name, (1024,), hidden=1024)
    if kind not in PRESETS:
        raise UserValueError(
            f"modality {name}: unknown kind {kind!r}, choose one of {', '.join(PRESETS)}{closest(kind, PRESETS)}"
        )
    if not num_classes and kind == "map":
        raise UserValueError(f"modality {name}: a map needs classes or a palette, as in classes: 5")
    if not num_classes:
        raise UserValueError(
            f"modality {name}: the data have no labels; set --num_classes or give labelled data"
        )
    if kind == "map":
        return MapModality(name, (num_classes, *image_shape[1:]))
    channels, size = image_shape[:2]
    return LabelModality(name, (num_classes,), classifier=ClassifierOptions(size, channels))


def parse_modalities(
    spec: str | Mapping[str, Mapping] | Sequence[Modality],
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    embedded: bool = False,
) -> tuple[Modality, ...]:
    """The modalities that a flag or a configuration file asks for.

    spec: "masked:X,label:U" (names of presets with their variant, U unless given; depth=image:U under another name),
    or a mapping, also as YAML in braces, from a name to a preset's name under `preset`, or to a class of your own
    under `target` (package.module.Class), and any fields of its class to change; `variant: X` stands for as_input,
    `channels` and `classes` for a shape, `patches` for those of RandomPatches, `classifier` for those of
    ClassifierOptions; or modalities that are made already. The first label is the network's y; others, and with
    `embedded` vectors, are embedded. UserValueError for anything unknown.
    """
    if not isinstance(spec, str | Mapping):
        return tuple(spec)
    found = []
    for name, options in as_mapping(spec).items():
        m = _from_options(name, dict(options), image_shape, num_classes, embedded)
        if isinstance(m, LabelModality) and not m.embedded and any(other.data_key == "y" for other in found):
            m = replace(m, embedded=True)
        found.append(m)
    return tuple(found)


def wants_labels(spec: str | Mapping[str, Mapping] | Sequence[Modality]) -> bool:
    """Whether a specification as for `parse_modalities` has a label in it, which the data must bring."""
    if not isinstance(spec, str | Mapping):
        return any(m.data_key == "y" for m in spec)
    return label_in(spec) is not None


def label_in(spec: str | Mapping[str, Mapping]) -> str | None:
    """The name of the first label of a specification: the network's y."""
    kinds = ((name, kind_of(name, options)) for name, options in as_mapping(spec).items())
    return next((name for name, cls in kinds if cls and issubclass(cls, LabelModality)), None)


def kind_of(name: str, options: Mapping) -> type[Modality] | None:
    """The class that a modality's options ask for; None where they leave it to the data."""
    if "target" in options:
        return resolve_target(name, options["target"])
    return KINDS.get(PRESETS.get(options.get("preset", name), ""))


def resolve_target(name: str, target: object) -> type[Modality]:
    """The subclass of Modality at package.module.Class. Its module is imported, which runs it: from PYTHONPATH, or from
    the folder one is in; nothing of it is called before it is known to be such a class. UserValueError otherwise."""
    at = f"modality {name}: target {target}"
    module_name, _, attribute = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        raise UserValueError(f"{at} is not of the form package.module.Class")
    path = list(sys.path)
    sys.path.append("")  # as of `python -m`, after everything that is installed
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        raise UserValueError(f"{at}: there is no module {error.name}; put its folder on PYTHONPATH") from None
    except Exception as error:
        raise UserValueError(f"{at} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = path
    if not (isinstance(found, type) and issubclass(found, Modality)):
        raise UserValueError(
            f"{at} is {'no class of modalities' if found is not None else 'not in its module'}"
        )
    return found


def as_mapping(spec: str | Mapping) -> dict[str, dict]:
    """A specification as a mapping from names to options. UserValueError for one that is none."""
    if isinstance(spec, str) and spec.strip().startswith("{"):
        spec = _yaml(spec)
    if isinstance(spec, str):
        parts = [part.strip().partition(":") for part in spec.split(",") if part.strip()]
        found = {}
        for name, _, variant in parts:
            name, renamed, kind = (word.strip() for word in name.partition("="))
            if name in found:
                raise UserValueError(f"modality names must differ: {spec}")
            found[name] = {**({"preset": kind} if renamed else {}), "variant": variant.strip() or "U"}
        return found
    for name, options in spec.items():
        if not (options is None or isinstance(options, Mapping)):
            raise UserValueError(
                f"modality {name}: expected options by name (such as variant: X), got {options!r}"
            )
    return {str(name): dict(options or {}) for name, options in spec.items()}


def _yaml(text):
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserValueError(
            f"modalities {text!r} are not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(found, Mapping):
        raise UserValueError(f"modalities {text!r} are no mapping from names to options")
    return found


def _from_options(name, options, image_shape, num_classes, embedded):
    variant = str(options.pop("variant", "U")).upper()
    if variant not in ("U", "X"):
        raise UserValueError(f"modality {name}: unknown variant {variant!r}, choose U or X")
    changes: dict = {"as_input": variant == "X"}
    cls = kind_of(name, options)
    if options.get("palette") is not None and hasattr(cls, "palette"):
        from .cells import as_palette

        options["palette"] = as_palette(options["palette"])
        is_map = issubclass(cls, MapModality)
        options.setdefault("classes" if is_map else "channels", len(options["palette"]) if is_map else 3)
    for word, kinds in (("classes", LabelModality | MapModality), ("channels", ImageModality)):
        if word in options and cls is not None and issubclass(cls, kinds):
            count = options.pop(word)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UserValueError(
                    f"modality {name}: {word} must be a whole number from 1 on, not {count!r}"
                )
            options["shape"] = (count, *(image_shape[1:] if cls.rank == 3 else ()))
    if isinstance(options.get("class_names"), list | tuple):
        options["class_names"] = tuple(map(str, options["class_names"]))
        options.setdefault("shape", (len(options["class_names"]),))
    if "target" in options:
        return _own(name, cls, options, changes, image_shape, embedded)
    classes = options["shape"][0] if "shape" in options else num_classes
    base = preset(name, options.pop("preset", name), image_shape, classes)
    if "patches" in options:
        if not isinstance(base.derive, RandomPatches):
            raise UserValueError(f"modality {name}: only masked images have patches")
        changes["derive"] = replace(base.derive, **_known(name, options.pop("patches"), RandomPatches))
    if "classifier" in options:
        if options.get("head") != "classifier":
            raise UserValueError(f"modality {name}: options of the classifier need head: classifier")
        own = _known(name, options.pop("classifier"), ClassifierOptions)
        changes["classifier"] = replace(base.classifier, **own)
    changes |= _known(name, options, type(base))
    if isinstance(base, VectorModality):
        if "shape" in changes:
            changes.setdefault("hidden", changes["shape"][0])  # as wide as it is itself
        changes.setdefault("embedded", embedded)
    return replace(base, **changes)


def _own(name, cls, options, changes, image_shape, embedded):
    """A modality of a class of the user's; where neither it nor the options have a shape, the image's."""
    del options["target"]
    changes |= _known(name, options, cls)
    defaults = {f.name for f in fields(cls) if f.default is not MISSING}
    if "shape" not in changes and "shape" not in defaults and cls.rank == 3:
        changes["shape"] = image_shape
    if issubclass(cls, VectorModality):
        changes.setdefault("embedded", embedded)
    try:
        return cls(name, **changes)
    except TypeError as error:
        raise UserValueError(f"modality {name}: {cls.__name__}: {error}") from None


def _known(name, options, cls):
    hidden = {"name", "derive", "classifier", "image_size", "image_channels"}
    allowed = {f.name for f in fields(cls)} - hidden
    if unknown := sorted(set(options) - allowed):
        raise UserValueError(
            f"modality {name}: unknown option {', '.join(unknown)}; known: {', '.join(sorted(allowed))}{closest(unknown[0], allowed)}"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
