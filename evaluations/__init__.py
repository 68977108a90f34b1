"""The metrics of the MT-Diffusion paper and of ADM, in PyTorch. Imports nothing else of this project."""
