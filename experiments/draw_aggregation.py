"""Draw the shift's size atil_t of every aggregation schedule, for linear and cosine betas:
docs/images/aggregation.png, and the same as .pdf beside it.
"""

from guided_diffusion import flags
from guided_diffusion.errors import exit_on_user_error


def parser() -> flags.Parser:
    """The flags of this script."""
    own = flags.Parser(__doc__)
    own.add("--out", default="docs/images/aggregation.png", path="image", help="the image, also as .pdf")
    return own


if __name__ == "__main__":
    flags.answer_early(parser)  # before the slow imports


import logging

import numpy as np

from guided_diffusion.figures import Curve, Plot, save_plots
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
    signal = Curve("sqrt(abar), the image", steps, np.sqrt(abar), dashed=True)
    return [*drawn, signal, Curve("sqrt(1 - abar), the noise", steps, np.sqrt(1 - abar), dashed=True)]


@exit_on_user_error()
def main():
    out = parser().parse_args().out
    # Its warning about the literal weights is what the image shows.
    logging.getLogger("guided_diffusion.mt.aggregation").setLevel(logging.ERROR)
    plots = [
        Plot(curves(name), "t", "atil", f"{name} betas, peak {PEAK}", top=TOP)
        for name in ("linear", "cosine")
    ]
    save_plots(plots, out)


if __name__ == "__main__":
    main()
