"""The table of row layouts: which columns make which layout, and columns that none may leave aside."""

from collections.abc import Mapping, Sequence

from lit_dpo.data.cells import Cells
from lit_dpo.data.layouts.base import QUESTION, SYSTEM, Answer, Answers, Layout
from lit_dpo.data.layouts.chosen import EXPLICIT, NAMED
from lit_dpo.data.layouts.labelled import LABELLED
from lit_dpo.data.layouts.ranked import RANKED
from lit_dpo.data.pair import LayoutError, names

__all__ = ["COLUMNS", "LAYOUTS", "Answer", "Answers", "Layout", "find_layout", "refuse_unused"]

LAYOUTS: tuple[Layout, ...] = (*EXPLICIT, *NAMED, *LABELLED, *RANKED)
"""The first one that fits a row reads it."""

PROMPT_LIKE = (
    *("prompt", "instruction", "input", "question", "query", "problem", "history", "context", "system"),
    *("system_prompt", "system_instruction", "messages", "conversations", "conversation", "contents", "tools"),
    *("dialogue", "images", "image", "videos", "audios"),
)
LABEL_LIKE = (
    *("label", "labels", "winner", "choice", "preference", "overall_preference", "preference_strength"),
    *("better_response_id", "safer_response_id", "rank", "ranking"),
)
COLUMNS = tuple(
    dict.fromkeys(
        [name for layout in LAYOUTS for name in (*layout.columns, *layout.aside)]
        + [*SYSTEM, "history", "input", "tools", "chat_template_kwargs"]
    )
)
"""Every column that some layout reads."""
_NEAREST = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))

_by_columns: dict[tuple[str, ...], list[Layout]] = {}


def find_layout(cells: Cells) -> Layout:
    """The layout of a row.

    Raises:
        LayoutError: No layout has these columns.
    """
    columns = tuple(cells.row)
    if columns not in _by_columns:
        if len(_by_columns) > 1000:  # of a file in which every row has columns of its own
            _by_columns.clear()
        _by_columns[columns] = [layout for layout in LAYOUTS if cells.has(*layout.columns)]
    for layout in _by_columns[columns]:
        if layout.fits(cells):
            return layout
    raise _unknown(cells.row, cells.where)


def refuse_unused(cells: Cells, layout: Layout, ignored: Sequence[str]) -> None:
    """Refuse a row with a column that changes its meaning and that nothing reads.

    Raises:
        RowError: A filled column belongs to the prompt, or says which answer is better, by its name.
    """
    for column, what in (*((c, "prompt") for c in PROMPT_LIKE), *((c, "label") for c in LABEL_LIKE)):
        if column in cells.row and cells.filled(column) and column not in {*cells.used, *layout.aside, *ignored}:
            remedy = (
                f"the layout `{layout.name}` does not read it: name it in `ignored_columns` if it is no part of the "
                f"{what}, or give a function in `rows` that says what it means"
            )
            raise cells.error(column, f"a column that reads like a {what} would be left out", remedy)


def _unknown(row: Mapping[str, object], where: str) -> LayoutError:
    """What to say of columns that fit no layout; never advice that leaves a label or a part of the prompt aside."""
    reason = f"the columns {names(row)} fit no known layout"
    if labels := [name for name in row if name.lower() in LABEL_LIKE]:
        remedy = (
            f"{names(labels)} seems to tell which answer is better: rename the columns by `columns` to those of a "
            "layout that reads such a label, or give a function in `rows`"
        )
        return LayoutError(where, None, reason, remedy)
    question = next((name for name in QUESTION[:-2] if name in row), None)
    nearest = (question, "chosen", "rejected") if question else max(_NEAREST, key=lambda n: sum(c in row for c in n))
    missing = [name for name in nearest if name not in row]
    mapping = ", ".join(f"{name}: {next((c for c in row if name in c), '...')}" for name in missing)
    remedy = f"the nearest has {names(nearest)}: add {names(missing)}, or set `columns: {{{mapping}}}`"
    if "prompt" in missing:
        remedy += " (`question` in the place of `prompt` where it is a turn, not text that the completions continue)"
    return LayoutError(where, None, reason, remedy)
