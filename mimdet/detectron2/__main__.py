"""``python -m mimdet.detectron2``."""

from .train import main

if __name__ == "__main__":
    main()
