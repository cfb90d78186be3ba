"""What the stage evaluate compares, and how."""

from rlhf_ray.config.section import Section, changeable


class EvaluateConfig(Section):
    """Comparison of the SFT model and the PPO policy on held-out prompts."""

    num_prompts: int = changeable(200, ge=1, description="Held-out prompts.")
    bootstrap: int = changeable(2000, ge=100, description="Resamples of the 95% interval.")
