"""Gaussian diffusion: the forward process, its reversal, samplers and losses (upstream:
guided_diffusion/gaussian_diffusion.py).

Indices run 0..T-1, abar_t is `alphas_cumprod[t]`. Images are float tensors [B, C, ...] in [-1, 1], `t` is
int64 [B]. A model is a callable (x, timesteps, **model_kwargs) -> [B, C, ...], or [B, 2C, ...] where it
learns the variance.
"""

import enum
import functools
import math

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .progress import tqdm


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """The betas, float64 [T], of `linear` (Ho et al. 2020, scaled to T) or `cosine` (Nichol & Dhariwal 2021).

    NotImplementedError for another name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise NotImplementedError(f"unknown noise schedule {schedule_name!r}: choose linear or cosine")


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """The betas, at most `max_beta`, whose cumulative product of 1 - beta follows alpha_bar(s), s in [0, 1]."""
    level = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.minimum(1 - level[1:] / level[:-1], max_beta)


# What the network predicts: x_{t-1}, x_0 or the noise.
ModelMeanType = enum.Enum("ModelMeanType", "PREVIOUS_X START_X EPSILON")

# The variance of the reverse process: its predicted logarithm; the posterior's; beta; or an interpolation
# between those two
# by a prediction in [-1, 1].
ModelVarType = enum.Enum("ModelVarType", "LEARNED FIXED_SMALL FIXED_LARGE LEARNED_RANGE")


class LossType(enum.Enum):
    """The training loss: squared error (with the bound for learned variances, which RESCALED_ scales by T /
    1000), or the bound itself (RESCALED_: times T, an estimate of the whole)."""

    MSE, RESCALED_MSE, KL, RESCALED_KL = range(1, 5)

    def is_vb(self):
        """Is it the variational bound?"""
        return self in (LossType.KL, LossType.RESCALED_KL)


def _final_sample(progressive):
    """A method that runs the sampler `progressive` to its end and returns the last sample; same arguments."""

    @functools.wraps(progressive)
    def loop(self, *args, **kwargs):
        for step in getattr(self, progressive.__name__)(*args, **kwargs):
            sample = step["sample"]
        return sample

    loop.__name__ = progressive.__name__.removesuffix("_progressive")
    loop.__doc__ = f"Sample from noise to image: a tensor of `shape`. Arguments as {progressive.__name__}."
    return loop


class GaussianDiffusion:
    """Training and sampling for one noise schedule.

    betas: float [T] in (0, 1], from t = 0 on; model_mean_type, model_var_type, loss_type: the enums above;
    rescale_timesteps: the model is called with t * 1000 / T. Tables are NumPy float64 attributes under upstream's
    names.
    aggregation: where modalities are diffused with the image, what shifts the latent (mt/aggregation.py).
    """

    def __init__(
        self,
        *,
        betas,
        model_mean_type,
        model_var_type,
        loss_type,
        rescale_timesteps=False,
        aggregation=None,
    ):
        self.aggregation = aggregation
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be a sequence of numbers in (0, 1]")
        self.num_timesteps = len(betas)

        self.alphas_cumprod = abar = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = abar_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)

        # q(x_t | x_0) and its inversions
        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - abar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - abar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / abar - 1)

        # q(x_{t-1} | x_t, x_0)
        self.posterior_variance = betas * (1.0 - abar_prev) / (1.0 - abar)
        # It is 0 at t = 0: the logarithm takes the next one there.
        floor = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(floor, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(abar_prev) / (1.0 - abar)
        self.posterior_mean_coef2 = (1.0 - abar_prev) * np.sqrt(1.0 - betas) / (1.0 - abar)
        self._large_variance = np.append(floor, betas[1:])

    # The forward process

    def q_mean_variance(self, x_start, t):
        """(mean, variance, log variance) of q(x_t | x_0), each shaped like x_start."""
        return (
            _at(self.sqrt_alphas_cumprod, t, x_start) * x_start,
            _extract_into_tensor(1.0 - self.alphas_cumprod, t, x_start.shape),
            _extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape),
        )

    def q_sample(
        self,
        x_start,
        t,
        noise=None,
        encodings=None,
    ):
        """A sample of q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; noise is drawn unless given."""
        if noise is None:
            noise = th.randn_like(x_start)
        _expect_shape("noise", noise, x_start)
        x_t = _at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        x_t = x_t + _at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        if encodings:  # modality name -> e_i shaped like x_start (paper equation 4)
            x_t = self.aggregation.from_frame(x_t, t, encodings)
        return x_t

    def q_posterior_mean_variance(
        self,
        x_start,
        x_t,
        t,
        encodings=None,
    ):
        """(mean, variance, clipped log variance) of q(x_{t-1} | x_t, x_0)."""
        _expect_shape("x_t", x_t, x_start)
        if encodings:  # of z_{t-1} given z_t and the modalities (paper equation 5)
            x_t = self.aggregation.to_frame(x_t, t, encodings)
        mean = _at(self.posterior_mean_coef1, t, x_t) * x_start + _at(self.posterior_mean_coef2, t, x_t) * x_t
        if encodings:
            mean = self.aggregation.from_frame(mean, t - 1, encodings)
        variance = _extract_into_tensor(self.posterior_variance, t, x_t.shape)
        log_variance = _extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)
        return mean, variance, log_variance

    # The reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """What the model says of x_{t-1} given x = x_t: a dict of `mean`, `variance`, `log_variance`,
        `pred_xstart`.

        denoised_fn is applied to the predicted x_0, then clip_denoised clips that to [-1, 1]. ValueError if
        the model's output does not have the shape that the variance type asks for.
        With an aggregation x is z_t and `mean` that of z_{t-1}, where the model returns a `JointOutput` with the
        modalities' encodings; the result has that under `joint`.
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.aggregation is not None:  # from here on x is y_t, which is a plain DDPM
            output, x, joint = self.aggregation.opened(output, x, t)
        output, variance, log_variance = self._model_variance(output, x, t)

        def process(x_start):
            if denoised_fn is not None:
                x_start = denoised_fn(x_start)
            return x_start.clamp(-1, 1) if clip_denoised else x_start

        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            mean, pred_xstart = output, process(self._predict_xstart_from_xprev(x, t, output))
        else:
            if self.model_mean_type is ModelMeanType.EPSILON:
                output = self._predict_xstart_from_eps(x, t, output)
            pred_xstart = process(output)
            mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        out = {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}
        if self.aggregation is not None and joint is not None:
            out["mean"] = self.aggregation.from_frame(mean, t - 1, joint.encodings)
            out["joint"] = joint
        return out

    def _model_variance(self, output, x, t):
        """Split the model's output: (prediction, variance, log variance), all shaped like x."""
        if self._learns_variance:
            output, raw = self._split_learned(output, x)
            if self.model_var_type is ModelVarType.LEARNED:
                return output, raw.exp(), raw
            low = _at(self.posterior_log_variance_clipped, t, x)
            high = _at(np.log(self.betas), t, x)
            fraction = (raw + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
            return output, log_variance.exp(), log_variance
        _expect_shape("the model's output", output, x)
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            # beta, but at t = 0 the posterior's: decoding with beta there scores badly.
            variance, log_variance = self._large_variance, np.log(self._large_variance)
        else:
            variance, log_variance = self.posterior_variance, self.posterior_log_variance_clipped
        return output, *(_extract_into_tensor(table, t, x.shape) for table in (variance, log_variance))

    @property
    def _learns_variance(self):
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _split_learned(self, output, x):
        channels = x.shape[1]
        if output.shape != (len(x), 2 * channels, *x.shape[2:]):
            raise ValueError(
                f"a model that learns the variance must return {2 * channels} channels for input {tuple(x.shape)}, "
                f"got {tuple(output.shape)}"
            )
        return output.split(channels, dim=1)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        _expect_shape("eps", eps, x_t)
        recip, recipm1 = self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        return _at(recip, t, x_t) * x_t - _at(recipm1, t, x_t) * eps

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        _expect_shape("xprev", xprev, x_t)
        # The posterior mean solved for x_0.
        ratio = self.posterior_mean_coef2 / self.posterior_mean_coef1
        return _at(1.0 / self.posterior_mean_coef1, t, x_t) * xprev - _at(ratio, t, x_t) * x_t

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        signal = _at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return (signal - pred_xstart) / _at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The reverse mean moved by guidance: mean + variance * grad log p(y | x) (Sohl-Dickstein et al.
        2015).

        cond_fn(x, timesteps, **model_kwargs) returns that gradient, shaped like x.
        """
        if "joint" in p_mean_var:  # it knows images, not latents with modalities
            x = self.aggregation.to_frame(x, t, p_mean_var["joint"].encodings)
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """p_mean_variance's result with eps - sqrt(1 - abar_t) * gradient in place of eps (Song 2020)."""
        if "joint" in p_mean_var:
            x = self.aggregation.to_frame(x, t, p_mean_var["joint"].encodings)
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - _at(self.sqrt_one_minus_alphas_cumprod, t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        if "joint" in p_mean_var:
            mean = self.aggregation.from_frame(mean, t - 1, p_mean_var["joint"].encodings)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # Samplers. Noise is drawn at every step, also where it has no weight: seeded results depend on that
    # order.

    def p_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        randn_like=th.randn_like,
    ):
        """One ancestral step: a dict of `sample` (x_{t-1}) and `pred_xstart`.

        randn_like(x) makes the noise.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = mean + _unless_first(t, x) * th.exp(0.5 * out["log_variance"]) * noise
        return _step(sample, out)

    def ddim_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        eta=0.0,
        randn_like=th.randn_like,
    ):
        """One DDIM step (Song et al. 2020, eq. 12), deterministic at eta = 0: `sample` and `pred_xstart`."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        if "joint" in out:
            x = self.aggregation.to_frame(x, t, out["joint"].encodings)
        x_start = out["pred_xstart"]
        # After clipping or guidance, the noise that belongs to the predicted x_0.
        eps = self._predict_eps_from_xstart(x, t, x_start)
        abar, abar_prev = _at(self.alphas_cumprod, t, x), _at(self.alphas_cumprod_prev, t, x)
        sigma = eta * ((1 - abar_prev) / (1 - abar)).sqrt() * (1 - abar / abar_prev).sqrt()
        noise = randn_like(x)
        sample = x_start * abar_prev.sqrt() + (1 - abar_prev - sigma**2).sqrt() * eps
        if "joint" in out:
            sample = self.aggregation.from_frame(sample, t - 1, out["joint"].encodings)
        sample = sample + _unless_first(t, x) * sigma * noise
        return _step(sample, out)

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
    ):
        """One deterministic DDIM step towards noise: `sample` (x_{t+1}) and `pred_xstart`.

        ValueError unless eta = 0.
        """
        if eta != 0.0:
            raise ValueError("the reverse DDIM step is deterministic: eta must be 0")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if "joint" in out:
            x = self.aggregation.to_frame(x, t, out["joint"].encodings)
        x_start = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x_start)
        abar_next = _at(self.alphas_cumprod_next, t, x)
        sample = x_start * abar_next.sqrt() + (1 - abar_next).sqrt() * eps
        if "joint" in out:
            t_next = (t + 1).clamp(max=self.num_timesteps - 1)
            sample = self.aggregation.from_frame(sample, t_next, out["joint"].encodings)
        return {"sample": sample, "pred_xstart": x_start}

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        randn_like=th.randn_like,
    ):
        """Yield p_sample's dict at every step, from t = T-1 down to 0.

        noise: the start, drawn if None; cond_fn: see condition_mean; device: the model's unless given;
        progress: show a bar.
        """

        def step(x, t):
            return self.p_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, randn_like=randn_like
            )

        yield from self._descend(step, model, shape, noise, device, progress)

    p_sample_loop = _final_sample(p_sample_loop_progressive)

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        randn_like=th.randn_like,
    ):
        """Yield ddim_sample's dict at every step, from t = T-1 down to 0.

        Arguments as p_sample_loop_progressive.
        """

        def step(x, t):
            return self.ddim_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, randn_like=randn_like
            )

        yield from self._descend(step, model, shape, noise, device, progress)

    ddim_sample_loop = _final_sample(ddim_sample_loop_progressive)

    def _descend(self, step, model, shape, noise, device, progress):
        """Apply step(x, t) for every t from the last to the first, yielding its dicts."""
        if device is None:
            device = next(model.parameters()).device
        x = th.randn(*shape, device=device) if noise is None else noise
        for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            with th.no_grad():
                out = step(x, th.full((shape[0],), i, device=device, dtype=th.long))
            yield out
            x = out["sample"]

    # Losses and the bound

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """One term of the variational bound in bits per dimension: `output` [B] and `pred_xstart`.

        At t = 0 the negative log likelihood of the 8-bit image, else KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1}
        | x_t)).
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        divergence = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        likelihood = discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        nats = th.where(t == 0, -mean_flat(likelihood), mean_flat(divergence))
        return {"output": nats / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The loss at given timesteps: a dict of tensors [B] with `loss` and its parts `mse`, `vb` where they
        exist.

        The variance, where learned, is trained by the bound alone: the mean it is evaluated with is detached.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, False, model_kwargs)
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1
            return {"loss": bound["output"] * scale}

        terms = {}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if self._learns_variance:
            output, raw_variance = self._split_learned(output, x_t)
            frozen = th.cat([output.detach(), raw_variance], dim=1)
            bound = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)
            # RESCALED: so that the bound does not drown the squared error.
            scale = self.num_timesteps / 1000.0 if self.loss_type is LossType.RESCALED_MSE else 1
            terms["vb"] = bound["output"] * scale
        if self.model_mean_type is ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type is ModelMeanType.START_X:
            target = x_start
        else:
            target, _, _ = self.q_posterior_mean_variance(x_start, x_t, t)
        _expect_shape("the model's output", output, target)
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _prior_bpd(self, x_start):
        """KL(q(x_{T-1} | x_0) || N(0, I)) in bits per dimension: [B]."""
        t = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @th.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        """The whole bound, term by term, on images x_start.

        Returns total_bpd [B] = prior_bpd [B] + the sum over the T columns of vb [B, T] (last timestep first),
        and the mean squared errors xstart_mse and mse (of the noise), [B, T].
        """
        columns = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t = th.full((len(x_start),), i, device=x_start.device)
            noise = th.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            term = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, term["pred_xstart"])
            columns["vb"].append(term["output"])
            columns["xstart_mse"].append(mean_flat((term["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        result = {name: th.stack(values, dim=1) for name, values in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": result["vb"].sum(dim=1) + prior, "prior_bpd": prior, **result}


def _step(sample, out):
    """A sampler's result: x_{t-1} and the predicted x_0; what the model said of modalities stays in it."""
    if "joint" in out:
        return {"sample": sample, "pred_xstart": out["pred_xstart"], "joint": out["joint"]}
    return {"sample": sample, "pred_xstart": out["pred_xstart"]}


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """arr[timesteps], float32, repeated to `broadcast_shape`, whose first axis is the batch."""
    picked = th.from_numpy(arr).to(device=timesteps.device)[timesteps].float()
    return picked.reshape(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)


def _at(table, t, x):
    return _extract_into_tensor(table, t, x.shape)


def _unless_first(t, x):
    """0 where t = 0, 1 elsewhere, shaped to multiply x."""
    return (t != 0).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def _expect_shape(what, tensor, like):
    if tensor.shape != like.shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
