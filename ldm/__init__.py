"""Latent diffusion, on the interface of CompVis/latent-diffusion."""
