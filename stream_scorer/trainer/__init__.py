"""The trainer: `loop.py` is its loop, `publisher.py` decides what scorers get to see."""

from stream_scorer.trainer.loop import Trainer
from stream_scorer.trainer.policy import TrainerPolicy
from stream_scorer.trainer.ports import TrainerPorts

__all__ = ["Trainer", "TrainerPolicy", "TrainerPorts"]
