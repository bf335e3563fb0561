"""Data sets: each gives (input, target) pairs by number, and whole batches at once.

What training needs from a data set is the protocol `base.Data`: `len(data)`, `data[i]`, and
`data.gather(indices)`, which reads a whole batch without a Python loop over the samples, besides
`input_shape`, `num_outputs`, `name`, `source` and `digest`. Its other members are optional, with
defaults in `base.BatchDataset`.

Any map-style PyTorch Dataset of your own works as it is (`data.train._target_=my_module.MyData`):
`map_style.adapt` wraps it. It is read as PyTorch's DataLoader reads it: each process builds its own
copy, and one thread builds and reads it, so that it may hold a file handle or a database connection.
A class whose samples may be read by several threads at once says so with the attribute
`thread_safe = True`, and with `readers = 4` that reading four batches at a time is worth while.

To add a data set to Descent, write one small file here and one YAML in `configs/data/`.

1. `service/descent/data/flowers.py` reads the data and hands two tensors to `TensorData`::

       class Flowers(TensorData):
           def __init__(self, split: str = "all", holdout: float = 0.1, seed: int = 0) -> None:
               measured, species = load_iris(return_X_y=True)
               rows = rows_of(len(measured), split, holdout, seed)
               super().__init__(
                   torch.from_numpy(measured[rows]).float(),   # [n, 4]
                   torch.from_numpy(species[rows]).long(),     # [n]
                   num_outputs=3, name="flowers", source="scikit-learn load_iris",
               )

2. `configs/data/flowers.yaml`, whose first line `descent config --groups` shows::

       # Iris flowers, 4 measurements, 3 species (scikit-learn).
       name: flowers
       holdout: 0.1
       train: {_target_: descent.data.flowers.Flowers, split: train, holdout: "${data.holdout}"}
       evaluate: {_target_: descent.data.flowers.Flowers, split: evaluate, holdout: "${data.holdout}"}

Then `descent train data=flowers`. With `evaluate: null`, Descent holds out a share itself
(`splits.split`). A data set that is larger as floats than on disk keeps its small form and overrides
`TensorData.decode`, as `idx.py` and `stdlib_bytes.py` do.

A data set that is read piece by piece has a `layout` and overrides `prefetch`: then the sample order
goes shard by shard. A data set whose batches cost no reading says `in_memory = True`. Parts of a data
set are views (`base.View`). Samples that can't be used raise `bad_records.BadRecords`. Files on S3
come through `descent.storage` and the node's `cache`.

Whatever is wrong with a file is a `descent.errors.DataError` that names the file, the place in it, and
what to do.
"""
