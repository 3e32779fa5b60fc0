"""What benchmark.py measures.

measure      timing in turn, the training step, a device's highest speed
comparisons  our data, epoch and checkpoints against alternatives
twins        our models against the same architectures of timm
speeds       the table of models: size, work, memory and speed
time_to      whole runs of a recipe: time to accuracies
"""
