"""The program: `capipe`, and `python -m capipe.pipeline`."""

from __future__ import annotations

from .runners import interrupts


def main() -> None:
    """Run the command. Signals are heard from the first line on, though the commands take seconds to import."""
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
