"""Models to share: folders and repositories of the Hugging Face hub, by huggingface_hub's mixin.

A folder holds model.safetensors, which describes itself (see conversion.py), config.json with the same flags, and a
model card, README.md.
"""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download

from .. import checkpoint_util
from ..errors import UserError, UserFileError, UserValueError, one_line

# Flags of training that the card tells; no folder of its maker is among them.
TRAINING = (
    "iterations",
    "batch_size",
    "lr",
    "lr_anneal_steps",
    "weight_decay",
    "ema_rate",
    "precision",
    "schedule_sampler",
    "random_flip",
    "seed",
)
PAPER = "https://arxiv.org/abs/2407.17571"
_CARD = """# {title}

A multi-modal diffusion model ([MT-Diffusion]({paper})): one U-Net generates images of {size}x{size} pixels ({channels}
channels) together with {names}. What is given may be any of them, what is wanted any other.

## What it generates

| modality | kind | shape | variant |
|---|---|---|---|
{modalities}

In variant U the network sees the latent alone, in X also the modality. {classes}

## How to sample

```python
from guided_diffusion.mt.model import JointModel
from guided_diffusion.seeding import PerSample

model = JointModel.from_pretrained("{repo}")
sample = model.sample(PerSample(range(4)), steps=20, sampler="dpm++sde")
sample.images, sample.values  # [4, {channels}, {size}, {size}] in [-1, 1], and the modalities by name
```

or, with the folder at hand, `python scripts/mt_image_sample.py --model_path FOLDER` (`--given`, `--want`: any direction).

## How it was trained

{training}

The network's flags are in config.json.

## Citation

```bibtex
@inproceedings{{chen2024mtdiffusion,
  title     = {{Diffusion Models for Multi-Modal Generative Modeling}},
  author    = {{Changyou Chen and Han Ding and Bunyamin Sisman and Yi Xu and Ouye Xie and Benjamin Z. Yao and
               Son Dinh Tran and Belinda Zeng}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2024}},
  url       = {{{paper}}}
}}
```
"""


class HubModel(
    ModelHubMixin,
    library_name="mt-diffusion",
    paper_url=PAPER,
    license="mit",
    pipeline_tag="unconditional-image-generation",
    tags=["diffusion", "multi-modal", "mt-diffusion"],
):
    """`save_pretrained(folder)`, `from_pretrained(folder or repository)` and `push_to_hub(repository)` of a JointModel."""

    def _save_pretrained(self, save_directory: Path) -> None:
        if not self.flags:
            raise UserValueError(
                "only a model that was made of flags (JointModel.from_flags, load) can be shared"
            )
        self._hub_mixin_config = {**self.flags, **self.training}
        about = {checkpoint_util.METADATA: {"kind": "joint", "flags": self._hub_mixin_config}}
        path = save_directory / checkpoint_util.HUB_WEIGHTS
        checkpoint_util.save_safetensors(self.network.state_dict(), path, about)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options):
        """The model of a folder of `save_pretrained`, or of a repository; options: of the mixin. UserError where there is
        none, or where it is no such model."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            why = one_line(error)
            raise UserFileError(
                f"{pretrained_model_name_or_path} is neither a folder nor a repository that can be reached ({why})"
            ) from None

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token=None, **_of_config
    ):
        if Path(model_id).is_dir():
            path = Path(model_id) / checkpoint_util.HUB_WEIGHTS
            if not path.is_file():
                raise UserFileError(f"{model_id} holds no {path.name}: it was not written by save_pretrained")
            return cls.load(str(path))
        how = dict(revision=revision, cache_dir=cache_dir, force_download=force_download, token=token)
        how["local_files_only"] = local_files_only
        return cls.load(hf_hub_download(model_id, checkpoint_util.HUB_WEIGHTS, **how))

    def generate_model_card(
        self, title: str = "MT-Diffusion", repo: str = "REPOSITORY", **_told
    ) -> ModelCard:
        """The card: what the model generates, how it was trained, how to sample it, whom to cite."""
        members = list(self.modalities)
        rows = [
            f"| {m.name} | {m.kind} | {' x '.join(map(str, m.shape))} | {'X' if m.as_input else 'U'} |"
            for m in members
        ]
        names = list(self.class_names)
        flags = {**self.flags, **self.training}
        told = [
            name for name in (*TRAINING, "diffusion_steps", "noise_schedule", "aggregation") if name in flags
        ]
        text = _CARD.format(
            title=title,
            repo=repo,
            paper=PAPER,
            size=self.flags["image_size"],
            channels=self.flags["image_channels"],
            names=", ".join(m.name for m in members) or "nothing else",
            modalities="\n".join(rows) or "| none | | | |",
            classes=f"Classes: {', '.join(names[:50])}{', ...' if len(names) > 50 else ''}." if names else "",
            training="\n".join(f"- {name}: {flags[name]}" for name in told),
        )
        return ModelCard(f"---\n{self._hub_mixin_info.model_card_data.to_yaml()}\n---\n\n{text}")


def training_of(flags: Mapping) -> dict:
    """Those of a run's flags that the card tells."""
    return {name: flags[name] for name in TRAINING if name in flags}
