"""Put the multi-modal change into a checkout of openai/guided-diffusion, or a fork of it.

    python patches/graft.py CHECKOUT              print the diff and write it
    python patches/graft.py CHECKOUT --dry_run    only print it
    python patches/graft.py CHECKOUT --remove     take it out again

Places are found by class, function and statement, so that edits of the fork's own do not matter. Whole lines are
inserted, each marked at its end; no line is changed. The paper itself, guided_diffusion/mt, comes along as files.
What is not recognised is refused, and then nothing is written.
"""

import ast
import difflib
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion.errors import UserError, exit_on_user_error  # noqa: E402
from guided_diffusion.flags import Parser  # noqa: E402

MARK = "  # mt-diffusion"
PACKAGE = "guided_diffusion"
MANIFEST = f"{PACKAGE}/mt/GRAFT"  # checksums of the files that came along
CORE = (
    "aggregation",
    "modality",
    "kinds",
    "modalities",
    "masks",
    "modality_set",
    "heads",
    "losses",
    "bound",
    "denoiser",
    "solvers",
    "sampling",
)
COPIES = {
    f"{PACKAGE}/{name}.py": f"{PACKAGE}/{name}.py"
    for name in ("errors", "progress", "seeding", "mt/__init__")
}
COPIES |= {f"{PACKAGE}/mt/{name}.py": f"{PACKAGE}/mt/{name}.py" for name in CORE}
COPIES |= {f"{PACKAGE}/mt/join.py": "patches/join.py"}


@dataclass(frozen=True)
class Insertion:
    """Lines for one place of a function.

    where: `parameter` (a further one, last), `start`, `after` or `before` the statement that `pattern` matches
    (its text as `ast.unparse` writes it), or `behind` the function. Lines may use the pattern's groups, those of
    earlier patterns of the function and, before a returned dict, {returned} and its entries as {returned_KEY}.
    """

    function: str
    where: str
    lines: str
    pattern: str = ""


_IN = 'if "joint" in {out}:\n    x = self.aggregation.to_frame(x, t, {out}["joint"].encodings)'
_NOISE = "if randn_like is not None:  # of every sample's own generator\n    {noise} = randn_like(x)"
_D, _U = "GaussianDiffusion", "UNetModel"

INSERTIONS = {
    f"{PACKAGE}/gaussian_diffusion.py": (
        Insertion(f"{_D}.__init__", "parameter", "aggregation=None,"),
        Insertion(f"{_D}.__init__", "start", "self.aggregation = aggregation"),
        Insertion(
            f"{_D}.q_sample",
            "behind",
            "# Equation 4\n"
            "def q_sample(self, x_start, t, noise=None, encodings=None, _plain=q_sample):\n"
            "    x_t = _plain(self, x_start, t, noise)\n"
            "    return self.aggregation.from_frame(x_t, t, encodings) if encodings else x_t",
        ),
        Insertion(
            f"{_D}.q_posterior_mean_variance",
            "behind",
            "# Equation 5\n"
            "def q_posterior_mean_variance(\n"
            "    self, x_start, x_t, t, encodings=None, _plain=q_posterior_mean_variance\n"
            "):\n"
            "    x_t = self.aggregation.to_frame(x_t, t, encodings) if encodings else x_t\n"
            "    mean, *variance = _plain(self, x_start, x_t, t)\n"
            "    mean = self.aggregation.from_frame(mean, t - 1, encodings) if encodings else mean\n"
            "    return (mean, *variance)",
        ),
        # From z_t to y_t, which is a plain DDPM, and back
        Insertion(
            f"{_D}.p_mean_variance",
            "after",
            "mt_joint = None\n"
            "if self.aggregation is not None:\n"
            "    {output}, x, mt_joint = self.aggregation.opened({output}, x, t)",
            r"(?P<output>\w+) = model\(x, self\._scale_timesteps\(t\)",
        ),
        Insertion(
            f"{_D}.p_mean_variance",
            "before",
            "if mt_joint is not None:\n"
            "    mt_mean = self.aggregation.from_frame({returned_mean}, t - 1, mt_joint.encodings)\n"
            "    return dict({returned}, mean=mt_mean, joint=mt_joint)",
            r"return \{",
        ),
        Insertion(f"{_D}.condition_mean", "start", _IN.format(out="p_mean_var")),
        Insertion(f"{_D}.condition_score", "start", _IN.format(out="p_mean_var")),
        Insertion(
            f"{_D}.condition_score",
            "before",
            'if "joint" in p_mean_var:\n'
            '    mt_encodings = p_mean_var["joint"].encodings\n'
            '    {out}["mean"] = self.aggregation.from_frame({out}["mean"], t - 1, mt_encodings)',
            r"return (?P<out>\w+)$",
        ),
        Insertion(f"{_D}.p_sample", "parameter", "randn_like=None,"),
        Insertion(f"{_D}.p_sample", "after", _NOISE, r"(?P<noise>\w+) = th\.randn_like\(x\)"),
        Insertion(f"{_D}.p_sample", "after", "", r"(?P<out>\w+) = self\.p_mean_variance\("),
        Insertion(
            f"{_D}.p_sample",
            "before",
            'if "joint" in {out}:\n    return dict({returned}, joint={out}["joint"])',
            r"return \{",
        ),
        Insertion(f"{_D}.ddim_sample", "parameter", "randn_like=None,"),
        Insertion(f"{_D}.ddim_sample", "after", "", r"(?P<out>\w+) = self\.p_mean_variance\("),
        Insertion(f"{_D}.ddim_sample", "before", _IN, r"\w+ = self\._predict_eps_from_xstart\(x, t"),
        Insertion(f"{_D}.ddim_sample", "after", _NOISE, r"(?P<noise>\w+) = th\.randn_like\(x\)"),
        Insertion(
            f"{_D}.ddim_sample",
            "before",
            'if "joint" in {out}:\n'
            '    mt_sample = self.aggregation.from_frame({returned_sample}, t - 1, {out}["joint"].encodings)\n'
            '    return dict({returned}, sample=mt_sample, joint={out}["joint"])',
            r"return \{",
        ),
        Insertion(f"{_D}.ddim_reverse_sample", "after", _IN, r"(?P<out>\w+) = self\.p_mean_variance\("),
        Insertion(
            f"{_D}.ddim_reverse_sample",
            "before",
            'if "joint" in {out}:\n'
            "    mt_after = (t + 1).clamp(max=self.num_timesteps - 1)\n"
            '    mt_sample = self.aggregation.from_frame({returned_sample}, mt_after, {out}["joint"].encodings)\n'
            "    return dict({returned}, sample=mt_sample)",
            r"return \{",
        ),
    ),
    f"{PACKAGE}/respace.py": (
        # The marginals stay at the steps that are kept
        Insertion(
            "SpacedDiffusion.__init__",
            "before",
            'if kwargs.get("aggregation") is not None:\n'
            '    alphas = 1.0 - kwargs["betas"]\n'
            '    kwargs["aggregation"] = kwargs["aggregation"].respaced(self.timestep_map, alphas)',
            r"super\(\)\.__init__\(\*\*kwargs\)",
        ),
    ),
    f"{PACKAGE}/unet.py": (
        # Decoders D_i, and class probabilities (Algorithm 1 feeds an expectation)
        Insertion(f"{_U}.__init__", "parameter", "heads=None,\npresence=None,"),
        Insertion(f"{_U}.__init__", "after", "self.heads = heads\nself.presence = presence", r"self\.out = "),
        Insertion(f"{_U}.forward", "start", "y, mt_present = y if isinstance(y, tuple) else (y, None)"),
        Insertion(
            f"{_U}.forward",
            "after",
            "if mt_present is not None:\n    {emb} = {emb} + self.presence(mt_present)",
            r"(?P<emb>\w+) = self\.time_embed\(",
        ),
        Insertion(
            f"{_U}.forward",
            "before",
            "if y is not None and y.is_floating_point():  # the next lines add row 0 back\n"
            "    {emb} = {emb} + y @ self.label_emb.weight - self.label_emb.weight[0]\n"
            "    y = th.zeros(len(y), dtype=th.long, device=y.device)",
            r"if self\.num_classes is not None:",
        ),
        Insertion(f"{_U}.forward", "after", "mt_middle = {h}", r"(?P<h>\w+) = self\.middle_block\("),
        Insertion(
            f"{_U}.forward",
            "before",
            "if self.heads is not None:\n    return self.out({last}), self.heads(mt_middle.type(x.dtype), {last})",
            r"return self\.out\((?P<last>\w+)\)",
        ),
        Insertion(
            f"{_U}.forward",
            "behind",
            "# With the modalities that are present in x\n"
            "def forward(self, x, timesteps, y=None, present=None, _plain=forward):\n"
            "    return _plain(self, x, timesteps, y if present is None else (y, present))",
        ),
    ),
    f"{PACKAGE}/script_util.py": (
        # --modalities masked:U,label:U of every script with these flags
        Insertion(
            "model_and_diffusion_defaults", "before", '{flags}["modalities"] = ""', r"return (?P<flags>\w+)$"
        ),
        Insertion("create_model_and_diffusion", "parameter", 'modalities="",'),
        Insertion(
            "create_model_and_diffusion",
            "before",
            "if modalities:\n"
            "    from .mt.join import join\n"
            "    {diffusion} = join({model}, {diffusion}, modalities, noise_schedule, diffusion_steps)",
            r"return \(?(?P<model>\w+), (?P<diffusion>\w+)\)?$",
        ),
        # head: classifier has the modality's classes, at any size
        Insertion(
            "create_classifier",
            "behind",
            "def create_classifier(*args, num_classes=None, _plain=create_classifier, **flags):\n"
            "    if num_classes is None:\n"
            "        return _plain(*args, **flags)\n"
            "    from .mt.join import make_classifier\n"
            "    return make_classifier(num_classes, **flags)",
        ),
    ),
}


# Finding places


def grafted(text: str, insertions, file: str) -> str:
    """A file's text with its insertions. UserError if a place is not found, or the result is not Python."""
    eol = "\r\n" if "\r\n" in text else "\n"
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{file} is not valid Python: line {error.lineno}") from error
    lines, found, names = text.split(eol), [], {}
    for order, insertion in enumerate(insertions):
        function = _function(tree, insertion.function, file)
        groups = names.setdefault(insertion.function, {})
        row, indent = _place(function, insertion, lines, groups, file)
        new = insertion.lines.format(**groups).splitlines() if insertion.lines else []
        found.append((row, order, [f"{indent}{line}{MARK}" for line in new]))
    for row, _, new in sorted(found, reverse=True):
        lines[row:row] = new
    result = eol.join(lines)
    try:
        ast.parse(result)
    except SyntaxError as error:
        raise UserError(
            f"{file} would not be valid Python with the insertions (line {error.lineno})"
        ) from error
    return result


def _function(tree, dotted, file):
    node = tree
    for part in dotted.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = [n for n in node.body if isinstance(n, kinds) and n.name == part]
        if len(found) != 1:
            raise UserError(
                f"{file} has {'no' if not found else 'more than one'} {dotted}: it cannot be grafted"
            )
        node = found[0]
    return node


def _place(function, insertion, lines, groups, file):
    """(row to insert before, counted from 0; indentation); puts the pattern's groups into `groups`."""
    first = function.body[0]
    if insertion.where == "behind":
        return function.end_lineno, lines[function.lineno - 1][: function.col_offset]
    if insertion.where == "start":
        documented = ast.get_docstring(function) is not None and len(function.body) > 1
        first = function.body[documented]
        return _top(first) - 1, lines[first.lineno - 1][: first.col_offset]
    if insertion.where == "parameter":
        arguments = function.args
        last = max(
            [
                *arguments.args,
                *arguments.kwonlyargs,
                *arguments.defaults,
                *filter(None, arguments.kw_defaults),
            ],
            key=lambda node: (node.end_lineno, node.end_col_offset),
        )
        line = lines[last.end_lineno - 1]
        if arguments.kwarg or not line[last.end_col_offset :].lstrip().startswith(","):
            raise UserError(
                f"{file}, {insertion.function}: its parameters do not stand on lines that end with a comma"
            )
        return last.end_lineno, line[: len(line) - len(line.lstrip())]
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.stmt) and node is not function:
            match = re.match(insertion.pattern, ast.unparse(node))
            if match:
                found.append((node, match))
    if len(found) != 1:
        many = "no statement" if not found else "more than one statement"
        raise UserError(
            f"{file}, {insertion.function}: {many} like `{insertion.pattern}`; it cannot be grafted"
        )
    node, match = found[0]
    groups.update(match.groupdict())
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
        source = ast.get_source_segment("\n".join(lines), node.value)
        groups["returned"] = (
            ast.unparse(node.value)
            if "#" in source
            else " ".join(source.split()).replace("{ ", "{").replace(", }", "}")
        )
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant):
                groups[f"returned_{key.value}"] = ast.unparse(value)
    row = node.end_lineno if insertion.where == "after" else node.lineno - 1
    return row, lines[node.lineno - 1][: node.col_offset]


def _top(node):
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


# Checkouts


def plan(checkout: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """({file: its text with insertions}, {file that comes along: content}); nothing is written."""
    changed, new = {}, {}
    for file in INSERTIONS:
        text = _text(checkout / file)
        if MARK in text or (checkout / MANIFEST).exists():
            raise UserError(f"{checkout} is grafted already: --remove comes first")
        changed[file] = grafted(text, INSERTIONS[file], file).encode()
    for file, source in COPIES.items():
        if (checkout / file).exists():
            raise UserError(f"{file} exists in {checkout}: it cannot be grafted beside it")
        new[file] = (ROOT / source).read_bytes()
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in new.items())
    return changed, new | {MANIFEST: sums.encode()}


def removal(checkout: Path) -> tuple[dict[str, bytes], list[str]]:
    """({file: its text without insertions}, [file that came along]). UserError if any of that was changed."""
    manifest = checkout / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{checkout} is not grafted: it has no {MANIFEST}")
    changed = {}
    for file in INSERTIONS:
        text = _text(checkout / file)
        rows = text.splitlines(keepends=True)
        plain = "".join(row for row in rows if not _is_marked(row))
        # A formatter may have broken an inserted line in two, of which one has no mark.
        again = grafted(plain, INSERTIONS[file], file).splitlines(keepends=True)
        if list(filter(_is_marked, rows)) != list(filter(_is_marked, again)):
            raise UserError(
                f"{file}: inserted lines were edited; they all end with `{MARK.strip()}`: remove them by hand"
            )
        changed[file] = plain.encode()
    files = []
    for line in manifest.read_text().splitlines():
        total, file = line.split(maxsplit=1)
        path = checkout / file
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != total:
            raise UserError(
                f"{file} was changed since it was put there: keep your change elsewhere, and restore it"
            )
        files.append(file)
    return changed, [*files, MANIFEST]


def _is_marked(row):
    return row.rstrip("\r\n").endswith(MARK)


def _text(path):
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: is this a checkout of guided-diffusion?") from error


def diff(checkout: Path, changed: dict[str, bytes]) -> str:
    """The change as a unified diff."""
    parts = []
    for file, content in changed.items():
        before, after = (
            _text(checkout / file).splitlines(keepends=True),
            content.decode().splitlines(keepends=True),
        )
        parts += difflib.unified_diff(before, after, f"a/{file}", f"b/{file}")
    return "".join(parts)


def flags() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("checkout", kind=Path, path="source", help="checkout of openai/guided-diffusion, or of a fork")
    own.add("--remove", action="store_true", help="take the change out again", group="results")
    own.add("--dry_run", action="store_true", help="print only", group="results")
    return own


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    """Do what the flags say."""
    args = flags().parse_args(argv)
    if args.remove:
        (changed, gone), new = removal(args.checkout), {}
    else:
        (changed, new), gone = plan(args.checkout), []
    print(diff(args.checkout, changed), end="")
    for file, content in new.items():
        print(f"new file {file}: {len(content.splitlines())} lines")
    for file in gone:
        print(f"removed {file}")
    if args.dry_run:
        return
    for file, content in {**changed, **new}.items():
        (args.checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (args.checkout / file).write_bytes(content)
    for file in gone:
        (args.checkout / file).unlink(missing_ok=True)
    folder = args.checkout / PACKAGE / "mt"
    if gone and folder.is_dir() and not [p for p in folder.iterdir() if p.name != "__pycache__"]:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
