"""Where images come from, and what is done to a batch of them.

Sources:  archives (CIFAR), image_folder (with its folder_cache), shapes (drawn, no files needed)
Datasets: examples (Examples, Split), splits (stratified selection), statistics (mean and std),
          residency (on the device or streamed from the host), locking (one process writes)
Batches:  pipeline (Pipeline, TRANSFORMS), augment, auto_augment, mixing, draws (random numbers)
"""
