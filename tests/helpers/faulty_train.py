"""train.py with few shapes and the faults in the variable FAULTS, for torchrun."""

import os

import train
from common import command_line
from datasets import shapes
from helpers import faults

if __name__ == "__main__":
    few_shapes = shapes.load_shapes(train=400, test=100)
    shapes.load_shapes = lambda: few_shapes
    faults.inject(os.environ["FAULTS"])
    command_line.run(train.main)
