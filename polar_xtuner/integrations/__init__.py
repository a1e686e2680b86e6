"""POLAR as the reward of a reinforcement learning run: verl (`verl.py`), TRL (`trl.py`).

A few lines each on top of `polar_xtuner.client`; neither verl nor TRL is imported. docs/rl.md says
what to put where.
"""
