"""The training engine (upstream: guided_diffusion/train_util.py).

`TrainLoop` has upstream's constructor, methods, files and logged values. Beyond that it synchronises gradients on every
backend, writes complete checkpoints from which training continues bit for bit, skips steps with non-finite numbers, and
stops cleanly on SIGTERM or Ctrl-C. Another objective is a subclass that overrides `compute_losses`.
"""

import contextlib
import copy
import inspect
import math
import os
import secrets
import shutil
import signal
import threading
from dataclasses import dataclass

import blobfile as bf
import torch as th
import torch.distributed as dist
from torch.nn.parallel.distributed import DistributedDataParallel as DDP
from torch.optim import AdamW

from . import checkpoint_util, dist_util, logger
from .checkpoint_util import (
    find_complete_checkpoint,
    is_remote,
    rng_state,
    save_atomic,
    seed_everything,
    set_rng_state,
)
from .errors import UserError, UserFileError, UserValueError
from .flags import PRECISIONS
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .image_files import from_uint8
from .nn import update_ema
from .pace import Pace
from .progress import tqdm
from .resample import LossAwareSampler, UniformSampler
from .seeding import PerSample, derive_seed

__all__ = [
    "INITIAL_LOG_LOSS_SCALE",
    "TrainLoop",
    "find_complete_checkpoint",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_resume_step_from_filename",
]

# Whether DDP copies buffers between ranks in every step, by the name that this torch has for it.
_SYNC_BUFFERS = next(
    n for n in ("forward_sync_buffers", "broadcast_buffers") if n in inspect.signature(DDP).parameters
)
MOST_PENDING = 1000  # steps whose numbers wait on the device to be logged
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # they save and stop

# What a seed is for: streams of random numbers that must not coincide.
_STEP, _TIMESTEPS, _SAMPLE = range(3)


@dataclass(frozen=True)
class _Pending:
    """What is still to be logged of a step, on the device."""

    number: int
    micros: list[tuple[dict, th.Tensor, th.Tensor]]  # (losses [b] by name, t [b], weights [b])
    bad: th.Tensor | bool
    norms: th.Tensor | None  # of gradients and weights [2]

    def rows(self):
        """All its numbers, float64 [...] each."""
        device = self.micros[0][1].device
        yield th.as_tensor(self.bad, device=device).double().reshape(1)
        if self.norms is not None:
            yield self.norms.double()
        for losses, t, weights in self.micros:
            yield th.cat([t.double(), weights.double(), *(values.double() for values in losses.values())])


class _Writer:
    """`write(*args)` in a thread; `finish` waits for it and raises what it raised."""

    def __init__(self, write, *args):
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(write, *args))
        self._thread.start()

    def _run(self, write, *args):
        try:
            write(*args)
        except BaseException as error:
            self._error = error

    def finish(self):
        self._thread.join()
        if self._error is not None:
            raise self._error


class TrainLoop:
    """Trains `model` on the loss of `diffusion`; upstream's arguments first, then further ones.

    With a seed n ranks with batch b do what one rank with batch n*b does, up to rounding. Raises `UserError` for what
    a user can mend: a checkpoint that does not fit, a precision that the device lacks, data that end, losses that
    stay non-finite.
    """

    initial_lg_loss_scale = INITIAL_LOG_LOSS_SCALE

    def __init__(
        self,
        *,
        model,
        diffusion,
        data,  # iterator of (images [b, C, H, W], dict of tensors [b, ...]) for this rank; or a function (step) ->
        # iterator, or with `seek(step)` or `iter_from(step)`: then a resumed run sees what it would have seen
        batch_size,  # b
        microbatch,  # samples per backward pass, -1: all; the gradient is the mean over the batch either way
        lr,
        ema_rate,  # one rate or several separated by commas
        log_interval,  # in steps
        save_interval,  # in steps
        resume_checkpoint,  # checkpoint*.pt, a run folder (its newest one), or ADM's model*.pt, beside which a
        # complete checkpoint of the same step is preferred
        use_fp16=False,
        fp16_scale_growth=1e-3,
        schedule_sampler=None,
        weight_decay=0.0,
        lr_anneal_steps=0,  # the learning rate falls linearly to zero over so many steps, then training ends
        iterations=0,  # end after so many steps counted from the very first; 0: never
        seed=None,  # draw everything from (seed, step, place in the global batch); dropout per (seed, rank, step).
        # "auto": that of the run that is resumed, or a fresh one. None leaves the generators alone
        precision="fp32",  # or bf16 (autocast), fp16 (upstream's use_fp16: loss scaling, float32 master weights)
        compile=False,  # torch.compile the model
        config=None,  # plain dict that is stored in every checkpoint
        max_nonfinite=20,  # steps skipped for a loss or gradient that is not finite; the next one ends training
        progress=False,  # show a progress bar on rank 0
        on_save=None,  # called as on_save(loop) on every rank after each save; cannot disturb the random numbers
        keep_checkpoints=2,  # complete ones
        adm_files="all",  # ADM's model, ema and opt files beside a checkpoint: `all` stay, `pruned` with it, or `none`
        ema_warmup=False,  # an average's rate is at most (1 + t) / (10 + t): it soon forgets the start
        find_unused_parameters=False,  # as in DistributedDataParallel
    ):
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = _parse_rates(ema_rate)
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint
        self.precision = _check_precision("fp16" if use_fp16 else precision)
        self.use_fp16 = self.precision == "fp16"
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.iterations = iterations
        self.seed = seed
        self.config = config or {}
        self.max_nonfinite = max_nonfinite
        self.progress = progress
        self.on_save = on_save
        self.keep_checkpoints = keep_checkpoints
        self.adm_files = adm_files
        self.ema_warmup = ema_warmup

        self.step = 0  # steps of this run, or, after an exact resume, of all runs
        self.resume_step = 0  # steps of earlier runs, known from a file name only
        self.rank, self.world_size = dist_util.get_rank(), dist_util.get_world_size()
        self.global_batch = self.batch_size * self.world_size
        self.sync_cuda = th.cuda.is_available()
        self.stop_requested = False
        self._nonfinite_steps = 0
        self._pending, self._micros = [], []  # steps, and microbatches of this one, that are not logged yet

        if self.rank == 0 and not is_remote(get_blob_logdir()):
            checkpoint_util.lock_folder(get_blob_logdir())
        self._resume_state = None
        self._load_and_sync_parameters()
        if compile:
            model.compile()
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.model,
            use_fp16=self.use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            initial_lg_loss_scale=self.initial_lg_loss_scale,
        )
        if self.use_fp16 and hasattr(model, "dtype"):
            model.dtype = th.float16  # the activations' type, where the model was not made with use_fp16
        self.opt = AdamW(
            self.mp_trainer.master_params, lr=self.lr, weight_decay=self.weight_decay, fused=self._can_fuse()
        )
        if self._resume_state is not None:
            self.load_state_dict(self._resume_state)
        elif self.resume_step:
            self._load_optimizer_state()
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        else:
            self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.ema_rate]
        if self.seed == "auto":
            self.seed = _fresh_seed()
        self.steps_done = self.step + self.resume_step
        self._saved_at = None
        self._skipped_before = self._nonfinite_steps

        self.use_ddp = self.world_size > 1
        self.ddp_model = self._distribute(find_unused_parameters) if self.use_ddp else self.model

    # ------------------------------------------------------------------------------------------------------- set-up

    def _distribute(self, find_unused_parameters):
        device = dist_util.dev()
        on_gpu = th.device(device).type == "cuda"
        return DDP(
            self.model,
            device_ids=[device] if on_gpu else None,
            output_device=device if on_gpu else None,
            **{_SYNC_BUFFERS: False},  # every rank has the same: codes of 1,000 labels are 49 MB at 64 pixels
            bucket_cap_mb=128,
            gradient_as_bucket_view=True,
            # Microbatches whose gradients are not exchanged would be another graph.
            static_graph=not find_unused_parameters and self.microbatch >= self.batch_size,
            find_unused_parameters=find_unused_parameters,
        )

    def _can_fuse(self):
        return all(p.device.type in ("cuda", "cpu") for p in self.mp_trainer.master_params)

    def _load_and_sync_parameters(self):
        """Find what to resume from, and give every rank the same weights."""
        path = find_resume_checkpoint() or self.resume_checkpoint
        complete = resumed_checkpoint(self.resume_checkpoint)
        if complete:
            logger.log(f"resuming exactly from {complete}")
            self._resume_state = checkpoint_util.load_complete(complete)
            checkpoint_util.load_weights(self.model, self._resume_state["model"], complete)
        elif path and not os.path.isdir(path):
            self.resume_step = parse_resume_step_from_filename(path)
            logger.log(
                f"loading model from checkpoint: {path} (its data order and random numbers start anew)"
            )
            checkpoint_util.load_weights(self.model, checkpoint_util.read_weights(path, "model"), path)
        dist_util.sync_params(self.model.parameters())

    def _load_ema_parameters(self, rate):
        """The moving average that ADM saved beside the model; the model's own weights where it did not."""
        main = find_resume_checkpoint() or self.resume_checkpoint
        path = find_ema_checkpoint(main, self.resume_step, rate)
        if not path:
            return copy.deepcopy(self.mp_trainer.master_params)
        logger.log(f"loading EMA from checkpoint: {path}...")
        with _one_line_where_it_does_not_fit("the average", path):
            params = self.mp_trainer.state_dict_to_master_params(checkpoint_util.read_weights(path))
        # The optimizer and the average must not share memory.
        params = [
            p.detach().clone().to(m.device)
            for p, m in zip(params, self.mp_trainer.master_params, strict=True)
        ]
        dist_util.sync_params(params)
        return params

    def _load_optimizer_state(self):
        """The optimizer that ADM saved beside the model, if it is there."""
        main = find_resume_checkpoint() or self.resume_checkpoint
        path = bf.join(bf.dirname(main), f"opt{self.resume_step:06}.pt")
        if bf.exists(path):
            logger.log(f"loading optimizer state from checkpoint: {path}")
            self._fill_optimizer(checkpoint_util.read(path), path)

    # ----------------------------------------------------------------------------------------------------- the loop

    def run_loop(self):
        """Train until `iterations` or `lr_anneal_steps`, or until SIGTERM, SIGHUP or Ctrl-C: the step is finished and
        saved. A run that is finished already changes nothing."""
        if self.is_finished():
            logger.log(f"finished at step {self.step + self.resume_step}")
            return
        logger.drop_from(self.step + self.resume_step)
        if self.rank == 0 and not is_remote(get_blob_logdir()):
            checkpoint_util.remove_stray_files(get_blob_logdir())
            self._tell_disk_need()
        batches = self._open_data()
        self._continue_from_resume_state()
        pace = Pace()
        with self._stop_on_signals(), self._progress_bar() as bar, self._whole_files():
            while not self.is_finished():
                with pace.waiting():
                    batch, cond = self._next_batch(batches)
                with _told_of_memory(self.microbatch):
                    self.run_step(batch, cond)
                if pace.step(len(batch) * self.world_size) and (told := pace.peak_memory()):
                    logger.log(f"peak memory of the first step: {told}")
                bar.update()
                if not self.step % self.log_interval:
                    self.log_steps()
                    self._check_patience()
                    logger.logkvs(pace.report(self._steps_left()) | {"lr": self.opt.param_groups[0]["lr"]})
                    bar.set_postfix_str(_loss_so_far(), refresh=False)
                    logger.dumpkvs()
                saved = self._save_if_due()
                # Upstream's integration tests end at the second save.
                if saved and self.step and os.environ.get("DIFFUSION_TRAINING_TEST"):
                    return
                self.step += 1
                if self.stop_requested:
                    logger.log(f"stopping after {self.steps_done} steps, as asked by a signal")
                    break
            if self.steps_done != self._saved_at:
                self._save_last()

    @contextlib.contextmanager
    def _whole_files(self):
        """Leave only when what is being written is on disk, on every rank."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(UserError):  # the first fault is told
                self._finish_writing()
            raise
        self._finish_writing()
        dist_util.barrier()

    def _save_last(self):
        self.save()

    def _save_if_due(self):
        due = self.step % self.save_interval == 0
        if due:
            self.save()
        return due

    def is_finished(self):
        """Whether the run has made all the steps it was to make."""
        limits = [limit for limit in (self.iterations, self.lr_anneal_steps) if limit]
        return bool(limits) and self.step + self.resume_step >= min(limits)

    def _steps_left(self):
        """Steps until the run is finished, None where it has no end."""
        limits = [limit for limit in (self.iterations, self.lr_anneal_steps) if limit]
        return min(limits) - self.step - self.resume_step - 1 if limits else None

    def _open_data(self):
        """The iterator of batches, at the position of the next step where `data` can be positioned."""
        start = self.step + self.resume_step
        if hasattr(self.data, "iter_from"):
            return iter(self.data.iter_from(start))
        if hasattr(self.data, "seek"):
            self.data.seek(start)
        elif callable(self.data):
            return iter(self.data(start))
        elif self._resume_state is not None:
            logger.log(
                "the data cannot be positioned: this run sees other batches than one that never stopped"
            )
        return iter(self.data)

    def _next_batch(self, batches):
        try:
            return next(batches)
        except StopIteration:
            raise UserError(
                f"the data ended after {self.steps_done} steps; training needs an endless iterator"
            ) from None

    def _progress_bar(self):
        total = min((n for n in (self.iterations, self.lr_anneal_steps) if n), default=None)
        hidden = not self.progress or self.rank != 0
        return tqdm(total=total, initial=self.step + self.resume_step, unit="step", disable=hidden)

    @contextlib.contextmanager
    def _stop_on_signals(self):
        """Note SIGTERM, SIGINT and SIGHUP (a closed terminal; under nohup it stays ignored) for the end of the step; a
        second one has its usual effect."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return

        def note(number, _frame):
            self._signalled = True
            signal.signal(number, previous[number])

        self._signalled = False
        numbers = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    _signalled = False

    # ------------------------------------------------------------------------------------------------------ one step

    def run_step(self, batch, cond):
        """One optimizer step on this rank's batch [b, C, H, W]; skipped on all ranks if a number is not finite on one.

        What is logged of it is read from the device later, with that of other steps.
        """
        self._seed_step(len(batch))
        self.forward_backward(batch, cond)
        bad, norms = self._check_step()
        if not self.use_fp16:
            # A step that is skipped is skipped on the device: the optimizer and the averages are told, the host is not.
            self.opt.found_inf = bad
            self.opt.step()
            self._update_ema(bad)
        elif bad := bool(bad):
            self.mp_trainer.zero_grad()
        elif self.mp_trainer.optimize(self.opt):
            self._update_ema()
        self._pending.append(_Pending(self.step + self.resume_step, self._micros, bad, norms))
        self._micros = []
        self._anneal_lr()
        self.log_step()
        self.steps_done = self.step + self.resume_step + 1
        if self.use_fp16 or len(self._pending) >= MOST_PENDING:
            self.log_steps()
            self._check_patience()

    def forward_backward(self, batch, cond):
        """Leave the gradient of the mean loss over the batch (of all ranks) in the parameters."""
        self.mp_trainer.zero_grad()
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            micro = self._on_device(batch[part])
            micro_cond = {k: self._on_device(v[part]) for k, v in cond.items()}
            self._micro_start = start
            last = part.stop >= len(batch)
            # The ranks exchange gradients once per step, in the last backward pass.
            with contextlib.nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses, t, weights = self.compute_losses(micro, micro_cond)
            self.backward(losses, weights, len(micro) / len(batch))
            losses = {name: values.detach() for name, values in losses.items()}
            self._micros.append((losses, t, weights))
            if isinstance(self.schedule_sampler, LossAwareSampler):
                finite = th.isfinite(losses["loss"])
                self.schedule_sampler.update_with_local_losses(t[finite], losses["loss"][finite])

    def backward(self, losses, weights, share):
        """Add the gradient of a microbatch, `share` of the batch, to the parameters'; arguments as `compute_losses`
        returned them."""
        self.mp_trainer.backward((losses["loss"] * weights).mean() * share)

    @staticmethod
    def _on_device(tensor):
        """A tensor of the data on this rank's device; bytes are images, [b, C, H, W] in [-1, 1] then."""
        tensor = tensor.to(dist_util.dev(), non_blocking=True)
        return from_uint8(tensor) if tensor.dtype == th.uint8 else tensor

    def compute_losses(self, micro, micro_cond):
        """(losses, t, weights) of a microbatch [b, C, H, W]: the hook of other objectives.

        losses: dict of tensors [b]; "loss" is trained on, all are logged. t: int64 [b]. weights: [b], multiplies the
        losses. The network is to be called as `self.ddp_model`, within `self.autocast()`.
        """
        t, weights = self.sample_timesteps(len(micro))
        # Unseeded, the diffusion draws the noise by itself, as upstream.
        given = {} if self.seed is None else {"noise": self.sample_noise(micro)}
        with self.autocast():
            losses = self.diffusion.training_losses(
                self.ddp_model, micro, t, model_kwargs=micro_cond, **given
            )
        return losses, t, weights

    def log_losses(self, losses, t, weights):
        """Log what `compute_losses` returned, weighted; called only where the loss is finite."""
        log_loss_dict(self.diffusion, t, {k: v * weights for k, v in losses.items()})

    def autocast(self):
        """The context in which the network runs: bfloat16 where that was asked for."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return th.autocast(th.device(dist_util.dev()).type, dtype=th.bfloat16)

    def sample_timesteps(self, count):
        """(t int64 [count], weights [count]) for the samples of the current microbatch."""
        if self._planned is None:
            return self.schedule_sampler.sample(count, dist_util.dev())
        own = slice(self._first + self._micro_start, self._first + self._micro_start + count)
        return tuple(drawn[own] for drawn in self._planned)

    def sample_noise(self, like):
        """Standard normal noise shaped and typed like the current microbatch's tensor [b, ...]; see `sample_random`."""
        if self.seed is None:
            return th.randn_like(like)
        return self.sample_random(len(like), 0, like.device).randn_like(like)

    def sample_random(self, count, stream, device):
        """Generators for the `count` samples of the current microbatch: what they draw depends on the seed, the step and the
        sample's place in the global batch alone. `stream`: a number that tells uses apart; 0 is the diffusion's noise.
        """
        if self.seed is None:
            raise UserValueError("random numbers by sample need a seed")
        step, first = self.step + self.resume_step, self._first + self._micro_start
        seeds = (
            derive_seed(self.seed, _SAMPLE, stream, step, place) for place in range(first, first + count)
        )
        return PerSample(seeds, device)

    def _seed_step(self, count):
        """With a seed: draw the timesteps of the whole global batch on every rank, then seed what else is random."""
        self._planned, self._micro_start, self._first = None, 0, self.rank * count
        if self.seed is None:
            return
        step = self.step + self.resume_step
        seed_everything(derive_seed(self.seed, _TIMESTEPS, step))
        self._planned = self.schedule_sampler.sample(count * self.world_size, dist_util.dev())
        seed_everything(derive_seed(self.seed, _STEP, self.rank, step))

    _planned, _micro_start, _first = None, 0, 0

    def _check_step(self):
        """(whether a loss or gradient of any rank is not finite, as a float32 [], norms of gradients and weights [2]), on
        the device; also passes a signal on from any rank to all.

        Half precision is left to its loss scaler as far as gradients go: there an overflow is part of the method.
        """
        good = th.stack([th.isfinite(losses["loss"]).all() for losses, _, _ in self._micros]).all()
        norms = None
        if not self.use_fp16:
            grads = [p.grad for p in self.mp_trainer.model_params if p.grad is not None]
            params = [p.detach() for p in self.mp_trainer.master_params]
            each = th.stack([norm.float() for norm in th._foreach_norm(grads or params[:1])])
            good = good & th.isfinite(each).all()
            norms = th.stack(
                [each.norm() if grads else each.new_zeros(()), th.stack(th._foreach_norm(params)).norm()]
            )
        if self.world_size == 1:
            self.stop_requested = self._signalled
            return 1.0 - good.float(), norms
        flags = th.stack([1.0 - good.float(), th.full((), float(self._signalled), device=good.device)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._hear(flags[1])
        return flags[0], norms

    def _hear(self, signalled):
        """Stop where a signal had reached a rank by the step before: that is known without waiting for the device."""
        if self._told is not None:
            before, copied = self._told
            if copied is not None:
                copied.synchronize()
            self.stop_requested = bool(before.numpy())
        on_gpu = signalled.device.type == "cuda"
        host = th.zeros((), pin_memory=on_gpu).copy_(signalled, non_blocking=True)
        self._told = host, th.cuda.current_stream().record_event() if on_gpu else None

    _told = None

    def log_steps(self):
        """Log the steps since the last time: one copy to the host, however many they are."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        numbers = iter(th.cat([row for step in pending for row in step.rows()]).tolist())
        for step in pending:
            bad = next(numbers) > 0
            norms = [next(numbers) for _ in range(0 if step.norms is None else 2)]
            micros = [
                [[next(numbers) for _ in range(len(t))] for _ in range(2 + len(losses))]
                for losses, t, _ in step.micros
            ]
            for (losses, _, _), (t, weights, *values) in zip(step.micros, micros, strict=True):
                if all(map(math.isfinite, values[list(losses).index("loss")])):
                    t, weights, *values = (th.tensor(v, dtype=th.float64) for v in (t, weights, *values))
                    self.log_losses(dict(zip(losses, values, strict=True)), t.long(), weights)
            if bad:
                self._nonfinite_steps += 1
                logger.logkv("nonfinite_steps", self._nonfinite_steps)
                logger.log(
                    f"step {step.number}: the loss or its gradient is not finite, the step is skipped "
                    f"({self._nonfinite_steps} so far)"
                )
            elif norms:
                self.mp_trainer._log_norms(*norms)

    @property
    def nonfinite_steps(self):
        """Steps skipped so far, over all runs."""
        self.log_steps()
        return self._nonfinite_steps

    def _check_patience(self):
        if self.nonfinite_steps - self._skipped_before > self.max_nonfinite:
            self._give_up()

    def _give_up(self):
        self.step += 1
        if self._weights_finite():
            self.save()
        raise UserError(
            f"{self.nonfinite_steps - self._skipped_before} steps had a loss or gradient that is not finite, more than "
            f"max_nonfinite = {self.max_nonfinite}: look at the data, lower lr, or use another precision. "
            f"{self._last_finite()}"
        )

    def _last_finite(self):
        """Where a run that failed can go on, once that is written."""
        self._finish_writing()
        folder = get_blob_logdir()
        found = None if is_remote(folder) else find_complete_checkpoint(folder)
        return f"The last finite checkpoint is {found}" if found else f"No checkpoint is in {folder}"

    def _weights_finite(self):
        params = [*self.mp_trainer.master_params, *(p for params in self.ema_params for p in params)]
        largest = th._foreach_norm([p.detach() for p in params], ord=math.inf)
        return bool(th.isfinite(th.stack(largest)).all())

    def _update_ema(self, skipped=None):
        """skipped: 1 on the device where the step was, and the averages are to stay."""
        step = self.step + self.resume_step
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            now = min(rate, (1 + step) / (10 + step)) if self.ema_warmup else rate
            now = now if skipped is None else 1 - (1 - now) * (1 - skipped.double())
            update_ema(params, self.mp_trainer.master_params, rate=now)

    def _anneal_lr(self):
        if self.lr_anneal_steps:
            self._set_lr(self.step + self.resume_step)

    def _set_lr(self, step):
        done = step / self.lr_anneal_steps if self.lr_anneal_steps else 0
        for group in self.opt.param_groups:
            group["lr"] = self.lr * (1 - done)

    def log_step(self):
        """Log the step and the number of samples seen by all ranks."""
        step = self.step + self.resume_step
        logger.logkv("step", step)
        logger.logkv("samples", (step + 1) * self.global_batch)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def save(self):
        """Write the complete checkpoint, and ADM's files (model, one EMA per rate, optimizer); called on every rank. The
        writing ends in the background.

        UserError instead where the weights are not finite: the checkpoint before stays the newest.
        """
        if not self._weights_finite():
            raise UserError(
                f"the weights are not finite after {self.steps_done} steps and are not saved: look at the data, lower lr, or "
                f"use another precision. {self._last_finite()}"
            )
        if self.on_save is not None:
            kept = rng_state()
            self.on_save(self)
            set_rng_state(kept)
        state = self.state_dict()
        self._finish_writing()
        if self.rank == 0:
            # Training goes on while a snapshot is written.
            self._writer = _Writer(self._write, _snapshot(state), f"{self.step + self.resume_step:06d}")
        self._saved_at = self.steps_done

    def _finish_writing(self):
        """Wait for what is being written; raises what went wrong with it."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.finish()

    _writer = None

    def _write(self, state, number):
        folder, files = get_blob_logdir(), {}
        if self.adm_files != "none":
            files[f"model{number}.pt"] = state["model"]
            for rate in self.ema_rate:
                files[f"ema_{rate}_{number}.pt"] = state["ema"][str(rate)]
            files[f"opt{number}.pt"] = state["optimizer"]
        # Last, so that its presence says that the others are complete.
        files[f"checkpoint{number}.pt"] = state
        for name, value in files.items():
            logger.log(f"saving {name}...")
            save_atomic(value, bf.join(folder, name))
        if not is_remote(folder):
            checkpoint_util.prune_checkpoints(
                folder, self.keep_checkpoints, f"checkpoint{number}.pt", adm_files=self.adm_files == "pruned"
            )

    def _tell_disk_need(self):
        weights = sum(p.numel() * p.element_size() for p in self.mp_trainer.master_params)
        one = weights * (3 + len(self.ema_rate))  # AdamW keeps two moments
        told = f"a checkpoint takes about {_gigabytes(one)}; {self.keep_checkpoints} are kept and one more while it is written"
        need = one * (self.keep_checkpoints + 1)
        if self.adm_files == "pruned":
            need *= 2
            told += ", each with ADM's files of the same size"
        elif self.adm_files == "all":
            told += f"; ADM's files of a save, which all stay, take {_gigabytes(one)} more"
        free = shutil.disk_usage(get_blob_logdir()).free
        logger.log(f"disk: {told}: {_gigabytes(need)} in all, {_gigabytes(free)} are free")
        if need > free:
            logger.warn(f"the disk may fill up: {_gigabytes(need)} are needed, {_gigabytes(free)} are free")

    def state_dict(self):
        """Everything that training depends on, in plain values and tensors; gathers from, and returns to, every rank."""
        own = rng_state()
        every_rng = [own]
        if self.world_size > 1:
            every_rng = [None] * self.world_size
            dist.all_gather_object(every_rng, own)
        sampler = self.schedule_sampler
        return {
            "format": checkpoint_util.FORMAT,
            "version": checkpoint_util.VERSION,
            "config": self.config,
            "step": self.steps_done,  # the next step, and the position in the data
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "model": self._weights(self.mp_trainer.master_params),
            "ema": {
                str(rate): self._weights(params)
                for rate, params in zip(self.ema_rate, self.ema_params, strict=True)
            },
            "optimizer": self.opt.state_dict(),
            "lg_loss_scale": getattr(self.mp_trainer, "lg_loss_scale", INITIAL_LOG_LOSS_SCALE),
            "schedule_sampler": sampler.state_dict() if hasattr(sampler, "state_dict") else {},
            "nonfinite_steps": self.nonfinite_steps,
            "rng": every_rng,
            "ema_warmup": self.ema_warmup,
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state):
        """Continue from `state_dict()`; random numbers and `extra_state` follow when the loop starts."""
        self.step, self.resume_step = state["step"], 0
        if self.seed == "auto" and state["seed"] is not None:
            self.seed = state["seed"]
        self._nonfinite_steps = state["nonfinite_steps"]
        self.mp_trainer.lg_loss_scale = state["lg_loss_scale"]
        masters = self.mp_trainer.master_params
        self.ema_params = []
        for rate in self.ema_rate:
            # An EMA that the earlier run did not keep starts at the weights.
            weights = state["ema"].get(str(rate), state["model"])
            with _one_line_where_it_does_not_fit("the average"):
                params = self.mp_trainer.state_dict_to_master_params(weights)
            self.ema_params.append(
                [p.detach().to(m.device, th.float32, copy=True) for p, m in zip(params, masters, strict=True)]
            )
        self._fill_optimizer(state["optimizer"])
        if state["schedule_sampler"] and hasattr(self.schedule_sampler, "load_state_dict"):
            with _one_line_where_it_does_not_fit("the schedule sampler"):
                self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        config = {"ema_warmup": self.ema_warmup, **self.config}
        for name, old in {"ema_warmup": state.get("ema_warmup", False), **state["config"]}.items():
            new = config.get(name, old)
            if new != old and name != "resume_checkpoint":
                logger.log(f"{name}: {old} -> {new}")

    def _fill_optimizer(self, state, source="the checkpoint"):
        """Take an optimizer's moments; rate, weight decay and `fused` are this run's."""
        own = [{name: group[name] for name in ("fused", "weight_decay")} for group in self.opt.param_groups]
        with _one_line_where_it_does_not_fit("the optimizer", source):
            self.opt.load_state_dict(state)
            for param, moments in self.opt.state.items():
                if any(value.ndim and value.shape != param.shape for value in moments.values()):
                    raise ValueError("its moments have other shapes than the weights")
        for group, values in zip(self.opt.param_groups, own, strict=True):
            group.update(values)
        self._set_lr(max(self.step + self.resume_step - 1, 0))

    def extra_state(self):
        """What a subclass wants back after a resume: a dict of plain values and tensors."""
        return {}

    def load_extra_state(self, state):
        """Take back what `extra_state` returned; called when the loop starts."""

    def _continue_from_resume_state(self):
        state, self._resume_state = self._resume_state, None
        if state is None:
            return
        with _one_line_where_it_does_not_fit("extra"):
            self.load_extra_state(state["extra"])
        for name, value in (
            ("world_size", self.world_size),
            ("batch_size", self.batch_size),
            ("seed", self.seed),
        ):
            if state[name] != value:
                logger.log(f"{name} was {state[name]} and is now {value}: not the same run, bit for bit")
        if self.rank < len(state["rng"]):
            with _one_line_where_it_does_not_fit("the random state"):
                set_rng_state(state["rng"][self.rank])

    def _weights(self, params):
        """A state dict with `params` in the model's place, free of the memory that training changes."""
        return self.mp_trainer.master_params_to_state_dict(params)


# ------------------------------------------------------------------------------------------------------ file names


def parse_resume_step_from_filename(filename):
    """path/to/modelNNNNNN.pt -> NNNNNN; 0 for other names."""
    _, found, rest = filename.rpartition("model")
    number = rest.split(".")[0]
    return int(number) if found and number.isdecimal() else 0


def get_blob_logdir():
    """Where checkpoints go: the logger's folder. Forks replace it to store them elsewhere."""
    return logger.get_dir()


def find_ema_checkpoint(main_checkpoint, step, rate):
    """The path of the EMA with `rate` beside the model file `main_checkpoint`, or None."""
    folder = bf.dirname(main_checkpoint) if main_checkpoint else None
    path = bf.join(folder, f"ema_{rate}_{step:06d}.pt") if folder is not None else None
    return path if path and bf.exists(path) else None


def find_resume_checkpoint():
    """A checkpoint found by other means than the flag: none here. For clusters that restart jobs by themselves."""
    return None


def resumed_checkpoint(resume_checkpoint):
    """The complete checkpoint from which training with this flag goes on, or None."""
    path = find_resume_checkpoint() or resume_checkpoint
    return _complete_checkpoint_for(path) if path else None


def _complete_checkpoint_for(path):
    """The complete checkpoint that `path` means (a file, a run folder, a model*.pt with one beside it), or None.

    None for a run folder only if it is this run's own, still empty one: a job that is always started with the same
    command begins there.
    """
    folder, name = os.path.split(path)
    if is_remote(path):
        return path if name.startswith("checkpoint") else None
    if os.path.isdir(path):
        found = find_complete_checkpoint(path)
        if found is None and os.path.realpath(path) != os.path.realpath(get_blob_logdir()):
            raise UserFileError(f"no complete checkpoint (checkpoint*.pt) in {path}")
        return found
    if not os.path.exists(path):
        raise UserFileError(f"no such checkpoint: {path}")
    if name.startswith("checkpoint") or checkpoint_util.is_complete(path):
        return path
    beside = os.path.join(folder, name.replace("model", "checkpoint", 1))
    return (
        beside
        if name.startswith("model") and beside in checkpoint_util.complete_checkpoints(folder)
        else None
    )


# ---------------------------------------------------------------------------------------------------------- logging


def log_loss_dict(diffusion, ts, losses):
    """Log the mean of every loss [B], and of its samples by quarter of the diffusion (key_q0 .. key_q3).

    ts: int64 [B]. One copy to the host, however many losses there are.
    """
    table = th.stack([ts.double(), *(values.detach().double() for values in losses.values())]).tolist()
    quarters = [math.floor(4 * t / diffusion.num_timesteps) for t in table[0]]
    for key, values in zip(losses, table[1:], strict=True):
        logger.logkv_mean(key, sum(values) / len(values))
        for quarter, value in zip(quarters, values, strict=True):
            logger.logkv_mean(f"{key}_q{quarter}", value)


# ----------------------------------------------------------------------------------------------------------- helpers


def _snapshot(value):
    """A copy of a state on the CPU, which training does not change."""
    if isinstance(value, th.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _snapshot(part) for name, part in value.items()}
    return type(value)(map(_snapshot, value)) if isinstance(value, list | tuple) else value


def _gigabytes(count):
    return f"{count / 1e9:.2f} GB"


def _parse_rates(ema_rate):
    if isinstance(ema_rate, float):
        return [ema_rate]
    try:
        rates = [float(rate) for rate in ema_rate.split(",") if rate.strip()]
    except ValueError:
        rates = [math.nan]
    if not all(0 <= rate < 1 for rate in rates):
        raise UserValueError(f"ema_rate {ema_rate!r} must be numbers from 0 to below 1, separated by commas")
    return rates


def _check_precision(precision):
    if precision not in PRECISIONS:
        raise UserValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision == "bf16" and th.cuda.is_available() and not th.cuda.is_bf16_supported():
        raise UserError("this GPU has no bfloat16: use --precision fp16 or fp32")
    return precision


def _fresh_seed():
    """A seed from the operating system, the same on every rank."""
    seed = [secrets.randbits(31)]
    if dist_util.get_world_size() > 1:
        dist.broadcast_object_list(seed, src=0, device=dist_util.dev())
    return seed[0]


def _loss_so_far():
    """The mean loss since the last table, for the progress bar."""
    loss = logger.getkvs().get("loss")
    return "" if loss is None else f"loss {float(loss):.4g}"


@contextlib.contextmanager
def _told_of_memory(microbatch):
    """UserError where the GPU's memory does not suffice for `microbatch` samples."""
    try:
        yield
    except th.OutOfMemoryError as error:
        less = f"--microbatch {max(1, microbatch // 2)} (the same gradient in smaller parts)"
        instead = less if microbatch > 1 else "a smaller model, --use_checkpoint True or --precision bf16"
        raise UserError(
            f"the GPU's memory does not suffice for {microbatch} images at once: use {instead}"
        ) from error


@contextlib.contextmanager
def _one_line_where_it_does_not_fit(what, source="the checkpoint"):
    """UserError where `what` that `source` holds is of another form than this run's."""
    try:
        yield
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{what} in {source} does not fit this run ({type(error).__name__}: {reason})"
        ) from error
