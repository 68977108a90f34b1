"""What the representation costs in a training step of the small text-to-image model, beside Stable Diffusion's own step.

    python benchmarks/bench_representation.py --threads 1 --repetitions 15

Times forward, backward and AdamW on random latents, captions' states and representations: of the single-task model, of
the joint model whose representation is not encoded (the head alone), and of the whole joint model, which runs the U-Net
once more, without gradient, on every representation. The three take turns, so that other work on the machine meets all
of them; prints medians and their ratios to the single-task step of the same run.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion.config_file import load_with_bases  # noqa: E402
from guided_diffusion.errors import exit_on_user_error  # noqa: E402
from guided_diffusion.flags import Parser  # noqa: E402
from guided_diffusion.seeding import PerSample  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402

FOLDER = ROOT / "configs" / "representation"


class States(torch.nn.Module):
    """In place of a text encoder: the same states [B, 32, 128] for whatever captions."""

    def encode(self, captions: list[str]) -> torch.Tensor:
        """For B captions."""
        return torch.randn(len(captions), 32, 128, generator=torch.Generator().manual_seed(0))


def parser() -> Parser:
    """The flags of this program."""
    own = Parser(__doc__)
    own.add("--batch_size", default=32)
    own.add("--repetitions", default=15, low=1, high=10_000, group="results", help="updates that are timed")
    own.add("--threads", default=1, low=1, high=4096, group="machine", help="threads of the CPU")
    return own


def make(joint: bool, **modality):
    """The model of the small configurations on given latents and contexts, ready to be trained."""
    config = load_with_bases(FOLDER / "text-to-image-small.yaml")
    if joint:
        config = OmegaConf.merge(config, load_with_bases(FOLDER / "joint-small.yaml"))
    model = OmegaConf.to_container(config, resolve=True)["model"]
    params = model["params"]
    params["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    params["cond_stage_config"] = {"target": "torch.nn.Identity"}
    params |= {"scale_by_std": False, "ucg_training": None, "use_ema": False}
    for name in ("ckpt_path", "extractors"):
        params.pop(name, None)
    if joint:
        params["single_task_probability"] = 0.0
        params["modalities"]["representation"] |= modality
    made = instantiate_from_config(model).train()
    made.cond_stage_model = States()
    return made, torch.optim.AdamW(made.trained_parameters(), 1e-4)


def step(model, optimizer, batch) -> float:
    """The seconds of one update."""
    started = time.perf_counter()
    loss, _ = model.shared_step(batch, PerSample(range(len(batch["txt"]))))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - started


@exit_on_user_error()
def main():
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = {
        "single task": make(joint=False),
        "joint, head alone": make(joint=True, encoder=lambda value: value.new_zeros(len(value), 4, 16, 16)),
        "joint": make(joint=True),
    }
    n = args.batch_size
    batch = {
        "jpg_latent": torch.randn(n, 4, 16, 16),
        "txt": [""] * n,
        "representation": torch.randn(n, 128),
    }
    seconds = {name: [] for name in models}
    for repetition in range(args.repetitions + 2):
        for name, (model, optimizer) in models.items():
            taken = step(model, optimizer, batch)
            if repetition >= 2:  # the first ones warm up
                seconds[name].append(taken)
    weights = {name: sum(p.numel() for p in model.model.parameters()) for name, (model, _) in models.items()}
    print(
        f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}, float32, batch {n}, "
        f"latents 4x16x16, {args.repetitions} repetitions\n"
    )
    print("| training step | parameters | seconds, median (min to max) | ratio |\n|---|---|---|---|")
    base = statistics.median(seconds["single task"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(
            f"| {name} | {weights[name]:,} | {median:.3f} ({min(taken):.3f} to {max(taken):.3f}) | {median / base:.2f} |"
        )


if __name__ == "__main__":
    main()
