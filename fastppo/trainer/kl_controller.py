"""How the KL coefficient beta of the reward r = score - beta * KL moves from step to step."""


class FixedKLController:
    """beta stays what it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Nothing to do; the adaptive controller's arguments."""


class AdaptiveKLController:
    """beta *= 1 + clip(current / target - 1, -0.2, 0.2) * n_steps / horizon.

    The proportional controller of Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019),
    section 2.2. target: KL per sequence in nats; horizon: in samples, as n_steps.
    """

    MAX_ERROR = 0.2

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        # float: a numpy float32 would make of beta a float32 in some steps, by whether the error is clipped
        error = min(max(float(current) / self.target - 1, -self.MAX_ERROR), self.MAX_ERROR)
        self.value *= 1 + error * n_steps / self.horizon
