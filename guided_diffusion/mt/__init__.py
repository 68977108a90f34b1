"""MT-Diffusion, whole: several modalities in one diffusion (Diffusion Models for Multi-Modal Generative Modeling, ICLR 2024)."""
