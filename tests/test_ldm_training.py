"""Training of the autoencoders, the data's order, grids of images."""

import pytest
import pytorch_lightning as pl
import torch as th
from torch.utils.data import DataLoader

from guided_diffusion import dist_util
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.training.data import DataModuleFromConfig, EpochSampler
from ldm.training.image_logger import ImageLogger, image_grid
from tests.ldm_training_driver import Ramps

DDCONFIG = dict(
    z_channels=2,
    resolution=8,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1],
    num_res_blocks=1,
    attn_resolutions=[],
    dropout=0.0,
)
LOSSES = {
    "kl": "ldm.modules.losses.LPIPSWithDiscriminator",
    "vq": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
}


def autoencoder(kind, disc_start=100, **options):
    th.manual_seed(0)
    params = {"disc_start": disc_start, "perceptual_weight": 0, "disc_num_layers": 1}
    params |= {"kl_weight": 1e-6} if kind == "kl" else {"disc_ndf": 8, "n_classes": 5}
    loss = {"target": LOSSES[kind], "params": params}
    if kind == "kl":
        model = AutoencoderKL({**DDCONFIG, "double_z": True}, loss, embed_dim=2, **options)
    else:
        model = VQModel({**DDCONFIG, "double_z": False}, loss, n_embed=5, embed_dim=2, **options)
    model.learning_rate = 1e-3
    return model


class Record(pl.Callback):
    """The discriminator's weight after each step, and what was logged."""

    def __init__(self):
        self.weights, self.metrics, self.rates = [], set(), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.loss.discriminator.main[0].weight.detach().clone())
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])
        self.metrics |= set(trainer.callback_metrics)


def fit(model, tmp_path, batch_size=2, size=6, epochs=1, validate=False):
    """Train on `Ramps` without shuffling; what `Record` noted, and the trainer."""
    record = Record()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[record],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Ramps(size, shift=0), batch_size=batch_size)
    th.manual_seed(1)
    trainer.fit(model, loader, loader if validate else None)
    return record, trainer


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_discriminator_learns_from_its_start_on(tmp_path, kind):
    record, trainer = fit(autoencoder(kind, disc_start=3), tmp_path, epochs=2)
    same = [th.equal(a, b) for a, b in zip(record.weights, record.weights[1:], strict=False)]
    assert same == [True, True, False, False, False]  # before the updates 2, 3, ..., 6
    assert trainer.global_step == 6 and {"aeloss", "discloss", "train/d_weight"} <= record.metrics
    assert ("train/perplexity" in record.metrics) == (kind == "vq")


def test_training_brings_the_images_back(tmp_path):
    model = autoencoder("kl")
    x = th.stack([th.from_numpy(Ramps(6, 0)[k]["image"]) for k in range(6)]).permute(0, 3, 1, 2)

    def error():
        return (model(x, sample_posterior=False)[0] - x).abs().mean().item()

    before = error()
    fit(model, tmp_path, epochs=20)
    assert error() < 0.5 * before


def test_accumulated_batches_count_as_one(tmp_path):
    """Two batches of two train as one of four: the same function but for rounding."""
    results = []
    for accumulate, batch_size in ((2, 2), (1, 4)):
        model = autoencoder("vq")  # draws no noise
        model.accumulate_grad_batches = accumulate
        record, trainer = fit(model, tmp_path, batch_size=batch_size, size=8, epochs=2)
        assert trainer.global_step == 4 and len(record.weights) == 4 * accumulate
        results.append(model.eval().encode_to_prequant(th.ones(1, 3, 8, 8)))
    assert th.allclose(*results, atol=1e-4)
    untrained = autoencoder("vq").eval().encode_to_prequant(th.ones(1, 3, 8, 8))
    assert (untrained - results[0]).abs().max() > 1e-2


def test_gradients_are_clipped(tmp_path, monkeypatch):
    norms, step = [], th.optim.Adam.step

    def note(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms.append(th.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(th.optim.Adam, "step", note)
    model = autoencoder("kl", disc_start=0)
    model.gradient_clip_val = 0.25
    fit(model, tmp_path)
    assert len(norms) == 6 and norms[::2] == pytest.approx([0.25] * 3, rel=1e-3) and max(norms) < 0.2501
    model.gradient_clip_val = None
    fit(model, tmp_path)
    assert max(norms) > 1


class Halving:
    """A schedule for the test: the rate halves with every update."""

    def schedule(self, n):
        return 0.5**n


def test_learning_rates_and_their_schedule(tmp_path):
    model = autoencoder(
        "vq", disc_start=1, lr_g_factor=4.0, scheduler_config={"target": "tests.test_ldm_training.Halving"}
    )
    record, _ = fit(model, tmp_path)
    assert record.rates == [[2e-3, 5e-4], [1e-3, 2.5e-4], [5e-4, 1.25e-4]]
    (first, second) = model.configure_optimizers()[0]
    assert first.defaults["betas"] == second.defaults["betas"] == (0.5, 0.9)
    trained = {id(p) for optimizer in (first, second) for g in optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in model.parameters()}


def test_the_average_is_validated_too(tmp_path):
    model = autoencoder("vq", use_ema=True)
    record, trainer = fit(model, tmp_path, validate=True)
    figures = trainer.callback_metrics
    assert {"val/rec_loss", "val/aeloss", "val_ema/rec_loss", "val_ema/aeloss"} <= set(figures)
    x = th.stack([th.from_numpy(Ramps(6, 0)[k]["image"]) for k in range(6)]).permute(0, 3, 1, 2)
    with th.no_grad(), model.eval().ema_scope():
        assert figures["val_ema/rec_loss"].item() == pytest.approx(
            (model(x)[0] - x).abs().mean().item(), rel=1e-4
        )
    assert figures["val_ema/rec_loss"] != figures["val/rec_loss"]


@pytest.mark.parametrize("kind, extra", [("kl", "samples"), ("vq", "reconstructions_ema")])
def test_images_to_look_at(kind, extra):
    model = autoencoder(kind, **({"use_ema": True} if kind == "vq" else {})).eval()
    batch = {"image": th.rand(2, 8, 8, 3)}
    log = model.log_images(batch, plot_ema=True)
    assert set(log) == {"inputs", "reconstructions", extra}
    assert th.equal(log["inputs"], batch["image"].permute(0, 3, 1, 2)) and log[extra].shape == (2, 3, 8, 8)
    assert set(model.log_images(batch, only_inputs=True)) == {"inputs"}


# ------------------------------------------------------------------------------------------------------
# data


def test_ranks_share_what_one_would_take(monkeypatch):
    """Batch k of two ranks together is batch k of one with the double size, the last one filled from the
    start."""
    whole = [index for _, index in EpochSampler(7, 4, seed=5, shuffle=True)]
    assert sorted(whole) == list(range(7)) and whole != sorted(whole)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        sampler = EpochSampler(7, 2, seed=5, shuffle=True)
        halves.append([index for _, index in sampler])
        assert len(sampler) == len(halves[-1]) == 4
    together = [index for pair in zip(*halves, strict=True) for index in pair]
    assert together == [*whole, whole[0]]


def test_the_order_goes_on_from_any_batch():
    sampler = EpochSampler(7, 2, seed=5, shuffle=True)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    again = EpochSampler(7, 2, seed=5, shuffle=True)
    again.go_to(1, batches=2)
    again.set_epoch(1)
    assert list(again) == epochs[1][4:] and len(again) == 7
    again.set_epoch(2)
    assert len(list(again)) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_for_a_sample_does_not_depend_on_workers(workers):
    ramps = {"target": "tests.ldm_training_driver.Ramps", "params": {"size": 6}}
    data = DataModuleFromConfig(2, train=ramps, validation=ramps, num_workers=workers)
    data.setup()
    loader = data.train_dataloader()
    samples = {int(i): x for batch in loader for i, x in zip(batch["index"], batch["image"], strict=True)}
    loader.sampler.set_epoch(1)
    later = {int(i): x for batch in loader for i, x in zip(batch["index"], batch["image"], strict=True)}
    assert sorted(samples) == sorted(later) == list(range(6))
    assert not any(th.equal(samples[k], later[k]) for k in samples)
    expected = float(samples[3].sum())
    alone = DataModuleFromConfig(3, train=ramps, num_workers=0)
    alone.setup()
    assert float(alone.train_dataloader().dataset[0, 3]["image"].sum()) == pytest.approx(expected, rel=1e-5)
    assert not hasattr(data, "test_loader") and [
        int(i) for b in data.val_dataloader() for i in b["index"]
    ] == list(range(6))


# ------------------------------------------------------------------------------------------------------
# grids


def test_a_grid_has_rows_of_four():
    images = th.arange(1.0, 6.0).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    grid = image_grid(images)
    assert grid.shape == (3, 2 * 6 + 2, 4 * 8 + 2)
    assert grid[0, 2:6, 26:32].eq(4).all() and grid[0, 8:12, 2:8].eq(5).all() and grid[:, :2].eq(0).all()
    assert grid.sum() == images.sum()


def test_images_may_be_drawn_in_half_precision(tmp_path):
    seen = []

    class Module(pl.LightningModule):
        def log_images(self, batch, split):
            seen.append((batch @ batch).dtype)
            return {}

    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    for half in (False, True):
        ImageLogger(10, 4, enable_autocast=half).log_img(trainer, Module(), th.ones(2, 2), 0, "val")
    assert seen == [th.float32, th.bfloat16]


def test_when_images_are_due():
    def due(**options):
        logger = ImageLogger(10, 4, **options)
        return [step for step in range(31) if logger.check_frequency(step)]

    assert due() == [1, 2, 4, 8, 10, 20, 30]
    assert due(increase_log_steps=False, log_first_step=True) == [0, 10, 20, 30]
