"""Guards against reinforcement learning gone wrong: what is watched, and what happens then."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from arguments.answers import means
from arguments.atomic import append_lines
from arguments.command_line import expect

WINDOW = 5  # rollouts over which length, ends and correlation are averaged: one rollout is a small sample
ENDED = 20  # answers that ended at first: of fewer, a quarter by chance is not rare
STOPPING = ("not_finite", "kl", "repetition", "eos")


@dataclass
class GuardArguments:
    """Guards over the rollouts. Each number is a limit; 0 turns that guard off."""

    guards: str = field(
        default="stop",
        metadata={
            "help": "stop: KL, repetition, missing ends and numbers that are not finite stop the run, which keeps its "
            "last good policy; length and correlation only warn. warn: all only warn. off: none. Numbers that are not "
            "finite end the run with both, too.",
            "choices": ["stop", "warn", "off"],
        },
    )
    guard_kl: float = field(default=30.0, metadata={"help": "Highest KL to the reference, in nats per answer."})
    guard_repetition: float = field(
        default=0.3, metadata={"help": "Lowest mean distinct_2: the share of an answer's token bigrams that differ."}
    )
    guard_eos: float = field(
        default=0.25,
        metadata={"help": "Lowest share of answers that end, as a fraction of that in the first rollouts."},
    )
    guard_length: float = field(
        default=2.0, metadata={"help": "Largest factor by which the mean length may grow or shrink."}
    )
    guard_correlation: float = field(
        default=0.8, metadata={"help": "Highest correlation of reward and length, positive or negative."}
    )

    def __post_init__(self):
        self.fired: set[str] = set()
        shares = "guard_repetition", "guard_eos", "guard_correlation"
        expect(self, "a share from 0 (off) to 1", lambda x: 0 <= x <= 1, *shares)
        expect(self, "nats per answer, or 0 (off)", lambda x: x >= 0, "guard_kl")
        expect(self, "a factor of at least 1, or 0 (off)", lambda x: x == 0 or x >= 1, "guard_length")

    def alarms(self, history: list[dict[str, float]], answers: int) -> dict[str, str]:
        """The guards that the last rollout sets off, with the reason.

        `history` holds the mean kl, length, eos_rate, distinct_2 and reward_length of every rollout so far, of that
        many `answers` each.
        """
        now = history[-1]
        if not all(map(math.isfinite, now.values())):
            return {"not_finite": f"a reward or log-probability is not finite: {now}"}
        first, last = means(history[:WINDOW]), means(history[-WINDOW:])
        settled, growth, found = len(history) > WINDOW, last["length"] / first["length"], {}
        if 0 < self.guard_kl < now["kl"]:
            found["kl"] = f"the KL to the reference is {now['kl']:.1f} nats an answer, over --guard_kl {self.guard_kl}"
        if now["distinct_2"] < self.guard_repetition:
            share = f"{now['distinct_2']:.2f} of an answer's bigrams are different"
            found["repetition"] = f"{share}, under --guard_repetition {self.guard_repetition}"
        enough = first["eos_rate"] * WINDOW * answers >= ENDED
        if settled and enough and last["eos_rate"] < self.guard_eos * first["eos_rate"]:
            shares = f"{first['eos_rate']:.2f} of the answers ended at first and {last['eos_rate']:.2f} do now"
            found["eos"] = f"{shares}, less than --guard_eos {self.guard_eos} of it"
        if settled and self.guard_length and not 1 / self.guard_length <= growth <= self.guard_length:
            lengths = f"answers had {first['length']:.0f} tokens at first and have {last['length']:.0f} now"
            found["length"] = f"{lengths}, further apart than --guard_length {self.guard_length} allows"
        if len(history) >= WINDOW and 0 < self.guard_correlation < abs(last["reward_length"]):
            found["correlation"] = (
                f"reward and length correlate by {last['reward_length']:.2f}, over --guard_correlation "
                f"{self.guard_correlation}: the reward may be paid for length"
            )
        return found

    def stop_for(self, found: dict[str, str], step: int, output_dir: str) -> bool:
        """Log what fired, once each, also to output_dir/guards.jsonl; True when the run is to stop."""
        if self.guards == "off":
            return False
        stopping = [guard for guard in found if guard in STOPPING and self.guards == "stop"]
        for guard in [guard for guard in found if guard not in self.fired]:
            ends, then = guard in stopping, "" if stopping else "; going on"
            logger.warning(f"Guard {guard}: {found[guard]}" + ("; stopping, last good policy kept" if ends else then))
            if os.environ.get("RANK", "0") == "0":
                row = {"step": step, "guard": guard, "reason": found[guard], "stopped": ends}
                path = Path(output_dir) / "guards.jsonl"
                if not (path.exists() and json.dumps(row, ensure_ascii=False) in path.read_text("utf-8")):
                    append_lines(path, [row])  # a resumed run meets a guard again
        self.fired |= set(found)
        return bool(stopping)
