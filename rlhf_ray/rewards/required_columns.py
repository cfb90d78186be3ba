"""What reward sources and judges read of a row, required before they are asked.

Found by a source itself, the first row that lacks it would end the run, maybe days later.
"""

from collections.abc import Iterable

from rlhf_ray.config.rewards import RewardSourceConfig
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.reading.rows import Row, given_values
from rlhf_ray.rewards.functions import ground_truths
from rlhf_ray.rewards.judge import columns_in


def require_read_columns(sources: Iterable[RewardSourceConfig], fields: Row) -> None:
    """Require the columns that the sources read from every prompt, given by its fields.

    Raises:
        BadRow: one is missing or holds nothing.
    """
    for source in sources:
        reader = f"rewards: {source.name}"
        match source.type:
            case "rouge":
                if not given_values(fields.get(source.column)):
                    _refuse(source.column, reader)
            case "judge":
                require_columns(columns_in(source), fields, reader)
            case "function" if source.signature == "verl":
                if "ground_truth" not in ground_truths(fields):
                    _refuse("ground_truth", reader)


def require_columns(columns: Iterable[str], fields: Row, reader: str) -> None:
    """Require columns whose text is shown to a judge; an empty list has one.

    Raises:
        BadRow: one is missing or holds nothing.
    """
    for column in columns:
        value = fields.get(column)
        if value != [] and not given_values(value):
            _refuse(column, reader)


def _refuse(column: str, reader: str) -> None:
    raise BadRow(
        f"no_{column}",
        f"{reader} reads the column {column!r}, which rows lack or have empty; name another one "
        "there, or map it in the data set's columns",
    )
