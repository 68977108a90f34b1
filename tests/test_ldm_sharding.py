"""Training in shards (--strategy fsdp): two ranks with gloo on the CPU."""

import shutil

import pytest
import torch as th
from omegaconf import OmegaConf

from guided_diffusion.errors import UserValueError
from ldm import inference
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.cli import main
from ldm.training.setup import make_strategy
from tests.conftest import ROOT
from tests.ldm_models import IDENTITY, small, unet_config
from tests.test_main import DDCONFIG, TRAINER, final, loss, run_folder, tensors

SHOWN = {
    "N": 2,
    "ddim_steps": 2,
    "inpaint": False,
    "quantize_denoised": False,
    "plot_progressive_rows": False,
}
JOINT = "ldm.models.diffusion.joint.JointLatentDiffusion"


@pytest.fixture
def config(tmp_path):
    """config(): a configuration of a joint model whose head E is called after the U-Net."""

    def write(name="tiny", **changes):
        params = dict(
            first_stage_config=IDENTITY,
            cond_stage_config={
                "target": "ldm.modules.encoders.modules.ClassEmbedder",
                "params": {"embed_dim": 6, "n_classes": 12, "key": "index"},
            },
            cond_stage_key="index",
            conditioning_key="crossattn",
            cond_stage_trainable=True,
            unet_config=unet_config(
                in_channels=3,
                out_channels=3,
                use_spatial_transformer=True,
                context_dim=6,
                num_classes=None,
                use_checkpoint=True,
            ),
            image_size=8,
            channels=3,
            timesteps=24,
            monitor="val/loss_ema",
            modalities={
                "other": {"preset": "image"},
                "what": {
                    "preset": "label",
                    "classes": 3,
                    "embedded": True,
                    "encoder": "none",
                    "head": "classifier",
                    "classifier": {"width": 32, "depth": 1, "attention_resolutions": "4", "channel_mult": "1,2"},
                },
            },
            **changes,
        )  # fmt: skip
        sets = {
            part: {"target": "tests.ldm_training_driver.Labelled", "params": {"size": size}}
            for part, size in (("train", 4), ("validation", 4))
        }
        content = {
            "model": {"base_learning_rate": 1e-3, "target": JOINT, "params": params},
            "data": {
                "target": "main.DataModuleFromConfig",
                "params": {"batch_size": 4, "num_workers": 0, **sets},
            },
            "lightning": {
                "trainer": TRAINER | {"max_epochs": 1, "gradient_clip_val": 0.1},
                "callbacks": {"image_logger": {"params": {"log_images_kwargs": SHOWN}}},
            },
        }
        OmegaConf.save(OmegaConf.create(content), tmp_path / f"{name}.yaml")
        return tmp_path / f"{name}.yaml"

    return write


def test_shards_continue_a_run_as_one_process_does(config, launch, tmp_path):
    """Train, validate and sample by the average, save whole. The moments tell most: Adam makes whole steps of the
    rounding error where the gradient should be 0."""
    main(["--base", str(config()), "-t", "--scale_lr", "False", "-l", str(tmp_path / "run")])
    run = run_folder(tmp_path, "run")
    shutil.copytree(run, tmp_path / "shards")
    longer = ["-t", "--scale_lr", "False", "lightning.trainer.max_epochs=2"]
    main(["--resume", str(run), *longer])
    words = ["--strategy", "fsdp", "data.params.batch_size=2"]
    words += ["lightning.callbacks.image_logger.params.batch_frequency=1"]
    job = launch("torchrun", ROOT / "main.py", "--resume", tmp_path / "shards", *longer, *words, timeout=150)
    assert job.returncode == 0, job.stderr
    one, two = (final(tmp_path / folder) for folder in (run, "shards"))
    assert two["global_step"] == 2 and one["state_dict"].keys() == two["state_dict"].keys()
    moments = [
        {name: value for name, value in tensors(state["optimizer_states"]).items() if "exp_avg" in name}
        for state in (one, two)
    ]
    assert moments[0].keys() == moments[1].keys()
    for name, value in moments[0].items():
        th.testing.assert_close(moments[1][name], value, rtol=1e-3, atol=1e-5)
    measured = (".variance", ".share", ".correlation")  # every rank reads its own validation samples
    for name, value in ((n, v) for n, v in one["state_dict"].items() if not n.endswith(measured)):
        th.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=2.1e-3)  # two steps of Adam
    drawn = {path.name.split("_gs-")[0] for path in (tmp_path / "shards" / "images" / "val").iterdir()}
    assert {"samples", "samples_other", "image_from_other"} <= drawn
    paths = inference.configurations(tmp_path / "shards")
    model = inference.load_model(inference.merged_config(paths), tmp_path / "shards/checkpoints/last.ckpt")
    with model.ema_scope():
        out = model.sample_joint(
            2,
            steps=2,
            sampler="ddim",
            conditioning=model.get_learned_conditioning({"index": th.tensor([0, 1])}),
        )
    assert out["image"].isfinite().all()


def test_what_cannot_be_sharded_is_named():
    autoencoder = AutoencoderKL(DDCONFIG, loss(), embed_dim=2)
    for model, said in (
        (autoencoder, "AutoencoderKL"),
        (small(LatentDiffusion, learn_logvar=True), "learn_logvar"),
    ):
        with pytest.raises(UserValueError, match=f"fsdp.*{said}.*use ddp"):
            make_strategy({"strategy": "fsdp", "devices": 1}, model)
