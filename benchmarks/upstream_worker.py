"""One loop of compare_upstream.py in a process of its own, by the `guided_diffusion` that is first on PYTHONPATH:
this project's, or upstream's, by the same calls.

Its argument is JSON. On standard input come numbers of units of work; the answer to each is the seconds that they took.
Nothing is saved.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch as th

REPLY = sys.stdout


def reply(value):
    """To the parent."""
    print(json.dumps(value), file=REPLY, flush=True)


def turns():
    """Yield for every unit of work that is asked for: it is done when the next one is taken."""
    for line in sys.stdin:
        started = time.perf_counter(), processor()
        yield from range(int(line))
        reply({"wall": time.perf_counter() - started[0], "processor": processor() - started[1]})


def processor():
    """Seconds of processors that this process and its data workers have used."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total, tick = time.process_time() + ended.ru_utime + ended.ru_stime, os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def images(case):
    """Pixels uint8 [b, 3, size, size]."""
    random = th.Generator().manual_seed(0)
    shape = (case["batch_size"], 3, case["image_size"], case["image_size"])
    return th.randint(256, shape, generator=random, dtype=th.uint8)


def network_flags(case):
    """The flags that both packages know."""
    return dict(
        image_size=case["image_size"],
        num_channels=case["num_channels"],
        num_res_blocks=2,
        channel_mult="1,2,2" if case["image_size"] > 8 else "1,2",
        attention_resolutions="16,8" if case["image_size"] > 8 else "4",
        num_heads=4,
        noise_schedule="cosine",
    )


def single_task(case, **more):
    """Upstream's network and diffusion."""
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **network_flags(case), **more})


def train(case):
    """Whole steps of TrainLoop.run_loop: loss, backward, optimizer, moving average, logging every tenth step."""
    from guided_diffusion import train_util

    batch = images(case)
    bf16 = case["precision"] == "bf16"
    options = dict(batch_size=case["batch_size"], microbatch=-1, lr=1e-4, ema_rate="0.9999")
    options |= dict(log_interval=10, save_interval=10**9, resume_checkpoint="")
    context = contextlib.nullcontext()
    if case["ours"]:
        options |= dict(seed=0, precision=case["precision"], adm_files="none")
    else:
        batch = batch.float() / 127.5 - 1
        context = th.autocast("cpu", dtype=th.bfloat16) if bf16 else context
    labels = th.arange(len(batch)) % max(case.get("num_classes", 1), 1)
    if case.get("modalities"):
        loop, share = joint_loop(case, options)
        cond = {"y": labels}
    else:
        model, diffusion = single_task(case)
        loop, cond, share = (
            train_util.TrainLoop(model=model, diffusion=diffusion, data=None, **options),
            {},
            0.0,
        )
    loop.save = lambda: None
    loop.data = ((batch, dict(cond)) for _ in turns())
    ready(share)
    with context:
        loop.run_loop()


def joint_loop(case, options):
    """(loop of a joint model, the share that encoding its labels anew adds to a step's time). Codes stay what they are
    while steps are timed: few of them would meet the refreshes of a run's beginning."""
    from guided_diffusion.flags import mt_defaults
    from guided_diffusion.mt.model import JointModel
    from guided_diffusion.mt.training import JointTrainLoop

    flags = {**mt_defaults(), **network_flags(case), "modalities": case["modalities"]}
    model = JointModel.from_flags({**flags, "num_classes": case.get("num_classes", 0)})
    loop = JointTrainLoop(model=model, data=None, **options)
    loop._refresh_codes = lambda like: None
    rows = sum(m.encoded_rows for m in model.modalities)
    return loop, rows / loop.code_interval / (3 * case["batch_size"])  # a step is three forward passes


def sample(case):
    """Whole batches of samples."""
    model, diffusion = single_task(case, timestep_respacing=case["steps"])
    model.eval()
    draw = diffusion.ddim_sample_loop if case["steps"].startswith("ddim") else diffusion.p_sample_loop
    shape = (case["batch_size"], 3, case["image_size"], case["image_size"])
    ready()
    for _ in turns():
        draw(model, shape, clip_denoised=True, model_kwargs={})


def load(case):
    """Batches of a folder or file."""
    from guided_diffusion.image_datasets import load_data

    options = dict(class_cond=True, batch_size=case["batch_size"], image_size=case["image_size"])
    batches = load_data(data_dir=case["data_dir"], **options)
    ready()
    for _ in turns():
        next(batches)


def ready(share=0.0):
    """Tell the parent whose code this is, and what is to be added to the times."""
    import guided_diffusion

    [folder] = guided_diffusion.__path__
    reply({"package": folder, "share": share, "threads": th.get_num_threads()})


def main():
    """Do what the argument says until standard input ends."""
    global REPLY
    REPLY = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the logs of both packages go elsewhere
    case = json.loads(sys.argv[1])
    from guided_diffusion import dist_util, logger

    with tempfile.TemporaryDirectory() as folder:
        logger.configure(dir=folder)
        dist_util.setup_dist()
        {"train": train, "sample": sample, "load": load}[case["kind"]](case)


if __name__ == "__main__":
    main()
