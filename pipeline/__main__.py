"""Entry point of `capipe` and `python -m capipe.pipeline`."""

from __future__ import annotations

from .runners import interrupts


def main() -> None:
    """Run the command. Signals are handled from the start, although importing the commands takes seconds."""
    interrupts.begin()
    from .cli import main as command
    from .commands.run_job import Exit

    interrupts.raise_on_signals()
    try:
        command()
    except SystemExit as ended:
        if ended.code != Exit.INTERRUPTED:
            raise
        if interrupts.broke_off():
            interrupts.say(f"capipe: {interrupts.STOPPED}")
        raise SystemExit(interrupts.exit_code()) from None
    finally:
        interrupts.end()


if __name__ == "__main__":
    main()
