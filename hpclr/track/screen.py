"""A view that renews itself on a terminal."""

from rich.console import Console, RenderableType
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType

_A_SECOND = 4


def can_renew(console: Console) -> bool:
    """Whether it is a terminal on which lines can be written anew."""
    return console.is_terminal and not console.is_dumb_terminal


def live(view: RenderableType, console: Console, *, whole_screen: bool = False) -> Live:
    """Shows a view that changes; call `start` and `stop`.

    Args:
        view: rendered anew a few times a second, by another thread.
        console: where.
        whole_screen: on a screen of its own, which is gone afterwards.
    """
    size = console.size

    def renewed() -> RenderableType:
        """Lines that a narrower terminal has wrapped are more than are known of: they are wiped with all the rest."""
        nonlocal size
        if console.size != size:
            size = console.size
            console.control(Control(ControlType.HOME, ControlType.CLEAR))
        return view

    return Live(
        console=console,
        get_renderable=renewed,
        refresh_per_second=_A_SECOND,
        screen=whole_screen,
        vertical_overflow="crop",
    )
