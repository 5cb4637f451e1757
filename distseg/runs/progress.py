"""Where training stands: what a checkpoint and the logs are in step by."""

from dataclasses import dataclass, field

from distseg.data.plan import Position


@dataclass(frozen=True)
class Progress:
    """Where training stands after an optimizer step."""

    step: int = 0
    """optimizer steps done, skipped ones too"""
    position: Position = field(default_factory=Position)
    """the next sample of the plan"""
    to_validate: bool = False
    """the validation that is due at this step is still to be done"""
    score: float | None = None
    """mean validation Dice at this step, where it was validated"""
    best_score: float | None = None
    """highest mean validation Dice so far"""
    best_step: int | None = None
    stale_validations: int = 0
    """validations since then"""
    skipped_steps: int = 0
    """steps whose gradient was not finite, so far"""
    skipped_in_a_row: int = 0
