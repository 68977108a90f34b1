"""Does every configuration of upstream's make here the model that it makes there? A table for the documents.

    python patches/configurations.py CHECKOUT... [--write docs/latent-diffusion.md]

CHECKOUT: of CompVis/latent-diffusion, CompVis/stable-diffusion or Stability-AI/stablediffusion. Every YAML file below
its configs/ and models/ is built unmodified on the meta device, where no weights are read, here and there, and the
names and shapes of the two state dicts are compared. --write puts the table between the marks of a page. Exit code 1 if
a file neither has upstream's keys nor is refused by one line that the page explains.
"""

import argparse
import collections
import functools
import importlib
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

MARKS = ("<!-- configurations: begin -->", "<!-- configurations: end -->")


def files(checkout: Path) -> list[str]:
    """The YAML files of a checkout, below its root."""
    found = (file for folder in ("configs", "models") for file in (checkout / folder).rglob("*.yaml"))
    return sorted(str(file.relative_to(checkout)) for file in found)


def built(root: Path, checkout: Path, theirs: dict | None = None) -> dict:
    """{file: {"keys": [[name, shape], ...]} or {"error": line}} of the package ldm in `root`, a process of its own.

    theirs: the same of upstream, whose tensors are first put into this project's names where a part of the model knows
    how (`adapt_weights`); their number is then under "renamed".
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"root": str(root), "checkout": str(checkout), "theirs": theirs}))
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, __file__, "--worker", str(request)]
        job = subprocess.run(command, env=env, capture_output=True, text=True)
        if job.returncode:
            last = (job.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"error: the package ldm of {root} cannot be imported: {last}")
        return json.loads((Path(folder) / "answer.json").read_text())


def worker(request: Path) -> None:
    """Build everything that the request names, and write the answer beside it."""
    told = json.loads(request.read_text())
    root, checkout = Path(told["root"]), Path(told["checkout"])
    sys.meta_path[:] = [
        f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
    ]
    here = root == ROOT
    sys.path[0] = str(root)
    import torch
    from omegaconf import OmegaConf

    if not here:
        stand_in(root)
    make = importlib.import_module("ldm.util").instantiate_from_config
    answer = {}
    for file in files(checkout):
        config = OmegaConf.to_container(OmegaConf.load(checkout / file), resolve=True)["model"]
        if not here:
            config = without_files(config)
        try:
            with torch.device("meta"):
                model = make(config)
            keys = {name: list(value.shape) for name, value in model.state_dict().items()}
            answer[file] = {"keys": keys, **(_renamed(model, told["theirs"][file]) if told["theirs"] else {})}
        except Exception as error:  # whatever foreign code raises is an answer
            answer[file] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    (request.parent / "answer.json").write_text(json.dumps(answer))


def _renamed(model, theirs):
    """Upstream's tensors under this project's names, and how many have others there."""
    import torch

    if "keys" not in theirs:
        return {}
    given = {name: torch.empty(shape, device="meta") for name, shape in theirs["keys"].items()}
    own = model.adapt_weights(given) if hasattr(model, "adapt_weights") else given
    return {
        "theirs": {name: list(value.shape) for name, value in own.items()},
        "renamed": len(given.keys() - own.keys()),
    }


def without_files(config):
    """A configuration without the names of files with weights."""
    if not isinstance(config, dict):
        return config
    return {k: without_files(v) for k, v in config.items() if k not in ("ckpt_path", "clip_stats_path")}


# What upstream's code imports or downloads, with the names and shapes of the real thing


def stand_in(root: Path) -> None:
    """Replace upstream's packages that are not installed, and what reads weights."""
    import torch
    import transformers
    from torch import nn

    sys.path.append(str(ROOT / "patches"))
    probe = importlib.import_module("probe")
    clips = {
        "text": transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
        ),
    }

    def text_model(*_, **__):
        model = transformers.CLIPTextModel(clips["text"])
        # As transformers 4 names it, and with the table of positions that it saved.
        inner = getattr(model, "text_model", model)
        inner.embeddings.register_buffer("position_ids", torch.zeros(1, 77, dtype=torch.long))
        return nn.ModuleDict({"text_model": inner})

    transformers.CLIPTextModel.from_pretrained = text_model
    for tokenizer in (transformers.CLIPTokenizer, transformers.BertTokenizerFast):
        tokenizer.from_pretrained = lambda *_, **__: None
    sys.meta_path.append(probe.StandIns(root))
    _module("torchvision.utils", make_grid=None)
    _module("torchvision", models=_module("torchvision.models", vgg16=_vgg16))
    _module("clip", load=lambda name, **_: (_Clip(768, 12, 1024, 24, 768), None))
    made = lambda arch, **_: (_Clip(1024, 24, 1280, 32, 1024), None, None)  # noqa: E731
    _module("open_clip", create_model_and_transforms=made)
    importlib.import_module("taming.modules.losses.lpips").LPIPS.load_from_pretrained = lambda *_, **__: None
    # Upstream asks tables of the schedule, which are empty, and makes one by torch.
    torch.isnan = lambda x: torch.zeros(1, dtype=torch.bool, device="cpu")
    torch.linspace = functools.partial(torch.linspace, device="cpu")


def _module(name, **names):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(names)
    sys.modules[name] = module
    return module


def _vgg16(**_):
    from torch import nn

    layers, width = [], 3
    for channels in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()] if channels else [nn.MaxPool2d(2)]
        width = channels or width
    return types.SimpleNamespace(features=nn.Sequential(*layers))


def _Clip(text, layers, vision, vision_layers, width):  # noqa: N802
    """A CLIP whose weights have OpenAI's and OpenCLIP's names; of images 224 x 224 in patches of 14."""
    import torch
    from torch import nn

    def tensor(*shape):
        return nn.Parameter(torch.empty(shape))

    def transformer(dim, depth):
        module = nn.Module()
        module.resblocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            block.attn = nn.MultiheadAttention(dim, 16)
            parts = {"c_fc": nn.Linear(dim, 4 * dim), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * dim, dim)}
            block.mlp = nn.Sequential(collections.OrderedDict(parts))
            module.resblocks.append(block)
        return module

    model, visual = nn.Module(), nn.Module()
    visual.class_embedding, visual.positional_embedding = tensor(vision), tensor(257, vision)
    visual.proj, visual.conv1 = tensor(vision, width), nn.Conv2d(3, vision, 14, 14, bias=False)
    visual.ln_pre, visual.ln_post = nn.LayerNorm(vision), nn.LayerNorm(vision)
    visual.transformer = transformer(vision, vision_layers)
    model.positional_embedding, model.text_projection = tensor(77, text), tensor(text, width)
    model.logit_scale, model.visual = tensor(), visual
    model.transformer, model.ln_final = transformer(text, layers), nn.LayerNorm(text)
    model.token_embedding = nn.Embedding(49408, text)
    return model


# The table


def rows(checkout: Path) -> list[tuple[str, str, str, str]]:
    """(file, build, keys, reason) of every file; build: `yes` or `refused`; keys: how they compare."""
    theirs = built(checkout, checkout)
    ours = built(ROOT, checkout, theirs)
    return [(file, *_judge(ours[file], theirs[file])) for file in ours]


def _judge(ours, theirs):
    if "error" in ours:
        return "refused", "", ours["error"].split(": ", 1)[1]
    if "error" in theirs:
        return "yes", "not compared", f"upstream's own code: {theirs['error']}"
    there = ours["theirs"]
    different = [name for name in {**there, **ours["keys"]} if there.get(name) != ours["keys"].get(name)]
    if different:
        return "yes", f"{len(different)} differ", f"`{different[0]}`"
    renamed = f"{ours['renamed']} of them under other names there" if ours["renamed"] else ""
    return "yes", f"{len(theirs['keys'])} equal", renamed


def table(found: list[tuple[str, list]]) -> str:
    """Markdown: one table per checkout, [(its name, rows), ...]."""
    lines = []
    for name, some in found:
        lines += [f"### {name}", "", "| file | builds | keys | remark |", "|---|---|---|---|"]
        lines += [f"| `{file}` | {build} | {keys} | {_cell(why)} |" for file, build, keys, why in some]
        lines.append("")
    return "\n".join(lines)


def _cell(text):
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    """Do what the flags say; the exit code."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("checkouts", nargs="+", metavar="CHECKOUT", type=Path)
    flags.add_argument(
        "--write", metavar="PAGE", type=Path, help="put the table between the marks of this page"
    )
    args = flags.parse_args(argv)
    found = []
    for checkout in args.checkouts:
        if not files(checkout) or not (checkout / "ldm").is_dir():
            flags.error(
                f"{checkout} is no checkout: it has no ldm, or no YAML files below configs and models"
            )
        found.append((checkout.name, rows(checkout.resolve())))
    text = table(found)
    print(text)
    if args.write:
        before, _, rest = args.write.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        args.write.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")
    bad = [row for _, some in found for row in some if row[1] == "yes" and not row[2].endswith("equal")]
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        sys.exit(main())
