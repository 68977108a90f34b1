"""What a side computes: networks with weights filled from their names, diffusions with a toy model.

The configurations are those of tests/parity. Nothing is imported from either side before a case asks for it.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch as th

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
LONGEST = 60  # steps of a sampling loop that is run whole


class Cases:
    """The cases of one package: `guided_diffusion` or `ldm`."""

    def __init__(self, parity: Path, package: str):
        self.package = package
        self.folders = [parity / name for name in ("adm",)] if package == "guided_diffusion" else []
        self.folders = self.folders or [parity / name for name in ("ldm", "ldm_sd2")]
        self.index = {folder: json.loads((folder / "index.json").read_text()) for folder in self.folders}
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
        return list(self._all("unet", "diffusion", "autoencoder"))

    def keys(self, name: str) -> dict:
        """{"state": [[tensor's name, shape], ...]} of a released model; no memory is used."""
        _, _, case = self._all("keys")[name]
        with th.device("meta"):
            model = self._build(case)
        return {"state": [[key, list(value.shape)] for key, value in model.state_dict().items()]}

    def run(self, name: str) -> dict[str, np.ndarray]:
        """The numbers of a case."""
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
        result["guided"] = diffusion.p_sample(model, x_t, t, cond_fn=lambda x, _: 0.3 * x.cos())["sample"]
        if diffusion.num_timesteps <= LONGEST:
            for loop in ("p_sample_loop", "ddim_sample_loop"):
                th.manual_seed(4)
                result[loop] = getattr(diffusion, loop)(model, tuple(x0.shape), device="cpu")
            th.manual_seed(5)
            result["bound"] = diffusion.calc_bpd_loop(model, x0)["total_bpd"]
        return result


class ToyModel:
    """Cheap, and sensitive to time, position and value."""

    def __init__(self, learn_sigma: bool):
        self.learn_sigma = learn_sigma

    def __call__(self, x, t, **_):
        phase = t.float().mul(1e-3).reshape(-1, 1, 1, 1)
        mean = (x * (1 + phase)).sin() + 0.2 * x.roll(1, dims=2)
        return th.cat([mean, (2 * x - phase).cos()], dim=1) if self.learn_sigma else mean


def _load(path):
    spec = importlib.util.spec_from_file_location("parity_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
