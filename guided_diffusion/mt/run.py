"""What the programs of joint models do once their flags are read: train, sample in any direction, measure the bound."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch as th
from PIL import Image

from .. import checkpoint_util, cli, dist_util, logger
from ..errors import UserError, UserValueError
from ..execution import Execution
from ..figures import Row, contact_sheet, is_frame, label_captions, save_film, to_uint8
from ..flags import FEW_SAMPLER, FEW_STEPS, model_and_diffusion_defaults, mt_defaults
from ..image_datasets import SquareImages, classes_of, hold_out, load_stream, open_dataset
from ..image_files import are_numbers, list_labelled_images, open_arrays
from ..sample_shards import Shards, fingerprint
from ..seeding import PerSample
from ..train_util import resumed_checkpoint
from . import directions
from .data import JointImages, Source, borne, completed, covers, find_source, label_names
from .evaluation import held_out_losses, judged_samples
from .files import GivenImages, read_images
from .guidance import ClassGuidance, classifier_guide
from .modalities import Modality, as_mapping, label_in, one_hot, parse_modalities, wants_labels
from .modality_set import batch_of
from .model import CONFIG_NAME, FORMER, JointModel, config_of, initialise, write_config
from .sampling import Known, random_labels
from .training import JointTrainLoop
from .weighting import PLAIN, Weighting

GRID = 12  # samples drawn at every save of a training
SHEET = 16  # samples in the sheet of a sampling
_SHOWN, _CAPTIONS = "@shown ", "@captions"  # of the sheet's samples, in shards
FILMED, FILM_TILE = 8, 96  # samples in a film, and pixels of one

# Told of a step of sampling: its number from 1, their count, the predicted images [B, C, H, W] and modalities by name.
Watch = Callable[[int, int, th.Tensor, dict[str, th.Tensor]], None]
NEEDS_FULL = "aggregation paper makes the shift so large that half precision rounds the noise away: use --precision fp32"

# ----------------------------------------------------------------------------------------------------------- training


def train(flags: dict, open_judge: Callable | None = None) -> None:
    """Train a joint model with the flags of `flags.mt_training_defaults`. open_judge(source, device, class_names) -> a
    Judge of evaluation.py: what reads --eval_judge."""
    if not flags["data_dir"]:
        raise UserValueError("give --data_dir: a folder of images or an .npz file")
    dist_util.setup_dist()
    cli.open_log(flags["log_dir"], "mt_image_train", log_formats())
    resume = flags["resume_checkpoint"] or (logger.get_dir() if flags["log_dir"] else "")
    resume = checkpoint_of(resume) or resume  # looked for once: that reads the whole file to check it
    if flags["init_from"]:
        network = {
            name: value for name, value in mt_defaults().items() if name in model_and_diffusion_defaults()
        }
        network.pop("num_classes")  # the data's
        began = checkpoint_of(resume) or flags["init_from"]
        flags = checkpoint_util.with_flags_of(began, flags, network, getattr(flags, "typed", ()))
    before = config_before(resume)
    if before is not None:  # flags that did not exist when it began
        flags |= {name: value for name, value in FORMER.items() if name not in before}
    source, flags["modalities"] = source_of(flags, before)
    flags = complete(flags)
    labelled = wants_labels(flags["modalities"])
    try:
        known = classes_known(flags, before) if labelled else {}
        dataset = open_data(flags, source, known, **{name: flags[name] for name in _AUGMENTATION})
    except UserValueError as error:
        if "labels" not in str(error) or not labelled:
            raise
        raise UserValueError(f"{error}; or leave the label out of --modalities, as in masked:U") from None
    if source is not None and before is None:
        dataset.check(directions.own_share(len(dataset)))
    if dataset.class_names:
        flags |= {"class_names": dataset.class_names, "label_from": dataset.label_from}
        flags["num_classes"] = flags["num_classes"] or len(dataset.class_names)
        begun = before is not None or bool(flags["init_from"])
        cli.check_classes(dataset.class_names, flags["num_classes"], fixed=begun)
    dataset, held_out = hold_out(dataset, min(flags["held_out"], len(dataset) // 10), flags["seed"])
    cli.check_batch(len(dataset), flags["batch_size"])
    check_same_model(flags, before, resume)
    th.manual_seed(flags["seed"])  # the same fresh weights everywhere
    model = JointModel.from_flags(flags)
    prepare(model, flags, begun=bool(checkpoint_of(resume)))
    describe(model, len(dataset), len(held_out[0]))

    device = dist_util.dev()
    model.network.to(device)
    if device.type == "cuda":
        model.network.to(memory_format=th.channels_last)
    images, cond = held_out
    plain = all(flags[name] == value for name, value in PLAIN.items())
    training = JointTrainLoop(
        weighting=None if plain else Weighting(model.modalities, model.diffusion, flags),
        eval_every=flags["eval_every"],
        on_eval=evaluation_of(flags, model, source, held_out, open_judge) if flags["eval_every"] else None,
        held_out=(images.to(device), {key: value.to(device) for key, value in cond.items()}),
        model=model,
        data=lambda step: load_stream(
            dataset, flags["batch_size"], flags["seed"], start_step=step, num_workers=flags["num_workers"]
        ),
        resume_checkpoint=resume,
        schedule_sampler=cli.schedule_sampler(flags["schedule_sampler"], model.diffusion),
        compile=flags["compile"] == "true",
        config=flags,
        adm_files="pruned" if flags["adm_files"] else "none",
        on_save=lambda loop: draw_samples(loop, model, flags),
        **{
            name: flags[name]
            for name in (
                "batch_size",
                "microbatch",
                "lr",
                "ema_rate",
                "log_interval",
                "save_interval",
                "fp16_scale_growth",
                "weight_decay",
                "lr_anneal_steps",
                "iterations",
                "seed",
                "precision",
                "max_nonfinite",
                "progress",
                "keep_checkpoints",
                "ema_warmup",
            )
        },
    )
    if not training.is_finished():
        logger.log_config(flags, flags["wandb"])
        if dist_util.get_rank() == 0:
            write_config(flags, os.path.join(logger.get_dir(), CONFIG_NAME))
    training.run_loop()


def evaluation_of(
    flags: Mapping, model: JointModel, source, held_out, open_judge: Callable | None
) -> Callable:
    """What measures the model during training, by --val_data_dir or the images `held_out`. UserError, before training,
    where there are none."""
    if flags["val_data_dir"]:
        known = {"class_names": list(flags["class_names"]) or None, "label_from": flags["label_from"]}
        if source is not None:
            source, _ = source_of({**flags, "data_dir": flags["val_data_dir"]}, flags)
        still = dict(random_crop=False, random_flip=False, max_bad=flags["max_bad"])
        dataset = open_data({**flags, "data_dir": flags["val_data_dir"]}, source, known, **still)
        _, held_out = hold_out(dataset, min(flags["eval_samples"], len(dataset)), flags["seed"])
    device, (images, cond) = dist_util.dev(), held_out
    if not len(images):
        raise UserValueError("--eval_every: no image is held out: give --val_data_dir, or --held_out above 0")
    images, cond = images.to(device), {name: value.to(device) for name, value in cond.items()}
    judge, pixels = None, exact_pixels(images)
    if flags["eval_judge"]:
        if open_judge is None:
            raise UserValueError("--eval_judge: this program brings no judge")
        judge = open_judge(flags["eval_judge"], device, list(flags["class_names"]) or None)

    def measure(loop: JointTrainLoop) -> dict[str, float]:
        found = held_out_losses(model, images, cond, flags["seed"]) if loop.rank == 0 else {}
        if judge is not None:
            steps = flags["sample_steps"] or 25
            found |= judged_samples(model, pixels, judge, flags["eval_samples"], steps, flags["seed"])
        return found

    return measure


def exact_pixels(images: th.Tensor) -> np.ndarray:
    """Images of data [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C], as they were."""
    return to_uint8(images, th.ones(1, 1, 1, 1, dtype=th.bool))


_AUGMENTATION = ("random_crop", "random_flip", "max_bad")


def source_of(flags: Mapping, before: Mapping | None = None) -> tuple[Source | None, str | dict]:
    """(what the data are read from, the modalities completed by it); (None, as they were) for a plain folder of images
    or .npz. before: the configuration of the run that is continued, whose modalities hold."""
    spec = as_mapping(flags["modalities"])
    label, names = label_in(spec), borne(spec)
    source = find_source(flags["data_dir"], names, flags["missing"], label)
    if before is not None and covers(as_mapping(before.get("modalities", "")), spec):
        return source, before["modalities"]
    if source is None:
        return None, flags["modalities"]
    told = completed(spec, source, label)
    return source, told if told != spec else flags["modalities"]


def open_data(flags: Mapping, source: Source | None, classes: Mapping, **options) -> SquareImages:
    """The data set at flags["data_dir"], of which `source` may be known. classes: class_names and label_from, where they
    are known; options: random_crop, random_flip and max_bad."""
    spec, size, channels = flags["modalities"], flags["image_size"], flags["image_channels"]
    labelled = wants_labels(spec)
    if source is None:
        more = dict(num_classes=flags["num_classes"], **classes)
        return open_dataset(
            flags["data_dir"], size, class_cond=labelled, image_channels=channels, **more, **options
        )
    spec, names = as_mapping(spec), []
    if labelled:
        label = label_in(spec)
        names = classes.get("class_names") or label_names(source, label, spec[label])
    members = parse_modalities(spec, (channels, size, size), len(names) or None, embedded=True)
    members = [m for m in members if m.name in borne(spec)]
    return JointImages(
        source, members, size, image_channels=channels, missing=flags["missing"], class_names=names, **options
    )


def data_of(model: JointModel, path: str, missing: str = "error", label_from: str = "auto") -> SquareImages:
    """Data at `path` as the model was trained on, neither cropped nor flipped at random."""
    spec = as_mapping(model.flags["modalities"])
    source = find_source(path, borne(spec), missing, label_in(spec))
    flags = {**model.flags, "data_dir": path, "missing": missing}
    return open_data(flags, source, classes_of(model.flags, label_from), random_flip=False)


def log_formats() -> list[str] | None:
    """ADM's, and TensorBoard on rank 0, unless the environment chooses; None for the logger's own choice."""
    if "OPENAI_LOG_FORMAT" in os.environ or logger.get_rank_without_mpi_import() > 0:
        return None
    return ["stdout", "log", "csv", "tensorboard"]


def complete(flags: dict) -> dict:
    """The flags with everything decided that was left to the data or the machine."""
    flags = dict(flags)
    if not wants_labels(flags["modalities"]):
        flags["num_classes"] = 0
    on_gpu = dist_util.dev().type == "cuda"
    if flags["aggregation"] == "paper" and flags["precision"] in ("bf16", "fp16"):
        raise UserValueError(NEEDS_FULL)
    if flags["use_fp16"]:
        if flags["precision"] not in ("auto", "fp16"):
            raise UserValueError(
                f"--use_fp16 True contradicts --precision {flags['precision']}: give one of the two"
            )
        flags["precision"] = "fp16"
    if flags["task_weighting"] == "pcgrad":
        for name, value in (("precision", "fp16"), ("compile", "true"), ("use_checkpoint", True)):
            if flags[name] == value:
                raise UserValueError(
                    f"--task_weighting pcgrad goes back once for every task: not with --{name} {value}"
                )
        flags["compile"] = "false"
    if flags["precision"] == "auto":
        half = on_gpu and th.cuda.is_bf16_supported() and flags["aggregation"] != "paper"
        flags["precision"] = "bf16" if half else "fp32"
    if flags["compile"] == "auto":
        flags["compile"] = "true" if on_gpu else "false"
    return flags


def config_before(resume: str) -> dict | None:
    """The configuration of the run that is continued, None where it begins."""
    path = resumed_checkpoint(resume)
    return checkpoint_util.load_complete(path)["config"] if path else None


def classes_known(flags: dict, before: dict | None) -> dict:
    """What `open_dataset` is told of the classes: those of the run that is continued or begun with, or the user's."""
    if before is None and flags["init_from"]:
        before = config_of(flags["init_from"])
    if before is not None and wants_labels(before.get("modalities", "")):
        return classes_of(before, flags["label_from"])
    names = flags["class_names"].split(",") if isinstance(flags["class_names"], str) else flags["class_names"]
    return {"class_names": [n for n in names if n] or None, "label_from": flags["label_from"]}


def check_same_model(flags: dict, before: dict | None, resume: str) -> None:
    """UserError if the run to resume trained another model, or with other random numbers."""
    if before is None:
        return
    fixed = [*mt_defaults(), "seed", "held_out", "init_from", "train"]
    changed = [
        name for name in fixed if before.get(name, flags[name]) != flags[name] and name != "label_from"
    ]
    if changed:
        was = ", ".join(f"{name} was {before[name]!r} and is now {flags[name]!r}" for name in changed)
        raise UserError(
            f"{checkpoint_of(resume)} belongs to another model: {was}. Use another --log_dir, or the former flags"
        )


def checkpoint_of(resume: str) -> str:
    """The file that the run continues from, "" where it begins."""
    return checkpoint_util.find_complete_checkpoint(resume) or "" if os.path.isdir(resume) else resume


def prepare(model: JointModel, flags: dict, begun: bool) -> None:
    """Weights from another run, unless this one has `begun`, and which of them are trained."""
    if flags["init_from"] and not begun:
        fresh, left = initialise(model.network, flags["init_from"])
        logger.log(
            f"weights of {flags['init_from']}; new: {', '.join(fresh) or 'none'}; "
            f"left out: {', '.join(left) or 'none'}"
        )
    if flags["train"] == "heads":
        if not any(m.head != "none" for m in model.modalities):
            raise UserValueError("--train heads: this model has no heads")
        if flags["weight_decay"]:
            raise UserValueError("--train heads: weight_decay would change the U-Net, which is to stay")
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(name.startswith("heads."))


def describe(model: JointModel, images: int, held_out: int) -> None:
    """Log the sizes, and for every modality how far its shift may carry an error of its prediction."""
    weights = sum(p.numel() for p in model.network.parameters())
    logger.log(f"{weights / 1e6:.2f} M parameters, {images} images, {held_out} held out")
    if report := model.report():
        logger.log(report)


def draw_samples(loop: JointTrainLoop, model: JointModel, flags: dict) -> None:
    """Joint samples of the averaged weights, by rank 0: samplesNNNNNN.png beside the checkpoint of that
    number, and in TensorBoard."""
    if not flags["sample_steps"] or dist_util.get_rank() != 0:
        return
    steps = min(flags["sample_steps"], model.diffusion.num_timesteps)
    loop.model.eval()
    with loop.ema_weights():
        random = PerSample.derived(flags["seed"], range(GRID), dist_util.dev())
        given = random_labels(model.modalities, random)
        drawn = model.sample(random, steps, given=given, sampler=FEW_SAMPLER)
    loop.model.train()
    rows = [Row("image", to_uint8(drawn.images), _captions(model, drawn.values))]
    shown = {m.name: m.pixels(drawn.values[m.name]) for m in model.modalities if m.name in drawn.values}
    rows += [Row(name, pixels) for name, pixels in shown.items() if pixels is not None]
    sheet = contact_sheet(rows)
    number = loop.step + loop.resume_step
    sheet.save(os.path.join(logger.get_dir(), f"samples{number:06d}.png"))
    for log in logger.get_current().output_formats:
        if isinstance(log, logger.TensorBoardOutputFormat):
            log.writer.add_image("samples/joint", np.asarray(sheet), number, dataformats="HWC")


def names_of_classes(model: JointModel, label: Modality) -> Sequence[str]:
    """The names of a label's classes, () where they have none."""
    return model.class_names if label.data_key == "y" else label.class_names


def _captions(model, values):
    """The most probable labels among `values` [N, ...], by name."""
    rows = []
    for m in model.modalities:
        if m.name in values and (classes := m.classes(values[m.name])) is not None:
            rows.append(label_captions([classes.tolist()], names_of_classes(model, m)))
    return [" ".join(words) for words in zip(*rows, strict=True)]


# ----------------------------------------------------------------------------------------------------------- sampling


def sample(args) -> None:
    """Sample a joint model with the flags of mt_image_sample.py."""
    dist_util.setup_dist()
    cli.open_log(args.log_dir, "mt_image_sample")
    model = JointModel.load(args.model_path, args.weights)
    args.sampler = args.sampler or ("ddpm" if args.resample > 1 else FEW_SAMPLER)
    if not args.steps and args.sampler != "ddpm":
        args.steps = str(min(FEW_STEPS, model.diffusion.num_timesteps))
    if max(args.times) >= model.diffusion.num_timesteps:
        raise UserValueError(f"--times must be below {model.diffusion.num_timesteps}, not {max(args.times)}")
    execution = execution_of(args, model)
    execution.prepare(model.network.to(dist_util.dev()))
    guidance = ClassGuidance.from_flags(vars(args), model)
    if guidance is not None and guidance.classifier is not None:
        execution.prepare(guidance.classifier)
    given, holes, drawn = read_given(args.given, model, guidance)
    absent = directions.names_without(args.without, model.modalities.names)
    if both := sorted({*given, *drawn} & set(absent)):
        raise UserValueError(f"--without {both[0]}, but it is given: say one of the two")
    if args.resample > 1 and not ("image" in holes or holes and args.replace_known):
        raise UserValueError(
            "--resample goes over known pixels again: give some of an image, with --replace_known"
        )
    names = ["image", *(m.name for m in model.modalities if m.head != "none" and m.name not in absent)]
    wanted = directions.names_wanted(args.want, names, given, in_part=holes)
    count = args.num_samples or (len(next(iter(given.values()))) if given else 16)
    logger.log(f"sampling {count}, given {', '.join(given) or 'nothing'}, wanted {', '.join(wanted)}")
    shards = Shards(logger.get_dir(), samples_depend_on(args, model, execution, guidance, given, holes))
    left = shards.missing(directions.own_share(count))
    for numbers in directions.batches(left, args.batch_size):
        # What is given is repeated in turn until there is enough.
        part, part_holes = (
            {name: value[th.tensor(numbers) % len(value)].to(dist_util.dev()) for name, value in some.items()}
            for some in (given, holes)
        )
        film = Film(args.film, model, given) if args.film and numbers[0] == 0 else None
        with execution.running():
            made = sample_batch(args, model, guidance, absent, drawn, dict(part), part_holes, numbers, film)
        if film is not None:
            film.save()
        kept = {"image", "classes", *wanted, *given}
        made = {name: value.float().cpu() for name, value in made.items() if name in kept}
        part_holes = {name: where.cpu() for name, where in part_holes.items()}
        shards.add(numbers, stored(made, given, part_holes, wanted, model, sheet=numbers[0] < SHEET))
    # Evaluations tell by them which number is which.
    told = {"class_names": model.class_names}
    told |= {
        f"{m.name}_class_names": getattr(m, "class_names", None)
        for m in model.modalities
        if m.name in (*wanted, *given)
    }
    told = {name: np.array(names) for name, names in told.items() if names and not are_numbers(names)}
    shards.join(count, cli.samples_path, told)
    if dist_util.get_rank() == 0:
        draw_sheet(shards, count, given, holes, model, true_values(args.given, model, {*wanted} - {*given}))
    shards.remove()


def execution_of(args, model: JointModel) -> Execution:
    """How the network runs. UserValueError where the model needs float32."""
    full = model.flags["aggregation"] == "paper" and len(model.modalities) > 0
    if full and args.precision in ("bf16", "fp16"):
        raise UserValueError(NEEDS_FULL)
    return Execution.from_flags(vars(args), dist_util.dev(), full=full)


def samples_depend_on(args, model, execution, guidance, given, holes) -> dict:
    """What makes samples what they are, in plain values: shards of others are not continued."""
    kept = {
        name: value
        for name, value in vars(args).items()
        if name not in (*cli.NOT_OF_SAMPLES, "batch_size", "film")
    }
    networks = [model.network, *([guidance.classifier] if guidance and guidance.classifier else [])]
    made_of = [fingerprint(values) for values in (*networks, given, holes)]
    return {**kept, "execution": vars(execution), "from": made_of, "aggregation": model.flags["aggregation"]}


def read_given(
    specs: list[str], model: JointModel, guidance: ClassGuidance | None
) -> tuple[dict[str, th.Tensor], dict[str, th.Tensor], set[str]]:
    """(values by name [N, ...], known pixels by name bool [N, 1, H, W], labels to draw) of --given NAME=FILE."""
    modalities: dict[str, Modality] = {m.name: m for m in model.modalities}
    if guidance is not None:
        modalities[guidance.target.name] = guidance.target
    values, known, drawn = {}, {}, set()
    for name, source in directions.sources_given(specs, ["image", *modalities]).items():
        modality = modalities.get(name)
        if source == directions.RANDOM:
            if name not in model.modalities:
                raise UserValueError(
                    f"--given {name}=random: only a label of the model can be drawn at random"
                )
            modality.draw(PerSample([0]))  # refuses where that cannot be
            drawn.add(name)
        else:
            if modality is None:
                read = read_images(source, *model.shape[:2])
            else:
                read = modality.read(source, model.shape, model.class_names)
            values[name], where = (read.values, read.known) if isinstance(read, GivenImages) else (read, None)
            if where is not None:
                known[name] = where
                if modality is not None and modality.derive is None:
                    raise UserValueError(
                        f"--given {name}={source}: pixels are missing, which only image and masked images may have"
                    )
    return values, known, drawn


def sample_batch(
    args,
    model: JointModel,
    guidance: ClassGuidance | None,
    absent: list[str],
    drawn: set[str],
    given: dict,
    holes: dict,
    indices: list[int],
    watch: Watch | None = None,
) -> dict[str, th.Tensor]:
    """Images and modalities [b, ...] of the samples with the given indices; `classes` [b], where they were
    drawn or guided to. watch: see `Watch`."""
    random = PerSample.derived(args.seed, indices, dist_util.dev())
    if "image" in given and "image" not in holes:
        if guidance is not None or args.guidance_scale != 1 or absent:
            raise UserValueError("the image is given: there is nothing to guide, and nothing to leave out")
        images = given.pop("image")
        values = model.predict(images, given, times=args.times, random=random)
        return {"image": images, **values}
    known = None
    for name, where in holes.items():
        every_step = args.replace_known or name == "image"
        known = Known(given[name], where, every_step, args.resample)
    given.pop("image", None)
    strength = {m.name: args.strength for m in model.modalities}
    cond_fn, extra = None, {}
    if guidance is not None:
        target, label = guidance.target.name, guidance.choose(given, random)
        extra["classes"] = label.argmax(dim=1)
        given.pop(target, None) if target not in model.modalities.names else None
        if guidance.classifier is None:
            given[target], strength[target] = label, guidance.scale
        else:
            cond_fn = classifier_guide(guidance.classifier, extra["classes"], guidance.scale)
            if target in model.modalities.names and guidance.target.as_input:
                given[target] = label  # as in ADM, network and classifier are told the same
    names = drawn | {m.name for m in model.modalities if m.required and m.drawable}
    for name, label in random_labels(model.modalities, random, names - {*given, *absent}).items():
        given[name], extra["classes"] = label, label.argmax(dim=1)
    result = model.sample(
        random,
        args.steps,
        given=given,
        strength=strength,
        known=known,
        sampler=args.sampler,
        order=args.order,
        clip_denoised=args.clip_denoised,
        cond_fn=cond_fn,
        guidance=args.guidance_scale,
        absent=absent,
        progress=dist_util.get_rank() == 0,
        on_step=watch and stepwise(watch, model.respaced(args.steps).num_timesteps, known),
    )
    return {"image": result.images, **result.values, **extra}


def stepwise(watch: Watch, total: int, known: Known | None = None) -> Callable[[int, dict], None]:
    """`watch` as `on_step` of `joint_sample`, known pixels in their place."""

    def on_step(k, out):
        if k >= 0:
            images = out["pred_xstart"]
            if known is not None:
                images = th.where(known.where, known.values, images)
            watch(k + 1, total, images, dict(out["joint"].values) if "joint" in out else {})

    return on_step


def mark_of(name: str, given: Collection[str], holes: Collection[str] = ()) -> str:
    """How a sheet marks the row of `name`; what has holes is generated there."""
    return "given" if name in given and name not in holes else "generated"


class Film:
    """The denoising of the first FILMED samples: at each of its steps the predicted image above the modalities'
    estimates. An object of it is a `Watch`."""

    def __init__(self, path: str, model: JointModel, given: Collection[str] = ()):
        self.path, self.model, self.given, self.frames = path, model, given, []

    def __call__(self, done: int, total: int, images: th.Tensor, values: dict) -> None:
        if is_frame(done, total):
            self.frames.append(self.frame(images, values, f"step {done} of {total}"))

    def frame(self, images: th.Tensor, values: dict, title: str) -> Image.Image:
        """One image of the film."""
        images, values = (
            images[:FILMED].float().cpu(),
            {n: v[:FILMED].float().cpu() for n, v in values.items()},
        )
        told = label_chances(self.model, values)
        rows = [Row(f"image, {title}", to_uint8(images.clamp(-1, 1)), told, "generated")]
        for m in self.model.modalities:
            pixels = m.pixels(values[m.name]) if m.name in values else None
            if pixels is not None:
                rows.append(Row(m.name, pixels, mark=mark_of(m.name, self.given)))
        return contact_sheet(rows, tile=FILM_TILE)

    def save(self) -> None:
        """Write the film. UserValueError where nothing was denoised."""
        if not self.frames:
            raise UserValueError("--film: the image is given, and nothing is denoised")
        save_film(self.frames, self.path)
        logger.log(f"saved {self.path}, {len(self.frames)} frames")


def label_chances(model: JointModel, values: dict) -> list[str]:
    """The likeliest class of every label with its probability, as captions [N]; [] where there is no label."""
    told = []
    for m in model.modalities:
        if m.name in values and m.classes(values[m.name]) is not None:
            chance, number = values[m.name].max(dim=1)
            names = label_captions([number.tolist()], names_of_classes(model, m))
            told.append([f"{name} {part:.0%}" for name, part in zip(names, chance.tolist(), strict=True)])
    return [" ".join(parts) for parts in zip(*told, strict=True)]


def stored(
    arrays: dict[str, th.Tensor], given: dict, holes: dict, wanted: list[str], model: JointModel, sheet: bool
) -> dict[str, np.ndarray]:
    """A batch of samples as it is written, by name: images as uint8 [b, H, W, C], the image as arr_0, drawn classes as
    arr_1 [b]. sheet: with what `draw_sheet` shows. UserError where they are not finite."""
    bad = [name for name in wanted if not bool(arrays[name].isfinite().all())]
    if bad:
        raise UserError(f"the samples of {', '.join(bad)} are not finite: the model or the sampler diverged")
    exact = {name: holes.get(name, th.ones(1, 1, 1, 1, dtype=th.bool)) for name in given}
    if holes:  # known pixels of a masked image are the image's
        exact["image"] = list(holes.values())[-1]
    made = {}
    for name in ["image", *model.modalities.names]:
        if name not in arrays:
            continue
        known, value = exact.get(name), arrays[name]
        if name == "image":
            pixels = made["arr_0"] = to_uint8(value, known)
        else:
            m = model.modalities[name]
            pixels, made[name] = m.pixels(value, known), m.stored(value, known)
        if sheet and pixels is not None:
            made[_SHOWN + name] = pixels
    if sheet and (captions := _captions(model, arrays)):
        made[_CAPTIONS] = np.array(captions)
    if "classes" in arrays:
        made["arr_1"] = arrays["classes"].numpy().astype(np.int64)  # ADM's name for the labels
    return made | {f"{name}_known": where[:, 0].numpy() for name, where in holes.items()}


def true_values(specs: list[str], model: JointModel, names: Collection[str]) -> dict[str, th.Tensor]:
    """The true values [N, ...] of the modalities `names`, where a source of --given has them beside what is given: an
    .npz by their names (labels also as in data), a folder of images by its classes."""
    found: dict[str, th.Tensor] = {}
    for source in directions.sources_given(specs, ["image", *model.modalities.names]).values():
        for m in (m for m in model.modalities if m.name in names):
            try:
                own = m.data_key == "y"
                if own and os.path.isdir(source):
                    known = list_labelled_images(source, class_names=model.class_names or None)
                    if max(known.labels) < m.shape[0]:
                        found[m.name] = one_hot(th.tensor(known.labels), m.shape[0])
                elif source.endswith(".npz"):
                    with open_arrays(source) as arrays:
                        there = m.name in arrays or own and "labels" in arrays
                    if there:
                        found[m.name] = m.read(source, model.shape, model.class_names)
            except UserError:  # no truth that this model knows: the samples need none
                continue
    return found


def draw_sheet(
    shards: Shards, count: int, given: dict, holes: dict, model: JointModel, truth: Mapping[str, th.Tensor]
) -> None:
    """samples.png in the log's folder, of the first ones of `count` samples; below them what is true."""
    count = min(SHEET, count)
    names = shards.names()
    captions = [str(row) for row in shards.rows(_CAPTIONS, count)] if _CAPTIONS in names else []
    rows = [
        Row(name, np.stack(list(shards.rows(_SHOWN + name, count))), captions, mark_of(name, given, holes))
        for name in (name.removeprefix(_SHOWN) for name in names if name.startswith(_SHOWN))
    ]
    truth = {name: value[th.arange(count) % len(value)] for name, value in truth.items()}
    shown = {name: model.modalities[name].pixels(value) for name, value in truth.items()}
    rows += [Row(name, pixels, mark="true") for name, pixels in shown.items() if pixels is not None]
    if told := _captions(model, truth):
        rows.append(Row("labels", rows[0].images, told, "true"))
    sheet = os.path.join(logger.get_dir(), "samples.png")
    contact_sheet(rows).save(sheet)
    logger.log(f"saved {sheet}")


# ---------------------------------------------------------------------------------------------------------- the bound


def measure_bound(args) -> None:
    """The bound of a joint model with the flags of mt_image_nll.py."""
    dist_util.setup_dist()
    cli.open_log(args.log_dir, "mt_image_nll")
    model = JointModel.load(args.model_path, args.weights)
    model.network.to(dist_util.dev())
    dataset = data_of(model, args.data_dir, args.missing, args.label_from)
    count = min(args.num_samples, len(dataset))
    own, rows = directions.own_share(count), {}
    for numbers in directions.batches(own, args.batch_size):
        directions.store(rows, numbers, bound_of(dataset, numbers, model, args))
        logger.log(f"{len(rows['total'])} of {len(own)} images")
    terms = directions.gathered(rows)
    if dist_util.get_rank() == 0:
        path = os.path.join(logger.get_dir(), "nll.npz")
        np.savez(path, **terms)
        for name, values in terms.items():
            # L1 is a sum over timesteps, L2 a mean.
            by_image = values.sum(axis=1) if name == "L1" else values
            logger.log(f"{name}: {by_image.mean():.5f} bits per dimension")
        logger.log(f"{count} images, {terms['L1'].shape[1]} steps, saved to {path}")


def bound_of(dataset, indices, model: JointModel, args) -> dict[str, th.Tensor]:
    """Every term [b] or [b, T] for the images with these indices."""
    items = [dataset[index] for index in indices]
    images = th.stack([th.from_numpy(image) for image, _ in items]).to(dist_util.dev())
    cond = {
        key: th.stack([th.from_numpy(extra[key]) for _, extra in items]).to(dist_util.dev())
        for key in items[0][1]
    }
    random = PerSample.derived(args.seed, indices, dist_util.dev())
    batch = model.derived(images, batch_of(model.modalities, cond), random)
    bound = model.bound(batch, args.steps, clip_denoised=args.clip_denoised, random=random)
    terms = {"L0": bound.L0, "L1": bound.L1}
    terms |= {f"L2_{name}": values for name, values in bound.L2.items()}
    return terms | {"L3": bound.L3, "total": bound.total}
