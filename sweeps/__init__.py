"""What sweep.py is made of: lists of experiments that are run over several seeds.

suites: the experiments and questions; plans: the runs of a suite and their state; launch: running
them here or on a SLURM cluster; findings: tables, curves and differences of the finished runs;
publish, reference: copies of runs in results/; results: their tables; campaign: the experiments
that belong there; commands: the command lines of the last three.
"""
