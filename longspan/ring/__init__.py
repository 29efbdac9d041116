"""Attention across ranks: traffic says what to send, merge joins the parts."""

from longspan.ring.attention import attend
from longspan.ring.grid import Grid, plan_grid
from longspan.ring.plan import STRATEGIES, Plan, plan
from longspan.ring.transport import RankError

__all__ = ["STRATEGIES", "Grid", "Plan", "RankError", "attend", "plan", "plan_grid"]
