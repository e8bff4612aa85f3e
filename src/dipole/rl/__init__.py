"""Improving a trained policy by reinforcement learning: shared pieces, and one file per method.

A method works on a frozen `Base` (features in, normalised chunks out), is fed by a `Collector`, and is run by
`finetune`, which evaluates, saves and resumes.
"""
