"""Pixel-space diffusion: the interface of openai/guided-diffusion, and the multi-modal terms of MT-Diffusion."""
