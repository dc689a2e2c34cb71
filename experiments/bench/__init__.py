"""Benchmarks: our backbones and operations beside those of other libraries, in one run on one machine.

    python -m experiments.bench                      # training speed of models, see models.py
    python -m experiments.bench kernels=recurrent    # the operations, see operations.py

Nothing is timed before it gives the right numbers. The sides take turns, and medians are shown. Tables go to
results/bench/.
"""
