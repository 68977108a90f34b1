"""YAML configuration files, which may state only what differs from their `base`."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from .errors import UserError, UserFileError, one_line


def load_with_bases(path: str | Path, inside: tuple[Path, ...] = ()) -> DictConfig:
    """The mapping in a YAML file, over the one in the file that its key `base` names, references not yet resolved.

    base: a path relative to the file, or a list of them, of which later ones win. The file's own keys win over all,
    nested mappings are merged, lists replaced; the key itself is left out. `inside`: the files that this one is a
    base of. UserFileError for a file that is missing, UserError for one that is no YAML mapping or its own base.
    """
    path = Path(path)
    asked = f" (the base of {inside[-1]})" if inside else ""
    if not path.is_file():
        raise UserFileError(f"there is no configuration file {path}{asked}")
    if path.resolve() in [file.resolve() for file in inside]:
        raise UserError(f"{inside[-1]}: its base {path} is made of {inside[-1]} itself")
    try:
        own = OmegaConf.load(path)
    except Exception as error:  # of YAML, of the text's coding, of OmegaConf
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(own, DictConfig):
        raise UserError(f"{path} is not a mapping from names to values")
    bases = own.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else list(bases) if OmegaConf.is_list(bases) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: `base` is the name of a file or a list of them, not {bases}")
    parts = [load_with_bases(path.parent / base, (*inside, path)) for base in bases]
    try:
        return OmegaConf.merge(OmegaConf.create(), *parts, own)
    except Exception as error:
        raise UserError(f"{path} does not fit its base: {one_line(error)}") from error
