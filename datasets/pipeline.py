from datasets.augment import Pipeline
