"""What the training scripts share.

arguments          options, their layers of values, what is recorded
config_file        reads --config: JSON or YAML
checks             what is refused before any work
initial_model      the model that a run starts from
inputs             the batches that a run trains, evaluates and tests on
loop               the step loop: train_epoch
evaluation         loss and accuracy over every image: evaluate
state              everything that changes while a run trains: the contents of last.pt
optimizers         parameter groups and optimizers
muon               Muon for convolutions with SGD for the rest
schedules          learning rate, warmup and averaging over the length of a run
progressive        smaller inputs early in training
moving_average     the moving average of weights
lookahead          weights that are set to an average of themselves
mixed_precision    autocast
devices            selecting, seeding and measuring the device
distributed        several processes; sync_batch_norm: batch norm over all of them
run                a run in progress: signals, directory, display, its end
run_directory      config.json, metrics.csv, checkpoints, summary.json
test_time_augmentation    logits averaged over views of an image
resume             whether a run may resume, and from what
environment        what a run is on: versions, device, commit
tensorboard        images, hyper-parameters and confusion matrix
terminal           progress display and signal handling
linear_probe       a classifier on features that are computed once
memory             the memory that a step needs
fitting            splits batches so that they fit
out_of_memory      running out of memory, explained
preflight          --dry-run and --smoke of train_sota.py
doctor             what this machine has and can reach
"""
