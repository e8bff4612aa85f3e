"""Evaluation: rollouts reproducible to the digit, honest statistics, latency, videos and a report page."""
