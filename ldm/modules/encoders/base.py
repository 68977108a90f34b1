"""What the conditioners share: their interface, and reading a CLIP of transformers."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from guided_diffusion.errors import UserFileError, UserValueError

# The hub repository of OpenCLIP's released models, by architecture and weights.
RELEASED = {("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


# Sizes of the released text and image encoders, of which a network is made where no weights are to be read.
ARCHITECTURES = {
    "openai/clip-vit-large-patch14": (
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            patch_size=14,
        ),
        768,
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (
        dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
        dict(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
        ),
        1024,
    ),
}


def released_config(source: str, part: str):
    """The configuration of a released CLIP's `text` or `vision` model. UserValueError for another than those of
    ARCHITECTURES."""
    transformers = import_transformers("a text or image encoder")
    if source not in ARCHITECTURES:
        raise UserValueError(
            f"without weights the sizes of the encoder {source} are not known: choose one of {', '.join(ARCHITECTURES)}"
        )
    text, vision, width = ARCHITECTURES[source]
    if part == "text":
        return transformers.CLIPTextConfig(**text, projection_dim=width)
    return transformers.CLIPVisionConfig(**vision, projection_dim=width)


class AbstractEncoder(nn.Module):
    """What a conditioner is: `encode` makes the U-Net's input of what the data bring."""

    def encode(self, *args, **kwargs):
        """As calling it."""
        return self(*args, **kwargs)


def frozen(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, its parameters without gradients."""
    return module.eval().requires_grad_(False)


def import_transformers(what: str):
    """The package transformers, for a `text encoder`, for example. UserValueError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserValueError(f"{what} needs the package transformers, which is not installed") from None
    return transformers


def subfolder(source: str, names: Sequence[str]) -> str:
    """The first of `names` that is a folder in the folder `source`; "" where none is, or for a name on the hub."""
    return next((name for name in names if (Path(source) / name).is_dir()), "")


@contextlib.contextmanager
def reading(source: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for files that are missing or damaged into UserFileError. what: the words for
    them in its message."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()  # of reading the weights, which takes a moment
    logging.set_verbosity_error()  # the weights of a whole CLIP's other half are left out: nothing to warn of
    try:
        yield
    except OSError as error:
        raise UserFileError(
            f"there is no {what} {source}: neither a folder with a CLIP model, nor a hub repository that can be "
            f"reached ({str(error).splitlines()[0]})"
        ) from None
    except (SafetensorError, RuntimeError, ValueError) as error:  # a file cut off, other shapes, no CLIP
        raise UserFileError(f"the {what} {source} cannot be read: {str(error).splitlines()[0]}") from None
    finally:
        logging.set_verbosity(verbosity)


def load_pretrained(model: type, source: str, part: str, what: str, config=None) -> nn.Module:
    """A model of transformers in evaluation mode, from the subfolder `part` of a folder or of a name on the hub.

    config: instead of that of the files. UserFileError where there is none, or where its weights are not all there.
    """
    with reading(source, what):
        loaded, found = model.from_pretrained(source, subfolder=part, config=config, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise UserFileError(
            f"there is no {what} in {source}: {len(missing)} of its tensors are missing (first: {missing[0]})"
        )
    return loaded.eval()
