"""What a PPO run will need, before a GPU is rented: memory by part, the largest micro-batch, tokens/s from measured rates."""

from fastppo.planner.memory import Job, Plan, Planner
from fastppo.planner.passes import CannotPlan
from fastppo.planner.speed import NoRates, Rates, read_rates, seconds, tokens_per_second

__all__ = ["CannotPlan", "Job", "NoRates", "Plan", "Planner", "Rates", "read_rates", "seconds", "tokens_per_second"]
