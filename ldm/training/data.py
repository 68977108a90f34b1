"""The data of a training run from its configuration, in an order that a resumed run continues exactly.

What a run draws from its data depends on nothing but (seed, epoch, index): the order of an epoch is
drawn from (seed, epoch), and before a sample is read, the generators of torch, NumPy and random are
seeded for it. So neither the number of workers nor a restart changes which crop an image gets.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from guided_diffusion import dist_util
from guided_diffusion.checkpoint_util import seed_everything
from guided_diffusion.errors import UserError
from guided_diffusion.seeding import derive_seed
from ldm.util import Indexed, instantiate_from_config

SPLITS = ("train", "validation", "test", "predict")


class WrappedDataset(Dataset):
    """Any object with a length and items as a dataset of torch's."""

    def __init__(self, dataset: Sequence):
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.data[index]


class SeededDataset(Dataset):
    """`dataset` with keys (epoch, index): the random generators are seeded for the sample before it is
    read."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        seed_everything(derive_seed(self.seed, *key))
        return self.dataset[key[1]]


class EpochSampler(Sampler):
    """This rank's keys (epoch, index) of one epoch after the other, from any batch on.

    size: of the dataset; batch_size: per rank. Batch k of all ranks together is what one rank with the whole
    batch would take; where the last indices do not suffice for every rank, the first ones come again.
    Lightning calls `set_epoch` before every epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool):
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.epoch, self._done = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; the current epoch is left where it is."""
        if epoch != self.epoch:
            self.epoch, self._done = epoch, 0

    def go_to(self, epoch: int, batches: int) -> None:
        """Continue in `epoch` after its first `batches` batches."""
        self.epoch, self._done = epoch, batches

    def __len__(self) -> int:
        """Samples of a whole epoch on this rank (Lightning counts the batches that were done before)."""
        return -(-self.size // dist_util.get_world_size())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        ranks, epoch = dist_util.get_world_size(), self.epoch
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order = torch.randperm(self.size, generator=generator)
        order = torch.cat((order, order[: -self.size % ranks]))
        mine = order[dist_util.get_rank() :: ranks][self._done * self.batch_size :]
        return ((epoch, index) for index in mine.tolist())


class DataModuleFromConfig(pl.LightningDataModule):
    """Datasets from configurations (target, params), and their loaders (interface: latent-diffusion,
    main.py).

    batch_size: per process; train, validation, test, predict: datasets; wrap: they are mere sequences;
    num_workers: processes that read, None: twice the batch size, but no more than there are cores;
    shuffle_test_loader, shuffle_val_dataloader: as they say. use_worker_init_fn is accepted for the sake of
    upstream's configurations: samples are seeded one by one in any case. `seed` is set by the program.
    `UserError` for datasets without length or without samples, and for a checkpoint that stopped in the
    middle of an epoch of other data.
    """

    seed = 0

    def __init__(
        self,
        batch_size: int,
        train: Mapping | None = None,
        validation: Mapping | None = None,
        test: Mapping | None = None,
        predict: Mapping | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
    ):
        super().__init__()
        self.batch_size, self.wrap, self.use_worker_init_fn = batch_size, wrap, use_worker_init_fn
        cores = os.cpu_count() or 1
        self.num_workers = min(2 * batch_size, cores) if num_workers is None else num_workers
        configs = zip(SPLITS, (train, validation, test, predict), strict=True)
        self.dataset_configs = {name: config for name, config in configs if config is not None}
        self._shuffle = {"train": True, "validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self._resume_at: dict[str, int] | None = None
        # Lightning asks which of these there are, and only calls those.
        for name in self.dataset_configs:
            hook = "val" if name == "validation" else name
            make = self._train_loader if name == "train" else functools.partial(self._loader, name)
            setattr(self, f"{hook}_dataloader", make)

    def setup(self, stage: str | None = None) -> None:
        """Make the datasets, once."""
        if hasattr(self, "datasets"):
            return
        self.datasets = {}
        for name, config in self.dataset_configs.items():
            dataset = instantiate_from_config(config, Indexed if self.wrap else Dataset, f"data.{name}")
            self._check(name, config["target"], dataset)
            self.datasets[name] = WrappedDataset(dataset) if self.wrap else dataset

    def _check(self, name, target, dataset):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise UserError(
                f"data.{name}: {target} has no length, so no order to resume in "
                "(TarShards have one in the data module ldm.training.shard_data.ShardDataModule)"
            )
        if len(dataset) == 0:
            raise UserError(f"data.{name}: {target} found nothing: the dataset is empty")

    def state_dict(self) -> dict[str, int]:
        """Where the training data are: epoch, batches done in it, and what an epoch consists of."""
        if "train" not in self.dataset_configs or self.trainer is None:
            return {}
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        epoch, done = self._sampler.epoch, batches
        if batches >= self.trainer.num_training_batches:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches": done, **self._size()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from `state_dict()`. `UserError` in the middle of an epoch whose data or batches
        differ."""
        now = self._size()
        late = ("sizes of shards",)  # which earlier versions did not note
        then = {key: state_dict.get(key, now[key] if key in late else None) for key in now}
        if state_dict.get("batches") and now != then:
            what = ", ".join(
                f"{key} {then[key]} then and {now[key]} now" for key in now if now[key] != then[key]
            )
            raise UserError(
                "the checkpoint stopped in the middle of an epoch, which cannot be continued "
                f"with other data: {what}"
            )
        self._resume_at = {key: state_dict[key] for key in ("epoch", "batches") if key in state_dict}

    def _size(self):
        return {
            "samples": len(self.datasets["train"]),
            "batch_size": self.batch_size,
            "processes": dist_util.get_world_size(),
            "seed": self.seed,
        }

    def _train_loader(self) -> DataLoader:
        loader = self._loader("train")
        self._sampler = loader.sampler
        if self._resume_at:
            self._sampler.go_to(**self._resume_at)
        return loader

    def _loader(self, name):
        dataset = self.datasets[name]
        # Each set's own seed, so that sample 0 of training and of validation are not cropped alike.
        seed = derive_seed(self.seed, SPLITS.index(name))
        sampler = EpochSampler(len(dataset), self.batch_size, seed, self._shuffle.get(name, False))
        return DataLoader(
            SeededDataset(dataset, seed),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
