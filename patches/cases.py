"""What a side computes: networks with weights filled from their names, diffusions with a toy model.

The configurations are those of tests/parity. Nothing is imported from either side before a case asks for it.
"""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch as th
import yaml

ADM_FACTORIES = {
    "unet": ("model_and_diffusion_defaults", "create_model_and_diffusion"),
    "superres": ("sr_model_and_diffusion_defaults", "sr_create_model_and_diffusion"),
    "classifier": ("classifier_defaults", "create_classifier"),
}
LDM_CLASSES = {
    "unet": ("ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    "kl": ("ldm.models.autoencoder", "AutoencoderKL"),
    "vq": ("ldm.models.autoencoder", "VQModel"),
}
TABLES = ("betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef1", "posterior_mean_coef2")
LATENT = """
unet_config:
  target: ldm.modules.diffusionmodules.openaimodel.UNetModel
  params: {image_size: 8, in_channels: 3, out_channels: 3, model_channels: 32, num_res_blocks: 1, num_heads: 2,
    attention_resolutions: [2], channel_mult: [1, 2], context_dim: 16, use_spatial_transformer: true}
first_stage_config:
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    embed_dim: 3
    lossconfig: {target: torch.nn.Identity}
    ddconfig: {ch: 32, out_ch: 3, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [], in_channels: 3,
      double_z: true, z_channels: 3, resolution: 16, dropout: 0.0}
cond_stage_config:
  target: ldm.modules.encoders.modules.ClassEmbedder
  params: {embed_dim: 16, n_classes: 5, key: class_label}
"""
LATENT_OPTIONS = dict(timesteps=100, image_size=8, channels=3, linear_start=0.0015, linear_end=0.0195)
LATENT_OPTIONS |= dict(cond_stage_key="class_label", conditioning_key="crossattn", scale_factor=0.18)
LATENT_OPTIONS |= dict(original_elbo_weight=0.01)
LONGEST = 60  # steps of a sampling loop that is run whole


class Cases:
    """The cases of one package: `guided_diffusion` or `ldm`."""

    def __init__(self, parity: Path, package: str):
        self.package = package
        folders = ("adm",) if package == "guided_diffusion" else ("ldm", "ldm_sd2")
        self.index = {parity / f: json.loads((parity / f / "index.json").read_text()) for f in folders}
        self.fill = _load(parity / "weights.py").fill

    def _all(self, *groups):
        return {
            f"{group}.{name}" if group != "keys" else name: (folder, group, case)
            for folder, index in self.index.items()
            for group in groups
            for name, case in index.get(group, {}).items()
        }

    def models(self) -> list[str]:
        """Released models whose state dict is compared."""
        return list(self._all("keys"))

    def names(self) -> list[str]:
        """Cases with numbers, as `group.name`."""
        latent = ["latent.eps", "latent.x0"] if self.package == "ldm" else []
        return [*self._all("unet", "diffusion", "autoencoder"), *latent]

    def keys(self, name: str) -> list:
        """[[tensor's name, shape], ...] of a released model; no memory is used."""
        _, _, case = self._all("keys")[name]
        with th.device("meta"):
            model = self._build(case)
        return [[key, list(value.shape)] for key, value in model.state_dict().items()]

    def run(self, name: str) -> dict[str, np.ndarray]:
        """The numbers of a case."""
        if name.startswith("latent."):
            return self._latent(name.removeprefix("latent."))
        folder, group, case = self._all("unet", "diffusion", "autoencoder")[name]
        with np.load(folder / f"{name.split('.', 1)[1]}.npz") as data:
            inputs = {key: th.from_numpy(data[key]) for key in data.files if data[key].size}
        compute = {"unet": self._network, "diffusion": self._diffusion, "autoencoder": self._autoencoder}
        result = compute[group](case, inputs)
        return {key: np.asarray(value, dtype=np.float64) for key, value in result.items()}

    def _build(self, case):
        if self.package == "ldm":
            module, name = LDM_CLASSES[case.get("kind", "unet")]
            extra = {} if name == "UNetModel" else {"lossconfig": {"target": "torch.nn.Identity"}}
            return getattr(importlib.import_module(module), name)(**case["params"], **extra)
        if case["kind"] == "raw_unet":
            return importlib.import_module("guided_diffusion.unet").UNetModel(**case["flags"])
        script_util = importlib.import_module("guided_diffusion.script_util")
        defaults, create = (getattr(script_util, name) for name in ADM_FACTORIES[case["kind"]])
        made = create(**{**defaults(), **case["flags"]})
        return made[0] if isinstance(made, tuple) else made

    def _network(self, case, data):
        model = self._build(case)
        self.fill(model)
        model.eval()
        x = data["x"].requires_grad_()
        known = {key: data[key] for key in ("y", "low_res", "context") if key in data}
        out = model(x, data["t"], **known)
        (out * data["probe"]).sum().backward()
        return {"output": out.detach(), "gradient": x.grad}

    @th.no_grad()
    def _autoencoder(self, case, data):
        model = self._build(case)
        self.fill(model)
        model.eval()
        if case["kind"] == "vq":
            quant, loss, _ = model.encode(data["x"])
            return {"codes": quant, "loss": loss.reshape(1), "decoded": model.decode(quant)}
        posterior = model.encode(data["x"])
        th.manual_seed(3)
        drawn = posterior.sample()
        return {"mean": posterior.mean, "sample": drawn, "decoded": model.decode(posterior.mode())}

    @th.no_grad()
    def _diffusion(self, case, data):
        script_util = importlib.import_module("guided_diffusion.script_util")
        diffusion = script_util.create_gaussian_diffusion(**case["flags"])
        model = ToyModel(case["flags"].get("learn_sigma", False))
        x0, t, noise = data["x0"], data["t"], data["noise"]
        result = {name: getattr(diffusion, name) for name in TABLES}
        x_t = result["q_sample"] = diffusion.q_sample(x0, t, noise=noise)
        result["posterior"] = diffusion.q_posterior_mean_variance(x0, x_t, t)[0]
        result |= {f"p_{k}": v for k, v in diffusion.p_mean_variance(model, x_t, t).items()}
        losses = diffusion.training_losses(model, x0, t, noise=noise)
        result |= {f"training_losses {k}": v for k, v in losses.items()}
        for number, step in enumerate(("p_sample", "ddim_sample", "ddim_reverse_sample")):
            th.manual_seed(number)
            result[step] = getattr(diffusion, step)(model, x_t, t)["sample"]
        th.manual_seed(3)
        result["guided"] = diffusion.p_sample(
            model, x_t, t, cond_fn=lambda x, _: 0.3 * x.cos(), model_kwargs={}
        )["sample"]
        if diffusion.num_timesteps <= LONGEST:
            for loop in ("p_sample_loop", "ddim_sample_loop"):
                th.manual_seed(4)
                result[loop] = getattr(diffusion, loop)(model, tuple(x0.shape), device="cpu")
            th.manual_seed(5)
            result["bound"] = diffusion.calc_bpd_loop(model, x0)["total_bpd"]
        return result

    @th.no_grad()
    def _latent(self, parameterization):
        """A small LatentDiffusion with labels as context: its state dict, loss, coding and samplers."""
        model = importlib.import_module("ldm.models.diffusion.ddpm").LatentDiffusion(
            **yaml.safe_load(LATENT), **LATENT_OPTIONS, parameterization=parameterization
        )
        for part in (model.model, model.first_stage_model, model.cond_stage_model):
            self.fill(part)
        model.eval()
        draw = th.Generator().manual_seed(0)
        x, noise = (th.randn(2, 3, 8, 8, generator=draw) for _ in range(2))
        t = th.tensor([3, 70])
        cond, null = (model.get_learned_conditioning({"class_label": th.tensor(y)}) for y in ([1, 4], [0, 0]))
        # Of the filled weights and their average the names and shapes, of the schedule the numbers.
        state = model.state_dict().items()
        result = {f"state {k}": th.tensor(v.shape) if "." in k else v for k, v in state}
        result |= {"decoded": model.decode_first_stage(x), "q_sample": model.q_sample(x, t, noise=noise)}
        loss, logged = model.p_losses(x, cond, t, noise=noise)
        result |= {"loss": loss} | {f"logged {k}": v for k, v in logged.items()}
        guided = dict(unconditional_guidance_scale=2.0, unconditional_conditioning=null)
        common = dict(S=10, batch_size=2, shape=(3, 8, 8), conditioning=cond, x_T=noise, verbose=False)
        # Upstream's samplers take the network's output for noise, whatever it is.
        for name in ("ddim", "plms") if parameterization == "eps" else ():
            module = importlib.import_module(f"ldm.models.diffusion.{name}")
            # Upstream's register_buffer moves to CUDA.
            kind = type("OnCpu", (getattr(module, f"{name.upper()}Sampler"),), {"register_buffer": _set})
            result[name] = kind(model).sample(**common)[0]
            result[f"{name} guided"] = kind(model).sample(**common, **guided)[0]
        return result


class ToyModel:
    """Cheap, and sensitive to time, position and value."""

    def __init__(self, learn_sigma: bool):
        self.learn_sigma = learn_sigma

    def __call__(self, x, t, **_):
        phase = t.float().mul(1e-3).reshape(-1, 1, 1, 1)
        mean = (x * (1 + phase)).sin() + 0.2 * x.roll(1, dims=2)
        return th.cat([mean, (2 * x - phase).cos()], dim=1) if self.learn_sigma else mean


def _set(owner, name, value):
    setattr(owner, name, value)


def _load(path):
    spec = importlib.util.spec_from_file_location("parity_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
