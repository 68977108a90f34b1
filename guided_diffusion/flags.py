"""The command line of every program: its flags, their defaults and ranges, and how they are read. Imports no torch.

A flag is declared once, in `FLAGS` by its name, or where a single program has it. Its default stands in the program's
dictionary of defaults, as in guided-diffusion. `Parser` shows help, unit, range and default, checks every value in one place,
and reports a mistake in one line.
"""

import argparse
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import UserError, UserFileError, UserValueError, closest, exit_on_user_error

NUM_CLASSES = 1000
NOISE_SCHEDULES = ("linear", "cosine")
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")
LABEL_FROM = ("auto", "prefix", "folder")
MISSING = ("error", "value")
PRECISIONS = ("fp32", "bf16", "fp16")
SWITCH = ("auto", "true", "false")
SAMPLERS = ("ddpm", "ddim", "plms", "heun", "dpm++", "dpm++sde", "dpm++3m", "unipc")
AGGREGATIONS = ("bump", "late", "paper-normalized", "constant", "paper")
LOSS_WEIGHTINGS = ("none", "p2", "min_snr")
TASK_WEIGHTINGS = ("fixed", "uncertainty", "pcgrad")
FEW_SAMPLER, FEW_STEPS = "dpm++sde", 20  # of joint models' programs, unless said otherwise
OWN_FOLDER = "$OPENAI_LOGDIR, or runs/DATE-NAME"  # where joint models' programs write without --log_dir
WRITTEN = (".png", ".jpg", ".jpeg", ".webp")  # kinds of images
OWN_STRENGTH = "1, of an image the share of its dimensions whose held-out errors are independent"
LARGEST = 2**63 - 1  # of a whole number without another limit: an int64
GROUPS = "data model classifier diffusion modalities sampling optimisation machine page logging results options".split()

# ------------------------------------------------------------------------------------------------- what a flag is


def str2bool(v):
    """yes/true/t/y/1 or no/false/f/n/0 in any case, or a bool; `argparse.ArgumentTypeError` for anything else."""
    if isinstance(v, bool):
        return v
    word = v.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"boolean value expected (true or false), not {v!r}")


def integers(text: str) -> list[int]:
    """Numbers separated by commas: a type for flags."""
    return [int(part) for part in text.split(",")]


def numbers(text: str) -> list[float]:
    """Numbers separated by commas: a type for flags."""
    return [float(part) for part in text.split(",")]


def device_name(text: str) -> str:
    """cpu, cuda, cuda:N or mps: a type for flags."""
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", text):
        raise ValueError
    return text


_KINDS = {
    int: ("a whole number", "N"),
    float: ("a number", "X"),
    str2bool: ("true or false", "BOOL"),
    integers: ("whole numbers separated by commas", "N,..."),
    numbers: ("numbers separated by commas", "X,..."),
    device_name: ("cpu, mps, cuda or cuda:N", "DEVICE"),
}


@dataclass(frozen=True)
class Flag:
    """What is said of a flag beside its default.

    kind: the type of a value (None: that of the default). low, high: the range of numbers, without its ends where
    `above` or `below`. also: values outside it that have a meaning. choices: all values. path: `source` (must
    exist), `file`, `image` or `folder` (to be written). unset: what the defaults None and "" mean.
    """

    help: str = ""
    group: str = "options"
    kind: Callable | None = None
    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    also: tuple = ()
    choices: tuple = ()
    path: str = ""
    unset: str = "none"

    def range(self) -> str:
        """The values that are allowed, in words; "" where any is."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.low is None and self.high is None:
            return ""
        low = "" if self.low is None else f"{'above' if self.above else 'at least'} {self.low}"
        high = "" if self.high is None else f"{'below' if self.below else 'at most'} {self.high}"
        both = f"from {self.low} to {self.high}" if low and high and not (self.above or self.below) else ""
        words = both or " and ".join(filter(None, (low, high)))
        return " or ".join([words, *map(str, self.also)])

    def check(self, label: str, value) -> None:
        """`UserError` that begins with `label` where a number or a choice is not allowed."""
        for one in value if isinstance(value, list | tuple) else [value]:
            if one in self.also:
                continue
            if self.choices and one not in self.choices:
                near = closest(str(one), map(str, self.choices))
                raise UserValueError(f"{label} must be {self.range()}, not {one!r}{near}")
            if isinstance(one, int | float) and not isinstance(one, bool) and not self._inside(one):
                finite = "finite" if isinstance(one, float) and self.high is None else ""
                words = " and ".join(filter(None, (self.range(), finite))) or f"at most {LARGEST}"
                shown = f"{one:g}" if isinstance(one, float) else one
                raise UserValueError(f"{label} must be {words}, not {shown}")

    def _inside(self, number) -> bool:
        if isinstance(number, float) and not math.isfinite(number):
            return False
        high = LARGEST if self.high is None and isinstance(number, int) else self.high
        if self.low is not None and (number <= self.low if self.above else number < self.low):
            return False
        return high is None or (number < high if self.below else number <= high)

    def check_path(self, label: str, value) -> None:
        """`UserFileError` where a source is missing or a result cannot be written. A file's folder is made."""
        for one in map(str, value if isinstance(value, list | tuple) else [value]):
            if not self.path or "://" in one or one in self.also:  # remote: whoever opens it tells
                continue
            one = os.path.expanduser(one)
            if self.path == "source":
                if not os.path.exists(one):
                    raise UserFileError(f"{label} not found: {one!r} does not exist")
                continue
            if self.path == "image" and not one.lower().endswith(WRITTEN):
                raise UserValueError(f"{label} must end in one of {', '.join(WRITTEN)}, not {one!r}")
            if self.path in ("file", "image") and os.path.isdir(one):
                raise UserFileError(f"{label} {one} is a folder: name a file")
            folder = os.path.abspath(one) if self.path == "folder" else os.path.dirname(os.path.abspath(one))
            there = folder
            while not os.path.exists(there):
                there = os.path.dirname(there)
            if not os.path.isdir(there):
                raise UserFileError(f"{label}: {there} is a file, not a folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserFileError(f"{label}: {there} is not writable")
            if self.path in ("file", "image"):
                try:
                    os.makedirs(folder, exist_ok=True)
                except OSError as error:
                    raise UserFileError(f"{label}: {folder} cannot be made: {error.strerror}") from None

    def told(self, default, required: bool = False) -> str:
        """The line of --help."""
        shown = self.unset if default in (None, "", [], (), argparse.SUPPRESS) else _typed(default)
        notes = [self.range(), "" if required else f"default: {shown}"]
        beside = "; ".join(note for note in notes if note)
        return (self.help + (f" ({beside})" if beside else "")).strip().replace("%", "%%")


def _typed(value) -> str:
    """A default as one types it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ----------------------------------------------------------------------------------------------- the flags by name


def _group(group: str, **flags: Flag) -> dict[str, Flag]:
    return {name: replace(flag, group=group) for name, flag in flags.items()}


_SEED = 2**32 - 1

FLAGS: dict[str, Flag] = {
    **_group(
        "data",
        data_dir=Flag("images: a folder or an .npz file", path="source"),
        val_data_dir=Flag("labelled images to validate on: a folder or an .npz file", path="source"),
        base_samples=Flag("images to enlarge: the .npz file of image_sample.py", path="source"),
        image_channels=Flag("channels of an image: 1 grey, 3 RGB, 4 RGBA", low=1, high=64),
        num_classes=Flag("classes of the labels", low=1, high=1_000_000),
        held_out=Flag("images that are not trained on but measure the heads, at most a tenth", low=0),
        random_crop=Flag("crop images at random places in place of the centre"),
        random_flip=Flag("flip half of the images left-right"),
        class_names=Flag("names of the classes by number, separated by commas", unset="those of the data"),
        label_from=Flag("what gives the classes of a folder's images", choices=LABEL_FROM),
        missing=Flag(
            "if a file or entry of an image is missing: an error, or train without that value",
            choices=MISSING,
        ),
        max_bad=Flag("unreadable images before training stops", low=0),
    ),
    **_group(
        "model",
        image_size=Flag("pixels along an edge of the image", low=1, high=4096),
        large_size=Flag("pixels along an edge of the enlarged image", low=1, high=4096),
        small_size=Flag("pixels along an edge of the image to enlarge", low=1, high=4096),
        num_channels=Flag("channels of the first level, a multiple of 32", low=1, high=16384),
        num_res_blocks=Flag("residual blocks of a level", low=1, high=64),
        num_heads=Flag("attention heads", low=1, high=1024),
        num_heads_upsample=Flag(
            "attention heads on the way up; -1: as num_heads", low=1, high=1024, also=(-1,)
        ),
        num_head_channels=Flag(
            "channels of an attention head; -1: num_heads decides", low=1, high=16384, also=(-1,)
        ),
        attention_resolutions=Flag("pixels along an edge at which there is attention, such as 32,16,8"),
        channel_mult=Flag("channels of every level in units of num_channels", unset="by the image's size"),
        dropout=Flag("share of activations that are dropped in training", low=0, high=1, below=True),
        class_cond=Flag("the network sees the class"),
        use_checkpoint=Flag("recompute activations in the backward pass: less memory, more time"),
        use_scale_shift_norm=Flag("the timestep scales and shifts after the normalisation"),
        resblock_updown=Flag("residual blocks change the resolution"),
        use_fp16=Flag("half precision (float16) inside the network"),
        use_new_attention_order=Flag("split queries, keys and values before the heads"),
        model_path=Flag("the weights: a model*.pt or ema_*.pt file", path="source"),
        weights=Flag(
            "which weights of a complete checkpoint: ema (the first average), a rate such as 0.9999, or model"
        ),
    ),
    **_group(
        "classifier",
        classifier_path=Flag("the classifier's weights: a file of classifier_train.py", path="source"),
        classifier_scale=Flag("strength of the guidance; 0 is none", low=0, high=1_000_000),
        classifier_use_fp16=Flag("half precision (float16) inside the classifier"),
        classifier_width=Flag("channels of its first level, a multiple of 32", low=1, high=16384),
        classifier_depth=Flag("residual blocks of a level", low=1, high=64),
        classifier_attention_resolutions=Flag("attention_resolutions of the classifier"),
        classifier_use_scale_shift_norm=Flag("the timestep scales and shifts after the normalisation"),
        classifier_resblock_updown=Flag("residual blocks change the resolution"),
        classifier_pool=Flag("how its last features become one vector", choices=POOLS),
        classifier_channel_mult=Flag("channel_mult of the classifier", unset="by the image's size"),
        noised=Flag("train on noised images; otherwise on images as they are"),
    ),
    **_group(
        "diffusion",
        learn_sigma=Flag("the network also predicts the variance"),
        diffusion_steps=Flag("timesteps of the full process", low=1, high=100_000),
        noise_schedule=Flag("the noise by timestep", choices=NOISE_SCHEDULES),
        timestep_respacing=Flag("use fewer steps: a number, ddim50, or 10,15,20 by section", unset="all"),
        use_kl=Flag("train on the variational bound"),
        predict_xstart=Flag("the network predicts the image, not the noise"),
        rescale_timesteps=Flag("the network is told timesteps from 0 to 1000"),
        rescale_learned_sigmas=Flag("train the learned variance on the rescaled bound"),
    ),
    **_group(
        "modalities",
        modalities=Flag(
            "what is generated beside the image, with its variant: masked:X,label:U,depth=image, or YAML: "
            '"{sound: {preset: representation}}"; "" for only the image'
        ),
        aggregation=Flag("how strongly modalities shift the latent by timestep", choices=AGGREGATIONS),
        detectability=Flag(
            "how clearly labels and vectors show in the noise, their largest d_t; 0: a peak of 0.5, as images",
            low=0,
        ),
        presence=Flag("tell the network which modalities are in the latent"),
        unshifted_probability=Flag(
            "share of the samples without a modality's shift; its head is trained all the same", low=0, high=1
        ),
        code_interval=Flag(
            "steps between two encodings of the labels; 0: so many that they cost 5 % of the time", low=0
        ),
        single_task_probability=Flag(
            "share of the samples that train the image without any modality", low=0, high=1
        ),
    ),
    **_group(
        "sampling",
        num_samples=Flag("samples in all", low=1),
        n_samples=Flag("samples in all", low=1),
        clip_denoised=Flag("clip the predicted image to the range of pixels at every step"),
        use_ddim=Flag("sample by DDIM in place of ancestral sampling"),
        sampler=Flag("how to sample", choices=SAMPLERS),
        steps=Flag(
            "use fewer steps: a number, placed where abar is large enough (ddpm: evenly), or upstream's ddim50, or "
            "10,15,20 by section",
            unset="all",
        ),
        given=Flag("what is known, NAME=FILE_OR_FOLDER; may be repeated"),
        want=Flag("what to generate, names separated by commas", unset="everything that is not given"),
        without=Flag("modalities to leave out, neither in the latent nor generated, such as label,masked"),
        strength=Flag(
            "how strongly a given U modality conditions: 1 is Bayes' rule for independent errors, 0 is none",
            low=0,
            high=1e6,
        ),
        guidance_scale=Flag(
            "classifier-free guidance, towards given X modalities, or all of a model trained with "
            "--single_task_probability; 1 is none",
            low=-1e6,
            high=1e6,
        ),
        scale=Flag("strength of classifier-free guidance; 1 is none", low=-1e6, high=1e6),
        replace_known=Flag("put known pixels back at every step, not only at the end"),
        resample=Flag("passes over every step, with --replace_known (RePaint; ddpm)", low=1, high=1000),
        times=Flag(
            "timesteps at which a given image is read; the readings are averaged", kind=integers, low=0
        ),
        order=Flag(
            "posterior: predict, then encode; paper: Algorithm 1, encode first",
            choices=("posterior", "paper"),
        ),
    ),
    **_group(
        "optimisation",
        schedule_sampler=Flag("how timesteps are drawn", choices=SCHEDULE_SAMPLERS),
        loss_weighting=Flag("of the image's squared error by timestep", choices=LOSS_WEIGHTINGS),
        p2_k=Flag("k of --loss_weighting p2, 1 / (k + SNR)^gamma", low=0, above=True, high=1e6),
        p2_gamma=Flag("gamma of --loss_weighting p2", low=0, high=100),
        min_snr_gamma=Flag("gamma of --loss_weighting min_snr, min(SNR, gamma) / SNR", low=0, above=True),
        task_weighting=Flag(
            "of the image and the modalities: their lambdas, learned log-variances, or gradients without conflicts",
            choices=TASK_WEIGHTINGS,
        ),
        image_weight=Flag("lambda of the image's own loss; 0: the modalities alone", low=0),
        task_intervals=Flag(
            "intervals of t that --task_weighting takes as tasks of their own", low=1, high=100
        ),
        lr=Flag("learning rate of AdamW", low=0),
        weight_decay=Flag("weight decay of AdamW", low=0),
        lr_anneal_steps=Flag(
            "steps over which the learning rate falls to 0 and training ends; 0: it stays constant", low=0
        ),
        anneal_lr=Flag("the learning rate falls to 0 over the iterations"),
        batch_size=Flag("images of a step on every rank", low=1, high=100_000),
        microbatch=Flag("images of a backward pass; -1: all of the batch", low=1, also=(-1,)),
        ema_rate=Flag("rates of the moving averages of the weights, from 0 to below 1, separated by commas"),
        iterations=Flag("steps of training in all; 0: until stopped", low=0),
        resume_checkpoint=Flag("a run's folder or a checkpoint to continue", path="source"),
        init_from=Flag(
            "a run or checkpoint whose weights, and network's flags, this run begins with", path="source"
        ),
        train=Flag("which weights change; heads: the U-Net keeps its own", choices=("all", "heads")),
        ema_warmup=Flag("let the averages forget the untrained start sooner"),
        fp16_scale_growth=Flag("growth of log2 of fp16's loss scale in a step", low=0, above=True),
        max_nonfinite=Flag("steps that may be skipped for NaN or infinity", low=0),
    ),
    **_group(
        "machine",
        precision=Flag("number format of the network", choices=PRECISIONS),
        compile=Flag("torch.compile the model", kind=str.lower),
        channels_last=Flag(
            "keep the channels of a pixel together in memory; auto: on a GPU", choices=SWITCH, kind=str.lower
        ),
        num_workers=Flag("processes that read images, on every rank", low=0, high=1024),
        device=Flag("such as cpu, cuda or cuda:1", kind=device_name, unset="the GPU where there is one"),
        seed=Flag(
            "seed of all random numbers: the same seed gives the same result", low=0, high=_SEED, kind=int
        ),
    ),
    **_group(
        "page",
        host=Flag("address to listen on; 0.0.0.0: every network of this machine"),
        port=Flag("port to listen on; 0: any free one", low=0, high=65535),
        queue=Flag("requests that may wait", low=0, high=10_000),
        max_upload=Flag("largest request, in MiB", low=0, above=True, high=1024),
    ),
    **_group(
        "logging",
        log_interval=Flag("steps between lines of the log", low=1),
        eval_every=Flag("steps between evaluations on held-out images, logged under eval/; 0: none", low=0),
        eval_judge=Flag(
            "also score samples by a file of judge.py, or `inception`", path="source", also=("inception",)
        ),
        eval_samples=Flag(
            "samples that --eval_judge scores, and images of --val_data_dir", low=4, high=100_000
        ),
        wandb=Flag("project of Weights & Biases to log to, where that is installed"),
        eval_interval=Flag("steps between validations", low=1),
        save_interval=Flag("steps between checkpoints", low=1),
        keep_checkpoints=Flag("complete checkpoints that are kept", low=1),
        adm_files=Flag("also write ADM's model, ema and opt files beside every checkpoint that is kept"),
        progress=Flag("show a progress bar"),
        sample_steps=Flag(
            "DPM-Solver++ steps of the samples drawn at every save; 0: none", low=0, high=100_000
        ),
    ),
    **_group(
        "results",
        log_dir=Flag(
            "where the results go",
            path="folder",
            unset="$OPENAI_LOGDIR, or a new temporary folder as upstream",
        ),
        out=Flag("where the results go", path="folder"),
        film=Flag("a .gif of the denoising, image and modalities at every step", path="file"),
        json=Flag("also write the numbers, and what they depend on, as JSON", path="file"),
        title=Flag("title of the plot"),
    ),
}


# ------------------------------------------------------------------------------------------------------- the parser


class Parsed(argparse.Namespace):
    """The flags by name; typed: the names of those that stood on the command line, which `vars` leaves out."""

    __slots__ = ("typed",)


class Flags(dict):
    """The flags by name; typed: the names of those that the user set, on the command line or in a file."""

    typed: frozenset[str] = frozenset()


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=max(100, shutil.get_terminal_size().columns - 2))

    def add_usage(self, usage, actions, groups, prefix=None):
        if usage is None and len(actions) > 12:  # the others stand below, one on a line
            needed = [a for a in actions if a.required]
            words = [f"{a.option_strings[-1]} {a.metavar}" if a.option_strings else a.dest for a in needed]
            usage = " ".join(["%(prog)s", *words, "[flags]"])
        super().add_usage(usage, actions, groups, prefix)


class Parser(argparse.ArgumentParser):
    """A parser whose flags come from `FLAGS`. A wrong command line is a `UserError` of one line."""

    def __init__(self, description: str | None = None, **options):
        options.setdefault("formatter_class", _Help)
        options.setdefault("allow_abbrev", False)
        super().__init__(description=description and description.strip(), **options)

    def add(self, *names: str, default=None, required: bool = False, **options) -> argparse.Action:
        """Add a flag (`--name`, also `-n`) or a positional argument.

        options: fields of `Flag`, over those that `FLAGS` has under its name, and action, nargs, metavar, dest of
        argparse.
        """
        name = max(names, key=len).lstrip("-").replace("-", "_")
        own = {key: options.pop(key) for key in list(options) if key in Flag.__dataclass_fields__}
        flag = replace(FLAGS.get(name, Flag()), **own)
        flagged = names[0].startswith("-")
        if options.get("action") == "store_true":
            default = False if default is None else default
        else:
            kind = flag.kind or (
                str2bool if isinstance(default, bool) else str if default in (None, [], ()) else type(default)
            )
            if kind is str:  # the range of a number of this name, in another program, is not that of a text
                flag = replace(flag, low=None, high=None)
            else:
                label = max(names, key=len)
                options["type"] = _reader(label, kind)
                options.setdefault("metavar", _KINDS.get(kind, ("", None))[1])
            if flagged and options.get("metavar") is None:
                words = {"source": "PATH", "file": "FILE", "image": "FILE", "folder": "FOLDER"}
                options["metavar"] = words.get(flag.path, "CHOICE" if flag.choices else "TEXT")
        if flagged:
            options["required"] = required
        group = self._titled(flag.group) if flagged else self
        told = flag.told(default, required or not flagged and default is None)
        action = group.add_argument(*names, default=default, help=told, **options)
        action.flag, action.declared = flag, default
        return action

    def add_flags(self, defaults: Mapping[str, object], **changes: Mapping) -> "Parser":
        """One flag per entry, of the type of its default. changes: name -> fields of `Flag` that differ here."""
        for name, default in defaults.items():
            self.add(f"--{name}", default=default, **changes.get(name, {}))
        return self

    def _titled(self, title):
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title)

    def format_help(self):
        order = {title: place for place, title in enumerate(GROUPS)}
        self._action_groups.sort(key=lambda group: order.get(group.title, -1))
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            self._refuse_unknown(args)
        parsed, rest = super().parse_known_args(args, Parsed() if namespace is None else namespace)
        if isinstance(parsed, Parsed):
            actions = (self._option_string_actions.get(word.partition("=")[0]) for word in args)
            parsed.typed = frozenset(action.dest for action in actions if action is not None)
        self.check(vars(parsed))
        return parsed, rest

    def parse_args(self, args=None, namespace=None):
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r} (see --help)")
        return parsed

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                return
            if word.startswith("--") and name not in self._option_string_actions:
                raise UserValueError(f"{name}: unknown flag{closest(name, self._option_string_actions)}")

    def check(self, values: Mapping[str, object], label: str = "") -> None:
        """`UserError` for a value by name that its flag does not allow, before any folder is made; defaults are allowed.

        label: what stands before the name in the message, in place of --.
        """
        for method in (Flag.check, Flag.check_path):
            for action in self._actions:
                value = values.get(action.dest)
                if hasattr(action, "flag") and value is not None and value != action.declared:
                    own = max(action.option_strings, key=len, default=action.dest)
                    method(action.flag, label + own.lstrip("-") if label else own, value)

    def error(self, message):
        message = message.removeprefix("argument ")
        missing = message.removeprefix("the following arguments are required: ")
        raise UserValueError(f"give {missing} (see --help)" if missing != message else message)


def _reader(label: str, kind: Callable) -> Callable:
    def read(text):
        try:
            return kind(text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            # No ValueError, of which argparse would make another message.
            if kind in _KINDS:
                raise UserError(f"{label} must be {_KINDS[kind][0]}, not {text!r}") from None
            raise UserError(f"{label}: {error}") from None

    return read


def make_parser(doc: str, *defaults: Mapping[str, object], **changes: Mapping) -> Parser:
    """A parser with one flag per entry of `defaults` (later ones win), --seed and --log_dir, as ADM's scripts have them.

    changes: as in `Parser.add_flags`.
    """
    merged = {name: value for some in defaults for name, value in some.items()}
    parser = Parser(doc).add_flags(merged, **changes)
    parser.add("--seed", unset="a fresh one")
    parser.add("--log_dir")
    return parser


def answer_early(make: Callable[[], Parser]) -> None:
    """Answer --help, and refuse a wrong command line, before a program whose parser is `make()` imports what takes long."""
    with exit_on_user_error():
        make().parse_args()


def add_dict_to_argparser(parser, default_dict):
    """Add one `--name` per entry, of the type of its default (None: a string; bool: see `str2bool`), to any parser."""
    if isinstance(parser, Parser):
        parser.add_flags(default_dict)
        return
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        told = FLAGS[name].told(default) if name in FLAGS else None
        parser.add_argument(f"--{name}", default=default, type=kind, help=told)


def args_to_dict(args, keys):
    """The attributes `keys` of a parsed namespace, as a dict."""
    return {key: getattr(args, key) for key in keys}


def add_training_flags(parser: Parser, iterations: bool = True) -> Parser:
    """Flags of training that upstream lacks; `iterations` where the program does not have its own."""
    if iterations:
        parser.add("--iterations", default=0)
    parser.add("--precision", default="fp32")
    parser.add("--compile", action="store_true")
    parser.add("--progress", action="store_true")
    parser.add("--label_from", default="auto")
    parser.add("--num_workers", default=1)
    parser.add("--max_nonfinite", default=20)
    return parser


def add_sampling_flags(parser: Parser, number_format: str = "auto", **changes: Mapping) -> Parser:
    """How the network runs when it samples, for every program that samples. number_format: the default of --precision; changes: as in
    `Parser.add_flags`."""
    switches = dict(precision=number_format, compile="auto", channels_last="auto")
    told = {
        "precision": dict(
            help="number format of the network; auto: bf16 where the GPU has it",
            choices=("auto", *PRECISIONS),
        ),
        "compile": dict(
            help="torch.compile the network; auto: on a GPU", choices=SWITCH, nargs="?", const="true"
        ),
        "channels_last": dict(nargs="?", const="true"),
    }
    for name, default in switches.items():
        parser.add(f"--{name}", default=default, **{**told[name], **changes.get(name, {})})
    return parser


# ---------------------------------------------------------------------------------------------- configuration files


def read_config(path: str | os.PathLike) -> dict:
    """A YAML file over its `base` (see load_with_bases) as plain values. UserError for one that cannot be read."""
    from omegaconf import OmegaConf  # here, since it takes long

    from .config_file import load_with_bases

    config = load_with_bases(path)
    try:
        return OmegaConf.to_container(config, resolve=True)
    except Exception as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_flags(parser: Parser, argv: Sequence[str] | None = None) -> dict:
    """With a parser that has --config: flags from the command line over those of `--config FILE` over the defaults. UserError for unknown names in the
    file.

    A value in the file must have the type of the flag; a flag whose default is text also takes a mapping there.
    """
    path, values = parser.parse_args(argv).config, {}
    if path:
        defaults = {a.dest: a.declared for a in parser._actions if hasattr(a, "flag") and a.dest != "config"}
        config = read_config(path)
        for name in sorted(set(map(str, config)) - set(defaults)):
            raise UserError(f"{path}: unknown flag {name}{closest(name, defaults)}")
        values = {name: _as_flag(name, value, defaults[name], path) for name, value in config.items()}
        parser.check(values, label=f"{path}: ")
        parser.set_defaults(**values)
    parsed = parser.parse_args(argv)
    flags = Flags(vars(parsed))
    flags.typed = parsed.typed | set(values)
    del flags["config"]
    return flags


def _as_flag(name, value, default, path):
    if isinstance(default, str):
        return (
            value
            if isinstance(value, (dict, str))
            else ",".join(map(str, value if isinstance(value, list) else [value]))
        )
    kinds = {bool: (bool,), int: (int,), float: (int, float)}.get(type(default), (type(default),))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{path}: {name} must be of type {type(default).__name__}, not {value!r}")
    return type(default)(value)


# ------------------------------------------------------------------------------- defaults, in upstream's order


def diffusion_defaults():
    """Flags of the diffusion process, shared by image models and classifiers."""
    return dict(
        learn_sigma=False,
        diffusion_steps=1000,
        noise_schedule="linear",
        timestep_respacing="",
        use_kl=False,
        predict_xstart=False,
        rescale_timesteps=False,
        rescale_learned_sigmas=False,
    )


def _data_defaults():
    """What upstream fixes: the number of classes and the channels of an image."""
    return dict(num_classes=NUM_CLASSES, image_channels=3)


def _classifier_flags():
    return dict(
        image_size=64,
        classifier_use_fp16=False,
        classifier_width=128,
        classifier_depth=2,
        classifier_attention_resolutions="32,16,8",
        classifier_use_scale_shift_norm=True,
        classifier_resblock_updown=True,
        classifier_pool="attention",
    )


def classifier_defaults():
    """Flags of the noisy classifier."""
    return _classifier_flags() | dict(classifier_channel_mult="") | _data_defaults()


def classifier_flags() -> dict:
    """The flags classifier_* of classifier_train.py with their defaults, beside a model that says the rest."""
    return {name: value for name, value in classifier_defaults().items() if name.startswith("classifier_")}


def model_and_diffusion_defaults():
    """Flags of image training and sampling."""
    model = dict(
        image_size=64,
        num_channels=128,
        num_res_blocks=2,
        num_heads=4,
        num_heads_upsample=-1,
        num_head_channels=-1,
        attention_resolutions="16,8",
        channel_mult="",
        dropout=0.0,
        class_cond=False,
        use_checkpoint=False,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_fp16=False,
        use_new_attention_order=False,
    )
    return model | diffusion_defaults() | _data_defaults()


def classifier_and_diffusion_defaults():
    """Flags of classifier training."""
    return _classifier_flags() | diffusion_defaults() | dict(classifier_channel_mult="") | _data_defaults()


def sr_model_and_diffusion_defaults():
    """Flags of super-resolution training and sampling: the image model's, with two sizes for one."""
    flags = model_and_diffusion_defaults()
    appended = {
        name: flags.pop(name) for name in ("channel_mult", "use_new_attention_order", *_data_defaults())
    }
    del flags["image_size"]
    return flags | dict(large_size=256, small_size=64) | appended


def training_defaults() -> dict:
    """Upstream's flags of image and super-resolution training."""
    return dict(
        data_dir="",
        schedule_sampler="uniform",
        lr=1e-4,
        weight_decay=0.0,
        lr_anneal_steps=0,
        batch_size=1,
        microbatch=-1,
        ema_rate="0.9999",
        log_interval=10,
        save_interval=10000,
        resume_checkpoint="",
        use_fp16=False,
        fp16_scale_growth=1e-3,
    )


def sampling_defaults() -> dict:
    """Upstream's flags of every script that samples."""
    return dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")


def mt_defaults() -> dict:
    """The flags that describe a joint model: ADM's, and those of its modalities."""
    flags = model_and_diffusion_defaults()
    del flags["class_cond"]  # a label is a modality
    return flags | dict(
        modalities="masked:U,label:U",
        aggregation="bump",
        detectability=4.0,
        presence=True,
        unshifted_probability=0.33,
        code_interval=0,
        single_task_probability=0.0,
        class_names="",
        label_from="auto",
    )


def mt_training_defaults() -> dict:
    """All flags of joint training: the model's, ADM's for training, and those that ADM does not have."""
    adm = training_defaults()
    del adm["use_fp16"]  # the model's; --precision fp16 sets it
    return (
        mt_defaults()
        | adm
        | dict(
            num_classes=0,
            missing="error",
            log_dir="",
            iterations=0,
            init_from="",
            ema_warmup=True,
            loss_weighting="none",
            p2_k=1.0,
            p2_gamma=1.0,
            min_snr_gamma=5.0,
            task_weighting="fixed",
            image_weight=1.0,
            task_intervals=1,
            train="all",
            seed=0,
            precision="auto",
            compile="auto",
            held_out=128,
            random_crop=False,
            random_flip=True,
            num_workers=2,
            max_bad=10,
            max_nonfinite=20,
            keep_checkpoints=2,
            adm_files=False,
            progress=True,
            sample_steps=25,
            val_data_dir="",
            eval_every=0,
            eval_judge="",
            eval_samples=500,
            wandb="",
        )
    )
