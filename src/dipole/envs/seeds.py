"""Where each use of an environment takes its seeds from. The ranges never meet, so no episode is seen twice.

Demonstrations count up from `COLLECT_SEED`, the choice between checkpoints during training from `SELECT_SEED`, and the
final evaluation from `EVAL_SEED`. Choosing a checkpoint on the seeds it is reported on would flatter it.
"""

from __future__ import annotations

COLLECT_SEED = 0
SELECT_SEED = 50_000
EVAL_SEED = 100_000
