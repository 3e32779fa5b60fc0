"""What sweep.py is made of: lists of experiments that are run over several seeds.

suites      the experiments and questions of each suite
plans       the runs of a suite and their state
estimate    what they would cost here
launch      running them on this machine or on a SLURM cluster
findings    tables, curves and differences of the finished runs
publish     copies of runs in results/
reference   whether two commits compute the same
results     the tables of results/
experiments the experiments that belong into results/
campaign    running these within a budget of time
commands    the command lines of publish, report and campaign
"""
