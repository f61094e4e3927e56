"""``python -m mimdet`` is the ``mimdet`` command."""

from .cli import main

if __name__ == "__main__":
    main()
