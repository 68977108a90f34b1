"""Training of a classifier on noised images, for classifier guidance (Dhariwal and Nichol 2021)."""

import torch as th
import torch.nn.functional as F

from . import dist_util
from .image_datasets import load_data
from .train_util import TrainLoop, log_loss_dict


class ClassifierLoop(TrainLoop):
    """Cross-entropy on x_t, or on the images themselves where not `noised`; evaluates on `val_data` if given."""

    initial_lg_loss_scale = 16.0  # of half precision, as upstream trains classifiers

    def __init__(self, *, noised, val_data, eval_interval, **kwargs):
        self.noised = noised
        self.val_data = val_data
        self.eval_interval = eval_interval
        super().__init__(**kwargs)

    def compute_losses(self, micro, micro_cond):
        t, _ = self.sample_timesteps(len(micro))
        with self.autocast():
            losses, t = self.classify(self.ddp_model, micro, micro_cond["y"], t, self.sample_noise(micro))
        return losses, t, th.ones_like(losses["loss"])

    def classify(self, model, images, labels, t, noise):
        """Loss and accuracies, each [b], and the timesteps that they belong to."""
        if self.noised:
            images = self.diffusion.q_sample(images, t, noise)
        else:
            t = th.zeros_like(t)
        logits = model(images, timesteps=t)
        loss = F.cross_entropy(logits, labels, reduction="none")
        accuracies = {f"acc@{k}": among_top(logits, labels, k) for k in (1, 5)}
        return {"loss": loss, **accuracies}, t

    def log_losses(self, losses, t, weights, prefix="train"):
        log_loss_dict(self.diffusion, t, {f"{prefix}_{name}": values for name, values in losses.items()})

    def run_step(self, batch, cond):
        self._anneal_lr()  # upstream's classifiers are annealed before the step
        super().run_step(batch, cond)
        if self.val_data is not None and self.step % self.eval_interval == 0:
            self.evaluate()

    @th.no_grad()
    def evaluate(self):
        """Log loss and accuracies on the next batch of the validation data."""
        images, cond = next(self.val_data)
        images, labels = images.to(dist_util.dev()), cond["y"].to(dist_util.dev())
        t, _ = self.schedule_sampler.sample(len(images), dist_util.dev())
        self.model.eval()
        with self.autocast():
            losses, t = self.classify(self.model, images, labels, t, th.randn_like(images))
        self.model.train()
        self.log_losses(losses, t, None, prefix="val")

    # Upstream's classifiers have other saves than its image models: none at step 0, and the last under the last step's number.
    def _save_if_due(self):
        return super()._save_if_due() if self.step + self.resume_step else False

    def _save_last(self):
        self.step -= 1
        self.save()


def among_top(logits, labels, k):
    """1.0 where the label is among the k largest logits [b, classes], else 0.0: [b]."""
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(dim=-1).float()


def open_val_data(args, dataset):
    """Batches of --val_data_dir with the classes of the training data; None where there is none."""
    if not args.val_data_dir:
        return None
    return load_data(
        data_dir=args.val_data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=True,
        image_channels=args.image_channels,
        class_names=dataset.class_names,
        label_from=dataset.label_from,
    )
