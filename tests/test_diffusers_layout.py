"""Stable Diffusion from diffusers' folders, compared with what diffusers and transformers computed from the
same files (tests/parity/diffusers)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch as th
from safetensors.torch import save_file

from guided_diffusion.errors import UserError, UserFileError
from ldm.checkpoint import load_state_dict, trained_steps
from ldm.diffusers_export import write_pipeline
from ldm.diffusers_layout import parameterization as told_parameterization
from ldm.inference import load_model
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.joint import JointLatentDiffusion
from tests.compare import agree
from tests.ldm_models import shaken
from tests.parity.weights import named_weight

FIXTURE = Path(__file__).parent / "parity" / "diffusers"
INDEX = json.loads((FIXTURE / "index.json").read_text())
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
UNET = dict(
    image_size=16, in_channels=4, out_channels=4, model_channels=32, use_spatial_transformer=True,
    legacy=False,
)  # fmt: skip
UNETS = {
    "sd1": dict(
        UNET, num_res_blocks=1, attention_resolutions=[1], channel_mult=[1, 2], num_heads=4, context_dim=24
    ),
    "sd2": dict(
        UNET, num_res_blocks=2, attention_resolutions=[1, 2], channel_mult=[1, 2, 2], num_head_channels=16,
        context_dim=32, use_linear_in_transformer=True,
    ),
}  # fmt: skip
VAE = dict(
    embed_dim=4, lossconfig={"target": "torch.nn.Identity"},
    ddconfig=dict(
        double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2],
        num_res_blocks=1, attn_resolutions=[],
    ),
)  # fmt: skip
ENCODERS = {"sd1": "FrozenCLIPEmbedder", "sd2": "FrozenOpenCLIPEmbedder"}
BETAS = dict(linear_start=0.00085, linear_end=0.012)
PREDICTS = {"sd1": "eps", "sd2": "v"}  # as their schedulers say


def tensors(case, part):
    shapes = INDEX[case]["state"][part]
    return {name: th.from_numpy(named_weight(name, tuple(shape))) for name, shape in shapes.items()}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_folder(folder, case):
    """A pipeline as diffusers saved it: the same files, filled from the same names."""
    write_json(folder / "model_index.json", INDEX[case]["model_index"])
    write_json(folder / "scheduler/scheduler_config.json", INDEX[case]["scheduler"])
    for part, file in FILES.items():
        assert f"{part}/{file}" in INDEX[case]["files"]
        (folder / part).mkdir()
        save_file(tensors(case, part), folder / part / file)
    return folder


def write_text_encoder(folder, case):
    """A text encoder with its tokenizer, as a configuration names it, with weights of its own."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(INDEX["vocabulary"])})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *INDEX["merges"], ""]))
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**INDEX[case]["text"])).save_pretrained(folder)
    return folder


def config(case, text_encoder):
    first_stage = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": VAE}
    options = {"version": str(text_encoder), "layer": "last", "max_length": 8}
    text = {"target": f"ldm.modules.encoders.modules.{ENCODERS[case]}", "params": options}
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNETS[case]}
    return dict(
        unet_config=unet, first_stage_config=first_stage, cond_stage_config=text, cond_stage_key="caption",
        conditioning_key="crossattn", image_size=16, channels=4, parameterization=PREDICTS[case], **BETAS,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def made(tmp_path_factory, case):
    """(folder in diffusers' layout, the configuration of its model)."""
    root = tmp_path_factory.mktemp(case)
    return write_folder(root / "pipeline", case), config(case, write_text_encoder(root / "text", case))


@pytest.fixture(scope="module")
def model(made):
    folder, options = made
    return LatentDiffusion(**options, ckpt_path=str(folder)).eval()


@pytest.fixture(scope="module")
def expected(case):
    with np.load(FIXTURE / f"{case}.npz") as data:
        return {key: th.from_numpy(data[key]) for key in data.files}


# ------------------------------------------------------------------------------------- what the parts compute


@th.no_grad()
def test_unet(model, expected):
    cond = {"c_crossattn": [expected["context"]]}
    agree(model.apply_model(expected["x"], expected["t"], cond), expected["noise"], "prediction")
    with model.ema_scope():
        agree(model.apply_model(expected["x"], expected["t"], cond), expected["noise"], "moving average")


@th.no_grad()
def test_autoencoder(model, expected):
    posterior = model.first_stage_model.encode(expected["picture"])
    agree(posterior.mean, expected["mean"], "mean")
    agree(posterior.logvar, expected["logvar"], "logvar")
    agree(model.first_stage_model.decode(expected["z"]), expected["decoded"], "decoded")


@th.no_grad()
def test_text_encoder(model, expected):
    assert th.equal(model.cond_stage_model.tokens(INDEX["captions"]), expected["ids"])
    agree(model.cond_stage_model(INDEX["captions"]), expected["text"], "text")


def test_schedule(made, model, expected):
    """diffusers' betas come with the weights, and weights for another noise are refused."""
    weights = load_state_dict(made[0])
    agree(weights["betas"], expected["betas"], "betas")
    agree(model.betas, expected["betas"], "the model's betas")
    with pytest.raises(UserError, match="another noise schedule"):
        LatentDiffusion(**(made[1] | {"linear_end": 0.02}), ckpt_path=str(made[0]))


def test_weights_that_predict_something_else_are_refused(made, case):
    folder, options = made
    told, wrong = PREDICTS[case], {"eps": "v", "v": "eps"}[PREDICTS[case]]
    with pytest.raises(UserError, match=f"predicts {told}, the configuration says {wrong}: set param"):
        LatentDiffusion(**(options | {"parameterization": wrong}), ckpt_path=str(folder))


def test_the_scale_of_the_latents_is_the_autoencoders(tmp_path, made):
    folder = tmp_path / "pipeline"
    shutil.copytree(made[0], folder)
    write_json(folder / "vae/config.json", {"scaling_factor": 0.18215})
    assert load_state_dict(folder)["scale_factor"] == pytest.approx(0.18215)
    LatentDiffusion(**made[1], scale_factor=0.18215, ckpt_path=str(folder))
    with pytest.raises(UserError, match=r"trained with scale_factor 0\.18215, the configuration says 1"):
        LatentDiffusion(**made[1], ckpt_path=str(folder))


def test_predictions_that_are_not_known_are_named(tmp_path):
    write_json(tmp_path / "scheduler/scheduler_config.json", {"prediction_type": "flow"})
    with pytest.raises(UserError, match="the network predicts 'flow'; known are epsilon"):
        told_parameterization(tmp_path)


# ------------------------------------------------------------------------------------------- forms of folders


def same(ours, reference):
    assert set(ours) == set(reference)
    return all(th.equal(ours[name], reference[name]) for name in reference)


def write_form(part, form, weights):
    """Weights in the files of a form: whole or sharded (with their index), pickled, of half precision."""
    names = INDEX["forms"][form]
    part.mkdir(parents=True)
    files = [name for name in names if name.endswith((".safetensors", ".bin"))]
    shares = {file: dict(list(weights.items())[i :: len(files)]) for i, file in enumerate(files)}
    for file, share in shares.items():
        th.save(share, part / file) if file.endswith(".bin") else save_file(share, part / file)
    for index in (name for name in names if ".index." in name):
        places = {name: file for file, share in shares.items() for name in share}
        write_json(part / index, {"metadata": {"total_size": 1}, "weight_map": places})


@pytest.mark.parametrize("form", [form for form in INDEX["forms"] if form.startswith("unet")])
def test_forms_of_the_unet(tmp_path, form):
    write_form(tmp_path / "whole/unet", "unet_pickled", tensors("sd1", "unet"))
    weights = tensors("sd1", "unet")
    if "half" in form:
        weights = {name: value.half() for name, value in weights.items()}
    write_form(tmp_path / form / "unet", form, weights)
    read, whole = load_state_dict(tmp_path / form), load_state_dict(tmp_path / "whole")
    assert len(read) == len(weights) and all(name.startswith("model.diffusion_model.") for name in read)
    assert same(read, {name: value.half() for name, value in whole.items()} if "half" in form else whole)


@pytest.mark.parametrize("form", [form for form in INDEX["forms"] if form.startswith("text_encoder")])
def test_forms_of_the_text_encoder(tmp_path, form):
    """Also by the names of transformers 4, as in the released folders, with what else is in them."""
    write_form(tmp_path / "unet", "unet_pickled", tensors("sd1", "unet"))
    weights = {f"text_model.{name}": value for name, value in tensors("sd1", "text_encoder").items()}
    others = {"text_model.embeddings.position_ids": th.arange(8), "text_projection.weight": th.zeros(3, 24)}
    write_form(tmp_path / "text_encoder", form, weights | others)
    prefix = "cond_stage_model.transformer."
    read = {k.removeprefix(prefix): v for k, v in load_state_dict(tmp_path).items() if k.startswith(prefix)}
    assert same(read, weights)


def test_full_precision_is_preferred(tmp_path):
    weights = tensors("sd1", "unet")
    write_form(tmp_path / "unet", "unet_sharded", weights)
    save_file(
        {k: v.half() for k, v in weights.items()}, tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    assert {value.dtype for value in load_state_dict(tmp_path).values()} == {th.float32}


def test_parts_alone(made, case, model):
    """An autoencoder's or a U-Net's own folder, and a pipeline's U-Net alone."""
    vae = AutoencoderKL(**VAE, ckpt_path=str(made[0] / "vae"))
    assert same(vae.state_dict(), model.first_stage_model.state_dict())
    for source in (made[0], made[0] / "unet"):
        alone = DDPM(
            made[1]["unet_config"], conditioning_key="crossattn", parameterization=PREDICTS[case],
            ckpt_path=str(source), load_only_unet=True,
        )  # fmt: skip
        assert same(alone.model.state_dict(), model.model.state_dict())
    assert trained_steps(made[0]) == 0


def test_the_scripts_load_folders(made, model):
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    loaded = load_model({"model": {"target": target, "params": made[1]}}, made[0])
    assert same(loaded.state_dict(), model.state_dict())
    with pytest.raises(UserFileError, match="no checkpoint .*nothing"):
        load_model({}, made[0] / "nothing")


# ---------------------------------------------------------------------------------------------- what is wrong


def break_json(folder):
    (folder / "scheduler/scheduler_config.json").write_text("{")


def truncate(folder):
    path = folder / "unet" / FILES["unet"]
    path.write_bytes(path.read_bytes()[:-1000])


def add_tensor(folder):
    save_file(tensors("sd1", "vae") | {"encoder.extra.weight": th.zeros(1)}, folder / "vae" / FILES["vae"])


def lose_shard(folder):
    write_form(folder / "unet2", "unet_sharded", tensors("sd1", "unet"))
    (folder / "unet" / FILES["unet"]).unlink()
    for path in (folder / "unet2").iterdir():
        path.rename(folder / "unet" / path.name)
    (folder / "unet/diffusion_pytorch_model-00003-of-00004.safetensors").unlink()


def lose_tensor(folder):
    lose_shard(folder)
    save_file(
        {"conv_in.weight": th.zeros(1)}, folder / "unet/diffusion_pytorch_model-00003-of-00004.safetensors"
    )


def escape(folder):
    lose_shard(folder)
    write_json(
        folder / "unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "../secret.bin"}}
    )


def swap_text(folder):
    save_file(tensors("sd1", "vae"), folder / "text_encoder" / FILES["text_encoder"])


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda folder: (folder / "vae" / FILES["vae"]).unlink(),
            "vae holds no weights in diffusers' layout",
        ),
        (lambda folder: (folder / "unet").rename(folder / "other"), "model_index.json, but no folder unet"),
        (truncate, "not a whole safetensors file"),
        (break_json, "scheduler_config.json is not JSON"),
        (add_tensor, "vae: encoder.extra.weight is no tensor"),
        (lose_shard, "checkpoint not found.*00003-of-00004"),
        (lose_tensor, "index.json: .* tensors are in none of the files"),
        (escape, "does not say which files beside it"),
        (swap_text, "text_encoder holds no CLIP text model"),
    ],
)
def test_damaged_folders_are_named(tmp_path, damage, message):
    folder = write_folder(tmp_path / "pipeline", "sd1")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_state_dict(folder)
    assert "\n" not in str(caught.value)


def test_folders_of_another_kind_are_named(tmp_path):
    with pytest.raises(UserFileError, match="no weights in diffusers' layout"):
        load_state_dict(tmp_path)
    save_file(tensors("sd1", "text_encoder"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="neither a U-Net nor an autoencoder"):
        load_state_dict(tmp_path)


def test_another_models_folder_is_refused(made, case):
    other = config({"sd1": "sd2", "sd2": "sd1"}[case], made[1]["cond_stage_config"]["params"]["version"])
    with pytest.raises(UserError, match="does not fit .*LatentDiffusion"):
        LatentDiffusion(**(other | {"parameterization": PREDICTS[case]})).init_from_ckpt(made[0])


# --------------------------------------------------------------------------------------------------- and out again


@pytest.fixture(scope="module")
def exported(tmp_path_factory, case, model):
    """(diffusers, the folder that the model became)."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("exported") / case
    write_pipeline(model, folder)
    return diffusers, folder


@th.no_grad()
def test_diffusers_computes_the_same_from_the_exported_folder(exported, model, expected):
    diffusers, folder = exported
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs = pipeline.unet(expected["x"], expected["t"], expected["context"]).sample
    with model.ema_scope():
        ours = model.apply_model(expected["x"], expected["t"], {"c_crossattn": [expected["context"]]})
    agree(theirs, ours, rtol=1e-5)
    agree(pipeline.vae.decode(expected["z"]).sample, model.first_stage_model.decode(expected["z"]), rtol=1e-5)
    tokens = pipeline.tokenizer(
        INDEX["captions"],
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    assert th.equal(tokens, expected["ids"])
    agree(
        pipeline.text_encoder(tokens).last_hidden_state, model.cond_stage_model(INDEX["captions"]), rtol=1e-5
    )


@th.no_grad()
def test_a_pipeline_draws_what_our_sampler_draws(exported, model):
    diffusers, folder = exported
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = th.randn(2, 4, 16, 16, generator=th.Generator().manual_seed(5))
    captions = INDEX["captions"]
    theirs = pipeline(
        captions, latents=noise, num_inference_steps=10, guidance_scale=2.0, output_type="latent"
    ).images
    with model.ema_scope():
        ours, _ = DDIMSampler(model).sample(
            10, 2, (4, 16, 16), model.get_learned_conditioning(captions), x_T=noise, verbose=False,
            unconditional_guidance_scale=2.0, unconditional_conditioning=model.get_unconditional_conditioning(2),
        )  # fmt: skip
    agree(theirs, ours, rtol=1e-4)


def test_the_exported_folder_is_the_model(exported, made, model):
    """Read back, it has every weight of the model."""
    _, folder = exported
    again = LatentDiffusion(**made[1], scale_factor=model.scale_factor, ckpt_path=str(folder))
    unread = (
        f"cond_stage_model.model.transformer.resblocks.{2 - getattr(model.cond_stage_model, 'unread', 0)}."
    )
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("model_ema", unread))}
    loaded = again.state_dict()
    assert all(th.equal(loaded[k], v) for k, v in own.items() if k.startswith(("model.", "first_stage")))
    assert all(th.equal(loaded[k], v) for k, v in own.items() if k.startswith("cond_stage"))


@th.no_grad()
def test_a_joint_model_leaves_as_its_model_of_captions(tmp_path, made):
    """Without heads, presence and the channels of X: what it predicts where no modality is there."""
    modalities = {"depth": {"preset": "image", "variant": "X"}, "other": {"preset": "image"}}
    model = shaken(JointLatentDiffusion(**made[1], modalities=modalities).eval())
    write_pipeline(model, tmp_path / "out")
    plain = LatentDiffusion(**made[1], ckpt_path=str(tmp_path / "out")).eval()
    z, t, cond = (
        th.randn(2, 4, 16, 16),
        th.tensor([3, 400]),
        model.get_learned_conditioning(INDEX["captions"][:2]),
    )
    ours, _ = model.modalities.apply(model.model, z, t, {}, cond)
    agree(plain.apply_model(z, t, cond), ours, rtol=1e-5)


def test_what_stable_diffusion_is_not_is_named(made):
    folder, options = made
    other = dict(
        options, unet_config={**options["unet_config"], "params": {**options["unet_config"]["params"]}}
    )
    other["unet_config"]["params"]["resblock_updown"] = True
    with pytest.raises(UserError, match="diffusers' Stable Diffusion cannot express resblock_updown True"):
        write_pipeline(LatentDiffusion(**other), folder / "nothing")
    assert not (folder / "nothing").exists()
