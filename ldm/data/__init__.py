"""Images for latent diffusion, as configurations name them: single ones, pairs, captioned ones, tar shards,
cached latents.

Every dataset here but TarShards, which is a stream, is map style, and an item a dict: images float32 [H, W, 3] in
[-1, 1] by their keys, and `file_path_`. Crops and flips are drawn from Python's `random`, which the training programme
seeds for every sample (ldm/training/data.py): they depend on (seed, epoch, index) alone, so that a resumed run draws
the same.
"""
