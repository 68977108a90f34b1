"""Draw the shift's size atil_t of every aggregation schedule, for linear and cosine betas:
docs/images/aggregation.png.
"""

import logging

import numpy as np
from PIL import Image

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.figures import Curve, line_plot
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.mt.aggregation import SCHEDULES, Aggregation

STEPS = 1000
PEAK = 0.5  # kappa
TOP = 1.2  # of the plot: the literal weights leave it


def curves(noise_schedule: str) -> list[Curve]:
    """atil_t of every schedule, and the signal sqrt(abar_t) and noise sqrt(1 - abar_t) that it competes
    with.
    """
    betas = get_named_beta_schedule(noise_schedule, STEPS)
    abar, steps = np.cumprod(1 - betas), np.arange(STEPS)
    drawn = []
    for schedule in SCHEDULES:
        row = Aggregation.named(schedule, betas, {"x": PEAK}).coefficients[0]
        name = schedule if row.max() <= PEAK * 1.001 else f"{schedule} (up to {row.max():.0f})"
        drawn.append(Curve(name, steps, np.where(row <= TOP, row, np.nan)))
    # Dashes need points further apart than they are long.
    few = np.linspace(0, STEPS - 1, 45).round().astype(int)
    signal = Curve("sqrt(abar), the image", few, np.sqrt(abar[few]), dashed=True)
    return [*drawn, signal, Curve("sqrt(1 - abar), the noise", few, np.sqrt(1 - abar[few]), dashed=True)]


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--out", default="docs/images/aggregation.png", path="file", help="the image")
    return own


@exit_on_user_error()
def main():
    out = parser().parse_args().out
    # Its warning about the literal weights is what the image shows.
    logging.getLogger("guided_diffusion.mt.aggregation").setLevel(logging.ERROR)
    plots = [
        line_plot(curves(name), "t", "atil", f"{name} betas, peak {PEAK}", size=(620, 400))[0]
        for name in ("linear", "cosine")
    ]
    image = Image.new("RGB", (sum(p.width for p in plots), plots[0].height), (255, 255, 255))
    for k, plot in enumerate(plots):
        image.paste(plot, (k * plot.width, 0))
    image.save(out, optimize=True)


if __name__ == "__main__":
    main()
