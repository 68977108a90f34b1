"""Joint training and sampling by the package that is on the path, this project's or a grafted checkout: the losses,
weights and samples, as .npz. usage: graft_driver.py OUT.npz MODALITIES"""

import sys
import zlib

import numpy as np
import torch as th

from guided_diffusion import script_util
from guided_diffusion.mt.losses import multitask_losses
from guided_diffusion.mt.modality_set import batch_of, derive_values
from guided_diffusion.mt.sampling import joint_sample
from guided_diffusion.seeding import PerSample

SPEC = sys.argv[2]
CLASSES, SIZE, STEPS = 5, 16, 20
FLAGS = dict(
    image_size=SIZE,
    num_channels=64,
    num_res_blocks=1,
    channel_mult="1,2",
    attention_resolutions="8",
    num_heads=2,
    learn_sigma=True,
    diffusion_steps=40,
    timestep_respacing="20",
    rescale_timesteps=True,
)


def made():
    """(network, modalities, diffusion, losses of a step: (images, t, cond, noise) -> terms)."""
    try:
        from guided_diffusion.mt import join  # noqa: F401
    except ImportError:
        from guided_diffusion.mt.model import JointModel, mt_defaults

        flags = {**mt_defaults(), **FLAGS, "num_classes": CLASSES, "modalities": SPEC, "code_interval": 1}
        model = JointModel.from_flags(flags)

        def losses(images, t, cond, noise):
            random = PerSample(th.randint(2**62, (len(images),)).tolist())
            batch = derive_values(model.modalities, images, batch_of(model.modalities, cond), random)
            return multitask_losses(
                model.modalities,
                model.network,
                batch,
                t,
                diffusion=model.diffusion,
                noise=noise,
                random=random,
                unshifted_probability=flags["unshifted_probability"],
            ).terms

        return model.network, model.modalities, model.diffusion, losses
    script_util.NUM_CLASSES = CLASSES
    flags = {**script_util.model_and_diffusion_defaults(), **FLAGS, "class_cond": True, "modalities": SPEC}
    network, joint = script_util.create_model_and_diffusion(**flags)

    joint.code_interval = 1

    def losses(images, t, cond, noise):
        return joint.training_losses(network, images, t, model_kwargs=cond, noise=noise)

    return network, joint.modalities, joint.diffusion, losses


def filled(network):
    """Every weight from its name, so that both sides begin alike."""
    state = {}
    for name, value in network.state_dict().items():
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(value.shape)
        scale = 1 / np.sqrt(max(np.prod(value.shape[1:]), 1)) if value.dim() > 1 else 0.1
        state[name] = th.from_numpy(np.asarray(abs(draw) if "variance" in name else draw * scale)).to(value)
    network.load_state_dict(state)


def main():
    network, modalities, diffusion, losses = made()
    filled(network)
    network.train()
    variances = {name: value.clone() for name, value in network.state_dict().items() if "variance" in name}
    result = {}
    optimizer = th.optim.AdamW(network.parameters(), lr=1e-4)
    for step in range(STEPS):
        th.manual_seed(step)
        images, noise = th.rand(4, 3, SIZE, SIZE) * 2 - 1, th.randn(4, 3, SIZE, SIZE)
        t = th.randint(diffusion.num_timesteps, (4,))
        cond = {"y": th.tensor([step % CLASSES, 1, -1, 3])}
        terms = losses(images, t, cond, noise)
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
        result |= {f"step {step} {name}": value.detach().numpy() for name, value in terms.items()}
    network.load_state_dict(variances, strict=False)  # measured otherwise by each side
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("codes")}
    result |= {f"weight {name}": value.numpy() for name, value in state.items()}
    modalities.refresh_codes(network, images)
    network.eval()
    label = {"label": th.eye(CLASSES)[[2, 0]]}
    cases = {
        "ddpm": {},
        "ddim": {"sampler": "ddim"},
        "dpm++, a given label": {"sampler": "dpm++", "given": label},
        "plms, guided": {"sampler": "plms", "cond_fn": lambda x, t, **_: 0.3 * x.cos()},
        "ddpm, guided": {"cond_fn": lambda x, t, **_: 0.3 * x.cos()},
    }
    for name, options in cases.items():
        made_ = joint_sample(diffusion, modalities, network, (2, 3, SIZE, SIZE), PerSample([7, 8]), **options)
        result[f"{name} images"] = made_.images.numpy()
        result |= {f"{name} {key}": value.detach().numpy() for key, value in made_.values.items()}
    np.savez(sys.argv[1], **result)


if __name__ == "__main__":
    main()
