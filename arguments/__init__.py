"""What the stage scripts share: the argument groups, each of which can build what its flags describe."""

from arguments.adapter import AdapterArguments
from arguments.base import adapter_config, adapter_folder, check_base
from arguments.command_line import UserError, parse_arguments, run_stage
from arguments.data import DataArguments
from arguments.encoding import LengthArguments, known_ids
from arguments.guards import GuardArguments
from arguments.loss import TokenLoss
from arguments.model import ModelArguments, keeps_apart
from arguments.order import SeededOrder
from arguments.precision import best_precision
from arguments.reward import RewardModel, RewardSourceArguments
from arguments.run import RunArguments
from arguments.stops import EndsOnce
from arguments.telemetry import LogLine

__all__ = [
    "AdapterArguments",
    "DataArguments",
    "EndsOnce",
    "GuardArguments",
    "LengthArguments",
    "LogLine",
    "ModelArguments",
    "RewardModel",
    "RewardSourceArguments",
    "RunArguments",
    "SeededOrder",
    "TokenLoss",
    "UserError",
    "adapter_config",
    "adapter_folder",
    "best_precision",
    "check_base",
    "keeps_apart",
    "known_ids",
    "parse_arguments",
    "run_stage",
]
