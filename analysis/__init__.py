"""Reads what runs wrote and compares them: tables, figures and an HTML page, without torch.

metrics     one run: its curves, final values and arguments
replicates  runs that differ by their seed only: mean, deviation, and differences with intervals
documents   accuracies that documents state, to compare runs with
tables      tables of groups of runs: text, Markdown, CSV, LaTeX
panels      what can be drawn: panels, x axes and sizes
curves      figures of groups of runs; curves with bands over seeds
charts      accuracy as bars, by family, and against cost
styles      how curves differ; axes and legends
figures     matplotlib's settings: colors, saving, windows, text
report      an HTML page with a sortable table and interactive curves
published   an experiment of results/: checks, tables and facts
results_page  an HTML page of all published experiments
"""
