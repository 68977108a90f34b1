"""Train one U-Net on images and other modalities of them.

    python scripts/mt_image_train.py --data_dir images/ --modalities masked:X,label:U --log_dir runs/mine
    mpiexec -n 8 python scripts/mt_image_train.py --config mine.yaml --data_dir images/
    torchrun --nproc_per_node 8 scripts/mt_image_train.py --config mine.yaml --data_dir images/

Flags: ADM's, `--modalities` (names with their variant: masked, label; "" for single-task training),
`--aggregation` (bump, paper-normalized, constant, paper), and those below. `--config FILE.yaml` sets any of
them; the command line wins. --single_task_probability P learns the image alone beside the joint model, in
that share of the samples; --init_from RUN finetunes: with --modalities "" the generator alone, with --train
heads what reads the modalities off it alone. The same command continues a run that was stopped, bit for bit. --log_dir
receives checkpoint*.pt (complete), model*.pt, ema_*.pt, opt*.pt (as ADM writes them), config.yaml,
progress.csv, tb/ (TensorBoard) and samples*.png.
"""

import os

import numpy as np
import torch as th

from guided_diffusion import checkpoint_util, cli, dist_util, logger
from guided_diffusion.errors import UserError, UserValueError, exit_on_user_error
from guided_diffusion.figures import Row, contact_sheet, label_captions, to_uint8
from guided_diffusion.image_datasets import classes_of, hold_out, load_stream, open_dataset
from guided_diffusion.mt.modalities import wants_labels
from guided_diffusion.mt.model import (
    CONFIG_NAME,
    JointModel,
    config_of,
    initialise,
    mt_defaults,
    parse_flags,
    write_config,
)
from guided_diffusion.mt.sampling import random_labels
from guided_diffusion.mt.training import JointTrainLoop
from guided_diffusion.script_util import model_and_diffusion_defaults
from guided_diffusion.seeding import PerSample

GRID = 12  # samples drawn at every save


def defaults() -> dict:
    """All flags with their defaults: the model's, ADM's for training, and those that ADM does not have."""
    adm = cli.training_defaults()
    del adm["use_fp16"]  # the model's; --precision fp16 sets it
    return (
        mt_defaults()
        | adm
        | dict(
            num_classes=0,  # 0: as many as the data have
            log_dir="",  # "": $OPENAI_LOGDIR, or a temporary folder
            iterations=0,  # 0: until stopped
            init_from="",  # a run or checkpoint whose weights (and network's flags) this run begins with
            ema_warmup=True,  # averages soon forget the untrained start
            train="all",  # or heads: the U-Net keeps its weights
            seed=0,
            precision="auto",  # bf16 where the GPU has it, else fp32; or fp32, bf16, fp16
            compile="auto",  # on a GPU; or true, false
            held_out=128,  # images that measure the heads and are not trained on; at most a tenth of the data
            random_crop=False,
            random_flip=True,
            num_workers=2,
            max_bad=10,  # unreadable images before training stops
            max_nonfinite=20,  # steps skipped for NaN or infinity before training stops
            keep_checkpoints=2,
            progress=True,
            sample_steps=25,  # DPM-Solver++ steps of the image at every save; 0: none
        )
    )


@exit_on_user_error()
def main():
    flags = parse_flags(defaults(), description=__doc__)
    dist_util.setup_dist()
    logger.configure(dir=flags["log_dir"] or None, format_strs=log_formats())
    resume = flags["resume_checkpoint"] or (logger.get_dir() if flags["log_dir"] else "")
    if flags["init_from"]:
        network = {
            name: value for name, value in mt_defaults().items() if name in model_and_diffusion_defaults()
        }
        network.pop("num_classes")  # the data's
        flags = checkpoint_util.with_flags_of(checkpoint_of(resume) or flags["init_from"], flags, network)
    flags = complete(flags)
    before = config_before(resume)
    dataset = open_dataset(
        flags["data_dir"],
        flags["image_size"],
        class_cond=wants_labels(flags["modalities"]),
        random_crop=flags["random_crop"],
        random_flip=flags["random_flip"],
        image_channels=flags["image_channels"],
        max_bad=flags["max_bad"],
        num_classes=flags["num_classes"],
        **classes_known(flags, before),
    )
    if dataset.class_names:
        flags |= {"class_names": dataset.class_names, "label_from": dataset.label_from}
        flags["num_classes"] = flags["num_classes"] or len(dataset.class_names)
        cli.check_classes(dataset.class_names, flags["num_classes"])
    dataset, held_out = hold_out(dataset, min(flags["held_out"], len(dataset) // 10), flags["seed"])
    check_same_model(flags, before, resume)
    th.manual_seed(flags["seed"])  # the same fresh weights everywhere
    model = JointModel.from_flags(flags)
    prepare(model, flags, begun=bool(checkpoint_of(resume)))
    for m in model.modalities:
        if m.data_key != "y" and m.derive is None:
            raise UserValueError(
                f"modality {m.name}: the data bring images and labels only, no {m.kind} beside them"
            )
    describe(model, len(dataset), len(held_out[0]))

    device = dist_util.dev()
    model.network.to(device)
    if device.type == "cuda":
        model.network.to(memory_format=th.channels_last)
    images, cond = held_out
    training = JointTrainLoop(
        held_out=(images.to(device), {key: value.to(device) for key, value in cond.items()}),
        model=model,
        data=lambda step: load_stream(
            dataset, flags["batch_size"], flags["seed"], start_step=step, num_workers=flags["num_workers"]
        ),
        resume_checkpoint=resume,
        schedule_sampler=cli.schedule_sampler(flags["schedule_sampler"], model.diffusion),
        compile=flags["compile"] == "true",
        config=flags,
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
    if dist_util.get_rank() == 0 and not training.is_finished():
        write_config(flags, os.path.join(logger.get_dir(), CONFIG_NAME))
    training.run_loop()


def log_formats() -> list[str] | None:
    """ADM's, and TensorBoard on rank 0, unless the environment chooses; None for the logger's own choice."""
    if "OPENAI_LOG_FORMAT" in os.environ or logger.get_rank_without_mpi_import() > 0:
        return None
    return ["stdout", "log", "csv", "tensorboard"]


def complete(flags: dict) -> dict:
    """The flags with everything decided that was left to the data or the machine."""
    flags = dict(flags)
    if not flags["data_dir"]:
        raise UserValueError("give --data_dir: a folder of images or an .npz file")
    if not wants_labels(flags["modalities"]):
        flags["num_classes"] = 0
    on_gpu = dist_util.dev().type == "cuda"
    if flags["aggregation"] == "paper" and flags["precision"] in ("bf16", "fp16"):
        raise UserValueError(
            "aggregation paper makes the shift so large that half precision rounds the noise away: use --precision fp32"
        )
    if flags["use_fp16"]:
        flags["precision"] = "fp16"
    if flags["precision"] == "auto":
        half = on_gpu and th.cuda.is_bf16_supported() and flags["aggregation"] != "paper"
        flags["precision"] = "bf16" if half else "fp32"
    if flags["compile"] == "auto":
        flags["compile"] = "true" if on_gpu else "false"
    if flags["compile"] not in ("true", "false"):
        raise UserValueError(f"compile must be auto, true or false, not {flags['compile']!r}")
    return flags


def config_before(resume: str) -> dict | None:
    """The configuration of the run that is continued, None where it begins."""
    path = checkpoint_of(resume)
    named = os.path.basename(path).startswith("checkpoint")
    return checkpoint_util.load_complete(path)["config"] if named else None


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
    if flags["train"] not in ("all", "heads"):
        raise UserValueError(f"train must be all or heads, not {flags['train']!r}")
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
        sample = model.sample(random, steps, given=given, sampler="dpm++")
    loop.model.train()
    rows = [Row("image", to_uint8(sample.images), _captions(model, sample.values))]
    rows += [
        Row(m.name, to_uint8(sample.values[m.name]))
        for m in model.modalities
        if m.kind == "image" and m.name in sample.values
    ]
    sheet = contact_sheet(rows)
    number = loop.step + loop.resume_step
    sheet.save(os.path.join(logger.get_dir(), f"samples{number:06d}.png"))
    for log in logger.get_current().output_formats:
        if isinstance(log, logger.TensorBoardOutputFormat):
            log.writer.add_image("samples", np.asarray(sheet), number, dataformats="HWC")


def _captions(model, values):
    labels = [values[m.name].argmax(dim=1).tolist() for m in model.modalities if m.kind == "label"]
    return label_captions(labels, model.class_names)


if __name__ == "__main__":
    main()
